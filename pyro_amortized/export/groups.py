"""The groups of an export: arrays with named axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.structure.influence import PlateLogProbs
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.structure import Structure

if TYPE_CHECKING:
    import xarray

__all__ = ["Group", "label_arguments", "to_dataset", "to_numpy"]

Variable = tuple[tuple[str, ...], np.ndarray[Any, Any]]
"""Names of the axes, and the values."""
Group = dict[str, Variable]


def to_numpy(value: Tensor) -> np.ndarray[Any, Any]:
    """A copy in NumPy, of the same dtype where NumPy has it."""
    value = value.float() if value.dtype == torch.bfloat16 else value
    return np.array(value.detach().cpu().numpy())


def label_arguments(
    arguments: Mapping[str, Any],
    structure: Structure,
    observed: Iterable[Tensor],
    log_probs: PlateLogProbs,
) -> Group:
    """The dense tensors among a model's arguments that are neither observed values nor indices of a plate.

    An axis is a plate's if its entries matter to the plate's entries, each to one; of an axis that is that of all
    entries of a subsampled plate the rows at hand are taken.

    Args:
        arguments: The arguments by name.
        structure: The structure of the call.
        observed: The observed values.
        log_probs: Log-probabilities of this call.
    """
    group: Group = {}
    taken = [*observed, *structure.indices.values()]
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:  # no array could hold a sparse one
            continue
        if any(_same(value, other) for other in taken):
            continue
        variable = f"{name}_argument" if name in structure.frames else name  # an axis of that name has coordinates
        dims, value = _label_argument(name, value, structure, log_probs)
        if not any(_same(value, other) for other in taken):
            group[variable] = (dims, to_numpy(value))
    return group


def _label_argument(
    name: str, value: Tensor, structure: Structure, log_probs: PlateLogProbs
) -> tuple[tuple[str, ...], Tensor]:
    axes, whole = dict[int, str](), value
    for frame in sorted(structure.frames.values(), key=lambda frame: (frame.name != structure.plate, frame.dim)):
        found = (
            (axis, positions)
            for axis in range(value.dim())
            for positions in _positions(frame, structure, whole.shape[axis])
            if axis not in axes and log_probs.holds(whole, axis, frame, positions)
        )
        axis, positions = next(found, (None, None))
        if axis is None or positions is None:
            continue
        value = value.index_select(axis, positions.to(value.device))
        axes[axis] = frame.name
    unnamed = iter(range(value.dim()))
    return tuple(axes[axis] if axis in axes else f"{name}_dim_{next(unnamed)}" for axis in range(value.dim())), value


def _positions(frame: PlateFrame, structure: Structure, length: int) -> Iterator[Tensor]:
    """Where along an axis the entries of a plate may lie: in its order, or in that of all of them."""
    index = structure.indices.get(frame.name)
    if length == frame.size:
        yield torch.arange(length)
    if length == frame.full_size and index is not None and index.dim() == 1 and not index.is_floating_point():
        yield index


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
    if name == "constant_data":  # whose axes other batches may tell to be those of plates
        sizes |= {frame.name: frame.size for frame in structure.frames.values()}
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
