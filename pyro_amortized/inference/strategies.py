"""phi without refinement: from a network, a table, or the prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_amortized.inference.base import InferenceStrategy, Objective
from pyro_amortized.inference.sharing import SharedHeads

__all__ = ["Encoded", "PerDatapoint", "Prior", "check_output", "output_parts"]


def check_output(output: Any, *, pair: bool | None = None, by_level: bool = False) -> None:
    """Raises a ValueError unless an encoder's output is floating: features, or a tuple.

    Args:
        output: The output.
        pair: Whether a pair is wanted, or features; None for either.
        by_level: Whether features may be a dict, by level.
    """
    parts = output_parts(output) if by_level or not isinstance(output, dict) else (output,)
    floating = all(isinstance(part, Tensor) and part.is_floating_point() for part in parts)
    if floating and (pair is None or (isinstance(output, tuple) and len(output) == 2) == pair):
        return
    kinds = [str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    given = f"({', '.join(kinds)})" if isinstance(output, tuple) else kinds[0]
    before = {None: "", True: " as the pair (loc, scale) that it gave at first", False: " as features"}[pair]
    raise ValueError(
        f"Cannot use the encoder's output, {given},{before} because floating tensors are wanted; try an encoder that "
        "returns features of shape (N, H), as .float(), in every call."
    )


def output_parts(output: Any) -> tuple[Any, ...]:
    """The tensors of an encoder's output: one, those of a pair, or those of all levels."""
    return output if isinstance(output, tuple) else tuple(output.values()) if isinstance(output, dict) else (output,)


class Encoded(InferenceStrategy):
    """phi from a network, as in the variational autoencoder.

    Args:
        encoder: From inputs to features ``(N, H)``, or to a pair ``(loc, scale)`` of shapes ``(N, D)``; or, for
            sequences and plates inside the datapoint plate, to features of all entries, by level.
        head: From features to phi, or None if the encoder returns a pair, which is then read as the location and scale
            of the mean-field normal family: ``phi = (loc, log scale)``. Features by level want
            :class:`~pyro_amortized.inference.sharing.SharedHeads`.

    References:
        Auto-Encoding Variational Bayes, Diederik P. Kingma, Max Welling (2013), https://arxiv.org/abs/1312.6114
    """

    def __init__(self, encoder: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """phi of shape ``(N, P)``; ``index`` and ``objective`` are not needed."""
        features, head = self.encoder(*inputs), self.head
        check_output(features, pair=head is None, by_level=isinstance(head, SharedHeads))
        if head is not None:
            _check_width(features, getattr(head, "in_features", None))
            return head(features)
        loc, scale = features
        return torch.cat([loc, scale.log()], -1)


def _check_width(features: Tensor, width: int | None) -> None:
    if width is not None and features.shape[-1:] != (width,):
        raise ValueError(
            f"Cannot use the encoder's features of shape {tuple(features.shape)} because there were {width} for "
            f"each datapoint when the guide was set up; try an encoder that returns (N, {width}) in every call."
        )


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
        # an Embedding, since DistributedDataParallel expects sparse gradients of nothing else
        self.rows = nn.Embedding.from_pretrained(table, freeze=False, sparse=sparse)

    @property
    def table(self) -> Tensor:
        """The table itself, ``(N_full, P)``."""
        return self.rows.weight

    @property
    def is_sparse(self) -> bool:  # type: ignore[override]
        """As it was asked for."""
        return bool(self.rows.sparse)

    @property
    def num_known(self) -> int:  # type: ignore[override]
        """Number of rows of the table."""
        return len(self.table)

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """Rows ``index`` of the table, or all of it; ``inputs`` and ``objective`` are not needed."""
        if index is None:
            if not self.rows.sparse:
                return self.table
            index = torch.arange(len(self.table), device=self.table.device)
        return self.rows(index.to(self.table.device))  # Pyro draws subsamples on the CPU


class Prior(InferenceStrategy):
    """phi close to the prior of each datapoint's latents, as a start for refinement."""

    needs_inputs = False

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """phi of shape ``(N, P)``, from the objective alone."""
        if objective is None:
            raise ValueError("Cannot start at the prior because no objective was given; try a guide that refines.")
        return objective.prior()
