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
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.local_site import LocalSite, check_local_site, inner_dimensions, local_site
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.sites import check_value, is_data, latent_sites, sample_sites

__all__ = ["SiteLayout", "datapoint_plate"]


def datapoint_plate(
    trace: Trace,
    frames: Mapping[str, PlateFrame],
    requested: str | None,
    *,
    encodes: bool = False,
    grouped: bool = False,
) -> str | None:
    """Decides which plate's indices are the datapoints.

    Plates whose data are but terms of ``pyro.factor`` count where no other plate has any.

    Args:
        trace: A run of the model.
        frames: The plates in it.
        requested: The user's choice, or None for the outermost plate that holds an observed site.
        encodes: Whether observed values are needed, so that terms of ``pyro.factor`` are none.
        grouped: Whether data may lie in other plates, tied to the requested one by an index.

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
            check_value(site)
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
    if requested not in holders and not grouped:
        raise ValueError(
            f"Cannot use plate {requested!r} as the datapoint plate because no observed site lies in it; try "
            + (
                f"groups={{{sorted(holders)[0]!r}: ...}} with the argument that holds the index, where its entries "
                f"belong to those of {requested!r}, or one of {sorted(holders)}, or "
                if holders
                else ""
            )
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
        >>> from pyro_amortized.structure.plates import probe
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
                check_local_site(name, site, frames[plate])
                inner = inner_dimensions(site, frames, plate)
                sites.append(local_site(name, site, inner, sites[-1].stop if sites else 0))
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
        """Names of the D dimensions without the number of their step, ``z_*[0]``; None unless sites are numbered.

        Numbers have to grow in the order of the model: those of the levels of a ladder, from the top, fall.
        """
        numbers = [int(re.search(r"\d*$", site.name).group() or -1) for site in self.sites]  # type: ignore[union-attr]
        if self.steps is None or len(self.steps) < 2 or numbers != sorted(numbers):
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
        return self._steps(())

    def _steps(self, plates: Collection[str]) -> list[tuple[Any, ...]] | None:
        steps: dict[str, list[Any]] = {}
        for site in self.sites:
            stem, number = re.fullmatch(r"(.*?)(\d*)", site.name, re.DOTALL).groups()  # type: ignore[union-attr]
            steps.setdefault(number, []).append((stem, *site.description(plates)))
        found = [tuple(step) for step in steps.values()]
        in_order = [site.name for site in self.sites] == [f"{part[0]}{n}" for n, step in steps.items() for part in step]
        return found if in_order and "" not in steps and all(step == found[0] for step in found) else None

    @property
    def description(self) -> list[tuple[Any, ...]]:
        """What tells layouts apart: name, unconstrained shape, inner plates, event dimensions, support of each site."""
        return [(site.name, *site.description()) for site in self.sites]

    def check_same(self, other: SiteLayout, *, plates: Collection[str] = (), by_step: bool = False) -> None:
        """Raises a ValueError naming what changed if ``other``, found in a later call, is laid out differently.

        Args:
            other: The layout of a later call.
            plates: Names of inner plates whose numbers of entries may differ.
            by_step: Whether the number of steps of sites numbered alike may differ.
        """
        steps = (self._steps(plates), other._steps(plates)) if by_step else (None, None)
        if not (steps[0] and steps[1] and steps[0][0] == steps[1][0]):
            self._check_sites(other, plates)
        if (self.plate, self.dim) != (other.plate, other.dim):
            raise ValueError(
                f"Cannot run this guide because the datapoint plate is now {other.plate!r} at dim {other.dim}, and was "
                f"{self.plate!r} at dim {self.dim} when the guide was set up; try the same structure in every call, or "
                "one guide per structure."
            )

    def _check_sites(self, other: SiteLayout, plates: Collection[str]) -> None:
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
            before, after = mine[name], theirs[name]
            if before.description(plates) != after.description(plates):
                if before.inner != after.inner:
                    remedy = (
                        'try as many entries as then, or, for any number of them, PlateEncoder() and family="normal" '
                        'or "structured".'
                    )
                raise ValueError(
                    f"Cannot run this guide because local site {name!r} now has unconstrained event shape "
                    f"{tuple(after.shape)} and inner plates {list(after.inner)}, and had {tuple(before.shape)} and "
                    f"{list(before.inner)} when the guide was set up, or has another support; {remedy}"
                )


def _shared_dimensions(trace: Trace, frames: Mapping[str, PlateFrame], plate: str) -> tuple[PlateFrame, ...]:
    """The inner dimensions of more than one entry that all sites of a model have, latent or observed."""
    dims = {frame.dim for frame in frames.values()}
    found: dict[tuple[str, int], PlateFrame] | None = None
    for site in sample_sites(trace).values():
        inner = {(frame.name, frame.dim): frame for frame in inner_dimensions(site, frames, plate) if frame.size > 1}
        inner = {key: frame for key, frame in inner.items() if frame.name or frame.dim not in dims}
        found = inner if found is None else {key: frame for key, frame in found.items() if key in inner}
    return tuple((found or {}).values())
