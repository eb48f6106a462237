"""The importance-weighted bound of a guide at every datapoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.elbo import log_weights
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.objective.noise import generator

__all__ = ["importance_weighted_bound"]

_DRAWS_PER_ROUND = 2000
_FEWEST = 20
"""Replicates of K draws, for a standard error that can be believed."""


@torch.no_grad()
def importance_weighted_bound(
    problem: LocalProblem, num_particles: int, tolerance: float, max_samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    r"""An unbiased estimate of :math:`E \log \frac{1}{K} \sum_k w_{nk}` with its standard error, each ``(N,)``.

    Replicates of K draws go on until the standard error of every datapoint is below half of the tolerance, or there are
    ``max_samples`` draws, though at least 20 replicates.

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov (2016),
        https://arxiv.org/abs/1509.00519
    """
    replicates = max(2, _DRAWS_PER_ROUND // num_particles)
    bounds = torch.zeros(0, len(problem.phi), dtype=torch.float64)
    error = torch.full_like(problem.phi[:, 0], math.inf)
    while len(bounds) < _FEWEST or (error.max() > tolerance / 2 and len(bounds) * num_particles < max_samples):
        part_seed = int(torch.randint(2**31 - 1, (), generator=generator(seed, 21, len(bounds))))
        found = log_weights(problem.objective, problem.phi, None, replicates * num_particles, part_seed)
        found = found.unflatten(0, (replicates, num_particles)).logsumexp(1) - math.log(num_particles)
        bounds = torch.cat([bounds, found])
        error = bounds.std(0) / len(bounds) ** 0.5
    return bounds.mean(0), error
