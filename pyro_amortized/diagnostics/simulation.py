"""Data sets simulated from the model: latents and observations whose true latents are known.

With the global latents held at the guide's median, local latents are drawn from the prior and observations given them.
The simulated observations are put among the model's arguments where the observed ones were, so that the guide, however
it finds its inputs, infers on them as on any other data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.checks import check_count, check_seed
from pyro_amortized.diagnostics.problem import LocalProblem, bind
from pyro_amortized.diagnostics.substitution import SampleDatapoints
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.objective.noise import generator, seeded
from pyro_amortized.structure.arguments import CallArguments, OwnArguments, Place
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.sites import is_computed, sample_sites
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.structure import Structure

__all__ = ["Simulation", "Simulator", "redraw", "simulate"]

_BLOCK = 1000
"""Datapoints simulated in one call of the model; bounds memory."""


@dataclass(frozen=True)
class Simulation:
    """One call of the model with simulated observations, and the latents that they came from.

    Attributes:
        args: The model's positional arguments, with simulated observations in place of the observed ones.
        kwargs: Its keyword arguments likewise.
        latents: The true local latents, flat and unconstrained, of shape ``(S, D)``.
        observed: The simulated observations by site, as the model observes them.
        rows: Which datapoint of the original call each simulated one takes its other arguments (covariates, masks,
            indices) from, ``(S,)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    latents: Tensor
    observed: dict[str, Tensor]
    rows: Tensor


def simulate(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_datapoints: int | None = None,
    *,
    plate: str | None = None,
    seed: int = 0,
) -> Simulation:
    """Simulates datapoints from the model, with the global latents held at the guide's median.

    Observed values must be among the arguments: as they are, as views of them (``x[:, t]``, ``x.reshape(...)``), as the
    rows of a subsample (``x[index]``) or in another dtype. Where an observation is masked, it keeps its value. Torch's
    global seed is left alone.

    Args:
        model: The Pyro model.
        guide: A guide of this package that serves unseen data.
        model_args: The model's positional arguments, as a tuple.
        model_kwargs: Its keyword arguments.
        num_datapoints: S, by default as many as the call has. Further ones repeat the rows of all arguments that
            hold data of the datapoints, as is found by numbers; fewer are a random selection of them.
        plate: As for :func:`estimate_gaps`.
        seed: Seed of all draws.

    Returns:
        The simulated call.

    Raises:
        ValueError: If the model is none that can be simulated, observations are not found among its arguments, or it
            cannot be run on another number of datapoints.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> simulation = simulate(model, AmortizedGuide(model), (torch.zeros(10),), num_datapoints=500)
        >>> simulation.args[0].shape, simulation.latents.shape
        (torch.Size([500]), torch.Size([500, 1]))
    """
    if num_datapoints is not None:
        num_datapoints = check_count("num_datapoints", num_datapoints, 1, 100)
    seed = check_seed(seed)
    return Simulator(bind(model, guide, model_args, model_kwargs, seed, plate=plate)).at_once(num_datapoints, seed)


