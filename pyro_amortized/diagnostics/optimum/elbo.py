"""The ELBO at given variational parameters: unbiased estimates with honest standard errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.laplace import hessian
from pyro_amortized.diagnostics.problem import progress_bar
from pyro_amortized.diagnostics.report import widening
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.noise import generator, quasi_normal, seeded

__all__ = ["estimate_elbo", "log_weights"]

_MAX_QUADRATIC_DIM = 256
"""Most noise variables for which the quadratic control variate is worth its Hessian."""


@torch.no_grad()
def estimate_elbo(
    objective: LocalObjective,
    phis: tuple[Tensor, Tensor],
    target: float,
    seed: int,
    progress: bool,
    *,
    min_rounds: int = 10,
    max_rounds: int = 80,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
    r"""ELBOs at two phis per datapoint from common draws, unbiased, with standard errors.

    Each round is a newly randomised set of quasi-random points; standard errors come from the spread between rounds.
    Rounds go on for the datapoints whose error is above ``target``. The quadratic part of the log weights, from the
    Hessian of the log-joint at the mean of q, serves as a control variate whose expectation is known; its coefficient
    in a round is fitted to the other rounds, which leaves the estimate unbiased.

    Returns:
        Means at both phis, their standard errors, the mean difference (second minus first) and its standard error, each
        of shape ``(N,)`` in float64.
    """
    family, size = objective.family, len(phis[0])
    num_draws = 2 ** math.ceil(math.log2(max(128, 4 * (family.noise_dim or 0))))
    quadratics = [_quadratic(objective, phi) for phi in phis]
    rounds = torch.zeros(0, 2, 3, size, dtype=torch.float64)  # means of f, f c and c c; missing ones are NaN
    controls = torch.zeros(0, 2, size, dtype=torch.float64)
    rows = torch.arange(size)
    with progress_bar(size, "ELBO of q and q*", progress) as bar:
        for number in range(max_rounds):
            sums, control = _round(objective, phis, quadratics, rows, num_draws, generator(seed, 4, number))
            rounds = torch.cat([rounds, _scatter(sums, rows, size)])
            controls = torch.cat([controls, _scatter(control, rows, size)])
            if number + 1 < min_rounds:
                continue
            means, errors = _combine(rounds, controls)
            rows = rows[(errors[:, rows] > target).any(0)]
            bar.update(size - len(rows) - bar.n)
            if len(rows) == 0:
                break
        bar.update(size - bar.n)
    means, errors = _combine(rounds, controls)
    return (means[0], means[1]), (errors[0], errors[1]), means[2], errors[2]


def _scatter(values: Tensor, rows: Tensor, size: int) -> Tensor:
    return values.new_full((1, *values.shape[:-1], size), math.nan).index_copy(-1, rows, values.unsqueeze(0))


def _combine(rounds: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard errors of first, second and difference, ``(3, N)`` each, over the rounds that a row has."""
    present = ~rounds[:, 0, 2].isnan()
    count = present.sum(0)
    filled, controls = rounds.nan_to_num(nan=0.0), controls.nan_to_num(nan=0.0)
    others = (filled.sum(0) - filled) / (count - 1)
    control = (controls.sum(0) - controls) / (count - 1)
    covariance = others[:, :, 1] - others[:, :, 0] * control
    variance = others[:, :, 2] - control.square()
    values = filled[:, :, 0] - controls * torch.where(variance > 0, covariance / variance, 0.0)
    values = torch.cat([values, values[:, 1:] - values[:, :1]], 1)
    mean = torch.where(present[:, None], values, 0.0).sum(0) / count
    mean[:2] = torch.where((rounds[:, :, 0] == -math.inf).any(0), -math.inf, mean[:2])
    squares = torch.where(present[:, None], values - mean, 0.0).square().sum(0)
    return mean, widening(count - 1.0) * (squares / (count * (count - 1))).sqrt()


def _quadratic(objective: LocalObjective, phi: Tensor) -> Tensor | None:
    """Half the second derivatives of the log weight with respect to the noise at 0, ``(N, noise_dim, noise_dim)``."""
    family = objective.family
    if family.noise_dim is None or family.noise_dim > _MAX_QUADRATIC_DIM:
        return None
    phi = phi.double()
    zero = phi.new_zeros(1, len(phi), family.noise_dim)
    unit = torch.eye(family.noise_dim, dtype=phi.dtype, device=phi.device).unsqueeze(1).expand(-1, len(phi), -1)
    mean = family.rsample(phi, zero)
    jacobian = (family.rsample(phi, unit) - mean).permute(1, 2, 0)
    curvature = hessian(objective.log_joint.plain, mean[0], objective.like).to(jacobian)
    curvature = curvature + torch.linalg.pinv(jacobian @ jacobian.transpose(-1, -2), hermitian=True)
    quadratic = 0.5 * jacobian.transpose(-1, -2) @ curvature @ jacobian
    return quadratic.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu()


def _round(
    objective: LocalObjective,
    phis: tuple[Tensor, Tensor],
    quadratics: list[Tensor | None],
    rows: Tensor,
    num_draws: int,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One round of :func:`estimate_elbo` for ``rows``: means of f, f c and c c ``(2, 3, n)``, and of c ``(2, n)``."""
    family, size = objective.family, len(phis[0])
    part = objective if len(rows) == size else objective.select(rows)
    known = torch.arange(size) if part is None else rows
    noise, seed = None, int(torch.randint(2**31 - 1, (), generator=rng))
    if family.noise_dim is not None:
        noise = quasi_normal(num_draws, len(known), family.noise_dim, rng, whiten=False)
    sums, controls = [], []
    for phi, quadratic in zip(phis, quadratics, strict=True):
        values = log_weights(part or objective, phi[known], noise, num_draws, seed)
        values = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # no density where none is defined
        control = torch.zeros_like(values)
        if noise is not None and quadratic is not None:
            matrix = quadratic[known]
            control = torch.einsum("kni,nij,knj->kn", noise, matrix, noise) - matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        sums.append(torch.stack([values.mean(0), (values * control).mean(0), control.square().mean(0)]))
        controls.append(control.mean(0))
    result, control = torch.stack(sums), torch.stack(controls)
    return (result[..., rows], control[..., rows]) if part is None else (result, control)


def log_weights(
    objective: LocalObjective, phi: Tensor, noise: Tensor | None, num_draws: int = 0, seed: int = 0
) -> Tensor:
    """Log weights ``(K, N)`` in float64, on given noise, or on the family's own draws under a seed."""
    pieces = chunks(num_draws if noise is None else len(noise), len(phi))
    if noise is not None:
        values = [objective.log_weights(phi, noise[piece].to(phi)) for piece in pieces]
    else:
        with seeded(generator(seed)):
            values = [objective.log_weights(phi, piece.stop - piece.start) for piece in pieces]
    return torch.cat(values).cpu().double()
