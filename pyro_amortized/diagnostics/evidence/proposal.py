"""Where importance samples of a posterior come from: mixtures of multivariate t's, one mixture per datapoint.

A component sits at the mean of the best member of the guide's family or, where that lies far from any mode, at the mode
that climbing from there leads to; one at every further mode that climbing from draws of the prior has found; and one,
with a small share, is as wide as the prior: it finds what the others have missed. Weighted draws then show how to do
better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.modes import Modes, Search, as_wide_as, log_volume, mahalanobis
from pyro_amortized.diagnostics.problem import LocalProblem

__all__ = ["DF", "Approximation", "Proposal", "first_proposals", "proposals_at"]

DF, HEAVY_DF = 10.0, 1.0
"""Degrees of freedom of components, and of those at modes with heavy tails."""
_PARTS = 250
"""Shares of the components are multiples of one in this many, so that every round draws the same number from each; of a
multiple of it, where there are many components."""
_MANY = 20
"""Components that 250 parts can serve."""
_WIDE_PARTS = 10
"""Share of the component as wide as the prior."""
_SMALLEST_PARTS = 5
"""Least share of a mode found, so that a wrong guess of its weight does little harm."""
_LEAST_SHARE = 1e-6
"""Of the mass of all modes, for one to have a component."""


class Approximation(Protocol):
    """A distribution for each of n datapoints, such as a proposal of the evidence."""

    def sample(self, num_draws: int, rng: torch.Generator) -> Tensor:
        """Draws ``(K, n, D)``."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-densities ``(K, n)`` of ``(K, n, D)``."""

    def __getitem__(self, rows: Tensor) -> Approximation:
        """That of some of the datapoints."""


