"""How odd datapoints are, from their features and their ELBOs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Distance", "Oddness", "TwoSided"]

_LEAST_SHARE = 0.1
"""Of the root mean square of all standard deviations, below which that of a feature is not taken: units may be dead."""


@dataclass(frozen=True)
class Distance:
    """The Mahalanobis distance from known features, with a covariance that is shrunk for their number.

    Attributes:
        mean: ``(F,)``.
        scale: Units of the features, ``(F,)``.
        root: From features in these units to white ones, ``(F, F)``.

    References:
        A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices, Olivier Ledoit, Michael Wolf (2004).
        A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks, Kimin Lee, Kibok
        Lee, Honglak Lee, Jinwoo Shin (2018), https://arxiv.org/abs/1807.03888
    """

    mean: Tensor
    scale: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Distance:
        """From known features ``(M, F)`` in float64."""
        mean, spread = features.mean(0), features.std(0)
        least = _LEAST_SHARE * spread.square().mean().sqrt()
        rounding = 1e-9 * (1.0 + mean.abs())  # of features that are all the same
        scale = torch.maximum(spread.clamp(min=float(least)), rounding)
        white = (features - mean) / scale
        covariance = white.T @ white / len(white)
        size = len(mean)
        target = covariance.trace() / size * torch.eye(size, dtype=white.dtype)
        apart = (covariance - target).square().sum() / size
        noise = (white.square().sum(-1).square().sum() / len(white) - covariance.square().sum()) / len(white) / size
        share = (noise.clamp(min=0.0) / apart.clamp(min=1e-300)).clamp(1e-6, 1.0)
        shrunk = share * target + (1 - share) * covariance + 1e-9 * torch.eye(size, dtype=white.dtype)
        return cls(mean, scale, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(shrunk))))

    def __call__(self, features: Tensor) -> Tensor:
        """Distances ``(N,)`` of features ``(N, F)``."""
        return (((features - self.mean) / self.scale) @ self.root).norm(dim=-1)


@dataclass(frozen=True)
class TwoSided:
    """How far values are from a median, in units of the way to the 5 % quantile on either side."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> TwoSided:
        """From known values ``(M,)``."""
        low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)).tolist()
        least = 1e-6 * (1.0 + abs(median))
        return cls(median, max(median - low, least), max(high - median, least))

    def signed(self, values: Tensor) -> Tensor:
        """Negative below the median."""
        away = values - self.median
        return torch.where(away < 0, away / self.low, away / self.high)


@dataclass(frozen=True)
class Oddness:
    """The two statistics, in units that compare, and their sum.

    Attributes:
        distance: From the features that were known.
        scale_of_distance: What distances of other known datapoints look like.
        elbo: What their ELBOs look like.
    """

    distance: Distance
    scale_of_distance: TwoSided
    elbo: TwoSided

    @classmethod
    def of(cls, features: Tensor, elbo: Tensor, first: Tensor, second: Tensor) -> Oddness:
        """From known features ``(M, F)`` and ELBOs ``(M,)``; moments of ``first``, units of distances of ``second``."""
        distance = Distance.of(features[first])
        return cls(distance, TwoSided.of(distance(features[second])), TwoSided.of(elbo[torch.cat([first, second])]))

    def __call__(self, features: Tensor, elbo: Tensor) -> dict[str, Tensor]:
        """Scores ``(N,)``, high where a datapoint is odd: of the features, of the ELBO, of both."""
        by_features = self.scale_of_distance.signed(self.distance(features))
        by_elbo = self.elbo.signed(elbo).abs()
        return {"features": by_features, "elbo": by_elbo, "both": by_features + by_elbo}
