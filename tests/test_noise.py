"""Noise for diagnostics: its moments, its law, its independence, and that it leaves torch's own seed alone."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_amortized import AmortizedGuide, VariationalFamily, estimate_gaps, log_evidence, optimize_local
from pyro_amortized.families import build_family
from pyro_amortized.objective.noise import draw, generator, quasi_normal, seeded


def second_moments(noise: Tensor) -> Tensor:
    return torch.einsum("kni,knj->nij", noise, noise) / len(noise)


# quasi_normal


@pytest.mark.parametrize(("num_draws", "size", "dim"), [(2, 3, 1), (64, 5, 1), (64, 4, 7), (128, 3, 64), (1024, 2, 20)])
def test_first_two_moments_are_exact(num_draws: int, size: int, dim: int) -> None:
    noise = quasi_normal(num_draws, size, dim, generator(0))
    assert noise.shape == (num_draws, size, dim)
    assert noise.dtype == torch.float64
    identity = torch.eye(dim, dtype=torch.float64).expand(size, dim, dim)
    torch.testing.assert_close(noise.mean(0), torch.zeros_like(noise[0]), rtol=0.0, atol=1e-10)
    torch.testing.assert_close(second_moments(noise), identity, rtol=0.0, atol=1e-10)
    plain = torch.randn(noise.shape, generator=generator(0), dtype=torch.float64)
    assert (second_moments(plain) - identity).abs().amax() > 1e-3


def test_draws_come_in_antithetic_pairs() -> None:
    noise = quasi_normal(64, 3, 2, generator(0))
    assert torch.equal(noise[32:], -noise[:32])


def reseeded(count: int, *shape: int) -> Tensor:
    """Noise from ``count`` seeds, stacked first."""
    return torch.stack([quasi_normal(*shape, generator(1, seed)) for seed in range(count)])


def test_marginals_are_normal() -> None:
    """One point of each set, from many seeds, is an independent draw; a set of 256 hardly feels the whitening."""
    points = reseeded(400, 256, 4, 2)[:, 17].reshape(-1)
    # Points of one seed share their scramble; their shifts make them independent.
    assert stats.kstest(points.numpy(), "norm").pvalue > 1e-3
    assert stats.kstest((1.2 * points).numpy(), "norm").pvalue < 1e-3
    assert stats.kstest((points + 0.2).numpy(), "norm").pvalue < 1e-3


def test_higher_moments() -> None:
    draws = reseeded(100, 256, 4, 2)
    for power, expected in ((4, 3.0), (6, 15.0)):
        estimates = draws.pow(power).mean(1).flatten()
        error = float(estimates.std()) / math.sqrt(len(estimates))
        # Whitening a set of K points biases these moments by a share of the order of 1 / K.
        assert abs(float(estimates.mean()) - expected) < 5 * error + 2 * expected / 256
        assert abs(1.1 * float(estimates.mean()) - expected) > 5 * error + 2 * expected / 256


def errors(noise: Tensor) -> Tensor:
    """Errors of three integrals that are not exact, ``(..., N, 3)``, from noise ``(..., K, N, dim)``."""
    first = (noise.abs().sum(-1) - noise.shape[-1] * math.sqrt(2 / math.pi)).mean(-2)
    second = (noise.cos().prod(-1) - math.exp(-0.5 * noise.shape[-1])).mean(-2)
    third = ((noise > 1).double().mean(-1) - float(stats.norm.sf(1.0))).mean(-2)
    return torch.stack([first, second, third], -1)


def largest_correlation(error: Tensor) -> float:
    """Between datapoints, over repetitions; of ``(R, N, 3)``, in standard errors of a correlation of zero."""
    standard = (error - error.mean(0)) / error.std(0)
    correlation = torch.einsum("rni,rmi->inm", standard, standard) / len(error)
    off_diagonal = correlation - torch.diag_embed(correlation.diagonal(dim1=1, dim2=2))
    return float(off_diagonal.abs().max()) * math.sqrt(len(error))


def test_errors_are_independent_between_datapoints() -> None:
    noise = reseeded(400, 64, 5, 2)
    assert largest_correlation(errors(noise)) < 4.5
    shared = noise[:, :, [0, 0, 1, 2, 3]]  # a twin in which two datapoints have the same shift
    assert largest_correlation(errors(shared)) > 4.5


def test_errors_are_smaller_than_those_of_plain_draws() -> None:
    noise = reseeded(100, 128, 4, 2)
    plain = torch.randn(noise.shape, generator=generator(2), dtype=torch.float64)
    ratio = errors(noise).square().mean((0, 1)).sqrt() / errors(plain).square().mean((0, 1)).sqrt()
    assert (ratio < 0.6).all()


def test_errors_are_unbiased() -> None:
    error = errors(reseeded(200, 256, 4, 2)).flatten(0, 1)
    standard_error = error.std(0) / math.sqrt(len(error))
    assert (error.mean(0).abs() < 5 * standard_error + 1e-3).all()


def test_same_generator_same_noise() -> None:
    first, again, other = (quasi_normal(64, 3, 2, generator(*seed)) for seed in ((0, 1), (0, 1), (1, 0)))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    rng = generator(0)
    assert not torch.allclose(quasi_normal(64, 3, 2, rng), quasi_normal(64, 3, 2, rng), atol=0.1)


def test_seeds_give_streams_of_their_own() -> None:
    seeds = [(i,) for i in range(40)] + [(i, j) for i in range(20) for j in range(20)]
    draws = {float(torch.rand((), generator=generator(*seed), dtype=torch.float64)) for seed in seeds}
    assert len(draws) == len(seeds)


# The global seed


class Laplace(VariationalFamily):
    """Draws its own noise."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        loc, log_scale = phi.chunk(2, -1)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)


