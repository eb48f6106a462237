"""Ranks of the true latents of simulated data among draws from a guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.diagnostics.simulation import Simulation
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.noise import draw, seeded
from pyro_amortized.objective.prior import prior_draws
from pyro_amortized.structure.structure import Structure

__all__ = ["Posterior", "prior_location", "ranks"]

Posterior = Callable[..., Any]
"""A procedure such as :func:`~pyro_amortized.certified_posterior`, from a model, a guide and a call to draws."""


@torch.no_grad()
def ranks(
    original: LocalProblem,
    simulation: Simulation,
    prior: tuple[Tensor, Tensor],
    num_samples: int,
    rng: torch.Generator,
    posterior: Posterior | None = None,
) -> tuple[Tensor, Tensor]:
    """Ranks of the true value of every quantity among draws from the guide, or from another procedure.

    Ties are broken at random. Reference points are draws from a normal with the prior's mean and standard deviation.

    Returns:
        Ranks ``(S, Q)``, without those of log q where it is not the guide that is asked; and which simulations have
        draws, ``(S,)``.
    """
    structure, phi = _infer(original, simulation, rng)
    before = original.objective.log_joint
    call = replace(before.call, args=simulation.args, kwargs=simulation.kwargs, structure=structure)
    log_joint = before.of_call(call)
    family = original.objective.family
    loc, scale = prior
    reference = loc + scale * torch.randn(simulation.latents.shape, generator=rng, dtype=torch.float64).to(scale)

    def quantities(z: Tensor) -> Tensor:
        log_q = [family(phi).log_prob(z)] if posterior is None else []
        distance = ((z - reference) / scale).square().sum(-1)
        others = torch.stack([part.to(z) for part in (log_joint.plain(z), *log_q, distance)], -1)
        return torch.cat([z, others.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)], -1)

    served, draws = torch.ones(len(phi), dtype=torch.bool), None
    if posterior is not None:
        served, draws = _ask(posterior, original, simulation, num_samples, rng)
    truth = quantities(_with_reference(simulation.latents.to(phi), structure, rng).unsqueeze(0))
    below, equal = torch.zeros(truth.shape[1:]), torch.zeros(truth.shape[1:])
    for piece in chunks(num_samples, len(phi)):
        number = piece.stop - piece.start
        values = quantities(draw(family, phi, number, rng) if draws is None else draws[piece].to(phi))
        below += (values < truth).sum(0).cpu()
        equal += (values == truth).sum(0).cpu()
    ties = torch.rand(equal.shape, generator=rng, dtype=torch.float64) * (equal + 1)
    return below.long() + ties.floor().long(), served


def _with_reference(latents: Tensor, structure: Structure, rng: torch.Generator) -> Tensor:
    """True latents with draws of a standard normal in the place of masked ones: what guides and log-joints have there.

    A model draws from a prior that counts for nothing.
    """
    present = structure.layout.present  # type: ignore[union-attr]
    if present is None:
        return latents
    drawn = torch.randn(latents.shape, generator=rng, dtype=torch.float64).to(latents)
    return torch.where(present.to(latents.device), latents, drawn)


def _ask(
    posterior: Posterior,
    original: LocalProblem,
    simulation: Simulation,
    num_samples: int,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Which simulations a procedure answers, and draws ``(L, S, D)`` chosen at random from its own."""
    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    model = original.objective.log_joint.call.model
    found = posterior(model, original.guide, simulation.args, simulation.kwargs, seed=seed)
    draws = found.draws
    if len(draws) < num_samples:
        raise ValueError(
            f"Cannot take num_samples={num_samples} draws from this posterior because it gives {len(draws)}; try "
            f"num_samples={max(19, len(draws) // 4)}."
        )
    chosen = torch.randperm(len(draws), generator=rng)[:num_samples]
    return torch.from_numpy(found.dataset["certified"].values), draws[chosen]


def _infer(original: LocalProblem, simulation: Simulation, rng: torch.Generator) -> tuple[Structure, Tensor]:
    """The structure of a simulated call, and the guide's variational parameters at the same global latents."""
    guide = original.guide
    try:
        with seeded(rng), guide.repeatable():
            inferred = guide.infer_given(original.held, *simulation.args, **simulation.kwargs)
            return inferred.structure, inferred.local[0]
    except ValueError as error:
        raise ValueError(
            "Cannot calibrate this guide because it has no answer to data simulated from the model, which may be more "
            f"extreme than the observed data; try a prior that gives plausible data. {error}"
        ) from error


def prior_location(problem: LocalProblem, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the prior's draws, ``(D,)`` each."""
    log_joint = problem.objective.log_joint
    with seeded(rng):
        prior = prior_draws(log_joint, 1 + 200 // log_joint.num_datapoints).flatten(0, 1)
    return prior.mean(0), prior.std(0).clamp(min=1e-6)
