"""Members of families fitted to single datapoints' posteriors, at a cost of a few hundred gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.lbfgs import minimize_rows
from pyro_amortized.diagnostics.optimum.local_optimum import FixedNoiseLoss
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.families import MultivariateNormal
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.noise import quasi_normal

__all__ = ["MAX_FITTED_DIM", "fit", "full_rank"]

MAX_FITTED_DIM = 128
_MAX_STEPS = 20
_MAX_LENGTH = 5.0


def fit(problem: LocalProblem, rows: Tensor, start: Tensor, units: Tensor, rng: torch.Generator) -> Tensor:
    """phi ``(n, P)`` of the family's best members for some datapoints, by L-BFGS on whitened quasi-random noise.

    Args:
        problem: The bound call, of a family that turns noise into draws.
        rows: Which datapoints, ``(n,)``.
        start: Where to start, ``(N, P)``.
        units: Roots of covariances, in whose units locations are moved, ``(N, D, D)``.
        rng: Source of the noise.
    """
    family = problem.objective.family
    noise_dim = family.noise_dim or 0
    noise = quasi_normal(max(64, 4 * noise_dim), len(start), noise_dim, rng).to(problem.phi)
    loss = FixedNoiseLoss(problem, noise, rows, start[rows].cpu().double(), units[rows])
    found = minimize_rows(loss, loss.origin, max_length=_MAX_LENGTH, max_steps=_MAX_STEPS, tolerance=1e-3)
    return loss.phi_at(found.x, torch.arange(len(rows))).to(problem.phi)


def full_rank(problem: LocalProblem, loc: Tensor, root: Tensor) -> LocalProblem:
    """The same call with full-rank normals, which start at given ones.

    Args:
        problem: The bound call.
        loc: Means, ``(N, D)``.
        root: Cholesky factors of covariances, ``(N, D, D)``.
    """
    family = MultivariateNormal(loc.shape[-1])
    phi = family.laplace(loc, torch.cholesky_inverse(root)).to(problem.phi)
    family = family.to(problem.phi.device)
    return replace(problem, objective=LocalObjective(problem.objective.log_joint, family), phi=phi)
