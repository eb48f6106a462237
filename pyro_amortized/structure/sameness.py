"""What of a run decides the structure that is read off it, so that the same is not read twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_data, is_enumerated, sample_sites

__all__ = ["run_key"]


def run_key(trace: Trace, frames: Mapping[str, PlateFrame]) -> Any:
    """All that a structure depends on but for indices and observed values, hashable.

    Args:
        trace: A run of the model.
        frames: The plates in it.

    Returns:
        The key; None for a run with latents that are masked or scaled, whose supports are made anew in every run, or
        whose densities are neither Pyro's nor torch's: what these are is read each time.
    """
    if torch._C._get_tracing_state():
        return None
    found: list[Any] = [*frames.values()]
    for name, site in sample_sites(trace).items():
        value, fn, kind = site["value"], site["fn"], None
        if not isinstance(value, Tensor):
            return None
        if not site["is_observed"]:
            kind = _kind(site)
            if kind is None:
                return None
        found += name, is_data(site), is_enumerated(site), site["cond_indep_stack"], fn.batch_shape, value.shape, kind
    return tuple(found)


def _kind(site: Site) -> Any:
    """What tells the density of a latent from others: its classes and its support, where that is an object of theirs.

    A support with bounds of its own is another object in every run.
    """
    if site["mask"] is not None or isinstance(site["scale"], Tensor):
        return None
    fn, kinds = site["fn"], [site["scale"], site["fn"].event_dim]
    while isinstance(fn, Independent):
        kinds.append(type(fn))
        fn = fn.base_dist
    if hasattr(fn, "base_dist") or type(fn).__module__.partition(".")[0] not in ("pyro", "torch"):
        return None
    return *kinds, type(fn), fn.support
