"""One local latent: its place in the flat latent, its transform, its mask and scale."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import IndependentTransform, Transform

from pyro_amortized.structure.masking import NEUTRAL, SiteMask, site_mask
from pyro_amortized.structure.periodic import check_periodic
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import size_at
from pyro_amortized.structure.transforms import bounds, is_identity, kind_of, to_support

__all__ = ["LocalSite", "check_continuous", "check_local_site", "inner_dimensions", "local_site"]


@dataclass(frozen=True)
class LocalSite:
    """One local latent site.

    Attributes:
        name: Name of the site.
        transform: From unconstrained space to the site's support.
        event_dim: Number of event dimensions of the (constrained) value.
        shape: Event shape of the unconstrained value.
        inner: Dimension and size of the batch dimensions other than that of the datapoint plate, leftmost first.
        plates: Names of the plates that they belong to, empty for a dimension outside of all plates.
        start: Where the site's values start in the flat latent.
        stop: Where they end.
        weight: The mask and the scale that the model gives the site in this call.
        present: Which unconstrained values are not masked, ``(*plates, *shape)``; None for all.
    """

    name: str
    transform: Transform
    event_dim: int
    shape: torch.Size
    inner: tuple[tuple[int, int], ...]
    plates: tuple[str, ...]
    start: int
    stop: int
    weight: SiteMask = NEUTRAL
    present: Tensor | None = None

    @cached_property
    def inner_plates(self) -> tuple[str, ...]:
        """Names of the plates, other than the datapoint plate, that hold the site."""
        return tuple(name for name in self.plates if name)

    def description(self, plates: Collection[str] = ()) -> tuple[Any, ...]:
        """What tells sites of one name apart: unconstrained shape, inner dimensions, event dimensions and support.

        Args:
            plates: Names of inner plates whose numbers of entries do not count.
        """
        named = zip(self.plates, self.inner, strict=True)
        inner = tuple((name, dim) if name in plates else (dim, size) for name, (dim, size) in named)
        return tuple(self.shape), inner, self.event_dim, kind_of(self.transform)

    @cached_property
    def is_real(self) -> bool:
        """Whether the support is all of real space, so that nothing needs to be transformed."""
        return is_identity(self.transform)

    def unflatten(self, flat: Tensor) -> Tensor:
        """This site's unconstrained values, in the batch shape that Pyro expects.

        Args:
            flat: Flat latents of shape ``(*batch, D)``, with the datapoints at their plate's dimension of ``batch`` and
                size 1 at the dimensions of the site's inner plates.

        Returns:
            Values of shape ``(*batch, *shape)``, with the inner plates' sizes filled in.
        """
        x = flat if self.stop - self.start == flat.shape[-1] else flat[..., self.start : self.stop]
        if not self.inner:
            return x if x.shape[-1:] == self.shape else x.reshape(x.shape[:-1] + self.shape)
        rank = max(x.dim() - 1, -self.inner[0][0])
        sizes = [size for _, size in self.inner]
        x = x.reshape([1] * (rank + 1 - x.dim()) + list(x.shape[:-1]) + sizes + list(self.shape))
        for i, (dim, _) in enumerate(self.inner):
            x = x.transpose(rank + dim, rank + i)
        return x.reshape(x.shape[:rank] + self.shape)

    def has_draws(self, value: Tensor, dim: int) -> bool:
        """Whether a value of the site, in its support, has batch dimensions of more than its plates, those of draws."""
        plates = max([-dim, *(-inner for inner, _ in self.inner)])
        return value.shape[: max(0, value.dim() - self.event_dim - plates)].numel() > 1

    @cached_property
    def is_static(self) -> bool:
        """Whether the support has no bounds of its own, such as those of a uniform, that may change between calls."""
        return not bounds(self.transform)

    def flatten(self, value: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`unflatten`: unconstrained values ``(*batch, *shape)`` to ``(N, stop - start)``.

        Args:
            value: Unconstrained values with no batch dimension beyond the site's plates.
            dim: Batch dimension of the datapoint plate.
        """
        rank = max([value.dim() - len(self.shape), -dim, *(-d for d, _ in self.inner)])
        batch = [1] * (rank + len(self.shape) - value.dim()) + list(value.shape)
        x = value.reshape(batch[:rank] + [1] * len(self.inner) + list(self.shape))
        for i, (inner_dim, _) in enumerate(self.inner):
            x = x.transpose(rank + inner_dim, rank + i)
        return x.reshape(-1, self.stop - self.start)

    def constrain(self, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        r"""The site's value and the log absolute determinant of the transform's Jacobian.

        Args:
            unconstrained: Values of shape ``(*batch, *shape)``.

        Returns:
            The value in the support, and :math:`\log|dT/du|` of shape ``(*batch)``.
        """
        value = self.transform(unconstrained)
        batch_dim = value.dim() - self.event_dim
        if self.is_real:
            return value, value.new_zeros(value.shape[:batch_dim])
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        return value, sum_rightmost(log_det, log_det.dim() - batch_dim)

    def log_det_and_padding(self, log_det: Tensor, unconstrained: Tensor, weight: SiteMask) -> Tensor:
        r"""What a log-joint adds for a site: the log-Jacobian, and a standard normal density for masked entries.

        Masked entries have no prior, and with none no posterior. A standard normal in its place, independent of
        everything, leaves the evidence and the ELBO of the other entries as they are.

        Args:
            log_det: :math:`\log|dT/du|` of shape ``(*batch)``.
            unconstrained: u, of shape ``(*batch, *shape)``.
            weight: The mask and the scale of the site in the run at hand.
        """
        present, event_dims = weight.present, len(self.shape)
        if present is not None:
            if self.is_real:
                log_normal = -0.5 * (unconstrained.square() + _LOG_2PI)
                log_det = sum_rightmost(log_normal.masked_fill(present, 0.0), event_dims)
            else:
                present = present.reshape(present.shape[: present.dim() - self.event_dim])
                log_normal = sum_rightmost(-0.5 * (unconstrained.square() + _LOG_2PI), event_dims)
                log_det = torch.where(present, log_det, log_normal)
        return log_det * weight.scale if weight.is_scaled else log_det

    def normal(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """A normal in unconstrained space, on the site's support: an analytic KL where the prior is of its kind.

        Args:
            loc: Unconstrained locations ``(*batch, *shape)``.
            scale: Standard deviations of the same shape, known to be positive.
        """
        mask, outside = self.weight.fn_mask, self.weight.fn_mask_events
        if mask is None:
            return self._normal(loc, scale, self.event_dim)
        return self._normal(loc, scale, outside).mask(mask).to_event(self.event_dim - outside)

    def _normal(self, loc: Tensor, scale: Tensor, event_dim: int) -> dist.TorchDistribution:
        normal = dist.Normal(loc, scale, validate_args=False)
        if self.is_real:
            return normal.to_event(event_dim)
        transform = self.transform
        while isinstance(transform, IndependentTransform):  # as the priors that `to_event` makes are built
            transform = transform.base_transform
        with suppress(NotImplementedError):
            transform = transform.with_cache()
        pushed = dist.TransformedDistribution(normal, [transform])
        return pushed.to_event(event_dim - len(pushed.event_shape))


_LOG_2PI = math.log(2 * math.pi)


def inner_dimensions(site: Site, frames: Mapping[str, PlateFrame], plate: str) -> list[PlateFrame]:
    """The batch dimensions of a local site beside the datapoint plate's, leftmost first.

    Those outside of all plates, which Pyro accepts on the right of a site's plates and on the left of all plates, are
    given as plates without a name.
    """
    own = [frames[frame.name] for frame in site["cond_indep_stack"]]
    taken, shape = {frame.dim for frame in own}, site["fn"].batch_shape
    loose = [dim for dim in range(-len(shape), 0) if dim not in taken and shape[dim] != 1]
    inner = [frame for frame in own if frame.name != plate]
    inner += [PlateFrame("", dim, shape[dim], shape[dim], "full") for dim in loose]
    return sorted(inner, key=lambda frame: frame.dim)


def check_local_site(name: str, site: Site, frame: PlateFrame) -> None:
    """Raises a ValueError if a latent is shared by the datapoints of the plate that it lies in."""
    if size_at(site, frame.dim) != frame.size:
        raise ValueError(
            f"Cannot guide local site {name!r} because its batch shape {tuple(site['fn'].batch_shape)} has no "
            f"dimension of size {frame.size} at dim {frame.dim}, and plate {frame.name!r} has no size to expand it to; "
            f"try `pyro.plate({frame.name!r}, {frame.size})`."
        )


def check_continuous(name: str, site: Site, by: str = "this guide") -> None:
    """Raises a ValueError if a latent is discrete, or of a single value, and so has no density."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if isinstance(fn, dist.Delta):
        raise ValueError(
            f"Cannot guide latent {name!r} by {by} because its prior is a Delta, all at one point, and has no density; "
            f"try pyro.deterministic({name!r}, value)."
        )
    if not site["fn"].support.is_discrete:
        return
    remedy = 'summing it out in the model, infer={"enumerate": "parallel"} under TraceEnum_ELBO'
    if by == "this guide":
        remedy = f"DiscreteAmortizedGuide, or {remedy}"
    if not site["fn"].has_enumerate_support:
        remedy = "a Categorical over the values that matter, which can be summed out"
    if name.endswith("_unobserved"):  # of Pyro's obs_mask
        remedy = "a mask in the place of obs_mask, `fn.mask(present)` with obs filled in: what is missing drops out"
    raise ValueError(f"Cannot guide latent {name!r} by {by} because it is discrete; try {remedy}.")


def local_site(name: str, site: dict[str, Any], inner: list[PlateFrame], start: int) -> LocalSite:
    """The local latent that a site of a run shows, from a position of the flat latent on."""
    for frame in inner:
        if frame.subsampled:
            raise ValueError(
                f"Cannot fold plate {frame.name!r} of local site {name!r} into the datapoint because it is subsampled; "
                "try running the model over all of that plate, or make it the datapoint plate."
            )
    check_periodic(name, site)
    check_continuous(name, site)
    support = site["fn"].support
    try:
        transform = to_support(support)
    except NotImplementedError as error:
        raise ValueError(
            f"Cannot guide local site {name!r} because no bijection from unconstrained space to its support {support} "
            "is known; try poutine.reparam, or another prior for it."
        ) from error
    value = site["value"]
    event_dim = site["fn"].event_dim
    unconstrained = value if is_identity(transform) else transform.inv(value)
    shape = unconstrained.shape[value.dim() - event_dim :]
    size = torch.Size([frame.size for frame in inner]).numel() * shape.numel()
    dims = tuple((frame.dim, frame.size) for frame in inner)
    weight = site_mask(site).simplified
    local = LocalSite(
        name, transform, event_dim, shape, dims, tuple(f.name for f in inner), start, start + size, weight
    )
    present = weight.present
    if present is None:
        return local
    if weight.within_event and not local.is_real:
        raise ValueError(
            f"Cannot guide local site {name!r} because parts of its events are masked and its support is {support}; "
            "try a mask for whole events, `dist.to_event(...).mask(present)`."
        )
    if not local.is_real:
        present = present.reshape(present.shape[: present.dim() - event_dim] + (1,) * len(shape))
    return replace(local, present=present.expand(unconstrained.shape))
