"""What guides refuse: options, states, starts, plates, and variational parameters that make no distribution."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_amortized.checks import check_function, check_positive, is_traced
from pyro_amortized.encoders.devices import has_to_wait
from pyro_amortized.families import VariationalFamily
from pyro_amortized.guides.call import Call
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import Refined
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.signature import named_arguments
from pyro_amortized.structure.structure import Structure

__all__ = [
    "check_created",
    "check_global_latents",
    "check_initial",
    "check_initial_value",
    "check_known",
    "check_options",
    "check_predictable",
    "check_refinable",
    "check_shape",
    "check_state",
    "check_summed_out",
    "check_values",
    "created_plates",
    "warn_of_unamortized",
]


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
        if isinstance(names, Mapping):  # by plate
            parts = [[part] if isinstance(part, str) else part for part in names.values()]
            named = [name for part in parts for name in (part if isinstance(part, Sequence) else [part])]
            if len(named) != len(set(map(str, named))):
                raise ValueError(
                    f"Cannot use encoder_input={dict(encoder_input)} because a name lies in it twice; try each name at "
                    "the level that it belongs to, of which those below and above learn."
                )
            names = [*names, *named]
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


def check_created(structure: Structure, indices: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if plates made by ``create_plates`` have other indices than the model gives them.

    Some models, such as Pyro's own CEVAE, give ``subsample=`` data of the right length, which say nothing.
    """
    for name, index in structure.indices.items():
        if structure.frames[name].kind != "explicit" or index.is_floating_point():
            continue
        if not torch.equal(index, indices[name].to(index.device)):
            raise ValueError(
                f"Cannot run this guide because create_plates gives plate {name!r} other indices than the model's own "
                "`subsample=`; try create_plates without that plate."
            )


def check_summed_out(structure: Structure, built: Structure, hidden: Collection[str]) -> None:
    """Raises a ValueError if sites that the encoder was set up to see are summed out in this call."""
    absent = sorted((set(structure.enumerated) & set(built.data)) - {*hidden})
    if absent:
        raise ValueError(
            f"Cannot encode this call because sites {absent} are summed out in it and were observed, and seen by the "
            "encoder, when the guide was set up; try guide.setup(...) with a call in which they are not observed: the "
            "encoder then does without them in every call."
        )


def check_global_latents(structure: Structure, built: Structure) -> None:
    """Raises a ValueError if latents that are guided as global ones have become more or fewer."""
    for name, shape in structure.global_shapes.items():
        before_shape = built.global_shapes.get(name, shape)
        if shape != before_shape:
            plate = "data" if structure.plate is None else structure.plate
            raise ValueError(
                f"Cannot guide latent {name!r} because it has shape {shape} in this call and had {before_shape} when "
                "the guide was set up, and lies in no plate: it is taken for one of all datapoints; if each of them "
                f"has one of its own, try sampling it inside of the datapoint plate, `with pyro.plate({plate!r}, "
                "len(x)):`, and data beside it."
            )
    for name in structure.global_plates:
        before, now = built.frames.get(name), structure.frames[name]
        if before is not None and before.full_size != now.full_size:
            raise ValueError(
                f"Cannot guide the latents of plate {name!r} because it now has {now.full_size} entries and had "
                f"{before.full_size} when the guide was set up, and they are no datapoints of this guide: the global "
                f"guide knows those of the set-up alone; try {structure.amortizing(name)} for any number of them."
            )


def warn_of_unamortized(call: Call, model: Callable[..., Any]) -> None:
    """A warning if nothing is amortized of a model whose arguments hold an index into a plate of latents."""
    structure = call.structure
    if structure.plate is None or structure.layout is not None or structure.discrete:
        return
    size = structure.datapoints.size
    arguments = named_arguments(model, call.args, call.kwargs)
    for name in structure.global_plates:
        entries = structure.frames[name].size
        index = [key for key, x in arguments.items() if name != structure.plate and _is_index(x, size, entries)]
        if index:
            warnings.warn(
                f"The datapoint plate {structure.plate!r} holds no latents: nothing is amortized, and latents of plate "
                f"{name!r} have parameters of their own in the global guide. {index[0]!r} looks like the index "
                f"that ties the two. To amortize them: {structure.amortizing(name, repr(index[0]))}.",
                stacklevel=2,
            )
            return


def _is_index(x: Any, size: int, entries: int) -> bool:
    """Whether an argument holds positions among so many entries, one for each datapoint."""
    if not isinstance(x, Tensor) or x.shape != (size,) or x.is_floating_point() or x.is_complex():
        return False
    return x.dtype != torch.bool and bool(((x >= 0) & (x < entries)).all())


def check_predictable(missing: Sequence[str], shown_masks: Sequence[str]) -> None:
    """Raises a ValueError if an encoder cannot tell that data are missing."""
    unknown = sorted(set(missing) - set(shown_masks))
    if unknown:
        raise ValueError(
            f"Cannot infer latents from part of the data because sites {unknown} are not observed in this call and "
            "the encoder does not know of missing values; try the default encoder and a model that masks them, "
            "`dist.Normal(...).mask(present)` with obs filled in, in training as in this call."
        )


