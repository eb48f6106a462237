"""Pictures of gaps, on axes that are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_amortized.diagnostics.report import style_colour

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["APPROXIMATION", "AMORTIZATION", "draw_stacks"]

APPROXIMATION, AMORTIZATION = "C0", "C1"
"""Colours of the two gaps."""
_WRITTEN = 5


def draw_stacks(data: xarray.Dataset, ax: Axes) -> Axes:
    """Both gaps of every datapoint, stacked in order of their sum; the axis leaves out what is far above the others.

    Args:
        data: ``approximation_gap``, ``amortization_gap``, ``inference_gap`` and ``reliable`` over a plate.
        ax: The axes.
    """
    data = data.sortby("inference_gap")
    plate, position = str(next(iter(data.sizes))), np.arange(len(data["inference_gap"]))
    total = data["inference_gap"].values
    top = _top(total)
    low = np.zeros(len(position))
    for name, colour in (("approximation_gap", APPROXIMATION), ("amortization_gap", AMORTIZATION)):
        values = np.clip(np.nan_to_num(data[name].values), -2 * top, 2 * top)
        label = f"{name.replace('_', ' ')} (mean {data[name].values.mean():.2f})"
        ax.bar(position, values, bottom=low, width=1.0, color=colour, lw=0, label=label)
        low = low + values
    shown = total[np.isfinite(total)]
    ax.set(xlabel=f"{plate} (sorted)", ylabel="nats", xlim=(-0.5, len(position) - 0.5))
    ax.set_ylim(min(-0.1 * top, max(-top, 1.1 * float(min(shown, default=0.0)))), 1.08 * top)
    doubtful = position[~data["reliable"].values]
    if len(doubtful):
        marks = np.full(len(doubtful), -0.05 * top)
        ax.plot(doubtful, marks, "x", color=style_colour(3), ms=5, label=f"unreliable ({len(doubtful)})")
    above = total[~(total <= top)]
    if len(above):
        text = ", ".join(f"{value:.3g}" for value in above[::-1][:_WRITTEN]) + (
            ", ..." if len(above) > _WRITTEN else ""
        )
        ax.annotate(f"largest: {text}", (1, 1), xycoords="axes fraction", ha="right", va="top", fontsize="small")
    ax.legend(loc="upper left")
    return ax


def _top(total: np.ndarray) -> float:
    """Where the axis ends: at the largest value, unless that is far above the nine tenths below."""
    finite = total[np.isfinite(total)]
    if len(finite) == 0:
        return 1.0
    largest, most = float(finite.max()), float(np.quantile(finite, 0.9))
    return max(largest if largest <= 3 * most or most <= 0 else 1.5 * most, 1e-3)
