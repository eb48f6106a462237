"""What all results share: a dataset that is saved, read, joined and drawn."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Self

    import xarray
    from matplotlib.axes import Axes

__all__ = ["Report", "fill", "join", "new_axes"]


@dataclass
class Report:
    """A result: an ``xarray.Dataset`` with units, settings and seeds in its attributes.

    Attributes:
        dataset: The numbers.
    """

    dataset: xarray.Dataset

    def to_netcdf(self, path: str | os.PathLike[str]) -> None:
        """Saves the dataset; :meth:`from_netcdf` reads it again."""
        self.dataset.to_netcdf(path)

    @classmethod
    def from_netcdf(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`to_netcdf` saved."""
        import xarray

        with xarray.open_dataset(path) as dataset:
            return cls(dataset.load())


def join(datasets: Sequence[xarray.Dataset], plate: str) -> xarray.Dataset:
    """Joins the results of several batches along the plate.

    Batches whose coordinates overlap, as those of unsubsampled plates do, are numbered anew in their order.
    """
    import xarray

    if len(datasets) == 1:
        return datasets[0]
    joined = xarray.concat(list(datasets), dim=plate, combine_attrs="drop_conflicts", data_vars="minimal")
    if len(np.unique(joined[plate].values)) < joined.sizes[plate]:
        joined = joined.assign_coords({plate: np.arange(joined.sizes[plate])})
    return joined


def fill(text: str, width: int = 92) -> list[str]:
    """The lines of a text."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def new_axes(ax: Axes | None, figsize: tuple[float, float] = (7, 4)) -> Axes:
    """The axes given, or new ones."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize)[1]
