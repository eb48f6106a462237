r"""Bounds on the evidence of simulated data, whose exact posterior draws are known: a check of the settings.

A data set simulated from the model comes with one exact draw :math:`z^*` from the posterior of every datapoint.
Importance weights :math:`w(z) = p(x, z) / q(z)` then bound the log evidence from both sides, on average over draws:

.. math::
    E \log \frac{1}{K} \sum_{k=1}^K w(z_k) \le \log p(x)
    \le E \log \frac{1}{K} \Big( w(z^*) + \sum_{k=2}^K w(z_k) \Big).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.checks import check_count
from pyro_amortized.diagnostics.checks import check_effort
from pyro_amortized.diagnostics.evidence.evidence import (
    adapted_proposals,
    estimate_evidence,
    log_weights_at,
    reliable_evidence,
)
from pyro_amortized.diagnostics.optimum.local_optimum import solve
from pyro_amortized.diagnostics.problem import bind, to_dataset
from pyro_amortized.diagnostics.simulation import Simulator
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import generator

if TYPE_CHECKING:
    import xarray

__all__ = ["evidence_bounds"]


def evidence_bounds(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_simulations: int = 100,
    num_samples: int = 2000,
    tolerance: float = 0.02,
    max_samples: int = 20000,
    plate: str | None = None,
    seed: int = 0,
    compile: bool = False,
    progress: bool = False,
) -> xarray.Dataset:
    r"""Bounds the log evidence of simulated datapoints from above and below, to check :func:`log_evidence`.

    A small mean difference between the bounds shows that the settings are good for data like those of the model; one
    that is large, or an estimate outside of the bounds, that they are not. What this cannot show is how the estimate
    does on data that the model does not describe.

    Args:
        model: The Pyro model.
        guide: A guide of this package.
        model_args: The model's positional arguments, whose covariates the simulations use.
        model_kwargs: The model's keyword arguments.
        num_simulations: Number of datapoints to simulate, in one call: in long format as many as there are.
        num_samples: K, the number of importance samples in the bounds.
        tolerance: As for :func:`log_evidence`.
        max_samples: As for :func:`log_evidence`.
        plate: As for :func:`estimate_gaps`.
        seed: Seed of all noise; torch's global seed is not touched.
        compile: Whether to compile the log-joint.
        progress: Whether to show progress bars.

    Returns:
        A dataset over the plate's dimension, one entry per simulated datapoint: ``lower_bound``, ``upper_bound`` and
        their difference ``width`` in nats, and ``log_evidence``, ``log_evidence_se``, ``khat`` and ``reliable`` as
        :func:`log_evidence` estimates them. The attributes ``mean_width`` and ``mean_width_se`` sum up.

    Raises:
        ValueError: If the model cannot be simulated, as where observations are not among its arguments.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo, Roger B. Grosse, Zoubin Ghahramani, Ryan P.
        Adams (2015), https://arxiv.org/abs/1511.02543
        Importance Weighted Hierarchical Variational Inference, Artem Sobolev, Dmitry Vetrov (2019),
        https://arxiv.org/abs/1905.03290
    """
    num_simulations = check_count("num_simulations", num_simulations, 1, 100)
    num_samples = check_count("num_samples", num_samples, 1, 2000)
    tolerance, max_samples, seed = check_effort(tolerance, max_samples, seed)
    original = bind(model, guide, model_args, model_kwargs, seed, plate=plate)
    simulation = Simulator(original).at_once(num_simulations, seed, "num_simulations")
    args, kwargs = simulation.args, simulation.kwargs
    problem = bind(model, guide, args, kwargs, seed, compile, plate=plate, held=original.held)
    optimum = solve(problem, tolerance, seed, progress)
    evidence = estimate_evidence(problem, optimum.phi, tolerance, max_samples, seed, progress)
    lower, upper = torch.zeros(2, len(optimum.phi), dtype=torch.float64)
    truth = simulation.latents.cpu().double().unsqueeze(0)
    for number, (rows, proposal) in enumerate(adapted_proposals(problem, optimum.phi, tolerance, (seed, 30))):
        z = proposal.draw(num_samples, generator(seed, 31, number))
        weights = log_weights_at(problem, proposal, rows, z)
        exact = log_weights_at(problem, proposal, rows, truth[:, rows])
        lower[rows] = _log_mean(weights)
        upper[rows] = _log_mean(torch.cat([exact, weights[1:]]))
    width = upper - lower
    variables = {name: evidence[name] for name in ("log_evidence", "log_evidence_se", "khat")}
    variables["reliable"] = reliable_evidence(evidence, tolerance)
    variables |= {"lower_bound": lower, "upper_bound": upper, "width": width}
    error = float(width.std() / math.sqrt(len(width))) if len(width) > 1 else math.nan
    return to_dataset(
        problem,
        variables,
        num_samples=num_samples,
        tolerance=tolerance,
        max_samples=max_samples,
        seed=seed,
        mean_width=float(width.mean()),
        mean_width_se=error,
    )


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))
