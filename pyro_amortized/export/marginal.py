r"""Log-likelihoods with the local latents integrated out, at draws from the posterior of the global ones.

Leave-one-out cross-validation wants :math:`\log p(x_n \mid \theta_s)` at draws from :math:`p(\theta \mid x)`. Draws
from the guide are weighed by :math:`p(\theta) \prod_n p(x_n \mid \theta) / q(\theta)`, in which the local latents are
integrated out too, so that these weights are right whatever the guide says of them; and drawn again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, is_single
from pyro_amortized.diagnostics.checks import Effort
from pyro_amortized.diagnostics.evidence.global_draws import (
    GlobalDraws,
    draw_globals,
    evidence_of_draws,
    outside_log_joint,
)
from pyro_amortized.diagnostics.evidence.importance import psis
from pyro_amortized.diagnostics.optimum.local_optimum import solve
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.export.batch import systematic
from pyro_amortized.export.groups import Group
from pyro_amortized.export.runs import ModelRuns
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import batch_seed, generator

__all__ = ["Marginal", "marginal_likelihood"]

_HEAVY_TAIL = 0.7


@dataclass(frozen=True)
class Marginal:
    """Log-likelihoods at draws of the global latents.

    Attributes:
        globals: The draws by site, ``(S, *batch, *event)``.
        log_likelihood: Nats, ``(S, N)``, of every batch, of all processes in turn where several share the data.
        khat: The tail shape of the weights by which the draws were drawn again.
    """

    globals: Mapping[str, Tensor]
    log_likelihood: list[Tensor]
    khat: float

    def add_to(self, groups: dict[str, Group], number: int, runs: ModelRuns) -> None:
        """Puts the log-likelihoods of a batch, and khat, among its groups."""
        plate, name = str(runs.structure.plate), _name(runs)
        values = self.log_likelihood[number].unsqueeze(0).numpy()
        groups["log_likelihood"] = {name: (("chain", "draw", plate), values)}
        groups.setdefault("sample_stats", {})["global_khat"] = ((), np.array(self.khat))


def _name(runs: ModelRuns) -> str:
    """The data sites of the datapoints, whose log-likelihood it is together."""
    within = {runs.structure.plate, *runs.structure.groups}
    return "+".join(name for name in runs.data if within & {*runs.sites[name].plates.values()})


def marginal_likelihood(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None,
    *,
    num_samples: int,
    to_args: ToArgs | None,
    seed: int,
    progress: bool,
    shards: Shards,
) -> Marginal:
    """Draws global latents, weighs them by all data, and draws them again.

    Raises:
        ValueError: If there are no global latents, or no local ones; if not all data are at hand.

    Warns:
        UserWarning: If the weights of the draws have too heavy a tail.
    """
    _check_again(model_args)
    effort, draws, parts, log_prior = Effort(), None, [], torch.zeros(())
    frame = None
    for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model, shared=True)):
        own_seed = batch_seed(seed, shards.number(number))
        guide.setup(*args, **kwargs)
        _check_latents(guide)
        problem = bind(model, guide, args, kwargs, own_seed)
        if draws is None:
            draws = draw_globals(guide, args, kwargs, num_samples, seed)
            log_prior = torch.stack([outside_log_joint(problem, values) for values in draws.values])
        phi = solve(problem, effort.tolerance, own_seed, progress).phi
        evidence = evidence_of_draws(problem, phi, draws.values, effort, own_seed, progress)["log_evidence"]
        frame = problem.objective.log_joint.structure.datapoints
        parts.append((evidence, problem.index))
    parts = list(shards.collect(parts))
    found = [evidence for evidence, _ in parts]
    index = torch.cat([index for _, index in parts]) if parts else torch.empty(0)
    rows = torch.from_numpy(shards.positions(len(index))[1]) if shards.shared else slice(None)
    index = index[rows]
    size, once = len(index), len(index.unique())
    if draws is None or frame is None or (frame.subsampled and not size == once == frame.full_size):
        twice = f", and {size - once} of them again" if size > once else ""
        raise ValueError(
            f"Cannot weigh draws of the global latents because {once} of the {frame.full_size if frame else 0} "
            f"datapoints are at hand{twice}, and their posterior is that given all of them, each once; try a loader "
            "over all data."
        )
    return _resampled(draws, found, log_prior + torch.cat(found, 1)[:, rows].sum(1) - draws.log_q, seed)


def _resampled(draws: GlobalDraws, found: list[Tensor], log_weights: Tensor, seed: int) -> Marginal:
    smoothed, khat = psis(log_weights.unsqueeze(-1))
    if khat.item() > _HEAVY_TAIL:
        warnings.warn(
            f"The log-likelihoods are not at draws from the posterior: the weights of the guide's draws of global "
            f"latents {draws.names} have a tail of khat = {khat.item():.2f}, above {_HEAVY_TAIL}, so that arviz.loo "
            "may be far off; try more training, global_guide=AutoMultivariateNormal, or a larger num_samples.",
            stacklevel=4,
        )
    rows = systematic(smoothed.softmax(0), generator(seed, 74)).squeeze(-1)
    values = {name: torch.stack([draws.values[i][name] for i in rows.tolist()]) for name in draws.names}
    return Marginal(values, [part[rows] for part in found], khat.item())


def _check_again(model_args: ModelArgs) -> None:
    if not is_single(model_args) and iter(model_args) is model_args:
        raise ValueError(
            "Cannot go through the data twice, to weigh draws and to export them, because an iterator ends; try a "
            "DataLoader."
        )


def _check_latents(guide: LocalGuide) -> None:
    if not guide.has_local_latents:
        raise ValueError(
            "Cannot integrate local latents out because the model has none; try log_likelihood=None, with which the "
            "log-likelihoods are those given the global latents already."
        )
    if not guide.global_sites:
        raise ValueError(
            "Cannot export marginal log-likelihoods at draws of global latents because the model has none: the rest is "
            "point estimates, of which no draw leaves a datapoint out; try log_evidence(model, guide, ...) of held-out "
            "data, or pyro.sample statements for the global parameters."
        )
