"""Newton steps: the regression against the model's own derivatives, optima in closed form, what cannot be done."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_amortized import (
    AmortizedGuide,
    MultivariateNormal,
    NaturalGradient,
    Newton,
    Normal,
    SemiAmortizedGuide,
)
from pyro_amortized.families import Flow, LowRankMultivariateNormal
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.objective import regression
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.updates.base import Curvature
from pyro_amortized.updates.gradient import Adam
from pyro_amortized.updates.rules import rule_for

pytestmark = pytest.mark.usefixtures("_float64")

FAMILIES = [Normal, MultivariateNormal]
LATENTS, FEATURES = 6, 8


def correlated() -> LinearGaussian:
    """Latents whose posterior is far from a product: all load on the same direction beside their own."""
    weights = torch.randn(FEATURES, LATENTS, generator=torch.Generator().manual_seed(5)) + 1.5
    return LinearGaussian(weights)


def objective_of(model: Any, x: Tensor, family: Any, **options: Any) -> LocalObjective:
    structure = StructureReader().read(model, (x,), {})
    return LocalObjective(LocalLogJoint(ModelCall(model, (x,), {}, structure)), family, **options)


def phi_of(family: Any, size: int) -> Tensor:
    return 0.3 * torch.randn(size, family.num_params, generator=torch.Generator().manual_seed(1))


def scale_tril(family: Any, phi: Tensor) -> Tensor:
    if isinstance(family, MultivariateNormal):
        return family.scale_tril(phi)
    return torch.diag_embed(family.marginals(phi)[1])


# The curvature


@pytest.mark.thinned
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("Family", FAMILIES)
@pytest.mark.parametrize("num_particles", [LATENTS + 1, 20, 33])
def test_curvature_of_a_normal_model_is_exact_without_ridge(
    Family: Any, num_particles: int, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One draw more than latents determines a gradient that is linear in them."""
    linear, family = correlated(), Family(LATENTS)
    x, phi = linear.simulate(3), phi_of(family, 3)
    objective_ = objective_of(linear.full, x, family, graphs=GraphCache() if traced else None)
    noise = torch.randn(num_particles, 3, LATENTS)
    posterior, factor = linear.posterior(x), scale_tril(family, phi)
    precision = torch.linalg.inv(posterior.covariance_matrix)
    expected = factor.mT @ precision @ factor
    slope = (factor.mT @ precision @ (posterior.mean - phi[:, :LATENTS]).unsqueeze(-1)).squeeze(-1)
    shrunk = objective_.curvature(phi, noise)
    assert (shrunk[2] - expected).abs().max() > 1e-4  # the ridge pulls towards the identity
    monkeypatch.setattr(regression, "_PRIOR_DRAWS", 0.0)
    exact = objective_of(linear.full, x, family, graphs=GraphCache() if traced else None).curvature(phi, noise)
    torch.testing.assert_close(exact[2], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact[1], slope, rtol=1e-6, atol=1e-6)


def test_ridge_is_strong_only_where_draws_tell_nothing_of_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, LATENTS, generator=generator)
    x = x - x.mean(1, keepdim=True)
    truth = torch.randn(5, LATENTS, LATENTS, generator=generator)
    linear, unrelated = regression.ridge(x, x @ truth), torch.randn(5, 40, LATENTS, generator=generator)
    torch.testing.assert_close(linear, truth, rtol=0, atol=0.01)
    unrelated = unrelated - unrelated.mean(1, keepdim=True)
    full = torch.linalg.solve(x.mT @ x + 3.0 * torch.eye(LATENTS), x.mT @ unrelated)
    torch.testing.assert_close(regression.ridge(x, unrelated), full)
    plain = torch.linalg.solve(x.mT @ x + 3.0 * torch.eye(LATENTS), x.mT @ (x @ truth))
    assert (plain - truth).abs().max() > 0.05  # a ridge of constant strength


