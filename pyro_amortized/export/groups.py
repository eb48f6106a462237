"""The groups of an export: arrays with named axes, put together from batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_amortized.diagnostics.report import join
from pyro_amortized.export.runs import SiteShape
from pyro_amortized.structure import Structure
from pyro_amortized.tracing import PlateFrame

if TYPE_CHECKING:
    import xarray

__all__ = ["Group", "join_group", "label", "label_arguments", "to_dataset", "to_numpy"]

Variable = tuple[tuple[str, ...], np.ndarray[Any, Any]]
"""Names of the axes, and the values."""
Group = dict[str, Variable]


def to_numpy(value: Tensor) -> np.ndarray[Any, Any]:
    """A copy in NumPy, of the same dtype."""
    return np.array(value.detach().cpu().numpy())


def label(
    name: str, value: Tensor, site: SiteShape, frames: Mapping[str, PlateFrame], lead: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Tensor]:
    """Names the axes of a site's values: after its plates, and ``<name>_dim_<i>`` where there is no plate.

    Args:
        name: Name of the site.
        value: Values of shape ``(*lead, *batch, *event)``.
        site: Which batch dimension belongs to which plate.
        frames: The plates.
        lead: Names of the leading axes.

    Returns:
        The names, and the values without the batch dimensions that no plate uses.
    """
    dims, shape, expanded, unnamed = list(lead), list(value.shape[: len(lead)]), list(value.shape[: len(lead)]), 0
    batch = value.dim() - len(lead) - site.event_dim
    for axis, size in enumerate(value.shape[len(lead) :]):
        plate = site.plates.get(axis - batch) if axis < batch else None
        if axis < batch and plate is None and size == 1:
            continue
        if plate is None:
            dims.append(f"{name}_dim_{unnamed}")
            unnamed += 1
        else:
            dims.append(plate)
        shape.append(size)
        expanded.append(size if plate is None else frames[plate].size)
    return tuple(dims), value.reshape(shape).expand(expanded)


def label_arguments(
    arguments: Mapping[str, Any], structure: Structure, observed: Iterable[Tensor], known: Mapping[str, Variable]
) -> Group:
    """The tensors among a model's arguments that are neither observed values nor indices of a plate.

    An axis as long as a plate is taken for it; of one as long as all of a subsampled plate the rows at hand are taken.

    Args:
        arguments: The arguments by name.
        structure: The structure of the call.
        observed: The observed values.
        known: The same of an earlier batch, whose names of axes are kept where they fit.
    """
    group: Group = {}
    taken = [*observed, *structure.indices.values()]
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or any(_same(value, other) for other in taken):
            continue
        dims, value = _label_argument(name, value, structure)
        if name in known and _fits(known[name], value, structure):
            dims = known[name][0]
        if not any(_same(value, other) for other in taken):
            group[name] = (dims, to_numpy(value))
    return group


def _label_argument(name: str, value: Tensor, structure: Structure) -> tuple[tuple[str, ...], Tensor]:
    dims = [f"{name}_dim_{axis}" for axis in range(value.dim())]
    frames = sorted(structure.frames.values(), key=lambda frame: (frame.name != structure.plate, frame.dim))
    for frame in frames:
        free = [axis for axis, dim in enumerate(dims) if dim.startswith(f"{name}_dim_")]
        axis = next((a for a in free if value.shape[a] in (frame.size, frame.full_size)), None)
        if axis is None:
            continue
        if value.shape[axis] != frame.size:
            value = value.index_select(axis, structure.indices[frame.name].to(value.device))
        dims[axis] = frame.name
    unnamed = iter(range(value.dim()))
    return tuple(f"{name}_dim_{next(unnamed)}" if dim.startswith(f"{name}_dim_") else dim for dim in dims), value


def _fits(known: Variable, value: Tensor, structure: Structure) -> bool:
    sizes = [structure.frames[dim].size if dim in structure.frames else None for dim in known[0]]
    return len(sizes) == value.dim() and all(
        size is None or size == length for size, length in zip(sizes, value.shape, strict=True)
    )


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their shape and dtype."""
    if first.numel() != second.numel():
        return False
    first, second = first.detach().reshape(-1), second.detach().to(first.device).reshape(-1)
    return bool(((first == second) | ((first != first) & (second != second))).all())


def to_dataset(name: str, group: Group, structure: Structure, attributes: Mapping[str, Any]) -> xarray.Dataset:
    """A group of one batch as a dataset; coordinates of plates are the positions in the full data set."""
    import xarray

    sizes = {dim: size for dims, values in group.values() for dim, size in zip(dims, values.shape, strict=True)}
    coords = {dim: _coordinates(dim, size, structure) for dim, size in sizes.items()}
    dataset = xarray.Dataset(group, coords, dict(attributes))
    for variable in dataset.data_vars if name in ("log_likelihood", "sample_stats") else ():
        if variable != "khat":
            dataset[variable].attrs["units"] = "nats"
    return dataset


def _coordinates(dim: str, size: int, structure: Structure) -> np.ndarray[Any, Any]:
    index = structure.indices.get(dim)
    if index is None or index.shape != (size,) or index.is_floating_point():  # a plate may be given data for indices
        return np.arange(size)
    return index.cpu().numpy()


def join_group(name: str, parts: list[xarray.Dataset], plate: str | None) -> xarray.Dataset:
    """Joins a group's batches along the plate, taking the parts out of the list; what has no such axis is kept once.

    Raises:
        ValueError: If other sizes or observed values outside the plate differ between batches.
    """
    if len(parts) == 1:
        return parts.pop()
    first = parts[0]
    along = [v for v in first.data_vars if plate in first[v].dims]
    once = [v for v in first.data_vars if v not in along]
    if name == "constant_data":
        along = [v for v in along if all(v in part and part[v].dims == first[v].dims for part in parts)]
        once = [v for v in once if all(v in part and part[v].equals(first[v]) for part in parts)]
    elif name == "observed_data":
        _check_outside(first[once], parts, plate)
    _check_sizes(name, [part[along] for part in parts], plate)
    kept = first[once]
    if not along:
        return kept
    slices = [part[along] for part in parts]
    parts.clear()
    joined = join(slices, str(plate))
    return kept.merge(joined)


def _check_sizes(name: str, parts: Sequence[xarray.Dataset], plate: str | None) -> None:
    for part in parts:
        for dim, size in parts[0].sizes.items():
            if dim != plate and part.sizes[dim] != size:
                raise ValueError(
                    f"Cannot join the batches of group {name!r} because dimension {dim!r} has size {size} in the first "
                    f"and {part.sizes[dim]} in a later one; try padding to a common size and masking, "
                    "`dist.Normal(...).mask(present)`, or one call per batch."
                )


def _check_outside(first: xarray.Dataset, parts: Sequence[xarray.Dataset], plate: str | None) -> None:
    changed = [str(v) for v in first.data_vars if any(v not in part or not part[v].equals(first[v]) for part in parts)]
    if changed:
        raise ValueError(
            f"Cannot join the batches because observed sites {changed} lie outside of plate {plate!r} and differ "
            "between them; try a single call with all data."
        )
