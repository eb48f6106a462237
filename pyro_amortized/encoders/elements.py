"""What encoders of sets and of sequences share: elements, standardised, and a mask that says which there are."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pyro_amortized.checks import is_traced
from pyro_amortized.encoders.checks import check_inputs, check_width
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = ["ElementsEncoder"]


class ElementsEncoder(StandardizedEncoder):
    """Base class of encoders of elements ``(N, M, F)``, or scalar ones ``(N, M)``, with a mask ``(N, M)``.

    Attributes:
        input_dim: Number of values per element F.
        standardize: What shifts and scales them, or None.
        kind: What elements make, in words.
    """

    kind: ClassVar[str] = "a set"
    input_dim: int
    standardize: Standardize | None

    def _elements(self, x: Tensor) -> Tensor:
        x = (x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)).to(next(self.parameters()).dtype)
        check_width(self, x, self.input_dim)
        return x

    def _mask(self, x: Tensor, *inputs: Tensor | None) -> Tensor | None:
        """The mask among the further inputs, if there is one."""
        check_inputs(self, (x,), 2)
        if len(inputs) > 1 or not isinstance(mask := (*inputs, None)[0], Tensor | None):
            raise ValueError(
                f"Cannot encode {1 + len(inputs)} inputs by {type(self).__name__} because it takes {self.kind} and, if "
                "need be, a mask; try encoder_input=... with the name of one argument, or an encoder of your own."
            )
        if mask is None:
            return None
        looked_at = mask.dtype != torch.bool and not is_traced()
        if mask.shape != x.shape[:2] or (looked_at and not ((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"Cannot read the second input of {type(self).__name__}, of shape {tuple(mask.shape)}, as a mask "
                f"because it says by True and False, or 1 and 0, which of the elements {tuple(x.shape[:2])} belong to "
                f"{self.kind}; try encoder_input=... with the name of one argument, or of one and its mask."
            )
        return mask

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from elements ``(N, M, F)``, those under a mask ``(N, M)`` if it is given."""
        mask = self._mask(*inputs)
        x = self._elements(inputs[0])
        if self.standardize is not None:
            self.standardize.fit(x if mask is None else x[mask.bool()])

    def forward(self, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """Features of sets, or sequences, of elements.

        Args:
            x: Elements of shape ``(N, M, F)``, or ``(N, M)`` for scalar ones.
            *inputs: A mask: which elements belong to the set, shape ``(N, M)``, boolean or 1 and 0; by default all.

        Returns:
            Features of shape ``(N, H)``; they do not depend on the order of the elements nor on those masked out.
        """
        mask = self._mask(x, *inputs)
        x = self._elements(x)
        member = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        x = x if mask is None else x.masked_fill(member.unsqueeze(-1) == 0, 0.0)
        return self.features(x if self.standardize is None else self.standardize(x), member)

    @abstractmethod
    def features(self, x: Tensor, member: Tensor) -> Tensor:
        """Features of standardised elements ``(N, M, F)``; ``member`` ``(N, M)`` says which count."""
