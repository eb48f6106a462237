"""From the encoder's answer to chains: each datapoint goes on until a stage passes.

Four stages, from the cheapest on: draws of the guide; of its family's best member for the datapoint; of a full-rank
approximation, which is a normal fitted to the datapoint, or a mixture at the modes that the exploration has found, as
they are or fitted to weighted draws; and Hamiltonian Monte Carlo, warm-started at the full-rank normal. A stage passes
if its draws are worth enough and agree with the exploration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_amortized.diagnostics.certificates.exploration import Exploration
from pyro_amortized.diagnostics.certificates.fits import MAX_FITTED_DIM, fit, full_rank
from pyro_amortized.diagnostics.certificates.hmc import NUM_CHAINS, Chains, run_chains
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.certificates.weighing import Member, Weighed, weigh
from pyro_amortized.diagnostics.evidence.evidence import adapt
from pyro_amortized.diagnostics.evidence.proposal import Approximation
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.objective.noise import draw, generator

__all__ = ["STAGES", "Certificates", "certify"]

STAGES = ("encoder", "refined", "full_rank", "hmc")
_HOPEFUL, _NUM_ADAPTATIONS, _MOST_DRAWS = 0.02, 4, 8
"""Effective share of the draws from which on a mixture can be fitted to further ones, how often, and how many times as
many draws may then be weighed: cheaper than chains, which need gradients one after the other."""


@dataclass
class Certificates:
    """What is known of N datapoints' posteriors.

    Attributes:
        draws: ``(S, N, D)``, of the last stage tried.
        stage: Its index in :data:`STAGES`, ``(N,)``.
        khat: Tail shape of the last weights tried; NaN of none.
        rhat: Largest R-hat of chains; NaN without any.
        ess: Smallest effective sample size, of weights or chains.
        divergences: Number of divergent trajectories of chains.
        converged: Whether the stage's draws are worth enough.
        agrees: Whether they agree with the exploration.
        exploration: Index in :data:`~.exploration.KINDS` of what they were compared with.
        num_modes: Number of modes found that hold a thousandth of the posterior or more.
        reasons: Why each stage before failed, in words.
    """

    draws: Tensor
    stage: Tensor
    khat: Tensor
    rhat: Tensor
    ess: Tensor
    divergences: Tensor
    converged: Tensor
    agrees: Tensor
    exploration: Tensor
    num_modes: Tensor
    reasons: list[list[str]] = field(default_factory=list)

    @classmethod
    def none(cls, num_datapoints: int, latent_dim: int, num_samples: int) -> Certificates:
        """Before any stage has been tried."""
        unknown = torch.full((num_datapoints,), torch.nan, dtype=torch.float64)
        zero = torch.zeros(num_datapoints, dtype=torch.long)
        draws = torch.full((num_samples, num_datapoints, latent_dim), torch.nan, dtype=torch.float64)
        columns = (unknown, unknown.clone(), unknown.clone(), zero.clone(), zero > 0, zero > 0, zero.clone(), zero)
        return cls(draws, zero.clone(), *columns, [[] for _ in range(num_datapoints)])

    def record(self, stage: str, rows: Tensor, found: Weighed | Chains, target: Target) -> Tensor:
        """Takes the results of a stage for some datapoints; for which of them it has converged."""
        self.stage[rows], self.draws[:, rows], self.ess[rows] = STAGES.index(stage), found.draws, found.ess
        if isinstance(found, Weighed):
            self.khat[rows] = found.khat
        else:
            self.rhat[rows], self.divergences[rows] = found.rhat, found.divergences.long()
        self.converged[rows] = found.reach(target)
        return self.converged[rows]


class _Pipeline:
    """The stages of one block of datapoints."""

    def __init__(
        self,
        problem: LocalProblem,
        phi: Tensor,
        target: Target,
        seed: tuple[int, ...],
        on_done: Callable[[int], object],
    ) -> None:
        self.problem = problem
        self.on_done = on_done
        self.phi = phi
        self.target = target
        self.rng = generator(*seed, 40)
        self.explored = Exploration.of(problem, phi, seed)
        self.result = Certificates.none(len(phi), problem.objective.family.latent_dim, target.num_samples)
        self.left = torch.arange(len(phi))

    def run(self) -> Certificates:
        """All stages, each for the datapoints that are left."""
        self._weigh("encoder", self.left, Member(self.problem.objective.family, self.phi))
        self._refine()
        self._mixtures(self.target.ess / self.target.num_samples)
        normal = self._full_rank()
        self._mixtures(_HOPEFUL, _NUM_ADAPTATIONS)
        if normal is not None and len(self.left):
            self._chains(normal[self.left])
        self.on_done(len(self.left))
        self.result.exploration, self.result.num_modes = self.explored.kind, self.explored.num_modes
        return self.result

    def _refine(self) -> None:
        family, rows = self.problem.objective.family, self.left
        if len(rows) == 0 or family.noise_dim is None or family.latent_dim > MAX_FITTED_DIM:
            return
        self.phi = self._fit(self.problem, self.phi)
        self._weigh("refined", rows, Member(family, self.phi[rows]))

    def _fit(self, problem: LocalProblem, start: Tensor) -> Tensor:
        """phi ``(N, P)`` with fitted members for the datapoints that are left."""
        phi = start.clone()
        phi[self.left] = fit(problem, self.left, start, self.explored.modes.root[0], self.rng)
        return phi

    def _mixtures(self, least: float, rounds: int = 0) -> None:
        """Mixtures at all modes, where draws from them have been worth some share, fitted to further draws or not."""
        for rows, proposal in self.explored.proposals:
            chosen = (torch.isin(rows, self.left) & (self.explored.ess[rows] >= least)).nonzero().squeeze(-1)
            if len(chosen):
                own = rows[chosen]
                fitted = adapt(self.problem, proposal[chosen], own, self.rng, rounds)
                self._weigh("full_rank", own, fitted, "mixture", _MOST_DRAWS)
                poor = ~(self.result.ess[own] >= self.target.ess) | (self.result.khat[own] >= self.target.khat)
                self.explored.doubt(own[poor & torch.isin(own, self.left)])

    def _full_rank(self) -> Member | None:
        """Full-rank normals, which are returned for chains to start at."""
        if len(self.left) == 0:
            return None
        modes = self.explored.modes
        problem = full_rank(self.problem, modes.loc[0], modes.root[0])
        phi, family = problem.phi, problem.objective.family
        if family.latent_dim <= MAX_FITTED_DIM:
            phi = self._fit(problem, phi)
        if type(self.problem.objective.family) is not type(family):  # which has been refined already
            self._weigh("full_rank", self.left, Member(family, phi[self.left]))
        return Member(family, phi)

    def _chains(self, q: Member) -> None:
        rows = self.left
        root = q.family.scale_tril(q.phi.double()).cpu()  # type: ignore[operator]
        start = draw(q.family, q.phi, NUM_CHAINS, self.rng).cpu().double()
        found = run_chains(self.problem, rows, start, root, self.target, self.rng)
        converged = self.result.record("hmc", rows, found, self.target)
        words = [f"R-hat {rhat:.3f}, {size}" for rhat, size in zip(found.rhat, _sizes(found), strict=True)]
        self._judge("hmc", rows, converged, words)

    def _weigh(self, stage: str, rows: Tensor, q: Approximation, name: str | None = None, most: int = 1) -> None:
        if len(rows):
            found = weigh(self.problem, rows, q, self.target, self.rng, most)
            converged = self.result.record(stage, rows, found, self.target)
            sizes = _sizes(found)
            words = [f"khat {khat:.2f}, {size}" for khat, size in zip(found.khat, sizes, strict=True)]
            self._judge(name or stage, rows, converged, words)

    def _judge(self, name: str, rows: Tensor, converged: Tensor, words: list[str]) -> None:
        """Compares draws that have converged with the exploration, and says why datapoints are left."""
        passed = torch.zeros_like(converged)
        index = converged.nonzero().squeeze(-1)
        if len(index):
            passed[index], differences = self.explored.compare(rows[index], self.result.draws[:, rows[index]])
            for i, difference in zip(index.tolist(), differences, strict=True):
                words[i] = difference
        self.result.agrees[rows] = passed
        for i in (~passed).nonzero().squeeze(-1).tolist():
            self.result.reasons[int(rows[i])].append(f"{name}: {words[i]}")
        done = rows[passed]
        self.left = self.left[~torch.isin(self.left, done)]
        self.on_done(len(done))


def _sizes(found: Weighed | Chains) -> list[str]:
    """Effective sample sizes in words."""
    pairs = zip(found.ess, found.tail_ess, strict=True)
    return [f"effective sample size {ess:.0f} (tails {tail:.0f})" for ess, tail in pairs]


def certify(
    problem: LocalProblem,
    phi: Tensor,
    target: Target,
    seed: tuple[int, ...],
    on_done: Callable[[int], object] = lambda number: None,
) -> Certificates:
    """Runs the stages for the datapoints of a bound call.

    Args:
        problem: The bound call.
        phi: Variational parameters to start from, ``(N, P)``.
        target: What a stage must reach.
        seed: Integers.
        on_done: Called with numbers of datapoints that are done.
    """
    return _Pipeline(problem, phi, target, seed, on_done).run()
