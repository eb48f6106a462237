"""Refinement: gradients through the steps against loops written by hand, optima against closed forms."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from itertools import product
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
    JitTrace_ELBO,
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
    Newton,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
    UpdateRule,
    VariationalFamily,
    estimate_gaps,
)
from pyro_amortized.graphs import cache
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import Refined
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.updates.base import Curvature

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal"]
OTHERS = ["first_order", "initial", "distill"]
GRADIENTS = ["unrolled", *OTHERS, "anchored"]
ESTIMATORS = ["stl", "plain", "analytic_kl"]
RULES: dict[str, Callable[[], UpdateRule]] = {
    "ascent": lambda: GradientAscent(0.1, 0.5),
    "adam": lambda: Adam(0.1, (0.8, 0.95)),
    "natural": lambda: NaturalGradient(0.5, max_shift=100.0, max_log_ratio=100.0),
}
POINTS, LATENTS, PIXELS, STEPS = 4, 2, 5, 3


def some_slow(fast: list[Any], *axes: list[Any]) -> list[Any]:
    """The product of some axes, all but the combinations in ``fast`` marked as slow."""
    combinations = product(*axes) if len(axes) > 1 else [(value,) for value in axes[0]]
    fast = [values if isinstance(values, tuple) else (values,) for values in fast]
    return [pytest.param(*values, marks=() if values in fast else pytest.mark.slow) for values in combinations]


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

    def recording(self: LocalObjective, phi: Tensor, num_particles: int, whiten: bool = False) -> Any:
        given.append(original(self, phi, num_particles, whiten))
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


def curvature_by_hand(vae: VAE, x: Tensor, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and curvature in units of q, by least squares on the draws and as many times zero as the ridge counts."""
    loc, log_scale = phi.chunk(2, -1)
    z = loc + log_scale.exp() * noise
    z = z if z.requires_grad else z.requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(
            (vae.log_likelihood(x, z) - 0.5 * z.square().sum(-1)).sum(), z, create_graph=True
        )
    residual = score * log_scale.exp() + noise
    slopes, curvatures = [], []
    for n in range(len(x)):
        draws, values = noise[:, n], residual[:, n]
        draws_mean, values_mean = draws.mean(0), values.mean(0)
        draws, values = draws - draws_mean, values - values_mean
        hat = draws @ torch.linalg.inv(draws.T @ draws + 3.0 * torch.eye(LATENTS)) @ draws.T
        left_out = (values - hat @ values) / (1 - hat.diagonal() - 1 / len(draws)).clamp(min=0.05).unsqueeze(-1)
        count = 3.0 * (left_out.square().sum() / values.square().sum()).clamp(0.01, 1.0)
        design = torch.cat([draws, count.sqrt() * torch.eye(LATENTS)])
        target = torch.cat([values, torch.zeros(LATENTS, LATENTS)])
        excess = -torch.linalg.lstsq(design, target).solution
        excess = (excess + excess.T) / 2
        slopes.append(values_mean + excess @ draws_mean)
        curvatures.append(torch.eye(LATENTS) + excess)
    return torch.stack(slopes), torch.stack(curvatures)


