"""Inference strategies: where the variational parameters phi come from.

A strategy maps what is known of the datapoints to phi, one row each: :class:`Encoded` through a network,
:class:`PerDatapoint` by looking it up in a table, :class:`Prior` without looking at the datapoint at all, and
:class:`Refined` by climbing the per-datapoint ELBO from where another strategy starts. It does not know the model.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from pyro_amortized.families import VariationalFamily

__all__ = ["InferenceStrategy", "Objective"]


class Objective(Protocol):
    """What a strategy that refines asks of the per-datapoint ELBO, in nats."""

    family: VariationalFamily

    def noise(self, phi: Tensor, num_particles: int, whiten: bool = False) -> Tensor | int:
        """Fresh noise for a number of draws: ``(K, N, noise_dim)``, or K if the family draws its own.

        Where no gradient is to be unbiased it may be whitened, so that quadratic functions are integrated exactly.
        """

    def masked(self, phi: Tensor) -> Tensor:
        """phi with latents that are masked apart from all others, so that they move nothing."""

    def unscaled(self, gradient: Tensor) -> Tensor:
        """A gradient ``(N, P)`` of the ELBO without the scale that the model gives to its latents."""

    def value(self, phi: Tensor, noise: Any) -> Tensor:
        """The ELBO ``(N,)`` on given noise."""

    def gradient(self, phi: Tensor, noise: Any) -> Tensor:
        """Its gradient ``(N, P)``, differentiable where gradients are enabled."""

    @property
    def has_curvature(self) -> bool:
        """Whether :meth:`curvature` can be had."""

    def curvature(self, phi: Tensor, noise: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient ``(N, P)``, with slope ``(N, D)`` and curvature ``(N, D, D)`` in units of q."""

    def prepare(self, phi: Tensor, noise: Any, curvature: bool) -> None:
        """Does what the first call of :meth:`gradient` or :meth:`curvature` with such arguments needs beforehand."""

    def prior(self) -> Tensor:
        """phi close to the prior, ``(N, P)``."""


class InferenceStrategy(nn.Module):
    """Base class: ``forward(inputs, index, objective) -> phi``, of shape ``(N, P)``.

    The arguments of ``forward`` are tensors ``inputs`` of shapes ``(N, ...)`` that describe the datapoints; ``index``,
    their positions ``(N,)`` in the full data set, or None for all of them in order; and ``objective``, the ELBO of each
    datapoint as a function of phi, for strategies that refine.

    Attributes:
        needs_inputs: Whether ``forward`` reads ``inputs``; guides do not look for the data otherwise.
        num_known: Number of datapoints that the strategy knows, or None if it serves any.
        is_sparse: Whether gradients hold only the rows looked up, which not every optimizer takes.
    """

    needs_inputs: bool = True
    num_known: int | None = None
    is_sparse: bool = False
