"""Whether a model looks the same in every run."""

from __future__ import annotations

import pyro
import torch

from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.masking import NEUTRAL
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.structure import Structure
from pyro_amortized.structure.transforms import bounds

__all__ = ["check_steady"]


def _check_bounds(first: Structure, second: Structure) -> None:
    """Raises a ValueError if the support of a local latent differs between two runs with the same arguments."""
    for site, again in zip(first.layout.sites, second.layout.sites, strict=True) if first.layout else ():  # type: ignore[union-attr]
        pairs = zip(bounds(site.transform), bounds(again.transform), strict=True)
        if not all(torch.equal(before, after) for before, after in pairs):
            raise ValueError(
                f"Cannot guide local site {site.name!r} because its support depends on other latents; try a latent of "
                "fixed support and a deterministic function of it, such as a fraction of the interval."
            )


def _check_weights(first: Structure, second: Structure) -> None:
    """Raises a ValueError if the mask or the scale of a latent differs between two runs with the same arguments."""
    for name in first.weights.keys() | second.weights.keys():
        before, after = (structure.weights.get(name, NEUTRAL) for structure in (first, second))
        if not before.same_as(after):
            raise ValueError(
                f"Cannot guide latent {name!r} because its mask or scale depends on other latents or is drawn at "
                "random; try a mask that is an argument of the model, or sampling the latent everywhere and using it "
                "where it is wanted."
            )


def _check_observed_again(first: Structure, second: Structure) -> None:
    """Raises a ValueError if observed values differ between two runs with the same arguments and random numbers."""
    for name, value in (first.observed or {}).items():
        again = (second.observed or {}).get(name)
        if value.layout != torch.strided:
            raise ValueError(
                f"Cannot guide this model because it observes a sparse tensor at site {name!r}, of which guides cannot "
                "tell the entries apart; try x.to_dense() in the model, which then holds one batch densely at a time."
            )
        if again is None or value.shape != again.shape or not torch.allclose(value, again, 0.0, 0.0, equal_nan=True):
            raise ValueError(
                f"Cannot guide this model because it observes other values of site {name!r} each time that it runs, so "
                "that a guide would see other data than the model; try data that are an argument of the model instead "
                "of the next ones of an iterator."
            )


_NUM_LOOKS = 3
"""Further runs of a model, with other random numbers, to see whether it looks the same in every run."""


def check_steady(reader: StructureReader, call: ModelCall, *, observed: bool) -> None:
    """Looks at a model some times more, with the same and with other random numbers.

    Args:
        reader: What looks.
        call: A call, and what was seen of it with the generators as they are.
        observed: Whether the observed values matter.

    Raises:
        ValueError: If the model has another structure then, or observes other values with the same random numbers.
    """
    first = call.structure
    again = reader.look(call.model, call.args, call.kwargs, first.indices)
    if observed:
        _check_observed_again(first, again)
    for seed in range(_NUM_LOOKS):
        changed = first.difference(again, weights=False)
        if changed is not None:
            raise ValueError(
                f"Cannot guide this model because {changed} when it runs again with the same arguments, at other "
                "values of its latents or other random numbers; try a structure that its arguments decide."
            )
        _check_bounds(first, again)
        _check_weights(first, again)
        with untouched():
            pyro.set_rng_seed(seed)
            again = reader.look(call.model, call.args, call.kwargs, first.indices)