class Simulator:
    """Simulates from one call of a model any number of times.

    Args:
        problem: The call.

    Raises:
        ValueError: If the call is none that can be simulated.
    """

    def __init__(self, problem: LocalProblem) -> None:
        self.guide = problem.guide
        self.log_joint = problem.objective.log_joint
        self.num_datapoints = self.log_joint.num_datapoints
        _check_call(self.guide, self.log_joint)

    def at_once(self, number: int | None, seed: int, name: str = "num_datapoints") -> Simulation:
        """Simulates a number of datapoints in one call, by default as many as it has, as :func:`simulate` does.

        Args:
            number: The number.
            seed: Seed of all draws.
            name: What the user calls the number.
        """
        rng = generator(seed, 20)
        rows = None if number is None else self.choose_rows(number, rng)
        if number is not None and rows is None:
            raise ValueError(
                f"Cannot simulate {number} datapoints in one call because the model and its guide can only be run on "
                f"their own {self.num_datapoints} rows; try {name}={self.num_datapoints}, or a model whose plate takes "
                "its size from an argument that holds the data of its datapoints."
            )
        return self.run(rows, rng)

    def blocks(self, num_simulations: int, rng: torch.Generator) -> Iterator[Simulation]:
        """Simulates at least ``num_simulations`` datapoints: in blocks, or as whole data sets if it has to be."""
        rows = self.choose_rows(num_simulations, rng)
        blocks: Sequence[Tensor | None] = () if rows is None else rows.chunk(math.ceil(num_simulations / _BLOCK))
        if not blocks or not all(map(self._can_run, blocks)):
            blocks = [None] * math.ceil(num_simulations / self.num_datapoints)
        for block in blocks:
            yield self.run(block, rng)

    def choose_rows(self, number: int, rng: torch.Generator) -> Tensor | None:
        """Rows of the call to simulate, each equally often but for a remainder; None if only all can be run at once."""
        size = self.num_datapoints
        rows = torch.cat([torch.arange(number - number % size) % size, torch.randperm(size, generator=rng)])[:number]
        rows = rows.sort().values if number <= size else rows
        return rows if self._can_run(rows) else None

    def _can_run(self, rows: Tensor | None) -> bool:
        if rows is None or _is_range(rows, self.num_datapoints):
            return True
        if self.guide.master is not None:  # an AutoGuideList fixes the sizes of its plates
            return False
        part = self.log_joint.select(rows, once=True)
        if part is None or (len(rows) > self.num_datapoints and self._indexed):
            return False
        try:
            with untouched():
                discrete = bool(part.structure.discrete)
                reader = StructureReader(self.guide.plate, discrete=discrete, groups=self.guide.groups)
                structure = reader.look(part.call.model, part.call.args, part.call.kwargs, part.structure.indices)
            self.log_joint.structure.check_same(structure)
            return self._sees_rows((part.call.args, dict(part.call.kwargs)), rows)
        except Exception:  # a model may fail in any way on a part of its data; then it is run on all of it
            return False

    def _sees_rows(self, call: CallArguments, rows: Tensor) -> bool:
        """Whether the guide's encoder sees of arguments cut to rows what it sees of these rows of all data."""
        pairs = zip(_inputs(self.guide, call), self._whole_inputs, strict=True)
        return all(torch.equal(part, whole) or torch.equal(part, whole[rows.to(whole.device)]) for part, whole in pairs)

    @cached_property
    def _whole_inputs(self) -> tuple[Tensor, ...]:
        return _inputs(self.guide, (self.log_joint.call.args, dict(self.log_joint.call.kwargs)))

    @cached_property
    def _indexed(self) -> bool:
        """Whether observations are rows of an argument, each of which can be observed only once."""
        return any(place.index is not None for place in self._draw(self.log_joint, generator(0))[1].values())

    @torch.no_grad()
    def run(self, rows: Tensor | None, rng: torch.Generator) -> Simulation:
        """Simulates the given rows of the call, which it can be run on, or all of them."""
        if rows is None:
            rows = torch.arange(self.num_datapoints)
        whole = _is_range(rows, self.num_datapoints)
        part: Any = self.log_joint if whole else self.log_joint.select(rows, once=True)
        trace, places, arguments = self._draw(part, rng)
        nodes: dict[str, Any] = trace.nodes
        observed = {name: nodes[name]["value"] for name in places}
        args, kwargs = arguments.replaced([(place, observed[name]) for name, place in places.items()])
        with untouched():
            _check_same_model(replace(part.call, args=args, kwargs=kwargs), trace)
            _check_inputs(self.guide, arguments.call, (args, kwargs))
        latents = part.layout.flatten({site.name: nodes[site.name]["value"] for site in part.layout.sites})
        _check_finite(part.layout, latents, observed)
        return Simulation(args, kwargs, latents, observed, rows)

    def _draw(self, part: LocalLogJoint, rng: torch.Generator) -> tuple[Trace, dict[str, Place], OwnArguments]:
        like = self.log_joint.call.args, dict(self.log_joint.call.kwargs)
        return _draw(part.call, part.layout.plate, like, rng)


def redraw(
    model: Callable[..., Any], guide: LocalGuide, args: tuple[Any, ...], kwargs: dict[str, Any], rng: torch.Generator
) -> CallArguments:
    """The arguments of a call with all its datapoints simulated, as by :func:`simulate` but without its checks."""
    with torch.no_grad(), untouched():
        inferred = guide.infer(*args, **kwargs)
        call = ModelCall(model, args, kwargs, inferred.structure, inferred.global_values)
        trace, places, arguments = _draw(call, inferred.structure.datapoints.name, (args, kwargs), rng)
    nodes: dict[str, Any] = trace.nodes
    return arguments.replaced([(place, nodes[name]["value"]) for name, place in places.items()])


