"""SiteLayout: which latents of a model are local to a datapoint, and where they lie in its flat latent vector.

A datapoint is one index of the datapoint plate. The latent sites inside that plate, with any further plates they are
in and any dimensions outside of all plates folded into the datapoint, are local; every datapoint's local values,
unconstrained and flattened, make one vector of ``latent_dim`` numbers. All other latent sites are global.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
    biject_to,
    constraints,
)
from torch.distributions.mixture_same_family import MixtureSameFamilyConstraint

from pyro_amortized.periodic import check_periodic
from pyro_amortized.tracing import PlateFrame, Site, sample_sites, size_at
from pyro_amortized.weights import NEUTRAL, SiteWeight, site_weight

__all__ = [
    "LocalSite",
    "SiteLayout",
    "bounds",
    "check_continuous",
    "datapoint_plate",
    "inner_dimensions",
    "is_data",
    "is_enumerated",
    "latent_sites",
]


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
    weight: SiteWeight = NEUTRAL
    present: Tensor | None = None

    @cached_property
    def inner_plates(self) -> tuple[str, ...]:
        """Names of the plates, other than the datapoint plate, that hold the site."""
        return tuple(name for name in self.plates if name)

    @cached_property
    def is_real(self) -> bool:
        """Whether the support is all of real space, so that nothing needs to be transformed."""
        return _is_identity(self.transform)

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

    def log_det_and_padding(self, log_det: Tensor, unconstrained: Tensor, weight: SiteWeight) -> Tensor:
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


def bounds(transform: Any) -> list[Tensor]:
    """The tensors that a transform holds, such as the bounds of an interval."""
    if isinstance(transform, Tensor):
        return [transform]
    if isinstance(transform, Transform):
        if type(transform).__name__ == "_InverseTransform":
            return bounds(transform.inv)
        transform = [value for name, value in vars(transform).items() if not name.startswith("_")]
    return [tensor for part in transform for tensor in bounds(part)] if isinstance(transform, list | tuple) else []


def _without_mixtures(support: Any) -> Any:
    """The support of the components in place of that of a ``MixtureSameFamily``, of which torch knows no bijection.

    Raises:
        NotImplementedError: If each component has bounds of its own.
    """
    if isinstance(support, MixtureSameFamilyConstraint):
        base = _without_mixtures(support.base_constraint)
        if any(bound.numel() > 1 for bound in bounds(biject_to(base))):
            raise NotImplementedError
        return base
    if isinstance(support, constraints.independent):
        return constraints.independent(_without_mixtures(support.base_constraint), support.reinterpreted_batch_ndims)
    return support


def _without_identities(transform: Transform) -> Transform:
    """Drops shifts by 0 and scales by 1: torch's way to the positive numbers then is that of a ``LogNormal``."""
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(_without_identities(transform.base_transform), transform.reinterpreted_batch_ndims)
    if not isinstance(transform, ComposeTransform) or not transform.parts:
        return transform
    parts = [part for part in transform.parts if not _is_neutral(part)]
    return parts[0] if len(parts) == 1 else ComposeTransform(parts)


def _is_neutral(transform: Transform) -> bool:
    numbers = getattr(transform, "loc", None), getattr(transform, "scale", None)
    return type(transform) is AffineTransform and not any(isinstance(n, Tensor) for n in numbers) and numbers == (0, 1)


def _is_identity(transform: Transform) -> bool:
    base = getattr(transform, "base_transform", transform)
    return getattr(base, "parts", None) == []


def _kind(transform: Any) -> Any:
    """The class of a transform with those of its parts, to tell supports apart."""
    parts = getattr(transform, "parts", None) or [getattr(transform, "base_transform", None)]
    return type(transform), *(_kind(part) for part in parts if part is not None)


def is_enumerated(site: Site) -> bool:
    """Whether the model sums a discrete site out by itself, under an ELBO that enumerates."""
    return site["infer"].get("enumerate") == "parallel"


def latent_sites(trace: Trace) -> dict[str, Site]:
    """The latent sites that a guide must provide: not observed, and not enumerated in the model."""
    return {
        name: site for name, site in sample_sites(trace).items() if not site["is_observed"] and not is_enumerated(site)
    }


def is_data(site: Site) -> bool:
    """Whether a site is observed, rather than latent or merely recorded by ``pyro.deterministic``."""
    return site["is_observed"] and not site["infer"].get("_deterministic", False)


