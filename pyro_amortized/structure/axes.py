"""Names for the axes of sites' values: those of plates, and of event dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_amortized.structure.plates import PlateFrame

__all__ = ["SiteShape", "label"]


@dataclass(frozen=True)
class SiteShape:
    """What the axes of a site's values are.

    Attributes:
        event_dim: Number of event dimensions.
        batch_rank: Number of batch dimensions in the model.
        plates: Names of its plates by their dimension.
    """

    event_dim: int
    batch_rank: int
    plates: Mapping[int, str]


def label(
    name: str, value: Tensor, site: SiteShape, frames: Mapping[str, PlateFrame], lead: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Tensor]:
    """Names the axes of a site's values: after its plates, and ``<name>_dim_<i>`` where there is no plate.

    Args:
        name: Name of the site.
        value: Values of shape ``(*lead, *batch, *event)``.
        site: Which batch dimension belongs to which plate.
        frames: The plates.
        lead: Names of the leading axes.

    Returns:
        The names, and the values without the batch dimensions that no plate uses.
    """
    dims, shape, expanded, unnamed = list(lead), list(value.shape[: len(lead)]), list(value.shape[: len(lead)]), 0
    batch = value.dim() - len(lead) - site.event_dim
    for axis, size in enumerate(value.shape[len(lead) :]):
        plate = site.plates.get(axis - batch) if axis < batch else None
        if axis < batch and plate is None and size == 1:
            continue
        if plate is None:
            dims.append(f"{name}_dim_{unnamed}")
            unnamed += 1
        else:
            dims.append(plate)
        shape.append(size)
        expanded.append(size if plate is None else frames[plate].size)
    return tuple(dims), value.reshape(shape).expand(expanded)
