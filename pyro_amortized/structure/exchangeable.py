"""Whether the entries of an inner plate are exchangeable, found by numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, product
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_amortized.structure.arguments import Arguments, Axis, CallArguments
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import Site, run_model
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import untouched

__all__ = ["are_exchangeable"]

_MAX_TRIES = 64
"""How many ways to permute the arguments to try."""


def are_exchangeable(call: ModelCall, frame: PlateFrame) -> bool:
    """Whether the log-joint stays the same when the entries of a plate, with all that belongs to them, change places.

    Latents and observed values are permuted along the plate, and the arguments along axes that are as long; where the
    log-joint is the same for one choice of these, nothing tells the entries apart but their data. Parameters are moved
    off their first values, which may be equal for all entries. Of a single entry nothing can be seen, and it is.

    Args:
        call: A call of a model, with the indices of subsampled plates.
        frame: The plate.
    """
    if frame.size < 2:
        return True
    arguments = Arguments(call.args, call.kwargs)
    order = torch.arange(frame.size).roll(1)
    with suppress(Exception):  # a model may fail in any way where entries are not exchangeable
        values = _values(_run(call, arguments.call, call.structure.indices))
        reference = _log_joint(call, arguments.call, values)
        permuted = {name: _permuted(value, frame, order, where) for name, (value, where) in values.items()}
        for axes in islice(_ways(arguments.axes_of_size(frame.size)), _MAX_TRIES):
            with suppress(Exception):
                taken = arguments.take(axes, order)
                if close(_log_joint(call, taken, {n: (v, values[n][1]) for n, v in permuted.items()}), reference):
                    return True
    return False


_Values = Mapping[str, tuple[Tensor, Site]]
"""Values by site, with a site that shows where its plates lie."""


class _OffTheStart(Messenger):
    """Moves parameters off their values, by the same numbers in every run."""

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.is_floating_point():
            noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(value.numel()))
            msg["value"] = value.detach() * (1 + 0.2 * noise.to(value)) + (
                0.0 if (value > 0).all() else 0.1 * noise.to(value)
            )


def _run(call: ModelCall, arguments: CallArguments, values: Mapping[str, Tensor]) -> Any:
    with torch.no_grad(), pyro.validation_enabled(False), untouched():
        torch.manual_seed(0)
        return run_model(call.model, *arguments, values, handlers=(_OffTheStart(),))


def _values(trace: Any) -> dict[str, tuple[Tensor, Site]]:
    return {
        name: (site["value"], site) for name, site in sample_sites(trace).items() if isinstance(site["value"], Tensor)
    }


def _log_joint(call: ModelCall, arguments: CallArguments, values: _Values) -> Tensor:
    """Log-probabilities of all sites, summed over all but the datapoints, in nats."""
    latent = {name: value for name, (value, site) in values.items() if not site["is_observed"]}
    datapoints, total = call.structure.datapoints, torch.zeros((), dtype=torch.float64)
    for name, site in sample_sites(_run(call, arguments, {**latent, **call.structure.indices})).items():
        value = values[name][0] if name in values else site["value"]
        log_prob = scale_and_mask(site["fn"].log_prob(value), scale=site["scale"], mask=site["mask"]).double()
        if any(f.name == datapoints.name for f in site["cond_indep_stack"]):
            log_prob = log_prob.reshape((1,) * (-datapoints.dim - log_prob.dim()) + log_prob.shape)
            log_prob = log_prob.movedim(datapoints.dim, 0).unsqueeze(-1).flatten(1).sum(1)
        else:
            log_prob = log_prob.sum()
        total = total + log_prob
    return total.float()


def _permuted(value: Tensor, frame: PlateFrame, order: Tensor, site: Site) -> Tensor:
    axis = value.dim() - site["fn"].event_dim + frame.dim
    own = any(f.name == frame.name for f in site["cond_indep_stack"])
    if not own or axis < 0 or value.shape[axis] != frame.size:
        return value
    return value.index_select(axis, order.to(value.device))


def _ways(axes: Sequence[Axis]) -> Iterator[list[Axis]]:
    """All choices of at most one axis of each argument, later axes first."""
    options: dict[int, list[Axis | None]] = {}
    for axis in sorted(axes, reverse=True):
        options.setdefault(axis[0], []).append(axis)
    for choice in product(*([*part, None] for part in options.values())):
        yield [axis for axis in choice if axis is not None]
