"""What a look at the posteriors finds that did not start at q, and whether draws agree with it.

Chains and weights that start at q can be perfect and miss a mode that q misses. So a search for modes from many sides
comes first, and importance samples of a mixture at all modes found, with a component as wide as the prior, estimate
means and standard deviations. Where their weights are no good, particles from a wide reference do, in up to 10
dimensions; in more, draws must at least have been at every mode found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_amortized.diagnostics.certificates.smc import MAX_SMC_DIM, particles
from pyro_amortized.diagnostics.certificates.weighing import weighted_moments
from pyro_amortized.diagnostics.evidence.evidence import adapt, log_weights_at
from pyro_amortized.diagnostics.evidence.importance import psis
from pyro_amortized.diagnostics.evidence.proposal import Proposal, proposals_at
from pyro_amortized.diagnostics.optimum.modes import Modes, Search, mahalanobis
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.objective.noise import generator

__all__ = ["KINDS", "Exploration"]

KINDS = ("modes", "importance", "smc")
"""What draws are compared with: the modes alone, importance samples, or particles (sequential Monte Carlo)."""
_NUM_DRAWS = 1000
_KHAT, _LEAST_ESS = 0.7, 200.0
"""Of importance samples that tell means to a fifteenth of a standard deviation."""
_NUM_ADAPTATIONS = 2
_CLOSE, _MARGIN = 0.25, 0.08
"""Differences of means, in standard deviations, and of logarithms of standard deviations, up to which two agree: the
margin and three standard errors of what was found, and at most the first."""
_PRECISE, _MORE_DRAWS = 0.04, 16_000
"""Standard errors of these from which on more draws are taken before anything is compared, and how many."""
_PIECE = 2**22
"""Numbers in the draws that are held at a time."""
_MATTERS = 1e-3
"""Share of the posterior from which on a mode must have been met: one far away that holds a thousandth of the posterior
already shows in standard deviations."""
_LEAST_SEEN = 0.1
"""Share of the draws around a mode, as a multiple of the mode's own, from which on it has been met."""


