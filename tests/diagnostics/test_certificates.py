"""Certified posteriors against exact ones; what must not be certified is not."""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import arviz
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, CertifiedPosterior, calibrate, certified_posterior
from pyro_amortized.diagnostics.certificates.convergence import bulk_ess, rank_rhat, scale_ess, tail_ess
from pyro_amortized.diagnostics.certificates.exploration import Exploration
from pyro_amortized.diagnostics.certificates.hmc import run_chains
from pyro_amortized.diagnostics.certificates.smc import particles
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.certificates.weighing import Member, weigh
from pyro_amortized.diagnostics.problem import LocalProblem, bind
from pyro_amortized.objective.meter import Meter
from pyro_amortized.objective.noise import generator
from pyro_amortized.objective.prior import prior_draws

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("_float64")


class Encode(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def guided(model: Callable[..., Any], encode: Callable[..., Any] | None = None, **options: Any) -> AmortizedGuide:
    pyro.clear_param_store()
    return AmortizedGuide(model, None if encode is None else Encode(encode), **options)


def oracle() -> LinearGaussian:
    return LinearGaussian.random_weights()


def encode_exactly(shift: float = 0.0, scale: float = 1.0) -> Callable[[Tensor], Any]:
    """Means and sds of the linear-Gaussian posterior, off by so much."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        q = oracle().posterior(x)
        return q.mean + shift * q.stddev, (scale * q.stddev).expand(len(x), -1)

    return encode


def error(draws: Tensor, mean: Tensor, scale: Tensor) -> float:
    """The worst error: of means in units of 0.1 sd, and of sds in units of 10 %."""
    shift, ratio = (draws.mean(0) - mean).abs() / scale, (draws.std(0) / scale - 1).abs()
    return 10 * float(torch.maximum(shift, ratio).max())


def bound(model: Callable[..., Any], guide: AmortizedGuide, *args: Any) -> LocalProblem:
    return bind(model, guide, args, None, 0)


# Chains' statistics


@pytest.mark.parametrize(("chains", "length"), [(4, 100), (8, 125), (3, 17), (1, 50)])
@pytest.mark.parametrize("dependence", [0.0, 0.9, -0.9])
def test_statistics_are_those_of_arviz(chains: int, length: int, dependence: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((chains, length, 3))
    for t in range(1, length):
        x[:, t] += dependence * x[:, t - 1]
    x[..., 1] += np.arange(chains)[:, None] * 0.3
    x[..., 2] = x[..., 2].round()  # ties, as where proposals are rejected
    draws = torch.from_numpy(x)
    for mine, theirs in (
        (bulk_ess, partial(arviz.ess, method="bulk")),
        (tail_ess, partial(arviz.ess, method="tail", prob=(0.05, 0.95))),
        *([(rank_rhat, arviz.rhat)] if chains > 1 else []),
    ):
        np.testing.assert_allclose(mine(draws), [theirs(x[..., i]) for i in range(3)], rtol=1e-9)


def test_standard_deviations_are_worth_what_they_vary_by() -> None:
    """Of chains of normal draws, and of independent ones with a kurtosis of 6, in closed form and as ArviZ has it."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((4, 2000, 30))
    for t in range(1, 2000):
        normal[:, t] = 0.6 * normal[:, t - 1] + 0.8 * normal[:, t]
    heavy = rng.laplace(size=(4, 2000, 30))
    for x, exact in ((normal, 8000 * (1 - 0.36) / (1 + 0.36)), (heavy, 8000 * 2 / 5)):
        found = scale_ess(torch.from_numpy(x))
        assert abs(found.mean().item() / exact - 1) < 0.1
        squares = (x[..., 0] - x[..., 0].mean()) ** 2
        worth = 2 * arviz.ess(squares, method="mean") * squares.mean() ** 2 / squares.var()
        assert found[0].item() == pytest.approx(worth, rel=1e-9)


def test_chains_that_have_not_moved_do_not_pass() -> None:
    draws = torch.randn(4, 1, 2).expand(4, 50, 2)
    assert not bool((rank_rhat(draws) < 1.01).any())


# The meter


def test_evaluations_are_counted_where_they_happen() -> None:
    model = oracle()
    x = model.simulate(6)
    log_joint = bound(model.full, guided(model.full), x).objective.log_joint
    meter = log_joint.meter = Meter.of(6)
    z = torch.randn(5, 6, 3)
    log_joint(z)
    log_joint.plain(z)
    assert meter.values.tolist() == [10] * 6
    log_joint(z.requires_grad_()).sum().backward()
    assert (meter.gradients.tolist(), meter.values.tolist()) == ([5] * 6, [10] * 6)
    rows = torch.tensor([4, 1])
    part: Any = log_joint.select(rows)
    part.select(torch.tensor([0]))(torch.randn(7, 1, 3))
    log_joint.on_rows(rows)(torch.randn(2, 2, 3))
    log_joint.likelihood()(torch.randn(1, 6, 3))
    assert meter.values.tolist() == [11, 13, 11, 11, 20, 11]


# Weights


def test_weights_of_an_exact_approximation_are_equal() -> None:
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(4)
    q = model.posterior(x)
    problem = bound(model.full, guided(model.full, lambda x: (model.posterior(x).mean, q.stddev.expand(len(x), -1))), x)
    found = weigh(problem, torch.arange(4), Member(problem.objective.family, problem.phi), Target(4000), generator(0))
    assert bool((found.khat == -math.inf).all())
    assert bool((found.ess > 3900).all())
    assert error(found.draws, q.mean, q.stddev) < 1


def test_large_weights_in_the_tails_count() -> None:
    """Of a q that is too narrow, means and sds are worth less than the weights alone tell; in closed form."""
    model = LinearGaussian(torch.zeros(1, 1))  # the posterior is the prior
    scale = 0.95
    encode = lambda x: (torch.zeros(len(x), 1), torch.full((len(x), 1), scale))  # noqa: E731
    problem = bound(model.full, guided(model.full, encode), torch.zeros(20, 1))
    q = Member(problem.objective.family, problem.phi)
    found = weigh(problem, torch.arange(20), q, Target(4000), generator(0))
    v = 1 / (2 - scale**-2)  # the variance of the normal that p(z)^2 / q(z) is, but for the mass below
    mass = scale * v**0.5
    assert abs(found.ess.mean().item() / 4000 * mass * v - 1) < 0.03
    assert abs(found.tail_ess.mean().item() / 8000 * mass * (3 * v**2 - 2 * v + 1) - 1) < 0.06
    assert mass * v > 1.1 * mass  # so that the weights alone would not tell


# Chains


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 0.3)])
def test_chains_sample_an_exact_posterior_from_good_and_bad_starts(shift: float, scale: float) -> None:
    model = oracle()
    x = model.simulate(5)
    problem = bound(model.full, guided(model.full), x)
    q = model.posterior(x)
    root = scale * q.scale_tril.expand(5, -1, -1)
    start = q.mean + shift * q.stddev + torch.einsum("nij,knj->kni", root, torch.randn(8, 5, 3, generator=generator(1)))
    target = Target(1000)
    found = run_chains(problem, torch.arange(5), start, root, target, generator(2))
    assert bool(found.reach(target).all())
    assert found.draws.shape == (1000, 5, 3)
    # five Monte Carlo standard errors of means at 500 draws are 0.22 sd, and of sds 16 %
    assert error(found.draws, q.mean, q.stddev) < 2.2
    centred = found.draws - found.draws.mean(0)
    moments = torch.einsum("kni,knj->nij", centred, centred) / len(centred)
    torch.testing.assert_close(moments / q.covariance_matrix, torch.ones(5, 3, 3), atol=0.5, rtol=0.0)


