"""What one call of the model looks like: its plates, their indices, its latents and observed values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from pyro_amortized.structure.discrete import DiscreteSite
from pyro_amortized.structure.groups import Group
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.masking import SiteMask
from pyro_amortized.structure.plates import PlateFrame

__all__ = ["Structure"]


@dataclass(frozen=True)
class Structure:
    """What one call of the model looks like.

    Attributes:
        frames: The vectorised plates by name.
        plate: Name of the datapoint plate, or None if the model has no local latents.
        layout: The local latents, or None if there are none.
        global_sites: Names of the global latent sites.
        global_plates: Names of the plates that hold them.
        global_shapes: Their shapes by name, with size 1 at the dimensions of plates.
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
        groups: The plates in long format, whose entries an index ties to the datapoints.
    """

    frames: Mapping[str, PlateFrame]
    plate: str | None
    layout: SiteLayout | None
    global_sites: tuple[str, ...]
    global_plates: tuple[str, ...] = ()
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] | None = None
    enumerated: tuple[str, ...] = ()
    global_weights: Mapping[str, SiteMask] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    discrete: tuple[DiscreteSite, ...] = ()
    data_plates: tuple[str, ...] = ()
    depth: int = 0
    data: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    groups: Mapping[str, Group] = field(default_factory=dict)
    global_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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

    @property
    def has_observations(self) -> bool:
        """Whether anything is observed of the datapoints in this call; known where the model has run in it."""
        observed = [self.observed or {}, *(group.observed for group in self.groups.values())]
        return any(name not in self.missing for values in observed for name in values)

    @cached_property
    def latents(self) -> frozenset[str]:
        """Names of the latents that a guide draws."""
        local = [site.name for site in self.layout.sites] if self.layout is not None else []
        return frozenset([*self.global_sites, *local, *(site.name for site in self.discrete)])

    def amortizing(self, plate: str, index: str = "...") -> str:
        """The guide that would amortize the latents of a plate in which no data lie."""
        groups = "" if self.plate in (None, plate) else f", groups={{{self.plate!r}: {index}}}"
        index = f", with the index that ties entries of {self.plate!r} to it" if groups and index == "..." else ""
        return f"AmortizedGuide(model, plate={plate!r}{groups}){index}"

    def worked_out(self) -> Structure:
        """This structure, with what every call asks of it worked out."""
        _ = self.is_fixed, self.latent_plates, self.random_plates, self.weights
        return self

    def holding(
        self, indices: Mapping[str, Tensor], observed: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Structure:
        """The structure with other values, and with all that has been worked out of it, which is the same for them."""
        found = object.__new__(Structure)
        found.__dict__.update(self.__dict__, indices=indices, observed=observed, present=present)
        return found

    def without_tensors(self) -> Structure:
        """The structure without indices and observed values, which may be kept without keeping data alive."""
        return replace(self, indices={}, observed=None, present={}, groups={})

    def check_same(self, other: Structure, *, plates: Collection[str] = (), by_step: bool = False) -> None:
        """Raises a ValueError naming what changed if ``other``, found in a later call, has other latents.

        Args:
            other: The structure of a later call.
            plates: Names of inner plates whose numbers of entries may differ.
            by_step: Whether the number of steps of sites numbered alike may differ.
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
            self.layout.check_same(other.layout, plates=plates, by_step=by_step)
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
    def weights(self) -> dict[str, SiteMask]:
        """Masks and scales of the latents to which the model gives any of its own accord."""
        weights = {site.name: site.weight for site in self.layout.sites} if self.layout is not None else {}
        weights.update({site.name: site.weight for site in self.discrete})
        return {**self.global_weights, **{name: weight for name, weight in weights.items() if not weight.is_neutral}}

    @property
    def is_weighted(self) -> bool:
        """Whether the model masks or scales latents of its own accord."""
        return bool(self.weights)

    @cached_property
    def random_plates(self) -> list[str]:
        """Plates whose indices are drawn anew in every run."""
        return [name for name, frame in self.frames.items() if frame.kind == "random"]
