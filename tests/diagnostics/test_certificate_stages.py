"""What certificates rest on, part by part: statistics of chains, weights, chains, explorations."""

import math
from functools import partial
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from certified import bound, error, guided, oracle
from models import LinearGaussian
from torch import Tensor

from pyro_amortized import certified_posterior
from pyro_amortized.diagnostics.certificates.convergence import bulk_ess, rank_rhat, scale_ess, tail_ess
from pyro_amortized.diagnostics.certificates.exploration import Exploration
from pyro_amortized.diagnostics.certificates.hmc import _summarise as _chains_in_all
from pyro_amortized.diagnostics.certificates.hmc import run_chains
from pyro_amortized.diagnostics.certificates.smc import particles
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.certificates.weighing import Member, _summarise, weigh
from pyro_amortized.objective.meter import Meter
from pyro_amortized.objective.noise import generator
from pyro_amortized.objective.prior import prior_draws
from pyro_amortized.structure.layout import SiteLayout

pytestmark = pytest.mark.usefixtures("_float64")


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


def test_few_effective_draws_are_made_up_for_by_more() -> None:
    """Of a q that is too wide, 4000 draws are worth 1000, and eight times as many what is wanted."""
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(6)
    q = model.posterior(x)
    encode = lambda x: (model.posterior(x).mean, 2.2 * q.stddev.expand(len(x), -1))  # noqa: E731
    problem = bound(model.full, guided(model.full, encode), x)
    member, target = Member(problem.objective.family, problem.phi), Target(4000)
    once, more = (weigh(problem, torch.arange(6), member, target, generator(0), most) for most in (1, 8))
    assert bool((once.ess < target.ess).all())
    assert bool(more.reach(target).all())
    assert more.draws.shape == once.draws.shape
    assert error(more.draws, q.mean, q.stddev) < 1


def layout(dim: int) -> SiteLayout:
    model = LinearGaussian(torch.zeros(1, dim))
    return bound(model.full, guided(model.full), torch.zeros(1, 1)).objective.log_joint.layout


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_effective_sizes_are_those_of_the_draws_returned(share: float) -> None:
    """Of a mixture whose lesser mode makes sds uncertain, which more draws than are returned make up for."""
    size, dim, apart, scale = 150, 3, 3.0, 0.4
    torch.manual_seed(0)
    z = (torch.rand(32000, size, 1) < share) * apart + scale * torch.randn(32000, size, dim)
    found = _summarise(z, torch.zeros(z.shape[:2]), layout(dim), Target(4000), generator(0))
    loc, sd = share * apart, math.sqrt(scale**2 + apart**2 * share * (1 - share))
    of_means = 1 / ((found.draws.mean(0) - loc) / sd).square().mean(0)
    of_scales = 0.5 / (found.draws.std(0) / sd).log().square().mean(0)
    # a variance of 150 numbers, smallest of three: 12 % standard error
    assert abs(found.tail_ess.mean() / of_scales.min() - 1) < 0.35
    assert of_means.min() > 4000
    assert bool((found.ess <= 4000).all())
    if share < 0.1:  # as many independent draws of the posterior itself would not do
        kurtosis = (3 * scale**4 + 6 * scale**2 * apart**2 * share + apart**4 * share) / sd**4
        assert 2 * 4000 / (kurtosis - 1) < Target(4000).tail_ess < found.tail_ess.min()


# Chains


def test_draws_are_returned_of_all_chains() -> None:
    """Evenly spaced over time, however many were kept; chains depend on each other's draws as little as they do."""
    rng = torch.Generator().manual_seed(0)
    for times in (1, 2, 4):
        kept = 0.01 * torch.randn(8, 125 * times, 1, 3, generator=rng) + torch.arange(8.0)[:, None, None, None]
        found = _chains_in_all(kept, layout(3), Target(1000), torch.zeros(1))
        assert found.draws.round().unique(return_counts=True)[1].tolist() == [375] * 8


@pytest.mark.slow
def test_chains_are_worth_what_the_draws_returned_are() -> None:
    rng, dependence = torch.Generator().manual_seed(0), 0.8
    noise = torch.randn(8, 2000, 200, 1, generator=rng)
    kept = [noise[:, 0]]
    for t in range(1, 2000):
        kept.append(dependence * kept[-1] + math.sqrt(1 - dependence**2) * noise[:, t])
    found = _chains_in_all(torch.stack(kept, 1), layout(1), Target(4000), torch.zeros(200))
    actual = 1 / found.draws.mean(0).square().mean()
    assert abs(found.ess.mean() / actual - 1) < 0.3  # of 200 squares: 10 % standard error


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
