"""Files that grow along the datapoint plate, one batch after the other: netCDF and Zarr."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

__all__ = ["FORMATS", "Format"]

MAX_CHUNK = 2**20
"""Elements of a variable that are stored, and read, together."""


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
        """A group, whose values are read when they are used."""
        import xarray

        options: Any = {"consolidated": False} if self.engine == "zarr" else {}
        return xarray.open_dataset(self.path, group=name, engine=self.engine, **options)


def _chunks(part: xarray.Dataset, plate: str | None, key: str) -> dict[str, Any]:
    """Sizes of what is stored together, by variable: whole batches, or even parts of them."""
    result: dict[str, Any] = {}
    for name, value in part.variables.items():
        if plate in value.dims and value.size:
            rows = value.sizes[plate]
            size = -(-rows // min(rows, -(-value.size // MAX_CHUNK)))
            result[str(name)] = {key: tuple(size if dim == plate else n for dim, n in value.sizes.items())}
    return result


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
            index = opened[name].variables[plate]
            index[:] = np.arange(index.shape[0])

    def complete(self) -> None:
        """Marks the file as whole."""
        with self._opened("a") as opened:
            opened.attrs["complete"] = 1

    def groups(self) -> list[str]:
        """Names of the groups of a whole file."""
        with self._opened("r") as opened:
            return _names_whole(opened.attrs, opened.groups, self.engine)

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
        index = self._opened("a")[f"{name}/{plate}"]
        index[:] = np.arange(index.shape[0])

    def complete(self) -> None:
        """Marks the directory as whole."""
        self._opened("a").attrs["complete"] = 1

    def groups(self) -> list[str]:
        """Names of the groups of a whole directory."""
        opened = self._opened("r")
        return _names_whole(opened.attrs, opened.group_keys(), self.engine)

    def _opened(self, mode: Any) -> Any:
        import zarr

        return zarr.open_group(self.path, mode=mode)


FORMATS: dict[str, type[Format]] = {".nc": NetCDF, ".zarr": Zarr}
"""Formats by the suffix of a path."""
