"""Batches of a group become one group: which variables run along the datapoint plate, and which are kept once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

__all__ = ["Constants", "Joined", "Parts"]


class Joined:
    """A group that is put together in memory.

    Args:
        name: The group.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._plate: str | None = None
        self._rules: Parts | None = None
        self._constants: list[xarray.Dataset] = []
        self._once: xarray.Dataset | None = None
        self._pieces: dict[Hashable, list[np.ndarray[Any, Any]]] = {}

    def add(self, part: xarray.Dataset, plate: str | None) -> None:
        """Adds a batch.

        Raises:
            ValueError: If other sizes or coordinates, or observed values outside the plate, differ between batches.
        """
        self._plate = plate
        if self.name == "constant_data":
            self._constants.append(part)
        else:
            self._add(part, self._rules or Parts(self.name, part, plate))

    def _add(self, part: xarray.Dataset, rules: Parts) -> None:
        self._rules, slices = rules, rules.check(part)
        if self._once is None:
            self._once = rules.once(part).merge(slices)
        for name in [self._plate, *rules.along_names] if rules.along_names else []:
            self._pieces.setdefault(name, []).append(slices[name].values)  # the arrays alone: a dataset takes far more

    def dataset(self) -> xarray.Dataset:
        """The whole group; the batches are given up."""
        if self._constants:
            rules = Constants.of(self._constants).parts(self._plate)
            for part in self._constants:
                self._add(part, rules)
            self._constants.clear()
        whole: Any = self._once
        if len(self._pieces.get(self._plate, ())) < 2:
            return whole
        along = {v: (whole[v].dims, whole[v].attrs) for v in self._pieces if v != self._plate}
        index = np.concatenate(self._pieces.pop(self._plate))
        whole = whole.drop_dims(self._plate)
        for name, (dims, attributes) in along.items():
            whole[name] = dims, np.concatenate(self._pieces.pop(name), dims.index(self._plate)), attributes
        repeated = len(np.unique(index)) < len(index)
        return whole.assign_coords({self._plate: np.arange(len(index)) if repeated else index})


class Parts:
    """How the batches of a group are joined.

    Args:
        name: The group.
        first: Its first batch.
        plate: The datapoint plate.

    Attributes:
        along_names: Variables that are joined along the plate.
        once_names: Variables of which the first batch is kept.
        dims: Names of the axes by variable.
    """

    def __init__(self, name: str, first: xarray.Dataset, plate: str | None) -> None:
        self.name = name
        self.plate = plate
        self.dims = {v: first[v].dims for v in first.data_vars}
        self.along_names = [v for v in self.dims if plate in self.dims[v]]
        self.once_names = [v for v in self.dims if v not in self.along_names]
        self._coords = dict(first[self.along_names].drop_vars(str(plate), errors="ignore").coords)
        self._once = first[self.once_names]

    def once(self, first: xarray.Dataset) -> xarray.Dataset:
        """What is kept of the first batch alone."""
        return _named(first, self.dims)[self.once_names]

    def check(self, part: xarray.Dataset) -> xarray.Dataset:
        """The variables of a batch that are joined along the plate.

        Raises:
            ValueError: If its other sizes or coordinates, or observed values outside the plate, are not the first's.
        """
        if self.name == "observed_data":
            _check_outside(self._once, part, self.plate)
        part = _named(part, self.dims)[self.along_names]
        for dim, coordinate in self._coords.items():
            if part.sizes[dim] != coordinate.size:
                raise ValueError(
                    f"Cannot join the batches of group {self.name!r} because dimension {dim!r} has size "
                    f"{coordinate.size} in the first and {part.sizes[dim]} in a later one; try padding to a common "
                    "size and masking, `dist.Normal(...).mask(present)`, or one call per batch."
                )
            if not np.array_equal(part[dim].values, coordinate.values):
                raise ValueError(
                    f"Cannot join the batches of group {self.name!r} because they hold other entries of plate {dim!r}; "
                    "try a subsample that is the same in all batches, all entries, or one call per batch."
                )
        return part


class Constants:
    """What the batches of ``constant_data`` tell of its axes, which is known when all have been seen.

    Args:
        first: The first batch.
    """

    def __init__(self, first: xarray.Dataset) -> None:
        self.first = first
        self._equal = set(first.data_vars)
        self._schemas: dict[Hashable, xarray.Dataset] = {}
        self.look(first)

    @classmethod
    def of(cls, parts: Sequence[xarray.Dataset]) -> Constants:
        """What all batches tell."""
        constants = cls(parts[0])
        for part in parts[1:]:
            constants.look(part)
        return constants

    def look(self, part: xarray.Dataset) -> None:
        """Looks at a batch, of which no values are kept."""
        self._equal = {v for v in self._equal if v in part and part[v].equals(self.first[v])}
        key = tuple((v, part[v].dims, part[v].shape) for v in part.data_vars), tuple(part.sizes.items())
        if key not in self._schemas:
            self._schemas[key] = _without_values(part)

    def parts(self, plate: str | None) -> Parts:
        """How the batches are joined: with axes named as in the one whose data tell most, wherever sizes allow it."""
        schemas = _named_alike(list(self._schemas.values()))
        rules = Parts("constant_data", schemas[0], plate)
        dims = rules.dims
        rules.along_names = [v for v in rules.along_names if all(v in s and s[v].dims == dims[v] for s in schemas)]
        rules.once_names = [v for v in rules.once_names if v in self._equal]
        rules._coords = dict(schemas[0][rules.along_names].drop_vars(str(plate), errors="ignore").coords)
        return rules


def _without_values(part: xarray.Dataset) -> xarray.Dataset:
    """The names and sizes of a batch, in no memory."""
    zeros = {v: np.broadcast_to(np.zeros((), part[v].dtype), part[v].shape) for v in part.data_vars}
    return part.assign({v: (part[v].dims, value) for v, value in zeros.items()})


def _named(part: xarray.Dataset, dims: dict[Hashable, tuple[Hashable, ...]]) -> xarray.Dataset:
    """A batch whose variables have axes of these names."""
    for name, names in dims.items():
        if name in part and part[name].dims != names:
            part = part.drop_vars(str(name)).assign({name: (names, part[name].values)})
    return part


def _named_alike(parts: list[xarray.Dataset]) -> list[xarray.Dataset]:
    """Names axes in all batches as in the one whose data tell most of them, wherever sizes allow it."""
    for name in map(str, parts[0].data_vars):
        found = [part[name].variable for part in parts if name in part]
        dims = min((x.dims for x in found), key=lambda dims: sum(str(dim).startswith(f"{name}_dim_") for dim in dims))
        if len(found) == len(parts) and all(map(partial(_has_sizes, dims), found, parts)):
            parts = [_named(part, {name: dims}) for part in parts]
    return parts


def _has_sizes(dims: Sequence[Any], value: xarray.Variable, part: xarray.Dataset) -> bool:
    pairs = zip(dims, value.shape, strict=False)
    return len(dims) == value.ndim and all(part.sizes.get(dim, size) == size for dim, size in pairs)


def _check_outside(first: xarray.Dataset, part: xarray.Dataset, plate: str | None) -> None:
    changed = [str(v) for v in first.data_vars if v not in part or not part[v].equals(first[v])]
    if changed:
        raise ValueError(
            f"Cannot join the batches because observed sites {changed} lie outside of plate {plate!r} and differ "
            "between them; try a single call with all data."
        )
