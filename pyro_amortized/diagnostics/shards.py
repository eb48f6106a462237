"""Data that several processes share: each goes through its own part, and all get the result of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pyro_amortized.diagnostics.batches import dealing_sampler
from pyro_amortized.diagnostics.processes import of_all_processes

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
        sampler = dealing_sampler(model_args)
        self.shared = sampler is not None
        self._loader: Any = model_args
        self._rank: int = 0 if sampler is None else sampler.rank
        self._size: int = 1 if sampler is None else sampler.num_replicas

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

    def positions(self, number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Where the collected rows lie in the data set, ascending, and the rows that lie there.

        Samplers repeat rows to come out even; each is taken once.

        Args:
            number: Number of rows collected.

        Raises:
            ValueError: If items of the data set are no rows, so that it cannot be told.
        """
        batches = self._loader.batch_sampler
        own = self._loader.sampler if batches is None else batches
        found = np.concatenate(list(self.collect(np.atleast_1d(batch) for batch in own)))
        if len(found) != number:
            raise ValueError(
                f"Cannot put together what several processes have found because {len(found)} items of the data set are "
                f"{number} datapoints; try a data set whose items are single datapoints, in a loader with batch_size, "
                "or one process without DistributedSampler."
            )
        return np.unique(found, return_index=True)

    def in_order(self, dataset: xarray.Dataset, plate: str | None) -> xarray.Dataset:
        """What was collected and joined, in the order of the data set, each row once."""
        if not self.shared or plate not in dataset.dims:
            return dataset
        positions, rows = self.positions(dataset.sizes[plate])
        numbered = np.array_equal(dataset[plate].values, np.arange(dataset.sizes[plate]))
        dataset = dataset.isel({plate: rows})
        return dataset.assign_coords({plate: positions}) if numbered else dataset
