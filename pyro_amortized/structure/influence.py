"""Which entries of a model's arguments matter to which datapoints, found by numbers.

Sizes only propose: an axis as long as the plate may hold the datapoints, or anything else of which there are as many.
An axis is one of datapoints if changing the entries of some datapoints along it changes the log-joints of no others,
and if the log-joint of arguments that are cut along all such axes is that of the whole call at the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import combinations, islice
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_amortized.structure.arguments import Arguments, Axis, CallArguments
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.groups import Group
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import run_model
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import untouched

__all__ = ["DatapointAxes", "PlateLogProbs", "close", "cut_to_rows", "matters"]

_MAX_TRIES = 64
"""How many ways to cut the arguments to try where several axes may be those of the datapoints."""


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
        for sources in (own.flip(0), own.roll(1)) if len(part) else ():
            changed = _changed(arguments, axes, own[part], sources[part], evaluate)
            others = torch.isin(positions, own[part], invert=True)
            if not close(changed[others], reference[others]):
                return False
            if not close(changed, reference):
                found = True
                break
    return found


def _changed(
    arguments: Arguments, axes: Sequence[Axis], changed: Tensor, sources: Tensor, evaluate: Callable[..., Tensor]
) -> Tensor:
    try:
        return evaluate(arguments.change(axes, changed, sources))
    except Exception:  # a model may fail in any way on data that it is not made for
        return evaluate(arguments.change(axes, changed, sources, noise=False))


Evaluate = Callable[[CallArguments, Tensor], Tensor]
"""Log-joints ``(n,)`` of a call whose datapoints are some rows of the original one, at latents that belong to these."""


class DatapointAxes:
    """The axes that hold the datapoints in one call's arguments.

    They are found when they are first needed, in a few runs of the model, and verified for every new number of rows.

    Args:
        arguments: The arguments of the call.
        size: N, the number of datapoints.
        evaluate: Log-joints.
        groups: Plates in long format, whose entries are cut to those of the rows, and whose indices count anew.
    """

    def __init__(
        self, arguments: Arguments, size: int, evaluate: Evaluate, groups: Mapping[str, Group] | None = None
    ) -> None:
        self.arguments = arguments
        self.size = size
        self.evaluate = evaluate
        self.groups = {} if groups is None else groups
        self._reference: Tensor | None = None
        self._agrees: dict[int, bool] = {}

    def take(self, rows: Tensor) -> CallArguments:
        """The arguments cut to rows, which :meth:`serves` has been asked about."""
        axes = self._joint_axes if self._axes is None else self._axes
        return self.cut(axes or (), rows)

    def cut(self, axes: Sequence[Axis], rows: Tensor) -> CallArguments:
        """The arguments cut to rows along axes."""
        return cut_to_rows(self.arguments, axes, rows, self.size, self.groups)

    @torch.no_grad()
    def serves(self, rows: Tensor, *, once: bool = False) -> bool:
        """Whether the arguments can be cut to as many rows as these, with right results.

        Args:
            rows: Positions in ``range(N)``.
            once: Whether to ask about this very selection, which may be right for datapoints that are not independent.
        """
        if any(not len(group.of_rows(rows, self.size)[0]) for group in self.groups.values()):
            return False  # no plate is empty
        if self._axes is None:
            return once and self._joint_axes is not None and self._are_right(self._joint_axes, rows)
        number = len(rows)
        if number not in self._agrees:
            self._agrees[number] = self._are_right(self._axes, rows)
        return self._agrees[number]

    @property
    def found(self) -> Sequence[Axis] | None:
        """The axes, none or one per argument; None if the model cannot be run on a part of its data."""
        return self._axes

    @property
    def reference(self) -> Tensor:
        """Log-joints ``(N,)`` of the call as it is."""
        if self._reference is None:
            self._reference = self.evaluate(self.arguments.call, torch.arange(self.size))
        return self._reference

    @cached_property
    def _axes(self) -> Sequence[Axis] | None:
        """The axes to cut along, none or one per argument; None if the model cannot be run on a part of its data."""
        candidates = self.arguments.axes_of_size(self.size)
        first = next(_ways(candidates))
        if (not first or self._are_apart(first)) and self._first_right([first]) is not None:
            return first
        return self._first_right(_ways(self._apart(candidates)))

    @cached_property
    def _joint_axes(self) -> Sequence[Axis] | None:
        """The same without the condition that no datapoint's entries matter to others."""
        return self._first_right(_ways(self.arguments.axes_of_size(self.size)))

    def _first_right(self, ways: Iterable[Sequence[Axis]]) -> Sequence[Axis] | None:
        """The first of some ways to cut the arguments that gives right results."""
        # Another length than that of the data, or models that fix their size would pass: the last row is repeated.
        rows = torch.cat([torch.arange(self.size - 1, -1, -1), torch.tensor([self.size - 1])])
        return next((way for way in islice(ways, _MAX_TRIES) if self._are_right(way, rows)), None)

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
            return close(self.evaluate(self.cut(axes, rows), rows), self.reference[rows])
        except Exception:  # a model may fail in any way on a part of its data; then it is run on all of it
            return False


def cut_to_rows(
    arguments: Arguments, axes: Sequence[Axis], rows: Tensor, size: int, groups: Mapping[str, Group]
) -> CallArguments:
    """Arguments cut to rows of so many along axes, and those of entries in long format to the entries of these rows."""
    call = arguments.take(axes, rows)
    for group in groups.values():
        entries, part = group.of_rows(rows, size)
        index = [i for i, leaf in enumerate(arguments.leaves) if _is_index(leaf, group.index)]
        along = {i: (i, axis) for i, axis in reversed(arguments.axes_of_size(len(group.index)))}
        cut = {i for i, _ in axes} | {*index}
        taken = Arguments(*Arguments(*call).take([at for i, at in along.items() if i not in cut], entries))
        call = taken.with_leaves({i: part.index.to(arguments.leaves[i]) for i in index})
    return call


def _is_index(leaf: Any, index: Tensor) -> bool:
    """Whether an argument is the index of a plate in long format."""
    return isinstance(leaf, Tensor) and leaf.shape == index.shape and torch.equal(leaf.to(index), index)


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
        call: A call of a model.
    """

    def __init__(self, call: ModelCall) -> None:
        self.model = call.model
        self.arguments = Arguments(call.args, call.kwargs)
        self.indices = call.structure.indices
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