@torch.no_grad()
def _draw(
    call: ModelCall, plate: str, like: CallArguments, rng: torch.Generator
) -> tuple[Trace, dict[str, Place], OwnArguments]:
    """A run of the model with simulated observations, and where among its arguments the observed ones lie."""
    arguments = OwnArguments(call.args, call.kwargs, like)
    args, kwargs = arguments.call
    sampler = SampleDatapoints(plate, *call.structure.groups)
    with pyro.validation_enabled(False), seeded(rng):
        trace = replace(call, args=args, kwargs=kwargs).run(handlers=(sampler,))
    _check_scales(call.structure, trace)
    places = {}
    for name, value in sampler.observed.items():
        place = arguments.find(value, tuple(call.structure.indices.values()))
        if place is None:
            raise ValueError(
                f"Cannot simulate data because the values of observed site {name!r} are not found among the "
                "model's arguments, so that simulated ones cannot be put in their place; try passing the data as "
                "an argument of the model, just as the site observes them."
            )
        places[name] = place
    return trace, places, arguments


def _is_range(rows: Tensor, size: int) -> bool:
    return len(rows) == size and torch.equal(rows, torch.arange(size))


def _check_call(guide: LocalGuide, log_joint: LocalLogJoint) -> None:
    if guide.inference.num_known is not None:
        raise ValueError(
            f"Cannot infer the latents of simulated data with this {type(guide).__name__} because its table holds "
            "variational parameters of the observed datapoints only; try AmortizedGuide, or SemiAmortizedGuide if "
            "answers are to be optimised for each datapoint."
        )
    if log_joint.structure.random_plates:
        raise ValueError(
            f"Cannot simulate data because plates {log_joint.structure.random_plates} draw another subsample in every "
            "run, which would not meet the simulated datapoints; try pyro.plate(name, size, subsample=index) with the "
            "indices, or only the batch itself, as an argument of the model."
        )


def _check_scales(structure: Structure, trace: Trace) -> None:
    """Refuses models whose log-joint is not that of what was drawn."""
    frame = structure.datapoints
    subsampling = frame.full_size / frame.size if frame.subsampled else 1.0
    for name, site in sample_sites(trace).items():
        if all(f.name != frame.name for f in site["cond_indep_stack"]) or is_computed(site):
            continue
        scale = torch.as_tensor(site["scale"], dtype=torch.float64) / subsampling
        if not torch.allclose(scale, torch.ones_like(scale)):
            raise ValueError(
                f"Cannot simulate data because site {name!r} has a scale of its own ({scale.flatten()[0].item():.3g}) "
                "from poutine.scale, and nothing can be drawn from a scaled density; try the model without it."
            )


def _check_same_model(call: ModelCall, trace: Trace) -> None:
    """Runs the model on the simulated data: all its distributions must be those that the data were drawn from."""
    before = sample_sites(trace)
    values = {name: site["value"] for name, site in before.items() if not site["is_observed"]}
    with pyro.validation_enabled(False):
        again = call.run(values)
        trace.compute_log_prob()
        again.compute_log_prob()
    after = sample_sites(again)
    for name, site in before.items():
        first = site["log_prob"]
        second = after[name]["log_prob"] if name in after else first.new_empty(0)
        if not close(second, first):
            raise ValueError(
                f"Cannot simulate data because the log-probability of site {name!r} is another when the model runs on "
                "the simulated data: the model looks at its observed data elsewhere, or draws random numbers of its "
                "own; try the values that pyro.sample returns in place of the argument, and eval() of modules in it."
            )


def _inputs(guide: LocalGuide, call: CallArguments) -> tuple[Tensor, ...]:
    """What the guide's encoder sees of a call."""
    return guide.encoder_inputs(*call[0], **call[1])


def _check_inputs(guide: LocalGuide, before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    """Refuses a guide that looks elsewhere for the data than the simulated ones are."""
    inputs = [_inputs(guide, call) for call in (before, after)]
    if inputs[0] and all(torch.equal(x, y) for x, y in zip(*inputs, strict=True)):
        raise ValueError(
            "Cannot infer the latents of simulated data because the inputs of the guide's encoder do not change with "
            "the observations; try an encoder_input that is, or is computed from, the argument that the model observes."
        )


def _check_finite(layout: SiteLayout, latents: Tensor, observed: Mapping[str, Tensor]) -> None:
    parts = {site.name: latents[:, site.start : site.stop] for site in layout.sites}
    for name, value in parts.items():
        rows = (~value.isfinite()).any(-1).sum().item()
        if rows:
            raise ValueError(
                f"Cannot use the simulated data because {rows} of {len(latents)} draws of latent site {name!r} lie on "
                "the boundary of its support; try a less extreme prior, or float64."
            )
    for name, value in observed.items():
        if value.isinf().any():
            raise ValueError(
                f"Cannot use the simulated data because draws of observed site {name!r} are not finite; try a prior "
                "whose draws keep the likelihood's parameters in a moderate range."
            )
