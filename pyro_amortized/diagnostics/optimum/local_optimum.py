r"""The best member of a guide's family for every datapoint, :math:`q^* = \arg\max_\phi L_n(\phi)`, and honest ELBOs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_amortized.diagnostics.checks import check_effort
from pyro_amortized.diagnostics.optimum.elbo import estimate_elbo, log_weights
from pyro_amortized.diagnostics.optimum.laplace import covariance_root, find_modes, hessian, moments
from pyro_amortized.diagnostics.optimum.lbfgs import minimize_rows
from pyro_amortized.diagnostics.optimum.modes import Search
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar, to_dataset
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.noise import generator, quasi_normal, seeded

if TYPE_CHECKING:
    import xarray

__all__ = ["FixedNoiseLoss", "LocalOptimum", "optimize_local"]

_LBFGS_MAX_DIM = 128
_SEED_TOLERANCE = 0.005
_MAX_ATTEMPTS = 4
_LEAST_SHARE = 1e-3
"""Of the posterior's mass, for a mode to be one that the optimisation starts at."""
_MAX_LENGTH = 5.0
"""Longest step in any variational parameter; most of them are logarithms or in units of the posterior."""


@dataclass(repr=False)
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
        converged: Whether the optimisation of each datapoint ended because nothing was left to gain, by small steps and
            by the gradient.
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

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{escape(str(self))}</p>{self.dataset._repr_html_()}"