def far_modes(x: Tensor) -> None:
    """Both square roots of what is observed, the positive one preferred."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.3, 3.0))
        pyro.sample("x", dist.Normal(z.square(), 1.0), obs=x)


def root_of_far_modes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The positive root only, with its width."""
    return x.sqrt().unsqueeze(-1), (0.5 / x.sqrt()).unsqueeze(-1)


def moments_of_far_modes(x: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.linspace(-8, 8, 20001)
    weights = (dist.Normal(0.3, 3.0).log_prob(z) + dist.Normal(z.square(), 1.0).log_prob(x.unsqueeze(-1))).softmax(-1)
    mean = weights @ z
    return mean.unsqueeze(-1), (weights @ z.square() - mean.square()).sqrt().unsqueeze(-1)


FAR = torch.tensor([9.0, 12.0, 16.0], dtype=torch.float64)


def test_chains_in_one_of_two_far_modes_converge_and_are_not_certified() -> None:
    """The twin that must fail: R-hat and effective sizes are perfect, and half of the posterior is missing."""
    problem = bound(far_modes, guided(far_modes, root_of_far_modes), FAR)
    loc, scale = root_of_far_modes(FAR)
    root, rows, target = torch.diag_embed(scale), torch.arange(3), Target(1000)
    found = run_chains(problem, rows, loc + scale * torch.randn(8, 3, 1), root, target, generator(0))
    assert bool(found.reach(target).all())
    explored = Exploration.of(problem, problem.phi, (0,))
    assert explored.num_modes.tolist() == [2, 2, 2]
    agrees, words = explored.compare(rows, found.draws)
    assert agrees.tolist() == [False] * 3
    assert all("sd" in text for text in words)
    grid = torch.linspace(-8, 8, 20001)
    log_p = dist.Normal(0.3, 3.0).log_prob(grid) + dist.Normal(grid.square(), 1.0).log_prob(FAR.unsqueeze(-1))
    right = grid[torch.multinomial(log_p.softmax(-1), 1000, replacement=True)].T.unsqueeze(-1)
    assert explored.compare(rows, right)[0].tolist() == [True] * 3


def test_far_modes_are_certified_by_the_mixture_at_both() -> None:
    found = certified_posterior(far_modes, guided(far_modes, root_of_far_modes), (FAR,))
    assert found.dataset["certified"].values.tolist() == [True] * 3
    assert set(found.dataset["stage"].values) == {"full_rank"}
    assert error(found.draws, *moments_of_far_modes(FAR)) < 1
    assert all("sd" in reason for reason in found.dataset["reason"].values)  # the encoder's weights were perfect


# Explorations


@pytest.mark.parametrize("dim", [1, 4])
def test_particles_find_both_modes_of_a_mixture(dim: int) -> None:
    centre = 2.0 * torch.ones(dim)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            components = dist.Normal(torch.stack([-centre, centre]), 0.5).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.7, 0.3])), components))
            pyro.sample("x", dist.Normal(z[..., 0], 100.0), obs=x)  # which says nothing

    problem = bound(model, guided(model), torch.zeros(20))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = prior_draws(problem.objective.log_joint, 500)
    z = particles(problem, torch.arange(20), prior, generator(0))
    share = (z[..., 0] > 0).double().mean(0)
    assert abs(share.mean().item() - 0.3) < 4 * share.std().item() / 20**0.5 + 0.01
    inside = (z.abs() - 2.0).square().mean().sqrt().item()
    assert abs(inside / 0.5 - 1) < 0.05


