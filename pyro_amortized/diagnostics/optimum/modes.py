"""The search for the modes of every datapoint's log-joint, from many sides, and whether it has settled.

Climbs start at the mean and the centres of q, at draws of the prior and wider ones, and at the maxima of the likelihood
alone. Every mode is then mirrored, permuted and recombined with the others (:mod:`.images`). Fresh climbs check the
result: where they lead to a mode of some mass that was not known, the search goes on. No search rules out modes that
none of its starts leads to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.images import Images
from pyro_amortized.diagnostics.optimum.laplace import covariance_root, find_modes, hessian, moments
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.objective.noise import generator, seeded
from pyro_amortized.objective.prior import prior_draws

__all__ = ["MAX_MODES", "Modes", "Search", "as_wide_as", "log_volume", "mahalanobis"]

MAX_MODES = 300
"""Most modes kept per datapoint."""
_NUM_PRIOR_DRAWS, _FEW_PRIOR_DRAWS = 1000, 256
"""Draws of the prior that show where to climb from; few where the model runs on one at a time."""
_NUM_WIDE_DRAWS = 256
_WIDER = 4.0
"""How much wider than the prior."""
_NUM_STARTS = 8
"""Draws from which one round of climbs starts."""
_MAX_ROUNDS = 8
"""Rounds of climbs, at most, that check a search."""
_SEVERAL, _QUIET = 4, 3
"""More modes than this, and so many rounds running must find no further one; else a single one."""
_MAX_LEVELS, _MAX_FRONTIER, _MAX_PICKS = 16, 32, 32
"""Rounds of images, and how many modes of a datapoint they are made of, and how many of them are followed."""
_LEAST_SHARE = 1e-3
"""Of the mass of all modes, for a new one to count."""
_FAR_BELOW = 15.0
"""Nats below the highest mode at which an image is not followed."""
_FEW_DIMENSIONS, _RADII, _HEAVY_RATIO = 4, (6.0, 24.0), 2.5
"""Dimensions up to which tails may be taken for heavy: those where the log-joint drops to the larger of two distances,
in standard deviations, by less than so many times as to the smaller one (exponential tails: 4; normal ones: 16)."""
_DF = 10.0
"""Degrees of freedom of the tails that a known mode is credited with."""


@dataclass
class Modes:
    """Up to M modes per datapoint, as normals, float64.

    Attributes:
        loc: ``(M, N, D)``; the first is the one that the mean of q leads to.
        root: Cholesky factors of the inverse of the log-joint's negative Hessian, ``(M, N, D, D)``.
        log_mass: Laplace's approximations of the integral of the joint around each, ``(M, N)``; minus infinity for
            places not in use.
        heavy: Whether the tails around a mode are heavy, ``(M, N)``.
        settled: Whether the last climbs led to known modes only, ``(N,)``.
    """

    loc: Tensor
    root: Tensor
    log_mass: Tensor
    heavy: Tensor
    settled: Tensor

    @property
    def share(self) -> Tensor:
        """Of the mass of all of them, ``(M, N)``."""
        return self.log_mass.softmax(0)


@dataclass
class _Pool:
    """Places to climb from.

    Attributes:
        z: Where, ``(K, N, D)``.
        height: The log-joint there, ``(K, N)``.
        log_weight: Log importance weights, ``(K, N)``.
        num_prior: How many of them are draws of the prior, which come first.
    """

    z: Tensor
    height: Tensor
    log_weight: Tensor
    num_prior: int


class Search:
    """Looks for the modes of all datapoints.

    Args:
        problem: The bound call.
        phi: Variational parameters ``(N, P)``, from whose mean and centres climbs start.
        seed: Seed of the draws.

    Attributes:
        mean: Mean of q, ``(N, D)``.
        root: Root of a covariance by the curvature there, ``(N, D, D)``; its units are those of the steps.
        draws: Draws of the prior, ``(K, N, D)``.
    """

    def __init__(self, problem: LocalProblem, phi: Tensor, seed: tuple[int, ...]) -> None:
        log_joint = problem.objective.log_joint
        self.log_joint = log_joint
        self.like = problem.phi
        self.centres = problem.objective.family.centres(phi.detach()).cpu().double()
        self.mean, scale_tril = moments(problem.objective.family, phi, generator(*seed, 5))
        self.root = covariance_root(hessian(log_joint.plain, self.mean, phi), scale_tril)
        with seeded(generator(*seed, 12)):
            count = _NUM_PRIOR_DRAWS if log_joint.vectorized else _FEW_PRIOR_DRAWS
            self.draws = prior_draws(log_joint, count).cpu().double()
        self.rng = generator(*seed, 13)
        size, dim = self.mean.shape
        self.images = Images(log_joint.layout)
        self.count = torch.zeros(size, dtype=torch.long)
        self.loc = torch.empty(0, size, dim, dtype=torch.float64)
        self.root_of = torch.empty(0, size, dim, dim, dtype=torch.float64)
        self.height = torch.empty(0, size, dtype=torch.float64)
        self.log_mass = torch.empty(0, size, dtype=torch.float64)

    def run(self) -> Modes:
        """The modes of all datapoints, and for which of them the search has settled."""
        rows = torch.arange(len(self.mean))
        pool = self._pool()
        starts = [self.mean.unsqueeze(0), self.centres, self._likelihood_maxima(pool), self._starts(pool, rows)]
        self._climb(torch.cat(starts), rows)
        self._spread(rows)
        quiet = torch.zeros_like(self.count)
        for _ in range(_MAX_ROUNDS):
            found = self._climb(self._starts(pool, rows), rows)
            quiet[rows] = torch.where(found, 0, quiet[rows] + 1)
            if found.any():
                self._spread(rows[found])
            rows = rows[quiet[rows] < torch.where(self.count[rows] > _SEVERAL, _QUIET, 1)]
            if len(rows) == 0:
                break
        settled = self.count < MAX_MODES
        settled[rows] = False
        return Modes(self.loc, self.root_of, self.log_mass, self._heavy(), settled)

    def _heavy(self) -> Tensor:
        """Whether tails around modes ``(M, N)`` are heavier than exponential ones in some direction."""
        heavy = torch.zeros(self.log_mass.shape, dtype=torch.bool)
        if self.mean.shape[-1] > _FEW_DIMENSIONS:  # where heavy tails in all directions would hold all draws
            return heavy
        for m in range(min(len(heavy), _MAX_FRONTIER)):
            axes = self.root_of[m].permute(2, 0, 1)
            axes = torch.cat([axes, -axes])
            near, far = (self.height[m] - self._heights(self.log_joint, self.loc[m] + r * axes) for r in _RADII)
            heavy[m] = (far < _HEAVY_RATIO * near.clamp(min=0.5)).any(0)
        return heavy

    def _on(self, rows: Tensor) -> tuple[LocalLogJoint, Tensor]:
        """The log-joint of some datapoints and their positions; of all where the model runs only on all its data."""
        everyone = torch.arange(len(self.mean))
        part = None if len(rows) == len(everyone) else self.log_joint.select(rows)
        return (self.log_joint, everyone) if part is None else (part, rows)

    def _pool(self) -> _Pool:
        """The draws of the prior, and wider ones."""
        loc, root = as_wide_as(self.draws)
        size, dim = self.mean.shape
        scale = _WIDER * root.diagonal(dim1=-2, dim2=-1)
        noise = torch.randn(_NUM_WIDE_DRAWS, size, dim, generator=self.rng, dtype=torch.float64)
        z = torch.cat([self.draws, loc + scale * noise])
        height = self._heights(self.log_joint, z)
        log_wide = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - scale.log().sum(-1)
        likelihood = self._heights(self.log_joint.likelihood(), self.draws)
        return _Pool(z, height, torch.cat([likelihood, height[len(self.draws) :] - log_wide]), len(self.draws))

    def _heights(self, log_joint: LocalLogJoint, z: Tensor) -> Tensor:
        """Log-joints ``(K, n)``; minus infinity where they are not numbers."""
        with torch.no_grad():
            values = [log_joint(z[piece].to(self.like)) for piece in chunks(len(z), z.shape[1])]
        return torch.cat(values).cpu().double().nan_to_num(nan=-math.inf, posinf=-math.inf)

    def _starts(self, pool: _Pool, rows: Tensor) -> Tensor:
        """Places to climb from ``(S, n, D)``: as the prior draws them, and by weight beyond known modes."""
        z, weight = pool.z[:, rows], pool.log_weight[:, rows]
        plain = z[torch.randint(pool.num_prior, (_NUM_STARTS // 2,), generator=self.rng)]
        uniform = torch.rand(weight.shape, generator=self.rng, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        keys = weight - torch.log(-uniform.log())
        if len(self.loc):
            beyond = pool.height[:, rows] > self._credit(z, rows) + 1.0
            keys = keys + 1e6 * beyond
        likely = keys.topk(_NUM_STARTS - len(plain), 0).indices
        return torch.cat([plain, z.gather(0, likely.unsqueeze(-1).expand(-1, -1, z.shape[-1]))])

    def _likelihood_maxima(self, pool: _Pool) -> Tensor:
        """Where climbing along the likelihood alone leads to, ``(S, N, D)``."""
        best = pool.log_weight.argmax(0, keepdim=True).unsqueeze(-1).expand(-1, -1, pool.z.shape[-1])
        loc, root = as_wide_as(self.draws)
        starts = torch.cat([self.mean.unsqueeze(0), loc.unsqueeze(0), pool.z.gather(0, best)])
        return find_modes(self.log_joint.likelihood(), starts, root, self.like, tolerance=0.01, max_steps=50)[0]

    def _climb(self, starts: Tensor, rows: Tensor) -> Tensor:
        """Climbs from starts ``(S, n, D)``; for which of ``rows`` that led to something new, ``(n,)``."""
        part, own = self._on(rows)
        if len(own) > len(rows):
            starts = self.mean.expand(len(starts), -1, -1).index_copy(1, rows, starts)
        places, heights = find_modes(part, starts, self.root[own], self.like, tolerance=0.01)
        if len(own) > len(rows):
            places, heights = places[:, rows], heights[:, rows]
        fresh = torch.zeros(len(rows), dtype=torch.bool)
        for place, height in zip(places, heights, strict=True):
            fresh |= self._add(place, height, rows)
        return fresh

    def _add(self, place: Tensor, height: Tensor, rows: Tensor, root: Tensor | None = None) -> Tensor:
        """Adds places ``(n, D)`` that are new; which of them are, and matter, ``(n,)``."""
        first = self.count[rows] == 0
        new = first | (height.isfinite() & (self.count[rows] < MAX_MODES) & ~self._known(place, rows))
        index = new.nonzero().squeeze(-1)
        if len(index) == 0:
            return new
        there = rows[index]
        matters = height > self._credit(place.unsqueeze(0), rows)[0] + 1.0
        if root is None:
            curvature = hessian(self.log_joint.on_rows(there, plain=True), place[index], self.like)
            own = covariance_root(curvature, self.root[there])
        else:
            own = root[index]
        self._grow(int(self.count[there].max()) + 1)
        slot = self.count[there]
        mass = torch.where(height[index].isfinite(), height[index] + log_volume(own), -math.inf)
        self.loc[slot, there], self.root_of[slot, there] = place[index], own
        self.height[slot, there], self.log_mass[slot, there] = height[index], mass
        self.count[there] += 1
        share = (mass - self.log_mass[:, there].logsumexp(0)).exp()
        return new.index_put((index,), (share > _LEAST_SHARE) & matters[index])

    def _grow(self, count: int) -> None:
        for _ in range(len(self.loc), count):
            self.loc = torch.cat([self.loc, self.mean.unsqueeze(0)])
            self.root_of = torch.cat([self.root_of, self.root.unsqueeze(0)])
            empty = torch.full_like(self.count, -math.inf, dtype=torch.float64).unsqueeze(0)
            self.height, self.log_mass = torch.cat([self.height, empty]), torch.cat([self.log_mass, empty])

    def _known(self, place: Tensor, rows: Tensor) -> Tensor:
        """Whether places ``(n, D)`` lie within a standard deviation of a known mode."""
        near = mahalanobis(place - self.loc[:, rows], self.root_of[:, rows]) <= 1.0
        return (near & self.height[:, rows].isfinite()).any(0)

    def _credit(self, z: Tensor, rows: Tensor) -> Tensor:
        """The log-joint at places ``(B, n, D)`` that known modes with heavy tails would explain, ``(B, n)``."""
        best = torch.full(z.shape[:2], -math.inf, dtype=torch.float64)
        for m in range(int(self.count[rows].max())):
            best = torch.maximum(best, _kernel(z, self.loc[m, rows], self.root_of[m, rows], self.height[m, rows]))
        return best

    def _spread(self, rows: Tensor) -> None:
        """Adds the images of known modes, and theirs, until there are none."""
        frontier = self._largest(rows, _MAX_FRONTIER // 4)
        useful = torch.ones(len(self.images), dtype=torch.bool)
        for _ in range(_MAX_LEVELS):
            before = self.count[rows].clone()
            useful = self._follow(rows, frontier, useful)
            grown = self.count[rows] > before
            if not grown.any():
                break
            rows, before = rows[grown], before[grown]
            slots = before + torch.arange(_MAX_FRONTIER).unsqueeze(-1)
            frontier = torch.where(slots < self.count[rows], slots, -1)

    def _largest(self, rows: Tensor, count: int) -> Tensor:
        """Slots of the largest modes ``(F, n)``, -1 for none."""
        mass = self.log_mass[:, rows]
        top = mass.topk(min(count, len(mass)), 0)
        return torch.where(top.values > top.values[:1] + math.log(_LEAST_SHARE), top.indices, -1)

    def _follow(self, rows: Tensor, frontier: Tensor, useful: Tensor) -> Tensor:
        """Adds images of modes in ``frontier`` ``(F, n)`` that are modes; which transformations led to any."""
        part, own = self._on(rows)
        parents = frontier.clamp(min=0)
        loc = self.loc[parents, rows]
        candidates, kind, origin = self.images.of(loc, useful, self._partners(rows))
        if len(candidates) == 0:
            return useful
        if len(own) > len(rows):
            heights = self._heights(part, self.mean.expand(len(candidates), -1, -1).index_copy(1, rows, candidates))
            heights = heights[:, rows]
        else:
            heights = self._heights(part, candidates)
        usable = (frontier >= 0)[origin] & (heights > self.height[:, rows].amax(0) - _FAR_BELOW)
        credit = self._credit(candidates, rows)
        led, climbs = torch.zeros_like(useful), []
        for _ in range(_MAX_PICKS):
            excess = torch.where(usable & (heights > credit + 1.0), heights, -math.inf)
            best = excess.amax(0)
            if best.isneginf().all():
                break
            index = torch.arange(len(rows))
            pick = excess.argmax(0)
            place, height, valid = candidates[pick, index], heights[pick, index], best > -math.inf
            parent = parents[origin[pick], index]
            root = self.images.root(kind[pick], self.root_of[parent, rows])
            height = torch.where(valid, height, -math.inf)
            credit = torch.maximum(credit, _kernel(candidates, place, root, height))
            exact = self._is_exact(height, self.height[parent, rows]) & (kind[pick] < len(self.images))
            self._add(place, torch.where(exact, height, -math.inf), rows, root)
            led[kind[pick][valid & exact]] = True
            climbs.append((place, valid & ~exact, kind[pick]))
        self._climb_images(climbs, rows, led)
        return led

    def _climb_images(self, climbs: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, led: Tensor) -> None:
        """Climbs from images that are no exact ones."""
        climbs = [climb for climb in climbs if climb[1].any()]
        wanted = torch.stack([valid for _, valid, _ in climbs]).any(0) if climbs else torch.zeros(0)
        if not climbs:
            return
        where = wanted.nonzero().squeeze(-1)
        there = rows[where]
        starts = torch.stack([torch.where(valid[:, None], place, self.loc[0, rows]) for place, valid, _ in climbs])[
            :, where
        ]
        before = self.count[there].clone()
        self._climb(starts, there)
        grown = self.count[there] > before
        for _, valid, kind in climbs:
            kinds = kind[where][valid[where] & grown]
            led[kinds[kinds < len(led)]] = True

    def _is_exact(self, height: Tensor, parent: Tensor) -> Tensor:
        tolerance = 1e-8 if self.like.dtype == torch.float64 else 1e-5
        return (height - parent).abs() <= tolerance * (1 + parent.abs())

    def _partners(self, rows: Tensor) -> Tensor:
        """Places of the largest modes, whose coordinates others may take, ``(B, n, D)``."""
        slots = self._largest(rows, 6)
        if len(slots) < 2:
            return self.loc[:0, rows]
        return self.loc[torch.where(slots < 0, slots[:1], slots), rows]


def _kernel(z: Tensor, loc: Tensor, root: Tensor, height: Tensor) -> Tensor:
    """The log-joint at ``(B, n, D)`` by a mode at ``loc`` ``(n, D)`` with heavy tails, ``(B, n)``."""
    centred = (z - loc).permute(1, 2, 0)
    squares = torch.linalg.solve_triangular(root, centred, upper=False).square().sum(1).T
    return height - 0.5 * _DF * torch.log1p(squares / _DF)


def mahalanobis(difference: Tensor, root: Tensor) -> Tensor:
    """Squared lengths ``(*)`` of differences ``(*, D)`` in units of the roots of covariances ``(*, D, D)``."""
    return torch.linalg.solve_triangular(root, difference.unsqueeze(-1), upper=False).square().sum((-2, -1))


def as_wide_as(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Location ``(N, D)`` and diagonal Cholesky factor ``(N, D, D)`` of draws ``(K, N, D)``, by their quantiles."""
    low, loc, high = (draws.kthvalue(max(1, round(q * len(draws))), 0).values for q in (0.16, 0.5, 0.84))
    return loc, torch.diag_embed((0.5 * (high - low)).clamp(min=1e-6))


def log_volume(scale_tril: Tensor) -> Tensor:
    """Log of the integral of a normal's unnormalised density, ``(*)``."""
    dim = scale_tril.shape[-1]
    return scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dim * math.log(2 * math.pi)
