"""Sites outside of the datapoint plate that depend on its latents: no quantity of a single datapoint counts them.

Whether a site does is found by numbers: the latents of the datapoint plate are changed, all else is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.running import Site, run_model
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.structure import Structure

__all__ = ["check_outside"]

_SPREAD = 3.0
"""How far latents are moved, in differences of a draw from the prior to the draw at hand."""


@torch.no_grad()
def check_outside(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    structure: Structure,
    global_values: Mapping[str, Tensor],
    z: Tensor,
) -> None:
    """Makes sure that no site outside of the datapoint plate depends on the latents in it.

    The log-joint of a datapoint sums the sites in the plate. One outside, be it observed, a factor, or a global latent
    whose prior depends on local ones, would be left out without a trace.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: The structure of this call, with the indices of subsampled plates.
        global_values: Values of the global latent sites.
        z: Two different draws of the flat latent, ``(2, N, D)``.

    Raises:
        ValueError: If one does, naming the site and its plates; or if the call sees only some of a datapoint's entries.
    """
    _check_whole(structure)
    layout: Any = structure.layout
    given = {**global_values, **structure.indices}

    def run(z: Tensor | None) -> Trace:
        values = given if z is None else {**given, **layout.values(z)}
        with untouched(), pyro.validation_enabled(False):
            pyro.set_rng_seed(0)
            return run_model(model, args, kwargs, values)

    first = run(z[0])
    before = _log_probs(first, layout.plate)
    if not before:
        return
    nodes: Mapping[str, Any] = first.nodes
    given.update({name: site["value"] for name, site in nodes.items() if _is_drawn(site)})
    for point in _points(run, layout, z):
        with suppress(Exception):  # a model may fail in any way at latents far out
            after = _log_probs(run(point), layout.plate)
            changed = [name for name in before if not _same(before[name], after.get(name))]
            if changed:
                again = _log_probs(run(z[0]), layout.plate)
                changed = [name for name in changed if _beyond(before[name], after.get(name), again.get(name))]
            if changed:
                break
    else:
        return
    _refuse(sample_sites(first)[changed[0]], layout)


def _check_whole(structure: Structure) -> None:
    for name in structure.data_plates:
        frame = structure.frames[name]
        raise ValueError(
            f"Cannot evaluate the datapoints of plate {structure.plate!r} on their own because this call sees only "
            f"{frame.size} of the {frame.full_size} entries of plate {name!r} inside of it, and the posterior is that "
            "given all of them; try a call with all entries, or an AmortizedGuide as it is, trained by SVI, without "
            "refinement, diagnostics and log weights."
        )


def _is_drawn(site: Site) -> bool:
    return site["type"] == "sample" and site_is_subsample(site) and isinstance(site["value"], Tensor)  # type: ignore[arg-type]


def _log_probs(trace: Trace, plate: str) -> dict[str, Tensor]:
    """The log-probabilities of all sites outside of a plate, masked and scaled, by name."""
    return {
        name: scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        for name, site in sample_sites(trace).items()
        if all(frame.name != plate for frame in site["cond_indep_stack"])
    }


def _points(run: Callable[[Tensor | None], Trace], layout: SiteLayout, z: Tensor) -> list[Tensor]:
    """Latents ``(N, D)`` far from the first draw and from each other, as the prior counts distances."""
    drawn = z[1]
    with suppress(Exception):  # priors that cannot be sampled
        nodes: Mapping[str, Any] = run(None).nodes
        drawn = layout.flatten({site.name: nodes[site.name]["value"] for site in layout.sites})
        drawn = torch.where(drawn.isfinite(), drawn.to(z), z[1])
    step = _SPREAD * (drawn - z[0])
    return [z[0] + step, z[0] - step, z[1]]


def _same(first: Tensor, second: Tensor | None) -> bool:
    if second is None or first.shape != second.shape:
        return False
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _beyond(first: Tensor, second: Tensor | None, again: Tensor | None) -> bool:
    """Whether two values differ by more than two runs at the same latents do."""
    if second is None or again is None or not first.shape == second.shape == again.shape:
        return True
    if _same(first, again):
        return True
    noise = 10 * (again - first).abs().max() + 1e-4 * first.abs()
    return not bool(((second - first).abs() <= noise).all())


def _refuse(site: Site, layout: SiteLayout) -> None:
    plates = [frame.name for frame in site["cond_indep_stack"]]
    where = f"in plate {plates[-1]!r}" if plates else "in no plate"
    kind = "observed site" if site["is_observed"] else "latent site"
    raise ValueError(
        f"Cannot evaluate the datapoints of plate {layout.plate!r} on their own because {kind} {site['name']!r}, "
        f"{where} and outside of {layout.plate!r}, depends on local latents {[s.name for s in layout.sites][:4]}: its "
        f"part of the log-joint would be left out; try a model in which {site['name']!r} lies in plate "
        f"{layout.plate!r}, such as responses (N, J) in a further plate inside of it, or an AmortizedGuide as it is, "
        "trained by SVI, whose ELBO counts the site: without refinement, diagnostics and log weights."
    )
