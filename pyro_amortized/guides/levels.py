"""The levels of a guide's latents: which of them share a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_amortized.families import VariationalFamily
from pyro_amortized.inference.sharing import STEP, Arrangement, Level, SharedHeads, arrange
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.structure import Structure

__all__ = ["Sharing", "inner_plates", "level_names", "levels_of", "refuse_sharing"]

_MAX_SIZES = 128
"""How many numbers of entries to keep arrangements of."""


def inner_plates(layout: SiteLayout | None) -> set[str]:
    """Names of the plates inside the datapoint plate that hold latents."""
    return set() if layout is None else {name for site in layout.sites for name in site.inner_plates}


def level_names(levels: Collection[tuple[str, ...]], plate: str, frames: Collection[str]) -> dict[tuple[str, ...], str]:
    """Names of levels: that of their innermost plate, or where several have the same one, of all their plates.

    Args:
        levels: The plates of each, none for the datapoint's own level.
        plate: Name of the datapoint plate, which is that of its level.
        frames: Names of all plates, outermost first.
    """
    order = list(frames)
    innermost = {axes: max(axes, key=order.index) if axes else plate for axes in levels}
    several = [name for name in innermost.values() if list(innermost.values()).count(name) > 1]
    return {axes: "/".join(axes) if len(axes) > 1 and name in several else name for axes, name in innermost.items()}


def levels_of(structure: Structure, plates: Collection[str], by_step: bool = False) -> tuple[Level, ...]:
    """The levels of a structure's local latents, coarsest first.

    Args:
        structure: The structure.
        plates: Names of the inner plates whose entries share a head; entries of others are places of their own.
        by_step: Whether sites are numbered by time, and steps share a head too.
    """
    layout = structure.layout
    parts: dict[tuple[str, ...], dict[str, list[Tensor]]] = {}
    for site in layout.sites:  # type: ignore[union-attr]
        axes, positions = _positions(site, plates)
        step = re.search(r"\d*$", site.name).group() if by_step else ""  # type: ignore[union-attr]
        parts.setdefault(axes, {}).setdefault(step, []).append(positions)
    names = level_names(parts, structure.datapoints.name, structure.frames)
    levels = []
    for axes in sorted(parts, key=len):
        steps = [torch.cat(step, -1) for step in parts[axes].values()]
        positions = torch.stack(steps, -2) if by_step else steps[0]
        levels.append(Level(names[axes], (*axes, STEP) if by_step else axes, positions))
    return tuple(levels)


def _positions(site: LocalSite, plates: Collection[str]) -> tuple[tuple[str, ...], Tensor]:
    """The plates of a site that are levels, and the positions of its values by entry, ``(*sizes, E)``."""
    positions = torch.arange(site.start, site.stop).reshape([*(size for _, size in site.inner), -1])
    own = [i for i, name in enumerate(site.plates) if name in plates]
    positions = positions.movedim(own, list(range(len(own))))
    return tuple(site.plates[i] for i in own), positions.flatten(len(own))


@dataclass
class Sharing:
    """What shared heads need in calls with other numbers of entries.

    Attributes:
        plates: Names of the inner plates whose entries share a head.
        by_step: Whether steps of sites numbered by time share one.
        heads: The heads; None before they are made.
        known: For numbers of entries, the family and how outputs of the heads make its phi.
    """

    plates: frozenset[str]
    by_step: bool
    heads: SharedHeads | None = None
    known: dict[tuple[object, ...], tuple[VariationalFamily, Arrangement]] = field(default_factory=dict)

    def arrange(self, structure: Structure, family: VariationalFamily) -> Arrangement:
        """How heads make phi of a family in calls of a structure."""
        kinds = None if self.heads is None else self.heads.arrangement.kinds
        levels = levels_of(structure, self.plates, self.by_step)
        return arrange(levels, *family.couplings, kinds=kinds)

    def family_of(
        self, structure: Structure, family: VariationalFamily, find_parents: Callable[[], Tensor]
    ) -> VariationalFamily:
        """The family for a call's numbers of entries, always the same for the same; the heads then serve it."""
        layout = structure.layout
        key = tuple(site.inner for site in layout.sites)  # type: ignore[union-attr]
        if key not in self.known:
            if self.known:
                family = family.resized(layout.latent_dim, find_parents)  # type: ignore[union-attr]
            self.known[key] = family, self.arrange(structure, family)
            if len(self.known) > _MAX_SIZES:
                self.known.pop(next(iter(self.known)))
        family, arrangement = self.known[key]
        if self.heads is not None:
            self.heads.arrangement = arrangement
        return family


def refuse_sharing(features: Tensor | dict[str, Tensor], layout: SiteLayout, family: VariationalFamily) -> None:
    """Raises a ValueError: latents cannot share heads as an encoder's features have it."""
    sites = [site.name for site in layout.sites][:6]
    if isinstance(features, dict):
        raise ValueError(
            f"Cannot share heads among the entries of {sorted(features)} because phi of family {type(family).__name__} "
            f'is not that of local sites {sites} one by one; try family="normal" or "structured", or features of '
            "shape (N, H)."
        )
    raise ValueError(
        f"Cannot share features of shape {tuple(features.shape)}, one for each of {features.shape[1]} steps, "
        f"because local sites {sites} of family {type(family).__name__} are not numbered alike (z_1, z_2, ..., the "
        'same sites in every step, family="normal" or "structured"); try features of shape (N, H), as of '
        "SequenceEncoder(..., pooled=True), or for plates inside the datapoint plate a dict from plate to features."
    )
