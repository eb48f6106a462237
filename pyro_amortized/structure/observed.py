"""The observed values of a call."""

from __future__ import annotations

from collections.abc import Collection

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.masking import site_mask
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.sites import is_data, sample_sites

__all__ = ["check_observed", "observed_values"]


def observed_values(
    trace: Trace, frame: PlateFrame, missing: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The observed values in a plate by site, datapoints first, each of shape ``(N, ...)``.

    Masked values are replaced by zeros.

    Args:
        trace: A run of the model.
        frame: The plate.
        missing: Names of sites whose values in this run are no data: all of them count as masked.

    Returns:
        The values, and which of them are not masked for the sites that have a mask.
    """
    values, masks = {}, {}
    for name, site in sample_sites(trace).items():
        if is_data(site) and any(f.name == frame.name for f in site["cond_indep_stack"]):
            value = torch.as_tensor(site["value"])
            present = site_mask(site).present if name not in missing else torch.zeros_like(value, dtype=torch.bool)
            if value.numel() > 0 and present is not None:
                value, present = torch.broadcast_tensors(value, present)
                value = value.masked_fill(~present, 0)
                masks[name] = _datapoints_first(present, frame, site["fn"].event_dim)
            if value.numel() > 0:
                values[name] = _datapoints_first(value, frame, site["fn"].event_dim)
    return values, masks


def _datapoints_first(value: Tensor, frame: PlateFrame, event_dim: int) -> Tensor:
    axis = value.dim() - event_dim + frame.dim
    if axis < 0 or value.shape[axis] != frame.size:
        value = value.expand(torch.broadcast_shapes(value.shape, (frame.size,) + (1,) * (event_dim - frame.dim - 1)))
        axis = value.dim() - event_dim + frame.dim
    return value if axis == 0 else value.movedim(axis, 0)


def check_observed(trace: Trace) -> None:
    """Raises a ValueError naming the site and the datapoints if observed values are NaN.

    Masked ones too: their log-probability is left out, but its derivative is NaN all the same.
    """
    for name, site in sample_sites(trace).items():
        value = site["value"]
        if not is_data(site) or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        missing = value.isnan()
        if missing.any():
            rows = missing.reshape(len(value), -1).any(-1).nonzero().squeeze(-1).tolist() if value.dim() else []
            raise ValueError(
                f"Cannot infer latents because observed site {name!r} holds {int(missing.sum())} NaN values "
                f"(first rows: {rows[:5]}); try dropping or imputing them, or mask them in the model: "
                "`dist.Normal(...).mask(~x.isnan())` with obs=torch.nan_to_num(x), filled in."
            )
