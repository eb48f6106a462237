"""Inputs shifted and scaled by what the data of the first call show."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FAR", "Standardize", "StandardizedEncoder", "log_shrinkage"]


class Standardize(nn.Module):
    r"""Shifts and scales features: :math:`(x - m) / s`, with m and s taken once from data by :meth:`fit`.

    Features that hardly vary in that data are scaled by a tenth of the typical deviation instead of their own, so that
    a pixel that was dark in the first batch and is lit later does not blow up. Beyond five deviations, which the data
    of a few rows may leave anywhere, features go on as a logarithm.

    Args:
        dim: Number of features F.
    """

    loc: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Takes location and scale from ``x`` of shape ``(..., F)``, once: a second call changes nothing."""
        if self.fitted:
            return
        self.fitted.fill_(True)
        x = x.reshape(-1, x.shape[-1]).to(self.loc)
        deviation = x.std(0, correction=0)
        floor = 0.1 * deviation.square().mean().sqrt()
        self.loc.copy_(x.mean(0))
        self.scale.copy_(torch.where(floor > 0, deviation.clamp(min=floor), torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised features of the shape of ``x``."""
        standardized = (x - self.loc) / self.scale
        return torch.where(self.fitted, standardized * log_shrinkage(standardized.abs()), standardized)


FAR = 5.0
"""Sizes, relative to those in the data of the first call, up to which features are taken as they are."""


def log_shrinkage(size: Tensor) -> Tensor:
    """What to multiply values by for their sizes to go on as a logarithm beyond :data:`FAR`."""
    size = size.clamp(min=FAR)
    return (FAR + (size - FAR).log1p()) / size


class StandardizedEncoder(nn.Module):
    """Base class of encoders that shift and scale their inputs by what they saw in :meth:`fit`."""

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from ``inputs`` of shapes ``(N, ...)``; guides call it in their ``setup``.

        A member that overrides nothing takes none.
        """
