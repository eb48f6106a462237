"""Runs of a guide and a model with K draws of the local latents for one of the global ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_model_guide_match
from torch import Tensor, nn

from pyro_amortized.objective.evaluation import Evaluation
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.running import Site, isolated
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.transforms import bounds

__all__ = ["Particles", "at_particle", "run_particles", "value_at"]


class _LocalPlate(pyro.plate):
    """A plate around the sites of some other plates alone: latents outside of these are drawn once."""

    inside: Collection[str] = ()

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and any(frame.name in self.inside for frame in msg["cond_indep_stack"]):
            super()._process_message(msg)


def _repeated(function: Callable[..., Any], call: ModelCall, number: int) -> Callable[..., Any]:
    """A model or a guide with K draws at its local sites, in an outermost plate if they are several."""
    if number == 1:
        return function
    with isolated():
        plate = _LocalPlate("num_particles_vectorized", number, dim=-call.structure.depth - 1)
    plate.inside = {str(call.structure.plate), *call.structure.groups}

    def run(*args: Any, **kwargs: Any) -> Any:
        with plate:
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Draw:
    """The draw of a site of a guide.

    Attributes:
        name: The site.
        source: What it is a function of without parameters: the draw before transforms to a support.
        leaf: The same without a history.
        site: The site, at the leaf.
    """

    name: str
    source: Tensor
    leaf: Tensor
    site: Site

    @classmethod
    def of_site(cls, name: str, site: Site) -> Draw:
        """Looks through transforms that hold no parameters, whose inverses lose digits, by their caches."""
        fn, source = _base(site["fn"]), site["value"]
        found = list(fn.transforms) if isinstance(fn, dist.TransformedDistribution) else []
        fixed = not any(isinstance(t, nn.Module) or any(b.requires_grad for b in bounds(t)) for t in found)
        found = found if fixed else []
        for transform in reversed(found):
            source = transform.inv(source)
        leaf = value = source.detach().requires_grad_()
        for transform in found:
            value = transform(value)
        return cls(name, source, leaf, {**site, "value": value})


@dataclass
class Particles:
    """Runs of a guide and of the model at the same K draws.

    Attributes:
        call: The call of the model, with the indices that the guide has drawn.
        number: K, in an outermost plate if it is more than one.
        guide_trace: The guide's run.
        model_trace: The model's.
        shares: Holds the normalised weights ``(K, N)`` by which gradients from the model to the draws are multiplied;
            while it is empty they are left as they are.
    """

    call: ModelCall
    number: int
    guide_trace: Trace
    model_trace: Trace
    shares: list[Tensor] = field(default_factory=list)

    @property
    def evaluation(self) -> Evaluation:
        """What sums the model's log-probabilities for each datapoint."""
        return Evaluation(self.call, self.number)

    @property
    def guide_evaluation(self) -> Evaluation:
        """What sums the guide's."""
        return Evaluation(replace(self.call, structure=replace(self.call.structure, enumerated=())), self.number)

    @cached_property
    def log_p(self) -> Tensor:
        """Log-joints ``(K, N)`` of the datapoints, nats, without the scale of a subsampled datapoint plate."""
        return self.evaluation.of_run(self.model_trace)

    @cached_property
    def log_q(self) -> Tensor:
        """The guide's log-densities ``(K, N)`` of their latents."""
        return self.guide_evaluation.of_run(self.guide_trace)

    @cached_property
    def outside(self) -> Tensor:
        """What sites outside of the datapoint plate add to an ELBO: log p - log q of global latents, mostly."""
        signs = ((1.0, self.model_trace), (-1.0, self.guide_trace))
        terms = [sign * term for sign, trace in signs for term in self.evaluation.outside(trace).values()]
        return torch.stack(terms).sum() if terms else self.log_p.new_zeros(())

    def outside_error(self, name: str) -> ValueError:
        """What to raise where a site outside of the datapoint plate depends on its latents."""
        plate = self.call.structure.plate
        return ValueError(
            f"Cannot weigh the draws of single datapoints because site {name!r}, outside of plate {plate!r}, depends "
            "on their latents: the weights of all datapoints hang together there; try a guide with groups={...} if an "
            f"index names the datapoint of each entry, a model in which the site lies in plate {plate!r}, or "
            "Trace_ELBO."
        )

    @property
    def drawn(self) -> dict[str, Site]:
        """The local sites at which the guide draws: no points, nor functions of other draws, nor factors."""
        sites = sample_sites(self.guide_trace).items()
        local = {name: site for name, site in sites if self.guide_evaluation.scale_of(site) is not None}
        return {name: site for name, site in local.items() if not isinstance(_base(site["fn"]), dist.Delta | dist.Unit)}

    @cached_property
    def draws(self) -> list[Draw]:
        """Their draws."""
        return [Draw.of_site(name, site) for name, site in self.drawn.items()]

    def log_q_at(self, draws: Sequence[Draw]) -> Tensor:
        """The log-densities ``(K, N)`` of draws as functions of their leaves, computed anew.

        A density that remembers how its draw was made is no function of the draw.
        """
        try:
            return self.guide_evaluation.of_sites({draw.name: draw.site for draw in draws})
        except NotImplementedError as error:
            raise ValueError(
                f"Cannot reparameterise draws of sites {[draw.name for draw in draws]} doubly because their density is "
                f'known where they have been drawn alone ({error}); try gradient="plain".'
            ) from error

    @property
    def log_q_of_points(self) -> Tensor:
        """What sites that are functions of draws add to the log-density, ``(K, N)``."""
        sites = sample_sites(self.guide_trace).items()
        return self.guide_evaluation.of_sites({n: s for n, s in sites if isinstance(_base(s["fn"]), dist.Delta)})

    @property
    def factors(self) -> dict[str, Site]:
        """The guide's factors in the datapoint plate, such as what trains learned updates."""
        sites = sample_sites(self.guide_trace).items()
        return {name: site for name, site in sites if isinstance(_base(site["fn"]), dist.Unit)}

    @property
    def factor_terms(self) -> Tensor:
        """The sum ``(K, N)`` of the guide's factors."""
        return self.guide_evaluation.of_sites(self.factors)

    @property
    def scales(self) -> list[float | Tensor]:
        """The model's own scales of all sites of the datapoints."""
        sites = [*sample_sites(self.model_trace).values(), *sample_sites(self.guide_trace).values()]
        found = [self.evaluation.scale_of(site) for site in sites]
        return [scale for scale in found if scale is not None]

    def gated(self, site: Site) -> Site:
        """A local site for the model, through which gradients are multiplied by :attr:`shares`."""
        value = site["value"]
        if not (isinstance(value, Tensor) and value.requires_grad):
            return site
        depth, frame = self.call.structure.depth, self.call.structure.datapoints
        outer = [self.number, *[1] * (depth + frame.dim)] if self.number > 1 else []
        shape = [*outer, frame.size, *[1] * (-frame.dim - 1 + site["fn"].event_dim)]
        shares, value = self.shares, value.view_as(value)  # a hook that held more would keep its own graph alive

        def weigh(gradient: Tensor) -> Tensor:
            return gradient * shares[0].reshape(shape) if shares else gradient

        value.register_hook(weigh)
        return {**site, "value": value}


