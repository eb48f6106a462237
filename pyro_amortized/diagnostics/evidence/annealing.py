r"""Annealed importance sampling: the evidence where no proposal is close enough to the posterior.

Chains start from a proposal :math:`q` and follow the path :math:`q(z)^{1 - \beta} p(x, z)^\beta` from
:math:`\beta = 0` to 1 by Hamiltonian Monte Carlo. A pilot run finds, for every datapoint, the temperatures at which the
path moves at constant speed and the step sizes; both are then frozen, so that the weights of the main run are unbiased.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.evidence.proposal import DF, Proposal
from pyro_amortized.diagnostics.problem import LocalProblem, value_and_gradient
from pyro_amortized.objective.noise import generator

__all__ = ["Path", "Points", "anneal"]

_NUM_CHAINS = 256
_NUM_PILOT_CHAINS = 64
_NUM_PILOT_TEMPERATURES = 48
_NUM_LEAPFROG = 4
_TARGET_ACCEPTANCE = 0.8
_LEAST_TEMPERATURES = 32


@dataclass
class Points:
    """Where chains are: positions, both log-densities ``(K, n)`` and their gradients ``(K, n, D)``."""

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    grad_p: Tensor
    grad_q: Tensor

    @property
    def difference(self) -> Tensor:
        """log p - log q."""
        return self.log_p - self.log_q

    def where(self, condition: Tensor, other: Points) -> Points:
        """These where the condition ``(K, n)`` holds, and the other points elsewhere."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Points(*(torch.where(condition if a.dim() == 2 else condition.unsqueeze(-1), a, b) for a, b in pairs))

    def of_rows(self, rows: Tensor) -> Points:
        """Those of some datapoints."""
        return Points(*(value[:, rows] for value in vars(self).values()))

    def taken(self, chosen: Tensor) -> Points:
        """Those at some positions ``(K, n)`` among them."""
        wide = chosen.unsqueeze(-1).expand_as(self.z)
        return Points(*(value.gather(0, chosen if value.dim() == 2 else wide) for value in vars(self).values()))


class Path:
    """The path of some datapoints from a proposal to their posteriors, and the steps of chains along it."""

    def __init__(self, problem: LocalProblem, proposal: Proposal, rows: Tensor) -> None:
        self.log_joint = problem.objective.log_joint.on_rows(rows)
        self.like = problem.phi
        self.proposal = proposal
        self.units = proposal.scale_tril[0]

    def at(self, z: Tensor) -> Points:
        """Evaluates both ends of the path."""
        log_p, grad_p = value_and_gradient(self.log_joint, z, self.like)
        with torch.enable_grad():
            y = z.detach().requires_grad_()
            log_q = self.proposal.log_prob(y)
            (grad_q,) = torch.autograd.grad(log_q.sum(), y)
        return Points(z.detach(), log_p, log_q.detach(), grad_p, grad_q)

    def move(self, points: Points, beta: Tensor, step_size: Tensor, rng: torch.Generator) -> tuple[Points, Tensor]:
        """One Hamiltonian Monte Carlo step at inverse temperatures ``(n,)``; also the acceptance rate ``(n,)``."""
        momentum = torch.randn(points.z.shape, generator=rng, dtype=torch.float64)
        jitter = 0.8 + 0.4 * torch.rand(points.log_p.shape, generator=rng, dtype=torch.float64)
        step = (jitter * step_size).unsqueeze(-1)
        new, p = points, momentum + 0.5 * step * self._force(points, beta)
        for number in range(_NUM_LEAPFROG):
            new = self.at(new.z + torch.einsum("nij,knj->kni", self.units, step * p))
            p = p + (1.0 if number + 1 < _NUM_LEAPFROG else 0.5) * step * self._force(new, beta)
        energy = [self._energy(points, beta, momentum), self._energy(new, beta, p)]
        accepted = (energy[0] - energy[1]).nan_to_num(nan=-math.inf).clamp(max=0.0).exp()
        uniform = torch.rand(accepted.shape, generator=rng, dtype=torch.float64)
        return new.where(uniform < accepted, points), accepted.mean(0)

    def _force(self, points: Points, beta: Tensor) -> Tensor:
        blend = beta.unsqueeze(-1) * points.grad_p + (1 - beta).unsqueeze(-1) * points.grad_q
        return torch.einsum("nji,knj->kni", self.units, blend)

    def _energy(self, points: Points, beta: Tensor, momentum: Tensor) -> Tensor:
        return 0.5 * momentum.square().sum(-1) - beta * points.log_p - (1 - beta) * points.log_q