def optimize_local(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    plate: str | None = None,
    seed: int = 0,
    compile: bool = False,
    progress: bool = False,
) -> LocalOptimum:
    r"""Maximises every datapoint's ELBO over the guide's family.

    For families that turn noise into draws, the ELBO on fixed whitened quasi-random noise is maximised by L-BFGS,
    twice: from the guide's phi, and with other noise from the optimum for a Laplace approximation at the mode that the
    guide's mean leads to, or for a mixture at all modes that climbing from its components and from draws of the prior
    finds. Where the two optima differ by more than 0.005 nats, again with twice the draws. Other families, and more
    than 128 latent dimensions, are optimised by Adam. The reported ELBOs come from fresh draws.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package.
        model_args: The model's positional arguments.
        model_kwargs: The model's keyword arguments.
        tolerance: Three times the standard error wanted for the reported ELBOs, in nats.
        plate: The datapoint plate of the guide, by default; of guides that amortize both sides of crossed plates, the
            side, with the other side's latents held at their medians.
        seed: Seed of the noise; torch's global seed is not touched.
        compile: Whether to compile the log-joint, which pays for many datapoints or a costly model.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`LocalOptimum`.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints.

    References:
        Inference Suboptimality in Variational Autoencoders, Chris Cremer, Xuechen Li, David Duvenaud (2018),
        https://arxiv.org/abs/1801.03558
    """
    tolerance, _, seed = check_effort(tolerance, 1, seed)
    return solve(bind(model, guide, model_args, model_kwargs, seed, compile, plate=plate), tolerance, seed, progress)


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
    worse = difference < -2 * difference_error  # the guide was better: its phi is the best one known
    phi = torch.where(worse.to(phi.device)[:, None], problem.phi, phi)
    means, errors = ((pair[0], torch.where(worse, *pair)) for pair in (means, errors))
    difference, difference_error = (x.masked_fill(worse, 0.0) for x in (difference, difference_error))
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
    starts = [problem.phi.cpu().double()] * 2 if laplace is None else [problem.phi.cpu().double(), laplace]
    best = starts[0].clone()
    converged, num_steps = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.long)
    rows, num_draws = torch.arange(size), max(64, 4 * noise_dim, min(family.num_params, 512) // 2 * 2)
    for attempt in range(_MAX_ATTEMPTS):
        results, ended = [], torch.ones(len(rows), dtype=torch.bool)
        for half, start in enumerate(starts):
            noise = quasi_normal(num_draws, size, noise_dim, generator(seed, 1, attempt, half))
            loss = FixedNoiseLoss(problem, noise.to(problem.phi), rows, start[rows], units[rows])
            with progress_bar(len(rows), f"q* ({num_draws} draws, pass {half + 1})", progress) as bar:
                found = minimize_rows(loss, loss.origin, max_length=_MAX_LENGTH, on_step=partial(_show, bar))
            results.append(start.index_copy(0, rows, loss.phi_at(found.x, torch.arange(len(rows)))))
            num_steps[rows] += found.num_steps
            ended &= found.converged & (loss.gain_left(found.x) <= _SEED_TOLERANCE)
        values = _compare(problem, results, 2 * num_draws, generator(seed, 2, attempt))
        best[rows] = torch.where((values[0] > values[1])[:, None], *results)[rows]
        agree = (values[0] - values[1]).abs() <= _SEED_TOLERANCE
        converged[rows] = ended & agree[rows]
        rows = rows[~agree[rows]]
        if len(rows) == 0:
            break
        starts, num_draws = [best, best], 2 * num_draws
    return best, converged, num_steps


@torch.no_grad()
def _compare(problem: LocalProblem, phis: list[Tensor], num_draws: int, rng: torch.Generator) -> list[Tensor]:
    """ELBOs at several phis on the same fresh noise, each ``(N,)``; where undefined, minus infinity."""
    noise_dim = problem.objective.family.noise_dim or 0
    noise = quasi_normal(max(256, 4 * noise_dim, num_draws), len(problem.phi), noise_dim, rng).to(problem.phi)
    values = [log_weights(problem.objective, phi.to(problem.phi), noise).mean(0) for phi in phis]
    return [value.nan_to_num(nan=-torch.inf) for value in values]


def _laplace_start(problem: LocalProblem, seed: int) -> tuple[Tensor, Tensor | None]:
    """Units for the location ``(N, D, D)``, and the family's optimum for the posterior's Laplace approximation."""
    log_joint, family = problem.objective.log_joint, problem.objective.family
    mean, scale_tril = moments(family, problem.phi, generator(seed, 11))
    modes, _ = find_modes(log_joint, mean.unsqueeze(0), scale_tril, problem.phi)
    units = covariance_root(hessian(log_joint.plain, modes[0], problem.phi), scale_tril)
    place = problem.phi.device
    if not family.multimodal:
        phi = family.laplace(modes[0].to(place), torch.cholesky_inverse(units).to(place))
        return units, None if phi is None else phi.cpu()
    every = Search(problem, problem.phi, (seed, 17)).run()
    share = torch.where(every.share < _LEAST_SHARE, 0.0, every.share)
    at = every.loc.to(place), torch.cholesky_inverse(every.root).to(place), share.to(place)
    phi = family.laplace_of_modes(*at)
    return units, None if phi is None else phi.cpu()


def _show(bar: Any, finished: int) -> None:
    bar.update(finished - bar.n)


class FixedNoiseLoss:
    """The negative ELBO on fixed noise and its gradient, for some of the datapoints.

    The optimiser sees those entries of phi that are locations (:attr:`VariationalFamily.locations`) in given units
    ``(N, D, D)``, relative to the start, so that neither the units of the latents nor strong correlations between them
    slow it down.
    """

    def __init__(self, problem: LocalProblem, noise: Tensor, rows: Tensor, start: Tensor, units: Tensor) -> None:
        self.problem = problem
        self.noise = noise
        self.rows = rows
        self.start = start
        self.units = units
        self.locations = problem.objective.family.locations
        self.origin = start.clone()
        self.origin[:, self.locations] = 0.0

    def phi_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """phi of what the optimiser sees."""
        phi = self._in_units(x, self.units[positions])
        phi[:, self.locations] += self.start[positions, self.locations]
        return phi

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(n,)`` and gradients ``(n, P)`` at what the optimiser sees of some datapoints."""
        value, gradient = self._on_rows(self.phi_at(x, positions), self.rows[positions])
        return value, self._in_units(gradient, self.units[positions].transpose(-1, -2))

    def gain_left(self, x: Tensor) -> Tensor:
        """What a step along the gradient would still gain at ``x`` ``(n, P)``, in nats, ``(n,)``.

        By the curvature along the step, but of a step no longer than 1. An optimiser whose idea of the curvature is
        wrong also makes small improvements; this needs no memory of its steps.
        """
        everyone = torch.arange(len(x))
        gradient = self(x, everyone)[1]
        size = gradient.norm(dim=-1)
        gain = 0.5 * size.square()  # where the curvature is at least 1
        rows = (gain > _SEED_TOLERANCE).nonzero().squeeze(-1)
        if len(rows):
            direction = gradient[rows] / size[rows, None]
            ahead = self(x[rows] - 0.01 * direction, everyone[rows])[1]
            curvature = ((gradient[rows] - ahead) * direction).sum(-1) / 0.01
            gain[rows] = 0.5 * size[rows].square() / torch.maximum(curvature, size[rows])
        return gain

    def _in_units(self, x: Tensor, units: Tensor) -> Tensor:
        """A copy of ``x`` ``(n, P)`` whose locations are multiplied by ``units`` ``(n, D, D)``."""
        x, dim = x.clone(), units.shape[-1]
        locs = x[:, self.locations]
        locs = locs.reshape(len(x), locs.shape[-1] // dim, dim)
        x[:, self.locations] = torch.einsum("nij,ncj->nci", units, locs).flatten(1)
        return x

    def _on_rows(self, phi: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        whole, size = self.problem.objective, len(self.problem.phi)
        objective = whole if len(rows) == size else whole.select(rows)
        if objective is not None:
            return self._evaluate(objective, phi, self.noise[:, rows])
        full = self.problem.phi.cpu().double().index_copy(0, rows, phi)  # the model runs only on all its data
        value, gradient = self._evaluate(whole, full, self.noise)
        return value[rows], gradient[rows]

    def _evaluate(self, objective: LocalObjective, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x)
        for piece in chunks(len(noise), len(x) * self.problem.objective.family.draws_per_noise):
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
    phi = phi.clone()
    first, second = torch.zeros_like(phi), torch.zeros_like(phi)
    with progress_bar(num_steps, "q* (Adam)", progress) as bar, torch.enable_grad():
        for step in range(1, num_steps + 1):
            phi.requires_grad_()
            elbo = _estimate(objective, phi, 8, rng)
            (grad,) = torch.autograd.grad(elbo.sum(), phi)
            grad = grad.nan_to_num(0.0)
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad.square()
            rate = 0.05 * (1 + math.cos(math.pi * step / num_steps))
            update = rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            phi = (phi + update).detach()
            bar.update()
    return phi


def _estimate(objective: LocalObjective, phi: Tensor, num_pairs: int, rng: torch.Generator) -> Tensor:
    """The ELBO ``(N,)`` on antithetic noise, if the family takes noise; by sticking the landing, if it allows."""
    family = objective.family
    if family.noise_dim is None:
        with seeded(rng):
            return _elbo(objective, phi, 2 * num_pairs)
    noise = torch.randn(num_pairs, len(phi), family.noise_dim, generator=rng, dtype=torch.float64).to(phi)
    return _elbo(objective, phi, torch.cat([noise, -noise]))


def _elbo(objective: LocalObjective, phi: Tensor, noise: Tensor | int) -> Tensor:
    if objective.family.fast_log_prob:  # no gradient through the parameters inside log q
        return objective.elbo(phi.detach(), noise, phi)
    return objective.elbo(phi, noise)
