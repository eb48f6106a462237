"""What all results share: a dataset that is saved, read, joined and drawn."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

    import xarray
    from matplotlib.axes import Axes

__all__ = [
    "Report",
    "style_colour",
    "fill",
    "in_style",
    "inference_data",
    "join",
    "new_axes",
    "put_title",
    "widening",
]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Report:
    """A result: an ``xarray.Dataset`` with units, settings and seeds in its attributes.

    Attributes:
        dataset: The numbers.
    """

    dataset: xarray.Dataset

    @property
    def verdict(self) -> str:
        """What the numbers say, in words."""
        return ""

    def __str__(self) -> str:
        return f"{type(self).__name__}\n{self.dataset}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The verdict, the table and, folded away, the dataset."""
        lines, words = str(self).splitlines(), self.verdict.split()
        spans = [(i, j) for j in range(len(lines), 0, -1) for i in range(j) if " ".join(lines[i:j]).split() == words]
        for i, j in spans[:1]:
            del lines[i:j]
        table = "\n".join(lines)
        verdict = f"<p>{escape(' '.join(words))}</p>" if words else ""
        box = '<pre style="overflow-x: auto">{}</pre>'
        numbers = f"<details><summary>dataset</summary>{box.format(escape(repr(self.dataset)))}</details>"
        return verdict + box.format(escape(table)) + numbers

    def to_netcdf(self, path: str | os.PathLike[str]) -> None:
        """Saves the dataset; :meth:`from_netcdf` reads it again.

        Raises:
            ValueError: If the file cannot be written.
        """
        _check_path(path)
        try:
            self.dataset.assign_attrs(report=type(self).__name__).to_netcdf(path)
        except OSError as error:
            raise ValueError(
                f"Cannot save this report at {os.fspath(path)!r} because it cannot be written "
                f"({error.strerror or error}); "
                'try a file in a directory of your own, to_netcdf("report.nc").'
            ) from error

    @classmethod
    def from_netcdf(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`to_netcdf` saved.

        Raises:
            ValueError: If the file cannot be read, or holds no report of this kind.
        """
        import xarray

        _check_path(path)
        try:
            with xarray.open_dataset(path) as opened:
                dataset = opened.load().drop_encoding()  # such as the length of words, which would cut longer ones
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Cannot read a report from {os.fspath(path)!r} because it is no file that xarray can read; try the "
                "path that to_netcdf was given."
            ) from error
        kind = dataset.attrs.pop("report", None)
        if kind != cls.__name__:
            raise ValueError(
                f"Cannot read a {cls.__name__} from {os.fspath(path)!r} because it holds "
                f"{'no report of this package' if kind is None else f'a {kind}'}; try the path that to_netcdf was given"
                + ("." if kind is None else f", or {kind}.from_netcdf.")
            )
        return cls(dataset)


def _check_path(path: Any) -> None:
    """Raises a ValueError unless this is the path of a file in a directory that exists."""
    cause = None
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        cause = "it is no path"
    elif os.path.isdir(path):
        cause = "it is a directory"
    elif not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        cause = "its directory does not exist"
    if cause is not None:
        raise ValueError(
            f'Cannot use path {path!r} because {cause}; try a file in a directory that exists, "report.nc".'
        )


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


def inference_data(groups: Mapping[str, xarray.Dataset]) -> Any:
    """Groups as an ``arviz.InferenceData`` (ArviZ below 1) or an ``xarray.DataTree`` (from 1 on)."""
    import arviz
    import xarray

    if int(arviz.__version__.split(".")[0]) >= 1:
        return xarray.DataTree.from_dict(dict(groups))
    return arviz.InferenceData(**dict[str, Any](groups))


def fill(text: str, width: int = 92, begin: str = "") -> list[str]:
    """The lines of a text, the first of them after a beginning, under which the others are indented."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, width, initial_indent=begin, subsequent_indent=" " * len(begin), **options)


def new_axes(ax: Axes | None, figsize: tuple[float, float] = (7, 4)) -> Axes:
    """The axes given, or new ones."""
    if ax is not None:
        if not hasattr(ax, "get_xlim"):
            raise ValueError(
                f"Cannot draw on a {type(ax).__name__} because matplotlib axes are wanted; try plt.subplots()[1], or "
                "None."
            )
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize)[1]


def style_colour(number: int) -> str:
    """A colour of the style at hand, for good: "C0" is looked up when a figure is shown, in the style of then."""
    import matplotlib as mpl

    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return str(colours[number % len(colours)])


def in_style(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws, in the style of the package, ``plt.style.use("pyro_amortized.style")``."""

    @functools.wraps(draw)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib.style

        with matplotlib.style.context("pyro_amortized.style"):
            return draw(*args, **kwargs)

    return drawing


def put_title(ax: Axes, title: str, verdict: str = "", most: int = 4) -> None:
    """Puts a title and the first lines of a verdict over axes."""
    lines = fill(verdict, 84)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    ax.set_title("\n".join([title, *lines]), fontsize="small" if lines else "medium")


def widening(degrees_of_freedom: Tensor) -> Tensor:
    """What a standard error with so few degrees of freedom lacks for two of them to cover as much as with many."""
    from scipy.special import ndtr, stdtrit

    return torch.from_numpy(stdtrit(degrees_of_freedom.double().numpy(), ndtr(2.0)) / 2)
