"""One batch of an export: what the model says at draws of its latents, as arrays with named axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.diagnostics.evidence.importance import psis, systematic
from pyro_amortized.export.groups import Group, label_arguments, to_numpy
from pyro_amortized.export.runs import Draws, ModelRuns, Pass, Results
from pyro_amortized.objective.draws import chunks
from pyro_amortized.structure.axes import label
from pyro_amortized.structure.influence import PlateLogProbs

__all__ = ["Batch", "Options", "systematic"]

MAX_ELEMENTS = 2**19
"""How many elements of a site to evaluate at once; bounds memory, and what fits in a cache is several times faster."""


@dataclass(frozen=True)
class Options:
    """What was asked for, explained at :func:`to_arviz`."""

    num_samples: int
    num_prior_samples: int
    resample: bool
    groups: frozenset[str]
    seed: int
    quantiles: tuple[float, ...] = ()

    @property
    def weighs(self) -> bool:
        """Whether log-densities are needed."""
        return self.resample or not self.groups.isdisjoint({"log_likelihood", "sample_stats"})


class Batch:
    """The groups of one batch.

    Args:
        runs: The call.
        options: What was asked for.
        log_q: The log-density ``(K, N)`` of flat local latents.
        first: Whether it is the first batch, with which goes what all datapoints share.

    Attributes:
        groups: What there is so far of the groups asked for.
    """

    def __init__(self, runs: ModelRuns, options: Options, log_q: Callable[[Tensor], Tensor], first: bool) -> None:
        self.runs = runs
        self.structure = runs.structure
        self.options = options
        self.log_q = log_q
        self.first = first
        self.groups: dict[str, Group] = {name: {} for name in options.groups}

    @property
    def passes(self) -> list[Pass]:
        """The runs of the model that are needed at every draw."""
        passes: list[Pass] = [self.runs.weigh] if self.options.weighs else []
        passes += [self.runs.predict] if "posterior_predictive" in self.groups else []
        return [*passes, self.runs.compute] if "posterior" in self.groups and self.runs.computed else passes

    @property
    def has_prior(self) -> bool:
        """Whether draws from the prior are asked for."""
        return not self.options.groups.isdisjoint({"prior", "prior_predictive"})

    def _parts(self, number: int) -> list[slice]:
        """Pieces in which draws are evaluated."""
        return chunks(number, self.runs.num_elements, MAX_ELEMENTS)

    # Draws

    def resampled(self, draws: Draws, rng: torch.Generator) -> Draws:
        """The draws of every datapoint, drawn again in proportion to its smoothed weights."""
        z: Any = draws.z
        weights = torch.cat(
            [self._log_weights(self._evaluate(self.runs.weigh, draws, p), z[p]) for p in self._parts(len(z))]
        )
        smoothed, khat = psis(weights.double())
        self._add_khat(khat)
        chosen = systematic(smoothed.softmax(0), rng)
        return Draws(z.gather(0, chosen.unsqueeze(-1).expand_as(z)), draws.globals)

    def add_posterior(self, draws: Draws) -> None:
        """Latents in their supports."""
        if "posterior" not in self.groups:
            return
        values = dict(draws.globals) if self.first else {}
        if draws.z is not None:
            values.update(self.structure.layout.values(draws.z))  # type: ignore[union-attr]
        for name, value in values.items():
            self._put("posterior", name, self.runs.aligned(name, value), slice(0, len(value)), len(value))

    def add_quantiles(self, values: Mapping[str, Tensor]) -> None:
        """Quantiles ``(Q, *batch, *event)`` of latents in their supports."""
        for name, value in values.items():
            site = self.runs.sites[name]
            dims, value = label(name, self.runs.aligned(name, value), site, self.structure.frames, ("quantile",))
            self.groups["quantiles"][name] = (dims, to_numpy(value))

    def add_evaluations(self, draws: Draws, advance: Callable[[int], Any] | None = None) -> None:
        """Log-likelihoods, log weights and predictions."""
        number = self.options.num_samples
        for part in self._parts(number):
            for function in self.passes:
                results = self._evaluate(function, draws, part)
                self._put_results(results, part, number)
                if ("log_joint", "") in results and "sample_stats" in self.groups:
                    weights = self._log_weights(results, draws.z[part])  # type: ignore[index]
                    self._store(
                        "sample_stats", "log_weight", ("draw", str(self.structure.plate)), weights, part, number
                    )
            if advance is not None:
                advance(part.stop - part.start)
        stats = self.groups.get("sample_stats", {})
        if "log_weight" in stats and "khat" not in stats and not draws.globals:
            self._add_khat(psis(torch.from_numpy(stats["log_weight"][1][0]).double())[1])

    def add_prior(self, global_draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents and observations from the prior, given global latents if there are draws of them already.

        Returns:
            The draws of the global latents.
        """
        number = self.options.num_prior_samples
        found: dict[str, list[Tensor]] = {}
        for part in self._parts(number):
            results = self._evaluate(self.runs.prior, Draws(None, global_draws), part)
            self._put_results(results, part, number)
            for (group, name), value in results.items():
                if group == "prior" and name in self.structure.global_sites:
                    found.setdefault(name, []).append(self.runs.natural(name, value))
        return {name: torch.cat(values) for name, values in found.items()}

    def _evaluate(self, function: Pass, draws: Draws, part: slice) -> Results:
        return self.runs.evaluate(function, draws[part], part.stop - part.start)

    def _log_weights(self, results: Results, z: Tensor) -> Tensor:
        """Log weights ``(K, N)``; a ValueError names datapoints whose density is not a number."""
        weights = results["log_joint", ""] - self.log_q(z)
        bad = weights.isnan().any(0).nonzero().squeeze(-1).tolist()
        if bad:
            raise ValueError(
                f"Cannot weigh the draws of {len(bad)} datapoints because their log-joint is not a number (datapoints "
                f"{bad[:10]} of plate {self.structure.plate!r}); try looking for invalid values in their data, or for "
                "a likelihood that is not defined at all latents, as z.sqrt() is not, but softplus(z)."
            )
        return weights

    # Data

    def add_observed(self) -> None:
        """Observed values, in their own dtype."""
        if "observed_data" in self.groups:
            for name, value in self.runs.data.items():
                value = self.runs.aligned(name, value.unsqueeze(0)).squeeze(0)
                dims, value = label(name, value, self.runs.sites[name], self.structure.frames)
                self.groups["observed_data"][name] = (dims, to_numpy(value))

    def add_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Arguments that are not observed."""
        if "constant_data" in self.groups:
            observed, runs = list(self.runs.data.values()), self.runs
            log_probs = PlateLogProbs(runs.call)
            self.groups["constant_data"] = label_arguments(arguments, self.structure, observed, log_probs)

    # Storing

    def _put_results(self, results: Results, part: slice, number: int) -> None:
        for (group, name), value in results.items():
            shared = self.structure.plate not in self.runs.sites[name].plates.values() if name else False
            if group in self.groups and (self.first or group != "posterior" or not shared):
                self._put(group, name, value, part, number)

    def _put(self, group: str, name: str, value: Tensor, part: slice, number: int) -> None:
        """Puts values ``(K, *batch, *event)`` of a site where they belong."""
        site = self.runs.sites[name]
        if group == "log_likelihood":  # which has no event, nor the plates of sums over discrete latents
            plates = {dim: p for dim, p in site.plates.items() if value.shape[dim] == self.structure.frames[p].size}
            site = replace(site, event_dim=0, plates=plates)
        dims, value = label(name, value, site, self.structure.frames, ("draw",))
        self._store(group, name, dims, value, part, number)

    def _store(self, group: str, name: str, dims: tuple[str, ...], value: Tensor, part: slice, number: int) -> None:
        values = to_numpy(value)
        if name not in self.groups[group]:
            array = np.empty((1, number, *values.shape[1:]), values.dtype)
            self.groups[group][name] = (("chain", *dims), array)
        self.groups[group][name][1][0, part] = values

    def _add_khat(self, khat: Tensor) -> None:
        if "sample_stats" in self.groups:
            self.groups["sample_stats"]["khat"] = ((str(self.structure.plate),), to_numpy(khat))
