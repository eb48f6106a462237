"""Pictures of a calibration report's dataset, on axes that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_amortized.diagnostics.calibration.findings import DENSITY, LEVEL
from pyro_amortized.diagnostics.report import style_colour

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["draw_coverage", "draw_ecdf", "draw_ranks"]

_NUM_BINS = 20
_LABELLED = 6


def draw_ecdf(data: xarray.Dataset, ax: Axes, names: Sequence[str], failing: Sequence[str]) -> Axes:
    """Distribution functions less that of the uniform, with the simultaneous band; failing ones in colour."""
    points = data["point"].values
    _band(ax, points, data["ecdf_lower"].values - points, data["ecdf_upper"].values - points)
    coloured = [name for name in failing if name in names][:_LABELLED] or (list(names) if len(names) == 1 else [])
    for name in sorted(names, key=lambda name: name in coloured):
        style: dict[str, Any] = {"color": "0.5", "alpha": 0.6}
        if name in coloured:
            style = {"color": style_colour(coloured.index(name)), "label": name}
        ax.plot(points, _distribution(data, name) - points, drawstyle="steps-mid", lw=1.2, **style)
    left_out = len(failing) - len(coloured) if len(names) > 1 else 0
    if left_out > 0:
        ax.plot([], [], color="0.5", label=f"{left_out} more that fail")
    low, high = ax.get_ylim()
    room = 0.05 * (2 + len(coloured))  # for the legend
    ax.set(xlabel="rank of the truth / number of draws", ylabel="difference from uniform", xlim=(0, 1))
    ax.set_ylim(low, high + room * (high - low))
    ax.legend(loc="upper left", ncols=2)
    return ax


def draw_ranks(data: xarray.Dataset, ax: Axes, name: str) -> Axes:
    """The histogram of one quantity's ranks, with a band that holds for all bins at once."""
    from scipy import stats

    values = data["pit"].sel(quantity=name).values
    alpha = LEVEL / _NUM_BINS
    low, high = stats.binom.ppf([alpha / 2, 1 - alpha / 2], len(values), 1 / _NUM_BINS)
    ax.axhspan(low, high, color="0.5", alpha=0.2, lw=0, label="95% band, all bins at once")
    ax.axhline(len(values) / _NUM_BINS, color="0.5", lw=1)
    ax.hist(values, bins=[i / _NUM_BINS for i in range(_NUM_BINS + 1)], color=style_colour(0), alpha=0.8)
    ax.set_ylim(0, 1.2 * max(high, ax.get_ylim()[1]))
    ax.set(xlabel="rank of the truth / number of draws", ylabel="simulations", xlim=(0, 1))
    ax.legend()
    return ax


def draw_coverage(data: xarray.Dataset, ax: Axes, name: str) -> Axes:
    """Expected coverage against content: of regions of highest density, or of balls around random points."""
    points, found = data["point"].values, _distribution(data, name)
    lower, upper = data["ecdf_lower"].values, data["ecdf_upper"].values
    if name == DENSITY:  # the region of content c holds the truth if its rank by density is among the upper c
        points, found, lower, upper = 1 - points, 1 - found, 1 - upper, 1 - lower
    _band(ax, points, lower, upper)
    ax.plot([0, 1], [0, 1], color="0.5", lw=1)
    label = "regions of highest density" if name == DENSITY else "balls around random points (TARP)"
    ax.plot(points, found, color=style_colour(0), label=label)
    ax.set(xlabel="content", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1))
    ax.legend(loc="upper left")
    return ax


def _distribution(data: xarray.Dataset, name: str) -> np.ndarray[Any, Any]:
    values = np.sort(data["pit"].sel(quantity=name).values)
    return np.searchsorted(values, data["point"].values) / len(values)


def _band(ax: Axes, points: np.ndarray[Any, Any], lower: np.ndarray[Any, Any], upper: np.ndarray[Any, Any]) -> None:
    ax.fill_between(
        points, lower, upper, color="0.5", alpha=0.2, lw=0, step="mid", label="95% band, all quantities at once"
    )
