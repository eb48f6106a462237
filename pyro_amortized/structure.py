"""The structure of one call: its plates, their indices and the observed values, with as few model runs as possible.

The first call with arguments of given shapes runs the model once without log-probabilities. The result is kept for
later calls of equal shapes unless the run read values of tensors in Python, and no further run is needed where all that
is asked for (indices of subsampled plates, observed values) is found among the arguments.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.discrete import DiscreteSite, discrete_sites
from pyro_amortized.guards import Guard, guards, undisturbed
from pyro_amortized.layout import SiteLayout, bounds, datapoint_plate, is_data, is_enumerated, latent_sites
from pyro_amortized.tracing import (
    PlateFrame,
    Source,
    ValueReads,
    call_key,
    find_source,
    probe,
    read_source,
    sample_sites,
    subsample_indices,
    versions,
    without_floats,
)
from pyro_amortized.weights import NEUTRAL, SiteWeight, site_weight

__all__ = ["Structure", "StructureCache", "check_bounds", "check_observed", "check_weights", "observed_values"]


@dataclass(frozen=True)
class Structure:
    """What one call of the model looks like.

    Attributes:
        frames: The vectorised plates by name.
        plate: Name of the datapoint plate, or None if the model has no local latents.
        layout: The local latents, or None if there are none.
        global_sites: Names of the global latent sites.
        global_plates: Names of the plates that hold them.
        indices: Indices of the explicitly subsampled plates.
        observed: Observed values in the datapoint plate by site, each of shape ``(N, ...)``; None if they were not
            asked for, or cannot be known before a random subsample is drawn.
        enumerated: Names of the discrete latent sites that the model sums out.
        global_weights: Masks and scales of the global latent sites that have any.
        discrete: The discrete local latents that the guide draws itself.
        present: Which of the observed values are not masked, by site, ``(N, ...)``, for sites that are masked.
        data_plates: Names of further plates, drawn at random, that hold observed values of the datapoints.
    """

    frames: Mapping[str, PlateFrame]
    plate: str | None
    layout: SiteLayout | None
    global_sites: tuple[str, ...]
    global_plates: tuple[str, ...] = ()
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] | None = None
    enumerated: tuple[str, ...] = ()
    global_weights: Mapping[str, SiteWeight] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    discrete: tuple[DiscreteSite, ...] = ()
    data_plates: tuple[str, ...] = ()

    @property
    def datapoints(self) -> PlateFrame:
        """The datapoint plate of a structure that has local latents."""
        return self.frames[self.plate]  # type: ignore[index]

    def without_tensors(self) -> Structure:
        """The structure without indices and observed values, which may be kept without keeping data alive."""
        return replace(self, indices={}, observed=None, present={})

    def check_same(self, other: Structure, *, per_step: bool = False) -> None:
        """Raises a ValueError naming what changed if ``other``, found in a later call, has other latents.

        Args:
            other: The structure of a later call.
            per_step: Whether the number of steps of sites numbered alike may differ.
        """
        remedy = "try the same structure in every call, or one guide per structure."
        if self.layout is not None and other.layout is not None:
            self.layout.check_same(other.layout, per_step=per_step)
        elif self.layout is not other.layout:
            before, now = ("some", "none") if other.layout is None else ("none", "some")
            raise ValueError(
                f"Cannot run this guide because the model now has {now} local latents and had {before} when the guide "
                f"was set up; {remedy}"
            )
        changed = sorted(set(self.global_sites) ^ set(other.global_sites))
        if changed:
            raise ValueError(
                f"Cannot run this guide because global latent sites {changed} have appeared or disappeared since it "
                f"was set up; {remedy}"
            )

    @cached_property
    def latent_plates(self) -> tuple[str, ...]:
        """Names of the plates that hold latent sites, or say which data there are; a guide opens no others."""
        local: list[str] = []
        if self.layout is not None or self.discrete:
            sites = (*(self.layout.sites if self.layout is not None else ()), *(d.logits for d in self.discrete))
            local = [self.datapoints.name, *(name for site in sites for name in site.plates), *self.data_plates]
        return tuple(dict.fromkeys([*self.global_plates, *local]))

    @cached_property
    def is_static(self) -> bool:
        """Whether no local latent has a support with bounds of its own."""
        return self.layout is None or all(site.is_static for site in self.layout.sites)

    @cached_property
    def weights(self) -> dict[str, SiteWeight]:
        """Masks and scales of the latents to which the model gives any of its own accord."""
        weights = {site.name: site.weight for site in self.layout.sites} if self.layout is not None else {}
        weights.update({site.name: site.weight for site in self.discrete})
        return {**self.global_weights, **{name: weight for name, weight in weights.items() if weight is not NEUTRAL}}

    @property
    def is_weighted(self) -> bool:
        """Whether the model masks or scales latents of its own accord."""
        return bool(self.weights)

    @cached_property
    def random_plates(self) -> list[str]:
        """Plates whose indices are drawn anew in every run."""
        return [name for name, frame in self.frames.items() if frame.kind == "random"]


def check_bounds(first: Structure, second: Structure) -> None:
    """Raises a ValueError if the support of a local latent differs between two runs with the same arguments."""
    for site, again in zip(first.layout.sites, second.layout.sites, strict=True) if first.layout else ():  # type: ignore[union-attr]
        pairs = zip(bounds(site.transform), bounds(again.transform), strict=True)
        if not all(torch.equal(before, after) for before, after in pairs):
            raise ValueError(
                f"Cannot guide local site {site.name!r} because its support depends on other latents; try a latent of "
                "fixed support and a deterministic function of it, such as a fraction of the interval."
            )


def check_weights(first: Structure, second: Structure) -> None:
    """Raises a ValueError if the mask or the scale of a latent differs between two runs with the same arguments."""
    for name in first.weights.keys() | second.weights.keys():
        before, after = (structure.weights.get(name, NEUTRAL) for structure in (first, second))
        if not before.same_as(after):
            raise ValueError(
                f"Cannot guide latent {name!r} because its mask or scale depends on other latents or is drawn at "
                "random; try a mask that is an argument of the model, or sampling the latent everywhere and using it "
                "where it is wanted."
            )


def observed_values(trace: Trace, frame: PlateFrame) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The observed values in a plate by site, datapoints first, each of shape ``(N, ...)``.

    Masked values are replaced by zeros.

    Returns:
        The values, and which of them are not masked for the sites that have a mask.
    """
    values, masks = {}, {}
    for name, site in sample_sites(trace).items():
        if is_data(site) and any(f.name == frame.name for f in site["cond_indep_stack"]):
            value = torch.as_tensor(site["value"])
            present = site_weight(site).present
            if value.numel() > 0 and present is not None:
                value, present = torch.broadcast_tensors(value, present)
                value = value.masked_fill(~present, 0)
                masks[name] = _datapoints_first(present, frame, site["fn"].event_dim)
            if value.numel() > 0:
                values[name] = _datapoints_first(value, frame, site["fn"].event_dim)
    return values, masks


