r"""Hamiltonian Monte Carlo for many datapoints in one batch, each with several chains and a step size of its own.

Chains move in the units of a normal approximation. Halfway through the warm-up the units are taken from the pooled
draws instead, so that a bad approximation costs little; step sizes are found by dual averaging, pooled over a
datapoint's chains. Datapoints whose chains agree leave the batch, the others go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_amortized.diagnostics.certificates.convergence import bulk_ess, mean_ess, rank_rhat, scale_ess, tail_ess
from pyro_amortized.diagnostics.certificates.support import in_support
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.problem import LocalProblem, value_and_gradient
from pyro_amortized.structure.layout import SiteLayout

__all__ = ["NUM_CHAINS", "Chains", "run_chains"]

NUM_CHAINS = 8
_HALF_WARMUP = 50
"""Steps of each half of the warm-up."""
_KEPT_OF_WARMUP = 30
"""Steps of the first half, its last ones, whose draws make the new units."""
_MAX_LEAPFROGS = 64
_TARGET_ACCEPTANCE = 0.8
_DIVERGENT = 1000.0
"""Change of energy, in nats, from which on a trajectory counts as divergent."""
_CHECKS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""After how many draws chains are looked at, as shares of those wanted."""
_PIECE = 32
"""Datapoints whose draws are ranked at a time; bounds memory."""


@dataclass
class Chains:
    """What chains found for n datapoints.

    Attributes:
        draws: ``(S, n, D)``, evenly spaced, or repeated where fewer were needed.
        rhat: The largest R-hat of any dimension, ``(n,)``.
        ess: The smallest effective sample size of any dimension for the centre, and for the mean of values in their
            support, ``(n,)``.
        tail_ess: The same for the tails and for standard deviations.
        divergences: Number of divergent trajectories after the warm-up, ``(n,)``.
    """

    draws: Tensor
    rhat: Tensor
    ess: Tensor
    tail_ess: Tensor
    divergences: Tensor

    def reach(self, target: Target) -> Tensor:
        """For which datapoints they have converged, ``(n,)``."""
        return (self.rhat < target.rhat) & (self.ess >= target.ess) & (self.tail_ess >= target.tail_ess)


@torch.no_grad()
def run_chains(
    problem: LocalProblem, rows: Tensor, start: Tensor, scale_tril: Tensor, target: Target, rng: torch.Generator
) -> Chains:
    """Runs chains of some datapoints until they agree, or have had four times the draws wanted.

    Args:
        problem: The bound call.
        rows: Which datapoints, ``(n,)``.
        start: Where the chains start, ``(C, n, D)``, float64.
        scale_tril: Cholesky factors of covariances of about the right size, ``(n, D, D)``, float64.
        target: What chains must reach.
        rng: Source of the draws.

    References:
        MCMC Using Hamiltonian Dynamics, Radford M. Neal (2011), https://arxiv.org/abs/1206.1901
        The No-U-Turn Sampler: Adaptively Setting Path Lengths in Hamiltonian Monte Carlo, Matthew D. Hoffman, Andrew
        Gelman (2014), https://arxiv.org/abs/1111.4246
    """
    state = _State(problem, rows, start, scale_tril, rng)
    state.warm_up()
    size, dim = start.shape[1:]
    draws, nothing = torch.empty(target.num_samples, size, dim, dtype=torch.float64), torch.zeros(size).double()
    found = Chains(draws, *(nothing.clone() for _ in range(4)))
    active, kept = torch.arange(size), torch.empty(len(start), 0, size, dim, dtype=torch.float64)
    for share in _CHECKS:
        number = max(4, math.ceil(share * target.num_samples / len(start))) - kept.shape[1]
        kept = torch.cat([kept, torch.stack([state.advance() for _ in range(number)], 1)], 1)
        now = _summarise(kept, problem.objective.log_joint.layout, target, state.divergences)
        for name, value in vars(found).items():
            value.index_copy_(1 if name == "draws" else 0, active, getattr(now, name).to(value))
        left = (~now.reach(target)).nonzero().squeeze(-1)
        if len(left) == 0:
            break
        active, kept = active[left], kept[:, :, left]
        state.keep(left)
    return found


