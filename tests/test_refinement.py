"""Refinement: gradients through the steps against loops written by hand, optima against closed forms."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from models import LinearGaussian, counts, topics
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    GradientAscent,
    IterativeAmortizedGuide,
    LearnedUpdate,
    NaturalGradient,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
    UpdateRule,
    VariationalFamily,
    estimate_gaps,
)
from pyro_amortized.graphs import GraphCache
from pyro_amortized.inference import InferenceStrategy, Refined
from pyro_amortized.objective import LocalLogJoint, LocalObjective
from pyro_amortized.structure import StructureCache

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal"]
GRADIENTS = ["unrolled", "first_order", "initial", "distill"]
ESTIMATORS = ["stl", "plain", "analytic_kl"]
RULES: dict[str, Callable[[], UpdateRule]] = {
    "ascent": lambda: GradientAscent(0.1, 0.5),
    "adam": lambda: Adam(0.1, (0.8, 0.95)),
    "natural": lambda: NaturalGradient(0.5, max_shift=100.0, max_log_ratio=100.0),
}
POINTS, LATENTS, PIXELS, STEPS = 4, 2, 5, 3


class VAE(nn.Module):
    """Binary pixels behind a decoder with curvature."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, PIXELS))
        for parameter in self.decoder.parameters():
            parameter.data.mul_(2.0)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        logits = self.decoder(z)
        return (x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(-1)


def pixels(size: int = POINTS) -> Tensor:
    return torch.rand(size, PIXELS, generator=torch.Generator().manual_seed(2)).round()


def small_encoder() -> nn.Module:
    torch.manual_seed(12)
    return nn.Sequential(nn.Linear(PIXELS, 4), nn.Tanh())


def svi(model: Any, guide: Any, elbo: Any = None, lr: float = 0.01) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The noise of every step, in order, as the objective gave it out."""
    given: list[Any] = []
    original = LocalObjective.noise

    def recording(self: LocalObjective, phi: Tensor, num_particles: int) -> Any:
        given.append(original(self, phi, num_particles))
        return given[-1]

    monkeypatch.setattr(LocalObjective, "noise", recording)
    return given


# The same in plain torch


def gradient_by_hand(vae: VAE, x: Tensor, phi: Tensor, noise: Tensor, estimator: str) -> Tensor:
    """The gradient of the ELBO in phi = (loc, log scale), by the score of the model at each draw."""
    loc, log_scale = phi.chunk(2, -1)
    scale = log_scale.exp()
    z = loc + scale * noise
    z = z if z.requires_grad else z.requires_grad_()
    with torch.enable_grad():
        density = vae.log_likelihood(x, z) - (0 if estimator == "analytic_kl" else 0.5 * z.square().sum(-1))
        (score,) = torch.autograd.grad(density.sum(), z, create_graph=True)
    if estimator == "stl":
        score = score + noise / scale
    loc_grad, scale_grad = score.mean(0), (score * noise * scale).mean(0)
    if estimator == "plain":
        scale_grad = scale_grad + 1
    if estimator == "analytic_kl":
        loc_grad, scale_grad = loc_grad - loc, scale_grad + 1 - scale.square()
    return torch.cat([loc_grad, scale_grad], -1)


def climb_by_hand(vae: VAE, x: Tensor, phi: Tensor, noises: list[Any], rule: str, estimator: str = "stl") -> Tensor:
    """Steps of the rules in ``RULES``."""
    velocity, first, second = 0.0, 0.0, 0.0
    for step, noise in enumerate(noises, 1):
        g = gradient_by_hand(vae, x, phi, noise, estimator)
        if rule == "ascent":
            velocity = 0.5 * velocity + g
            phi = phi + 0.1 * velocity
        elif rule == "adam":
            first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g * g
            phi = phi + 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        else:
            dim = phi.shape[1] // 2
            variance = (2 * phi[:, dim:]).exp()
            phi = phi + torch.cat([0.5 * variance * g[:, :dim], 0.25 * g[:, dim:]], -1)
    return phi


def loss_by_hand(vae: VAE, x: Tensor, phi: Tensor, z: Tensor) -> Tensor:
    """The negative ELBO from the draw z of q_phi, differentiable through its location and scale."""
    loc, log_scale = phi.chunk(2, -1)
    noise = ((z - loc) / log_scale.exp()).detach()
    z = loc + log_scale.exp() * noise
    log_joint = vae.log_likelihood(x, z) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    return (dist.Normal(loc, log_scale.exp()).log_prob(z).sum(-1) - log_joint).sum()


def loss_and_draw(model: Any, guide: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """Trace_ELBO's differentiable loss, and the draw z that it used."""
    draws: list[Tensor] = []

    def spied(*args: Any) -> None:
        draws.append(guide(*args)["z"].detach())

    return Trace_ELBO().differentiable_loss(model, spied, *args), draws[-1]


def semi_amortized(vae: VAE, x: Tensor, **options: Any) -> Any:
    """A guide with a small encoder, set up; it returns the last phi, as in training."""
    options = {"num_steps": STEPS, "keep_best": False, **options}
    guide = SemiAmortizedGuide(vae, small_encoder(), **options)
    guide.setup(x)
    return guide


def start_by_hand(guide: Any, x: Tensor) -> Tensor:
    start = guide.inference.initial
    return start.head(start.encoder(x))


def relative_error(actual: Any, expected: Any) -> float:
    """The largest over tensors."""
    return max(((a - e).norm() / e.norm().clamp(min=1e-12)).item() for a, e in zip(actual, expected, strict=True))


def gradients(loss: Tensor, *modules: Any) -> tuple[Tensor, ...]:
    parameters = [p for module in modules for p in nn.Module.parameters(module)]
    return torch.autograd.grad(loss, parameters, retain_graph=True)


# 1. Exact gradients through the steps.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", RULES)
def test_unrolled_gradients_equal_a_loop_by_hand(rule: str, estimator: str, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, update=RULES[rule](), estimator=estimator, num_particles=3)
    torch.manual_seed(1)
    noises.clear()
    phi = guide.variational_parameters(x)
    by_hand = climb_by_hand(vae, x, start_by_hand(guide, x), noises, rule, estimator)
    assert len(noises) == STEPS
    assert relative_error([phi], [by_hand]) < 1e-9
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    by_hand = climb_by_hand(vae, x, start_by_hand(guide, x), noises, rule, estimator)
    expected = loss_by_hand(vae, x, by_hand, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    actual = gradients(loss, guide, vae)
    assert len(actual) == 8  # two layers each
    assert relative_error(actual, gradients(expected, guide, vae)) < 1e-6


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("rule", RULES)
def test_first_order_gradients_are_others_than_those_of_the_loop(rule: str, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, update=RULES[rule](), encoder_gradient="first_order")
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    expected = loss_by_hand(vae, x, climb_by_hand(vae, x, start_by_hand(guide, x), noises, rule), z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert relative_error(gradients(loss, guide), gradients(expected, guide)) > 0.02
    assert relative_error(gradients(loss, vae), gradients(expected, vae)) > 1e-3


@pytest.mark.usefixtures("_float64")
def test_gradients_of_another_estimator_are_others(noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, update=RULES["natural"](), estimator="plain")
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    wrong = loss_by_hand(vae, x, climb_by_hand(vae, x, start_by_hand(guide, x), noises, "natural", "stl"), z)
    assert relative_error(gradients(loss, guide, vae), gradients(wrong, guide, vae)) > 1e-3


class Given(InferenceStrategy):
    """Starts where it is told."""

    needs_inputs = False

    def __init__(self, phi: Tensor) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, inputs: Any, index: Any, objective: Any = None) -> Tensor:
        return self.phi


def objective_of(model: Any, x: Tensor, family: VariationalFamily, **options: Any) -> LocalObjective:
    structure = StructureCache().find(model, (x,), {}, observed=False)
    return LocalObjective(LocalLogJoint(model, (x,), {}, structure, {}), family, **options)


def starts(size: int, num_params: int) -> Tensor:
    return 0.3 * torch.randn(size, num_params, generator=torch.Generator().manual_seed(4))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", RULES)
def test_refined_phi_passes_gradcheck(rule: str, estimator: str, traced: bool) -> None:
    vae, x = VAE(), pixels(2)
    objective = objective_of(vae, x, Normal(LATENTS), estimator=estimator, graphs=GraphCache() if traced else None)
    bias = vae.decoder[0].bias

    def refined(phi: Tensor, shift: Tensor) -> Tensor:
        bias.data.add_(shift)  # the finite difference; the derivative is that of the bias
        result = Refined(Given(phi), RULES[rule](), STEPS, num_particles=2, fixed_noise=True)((), None, objective)
        bias.data.sub_(shift)
        return result

    phi = starts(2, 2 * LATENTS).requires_grad_()
    assert torch.autograd.gradcheck(lambda phi: refined(phi, torch.zeros_like(bias)), phi)
    weights = starts(2, 2 * LATENTS)
    (slope,) = torch.autograd.grad((refined(phi, torch.zeros_like(bias)) * weights).sum(), bias)
    for i in range(len(bias)):
        shift = 1e-6 * F.one_hot(torch.tensor(i), len(bias)).to(bias)
        difference = (refined(phi, shift) - refined(phi, -shift)).detach()
        assert slope[i].item() == pytest.approx((difference * weights).sum().item() / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_refined_phi_of_other_families_passes_gradcheck(family: str) -> None:
    vae, x = VAE(), pixels(2)
    guide = AmortizedGuide(vae, family=family)
    guide.setup(x)
    objective = objective_of(vae, x, guide.family)
    start = guide.variational_parameters(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda phi: Refined(Given(phi), Adam(0.05), 2, fixed_noise=True)((), None, objective), start
    )


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("Rule", [GradientAscent, Adam, NaturalGradient])
def test_learned_step_size_gets_the_gradient_through_the_steps(Rule: Any) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, update=Rule(0.1, learned=True), fixed_noise=True)
    parameter = guide.inference.update.log_step_size
    weights = starts(POINTS, 2 * LATENTS)

    def value() -> Tensor:
        return (guide.variational_parameters(x) * weights).sum()

    (slope,) = torch.autograd.grad(value(), parameter)
    values = []
    for shift in (1e-5, -2e-5):
        parameter.data.add_(shift)
        values.append(value().item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.fixture
def gradient_runs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """As long as the number of gradients that have been evaluated."""
    runs: list[None] = []
    original = LocalObjective.gradient

    def counted(self: LocalObjective, phi: Tensor, noise: Any) -> Tensor:
        runs.append(None)
        return original(self, phi, noise)

    monkeypatch.setattr(LocalObjective, "gradient", counted)
    return runs


def loss_and_gradients(guide: Any, vae: VAE, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    loss = Trace_ELBO().differentiable_loss(vae, guide, x)
    return [loss, *gradients(loss, guide, vae)]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rule", RULES)
def test_checkpoint_changes_neither_loss_nor_gradients(rule: str, dropout: float) -> None:
    vae, x = VAE(dropout), pixels()
    kept = semi_amortized(vae, x, update=RULES[rule](), name="kept")
    recomputed = semi_amortized(vae, x, update=RULES[rule](), name="recomputed", checkpoint=True)
    for seed in range(3):
        expected = loss_and_gradients(kept, vae, x, seed)
        assert relative_error(loss_and_gradients(recomputed, vae, x, seed), expected) < 1e-9
        assert relative_error(loss_and_gradients(recomputed, vae, x, seed + 100), expected) > 1e-3


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpoint_runs_every_step_once_more_in_the_backward_pass(dropout: float, gradient_runs: list[None]) -> None:
    vae, x = VAE(dropout), pixels()
    guide = semi_amortized(vae, x)
    loss_and_gradients(guide, vae, x, 0)
    for checkpoint in (False, True):
        guide.inference.checkpoint = checkpoint
        gradient_runs.clear()
        loss = Trace_ELBO().differentiable_loss(vae, guide, x)
        assert len(gradient_runs) == STEPS
        loss.backward()
        assert len(gradient_runs) == STEPS * (1 + checkpoint)


# 2. The other ways to train the encoder.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", GRADIENTS[1:])
def test_encoder_gradient_equals_its_definition(kind: str, rule: str, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, update=RULES[rule](), encoder_gradient=kind, num_particles=2)
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    start = start_by_hand(guide, x)
    refined = climb_by_hand(vae, x, start.detach(), noises, rule).detach().requires_grad_()
    expected = loss_by_hand(vae, x, refined, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (at_refined,) = torch.autograd.grad(expected, refined, retain_graph=True)
    at_start = -gradient_by_hand(vae, x, start.detach(), noises[0], "stl").detach()
    (loc, log_scale), (goal, log_goal) = start.chunk(2, -1), refined.detach().chunk(2, -1)
    kl = log_goal - log_scale + 0.5 * ((2 * log_scale).exp() + (loc - goal).square()) * (-2 * log_goal).exp() - 0.5
    encoder_losses = {
        "first_order": (start * at_refined).sum(),
        "initial": (start * at_start).sum(),
        "distill": kl.sum(),
    }
    actual = gradients(loss, guide)
    for name, encoder_loss in encoder_losses.items():
        error = relative_error(actual, gradients(encoder_loss, guide))
        assert error < 1e-9 if name == kind else error > 1e-2
    assert relative_error(gradients(loss, vae), gradients(expected, vae)) < 1e-9


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", GRADIENTS)
def test_signal_adds_exactly_zero_to_the_loss(kind: str) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, encoder_gradient=kind)
    nodes: Any = poutine.trace(guide).get_trace(x).nodes
    signals = [site for name, site in nodes.items() if name.endswith("_signal")]
    assert len(signals) == (kind in ("initial", "distill"))
    for site in signals:
        assert torch.equal(site["fn"].log_factor, torch.zeros(POINTS))
        assert site["fn"].log_factor.requires_grad


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["initial", "distill"])
def test_encoder_gradient_is_the_same_under_every_elbo_and_number_of_particles(kind: str) -> None:
    """It comes from the signal alone, which must be weighed once for each draw, plate and particle."""
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, encoder_gradient=kind, fixed_noise=True)
    reference = gradients(Trace_ELBO().differentiable_loss(vae, guide, x), guide)
    for Elbo in (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO):
        for vectorized in (False, True):
            elbo: Any = Elbo(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
            guide.zero_grad()
            elbo.loss_and_grads(vae, guide, x)
            assert relative_error([p.grad for p in guide.parameters()], reference) < 1e-9, (Elbo, vectorized)