def datapoint_plate(
    trace: Trace, frames: Mapping[str, PlateFrame], requested: str | None, *, encodes: bool = False
) -> str | None:
    """Decides which plate's indices are the datapoints.

    Plates whose data are but terms of ``pyro.factor`` count where no other plate has any.

    Args:
        trace: A run of the model.
        frames: The plates in it.
        requested: The user's choice, or None for the outermost plate that holds an observed site.
        encodes: Whether observed values are needed, so that terms of ``pyro.factor`` are none.

    Returns:
        The plate's name; None if no observed site lies in a plate.

    Raises:
        ValueError: If the requested plate does not exist or holds no observed site, or if several plates qualify.
    """
    holders: dict[str, None] = {}
    outermost: dict[str, None] = {}
    of_factors: dict[str, None] = {}
    for site in sample_sites(trace).values():
        names = [frame.name for frame in site["cond_indep_stack"]]
        if is_data(site) and names:
            holders.update(dict.fromkeys(names))
            (outermost if torch.as_tensor(site["value"]).numel() else of_factors)[names[0]] = None
    if not outermost and not encodes:
        outermost = of_factors
    if requested is None:
        if len(outermost) > 1:
            raise ValueError(
                f"Cannot choose the datapoint plate because several plates hold observed sites: {sorted(outermost)}; "
                "try plate=... with one of these names."
            )
        return next(iter(outermost), None)
    if requested not in frames:
        found = f"one of {sorted(holders)}" if holders else f"`with pyro.plate({requested!r}, ...):` in the model"
        raise ValueError(f"Cannot use plate {requested!r} because the model has no plate of that name; try {found}.")
    if requested not in holders:
        raise ValueError(
            f"Cannot use plate {requested!r} as the datapoint plate because no observed site lies in it; try "
            + (f"one of {sorted(holders)}, or " if holders else "")
            + "calling the guide with the data that the model observes."
        )
    return requested


