"""Files that grow along the datapoint plate, one batch after the other: netCDF and Zarr."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

__all__ = ["FORMATS", "Format"]

MAX_CHUNK = 2**20
"""Elements of a variable that are stored, and read, together."""
MAX_PIECE = 2**16
"""Entries of an index that are looked at together."""


class Format(ABC):
    """A file, or a directory, of groups.

    Args:
        path: Where it lies.
    """

    engine: str
    """What xarray reads it with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def create(self, name: str, part: xarray.Dataset, plate: str | None) -> None:
        """Writes a new group that can grow along the plate."""

    @abstractmethod
    def append(self, name: str, part: xarray.Dataset, plate: str) -> None:
        """Lets a group grow by the variables of a batch."""

    @abstractmethod
    def renumber(self, name: str, plate: str) -> None:
        """Numbers the datapoints of a group from 0 on."""

    @abstractmethod
    def complete(self) -> None:
        """Marks the file as whole."""

    @abstractmethod
    def groups(self) -> list[str]:
        """Names of the groups of a whole file; an OSError if it is not marked as whole."""

    def open(self, name: str) -> xarray.Dataset:
        """A group, whose values are read when they are used; of indices that count, only their sizes are held."""
        import pandas
        import xarray

        with self._indices(name) as indices:
            sizes = {dim: index.shape[0] for dim, index in indices.items() if _counts(index)}
        options: Any = {"consolidated": False} if self.engine == "zarr" else {}
        dataset = xarray.open_dataset(self.path, group=name, engine=self.engine, drop_variables=list(sizes), **options)
        return dataset.assign_coords({dim: pandas.RangeIndex(size) for dim, size in sizes.items()})

    @abstractmethod
    def _indices(self, name: str) -> AbstractContextManager[dict[str, Any]]:
        """The indices of a group's dimensions, as arrays on disk."""


def _chunks(part: xarray.Dataset, plate: str | None, key: str) -> dict[str, Any]:
    """Sizes of what is stored together, by variable: whole batches, or even parts of them."""
    result: dict[str, Any] = {}
    for name, value in part.variables.items():
        if plate in value.dims and value.size:
            rows = value.sizes[plate]
            size = -(-rows // min(rows, -(-value.size // MAX_CHUNK)))
            result[str(name)] = {key: tuple(size if dim == plate else n for dim, n in value.sizes.items())}
    return result


def _pieces(size: int) -> Iterator[slice]:
    """What is read, or written, of an index at once."""
    return (slice(start, min(start + MAX_PIECE, size)) for start in range(0, size, MAX_PIECE))


def _counts(index: Any) -> bool:
    """Whether an index on disk counts from 0 on."""
    plain = np.issubdtype(index.dtype, np.int64) and not dict(index.attrs)
    return plain and all(np.array_equal(index[p], np.arange(p.start, p.stop)) for p in _pieces(index.shape[0]))


def _count(index: Any) -> None:
    """Lets an index on disk count from 0 on."""
    for piece in _pieces(index.shape[0]):
        index[piece] = np.arange(piece.start, piece.stop)


def _names_whole(attributes: Any, names: Any, engine: str) -> list[str]:
    if "complete" not in attributes:
        raise OSError(f"this {engine} file is not marked as complete")
    return list(names)


class NetCDF(Format):
    """A netCDF file with an unlimited dimension."""

    engine = "h5netcdf"

    def create(self, name: str, part: xarray.Dataset, plate: str | None) -> None:
        """Writes a new group."""
        grows = [plate] if plate in part.sizes else []
        encoding = _chunks(part, plate, "chunksizes")
        part.to_netcdf(self.path, "a", group=name, engine="h5netcdf", unlimited_dims=grows, encoding=encoding)

    def append(self, name: str, part: xarray.Dataset, plate: str) -> None:
        """Lets a group grow, which xarray cannot."""
        import xarray

        with self._opened("a") as opened:
            group = opened[name]
            start = group.dimensions[plate].size
            group.resize_dimension(plate, start + part.sizes[plate])
            for variable in [plate, *map(str, part.data_vars)]:
                value = xarray.conventions.encode_cf_variable(part[variable].variable)
                place = tuple(slice(start, None) if dim == plate else slice(None) for dim in value.dims)
                group.variables[variable][place] = value.values

    def renumber(self, name: str, plate: str) -> None:
        """Numbers the datapoints of a group from 0 on."""
        with self._opened("a") as opened:
            _count(opened[name].variables[plate])

    def complete(self) -> None:
        """Marks the file as whole."""
        with self._opened("a") as opened:
            opened.attrs["complete"] = 1

    def groups(self) -> list[str]:
        """Names of the groups of a whole file."""
        with self._opened("r") as opened:
            return _names_whole(opened.attrs, opened.groups, self.engine)

    @contextmanager
    def _indices(self, name: str) -> Iterator[dict[str, Any]]:
        with self._opened("r") as opened:
            variables = opened[name].variables.items()
            yield {dim: variable for dim, variable in variables if variable.dimensions == (dim,)}

    def _opened(self, mode: str) -> Any:
        import h5netcdf

        return h5netcdf.File(self.path, mode)


class Zarr(Format):
    """A directory in Zarr's format."""

    engine = "zarr"

    def create(self, name: str, part: xarray.Dataset, plate: str | None) -> None:
        """Writes a new group."""
        part.to_zarr(self.path, group=name, mode="a", consolidated=False, encoding=_chunks(part, plate, "chunks"))

    def append(self, name: str, part: xarray.Dataset, plate: str) -> None:
        """Lets a group grow."""
        part.to_zarr(self.path, group=name, append_dim=plate, consolidated=False)

    def renumber(self, name: str, plate: str) -> None:
        """Numbers the datapoints of a group from 0 on."""
        _count(self._opened("a")[f"{name}/{plate}"])

    def complete(self) -> None:
        """Marks the directory as whole."""
        self._opened("a").attrs["complete"] = 1

    def groups(self) -> list[str]:
        """Names of the groups of a whole directory."""
        opened = self._opened("r")
        return _names_whole(opened.attrs, opened.group_keys(), self.engine)

    @contextmanager
    def _indices(self, name: str) -> Iterator[dict[str, Any]]:
        arrays = self._opened("r")[name].arrays()
        yield {dim: array for dim, array in arrays if array.metadata.dimension_names == (dim,)}

    def _opened(self, mode: Any) -> Any:
        import zarr

        return zarr.open_group(self.path, mode=mode)


FORMATS: dict[str, type[Format]] = {".nc": NetCDF, ".zarr": Zarr}
"""Formats by the suffix of a path."""
