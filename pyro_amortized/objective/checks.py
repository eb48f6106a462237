"""Whether the log-joint of a datapoint is what it says.

No quantity of a single datapoint counts sites outside of the datapoint plate that depend on its latents. Whether a site
does is found by numbers: the latents of the datapoint plate are changed, all else is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortized.objective.independence import check_independence
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.structure import Structure

__all__ = ["check_alone", "check_log_joint", "check_outside"]


@torch.no_grad()
def check_log_joint(log_joint: LocalLogJoint, z: Tensor) -> None:
    """Makes sure that the numbers can be trusted, and finds out whether draws may be evaluated together.

    Args:
        log_joint: The log-joint of a call.
        z: Two different draws, of shape ``(2, N, D)``.

    Raises:
        ValueError: If the model gives different numbers for equal latents, the log-joint of a datapoint is not
            finite, or sites outside of the plate depend on its latents.
    """
    log_joint.vectorized = False
    log_joint.like = z.new_empty(0)
    reference = torch.cat([log_joint(draw.unsqueeze(0)) for draw in z])
    if not close(log_joint(z[:1]), reference[:1]):
        raise ValueError(
            "Cannot evaluate the model's log-joint because two runs at the same latent values give different "
            "numbers; try eval() of modules that hold dropout or batch normalisation, and keep random numbers in "
            "pyro.sample sites."
        )
    _check_finite(reference, log_joint.layout)
    check_outside(log_joint.call, z)
    _check_independence(log_joint, z, reference)
    log_joint.try_vectorized(z, reference)
    log_joint.validate = False


def _check_independence(log_joint: LocalLogJoint, z: Tensor, values: Tensor) -> None:
    """Changes the latents of one datapoint; the log-joints of the others must stay."""
    mixed = z[:1].clone()
    mixed[:, 0] = z[1, 0]
    if not close(log_joint(mixed)[:, 1:], values[:1, 1:]):
        raise ValueError(
            f"Cannot evaluate datapoints on their own because the log-joint of one datapoint in plate "
            f"{log_joint.layout.plate!r} depends on the latents of others; try eval() of modules that hold batch "
            "normalisation, or move what datapoints share out of the plate."
        )


def _check_finite(values: Tensor, layout: SiteLayout) -> None:
    bad = (~values.isfinite()).any(0).nonzero().squeeze(-1).tolist()
    if bad:
        raise ValueError(
            f"Cannot evaluate the ELBO of {len(bad)} datapoints because their log-joint is not finite (datapoints "
            f"{bad[:10]} of plate {layout.plate!r}); try looking for invalid values in their data, or for a "
            "likelihood that underflows or is not defined at all latents, as z.sqrt() is not, but softplus(z)."
        )


_SPREAD = 3.0
"""How far latents are moved, in differences of a draw from the prior to the draw at hand."""


@torch.no_grad()
def check_outside(call: ModelCall, z: Tensor, *, all_pairs: bool = True) -> None:
    """Makes sure that no site outside of the datapoint plate depends on the latents in it, nor another datapoint.

    The log-joint of a datapoint sums the sites in the plate. One outside, be it observed, a factor, or a global latent
    whose prior depends on local ones, would be left out without a trace.

    Args:
        call: The call.
        z: Two different draws of the flat latent, ``(2, N, D)``.
        all_pairs: Whether to try every two datapoints, as in :func:`check_independence`, or some in every call.

    Raises:
        ValueError: If one does, naming the site and its plates; or if the call sees only some of a datapoint's entries.
    """
    _check_whole(call.structure)
    layout: Any = call.structure.layout
    run, first, points = check_alone(call, z, all_pairs=all_pairs)
    inside = {layout.plate, *call.structure.groups}
    before = _log_probs(first, inside)
    if not before:
        return
    for point in points:
        with suppress(Exception):  # a model may fail in any way at latents far out
            after = _log_probs(run(point), inside)
            changed = [name for name in before if not _same(before[name], after.get(name))]
            if changed:
                again = _log_probs(run(z[0]), inside)
                changed = [name for name in changed if _beyond(before[name], after.get(name), again.get(name))]
            if changed:
                break
    else:
        return
    _refuse(sample_sites(first)[changed[0]], layout)


@torch.no_grad()
def check_alone(
    call: ModelCall, z: Tensor, *, all_pairs: bool = True
) -> tuple[Callable[..., Trace], Trace, list[Tensor]]:
    """Makes sure that no datapoint depends on the latents of others.

    Args:
        call: The call.
        z: Two different draws of the flat latent, ``(2, N, D)``.
        all_pairs: As for :func:`check_outside`.

    Returns:
        What runs the model at latents ``(N, D)``, or with all drawn at None; its run at the first draw; and latents far
        from that.

    Raises:
        ValueError: If one does.
    """
    layout: Any = call.structure.layout
    drawn: dict[str, Any] = {}

    def run(z: Tensor | None, others: Mapping[str, Any] = MappingProxyType({})) -> Trace:
        values = drawn if z is None else {**drawn, **others, **layout.values(z)}
        with untouched(), pyro.validation_enabled(False):
            pyro.set_rng_seed(0)
            return call.run(values)

    first = run(z[0])
    nodes: Mapping[str, Any] = first.nodes
    drawn.update({name: site["value"] for name, site in nodes.items() if _is_drawn(site)})
    points = _points(run, layout, z)
    others = {name: site["value"] for name, site in sample_sites(first).items() if not site["is_observed"]}
    check_independence(call, first, partial(run, others=others), points, z[0], all_pairs=all_pairs)
    return run, first, points


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


def _log_probs(trace: Trace, inside: Collection[str]) -> dict[str, Tensor]:
    """The log-probabilities of all sites outside of some plates, masked and scaled, by name."""
    return {
        name: scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
        for name, site in sample_sites(trace).items()
        if all(frame.name not in inside for frame in site["cond_indep_stack"])
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
        f"{layout.plate!r}, such as responses (N, J) in a further plate inside of it, a guide with groups={{...}} if "
        "an index names the datapoint of each entry, or an AmortizedGuide as it is, trained by SVI, whose ELBO counts "
        "the site: without refinement, diagnostics and log weights."
    )
