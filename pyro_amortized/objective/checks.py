"""Whether the log-joint of a datapoint is what it says.

No quantity of a single datapoint counts sites outside of the datapoint plate that depend on its latents. Whether a site
does is found by numbers: the latents of the datapoint plate are changed, all else is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.structure import Structure

__all__ = ["check_log_joint", "check_outside"]


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
            "numbers; try model.eval() if it holds dropout or batch normalisation, and keep random numbers in "
            "pyro.sample sites."
        )
    _check_finite(reference, log_joint.layout)
    _check_independence(log_joint, z, reference)
    check_outside(log_joint.call, z)
    log_joint.try_vectorized(z, reference)
    log_joint.validate = False


def _check_independence(log_joint: LocalLogJoint, z: Tensor, values: Tensor) -> None:
    """Changes the latents of one datapoint; the log-joints of the others must stay."""
    mixed = z[:1].clone()
    mixed[:, 0] = z[1, 0]
    if not close(log_joint(mixed)[:, 1:], values[:1, 1:]):
        raise ValueError(
            f"Cannot evaluate datapoints on their own because the log-joint of one datapoint in plate "
            f"{log_joint.layout.plate!r} depends on the latents of others; try model.eval() if the model holds batch "
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
def check_outside(call: ModelCall, z: Tensor) -> None:
    """Makes sure that no site outside of the datapoint plate depends on the latents in it.

    The log-joint of a datapoint sums the sites in the plate. One outside, be it observed, a factor, or a global latent
    whose prior depends on local ones, would be left out without a trace.

    Args:
        call: The call.
        z: Two different draws of the flat latent, ``(2, N, D)``.

    Raises:
        ValueError: If one does, naming the site and its plates; or if the call sees only some of a datapoint's entries.
    """
    _check_whole(call.structure)
    layout: Any = call.structure.layout
    inside = {layout.plate, *call.structure.groups}
    drawn: dict[str, Any] = {}

    def run(z: Tensor | None) -> Trace:
        values = drawn if z is None else {**drawn, **layout.values(z)}
        with untouched(), pyro.validation_enabled(False):
            pyro.set_rng_seed(0)
            return call.run(values)

    first = run(z[0])
    before = _log_probs(first, inside)
    if call.structure.groups:
        _check_groups(
            call, first, run(torch.where(torch.arange(len(z[0]), device=z.device).unsqueeze(-1) % 2 == 0, z[0], z[1]))
        )
    if not before:
        return
    nodes: Mapping[str, Any] = first.nodes
    drawn.update({name: site["value"] for name, site in nodes.items() if _is_drawn(site)})
    for point in _points(run, layout, z):
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


def _check_groups(call: ModelCall, before: Trace, after: Trace) -> None:
    """Raises a ValueError if entries in long format depend on the latents of other datapoints than their index says.

    Args:
        call: The call.
        before: A run of the model.
        after: One at which the latents of every other datapoint, from the second on, are others.
    """
    sites = sample_sites(after)
    for name, site in sample_sites(before).items():
        frame = next((f for f in site["cond_indep_stack"] if f.name in call.structure.groups), None)
        if frame is None or name not in sites:
            continue
        first, second = (_rows(s["fn"].log_prob(s["value"]), frame) for s in (site, sites[name]))
        kept = call.structure.groups[frame.name].datapoints % 2 == 0
        if first.shape[0] == len(kept) and not close(second[kept], first[kept]):
            raise ValueError(
                f"Cannot evaluate the datapoints of plate {call.structure.plate!r} on their own because entries of "
                f"site {name!r} in plate {frame.name!r} depend on the latents of other datapoints than those that "
                "groups= names; try the index that the model uses."
            )


def _rows(log_prob: Tensor, frame: Any) -> Tensor:
    """Sums over all but the entries of a plate."""
    log_prob = log_prob.reshape((1,) * (-frame.dim - log_prob.dim()) + log_prob.shape)
    return log_prob.movedim(frame.dim, 0).unsqueeze(-1).flatten(1).sum(-1)


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