def test_in_many_dimensions_a_mode_that_was_not_met_is_enough_to_disagree() -> None:
    dim = 12

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.stack([-torch.ones(dim), torch.ones(dim)])
            components = dist.Normal(loc, 0.3).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
            pyro.sample("x", dist.Normal(z.sum(-1), 50.0), obs=x)

    problem = bound(model, guided(model), torch.zeros(2))
    explored = Exploration.of(problem, problem.phi, (0,))
    explored.kind.zero_()  # as where weights are no good
    one = 1.0 + 0.3 * torch.randn(1000, 2, dim, generator=generator(0))
    both = torch.where(torch.rand(1000, 2, 1, generator=generator(1)) < 0.5, one, one - 2.0)
    rows = torch.arange(2)
    agrees, words = explored.compare(rows, one)
    assert (agrees.tolist(), words) == ([False] * 2, ["has not met a mode of the search"] * 2)
    assert explored.compare(rows, both)[0].tolist() == [True, True]


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (0.2, 1.0), (0.0, 0.8), (0.0, 1.25)])
def test_draws_that_are_off_by_twice_what_a_certificate_allows_do_not_agree(shift: float, factor: float) -> None:
    model = LinearGaussian(torch.ones(1, 1))
    problem = bound(model.full, guided(model.full), torch.zeros(20, 1))
    explored = Exploration.of(problem, problem.phi, (0,))
    noise = torch.randn(4000, 20, 1, dtype=torch.float64, generator=generator(1))
    draws = 0.5**0.5 * (shift + factor * noise)
    agrees, words = explored.compare(torch.arange(20), draws)
    assert bool((agrees == (shift == 0.0 and factor == 1.0)).all()), words


