"""Gradients through refinement steps, and the learned rule, against loops written by hand."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import LinearGaussian
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from refinement_by_hand import (
    ESTIMATORS,
    FAMILIES,
    GRADIENTS,
    LATENTS,
    OTHERS,
    POINTS,
    RULES,
    STEPS,
    VAE,
    climb_by_hand,
    curvature_by_hand,
    exact_elbo,
    gradient_by_hand,
    gradients,
    loss_and_draw,
    loss_by_hand,
    mean_field_gap,
    newton_by_hand,
    pixels,
    relative_error,
    semi_amortized,
    small_encoder,
    some_slow,
    start_by_hand,
    svi,
)
from torch import Tensor

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    GradientAscent,
    IterativeAmortizedGuide,
    LearnedUpdate,
    NaturalGradient,
    Newton,
    Normal,
    SemiAmortizedGuide,
    VariationalFamily,
)
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import Refined
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.updates.base import Curvature

# Exact gradients through the steps


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


# The other ways to train the encoder


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


# The learned rule


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