@pytest.fixture(autouse=True)
def clean_pyro() -> Iterator[None]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("family", ["normal", "low_rank_multivariate_normal", Laplace])
def test_draw_takes_its_noise_from_the_generator(family: Any) -> None:
    built = build_family(family, 2)
    phi, state = torch.randn(3, built.num_params), torch.get_rng_state()
    first, again, other = (draw(built, phi, 5, generator(seed)) for seed in (0, 0, 1))
    assert first.shape == (5, 3, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    draw(built, phi, 5, generator(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_restores_the_state_after_an_exception() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(generator(0)):
        torch.randn(3) / (1 // 0)
    assert torch.equal(torch.get_rng_state(), state)


def whole(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def random_batch(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def with_global(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


CASES: dict[str, tuple[Callable[[Tensor], None], Any, int]] = {
    "shapes seen before": (whole, "normal", 4),
    "new shapes": (whole, "normal", 3),
    "random batch": (random_batch, "normal", 4),
    "global latents": (with_global, "multivariate_normal", 4),
    "own noise": (whole, Laplace, 4),
}


def case(name: str) -> tuple[Callable[[Tensor], None], AmortizedGuide, Tensor]:
    model, family, size = CASES[name]
    guide = AmortizedGuide(model, family=family)
    guide.setup(torch.linspace(-1.0, 1.0, 4))
    return model, guide, torch.linspace(-1.0, 2.0, size)


DIAGNOSTICS = [
    pytest.param(
        diagnostic, name, marks=pytest.mark.slow if name == "own noise" and diagnostic is not optimize_local else ()
    )
    for diagnostic in (estimate_gaps, optimize_local, log_evidence)
    for name in CASES
]


@pytest.mark.thinned
@pytest.mark.parametrize(("diagnostic", "name"), DIAGNOSTICS)
def test_diagnostics_leave_the_global_seed_alone(diagnostic: Callable[..., Any], name: str) -> None:
    model, guide, x = case(name)
    state = torch.get_rng_state()
    diagnostic(model, guide, (x,))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "own noise" else ()) for name in CASES]
)
def test_diagnostics_depend_on_their_own_seed_only(name: str) -> None:
    model, guide, x = case(name)
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        results.append(log_evidence(model, guide, (x,), seed=seed))
    assert results[0].identical(results[1])
    assert not results[1]["log_evidence"].identical(results[2]["log_evidence"])
