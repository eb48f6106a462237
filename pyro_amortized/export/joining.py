"""Batches of a group become one group: which variables run along the datapoint plate, and which are kept once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_amortized.diagnostics.report import join

if TYPE_CHECKING:
    import xarray

__all__ = ["Constants", "Parts", "join_group"]


def join_group(name: str, parts: list[xarray.Dataset], plate: str | None) -> xarray.Dataset:
    """Joins a group's batches along the plate, taking the parts out of the list; what has no such axis is kept once.

    Raises:
        ValueError: If other sizes or observed values outside the plate differ between batches.
    """
    if len(parts) == 1:
        part = parts.pop()
        return part[list(part.data_vars)]
    rules: Parts = Parts(name, parts[0], plate)
    if name == "constant_data":
        found = Constants(parts[0])
        for part in parts[1:]:
            found.look(part)
        rules = found.parts(plate)
    slices = [rules.check(part) for part in parts]
    kept = rules.once(parts[0])
    parts.clear()
    return kept.merge(join(slices, str(plate))) if rules.along_names else kept


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
        self._sizes = dict(first[self.along_names].sizes)
        self._once = first[self.once_names]

    def once(self, first: xarray.Dataset) -> xarray.Dataset:
        """What is kept of the first batch alone."""
        return _named(first, self.dims)[self.once_names]

    def check(self, part: xarray.Dataset) -> xarray.Dataset:
        """The variables of a batch that are joined along the plate.

        Raises:
            ValueError: If its other sizes, or observed values outside the plate, are not those of the first batch.
        """
        if self.name == "observed_data":
            _check_outside(self._once, part, self.plate)
        part = _named(part, self.dims)[self.along_names]
        for dim, size in self._sizes.items():
            if dim != self.plate and part.sizes[dim] != size:
                raise ValueError(
                    f"Cannot join the batches of group {self.name!r} because dimension {dim!r} has size {size} in the "
                    f"first and {part.sizes[dim]} in a later one; try padding to a common size and masking, "
                    "`dist.Normal(...).mask(present)`, or one call per batch."
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
        rules._sizes = dict(schemas[0][rules.along_names].sizes)
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
