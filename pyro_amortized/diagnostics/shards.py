"""Data that several processes share: each goes through its own part, and all get the result of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pyro_amortized.diagnostics.processes import num_processes, of_all_processes

if TYPE_CHECKING:
    import xarray

__all__ = ["Shards"]

Part = TypeVar("Part")


class Shards:
    """The parts of a data set: one for each process if a ``DistributedSampler`` deals them out, else a single one.

    Batches are numbered by turns, first the first ones of all processes, so that each has its own seed, and the result
    is that of one process that goes through the same batches.

    Args:
        model_args: What a diagnostic goes through.
    """

    def __init__(self, model_args: Any) -> None:
        sampler: Any = model_args.sampler if isinstance(model_args, DataLoader) else None
        self.shared = isinstance(sampler, DistributedSampler) and num_processes() > 1
        self._loader: Any = model_args
        self._rank: int = sampler.rank if self.shared else 0
        self._size: int = sampler.num_replicas if self.shared else 1

    def number(self, batch: int) -> int:
        """The number among the batches of all processes of a batch of this one."""
        return batch * self._size + self._rank

    def collect(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts of all processes, in the order of their numbers; those of a single one as they come."""
        if not self.shared:
            yield from parts
            return
        by_turns = zip_longest(*of_all_processes(list(parts)))
        yield from (part for part in chain.from_iterable(by_turns) if part is not None)

    def in_order(self, dataset: xarray.Dataset, plate: str | None) -> xarray.Dataset:
        """What was collected and joined, in the order of the data set; what samplers repeat to come out even, once."""
        if not self.shared or plate not in dataset.dims:
            return dataset
        positions = np.concatenate(list(self.collect(np.asarray(batch) for batch in self._loader.batch_sampler)))
        rows = np.unique(positions, return_index=True)[1]
        numbered = np.array_equal(dataset[plate].values, np.arange(dataset.sizes[plate]))
        dataset = dataset.isel({plate: rows})
        return dataset.assign_coords({plate: np.arange(len(rows))}) if numbered else dataset
