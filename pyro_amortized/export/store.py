"""Exports larger than memory: every batch is written to a Zarr or netCDF store when it has been inferred.

A store is written beside its path and moved there when it is complete, so that what lies at the path is a whole export.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_amortized.export.formats import FORMATS
from pyro_amortized.export.joining import Constants, Parts

if TYPE_CHECKING:
    import xarray

__all__ = ["Store", "StorePath", "open_groups"]

StorePath = str | os.PathLike[str]


class Store:
    """An export that is being written, a context manager: leaving it completes the store, or removes what there is.

    Args:
        path: Where it will lie; its suffix says in which format.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(self, path: StorePath) -> None:
        self.path = _checked(path)
        _check_place(self.path)
        self.partial = _partial(self.path)
        self._file = FORMATS[self.path.suffix](self.partial / f"unfinished{self.path.suffix}")
        self._groups: dict[str, Parts] = {}
        self._positions: dict[str, _Positions] = {}
        self._constants: Constants | None = None
        self._plate: str | None = None

    def __enter__(self) -> Store:
        shutil.rmtree(self.partial, ignore_errors=True)  # of an export that was killed
        self.partial.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, groups: Mapping[str, xarray.Dataset], plate: str | None) -> None:
        """Writes the groups of a batch."""
        self._plate = plate
        for name, part in groups.items():
            if name == "constant_data":
                self._spool(part)
            else:
                self._add(name, part, self._groups.get(name) or Parts(name, part, plate))

    def _add(self, name: str, part: xarray.Dataset, rules: Parts) -> None:
        slices = rules.check(part)
        if name not in self._groups:
            self._groups[name] = rules
            part = rules.once(part).merge(slices)
            if part.data_vars:
                self._file.create(name, part, self._plate)
        elif rules.along_names:
            self._file.append(name, slices, str(self._plate))
        if rules.along_names:
            self._positions.setdefault(name, _Positions()).add(slices[self._plate].values)

    def _spool(self, part: xarray.Dataset) -> None:
        """Keeps a batch of constants on disk: what their axes are is known when all have been seen."""
        if self._constants is None:
            self._constants = Constants(part)
        else:
            self._constants.look(part)
        with (self.partial / "constant_data").open("ab") as file:
            pickle.dump(part, file)

    def _spooled(self) -> Iterator[xarray.Dataset]:
        with (self.partial / "constant_data").open("rb") as file:
            while file.peek(1):
                yield pickle.load(file)

    def _finish(self) -> None:
        """Completes the store and moves it to its path."""
        if self._constants is not None:
            rules = self._constants.parts(self._plate)
            for part in self._spooled():
                self._add("constant_data", part, rules)
        for name, positions in self._positions.items():
            if positions.are_renumbered:
                self._file.renumber(name, str(self._plate))
        self._file.complete()
        if self.path.is_dir():  # no directory can take the place of another
            self.path.rename(self.partial / "replaced")
        os.replace(self._file.path, self.path)


class _Positions:
    """The datapoints' positions in the full data set: batches that repeat some are numbered anew in their order.

    As long as they count, their number says which have been seen; then there is a flag for each.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._number = 0
        self._seen: np.ndarray[Any, Any] | None = None
        self._repeated = False

    @property
    def are_renumbered(self) -> bool:
        """Whether some position has come twice, among several batches."""
        return self._repeated and self.batches > 1

    def add(self, index: np.ndarray[Any, Any]) -> None:
        """Adds the positions of a batch."""
        self.batches += 1
        if self._repeated or not len(index):
            return
        if self._seen is None and np.array_equal(index, np.arange(self._number, self._number + len(index))):
            self._number += len(index)
            return
        self._repeated = index.min() < 0 or len(np.unique(index)) < len(index) or self._are_seen(index)
        if self._repeated:
            self._seen = None

    def _are_seen(self, index: np.ndarray[Any, Any]) -> bool:
        """Whether any of these has come before; all have then."""
        seen = np.ones(self._number, bool) if self._seen is None else self._seen
        missing = int(index.max()) + 1 - len(seen)
        if missing > 0:  # at least twice as long, so that a batch does not pay for those before it
            seen = np.pad(seen, (0, max(missing, len(seen))))
        known = bool(seen[index].any())
        seen[index], self._seen = True, seen
        return known


def _checked(path: StorePath) -> Path:
    """A path in a format that can be written here."""
    known = "posterior.nc (netCDF) or posterior.zarr (Zarr)"
    if not isinstance(path, str | os.PathLike) or Path(path).suffix not in FORMATS:
        raise ValueError(f"Cannot use store={path!r} because its suffix tells no format; try a path such as {known}.")
    if Path(path).suffix == ".zarr" and find_spec("zarr") is None:
        raise ValueError(
            f"Cannot use store={os.fspath(path)!r} because zarr is not installed; try pip install "
            "'pyro-amortized[zarr]' on Python 3.11 or later, or a netCDF file, which needs nothing more, "
            '"posterior.nc".'
        )
    return Path(path)


def _check_place(path: Path) -> None:
    """Raises a ValueError where no store can lie, or something else would be lost."""
    cause, remedy = "", '"posterior.nc" in a directory that exists'
    if not path.absolute().parent.is_dir():
        cause = "its directory does not exist"
    elif path.is_dir() and not (path.suffix == ".zarr" and (path / "zarr.json").exists()):
        cause, remedy = "there is a directory which is no Zarr store", "another name"
    if cause:
        raise ValueError(f"Cannot write store={os.fspath(path)!r} because {cause}; try {remedy}.")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def open_groups(path: StorePath) -> dict[str, xarray.Dataset]:
    """The groups of a whole store, whose values are read when they are used.

    Raises:
        ValueError: If there is none, or only part of one.
    """
    path = _checked(path)
    again = "to_arviz(..., store=...) again"
    if not path.exists():
        cause = "it does not exist"
        if _partial(path).exists():
            cause = f"the export to it was not finished, and {_partial(path).name!r} holds only some of its batches"
        raise ValueError(f"Cannot open store {os.fspath(path)!r} because {cause}; try {again}.")
    file = FORMATS[path.suffix](path)
    try:
        return {name: file.open(name) for name in file.groups()}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Cannot open store {os.fspath(path)!r} because it is no whole export ({error}); try {again}."
        ) from error