@dataclass(frozen=True)
class SiteLayout:
    """The local latent sites of one model structure and their places in the flat unconstrained latent.

    Attributes:
        plate: Name of the datapoint plate.
        dim: Its batch dimension, negative.
        sites: The local sites, in the order of the model.
        latent_dim: D, the length of a datapoint's flat latent.
        shared: Dimensions, beside the datapoint plate's, in which every site of the model has entries of its own, with
            their sizes and the names of their plates. Bounds such as RenyiELBO's weigh these entries one by one.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...         weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        ...         pyro.sample("x", dist.Poisson(rate * weights[..., 0]), obs=x)
        >>> from pyro_amortized.tracing import probe
        >>> trace, frames = probe(model, (torch.ones(5),), {})
        >>> layout = SiteLayout.from_trace(trace, frames, "data")
        >>> layout.latent_dim
        3
        >>> {name: tuple(value.shape) for name, value in layout.values(torch.zeros(5, 3)).items()}
        {'rate': (5,), 'weights': (5, 3)}
    """

    plate: str
    dim: int
    sites: tuple[LocalSite, ...]
    latent_dim: int
    shared: tuple[PlateFrame, ...] = ()

    @classmethod
    def from_trace(
        cls, trace: Trace, frames: Mapping[str, PlateFrame], plate: str, but: Collection[str] = ()
    ) -> SiteLayout:
        """Reads the layout off a run of the model.

        Args:
            trace: A run of the model.
            frames: The plates in it.
            plate: Name of the datapoint plate.
            but: Names of local sites to leave out.

        Raises:
            ValueError: If a local site is discrete or has no transform to its support, or lies in a further plate that
                is subsampled.
        """
        sites: list[LocalSite] = []
        for name, site in latent_sites(trace).items():
            names = [frame.name for frame in site["cond_indep_stack"]]
            if plate in names and name not in but:
                _check_local_site(name, site, frames[plate])
                inner = inner_dimensions(site, frames, plate)
                sites.append(_local_site(name, site, inner, sites[-1].stop if sites else 0))
        shared = _shared_dimensions(trace, frames, plate)
        return cls(plate, frames[plate].dim, tuple(sites), sites[-1].stop if sites else 0, shared)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the D dimensions: the site's, with the position in inner dimensions and event, as ``z[0]``."""
        found = []
        for site in self.sites:
            sizes = [*(size for _, size in site.inner), *site.shape]
            positions = product(*map(range, sizes)) if sizes else [()]
            found += [f"{site.name}[{','.join(map(str, at))}]" if at else site.name for at in positions]
        return tuple(found)

    @cached_property
    def names_over_time(self) -> tuple[str, ...] | None:
        """Names of the D dimensions without the number of their step, ``z_*[0]``; None unless sites are numbered."""
        if self.steps is None or len(self.steps) < 2:
            return None
        pairs = [(site, name) for site in self.sites for name in self.names[site.start : site.stop]]
        return tuple(f"{site.name.rstrip('0123456789')}*{name[len(site.name) :]}" for site, name in pairs)

    def batch(self, flat: Tensor) -> Tensor:
        """Puts datapoints at their plate's dimension: ``(*, N, P)`` to ``(*, N, 1, ..., 1, P)``."""
        if self.dim == -1:
            return flat
        return flat.reshape(flat.shape[:-1] + (1,) * (-self.dim - 1) + flat.shape[-1:])

    def spread(self, term: Tensor) -> Tensor:
        """Divides what counts for whole datapoints, in their batch shape, among the entries of shared dimensions."""
        if not self.shared:
            return term
        sizes = {frame.dim: frame.size for frame in self.shared}
        shape = [sizes.get(dim, 1) for dim in range(min(sizes), 0)]
        return term / math.prod(shape) * term.new_ones(shape)

    def split(self, flat: Tensor, depth: int | None = None) -> dict[str, Tensor]:
        """Unconstrained values by site.

        Args:
            flat: Flat latents of shape ``(*sample, N, D)``.
            depth: Number of batch dimensions to keep free for plates between ``sample`` and the event dimensions; by
                default what each site needs.

        Returns:
            Values of shape ``(*sample, *plates, *unconstrained event)``.
        """
        values = {}
        for site in self.sites:
            plates = depth or max([-self.dim, *(-dim for dim, _ in site.inner)])
            shape = flat.shape[:-2] + (1,) * (plates + self.dim) + flat.shape[-2:-1] + (1,) * (-self.dim - 1)
            values[site.name] = site.unflatten(flat.reshape(shape + flat.shape[-1:]))
        return values

    def values(self, flat: Tensor, depth: int | None = None) -> dict[str, Tensor]:
        """Values in their supports by site; arguments as for :meth:`split`."""
        parts = self.split(flat, depth)
        return {site.name: site.transform(parts[site.name]) for site in self.sites}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values in their supports ``(*plates, *event)`` by site, to flat unconstrained latents ``(N, D)``."""
        return torch.cat([s.flatten(s.transform.inv(values[s.name]), self.dim) for s in self.sites], -1)

    @cached_property
    def present(self) -> Tensor | None:
        """Which of the flat unconstrained values are not masked, ``(N, D)``; None for all."""
        masks = [site.present for site in self.sites]
        like = next((mask for mask in masks if mask is not None), None)
        if like is None:
            return None
        flat = [None if s.present is None else s.flatten(s.present, self.dim) for s in self.sites]
        size = next(len(part) for part in flat if part is not None)
        whole = [like.new_ones(size, s.stop - s.start) for s in self.sites]
        return torch.cat([w if part is None else part for part, w in zip(flat, whole, strict=True)], -1)

    @cached_property
    def is_scaled(self) -> bool:
        """Whether the model scales a local site of its own accord."""
        return any(site.weight.is_scaled for site in self.sites)

    @cached_property
    def is_apart(self) -> bool:
        """Whether each site needs a density of its own: they share a dimension, or the model scales them apart."""
        with suppress(ValueError):
            return bool(self.shared) or self.scale is None
        return True

    @cached_property
    def scale(self) -> float | Tensor:
        """The model's own scale of the local sites: a number, or one for each datapoint ``(N,)``.

        Raises:
            ValueError: If it is not the same for all sites, or differs within a datapoint.
        """
        first = self.sites[0].weight.scale
        for site in self.sites[1:]:
            same = torch.equal(torch.as_tensor(site.weight.scale), torch.as_tensor(first))
            if not same:
                raise ValueError(
                    f"Cannot evaluate the per-datapoint ELBO because the model scales its local sites "
                    f"{self.sites[0].name!r} and {site.name!r} differently; try one poutine.scale around all of them."
                )
        if not isinstance(first, Tensor):
            return first
        if first.numel() == 1:
            return first.reshape(())
        if first.dim() < -self.dim or first.shape[self.dim] != first.numel():
            raise ValueError(
                f"Cannot evaluate the per-datapoint ELBO because the scale of local site {self.sites[0].name!r}, of "
                f"shape {tuple(first.shape)}, is not one for each datapoint of plate {self.plate!r}; try one number "
                "for each datapoint."
            )
        return first.reshape(-1)

    @cached_property
    def steps(self) -> list[tuple[Any, ...]] | None:
        """For sites numbered alike, as ``z_1, w_1, z_2, w_2``: what each step holds; None if steps differ."""
        steps: dict[str, list[Any]] = {}
        for site in self.sites:
            stem, number = re.fullmatch(r"(.*?)(\d*)", site.name, re.DOTALL).groups()  # type: ignore[union-attr]
            steps.setdefault(number, []).append((stem, site.shape, site.inner, site.event_dim, _kind(site.transform)))
        found = [tuple(step) for step in steps.values()]
        in_order = [site.name for site in self.sites] == [f"{part[0]}{n}" for n, step in steps.items() for part in step]
        return found if in_order and "" not in steps and all(step == found[0] for step in found) else None

    @property
    def description(self) -> list[tuple[Any, ...]]:
        """What tells layouts apart: name, unconstrained shape, inner plates, event dimensions, support of each site."""
        return [(s.name, tuple(s.shape), s.inner, s.event_dim, _kind(s.transform)) for s in self.sites]

    def check_same(self, other: SiteLayout, *, per_step: bool = False) -> None:
        """Raises a ValueError naming what changed if ``other``, found in a later call, is laid out differently.

        Args:
            other: The layout of a later call.
            per_step: Whether the number of steps of sites numbered alike may differ.
        """
        if not (per_step and self.steps and other.steps and self.steps[0] == other.steps[0]):
            self._check_sites(other)
        if (self.plate, self.dim) != (other.plate, other.dim):
            raise ValueError(
                f"Cannot run this guide because the datapoint plate is now {other.plate!r} at dim {other.dim}, and was "
                f"{self.plate!r} at dim {self.dim} when the guide was set up; try the same structure in every call, or "
                "one guide per structure."
            )

    def _check_sites(self, other: SiteLayout) -> None:
        mine, theirs = ({site.name: site for site in layout.sites} for layout in (self, other))
        remedy = (
            "try the same structure in every call, one guide per structure, or, for sites numbered by time, an encoder "
            "that returns features (N, T, H)."
        )
        for name in [*mine, *theirs]:
            if name not in theirs or name not in mine:
                state = "is no longer a latent site of" if name in mine else "has become a latent site of"
                raise ValueError(
                    f"Cannot run this guide because site {name!r} {state} plate {self.plate!r} since the guide was "
                    f"set up (it may have changed between observed and latent); {remedy}"
                )
            before, after = ((s.shape, s.inner, s.event_dim, _kind(s.transform)) for s in (mine[name], theirs[name]))
            if before != after:
                raise ValueError(
                    f"Cannot run this guide because local site {name!r} now has unconstrained event shape "
                    f"{tuple(after[0])} and inner plates {list(after[1])}, and had {tuple(before[0])} and "
                    f"{list(before[1])} when the guide was set up, or has another support; {remedy}"
                )


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


def _shared_dimensions(trace: Trace, frames: Mapping[str, PlateFrame], plate: str) -> tuple[PlateFrame, ...]:
    """The inner dimensions of more than one entry that all sites of a model have, latent or observed."""
    dims = {frame.dim for frame in frames.values()}
    found: dict[tuple[str, int], PlateFrame] | None = None
    for site in sample_sites(trace).values():
        inner = {(frame.name, frame.dim): frame for frame in inner_dimensions(site, frames, plate) if frame.size > 1}
        inner = {key: frame for key, frame in inner.items() if frame.name or frame.dim not in dims}
        found = inner if found is None else {key: frame for key, frame in found.items() if key in inner}
    return tuple((found or {}).values())


def _check_local_site(name: str, site: Site, frame: PlateFrame) -> None:
    if size_at(site, frame.dim) != frame.size:
        raise ValueError(
            f"Cannot guide local site {name!r} because its batch shape {tuple(site['fn'].batch_shape)} has no "
            f"dimension of size {frame.size} at dim {frame.dim}, and plate {frame.name!r} has no size to expand it to; "
            f"try `pyro.plate({frame.name!r}, {frame.size})`."
        )


def check_continuous(name: str, site: Site, by: str = "this guide") -> None:
    """Raises a ValueError if a latent is discrete, which a density in unconstrained space cannot be of."""
    if not site["fn"].support.is_discrete:
        return
    remedy = 'summing it out in the model, infer={"enumerate": "parallel"} under TraceEnum_ELBO'
    if by == "this guide":
        remedy = f"DiscreteAmortizedGuide, or {remedy}"
    if not site["fn"].has_enumerate_support:
        remedy = "a Categorical over the values that matter, which can be summed out"
    raise ValueError(f"Cannot guide latent {name!r} by {by} because it is discrete; try {remedy}.")


def _local_site(name: str, site: dict[str, Any], inner: list[PlateFrame], start: int) -> LocalSite:
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
        transform = _without_identities(biject_to(_without_mixtures(support)))
    except NotImplementedError as error:
        raise ValueError(
            f"Cannot guide local site {name!r} because no bijection from unconstrained space to its support {support} "
            "is known; try poutine.reparam, or another prior for it."
        ) from error
    value = site["value"]
    event_dim = site["fn"].event_dim
    unconstrained = value if _is_identity(transform) else transform.inv(value)
    shape = unconstrained.shape[value.dim() - event_dim :]
    size = torch.Size([frame.size for frame in inner]).numel() * shape.numel()
    dims = tuple((frame.dim, frame.size) for frame in inner)
    weight = site_weight(site).simplified
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
