"""Drawing the observed values of a model anew."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_amortized.structure.masking import site_mask
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_computed

__all__ = ["SampleDatapoints"]


class SampleDatapoints(Messenger):
    """Draws all sites in the datapoint plate, and those in long format, the observed ones too; keeps what was observed.

    Args:
        plates: Names of the datapoint plate and of plates in long format.
    """

    def __init__(self, *plates: str) -> None:
        super().__init__()
        self.plates = plates
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if is_computed(msg) or all(f.name not in self.plates for f in msg["cond_indep_stack"]):
            return
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, dist.Unit):
            raise ValueError(
                f"Cannot simulate data because site {name!r} is a pyro.factor, which nothing can be drawn from; try a "
                "model whose prior and likelihood are distributions."
            )
        try:
            value = fn(*msg["args"], **msg["kwargs"])
        except NotImplementedError as error:
            raise ValueError(
                f"Cannot simulate data because site {name!r} has the distribution {type(fn).__name__}, which cannot "
                "be sampled; try a proper distribution with a sampler."
            ) from error
        if msg["is_observed"]:
            self.observed[name] = msg["value"]
            value = _in_place_of(msg, value)
        msg["value"] = value


def _in_place_of(msg: Site, drawn: Tensor) -> Tensor:
    """A draw in the dtype of the observed value, with the observed value where it is masked."""
    name, observed = msg["name"], msg["value"]
    if not isinstance(observed, Tensor) or observed.shape != drawn.shape:
        raise ValueError(
            f"Cannot simulate data because observed site {name!r} has a value of shape "
            f"{tuple(getattr(observed, 'shape', ()))} for a distribution of shape {tuple(drawn.shape)}; try observing "
            "a tensor with one value for each."
        )
    value = drawn.to(observed.dtype)
    if not torch.equal(value.to(drawn.dtype), drawn) and drawn.isfinite().all():
        raise ValueError(
            f"Cannot simulate data because observed site {name!r} holds {observed.dtype} and draws from its "
            f"{type(msg['fn']).__name__} distribution do not fit that; try data of dtype {drawn.dtype}."
        )
    present = site_mask(msg).present
    return value if present is None else torch.where(present, value, observed)
