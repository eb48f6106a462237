"""Whether the log-joint of a datapoint depends on its own latents alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import modes_of_modules, untouched

__all__ = ["check_absent", "check_independence"]

_TURN = count()
"""Which of the splits is tried where not all are."""


def check_independence(
    call: ModelCall,
    first: Trace,
    run: Callable[[Tensor], Trace],
    points: Iterable[Tensor],
    z: Tensor,
    *,
    all_pairs: bool,
) -> None:
    """Moves the latents of one half of the datapoints; what the model has of the other half must stay.

    Halves are those whose positions have a binary digit in common, so that any two datapoints are in different halves
    once: after all digits every dependence of one datapoint on the latents of any other has been tried. Batch
    normalisation in training makes all depend on all, and is taken as meant.

    Args:
        call: The call.
        first: A run of the model at ``z``.
        run: Runs it at other latents ``(N, D)``, with all else as in the first run.
        points: Where to move to, ``(N, D)`` each: the first that the model takes.
        z: The latents of the first run, ``(N, D)``.
        all_pairs: Whether to try all digits, or one that is another in every call.

    Raises:
        ValueError: If a datapoint depends on the latents of others.
    """
    if any(training for _, training in modes_of_modules()) and _normalizes_batches(lambda: run(z)):
        return
    size = len(z)
    digits = range((size - 1).bit_length())
    positions = torch.arange(size)
    for digit in digits if all_pairs or not digits else [next(_TURN) % len(digits)]:
        for value in (0, 1):
            moved = (positions >> digit) & 1 == value
            for point in points:
                with suppress(Exception):  # a model may fail in any way at latents far out
                    after = sample_sites(run(torch.where(moved.to(z.device).unsqueeze(-1), point, z)))
                    break
            else:
                continue
            for site, other, kept in _pairs(call, sample_sites(first), after, ~moved):
                if not close(other[kept], site[0][kept]):
                    _refuse(call, *site[1:])


def _normalizes_batches(run: Callable[[], Trace]) -> bool:
    """Whether a run calls modules that keep running statistics, in training."""
    found: list[bool] = []
    hook = register_module_forward_pre_hook(lambda m, _: found.append(m.training and "running_mean" in m._buffers))
    try:
        run()
    finally:
        hook.remove()
    return any(found)


@torch.no_grad()
def check_absent(call: ModelCall) -> None:
    """Makes sure that nothing depends on latents whose prior is masked, which count as absent.

    Args:
        call: The call; global latents without a value in it are drawn.

    Raises:
        ValueError: If something does, as where ``mask(False)`` is meant for a flat prior.
    """
    layout: Any = call.structure.layout
    if layout is None or layout.present is None:
        return

    def run(values: Any) -> Trace:
        with untouched(), pyro.validation_enabled(False):
            pyro.set_rng_seed(0)
            return call.run(values)

    drawn = sample_sites(run({}))
    z = layout.flatten({site.name: drawn[site.name]["value"] for site in layout.sites})
    others = {name: site["value"] for name, site in drawn.items() if not site["is_observed"]}
    changed: list[str] = []
    with suppress(Exception):  # a model may fail in any way at latents that mean nothing
        pair = [run({**others, **layout.values(z + shift)}) for shift in (0.0, (~layout.present).to(z))]
        before, after = ({n: _masked(site) for n, site in sample_sites(trace).items()} for trace in pair)
        changed = [name for name in before if name in after and not close(after[name], before[name])]
    if changed:
        masked = [site.name for site in layout.sites if not layout.present[:, site.start : site.stop].all()]
        raise ValueError(
            f"Cannot guide latents {masked} because their prior is masked in part, as of what is absent, and site "
            f"{changed[0]!r} depends on what is masked; try masking {changed[0]!r} alike, or a wide prior, "
            "Normal(0.0, 100.0), in place of a flat one."
        )


def _pairs(call: ModelCall, before: Any, after: Any, kept: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """The log-probabilities of every site's rows in two runs, and which of the rows are those of kept datapoints."""
    groups, plate = call.structure.groups, call.structure.plate
    for name, site in before.items():
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        grouped = next((frame for frame in frames if frame in groups), None)
        if name not in after or (grouped is None and plate not in frames):
            continue
        frame = frames[plate if grouped is None else grouped]
        rows = kept if grouped is None else kept[groups[grouped].datapoints.cpu()]
        one, other = _rows(site, frame), _rows(after[name], frame)
        if one.shape == other.shape and len(one) == len(rows):
            yield (one, name, grouped), other, rows.to(one.device)


def _rows(site: Site, frame: Any) -> Tensor:
    """Sums over all but the entries of a plate."""
    log_prob = _masked(site)
    log_prob = log_prob.reshape((1,) * (-frame.dim - log_prob.dim()) + log_prob.shape)
    return log_prob.movedim(frame.dim, 0).unsqueeze(-1).flatten(1).sum(-1)


def _masked(site: Site) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])


def _refuse(call: ModelCall, name: str, grouped: str | None) -> None:
    if grouped is not None:
        raise ValueError(
            f"Cannot evaluate the datapoints of plate {call.structure.plate!r} on their own because entries of "
            f"site {name!r} in plate {grouped!r} depend on the latents of other datapoints than those that "
            "groups= names; try the index that the model uses."
        )
    raise ValueError(
        f"Cannot evaluate datapoints on their own because the log-joint of one datapoint in plate "
        f"{call.structure.plate!r} depends on the latents of others, by site {name!r}; try eval() of modules "
        "that hold batch normalisation, moving what datapoints share out of the plate, or an AmortizedGuide as it is, "
        "trained by SVI, whose ELBO is right: without refinement, diagnostics and log weights."
    )
