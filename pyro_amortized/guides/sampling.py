"""Sampling the local latents of a call as Pyro sites."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_amortized.families import VariationalFamily
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.masking import NEUTRAL, SiteMask
from pyro_amortized.structure.structure import Structure

__all__ = ["KeepLogDensity", "PushedDelta", "add_gradient", "check_scaled_once", "log_conditionals", "sample_local"]


class PushedDelta(dist.Delta):
    """A value drawn elsewhere and transformed; ``log_density`` holds the Jacobian of the transform.

    Pyro's KL divergence of a ``Delta`` leaves its ``log_density`` out, so that ``TraceMeanField_ELBO`` is wrong for all
    of Pyro's autoguides with constrained latents. This class has no closed-form KL: the ELBO samples it, correctly.
    """

    def log_prob(self, x: Tensor) -> Tensor:
        """As of any ``Delta``; but that of another value, of which the flat latent is not known, is refused.

        Raises:
            ValueError: If ``x`` is not the value that has been drawn.
        """
        drawn = x.data_ptr() == self.v.data_ptr() or not self._validate_args
        if not drawn and x.shape[-self.v.dim() :] == self.v.shape and not (x == self.v).all():
            raise ValueError(
                "Cannot evaluate the guide at other latents than its own draws, as the sleep phase of "
                "ReweightedWakeSleep (insomnia < 1) and CSIS do, because they are functions of a flat latent drawn "
                'first, in joint families and in Pyro\'s autoguides for global latents; try family="normal" and a '
                "model without global latents, or insomnia=1.0."
            )
        return super().log_prob(x)


@register_kl(PushedDelta, dist.Distribution)
def _no_closed_form(p: PushedDelta, q: dist.Distribution) -> Tensor:
    raise NotImplementedError


class KeepLogDensity(Messenger):
    """Makes an autoguide of Pyro's, run under this handler, use :class:`PushedDelta`, and the model's masks and scales.

    Args:
        weights: Masks and scales of the latents that the model gives any.
    """

    def __init__(self, weights: Mapping[str, SiteMask]) -> None:
        super().__init__()
        self.weights = weights

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if self.weights and not msg["is_observed"] and not site_is_subsample(msg):
            self._weigh(msg)
        if type(fn) is dist.Delta and isinstance(fn.log_density, Tensor):
            msg["fn"] = PushedDelta(fn.v, log_density=fn.log_density, event_dim=fn.event_dim)

    def _weigh(self, msg: Any) -> None:
        """Gives a site of the guide the scale and mask of the model's."""
        name = msg["name"]
        weight = self.weights.get(name, self.weights.get(name.removesuffix("_unconstrained"), NEUTRAL))
        joint = msg["infer"].get("is_auxiliary") and not name.endswith("_unconstrained")
        within, fn = weight.within_event, msg["fn"]
        if within and isinstance(fn, dist.Independent) and fn.reinterpreted_batch_ndims >= weight.fn_mask_events:
            outer = fn.reinterpreted_batch_ndims - weight.fn_mask_events
            masked = fn.base_dist.to_event(weight.fn_mask_events).mask(weight.fn_mask)
            msg["fn"], weight = masked.to_event(outer), replace(weight, fn_mask=None)
        elif within and isinstance(fn, dist.Delta) and not torch.as_tensor(fn.log_density).any():
            weight = replace(weight, fn_mask=None)  # nothing of this site's own is in the density
        elif within:
            raise ValueError(
                f"Cannot guide global site {name!r} because parts of its events are masked; try a mask for whole "
                "events, `dist.to_event(...).mask(present)`, or a plate in place of to_event."
            )
        if joint:
            raise ValueError(
                f"Cannot guide global sites {sorted(self.weights)} jointly, as {name!r} does, because the model "
                "masks or scales them; try global_guide=AutoNormal."
            )
        msg["scale"] = msg["scale"] * weight.scale
        for mask in (weight.handler_mask, weight.fn_mask):
            if mask is not None:
                msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]


def check_scaled_once(structure: Structure) -> None:
    """Raises a ValueError if the caller scales the guide as the model has scaled its latents already."""
    weights = dict(structure.global_weights)
    if structure.layout is not None:
        weights.update({site.name: site.weight for site in structure.layout.sites})
    outer = [handler.scale for handler in runtime._PYRO_STACK if isinstance(handler, ScaleMessenger)]
    for name, weight in weights.items():
        if weight.is_scaled and any(torch.equal(torch.as_tensor(s), torch.as_tensor(weight.scale)) for s in outer):
            raise ValueError(
                f"Cannot scale this guide by poutine.scale because its model scales site {name!r} by as much itself, "
                "which the guide does too: it would be scaled twice; try the guide without poutine.scale, or a guide "
                "of the model without it."
            )


