"""Where in a hierarchy lies what an encoder sees: which inner plates, along which axes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.encoders.plate import PlateEncoder
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.inputs import by_plate
from pyro_amortized.guides.levels import inner_plates, level_names
from pyro_amortized.inference.sharing import Level
from pyro_amortized.structure.exchangeable import are_exchangeable
from pyro_amortized.structure.local_site import inner_dimensions
from pyro_amortized.structure.plates import PlateFrame, probe
from pyro_amortized.structure.sites import is_data, sample_sites
from pyro_amortized.structure.structure import Structure

__all__ = ["LevelInputs", "build_levels", "check_tells_apart", "find_levels"]


@dataclass(frozen=True)
class LevelInput:
    """Where in a hierarchy an input of the encoder lies.

    Attributes:
        plates: Names of its inner plates.
        axes: Its axes along them, once the datapoints come first.
        datapoints: The axis of the datapoints.
        is_flat: Whether it comes as ``(N, F)`` with all entries in a row, as global latents do.
        site: Name of the observed site whose values it holds, or None.
    """

    plates: tuple[str, ...]
    axes: tuple[int, ...]
    datapoints: int = 0
    is_flat: bool = False
    site: str | None = None

    def arranged(self, x: Tensor, structure: Structure) -> Tensor:
        """The input as ``(N, *sizes, F)``."""
        sizes = [structure.frames[name].size for name in self.plates]
        if self.is_flat:
            return x.reshape(len(x), *sizes, -1)
        if self.plates and not self.axes and self.plates[0] not in structure.groups:  # the same for all entries
            return x.reshape(len(x), *[1] * len(sizes), -1).expand(-1, *sizes, -1)
        x = x if self.datapoints == 0 else x.movedim(self.datapoints, 0)
        lacking = max((-axis for axis in self.axes), default=0) - (x.dim() - 1)
        if lacking > 0:
            x = x.reshape(len(x), *[1] * lacking, *x.shape[1:])
        count = len(self.axes)
        x = x.movedim(self.axes, tuple(range(1, 1 + count)))
        x = x.flatten(1 + count) if x.dim() > 1 + count else x.unsqueeze(-1)
        shape = [size if length == 1 else length for length, size in zip(x.shape[1:], sizes, strict=False)]
        return x.expand(len(x), *shape[:count], x.shape[-1])


@dataclass(frozen=True)
class LevelInputs:
    """The inputs of a :class:`~pyro_amortized.PlateEncoder`: values, and which of the observed ones are masked.

    Attributes:
        values: Where each input lies.
        masks: Where each mask lies, by the name of the observed site.
        groups: The plates in long format, with the plates of the level that their indices point into.
    """

    values: tuple[LevelInput, ...]
    masks: Mapping[str, LevelInput]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def arranged(
        self, inputs: tuple[Tensor, ...], present: Mapping[str, Tensor], structure: Structure
    ) -> tuple[Tensor, ...]:
        """All of them as ``(N, *sizes, F)``, with what an encoder needs to know of indices.

        Args:
            inputs: The inputs, without masks.
            present: Which observed values are not masked, by site.
            structure: The structure of the call.
        """
        unknown = sorted(present.keys() - self.masks.keys())
        if unknown:
            raise ValueError(
                f"Cannot encode this call because observed sites {unknown} are masked in it and were not when the "
                "guide was set up; try guide.setup(...) with data that the model masks, if only by a mask of ones."
            )
        values = [where.arranged(x, structure) for where, x in zip(self.values, inputs, strict=True)]
        dtype = next((x.dtype for x in values if x.is_floating_point()), torch.get_default_dtype())
        masks = [
            self._mask(where, None if name not in present else where.arranged(present[name], structure), values)
            for name, where in self.masks.items()
        ]
        masks = [mask.to(dtype) for mask in masks]
        return (*values, *masks, *self._indices(structure, values))

    def _mask(self, where: LevelInput, mask: Tensor | None, values: Sequence[Tensor]) -> Tensor:
        """A mask ``(N, *sizes, F)``; of ones in a call that masks nothing."""
        if mask is not None:
            return mask
        like = next(x for at, x in zip(self.values, values, strict=True) if at.plates == where.plates)
        return torch.ones_like(like)

    def _indices(self, structure: Structure, values: Sequence[Tensor]) -> list[Tensor]:
        """Of every plate in long format, the index and a tensor with as many rows as there are groups."""
        found = []
        for name in self.groups:
            group = structure.groups[name]
            rows = structure.frames[group.parent].size
            found += [group.index.to(values[0].device), values[0].new_empty(rows, 0)]
        return found


def input_levels(
    trace: Trace, frames: Mapping[str, PlateFrame], plate: str, plates: Collection[str]
) -> dict[str, LevelInput]:
    """Where the observed values of a run lie, by site, once their datapoints come first.

    Args:
        trace: A run of the model.
        frames: The plates in it.
        plate: Name of the datapoint plate.
        plates: Names of the inner plates that are levels.
    """
    found, here = {}, frames[plate].dim
    for name, site in sample_sites(trace).items():
        if is_data(site) and any(f.name == plate for f in site["cond_indep_stack"]):
            inner = [frame for frame in inner_dimensions(site, frames, plate) if frame.name in plates]
            axes = tuple(frame.dim + (frame.dim < here) - site["fn"].event_dim for frame in inner)
            found[name] = LevelInput(tuple(frame.name for frame in inner), axes, site=name)
    return found


def level_of_argument(x: Tensor, observed: Mapping[str, Tensor], levels: Mapping[str, LevelInput]) -> LevelInput | None:
    """Where an argument lies that holds the observed values of a site; None if it is that of none, or of several.

    It is the one that is in the same memory, or else the only one with the same values.
    """
    found, same = [], []
    for site, value in observed.items():
        for axis in range(x.dim()):
            moved = x.movedim(axis, 0)
            if moved.shape == value.shape and torch.equal(moved.to(value), value):
                found.append(replace(levels[site], datapoints=axis))
                if moved.data_ptr() == value.data_ptr() and moved.stride() == value.stride():
                    same.append(found[-1])
    unique = same if len(same) == 1 else found
    return unique[0] if len(unique) == 1 else None


def given_level(name: str, plate: str, x: Tensor, call: Call, names: Mapping[tuple[str, ...], str]) -> LevelInput:
    """Where an argument lies that the user has said to be one of a plate: datapoints first, then inner plates by dim.

    Raises:
        ValueError: If no level has that plate, or the argument has other numbers of entries.
    """
    structure = call.structure
    if plate in structure.groups:
        if len(x) != structure.frames[plate].size:
            raise ValueError(
                f"Cannot show the encoder {name!r} of shape {tuple(x.shape)} as a value of plate {plate!r} because "
                f"there must be a row for each of its {structure.frames[plate].size} entries; try one of as many rows."
            )
        return LevelInput((plate,), ())
    plates = next((axes for axes, own in names.items() if own == plate), None)
    if plates is None:
        plates = min((axes for axes in names if plate in axes), key=len, default=None)
    if plates is None:
        raise ValueError(
            f"Cannot show the encoder {name!r} as a value of plate {plate!r} because the model has no latents and no "
            f"data in it, inside of plate {structure.datapoints.name!r}; try one of {sorted(names.values())}."
        )
    sizes = [structure.datapoints.size, *(structure.frames[name].size for name in plates)]
    if x.dim() < len(sizes) or any(length not in (1, size) for length, size in zip(x.shape, sizes, strict=False)):
        raise ValueError(
            f"Cannot show the encoder {name!r} of shape {tuple(x.shape)} as a value of plate {plate!r} because its "
            f"first axes should be those of the plates {[structure.datapoints.name, *plates]}, {sizes}; try a function "
            "of the model's arguments that returns it so, encoder_input=lambda ...: {plate: x.movedim(...)}."
        )
    return LevelInput(plates, tuple(range(1, len(sizes))))


def find_levels(guide: Any, call: Call, asked: bool) -> LevelInputs:
    """Where the inputs of a guide's encoder lie.

    Args:
        guide: The guide, which knows what its encoder sees.
        call: Its first call.
        asked: Whether the user has asked for an encoder by level; else plates whose entries are not exchangeable are
            none, and their entries places of their own.

    Raises:
        ValueError: If it is not clear where an input lies.
    """
    model_call, structure = call.of_model(guide.model), call.structure
    trace = probe(model_call.model, call.args, call.kwargs, structure.indices)[0]
    frames, plate = structure.frames, structure.datapoints.name
    every = {name: where.plates for name, where in input_levels(trace, frames, plate, frames).items()}
    candidates = {name for plates in every.values() for name in plates} | inner_plates(structure.layout)
    plates = {name for name in candidates if asked or are_exchangeable(model_call, frames[name])}
    if not asked and not structure.groups and not plates & inner_plates(structure.layout):
        return LevelInputs((), {})
    levels = input_levels(trace, frames, plate, plates)
    seen = [name for name in structure.observed or {} if name not in guide._hidden]
    for name, group in structure.groups.items():
        levels.update({site: LevelInput((name,), (), site=site) for site in group.observed})
        seen += group.observed
    masks = {name: levels[name] for name in guide._present(call)}
    groups = {name: () if group.parent == plate else (group.parent,) for name, group in structure.groups.items()}
    if guide._encoder_input is None:
        return LevelInputs(tuple(levels[name] for name in seen), masks, groups)
    guide._condition(call)
    inputs = guide._plain_inputs(call)
    sites = () if structure.layout is None else structure.layout.sites
    axes = {where.plates for where in levels.values() if where.plates[:1] not in [(name,) for name in groups]}
    axes |= {(), *(tuple(name for name in site.plates if name in plates) for site in sites)}
    known = level_names(axes, plate, frames)
    global_plates = {name: [f.name for f in trace.nodes[name]["cond_indep_stack"]] for name in structure.global_sites}
    named = zip(_named(guide, call), inputs, strict=True)
    found = [_level_of(*name, x, call, levels, known, global_plates) for name, x in named]
    return LevelInputs(tuple(found), masks, groups)


def _named(guide: Any, call: Call) -> list[tuple[str, str | None]]:
    """The names of a guide's inputs, and the plates that they are said to be of."""
    spec = guide._encoder_input
    if callable(spec):
        return [(f"number {i}", plate) for i, (plate, _) in enumerate(by_plate(spec, call))]
    return [(name, guide._encoder_plates.get(name)) for name in ([spec] if isinstance(spec, str) else spec)]


