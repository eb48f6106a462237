r"""The best member of a guide's family for every datapoint, :math:`q^* = \arg\max_\phi L_n(\phi)`, and honest ELBOs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    r"""Maximises every datapoint's ELBO over the guide's family, from the guide's own phi.

    For families that turn noise into draws, the ELBO on fixed whitened quasi-random noise is maximised by L-BFGS, twice
    with different noise; where the two optima differ by more than 0.005 nats, again with twice the draws. Other
    families, and more than 128 latent dimensions, are optimised by Adam. The reported ELBOs come from fresh draws.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package.
        model_args: The model's positional arguments.
        model_kwargs: The model's keyword arguments.
        tolerance: Four times the standard error wanted for the reported ELBOs, in nats.
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
        problem.objective, (problem.phi, phi), tolerance / 4, seed, progress
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
    objective, family = problem.objective, problem.objective.family
    noise_dim = family.noise_dim or 0
    phi, size = problem.phi.double(), len(problem.phi)
    converged = torch.zeros(size, dtype=torch.bool)
    num_steps = torch.zeros(size, dtype=torch.long)
    rows, num_draws = torch.arange(size), max(64, 4 * noise_dim, min(family.num_params, 512) // 2 * 2)
    for attempt in range(4):
        results = []
        for half in range(2):
            rng = generator(seed, 1, attempt, half)
            noise = quasi_normal(num_draws, size, noise_dim, rng).to(problem.phi)
            with progress_bar(len(rows), f"q* ({num_draws} draws, pass {half + 1})", progress) as bar:
                found = minimize_rows(
                    _FixedNoiseLoss(objective, noise, rows, problem.phi),
                    phi[rows],
                    on_step=partial(_show, bar),
                )
            phi = phi.index_copy(0, rows, found.x)
            num_steps[rows] += found.num_steps
            converged[rows] = found.converged
            results.append(phi)
        check = quasi_normal(max(256, 4 * noise_dim), size, noise_dim, generator(seed, 2, attempt)).to(problem.phi)
        with torch.no_grad():
            first, second = (_mean_log_weight(objective, p.to(problem.phi), check) for p in results)
        phi = torch.where((first > second)[:, None], results[0], results[1])
        off = (first - second).abs() > _SEED_TOLERANCE
        rows = rows[off[rows].cpu()]
        num_draws *= 2
        if len(rows) == 0:
            break
    converged[rows] = False
    return phi, converged, num_steps


def _show(bar: Any, finished: int) -> None:
    bar.update(finished - bar.n)


class _FixedNoiseLoss:
    """The negative ELBO on fixed noise and its gradient, for some of the datapoints."""

    def __init__(self, objective: LocalObjective, noise: Tensor, rows: Tensor, phi: Tensor) -> None:
        self.objective = objective
        self.noise = noise
        self.rows = rows
        self.phi = phi

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows[positions]
        objective = self.objective if len(rows) == len(self.phi) else self.objective.select(rows)
        if objective is None:  # the model runs only on all its data
            full = self.phi.double().index_copy(0, rows, x)
            value, gradient = self._evaluate(self.objective, full, self.noise)
            return value[rows], gradient[rows]
        return self._evaluate(objective, x, self.noise[:, rows])

    def _evaluate(self, objective: LocalObjective, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x)
        for piece in chunks(len(noise), len(x)):
            with torch.enable_grad():
                phi = x.to(self.phi).clone().requires_grad_()
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
    phi = torch.where((gain > 0)[:, None], long, short)
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
    """ELBOs at two phis per datapoint from common draws, with standard errors.

    Each round is a newly randomised set of quasi-random points; standard errors come from the spread between rounds.
    Rounds go on for the datapoints whose error is above ``target``.

    Returns:
        Means at both phis, their standard errors, the mean difference (second minus first) and its standard error, each
        of shape ``(N,)`` in float64.
    """
    family, size = objective.family, len(phis[0])
    num_draws = 2 ** math.ceil(math.log2(max(128, 4 * (family.noise_dim or 0))))
    moments = torch.zeros(2, 3, size, dtype=torch.float64)  # sums and sums of squares, of first, second, difference
    shift: Tensor | None = None
    count = torch.zeros(size, dtype=torch.float64)
    rows = torch.arange(size)
    with progress_bar(size, "ELBO of q and q*", progress) as bar:
        for number in range(max_rounds):
            values = _round(objective, phis, rows, num_draws, generator(seed, 4, number))
            shift = values.clone() if shift is None else shift
            deviations = values - shift[:, rows]
            moments[:, :, rows] += torch.stack([deviations, deviations.square()])
            count[rows] += 1
            if number + 1 < min_rounds:
                continue
            errors = _standard_errors(moments, count)
            rows = rows[(errors[:, rows] > target).any(0)]
            bar.update(size - len(rows) - bar.n)
            if len(rows) == 0:
                break
        bar.update(size - bar.n)
    means, errors = moments[0] / count + shift, _standard_errors(moments, count)  # type: ignore[operator]
    return (means[0], means[1]), (errors[0], errors[1]), means[2], errors[2]


def _standard_errors(moments: Tensor, count: Tensor) -> Tensor:
    variance = (moments[1] - moments[0].square() / count).clamp(min=0.0) / (count - 1)
    return (variance / count).sqrt()


def _round(
    objective: LocalObjective, phis: tuple[Tensor, Tensor], rows: Tensor, num_draws: int, rng: torch.Generator
) -> Tensor:
    """One round of :func:`estimate_elbo` for ``rows``: first, second and difference, ``(3, n)``."""
    size = len(phis[0])
    part = objective if len(rows) == size else objective.select(rows)
    known = torch.arange(size) if part is None else rows
    evaluate = _common_noise(part or objective, len(known), num_draws, rng, phis[0])
    first, second = (evaluate(phi[known]) for phi in phis)
    values = torch.stack([first, second, second - first])
    return values[:, rows] if part is None else values


def _common_noise(
    objective: LocalObjective, num_datapoints: int, num_draws: int, rng: torch.Generator, like: Tensor
) -> Callable[[Tensor], Tensor]:
    """The ELBO as a function of phi, with the same noise at every call."""
    family = objective.family
    if family.noise_dim is not None:
        noise = quasi_normal(num_draws, num_datapoints, family.noise_dim, rng).to(like)
        return lambda phi: _mean_log_weight(objective, phi, noise)
    seed = int(torch.randint(2**31 - 1, (), generator=rng))

    def own_noise(phi: Tensor) -> Tensor:
        with seeded(generator(seed)):
            pieces = chunks(num_draws, num_datapoints)
            total = sum(objective.log_weights(phi, p.stop - p.start).double().sum(0).cpu() for p in pieces)
        return torch.as_tensor(total) / num_draws

    return own_noise
