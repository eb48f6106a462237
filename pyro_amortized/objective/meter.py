"""What inference costs, counted where the model is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Meter"]


@dataclass(frozen=True)
class Meter:
    """How often the log-joint of every datapoint has been evaluated.

    Attributes:
        gradients: Evaluations that were differentiated, ``(N,)``; a Hessian counts as D of them.
        values: Evaluations of the value alone, ``(N,)``.
        rows: The datapoints that this meter stands at, positions in ``range(N)``.
    """

    gradients: Tensor
    values: Tensor
    rows: Tensor

    @classmethod
    def of(cls, num_datapoints: int) -> Meter:
        """A meter that has counted nothing yet."""
        nothing = torch.zeros(num_datapoints, dtype=torch.long)
        return cls(nothing, nothing.clone(), torch.arange(num_datapoints))

    def of_rows(self, rows: Tensor) -> Meter:
        """The same counts, for some of the datapoints, some of them repeated."""
        return replace(self, rows=self.rows[rows])

    def add(self, z: Tensor) -> None:
        """Counts an evaluation at latents ``(K, n, D)``."""
        counts = self.gradients if z.requires_grad else self.values
        counts.index_add_(0, self.rows, torch.full_like(self.rows, len(z)))