@pytest.mark.parametrize("estimator", ["stl", "plain"])
@pytest.mark.parametrize("Family", FAMILIES)
def test_gradient_beside_the_curvature_is_that_of_the_estimator(Family: Any, estimator: str) -> None:
    linear, family = correlated(), Family(LATENTS)
    objective_ = objective_of(linear.full, linear.simulate(3), family, estimator=estimator)
    phi, noise = phi_of(family, 3), torch.randn(5, 3, LATENTS)
    torch.testing.assert_close(objective_.curvature(phi, noise)[0], objective_.gradient(phi, noise))
    other = objective_of(linear.full, linear.simulate(3), family, estimator="plain" if estimator == "stl" else "stl")
    assert (other.gradient(phi, noise) - objective_.gradient(phi, noise)).abs().max() > 1e-2


@pytest.mark.parametrize("Family", FAMILIES)
@pytest.mark.parametrize("num_particles", [2, 7, 20])
def test_the_exact_posterior_is_left_where_it_is(Family: Any, num_particles: int) -> None:
    """Without noise, whatever the ridge and however few the draws."""
    weights = torch.linalg.qr(torch.randn(FEATURES, LATENTS))[0] * torch.arange(1.0, LATENTS + 1)
    linear, family = LinearGaussian(weights), Family(LATENTS)
    x = linear.simulate(4)
    posterior = linear.posterior(x)
    precision = torch.linalg.inv(posterior.covariance_matrix).expand(4, -1, -1)
    phi = family.laplace(posterior.mean, precision)
    noise = torch.randn(num_particles, 4, LATENTS)
    grad, slope, curvature = objective_of(linear.full, x, family).curvature(phi, noise)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)
    torch.testing.assert_close(curvature, torch.eye(LATENTS).expand_as(curvature), rtol=0, atol=1e-10)
    moved = Newton(1.0).update(phi, Curvature(grad, slope, curvature, family), ())[0]
    torch.testing.assert_close(moved, phi, rtol=0, atol=1e-9)
    wide = objective_of(linear.full, x, family).curvature(phi + 0.1, noise)
    assert wide[1].abs().max() > 1e-2


def test_a_scale_of_the_whole_model_changes_no_step() -> None:
    linear = correlated()
    x, family = linear.simulate(3), Normal(LATENTS)
    phi, noise = phi_of(family, 3), torch.randn(10, 3, LATENTS)
    plain = objective_of(linear.full, x, family).curvature(phi, noise)
    scaled = objective_of(poutine.scale(linear.full, 0.3), x, family).curvature(phi, noise)
    torch.testing.assert_close(scaled[0], 0.3 * plain[0])
    for a, b in zip(scaled[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b)


# Where the steps lead


def divergence(linear: LinearGaussian, x: Tensor, family: Any, phi: Tensor) -> Tensor:
    factor = scale_tril(family, phi)
    q = dist.MultivariateNormal(phi[:, :LATENTS], scale_tril=factor)
    return kl_divergence(q, linear.posterior(x)).detach()


@pytest.mark.parametrize("Family", FAMILIES)
def test_few_steps_reach_the_optimum_of_correlated_latents(Family: Any) -> None:
    """Ten steps of 32 draws from the prior; as many natural gradients are still on their way."""
    linear, family = correlated(), Family(LATENTS)
    x = linear.simulate(20)
    precision = torch.linalg.inv(linear.posterior(x).covariance_matrix[0])
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)) if Family is Normal else torch.tensor(0.0)

    def excess(update: Any, num_steps: int) -> float:
        name = "normal" if Family is Normal else "multivariate_normal"
        guide = SemiAmortizedGuide(
            linear.full,
            initial="prior",
            num_steps=num_steps,
            update=update,
            family=name,
            num_particles=32,
            keep_best=False,
        )
        guide.setup(x)
        with torch.no_grad():
            return (divergence(linear, x, family, guide.variational_parameters(x)) - gap).max().item()

    assert -1e-6 < excess(Newton(), 10) < 0.01
    slow = NaturalGradient(0.5) if Family is Normal else Adam(0.1)
    assert excess(slow, 10) > 1.0


