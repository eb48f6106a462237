r"""The log evidence of every datapoint, :math:`\log p(x_n)`, by importance sampling that watches its own reliability.

A proposal is a mixture of multivariate t's: one with the mean of the optimal member of the guide's family and the
Hessian of the log-joint there, and one at every further mode that climbing from draws of the prior has found. Where the
weights have a heavy tail or vary too much, a proposal is fitted to the weighted draws. Draws are taken in rounds, per
datapoint, until the standard error is small and the tail of the weights is light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.importance import psis
from pyro_amortized.diagnostics.laplace import covariance_root, find_modes, hessian, moments
from pyro_amortized.diagnostics.local_optimum import LocalOptimum, solve
from pyro_amortized.diagnostics.noise import generator, seeded
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar, to_dataset
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective import chunks

if TYPE_CHECKING:
    import xarray

__all__ = ["log_evidence"]

_LIGHT_TAIL = 0.5
_ROUND = 1000
_LEAST_ROUNDS = 2
"""Rounds that every datapoint gets, so that its khat and standard error mean something."""
_BLOCK = 256
"""Datapoints worked on at a time; bounds memory."""
_NUM_STARTS = 16
"""Draws from the prior, per datapoint, from which modes are looked for."""
_MAX_FURTHER = 4
"""Most modes, beyond the one that the guide leads to, that a proposal covers."""
_SMALLEST_SHARE = 0.02
"""Least share of a mode found in the mixture, so that a wrong guess of its weight does little harm."""
_PATIENCE = 4
"""Rounds that a proposal gets before it is adapted."""


def log_evidence(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    max_samples: int = 20000,
    optimum: LocalOptimum | None = None,
    seed: int = 0,
    compile: bool = False,
    progress: bool = False,
) -> xarray.Dataset:
    r"""Estimates :math:`\log p(x_n) = \log \int p(x_n, z)\, dz` for every datapoint.

    The estimate is the logarithm of the mean weight. Its standard error is calibrated while ``khat`` is below 0.5 and
    too small above.

    Args:
        model: The Pyro model.
        guide: A guide of this package; only the efficiency depends on how well it is trained.
        model_args: The model's positional arguments.
        model_kwargs: The model's keyword arguments.
        tolerance: Twice the standard error at which a datapoint is done, in nats.
        max_samples: Most draws from one proposal per datapoint.
        optimum: The result of :func:`optimize_local` on the same call, if it is at hand.
        seed: Seed of the draws; torch's global seed is not touched.
        compile: Whether to compile the log-joint, which pays for many datapoints or a costly model.
        progress: Whether to show progress bars.

    Returns:
        A dataset over the plate's dimension with ``log_evidence`` and ``log_evidence_se`` in nats, ``khat``, ``ess``
        (effective sample size) and ``num_samples``. Global latents are held at the guide's median.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints.

    References:
        Bayesian Inference in Econometric Models Using Monte Carlo Integration, John Geweke (1989).
        Pareto Smoothed Importance Sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry (2024),
        https://arxiv.org/abs/1507.02646
        Adaptive Importance Sampling in General Mixture Classes, Olivier Cappé, Randal Douc, Arnaud Guillin, Jean-Michel
        Marin, Christian P. Robert (2008).
    """
    problem = bind(model, guide, model_args, model_kwargs, seed, compile)
    optimum = solve(problem, tolerance, seed, progress) if optimum is None else optimum
    evidence = estimate_evidence(problem, optimum.phi, tolerance, max_samples, seed, progress)
    settings = {"tolerance": tolerance, "max_samples": max_samples, "seed": seed}
    return to_dataset(problem, evidence, **settings)


@dataclass
class Proposal:
    """A mixture of C multivariate t's per datapoint.

    Attributes:
        loc: ``(C, N, D)``, float64.
        scale_tril: ``(C, N, D, D)``, float64.
        log_share: Logarithms of the mixture's weights ``(C, N)``; minus infinity for a component not in use.
        df: Degrees of freedom.
    """

    loc: Tensor
    scale_tril: Tensor
    log_share: Tensor
    df: float = 10.0

    @classmethod
    def single(cls, loc: Tensor, scale_tril: Tensor) -> Proposal:
        """One component per datapoint, of ``(N, D)`` and ``(N, D, D)``."""
        return cls(loc.unsqueeze(0), scale_tril.unsqueeze(0), loc.new_zeros(1, len(loc)))

    def __getitem__(self, rows: Tensor) -> Proposal:
        return Proposal(self.loc[:, rows], self.scale_tril[:, rows], self.log_share[:, rows], self.df)

    def sample(self, num_draws: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws ``(K, N, D)`` and their log-densities ``(K, N)``.

        Draws 2i and 2i + 1, a pair, lie in opposite directions, and four in a row at distances from the same of K/4
        equally likely intervals. So skewed posteriors cost little, and those whose weights depend on the distance alone
        next to nothing; the two pairs of an interval tell the error (:func:`_summary`).

        Args:
            num_draws: K, a multiple of 4.
            rng: Source of the draws.
        """
        _, size, dim = self.loc.shape
        normal = torch.randn(num_draws // 2, size, dim, generator=rng, dtype=torch.float64)
        direction = normal / normal.norm(dim=-1, keepdim=True)
        radius = _radii(dim, self.df, num_draws // 2, size, rng)
        white = (torch.stack([direction, -direction], 1) * radius.unsqueeze(-1)).flatten(0, 1)
        chosen = torch.multinomial(self.log_share.exp().T, num_draws // 2, replacement=True, generator=rng).T
        chosen = chosen.repeat_interleave(2, 0)
        z = self.loc[0] + torch.einsum("nij,knj->kni", self.scale_tril[0], white)
        for c, rows in self._further():
            other = self.loc[c, rows] + torch.einsum("nij,knj->kni", self.scale_tril[c, rows], white[:, rows])
            z[:, rows] = torch.where((chosen[:, rows] == c).unsqueeze(-1), other, z[:, rows])
        log_density = self.log_share[0] + self._log_density(0, torch.arange(size), z)
        for c, rows in self._further():
            further = self.log_share[c, rows] + self._log_density(c, rows, z[:, rows])
            log_density[:, rows] = torch.logaddexp(log_density[:, rows], further)
        return z, log_density

    def _further(self) -> list[tuple[int, Tensor]]:
        """The components beyond the first, each with the datapoints that use it."""
        used = [(c, self.log_share[c].isfinite().nonzero().squeeze(-1)) for c in range(1, len(self.loc))]
        return [(c, rows) for c, rows in used if len(rows)]

    def _log_density(self, c: int, rows: Tensor, z: Tensor) -> Tensor:
        df, dim = self.df, self.loc.shape[-1]
        centred = (z - self.loc[c, rows]).permute(1, 2, 0)
        white = torch.linalg.solve_triangular(self.scale_tril[c, rows], centred, upper=False)
        constant = math.lgamma((df + dim) / 2) - math.lgamma(df / 2) - 0.5 * dim * math.log(df * math.pi)
        log_det = self.scale_tril[c, rows].diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return constant - log_det - 0.5 * (df + dim) * torch.log1p(white.square().sum(1).T / df)


def _radii(dim: int, df: float, num_pairs: int, size: int, rng: torch.Generator) -> Tensor:
    """Norms of standard t vectors, two pairs from each of equally likely intervals: ``(num_pairs, 2, size)``."""
    from scipy.special import fdtri

    interval = torch.arange(num_pairs // 2, dtype=torch.float64).repeat_interleave(2).reshape(-1, 1, 1)
    uniform = (interval + torch.rand(num_pairs, 2, size, generator=rng, dtype=torch.float64)) / (num_pairs // 2)
    squares = torch.from_numpy(fdtri(dim, df, uniform.clamp(1e-12, 1 - 1e-12).numpy()))
    return (dim * squares).sqrt()


def estimate_evidence(
    problem: LocalProblem, phi: Tensor, tolerance: float, max_samples: int, seed: int, progress: bool
) -> dict[str, Tensor]:
    """:func:`log_evidence` of a call that is bound already, from the optimal phi ``(N, P)``."""
    size = len(phi)
    parts = [(problem, phi)]
    if size > _BLOCK and problem.objective.select(torch.arange(1)) is not None:
        parts = [(_part(problem, rows), phi[rows]) for rows in torch.arange(size).split(_BLOCK)]
    results = []
    with progress_bar(size, "log evidence", progress) as bar:
        for number, (part, part_phi) in enumerate(parts):
            results.append(_estimate_block(part, part_phi, tolerance, max_samples, (seed, number)))
            bar.update(len(part_phi))
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _part(problem: LocalProblem, rows: Tensor) -> LocalProblem:
    """The problem of some of the datapoints."""
    objective = problem.objective.select(rows) or problem.objective
    return replace(problem, objective=objective, phi=problem.phi[rows], index=problem.index[rows])


def _estimate_block(
    problem: LocalProblem, phi: Tensor, tolerance: float, max_samples: int, seed: tuple[int, int]
) -> dict[str, Tensor]:
    """Estimates by the first proposal, by a fitted one where that is poor, and with more draws where they lack."""
    rounds, rows = _Rounds(problem, tolerance, max_samples), torch.arange(len(phi))
    proposal = _first_proposal(problem, phi, seed)
    result = rounds.run(proposal, rows, generator(*seed, 6), patience=_PATIENCE)
    single = ~proposal.log_share[1:].isfinite().any(0)
    poor = (~rounds.done(result) & single).nonzero().squeeze(-1)
    if len(poor):
        fitted = _adapt(problem, proposal[poor], poor, generator(*seed, 7))
        _keep_better(result, rounds.run(fitted, poor, generator(*seed, 8)), poor)
    stuck = (~rounds.done(result) & (~single | (result["khat"] <= _LIGHT_TAIL))).nonzero().squeeze(-1)
    if len(stuck):  # the first proposal was the better one, and only lacks draws
        _keep_better(result, rounds.run(proposal[stuck], stuck, generator(*seed, 9)), stuck)
    return result


def _first_proposal(problem: LocalProblem, phi: Tensor, seed: tuple[int, int]) -> Proposal:
    """A t at the mean of the optimal member, and at each mode found from draws of the prior that is another one."""
    log_joint, family = problem.objective.log_joint, problem.objective.family
    mean, scale_tril = moments(family, phi, generator(*seed, 5))
    root = covariance_root(hessian(log_joint.plain, mean, phi), scale_tril)
    with seeded(generator(*seed, 12)):
        draws = torch.stack([log_joint.prior_draw() for _ in range(_NUM_STARTS)]).double().cpu()
    modes, heights = find_modes(log_joint, torch.cat([mean.unsqueeze(0), draws]), root, phi, tolerance=0.01)
    locs, roots, masses = [mean], [root], [heights[0] + _log_volume(root)]
    for mode, height in zip(modes[1:], heights[1:], strict=True):
        known = torch.stack([modes[0], *locs[1:]])
        distance = torch.linalg.solve_triangular(torch.stack(roots), (mode - known).unsqueeze(-1), upper=False)
        new = height.isfinite() & (distance.square().sum((-2, -1)) > 1.0).all(0)
        rows = new.nonzero().squeeze(-1)
        other, mass = root.clone(), torch.full_like(height, -math.inf)
        if len(rows):
            curvature = hessian(log_joint.on_rows(rows, plain=True), mode[rows], phi)
            other[rows] = covariance_root(curvature, root[rows])
            mass[rows] = (height + _log_volume(other))[rows]
        locs.append(torch.where(new[:, None], mode, math.inf))
        roots.append(other)
        masses.append(mass)
    log_share, order = torch.stack(masses).log_softmax(0)[1:].topk(min(_MAX_FURTHER, _NUM_STARTS), 0)
    log_share = torch.cat([torch.stack(masses).log_softmax(0)[:1], log_share])
    everyone = torch.arange(len(mean))
    locs = [mean, *torch.stack(locs[1:])[order, everyone]]
    roots = [root, *torch.stack(roots[1:])[order, everyone]]
    floor = torch.where(log_share.isfinite(), math.log(_SMALLEST_SHARE), -math.inf)
    negligible = log_share < math.log(1e-6)
    log_share = torch.where(negligible, -math.inf, torch.maximum(log_share, floor))
    log_share[0] = torch.maximum(log_share[0], torch.tensor(math.log(_SMALLEST_SHARE)))
    return Proposal(torch.stack(locs).nan_to_num(posinf=0.0), torch.stack(roots), log_share.log_softmax(0))


def _log_volume(scale_tril: Tensor) -> Tensor:
    """Log of the integral of a normal's unnormalised density, ``(N,)``."""
    dim = scale_tril.shape[-1]
    return scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * dim * math.log(2 * math.pi)


@torch.no_grad()
def _log_weights(
    problem: LocalProblem, proposal: Proposal, rows: Tensor, num_draws: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws ``(K, n, D)`` and log-weights ``(K, n)`` for ``rows``, where ``proposal`` has one row for each of them."""
    log_joint = problem.objective.log_joint.on_rows(rows)
    z, log_q = proposal.sample(num_draws, rng)
    values = [log_joint(z[piece].to(problem.phi)) for piece in chunks(num_draws, len(rows))]
    log_p = torch.cat(values).double().cpu().nan_to_num(nan=-math.inf)
    return z, log_p - log_q


def _summary(log_weights: Tensor) -> dict[str, Tensor]:
    """Log-mean-exp, its standard error, tail shape and effective sample size of log-weights ``(K, n)``.

    Draws come in fours, two independent pairs from the same interval, so that their differences show the error.
    """
    count = len(log_weights)
    relative = (log_weights - log_weights.amax(0)).exp()
    mean = relative.mean(0)
    pairs = relative.unflatten(0, (-1, 2, 2)).mean(2)
    differences = pairs[:, 0] - pairs[:, 1]
    return {
        "log_evidence": log_weights.logsumexp(0) - math.log(count),
        "log_evidence_se": differences.square().sum(0).sqrt() / (mean * count / 2),
        "khat": psis(log_weights)[1],
        "ess": relative.sum(0).square() / relative.square().sum(0),
        "num_samples": torch.full_like(mean, count),
    }


@dataclass
class _Rounds:
    """Rounds of importance sampling until every datapoint is done or has had ``max_samples`` draws."""

    problem: LocalProblem
    tolerance: float
    max_samples: int

    def run(
        self, proposal: Proposal, rows: Tensor, rng: torch.Generator, patience: int | None = None
    ) -> dict[str, Tensor]:
        """Results of ``rows``; after ``patience`` rounds those that will not be done are left.

        Args:
            proposal: Their proposals.
            rows: Which datapoints to work on.
            rng: Source of the draws.
            patience: Number of rounds; None for as many as it takes.
        """
        result: dict[str, Tensor] = {}
        active = torch.arange(len(rows))
        collected = torch.empty(0, len(rows), dtype=torch.float64)
        while len(active) and len(collected) < self.max_samples:
            num_draws = min(_ROUND, max(4, (self.max_samples - len(collected)) // 4 * 4))
            fresh = _log_weights(self.problem, proposal[active], rows[active], num_draws, rng)[1]
            collected = torch.cat([collected, fresh])
            summary = _summary(collected)
            for name, values in summary.items():
                result.setdefault(name, values.new_zeros(len(rows)))[active] = values
            done = self.done(summary)
            if patience is not None and len(collected) >= patience * _ROUND:
                done = done | self._hopeless(summary)
            active, collected = active[~done], collected[:, ~done]
        return result

    def done(self, summary: Mapping[str, Tensor]) -> Tensor:
        """Which datapoints have light-tailed weights, a small standard error, and draws enough to trust both."""
        enough = summary["num_samples"] >= min(_LEAST_ROUNDS * _ROUND, self.max_samples)
        return enough & (summary["khat"] <= _LIGHT_TAIL) & (summary["log_evidence_se"] <= self.tolerance / 2)

    def _hopeless(self, summary: Mapping[str, Tensor]) -> Tensor:
        """Which datapoints will not be done within ``max_samples`` draws."""
        ratio = summary["log_evidence_se"] / (self.tolerance / 2)
        return (summary["khat"] > _LIGHT_TAIL) | (summary["num_samples"] * ratio.square() > self.max_samples)


def _keep_better(result: dict[str, Tensor], other: Mapping[str, Tensor], rows: Tensor) -> None:
    """Puts the estimates of ``rows`` in ``other`` into ``result`` where they are the better ones."""
    better = _badness(other) < _badness(result)[rows]
    for name, values in result.items():
        values[rows] = torch.where(better, other[name], values[rows])


def _badness(summary: Mapping[str, Tensor]) -> Tensor:
    """What to choose the better of two estimates by: the tail first, where it is heavy, then the standard error."""
    return summary["khat"].clamp(min=_LIGHT_TAIL) + summary["log_evidence_se"].clamp(max=1.0) * 0.1


def _adapt(problem: LocalProblem, proposal: Proposal, rows: Tensor, rng: torch.Generator) -> Proposal:
    """Moves single-component proposals of ``rows`` to the weighted moments of draws from them, three times."""
    loc, scale_tril = proposal.loc[0], proposal.scale_tril[0]
    for _ in range(3):
        z, log_weights = _log_weights(problem, Proposal.single(loc, scale_tril), rows, 2 * _ROUND, rng)
        weights = psis(log_weights)[0].softmax(0)
        mean = torch.einsum("kn,knd->nd", weights, z)
        centred = z - mean
        covariance = torch.einsum("kn,kni,knj->nij", weights, centred, centred)
        effective = 1 / weights.square().sum(0)
        trust = (effective / (effective + 2 * z.shape[-1]))[:, None, None]
        shrunk = trust * covariance + (1 - trust) * scale_tril @ scale_tril.transpose(-1, -2)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        good = failed == 0
        loc = torch.where(good[:, None], mean, loc)
        scale_tril = torch.where(good[:, None, None], factor, scale_tril)
    return Proposal.single(loc, scale_tril)