@dataclass
class Proposal:
    """A mixture of C multivariate t's per datapoint.

    Attributes:
        loc: ``(C, N, D)``, float64.
        scale_tril: ``(C, N, D, D)``, float64.
        parts: Shares of the components in parts, ``(C, N)``, integers whose sum is the same for all datapoints; 0 for
            a component not in use. The last component is as wide as the prior.
        df: Degrees of freedom, ``(C, N)``; few where tails are heavy, and of the last component: it bounds
            the weights.
        has_spare: Whether the last but one is a component that was added to be adapted.
    """

    loc: Tensor
    scale_tril: Tensor
    parts: Tensor
    df: Tensor
    has_spare: bool = False

    def __getitem__(self, rows: Tensor) -> Proposal:
        """That of some datapoints, without the components that none of them uses."""
        used = (self.parts[:, rows] > 0).any(1)
        used[0] = used[-2:] = True
        own = [x[used][:, rows] for x in (self.loc, self.scale_tril, self.parts, self.df)]
        return replace(self, loc=own[0], scale_tril=own[1], parts=own[2], df=own[3])

    @property
    def num_parts(self) -> int:
        """Sum of the shares: a round of as many fours draws the same number from each component every time."""
        return int(self.parts[:, 0].sum())

    def adapted(self, z: Tensor, weights: Tensor) -> Proposal:
        """One EM step towards weighted draws; where no component is spare, one is taken from the wide one.

        Args:
            z: Draws ``(K, N, D)``.
            weights: Their weights ``(K, N)``, which sum to 1.

        References:
            Adaptive Importance Sampling in General Mixture Classes, Olivier Cappé, Randal Douc, Arnaud Guillin,
            Jean-Michel Marin, Christian P. Robert (2008).
        """
        old = self if self.has_spare else self._with_spare()
        everyone = torch.arange(z.shape[1])
        log_share = (old.parts[:-1].double() / old.num_parts).log()
        logits = torch.stack([log_share[c] + old._component(c, everyone, z) for c in range(len(log_share))])
        owned = weights * logits.softmax(0)  # (C - 1, K, N)
        share = owned.sum(1)
        within = owned / share.clamp(min=1e-300).unsqueeze(1)
        mean = torch.einsum("ckn,knd->cnd", within, z)
        covariance = torch.einsum("ckn,knd,kne->cnde", within, z, z) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        effective = 1 / within.square().sum(1).clamp(min=1e-300)
        trust = torch.where(share > 0, effective / (effective + 2 * z.shape[-1]), 0.0)[..., None]
        before = old.scale_tril[:-1] @ old.scale_tril[:-1].transpose(-1, -2)
        factor, failed = torch.linalg.cholesky_ex(trust[..., None] * covariance + (1 - trust[..., None]) * before)
        good = (failed == 0) & (share > 0)
        loc = torch.where(good[..., None], trust * mean + (1 - trust) * old.loc[:-1], old.loc[:-1])
        scale_tril = torch.where(good[..., None, None], factor, old.scale_tril[:-1])
        loc, scale_tril = torch.cat([loc, old.loc[-1:]]), torch.cat([scale_tril, old.scale_tril[-1:]])
        return replace(old, loc=loc, scale_tril=scale_tril, parts=_parts(share, old.num_parts))

    def _with_spare(self) -> Proposal:
        spare = torch.full_like(self.parts[:1], _WIDE_PARTS * self.num_parts // _PARTS)
        parts = torch.cat([self.parts[:-1], spare, self.parts[-1:]])
        parts = parts.scatter_add(0, parts.argmax(0, keepdim=True), -spare)
        loc, scale_tril = (torch.cat([x, x[-1:]]) for x in (self.loc, self.scale_tril))
        df = torch.cat([self.df[:-1], torch.full_like(self.df[:1], DF), self.df[-1:]])
        return replace(self, loc=loc, scale_tril=scale_tril, parts=parts, df=df, has_spare=True)

    def sample(self, num_draws: int, rng: torch.Generator) -> Tensor:
        """Stratified draws ``(K, N, D)``.

        Draws 2i and 2i + 1, a pair, lie in opposite directions, and four in a row come from one component, at distances
        from the same one of as many equally likely intervals as the component has fours. So skewed posteriors cost
        little, and those whose weights depend on the distance alone next to nothing; the two pairs of an interval tell
        the error.

        Args:
            num_draws: K, a multiple of 4.
            rng: Source of the draws.
        """
        _, size, dim = self.loc.shape
        normal = torch.randn(num_draws // 2, size, dim, generator=rng, dtype=torch.float64)
        direction = normal / normal.norm(dim=-1, keepdim=True)
        chosen, uniform = self._strata(num_draws // 4, rng)
        radius = self._radii(uniform.flatten(0, 1), chosen)
        white = torch.stack([direction, -direction], 1).flatten(0, 1) * radius.unsqueeze(-1)
        return self._place(white, chosen)

    def draw(self, num_draws: int, rng: torch.Generator) -> Tensor:
        """Independent draws ``(K, N, D)``."""
        _, size, dim = self.loc.shape
        white = torch.randn(num_draws, size, dim, generator=rng, dtype=torch.float64)
        uniform = torch.rand(num_draws, size, generator=rng, dtype=torch.float64)
        chosen = torch.multinomial(self.parts.T.double(), num_draws, replacement=True, generator=rng).T
        white = white / white.norm(dim=-1, keepdim=True) * self._radii(uniform, chosen).unsqueeze(-1)
        return self._place(white, chosen)

    def _radii(self, uniform: Tensor, chosen: Tensor) -> Tensor:
        """Norms of standard t vectors of the chosen components ``(K, N)`` at given probabilities ``(K, N)``."""
        from scipy.special import fdtri

        dim, own = self.loc.shape[-1], self.df.gather(0, chosen)
        squares = torch.empty_like(uniform)
        for df, where in ((df, own == df) for df in (DF, HEAVY_DF)):
            squares[where] = torch.from_numpy(fdtri(dim, df, uniform[where].clamp(1e-12, 1 - 1e-12).numpy()))
        return (dim * squares).sqrt()

    def _place(self, white: Tensor, chosen: Tensor) -> Tensor:
        """Standard t vectors ``(K, N, D)`` put where the chosen components ``(K, N)`` are."""
        z = self.loc[0] + torch.einsum("nij,knj->kni", self.scale_tril[0], white)
        for c, rows in self._further():
            other = self.loc[c, rows] + torch.einsum("nij,knj->kni", self.scale_tril[c, rows], white[:, rows])
            z[:, rows] = torch.where((chosen[:, rows] == c).unsqueeze(-1), other, z[:, rows])
        return z

    def _strata(self, num_fours: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Components ``(4 fours, N)`` and, within the interval of each four, uniform numbers ``(2 fours, 2, N)``."""
        size, position = self.parts.shape[1], torch.arange(num_fours, dtype=torch.float64)
        ends = self.parts.cumsum(0).double() * (num_fours / self.num_parts)
        offset = torch.rand(size, generator=rng, dtype=torch.float64)
        place = (position.unsqueeze(-1) + offset).clamp(max=num_fours - 1e-9)
        chosen = (place.unsqueeze(0) >= ends.unsqueeze(1)).sum(0)
        same = torch.nn.functional.one_hot(chosen, len(self.parts))  # (fours, N, C)
        rank = (same.cumsum(0) - 1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        count = same.sum(0).gather(-1, chosen.T).T
        draws = torch.rand(2 * num_fours, 2, size, generator=rng, dtype=torch.float64)
        pairs = [x.repeat_interleave(2, 0).unsqueeze(1) for x in (rank, count)]
        return chosen.repeat_interleave(4, 0), (pairs[0] + draws) / pairs[1]

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-densities ``(K, N)`` of ``(K, N, D)``."""
        log_share = (self.parts.double() / self.num_parts).log()
        log_density = log_share[0] + self._component(0, torch.arange(z.shape[1]), z)
        for c, rows in self._further():
            further = log_share[c, rows] + self._component(c, rows, z[:, rows])
            mixed = torch.logaddexp(log_density[:, rows], further)
            log_density = log_density.index_copy(1, rows, mixed)
        return log_density

    def _further(self) -> list[tuple[int, Tensor]]:
        """The components beyond the first, each with the datapoints that use it."""
        used = [(c, self.parts[c].nonzero().squeeze(-1)) for c in range(1, len(self.loc))]
        return [(c, rows) for c, rows in used if len(rows)]

    def _component(self, c: int, rows: Tensor, z: Tensor) -> Tensor:
        df, dim = self.df[c, rows], self.loc.shape[-1]
        centred = (z - self.loc[c, rows]).permute(1, 2, 0)
        white = torch.linalg.solve_triangular(self.scale_tril[c, rows], centred, upper=False)
        constant = ((df + dim) / 2).lgamma() - (df / 2).lgamma() - 0.5 * dim * (df * math.pi).log()
        log_det = self.scale_tril[c, rows].diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return constant - log_det - 0.5 * (df + dim) * torch.log1p(white.square().sum(1).T / df)


def first_proposals(problem: LocalProblem, phi: Tensor, seed: tuple[int, ...]) -> list[tuple[Tensor, Proposal, Tensor]]:
    """Rows with few modes, and rows with many: which, their proposals, and for which the search for modes has settled.

    The first component lies at the mean of q, where that is close to a mode; else it lies at the mode that climbing
    from the mean leads to, and another one at the mean.

    Args:
        problem: The bound call.
        phi: The optimal variational parameters, ``(N, P)``.
        seed: Seed of the search.
    """
    search = Search(problem, phi, seed)
    return proposals_at(problem, search, search.run())


def proposals_at(problem: LocalProblem, search: Search, modes: Modes) -> list[tuple[Tensor, Proposal, Tensor]]:
    """:func:`first_proposals` at the modes of a search that has run."""
    mean, root = search.mean, search.root
    close = mahalanobis(mean - modes.loc[0], modes.root[0]) <= 1.0
    if problem.objective.family.multimodal:  # whose mean may lie where there is next to nothing
        with torch.no_grad():
            height = problem.objective.log_joint(mean.to(problem.phi).unsqueeze(0)).squeeze(0).cpu().double()
    else:
        height = modes.log_mass[0] - log_volume(modes.root[0])
    mass = torch.where(close | ~height.isfinite(), -math.inf, height + log_volume(root))
    locs, roots = torch.cat([modes.loc, mean.unsqueeze(0)]), torch.cat([modes.root, root.unsqueeze(0)])
    locs[0] = torch.where(close[:, None], mean, locs[0])
    roots[0] = torch.where(close[:, None, None], root, roots[0])
    share = torch.cat([modes.log_mass, mass.unsqueeze(0)]).softmax(0)
    order = share[1:].argsort(0, descending=True) + 1
    order = torch.cat([torch.zeros_like(order[:1]), order])
    everyone = torch.arange(len(mean))
    wide = as_wide_as(search.draws)
    heavy = torch.cat([modes.heavy, modes.heavy[:1]])[order, everyone]
    df = torch.where(torch.cat([heavy, torch.ones_like(heavy[:1])]), HEAVY_DF, DF).double()
    locs, roots = (torch.cat([x[order, everyone], w.unsqueeze(0)]) for x, w in zip((locs, roots), wide, strict=True))
    share = share.gather(0, order)
    count = (share >= _LEAST_SHARE).sum(0)
    groups = []
    for rows in ((count <= _MANY).nonzero().squeeze(-1), (count > _MANY).nonzero().squeeze(-1)):
        if len(rows):
            parts = _parts(share[:, rows], _num_parts(int(count[rows].max())))
            own = Proposal(locs[:, rows], roots[:, rows], parts, df[:, rows])
            groups.append((rows, own[torch.arange(len(rows))], modes.settled[rows]))
    return groups


def _num_parts(count: int) -> int:
    """So many parts that each of a number of components can have its least share."""
    return _PARTS * max(1, math.ceil(count / _MANY))


def _parts(share: Tensor, num_parts: int) -> Tensor:
    """Shares of modes, the first of them always in use, in parts, with the wide component's at the end."""
    wide = _WIDE_PARTS * num_parts // _PARTS
    used = share >= _LEAST_SHARE
    used[0] = True
    free = num_parts - wide - _SMALLEST_PARTS * used.sum(0)
    parts = torch.where(used, (share * free).floor().long() + _SMALLEST_PARTS, 0)
    parts = torch.cat([parts, torch.full_like(parts[:1], wide)])
    largest = parts[:-1].argmax(0, keepdim=True)
    return parts.scatter_add(0, largest, num_parts - parts.sum(0, keepdim=True))
