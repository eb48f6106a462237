"""The plates of a model as one run shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortized.structure.running import Feasible, Site, Untraced, run_model
from pyro_amortized.structure.sites import sample_sites, size_at
from pyro_amortized.structure.state import untouched

__all__ = ["PlateFrame", "batch_depth", "plate_frames", "probe", "subsample_indices"]


class _Look(Feasible, TraceMessenger):
    """Records a run; of parameters their names alone, and of plates how their indices come about."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):  # type: ignore[arg-type]
            size = msg["fn"].subsample_size
            if msg["value"] is not None:
                kind = "explicit"
            else:
                kind = "full" if size is None or size >= msg["fn"].size else "random"
            self.kinds[msg["name"]] = kind
        elif msg["value"] is None:
            super()._pyro_sample(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        self.trace.add_node(msg["name"], name=msg["name"], type="param")


@dataclass(frozen=True)
class PlateFrame:
    """A vectorised plate as one run of the model showed it.

    Attributes:
        name: Name of the plate.
        dim: Its batch dimension, negative.
        size: Number of datapoints in this run.
        full_size: Number of datapoints in all.
        kind: ``"full"``, ``"explicit"`` (``subsample=``), ``"random"`` (``subsample_size=``), or ``"unsized"``.
    """

    name: str
    dim: int
    size: int
    full_size: int
    kind: str

    @property
    def subsampled(self) -> bool:
        """Whether the plate holds a part of its datapoints."""
        return self.kind in ("explicit", "random")

    def create(self, indices: Tensor | None = None) -> pyro.plate:
        """A plate like this one, with the given indices if it is subsampled explicitly."""
        if self.kind == "unsized":
            return pyro.plate(self.name, dim=self.dim)
        if self.kind == "explicit":
            return pyro.plate(self.name, self.full_size, subsample=indices, dim=self.dim)
        return pyro.plate(self.name, self.full_size, subsample_size=self.size, dim=self.dim)


def plate_frames(trace: Trace, kinds: Mapping[str, str]) -> dict[str, PlateFrame]:
    """The vectorised plates in a trace by name, outermost first within each site.

    Raises:
        ValueError: If a latent or observed site lies in a sequential plate.
    """
    frames: dict[str, PlateFrame] = {}
    for name, site in sample_sites(trace).items():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"Cannot build a guide for site {name!r} because it lies in the sequential plate {frame.name!r}; "
                    f"try the vectorised form, `with pyro.plate({frame.name!r}, ...):`."
                )
            size, full_size, kind = frame.size, frame.full_size, kinds.get(frame.name, "unsized")
            if kind == "unsized":
                size = full_size = max(size_at(site, frame.dim), getattr(frames.get(frame.name), "size", 1))
            elif frame.name in frames:
                continue
            frames[frame.name] = PlateFrame(frame.name, frame.dim, int(size), int(full_size), kind)
    return frames


def batch_depth(trace: Trace, frames: Mapping[str, PlateFrame]) -> int:
    """The largest number of batch dimensions of a run's sites, in plates or outside of all."""
    ranks = [len(site["fn"].batch_shape) for site in sample_sites(trace).values()]
    return max([0, *ranks, *(-frame.dim for frame in frames.values())])


def subsample_indices(trace: Trace, frames: Mapping[str, PlateFrame]) -> dict[str, Tensor]:
    """The indices of the subsampled plates, by name, each of shape ``(size,)``."""
    return {name: torch.as_tensor(trace.nodes[name]["value"]) for name, frame in frames.items() if frame.subsampled}


def probe(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    *,
    first: bool = True,
) -> tuple[Trace, dict[str, PlateFrame]]:
    """Runs the model without gradients, log-probabilities, validation or traces of the run to see its structure.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values to give to sites, such as the indices of a plate.
        first: Whether the model may call modules that it did not call before.

    Returns:
        The trace, and its plates by name.
    """
    look = _Look()
    with torch.no_grad(), pyro.validation_enabled(False), untouched(first=first):
        handlers = (Untraced(),) if torch._C._get_tracing_state() else ()
        trace = run_model(model, args, kwargs, values, handlers, look)
    return trace, plate_frames(trace, look.kinds)