def test_mixtures_whose_draws_are_worth_little_are_doubted() -> None:
    """A thousandth of the posterior, far away, makes a quarter of the standard deviation."""
    prior = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.999, 0.001])),
        dist.Normal(torch.tensor([0.0, 12.0]), torch.tensor([0.4, 1.0])),
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", prior), 1000.0), obs=x)

    problem = bound(model, guided(model), torch.zeros(8))
    explored, rows = Exploration.of(problem, problem.phi, (0,)), torch.arange(8)
    explored.doubt(rows)
    narrow = 0.4 * torch.randn(4000, 8, 1, dtype=torch.float64, generator=generator(1))
    assert not bool(explored.compare(rows, narrow)[0].any())
    torch.testing.assert_close(explored.scale, prior.stddev.expand(8, 1).double(), rtol=0.1, atol=0.0)


# The whole


@pytest.mark.parametrize(
    ("shift", "scale", "stage"), [(0.0, 1.0, None), (0.0, 0.2, "full_rank"), (4.0, 0.2, "full_rank")]
)
def test_a_bad_guide_changes_the_cost_and_nothing_else(shift: float, scale: float, stage: str | None) -> None:
    """Overconfident, and far off: certified all the same, and right."""
    model = oracle()
    x = model.simulate(6)
    found = certified_posterior(model.full, guided(model.full, encode_exactly(shift, scale)), (x,))
    q = model.posterior(x)
    assert bool(found.dataset["certified"].all())
    assert not bool(found.dataset["local"].any())
    assert error(found.draws, q.mean, q.stddev) < 1
    if stage is not None:
        assert "encoder" not in found.dataset["stage"].values
        assert all("encoder: khat" in reason for reason in found.dataset["reason"].values)


def test_an_exact_encoder_is_certified_at_once() -> None:
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(6)
    q = model.posterior(x)
    encode = lambda x: (model.posterior(x).mean, q.stddev.expand(len(x), -1))  # noqa: E731
    found = certified_posterior(model.full, guided(model.full, encode), (x,))
    assert set(found.dataset["stage"].values) == {"encoder"}
    assert bool(found.dataset["certified"].all())
    assert found.dataset["reason"].values.tolist() == [""] * 6
    assert bool((found.dataset["num_evaluations"] >= 4000).all())
    assert "The encoder's weighted draws do" in str(found)


def test_where_weights_do_not_do_chains_are_certified() -> None:
    """Heavy tails with a sharp peak: normals and mixtures of t's fail, chains and particles agree with a grid."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0].square(), 0.7), obs=x)

    x = torch.tensor([0.0, 0.5])
    line = torch.linspace(-8.0, 8.0, 801)
    z = torch.cartesian_prod(line, line)
    log_p = dist.Normal(0.0, 1.5).log_prob(z).sum(-1) + dist.Normal(z[:, 1] + z[:, 0].square(), 0.7).log_prob(
        x[:, None]
    )
    weights = log_p.softmax(-1)
    mean = weights @ z
    scale = (weights @ z.square() - mean.square()).sqrt()
    found = certified_posterior(model, guided(model), (x,))
    assert found.dataset["certified"].values.tolist() == [True, True]
    assert error(found.draws, mean, scale) < 1


def test_what_does_not_converge_is_marked() -> None:
    """A centred hierarchy is a funnel: nothing serves it within the draws allowed."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(8), (v / 2).exp().unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(w.sum(-1), 5.0), obs=x)

    found = certified_posterior(model, guided(model), (torch.tensor([0.0, 1.0]),), num_samples=400)
    data = found.dataset
    assert not bool(data["certified"].any())
    assert "draws are not to be used" in str(found)
    with pytest.warns(UserWarning, match=r"2 of 2 datapoints are not certified: their draws are NaN"):
        exported = found.to_arviz()
    assert bool(exported["posterior"]["w"].isnull().all())
    assert not bool(found.to_arviz("all")["posterior"]["w"].isnull().any())
    with pytest.raises(ValueError, match=r"Cannot keep the draws of keep='some' because it is unknown; try one of"):
        found.to_arviz("some")


