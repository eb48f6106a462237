"""What the encoder sees of a call: observed values, named arguments, or a function of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyro_amortized.guides.call import Call
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import PlateLogProbs
from pyro_amortized.structure.signature import named_arguments
from pyro_amortized.structure.whole import WholeObservations

__all__ = ["EncoderInput", "by_plate", "check_finite_inputs", "check_global_shapes", "encoder_inputs"]

EncoderInput = str | Sequence[str] | Mapping[str, str | Sequence[str]] | Callable[..., Any] | None
"""None (the observed values), the name of an argument or a global latent, several, also by plate, or a function."""


def encoder_inputs(
    spec: EncoderInput,
    model: Callable[..., Any] | None,
    call: Call,
    *,
    known: MutableMapping[Any, bool] | None = None,
    show_masks: bool = False,
    show_indices: bool = False,
    but: Collection[str] = (),
    whole: WholeObservations | None = None,
) -> tuple[Tensor, ...]:
    """The encoder's positional inputs.

    Args:
        spec: What the user asked for.
        model: The model, for the names of its arguments; None if it is not at hand.
        call: The call.
        known: What earlier calls showed of arguments: whether they hold all data of a subsampled plate.
        show_masks: Whether to add, to observed values of which some are masked (and given as zeros), which these are.
        show_indices: Whether to add, to values in long format ``(R, ...)``, the index that ties them to datapoints.
        but: Names of observed sites to leave out.
        whole: What finds the observed values at all entries of subsampled inner plates.

    Raises:
        ValueError: If the model has no argument, and no global latent, of a given name, or one of which it is not clear
            whether it holds all data.
    """
    if spec is None:
        observed, present = call.structure.observed or {}, call.structure.present
        if whole is not None and call.structure.data_plates:
            observed, present = whole.find(call.of_model(model))  # type: ignore[arg-type]
        values = [value for name, value in observed.items() if name not in but]
        values += [value for group in call.structure.groups.values() for value in group.observed.values()]
        masks = [mask for name, mask in present.items() if show_masks and name not in but]
        like = next((value for value in values if value.is_floating_point()), None)
        values += [group.index for group in call.structure.groups.values() if show_indices]
        return *values, *(mask.to(torch.get_default_dtype() if like is None else like.dtype) for mask in masks)
    if not call.complete:
        raise ValueError(
            f"Cannot encode simulated data by encoder_input={spec!r} because the model does not observe an argument as "
            "it is; try encoder_input=None, the observed values."
        )
    if callable(spec):
        found = [x for _, x in by_plate(spec, call)]
    else:
        known = {} if known is None else known
        found = [_argument(name, model, call, known) for name in ([spec] if isinstance(spec, str) else [*spec])]
    inputs = tuple(found)
    absent = [x is None for x in inputs] if call.structure.missing else []
    if absent and (all(absent) or (any(absent) and not call.structure.has_observations)):
        return ()
    if any(absent):
        raise ValueError(
            f"Cannot infer latents from part of what encoder_input={spec!r} gives because the rest is None in this "
            f"call, where {[*call.structure.missing]} are not observed and other data are; try all of them, or none "
            "for the prior of the latents."
        )
    kinds = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
    if not inputs or not all(isinstance(x, Tensor) and x.numel() for x in inputs) or not any(kinds):
        raise ValueError(
            f"Cannot encode {kinds}, what encoder_input={spec!r} gives, because tensors (N, ...) are wanted, with a "
            "row for each datapoint; try torch.as_tensor(...) in a function of the model's arguments, or "
            "encoder_input=None for the observed values."
        )
    return inputs


def by_plate(spec: Callable[..., Any], call: Call) -> list[tuple[str | None, Any]]:
    """What a function of the arguments, run inside the datapoint plate, gives, each with the plate that it names."""
    with call.plates[call.structure.datapoints.name]:
        try:
            found = spec(*call.args, **call.kwargs)
        except (TypeError, AttributeError) as error:
            if not call.structure.missing:
                raise
            raise ValueError(
                f"Cannot encode because the function given as encoder_input fails ({error}) in a call in which "
                f"{[*call.structure.missing]} are not observed; try returning None in the place of what is missing."
            ) from error
    parts: list[tuple[str | None, Any]] = [*found.items()] if isinstance(found, Mapping) else [(None, found)]
    return [(plate, x) for plate, part in parts for x in (part if isinstance(part, list | tuple) else [part])]


def check_finite_inputs(inputs: tuple[Tensor, ...]) -> None:
    """Raises a ValueError if the inputs that an encoder is fitted to hold NaN or infinite values."""
    for number, x in enumerate(inputs):
        if not x.isfinite().all():
            raise ValueError(
                f"Cannot set up an encoder because its input number {number} holds NaN or infinite values; try "
                "dropping or imputing them, or an encoder_input that fills them in."
            )


def _argument(name: str, model: Callable[..., Any] | None, call: Call, known: MutableMapping[Any, bool]) -> Any:
    """An argument by name, and of one with the data of all datapoints of a subsampled plate those at hand."""
    if model is None:
        raise ValueError(
            f"Cannot find argument {name!r} because this guide was loaded without its model; try `guide.model = model`."
        )
    arguments = named_arguments(model, call.args, call.kwargs)
    if name not in arguments and name in (call.global_values or {}):
        return call.global_values[name].reshape(1, -1).expand(call.structure.datapoints.size, -1)  # type: ignore[index]
    if name not in arguments:
        raise ValueError(
            f"Cannot use encoder_input={name!r} because the model has no argument of that name; try "
            + (
                f"one of {names}, or a function"
                if (names := [*arguments, *call.structure.global_sites])
                else "a function"
            )
            + " of the model's arguments."
        )
    value, frame = arguments[name], call.structure.datapoints
    if call.index is None or not isinstance(value, Tensor) or not value.dim() or len(value) != frame.full_size:
        return value
    if frame.size == frame.full_size and _is_range(call.index):
        return value
    key = name, value.shape, frame
    if key not in known:
        log_probs = PlateLogProbs(ModelCall(model, call.args, call.kwargs, call.structure))
        found = log_probs.holds(value, 0, frame, call.index)
        if found is None:
            event_dim = max(0, value.dim() + frame.dim)
            raise ValueError(
                f"Cannot tell whether argument {name!r} holds the data of all datapoints of plate {frame.name!r} "
                "because no log-probability in it is seen to change with it; try a function of the model's arguments, "
                f"encoder_input=lambda {', '.join(arguments)}: pyro.subsample({name}, event_dim={event_dim})."
            )
        known[key] = found
    return value[call.index.to(value.device)] if known[key] else value


def _is_range(index: Tensor) -> bool:
    return torch.equal(index, torch.arange(len(index), device=index.device))


def check_global_shapes(shapes: Mapping[str, Size], before: Mapping[str, Size]) -> None:
    """Raises a ValueError if global latents that the encoder sees have other shapes than when the guide was set up."""
    if shapes != before:
        raise ValueError(
            f"Cannot condition on global latents of shapes {[tuple(shape) for shape in shapes.values()]} because "
            f"they had {[tuple(shape) for shape in before.values()]} when the guide was set up, and "
            "there is one phi per datapoint; try vectorize_particles=False, or Predictive(parallel=False)."
        )