def check_refinable(guide: Any, options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a guide's answers cannot be refined, or not with these options."""
    if not guide._ready:
        raise ValueError(
            "Cannot refine this guide because it has not been set up; try training it, or guide.setup(...)."
        )
    if guide.draws_discrete:
        raise ValueError(
            f"Cannot refine this guide because it draws discrete latents, {sorted(guide.draws_discrete)}, which no "
            "gradient step moves; try a model that sums the discrete latents out, "
            'infer={"enumerate": "parallel"}, with AmortizedGuide.'
        )
    if guide.layout is None:
        raise ValueError("Cannot refine this guide because the model has no local latents; try this guide as it is.")
    taken = {"family", "initial", "encoder_input", "global_guide", "create_plates", "plate"} & options.keys()
    if taken:
        raise ValueError(
            f"Cannot refine this guide with other {sorted(taken)} because these are shared with it; try a new "
            "SemiAmortizedGuide."
        )
    if guide.model_at_hand is None:
        raise ValueError("Cannot refine this guide because it was loaded without its model; try `guide.model = model`.")


def check_positions(frame: PlateFrame, index: Tensor | None) -> None:
    """Raises a ValueError unless it is known which of all datapoints those of a plate are."""
    if index is None and frame.size < frame.full_size:
        raise ValueError(
            f"Cannot keep variational parameters for each datapoint because plate {frame.name!r} is given data in "
            "place of indices, which do not tell which datapoints these are; try "
            f"pyro.plate({frame.name!r}, {frame.full_size}, subsample=index), if need be as create_plates=..., or an "
            "AmortizedGuide."
        )


def check_known(strategy: InferenceStrategy, frame: PlateFrame, index: Tensor | None) -> None:
    """Raises a ValueError if a table of variational parameters is of other datapoints, or of which ones is not said."""
    if strategy.num_known is not None:
        check_positions(frame, index)
    if strategy.num_known is not None and strategy.num_known != frame.full_size:
        raise ValueError(
            f"Cannot look up variational parameters because plate {frame.name!r} now has {frame.full_size} "
            f"datapoints and the guide's table was set up with {strategy.num_known}: it knows nothing of unseen "
            "data; try AmortizedGuide, or pyro.plate(name, full_size, subsample=indices) for a batch of the same "
            "data."
        )


def check_shape(phi: Tensor, shape: tuple[int, int], inputs: tuple[Tensor, ...], frame: PlateFrame) -> None:
    """Raises a ValueError unless variational parameters are ``(N, P)``."""
    if phi.shape != shape:
        raise ValueError(
            f"Cannot sample the latents of {frame.size} datapoints in plate {frame.name!r} because the encoder "
            f"returned variational parameters of shape {tuple(phi.shape)} and not "
            f"{shape}; try an encoder and an encoder_input whose first dimension "
            f"runs over the plate (inputs have shapes {[tuple(x.shape) for x in inputs]}), and for features "
            "(N, T, H) as many steps T as the model has."
        )


_MODERATE = 80.0
"""Variational parameters below this in size need no closer look: even as logarithms they do not overflow."""


def check_values(
    phi: Tensor, family: VariationalFamily, strategy: InferenceStrategy, inputs: tuple[Tensor, ...]
) -> None:
    """Raises a ValueError naming the datapoints whose variational parameters make no distribution.

    It looks closer only where values are far out; and on an accelerator not at all in training without Pyro's
    validation, as Pyro's own distributions do not: the next loss is then not finite.
    """
    unasked = torch.is_grad_enabled() and not pyro.distributions.is_validation_enabled()
    if is_traced() or (unasked and has_to_wait(phi)):
        return
    if not phi.numel() or all(-_MODERATE < bound.item() < _MODERATE for bound in phi.detach().aminmax()):
        return
    bad = _degenerate(phi.detach().reshape(-1, phi.shape[-1]), family).nonzero().squeeze(-1).tolist()
    if not bad:
        return
    cause = "its parameters have diverged"
    clipping = ", and pyro.optim.ClippedAdam if gradients are not clipped yet"
    remedy = "a smaller learning rate" + ("" if strategy.is_sparse else clipping)
    if isinstance(strategy, Refined):
        cause = "refinement has diverged, the data hold invalid values, or the encoder has diverged"
        remedy = (
            'a smaller step_size, encoder_gradient="anchored", or "first_order" where exact gradients explode, a '
            "smaller learning rate, and a look at the data"
        )
    for i, x in enumerate(inputs):
        if x.is_floating_point() and not x.isfinite().all():
            cause = f"its input number {i} holds NaN or infinite values"
            remedy = (
                "dropping or imputing them, an encoder_input that fills them in, or, for data that the model masks, "
                "torch.nan_to_num(x) in its place"
            )
    raise ValueError(
        f"Cannot sample the latents of {len(bad)} datapoints (first: {bad[:10]}) because the variational "
        f"parameters from {type(strategy).__name__} are not finite, or a scale is zero or infinite: "
        f"{cause}; try {remedy}."
    )


def _degenerate(rows: Tensor, family: VariationalFamily) -> Tensor:
    """Which rows of variational parameters make no distribution."""
    wrong = ~rows.isfinite().all(-1)
    if family.is_mean_field:
        scale = family.marginals(rows)[1]  # type: ignore[operator]
        wrong |= ~(scale.isfinite() & (scale > 0)).all(-1)
    elif not wrong.all() and not _makes_distributions(rows[~wrong], family):
        wrong |= torch.tensor([not _makes_distributions(row, family) for row in rows], device=rows.device)
    return wrong


def _makes_distributions(phi: Tensor, family: VariationalFamily) -> bool:
    with pyro.validation_enabled():
        try:
            family(phi)
        except (ValueError, torch.linalg.LinAlgError):  # the second of torch's low-rank normals
            return False
    return True