def _datapoints_first(value: Tensor, frame: PlateFrame, event_dim: int) -> Tensor:
    axis = value.dim() - event_dim + frame.dim
    if axis < 0 or value.shape[axis] != frame.size:
        value = value.expand(torch.broadcast_shapes(value.shape, (frame.size,) + (1,) * (event_dim - frame.dim - 1)))
        axis = value.dim() - event_dim + frame.dim
    return value if axis == 0 else value.movedim(axis, 0)


def check_observed(trace: Trace) -> None:
    """Raises a ValueError naming the site and the datapoints if observed values are NaN.

    Masked ones too: their log-probability is left out, but its derivative is NaN all the same.
    """
    for name, site in sample_sites(trace).items():
        value = site["value"]
        if not is_data(site) or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        missing = value.isnan()
        if missing.any():
            rows = missing.reshape(len(value), -1).any(-1).nonzero().squeeze(-1).tolist() if value.dim() else []
            raise ValueError(
                f"Cannot infer latents because observed site {name!r} holds {int(missing.sum())} NaN values "
                f"(first rows: {rows[:5]}); try dropping or imputing them, or mask them in the model: "
                "`dist.Normal(...).mask(~x.isnan())` with obs=torch.nan_to_num(x), filled in."
            )


@dataclass(frozen=True)
class _Template:
    """A structure without its tensors, and where in the arguments to find them.

    Attributes:
        structure: The structure.
        indices: Where the indices of explicitly subsampled plates lie.
        observed: Where the observed values lie, and their number of event dimensions.
        guards: What the model could reach; None in a guide that was loaded, or copied.
        is_unique: Whether arguments like these have had no other structure before.
    """

    structure: Structure
    indices: Mapping[str, Source | None]
    observed: Mapping[str, tuple[Source, int] | None]
    guards: list[Guard] | None
    is_unique: bool = True

    def is_like(self, other: _Template) -> bool:
        """Whether another one, of the same arguments, describes the same."""
        same = self.structure.frames == other.structure.frames and self.indices == other.indices
        return self.is_unique and same and self.observed == other.observed

    def holds(self) -> bool:
        """Whether the model's Python state is what it was."""
        return self.guards is not None and all(guard.holds() for guard in self.guards)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "guards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


