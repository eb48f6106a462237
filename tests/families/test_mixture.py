"""Mixtures of normals in guides and diagnostics; the laws of all families are in test_family_laws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_amortized import (
    AmortizedGuide,
    IterativeAmortizedGuide,
    NaturalGradient,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
)
from pyro_amortized.diagnostics.optimum import local_optimum
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.families import Mixture, mixture
from pyro_amortized.families.mixture import _search
from pyro_amortized.objective.draws import MAX_ROWS
from pyro_amortized.objective.log_joint import LocalLogJoint


def squares(x: Tensor) -> None:
    """Which sign z has is not to be seen from x."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.3, 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)


def log_evidence(x: Tensor) -> Tensor:
    """By quadrature, ``(N,)``."""
    z = torch.linspace(-8, 8, 16001, dtype=torch.float64).unsqueeze(-1)
    log_joint = dist.Normal(0.3, 1.0).log_prob(z) + dist.Normal(z**2, 0.3).log_prob(x.double())
    return log_joint.logsumexp(0) + math.log(1e-3)


X = torch.tensor([1.0, 2.0, 3.0, 4.0])
"""From two modes that overlap a little to two that are 26 standard deviations apart."""


def trained(family: object, num_steps: int, kind: type = AmortizedGuide) -> AmortizedGuide:
    pyro.clear_param_store()
    guide = kind(squares, family=family)
    svi = SVI(squares, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step(X)
    return guide.eval()


@pytest.mark.slow
def test_two_modes_are_found_and_weighed() -> None:
    exact = log_evidence(X)
    guide = trained("normal", 50)
    normal = estimate_gaps(squares, guide, (X,)).dataset
    share = torch.sigmoid(2 * 0.3 * X.sqrt().double() * guide.median(X)["z"].sign())  # about that of the guide's mode
    expected = -share.log()
    gap = torch.from_numpy(normal["approximation_gap"].values)
    assert ((gap - expected).abs()[1:] < 0.1).all()
    for count, bound in ((2, 0.05), (4, 0.02)):
        gaps = estimate_gaps(squares, trained(lambda dim, c=count: Mixture(dim, c), 50), (X,)).dataset
        optimum = torch.from_numpy(gaps["elbo_optimal"].values)
        assert (exact - optimum < bound).all()
        assert (exact - optimum > -0.01).all()
        assert abs(gaps["log_evidence"].values - exact.numpy()).max() < 0.02


def test_refinement_learns_the_weights_of_distant_modes() -> None:
    guide = PerDatapointGuide(squares, family=lambda dim: Mixture(dim, 2))
    guide.setup(X)
    refined = guide.refined(200, num_particles=128)
    q = refined.posterior(X)
    right = q.logits.softmax(-1)[q.locs.squeeze(-1) > 0]
    expected = torch.sigmoid(2 * 0.3 * X.sqrt())
    torch.testing.assert_close(right, expected, atol=0.05, rtol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"encoder_gradient": "first_order"}, {"num_particles": 4}])
