"""Laws that every variational family obeys, crossed over the registry; autodiff and quadrature are the oracle."""

import copy
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, PerDatapointGuide, estimate_gaps, optimize_local
from pyro_amortized.diagnostics.optimum import local_optimum
from pyro_amortized.families import (
    Flow,
    LowRankMultivariateNormal,
    Mixture,
    Structured,
    VariationalFamily,
    base,
    build_family,
    register_family,
)


class Laplace(VariationalFamily):
    """The least that a member needs: ``num_params`` and ``forward``."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        loc, log_scale = phi.split(self.latent_dim, -1)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)


def chain(latent_dim: int) -> Structured:
    """Every dimension conditioned on the one before."""
    return Structured(latent_dim, torch.eye(latent_dim).bool().roll(-1, -1).tril(-1))


def stacked(latent_dim: int, context_dim: int) -> nn.Module:
    """A conditional transform of Pyro's own making."""
    return transforms.conditional_spline(latent_dim, context_dim, [16], count_bins=4)


REGISTERED = sorted(base._REGISTRY)
SPECS: dict[str, base.FamilySpec] = {
    **dict(zip(REGISTERED, REGISTERED, strict=True)),
    "minimal": Laplace,
    "one_component": lambda dim: Mixture(dim, 1),
    "eight_components": lambda dim: Mixture(dim, 8),
    "chain": chain,
    "spline_flow": lambda dim: Flow(dim, "spline_autoregressive", 2),
    "coupling_flow": lambda dim: Flow(dim, "affine_coupling", 4),
    "planar_flow": lambda dim: Flow(dim, "planar", 2),
    "own_flow": lambda dim: Flow(dim, stacked, 1),
}
if importlib.util.find_spec("zuko") is not None:
    SPECS["zuko_flow"] = lambda dim: Flow(dim, "zuko.NSF", 2, hidden_dims=(16,))
DIMS = {"coupling_flow": 2}
"""Fewest latent dimensions, where it is not 1."""
NO_DENSITY = {"planar_flow"}
"""No log-density but of their own draws."""
DENSE = sorted(set(SPECS) - NO_DENSITY)
NOISY = [name for name in SPECS if build_family(SPECS[name], 2).noise_dim is not None]
SQUARE = [name for name in NOISY if build_family(SPECS[name], 3).noise_dim == 3]
EXACT = ["normal", "multivariate_normal", "structured", "chain", "one_component"]
"""Families whose members are told by mean and covariance."""


def cross(names: list[str], dims: tuple[int, ...]) -> pytest.MarkDecorator:
    """All pairs of names and dimensions that there are."""
    pairs = [(name, dim) for name in names for dim in dims if dim >= DIMS.get(name, 1)]
    return pytest.mark.parametrize(("name", "latent_dim"), pairs)


def slow(name: str) -> object:
    """A parameter for slow tests only."""
    return pytest.param(name, marks=pytest.mark.slow)


QUANTILE_DRAWS = 1000
"""Draws of the default ``VariationalFamily.quantile``."""


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def make(
    name: str, latent_dim: int, *batch: int, dtype: torch.dtype = torch.float64
) -> tuple[VariationalFamily, Tensor]:
    """A family and phi of shape ``(*batch, P)`` away from where it starts."""
    family = build_family(SPECS[name], latent_dim).to(dtype).requires_grad_(False)
    for parameter in family.parameters():  # away from where it starts, too
        parameter += 0.1 * torch.randn_like(parameter)
    loc = torch.randn(*batch, latent_dim, dtype=dtype)
    phi = family.initial(loc, 0.7)
    return family, phi + 0.4 * torch.randn_like(phi)