_MAX_WATCHED = 8
"""Watched runs in a row that showed nothing for the next call, after which runs are no longer watched."""


class StructureCache:
    """Finds the structure of a call, from what earlier calls showed where that is certain.

    That is the case where arguments have equal shapes, the model let no values of tensors decide anything, masks and
    scales no latents, and can reach no other Python objects than it could then.

    Args:
        plate: The datapoint plate that the user asked for, or None.
        discrete: Whether the guide draws discrete local latents itself.
        max_size: Number of structures kept.
    """

    def __init__(self, plate: str | None = None, *, discrete: bool = False, max_size: int = 128) -> None:
        self.requested_plate = plate
        self.discrete = discrete
        self.max_size = max_size
        self._templates: OrderedDict[Any, _Template] = OrderedDict()
        self._watched: OrderedDict[Any, tuple[float, int]] = OrderedDict()
        self._calls = 0

    def clear(self) -> None:
        """Forgets all structures: the model is another one."""
        self._templates.clear()
        self._watched.clear()

    def find(
        self,
        model: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        observed: bool,
        indices: Mapping[str, Tensor] | None = None,
    ) -> Structure:
        """The structure of a call.

        Args:
            model: The model, or None if it is not at hand (a guide loaded from a file).
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            observed: Whether the observed values are asked for.
            indices: Indices of plates that the model draws at random, once they are known.

        Raises:
            ValueError: If the structure cannot be known, or is one that no guide can serve.
        """
        self._calls += 1
        key = call_key((args, dict(kwargs))) if args or kwargs else None  # without arguments all data are elsewhere
        template = self._templates.get(key)
        if template is not None and not (template.is_unique if model is None else template.holds()):
            template = None
        if template is not None:
            self._templates.move_to_end(key)
            local = template.structure.layout is not None or self.discrete
            structure = _fill(template, (args, kwargs), observed and local, indices or {})
            if structure is not None:
                return structure
        if model is None:
            raise ValueError(
                "Cannot run a guide that was loaded without its model on arguments of new shapes, or of shapes with "
                "which the model's structure has varied, because guides are saved without their model; try "
                "`guide.model = model`."
            )
        watch = key is not None and template is None and self._worth_watching(key)
        before = _state(model) if watch else None
        structure, trace, reads = self.look(model, args, kwargs, indices, watch=before is not None)
        after = None if before is None else _state(model)
        if before is not None and after is not None:
            self._keep(key, structure, trace, reads, undisturbed(before, after), (args, kwargs))
        drawn = indices is None and structure.random_plates
        return replace(structure, observed=None) if drawn else structure

    def _worth_watching(self, key: Any) -> bool:
        """Whether a run may show something that holds for further calls; not if that has failed many times in a row."""
        key = without_floats(key)
        count, last = self._watched.get(key, (0, 0))
        count = count + 1 if self._calls - last <= 2 or count == math.inf else 1
        self._watched[key] = (count, self._calls)
        if len(self._watched) > self.max_size:
            self._watched.popitem(last=False)
        return count <= _MAX_WATCHED

    def _keep(
        self, key: Any, structure: Structure, trace: Trace, reads: ValueReads, state: list[Guard], arguments: Any
    ) -> None:
        """Keeps what a run showed, if it will hold for calls with the same key."""
        before = self._templates.pop(key, None)
        if reads.seen or not structure.is_static or structure.is_weighted:
            self._watched[without_floats(key)] = (math.inf, self._calls)
            return
        template = _template(structure, trace, arguments, reads, state)
        self._templates[key] = (
            template if before is None or before.is_like(template) else replace(template, is_unique=False)
        )
        if len(self._templates) > self.max_size:
            self._templates.popitem(last=False)

    def look(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, Tensor] | None = None,
        *,
        watch: bool = False,
    ) -> tuple[Structure, Trace, ValueReads]:
        """Runs the model once and reads the structure off the run; arguments and results as for :func:`probe`.

        Raises:
            ValueError: If the structure is one that no guide can serve, or the model changes its arguments.
        """
        before = versions((args, kwargs))
        trace, frames, reads = probe(model, args, kwargs, values, watch=watch)
        if versions((args, kwargs)) != before:
            raise ValueError(
                "Cannot guide a model that changes its arguments in place because guide and model would see different "
                "data; try x = x.clone() at its beginning."
            )
        plate = datapoint_plate(trace, frames, self.requested_plate)
        discrete = discrete_sites(trace, frames, plate) if self.discrete and plate is not None else ()
        local = {site.name for site in discrete}
        layout = None if plate is None else SiteLayout.from_trace(trace, frames, plate, local)
        if layout is not None and not layout.sites:
            layout = None
        local |= set() if layout is None else {site.name for site in layout.sites}
        global_sites = {name: site for name, site in latent_sites(trace).items() if name not in local}
        observed, present = ({}, {}) if plate is None else observed_values(trace, frames[plate])
        weights = {name: site_weight(site) for name, site in global_sites.items()}
        structure = Structure(
            frames=frames,
            plate=plate,
            layout=layout,
            global_sites=tuple(global_sites),
            global_plates=tuple({f.name for site in global_sites.values() for f in site["cond_indep_stack"]}),
            indices=subsample_indices(trace, frames),
            observed=observed,
            present=present,
            discrete=discrete,
            global_weights={name: weight for name, weight in weights.items() if weight is not NEUTRAL},
            data_plates=_random_data_plates(trace, frames, plate),
            enumerated=tuple(
                name for name, site in sample_sites(trace).items() if not site["is_observed"] and is_enumerated(site)
            ),
        )
        return structure, trace, reads