def sample_local(
    layout: SiteLayout, family: VariationalFamily, phi: Tensor, plates: Mapping[str, pyro.plate], latent_name: str
) -> dict[str, Tensor]:
    """Samples every local site; to be called inside the datapoint plate.

    The normal family samples the sites directly, so that Pyro's analytic KL divergences apply; others draw one flat
    auxiliary latent per datapoint, of which the sites are functions. It carries the log-density; but where every site
    of the model lies in an inner plate, or the model scales the sites differently, each site has that of its entries
    given those before them: ELBOs that keep the plates which all sites share, such as ``RenyiELBO``, weigh every entry
    on its own.

    Args:
        layout: The local latents.
        family: The variational family.
        phi: Variational parameters ``(*batch, P)``, with the datapoints at their plate's dimension.
        plates: The plates of this call by name.
        latent_name: Name of the auxiliary site.

    Returns:
        Values by site name.
    """
    if family.is_mean_field:
        loc, scale = family.marginals(phi)  # type: ignore[operator]
        return {
            site.name: _sample(site, site.normal(site.unflatten(loc), site.unflatten(scale)), plates, site.weight)
            for site in layout.sites
        }
    apart = layout.is_apart
    joint = SiteMask() if apart else SiteMask(layout.scale)
    if isinstance(joint.scale, Tensor) and joint.scale.dim():
        joint = SiteMask(layout.batch(joint.scale.unsqueeze(-1)).squeeze(-1))
    with joint.handlers():
        fn: Any = family(phi)
        latent = pyro.sample(latent_name, fn.mask(False) if apart else fn, infer={"is_auxiliary": True})
        log_q = log_conditionals(layout, family, phi, latent) if apart else None
        result = {}
        for site in layout.sites:
            weight = SiteMask(site.weight.scale) if apart and site.weight.is_scaled else NEUTRAL
            result[site.name] = _sample(site, _delta(site, latent, log_q), plates, weight)
        return result


def log_conditionals(layout: SiteLayout, family: VariationalFamily, phi: Tensor, latent: Tensor) -> Tensor:
    """The terms of log q of every dimension; a ValueError if a family that has none would need them."""
    terms = family.log_conditionals(phi, latent)
    if terms is not None:
        return terms
    where = [f"plate {f.name!r}" if f.name else f"dimension {f.dim} outside of all plates" for f in layout.shared]
    if not where:
        raise ValueError(
            f"Cannot guide the sites of a datapoint by one {type(family).__name__} because the model scales sites "
            f"{[site.name for site in layout.sites]} of plate {layout.plate!r} differently, and this family has no "
            'density of one given others; try family="normal" or "multivariate_normal", or one poutine.scale '
            "around all of them."
        )
    raise ValueError(
        f"Cannot guide all entries of a datapoint by one {type(family).__name__} because every site of the model "
        f"lies in {' and '.join(where)} beside plate {layout.plate!r}: ELBOs such as RenyiELBO weigh each entry on "
        f'its own, and this family has no density of one given others; try family="normal" or '
        '"multivariate_normal".'
    )


def _delta(site: LocalSite, latent: Tensor, log_q: Tensor | None) -> dist.TorchDistribution:
    unconstrained = site.unflatten(latent)
    value, log_det = site.constrain(unconstrained)
    if site.weight.is_masked:
        log_det = site.log_det_and_padding(log_det, unconstrained, replace(site.weight, scale=1.0))
    log_density = -log_det if log_q is None else sum_rightmost(site.unflatten(log_q), len(site.shape)) - log_det
    return PushedDelta(value, log_density=log_density, event_dim=site.event_dim)


def _sample(site: LocalSite, fn: dist.TorchDistribution, plates: Mapping[str, pyro.plate], weight: SiteMask) -> Tensor:
    if not site.inner_plates and weight.is_neutral:
        return pyro.sample(site.name, fn)
    with ExitStack() as stack:
        for name in site.inner_plates:
            stack.enter_context(plates[name])
        stack.enter_context(weight.handlers())
        return pyro.sample(site.name, fn)


def add_gradient(name: str, term: Tensor) -> None:
    """Adds a term to the gradient of the loss but not to its value, with the weight that the guide's density has there.

    In an ELBO the guide's log-density counts positively, in the wake-phi loss of ``ReweightedWakeSleep`` and in that of
    ``CSIS`` negatively: the weight is taken without its sign, so that every loss decreases the term.

    Args:
        name: Name of the site that carries the gradient.
        term: What is to become smaller, in nats, of the batch shape of the plates around.
    """
    zero = term - term.detach()
    if zero.requires_grad:
        zero.register_hook(torch.abs)
    pyro.factor(name, zero, has_rsample=True)
