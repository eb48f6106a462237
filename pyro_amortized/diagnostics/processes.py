"""What several processes tell each other; a single one has nobody to ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["mean_of_all", "num_processes", "of_all_processes", "share_of_rows", "weighted_sum"]


def num_processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_processes(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values = [value]
    if num_processes() > 1:
        values = [None] * num_processes()
        dist.all_gather_object(values, value)
    return values


def weighted_sum(values: Sequence[tuple[float, float]], device: torch.device) -> tuple[float, float]:
    """Sum of values times weights, and sum of weights, over all processes."""
    sums = sum(x * w for x, w in values), sum(w for _, w in values)
    if num_processes() == 1:
        return sums
    total = torch.tensor(sums, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total[0].item(), total[1].item()


def share_of_rows(rows: int, device: torch.device) -> float:
    """This process's number of rows over the mean of all processes: the weight of its loss."""
    total = torch.tensor(float(rows), device=device)
    dist.all_reduce(total)
    return rows * num_processes() / total.item()


def mean_of_all(value: torch.Tensor) -> float:
    """The mean over all processes of one number each."""
    if num_processes() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value.item() / num_processes()
