r"""The log evidence of every datapoint, :math:`\log p(x_n)`, by importance sampling that watches its own reliability.

A proposal is a mixture of multivariate t's: one with the mean of the optimal member of the guide's family and the
Hessian of the log-joint there, or at the mode that climbing from there leads to, if that is far; and one at every
further mode that a search from many sides has found. Where the weights have a heavy tail or vary too much, a
proposal is fitted to the weighted draws. Draws are taken in rounds, per datapoint, until the standard error is small
and the tail of the weights is light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_amortized.diagnostics.evidence.annealing import anneal
from pyro_amortized.diagnostics.evidence.importance import psis
from pyro_amortized.diagnostics.evidence.proposal import Approximation, Proposal, first_proposals
from pyro_amortized.diagnostics.problem import LocalProblem, blocks, progress_bar
from pyro_amortized.diagnostics.report import widening
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.noise import generator

__all__ = [
    "BOUNDED",
    "Rounds",
    "adapt",
    "adapted_proposals",
    "estimate_evidence",
    "estimate_rows",
    "log_weights_at",
    "reliable_evidence",
    "summary",
]

_LIGHT_TAIL, _HEAVY_TAIL = 0.5, 0.7
_ROUND = 1000
_LEAST_ROUNDS = 2
"""Rounds that every datapoint gets, so that its khat and standard error mean something."""
BOUNDED = 5.0
"""Weights that exceed their mean by no more than this have no tail to fit: of those that have one, the largest of a
thousand exceed it many times over."""
_ANNEALING = 8
"""Evaluations of the log-joint that annealing may take, for every draw allowed."""
_NUM_ADAPTATIONS = 4
_PATIENCE = 4
"""Rounds that a proposal gets before it is adapted."""


def estimate_evidence(
    problem: LocalProblem, phi: Tensor, tolerance: float, max_samples: int, seed: int, progress: bool
) -> dict[str, Tensor]:
    """:func:`log_evidence` of a call that is bound already, from the optimal phi ``(N, P)``."""
    results = []
    with progress_bar(len(phi), "log evidence", progress) as bar:
        for number, (part, part_phi) in enumerate(blocks(problem, phi)):
            results.append(_estimate_block(part, part_phi, tolerance, max_samples, (seed, number)))
            bar.update(len(part_phi))
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def reliable_evidence(evidence: Mapping[str, Tensor], tolerance: float) -> Tensor:
    """Where nothing speaks against the results of :func:`estimate_evidence`."""
    return (evidence["khat"] < _HEAVY_TAIL) & (evidence["log_evidence_se"] <= tolerance) & evidence["settled"]


def _estimate_block(
    problem: LocalProblem, phi: Tensor, tolerance: float, max_samples: int, seed: tuple[int, ...]
) -> dict[str, Tensor]:
    """Results of all datapoints of a block, those with many modes apart from the others."""
    rounds, result = Rounds(problem, tolerance, max_samples), dict[str, Tensor]()
    for rows, proposal, settled in first_proposals(problem, phi, seed):
        own = {**estimate_rows(rounds, proposal, rows, seed), "settled": settled}
        for name, values in own.items():
            result.setdefault(name, values.new_zeros(len(phi)))[rows] = values
    return result


def estimate_rows(rounds: Rounds, proposal: Proposal, rows: Tensor, seed: tuple[int, ...]) -> dict[str, Tensor]:
    """Estimates by the first proposal, by a fitted one, with more draws, by annealing."""
    problem, tolerance = rounds.problem, rounds.tolerance
    result = rounds.run(proposal, rows, generator(*seed, 6), patience=_PATIENCE)
    poor = (~rounds.done(result)).nonzero().squeeze(-1)
    if len(poor):
        fitted = adapt(problem, proposal[poor], rows[poor], generator(*seed, 7))
        _keep_better(result, rounds.run(fitted, rows[poor], generator(*seed, 8)), poor)
    stuck = (~rounds.done(result) & (result["khat"] <= _LIGHT_TAIL)).nonzero().squeeze(-1)
    if len(stuck):  # the first proposal was the better one, and only lacks draws
        _keep_better(result, rounds.run(proposal[stuck], rows[stuck], generator(*seed, 9)), stuck)
    result["annealed"] = torch.zeros(len(rows), dtype=torch.bool)
    hopeless = (result["khat"] > _HEAVY_TAIL) | (result["log_evidence_se"] > tolerance)
    hopeless = hopeless.nonzero().squeeze(-1)
    if len(hopeless) and 4 * proposal.num_parts <= _ROUND:  # chains take long where there are many modes
        most = _ANNEALING * rounds.max_samples
        weights = anneal(problem, proposal[hopeless], rows[hopeless], tolerance, most, seed)
        _keep_better(result, _checked(summary(weights), result, hopeless), hopeless)
    return result


def adapted_proposals(
    problem: LocalProblem, phi: Tensor, tolerance: float, seed: tuple[int, ...]
) -> list[tuple[Tensor, Proposal]]:
    """Rows and their proposals: the first ones where a few rounds show that they do, adapted ones elsewhere."""
    rounds, pairs = Rounds(problem, tolerance, _PATIENCE * _ROUND), []
    for rows, proposal, _ in first_proposals(problem, phi, seed):
        done = rounds.done(rounds.run(proposal, rows, generator(*seed, 6)))
        good, poor = done.nonzero().squeeze(-1), (~done).nonzero().squeeze(-1)
        if len(good):
            pairs.append((rows[good], proposal[good]))
        if len(poor):
            fitted = adapt(problem, proposal[poor], rows[poor], generator(*seed, 7))
            pairs.append((rows[poor], fitted))
    return pairs


def _log_weights(
    problem: LocalProblem, proposal: Proposal, rows: Tensor, num_draws: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws ``(K, n, D)`` and log-weights ``(K, n)`` for ``rows``, where ``proposal`` has one row for each of them."""
    z = proposal.sample(num_draws, rng)
    return z, log_weights_at(problem, proposal, rows, z)


