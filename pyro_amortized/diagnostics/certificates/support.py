"""Draws on the scale on which they are read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.transforms import IndependentTransform

from pyro_amortized.structure.layout import SiteLayout

__all__ = ["in_support"]


def in_support(layout: SiteLayout, z: Tensor) -> Tensor | None:
    """Values ``(*, E)`` of positive sites and the like, whose means few large draws may decide; None without any."""
    found = []
    for site in layout.sites:
        transform = site.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        elementwise = transform.domain.event_dim == transform.codomain.event_dim == 0
        if elementwise and site.is_static and not site.is_real:
            found.append(transform(z[..., site.start : site.stop]).clamp(-1e150, 1e150))
    return torch.cat(found, -1) if found else None
