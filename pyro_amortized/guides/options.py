"""Checks of the options that all guides share, and of what the functions among them return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_amortized.checks import check_function, check_positive
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import Site

__all__ = ["check_initial", "check_initial_value", "check_options", "check_state", "created_plates"]


def check_options(
    plate: Any, encoder_input: Any, global_guide: Any, create_plates: Any, init_loc_fn: Any, init_scale: Any, name: Any
) -> None:
    """Raises a ValueError, before any model has run, if an option is nothing that it could be."""
    if plate is not None and not isinstance(plate, str):
        raise ValueError(f'Cannot use plate={plate!r} because the name of a plate is wanted; try plate="data".')
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f'Cannot use name={name!r} because it is no name; try name="guide".')
    if encoder_input is not None and not callable(encoder_input):
        names = [encoder_input] if isinstance(encoder_input, str) else encoder_input
        if isinstance(names, Tensor) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"Cannot use encoder_input of type {type(encoder_input).__name__} because names are wanted, or a "
                "function of the model's arguments; try None for the observed values."
            )
        if not names:
            raise ValueError(
                "Cannot use encoder_input=[] because the encoder then sees nothing; try None for the observed values."
            )
    if isinstance(global_guide, AutoGuide) or not callable(global_guide):
        raise ValueError(
            f"Cannot use global_guide={global_guide!r} because a function from a model to an autoguide is wanted; try "
            "the class, global_guide=pyro.infer.autoguide.AutoNormal."
        )
    if create_plates is not None:
        check_function("create_plates", create_plates, "a function of the model's arguments", "None")
    check_function("init_loc_fn", init_loc_fn, "a function of a site", "pyro.infer.autoguide.init_to_median")
    check_positive("init_scale", init_scale, 0.1)


def check_state(module: nn.Module, state: Any, complete: bool) -> None:
    """Raises a ValueError unless a state is made of tensors, and, if it must be complete, is that of such a module."""
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(
            f"Cannot load a state of type {type(state).__name__} because parameters by name are wanted; try "
            "guide.state_dict() of a guide that was made alike."
        )
    if not complete:
        return
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    given = {name: value for name, value in state.items() if name in own or not name.endswith("_extra_state")}
    missing, unknown = [n for n in own if n not in given], [n for n in given if n not in own]
    other = [n for n in own if n in given and getattr(given[n], "shape", None) != own[n].shape]
    if missing or unknown or other:
        causes = [f"{what} {names[:3]}" for what, names in _parts(missing, unknown, other) if names]
        raise ValueError(
            f"Cannot load this state because it is that of another guide: {'; '.join(causes)}; try a guide of the same "
            "model, family, encoder and sizes as the one that was saved."
        )


def _parts(missing: list[str], unknown: list[str], other: list[str]) -> list[tuple[str, list[str]]]:
    return [("it lacks", missing), ("it holds besides", unknown), ("of other shapes are", other)]


def check_initial_value(site: Site, value: Any) -> None:
    """Raises a ValueError if ``init_loc_fn`` gives a latent no value, unless it leaves it to the prior by None."""
    shape = tuple(site["fn"].shape())
    if isinstance(value, Tensor) and not value.isfinite().all():
        raise ValueError(
            f"Cannot start latent {site['name']!r} at what init_loc_fn returned because it holds NaN or infinite "
            "values; try init_loc_fn=pyro.infer.autoguide.init_to_median."
        )
    if value is not None and not (isinstance(value, Tensor) and tuple(value.shape) == shape):
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"Cannot start latent {site['name']!r} at what init_loc_fn returned, {given}, because a tensor of shape "
            f"{shape} is wanted; try value.expand({shape}), or init_loc_fn=pyro.infer.autoguide.init_to_median."
        )


def check_initial(init_loc: Tensor, names: Sequence[str]) -> None:
    """Raises a ValueError if initial locations ``(N, D)`` are not finite."""
    bad = (~init_loc.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"Cannot start latents {[names[i] for i in bad[:5]]} at what init_loc_fn returned because it is NaN, "
            "infinite or at the edge of the support; try init_loc_fn=pyro.infer.autoguide.init_to_feasible."
        )


def created_plates(created: Any, frames: Mapping[str, PlateFrame]) -> dict[str, pyro.plate]:
    """The plates that ``create_plates`` made, by name.

    Raises:
        ValueError: If they are no plates, or of another size than the model's.
    """
    plates = (
        [created] if isinstance(created, pyro.plate) else list(created) if isinstance(created, Iterable) else [created]
    )
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            raise ValueError(
                f"Cannot use what create_plates returned, a {type(plate).__name__}, because plates are wanted; try "
                '`lambda x: pyro.plate("data", len(x), dim=-1)`.'
            )
        frame = frames.get(plate.name)
        if frame is not None and plate.subsample_size != frame.size:
            raise ValueError(
                f"Cannot use plate {plate.name!r} of create_plates because {plate.subsample_size} of its indices are "
                f"at hand, and in the model {frame.size}; try the size that the model gives it."
            )
    return {plate.name: plate for plate in plates}
