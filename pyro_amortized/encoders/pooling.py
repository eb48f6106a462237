"""From the entries of a group to the group: learned features, and plain statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Pool", "statistics"]


class Pool(nn.Module):
    r"""Features of a group from those of its entries, weighted by what each of them is worth.

    .. math:: w_{m} = \operatorname{softplus}(A h_m + b), \qquad
        \Big(\frac{\sum_m w_m h_m}{1 + \sum_m w_m},\; \log\big(1 + \sum_m w_m\big)\Big)

    as precisions are added up in a linear-Gaussian model, where the 1 is that of the prior. A group without entries has
    features of zeros.

    Args:
        width: Number of features H of an entry; a group has 2H.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, width)

    def forward(self, h: Tensor, present: Tensor | None, dims: list[int]) -> Tensor:
        """Features ``(*, 2H)`` of the entries ``(*, H)`` along ``dims`` that are present, ``(*, 1)``."""
        w = F.softplus(self.weight(h))
        w = w if present is None else w * present
        total, weighted = w, w * h
        if dims:
            total, weighted = total.sum(dims), weighted.sum(dims)
        return torch.cat([weighted / (1 + total), total.log1p()], -1)


def statistics(x: Tensor, present: Tensor | None, dims: list[int]) -> Tensor:
    """Mean and deviation of the entries ``(*, F)`` along ``dims`` that are present, and the log of their number.

    Returns:
        Statistics ``(*, 2F + 1)``, zeros for a group without entries.
    """
    member = x.new_ones(*x.shape[:-1], 1) if present is None else present.to(x.dtype)
    if not dims:
        return torch.cat([x * member, torch.zeros_like(x), member.log1p()], -1)
    count = member.sum(dims, keepdim=True)
    mean = (x * member).sum(dims, keepdim=True) / count.clamp(min=1.0)
    variance = ((x - mean).square() * member).sum(dims) / count.sum(dims).clamp(min=1.0)
    deviation = (variance + 1e-6).sqrt() - 1e-3  # whose derivative is finite where all entries are equal
    return torch.cat([mean.sum(dims), deviation, count.sum(dims).log1p()], -1)