@dataclass
class Exploration:
    """What was found for N datapoints.

    Attributes:
        problem: The bound call.
        modes: The modes.
        prior: Draws of the prior, ``(K, N, D)``.
        proposals: Which datapoints, and mixtures at their modes.
        loc: Means, ``(N, D)``, float64.
        scale: Standard deviations, ``(N, D)``.
        error: Standard errors of the means, in standard deviations, and of the logarithms of the standard deviations,
            ``(2, N, D)``; infinite where they are not known.
        ess: Effective sample size of the importance samples, as a share of their number, ``(N,)``.
        kind: Index in :data:`KINDS` of what the moments are from, ``(N,)``.
        sharpened: Whether they are from more draws than at first, ``(N,)``.
        rng: Source of further draws.
    """

    problem: LocalProblem
    modes: Modes
    prior: Tensor
    proposals: list[tuple[Tensor, Proposal]]
    loc: Tensor
    scale: Tensor
    error: Tensor
    ess: Tensor
    kind: Tensor
    sharpened: Tensor
    rng: torch.Generator

    @classmethod
    def of(cls, problem: LocalProblem, phi: Tensor, seed: tuple[int, ...]) -> Exploration:
        """Looks for the modes of all datapoints, and samples from a mixture at them."""
        search = Search(problem, phi, seed)
        modes = search.run()
        size, dim = search.mean.shape
        nothing = torch.zeros(size, dtype=torch.float64)
        loc, scale = search.mean.clone(), torch.ones(size, dim, dtype=torch.float64)
        kind = torch.zeros(size, dtype=torch.long)
        error = torch.full((2, size, dim), math.inf, dtype=torch.float64)
        found = cls(problem, modes, search.draws, [], loc, scale, error, nothing, kind, kind > 0, generator(*seed, 41))
        for rows, proposal, settled in proposals_at(problem, search, modes):
            found._sample(rows, proposal)
            found.kind[rows] *= settled
        return found

    @property
    def num_modes(self) -> Tensor:
        """Number of modes that hold a thousandth of the posterior or more, ``(N,)``."""
        return (self.modes.share >= _MATTERS).sum(0)

    def _sample(self, rows: Tensor, proposal: Proposal) -> None:
        """Importance samples of some datapoints, where they are poor once more after adapting the mixture."""
        poor = self._weigh(rows, proposal, _NUM_DRAWS)
        good = (~poor).nonzero().squeeze(-1)
        if len(good):
            self.proposals.append((rows[good], proposal[good]))
        left = poor.nonzero().squeeze(-1)
        if len(left):
            fitted = adapt(self.problem, proposal[left], rows[left], self.rng, _NUM_ADAPTATIONS)
            self._weigh(rows[left], fitted, 2 * _NUM_DRAWS)
            self.proposals.append((rows[left], fitted))

    def _weigh(self, rows: Tensor, proposal: Proposal, number: int) -> Tensor:
        """Moments of some datapoints, and for which of these the weights are poor."""
        z = proposal.sample(4 * max(number // 4, proposal.num_parts), self.rng)
        log_weights = log_weights_at(self.problem, proposal, rows, z)
        none = ~(log_weights.amax(0) > -math.inf)
        smoothed, khat = psis(torch.where(none, 0.0, log_weights.nan_to_num(nan=-math.inf)))
        weights = smoothed.softmax(0)
        ess = torch.where(none, 0.0, 1 / weights.square().sum(0))
        self.loc[rows], self.scale[rows], self.error[:, rows] = weighted_moments(z, weights)
        self.ess[rows] = ess / len(z)
        poor = none | (khat >= _KHAT) | (ess < _LEAST_ESS)
        self.kind[rows] = KINDS.index("importance") * (~poor)
        return poor

    def compare(self, rows: Tensor, draws: Tensor) -> tuple[Tensor, list[str]]:
        """Whether draws of some datapoints agree with what was found, and in which words they do not.

        Args:
            rows: Which datapoints, ``(n,)``.
            draws: ``(S, n, D)``.

        Returns:
            ``(n,)``, and as many words.
        """
        self._sharpen(rows)
        if draws.shape[-1] <= MAX_SMC_DIM:
            self._add_particles(rows[self.kind[rows] == 0])
        loc, scale = draws.mean(0), draws.std(0)
        wide = torch.maximum(scale, self.scale[rows]).clamp(min=1e-300)
        shift = (loc - self.loc[rows]).abs() / wide
        ratio = (scale.clamp(min=1e-300) / self.scale[rows].clamp(min=1e-300)).log()
        bounds = self._bounds(rows)
        close = ((shift <= bounds[0]) & (ratio.abs() <= bounds[1])).all(-1)
        alone, several = self.kind[rows] == 0, (self.modes.share[:, rows] >= _MATTERS).sum(0) > 1
        asked, met = (alone | several).nonzero().squeeze(-1), torch.ones_like(alone)
        if len(asked):
            met[asked] = self._has_met(rows[asked], draws[:, asked])
        words = [
            self._differs(shift[i], ratio[i], int(row)) if not alone[i] and not close[i] else self._unmet(int(row))
            for i, row in enumerate(rows)
        ]
        return met & (close | alone), words

    def _bounds(self, rows: Tensor | int) -> Tensor:
        """Up to which differences of means and of logarithms of standard deviations draws agree, ``(2, *rows, D)``."""
        return (_MARGIN + 3 * self.error[:, rows]).clamp(max=_CLOSE)

    def _unmet(self, row: int) -> str:
        settled = bool(self.modes.settled[row])
        return f"has not met {'a mode' if settled else 'all modes, of which there may be more,'} of the search"

    def _differs(self, shift: Tensor, ratio: Tensor, row: int) -> str:
        names, source = self.problem.objective.log_joint.layout.names, KINDS[self.kind[row]]
        bounds = self._bounds(row)
        d = int((shift - bounds[0]).argmax())
        if shift[d] > bounds[0, d]:
            return f"{source} puts {names[d]} {shift[d]:.2f} sd away"
        d = int((ratio.abs() - bounds[1]).argmax())
        return f"{source} has a sd of {names[d]} {(-ratio[d]).exp():.2f} times this"

    def doubt(self, rows: Tensor) -> None:
        """Trusts the moments of some datapoints no longer: more draws from the same mixtures were worth little."""
        self.error[:, rows] = math.inf

    def _sharpen(self, rows: Tensor) -> None:
        """Takes more draws for those of some datapoints whose moments are known too badly for a comparison."""
        known = self.kind == KINDS.index("importance")
        vague = known & ~self.sharpened & (self.error.amax((0, 2)) > _PRECISE)
        vague &= torch.isin(torch.arange(len(known)), rows)
        for own, proposal in self.proposals:
            few = vague[own].nonzero().squeeze(-1)
            for part in few.split(max(1, _PIECE // (_MORE_DRAWS * self.loc.shape[-1]))) if len(few) else ():
                self._weigh(own[part], proposal[part], _MORE_DRAWS)
                self.sharpened[own[part]] = True

    def _add_particles(self, rows: Tensor) -> None:
        if len(rows):
            z = particles(self.problem, rows, self.prior, self.rng)
            self.loc[rows], self.scale[rows], self.error[:, rows] = z.mean(0), z.std(0), math.inf
            self.kind[rows] = KINDS.index("smc")

    def _has_met(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Whether draws have been at every mode that matters."""
        dim = draws.shape[-1]
        near = dim + 4 * math.sqrt(2 * dim)
        met = self.modes.settled[rows] | (self.kind[rows] > 0)
        for loc, root, share in zip(self.modes.loc, self.modes.root, self.modes.share, strict=True):
            distance = mahalanobis(draws - loc[rows], root[rows].expand(len(draws), -1, -1, -1))
            seen = (distance <= near).double().mean(0)
            met &= (share[rows] < _MATTERS) | (seen >= _LEAST_SEEN * share[rows])
        return met
