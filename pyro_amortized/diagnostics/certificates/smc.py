r"""Sequential Monte Carlo from a wide reference: an exploration of posteriors that does not start at q.

Particles drawn from a reference about as wide as the prior follow the path :math:`r(z)^{1 - \beta} p(x, z)^\beta` from
:math:`\beta = 0` to 1. Every datapoint has temperatures of its own, so chosen that half of its particles survive each;
the survivors are moved by Hamiltonian Monte Carlo in units of their own covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_amortized.diagnostics.evidence.annealing import Path, Points
from pyro_amortized.diagnostics.evidence.importance import systematic
from pyro_amortized.diagnostics.evidence.proposal import DF, Proposal
from pyro_amortized.diagnostics.optimum.modes import as_wide_as
from pyro_amortized.diagnostics.problem import LocalProblem

__all__ = ["MAX_SMC_DIM", "particles"]

MAX_SMC_DIM = 10
"""Dimensions up to which so few particles can be trusted to explore."""
_NUM_PARTICLES, _NUM_MOVES, _MAX_TEMPERATURES = 256, 3, 60
_SURVIVING = 0.5
_WIDER = 1.5
"""How much wider than the prior the reference is."""


@torch.no_grad()
def particles(problem: LocalProblem, rows: Tensor, prior: Tensor, rng: torch.Generator) -> Tensor:
    """Particles ``(K, n, D)`` of some datapoints' posteriors.

    Args:
        problem: The bound call.
        rows: Which datapoints, ``(n,)``.
        prior: Draws of the prior, ``(K, N, D)``.
        rng: Source of the draws.

    References:
        Sequential Monte Carlo Samplers, Pierre Del Moral, Arnaud Doucet, Ajay Jasra (2006),
        https://arxiv.org/abs/cond-mat/0212648
    """
    reference = _reference(prior[:, rows])
    path = Path(problem, reference, rows)
    points = path.at(reference.draw(_NUM_PARTICLES, rng))
    size, dim = points.z.shape[1:]
    result = points.z.clone()
    active, beta = torch.arange(size), torch.zeros(size, dtype=torch.float64)
    log_step = torch.full((size,), -0.25, dtype=torch.float64) * torch.tensor(float(dim)).log()
    for _ in range(_MAX_TEMPERATURES):
        after = _next(points.difference, beta)
        points = _resampled(points, after - beta, rng)
        beta, path.units = after, _root(points.z, path.units)
        for _ in range(_NUM_MOVES):
            points, accepted = path.move(points, beta, log_step.exp(), rng)
            log_step = log_step + 0.5 * (accepted - 0.7)
        result[:, active] = points.z
        left = (beta < 1).nonzero().squeeze(-1)
        if len(left) == 0:
            break
        if len(left) < len(active):
            active, beta, log_step, units = active[left], beta[left], log_step[left], path.units[left]
            path = Path(problem, reference[active], rows[active])
            path.units, points = units, points.of_rows(left)
    return result


def _reference(prior: Tensor) -> Proposal:
    """A multivariate t at the prior's median, somewhat wider than its quantiles."""
    loc, root = as_wide_as(prior)
    shape = loc.shape[:1]
    df = torch.full((1, *shape), DF, dtype=torch.float64)
    return Proposal(loc.unsqueeze(0), _WIDER * root.unsqueeze(0), torch.full((1, *shape), 250, dtype=torch.long), df)


def _next(difference: Tensor, beta: Tensor) -> Tensor:
    """The inverse temperatures ``(n,)`` to go to, by bisection: at which half of the particles survive."""
    low, high = beta.clone(), torch.ones_like(beta)
    reached = _survivors(difference, high - beta) >= _SURVIVING
    for _ in range(30):
        middle = 0.5 * (low + high)
        enough = _survivors(difference, middle - beta) >= _SURVIVING
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(reached, 1.0, torch.maximum(low, beta + 1e-8).clamp(max=1.0))


def _survivors(difference: Tensor, step: Tensor) -> Tensor:
    """The effective share of the particles."""
    weights = _weights(difference, step)
    return 1 / (weights.square().sum(0) * len(weights))


def _weights(difference: Tensor, step: Tensor) -> Tensor:
    usable = torch.where(difference.isneginf().all(0), 0.0, difference)
    return (step * usable).nan_to_num(nan=-torch.inf).softmax(0)


def _resampled(points: Points, step: Tensor, rng: torch.Generator) -> Points:
    chosen = systematic(_weights(points.difference, step), rng)
    return points.taken(chosen)


def _root(z: Tensor, before: Tensor) -> Tensor:
    """Cholesky factors of the particles' covariances ``(n, D, D)``, drawn a little towards their diagonals."""
    count, _, dim = z.shape
    centred = z - z.mean(0)
    covariance = torch.einsum("kni,knj->nij", centred, centred) / count
    share = dim / (dim + count / 4)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    factor, failed = torch.linalg.cholesky_ex((1 - share) * covariance + share * diagonal)
    return torch.where((failed == 0)[:, None, None], factor, before)