def _level_of(
    name: str,
    plate: str | None,
    x: Tensor,
    call: Call,
    levels: Mapping[str, LevelInput],
    known: Mapping[tuple[str, ...], str],
    global_plates: Mapping[str, Collection[str]],
) -> LevelInput:
    """Where an argument, or a global latent, lies; what the user says of it goes before what its values show."""
    groups = call.structure.groups
    if plate in groups and name in global_plates:
        raise ValueError(
            f"Cannot show the encoder global latent {name!r} as a value of plate {plate!r} because nothing says which "
            f"of its values belongs to which entry of a plate in long format; try {{{known[()]!r}: [{name!r}]}}, which "
            "shows all of them to every datapoint."
        )
    if plate is not None and name in global_plates:
        axes = next(
            (axes for axes, own in known.items() if own == plate), None if plate in known.values() else (plate,)
        )
        within = axes and set(global_plates[name]) & set(axes)
        return LevelInput(axes or (), (), is_flat=bool(within))
    observed = dict(call.structure.observed or {})
    for group in groups.values():
        observed.update(group.observed)
    if plate is not None:
        observed = {
            site: value
            for site, value in observed.items()
            if plate
            == (levels[site].plates[0] if levels[site].plates[:1] == (plate,) else known.get(levels[site].plates))
        }
    where = level_of_argument(x, observed, levels)
    if where is not None:
        return where
    if plate is not None:
        return given_level(name, plate, x, call, known)
    if name in global_plates:
        return LevelInput((), ())
    plates = [*sorted(known.values()), *groups]
    raise ValueError(
        f"Cannot tell which of the plates {plates} the encoder's input {name!r} belongs to because no site alone "
        f"observes it; try a dict, encoder_input={{{plates[0]!r}: [{name!r}]}}, from the name of a plate to what is "
        "known of its entries."
    )