def newton_by_hand(vae: VAE, x: Tensor, phi: Tensor, noises: list[Any], step_size: float) -> Tensor:
    """Newton steps without limits."""
    for noise in noises:
        slope, curvature = curvature_by_hand(vae, x, phi, noise)
        assert (torch.linalg.eigvalsh(curvature) > 0.05).all()  # nothing is damped
        loc, log_scale = phi.chunk(2, -1)
        shift = step_size * torch.linalg.solve(curvature, slope)
        precision = 1 + step_size * (curvature.diagonal(dim1=-2, dim2=-1) - 1)
        phi = torch.cat([loc + log_scale.exp() * shift, log_scale - 0.5 * precision.log()], -1)
    return phi


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
@pytest.mark.parametrize(
    ("rule", "estimator"),
    some_slow([*product(RULES, ["stl"]), ("natural", "plain"), ("natural", "analytic_kl")], list(RULES), ESTIMATORS),
)
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
@pytest.mark.parametrize(("num_particles", "checkpoint"), [(3, False), (4, False), (4, True)])
def test_unrolled_newton_steps_equal_a_loop_by_hand(num_particles: int, checkpoint: bool, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    update = Newton(0.7, max_shift=100.0, max_log_ratio=100.0)
    guide = semi_amortized(vae, x, update=update, num_particles=num_particles, checkpoint=checkpoint)
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    phi = newton_by_hand(vae, x, start_by_hand(guide, x), noises[:STEPS], 0.7)
    expected = loss_by_hand(vae, x, phi, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    actual = gradients(loss, guide, vae)
    assert relative_error(actual, gradients(expected, guide, vae)) < 1e-6
    others = loss_by_hand(vae, x, newton_by_hand(vae, x, start_by_hand(guide, x), noises[:STEPS], 0.5), z)
    assert relative_error(actual, gradients(others, guide, vae)) > 1e-3


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("rule", some_slow(["natural"], list(RULES)))
def test_first_order_gradients_are_others_than_those_of_the_loop(rule: str, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, update=RULES[rule](), encoder_gradient="first_order")
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    expected = loss_by_hand(vae, x, climb_by_hand(vae, x, start_by_hand(guide, x), noises, rule), z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert relative_error(gradients(loss, guide), gradients(expected, guide)) > 1e-3
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
    structure = StructureReader().read(model, (x,), {})
    return LocalObjective(LocalLogJoint(ModelCall(model, (x,), {}, structure)), family, **options)


def starts(size: int, num_params: int) -> Tensor:
    return 0.3 * torch.randn(size, num_params, generator=torch.Generator().manual_seed(4))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("rule", "estimator", "traced"),
    some_slow(
        [("ascent", "plain", True), ("adam", "stl", True), ("natural", "analytic_kl", True), ("natural", "stl", False)],
        list(RULES),
        ESTIMATORS,
        [False, True],
    ),
)
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
@pytest.mark.parametrize("Rule", some_slow([NaturalGradient], [GradientAscent, Adam, NaturalGradient]))
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
@pytest.mark.parametrize(("rule", "dropout"), some_slow([("natural", 0.0), ("adam", 0.5)], list(RULES), [0.0, 0.5]))
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
    guide = semi_amortized(vae, x, num_particles=1)
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
@pytest.mark.parametrize(
    ("kind", "rule"),
    some_slow([*product(OTHERS, ["natural"]), ("distill", "adam")], OTHERS, list(RULES)),
)
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
    assert len(signals) == (kind in ("initial", "distill", "anchored"))
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


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_anchored_gradients_are_those_of_the_steps_and_of_the_start(checkpoint: bool, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(
        vae, x, update=RULES["natural"](), encoder_gradient="anchored", num_particles=3, checkpoint=checkpoint
    )
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    start = start_by_hand(guide, x)
    expected = loss_by_hand(vae, x, climb_by_hand(vae, x, start, noises[:STEPS], "natural"), z)
    at_start = -gradient_by_hand(vae, x, start.detach(), noises[0], "stl").detach()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    actual = gradients(loss, guide, vae)
    both = expected + (start * at_start).sum() - (start.detach() * at_start).sum()
    assert relative_error(actual, gradients(both, guide, vae)) < 1e-6
    assert relative_error(actual, gradients(expected, guide, vae)) > 1e-2


def test_the_default_gradient_is_anchored_but_for_rules_of_the_users_own() -> None:
    vae, x = VAE(), pixels()
    kinds = {}
    for name, options in (("default", {}), ("own", {"update": NaturalGradient(0.3)})):
        guide = SemiAmortizedGuide(vae, small_encoder(), name=name, **options)
        guide.setup(x)
        kinds[name] = guide.inference.encoder_gradient, guide.inference.num_particles
    assert kinds == {"default": ("anchored", 8), "own": ("unrolled", 8)}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", GRADIENTS[:3])
def test_encoder_gradient_is_that_of_the_start_without_steps(kind: str) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, encoder_gradient=kind, num_steps=0)
    loss, z = loss_and_draw(vae, guide, x)
    expected = loss_by_hand(vae, x, start_by_hand(guide, x), z)
    assert relative_error(gradients(loss, guide, vae), gradients(expected, guide, vae)) < 1e-9


# 3. The learned rule.


def iterative(vae: Any, x: Tensor, **options: Any) -> Any:
    torch.manual_seed(13)
    options = {"num_steps": STEPS, "keep_best": False, "update": LearnedUpdate((8,)), **options}
    guide = IterativeAmortizedGuide(vae, small_encoder() if isinstance(vae, VAE) else None, **options)
    guide.setup(x)
    return guide


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("initial", ["prior", "encoder"])
def test_every_learned_step_is_trained_by_the_elbo_that_it_leads_to(
    initial: str, num_particles: int, noises: list[Any]
) -> None:
    vae, x = VAE(), pixels()
    guide = iterative(vae, x, initial=initial, num_particles=num_particles)
    noises.clear()
    loss, z = loss_and_draw(vae, guide, x)
    rule, features = guide.inference.update, guide.inference.features(x)
    phi = torch.zeros(POINTS, 2 * LATENTS) if initial == "prior" else start_by_hand(guide, x)
    assert len(noises) == STEPS
    encoder_loss = torch.zeros(())
    for noise in noises:
        g = gradient_by_hand(vae, x, phi.detach(), noise, "stl").detach()
        encoder_loss = encoder_loss - (g * phi).sum()
        state, phi = rule.init(phi, features), phi.detach()
        if num_particles == 1:
            phi = rule.update(phi, g, state)[0]
        else:
            slope, curvature = (part.detach() for part in curvature_by_hand(vae, x, phi, noise))
            phi = rule.update(phi, Curvature(g, slope, curvature, Normal(LATENTS)), state)[0]
    last = loss_by_hand(vae, x, phi, z)
    assert loss.item() == pytest.approx(last.item(), rel=1e-9)
    expected = gradients(encoder_loss + last, guide)
    assert len(expected) == (8 if initial == "prior" else 10)  # the rule, the features, and a head if there is a start
    assert relative_error(gradients(loss, guide), expected) < 1e-9
    assert relative_error(gradients(loss, vae), gradients(last, vae)) < 1e-9
    only_last = torch.autograd.grad(last, list(rule.parameters()))
    assert relative_error(torch.autograd.grad(loss, list(rule.parameters())), only_last) > 1e-2


def exact_elbo(linear: LinearGaussian, x: Tensor, guide: Any, phi: Tensor) -> Tensor:
    """log p(x) - KL(q || p(z|x)), per datapoint, in closed form."""
    return linear.log_evidence(x) - kl_from_posterior(linear, x, guide, phi)


def kl_from_posterior(linear: LinearGaussian, x: Tensor, guide: Any, phi: Tensor) -> Tensor:
    q = guide.family(phi)
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    return kl_divergence(dist.MultivariateNormal(q.mean, covariance), linear.posterior(x)).detach()


@pytest.mark.usefixtures("_float64")
def test_more_learned_steps_than_in_training_do_no_harm() -> None:
    linear = LinearGaussian.random_weights()
    x, unseen = linear.simulate(64), linear.simulate(32, seed=8)
    guide = IterativeAmortizedGuide(linear.full, num_steps=3, update=LearnedUpdate((32,)), keep_best=False)
    steps = svi(linear.full, guide, lr=0.005)
    for _ in range(200):
        steps.step(x)
    elbos = {}
    with torch.no_grad():
        for count in (0, 3, 10, 50):
            guide.num_steps = count
            elbos[count] = exact_elbo(linear, unseen, guide, guide.variational_parameters(unseen)).mean().item()
    assert elbos[3] > elbos[0] + 1.0
    assert min(elbos[10], elbos[50]) > elbos[3] - 0.05
    best = linear.log_evidence(unseen).mean().item() - mean_field_gap(linear)
    assert best - elbos[10] < 0.3


# 4. Where refinement leads.


def mean_field_gap(linear: LinearGaussian) -> float:
    """The least KL divergence of a mean-field normal from the posterior."""
    precision = torch.linalg.inv(linear.posterior(torch.zeros(1, len(linear.weights))).covariance_matrix[0])
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("estimator", some_slow(["stl"], ESTIMATORS))
def test_refinement_converges_to_the_mean_field_optimum(estimator: str) -> None:
    """Means are exact, as the noise is antithetic; four standard errors for the noise in the last log scales.

    The gradient of a log scale is the mean of K draws with a standard deviation s, below 2 (sqrt(2) for its own
    quadratic part); steps of 0.25 times it contract by a half, so that the error's deviation is 0.29 s / sqrt(K).
    """
    linear, draws = LinearGaussian.random_weights(), 4000
    x = linear.simulate(5)
    guide = SemiAmortizedGuide(
        linear.full, num_steps=80, initial="prior", num_particles=draws, estimator=estimator, keep_best=False
    )
    with torch.no_grad():
        loc, log_scale = guide.variational_parameters(x).chunk(2, -1)
    posterior = linear.posterior(x)
    optimum = -0.5 * torch.linalg.inv(posterior.covariance_matrix).diagonal(dim1=-2, dim2=-1).log()
    tolerance = 4 * 0.29 * 2 / draws**0.5
    torch.testing.assert_close(loc, posterior.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_scale, optimum, rtol=0, atol=tolerance)
    assert (log_scale - posterior.stddev.log()).abs().max() > 3 * tolerance  # the posterior's own are others


def guide_of_kind(kind: str, model: Any, family: str, **options: Any) -> Any:
    kinds: dict[str, Callable[..., Any]] = {
        "amortized": AmortizedGuide,
        "per_datapoint": PerDatapointGuide,
        "semi_amortized": lambda model, **o: SemiAmortizedGuide(model, num_steps=1, **o),
        "iterative": lambda model, **o: IterativeAmortizedGuide(model, num_steps=1, update=LearnedUpdate((8,)), **o),
    }
    return kinds[kind](model, family=family, **options)


KINDS = ["amortized", "per_datapoint", "semi_amortized", "iterative"]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("kind", "family"),
    some_slow([("iterative", "normal"), ("per_datapoint", "multivariate_normal")], KINDS, FAMILIES),
)
def test_every_guide_can_be_refined_to_its_familys_optimum(kind: str, family: str) -> None:
    """Tolerance: what the last steps wander by on 128 draws; Newton's, less. The start is far from that."""
    linear = LinearGaussian.random_weights()
    x = linear.simulate(5)
    guide = guide_of_kind(kind, linear.full, family)
    guide.setup(x)
    steps, update = (40, None) if family == "normal" else (150, Adam(0.1))
    refined = guide.refined(steps, update, num_particles=128)
    assert isinstance(refined, SemiAmortizedGuide)
    with torch.no_grad():
        optimum = mean_field_gap(linear) if family == "normal" else 0.0
        before, after = (kl_from_posterior(linear, x, g, g.variational_parameters(x)) for g in (guide, refined))
    tolerance = 0.03 if family == "normal" else 0.1
    assert (after - optimum).max() < tolerance
    assert (after - optimum).min() > -1e-6
    assert (before - optimum).min() > 3 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_refined_guide_shares_parameters_and_leaves_the_guide_alone(kind: str) -> None:
    x = counts(6)
    options = {"fixed_noise": True} if kind in KINDS[2:] else {}
    guide = guide_of_kind(kind, topics, "normal", init_scale=0.3, **options)
    steps = svi(topics, guide)
    steps.step(x)
    refined = guide.refined(3, Adam(0.05), fixed_noise=True, num_particles=2)
    assert not refined.training
    assert not refined.inference.training
    assert all(module.training for module in guide.modules())
    assert {id(p) for p in refined.parameters()} == {id(p) for p in guide.parameters()}
    before = refined.median(x)
    assert before.keys() == {"rate", "size", "share"}
    assert torch.equal(before["rate"], guide.median(x)["rate"])
    assert not torch.equal(before["size"], guide.median(x)["size"])
    assert torch.equal(before["size"], refined.median(x)["size"])
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()
    assert not torch.equal(before["size"], refined.median(x)["size"])
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert torch.tensor(elbo.loss(topics, refined, x)).isfinite()
    again = guide.refined(3, Adam(0.05), fixed_noise=True, num_particles=2)
    assert torch.equal(again.median(x)["size"], refined.median(x)["size"])


def test_refined_guide_shows_an_encoder_of_ones_own_no_masks() -> None:
    """Only the default encoder sees which observed values are masked, refined or not."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 0), obs=x)

    class Encoder(nn.Module):
        def forward(self, *inputs):
            assert len(inputs) == 1
            return inputs[0].unsqueeze(-1)

    x = torch.randn(5)
    guide = AmortizedGuide(model, Encoder())
    guide.setup(x)
    assert guide.refined(1).median(x)["z"].shape == (5,)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_refined_guide_with_fixed_noise_can_be_repeated_whatever_it_refines(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = guide_of_kind(kind, linear.full, "normal")
    guide.setup(x)
    refined = guide.refined(1, fixed_noise=True, num_particles=2)
    assert torch.equal(refined.variational_parameters(x), refined.variational_parameters(x))


def test_refined_guide_can_be_trained() -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(8)
    guide = AmortizedGuide(linear.full)
    svi(linear.full, guide).step(x)
    refined = guide.refined(3, fixed_noise=True, num_particles=2)
    pyro.clear_param_store()
    before = refined.variational_parameters(x).detach()
    steps = svi(linear.full, refined)
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()
    assert not torch.equal(before, refined.variational_parameters(x))


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_keep_best_never_lowers_the_elbo_even_by_steps_that_diverge() -> None:
    """Judged by 512 draws that all candidates share: a tenth of a nat is lost by chance at most."""
    linear = LinearGaussian.random_weights()
    x = linear.simulate(10)
    guide = AmortizedGuide(linear.full)
    guide.setup(x)
    gains = {}
    with torch.no_grad():
        start = exact_elbo(linear, x, guide, guide.variational_parameters(x))
        for name, rule, keep_best in (
            ("diverging", GradientAscent(10.0), True),
            ("converging", NaturalGradient(), True),
            ("not kept", GradientAscent(0.5, 0.0), False),
        ):
            options = {"keep_best": keep_best, "fixed_noise": True, "num_particles": 512}
            refined = guide.refined(3 if name == "not kept" else 10, rule, **options)
            gains[name] = exact_elbo(linear, x, guide, refined.variational_parameters(x)) - start
    assert gains["diverging"].min() > -0.1
    assert gains["converging"].min() > -0.1
    assert gains["converging"].mean() > 1.0
    assert gains["not kept"].min() < -10.0


@pytest.mark.parametrize("kind", GRADIENTS)
def test_divergence_in_training_names_the_datapoints(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = SemiAmortizedGuide(
        linear.full, num_steps=30, update=GradientAscent(10.0), encoder_gradient=kind, init_scale=1.0
    )
    guide.setup(x)
    with pytest.raises(ValueError, match=r"latents of 4 datapoints \(first: \[0, 1, 2, 3\]\).*refinement has diverged"):
        svi(linear.full, guide).step(x)
    assert torch.tensor(svi(linear.full, guide).evaluate_loss(x)).isfinite()  # without gradients the best is kept
    guide.eval()
    assert guide.variational_parameters(x).isfinite().all()


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(["unrolled", "distill"], GRADIENTS))
def test_keep_best_is_for_outside_training(kind: str, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, encoder_gradient=kind, keep_best=None)
    assert guide.inference.keep_best is None
    for training, keep_best, enabled in product((True, False), (None, True, False), (True, False)):
        guide.train(training)
        guide.inference.keep_best = keep_best
        noises.clear()
        with torch.set_grad_enabled(enabled):
            guide.variational_parameters(x)
        keeps = not (training and enabled) if keep_best is None else keep_best
        assert len(noises) == STEPS + keeps, (keep_best, training, enabled)  # one more to compare by


# 5. Batches, noise and scales.


def refining_guide(kind: str, model: Any, **options: Any) -> Any:
    if kind == "iterative":
        return IterativeAmortizedGuide(model, update=LearnedUpdate((8,)), **options)
    return SemiAmortizedGuide(model, encoder_gradient=kind, **options)


REFINING = [*GRADIENTS, "iterative"]
FAST = ["unrolled", "distill", "iterative"]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("family", "kind", "training"),
    some_slow(
        [("normal", "unrolled", True), ("normal", "iterative", False)],
        FAMILIES,
        ["unrolled", "iterative"],
        [False, True],
    ),
)
def test_answers_do_not_depend_on_the_batch(family: str, kind: str, training: bool) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(10)
    guide = refining_guide(kind, linear.full, family=family, num_steps=3, fixed_noise=True).train(training)
    together = guide.variational_parameters(x).detach()
    with torch.no_grad():
        assert not torch.equal(refined_by(guide, x, 0), refined_by(guide, x, 3))
    for size in (5, 1):
        parts = [guide.variational_parameters(batch).detach() for batch in x.split(size)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-10)
    torch.testing.assert_close(guide.variational_parameters(x.flip(0)).detach().flip(0), together, rtol=0, atol=1e-10)
    guide.inference.fixed_noise = False
    assert (guide.variational_parameters(x).detach() - together).abs().max() > 1e-4


def refined_by(guide: Any, x: Tensor, num_steps: int) -> Tensor:
    before, guide.num_steps = guide.num_steps, num_steps
    phi = guide.variational_parameters(x).detach()
    guide.num_steps = before
    return phi


@pytest.mark.parametrize(
    ("name", "kind", "initial"),
    some_slow(
        [("topics", "unrolled", "encoder"), ("mixture", "unrolled", "prior"), ("mixture", "iterative", "prior")],
        ["topics", "mixture"],
        ["unrolled", "iterative"],
        ["encoder", "prior"],
    ),
)
def test_fixed_noise_leaves_the_global_generator_alone(name: str, kind: str, initial: str) -> None:
    model, x = {"topics": (topics, counts(6)), "mixture": (mixture, torch.randn(6))}[name]
    guide = refining_guide(kind, model, num_steps=2, fixed_noise=True, initial=initial)
    guide.setup(x)
    for call in (lambda: guide.variational_parameters(x), lambda: guide.median(x)):
        before = torch.get_rng_state()
        first = call()
        assert torch.equal(torch.get_rng_state(), before)
        torch.randn(1)
        torch.testing.assert_close(call(), first, rtol=0, atol=0)
    before = torch.get_rng_state()
    guide.inference.fixed_noise = False
    guide.variational_parameters(x)
    assert not torch.equal(torch.get_rng_state(), before)


@config_enumerate
def mixture(x: Tensor) -> None:
    """A discrete latent beside a continuous one."""
    with pyro.plate("data", len(x)):
        component = pyro.sample("component", dist.Categorical(torch.tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 3.0 * component, 1.0), obs=x)


class OwnNoise(VariationalFamily):
    """A family that draws its own noise."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        loc, log_scale = phi.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def test_fixed_noise_holds_for_families_that_draw_their_own() -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(6)
    guide = SemiAmortizedGuide(linear.full, num_steps=3, family=OwnNoise, fixed_noise=True)
    first = guide.variational_parameters(x)
    assert first.isfinite().all()
    torch.testing.assert_close(guide.variational_parameters(x), first)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(FAST, REFINING))
