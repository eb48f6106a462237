"""The datapoint plate in training: how many datapoints there are, and what several processes' losses weigh."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

from pyro.poutine.messenger import Messenger
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from pyro_amortized.structure.layout import datapoint_plate
from pyro_amortized.structure.plates import probe

__all__ = ["DataPlate", "RowsOfPlate", "find_plate"]


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
        dataset = getattr(loader, "dataset", None)
        if self.size is None or not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
            return
        rows = loader.sampler if isinstance(loader.sampler, SubsetRandomSampler) else dataset
        if isinstance(rows, Sized) and len(rows) != self.size:
            raise ValueError(
                f"Cannot train on a loader over {len(rows)} datapoints because plate {self.name!r} of the model has "
                f"{self.size}, by which every batch's loss is scaled; try pyro.plate({self.name!r}, {len(rows)}, "
                "subsample=...) in the model, or a loader over all of the model's datapoints."
            )


def find_plate(
    model: Callable[..., Any], requested: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DataPlate | None:
    """The plate of the datapoints, from one look at the model; None if the model has none, or several could be."""
    trace, frames = probe(model, args, kwargs)
    try:
        name = datapoint_plate(trace, frames, requested, grouped=True)
    except ValueError:
        return None
    if name is None:
        return None
    frame = frames[name]
    return DataPlate(name, frame.full_size if frame.subsampled else None)


class RowsOfPlate(Messenger):
    """Counts the rows of a plate in a run, and scales all that lies in it.

    Attributes:
        rows: Number of datapoints in the run.
    """

    def __init__(self, plate: str, scale: int = 1) -> None:
        super().__init__()
        self.plate, self.scale, self.rows = plate, scale, 0

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                self.rows = int(frame.size)
                msg["scale"] = msg["scale"] * self.scale
