"""Gradients through refinement steps by finite differences, as common code has them and as they should be.

Written in plain torch, since the package differentiates its steps exactly and has no use for this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

Slope = Callable[..., torch.Tensor]
"""The gradient by phi of the mean ELBO of a batch on given noise."""

LogLikelihood = Callable[[torch.Tensor], torch.Tensor]
"""log p(x | z) of a batch for draws ``(K, N, D)``: ``(K, N)``."""


@dataclass(frozen=True)
class Differences:
    """How Hessian-vector products are taken.

    Attributes:
        eps: Length of the difference, over the whole batch.
        limit: Longest gradient of the batch, for locations and for scales; None for no limit. With one, as in common
            code, the gradient of a step is clipped, that of its difference is not, and the product is again.
    """

    eps: float
    limit: float | None


PUBLIC, BINDING, SOUND = Differences(1e-5, 5.0), Differences(1e-5, 0.5), Differences(1e-2, None)
"""As in common code; with a limit that gradients do exceed here; and as they should be."""


def mean_elbo(log_likelihood: LogLikelihood, phi: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The ELBO of a batch, a mean over its datapoints, for phi = (location, log scale) and a N(0, I) prior."""
    loc, log_scale = phi.chunk(2, -1)
    q = dist.Normal(loc, log_scale.exp())
    kl = kl_divergence(q, dist.Normal(torch.zeros(()), 1.0)).sum(-1)
    return (log_likelihood(loc + q.scale * noise).mean(0) - kl).mean()


def slope_of(log_likelihood: LogLikelihood, max_norm: float) -> Slope:
    """The gradient of :func:`mean_elbo`, with a graph of its own if asked for.

    Args:
        log_likelihood: Of the batch.
        max_norm: Longest gradient of the ELBO of a single datapoint.
    """

    def slope(phi: torch.Tensor, noise: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        with torch.enable_grad():
            at = phi if create_graph else phi.detach().requires_grad_()
            gradient = torch.autograd.grad(mean_elbo(log_likelihood, at, noise), at, create_graph=create_graph)[0]
            norm = len(phi) * gradient.norm(dim=-1, keepdim=True)
            return gradient * (max_norm / norm).clamp(max=1.0)

    return slope


def antithetic(count: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise for draws of phi, in antithetic pairs if they are even in number."""
    pairs, odd = divmod(count, 2)
    noise = torch.randn(count if odd else pairs, len(like), like.shape[-1] // 2)
    return noise if odd else torch.cat([noise, -noise])


def unrolled(
    phi: torch.Tensor, slope: Slope, noises: Sequence[torch.Tensor], step: float, momentum: float
) -> torch.Tensor:
    """Gradient ascent with momentum that autograd differentiates exactly."""
    velocity = torch.zeros_like(phi)
    for noise in noises:
        velocity = momentum * velocity + slope(phi, noise, create_graph=True)
        phi = phi + step * velocity
    return phi


class DifferencedSteps(torch.autograd.Function):
    """The same steps, whose backward pass takes Hessian-vector products by finite differences."""

    @staticmethod
    def forward(
        ctx: Any,
        phi: torch.Tensor,
        slope: Slope,
        noises: Sequence[torch.Tensor],
        step: float,
        momentum: float,
        how: Differences,
    ) -> torch.Tensor:
        """The refined phi."""
        velocity, path = torch.zeros_like(phi), []
        for noise in noises:
            gradient = _clipped(slope(phi, noise), how.limit)
            path.append((phi, gradient))
            velocity = momentum * velocity + gradient
            phi = phi + step * velocity
        ctx.settings = slope, noises, step, momentum, how, path
        return phi

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient by where the steps start."""
        slope, noises, step, momentum, how, path = ctx.settings
        by_phi = gradients[0]
        by_velocity = torch.zeros_like(by_phi)
        for (phi, gradient), noise in zip(reversed(path), reversed(noises), strict=True):
            by_velocity = by_velocity + step * by_phi
            length = how.eps / by_velocity.norm().clamp(min=1e-30)
            product = (slope(phi + length * by_velocity, noise) - gradient) / length
            by_phi = by_phi + _clipped(product, how.limit)
            by_velocity = momentum * by_velocity
        return by_phi, None, None, None, None, None


def _clipped(gradient: torch.Tensor, limit: float | None) -> torch.Tensor:
    if limit is None:
        return gradient
    return torch.cat([part * (limit / part.norm()).clamp(max=1.0) for part in gradient.chunk(2, -1)], -1)