def test_steps_do_not_see_the_scale_of_a_subsampled_plate(kind: str) -> None:
    """phi is the same whatever the full size, and the gradient of what trains the encoder is in proportion to it."""
    vae, x = VAE(), pixels(5)

    def model(x: Tensor, full_size: int) -> None:
        with pyro.plate("data", full_size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z)).to_event(1), obs=x)

    guide = refining_guide(kind, model, encoder=small_encoder(), num_steps=3, fixed_noise=True, num_particles=2)
    results = {}
    for full_size in (5, 1000):
        torch.manual_seed(0)
        phi = guide.variational_parameters(x, full_size).detach()
        torch.manual_seed(1)
        loss = Trace_ELBO().differentiable_loss(model, guide, x, full_size)
        results[full_size] = phi, [loss, *gradients(loss, guide, vae)]
    torch.testing.assert_close(results[1000][0], results[5][0], rtol=0, atol=1e-12)
    assert relative_error(results[1000][1], [200.0 * g for g in results[5][1]]) < 1e-9


def test_switching_between_training_and_evaluation_traces_once_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[None] = []
    original = cache.record

    def counted(*args: Any) -> Any:
        traced.append(None)
        return original(*args)

    monkeypatch.setattr(cache, "record", counted)
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = SemiAmortizedGuide(linear.full, num_steps=2, keep_best=False)
    for mode in (True, False) * 4:
        guide.train(mode).variational_parameters(x)
    assert 1 <= len(traced) <= 2