@pytest.mark.parametrize("learned", [False, True])
def test_full_steps_converge_on_a_normal_model(learned: bool) -> None:
    """The regression is exact at the fixed point of the full-rank family, which is the posterior."""
    linear = correlated()
    x, update = linear.simulate(4), Newton(1.0, learned=learned)
    guide = SemiAmortizedGuide(
        linear.full,
        initial="prior",
        num_steps=40,
        update=update,
        family="multivariate_normal",
        num_particles=16,
        keep_best=False,
    )
    guide.setup(x)
    with torch.no_grad():
        phi = guide.variational_parameters(x)
    assert divergence(linear, x, MultivariateNormal(LATENTS), phi).max() < 1e-10


class TwoModes:
    """x = z^2 + noise: the curvature is negative between the modes."""

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square().sum(-1), 0.2), obs=x)


@pytest.mark.slow
def test_steps_from_between_modes_climb() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    guide = SemiAmortizedGuide(TwoModes(), initial="prior", num_steps=15, update=Newton(), num_particles=32)
    guide.setup(x)
    guide.eval()
    log_joint = objective_of(TwoModes(), x, Normal(2))
    start, noise = torch.cat([torch.full((3, 2), 0.05), torch.full((3, 2), -1.0)], -1), torch.randn(64, 3, 2)
    curvature = log_joint.curvature(start, noise)[2]
    assert (torch.linalg.eigvalsh(curvature)[:, 0] < 0).all()
    with torch.no_grad():
        phi = guide.variational_parameters(x)
    assert (log_joint.elbo(phi, noise) > log_joint.elbo(log_joint.prior(), noise) + 1.0).all()


@pytest.mark.parametrize("Family", FAMILIES)
def test_steps_are_limited_and_far_from_the_optimum_keep_their_width(Family: Any) -> None:
    family = Family(LATENTS)
    phi, slope = phi_of(family, 3), 100.0 * torch.ones(3, LATENTS)
    slope[:, 1:] = torch.linspace(-50.0, 50.0, LATENTS - 1)
    rule = Newton(1.0, max_shift=2.0, max_log_ratio=0.3)
    for size in (1e4, 0.06):
        precision = size * torch.eye(LATENTS).expand(3, -1, -1)
        moved = rule.update(phi, Curvature(phi, slope * size, precision, family), ())[0] - phi
        shift = torch.linalg.solve(scale_tril(family, phi), moved[:, :LATENTS].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(shift.abs().amax(-1), torch.full((3,), 2.0))
        torch.testing.assert_close(shift / shift[:, :1], slope / slope[:, :1])  # the direction is kept
        assert moved[:, LATENTS : 2 * LATENTS].abs().max() < 0.02 * 0.3 + 1e-6
        near = rule.update(phi, Curvature(phi, torch.zeros_like(slope), precision, family), ())[0] - phi
        ratio = near[:, LATENTS : 2 * LATENTS] * (-1 if size > 1 else 1)
        assert near[:, :LATENTS].abs().max() == 0
        if Family is Normal:
            torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3))
        else:
            assert ratio.min() > 0.05
            assert ratio.max() < 0.3 + 1e-9


@pytest.mark.parametrize("Family", FAMILIES)
def test_steps_go_further_where_the_slope_stays_and_less_far_where_it_turns(Family: Any) -> None:
    """On a quadratic with its optimum 100 standard deviations away, and on a ridge that is met after one step."""
    family, ones = Family(2), torch.ones(1, 2)
    precision, optimum = torch.eye(2).unsqueeze(0), 100.0 * ones

    def climb(gradient: Any, num_steps: int) -> Tensor:
        phi, state, rule = torch.zeros(1, family.num_params), (), Newton(1.0)
        places = [phi[0, 0]]
        for _ in range(num_steps):
            slope = gradient(phi[:, :2])
            grad = torch.cat([slope, torch.zeros(1, family.num_params - 2)], -1)
            phi, state = rule.update(phi, Curvature(grad, slope, precision, family), state)
            places.append(phi[0, 0])
        return torch.stack(places).diff()

    expected = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0, 38.0, 0.0])
    torch.testing.assert_close(climb(lambda loc: optimum - loc, 7), expected)
    steps = climb(lambda loc: 50.0 * (1.2 - loc).sign(), 4)  # every step leaps over it
    torch.testing.assert_close(steps.abs(), torch.tensor([2.0, 1.0, 0.5, 0.25]))


