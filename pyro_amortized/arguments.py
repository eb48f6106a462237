"""Where among a model's arguments a datapoint's data lie: found by numbers, changed, and cut to rows.

Sizes only propose: an axis as long as the plate may hold the datapoints, or anything else of which there are as many.
An axis is one of datapoints if changing the entries of some datapoints along it changes the log-joints of no others,
and if the log-joint of arguments that are cut along all such axes is that of the whole call at the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import combinations, islice
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_amortized.tracing import PlateFrame, run_model, sample_sites, untouched

__all__ = ["Arguments", "Axis", "CallArguments", "DatapointAxes", "PlateLogProbs", "close", "matters"]

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""
Axis = tuple[int, int]
"""Number of an argument, in the order of the nested arguments, and one of its axes."""

_MAX_TRIES = 64
"""How many ways to cut the arguments to try where several axes may be those of the datapoints."""


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

    def change(self, axes: Sequence[Axis], positions: Tensor, part: Tensor, noise: bool = True) -> CallArguments:
        """The arguments with the data of some datapoints changed.

        They get those of other datapoints, which the model can be run on, and, where these may be equal, noise.

        Args:
            axes: The axes of the datapoints, at most one per argument.
            positions: Which entries along them are those of the datapoints, ``(N,)``.
            part: Which datapoints to change.
            noise: Whether to add noise to floating-point numbers.
        """
        leaves = dict(enumerate(self.leaves))
        for position, axis in axes:
            leaf = leaves[position]
            entries = torch.arange(leaf.shape[axis])
            entries[positions[part]] = positions.flip(0)[part]
            leaf = _take(leaf, axis, entries)
            leaves[position] = _with_noise(leaf, axis, positions[part]) if noise else leaf
        return self.with_leaves(leaves)


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


def matters(
    arguments: Arguments,
    axes: Sequence[Axis],
    positions: Tensor,
    evaluate: Callable[[CallArguments], Tensor],
    reference: Tensor,
) -> bool | None:
    """Whether the entries at some positions along axes are the data of one datapoint each.

    Args:
        arguments: The arguments of a call.
        axes: The axes, at most one per argument, all of one length.
        positions: The entries of the datapoints, ``(N,)``.
        evaluate: Log-joints ``(N,)`` of the datapoints, given arguments of the same shapes.
        reference: Those of the arguments as they are.

    Returns:
        True if changing the entries of some datapoints changes these alone; False if it changes others, or entries of
        none of them matter; None if none matters.

    Raises:
        Exception: Any that the model raises on changed arguments.
    """
    length = arguments.leaves[axes[0][0]].shape[axes[0][1]]
    rest = torch.ones(length, dtype=torch.bool).index_fill(0, positions, False).nonzero().squeeze(-1)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    parts = [(positions, part) for part in order.tensor_split(2)]
    found = None
    for own, part in [*parts, (rest, torch.arange(len(rest)))]:
        if len(part) == 0:
            continue
        try:
            changed = evaluate(arguments.change(axes, own, part))
        except Exception:  # a model may fail in any way on data that it is not made for
            changed = evaluate(arguments.change(axes, own, part, noise=False))
        others = torch.isin(positions, own[part], invert=True)
        if not close(changed[others], reference[others]):
            return False
        found = found or (None if close(changed, reference) else True)
    return found


Evaluate = Callable[[CallArguments, Tensor], Tensor]
"""Log-joints ``(n,)`` of a call whose datapoints are some rows of the original one, at latents that belong to these."""


class DatapointAxes:
    """The axes that hold the datapoints in one call's arguments.

    They are found when they are first needed, in a few runs of the model, and verified for every new number of rows.

    Args:
        arguments: The arguments of the call.
        size: N, the number of datapoints.
        evaluate: Log-joints.
    """

    def __init__(self, arguments: Arguments, size: int, evaluate: Evaluate) -> None:
        self.arguments = arguments
        self.size = size
        self.evaluate = evaluate
        self._axes: Sequence[Axis] | None = None
        self._reference: Tensor | None = None
        self._agrees: dict[int, bool] = {}
        self._found = False

    def take(self, rows: Tensor) -> CallArguments:
        """The arguments cut to rows, which :meth:`serves` has been asked about."""
        return self.arguments.take(self._axes or (), rows)

    @torch.no_grad()
    def serves(self, rows: Tensor) -> bool:
        """Whether the arguments can be cut to as many rows as these, with right results."""
        if not self._found:
            self._axes, self._found = self._find(), True
        if self._axes is None:
            return False
        number = len(rows)
        if number not in self._agrees:
            self._agrees[number] = self._are_right(self._axes, rows)
        return self._agrees[number]

    @property
    def reference(self) -> Tensor:
        """Log-joints ``(N,)`` of the call as it is."""
        if self._reference is None:
            self._reference = self.evaluate(self.arguments.call, torch.arange(self.size))
        return self._reference

    def _find(self) -> Sequence[Axis] | None:
        """The axes to cut along, none or one per argument; None if the model cannot be run on a part of its data."""
        # Another length than that of the data, or models that fix their size would pass: the last row is repeated.
        rows = torch.cat([torch.arange(self.size - 1, -1, -1), torch.tensor([self.size - 1])])
        candidates = self.arguments.axes_of_size(self.size)
        first = next(_ways(candidates))
        if (not first or self._are_apart(first)) and self._are_right(first, rows):
            return first
        return next(
            (way for way in islice(_ways(self._apart(candidates)), _MAX_TRIES) if self._are_right(way, rows)), None
        )

    def _apart(self, axes: Sequence[Axis]) -> Sequence[Axis]:
        """Those of the axes whose entries matter to one datapoint each."""
        if not axes or self._are_apart(axes):
            return axes
        if len(axes) == 1:
            return []
        half = len(axes) // 2
        return [*self._apart(axes[:half]), *self._apart(axes[half:])]

    def _are_apart(self, axes: Sequence[Axis]) -> bool:
        """Whether changing the entries of some datapoints leaves the log-joints of the others as they are."""
        everyone = torch.arange(self.size)
        with suppress(Exception):  # a model may fail in any way on data that it is not made for
            found = matters(self.arguments, axes, everyone, lambda c: self.evaluate(c, everyone), self.reference)
            return found is not False
        return False

    def _are_right(self, axes: Sequence[Axis], rows: Tensor) -> bool:
        """Whether the log-joints of arguments that are cut to rows are those of the whole call at these rows."""
        try:
            return close(self.evaluate(self.arguments.take(axes, rows), rows), self.reference[rows])
        except Exception:  # a model may fail in any way on a part of its data; then it is run on all of it
            return False


def _ways(axes: Sequence[Axis]) -> Iterator[Sequence[Axis]]:
    """Ways to cut arguments along at most one axis each: the first ones, and with other choices for few arguments."""
    first = {position: (position, axis) for position, axis in reversed(axes)}
    others: list[tuple[int, Axis | None]] = [*((position, None) for position in first)]
    others += [(axis[0], axis) for axis in axes if axis != first[axis[0]]]
    for number in range(3):
        for choices in combinations(others, number):
            way = {**first, **dict(choices)}
            yield [axis for axis in way.values() if axis is not None]


class PlateLogProbs:
    """Log-probabilities of all sites in a plate as a function of the arguments, at latents drawn once from the prior.

    Args:
        model: The model.
        arguments: The arguments of the call.
        indices: Indices of the subsampled plates.
    """

    def __init__(self, model: Callable[..., Any], arguments: Arguments, indices: Mapping[str, Tensor]) -> None:
        self.model = model
        self.arguments = arguments
        self.indices = indices
        self._references: dict[str, Tensor] = {}

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        nodes = self._run(self.arguments.call, self.indices).nodes.items()
        return {name: site["value"] for name, site in nodes if site["type"] == "sample" and not site["is_observed"]}

    def _run(self, call: CallArguments, values: Mapping[str, Tensor]) -> Any:
        with torch.no_grad(), pyro.validation_enabled(False), untouched():
            torch.manual_seed(0)  # a model may draw numbers of its own
            return run_model(self.model, *call, values)

    def __call__(self, call: CallArguments, frame: PlateFrame) -> Tensor:
        """Sums over all but the entries of a plate, ``(size,)``, in nats."""
        total = torch.zeros(())
        for site in sample_sites(self._run(call, self._values)).values():
            if any(f.name == frame.name for f in site["cond_indep_stack"]):
                log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                log_prob = scale_and_mask(log_prob, mask=site["mask"])
                log_prob = log_prob.reshape((1,) * (-frame.dim - log_prob.dim()) + log_prob.shape)
                total = log_prob.movedim(frame.dim, 0).unsqueeze(-1).flatten(1).sum(-1) + total.to(log_prob)
        return total.expand(frame.size)

    def holds(self, value: Tensor, axis: int, frame: PlateFrame, positions: Tensor) -> bool | None:
        """Whether the entries at some positions along an axis of an argument are the data of one entry of a plate each.

        Returns:
            As :func:`matters`; also None if the argument is none of the call, or the model cannot be run on others.
        """
        axes = [(number, axis) for number, leaf in enumerate(self.arguments.leaves) if leaf is value]
        with suppress(Exception):  # a model may fail in any way on data that it is not made for
            if axes and frame.name not in self._references:
                self._references[frame.name] = self(self.arguments.call, frame)
            if axes:
                evaluate, reference = partial(self, frame=frame), self._references[frame.name]
                return matters(self.arguments, axes, positions.cpu(), evaluate, reference)
        return None


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two evaluations of the same numbers agree but for rounding."""
    tolerance = 1e-8 if expected.dtype == torch.float64 else 1e-4
    return actual.shape == expected.shape and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )
