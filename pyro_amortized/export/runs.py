"""Runs of one call of a model at many draws of its latents: log-likelihoods, log-joints, predictions, prior draws.

All draws are evaluated in one run, in a plate outside of all others, if the model gives the same numbers that way as
one draw at a time; else by torch's ``vmap``, if that does; else one by one. Results are brought to a common form: a
leading axis of the draws, then the model's batch dimensions, then those of an event.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_amortized.objective.checks import check_outside
from pyro_amortized.objective.draws import agrees, draws_plate
from pyro_amortized.objective.enumeration import log_likelihood
from pyro_amortized.objective.evaluation import Evaluation
from pyro_amortized.structure.axes import SiteShape
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.plates import batch_depth, probe
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_computed, is_data, latent_sites, sample_sites

__all__ = ["Draws", "Mode", "ModelRuns", "Pass", "Results"]

Results = dict[tuple[str, str], Tensor]
"""Tensors of shape ``(K, *batch, *event)`` by group and site, with as many batch dimensions as the call has."""


@dataclass(frozen=True)
class Draws:
    """Draws of the latents of a call.

    Attributes:
        z: Flat unconstrained local latents, ``(K, N, D)``; None if there are none.
        globals: Values of global latents by site, ``(K, *batch, *event)``.
    """

    z: Tensor | None
    globals: Mapping[str, Tensor]

    @property
    def number(self) -> int:
        """Number of draws; 0 if there are no latents."""
        return next((len(value) for value in (self.z, *self.globals.values()) if value is not None), 0)

    def __getitem__(self, part: slice | Tensor) -> Draws:
        """Some of the draws."""
        z = None if self.z is None else self.z[part]
        return Draws(z, {name: value[part] for name, value in self.globals.items()})


Pass = Callable[[Draws, int, bool], Results]
"""What a run of the model gives, as a function of the draws, their number and whether it is for all of them."""
Mode = Callable[[Pass, Draws, int], Results]
"""How a pass is evaluated at several draws."""


class ModelRuns:
    """Evaluates a call of a model at many draws.

    Args:
        call: The call, with the indices of subsampled plates.

    Attributes:
        data: Observed values by site, ``(*batch, *event)`` as the model has them.
        sites: The axes of all sites.
        latent: Names of the latent sites, but for those that the model sums out.
        depth: Number of batch dimensions of results.
        num_elements: Number of elements of the largest site.
        computed: Names of the sites that hold what the model computes of its latents.
        lengths: How long the axes of the sites are.
        modes: How several draws are evaluated, by pass; those missing one by one.
    """

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        self.structure = structure = call.structure
        trace, _ = probe(call.model, call.args, call.kwargs, structure.indices)
        found = sample_sites(trace)
        self.sites = {name: _site_shape(site) for name, site in found.items()}
        self.latent = tuple(latent_sites(trace))
        self.data: dict[str, Tensor] = {
            name: torch.as_tensor(site["value"]).detach()
            for name, site in found.items()
            if is_data(site) and name not in structure.global_sites and torch.as_tensor(site["value"]).numel() > 0
        }
        of_chosen = structure.enumerated or structure.discrete  # of whose values there are no draws
        computed = [name for name, site in found.items() if is_computed(site) and _is_tensor(site)]
        self.computed = () if of_chosen else tuple(computed)
        self.depth = batch_depth(trace, structure.frames)
        shapes = [site["fn"].shape() for site in found.values()]
        self.num_elements = max([1, *(shape.numel() for shape in shapes)])
        self.lengths = {length for shape in shapes for length in shape}
        self.modes: dict[str, Mode] = {}

    # What a run gives

    def weigh(self, draws: Draws, number: int, together: bool) -> Results:
        """Log-likelihoods of every data site, and the log-joint of every datapoint where there are local latents."""
        recorder = poutine.trace(self.call.model)
        results: Results = {}
        values = self._global_values(draws, together)
        if draws.z is not None:
            call = replace(self.call, model=recorder, global_values=values)
            results["log_joint", ""] = Evaluation(call, number if together else 1, validate=False)(draws.z)
        else:
            handlers = self._draws_plate(number, together)
            if self.structure.enumerated:
                handlers.append(poutine.enum(first_available_dim=-self.depth - 2))
            self._run(recorder, values, handlers)
        trace = recorder.trace
        for name in self.data:
            value = log_likelihood(trace, name, bool(self.structure.enumerated))
            results["log_likelihood", name] = self._aligned(value, 0, number, together)
        return results

    def predict(self, draws: Draws, number: int, together: bool) -> Results:
        """New values of every data site."""
        values = {**self._global_values(draws, together), **self._local_values(draws, together)}
        return self._sample(values, number, together, {"posterior_predictive": tuple(self.data)})

    def compute(self, draws: Draws, number: int, together: bool) -> Results:
        """Values of the sites that are computed of latents."""
        values = {**self._global_values(draws, together), **self._local_values(draws, together)}
        nodes: dict[str, Any] = self._run(self.call.model, values, self._draws_plate(number, together)).nodes
        return {
            ("posterior", name): self._aligned(nodes[name]["value"], self.sites[name].event_dim, number, together)
            for name in self.computed
        }

    def prior(self, draws: Draws, number: int, together: bool) -> Results:
        """Draws of every latent and data site from the prior; global latents of ``draws`` are taken as they are."""
        values = self._global_values(draws, together)
        return self._sample(values, number, together, {"prior": self.latent, "prior_predictive": tuple(self.data)})

    def _sample(
        self, values: Mapping[str, Tensor], number: int, together: bool, groups: Mapping[str, tuple[str, ...]]
    ) -> Results:
        handlers = [_Sample(values), *self._draws_plate(number, together)]
        trace = self._run(poutine.uncondition(self.call.model), values, handlers)
        nodes: dict[str, Any] = trace.nodes
        return {
            (group, name): self._aligned(nodes[name]["value"], self.sites[name].event_dim, number, together)
            for group, names in groups.items()
            for name in names
        }

    def _run(self, model: Callable[..., Any], values: Mapping[str, Tensor], handlers: list[Any]) -> Trace:
        with pyro.validation_enabled(False):
            return replace(self.call, model=model).run(values, handlers)

    def _draws_plate(self, number: int, together: bool) -> list[Any]:
        return [draws_plate(number, self.depth)] if together else []

    # How draws are evaluated

    @torch.no_grad()
    def leave_out_shared(self, draws: Draws) -> None:
        """Leaves out what is computed for all datapoints of a call together, which other calls have otherwise."""
        plate = self.structure.plate
        shared = [name for name in self.computed if plate not in self.sites[name].plates.values()]
        if shared and draws.z is not None:
            before, after = (
                self.compute(Draws(z, draws[:1].globals), 1, False) for z in (draws.z[:1], draws.z[:1] + 1)
            )
            left = [name for name in shared if not torch.equal(before["posterior", name], after["posterior", name])]
            self.computed = tuple(name for name in self.computed if name not in left)

    def check_outside(self, draws: Draws) -> None:
        """Raises a ValueError if the weight of a datapoint's draw would leave out sites that depend on it."""
        if draws.z is not None:
            values = self._global_values(draws[:1], False)
            check_outside(replace(self.call, global_values=values), draws.z[[0, -1]])

    @torch.no_grad()
    def choose_mode(self, function: Pass, draws: Draws) -> None:
        """Finds out from a few draws, as many as no axis of the model is long, how a pass may be evaluated at many."""
        number = next(k for k in count(2) if k not in self.lengths)
        chosen = draws[torch.arange(number) % draws.number] if draws.number else draws
        apart = _one_by_one(function, chosen, number)
        modes = (mode for mode in (_together, _mapped) if self._agrees(mode, function, chosen, apart, number))
        self.modes[function.__name__] = next(modes, _one_by_one)

    def _agrees(self, mode: Mode, function: Pass, draws: Draws, apart: Results, number: int) -> bool:
        """Whether a mode gives the shapes, and where nothing is random the numbers, of one draw at a time."""

        def is_right(results: Results) -> bool:
            same = all(value.shape == apart[key].shape for key, value in results.items())
            return same and (
                function not in (self.weigh, self.compute) or all(close(v, apart[key]) for key, v in results.items())
            )

        return agrees(lambda: mode(function, draws, number), is_right)

    @torch.no_grad()
    def evaluate(self, function: Pass, draws: Draws, number: int) -> Results:
        """The results of a pass at ``number`` draws."""
        mode = self.modes.get(function.__name__, _one_by_one) if number > 1 else _one_by_one
        return mode(function, draws, number)

    # Axes

    def _global_values(self, draws: Draws, together: bool) -> dict[str, Tensor]:
        return {name: self._placed(name, value, together) for name, value in draws.globals.items()}

    def _local_values(self, draws: Draws, together: bool) -> dict[str, Tensor]:
        if draws.z is None:
            return {}
        values = self.structure.layout.values(draws.z)  # type: ignore[union-attr]
        return {name: self._placed(name, value, together) for name, value in values.items()}

    def _placed(self, name: str, value: Tensor, together: bool) -> Tensor:
        """Values ``(K, *batch, *event)`` with the draws where their plate is, or a single draw as the model has it."""
        return self.aligned(name, value) if together else value.squeeze(0)

    def aligned(self, name: str, value: Tensor) -> Tensor:
        """Brings a site's values ``(K, *batch, *event)`` to the common number of batch dimensions."""
        batch_rank = value.dim() - 1 - self.sites[name].event_dim
        return value.reshape(value.shape[:1] + (1,) * (self.depth - batch_rank) + value.shape[1:])

    def _aligned(self, value: Tensor, event_dim: int, number: int, together: bool) -> Tensor:
        """Brings what a run gives to the common form."""
        missing = self.depth + together - (value.dim() - event_dim)
        value = value.reshape((1,) * missing + value.shape)
        value = value if together else value.unsqueeze(0)
        return value.expand((number,) + value.shape[1:])

    def natural(self, name: str, value: Tensor) -> Tensor:
        """The inverse of :meth:`aligned`: a site's values with only the batch dimensions that it has in the model."""
        return value.reshape(value.shape[:1] + value.shape[1 + self.depth - self.sites[name].batch_rank :])


class _Sample(Messenger):
    """Draws without a path for gradients, which torch can vectorise for more distributions."""

    def __init__(self, given: Collection[str]) -> None:
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"] and msg["name"] not in self.given:
            try:
                msg["value"] = msg["fn"].sample()
            except NotImplementedError as error:
                raise ValueError(
                    f"Cannot export draws of site {msg['name']!r} because its {type(msg['fn']).__name__} distribution "
                    'cannot be sampled; try groups=["posterior", "log_likelihood"], or a distribution with a sampler.'
                ) from error


def _is_tensor(site: Site) -> bool:
    """Whether a site holds numbers."""
    return isinstance(site["value"], Tensor) and site["value"].numel() > 0


def _site_shape(site: Site) -> SiteShape:
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    if is_computed(site) and _is_tensor(site):
        shape, sizes = site["value"].shape, {frame.dim: frame.size for frame in site["cond_indep_stack"]}
        batch = len(shape) - site["fn"].event_dim
        if not batch:  # by default Pyro takes all dimensions for those of an event, also inside of plates
            batch = min(len(shape), max([-dim for dim in sizes], default=0))
        shape = shape[:batch]
        plates = {dim: name for dim, name in plates.items() if -dim <= batch and shape[dim] == sizes[dim]}
        return SiteShape(site["value"].dim() - batch, batch, plates)
    return SiteShape(site["fn"].event_dim, len(site["fn"].batch_shape), plates)


def _together(function: Pass, draws: Draws, number: int) -> Results:
    """All draws in one run of the model, in a plate outside of all others."""
    return function(draws, number, True)


def _mapped(function: Pass, draws: Draws, number: int) -> Results:
    """All draws in one run of the model as it is, vectorised by torch."""

    def single(_: Tensor, tensors: dict[str, Tensor]) -> Results:
        parts = {name: value.unsqueeze(0) for name, value in tensors.items()}
        results = function(Draws(parts.pop("", None), parts), 1, False)
        return {key: value.squeeze(0) for key, value in results.items()}

    tensors = dict(draws.globals) if draws.z is None else {**draws.globals, "": draws.z}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that it vectorises by a loop
        return torch.vmap(single, randomness="different")(torch.arange(number), tensors)


def _one_by_one(function: Pass, draws: Draws, number: int) -> Results:
    """A run of the model for every draw."""
    results = [function(draws[k : k + 1], 1, False) for k in range(number)]
    return {key: torch.cat([result[key] for result in results]) for key in results[0]}