@pytest.mark.parametrize("Family", FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_indefinite_curvatures_of_any_size_give_limited_steps(Family: Any, seed: int) -> None:
    """In single precision, where the eigenvalues of such matrices are known to within one or so."""
    family, generator = Family(5), torch.Generator().manual_seed(seed)
    curvature = 1e7 * torch.randn(20, 5, 5, generator=generator, dtype=torch.float32)
    phi = torch.zeros(20, family.num_params, dtype=torch.float32)
    slope = torch.zeros(20, 5, dtype=torch.float32)
    moved = Newton().update(phi, Curvature(phi, slope, curvature + curvature.mT, family), ())[0]
    assert moved.isfinite().all()
    assert moved[:, 5:10].abs().max() < 0.7 + 1e-5


def test_narrow_likelihoods_are_reached_from_afar() -> None:
    """From the prior, in single precision, 100 posterior standard deviations away."""
    torch.manual_seed(0)
    weights = torch.randn(3, 5, dtype=torch.float32) / 5**0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5, dtype=torch.float32), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights.T, 0.01).to_event(1), obs=x)

    x = torch.randn(16, 5, dtype=torch.float32) @ weights.T + 0.01 * torch.randn(16, 3, dtype=torch.float32)
    for family in ("normal", "multivariate_normal"):
        guide = AmortizedGuide(model, family=family, name=family).to(torch.float32)
        guide.setup(x)
        losses = {}
        for name, update in (("newton", None), ("adam", Adam(0.05))):
            refined = guide.refined(20, update)
            with torch.no_grad():
                losses[name] = Trace_ELBO(num_particles=20).loss(model, refined, x) / len(x)
        assert losses["newton"] < 0.2 * losses["adam"]


@pytest.mark.parametrize("Family", FAMILIES)
def test_a_datapoint_without_a_curvature_harms_no_other(Family: Any) -> None:
    family = Family(LATENTS)
    phi, slope = phi_of(family, 4), torch.randn(4, LATENTS)
    factor = torch.randn(4, LATENTS, LATENTS)
    curvature = factor @ factor.mT - 0.5 * torch.eye(LATENTS)  # some are indefinite
    expected = Newton().update(phi, Curvature(phi, slope, curvature, family), ())[0]
    broken = curvature.clone()
    broken[1, 0, 0], broken[2] = torch.nan, torch.inf
    moved = Newton().update(phi, Curvature(phi, slope, broken, family), ())[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(moved[[0, 3]], expected[[0, 3]])
    assert not moved[1:3].isfinite().all(-1).any()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["normal", "multivariate_normal"])
def test_compiled_steps_give_the_same_numbers(family: str) -> None:
    linear = correlated()
    x = linear.simulate(5)
    answers = []
    for compiled in (False, True):
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_particles": 8, "fixed_noise": True, "compile": compiled, "family": family}
        guide = SemiAmortizedGuide(
            linear.full, initial="prior", num_steps=3, update=Newton(), name=f"guide_{compiled}", **options
        )
        guide.setup(x)
        with torch.no_grad():
            answers.append(guide.variational_parameters(x))
    torch.testing.assert_close(*answers, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_sequences_of_any_length_are_refined() -> None:
    """Their family grows with them."""

    def chain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    class PerStep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.unsqueeze(-1))

    guide = AmortizedGuide(chain, PerStep(), encoder_input="x")
    guide.setup(torch.randn(3, 4))
    refined = guide.refined(3)
    assert isinstance(refined.inference.update, Newton)
    for length in (4, 7, 2):
        with torch.no_grad():
            assert refined.variational_parameters(torch.randn(3, length)).shape == (3, 2 * length)


