r"""The evidence of every datapoint at draws of the global latents, :math:`\log p(x_n \mid \theta_s)`.

The proposals are fitted once, with the global latents at their median, and used at all draws; where they do not do
for one of them, they are fitted to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.checks import Effort
from pyro_amortized.diagnostics.evidence.evidence import Rounds, estimate_rows, log_weights_at, summary
from pyro_amortized.diagnostics.evidence.proposal import Proposal, first_proposals
from pyro_amortized.diagnostics.problem import LocalProblem, progress_bar
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.evaluation import Evaluation
from pyro_amortized.objective.noise import generator, seeded

__all__ = ["GlobalDraws", "averaged", "draw_globals", "evidence_of_draws", "outside_log_joint"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class GlobalDraws:
    """Draws of the global latents from a guide.

    Attributes:
        values: Values by site, of each of the S draws.
        log_q: Their log-densities, ``(S,)``.
    """

    values: Sequence[Values]
    log_q: Tensor

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return sorted(self.values[0])


def draw_globals(
    guide: LocalGuide, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int, seed: int
) -> GlobalDraws:
    """Draws global latents from the guide of a call.

    Raises:
        ValueError: If there are none, or all draws are the same, as those of ``AutoDelta``.
    """
    if not guide.global_sites:
        raise ValueError(
            "Cannot draw global latents because the model has none, so that nothing of them is uncertain; try "
            "log_evidence(model, guide, ...) without num_global_samples."
        )
    with torch.no_grad(), seeded(generator(seed, 70)):
        pairs = [guide.sample_globals_and_log_prob(*args, **kwargs) for _ in range(number)]
    values, log_q = zip(*pairs, strict=True)
    points = [name for name in guide.global_sites if all(torch.equal(values[0][name], v[name]) for v in values[1:])]
    if number > 1 and points:
        raise ValueError(
            f"Cannot weigh draws of the global latents because {type(guide.global_guide).__name__} gives one value of "
            f"{points}, which has no density; try global_guide=AutoNormal."
        )
    return GlobalDraws(values, torch.stack([torch.as_tensor(x) for x in log_q]).cpu().double())


def _at(problem: LocalProblem, values: Values) -> LocalProblem:
    """The problem of a call with the global latents at other values."""
    log_joint = problem.objective.log_joint
    call = replace(log_joint.call, global_values={**log_joint.call.global_values, **values})
    return replace(problem, objective=LocalObjective(log_joint.of_call(call), problem.objective.family))


@torch.no_grad()
def outside_log_joint(problem: LocalProblem, values: Values) -> Tensor:
    r"""What sites outside of the datapoint plate give at global latents, :math:`\log p(\theta)` mostly, nats."""
    call = _at(problem, values).objective.log_joint.call
    terms = Evaluation(call, 1).outside(call.run()).values()
    return sum((term.cpu().double() for term in terms), torch.zeros((), dtype=torch.float64))


def evidence_of_draws(
    problem: LocalProblem, phi: Tensor, draws: Sequence[Values], effort: Effort, seed: int, progress: bool = False
) -> dict[str, Tensor]:
    """Estimates at S draws of the global latents, ``(S, N)`` each.

    Args:
        problem: The bound call, with the global latents at their median.
        phi: The optimal variational parameters there, ``(N, P)``.
        draws: Values of the global latents by site, of each draw.
        effort: Tolerance and number of draws.
        seed: Seed of all draws.
        progress: Whether to show a progress bar.
    """
    found: list[dict[str, Tensor]] = []
    proposals = first_proposals(problem, phi, (seed, 71))
    common = [_CommonDraws.of(proposal, generator(seed, 73)) for _, proposal, _ in proposals]
    with progress_bar(len(draws), "log evidence at global draws", progress) as bar:
        for number, values in enumerate(draws):
            rounds, result = Rounds(_at(problem, values), effort.tolerance, effort.max_samples), dict[str, Tensor]()
            for (rows, proposal, settled), shared in zip(proposals, common, strict=True):
                own = {**_estimate(rounds, proposal, rows, shared, (seed, 72, number)), "settled": settled}
                for name, part in own.items():
                    result.setdefault(name, part.new_zeros(len(phi)))[rows] = part
            found.append(result)
            bar.update()
    return {name: torch.stack([result[name] for result in found]) for name in found[0]}


@dataclass(frozen=True)
class _CommonDraws:
    """Draws from proposals that serve at all values of the global latents, ``(K, n, D)``, and log-densities."""

    z: Tensor
    log_q: Tensor

    @classmethod
    def of(cls, proposal: Proposal, rng: torch.Generator) -> _CommonDraws:
        """About two thousand draws."""
        z = proposal.sample(8 * proposal.num_parts, rng)
        return cls(z, proposal.log_prob(z))


def _estimate(
    rounds: Rounds, proposal: Proposal, rows: Tensor, shared: _CommonDraws, seed: tuple[int, ...]
) -> dict[str, Tensor]:
    """Estimates from the common draws, and, where these do not do, from draws and proposals of their own."""
    result = summary(log_weights_at(rounds.problem, proposal, rows, shared.z, shared.log_q))
    result["annealed"] = torch.zeros(len(rows), dtype=torch.bool)
    poor = (~rounds.done(result)).nonzero().squeeze(-1)
    if len(poor):
        own = estimate_rows(rounds, proposal[poor], rows[poor], seed)
        for name, values in own.items():
            result[name][poor] = values
    return result


def averaged(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Results :math:`\log \frac{1}{S} \sum_s p(x_n \mid \theta_s)` of estimates ``(S, N)``, which they keep.

    The standard error holds that of every draw and what differs between them.
    """
    values, errors = found["log_evidence"], found["log_evidence_se"]
    count = len(values)
    shares = values.softmax(0)
    between = (count * shares).std(0) / count**0.5
    within = (shares * errors).sum(0)  # which have draws in common
    return {
        "log_evidence": values.logsumexp(0) - math.log(count),
        "log_evidence_se": torch.hypot(between, within),
        "khat": found["khat"].amax(0),
        "ess": found["ess"].amin(0),
        "num_samples": found["num_samples"].sum(0),
        "annealed": found["annealed"].any(0),
        "settled": found["settled"].all(0),
        "log_evidence_of_draw": values,
        "log_evidence_of_draw_se": errors,
    }
