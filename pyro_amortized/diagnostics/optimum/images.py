"""Where symmetries of a model would put further modes: mirror images, permutations and recombinations of known ones."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from pyro_amortized.structure.layout import SiteLayout

__all__ = ["Images"]

_MANY = 10
"""Dimensions up to which all pairs of coordinates are tried."""
_MAX_SWAPS = 45
"""Most swaps of entries that an axis of a site gets."""


class Images:
    """Signed permutations of the flat latent under which a posterior may be invariant.

    Signs of single coordinates, of all, and of pairs; swaps of coordinates; and, where sites have axes of one size, as
    the components of a mixture, swaps and signs of their entries in all these sites at once.

    Args:
        layout: The local sites.
    """

    def __init__(self, layout: SiteLayout) -> None:
        dim = layout.latent_dim
        identity, positive = torch.arange(dim), torch.ones(dim, dtype=torch.float64)
        found = {}

        def add(swapped: list[tuple[Tensor, Tensor]], negative: list[Tensor]) -> None:
            order, sign = identity.clone(), positive.clone()
            for a, b in swapped:
                order[a], order[b] = b, a
            for a in negative:
                sign[a] = -1.0
            found[(*order.tolist(), *sign.tolist())] = (order, sign)

        single = [identity[i : i + 1] for i in range(dim)]
        for one in single:
            add([], [one])
        add([], [identity])
        for a, b in combinations(single, 2) if dim <= _MANY else ():
            add([(a, b)], [])
            add([], [a, b])
        for entries in _axes(layout):
            for i, j in list(combinations(range(len(entries[0])), 2))[:_MAX_SWAPS]:
                add([(entry[i], entry[j]) for entry in entries], [])
            for i in range(len(entries[0])):
                add([], [entry[i] for entry in entries])
        self.order = torch.stack([order for order, _ in found.values()])
        self.sign = torch.stack([sign for _, sign in found.values()])

    def __len__(self) -> int:
        return len(self.order)

    def of(self, loc: Tensor, useful: Tensor, partners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images of places.

        Args:
            loc: F places per datapoint, ``(F, n, D)``.
            useful: Which transformations to use, ``(G,)``.
            partners: Places whose coordinates they may take one by one, ``(B, n, D)``.

        Returns:
            The images ``(C, n, D)``; the transformation of each ``(C,)``, ``len(self)`` for a recombination; and the
            place it comes from, ``(C,)``.
        """
        count, size, dim = loc.shape
        chosen = useful.nonzero().squeeze(-1)
        mirrored = loc[..., self.order[chosen]] * self.sign[chosen]  # (F, n, G, D)
        images = [mirrored.permute(0, 2, 1, 3).flatten(0, 1)]
        kinds, origins = [chosen.repeat(count)], [torch.arange(count).repeat_interleave(len(chosen))]
        if len(partners) and dim > 1:
            here = torch.eye(dim, dtype=torch.bool)[:, None, None, None]
            mixed = torch.where(here, partners.unsqueeze(1), loc).flatten(0, 2)  # (D, B, F, n, D)
            images.append(mixed)
            kinds.append(torch.full((len(mixed),), len(self)))
            origins.append(torch.arange(count).repeat(dim * len(partners)))
        return torch.cat(images), torch.cat(kinds), torch.cat(origins)

    def root(self, kind: Tensor, root: Tensor) -> Tensor:
        """Cholesky factors of covariances under transformations ``(n,)``, from those before, ``(n, D, D)``."""
        order = torch.cat([self.order, torch.arange(root.shape[-1]).unsqueeze(0)])[kind]
        sign = torch.cat([self.sign, torch.ones_like(self.sign[:1])])[kind]
        moved = root.gather(1, order.unsqueeze(-1).expand_as(root)) * sign.unsqueeze(-1)
        triangular = torch.linalg.qr(moved.transpose(-1, -2)).R.transpose(-1, -2)
        return triangular * triangular.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def _axes(layout: SiteLayout) -> list[list[list[Tensor]]]:
    """For every size, the flat positions of the entries along one axis of that size, in each site that has one."""
    by_size: dict[int, list[list[Tensor]]] = {}
    for site in layout.sites:
        sizes = [size for _, size in site.inner] + list(site.shape)
        positions = torch.arange(site.start, site.stop).reshape(sizes)
        for axis, size in enumerate(sizes):
            if size > 1 and len(sizes) > 1 or len(layout.sites) > 1 and size > 1:
                by_size.setdefault(size, []).append([positions.select(axis, i).flatten() for i in range(size)])
    return [*by_size.values(), *([one] for entries in by_size.values() if len(entries) > 1 for one in entries)]
