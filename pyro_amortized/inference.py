"""Inference strategies: where the variational parameters phi come from.

A strategy maps what is known of the datapoints to phi, one row each: :class:`Encoded` through a network,
:class:`PerDatapoint` by looking it up in a table. It knows neither the model nor the shape of q.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Encoded", "InferenceStrategy", "PerDatapoint"]

Objective = Callable[[Tensor], Tensor]
"""phi of shape ``(N, P)`` -> the per-datapoint ELBO of shape ``(N,)``, in nats."""


class InferenceStrategy(nn.Module):
    """Base class: ``forward(inputs, index, objective) -> phi``.

    Attributes:
        needs_inputs: Whether ``forward`` reads ``inputs``; guides do not look for the data otherwise.
    """

    needs_inputs: bool = True

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """phi of the datapoints at hand.

        Args:
            inputs: Tensors of shape ``(N, ...)`` that describe the datapoints.
            index: Positions ``(N,)`` of the datapoints in the full data set, or None for all of them in order.
            objective: The per-datapoint ELBO as a function of phi, for strategies that refine.

        Returns:
            phi of shape ``(N, P)``.
        """
        raise NotImplementedError


class Encoded(InferenceStrategy):
    """phi from a network, as in the variational autoencoder.

    Args:
        encoder: From inputs to features ``(N, H)``, or to a pair ``(loc, scale)`` of shapes ``(N, D)``.
        head: From features to phi, or None if the encoder returns a pair, which is then read as the location and scale
            of the mean-field normal family: ``phi = (loc, log scale)``.

    References:
        Auto-Encoding Variational Bayes, Diederik P. Kingma, Max Welling (2013), https://arxiv.org/abs/1312.6114
    """

    def __init__(self, encoder: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """phi of shape ``(N, P)``; ``index`` and ``objective`` are not needed."""
        features = self.encoder(*inputs)
        if self.head is not None:
            return self.head(features)
        loc, scale = features
        return torch.cat([loc, scale.log()], -1)


class PerDatapoint(InferenceStrategy):
    """phi from a table with one row per datapoint: classical, non-amortized variational inference.

    Args:
        table: Initial phi of shape ``(N_full, P)``.
        sparse: Whether the gradient of the table holds only the rows looked up. A step then costs the same however
            many datapoints there are, but the optimizer must take sparse gradients (``pyro.optim.Adagrad``,
            ``pyro.optim.SparseAdam``, ``pyro.optim.SGD``).
    """

    needs_inputs = False

    def __init__(self, table: Tensor, *, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.sparse = sparse

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """Rows ``index`` of the table, or all of it; ``inputs`` and ``objective`` are not needed."""
        if index is None:
            if not self.sparse:
                return self.table
            index = torch.arange(len(self.table), device=self.table.device)
        return F.embedding(index, self.table, sparse=self.sparse)
