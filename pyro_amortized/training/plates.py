"""The datapoint plate in training: how many datapoints there are, and what several processes' losses weigh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sized
from dataclasses import dataclass
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler

from pyro_amortized.diagnostics.processes import num_processes
from pyro_amortized.structure.layout import datapoint_plate
from pyro_amortized.structure.plates import probe
from pyro_amortized.structure.sites import is_data, sample_sites

__all__ = ["DataPlate", "RowsOfPlate", "find_plate", "is_of_batch"]


@dataclass(frozen=True)
class DataPlate:
    """The plate of the datapoints.

    Attributes:
        name: Its name.
        size: Number of datapoints in all, which the model says; None if the plate is as large as the batch at hand.
    """

    name: str
    size: int | None

    def check_loader(self, loader: Any) -> None:
        """Raises a ValueError if a loader goes over another number of datapoints than the model has."""
        rows = _rows_of(loader) if isinstance(loader, DataLoader) else None
        if self.size is not None and rows is not None and rows != self.size:
            raise ValueError(
                f"Cannot train on a loader over {rows} datapoints because plate {self.name!r} of the model has "
                f"{self.size}, by which every batch's loss is scaled; try pyro.plate({self.name!r}, {rows}, "
                "subsample=...) in the model, or a loader over all of the model's datapoints."
            )


def is_of_batch(plate: DataPlate | None) -> bool:
    """Whether a loss stands for the datapoints of a batch alone, and not for all that the model says there are."""
    return plate is None or plate.size is None


def _rows_of(loader: DataLoader[Any]) -> int | None:
    """How many datapoints a loader goes over; None where it does not tell."""
    if isinstance(loader.dataset, IterableDataset) and num_processes() > 1:
        return None  # of which each process may have its own part
    batches = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    rows = getattr(batches, "sampler", None)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(
        rows, SubsetRandomSampler | SequentialSampler | range | list
    ):
        rows = loader.dataset  # other samplers may draw of it what they like
    if batches is None and not isinstance(loader.dataset, IterableDataset):
        return None  # of which each item may be a batch
    return len(rows) if isinstance(rows, Sized) else None


def find_plate(
    model: Callable[..., Any], requested: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DataPlate | None:
    """The plate of the datapoints, from one look at the model.

    That is the outermost subsampled one of those with data; where none is, the one that is as large as the batch.

    Args:
        model: The model.
        requested: The plate's name, if it is known.
        args: The positional arguments of a batch.
        kwargs: Its keyword arguments.

    Returns:
        The plate; None if the model has none, or if several could be and none has a size of its own.

    Raises:
        ValueError: If there is no such plate, or several are subsampled.
    """
    trace, frames = probe(model, args, kwargs)
    if requested is not None:
        name = datapoint_plate(trace, frames, requested, grouped=True)
        return DataPlate(str(name), frames[str(name)].full_size if frames[str(name)].subsampled else None)
    stacks = [[f.name for f in site["cond_indep_stack"]] for site in sample_sites(trace).values() if is_data(site)]
    subsampled = {names[0] for stack in stacks if (names := [n for n in stack if frames[n].subsampled])}
    if len(subsampled) > 1:
        raise ValueError(
            f"Cannot tell which datapoints the loader goes over because the plates {sorted(subsampled)} are subsampled "
            f"beside each other; try plate={min(subsampled)!r}, or another of them."
        )
    for name in subsampled:
        return DataPlate(name, frames[name].full_size)
    holders = {name for stack in stacks for name in stack}
    rows = {len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
    found = holders if len(holders) == 1 else {name for name in holders if frames[name].size in rows}
    return DataPlate(found.pop(), None) if len(found) == 1 else None


class RowsOfPlate(Messenger):
    """Counts the rows of a plate in a run, and scales all that lies in it, or in plates of its rows in long format.

    Args:
        plate: The datapoint plate.
        scale: What to scale by.
        groups: Names of plates in long format, whose entries belong to the datapoints.

    Attributes:
        rows: Number of datapoints in the run.

    Raises:
        ValueError: While a model runs, if it is to be scaled and observes data in another plate than these: whether
            they belong to the rows of this process cannot be seen.
    """

    def __init__(self, plate: str, scale: int = 1, groups: Collection[str] = ()) -> None:
        super().__init__()
        self.plate, self.scale, self.groups, self.rows = plate, scale, groups, 0

    def _pyro_sample(self, msg: Any) -> None:
        names = [frame.name for frame in msg["cond_indep_stack"]]
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                self.rows = int(frame.size)
        if self.plate in names or any(name in self.groups for name in names):
            msg["scale"] = msg["scale"] * self.scale
        elif self.scale != 1 and names and is_data(msg):
            raise ValueError(
                f"Cannot train in several processes because site {msg['name']!r} observes data in plate {names[0]!r}, "
                f"outside of plate {self.plate!r}, whose rows the processes share: whether they belong to these rows "
                f"cannot be seen; try a guide with groups={{{names[0]!r}: ...}}, or sizes of all data for the plates, "
                "pyro.plate(name, size, subsample=index)."
            )
