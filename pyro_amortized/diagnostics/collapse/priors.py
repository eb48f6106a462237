"""The model's prior of every dimension of the local latents, given the sites before it, at draws from a guide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    Independent,
    IndependentTransform,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Transform,
    kl_divergence,
)

from pyro_amortized.objective.draws import chunks, draws_plate
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_enumerated

__all__ = ["SitePrior", "prior_draws", "site_priors"]


@dataclass
class SitePrior:
    """The prior of one site in one run of the model, at k draws.

    Its units are its coordinates; or its events, if the prior couples their coordinates.

    Attributes:
        site: The site.
        unit: Number of unconstrained coordinates of a unit.
        log_p: Log density of every unit in unconstrained space, ``(k, N, J)``.
        log_whole: Log density of the whole site, ``(k, N)``.
        fn: Distribution of the units; None where discrete latents have been summed out.
        transform: From unconstrained space to the support of ``fn``.
        log_joint: The log-joint whose model was run.
    """

    site: LocalSite
    unit: int
    log_p: Tensor
    log_whole: Tensor
    fn: Any
    transform: Transform
    log_joint: LocalLogJoint

    def kl_from_normal(self, loc: Tensor, scale: Tensor) -> Tensor | None:
        """KL divergences of normals in unconstrained space, ``(k, N, J)``; None if there is no closed form.

        Args:
            loc: Locations ``(k, N, J)``.
            scale: Standard deviations ``(N, J)``.
        """
        if self.fn is None or self.unit > 1:
            return None
        loc, scale = (self._unflatten(part) for part in (loc, scale.unsqueeze(0)))
        posterior: Any = dist.Normal(loc, scale)
        if not self.site.is_real:
            posterior = dist.TransformedDistribution(posterior, [self.transform])
        try:
            kl = kl_divergence(posterior, self.fn)
        except NotImplementedError:
            return None
        return _flatten(kl, self.site, self.log_joint)

    def _unflatten(self, flat: Tensor) -> Tensor:
        depth, dim = self.log_joint.structure.depth, self.log_joint.layout.dim
        middle = (1,) * (depth + dim) + flat.shape[1:2] + (1,) * (-dim - 1)
        return self.site.unflatten(flat.reshape(flat.shape[:1] + middle + flat.shape[2:]))


def site_priors(log_joint: LocalLogJoint, z: Tensor) -> Iterator[tuple[slice, list[SitePrior]]]:
    """Runs the model at draws ``(K, N, D)``, as many at once as it can take.

    Yields:
        Which draws, and the priors of all local sites there.
    """
    pieces = [slice(i, i + 1) for i in range(len(z))]
    for piece in chunks(len(z), z.shape[1]) if log_joint.vectorized else pieces:
        yield piece, _run(log_joint, z[piece])


class _AllSeen(Exception):  # noqa: N818 - not an error
    """Leaves a model once its local latents have been sampled: the likelihood is not needed."""


class _Capture(Messenger):
    """Keeps the local latents' sites, and those of discrete latents that the model sums out, in the model's order."""

    def __init__(self, log_joint: LocalLogJoint) -> None:
        super().__init__()
        self.missing = {site.name for site in log_joint.layout.sites}
        self.found: list[Site] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.missing or (is_enumerated(msg) and not msg["is_observed"]):
            self.found.append(msg)
            self.missing.discard(msg["name"])
            if not self.missing:
                raise _AllSeen


def prior_draws(log_joint: LocalLogJoint, num_draws: int) -> Tensor:
    """Unconstrained draws ``(K, N, D)`` from the prior of every datapoint, with global latents at their values."""
    if not log_joint.vectorized:
        return torch.stack([_flatten_sites(log_joint, _sites(log_joint, {}, None))[0] for _ in range(num_draws)])
    sizes = [piece.stop - piece.start for piece in chunks(num_draws, log_joint.num_datapoints)]
    return torch.cat([_flatten_sites(log_joint, _sites(log_joint, {}, size)) for size in sizes])


def _flatten_sites(log_joint: LocalLogJoint, found: list[Site]) -> Tensor:
    values = {site["name"]: site["value"] for site in found}
    parts = []
    for site in log_joint.layout.sites:
        unconstrained = site.transform.inv(values[site.name])
        lead = (1,) * (log_joint.structure.depth + 1 + len(site.shape) - unconstrained.dim())
        parts.append(_flatten(unconstrained.reshape(lead + unconstrained.shape), site, log_joint))
    return torch.cat(parts, -1)


def _run(log_joint: LocalLogJoint, z: Tensor) -> list[SitePrior]:
    layout, together = log_joint.layout, log_joint.vectorized
    parts = layout.split(z, log_joint.structure.depth) if together else layout.split(z[0])
    values = {site.name: site.transform(parts[site.name]) for site in layout.sites}
    extra = [poutine.enum(first_available_dim=-log_joint.structure.depth - 2)] if log_joint.structure.enumerated else []
    return _read(log_joint, _sites(log_joint, values, len(z) if together else None, extra), parts)


def _sites(
    log_joint: LocalLogJoint, values: Mapping[str, Tensor], num_draws: int | None, extra: Sequence[Any] = ()
) -> list[Site]:
    """Runs the model up to its last local site, with values that are given, in a plate of draws unless None."""
    capture = _Capture(log_joint)

    def prior(*args: Any, **kwargs: Any) -> None:
        with suppress(_AllSeen):
            log_joint.call.model(*args, **kwargs)

    handlers: list[Any] = [capture]
    if num_draws is not None:
        handlers.append(draws_plate(num_draws, log_joint.structure.depth))
    replace(log_joint.call, model=prior).run(values, [*handlers, *extra])
    return capture.found


def _read(log_joint: LocalLogJoint, found: list[Site], parts: dict[str, Tensor]) -> list[SitePrior]:
    """Goes through the sites in order; ``weights`` are those of the discrete latents' values so far."""
    priors = []
    local = {site.name: site for site in log_joint.layout.sites}
    weights = torch.zeros(())
    for found_site in found:
        site = local.get(found_site["name"])
        if site is None:
            log_prob = _per_datapoint(found_site["fn"].log_prob(found_site["value"]), log_joint)
        else:
            prior = _site_prior(log_joint, found_site, site, parts[site.name], weights)
            log_prob = prior.log_whole
            priors.append(replace(prior, log_whole=_sum_out(log_prob, weights, 2)))
        weights = weights + log_prob
    return priors


