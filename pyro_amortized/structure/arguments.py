"""A model's arguments as a flat list: tensors found among them, replaced, changed, and cut to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "Arguments",
    "Axis",
    "CallArguments",
    "OwnArguments",
    "Place",
]

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""
Axis = tuple[int, int]
"""Number of an argument, in the order of the nested arguments, and one of its axes."""


class Arguments:
    """A call's arguments, nested in lists, tuples and dicts, as a flat list of leaves: tensors, arrays and all else.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))

    @property
    def call(self) -> CallArguments:
        """The positional and the keyword arguments."""
        return self.with_leaves({})

    def with_leaves(self, leaves: Mapping[int, Any]) -> CallArguments:
        """The arguments with other leaves in some positions."""
        changed = [leaves.get(position, leaf) for position, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(changed, self._spec)
        return args, kwargs

    def position(self, value: Tensor) -> int | None:
        """Number of the argument that a tensor is, or is a reshaped view of; None unless there is just one."""
        found = [i for i, leaf in enumerate(self.leaves) if leaf is value or _same_memory(leaf, value)]
        return found[0] if len(found) == 1 else None  # equal ones may differ in another call

    def axes_of_size(self, size: int) -> list[Axis]:
        """All axes of tensors and arrays that are this long, the first one of each argument first."""
        found: list[list[Axis]] = []
        for position, leaf in enumerate(self.leaves):
            shape = leaf.shape if isinstance(leaf, Tensor | np.ndarray) else ()
            found.append([(position, axis) for axis, length in enumerate(shape) if length == size])
        return [axes[rank] for rank in range(max(map(len, found), default=0)) for axes in found if rank < len(axes)]

    def take(self, axes: Sequence[Axis], rows: Tensor) -> CallArguments:
        """The arguments cut to rows along one axis each; what is passed twice, and cut alike, stays one object."""
        taken: dict[Any, Any] = {}
        leaves: dict[int, Any] = {}
        for position, axis in axes:
            leaf = self.leaves[position]
            key = id(leaf), axis
            leaves[position] = taken[key] if key in taken else taken.setdefault(key, _take(leaf, axis, rows))
        return self.with_leaves(leaves)

    def change(self, axes: Sequence[Axis], changed: Tensor, sources: Tensor, noise: bool = True) -> CallArguments:
        """The arguments with the data of some datapoints changed.

        They get those of other datapoints, which the model can be run on, and, where these may be equal, noise.

        Args:
            axes: The axes of the datapoints, at most one per argument.
            changed: Which entries along them to change.
            sources: The entries whose data they get, as many.
            noise: Whether to add noise to floating-point numbers.
        """
        leaves = dict(enumerate(self.leaves))
        for position, axis in axes:
            leaf = leaves[position]
            entries = torch.arange(leaf.shape[axis])
            entries[changed] = sources
            leaf = _take(leaf, axis, entries)
            leaves[position] = _with_noise(leaf, axis, changed) if noise else leaf
        return self.with_leaves(leaves)


def _same_memory(leaf: Any, value: Tensor) -> bool:
    if not _is_plain(leaf) or not _is_plain(value) or leaf.data_ptr() != value.data_ptr():
        return False
    same = leaf.numel() == value.numel() and leaf.dtype == value.dtype
    return same and leaf.is_contiguous() and value.is_contiguous()


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.numel() > 0


def _take(leaf: Any, axis: int, rows: Tensor) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.take(rows.numpy(), axis)
    if leaf.layout in (torch.strided, torch.sparse_coo):
        return leaf.index_select(axis, rows.to(leaf.device))
    return _take(leaf.to_sparse_coo(), axis, rows).to_sparse(layout=leaf.layout)


def _with_noise(leaf: Any, axis: int, entries: Tensor) -> Any:
    """A leaf with noise on some entries of floating-point numbers; whole numbers keep their integral part."""
    if isinstance(leaf, np.ndarray):
        return _with_noise(torch.from_numpy(leaf), axis, entries).numpy() if leaf.dtype.kind == "f" else leaf
    if leaf.layout != torch.strided or not leaf.is_floating_point():
        return leaf
    entries = entries.unique().to(leaf.device)
    value = leaf.detach().index_select(axis, entries)
    noise = 0.1 + 0.4 * torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    if not torch.equal(value.nan_to_num(), value.nan_to_num().round()):
        noise = noise * (0.1 + value.abs())
    return leaf.detach().index_copy(axis, entries, value + noise)


@dataclass(frozen=True)
class Place:
    """Where among the arguments a site's observed values lie.

    Attributes:
        leaf: Number of the argument, in the order of the nested arguments.
        view: Shape, strides and offset of the values in the argument's memory, if they are a view of it.
        index: Rows of the argument that the values are a copy of; None if of all.
    """

    leaf: int
    view: tuple[torch.Size, tuple[int, ...], int] | None
    index: Tensor | None

    def write(self, argument: Tensor, values: Tensor) -> None:
        """Writes values into an argument, in place."""
        if self.view is not None:
            shape, strides, offset = self.view
            argument.as_strided(shape, strides, offset).copy_(values)
        elif self.index is not None:
            argument[self.index] = values.reshape(argument[self.index].shape).to(argument)
        else:
            argument.copy_(values.reshape(argument.shape))


class OwnArguments(Arguments):
    """A copy of a call's arguments, each tensor in memory of its own, so that places in it are unique.

    An argument that is passed twice stays one and the same.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        like: Arguments of the same nesting, which tell what is passed twice.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], like: CallArguments | None = None) -> None:
        super().__init__(args, kwargs)
        originals = self.leaves if like is None else Arguments(*like).leaves
        first: dict[Any, int] = {}
        self._same = []
        for position, (leaf, original) in enumerate(zip(self.leaves, originals, strict=True)):
            key = (original.data_ptr(), original.shape, original.stride()) if _is_plain(original) else position
            self._same.append(first.setdefault(key, position))
            if self._same[position] < position:
                self.leaves[position] = self.leaves[self._same[position]]
            elif _is_plain(leaf):
                self.leaves[position] = leaf.detach().clone(memory_format=torch.contiguous_format)

    def find(self, value: Tensor, indices: Sequence[Tensor]) -> Place | None:
        """Where a tensor that the model observes lies: a view of an argument, or a copy of one with the same values.

        Args:
            value: The tensor.
            indices: Of the subsampled plates around it.

        Returns:
            The place, or None if there is none or more than one.
        """
        distinct = [i for i, leaf in enumerate(self.leaves) if _is_plain(leaf) and self._same[i] == i]
        if _is_plain(value) and 0 not in value.stride():  # an expanded tensor holds one number for several
            memory = value.untyped_storage().data_ptr()
            for i in distinct:
                if self.leaves[i].untyped_storage().data_ptr() == memory and self.leaves[i].dtype == value.dtype:
                    return Place(i, (value.shape, value.stride(), int(value.storage_offset())), None)
        copies = [Place(i, None, None) for i in distinct if _equal(self.leaves[i], value)]
        for index in indices:
            copies += [Place(i, None, index) for i in distinct if _holds_rows(self.leaves[i], index, value)]
        return copies[0] if len(copies) == 1 else None

    def replaced(self, values: Sequence[tuple[Place, Tensor]]) -> CallArguments:
        """The arguments of a new call with other values in the given places."""
        leaves = {place.leaf: self.leaves[place.leaf].clone() for place, _ in values}
        for place, value in values:
            place.write(leaves[place.leaf], value)
        return self.with_leaves({i: leaves[same] for i, same in enumerate(self._same) if same in leaves})


def _equal(argument: Tensor, value: Tensor) -> bool:
    if argument.numel() != value.numel() or argument.device != value.device:
        return False
    return torch.allclose(
        argument.reshape(value.shape).to(value.dtype).double(), value.double(), rtol=0.0, atol=0.0, equal_nan=True
    )


def _holds_rows(argument: Tensor, index: Tensor, value: Tensor) -> bool:
    if argument.dim() == 0 or len(argument) <= int(index.max()) or argument[:1].numel() * len(index) != value.numel():
        return False
    return len(index.unique()) == len(index) and _equal(argument[index.to(argument.device)], value)