def test_another_model_is_refined_on_its_own_elbo() -> None:
    first, second, x = VAE(), VAE(), pixels()
    for parameter in second.parameters():
        parameter.data.mul_(3.0)
    guide = semi_amortized(first, x, fixed_noise=True)
    for _ in range(6):
        before = guide.variational_parameters(x).detach()
    guide.model = second
    after = guide.variational_parameters(x).detach()
    fresh = semi_amortized(second, x, fixed_noise=True)
    fresh.load_state_dict(guide.state_dict())
    torch.testing.assert_close(after, fresh.variational_parameters(x).detach())
    assert (after - before).abs().max() > 1e-3


# 6. Everything that Pyro does with a guide.


def assert_trains(model: Any, guide: Any, args: Any, elbos: list[Any]) -> None:
    """Every ELBO gives a finite loss and every parameter of the guide a gradient."""
    for Elbo in elbos:
        for vectorized in (False, True):
            elbo = Elbo(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
            guide.zero_grad()
            assert torch.tensor(elbo.loss_and_grads(model, guide, *args)).isfinite()
            named = dict(nn.Module.named_parameters(guide))
            assert named
            for name, parameter in named.items():
                assert parameter.grad is not None, (Elbo, name)
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0 or "global" in name, (Elbo, name)
            assert torch.tensor(elbo.loss(model, guide, *args)).isfinite()


@pytest.mark.parametrize(
    ("plates", "kind"),
    some_slow(
        [*product(["explicit"], REFINING), ("random", "iterative")],
        ["full", "explicit", "random"],
        REFINING,
    ),
)
def test_every_elbo_trains_on_every_plate(plates: str, kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(9)
    args = (x, torch.tensor([7, 2, 4])) if plates == "explicit" else (x,)
    model = getattr(linear, plates)
    guide = refining_guide(kind, model, num_steps=2, encoder=nn.Linear(4, 4))
    assert_trains(model, guide, args, [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])


@pytest.mark.parametrize("kind", some_slow(FAST[2:], REFINING))
def test_every_elbo_trains_with_global_latents(kind: str) -> None:
    guide = refining_guide(kind, topics, num_steps=2, encoder_input=lambda x: x.log1p().reshape(-1, 1))
    assert_trains(topics, guide, (counts(6),), [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])


@pytest.mark.parametrize("kind", some_slow(FAST[1:], REFINING))
def test_enumerated_latents_are_summed_out_in_refinement(kind: str) -> None:
    x = torch.randn(6) + 2.0
    guide = refining_guide(kind, mixture, num_steps=2)
    assert_trains(mixture, guide, (x,), [TraceEnum_ELBO])
    loss = svi(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1)).evaluate_loss(x)
    assert torch.tensor(loss).isfinite()


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_refinement_climbs_the_elbo_of_the_enumerated_model() -> None:
    """Against the mixture's own density, summed by hand: no step from its maximum over a grid would be uphill."""
    x = torch.tensor([0.0, 1.5, 4.0])
    guide = SemiAmortizedGuide(mixture, num_steps=200, initial="prior", num_particles=512, fixed_noise=True)
    with torch.no_grad():
        loc, log_scale = guide.variational_parameters(x).unbind(-1)
    z = torch.linspace(-10, 10, 4001).unsqueeze(-1)
    parts = [w * dist.Normal(z + shift, 1.0).log_prob(x).exp() for w, shift in ((0.3, 0.0), (0.7, 3.0))]
    log_joint = (parts[0] + parts[1]).log() + dist.Normal(0.0, 1.0).log_prob(z)

    def elbo(loc: Tensor, log_scale: Tensor) -> Tensor:
        q = dist.Normal(loc, log_scale.exp())
        density = q.log_prob(z).exp() * (z[1] - z[0])
        return (density * (log_joint - q.log_prob(z))).sum(0)

    at = elbo(loc, log_scale)
    for shift in (0.3, -0.3):
        assert (elbo(loc + shift, log_scale) < at + 1e-3).all()
        assert (elbo(loc, log_scale + shift) < at + 1e-3).all()
    start = elbo(torch.zeros(3), torch.zeros(3))
    assert (at >= start - 1e-3).all()
    assert (at - start).max() > 0.05


@pytest.mark.parametrize("kind", some_slow(FAST[1:], REFINING))
def test_training_lowers_the_loss(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(16)
    guide = refining_guide(kind, linear.full, num_steps=2)
    steps = svi(linear.full, guide, Trace_ELBO(num_particles=4, vectorize_particles=True), lr=0.005)
    losses = torch.tensor([steps.step(x) for _ in range(30)])
    assert losses.isfinite().all()
    assert losses[-10:].mean() < losses[:5].mean()
    assert steps.evaluate_loss(x) < losses[:5].mean()


@pytest.mark.parametrize(
    ("kind", "parallel"),
    some_slow([("unrolled", False), ("iterative", True)], ["unrolled", "initial", "iterative"], [False, True]),
)
def test_predictive_and_calls_without_gradients(kind: str, parallel: bool) -> None:
    x = counts(6)
    guide = refining_guide(kind, topics, num_steps=2)
    guide.setup(x)
    samples = Predictive(topics, guide=guide, num_samples=3, parallel=parallel)(x)
    assert samples["share"].reshape(3, 6, 3).sum(-1).sub(1).abs().max() < 1e-5
    assert samples["size"].reshape(3, 6).std(0).min() > 0
    with torch.no_grad():
        values = guide(x)
        assert not guide.variational_parameters(x).requires_grad
    assert not any(value.requires_grad for value in values.values())
    assert guide.variational_parameters(x).requires_grad == (kind != "initial")  # which trains the encoder otherwise


# 7. Settings.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(FAST, REFINING))
def test_num_steps_may_be_changed_at_any_time_and_zero_gives_the_start(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(5)
    guide = refining_guide(kind, linear.full, num_steps=4, fixed_noise=True, keep_best=False, initial="encoder")
    guide.num_steps = 0
    start = guide.variational_parameters(x)
    assert torch.equal(start, guide.inference.initial((x,), None))
    phis = [start]
    for count in (1, 2, 7):
        guide.num_steps = count
        assert guide.num_steps == guide.inference.num_steps == count
        phis.append(guide.variational_parameters(x))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(phis, phis[1:], strict=False))
    guide.num_steps = 2
    torch.testing.assert_close(guide.variational_parameters(x), phis[2])
    assert torch.tensor(svi(linear.full, guide).step(x)).isfinite()


@pytest.mark.parametrize("value", [-1, 2.0, True, None, "3"])
@pytest.mark.parametrize("kind", ["unrolled", "iterative"])
def test_num_steps_must_be_a_count(kind: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"num_steps=.* because it must be an integer of at least 0"):
        refining_guide(kind, topics, num_steps=value)
    if kind != "iterative" or value is not None:  # which chooses for itself
        with pytest.raises(ValueError, match=r"num_particles=.* because it must be an integer of at least 1"):
            refining_guide(kind, topics, num_particles=value)
    guide = refining_guide(kind, topics, num_steps=1)
    for ready in (False, True):
        if ready:
            guide.setup(counts(4))
        with pytest.raises(ValueError, match="must be an integer of at least 0"):
            guide.num_steps = value
        assert guide.num_steps == 1


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_prior_start_is_the_prior(family: str) -> None:
    def model(x: Tensor, loc: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            y = pyro.sample("y", dist.Normal(2.0 * z[..., 0], 3.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    x, loc, log_scale = torch.randn(5), torch.randn(5, 2), torch.randn(5, 2)
    guide = SemiAmortizedGuide(model, num_steps=0, initial="prior", family=family)
    q = guide.posterior(x, loc, log_scale.exp())
    expected = torch.cat([loc, 2.0 * loc[:, :1]], -1), torch.cat([log_scale.exp(), torch.full((5, 1), 3.0)], -1)
    torch.testing.assert_close(q.mean, expected[0])
    if family != "low_rank_multivariate_normal":  # which starts with a small factor beside
        torch.testing.assert_close(q.stddev, expected[1])
    linear = LinearGaussian.random_weights()
    guide = SemiAmortizedGuide(linear.full, num_steps=0, initial="prior", name="standard")
    assert torch.equal(guide.variational_parameters(linear.simulate(4)), torch.zeros(4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_slow(["unrolled"], ["unrolled", "iterative"]))
def test_prior_start_serves_constrained_latents(kind: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            part = pyro.sample("part", dist.Beta(2.0, 5.0))
            heavy = pyro.sample("heavy", dist.Cauchy(0.0, 1.0))  # without moments
            pyro.sample("x", dist.Normal(rate * share[..., 0] + part + 0.1 * heavy, 0.3), obs=x)

    x = torch.rand(6)
    guide = refining_guide(kind, model, num_steps=0, initial="prior")
    median = guide.median(x)
    torch.testing.assert_close(median["rate"], torch.full((6,), 1.5))
    torch.testing.assert_close(median["share"], (torch.tensor([1.0, 2.0, 3.0]) / 6).expand(6, 3))
    torch.testing.assert_close(median["part"], torch.full((6,), 2 / 7))
    torch.testing.assert_close(median["heavy"], torch.zeros(6))
    slopes = 1.5, 2 / 7 * 5 / 7  # of exp and the logistic function
    scales = dist.Gamma(3.0, 2.0).stddev / slopes[0], dist.Beta(2.0, 5.0).stddev / slopes[1]
    found = guide.posterior(x).stddev[0]
    assert guide.layout is not None
    torch.testing.assert_close(found[0], scales[0])
    torch.testing.assert_close(found[3], scales[1])
    guide.num_steps = 3
    assert torch.tensor([svi(model, guide).step(x) for _ in range(3)]).isfinite().all()


def test_prior_start_needs_no_encoder_and_no_data_of_its_own() -> None:
    linear = LinearGaussian.random_weights()
    guide = SemiAmortizedGuide(linear.full, num_steps=3, initial="prior", num_particles=16)
    x = linear.simulate(8)
    assert torch.tensor(Trace_ELBO().loss(linear.full, guide, x)).isfinite()
    assert not list(guide.parameters())


# 8. Saving.


def saved(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


LINEAR = LinearGaussian.random_weights()


def unsaved(kind: str, model: Any) -> Any:
    rule = {} if kind == "iterative" else {"update": Adam(0.05, learned=kind == "unrolled")}
    return refining_guide(kind, model, num_steps=2, fixed_noise=True, **rule)


def trained(kind: str, model: Any, x: Tensor) -> Any:
    guide = unsaved(kind, model)
    steps = svi(model, guide, lr=0.002)
    for _ in range(3):
        steps.step(x)
    return guide


@pytest.mark.parametrize(
    ("kind", "setup"), some_slow([("unrolled", True), ("iterative", False)], ["unrolled", "iterative"], [False, True])
)
def test_state_dict_restores_every_answer(kind: str, setup: bool) -> None:
    x = LINEAR.simulate(8)
    guide = trained(kind, LINEAR.full, x)
    other = unsaved(kind, LINEAR.full)
    pyro.clear_param_store()
    if setup:
        other.setup(x)
        assert not torch.equal(other.median(x)["z"], guide.median(x)["z"])
        pyro.clear_param_store()
    state = saved(guide.state_dict())
    assert ("inference.update.log_step_size" in state) == (kind == "unrolled")
    assert any("inference.update.network" in name for name in state) == (kind == "iterative")
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    answer = other.median(x)["z"]
    pyro.clear_param_store()
    assert torch.equal(answer, guide.median(x)["z"])
    assert list(other.state_dict()) == list(state)


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "saved": lambda g: saved(g, weights_only=False),
    "pickled": lambda g: pickle.loads(pickle.dumps(g)),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize(
    ("kind", "duplicate"),
    some_slow([("iterative", "saved")], ["unrolled", "iterative"], list(DUPLICATES)),
)
def test_whole_guide_is_saved_and_copied(kind: str, duplicate: str) -> None:
    x = LINEAR.simulate(8)
    guide = trained(kind, LINEAR.full, x)
    other = DUPLICATES[duplicate](guide)
    if duplicate != "copied":
        with pytest.raises(ValueError, match="guide.model = model"):
            other.median(x)
        other.model = LINEAR.full
    before = other.median(x)["z"]
    assert torch.equal(before, guide.median(x)["z"])
    steps = svi(LINEAR.full, guide, lr=0.01)
    assert torch.tensor([steps.step(x) for _ in range(2)]).isfinite().all()  # the original goes on, on its own
    assert torch.equal(before, other.median(x)["z"])
    assert not torch.equal(before, guide.median(x)["z"])
    pyro.clear_param_store()
    assert torch.tensor(svi(LINEAR.full, other, lr=0.002).step(LINEAR.simulate(5))).isfinite()
    other.num_steps = 1
    assert other.inference.num_steps == 1
    assert guide.num_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "iterative"])
def test_guide_with_global_latents_is_saved_and_copied(kind: str) -> None:
    x = counts(8)
    guide = trained(kind, topics, x)
    for duplicate in DUPLICATES.values():
        other = duplicate(guide)
        other.model = topics
        torch.testing.assert_close(other.median(x), guide.median(x), rtol=0, atol=0)
    other = unsaved(kind, topics)
    other.load_state_dict(saved(guide.state_dict()))
    expected = guide.median(x)
    pyro.clear_param_store()
    torch.testing.assert_close(other.median(x), expected, rtol=0, atol=0)


# 9. Gaps.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["unrolled", pytest.param("iterative", marks=pytest.mark.slow)])
def test_refinement_narrows_the_amortization_gap(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(12)
    guide = refining_guide(kind, linear.full, initial="encoder", num_steps=6, num_particles=16)
    steps = svi(linear.full, guide, lr=0.01)
    for _ in range(20 if kind == "iterative" else 5):
        steps.step(x)
    gaps = {}
    for count in (0, 6):
        guide.num_steps = count
        estimate = estimate_gaps(linear.full, guide, (x,)).dataset
        gaps[count] = estimate["amortization_gap"]
        assert estimate["reliable"].all()
        assert abs(float(estimate["approximation_gap"].mean()) - mean_field_gap(linear)) < 0.05
        with guide.repeatable():  # the answers that the estimate is of
            exact = kl_from_posterior(linear, x, guide, guide.variational_parameters(x)).mean().item()
        assert abs(float(gaps[count].mean()) + mean_field_gap(linear) - exact) < (0.05 if count == 0 else 0.2)
    assert float(gaps[6].mean()) < 0.5 * float(gaps[0].mean())


# 10. Errors.


@pytest.mark.parametrize("wrong", [0.1, "adam", Adam, torch.optim.Adam])
def test_what_is_no_update_rule_is_refused(wrong: Any) -> None:
    for kind in REFINING:
        Guide = IterativeAmortizedGuide if kind == "iterative" else SemiAmortizedGuide
        options = {} if kind == "iterative" else {"encoder_gradient": kind}
        with pytest.raises(ValueError, match="because it is not an update rule; try pyro_amortized.NaturalGradient"):
            Guide(topics, update=wrong, **options)


def test_wrong_settings_are_refused() -> None:
    def refused(pattern: str, Guide: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=pattern):
            Guide(topics, *args, **options)

    for Guide in (SemiAmortizedGuide, IterativeAmortizedGuide):
        refused(r"Cannot start at 'zero' because there is no such start; try initial=", Guide, initial="zero")
        refused(r"estimate gradients by 'reinforce' because it is none of .*; try 'stl'", Guide, estimator="reinforce")
        refused("not a torch.nn.Module instance", Guide, lambda x: x)
        refused("init_scale=0", Guide, init_scale=0)
        refused("no variational family has that name", Guide, family="gamma")
    refused("encoder_gradient='exact' because it is none of", SemiAmortizedGuide, encoder_gradient="exact")
    for rule in (LearnedUpdate(), LearnedUpdate):
        refused("because it (has to be trained|is not an update rule)", SemiAmortizedGuide, update=rule)
    for rule in (GradientAscent(), Adam(), NaturalGradient()):
        refused(r"IterativeAmortizedGuide because there is nothing to learn", IterativeAmortizedGuide, update=rule)
    for kind in OTHERS:
        refused("learn the step size", SemiAmortizedGuide, update=Adam(learned=True), encoder_gradient=kind)
    SemiAmortizedGuide(topics, update=Adam(learned=True))
    refused('Cannot use an encoder with initial="prior"', SemiAmortizedGuide, nn.Linear(1, 2), initial="prior")


@pytest.mark.parametrize("kind", ["unrolled", "iterative"])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_what_only_the_normal_family_has_is_refused_for_others(family: str, kind: str) -> None:
    linear = LinearGaussian.random_weights()
    guide = refining_guide(kind, linear.full, family=family, estimator="analytic_kl")
    with pytest.raises(ValueError, match=r"by 'analytic_kl' because there is no closed form.*; try estimator="):
        guide(linear.simulate(4))
    if kind == "unrolled":
        guide = SemiAmortizedGuide(linear.full, family=family, update=NaturalGradient(), name="natural")
        with pytest.raises(ValueError, match="because its Fisher information is only known"):
            guide(linear.simulate(4))


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_guide_with_local_latents_that_is_set_up_can_be_refined(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = guide_of_kind(kind, linear.full, "normal")
    with pytest.raises(ValueError, match="it has not been set up"):
        guide.refined(3)
    guide.setup(x)
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ValueError, match="guide.model = model"):
        other.refined(3)
    with pytest.raises(ValueError, match="LearnedUpdate in SemiAmortizedGuide"):
        guide.refined(3, LearnedUpdate())

    def global_only(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    guide = guide_of_kind(kind, global_only, "normal", name="global_only")
    guide.setup(x[:, 0])
    with pytest.raises(ValueError, match="no local latents"):
        guide.refined(3)


def test_iterative_guide_needs_features() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :3], x[:, :3].exp()

    linear = LinearGaussian.random_weights()
    with pytest.raises(ValueError, match="the update network needs features"):
        IterativeAmortizedGuide(linear.full, Pair())(linear.simulate(4))
    guide = SemiAmortizedGuide(linear.full, Pair(), num_steps=2)  # for which a pair is as good a start as any
    assert torch.tensor(Trace_ELBO().loss(linear.full, guide, linear.simulate(4))).isfinite()


def test_learned_update_serves_one_guide() -> None:
    rule, linear = LearnedUpdate((8,)), LinearGaussian.random_weights()
    IterativeAmortizedGuide(linear.full, update=rule)(linear.simulate(4))
    with pytest.raises(ValueError, match="a new LearnedUpdate for each guide"):
        IterativeAmortizedGuide(topics, update=rule, name="other")(counts(4))


# What a start, a shared encoder and a broken datapoint may not do.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "update", [NaturalGradient(0.3), Adam(0.05), GradientAscent(0.01)], ids=lambda u: type(u).__name__
)
def test_gradients_reach_a_learned_prior_that_refinement_starts_at(update: Any) -> None:
    loc = torch.tensor(0.3, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z.tanh(), 0.5), obs=x)

    x = torch.tensor([0.1, -0.4, 1.0])
    guide = SemiAmortizedGuide(model, num_steps=3, update=update, initial="prior", fixed_noise=True, keep_best=False)
    (gradient,) = torch.autograd.grad(guide.variational_parameters(x).sum(), loc)
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            loc.add_(shift)
            values.append(guide.variational_parameters(x).sum().item())
            loc.sub_(shift)
    assert gradient.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("Guide", [SemiAmortizedGuide, IterativeAmortizedGuide])
def test_datapoints_without_an_elbo_get_no_answer(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    guide = Guide(model, num_steps=3, initial="prior")
    guide.setup(x)
    guide.eval()
    x[2] = torch.nan
    with pytest.raises(ValueError, match=r"1 datapoints \(first: \[2\]\)"):
        guide.median(x)


def test_keeping_the_best_hides_no_divergence_in_training() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    guide = SemiAmortizedGuide(model, num_steps=8, update=GradientAscent(1.0), keep_best=True, num_particles=4)
    with pytest.raises(ValueError, match="refinement has diverged"):
        svi(model, guide).step(torch.tensor([0.0, 1.0, 2.0, 500.0]))


def test_a_refined_guide_leaves_a_shared_encoder_in_training_alone() -> None:
    x = torch.randn(20, 5)
    encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 3)[:, :5], 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(model, encoder)
    guide.setup(x)
    refined = guide.refined(0)
    before = encoder[1].running_mean.clone()
    assert torch.equal(refined.variational_parameters(x), refined.variational_parameters(x))
    assert torch.equal(before, encoder[1].running_mean)
    assert all(module.training for module in encoder.modules())


def test_a_refined_guide_shares_what_it_cannot_change() -> None:
    linear = LinearGaussian.random_weights()
    guide = AmortizedGuide(linear.full)
    guide.setup(linear.simulate(4))
    with pytest.raises(ValueError, match=r"with other \['family', 'initial'\] because these are shared"):
        guide.refined(3, family="multivariate_normal", initial="prior")


def test_jit_tracing_is_refused() -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = SemiAmortizedGuide(linear.full, num_steps=2)
    guide.setup(x)
    step = svi(linear.full, guide, JitTrace_ELBO()).step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="inside torch.jit.trace"):
            step(x)


# Models that take no dimension of draws in front


class Shares(nn.Module):
    """Shares along the last dimension, or along dimension 1, which is the last one without a dimension of draws."""

    def __init__(self, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.dim, self.runs = dim, 0
        self.layers = nn.Sequential(nn.Linear(3, 8), norm, nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> None:
        self.runs += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Multinomial(10, self.layers(z).softmax(self.dim)), obs=x)


def shares(dim: int, norm: nn.Module | None = None) -> Any:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = Shares(dim, nn.Identity() if norm is None else norm)
    guide = SemiAmortizedGuide(model, nn.Linear(6, 8), num_steps=3, fixed_noise=True, name=f"shares_{dim}")
    x = dist.Multinomial(10, torch.ones(6)).sample((7,))
    guide.setup(x)
    guide(x)  # finds how draws can be evaluated
    return model, guide, x


@pytest.mark.usefixtures("_float64")
def test_draws_are_evaluated_as_copies_of_the_datapoints() -> None:
    """In as many runs of the model as with a dimension of draws, with the same losses and gradients."""
    found = []
    for dim in (-1, 1):
        model, guide, x = shares(dim)
        model.runs = 0
        torch.manual_seed(1)
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
        found.append((loss, gradients(loss, guide, model), model.runs))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-9)
    assert relative_error(found[1][1], found[0][1]) < 1e-6
    assert found[0][2] == found[1][2]


@pytest.mark.usefixtures("_float64")
def test_draws_that_batch_normalisation_mixes_are_not_evaluated_together() -> None:
    """Copies of a datapoint at other draws would matter to it; in evaluation mode they do not."""
    runs = []
    for training in (False, True):
        norm = nn.BatchNorm1d(8)
        model, guide, x = shares(-1, norm)
        model.train(training)
        guide(x)
        model.runs, before = 0, norm.running_mean.clone()
        phi = guide.variational_parameters(x)
        runs.append(model.runs)
        assert phi.isfinite().all()
        assert torch.equal(norm.running_mean, before)
    assert runs[0] < 3 * 8 <= runs[1]


@pytest.mark.usefixtures("_float64")
def test_batch_normalisation_may_go_into_training_behind_a_function() -> None:
    """Draws were evaluated as copies of the datapoints before."""
    norm = nn.BatchNorm1d(8)
    net = Shares(1, norm)

    def model(x: Tensor) -> None:
        net(x)

    guide = SemiAmortizedGuide(model, nn.Linear(6, 8), num_steps=3, fixed_noise=True, keep_best=False)
    x = dist.Multinomial(10, torch.ones(6)).sample((7,))
    guide.setup(x)
    runs = []
    for training in (False, True):
        norm.train(training)
        guide(x)
        net.runs = 0
        guide.variational_parameters(x)
        runs.append(net.runs)
    assert runs[0] < 3 * 8 <= runs[1]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("family", ["normal", "multivariate_normal"])
def test_a_normal_posterior_is_found_exactly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.3, 0.0, 1.2], [1.0, 1.0, 1.0]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights.T, 0.5).to_event(1), obs=x)

    x = torch.randn(20, 4)
    precision = torch.eye(3) + weights.T @ weights / 0.25
    mean = torch.linalg.solve(precision, weights.T @ x.T / 0.25).T
    stddev = precision.diagonal() ** -0.5 if family == "normal" else precision.inverse().diagonal().sqrt()
    guide = AmortizedGuide(model, family=family)
    guide.setup(x)

    def error() -> float:
        with torch.no_grad():
            q = guide.refined(20).posterior(x)
        return max((q.mean - mean).abs().max().item(), (q.stddev - stddev).abs().max().item())

    assert error() < 1e-6
    original = LocalObjective.noise
    monkeypatch.setattr(LocalObjective, "noise", lambda self, phi, number, whiten: original(self, phi, number))
    assert error() > 1e-3, "draws as they come would do"
