"""Discrete local latents: which there are, and how a guide draws them from logits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_amortized.structure.local_site import LocalSite, inner_dimensions
from pyro_amortized.structure.masking import SiteMask, site_mask
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import latent_sites

__all__ = ["DiscreteSite", "check_inference", "discrete_sites", "distribution", "mode", "one_hot", "sample_discrete"]


@dataclass(frozen=True)
class DiscreteSite:
    """A discrete local latent that the guide draws from logits of its own.

    Attributes:
        name: Name of the site.
        kind: ``"categorical"``, ``"one_hot"`` or ``"bernoulli"``.
        num_categories: Number of values.
        num_events: Number of event dimensions over which the prior declares its values independent (``to_event``).
        logits: Where its logits lie among those of all discrete sites, and its plates.
        weight: The mask and the scale that the model gives the site in this call.
    """

    name: str
    kind: str
    num_categories: int
    num_events: int
    logits: LocalSite
    weight: SiteMask

    def same_as(self, other: DiscreteSite) -> bool:
        """Whether logits for one are logits for the other."""
        mine, theirs = ((s.kind, s.num_categories, s.logits.shape, s.logits.inner) for s in (self, other))
        return mine == theirs


_KINDS = {dist.Categorical: "categorical", dist.OneHotCategorical: "one_hot", dist.Bernoulli: "bernoulli"}


def discrete_sites(trace: Trace, frames: Mapping[str, PlateFrame], plate: str) -> tuple[DiscreteSite, ...]:
    """The discrete local latents in a run of the model that the model does not sum out itself.

    Raises:
        ValueError: If one of them is of another kind than those that can be enumerated.
    """
    found: list[DiscreteSite] = []
    for name, site in latent_sites(trace).items():
        stack = [frame.name for frame in site["cond_indep_stack"]]
        if plate in stack and site["fn"].support.is_discrete:
            inner = inner_dimensions(site, frames, plate)
            found.append(_discrete_site(name, site, inner, found[-1].logits.stop if found else 0))
    return tuple(found)


def _discrete_site(name: str, site: Site, inner: list[PlateFrame], start: int) -> DiscreteSite:
    fn = site["fn"]
    base, num_events = fn.base_dist if isinstance(fn, dist.MaskedDistribution) else fn, 0
    if isinstance(base, dist.Independent):
        base, num_events = base.base_dist, base.reinterpreted_batch_ndims
    kind = next((kind for family, kind in _KINDS.items() if isinstance(base, family)), None)
    if kind is None or any(frame.subsampled for frame in inner):
        cause = f"its prior is a {type(base).__name__}" if kind is None else "it lies in a further subsampled plate"
        raise ValueError(
            f"Cannot guide discrete local site {name!r} because {cause}; try a Categorical, OneHotCategorical or "
            'Bernoulli prior, or a model that sums it out, infer={"enumerate": "parallel"}.'
        )
    num_categories = len(base.enumerate_support(expand=False))
    events = fn.event_shape[:num_events]
    shape = torch.Size([*events, 1 if kind == "bernoulli" else num_categories])
    size = torch.Size([frame.size for frame in inner]).numel() * shape.numel()
    dims = tuple((frame.dim, frame.size) for frame in inner)
    names = tuple(frame.name for frame in inner)
    logits = LocalSite(name, transform_to(constraints.real), len(shape), shape, dims, names, start, start + size)
    return DiscreteSite(name, kind, num_categories, num_events, logits, site_mask(site).simplified)


class _StraightThroughOneHotCategorical(dist.OneHotCategorical):
    """OneHotCategorical whose draws have the gradient of a Gumbel-softmax draw, and whose density has one by value."""

    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float) -> None:
        super().__init__(logits=logits)
        self.temperature = temperature

    def expand(self, batch_shape: Any, _instance: Any = None) -> _StraightThroughOneHotCategorical:
        shape = torch.Size(batch_shape) + self.event_shape
        return _StraightThroughOneHotCategorical(self.logits.expand(shape), self.temperature)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        noise = dist.Gumbel(torch.zeros_like(logits), torch.ones_like(logits)).sample()
        soft = ((logits + noise) / self.temperature).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        return hard + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)  # the logits of a OneHotCategorical are normalised


class _StraightThroughBernoulli(dist.Bernoulli):
    """Bernoulli whose draws have the gradient of a binary Gumbel-softmax draw."""

    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float) -> None:
        super().__init__(logits=logits)
        self.temperature = temperature

    def expand(self, batch_shape: Any, _instance: Any = None) -> _StraightThroughBernoulli:
        return _StraightThroughBernoulli(self.logits.expand(torch.Size(batch_shape)), self.temperature)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        noise = torch.logit(torch.rand_like(logits), eps=torch.finfo(logits.dtype).tiny)
        soft = ((logits + noise) / self.temperature).sigmoid()
        return (soft > 0.5).to(soft) + (soft - soft.detach())


def distribution(site: DiscreteSite, logits: Tensor, temperature: float | None = None) -> dist.TorchDistribution:
    """q(y | x) of a site.

    Args:
        site: The site.
        logits: Its logits, ``(*batch, *events, num_logits)``.
        temperature: Of the Gumbel-softmax variable whose gradient stands in for the draw's; None for no gradient.
    """
    logits = logits.squeeze(-1) if site.kind == "bernoulli" else logits
    if site.kind == "categorical":
        fn: Any = dist.Categorical(logits=logits)
    elif temperature is None:
        fn = (dist.Bernoulli if site.kind == "bernoulli" else dist.OneHotCategorical)(logits=logits)
    elif site.kind == "bernoulli":
        fn = _StraightThroughBernoulli(logits, temperature)
    else:
        fn = _StraightThroughOneHotCategorical(logits, temperature)
    fn = fn.to_event(site.num_events) if site.num_events else fn
    return fn if site.weight.fn_mask is None else fn.mask(site.weight.fn_mask)


def check_inference(site: DiscreteSite, temperature: float | None) -> None:
    """Raises a ValueError if a site can neither be enumerated (no temperature) nor be relaxed (one)."""
    if temperature is None and site.num_events:
        raise ValueError(
            f"Cannot enumerate discrete local site {site.name!r} because its values are joined by `to_event`; try a "
            "plate of its own for them, or temperature=1.0, which draws them with straight-through gradients."
        )
    if temperature is not None and site.kind == "categorical":
        raise ValueError(
            f"Cannot relax discrete local site {site.name!r} because no gradient flows through the integers of a "
            "Categorical; try a OneHotCategorical prior, whose values the model multiplies with, or temperature=None, "
            "which enumerates them."
        )


def sample_discrete(
    site: DiscreteSite, logits: Tensor, plates: Mapping[str, pyro.plate], temperature: float | None = None
) -> Tensor:
    """Draws a site, or enumerates its values; to be called inside the datapoint plate.

    Args:
        site: The site.
        logits: Logits of all discrete sites, with the datapoints at their plate's dimension.
        plates: The plates of this call by name.
        temperature: As for :func:`distribution`; None leaves the site to be enumerated.
    """
    fn = distribution(site, site.logits.unflatten(logits), temperature)
    with ExitStack() as stack:
        for name in site.logits.inner_plates:
            stack.enter_context(plates[name])
        stack.enter_context(site.weight.handlers())
        return pyro.sample(site.name, fn, infer={"enumerate": "parallel"} if temperature is None else {})


def one_hot(site: DiscreteSite, value: Tensor, like: Tensor) -> Tensor:
    """A value as indicators, ``(*batch, prod(events) * num_categories)``."""
    if site.kind == "bernoulli":
        value = torch.stack([1.0 - value, value], -1)
    elif site.kind == "categorical":
        value = F.one_hot(value.long(), site.num_categories)
    return value.to(like).flatten(-1 - site.num_events)


def mode(site: DiscreteSite, logits: Tensor) -> Tensor:
    """The most probable value."""
    if site.kind == "bernoulli":
        return (logits.squeeze(-1) > 0).to(logits)
    best = logits.argmax(-1)
    return best if site.kind == "categorical" else F.one_hot(best, site.num_categories).to(logits)
