"""What of a run decides the structure that is read off it, so that the same is not read twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions.constraints import Constraint

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
        The key; None for a run with latents that are masked or scaled, whose supports have bounds of their own, or
        whose densities are neither Pyro's nor torch's, or made of others: what these are is read each time.
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
        plates = tuple([frame.name for frame in site["cond_indep_stack"]])
        found += name, is_data(site), is_enumerated(site), plates, fn.batch_shape, value.shape, kind
    return tuple(found)


def _kind(site: Site) -> Any:
    """What tells the density of a latent from others: its classes, and its support where that has no bounds of its own.

    None for what is made of other densities, which may be of any kind, and for classes of others.
    """
    if site["mask"] is not None or isinstance(site["scale"], Tensor):
        return None
    fn, kinds = site["fn"], [site["scale"], site["fn"].event_dim]
    while isinstance(fn, Independent):
        kinds.append(type(fn))
        fn = fn.base_dist
    support = _plain(fn.support)
    if support is None or not _is_known(fn) or any(isinstance(part, Distribution) for part in vars(fn).values()):
        return None
    return *kinds, type(fn), support


def _plain(support: Any) -> Any:
    """A support of torch's or Pyro's as the numbers that it is made of; None if these are tensors, or anything else."""
    if not _is_known(support):
        return None
    parts = [_plain(value) if isinstance(value, Constraint) else value for value in vars(support).values()]
    return (type(support), *parts) if all(isinstance(part, int | float | tuple) for part in parts) else None


def _is_known(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("pyro", "torch")
