"""The structure of one call, read off a run of the model: its plates, their indices, its latents and observed values.

The model runs once in every call, without log-probabilities. Only where the user has said what the encoder sees, so
that no observed values are asked for, is the run spared, and repeated now and then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.discrete import DiscreteSite, discrete_sites
from pyro_amortized.layout import SiteLayout, bounds, datapoint_plate, is_data, is_enumerated, latent_sites
from pyro_amortized.periodic import check_periodic
from pyro_amortized.tracing import (
    PlateFrame,
    batch_depth,
    call_key,
    probe,
    sample_sites,
    subsample_indices,
    untouched,
    versions,
)
from pyro_amortized.weights import NEUTRAL, SiteWeight, site_weight

__all__ = ["Structure", "StructureReader", "check_observed", "check_steady", "observed_values"]


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
        observed: Observed values in the datapoint plate by site, each of shape ``(N, ...)``, for the indices at hand;
            None if the model has not run in this call.
        enumerated: Names of the discrete latent sites that the model sums out.
        global_weights: Masks and scales of the global latent sites that have any.
        discrete: The discrete local latents that the guide draws itself.
        present: Which of the observed values are not masked, by site, ``(N, ...)``, for sites that are masked.
        data_plates: Names of further plates, of which the call has a subsample, with observed values of the datapoints.
        depth: Number of batch dimensions of the model's sites, in plates or outside of all.
        data: Names of the sites that are observed.
        missing: Those of them that are latent in this call, which asks for predictions of them.
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
    depth: int = 0
    data: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def datapoints(self) -> PlateFrame:
        """The datapoint plate of a structure that has local latents."""
        return self.frames[self.plate]  # type: ignore[index]

    @property
    def positions(self) -> Tensor | None:
        """Positions of the datapoints in the full data set, ``(N,)``.

        None if the plate holds all of them, or the model gives it data in place of indices.
        """
        index = self.indices.get(self.datapoints.name)
        return None if index is None or index.dim() != 1 or index.is_floating_point() else index

    @cached_property
    def latents(self) -> frozenset[str]:
        """Names of the latents that a guide draws."""
        local = [site.name for site in self.layout.sites] if self.layout is not None else []
        return frozenset([*self.global_sites, *local, *(site.name for site in self.discrete)])

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
        turned = [name for name in self.data if name in other.latents - {site.name for site in other.discrete}]
        if turned:
            raise ValueError(
                f"Cannot run this guide because sites {turned} are latent in this call and were observed when it was "
                "set up; try the data that the model observes, or for predictions pyro.infer.Predictive(model, "
                "guide=guide, num_samples=...)."
            )
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

    def difference(self, other: Structure, *, weights: bool = True) -> str | None:
        """What of a later call's structure is another, in words, with masks and scales or without; None if nothing."""
        for (what, before), (_, after) in zip(self._description, other._description, strict=True):
            if before != after and (weights or not what.startswith("masks")):
                return f"{what} {before} have become {after}"
        return None

    @cached_property
    def _description(self) -> list[tuple[str, Any]]:
        """What a guide depends on, in words that can be compared."""
        weights = {n: "masked" if weight.is_masked else f"scale {weight.scale}" for n, weight in self.weights.items()}
        return [
            ("plates", [(f.name, f"dim {f.dim}", f"{f.size} of {f.full_size}", f.kind) for f in self.frames.values()]),
            ("datapoints", self.plate),
            ("local latents", None if self.layout is None else self.layout.description),
            ("global latents", [*self.global_sites]),
            ("enumerated latents", [*self.enumerated]),
            ("discrete latents", [(site.name, site.kind, site.num_categories) for site in self.discrete]),
            ("masks and scales of latents", weights),
        ]

    @cached_property
    def is_fixed(self) -> bool:
        """Whether nothing but the shapes of the arguments may decide it: no subsample, mask, scale or bounds."""
        subsampled = any(frame.subsampled for frame in self.frames.values())
        return self.is_static and not self.is_weighted and not subsampled and not self.missing

    @cached_property
    def latent_plates(self) -> tuple[str, ...]:
        """Names of the plates that hold latent sites, or say which data there are; a guide opens no others."""
        local: list[str] = []
        if self.layout is not None or self.discrete:
            sites = (*(self.layout.sites if self.layout is not None else ()), *(d.logits for d in self.discrete))
            random = [name for name in self.data_plates if self.frames[name].kind == "random"]
            local = [self.datapoints.name, *(name for site in sites for name in site.inner_plates), *random]
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