# What cannot be done


@pytest.mark.parametrize(
    ("family", "num_particles", "estimator", "expected"),
    [
        (Normal(3), 32, None, Newton),
        (MultivariateNormal(3), 2, "plain", Newton),
        (Normal(3), 1, None, NaturalGradient),
        (Normal(3), 32, "analytic_kl", NaturalGradient),
        (Normal(200), 32, None, NaturalGradient),
        (LowRankMultivariateNormal(3), 32, None, None),
        (Flow(3), 32, None, None),
    ],
)
def test_rule_for_refinement_after_training(family: Any, num_particles: int, estimator: Any, expected: Any) -> None:
    rule = rule_for(family, num_particles, estimator)
    assert rule is None if expected is None else type(rule) is expected


def test_families_without_a_curvature_are_refused() -> None:
    linear = correlated()
    guide = SemiAmortizedGuide(linear.full, update=Newton(), family="low_rank_multivariate_normal", num_particles=8)
    with pytest.raises(ValueError, match=r"LowRankMultivariateNormal family by Newton .*; try update=Adam"):
        guide.setup(linear.simulate(3))


@pytest.mark.parametrize("options", [{"num_particles": 1}, {"num_particles": 8, "estimator": "analytic_kl"}])
def test_one_draw_or_an_analytic_kl_has_no_curvature(options: dict[str, Any]) -> None:
    linear = correlated()
    x = linear.simulate(3)
    guide = SemiAmortizedGuide(linear.full, update=Newton(), num_steps=2, **options)
    guide.setup(x)
    with pytest.raises(ValueError, match="Cannot refine by Newton with one particle.*; try num_particles=32"):
        guide.variational_parameters(x)


@pytest.mark.parametrize("settings", [{"step_size": 1.5}, {"max_shift": 0.0}, {"max_log_ratio": -1.0}])
def test_settings_must_make_sense(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Cannot (refine with|use max_.* a positive number).*; try"):
        Newton(**settings)


def test_low_precision_is_refined() -> None:
    """Linear algebra exists in single precision and above only."""

    def model(x: Tensor) -> None:
        one = torch.ones((), dtype=x.dtype)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), one).to_event(1))
            pyro.sample("x", dist.Normal(z, one).to_event(1), obs=x)

    x = torch.randn(5, 3).bfloat16()
    guide = AmortizedGuide(model).to(torch.bfloat16)
    guide.setup(x)
    with torch.no_grad():
        phi = guide.refined(10).variational_parameters(x)
    assert phi.dtype == torch.bfloat16
    torch.testing.assert_close(phi[:, :3], x / 2, rtol=0, atol=0.1)


def test_draws_are_standard_normal_and_orthogonal() -> None:
    """Moments within five standard errors of 20,000 draws; independent draws are not orthogonal."""
    linear = correlated()
    objective_ = objective_of(linear.full, linear.simulate(1), Normal(LATENTS))
    phi = torch.zeros(20000, 2 * LATENTS)
    noise = objective_.noise(phi, 10)
    assert noise.shape == (10, 20000, LATENTS)
    torch.testing.assert_close(noise[:5], -noise[5:])
    products = torch.einsum("knd,lnd->nkl", noise[:5], noise[:5])
    off = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-10
    for k in (0, 4):
        draw = noise[k]
        assert draw.mean(0).abs().max() < 5 / 20000**0.5
        assert (draw.T @ draw / 20000 - torch.eye(LATENTS)).abs().max() < 5 * (2 / 20000) ** 0.5
        assert (draw.pow(4).mean(0) - 3.0).abs().max() < 5 * (96 / 20000) ** 0.5
    blocks = objective_.noise(phi[:3], 4 * LATENTS)  # more pairs than dimensions: two blocks
    assert blocks.shape == (4 * LATENTS, 3, LATENTS)
    independent = objective_.noise(phi, 5)
    assert (independent[0] * independent[1]).sum(-1).abs().max() > 1.0
