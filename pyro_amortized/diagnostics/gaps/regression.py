"""Gaussian process regression that chooses its kernel and its inputs by leaving out one datapoint after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

__all__ = ["GaussianProcess"]

_LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
_LINEAR = (0.0, 0.1, 1.0)
_NOISES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class GaussianProcess:
    """A mean of functions of inputs, by a squared exponential and a linear kernel.

    Attributes:
        columns: Which of the inputs are used.
        inputs: Known inputs in units of their spread, ``(M, F)``.
        mean: What they are relative to.
        scale: Their spread.
        length: Length scale, in units in which squared distances are averaged over inputs.
        linear: Variance of the linear part, that of the other part being 1.
        weights: Of the known inputs, ``(M,)``.
        level: Mean of the targets.
        error: Mean squared error of the left-out datapoints.

    References:
        Gaussian Processes for Machine Learning, Carl Edward Rasmussen, Christopher K. I. Williams (2006).
    """

    columns: slice
    inputs: Tensor
    mean: Tensor
    scale: Tensor
    length: float
    linear: float
    weights: Tensor
    level: Tensor
    error: float

    @classmethod
    def fit(cls, inputs: Tensor, targets: Tensor, choices: Sequence[slice]) -> GaussianProcess:
        """Fits targets ``(M,)`` on inputs ``(M, F)``, on those columns that leave the smallest error."""
        return min((cls._best(inputs, targets, columns) for columns in choices), key=lambda found: found.error)

    @classmethod
    def _best(cls, inputs: Tensor, targets: Tensor, columns: slice) -> GaussianProcess:
        inputs, level = inputs[:, columns], targets.mean()
        mean, spread = inputs.mean(0), inputs.std(0)
        scale = spread + 0.1 * spread.square().mean().sqrt() + 1e-9
        white, found = (inputs - mean) / scale, []
        eye = torch.eye(len(white), dtype=white.dtype)
        for length, linear in product(_LENGTHS, _LINEAR):
            kernel = _kernel(white, white, length, linear)
            for noise in _NOISES:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + noise * eye))
                weights = inverse @ (targets - level)
                error = float((weights / inverse.diagonal()).square().mean())
                found.append(cls(columns, white, mean, scale, length, linear, weights, level, error))
        return min(found, key=lambda process: process.error)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Predictions ``(N,)`` at inputs ``(N, F)``."""
        white = (inputs[:, self.columns] - self.mean) / self.scale
        return _kernel(white, self.inputs, self.length, self.linear) @ self.weights + self.level


def _kernel(first: Tensor, second: Tensor, length: float, linear: float) -> Tensor:
    size = first.shape[-1]
    return (-torch.cdist(first, second).square() / (2 * size * length**2)).exp() + linear / size * (first @ second.T)
