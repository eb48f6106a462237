"""Densities of angles and directions: some supports are declared as real, where they have no finite integral."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.constraints import sphere
from torch import Tensor

from pyro_amortized.structure.running import Site

__all__ = ["check_periodic"]

_PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
_PARTS = ("base_dist", "_component_distribution", "component0", "component1")
"""Where distributions hold those that they are made of."""


def check_periodic(name: str, site: Site) -> None:
    """Refuses a latent whose density is periodic, or lies on a sphere.

    Raises:
        ValueError: If it is.
    """
    found = next((part for part in _parts(site["fn"]) if _is_periodic(part, site)), None)
    if found is None:
        return
    if found.support is sphere:
        because = "the sphere that is its support cannot be mapped to unconstrained space"
    else:
        because = (
            "its density is periodic: over the real line, which is declared as its support, its integral is infinite, "
            "and so would be the evidence"
        )
    remedy = "try" if isinstance(found, dist.ProjectedNormal) else "try a direction `dist.ProjectedNormal(...)` and"
    angle = "" if found.support is sphere else ", with torch.atan2(direction[..., 1], direction[..., 0]) as the angle"
    raise ValueError(
        f"Cannot guide latent {name!r}, a {type(found).__name__}, because {because}; {remedy} "
        f"`pyro.poutine.reparam(model, {{{name!r}: pyro.infer.reparam.ProjectedNormalReparam()}})`{angle}."
    )


def _parts(fn: Any) -> Iterator[Any]:
    """A distribution and those that it is made of."""
    yield fn
    for name in _PARTS:
        part = vars(fn).get(name)
        if part is not None:
            yield from _parts(part)


def _is_periodic(fn: Any, site: Site) -> bool:
    if isinstance(fn, _PERIODIC) or fn.support is sphere:
        return True
    known = type(fn).__module__.partition(".")[0] in ("pyro", "torch")
    return not known and fn is site["fn"] and _repeats(fn, site["value"])


def _repeats(fn: Any, value: Tensor) -> bool:
    """Whether a density of the user's own is the same after full turns, and not after other steps."""
    if not str(fn.support).startswith(("Real", "IndependentConstraint(Real")):
        return False
    with torch.no_grad():
        here, *turned = (fn.log_prob(value + 2 * math.pi * turns) for turns in (0, 1, -2))
        other = fn.log_prob(value + 1)
    same = all(torch.allclose(here, there, rtol=1e-3, atol=1e-3) for there in turned)
    return same and not torch.allclose(here, other, rtol=1e-2, atol=1e-2)