def _check_bounds(first: Structure, second: Structure) -> None:
    """Raises a ValueError if the support of a local latent differs between two runs with the same arguments."""
    for site, again in zip(first.layout.sites, second.layout.sites, strict=True) if first.layout else ():  # type: ignore[union-attr]
        pairs = zip(bounds(site.transform), bounds(again.transform), strict=True)
        if not all(torch.equal(before, after) for before, after in pairs):
            raise ValueError(
                f"Cannot guide local site {site.name!r} because its support depends on other latents; try a latent of "
                "fixed support and a deterministic function of it, such as a fraction of the interval."
            )


def _check_weights(first: Structure, second: Structure) -> None:
    """Raises a ValueError if the mask or the scale of a latent differs between two runs with the same arguments."""
    for name in first.weights.keys() | second.weights.keys():
        before, after = (structure.weights.get(name, NEUTRAL) for structure in (first, second))
        if not before.same_as(after):
            raise ValueError(
                f"Cannot guide latent {name!r} because its mask or scale depends on other latents or is drawn at "
                "random; try a mask that is an argument of the model, or sampling the latent everywhere and using it "
                "where it is wanted."
            )


def _check_observed_again(first: Structure, second: Structure) -> None:
    """Raises a ValueError if observed values differ between two runs with the same arguments and random numbers."""
    for name, value in (first.observed or {}).items():
        again = (second.observed or {}).get(name)
        if again is None or value.shape != again.shape or not torch.allclose(value, again, 0.0, 0.0, equal_nan=True):
            raise ValueError(
                f"Cannot guide this model because it observes other values of site {name!r} each time that it runs, so "
                "that a guide would see other data than the model; try data that are an argument of the model instead "
                "of the next ones of an iterator."
            )


_NUM_LOOKS = 3
"""Further runs of a model, with other random numbers, to see whether it looks the same in every run."""


def check_steady(
    reader: StructureReader, first: Structure, model: Callable[..., Any], args: Any, kwargs: Any, *, observed: bool
) -> None:
    """Looks at a model some times more, with the same and with other random numbers.

    Args:
        reader: What looks.
        first: What was seen with the generators as they are.
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        observed: Whether the observed values matter.

    Raises:
        ValueError: If the model has another structure then, or observes other values with the same random numbers.
    """
    again = reader.look(model, args, kwargs, first.indices)
    if observed:
        _check_observed_again(first, again)
    for seed in range(_NUM_LOOKS):
        changed = first.difference(again, weights=False)
        if changed is not None:
            raise ValueError(
                f"Cannot guide this model because {changed} when it runs again with the same arguments, at other "
                "values of its latents or other random numbers; try a structure that its arguments decide."
            )
        _check_bounds(first, again)
        _check_weights(first, again)
        with untouched():
            pyro.set_rng_seed(seed)
            again = reader.look(model, args, kwargs, first.indices)