def conjugate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_constrained_latents() -> None:
    x = torch.tensor([0.0, 1.0, 12.0])
    found = certified_posterior(conjugate, guided(conjugate), (x,))
    assert bool(found.dataset["certified"].all())
    q = dist.Gamma(2.0 + x, 2.0)
    rate = torch.from_numpy(found.posterior["rate"].values)
    assert rate.shape == (4000, 3)
    assert error(rate, q.mean, q.stddev) < 1


def test_discrete_latents_that_the_model_sums_out() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2.0 * c, 1.0), obs=x)

    x = torch.tensor([-1.0, 0.5, 1.5])
    shifts, prior = torch.tensor([0.0, 2.0]), torch.tensor([0.7, 0.3])
    share = (prior.log() + dist.Normal(shifts, 2.0**0.5).log_prob(x[:, None])).softmax(-1)
    means = (x[:, None] - shifts) / 2
    mean = (share * means).sum(-1)
    scale = ((share * (means.square() + 0.5)).sum(-1) - mean.square()).sqrt()
    found = certified_posterior(model, guided(model), (x,))
    assert bool(found.dataset["certified"].all())
    assert error(found.draws[..., 0], mean, scale) < 1


@pytest.mark.slow
def test_inner_plates_and_global_latents() -> None:
    """Two levels of normal means have a normal posterior, given the global latent's median."""

    def model(x: Tensor) -> None:
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.1))
        with pyro.plate("school", len(x), dim=-2):
            school = pyro.sample("school_mean", dist.Normal(0.0, 1.0))
            with pyro.plate("pupil", x.shape[1], dim=-1):
                pupil = pyro.sample("pupil_mean", dist.Normal(school, spread))
                pyro.sample("x", dist.Normal(pupil, 0.5), obs=x)

    x = torch.randn(4, 3, generator=generator(0))
    guide = guided(model, plate="school")
    found = certified_posterior(model, guide, (x,))
    spread = guide.median(x)["spread"].item()
    precision = torch.zeros(4, 4)
    precision[0, 0] = 1 + 3 / spread**2
    precision[0, 1:] = precision[1:, 0] = -1 / spread**2
    precision[1:, 1:] = torch.eye(3) * (1 / spread**2 + 4.0)
    covariance = torch.linalg.inv(precision)
    mean = torch.cat([torch.zeros(4, 1), 4.0 * x], -1) @ covariance
    assert bool(found.dataset["certified"].all())
    assert error(found.draws, mean, covariance.diagonal().sqrt().expand(4, -1)) < 1
    assert found.posterior["pupil_mean"].dims == ("draw", "school", "pupil")
    assert found.posterior["school_mean"].dims == ("draw", "school")
    assert found.dataset.attrs["global_latents"] == "held at the guide's median: spread"
    assert "global latents held at the guide's median" in str(found)


def test_datapoints_that_matter_to_each_other_run_together() -> None:
    """A model that can only run on all of its data has the same posteriors."""
    model = oracle()
    x = model.simulate(4)

    def fixed(x: Tensor) -> None:
        assert len(x) == 4
        model.full(x)

    found = certified_posterior(fixed, guided(fixed), (x,), num_samples=1000)
    q = model.posterior(x)
    assert bool(found.dataset["certified"].all())
    assert error(found.draws, q.mean, q.stddev) < 2.2


# Batches, files and pictures


