"""All observed values of the datapoints, where a call of the model sees only some entries of an inner plate.

What the encoder sees may not depend on which entries were drawn: the variational posterior would, and the loss would be
no bound. The model is looked at several times, with indices of the plate that cover all entries in turn; whether the
values follow the indices is found by numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.observed import observed_values
from pyro_amortized.structure.plates import PlateFrame, probe
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.structure import Structure

__all__ = ["WholeObservations"]

_Values = dict[tuple[str, str], Tensor]
"""Observed values and masks by site, datapoints first."""


@dataclass
class WholeObservations:
    """Finds the observed values at all entries of the inner plates that are subsampled.

    Attributes:
        followed: Names of sites whose values have been seen to follow the indices of their plates. Entries that are all
            equal do not show it.
    """

    followed: set[str] = field(default_factory=set)

    def find(self, call: ModelCall) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The observed values by site ``(N, ...)``, and which of them are not masked, at all entries.

        Args:
            call: A call of a model, with the indices of subsampled plates.

        Raises:
            ValueError: If the values do not follow the indices of the plates: the other entries cannot be known.
        """
        structure = call.structure
        frames = [structure.frames[name] for name in structure.data_plates]
        drawn = {frame.name: structure.indices[frame.name] for frame in frames}

        def look(indices: Mapping[str, Tensor]) -> tuple[Trace, _Values]:
            trace = probe(call.model, call.args, call.kwargs, {**structure.indices, **indices})[0]
            values, masks = observed_values(trace, structure.datapoints)
            return trace, {**{("", n): v for n, v in values.items()}, **{("mask", n): m for n, m in masks.items()}}

        trace, here = look(drawn)
        axes = {key: _axes(trace, key[1], value, frames, structure.datapoints) for key, value in here.items()}
        whole, moved = dict(here), set[tuple[str, str]]()
        for count, indices in enumerate(_chunks(frames, drawn)):
            part = look(indices)[1]
            for key, places in axes.items():
                if places:
                    moved |= set() if _equal(part[key], here[key]) else {key}
                    base = whole[key] if count else _enlarged(here[key], places)
                    whole[key] = _put(base, part[key], places, indices)
        turned = look({name: index.flip(0) for name, index in drawn.items()})[1]
        for key, places in axes.items():
            expected = here[key].flip([axis for axis, _ in places]) if places else here[key]
            moved |= set() if _equal(expected, here[key]) else {key}
            agrees = _equal(turned[key], expected) and _equal(_take(whole[key], places, drawn), here[key])
            unknown = places and key not in moved and not key[0] and key[1] not in self.followed
            if not agrees or unknown:
                _refuse(key[1], [frame for _, frame in places] or frames, structure, agrees)
        self.followed |= {name for _, name in moved}
        return tuple({n: v for (part, n), v in whole.items() if part == kind} for kind in ("", "mask"))  # type: ignore[return-value]


_Places = list[tuple[int, PlateFrame]]
"""Axes of a site's values, and the plates that they belong to."""


def _axes(trace: Trace, name: str, value: Tensor, frames: list[PlateFrame], datapoints: PlateFrame) -> _Places:
    """The axes of observed values, datapoints first, along which entries of subsampled plates lie."""
    site = sample_sites(trace)[name]
    own = {frame.name for frame in site["cond_indep_stack"]}
    rank, places = value.dim() - site["fn"].event_dim, []
    for frame in frames:
        axis = rank + frame.dim + (frame.dim < datapoints.dim)
        if frame.name in own and rank + frame.dim >= 0 and value.shape[axis] == frame.size:
            places.append((axis, frame))
    return places


def _chunks(frames: list[PlateFrame], drawn: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Indices of all plates, as many of each as in this call, that cover all entries together."""
    starts = [range(0, frame.full_size, frame.size) for frame in frames]
    for combination in product(*starts):
        positions = zip(frames, combination, strict=True)
        yield {
            f.name: torch.arange(f.size, device=drawn[f.name].device) + min(start, f.full_size - f.size)
            for f, start in positions
        }


def _enlarged(value: Tensor, places: _Places) -> Tensor:
    shape = list(value.shape)
    for axis, frame in places:
        shape[axis] = frame.full_size
    return value.new_zeros(shape)


def _grid(value: Tensor, places: _Places, indices: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What indexes the given entries of the plates, and all else."""
    grid: list[Any] = [torch.arange(size, device=value.device) for size in value.shape]
    for axis, frame in places:
        grid[axis] = indices[frame.name].to(value.device)
    return tuple(index.reshape([-1 if i == k else 1 for k in range(value.dim())]) for i, index in enumerate(grid))


def _put(whole: Tensor, part: Tensor, places: _Places, indices: Mapping[str, Tensor]) -> Tensor:
    return whole.index_put(_grid(whole, places, indices), part)


def _take(whole: Tensor, places: _Places, indices: Mapping[str, Tensor]) -> Tensor:
    return whole[_grid(whole, places, indices)] if places else whole


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN."""
    return first.shape == second.shape and bool(((first == second) | ((first != first) & (second != second))).all())


def _refuse(name: str, frames: list[PlateFrame], structure: Structure, agrees: bool) -> None:
    plates = ", ".join(f"{frame.name!r} ({frame.size} of {frame.full_size} entries)" for frame in frames)
    cause = "the values do not follow the plate's index, so that those of the other entries are unknown"
    if agrees:
        cause = "whether the values follow the plate's index cannot be seen, because all of them are equal"
    raise ValueError(
        f"Cannot show the encoder observed site {name!r} because it lies in a subsample of plate {plates} inside of "
        f"plate {structure.datapoints.name!r} and {cause}: the posterior of a datapoint may not depend on which were "
        "drawn; try a model that is given the values of all entries and takes them at the plate's own index, "
        "`with pyro.plate(name, size, subsample=index) as i:` and `obs=y[:, i]`, or encoder_input=... that is the same "
        "for every subsample."
    )