def features(z: Tensor) -> Tensor:
    """First and second moments, and bounded functions of draws ``(K, *, D)``, as ``(K, *, F)``."""
    products = (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
    return torch.cat([z, products, z.sin(), z.abs().clamp(max=3.0)], -1)


def z_score(first: Tensor, second: Tensor) -> float:
    """The largest difference of mean features of two sets of draws, in Monte Carlo standard errors."""
    a, b = features(first), features(second)
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt().clamp(min=1e-9)
    return float(((a.mean(0) - b.mean(0)).abs() / error).max())


def grid_1d(family: VariationalFamily, phi: Tensor, num_points: int = 40001) -> tuple[Tensor, Tensor]:
    """Points that span q at one phi ``(P,)``, and the density there."""
    draws = family(phi).sample((4000,)).squeeze(-1)
    middle, width = draws.median(), 4 * (draws - draws.median()).abs().max()
    z = torch.linspace(float(middle - width), float(middle + width), num_points, dtype=phi.dtype)
    return z, family(phi).log_prob(z.unsqueeze(-1)).exp()


# Draws


@cross(NOISY, (1, 4))
def test_rsample_and_forward_are_the_same_law(name: str, latent_dim: int) -> None:
    family, phi = make(name, latent_dim, 4)
    noise = torch.randn(10000, 4, family.noise_dim, dtype=phi.dtype)
    drawn = family(phi).sample((10000,))
    assert z_score(family.rsample(phi, noise), drawn) < 5.0
    assert z_score(family.rsample(phi, 1.1 * noise), drawn) > 5.0
    assert z_score(family.rsample(phi, noise + 0.1), drawn) > 5.0


def density_of_draws(family: VariationalFamily, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One draw ``(D,)`` from one phi, and its log-density by the change of variables from noise."""

    def push(e: Tensor) -> Tensor:
        return family.rsample(phi, e.unsqueeze(0)).squeeze(0)

    jacobian = torch.autograd.functional.jacobian(push, noise)
    log_normal = -0.5 * noise.square().sum() - 0.5 * len(noise) * math.log(2 * math.pi)
    return push(noise), log_normal - torch.linalg.slogdet(jacobian).logabsdet


@cross(SQUARE, (1, 2, 5))
def test_log_prob_is_the_change_of_variables(name: str, latent_dim: int) -> None:
    family, phi = make(name, latent_dim)
    for noise in torch.randn(10, latent_dim, dtype=phi.dtype):
        z, expected = density_of_draws(family, phi, noise)
        drawn, log_q = family.sample_and_log_prob(phi, noise.unsqueeze(0))
        torch.testing.assert_close(drawn.squeeze(0), z)
        torch.testing.assert_close(log_q.squeeze(0), expected, rtol=1e-8, atol=1e-8)
        if name in DENSE:
            torch.testing.assert_close(family(phi).log_prob(z), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("latent_dim", [1, 3, 6])
def test_low_rank_draws_have_its_covariance(latent_dim: int) -> None:
    family, phi = make("low_rank_multivariate_normal", latent_dim)
    noise = torch.zeros(family.noise_dim, dtype=phi.dtype)
    jacobian = torch.autograd.functional.jacobian(lambda e: family.rsample(phi, e.unsqueeze(0)).squeeze(0), noise)
    torch.testing.assert_close(jacobian @ jacobian.T, family(phi).covariance_matrix)
    torch.testing.assert_close(family.rsample(phi, noise.unsqueeze(0)).squeeze(0), family(phi).mean)


@pytest.mark.parametrize("name", set(SPECS) - set(NOISY))
def test_family_without_noise_draws_its_own(name: str) -> None:
    family, phi = make(name, 2, 3)
    assert not hasattr(family, "rsample")
    z, log_q = family.sample_and_log_prob(phi, 5)
    torch.testing.assert_close(log_q, family(phi).log_prob(z))


# Densities


@pytest.mark.parametrize("name", [name for name in DENSE if DIMS.get(name, 1) == 1])
def test_total_mass_is_one_in_1d(name: str) -> None:
    family, phis = make(name, 1, 3)
    for phi in phis:
        z, density = grid_1d(family, phi)
        assert torch.trapezoid(density, z) == pytest.approx(1.0, abs=1e-3)
        assert torch.trapezoid(1.002 * density, z) != pytest.approx(1.0, abs=1e-3)


def grid_2d(family: VariationalFamily, phi: Tensor, num_points: int) -> tuple[Tensor, float]:
    """Points ``(G, 2)`` that span q at one phi ``(P,)``, and the area of each."""
    draws = family(phi).sample((4000,))
    middle = draws.median(0).values
    width = 2 * (draws - middle).abs().amax(0)
    axes = [
        torch.linspace(float(m - w), float(m + w), num_points, dtype=phi.dtype)
        for m, w in zip(middle, width, strict=True)
    ]
    return torch.cartesian_prod(*axes), math.prod(float(axis[1] - axis[0]) for axis in axes)


@pytest.mark.parametrize("name", DENSE)
def test_total_mass_is_one_in_2d(name: str) -> None:
    family, phi = make(name, 2)
    grid, area = grid_2d(family, phi, 451 if isinstance(family, Flow) else 601)
    mass = area * family(phi).log_prob(grid).exp().sum()
    assert mass == pytest.approx(1.0, abs=1e-3)
    assert 1.002 * mass != pytest.approx(1.0, abs=1e-3)


@cross(DENSE, (1, 4))
def test_entropy(name: str, latent_dim: int) -> None:
    family, phi = make(name, latent_dim, 3)
    q = family(phi)
    try:
        entropy = q.entropy()
    except NotImplementedError:
        pytest.skip("no closed form")
    assert entropy.shape == (3,)
    log_q = q.log_prob(q.sample((20000,)))
    error = log_q.std(0) / math.sqrt(len(log_q))
    assert ((entropy + log_q.mean(0)).abs() < 5 * error).all()
    assert ((entropy + 0.1 + log_q.mean(0)).abs() > 5 * error).all()


# Gradients


@pytest.mark.thinned
@cross(NOISY, (1, 3))
def test_gradients_on_fixed_noise_are_finite_differences(name: str, latent_dim: int) -> None:
    family, phi = make(name, latent_dim, 2)
    noise = torch.randn(16, 2, family.noise_dim, dtype=phi.dtype)

    def elbo(phi: Tensor) -> Tensor:
        z, log_q = family.sample_and_log_prob(phi, noise)
        return (z.sin().sum(-1) - 0.1 * z.pow(4).sum(-1) - log_q).mean(0)

    torch.autograd.gradcheck(elbo, phi.requires_grad_())


def bounded(z: Tensor) -> Tensor:
    """A function of draws ``(*, D)`` that tells signs, sizes and correlations apart, ``(*)``."""
    return z.sin().sum(-1) + 0.3 * z.square().sum(-1) + 0.5 * z.prod(-1).tanh()


def exact_slopes(family: VariationalFamily, phi: Tensor, directions: Tensor) -> Tensor:
    """Slopes of the expectation of :func:`bounded` at one phi ``(P,)``: central differences of a quadrature.

    Over noise for flows, whose densities have kinks; over draws for all others.
    """
    over_noise = isinstance(family, Flow)
    if over_noise:
        axis = torch.linspace(-6, 6, 4001 if family.latent_dim == 1 else 201, dtype=phi.dtype)
        grid = torch.cartesian_prod(*[axis] * family.latent_dim).reshape(-1, 1, family.latent_dim)
        weights = (axis[1] - axis[0]) ** family.latent_dim * dist.Normal(0.0, 1.0).log_prob(grid).sum(-1).exp()
    elif family.latent_dim == 1:
        z, _ = grid_1d(family, phi, 10001)
        grid, weights = z.reshape(-1, 1, 1), z[1] - z[0]
    else:
        points, area = grid_2d(family, phi, 201)
        grid, weights = points.unsqueeze(1), torch.tensor(area)

    def expectation(phi: Tensor) -> Tensor:
        if over_noise:
            return (weights * bounded(family.rsample(phi, grid))).sum()
        return (weights * family(phi).log_prob(grid).exp() * bounded(grid)).sum()

    steps = 1e-4 * directions
    return torch.stack([expectation(phi + s[None]) - expectation(phi - s[None]) for s in steps]) / 2e-4


@pytest.mark.thinned
@cross(DENSE, (1, 2))
@pytest.mark.parametrize("way", ["rsample", "noise", "weighted"])
def test_reparameterised_gradients_are_those_of_the_expectation(name: str, latent_dim: int, way: str) -> None:
    family, phi = make(name, latent_dim)
    copies = phi.expand(10000, -1).clone().requires_grad_()
    noise = torch.randn(1, 10000, family.noise_dim or 0, dtype=phi.dtype)
    weighted = family.weighted_draws(copies, noise) if family.noise_dim else None
    if (way == "noise" and not family.noise_dim) or (way == "weighted" and weighted is None):
        pytest.skip("not a way of this family")
    if weighted is not None and way == "weighted":
        value = (weighted[2] * bounded(weighted[0])).sum()
    else:
        value = bounded(family(copies).rsample() if way == "rsample" else family.rsample(copies, noise)).sum()
    directions = torch.randn(4, len(phi), dtype=phi.dtype)
    exact = exact_slopes(family, phi, directions)
    draws = torch.autograd.grad(value, copies)[0] @ directions.T
    error = draws.std(0) / math.sqrt(len(draws)) + 1e-5
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()
    assert ((1.5 * draws.mean(0) - exact).abs() > 5 * error).any()


@pytest.mark.parametrize("name", NOISY)
def test_weighted_draws_are_draws(name: str) -> None:
    family, phi = make(name, 2, 3)
    noise = torch.randn(5000, 3, family.noise_dim, dtype=phi.dtype)
    weighted = family.weighted_draws(phi, noise)
    if weighted is None:
        pytest.skip("all draws count alike")
    z, log_q, weights = weighted
    torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=phi.dtype))
    torch.testing.assert_close(log_q, family(phi).log_prob(z))
    drawn = features(family(phi).sample((5000,)))
    mean = (weights.unsqueeze(-1) * features(z)).sum(0)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((mean - drawn.mean(0)).abs() < 8 * error).all()


# Starts and quantiles


@pytest.mark.parametrize(("latent_dim", "scale"), [(1, 0.1), (3, 2.0), (10, 0.5)])
@pytest.mark.parametrize("name", REGISTERED)
def test_initial_has_the_given_mean_and_scale(name: str, latent_dim: int, scale: float) -> None:
    family = build_family(name, latent_dim).double()
    loc = torch.randn(2, latent_dim, dtype=torch.float64)
    draws = family(family.initial(loc, scale)).sample((40000,))
    mean, sd = draws.mean(0), draws.std(0)
    if isinstance(family, Mixture):  # whose components start apart, each of the given scale
        assert ((sd.square() - scale**2 - family.spread**2).abs() < 0.05 * sd.square()).all()
        family.spread = 1e-6
        draws = family(family.initial(loc, scale)).sample((40000,))
        mean, sd = draws.mean(0), draws.std(0)
    # The factor of the low-rank family starts at entries of at most 0.05, that is at most this much wider.
    slack = math.sqrt(1 + 0.05**2 * family.rank) - 1 if isinstance(family, LowRankMultivariateNormal) else 0.0
    mean_error, sd_error = scale / math.sqrt(len(draws)), scale / math.sqrt(2 * len(draws))
    assert ((mean - loc).abs() < 5 * mean_error).all()
    assert ((sd - scale).abs() < 5 * sd_error + slack * scale).all()
    assert ((sd - 1.05 * scale).abs() > 5 * sd_error + slack * scale).all()


@pytest.mark.parametrize("name", REGISTERED)
def test_initial_is_exact_where_moments_are(name: str) -> None:
    family = build_family(name, 4).double()
    loc = torch.randn(2, 4, dtype=torch.float64)
    if isinstance(family, Mixture):
        family.spread = 1e-8
    q = family(family.initial(loc, 0.3))
    try:
        mean, sd = q.mean, q.variance.sqrt()
    except NotImplementedError:
        pytest.skip("no closed form")
    torch.testing.assert_close(mean, loc)
    relative = 1 + 0.05**2 * family.rank if isinstance(family, LowRankMultivariateNormal) else 1 + 1e-12
    assert ((sd / 0.3).square() <= relative).all()
    assert ((sd / 0.3).square() >= 1 - 1e-12).all()


def test_low_rank_factor_starts_where_it_has_a_gradient() -> None:
    family = build_family("low_rank_multivariate_normal", 3).double()
    phi = family.initial(torch.zeros(1, 3, dtype=torch.float64), 1.0).requires_grad_()
    noise = torch.randn(64, 1, family.noise_dim, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(family.rsample(phi, noise).prod(-1).sum(), phi)
    assert (gradient[:, 6:].abs() > 1e-6).all()


def test_default_initial_is_zeros() -> None:
    assert torch.equal(Laplace(3).initial(torch.ones(5, 2, 3), 0.1), torch.zeros(5, 2, 6))


def sampled_quantiles(family: VariationalFamily) -> bool:
    return type(family).quantile is VariationalFamily.quantile


@pytest.mark.parametrize("name", EXACT)
def test_phi_round_trip(name: str) -> None:
    family, phi = make(name, 4, 3)
    q = family(phi)
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    back = family.laplace(q.mean, torch.linalg.inv(covariance))
    logit = 1 if isinstance(family, Mixture) else 0  # of the one component, which says nothing
    torch.testing.assert_close(back[:, logit:], phi[:, logit:])


@pytest.mark.parametrize("name", DENSE)
def test_a_family_is_the_same_after_saving(name: str) -> None:
    family, phi = make(name, 3, 2)
    torch.manual_seed(1)
    other = build_family(SPECS[name], 3).double()
    other.load_state_dict(copy.deepcopy(family.state_dict()))
    z = family(phi).sample((2,))
    torch.testing.assert_close(other(phi).log_prob(z), family(phi).log_prob(z))


@pytest.mark.parametrize("name", [name for name in DENSE if DIMS.get(name, 1) == 1])
def test_quantiles_invert_the_distribution_function(name: str) -> None:
    family, phi = make(name, 1)
    probs = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=phi.dtype)
    z, density = grid_1d(family, phi)
    cumulative = torch.cumulative_trapezoid(density, z)

    def level(quantile: Tensor) -> Tensor:
        return cumulative[torch.searchsorted(z, quantile.squeeze(-1)) - 1]

    error = (probs * (1 - probs) / QUANTILE_DRAWS).sqrt() if sampled_quantiles(family) else torch.tensor(2e-4)
    quantile = family.quantile(phi, probs)
    scale = family(phi).sample((1000,)).std()
    assert ((level(quantile) - probs).abs() < 5 * error).all()
    assert ((level(quantile + 0.5 * scale) - probs).abs() > 5 * error).any()


@pytest.mark.parametrize("name", SPECS)
def test_quantiles_are_those_of_draws(name: str) -> None:
    family, phi = make(name, 3, 4)
    probs = torch.tensor([0.1, 0.5, 0.8], dtype=phi.dtype)
    quantile = family.quantile(phi, probs)
    assert quantile.shape == (3, 4, 3)
    draws = family(phi).sample((20000,))
    count = 1 / (1 / 20000 + (1 / QUANTILE_DRAWS if sampled_quantiles(family) else 0.0))
    error = (probs * (1 - probs) / count).sqrt()[:, None, None]
    below = torch.stack([(draws <= q).to(phi.dtype).mean(0) for q in quantile])
    assert ((below - probs[:, None, None]).abs() < 5 * error).all()
    assert ((below.flip(0) - probs[:, None, None]).abs() > 5 * error).any()


@pytest.mark.parametrize("name", SPECS)
def test_quantiles_take_probabilities_of_any_precision(name: str) -> None:
    family, phi = make(name, 2, 3)
    assert family.quantile(phi, torch.tensor([0.5])).dtype == torch.float64


# Shapes


@cross(list(SPECS), (1, 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 1, 3)])
def test_shapes_and_precision(name: str, batch: tuple[int, ...], latent_dim: int, dtype: torch.dtype) -> None:
    family, phi = make(name, latent_dim, *batch, dtype=dtype)
    q = family(phi)
    assert phi.shape == (*batch, family.num_params)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == (batch, (latent_dim,), True)
    z, log_q = family.sample_and_log_prob(phi, 5)
    quantiles = family.quantile(phi, torch.tensor([0.2, 0.8], dtype=dtype))
    assert (z.shape, log_q.shape) == ((5, *batch, latent_dim), (5, *batch))
    assert quantiles.shape == (2, *batch, latent_dim)
    results = [z, log_q, quantiles]
    if name in DENSE:
        results.append(q.log_prob(z))
        assert results[-1].shape == (5, *batch)
        assert q.expand((7, *batch)).log_prob(z[:1].expand(7, *z.shape[1:])).shape == (7, *batch)
    if family.noise_dim is not None:
        results.append(family.rsample(phi, torch.randn(5, *batch, family.noise_dim, dtype=dtype)))
        assert results[-1].shape == z.shape
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("name", SPECS)
def test_locations_and_centres(name: str) -> None:
    family, phi = make(name, 3, 2)
    shift = torch.randn(3, dtype=phi.dtype)
    moved, locations = phi.clone(), phi[:, family.locations]
    moved[:, family.locations] += shift.repeat(locations.shape[-1] // 3)
    centres = family.centres(phi)
    assert centres.shape[1:] == (2, 3)
    if locations.shape[-1]:
        torch.testing.assert_close(family.centres(moved), centres + shift)
        torch.manual_seed(1)
        z = family(phi).rsample((5,))
        torch.manual_seed(1)
        torch.testing.assert_close(family(moved).rsample((5,)), z + shift)


@pytest.mark.parametrize("name", SPECS)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    family, phi = make(name, 3, 6)
    z, rows = torch.randn(5, 6, 3, dtype=phi.dtype), torch.tensor([4, 1])
    if name in NO_DENSITY:
        noise = torch.randn(5, 6, 3, dtype=phi.dtype)
        alone = family.sample_and_log_prob(phi[rows], noise[:, rows])
        for together, part in zip(family.sample_and_log_prob(phi, noise), alone, strict=True):
            torch.testing.assert_close(together[:, rows], part)
        return
    torch.testing.assert_close(family(phi).log_prob(z)[:, rows], family(phi[rows]).log_prob(z[:, rows]))
    if family.noise_dim is not None:
        noise = torch.randn(5, 6, family.noise_dim, dtype=phi.dtype)
        torch.testing.assert_close(family.rsample(phi, noise)[:, rows], family.rsample(phi[rows], noise[:, rows]))
    phi.requires_grad_()
    (gradient,) = torch.autograd.grad(family(phi).log_prob(z)[:, rows].sum(), phi)
    assert gradient[rows].abs().sum() > 0
    assert gradient[[0, 2, 3, 5]].abs().sum() == 0


@pytest.mark.parametrize("name", SPECS)
def test_repr_tells_the_sizes(name: str) -> None:
    family = build_family(SPECS[name], 3)
    assert f"latent_dim=3, num_params={family.num_params}" in repr(family)


# Units

LOADINGS, IN_UNITS = torch.tensor([[1.0, 0.95], [0.2, -0.1]]).double(), torch.tensor([[1.0, 0.5], [0.3, -2.0]]).double()


@pytest.mark.parametrize("name", [name for name in NOISY if name in REGISTERED])
def test_gaps_do_not_change_with_the_units_of_z(name: str) -> None:
    gaps = []
    for c in (1.0, 1e-3):
        pyro.set_rng_seed(0)

        def model(x: Tensor, c: float = c) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), c).to_event(1))
                pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.3 * c).to_event(1), obs=x)

        family = build_family(SPECS[name], 2).double()
        if isinstance(family, Mixture):
            family.spread = 0.5 * c
        guide = PerDatapointGuide(model, family=family)
        guide.setup(c * IN_UNITS)
        with torch.no_grad():
            guide.inference.table.data = family.initial(c * IN_UNITS.flip(-1), 0.5 * c)
        data = estimate_gaps(model, guide, (c * IN_UNITS,)).dataset
        gaps.append(
            torch.stack([torch.from_numpy(data[f"{gap}_gap"].values) for gap in ("approximation", "amortization")])
        )
    torch.testing.assert_close(*gaps, atol=2e-3, rtol=1e-3)


# Names and errors


@pytest.mark.parametrize("spec", [Laplace, Laplace(2), lambda dim: Laplace(dim)], ids=["class", "instance", "lambda"])
def test_build_family_takes(spec: base.FamilySpec) -> None:
    family = build_family(spec, 2)
    assert isinstance(family, Laplace)
    assert family.latent_dim == 2


def test_register_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    assert register_family("laplace")(Laplace) is Laplace
    assert isinstance(build_family("laplace", 3), Laplace)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_family("norml", 2), r"Cannot use family 'norml' because no variational family.*'normal'"),
        (
            lambda: build_family(3, 2),
            r"Cannot use family 3 because it is neither a name nor a VariationalFamily.*'normal'",
        ),
        (lambda: build_family(lambda dim: dim, 2), r"Cannot use family .* because it gave a int; try a function"),
        (lambda: build_family(Laplace(3), 2), r"Laplace\(latent_dim=3\) because .* 2 unconstrained .*latent_dim=2"),
        (lambda: build_family(lambda dim: Laplace(dim + 1), 2), r"latent_dim=3.*have 2 unconstrained"),
        (lambda: LowRankMultivariateNormal(3, rank=0), r"Cannot use rank=0 because .* at least 1; try rank=1"),
        (lambda: AmortizedGuide(conjugate, family="norml"), r"Cannot use family 'norml'"),
    ],
)
def test_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# A custom family in guides and diagnostics

LAPLACE_GAP = 0.5 * math.log(math.pi) - 0.5
"""min over b of KL(Laplace(0, b) || N(0, s^2)), in nats, for any s; at b = s / sqrt(2)."""


def conjugate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def train(spec: base.FamilySpec, x: Tensor, num_steps: int) -> tuple[AmortizedGuide, list[float]]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AmortizedGuide(conjugate, family=spec)
    svi = pyro.infer.SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    return guide, [svi.step(x) for _ in range(num_steps)]


def test_custom_family_trains_however_it_is_given() -> None:
    x = torch.randn(8)
    losses = [train(spec, x, 5)[1] for spec in (Laplace, Laplace(1), lambda dim: Laplace(dim))]
    assert losses[0] == losses[1] == losses[2]
    assert all(math.isfinite(loss) for loss in losses[0])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> tuple[AmortizedGuide, Tensor]:
    """A guide with a custom family, trained a little, that diagnostics may not optimise on fixed noise."""

    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("a family that draws its own noise has no deterministic objective")

    monkeypatch.setattr(local_optimum, "minimize_rows", unexpected)
    x = torch.tensor([-1.5, -0.5, 0.0, 0.5, 2.0])
    guide, losses = train(Laplace, x, 30)
    assert sum(losses[-5:]) < sum(losses[:5])
    return guide, x


@pytest.mark.slow
def test_local_optimum_of_a_custom_family(trained: tuple[AmortizedGuide, Tensor]) -> None:
    guide, x = trained
    optimum = optimize_local(conjugate, guide, (x,))
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).double()
    shortfall = (evidence - LAPLACE_GAP - optimum.elbo).abs()
    assert (shortfall < 5 * optimum.elbo_se + 0.01).all()
    before = (evidence - optimum.initial_elbo - LAPLACE_GAP).sum()
    assert before > 5 * optimum.initial_elbo_se.square().sum().sqrt() + 0.05


@pytest.mark.slow
def test_gaps_of_a_custom_family(trained: tuple[AmortizedGuide, Tensor]) -> None:
    guide, x = trained
    gaps = estimate_gaps(conjugate, guide, (x,)).dataset
    error = 5 * torch.as_tensor(gaps["approximation_gap_se"].values) + 0.01
    gap = torch.as_tensor(gaps["approximation_gap"].values)
    assert ((gap - LAPLACE_GAP).abs() < error).all()
    assert (gap.abs() > error).all()
    assert (gaps["amortization_gap"].values > 0).all()


@pytest.mark.slow
def test_the_family_of_the_documentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    page = Path(__file__).parents[2] / "docs" / "extending.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(code, page.name, "exec"), {})
    printed = capsys.readouterr().out
    normal, laplace = (float(gap) for gap in re.findall(r"approximation gap (-?\d+\.\d+) nats", printed))
    assert laplace < 0.4 * normal
    assert printed.count("torch.Size([5])") == 3
