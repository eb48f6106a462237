"""From the entries of a group to the group: which entries lie in it, learned features, and plain statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Along", "ByIndex", "Grouping", "Pool", "statistics"]


class Grouping(ABC):
    """Which entries of a level lie in which of a coarser one."""

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """Sums of what the entries hold, ``(*, F)``, over each group."""

    @abstractmethod
    def spread(self, x: Tensor) -> Tensor:
        """What the groups hold for each of their entries, to be broadcast with these."""


@dataclass(frozen=True)
class Along(Grouping):
    """The entries along some dimensions, of which there may be none.

    Attributes:
        dims: The dimensions, the last excepted.
    """

    dims: tuple[int, ...]

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the dimensions."""
        return x.sum(self.dims) if self.dims else x

    def spread(self, x: Tensor) -> Tensor:
        """The same for all entries along the dimensions."""
        for dim in self.dims:
            x = x.unsqueeze(dim)
        return x


@dataclass(frozen=True)
class ByIndex(Grouping):
    """Any number of entries, each in the group that an index names.

    Attributes:
        index: The group of each entry, ``(R,)``.
        size: Number of groups.
    """

    index: Tensor
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the entries of each group."""
        return x.new_zeros(self.size, *x.shape[1:]).index_add(0, self.index, x)

    def spread(self, x: Tensor) -> Tensor:
        """The groups' own, entry by entry."""
        return x.index_select(0, self.index)


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

    def forward(self, h: Tensor, present: Tensor | None, groups: Grouping) -> Tensor:
        """Features ``(*, 2H)`` of groups of the entries ``(*, H)`` that are present, ``(*, 1)``."""
        w = F.softplus(self.weight(h))
        w = w if present is None else w * present
        total = groups.sum(w)
        return torch.cat([groups.sum(w * h) / (1 + total), total.log1p()], -1)


def statistics(x: Tensor, present: Tensor | None, groups: Grouping) -> Tensor:
    """Mean and deviation of those entries ``(*, F)`` of groups that are present, and the log of one more than these.

    Returns:
        Statistics ``(*, 2F + 1)``, zeros for a group without entries.
    """
    member = x.new_ones(*x.shape[:-1], 1) if present is None else present.to(x.dtype)
    count = groups.sum(member)
    number = count.clamp(min=1.0)
    mean = groups.sum(x * member) / number
    variance = groups.sum((x - groups.spread(mean)).square() * member) / number
    deviation = (variance + 1e-6).sqrt() - 1e-3  # whose derivative is finite where all entries are equal
    return torch.cat([mean, deviation, count.log1p()], -1)