def observed_values(
    trace: Trace, frame: PlateFrame, missing: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The observed values in a plate by site, datapoints first, each of shape ``(N, ...)``.

    Masked values are replaced by zeros.

    Args:
        trace: A run of the model.
        frame: The plate.
        missing: Names of sites whose values in this run are no data: all of them count as masked.

    Returns:
        The values, and which of them are not masked for the sites that have a mask.
    """
    values, masks = {}, {}
    for name, site in sample_sites(trace).items():
        if is_data(site) and any(f.name == frame.name for f in site["cond_indep_stack"]):
            value = torch.as_tensor(site["value"])
            present = site_weight(site).present if name not in missing else torch.zeros_like(value, dtype=torch.bool)
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


@dataclass
class _Known:
    """What the calls with arguments of equal shapes have looked like.

    Attributes:
        structure: Their structure, without tensors.
        calls: Their number.
        agreed: The last of them in which the model was looked at.
    """

    structure: Structure
    calls: int = 1
    agreed: int = 1

    @property
    def is_due(self) -> bool:
        """Whether the next call is the second, third, fifth, ninth, ..., and then every 64th."""
        return self.calls & (self.calls - 1) == 0 if self.calls <= _MAX_SPARED else self.calls % _MAX_SPARED == 0


_MAX_SPARED = 64
"""Calls from one look at the model to the next, at most."""


class StructureReader:
    """Reads the structure of a call off a run of the model.

    Where the user has promised that arguments of equal shapes have equal structure, the run is spared after the first
    such call, and repeated in the second, third, fifth, ninth, ... and then in every 64th to check the promise. Masked,
    scaled and subsampled models, and those whose latents have bounds of their own, run in every call.

    Args:
        plate: The datapoint plate that the user asked for, or None.
        discrete: Whether the guide draws discrete local latents itself.
        promised: Whether the structure depends on the shapes of the arguments, and values that are no tensors, alone.
        encodes: Whether observed values are needed: latents of plates that have none count as global.
        max_size: Number of structures kept.
    """

    def __init__(
        self,
        plate: str | None = None,
        *,
        discrete: bool = False,
        promised: bool = False,
        encodes: bool = False,
        max_size: int = 128,
    ) -> None:
        self.requested_plate = plate
        self.discrete = discrete
        self.promised = promised
        self.encodes = encodes
        self.max_size = max_size
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._drawn: OrderedDict[Any, Structure] = OrderedDict()
        self._parameters: list[str] | None = None

    def clear(self) -> None:
        """Forgets all structures: the model is another one."""
        self._known.clear()
        self._drawn.clear()
        self._parameters = None

    def foresee(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure | None:
        """What a call will look like if it draws a random subsample as the last one with arguments like these did.

        It spares a look: the guide's plates draw their indices first, and the model is looked at with these, once. That
        look tells whether the structure is what was foreseen.
        """
        return self._drawn.get(call_key((args, dict(kwargs))))

    def look_as_foreseen(
        self, foreseen: Structure, model: Callable[..., Any], args: Any, kwargs: Any, indices: Mapping[str, Tensor]
    ) -> Structure:
        """Looks at a call with the indices that the foreseen plates have drawn.

        Raises:
            ValueError: If the plates are other ones than those foreseen; only once, the next call looks first.
        """
        try:
            structure = self.look(model, args, kwargs, indices)
        except ValueError:  # Pyro's, where the number of indices is another
            structure = self.look(model, args, kwargs)
            if structure.frames == foreseen.frames:
                raise
        if structure.frames != foreseen.frames:
            self._drawn.clear()
            raise ValueError(
                f"Cannot use the subsample that this call has drawn because {foreseen.difference(structure)} since the "
                "last call with arguments of the same shapes; try again: the next call looks at the model first."
            )
        return structure

    def read(
        self,
        model: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        data: Collection[str] = (),
    ) -> Structure:
        """The structure of a call; without observed values where the run is spared.

        Args:
            model: The model, or None if it is not at hand (a guide loaded from a file).
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            data: As for :meth:`look`.

        Raises:
            ValueError: If the structure cannot be known, is one that no guide can serve, or is another than that of an
                earlier call where it was promised to be the same.
        """
        key = call_key((args, dict(kwargs))) if self.promised and (args or kwargs) else None
        known = None if key is None else self._known.get(key)
        if known is not None and not (known.is_due and model is not None):
            known.calls += 1
            return known.structure
        if model is None:
            raise ValueError(
                "Cannot run a guide that was loaded without its model, but for one with an encoder_input=... on "
                "arguments of shapes that it has seen, because the model shows what a call looks like; try "
                "`guide.model = model`."
            )
        structure = self.look(model, args, kwargs, data=data)
        if known is not None:
            self._check_promise(key, known, structure)
        elif key is not None and structure.is_fixed:
            self._keep(self._known, key, _Known(structure.without_tensors()))
        explicit = any(frame.kind == "explicit" for frame in structure.frames.values())
        foreseeable = structure.is_static and not structure.is_weighted and not structure.missing
        if structure.random_plates and foreseeable and not explicit:
            key = call_key((args, dict(kwargs)))
            if key is not None:
                self._keep(self._drawn, key, structure.without_tensors())
        return structure

    def _keep(self, known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        known[key] = value
        if len(known) > self.max_size:
            known.popitem(last=False)

    def _check_promise(self, key: Any, known: _Known, structure: Structure) -> None:
        """Goes on trusting what is known of calls with a key, or trusts no promise any more and says so."""
        known.calls += 1
        changed = known.structure.difference(structure)
        if changed is None:
            known.agreed = known.calls
            self._known.move_to_end(key)
            return
        self.promised = False
        self.clear()
        raise ValueError(
            f"Cannot use what earlier calls have shown of the model because {changed} for arguments of the same "
            "shapes, and encoder_input=... promises that the structure depends on these alone. Of the calls with such "
            f"arguments those since number {known.agreed + 1} may have given wrong results; in number {known.agreed} "
            "the model was last looked at. Try again: from now on this guide looks at the model in every call, as with "
            "encoder_input=None; or make what changes an argument of the model."
        )

    def look(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, Tensor] | None = None,
        data: Collection[str] = (),
    ) -> Structure:
        """Runs the model once and reads the structure off the run.

        Args:
            model: A Pyro model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            values: Values to give to sites, such as the indices of a plate.
            data: Names of sites that are no latents even where they are not observed: those to be predicted.

        Raises:
            ValueError: If the structure is one that no guide can serve, or the model changes its arguments.
        """
        before = versions((args, kwargs))
        trace, frames = probe(model, args, kwargs, values, first=self._parameters is None)
        parameters = trace.param_nodes
        self._parameters = (
            parameters if self._parameters in (None, parameters) else None
        )  # other modules: the next is first
        if versions((args, kwargs)) != before:
            raise ValueError(
                "Cannot guide a model that changes its arguments in place because guide and model would see different "
                "data; try x = x.clone() at its beginning."
            )
        missing = tuple(name for name, site in latent_sites(trace).items() if name in data)
        for name in missing:
            trace.nodes[name]["is_observed"] = True
        plate = datapoint_plate(trace, frames, self.requested_plate, encodes=self.encodes)
        discrete = discrete_sites(trace, frames, plate) if self.discrete and plate is not None else ()
        local = {site.name for site in discrete}
        layout = None if plate is None else SiteLayout.from_trace(trace, frames, plate, local)
        if layout is not None and not layout.sites:
            layout = None
        local |= set() if layout is None else {site.name for site in layout.sites}
        global_sites = {name: site for name, site in latent_sites(trace).items() if name not in local}
        for name, site in global_sites.items():
            check_periodic(name, site)
        observed, present = ({}, {}) if plate is None else observed_values(trace, frames[plate], missing)
        weights = {name: site_weight(site).simplified for name, site in global_sites.items()}
        return Structure(
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
            data_plates=_subsampled_data_plates(trace, frames, plate),
            depth=batch_depth(trace, frames),
            data=tuple(name for name, site in sample_sites(trace).items() if is_data(site)),
            missing=missing,
            enumerated=tuple(
                name for name, site in sample_sites(trace).items() if not site["is_observed"] and is_enumerated(site)
            ),
        )


def _subsampled_data_plates(trace: Trace, frames: Mapping[str, PlateFrame], plate: str | None) -> tuple[str, ...]:
    stacks = [[f.name for f in site["cond_indep_stack"]] for site in sample_sites(trace).values() if is_data(site)]
    names = [name for stack in stacks if plate in stack for name in stack if frames[name].size < frames[name].full_size]
    return tuple(dict.fromkeys(name for name in names if name != plate))