@pytest.mark.slow
def test_a_loader_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle()
    x = model.simulate(7)
    guide = guided(model.full, encode_exactly())
    loader = DataLoader(TensorDataset(x), batch_size=3)
    options: dict[str, Any] = {"num_samples": 400, "path": tmp_path / "saved"}

    def interrupted() -> Iterator[Any]:
        yield from list(loader)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certified_posterior(model.full, guide, interrupted(), **options)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["batch_00000.nc", "batch_00001.nc"]
    calls = []
    name = "pyro_amortized.diagnostics.certificates.certified._certify"
    monkeypatch.setattr(
        name, lambda *args, real=certified_posterior.__globals__["_certify"]: calls.append(1) or real(*args)
    )
    found = certified_posterior(model.full, guide, loader, **options)
    assert len(calls) == 1
    whole = certified_posterior(model.full, guide, loader, num_samples=400)
    assert found.dataset["data"].values.tolist() == list(range(7))
    assert found.dataset.equals(whole.dataset)
    assert torch.equal(found.draws, whole.draws)
    other = DataLoader(TensorDataset(x + 1), batch_size=3)
    with pytest.raises(
        ValueError, match=r"Cannot go on .*because batch_00000.nc belongs to other data.*try another dir"
    ):
        certified_posterior(model.full, guide, other, **options)
    certified_posterior(model.full, guide, other, num_samples=400, path=tmp_path / "another")


@pytest.mark.parametrize("change", ["of the model", "of the arguments"])
def test_batches_of_another_model_are_not_taken(change: str, tmp_path: Path) -> None:
    """One that is the same at the origin, and in all that the encoder sees."""
    slope = 1.0

    def model(x: Tensor, factor: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slope * factor * z, 1.0), obs=x)

    x, options = torch.tensor([0.3, -1.0]), {"num_samples": 400, "path": tmp_path}
    guide = guided(model)
    first = certified_posterior(model, guide, (x, 1.0), **options)
    assert certified_posterior(model, guide, (x, 1.0), **options).dataset.equals(first.dataset)
    factor = 1.0
    if change == "of the model":
        slope = 3.0
    else:
        factor = 3.0
    with pytest.raises(ValueError, match=r"Cannot go on .*because batch_00000.nc belongs to other data"):
        certified_posterior(model, guide, (x, factor), **options)


