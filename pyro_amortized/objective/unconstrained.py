"""Densities of saturating sites, from their unconstrained values.

A sigmoid or an exponential runs out of floats long before a Beta, gamma or Dirichlet density of small shape runs out of
mass: computed from the constrained value, the density would be constant from there on, or infinite.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
)
from torch.nn.functional import logsigmoid

__all__ = ["unconstrained_log_prob"]


def unconstrained_log_prob(fn: Any, transform: Any, u: Tensor) -> Tensor | None:
    r"""The log-density of u, where :math:`T(u)` has a given distribution; None for those that need no care.

    Args:
        fn: The distribution of :math:`T(u)`.
        transform: T, from unconstrained space to the support.
        u: Unconstrained values.
    """
    if isinstance(fn, torch.distributions.Independent):
        log_prob = unconstrained_log_prob(fn.base_dist, transform, u)
        return None if log_prob is None else sum_rightmost(log_prob, fn.reinterpreted_batch_ndims)
    transform = _simplest(transform)
    if isinstance(fn, torch.distributions.Beta) and isinstance(transform, SigmoidTransform):
        a, b = fn.concentration1, fn.concentration0
        return a * logsigmoid(u) + b * logsigmoid(-u) + (a + b).lgamma() - a.lgamma() - b.lgamma()
    if isinstance(fn, torch.distributions.Gamma) and isinstance(transform, ExpTransform):
        return fn.concentration * (fn.rate.log() + u) - fn.rate * u.exp() - fn.concentration.lgamma()
    if isinstance(fn, dist.InverseGamma) and isinstance(transform, ExpTransform):
        return fn.concentration * (fn.rate.log() - u) - fn.rate * (-u).exp() - fn.concentration.lgamma()
    if isinstance(fn, torch.distributions.Dirichlet) and isinstance(transform, StickBreakingTransform):
        return _dirichlet(fn.concentration, u)
    return None


def _simplest(transform: Any) -> Any:
    """The transform of single values, without the idle affine one that non-negative supports come with."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform):
        parts = [part for part in map(_simplest, transform.parts) if not _does_nothing(part)]
        return parts[0] if len(parts) == 1 else transform
    return transform


def _does_nothing(transform: Any) -> bool:
    if not isinstance(transform, AffineTransform):
        return False
    loc, scale = transform.loc, transform.scale
    return isinstance(loc, int | float) and isinstance(scale, int | float) and loc == 0 and scale == 1


def _dirichlet(concentration: Tensor, u: Tensor) -> Tensor:
    """A stick is broken at independent Beta variables, whose logits are those of u less those of equal pieces."""
    left = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device)
    logit, a = u - left.log(), concentration[..., :-1]
    rest = concentration.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    log_beta = a.lgamma() + rest.lgamma() - (a + rest).lgamma()
    return (a * logsigmoid(logit) + rest * logsigmoid(-logit) - log_beta).sum(-1)