def _site_prior(log_joint: LocalLogJoint, found: Site, site: LocalSite, part: Tensor, weights: Tensor) -> SitePrior:
    """The prior of a site, with ``log_whole`` not yet summed over the values of discrete latents."""
    fn, transform, coupled = _decouple(found["fn"], site)
    value, log_det = site.constrain(part)
    whole = _per_datapoint(found["fn"].log_prob(value) + log_det, log_joint)
    value = transform(part)
    log_det = transform.log_abs_det_jacobian(part, value)
    lead = len(site.shape) - coupled
    log_p = fn.log_prob(value) + sum_rightmost(log_det, log_det.dim() - (part.dim() - coupled))
    rank = log_joint.structure.depth + 1
    if log_p.dim() > rank + lead:
        _check_enumerated(log_joint, site)
        middle = (1,) * (log_joint.structure.depth + log_joint.layout.dim), (1,) * (-log_joint.layout.dim - 1 + lead)
        placed = weights.reshape(weights.shape[:-1] + middle[0] + weights.shape[-1:] + middle[1])
        log_p, fn = _sum_out(log_p, placed, rank + lead), None
    log_p = log_p.reshape((1,) * (rank + lead - log_p.dim()) + log_p.shape)
    units = replace(site, shape=site.shape[:lead])
    unit = site.shape[lead:].numel()
    return SitePrior(site, unit, _flatten(log_p, units, log_joint), whole, fn, transform, log_joint)


def _decouple(fn: Any, site: LocalSite) -> tuple[Any, Transform, int]:
    """The distribution of single coordinates or events, its transform, and the number of an event's dimensions."""
    transform = site.transform
    while isinstance(fn, Independent):
        fn = fn.base_dist
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(fn, MultivariateNormal | LowRankMultivariateNormal):
        fn = dist.Normal(fn.mean, fn.stddev)  # the marginals
    if not fn.event_shape and not transform.domain.event_dim and not transform.codomain.event_dim:
        return fn, transform, 0
    return fn, transform, len(site.shape) - (site.event_dim - len(fn.event_shape))


def _flatten(values: Tensor, units: LocalSite, log_joint: LocalLogJoint) -> Tensor:
    """Values ``(k, *plates, *shape)`` to ``(k, N, J)``."""
    count = units.shape.numel() * torch.Size([size for _, size in units.inner]).numel()
    units = replace(units, start=0, stop=count)
    return torch.stack([units.flatten(value, log_joint.layout.dim) for value in values])


def _per_datapoint(log_prob: Tensor, log_joint: LocalLogJoint) -> Tensor:
    """Sums over inner plates: ``(*enumerated, k, *plates)`` to ``(*enumerated, k, N)``."""
    rank = log_joint.structure.depth + 1
    log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
    others = [axis for axis in range(-log_joint.structure.depth, 0) if axis != log_joint.layout.dim]
    return log_prob.sum(others) if others else log_prob


def _sum_out(log_prob: Tensor, weights: Tensor, rank: int) -> Tensor:
    """The average over the values of discrete latents, which lie at dimensions beyond ``rank``."""
    if log_prob.dim() <= rank:
        return log_prob
    joint = log_prob + weights
    values = list(range(joint.dim() - rank))
    return joint.logsumexp(values) - weights.expand_as(joint).logsumexp(values)


def _check_enumerated(log_joint: LocalLogJoint, site: LocalSite) -> None:
    if log_joint.structure.depth > 1:
        raise ValueError(
            f"Cannot compare the guide with the prior of site {site.name!r} because that depends on a discrete latent "
            "in a model with nested plates; try to_event(...) instead of the inner plates."
        )
