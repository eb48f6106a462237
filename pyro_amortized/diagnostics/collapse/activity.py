r"""What each latent dimension tells of its datapoint beyond its prior, whatever the units of the latent.

Latents are measured against the spread of their own prior,

.. math:: w_{nd} = \frac{u_{nd} - m_{nd}}{s_{nd}},

with m and s the median and the scaled interquartile range of the prior of datapoint n, found from draws: moments need
not exist, and a prior may depend on other latents or on the datapoint. In these units a guide that answers with the
prior gives every datapoint the same distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_amortized.diagnostics.collapse.priors import prior_draws, site_priors
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.families import VariationalFamily
from pyro_amortized.objective.noise import draw, seeded

__all__ = ["PriorSpread", "dimension_information", "least_information"]

_IQR_OF_NORMAL = 1.3489795


@dataclass
class PriorSpread:
    """Where the priors of the datapoints lie.

    Attributes:
        loc: Medians in unconstrained space, ``(N, D)``.
        scale: Interquartile ranges, in units of a standard normal's, ``(N, D)``.
        shared: Log density of the prior at some values for each datapoint, if it is the same for all; else None.
        values: Those values, ``(1, D)``.
    """

    loc: Tensor
    scale: Tensor
    shared: Tensor | None
    values: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, problem: LocalProblem, rng: torch.Generator, before: PriorSpread | None) -> PriorSpread:
        """Finds the spread for a batch.

        Args:
            problem: The batch.
            rng: Source of the draws.
            before: The spread of an earlier batch, taken over where the prior is the same.
        """
        log_joint, size = problem.objective.log_joint, len(problem.phi)
        with pyro.validation_enabled(False), seeded(rng):
            values = draw(problem.objective.family, problem.phi[:1], 1, rng)[0] if before is None else before.values
            log_p = [p.log_p for _, ps in site_priors(log_joint, values.expand(1, size, -1)) for p in ps]
            densities = torch.cat(log_p, -1)[0]
            same = _are_close(densities, densities[:1].expand_as(densities))
            shared = densities[0].cpu().double() if same else None
            if before is not None and _are_close(before.shared, shared):
                return cls(before.loc[:1].expand(size, -1), before.scale[:1].expand(size, -1), shared, values)
            num_draws = max(2, 40_000 // size) if same else max(200, 20_000_000 // (size * values.shape[-1]))
            draws = prior_draws(log_joint, min(1000, num_draws)).cpu().double()
        ordered = (draws.flatten(0, 1).unsqueeze(1) if same else draws).sort(0).values
        low, loc, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
        scale = ((high - low) / _IQR_OF_NORMAL).nan_to_num(1.0, 1.0).clamp(min=1e-30)
        loc = torch.where(loc.isfinite(), loc, 0.0)
        return cls(loc.expand(size, -1), scale.expand(size, -1), shared, values)


def _are_close(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return False
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
def dimension_information(
    family: VariationalFamily, phi: Tensor, loc: Tensor, scale: Tensor, rng: torch.Generator
) -> Tensor:
    r"""Mutual information of the datapoint and each dimension by itself, ``(D,)`` nats.

    Draws are counted in up to 32 bins of equal mass under the aggregate posterior, which makes a lower bound of at most
    :math:`\log 32`; the bias of the counts is taken out to first order.

    Args:
        family: The variational family.
        phi: Variational parameters ``(N, P)``.
        loc: Medians of the priors ``(N, D)``.
        scale: Their spread ``(N, D)``.
        rng: Source of the draws.

    References:
        Estimation of Entropy and Mutual Information, Liam Paninski (2003).
    """
    size, dim = loc.shape
    num_draws = max(100, min(5000, 200_000 // size, 20_000_000 // (size * dim)))
    w = (draw(family, phi, num_draws, rng).cpu().double() - loc) / scale
    return torch.stack([_information(w[..., d].T.contiguous()) for d in range(dim)])


def _information(draws: Tensor) -> Tensor:
    """Mutual information of row and value of draws ``(N, K)``."""
    size, num_draws = draws.shape
    num_bins = max(8, min(32, num_draws // 12))  # more would leave a bias of second order
    ordered = draws.flatten().sort().values
    edges = ordered[torch.arange(1, num_bins) * len(ordered) // num_bins]
    bins = torch.bucketize(draws, edges) + num_bins * torch.arange(size).unsqueeze(-1)
    counts = bins.flatten().bincount(minlength=size * num_bins).reshape(size, num_bins)
    return (_entropy(counts.sum(0)) - _entropy(counts).mean()).clamp(min=0.0)


def _entropy(counts: Tensor) -> Tensor:
    """Entropy of counts over the last dimension, with the correction of Miller and Madow."""
    total = counts.sum(-1, keepdim=True)
    share = counts.double() / total
    return -torch.special.xlogy(share, share).sum(-1) + ((counts > 0).sum(-1) - 1) / (2 * total.squeeze(-1))


def least_information(threshold: float) -> float:
    """Information of a normal whose mean varies by ``threshold`` times its own variance, in nats."""
    return 0.5 * math.log1p(threshold)
