r"""Heads that latents share: those of the steps of a sequence, and of the entries of a plate inside the datapoints'.

A level is a set of latents of which there is one group for each entry: the pupils of a school, the steps of a sequence.
One head serves all entries of a level, whatever their number. It gives each of them the locations and log scales of its
latents and the couplings that it has: to its own latents, to those of coarser levels that it lies in, and to those of
steps before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["STEP", "Arrangement", "Level", "SharedHeads", "arrange"]

STEP = ""
"""The axis of the steps of a sequence, which are coupled by how far they are apart; entries of plates are not."""

Kind = tuple[int, int, int, int, int]
"""Level and place of a child, level and place of its parent, number of steps between them."""


@dataclass(frozen=True)
class Level:
    """Latents of a datapoint that share a head.

    Attributes:
        name: Name of the level.
        axes: Names of the axes of its entries: plates, and last :data:`STEP` if they are steps of a sequence.
        positions: Where in the flat latent the E latents of each entry lie, ``(*sizes, E)``.
    """

    name: str
    axes: tuple[str, ...]
    positions: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of entries along the axes."""
        return tuple(self.positions.shape[:-1])

    @property
    def size(self) -> int:
        """Number E of latents of an entry."""
        return self.positions.shape[-1]


@dataclass(frozen=True)
class Arrangement:
    """How the outputs of shared heads make phi in calls with given numbers of entries.

    Attributes:
        levels: The levels.
        kinds: Of each level, the kinds of couplings that its head gives every entry.
        order: For each entry of phi, its position among the outputs of all heads, ``(P,)``.
        rows: Of couplings between levels, the children in the flat latent.
        columns: Their parents.
        places: The positions of these couplings in phi.
    """

    levels: tuple[Level, ...]
    kinds: tuple[tuple[Kind, ...], ...]
    order: Tensor
    rows: Tensor
    columns: Tensor
    places: Tensor

    @property
    def widths(self) -> list[int]:
        """Numbers of outputs of the heads."""
        return [2 * level.size + len(kinds) for level, kinds in zip(self.levels, self.kinds, strict=True)]

    def to(self, device: torch.device) -> Arrangement:
        """The same with its tensors on a device."""
        moved = [x.to(device) for x in (self.order, self.rows, self.columns, self.places)]
        return Arrangement(self.levels, self.kinds, *moved)


def arrange(
    levels: Sequence[Level], rows: Tensor, columns: Tensor, kinds: Sequence[Sequence[Kind]] | None = None
) -> Arrangement:
    """Finds how heads make phi, which holds locations, log scales, and one entry for each coupling.

    A coupling comes from the head of the finer one of the two levels.

    Args:
        levels: The levels, which hold every dimension of the flat latent once.
        rows: The children of all couplings in the flat latent, ``(E,)``.
        columns: Their parents.
        kinds: The kinds of couplings that the heads were made for; by default those that there are.

    Raises:
        ValueError: If a coupling joins entries that do not lie within each other, or is of none of the kinds.
    """
    where = _Places(levels)
    found = [where.kind(child, parent) for child, parent in zip(rows.tolist(), columns.tolist(), strict=True)]
    finer = [where.finer(child, parent) for child, parent in zip(rows.tolist(), columns.tolist(), strict=True)]
    if kinds is None:
        held = [
            {kind for kind, at in zip(found, finer, strict=True) if where.level[at] == i} for i in range(len(levels))
        ]
        kinds = [sorted(part) for part in held]
    columns_of = {kind: j for part in kinds for j, kind in enumerate(part)}
    if unknown := [kind for kind in found if kind not in columns_of]:
        _refuse(levels, unknown[0])
    widths = [2 * level.size + len(part) for level, part in zip(levels, kinds, strict=True)]
    starts = [0]
    for level, width in zip(levels, widths, strict=True):
        starts.append(starts[-1] + level.positions[..., 0].numel() * width)

    def output(dim: int, place: int) -> int:
        level = where.level[dim]
        return starts[level] + where.entry[dim] * widths[level] + place

    dims = range(len(where.level))
    order = [output(d, where.slot[d]) for d in dims]
    order += [output(d, levels[where.level[d]].size + where.slot[d]) for d in dims]
    order += [
        output(at, 2 * levels[where.level[at]].size + columns_of[kind]) for kind, at in zip(found, finer, strict=True)
    ]
    between = [i for i, kind in enumerate(found) if kind[0] != kind[2]]
    places = torch.tensor([2 * len(dims) + i for i in between], dtype=torch.long)
    parts = rows.cpu()[between], columns.cpu()[between], places
    return Arrangement(tuple(levels), tuple(map(tuple, kinds)), torch.tensor(order), *parts)


