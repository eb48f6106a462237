r"""The log evidence of every datapoint, :math:`\log p(x_n)`, with global latents held or averaged over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.checks import check_count
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, is_single
from pyro_amortized.diagnostics.checks import Effort, check_effort
from pyro_amortized.diagnostics.evidence.evidence import estimate_evidence, reliable_evidence
from pyro_amortized.diagnostics.evidence.global_draws import averaged, draw_globals, evidence_of_draws
from pyro_amortized.diagnostics.optimum.local_optimum import LocalOptimum, solve
from pyro_amortized.diagnostics.problem import LocalProblem, bind, to_dataset
from pyro_amortized.diagnostics.report import join
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import batch_seed, draw, generator

if TYPE_CHECKING:
    import xarray

__all__ = ["log_evidence"]


def log_evidence(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    max_samples: int = 20000,
    num_global_samples: int | None = None,
    optimum: LocalOptimum | None = None,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    compile: bool = False,
    progress: bool = False,
) -> xarray.Dataset:
    r"""Estimates :math:`\log p(x_n) = \log \int p(x_n, z)\, dz` for every datapoint.

    The estimate is the logarithm of the mean weight. Its standard error is calibrated while ``khat`` is below 0.5 and
    too small above.

    Args:
        model: The Pyro model.
        guide: A guide of this package; only the efficiency depends on how well it is trained.
        model_args: The model's positional arguments, or a ``DataLoader``, whose batches are worked on one by one.
        model_kwargs: The model's keyword arguments.
        tolerance: Twice the standard error at which a datapoint is done, in nats.
        max_samples: Most draws from one proposal per datapoint.
        num_global_samples: Number of draws of the global latents from the guide, over which to average in place of
            holding them at their median: the result is :math:`\log E_{q(\theta)}\, p(x_n \mid \theta)`, of new data
            the log predictive density.
        optimum: The result of :func:`optimize_local` on the same call, if it is at hand.
        plate: The datapoint plate of the guide, by default; of guides that amortize both sides of crossed plates, the
            side, with the other side's latents held at their medians.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of the draws; torch's global seed is not touched.
        compile: Whether to compile the log-joint, which pays for many datapoints or a costly model.
        progress: Whether to show progress bars.

    Returns:
        A dataset over the plate's dimension with ``log_evidence`` and ``log_evidence_se`` in nats; ``khat``, the shape
        of the weights' tail (0 or less where no weight exceeds five times the mean: there is no tail then); ``ess``
        (effective sample size); ``num_samples``; ``reliable``, whether ``khat`` is below 0.7, the standard error at
        most ``tolerance``, and the last climbs have found no further mode. The attribute ``num_annealed`` counts the
        datapoints whose weights are those of annealed chains, the last resort. Global latents are held at the guide's
        median, or averaged over: with ``num_global_samples`` there are ``log_evidence_of_draw`` and
        ``log_evidence_of_draw_se`` over ``global_draw`` and the plate, and ``log_evidence_se`` also holds what differs
        between draws.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints; if a setting is out
            of range.

    References:
        Bayesian Inference in Econometric Models Using Monte Carlo Integration, John Geweke (1989).
        Pareto Smoothed Importance Sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry (2024),
        https://arxiv.org/abs/1507.02646
        Adaptive Importance Sampling in General Mixture Classes, Olivier Cappé, Randal Douc, Arnaud Guillin, Jean-Michel
        Marin, Christian P. Robert (2008).
    """
    if optimum is not None and not is_single(model_args):
        raise ValueError(
            "Cannot use one optimum for several batches because it belongs to one call; try leaving it out."
        )
    tolerance, max_samples, seed = check_effort(tolerance, max_samples, seed)
    graphs, parts, shards, draws = GraphCache(compile), [], Shards(model_args), None
    if num_global_samples is not None:
        num_global_samples = check_count("num_global_samples", num_global_samples, 2, 200)
    for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model, shared=True)):
        own_seed = batch_seed(seed, shards.number(number))
        problem = bind(model, guide, args, kwargs, own_seed, graphs=graphs, plate=plate)
        if optimum is None:
            phi = solve(problem, tolerance, own_seed, progress).phi
        else:
            phi = _checked_optimum(problem, optimum, own_seed)
        if num_global_samples is None:
            evidence = estimate_evidence(problem, phi, tolerance, max_samples, own_seed, progress)
        else:
            draws = draws or draw_globals(guide, args, kwargs, num_global_samples, seed)
            effort = Effort(tolerance, max_samples)
            evidence = averaged(evidence_of_draws(problem, phi, draws.values, effort, own_seed, progress))
        num_annealed = int(evidence.pop("annealed").sum())
        evidence["reliable"] = reliable_evidence(evidence, tolerance)
        del evidence["settled"]
        of_draws = {name: evidence.pop(name) for name in [*evidence] if evidence[name].dim() > 1}
        settings = {"tolerance": tolerance, "max_samples": max_samples, "seed": seed, "num_annealed": num_annealed}
        part = to_dataset(problem, evidence, **settings)
        cells = {name: (("global_draw", problem.plate), values.numpy()) for name, values in of_draws.items()}
        parts.append(part.assign(cells))
        if draws is not None:
            held = f"averaged over {num_global_samples} draws from the guide: {', '.join(draws.names)}"
            parts[-1].attrs["global_latents"] = held
    parts = list(shards.collect(parts))
    num_annealed = sum(part.attrs["num_annealed"] for part in parts)
    return shards.in_order(join(parts, problem.plate), problem.plate).assign_attrs(num_annealed=num_annealed)


@torch.no_grad()
def _checked_optimum(problem: LocalProblem, optimum: Any, seed: int) -> Tensor:
    """phi of an optimum that is that of this call: its ELBO must be what it was found to be."""
    cause = None
    if not isinstance(optimum, LocalOptimum):
        cause = f"it is a {type(optimum).__name__}"
    elif optimum.phi.shape != problem.phi.shape:
        cause = f"its phi has shape {tuple(optimum.phi.shape)}, and this call's {tuple(problem.phi.shape)}"
    else:
        family, phi = problem.objective.family, optimum.phi.to(problem.phi)
        z = draw(family, phi, 100, generator(seed, 16))
        values = (problem.objective.log_joint(z) - family(phi).log_prob(z)).cpu().double()
        error = torch.hypot(values.std(0) / 10, optimum.elbo_se.cpu().double())
        off = (values.mean(0) - optimum.elbo.cpu().double()).abs() > 8 * error + 1e-3 * (1 + values.mean(0).abs())
        if off.any():
            cause = f"at {int(off.sum())} datapoints the ELBO of its phi is another one now"
    if cause is not None:
        raise ValueError(
            f"Cannot use this optimum because it belongs to another call: {cause}; try optimize_local(...) with the "
            "arguments of this call, or leaving it out."
        )
    return optimum.phi