def _summarise(kept: Tensor, layout: SiteLayout, target: Target, divergences: Tensor) -> Chains:
    """What draws ``(C, T, n, D)`` say, and those of them, of all chains, that are wanted."""
    each = -(-target.num_samples // len(kept))
    times = torch.arange(each) * kept.shape[1] // each
    columns = []
    for whole in kept.split(_PIECE, 2):
        part = whole[:, times]
        ess, values = bulk_ess(part).amin(-1), in_support(layout, part)
        ess = ess if values is None else torch.minimum(ess, mean_ess(values).amin(-1))
        tail = torch.minimum(tail_ess(part), scale_ess(part)).amin(-1)
        columns.append(torch.stack([rank_rhat(whole).amax(-1), ess, tail]))
    rhat, ess, tail = torch.cat(columns, -1).nan_to_num(nan=0.0)
    rhat = torch.where(rhat > 0, rhat, math.inf)  # of chains that have not moved
    draws = kept[:, times].transpose(0, 1).flatten(0, 1)[: target.num_samples]
    return Chains(draws, rhat, ess, tail, divergences)


class _State:
    """Where the chains of n datapoints are, and how they move."""

    def __init__(
        self, problem: LocalProblem, rows: Tensor, z: Tensor, scale_tril: Tensor, rng: torch.Generator
    ) -> None:
        self.problem = problem
        self.rows = rows
        self.rng = rng
        self.units = scale_tril
        self.z = z
        self.log_p, self.gradient = self._evaluate(z, torch.arange(len(rows)))
        self.step_size = torch.full((len(rows),), z.shape[-1] ** -0.25, dtype=torch.float64)
        self.divergences = torch.zeros(len(rows))

    def keep(self, left: Tensor) -> None:
        """Goes on with some of the datapoints."""
        self.rows, self.units, self.step_size = self.rows[left], self.units[left], self.step_size[left]
        self.z, self.log_p, self.gradient = self.z[:, left], self.log_p[:, left], self.gradient[:, left]
        self.divergences = self.divergences[left]

    def warm_up(self) -> None:
        """Finds units and step sizes."""
        first = self._adapt()
        pooled = torch.cat(first[-_KEPT_OF_WARMUP:])
        centred = torch.linalg.solve_triangular(self.units, (pooled - pooled.mean(0)).permute(1, 2, 0), upper=False)
        count, dim = len(pooled) / 4, pooled.shape[-1]  # draws of a chain in a row depend on each other
        moments = centred @ centred.transpose(-1, -2) / len(pooled)
        eye = torch.eye(dim, dtype=torch.float64)
        scale = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        relative, failed = torch.linalg.cholesky_ex((count * moments + dim * scale * eye) / (count + dim))
        self.units = torch.where((failed == 0)[:, None, None], self.units @ relative, self.units)
        self.step_size = torch.full_like(self.step_size, dim**-0.25)
        self._adapt()
        self.divergences.zero_()

    def _adapt(self) -> list[Tensor]:
        """Moves with step sizes by dual averaging; the draws."""
        centre = (10 * self.step_size).log()
        error, average = torch.zeros_like(centre), torch.zeros_like(centre)
        draws = []
        for t in range(1, _HALF_WARMUP + 1):
            draws.append(self.advance())
            error = (1 - 1 / (t + 10)) * error + (_TARGET_ACCEPTANCE - self.acceptance) / (t + 10)
            log_step = (centre - t**0.5 / 0.05 * error).clamp(max=0.5)
            average = log_step * t**-0.75 + (1 - t**-0.75) * average
            self.step_size = log_step.exp()
        self.step_size = average.exp()
        return draws

    def advance(self) -> Tensor:
        """One trajectory of every chain, of random length; where the chains are then, ``(C, n, D)``."""
        path = 0.5 * math.pi * (0.5 + torch.rand(len(self.rows), generator=self.rng, dtype=torch.float64))
        number = (path / self.step_size).ceil().clamp(1, _MAX_LEAPFROGS)
        step = torch.minimum(path / number, self.step_size)
        momentum = torch.randn(self.z.shape, generator=self.rng, dtype=torch.float64)
        z, p, log_p, gradient = self._leap(momentum, step, number)
        energy = 0.5 * (p.square().sum(-1) - momentum.square().sum(-1)) - log_p + self.log_p
        energy = energy.nan_to_num(nan=math.inf)
        self.acceptance = (-energy).clamp(max=0.0).exp().mean(0)
        self.divergences = self.divergences + (energy > _DIVERGENT).sum(0)
        uniform = torch.rand(energy.shape, generator=self.rng, dtype=torch.float64)
        taken = uniform.log() < -energy
        self.z, self.gradient = (
            torch.where(taken.unsqueeze(-1), new, old) for new, old in ((z, self.z), (gradient, self.gradient))
        )
        self.log_p = torch.where(taken, log_p, self.log_p)
        return self.z

    def _leap(self, momentum: Tensor, step: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leapfrogs, as many as each datapoint takes."""
        z, log_p, gradient = self.z.clone(), self.log_p.clone(), self.gradient.clone()
        p = momentum + 0.5 * step[:, None] * self._force(gradient, slice(None))
        for i in range(int(number.max())):
            rows = (number > i).nonzero().squeeze(-1)
            size = step[rows, None]
            z[:, rows] += torch.einsum("nij,knj->kni", self.units[rows], size * p[:, rows])
            log_p[:, rows], gradient[:, rows] = self._evaluate(z[:, rows], rows)
            half = torch.where(number[rows] > i + 1, 1.0, 0.5)[:, None]
            p[:, rows] += half * size * self._force(gradient[:, rows], rows)
        return z, p, log_p, gradient

    def _force(self, gradient: Tensor, rows: Tensor | slice) -> Tensor:
        return torch.einsum("nji,knj->kni", self.units[rows], gradient)

    def _evaluate(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        log_joint = self.problem.objective.log_joint.on_rows(self.rows[rows])
        return value_and_gradient(log_joint, z, self.problem.phi)