@torch.no_grad()
def log_weights_at(
    problem: LocalProblem, proposal: Approximation, rows: Tensor, z: Tensor, log_q: Tensor | None = None
) -> Tensor:
    """Log-weights ``(K, n)`` of ``rows`` at latents ``(K, n, D)``, whose log-densities may be given."""
    log_joint = problem.objective.log_joint.on_rows(rows)
    values = [log_joint(z[piece].to(problem.phi)) for piece in chunks(len(z), len(rows))]
    log_p = torch.cat(values).cpu().double()
    log_p = torch.where(log_p.isfinite(), log_p, -math.inf)  # infinite only where numbers underflow
    return log_p - (proposal.log_prob(z) if log_q is None else log_q)


def summary(log_weights: Tensor) -> dict[str, Tensor]:
    """Log-mean-exp, its standard error, tail shape and effective sample size of log-weights ``(K, n)``.

    Draws come in fours, two independent pairs from the same interval, so that their differences show the error. A few
    fours, the outermost, may make most of it: it then has as few degrees of freedom, by Satterthwaite's approximation.
    """
    count, none = len(log_weights), log_weights.isneginf().all(0)
    log_weights = torch.where(none, 0.0, log_weights)
    relative = (log_weights - log_weights.amax(0)).exp()
    mean = relative.mean(0)
    pairs = relative.unflatten(0, (-1, 2, 2)).mean(2)
    squares = (pairs[:, 0] - pairs[:, 1]).square()
    total = squares.sum(0)
    few = (3 * total.square() / squares.square().sum(0) - 2).nan_to_num(nan=1.0).clamp(min=1.0)
    khat = psis(log_weights)[1]
    return {
        "log_evidence": torch.where(none, -math.inf, log_weights.logsumexp(0) - math.log(count)),
        "log_evidence_se": torch.where(none, math.inf, widening(few) * total.sqrt() / (mean * count / 2)),
        "khat": torch.where(none, math.inf, torch.where(relative.amax(0) <= BOUNDED * mean, khat.clamp(max=0.0), khat)),
        "ess": torch.where(none, 0.0, relative.sum(0).square() / relative.square().sum(0)),
        "num_samples": torch.full_like(mean, count),
    }


@dataclass
class Rounds:
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
            num_draws = min(4 * proposal.num_parts, max(4, (self.max_samples - len(collected)) // 4 * 4))
            fresh = _log_weights(self.problem, proposal[active], rows[active], num_draws, rng)[1]
            collected = torch.cat([collected, fresh])
            found = summary(collected)
            for name, values in found.items():
                result.setdefault(name, values.new_zeros(len(rows)))[active] = values
            done = self.done(found)
            if patience is not None and len(collected) >= patience * _ROUND:
                done = done | self._hopeless(found)
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


def _checked(annealed: dict[str, Tensor], other: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Results of annealing, with the other estimate's khat where the two do not agree: chains may miss modes too."""
    difference = annealed["log_evidence"] - other["log_evidence"][rows]
    error = (annealed["log_evidence_se"].square() + other["log_evidence_se"][rows].square()).sqrt()
    doubtful = torch.maximum(annealed["khat"], other["khat"][rows])
    khat = torch.where(difference.abs() <= 3 * error, annealed["khat"], doubtful)
    return {**annealed, "khat": khat, "annealed": torch.ones_like(khat, dtype=torch.bool)}


def _keep_better(result: dict[str, Tensor], other: Mapping[str, Tensor], rows: Tensor) -> None:
    """Puts the estimates of ``rows`` in ``other`` into ``result`` where they are the better ones."""
    better = _badness(other) < _badness(result)[rows]
    for name, values in other.items():
        result[name][rows] = torch.where(better, values, result[name][rows])


def _badness(summary: Mapping[str, Tensor]) -> Tensor:
    """What to choose the better of two estimates by: the tail first, where it is heavy, then the standard error."""
    return summary["khat"].clamp(min=_LIGHT_TAIL) + summary["log_evidence_se"].clamp(max=1.0) * 0.1


def adapt(
    problem: LocalProblem, proposal: Proposal, rows: Tensor, rng: torch.Generator, num_rounds: int = _NUM_ADAPTATIONS
) -> Proposal:
    """Moves the proposals of ``rows`` towards weighted draws from them, a few times."""
    if 4 * proposal.num_parts > _ROUND:  # what many modes hold is no matter of their widths
        return proposal
    for _ in range(num_rounds):
        z, log_weights = _log_weights(problem, proposal, rows, 8 * proposal.num_parts, rng)
        usable = torch.where(log_weights.isneginf().all(0), 0.0, log_weights)
        proposal = proposal.adapted(z, psis(usable)[0].softmax(0))
    return proposal