def test_batches_with_other_latents_are_refused_before_any_work() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("school", len(x), dim=-2), pyro.plate("pupil", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guided(model, plate="school")
    batches = [(torch.zeros(2, 2),), (torch.zeros(2, 3),)]
    with pytest.raises(
        ValueError, match=r"Cannot join the draws .* 2 latent dimensions in the first and 3.*; try one call"
    ):
        certified_posterior(model, guide, iter(batches), num_samples=400)
    assert certified_posterior(model, guide, batches[1], num_samples=400).posterior["z"].shape == (400, 2, 3)


def test_files_and_exports(tmp_path: Path) -> None:
    x = torch.tensor([0.0, 3.0])
    found = certified_posterior(conjugate, guided(conjugate), (x,), num_samples=400)
    found.to_netcdf(tmp_path / "found.nc")
    again = CertifiedPosterior.from_netcdf(tmp_path / "found.nc")
    assert again.dataset.identical(found.dataset)
    assert again.posterior.equals(found.posterior)
    assert str(again) == str(found)
    exported = again.to_arviz()
    assert exported["posterior"]["rate"].dims == ("chain", "draw", "data")
    assert exported["sample_stats"]["certified"].values.tolist() == [True, True]
    assert arviz.summary(exported, kind="stats")["mean"].between(0.5, 3.5).all()
    axes = found.plot()
    assert axes.get_title() == "2 of 2 posteriors certified"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sum(any(stage in label for stage in ("encoder", "refined", "full_rank", "hmc")) for label in labels) >= 1


@pytest.mark.slow
def test_seeds_and_settings() -> None:
    x = torch.tensor([0.0, 3.0])
    guide = guided(conjugate)
    state = torch.random.get_rng_state()
    first, second, third = (
        certified_posterior(conjugate, guide, (x,), num_samples=400, seed=seed).draws for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(
        ValueError, match=r"Cannot use num_samples=100 because it must be .* at least 400; try num_samples=4"
    ):
        certified_posterior(conjugate, guide, (x,), num_samples=100)
    with pytest.raises(ValueError, match=r"Cannot save batches at path=3 because .*; try a directory of your own"):
        certified_posterior(conjugate, guide, (x,), path=3)  # type: ignore[arg-type]


# Calibration of the procedure


def test_certified_posteriors_are_calibrated() -> None:
    guide = guided(conjugate)
    procedure = partial(certified_posterior, num_samples=400)
    found = calibrate(conjugate, guide, (torch.ones(20),), num_simulations=200, num_samples=99, posterior=procedure)
    assert found.calibrated
    assert found.dataset["quantity"].values.tolist() == ["rate", "log_joint", "tarp"]
    assert found.dataset.attrs["guide"] == "certified_posterior"
    assert found.dataset.sizes["simulation"] + found.dataset.attrs["num_left_out"] == 200
    assert not calibrate(conjugate, guide, (torch.ones(20),), num_simulations=200, num_samples=99).calibrated
    with pytest.raises(ValueError, match=r"Cannot tell the coverage .*; try plot\(\"tarp\"\)"):
        found.coverage(0.5)
    found.plot("tarp")


def test_a_procedure_whose_draws_are_too_narrow_fails() -> None:
    def narrow(*args: Any, **kwargs: Any) -> CertifiedPosterior:
        found = certified_posterior(*args, num_samples=400, **kwargs)
        flat = found.posterior["_unconstrained"]
        centre = flat.mean("draw")
        return CertifiedPosterior(found.dataset, found.posterior.assign(_unconstrained=centre + 0.6 * (flat - centre)))

    guide = guided(conjugate)
    found = calibrate(conjugate, guide, (torch.ones(20),), num_simulations=200, num_samples=99, posterior=narrow)
    assert "rate" in found.failing
    assert "too narrow" in str(found)
    with pytest.raises(ValueError, match=r"Cannot take num_samples=999 draws .* gives 400; try num_samples=100"):
        calibrate(conjugate, guide, (torch.ones(20),), num_samples=999, posterior=narrow)
    with pytest.raises(ValueError, match=r"Cannot use posterior=3 because it must be a function such as"):
        calibrate(conjugate, guide, (torch.ones(20),), posterior=3)  # type: ignore[arg-type]


def test_without_certificates_there_is_no_calibration() -> None:
    def refuses(*args: Any, **kwargs: Any) -> CertifiedPosterior:
        found = certified_posterior(*args, num_samples=400, **kwargs)
        return CertifiedPosterior(found.dataset.assign(certified=found.dataset["certified"] & False), found.posterior)

    with pytest.raises(ValueError, match=r"Cannot test calibration because 0 of 20 .*; try num_simulations=200"):
        calibrate(conjugate, guided(conjugate), (torch.ones(20),), num_simulations=20, posterior=refuses)


def test_words_of_batches_that_were_read_are_saved_whole(tmp_path: Path) -> None:
    x = torch.tensor([0.0, 1.0])
    found = certified_posterior(conjugate, guided(conjugate), (x,), num_samples=400)
    for stage in ("hmc", "full_rank"):
        named = found.dataset.assign(stage=("data", np.array([stage] * 2, dtype=object)))
        CertifiedPosterior(named, found.posterior).to_netcdf(tmp_path / stage)
    parts = [CertifiedPosterior.from_netcdf(tmp_path / stage) for stage in ("hmc", "full_rank")]
    CertifiedPosterior.concat(parts).to_netcdf(tmp_path / "all")
    stages = CertifiedPosterior.from_netcdf(tmp_path / "all").dataset["stage"].values.tolist()
    assert stages == ["hmc", "hmc", "full_rank", "full_rank"]


@pytest.mark.slow
def test_means_of_values_in_their_support_count() -> None:
    """On the scale of log z most draws tell nothing of the mean of z, which few large ones decide."""

    def model(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Gamma(0.2, 0.2))
            pyro.sample("x", dist.NegativeBinomial(0.2, logits=z.log()), obs=x)

    x = torch.zeros(2, dtype=torch.float64)
    guide = AmortizedGuide(model)
    guide.setup(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = certified_posterior(model, guide, (x,))
        values = found.to_arviz().posterior["z"].values.reshape(-1, 2)
    grid = torch.linspace(-60.0, 6.0, 20001, dtype=torch.float64).exp()
    density = (dist.Gamma(0.2, 0.2).log_prob(grid) + dist.NegativeBinomial(0.2, logits=grid.log()).log_prob(x[0])).exp()
    mean, square = ((density * grid * grid**power).sum() / (density * grid).sum() for power in (1, 2))
    certified = found.dataset["certified"].values
    assert certified.any()
    error = np.abs(values[:, certified].mean(0) - mean.item()) / (square - mean**2).sqrt().item()
    assert error.max() < 0.1