def build_levels(encoder: Any, levels: LevelInputs, inputs: Sequence[Tensor], targets: Sequence[Level]) -> None:
    """Makes the networks of an encoder by level, unless it has them.

    Args:
        encoder: The encoder.
        levels: Where its inputs lie.
        inputs: The inputs and masks, ``(N, *sizes, F)``.
        targets: The levels whose features are wanted.
    """
    if not isinstance(encoder, PlateEncoder) or encoder.is_built:
        return
    if not levels.values:
        raise ValueError(
            "Cannot build a PlateEncoder because no site in the datapoint plate is observed with values; try "
            "encoder_input=... with the name of an argument, or a dict from plate to names."
        )
    widths, count = [x.shape[-1] for x in inputs], len(levels.values)
    sites = [where.site for where in levels.values]
    encoder.build(
        inputs=[where.plates for where in levels.values],
        widths=widths[:count],
        targets={level.name: level.axes for level in targets},
        masks=[where.plates for where in levels.masks.values()],
        mask_widths=widths[count : count + len(levels.masks)],
        masked=[sites.index(name) if name in sites else None for name in levels.masks],
        covariates=[i for i, name in enumerate(sites) if name is None] if any(sites) or levels.masks else [],
        groups=levels.groups,
    )


@torch.no_grad()
def check_tells_apart(guide: Any, encoder: Any, call: Call) -> None:
    """Raises a ValueError if features of datapoints stay the same when entries with latents of their own change places.

    Args:
        guide: The guide, whose encoder it is.
        encoder: A function of the inputs that gives features.
        call: The guide's first call.
    """
    model_call, structure = call.of_model(guide.model), call.structure
    plates = inner_plates(structure.layout)
    trace = probe(model_call.model, call.args, call.kwargs, structure.indices)[0]
    levels = input_levels(trace, structure.frames, structure.datapoints.name, plates)
    inputs = guide._inputs(call)
    features = encoder(inputs)
    if not isinstance(features, Tensor) or features.dim() != 2:
        return
    observed = {name: x for name, x in (structure.observed or {}).items() if name in levels}
    where = [level_of_argument(x, observed, levels) for x in inputs]
    for plate in sorted(plates):
        moved = [_rolled(x, at, plate) for x, at in zip(inputs, where, strict=True)]
        changed = any(not torch.equal(x, y) for x, y in zip(inputs, moved, strict=True))
        if changed and _same(encoder(tuple(moved)), features) and _depends(encoder, inputs, features):
            raise ValueError(
                f"Cannot infer the latents of each entry of plate {plate!r} from features of shape "
                f"{tuple(features.shape)} because the encoder gives the same ones when entries change places: "
                "it cannot tell them apart; try PlateEncoder(), the default, or an encoder that returns a dict from "
                "the name of each plate with latents to features, datapoints first."
            )


def _same(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def _depends(encoder: Any, inputs: tuple[Tensor, ...], features: Tensor) -> bool:
    """Whether an encoder looks at its inputs at all."""
    floating = tuple(x + 1.0 if x.is_floating_point() else x for x in inputs)
    return not _same(encoder(floating), features)


def _rolled(x: Tensor, where: LevelInput | None, plate: str) -> Tensor:
    """An input with the entries of a plate moved by one."""
    if where is None or plate not in where.plates or where.datapoints:
        return x
    axis = where.axes[where.plates.index(plate)]
    return x.roll(1, axis) if -axis < x.dim() else x
