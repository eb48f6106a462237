"""The sites of a model's run: latent, observed, enumerated."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_amortized.structure.running import Site

__all__ = ["check_value", "is_computed", "is_data", "is_enumerated", "latent_sites", "sample_sites", "size_at"]


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace without those that only draw the indices of a plate."""
    nodes: dict[str, Any] = trace.nodes
    return {name: site for name, site in nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}


def size_at(site: Site, dim: int) -> int:
    """Size of a site's batch shape at a dimension, 1 where it has none."""
    shape = site["fn"].batch_shape
    return shape[dim] if len(shape) >= -dim else 1


def is_enumerated(site: Site) -> bool:
    """Whether the model sums a discrete site out by itself, under an ELBO that enumerates."""
    return site["infer"].get("enumerate") == "parallel"


def latent_sites(trace: Trace) -> dict[str, Site]:
    """The latent sites that a guide must provide: not observed, and not enumerated in the model."""
    return {
        name: site for name, site in sample_sites(trace).items() if not site["is_observed"] and not is_enumerated(site)
    }


def is_data(site: Site) -> bool:
    """Whether a site is observed, rather than latent or computed of latents."""
    return site["is_observed"] and not is_computed(site)


def check_value(site: Site) -> None:
    """Raises a ValueError if what a site observes is no tensor, and nothing that torch makes one of."""
    try:
        torch.as_tensor(site["value"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Cannot read what site {site['name']!r} observes because it is a {type(site['value']).__name__} and no "
            "tensor; try the tensors of a batch as the model's arguments, svi.step(*batch), and for diagnostics the "
            "loader in place of the arguments, estimate_gaps(model, guide, loader)."
        ) from error


def is_computed(site: Site) -> bool:
    """Whether a site holds what is computed of others: ``pyro.deterministic``, or what ``poutine.reparam`` replaces."""
    fn = site["fn"]
    replaced = isinstance(fn, MaskedDistribution) and fn._mask is False and isinstance(fn.base_dist, Delta)
    return site["is_observed"] and (site["infer"].get("_deterministic", False) or replaced)
