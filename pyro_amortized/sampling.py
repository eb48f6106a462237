"""Sampling the local latents of a call as Pyro sites."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_amortized.families import Normal, VariationalFamily
from pyro_amortized.layout import LocalSite, SiteLayout

__all__ = ["KeepLogDensity", "PushedDelta", "sample_local"]


class PushedDelta(dist.Delta):
    """A value drawn elsewhere and transformed; ``log_density`` holds the Jacobian of the transform.

    Pyro's KL divergence of a ``Delta`` leaves its ``log_density`` out, so that ``TraceMeanField_ELBO`` is wrong for all
    of Pyro's autoguides with constrained latents. This class has no closed-form KL: the ELBO samples it, correctly.
    """


@register_kl(PushedDelta, dist.Distribution)
def _no_closed_form(p: PushedDelta, q: dist.Distribution) -> Tensor:
    raise NotImplementedError


class KeepLogDensity(Messenger):
    """Makes an autoguide of Pyro's, run under this handler, use :class:`PushedDelta`."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta and isinstance(fn.log_density, Tensor):
            msg["fn"] = PushedDelta(fn.v, log_density=fn.log_density, event_dim=fn.event_dim)


def sample_local(
    layout: SiteLayout, family: VariationalFamily, phi: Tensor, plates: Mapping[str, pyro.plate], latent_name: str
) -> dict[str, Tensor]:
    """Samples every local site; to be called inside the datapoint plate.

    The normal family samples the sites directly, so that Pyro's analytic KL divergences apply; others draw one flat
    auxiliary latent per datapoint, of which the sites are functions.

    Args:
        layout: The local latents.
        family: The variational family.
        phi: Variational parameters of shape ``(N, P)``.
        plates: The plates of this call by name.
        latent_name: Name of the auxiliary site.

    Returns:
        Values by site name.
    """
    phi = layout.batch(phi)
    if isinstance(family, Normal):
        loc, scale = family.marginals(phi)
        return {
            site.name: _sample(site, site.normal(site.unflatten(loc), site.unflatten(scale)), plates)
            for site in layout.sites
        }
    latent = pyro.sample(latent_name, family(phi), infer={"is_auxiliary": True})
    return {site.name: _sample(site, _delta(site, latent), plates) for site in layout.sites}


def _delta(site: LocalSite, latent: Tensor) -> dist.TorchDistribution:
    value, log_det = site.constrain(site.unflatten(latent))
    return PushedDelta(value, log_density=-log_det, event_dim=site.event_dim)


def _sample(site: LocalSite, fn: dist.TorchDistribution, plates: Mapping[str, pyro.plate]) -> Tensor:
    if not site.plates:
        return pyro.sample(site.name, fn)
    with ExitStack() as stack:
        for name in site.plates:
            stack.enter_context(plates[name])
        return pyro.sample(site.name, fn)
