"""The structured normal: its density, the parents that it takes from the model, and what guides make of it."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    NaturalGradient,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
    optimize_local,
)
from pyro_amortized.families import Structured, build_family
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.dependence import posterior_parents
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.plates import probe
from pyro_amortized.structure.reader import StructureReader

pytestmark = pytest.mark.usefixtures("_float64")

SPARSE = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)


def network(parents: Tensor, *batch: int) -> tuple[Structured, Tensor]:
    family = Structured(len(parents), parents)
    return family, 0.7 * torch.randn(*batch, family.num_params)


def dense(family: Structured, phi: Tensor) -> dist.MultivariateNormal:
    """The normal at one phi ``(P,)`` by its definition, dimension by dimension."""
    dim = family.latent_dim
    loc, scale, couplings = phi[:dim], phi[dim : 2 * dim].exp(), iter(phi[2 * dim :])
    unit = torch.eye(dim)
    for i in range(dim):
        for j in range(dim):
            if family.parents[i, j]:
                unit[i, j] = -next(couplings)
    return dist.MultivariateNormal(loc, precision_matrix=unit.T @ torch.diag(scale**-2) @ unit)


# The distribution


def test_log_prob_is_that_of_the_dense_normal() -> None:
    family, phi = network(SPARSE, 5)
    z = torch.randn(7, 5, 4)
    found = family(phi).log_prob(z)
    expected = torch.stack([dense(family, row).log_prob(z[:, i]) for i, row in enumerate(phi)], -1)
    torch.testing.assert_close(found, expected)
    wrong = torch.stack([dense(family, row).log_prob(z[:, i]) for i, row in enumerate(phi.roll(1, -1))], -1)
    assert (found - wrong).abs().max() > 0.1


def test_moments_entropy_and_divergence_are_those_of_the_dense_normal() -> None:
    family, phi = network(SPARSE, 2)
    q, p = dense(family, phi[0]), dense(family, phi[1])
    found, other = family(phi[0]), family(phi[1])
    for name in ("mean", "variance", "covariance_matrix", "scale_tril", "precision_matrix"):
        torch.testing.assert_close(getattr(found, name), getattr(q, name))
    torch.testing.assert_close(found.entropy(), q.entropy())
    torch.testing.assert_close(torch.distributions.kl_divergence(found, other), torch.distributions.kl_divergence(q, p))
    torch.testing.assert_close(torch.distributions.kl_divergence(found, p), torch.distributions.kl_divergence(q, p))


def test_draws_solve_the_network() -> None:
    family, phi = network(SPARSE, 3)
    noise = torch.randn(6, 3, 4)
    z, q = family.rsample(phi, noise), family(phi)
    expected = q.loc + (q.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(z, expected)
    draws = q.sample((20000,))
    error = (draws.var(0) / len(draws)).sqrt()
    assert ((draws.mean(0) - q.mean).abs() < 5 * error).all()
    assert ((draws.mean(0) - q.mean - 0.1 * q.stddev).abs() > 5 * error).all()
    covariance = (draws - q.mean).transpose(0, 1).mT @ (draws - q.mean).transpose(0, 1) / len(draws)
    bound = 6 * torch.einsum("ni,nj->nij", q.stddev, q.stddev) * (2 / len(draws)) ** 0.5
    assert ((covariance - q.covariance_matrix).abs() < bound).all()


def test_total_mass_is_one_in_2d() -> None:
    family, phi = network(torch.tensor([[0, 0], [1, 0]]))
    q = family(phi)
    axes = [torch.linspace(-9, 9, 601) * q.stddev[i] + q.mean[i] for i in range(2)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    mass = torch.trapezoid(torch.trapezoid(q.log_prob(grid).exp(), axes[1]), axes[0])
    assert mass == pytest.approx(1.0, abs=1e-3)
    assert 1.002 * mass != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("parents", [SPARSE, torch.zeros(2, 2), torch.ones(3, 3).tril(-1)])
def test_gradients_are_finite_differences(parents: Tensor) -> None:
    family, phi = network(parents, 2)
    noise, at = torch.randn(3, 2, len(parents)), torch.randn(3, 2, len(parents))

    def elbo(phi: Tensor, at: Tensor) -> Tensor:
        z = family.rsample(phi, noise)
        return z.sin().sum(-1) - family(phi).log_prob(z) + family(phi).log_prob(at) + family(phi).variance.sum(-1)

    inputs = phi.requires_grad_(), at.requires_grad_()
    assert torch.autograd.gradcheck(elbo, inputs)
    assert torch.autograd.gradgradcheck(elbo, inputs)


def test_rows_do_not_depend_on_each_other() -> None:
    family, phi = network(SPARSE, 6)
    z, noise, rows = torch.randn(5, 6, 4), torch.randn(5, 6, 4), [4, 1]
    torch.testing.assert_close(family(phi).log_prob(z)[:, rows], family(phi[rows]).log_prob(z[:, rows]))
    torch.testing.assert_close(family.rsample(phi, noise)[:, rows], family.rsample(phi[rows], noise[:, rows]))
    (gradient,) = torch.autograd.grad(family(phi.requires_grad_()).log_prob(z)[:, rows].sum(), phi)
    assert gradient[rows].abs().min() > 0
    assert gradient[[0, 2, 3, 5]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_precision(dtype: torch.dtype) -> None:
    family, phi = network(SPARSE, 3, 1)
    phi = phi.to(dtype)
    q = family.to(dtype)(phi).expand([3, 2])
    assert (q.batch_shape, q.event_shape) == ((3, 2), (4,))
    z = q.rsample(torch.Size([5, 2]))
    assert (z.shape, z.dtype, q.log_prob(z).shape, q.log_prob(z).dtype) == ((5, 2, 3, 2, 4), dtype, (5, 2, 3, 2), dtype)
    assert q.rsample().shape == q.mean.shape == q.variance.shape == (3, 2, 4)
    assert family.quantile(phi, torch.tensor([0.1, 0.5])).dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    reference = family(phi.double()).log_prob(z[0, :, :, :1].double())
    torch.testing.assert_close(q.log_prob(z)[0, :, :, :1].double(), reference, rtol=tolerance, atol=tolerance)


def test_phi_of_its_own_posterior_is_phi() -> None:
    family, phi = network(SPARSE, 5)
    q = family(phi)
    torch.testing.assert_close(family.laplace(q.mean, q.precision_matrix), phi)
    assert (family.laplace(q.mean, 2 * q.precision_matrix) - phi).abs().max() > 0.1


def test_best_scales_where_couplings_are_missing() -> None:
    """With none at all the best member is known; with some, no other scales are better."""
    root = torch.randn(4, 4)
    precision, loc = root @ root.T + 0.1 * torch.eye(4), torch.randn(4)
    bare = Structured(4, torch.zeros(4, 4))
    torch.testing.assert_close(bare.laplace(loc, precision), build_family("normal", 4).laplace(loc, precision))
    family = Structured(4, SPARSE)
    phi, p = family.laplace(loc, precision), dist.MultivariateNormal(loc, precision_matrix=precision)
    best = torch.distributions.kl_divergence(family(phi), p)
    for i in range(4):
        for change in (-0.1, 0.1):
            other = phi.clone()
            other[4 + i] += change
            assert torch.distributions.kl_divergence(family(other), p) > best
    assert best < torch.distributions.kl_divergence(bare(bare.laplace(loc, precision)), p)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Structured(3, SPARSE), r"3 latent dimensions on parents of shape \(4, 4\).*try a boolean"),
        (lambda: Structured(2, torch.ones(2, 2)), r"dimension 0 on dimension 0 because parents come before.*tril"),
    ],
)
def test_wrong_parents_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# The parents

Model = Callable[[Tensor], None]


def fork(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(0.5 * a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)
        pyro.sample("y", dist.Normal(c, 1.0), obs=x)


def chain(x: Tensor, length: int = 4) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(length):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def latent_collider(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(a + 2 * b, 1.0))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def observed_collider(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + 2 * b, 1.0), obs=x)


def two_chains(x: Tensor) -> None:
    """Observations join two chains: integrating a later state out couples those before it."""
    with pyro.plate("data", len(x)):
        a = b = torch.zeros(())
        for t in range(3):
            a = pyro.sample(f"a_{t}", dist.Normal(a, 1.0))
            b = pyro.sample(f"b_{t}", dist.Normal(0.5 * b, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(a + 0.7 * b, 1.0), obs=x)


def with_globals(x: Tensor) -> None:
    """Latents of a datapoint that have only a global latent in common."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(theta, 1.0))
        b = pyro.sample("b", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.sample("y", dist.Normal(b, 1.0), obs=x)


def hierarchy(x: Tensor) -> None:
    """A level for each datapoint, with three latents around it in an inner plate, of two dimensions each."""
    data, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1)
    with data:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with inner:
            z = pyro.sample("z", dist.Normal(level.unsqueeze(-1), 1.0).expand([len(x), 3, 2]).to_event(1))
            w = pyro.sample("w", dist.Normal(z.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(w + z[..., 0] * 0.3, 1.0), obs=x.reshape(-1, 1).expand(-1, 3))


WIDE = LinearGaussian(torch.tensor([[1.0, 0.5, 0.3], [0.2, 1.0, 0.1]], dtype=torch.float64))

EDGES: dict[str, tuple[Model, set[tuple[str, str]]]] = {
    "fork": (fork, {("b", "a"), ("c", "a")}),
    "chain": (chain, {("z_1", "z_0"), ("z_2", "z_1"), ("z_3", "z_2")}),
    "latent collider": (latent_collider, {("b", "a"), ("c", "a"), ("c", "b")}),
    "observed collider": (observed_collider, {("b", "a")}),
    "globals": (with_globals, set()),
    "two chains": (
        two_chains,
        {("b_0", "a_0")}
        | {("a_1", "a_0"), ("a_1", "b_0"), ("b_1", "a_1"), ("b_1", "b_0")}
        | {("a_2", "a_1"), ("a_2", "b_1"), ("b_2", "a_2"), ("b_2", "b_1")},
    ),
    "hierarchy": (
        hierarchy,
        {(f"z[{i},{e}]", "level") for i in range(3) for e in range(2)}
        | {(f"z[{i},1]", f"z[{i},0]") for i in range(3)}
        | {(f"w[{i}]", f"z[{i},{e}]") for i in range(3) for e in range(2)},
    ),
    "wide": (WIDE.rows, {("z[1]", "z[0]"), ("z[2]", "z[0]"), ("z[2]", "z[1]")}),
}


def find(model: Any, *args: Any) -> tuple[SiteLayout, Tensor]:
    structure: Any = StructureReader("data").read(model, args, {})
    return structure.layout, posterior_parents(ModelCall(model, args, {}, structure))


@pytest.mark.parametrize("name", EDGES)
def test_parents_follow_the_model(name: str) -> None:
    model, expected = EDGES[name]
    layout, parents = find(model, torch.ones(2, 2) if name == "wide" else torch.ones(2))
    names = layout.names
    assert {(names[i], names[j]) for i, j in parents.nonzero().tolist()} == expected
    assert not parents.triu().any()


@pytest.mark.parametrize("name", EDGES)
def test_posterior_given_the_parents_is_exact(name: str) -> None:
    """The oracle: the Hessian of the log-joint, and the posterior conditionals that it makes."""
    model = EDGES[name][0]
    x = torch.ones(1, 2) if name == "wide" else torch.ones(1)
    layout, parents = find(model, x)

    def log_joint(flat: Tensor) -> Tensor:
        values = {**layout.values(flat.unsqueeze(0)), "theta": torch.tensor(0.3)}
        return poutine.trace(poutine.condition(model, values)).get_trace(x).log_prob_sum()

    precision = -torch.autograd.functional.hessian(log_joint, torch.zeros(layout.latent_dim))
    root = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(precision)))
    needed = (root.abs() > 1e-9).tril(-1)
    assert not (needed & ~parents).any()
    assert int((parents & ~needed).sum()) == 0  # nor one too many, in these models
    family = Structured(layout.latent_dim, parents)
    phi = family.laplace(torch.zeros(layout.latent_dim), precision)
    torch.testing.assert_close(family(phi).precision_matrix, precision)


def enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        a = pyro.sample("a", dist.Normal(torch.tensor([-2.0, 2.0])[k], 1.0))
        b = pyro.sample("b", dist.Normal(torch.tensor([-2.0, 2.0])[k], 1.0))
        pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.sample("y", dist.Normal(b, 1.0), obs=x)


def enumerated_inside(x: Tensor) -> None:
    """A discrete latent for each index of an inner plate couples the latents of that index only."""
    with pyro.plate("data", len(x)), pyro.plate("inner", 2):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        a = pyro.sample("a", dist.Normal(torch.tensor([-2.0, 2.0])[k], 1.0))
        b = pyro.sample("b", dist.Normal(torch.tensor([-2.0, 2.0])[k], 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x.expand(2, -1))
        pyro.sample("y", dist.Normal(b, 1.0), obs=x.expand(2, -1))


def test_enumerated_latents_are_integrated_out() -> None:
    assert find(enumerated, torch.ones(2))[1].nonzero().tolist() == [[1, 0]]
    assert find(enumerated_inside, torch.ones(3))[1].nonzero().tolist() == [[2, 0], [3, 1]]


def test_masks_and_constraints_do_not_hide_dependence() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            share = pyro.sample("share", dist.Dirichlet(rate.unsqueeze(-1) * torch.ones(3)))
            size = pyro.deterministic("size", rate * share[..., 0])
            z = pyro.sample("z", dist.Normal(size, 1.0).mask(x > 1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 1), obs=x)

    layout, parents = find(model, torch.tensor([0.5, 1.5]))
    assert layout.latent_dim == 4
    assert torch.equal(parents, torch.ones(4, 4).tril(-1).bool())


def test_nothing_global_changes() -> None:
    pyro.get_param_store().clear()
    state = torch.get_rng_state()
    find(chain, torch.ones(2))
    probe_free = torch.get_rng_state()
    torch.set_rng_state(state)
    probe(chain, (torch.ones(2),), {})
    assert torch.equal(probe_free, torch.get_rng_state())


# Guides

LENGTH, STEP = 5, 0.1


def coupled(x: Tensor, present: Tensor | None = None) -> None:
    """A random walk of short steps from a wide start, seen through noise: neighbours are nearly equal."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(x.shape[1]):
            mask = True if present is None else present[:, t]
            z = pyro.sample(f"z_{t}", dist.Normal(z, STEP if t else 1.0).mask(mask))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(mask), obs=x[:, t])


def covariance(length: int) -> Tensor:
    lower = torch.ones(length, length).tril()
    return lower @ torch.diag(torch.tensor([1.0] + [STEP**2] * (length - 1))) @ lower.T


def log_evidence(x: Tensor) -> Tensor:
    length = x.shape[1]
    return dist.MultivariateNormal(torch.zeros(length), covariance(length) + torch.eye(length)).log_prob(x)


def simulate(size: int, length: int = LENGTH) -> Tensor:
    return dist.MultivariateNormal(torch.zeros(length), covariance(length) + torch.eye(length)).sample((size,))


def mean_field_gap(length: int) -> float:
    precision = torch.linalg.inv(covariance(length)) + torch.eye(length)
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


@pytest.mark.slow
def test_gap_of_a_strongly_coupled_chain() -> None:
    """Mean-field misses the coupling, by as much as the closed form says; the structured family has it."""
    x = simulate(2)
    gaps, sizes = {}, {}
    for family in ("normal", "structured"):
        guide = AmortizedGuide(coupled, family=family, name=family)
        dataset = estimate_gaps(coupled, guide, (x,)).dataset
        gaps[family] = torch.as_tensor(dataset["approximation_gap"].values)
        sizes[family] = guide.family.num_params
        assert abs(dataset["log_evidence"].values - log_evidence(x).numpy()).max() < 0.02
        assert (dataset["amortization_gap"].values > 0.1).all()
    assert mean_field_gap(LENGTH) > 1.5
    assert (gaps["normal"] - mean_field_gap(LENGTH)).abs().max() < 0.02
    assert gaps["structured"].abs().max() < 0.01
    assert sizes == {"normal": 10, "structured": 14}
    assert sizes["structured"] < build_family("multivariate_normal", LENGTH).num_params == 20


@pytest.mark.parametrize(
    ("Guide", "options", "lr"),
    [
        (AmortizedGuide, {}, 0.02),
        (PerDatapointGuide, {}, 0.2),
        (SemiAmortizedGuide, {"num_steps": 2}, 0.02),
        (SemiAmortizedGuide, {"num_steps": 2, "initial": "prior"}, 0.02),
        (IterativeAmortizedGuide, {"num_steps": 2}, 0.01),
        (DiscreteAmortizedGuide, {}, 0.02),
    ],
)
def test_every_guide_trains(Guide: Any, options: dict[str, Any], lr: float) -> None:
    x = simulate(8)
    guide = Guide(coupled, family="structured", **options)
    svi = SVI(coupled, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(num_particles=4))
    losses = [svi.step(x) for _ in range(10)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3]) or "initial" in options  # where there is nothing to train
    assert guide.family.rows.tolist() == [1, 2, 3, 4]
    assert guide.family.columns.tolist() == [0, 1, 2, 3]
    assert guide.median(x)["z_4"].shape == (8,)
    if Guide is not DiscreteAmortizedGuide:
        assert guide.posterior(x).covariance_matrix.shape == (8, 5, 5)


def test_elbo_at_the_exact_posterior_is_the_evidence() -> None:
    x = simulate(5)
    guide = PerDatapointGuide(coupled, family="structured")
    guide.setup(x)
    precision = torch.linalg.inv(covariance(LENGTH)) + torch.eye(LENGTH)
    mean = torch.linalg.solve(precision, x.T).T
    with torch.no_grad():
        guide.inference.table.copy_(guide.family.laplace(mean, precision.expand(5, -1, -1)))
    assert -Trace_ELBO().loss(coupled, guide, x) == pytest.approx(log_evidence(x).sum().item(), abs=1e-9)
    with torch.no_grad():
        guide.inference.table[:, -1] += 0.1
    assert -Trace_ELBO().loss(coupled, guide, x) != pytest.approx(log_evidence(x).sum().item(), abs=1e-6)


@pytest.mark.slow
def test_refinement_finds_the_posterior() -> None:
    x = simulate(4)
    guide = AmortizedGuide(coupled, family="structured")
    guide.setup(x)
    refined = guide.refined(150, Adam(0.05), fixed_noise=True, num_particles=16)
    with torch.no_grad():
        losses = [
            Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss(coupled, g, x) / 4
            for g in (guide, refined)
        ]
    gaps = [loss + log_evidence(x).mean().item() for loss in losses]
    assert gaps[0] > 5
    assert gaps[1] < 0.6 * mean_field_gap(LENGTH)


@pytest.mark.slow
def test_masked_latents_are_standard_normal_and_cost_nothing() -> None:
    x = simulate(4)
    lengths = torch.tensor([5, 3, 1, 4])
    present = torch.arange(LENGTH) < lengths.unsqueeze(-1)
    guide = AmortizedGuide(coupled, family="structured")
    guide.setup(x, present)
    with torch.no_grad():
        guide.inference.head.bias.normal_()
    phi = guide.variational_parameters(x, present)
    q = guide.family(phi)
    for i, length in enumerate(lengths.tolist()):
        eye = torch.eye(LENGTH)
        torch.testing.assert_close(q.covariance_matrix[i, length:], eye[length:])
        assert (q.mean[i, length:] == 0).all()
        assert (q.covariance_matrix[i, :length, :length].tril(-1).sum(-1)[1:] != 0).all()
    optimum = optimize_local(coupled, guide, (x, present))
    exact = torch.stack([log_evidence(row[:n].unsqueeze(0))[0] for row, n in zip(x, lengths.tolist(), strict=True)])
    assert (optimum.elbo - exact).abs().max() < 0.01
    assert (exact - optimum.initial_elbo).min() > 0.1


def test_inner_plates_and_globals_in_a_guide() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        with pyro.plate("data", len(x), dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, scale))
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(level, 0.1))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6, 3)
    guide = AmortizedGuide(model, family="structured")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert guide.family.parents.nonzero().tolist() == [[1, 0], [2, 0], [3, 0]]
    scale = guide.global_median(x)["scale"]
    covariance = scale**2 * torch.ones(3, 3) + (0.1**2 + 1.0) * torch.eye(3)
    evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    assert (optimize_local(model, guide, (x,)).elbo - evidence).abs().max() < 0.01


def test_subsampled_plates() -> None:
    x = torch.randn(10, 3)

    def model(index: Tensor | None = None) -> None:
        with pyro.plate("data", 10, subsample=index, subsample_size=None if index is not None else 4) as found:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.1))
            pyro.sample("x", dist.Normal(b.unsqueeze(-1), 1.0).expand([len(found), 3]).to_event(1), obs=x[found])

    for i, args in enumerate(((), (torch.tensor([1, 5, 7]),))):
        guide = AmortizedGuide(model, family="structured", name=f"q{i}")
        assert math.isfinite(SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step(*args))
        assert guide.family.parents.nonzero().tolist() == [[1, 0]]


def test_enumerated_model_in_a_guide() -> None:
    guide = AmortizedGuide(enumerated, family="structured")
    svi = SVI(enumerated, guide, pyro.optim.Adam({"lr": 0.02}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = [svi.step(torch.ones(4)) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert len(guide.family.rows) == 1


def test_model_runs_are_counted() -> None:
    """Dependence costs one run, in the setup, of the family that needs it; no other family pays."""
    runs = []

    def model(x: Tensor) -> None:
        runs.append(1)
        coupled(x)

    counts, x = {}, simulate(3)
    for spec in ("normal", "multivariate_normal", "structured", Structured, lambda dim: Structured(dim)):
        runs.clear()
        guide = AmortizedGuide(model, family=spec, name=f"q{len(counts)}")
        guide.setup(x)
        guide(x)
        guide(simulate(3))
        counts[spec] = len(runs)
    first, full, structured, named, given = counts.values()
    assert first == full == given == structured - 1 == named - 1
    assert len(guide.family.rows) == 10  # all of them, where the guide was given the family's parents


def test_state_goes_to_another_guide_and_to_a_file(tmp_path: Any) -> None:
    x = simulate(3)
    guide, other = (AmortizedGuide(coupled, family="structured", name=name) for name in ("a", "b"))
    guide.setup(x)
    other.load_state_dict(guide.state_dict())
    assert torch.equal(guide.variational_parameters(x), other.variational_parameters(x))
    torch.save(guide, tmp_path / "guide.pt")
    loaded = torch.load(tmp_path / "guide.pt", weights_only=False)
    loaded.model = coupled
    assert torch.equal(loaded.posterior(x).covariance_matrix, guide.posterior(x).covariance_matrix)


# Sequences


class ExactSteps(nn.Module):
    """Features ``(N, T, 3)`` that are the exact posterior of the chain: location, log scale, coupling to the past."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, length = x.shape
        precision = torch.linalg.inv(covariance(length)) + torch.eye(length)
        family = Structured(length, torch.diag(torch.ones(length - 1), -1))
        phi = family.laplace(torch.linalg.solve(precision, x.T).T, precision.expand(size, -1, -1))
        loc, log_scale, couplings = phi.split([length, length, length - 1], -1)
        return torch.stack([loc, log_scale, torch.cat([torch.full((size, 1), 7.0), couplings], -1)], -1)


def by_step(Guide: Any = AmortizedGuide, **options: Any) -> Any:
    guide = Guide(coupled, ExactSteps(), family="structured", encoder_input="x", **options)
    guide.setup(simulate(3, 3))
    head = (guide.inference if Guide is AmortizedGuide else guide.inference.initial).head.heads[0]
    with torch.no_grad():
        head.weight.copy_(torch.eye(3) * head.size)
        head.bias.zero_()
    return guide


def test_one_head_is_exact_for_every_number_of_steps() -> None:
    guide = by_step()
    first = guide.family
    for length in (3, 7, 2, 1):
        x = simulate(4, length)
        assert -Trace_ELBO().loss(coupled, guide, x) == pytest.approx(log_evidence(x).sum().item(), abs=1e-8)
        assert guide.posterior(x).event_shape == (length,)
        assert guide.family.parents.sum() == length - 1
    x = simulate(4, 3)
    guide(x)
    assert guide.family is first  # with what has been traced for it
    with torch.no_grad():
        guide.inference.head.heads[0].bias[2] = 0.5
    assert log_evidence(x).sum().item() + Trace_ELBO().loss(coupled, guide, x) > 0.01


def test_shared_head_with_masks_refinement_and_diagnostics() -> None:
    guide = by_step(SemiAmortizedGuide, num_steps=2, update=Adam(1e-4))
    x = simulate(2, 4)
    args = (x, torch.tensor([[True, True, True, True], [True, False, False, False]]))
    guide(*args)
    exact = torch.cat([log_evidence(x[:1]), log_evidence(x[1:, :1])])
    assert (optimize_local(coupled, guide, args).elbo - exact).abs().max() < 0.01
    assert torch.equal(guide.posterior(*args).covariance_matrix[1, 1:], torch.eye(4)[1:])


def second_order(x: Tensor) -> None:
    """Each state depends on the two before it."""
    with pyro.plate("data", len(x)):
        z = [torch.zeros(()), torch.zeros(())]
        for t in range(x.shape[1]):
            z.append(pyro.sample(f"z_{t}", dist.Normal(1.2 * z[-1] - 0.4 * z[-2], 1.0)))
            pyro.sample(f"x_{t}", dist.Normal(z[-1], 1.0), obs=x[:, t])


class Plain(nn.Module):
    def forward(self, *columns: Tensor) -> Tensor:
        return torch.stack(columns, -1).unsqueeze(-1)


def test_steps_that_depend_on_more_than_they_did_are_refused() -> None:
    guide = AmortizedGuide(second_order, Plain(), family="structured")
    guide.setup(torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"share one head.*because step t now depends on step t - 2.*longest"):
        guide(torch.randn(3, 4))
    longer = AmortizedGuide(second_order, Plain(), family="structured", name="longer")
    longer.setup(torch.randn(3, 4))
    for length in (6, 1, 2):
        x = torch.randn(3, length)
        assert math.isfinite(Trace_ELBO().loss(second_order, longer, x))
    assert longer.family.parents.nonzero().tolist() == [[1, 0]]


# Errors


def hidden(x: Tensor) -> None:
    """Latents written into a tensor in place, which Pyro's tracking does not follow."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x), 2)
        z[:, 0] = pyro.sample("a", dist.Normal(0.0, torch.ones(len(x))))
        z[:, 1] = pyro.sample("b", dist.Normal(0.0, torch.ones(len(x))))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)


@pytest.mark.slow
def test_hidden_dependence_can_be_given() -> None:
    """q is then mean-field, and right again with parents from the user."""
    x = torch.tensor([0.3, -1.0])
    evidence = dist.Normal(0.0, 1.5).log_prob(x)
    gaps = []
    for spec in ("structured", lambda dim: Structured(dim, torch.tensor([[0, 0], [1, 0]]))):
        guide = PerDatapointGuide(hidden, family=spec, name=f"q{len(gaps)}")
        gaps.append(evidence - optimize_local(hidden, guide, (x,)).elbo)
    precision = torch.tensor([[5.0, 4.0], [4.0, 5.0]])
    mean_field = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert (gaps[0] - mean_field).abs().max() < 0.01
    assert gaps[1].abs().max() < 0.01
    assert mean_field > 0.4


def unseen(x: Tensor) -> None:
    """A model that Pyro's tracking of dependence cannot run."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if type(z).__name__ == "ProvenanceTensor":
            raise RuntimeError("no subclass of tensors")
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_what_cannot_be_done_is_refused() -> None:
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"which local latents depend.*RuntimeError: no subclass.*Structured\("):
        AmortizedGuide(unseen, family="structured").setup(x)
    AmortizedGuide(unseen, family=lambda dim: Structured(dim), name="given").setup(x)
    guide = AmortizedGuide(fork, family="structured", name="fork")
    guide.setup(x)
    with pytest.raises(ValueError, match=r"Structured family by NaturalGradient .*try update=Adam\(0.05\)"):
        guide.refined(3, NaturalGradient(0.5))
    with pytest.raises(ValueError, match=r"\(loc, scale\) pair .* has Structured"):
        AmortizedGuide(fork, Pair(), family="structured", name="pair").setup(x)


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([x, y, x], -1), torch.ones(len(x), 3)
