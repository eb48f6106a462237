"""The datapoint plate in training: how many datapoints there are, and what several processes' losses weigh."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler

from pyro_amortized.diagnostics.processes import of_all_processes
from pyro_amortized.structure.layout import datapoint_plate
from pyro_amortized.structure.plates import PlateFrame, probe
from pyro_amortized.structure.sites import is_data, sample_sites

__all__ = ["DataPlate", "RowsOfPlate", "find_plate", "is_of_batch", "scale_of_caller"]


@dataclass(frozen=True)
class DataPlate:
    """The plate of the datapoints.

    Attributes:
        name: Its name.
        size: Number of datapoints in all, which the model says; None if the plate is as large as the batch at hand.
    """

    name: str
    size: int | None

    def check_loader(self, loader: Any, *, dealt: bool = True) -> None:
        """Raises a ValueError if a loader goes over another number of datapoints than the model has.

        Args:
            loader: The loader.
            dealt: Whether the trainer deals its datapoints out to processes; else each may have a part of its own.
        """
        rows = _rows_of(loader) if isinstance(loader, DataLoader) else None
        of_all = of_all_processes(rows)
        own = isinstance(getattr(loader, "dataset", None), IterableDataset) or not dealt
        if self.size is None or None in of_all or rows == self.size or (own and sum(of_all) == self.size):
            return
        raise ValueError(
            f"Cannot train on a loader over {rows} datapoints because plate {self.name!r} of the model has "
            f"{self.size}, by which every batch's loss is scaled; try pyro.plate({self.name!r}, {rows}, subsample=...) "
            "in the model, a loader over all of the model's datapoints, or SVIModule(..., plate=...) if it goes over "
            "another plate."
        )


def is_of_batch(plate: DataPlate | None) -> bool:
    """Whether a loss stands for the datapoints of a batch alone, and not for all that the model says there are."""
    return plate is None or plate.size is None


def _rows_of(loader: DataLoader[Any]) -> int | None:
    """How many datapoints a loader goes over; None where it does not tell."""
    batches = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    rows = getattr(batches, "sampler", None)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(
        rows, SubsetRandomSampler | SequentialSampler | range | list
    ):
        rows = loader.dataset  # other samplers may draw of it what they like
    if batches is None and not isinstance(loader.dataset, IterableDataset):
        return None  # of which each item may be a batch
    return len(rows) if isinstance(rows, Sized) else None


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


def find_plate(
    model: Callable[..., Any], batch: Any, to_arguments: Callable[[Any], Arguments], named: str | None, own: Any = None
) -> DataPlate | None:
    """The plate of the datapoints, from looks at the model.

    That is the one that holds one datapoint less where a batch does; where none is, as with batches of one size, the
    outermost plate with data.

    Args:
        model: The model.
        batch: A batch, as loaders yield it.
        to_arguments: From a batch to the model's arguments.
        named: The plate's name, if the user says it.
        own: The guide's plate, if it is one of this package.

    Returns:
        The plate; None if the model has none, or several could be.

    Raises:
        ValueError: If there is no plate of the name that the user says.
    """
    args, kwargs = to_arguments(batch)
    if named is not None:
        trace, frames = probe(model, args, kwargs)
        return _data_plate(frames, str(datapoint_plate(trace, frames, named, grouped=True)))
    try:
        trace, frames = probe(model, args, kwargs)
        if isinstance(own, str) and own in frames:
            return _data_plate(frames, own)
        outermost = datapoint_plate(trace, frames, None, grouped=True)
    except ValueError:  # of sequential plates, or several without one around them
        outermost = None
    found = _that_change(model, batch, to_arguments)
    name = outermost if outermost in found or not found else found.pop() if len(found) == 1 else None
    return None if name is None else _data_plate(frames, name)


def _data_plate(frames: Mapping[str, PlateFrame], name: str) -> DataPlate:
    return DataPlate(name, frames[name].full_size if frames[name].subsampled else None)


def _that_change(model: Callable[..., Any], batch: Any, to_arguments: Callable[[Any], Arguments]) -> set[str]:
    """The plates with data that have another size where a batch has one datapoint less, or of one datapoint more."""
    rows = {len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()}
    if len(rows) != 1:
        return set()
    size = rows.pop()
    other = list(range(size - 1)) if size > 1 else [0] * (size + 1)
    try:
        args, kwargs = to_arguments(tree_map(lambda x: x[other] if isinstance(x, Tensor) and x.dim() else x, batch))
        before = probe(model, *to_arguments(batch))
        after = probe(model, args, kwargs)[1]
    except Exception:  # whatever a model says that takes batches of one size alone
        return set()
    trace, frames = before
    holders = {f.name for site in sample_sites(trace).values() if is_data(site) for f in site["cond_indep_stack"]}
    return {name for name in holders if name in after and frames[name].size != after[name].size}


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


def scale_of_caller() -> float:
    """By what the handlers around a call scale every datapoint alike, in several processes or by ``poutine.scale``."""
    handlers = [handler for handler in runtime._PYRO_STACK if isinstance(handler, RowsOfPlate | ScaleMessenger)]
    return math.prod(float(handler.scale) for handler in handlers if torch.as_tensor(handler.scale).numel() == 1)