def test_semi_amortized(options: dict[str, object]) -> None:
    guide = SemiAmortizedGuide(squares, family="mixture", num_steps=3, **options)
    svi = SVI(squares, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    loss = Trace_ELBO(num_particles=200)
    before = loss.loss(squares, guide, X)
    for _ in range(60):
        svi.step(X)
    assert loss.loss(squares, guide, X) < 0.9 * before


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
def test_compiled_refinement_is_the_same() -> None:
    guide = trained("mixture", 5)
    refined = [
        guide.refined(5, compile=compile, fixed_noise=True, name=str(compile)).variational_parameters(X)
        for compile in (False, True)
    ]
    torch.testing.assert_close(*refined, rtol=1e-3, atol=1e-3)


def test_unrolled_gradients_are_those_of_the_steps() -> None:
    pyro.set_rng_seed(0)
    family = Mixture(1, 3).double()
    noise = torch.randn(8, 2, 1, dtype=torch.float64)

    def step(phi: Tensor) -> Tensor:
        z, log_q = family.sample_and_log_prob(phi, noise)
        (grad,) = torch.autograd.grad(
            (-(z.squeeze(-1) ** 2 - 1).square() - log_q).mean(0).sum(), phi, create_graph=True
        )
        return phi + 0.05 * grad

    phi = family.initial(torch.zeros(2, 1, dtype=torch.float64), 0.5) + 0.1 * torch.randn(2, 9, dtype=torch.float64)
    torch.autograd.gradcheck(step, phi.requires_grad_())


@pytest.mark.slow
def test_learned_updates() -> None:
    guide = trained("mixture", 30, IterativeAmortizedGuide)
    assert guide.variational_parameters(X).shape == (4, 12)


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles(vectorize: bool) -> None:
    guide = AmortizedGuide(squares, family="mixture")
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    SVI(squares, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(X)
    assert guide.median(X)["z"].shape == (4,)
    assert guide.quantiles([0.1, 0.9], X)["z"].shape == (2, 4)


def test_moments() -> None:
    family = Mixture(3, 3).double()
    phi = family.initial(torch.zeros(3).double(), 0.5) + 0.5 * torch.randn(21).double()
    q, draws = family(phi), family(phi).sample((200000,))
    torch.testing.assert_close(q.mean, draws.mean(0), atol=0.02, rtol=0.0)
    torch.testing.assert_close(q.covariance_matrix, draws.T.cov(), atol=0.05, rtol=0.0)
    torch.testing.assert_close(q.variance, q.covariance_matrix.diagonal())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_quantiles_of_mixtures_are_found(dtype: torch.dtype, tolerance: float) -> None:
    weights = (2 * torch.randn(20000, 4, dtype=dtype)).softmax(-1)
    loc, log_scale = 5 * torch.randn(20000, 4, dtype=dtype), 1.5 * torch.randn(20000, 4, dtype=dtype)
    noise = torch.randn(20000, dtype=dtype)
    z = _search(noise, weights, loc, log_scale).double()
    below = (weights.double() * torch.special.ndtr((z[:, None] - loc) / log_scale.double().exp())).sum(-1)
    error = (torch.special.ndtri(below) - noise).abs()
    assert error.quantile(0.999) < tolerance


@pytest.mark.parametrize("traced", [False, True])
def test_quantiles_of_extreme_mixtures_are_found(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if traced:
        monkeypatch.setattr(mixture, "_is_traced", lambda: True)
    noise = torch.randn(4000, dtype=torch.float64)
    far = torch.tensor([-1e5, 1e5]).double().expand(4000, -1)
    scales = 3000 * torch.randn(4000, 4).double(), (torch.rand(4000, 4).double() - 0.5) * math.log(1000)
    for loc, log_scale in ((far, torch.zeros_like(far)), scales):
        weights = torch.randn_like(loc).softmax(-1)
        z = _search(noise, weights, loc, log_scale)
        below = (weights * torch.special.ndtr((z[:, None] - loc) / log_scale.exp())).sum(-1)
        torch.testing.assert_close(below, torch.special.ndtr(noise), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_searches_can_be_traced() -> None:
    family, noise = Mixture(2, 3).double(), torch.randn(50, 1, 2, dtype=torch.float64)
    phi = family.initial(torch.zeros(1, 2).double(), 0.5)
    graph = make_fx(lambda phi, noise: family.rsample(phi, noise))(phi, noise)
    assert not mixture._is_traced()
    torch.testing.assert_close(graph(phi + 0.1, -noise), family.rsample(phi + 0.1, -noise))


def test_no_datapoints() -> None:
    q = Mixture(2, 3)(torch.zeros(0, 15))
    assert q.log_prob(q.rsample((4,))).shape == (4, 0)


def test_adam_learns_the_weights_of_distant_modes() -> None:
    guide = PerDatapointGuide(squares, family=lambda dim: Mixture(dim, 2))
    guide.setup(X)
    at_modes = torch.stack([0 * X, 0 * X, -X.sqrt(), X.sqrt(), 0 * X - 2, 0 * X - 2], -1)
    objective = bind(squares, guide, (X,), None, 0).objective
    phi = local_optimum._adam(objective, at_modes, 200, torch.Generator().manual_seed(0), False)
    expected = torch.sigmoid(2 * 0.3 * X.sqrt())
    torch.testing.assert_close(phi[:, :2].softmax(-1)[:, 1], expected, atol=0.04, rtol=0.0)


def test_fixed_noise_is_cut_by_the_draws_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = PerDatapointGuide(squares, family=lambda dim: Mixture(dim, 8))
    guide.setup(X)
    problem, sizes = bind(squares, guide, (X,), None, 0), []
    monitored = LocalLogJoint.__call__
    monkeypatch.setattr(LocalLogJoint, "__call__", lambda own, z: sizes.append(z.shape[0] * 4) or monitored(own, z))
    noise = torch.randn(MAX_ROWS // 8, 4, 1)
    loss = local_optimum.FixedNoiseLoss(
        problem, noise, torch.arange(4), problem.phi.double(), torch.ones(4, 1, 1).double()
    )
    loss._evaluate(problem.objective, problem.phi.double(), noise)
    assert max(sizes) <= MAX_ROWS


def test_far_tails_have_finite_gradients() -> None:
    family = Mixture(2, 3)
    phi = family.initial(torch.zeros(1, 2), 0.05).requires_grad_()
    noise = torch.tensor([[[6.0, -6.0]], [[-5.0, 5.0]], [[0.0, 0.0]]])
    (grad,) = torch.autograd.grad(family.rsample(phi, noise).square().sum(), phi)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_components": 0}, "num_components=0 because it must be an integer of at least 1; try num_components=4"),
        ({"spread": 0.0}, "spread=0.0 because it must be a positive number; try spread=1.0"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Mixture(2, **options)


def test_natural_gradients_are_refused() -> None:
    guide = SemiAmortizedGuide(squares, family="mixture", update=NaturalGradient(0.5))
    with pytest.raises(ValueError, match="refine a Mixture family by NaturalGradient because its Fisher information"):
        guide(X)


def test_analytic_divergences_are_refused() -> None:
    guide = SemiAmortizedGuide(squares, family="mixture", estimator="analytic_kl")
    with pytest.raises(ValueError, match="Cannot estimate gradients of a Mixture family by 'analytic_kl'"):
        guide(X)


def test_gradients_under_autocast() -> None:
    """Of the parameters' own precision, in which linear systems can be solved."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    svi = SVI(model, AmortizedGuide(model, family="mixture"), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(math.isfinite(svi.step(torch.randn(16))) for _ in range(2))