class _Places:
    """Level, entry, place within the entry and index along every axis, of each dimension of the flat latent."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels = levels
        dim = sum(level.positions.numel() for level in levels)
        self.level, self.entry, self.slot = [0] * dim, [0] * dim, [0] * dim
        self.index: list[dict[str, int]] = [{} for _ in range(dim)]
        for number, level in enumerate(levels):
            for entry, (at, positions) in enumerate(
                zip(_grid(level), level.positions.reshape(-1, level.size), strict=True)
            ):
                for slot, position in enumerate(positions.tolist()):
                    self.level[position], self.entry[position], self.slot[position] = number, entry, slot
                    self.index[position] = dict(zip(level.axes, at, strict=True))

    def kind(self, child: int, parent: int) -> Kind:
        """The kind of a coupling; a ValueError if it joins different entries of a plate."""
        one, other = self.index[child], self.index[parent]
        apart = [axis for axis in one.keys() & other.keys() if axis != STEP and one[axis] != other[axis]]
        lag = one.get(STEP, 0) - other.get(STEP, 0) if STEP in one and STEP in other else 0
        if apart or not (one.keys() >= other.keys() or one.keys() <= other.keys()):
            level = self.levels[self.level[child]].name
            raise ValueError(
                f"Cannot couple latents of level {level!r} to those of {self.levels[self.level[parent]].name!r} by a "
                "shared head because entries that do not lie within each other depend on one another in the "
                'posterior; try a model that samples what entries share before them, or family="normal".'
            )
        return self.level[child], self.slot[child], self.level[parent], self.slot[parent], lag

    def finer(self, child: int, parent: int) -> int:
        """That of two coupled dimensions whose level has more axes; the child where they have the same."""
        return parent if len(self.index[parent]) > len(self.index[child]) else child


def _grid(level: Level) -> list[tuple[int, ...]]:
    """The indices of all entries along the axes, in order."""
    return list(product(*map(range, level.sizes)))


def _refuse(levels: Sequence[Level], kind: Kind) -> None:
    child, _, parent, _, lag = kind
    what = (
        f"step t now depends on step t - {lag}" if lag else f"{levels[child].name!r} depends on {levels[parent].name!r}"
    )
    raise ValueError(
        f"Cannot share one head among the entries of level {levels[child].name!r} because {what} in a way that it did "
        "not when the guide was set up; try guide.setup(...) with the longest sequence, or a model whose steps depend "
        "on a fixed number of steps before them."
    )


class SharedHeads(nn.Module):
    r"""From the features of every entry of every level to phi.

    A coupling between levels conditions an entry on the draw of what it lies in, :math:`z_i = a_i + \sum_j B_{ij} z_j +
    \sigma_i \epsilon_i`, so that the features of an entry need not hold the answer for its parent; phi holds the
    locations :math:`\mu = a + B \mu` that follow.

    Args:
        heads: One module for each level, from features ``(N, *sizes, H)`` to outputs.
        arrangement: How outputs make phi; set before each call whose numbers of entries are others.
    """

    arrangement: Arrangement

    def __init__(self, heads: Sequence[nn.Module], arrangement: Arrangement) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.arrangement = arrangement

    def forward(self, features: Tensor | Mapping[str, Tensor]) -> Tensor:
        """phi ``(N, P)`` of features by the names of the levels, or of one level."""
        levels = self.arrangement.levels
        found = {levels[0].name: features} if isinstance(features, Tensor) else features
        outputs = []
        for level, head in zip(levels, self.heads, strict=True):
            check_level_features(found.get(level.name), level, getattr(head, "in_features", None))
            outputs.append(head(found[level.name]).flatten(1))
        arrangement = self.arrangement
        if arrangement.order.device != outputs[0].device:
            self.arrangement = arrangement = arrangement.to(outputs[0].device)
        phi = torch.cat(outputs, -1).index_select(-1, arrangement.order)
        return phi if not len(arrangement.rows) else self._uncentred(phi)

    def _uncentred(self, phi: Tensor) -> Tensor:
        """phi with the locations that follow from those given the parents' draws."""
        found = self.arrangement
        size = sum(level.positions.numel() for level in found.levels)
        loc = given = phi[..., :size]
        couplings = phi.index_select(-1, found.places)
        for _ in found.levels[1:]:
            loc = given.index_add(-1, found.rows, couplings * loc.index_select(-1, found.columns))
        return torch.cat([loc, phi[..., size:]], -1)


def check_level_features(features: Any, level: Level, width: int | None = None) -> None:
    """Raises a ValueError unless there are features of every entry of a level, and as many as there were."""
    usable = isinstance(features, Tensor) and features.dim() == len(level.axes) + 2
    if usable and features.shape[1:-1] == level.sizes and width in (None, features.shape[-1]):
        return
    given = f"features of shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
    wanted = ", ".join(["N", *map(str, level.sizes), "H" if width is None else str(width)])
    what = f"every entry of {[axis for axis in level.axes if axis]}" if any(level.axes) else "every datapoint"
    remedy = "a dict from the name of each plate with latents to features, datapoints first"
    if STEP in level.axes:
        what += " and every step"
        remedy = "features (N, T, H) of as many steps T as the model has, of inner plates in a dict from plate to these"
    raise ValueError(
        f"Cannot use what the encoder returned for level {level.name!r}, {given}, because features of shape ({wanted}) "
        f"are wanted, for {what}; try an encoder that returns {remedy}."
    )
