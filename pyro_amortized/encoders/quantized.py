"""Features and the codes nearest to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Quantized", "perplexity"]


def perplexity(counts: Tensor) -> Tensor:
    r"""The effective number of codes in use, :math:`\exp(-\sum_k p_k \log p_k)`.

    Args:
        counts: How often each of K codes is used, ``(*, K)``, of any positive total.

    Returns:
        Between 1 and K, of shape ``(*)``; NaN where nothing was counted.
    """
    share = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


@dataclass
class Quantized:
    """Features and the codes nearest to them.

    Attributes:
        features: The features in rows ``(M, D)``.
        codes: Their codes ``(*)``, M of them in the same order, in memory of their own: the model may overwrite them.
        nearest: A copy of the codes, ``(M,)``.
        vectors: The vectors of these codes when they were found, ``(M, D)``, without gradient.
        looked_up: Which of the codes the model has looked up since, so that their features will have its gradient,
            ``(M,)``.
    """

    features: Tensor
    codes: Tensor
    nearest: Tensor
    vectors: Tensor
    looked_up: Tensor

    @property
    def squared_distance(self) -> Tensor:
        """Squared distance of each feature vector to its code's, ``(*)``, differentiable in the features."""
        return (self.features - self.vectors).square().sum(-1).reshape(self.codes.shape)

    def rows(self, codes: Tensor) -> Tensor | None:
        """For codes that lie in the memory of these, as all views of them do, their rows; None for others."""
        own = self.codes
        if codes.device != own.device or codes.dtype != own.dtype:
            return None
        if codes.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        rows = torch.arange(own.numel(), device=own.device)
        return rows.as_strided(codes.shape, codes.stride(), codes.storage_offset())