def _state(model: Callable[..., Any]) -> list[Guard] | None:
    """What the model can reach; None if that cannot be watched."""
    with suppress(ValueError):
        return list(guards(model))
    return None


def _random_data_plates(trace: Trace, frames: Mapping[str, PlateFrame], plate: str | None) -> tuple[str, ...]:
    stacks = [[f.name for f in site["cond_indep_stack"]] for site in sample_sites(trace).values() if is_data(site)]
    names = [name for stack in stacks if plate in stack for name in stack if frames[name].kind == "random"]
    return tuple(dict.fromkeys(name for name in names if name != plate))


def _template(structure: Structure, trace: Trace, arguments: Any, reads: ValueReads, guarded: list[Guard]) -> _Template:
    explicit = [name for name, frame in structure.frames.items() if frame.kind == "explicit"]
    indices = {name: find_source(structure.indices[name], arguments) for name in explicit}
    drawn = {name: trace.nodes[name]["value"] for name in structure.frames if name in trace.nodes}
    plates = {name: index for name, index in drawn.items() if isinstance(index, Tensor)}
    observed = {}
    for name in structure.observed or {}:
        site: Any = trace.nodes[name]
        source = None
        if isinstance(site["value"], Tensor) and name not in structure.present:
            source = find_source(site["value"], arguments, reads.rows, plates)
        observed[name] = None if source is None else (source, site["fn"].event_dim)
    return _Template(structure.without_tensors(), indices, observed, guarded)


def _fill(template: _Template, arguments: Any, observed: bool, drawn: Mapping[str, Tensor]) -> Structure | None:
    """The structure of a call like an earlier one, or None if the model must run again to know it."""
    structure = template.structure
    if not template.indices and not observed:
        return replace(structure, indices=drawn) if drawn else structure
    indices, values = dict(drawn), {}
    for name, source in template.indices.items():
        if source is None:
            return None
        if name not in drawn:
            indices[name] = read_source(source, arguments)
    if observed and not indices.keys() >= set(structure.random_plates):  # values are known once the plates are drawn
        return replace(structure, indices=indices)
    for name, place in template.observed.items() if observed else ():
        if place is None:
            return None
        source, event_dim = place
        value = read_source(source, arguments, _rows_of_plates(structure, indices) if source.rows else None)
        values[name] = _datapoints_first(value, structure.datapoints, event_dim)
    filled = object.__new__(Structure)  # keeps what has been computed of the structure already
    filled.__dict__.update(structure.__dict__, indices=indices, observed=values if observed else None)
    return filled


def _rows_of_plates(structure: Structure, indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Indices of all plates, whole ones too."""
    sizes = {name: frame.size for name, frame in structure.frames.items() if name not in indices}
    return {**indices, **{name: torch.arange(size) for name, size in sizes.items()}}