def run_particles(
    call: ModelCall, guide: Callable[..., Any], number: int, shared: Particles | None = None
) -> Particles:
    """Runs the guide, and the model at its draws.

    Args:
        call: The call of the model.
        guide: The guide.
        number: K.
        shared: Particles whose global latents, and indices of plates, are used again.
    """
    guide = _repeated(guide, call, number)
    if shared is not None:
        guide = poutine.replay(guide, trace=_outside(shared))
    guide_trace = poutine.trace(guide).get_trace(*call.args, **call.kwargs)
    known, drawn = call.structure.indices, guide_trace.nodes
    indices: dict[str, Any] = {name: drawn[name]["value"] for name in known if name in drawn}
    call = replace(call, structure=replace(call.structure, indices={**known, **indices}))
    particles = Particles(call, number, guide_trace, guide_trace)
    replayed = guide_trace.copy()
    nodes: dict[str, Any] = replayed.nodes
    for name, site in sample_sites(guide_trace).items():
        if particles.guide_evaluation.scale_of(site) is not None:
            nodes[name] = particles.gated(site)
    model = _repeated(call.model, call, number)
    if call.structure.enumerated:  # inside of the replay, which is what latents have their values from first
        model = poutine.enum(model, first_available_dim=-call.structure.depth - 2)
    model = poutine.replay(model, trace=replayed)
    particles.model_trace = poutine.trace(model).get_trace(*call.args, **call.kwargs)
    if is_validation_enabled():
        check_model_guide_match(particles.model_trace, guide_trace, call.structure.depth + 1)
    return particles


def _outside(particles: Particles) -> Trace:
    """The part of a guide's run that is outside of the datapoint plate."""
    trace = particles.guide_trace.copy()
    for name, site in sample_sites(trace).items():
        if particles.guide_evaluation.scale_of(site) is not None:
            del trace.nodes[name]
    return trace


@torch.no_grad()
def at_particle(particles: Particles, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-joints ``(1, N)`` of one of the draws, evaluated on its own, and what lies outside of the plate."""
    structure, nodes = particles.call.structure, sample_sites(particles.guide_trace)
    values = {name: nodes[name]["value"] for name in structure.global_sites if name in nodes}
    for name in (site.name for site in structure.layout.sites):  # type: ignore[union-attr]
        values[name] = value_at(nodes[name], number, structure.depth)
    handlers = [poutine.enum(first_available_dim=-structure.depth - 2)] if structure.enumerated else []
    evaluation, trace = Evaluation(particles.call, 1), particles.call.run(values, handlers)
    return evaluation.of_run(trace), evaluation.outside(trace)


def latents_at(particles: Sequence[Particles]) -> tuple[ModelCall, Tensor]:
    """The call at the first draw's global latents; the flat latents of the first and the last, ``(2, N, D)``."""
    first, last = particles[0], particles[-1]
    layout: Any = first.call.structure.layout
    depth, nodes = first.call.structure.depth, [sample_sites(run.guide_trace) for run in (first, last)]
    numbers = (0, last.number - 1)
    z = [
        layout.flatten({site.name: value_at(found[site.name], number, depth) for site in layout.sites}).detach()
        for found, number in zip(nodes, numbers, strict=True)
    ]
    held = {name: nodes[0][name]["value"] for name in first.call.structure.global_sites if name in nodes[0]}
    return replace(first.call, global_values=held), torch.stack(z)


def value_at(site: Site, number: int, depth: int) -> Tensor:
    """One of the draws of a site that are in an outermost plate; the value of a site that has but one."""
    value = site["value"]
    axis = value.dim() - site["fn"].event_dim - depth - 1
    return value.select(axis, number) if axis >= 0 else value


def _base(fn: Any) -> Any:
    while getattr(fn, "base_dist", None) is not None and isinstance(
        fn, dist.MaskedDistribution | dist.Independent | dist.ExpandedDistribution
    ):
        fn = fn.base_dist
    return fn
