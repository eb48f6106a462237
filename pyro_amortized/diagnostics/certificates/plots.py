"""The picture of certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_amortized.diagnostics.certificates.stages import STAGES

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["draw_certificates"]

_BOUND = 0.7
_LOWEST, _HIGHEST = -0.5, 2.0
"""Of the values of khat that are drawn; others are drawn at the border."""


def draw_certificates(data: xarray.Dataset, ax: Axes) -> Axes:
    """Cost against khat by stage, with crosses at datapoints without a certificate."""
    cost = (data["num_gradients"] + data["num_evaluations"]).values
    khat = np.nan_to_num(data["khat"].values, nan=_LOWEST, posinf=_HIGHEST, neginf=_LOWEST).clip(_LOWEST, _HIGHEST)
    for stage in STAGES:
        own = data["stage"].values == stage
        if own.any():
            ax.plot(cost[own], khat[own], "o", ms=4, alpha=0.6, label=f"{stage} ({own.mean():.0%})")
    for name, mark in (("local", "+"), ("neither", "x")):
        local = data["local"].values
        own = local if name == "local" else ~data["certified"].values & ~local
        if own.any():
            ax.plot(cost[own], khat[own], mark, color="grey", ms=7, mew=2, label=f"{name} ({own.mean():.0%})")
    ax.axhline(_BOUND, color="grey", lw=0.8, ls="--")
    ax.set(
        xscale="log",
        xlabel="evaluations and gradients of the log-joint",
        ylabel="khat of the last weights",
        title=f"{int(data['certified'].sum())} of {len(cost)} posteriors certified",
    )
    ax.legend(frameon=False, fontsize="small")
    return ax
