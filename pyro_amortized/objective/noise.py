"""Noise: seeded draws that leave torch's own generator alone, quasi-random and orthogonal points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_amortized.families import VariationalFamily
from pyro_amortized.structure.state import untouched

__all__ = [
    "MOST_ORTHOGONAL",
    "batch_seed",
    "draw",
    "generator",
    "orthogonal",
    "quasi_normal",
    "seeded",
    "whitened",
    "widened",
]


def generator(*seed: int) -> torch.Generator:
    """A generator on the CPU whose stream depends on all the given integers."""
    state = 0
    for part in seed:
        state = (state * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(state)


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch: the user's own for the first one."""
    return seed if number == 0 else int(torch.randint(2**31 - 1, (), generator=generator(seed, 1000, number)))


def quasi_normal(num_draws: int, num_datapoints: int, dim: int, rng: torch.Generator, *, whiten: bool = True) -> Tensor:
    r"""Antithetic Sobol points, mapped to the normal distribution.

    Every datapoint gets the same scrambled Sobol points under a random shift of its own, so that errors are independent
    between datapoints. The mean of each datapoint's points is exactly 0.

    Args:
        num_draws: K, even, at least twice ``dim``.
        num_datapoints: N.
        dim: Number of noise variables.
        rng: Source of the scramble and the shifts.
        whiten: Whether to make the second moments exactly I too, so that quadratic functions are integrated without
            error. Good for optimisation, where all that matters is a smooth function of phi; not for estimates, since
            it shrinks the higher moments and so biases every other function, by as much as 3% of a fourth moment.

    Returns:
        float64 noise of shape ``(K, N, dim)``.

    References:
        Randomization of Number Theoretic Methods for Multiple Integration, R. Cranley, T. N. L. Patterson (1976).
    """
    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    points = SobolEngine(dim, scramble=True, seed=seed).draw(num_draws // 2, dtype=torch.float64)
    shift = torch.rand(num_datapoints, dim, generator=rng, dtype=torch.float64)
    uniform = (points.unsqueeze(1) + shift).remainder(1.0).clamp(1e-12, 1 - 1e-12)
    half = torch.special.ndtri(uniform)
    noise = torch.cat([half, -half])
    return whitened(noise) if whiten else noise


def whitened(noise: Tensor) -> Tensor:
    """Antithetic noise ``(K, N, D)`` of second moments of exactly I over the draws; of 1 each where K is below 2 D."""
    if len(noise) < 2 * noise.shape[-1]:
        return noise / noise.square().mean(0).sqrt()
    rows = widened(noise).permute(1, 2, 0)
    factor = torch.linalg.cholesky_ex(rows @ rows.transpose(-1, -2) / len(noise))[0]
    return torch.linalg.solve_triangular(factor, rows, upper=False).permute(2, 0, 1).to(noise)


@contextmanager
def seeded(rng: torch.Generator) -> Iterator[None]:
    """Draws under a seed taken from ``rng``, and restores the generators and what runs of a model change."""
    with untouched():
        torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=rng)))
        yield


def draw(family: VariationalFamily, phi: Tensor, num_draws: int, rng: torch.Generator) -> Tensor:
    """Independent draws from the family, of shape ``(K, N, D)``, without touching torch's global seed."""
    if family.noise_dim is not None:
        noise = torch.randn(num_draws, len(phi), family.noise_dim, generator=rng, dtype=torch.float64)
        return family.rsample(phi, noise.to(phi))
    with seeded(rng):
        return family(phi).rsample((num_draws,))


MOST_ORTHOGONAL = 128
"""Dimensions up to which draws are made orthogonal, at a cost that grows with their cube."""


def orthogonal(noise: Tensor) -> Tensor:
    """Standard normal vectors ``(K, N, D)``, K at most D, turned to be orthogonal for each of N; lengths are kept."""
    q, r = torch.linalg.qr(widened(noise).permute(1, 2, 0))
    directions = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).permute(2, 0, 1)
    return (directions * noise.norm(dim=-1, keepdim=True)).to(noise)


def widened(tensor: Tensor) -> Tensor:
    """A tensor of a precision that linear algebra exists in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
