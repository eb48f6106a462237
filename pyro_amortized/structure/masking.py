"""How much a site counts: the mask and the scale that a model gives it, apart from those of its plates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor

from pyro_amortized.structure.running import Site

__all__ = ["NEUTRAL", "SiteMask", "site_mask"]


@dataclass(frozen=True)
class SiteMask:
    """The masks and the scale of a site; a guide gives its own site the same, so that both drop out together.

    Attributes:
        scale: The model's own ``poutine.scale``, without the scales of subsampled plates.
        handler_mask: What ``poutine.mask`` or ``obs_mask`` lets through, of the site's batch shape; None for all.
        fn_mask: The mask of a masked distribution; None for all.
        fn_mask_events: Number of event dimensions of the site on the right of those of ``fn_mask``.
        event_dim: Number of event dimensions of the site.
    """

    scale: float | Tensor = 1.0
    handler_mask: Tensor | None = None
    fn_mask: Tensor | None = None
    fn_mask_events: int = 0
    event_dim: int = 0

    @property
    def is_neutral(self) -> bool:
        """Whether the site counts as it is."""
        return not self.is_masked and not self.is_scaled

    @property
    def is_scaled(self) -> bool:
        """Whether the site is scaled."""
        return isinstance(self.scale, Tensor) or self.scale != 1.0

    @property
    def is_masked(self) -> bool:
        """Whether the site is masked."""
        return self.handler_mask is not None or self.fn_mask is not None

    @property
    def within_event(self) -> bool:
        """Whether entries of one event are masked apart from each other."""
        return self.fn_mask is not None and self.fn_mask_events < self.event_dim

    @property
    def present(self) -> Tensor | None:
        """What is not masked, to be broadcast with values ``(*batch, *event)``; None for all."""
        masks = [_pad(self.handler_mask, self.event_dim), _pad(self.fn_mask, self.fn_mask_events)]
        found = [mask for mask in masks if mask is not None]
        return None if not found else found[0] if len(found) == 1 else found[0] & found[1]

    @property
    def simplified(self) -> SiteMask:
        """The same without a scale that is a tensor of ones; reads its values, which traced code may not."""
        if not isinstance(self.scale, Tensor) or not ((self.scale - 1.0).abs() < 1e-6).all():
            return self
        return replace(self, scale=1.0) if self.is_masked else NEUTRAL

    def same_as(self, other: SiteMask) -> bool:
        """Whether mask and scale are the same, by value."""
        pairs = ((self.scale, other.scale), (self.handler_mask, other.handler_mask), (self.fn_mask, other.fn_mask))
        return all(
            (first is None) == (second is None)
            and (first is None or torch.equal(torch.as_tensor(first), torch.as_tensor(second)))
            for first, second in pairs
        )

    @contextmanager
    def handlers(self) -> Iterator[None]:
        """Gives the scale and the handler's mask to the sites sampled inside."""
        with ExitStack() as stack:
            if self.is_scaled:
                stack.enter_context(ScaleMessenger(self.scale))
            if self.handler_mask is not None:
                stack.enter_context(MaskMessenger(self.handler_mask))  # type: ignore[arg-type]
            yield


NEUTRAL = SiteMask()
"""The weight of a site that the model neither masks nor scales."""


def _pad(mask: Tensor | None, events: int) -> Tensor | None:
    return None if mask is None else mask.reshape(mask.shape + (1,) * events)


def site_mask(site: Site) -> SiteMask:
    """Reads the masks and the scale of a site off a run of the model."""
    fn = site["fn"]
    handler_mask = _as_tensor(site["mask"], site["value"])
    events, fn_mask, base = fn.event_dim, None, fn
    while True:
        mask = _as_tensor(base._mask, site["value"]) if isinstance(base, MaskedDistribution) else None
        if mask is not None and fn_mask is None:
            fn_mask, events = mask, base.event_dim
        elif mask is not None:
            fn_mask, events = _pad(fn_mask, events - base.event_dim) & mask, base.event_dim  # type: ignore[operator]
        if getattr(base, "base_dist", None) is None or not hasattr(base.base_dist, "event_dim"):
            break
        if base.base_dist.event_dim > base.event_dim:
            break
        base = base.base_dist
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.full_size and frame.full_size != frame.size:
            scale = scale * frame.size / frame.full_size
    if not isinstance(scale, Tensor):
        scale = 1.0 if abs(scale - 1.0) < 1e-6 else float(scale)
    if handler_mask is None and fn_mask is None and isinstance(scale, float) and scale == 1.0:
        return NEUTRAL
    return SiteMask(scale, handler_mask, fn_mask, events, fn.event_dim)


def _as_tensor(mask: Any, value: Any) -> Tensor | None:
    if mask is None or mask is True:
        return None
    return mask if isinstance(mask, Tensor) else torch.tensor(bool(mask), device=getattr(value, "device", None))
