r"""The best member of a guide's family for every datapoint, :math:`q^* = \arg\max_\phi L_n(\phi)`, and honest ELBOs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_amortized.diagnostics.laplace import covariance_root, find_modes, hessian, moments
from pyro_amortized.diagnostics.lbfgs import minimize_rows
from pyro_amortized.diagnostics.noise import draw, generator, quasi_normal, seeded
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar, to_dataset
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective import LocalObjective, chunks

if TYPE_CHECKING:
    import xarray

__all__ = ["LocalOptimum", "optimize_local"]

_LBFGS_MAX_DIM = 128
_SEED_TOLERANCE = 0.005
_MAX_ATTEMPTS = 4
_MAX_LENGTH = 5.0
"""Longest step in any variational parameter; most of them are logarithms or in units of the posterior."""


@dataclass
class LocalOptimum:
    """The local optimum of every datapoint, with the ELBO there and at the guide's own phi.

    Attributes:
        phi: Optimal variational parameters of shape ``(N, P)``.
        initial_phi: The guide's, of shape ``(N, P)``.
        elbo: ELBO at ``phi``, in nats, of shape ``(N,)``, from draws that the optimisation has not seen.
        elbo_se: Its Monte Carlo standard error.
        initial_elbo: ELBO at ``initial_phi``.
        initial_elbo_se: Its Monte Carlo standard error.
        improvement: ``elbo - initial_elbo``, the amortization gap, from common draws.
        improvement_se: Its Monte Carlo standard error.
        converged: Whether the optimisation of each datapoint ended because nothing was left to gain.
        num_steps: Number of steps it took.
        dataset: All of these over the plate's dimension, but for phi.
    """

    phi: Tensor
    initial_phi: Tensor
    elbo: Tensor
    elbo_se: Tensor
    initial_elbo: Tensor
    initial_elbo_se: Tensor
    improvement: Tensor
    improvement_se: Tensor
    converged: Tensor
    num_steps: Tensor
    dataset: xarray.Dataset

    def __str__(self) -> str:
        return (
            f"LocalOptimum of {len(self.phi)} datapoints: ELBO {self.initial_elbo.mean():.3f} -> "
            f"{self.elbo.mean():.3f} nats, {int(self.converged.sum())} converged"
        )


def optimize_local(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    seed: int = 0,
    progress: bool = False,
) -> LocalOptimum:
    r"""Maximises every datapoint's ELBO over the guide's family.

    For families that turn noise into draws, the ELBO on fixed whitened quasi-random noise is maximised by L-BFGS,
    twice: from the guide's phi, and with other noise from the optimum for a Laplace approximation at the mode that the
    guide's mean leads to. Where the two optima differ by more than 0.005 nats, again with twice the draws. Other
    families, and more than 128 latent dimensions, are optimised by Adam. The reported ELBOs come from fresh draws.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package.
        model_args: The model's positional arguments.
        model_kwargs: The model's keyword arguments.
        tolerance: Three times the standard error wanted for the reported ELBOs, in nats.
        seed: Seed of the noise; torch's global seed is not touched.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`LocalOptimum`.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints.

    References:
        Inference Suboptimality in Variational Autoencoders, Chris Cremer, Xuechen Li, David Duvenaud (2018),
        https://arxiv.org/abs/1801.03558
    """
    return solve(bind(model, guide, model_args, model_kwargs, seed), tolerance, seed, progress)


def solve(problem: LocalProblem, tolerance: float, seed: int, progress: bool) -> LocalOptimum:
    """:func:`optimize_local` of a call that is bound already."""
    family = problem.objective.family
    smooth = family.noise_dim is not None and family.latent_dim <= _LBFGS_MAX_DIM
    optimizer = _smooth_optimum if smooth else _stochastic_optimum
    phi, converged, num_steps = optimizer(problem, seed, progress)
    phi = phi.to(problem.phi)
    means, errors, difference, difference_error = estimate_elbo(
        problem.objective, (problem.phi, phi), tolerance / 3, seed, progress
    )
    variables = {
        "elbo": means[1],
        "elbo_se": errors[1],
        "initial_elbo": means[0],
        "initial_elbo_se": errors[0],
        "improvement": difference,
        "improvement_se": difference_error,
        "converged": converged,
        "num_steps": num_steps,
    }
    dataset = to_dataset(problem, variables, tolerance=tolerance, seed=seed)
    return LocalOptimum(phi=phi, initial_phi=problem.phi, dataset=dataset, **variables)


def _smooth_optimum(problem: LocalProblem, seed: int, progress: bool) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS on fixed noise from two starts: the guide's phi, and the optimum for a Laplace approximation."""
    family, size = problem.objective.family, len(problem.phi)
    noise_dim = family.noise_dim or 0
    units, laplace = _laplace_start(problem, seed)
    starts = [problem.phi.double().cpu()] * 2 if laplace is None else [problem.phi.double().cpu(), laplace]
    best = starts[0].clone()
    converged, num_steps = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.long)
    rows, num_draws = torch.arange(size), max(64, 4 * noise_dim, min(family.num_params, 512) // 2 * 2)
    for attempt in range(_MAX_ATTEMPTS):
        results, ended = [], torch.ones(len(rows), dtype=torch.bool)
        for half, start in enumerate(starts):
            noise = quasi_normal(num_draws, size, noise_dim, generator(seed, 1, attempt, half))
            loss = _FixedNoiseLoss(problem, noise.to(problem.phi), rows, start[rows], units[rows])
            with progress_bar(len(rows), f"q* ({num_draws} draws, pass {half + 1})", progress) as bar:
                found = minimize_rows(loss, loss.origin, max_length=_MAX_LENGTH, on_step=partial(_show, bar))
            results.append(start.index_copy(0, rows, loss.phi_at(found.x, torch.arange(len(rows)))))
            num_steps[rows] += found.num_steps
            ended &= found.converged
        values = _compare(problem, results, generator(seed, 2, attempt))
        best[rows] = torch.where((values[0] > values[1])[:, None], *results)[rows]
        agree = (values[0] - values[1]).abs() <= _SEED_TOLERANCE
        converged[rows] = ended & agree[rows]
        rows = rows[~agree[rows]]
        if len(rows) == 0:
            break
        starts, num_draws = [best, best], 2 * num_draws
    return best, converged, num_steps


@torch.no_grad()
def _compare(problem: LocalProblem, phis: list[Tensor], rng: torch.Generator) -> list[Tensor]:
    """ELBOs at several phis on the same fresh noise, each ``(N,)``; where undefined, minus infinity."""
    noise_dim = problem.objective.family.noise_dim or 0
    noise = quasi_normal(max(256, 4 * noise_dim), len(problem.phi), noise_dim, rng).to(problem.phi)
    values = [_mean_log_weight(problem.objective, phi.to(problem.phi), noise) for phi in phis]
    return [value.nan_to_num(nan=-torch.inf) for value in values]


def _laplace_start(problem: LocalProblem, seed: int) -> tuple[Tensor, Tensor | None]:
    """Units for the location ``(N, D, D)``, and the family's optimum for the posterior's Laplace approximation."""
    log_joint, family = problem.objective.log_joint, problem.objective.family
    mean, scale_tril = moments(family, problem.phi, generator(seed, 11))
    modes, _ = find_modes(log_joint, mean.unsqueeze(0), scale_tril, problem.phi)
    units = covariance_root(hessian(log_joint, modes[0], problem.phi), scale_tril)
    return units, family.laplace(modes[0], torch.cholesky_inverse(units))


def _show(bar: Any, finished: int) -> None:
    bar.update(finished - bar.n)


class _FixedNoiseLoss:
    """The negative ELBO on fixed noise and its gradient, for some of the datapoints.

    Where phi begins with a location, the optimiser sees it in given units, relative to the start, so that strong
    correlations and differences of scale between the latents do not slow it down.
    """

    def __init__(self, problem: LocalProblem, noise: Tensor, rows: Tensor, start: Tensor, units: Tensor) -> None:
        self.problem = problem
        self.noise = noise
        self.rows = rows
        self.units = units if problem.objective.family.loc_first else None
        self.dim = problem.objective.family.latent_dim
        self.loc = start[:, : self.dim]
        self.origin = start.clone()
        if self.units is not None:
            self.origin[:, : self.dim] = 0.0

    def phi_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """phi of what the optimiser sees."""
        if self.units is None:
            return x
        loc = self.loc[positions] + (self.units[positions] @ x[:, : self.dim, None]).squeeze(-1)
        return torch.cat([loc, x[:, self.dim :]], -1)

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self._on_rows(self.phi_at(x, positions), self.rows[positions])
        if self.units is not None:
            whitened = (self.units[positions].transpose(-1, -2) @ gradient[:, : self.dim, None]).squeeze(-1)
            gradient = torch.cat([whitened, gradient[:, self.dim :]], -1)
        return value, gradient

    def _on_rows(self, phi: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        whole, size = self.problem.objective, len(self.problem.phi)
        objective = whole if len(rows) == size else whole.select(rows)
        if objective is not None:
            return self._evaluate(objective, phi, self.noise[:, rows])
        full = self.problem.phi.double().cpu().index_copy(0, rows, phi)  # the model runs only on all its data
        value, gradient = self._evaluate(whole, full, self.noise)
        return value[rows], gradient[rows]

    def _evaluate(self, objective: LocalObjective, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x)
        for piece in chunks(len(noise), len(x)):
            with torch.enable_grad(), pyro.validation_enabled(False):  # a step too far gives a value that is rejected
                phi = x.to(self.problem.phi).clone().requires_grad_()
                elbo = objective.sum_elbo(phi, noise[piece])
                (grad,) = torch.autograd.grad(elbo.sum(), phi)
            value -= elbo.detach().to(value) / len(noise)
            gradient -= grad.to(gradient) / len(noise)
        return value, gradient


def _stochastic_optimum(problem: LocalProblem, seed: int, progress: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Adam with a cosine schedule, a short and a long run; they must agree for a datapoint to count as converged."""
    short = _adam(problem.objective, problem.phi, 300, generator(seed, 3, 0), progress)
    long = _adam(problem.objective, short, 1000, generator(seed, 3, 1), progress)
    _, _, gain, gain_se = estimate_elbo(problem.objective, (short, long), 0.01, seed + 1, False)
    phi = torch.where((gain > 0)[:, None].to(long.device), long, short)
    return phi, gain < 0.01 + 2 * gain_se, torch.full((len(phi),), 1300)


def _adam(objective: LocalObjective, phi: Tensor, num_steps: int, rng: torch.Generator, progress: bool) -> Tensor:
    family = objective.family
    phi = phi.clone()
    first, second = torch.zeros_like(phi), torch.zeros_like(phi)
    with progress_bar(num_steps, "q* (Adam)", progress) as bar, torch.enable_grad():
        for step in range(1, num_steps + 1):
            phi.requires_grad_()
            z = _antithetic(objective, phi, 8, rng)
            q = family(phi.detach())  # sticking the landing: no gradient through the parameters inside log q
            elbo = (objective.log_joint(z) - q.log_prob(z)).mean(0)
            (grad,) = torch.autograd.grad(elbo.sum(), phi)
            grad = grad.nan_to_num(0.0)
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad.square()
            rate = 0.05 * (1 + math.cos(math.pi * step / num_steps))
            update = rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            phi = (phi + update).detach()
            bar.update()
    return phi


def _antithetic(objective: LocalObjective, phi: Tensor, num_pairs: int, rng: torch.Generator) -> Tensor:
    family = objective.family
    if family.noise_dim is None:
        return draw(family, phi, 2 * num_pairs, rng)
    noise = torch.randn(num_pairs, len(phi), family.noise_dim, generator=rng, dtype=torch.float64).to(phi)
    return family.rsample(phi, torch.cat([noise, -noise]))


def _mean_log_weight(objective: LocalObjective, phi: Tensor, noise: Tensor) -> Tensor:
    """The ELBO on given noise, in float64."""
    total = torch.zeros(len(phi), dtype=torch.float64)
    for piece in chunks(len(noise), len(phi)):
        total += objective.log_weights(phi, noise[piece]).double().sum(0).cpu()
    return total / len(noise)


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
    present = ~rounds[:, 0, 0].isnan()
    count = present.sum(0)
    filled, controls = rounds.nan_to_num(nan=0.0), controls.nan_to_num(nan=0.0)
    others = (filled.sum(0) - filled) / (count - 1)
    control = (controls.sum(0) - controls) / (count - 1)
    covariance = others[:, :, 1] - others[:, :, 0] * control
    variance = others[:, :, 2] - control.square()
    values = filled[:, :, 0] - controls * torch.where(variance > 0, covariance / variance, 0.0)
    values = torch.cat([values, values[:, 1:] - values[:, :1]], 1)
    mean = torch.where(present[:, None], values, 0.0).sum(0) / count
    squares = torch.where(present[:, None], values - mean, 0.0).square().sum(0)
    return mean, (squares / (count * (count - 1))).sqrt()


def _quadratic(objective: LocalObjective, phi: Tensor) -> Tensor | None:
    """Half the second derivatives of the log weight with respect to the noise at 0, ``(N, noise_dim, noise_dim)``."""
    family = objective.family
    if family.noise_dim is None or family.noise_dim > 2 * _LBFGS_MAX_DIM:
        return None
    phi = phi.double()
    zero = phi.new_zeros(1, len(phi), family.noise_dim)
    unit = torch.eye(family.noise_dim, dtype=phi.dtype, device=phi.device).unsqueeze(1).expand(-1, len(phi), -1)
    mean = family.rsample(phi, zero)
    jacobian = (family.rsample(phi, unit) - mean).permute(1, 2, 0)
    curvature = hessian(objective.log_joint, mean[0], objective.like).to(jacobian)
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
        values = _log_weights(part or objective, phi[known], noise, num_draws, seed)
        control = torch.zeros_like(values)
        if noise is not None and quadratic is not None:
            matrix = quadratic[known]
            control = torch.einsum("kni,nij,knj->kn", noise, matrix, noise) - matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        sums.append(torch.stack([values.mean(0), (values * control).mean(0), control.square().mean(0)]))
        controls.append(control.mean(0))
    result, control = torch.stack(sums), torch.stack(controls)
    return (result[..., rows], control[..., rows]) if part is None else (result, control)


def _log_weights(objective: LocalObjective, phi: Tensor, noise: Tensor | None, num_draws: int, seed: int) -> Tensor:
    """Log weights ``(K, N)`` in float64, on given noise, or on the family's own draws under a seed."""
    pieces = chunks(num_draws, len(phi))
    if noise is not None:
        values = [objective.log_weights(phi, noise[piece].to(phi)) for piece in pieces]
    else:
        with seeded(generator(seed)):
            values = [objective.log_weights(phi, piece.stop - piece.start) for piece in pieces]
    return torch.cat(values).double().cpu()