@dataclass
class _Schedule:
    """Inverse temperatures ``(T + 1, n)`` from 0 to 1, and step sizes ``(T, n)`` at those above 0."""

    beta: Tensor
    step_size: Tensor
    length: Tensor

    def at_speed(self, num_temperatures: int) -> _Schedule:
        """The same path in other steps, equally long in the pilot's measure."""
        place = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64).unsqueeze(-1)
        share = (self.length / self.length[-1]).T.contiguous()
        position = place.expand(-1, len(share)).T.contiguous()
        right = torch.searchsorted(share, position).clamp(1, share.shape[1] - 1)
        low, high = share.gather(1, right - 1), share.gather(1, right)
        weight = ((position - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        betas = self.beta.T.contiguous()
        beta = betas.gather(1, right - 1) + weight * (betas.gather(1, right) - betas.gather(1, right - 1))
        steps = self.step_size.T.gather(1, right - 1)
        beta[:, 0], beta[:, -1] = 0.0, 1.0
        return _Schedule(beta.T, steps.T[1:], place)


@torch.no_grad()
def anneal(
    problem: LocalProblem, proposal: Proposal, rows: Tensor, tolerance: float, max_evaluations: int, seed: Any
) -> Tensor:
    """Log-weights ``(K, n)`` of annealed chains for ``rows``, where ``proposal`` has one row for each of them.

    Args:
        problem: The bound call.
        proposal: Where the chains start.
        rows: Which datapoints to work on.
        tolerance: Twice the standard error to aim at, in nats.
        max_evaluations: Most evaluations of the log-joint per datapoint in the main run.
        seed: Integers.

    References:
        Annealed Importance Sampling, Radford M. Neal (2001), https://arxiv.org/abs/physics/9803008
        Simulating Normalizing Constants: From Importance Sampling to Bridge Sampling to Path Sampling, Andrew Gelman,
        Xiao-Li Meng (1998).
    """
    path = Path(
        problem, replace(proposal, df=torch.full_like(proposal.df, DF)), rows
    )  # chains from far away would set the pace
    pilot = _pilot(path, generator(*seed, 20))
    most = max(_LEAST_TEMPERATURES, max_evaluations // (_NUM_CHAINS * _NUM_LEAPFROG))
    wanted = 2 * pilot.length[-1].square().max() / (_NUM_CHAINS * (tolerance / 2) ** 2)
    num_temperatures = int(wanted.clamp(_LEAST_TEMPERATURES, most))
    return _run(path, pilot.at_speed(num_temperatures), _NUM_CHAINS, generator(*seed, 21))


def _run(path: Path, schedule: _Schedule, num_chains: int, rng: torch.Generator) -> Tensor:
    points = path.at(path.proposal.sample(num_chains, rng))
    log_weights = torch.zeros_like(points.log_p)
    last = len(schedule.beta) - 2
    for t, (before, beta) in enumerate(zip(schedule.beta[:-1], schedule.beta[1:], strict=True)):
        log_weights += (beta - before) * points.difference
        if t < last:
            points, _ = path.move(points, beta, schedule.step_size[t], rng)
    return torch.where(log_weights.isfinite(), log_weights, -math.inf)


def _pilot(path: Path, rng: torch.Generator) -> _Schedule:
    """Step sizes by stochastic approximation, and the length of the path by the spread of log p - log q along it."""
    points = path.at(path.proposal.sample(_NUM_PILOT_CHAINS, rng))
    size, dim = points.z.shape[1:]
    beta = torch.linspace(0, 1, _NUM_PILOT_TEMPERATURES + 1, dtype=torch.float64).square()  # steepest at the start
    log_step = torch.full((size,), math.log(dim**-0.25), dtype=torch.float64)
    speeds, steps = [_spread(points.difference)], [log_step.exp()]
    for value in beta[1:]:
        inverse = value.expand(size)
        for _ in range(2):
            points, accepted = path.move(points, inverse, log_step.exp(), rng)
            log_step = log_step + 0.5 * (accepted - _TARGET_ACCEPTANCE)
        speeds.append(_spread(points.difference))
        steps.append(log_step.exp())
    speed = torch.stack(speeds)
    pieces = 0.5 * (speed[1:] + speed[:-1]) * beta.diff().unsqueeze(-1)
    pieces = pieces + 1e-3 * beta.diff().unsqueeze(-1)  # so that no part of the path is skipped
    length = torch.cat([torch.zeros(1, size, dtype=torch.float64), pieces.cumsum(0)])
    return _Schedule(beta.unsqueeze(-1).expand(-1, size), torch.stack(steps), length)


def _spread(difference: Tensor) -> Tensor:
    """Standard deviation over chains; of the finite values, so that the start of the path does not last for ever."""
    low = difference.isfinite()
    values = torch.where(low, difference, difference.where(low, torch.zeros_like(difference)).amin(0))
    return values.std(0)
