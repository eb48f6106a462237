"""Which arguments of a model matter to a datapoint's posterior and are not seen by the guide's encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import draw, generator, seeded
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.signature import named_arguments

if TYPE_CHECKING:
    import xarray

__all__ = ["advice_on_inputs", "on_globals", "unseen_arguments"]

_UNSEEN, _SHOWN = "unseen_arguments", "encoder_input_to_try"


def advice_on_inputs(dataset: xarray.Dataset) -> str:
    """What to show the encoder, in words; empty where it sees all that posteriors depend on."""
    if _UNSEEN not in dataset.attrs:
        return ""
    return (
        f"the encoder does not see {dataset.attrs[_UNSEEN]}, on which posteriors depend, so that what it was trained "
        f"with (global latents, the model's parameters) may be off too: try encoder_input={dataset.attrs[_SHOWN]}, and "
        "training again; else "
    )


def on_globals(dataset: xarray.Dataset) -> str:
    """Says that global latents were held, if there are any."""
    held = dataset.attrs.get("global_latents", "none")
    return "" if held == "none" else f"Global latents are {held}; how far off these are is not part of it."


@torch.no_grad()
def unseen_arguments(guide: LocalGuide, problem: LocalProblem) -> dict[str, str]:
    """Names of arguments that the log-joint depends on and the encoder does not see, and of all that it depends on.

    Found by numbers: what belongs to half of the datapoints changes places within one argument. An argument that
    changes the log-joints of other datapoints too is shared by all, and none of their data. Covariates that the encoder
    is not shown let its answers, and global latents and parameters that are trained with them, miss what they explain.
    """
    log_joint = problem.objective.log_joint
    inputs = _inputs(guide, *log_joint.call.args, **log_joint.call.kwargs)
    if not inputs or problem.plate != guide.plate:
        return {}
    structure = log_joint.structure
    half = structure.datapoints.size // 2
    rows = {structure.datapoints.size: torch.arange(structure.datapoints.size) < half}
    plates = {len(group.index): name for name, group in structure.groups.items()}
    rows |= {len(group.index): group.datapoints.cpu() < half for group in structure.groups.values()}
    indices = [*structure.indices.values(), *(group.index for group in structure.groups.values())]
    z = draw(problem.objective.family, problem.phi, 2, generator(0, 40))
    call = log_joint.call
    reference, named = log_joint.plain(z), named_arguments(call.model, call.args, call.kwargs)
    unseen: list[str] = []
    all_names: list[str] = []
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.dim() or value.layout != torch.strided:
            continue
        if len(value) not in rows or any(value.data_ptr() == index.data_ptr() for index in indices):
            continue
        order, chosen = torch.arange(len(value)), rows[len(value)].nonzero().squeeze(-1)
        order[chosen] = chosen.flip(0)
        moved = {name: value[order.to(value.device)]}
        try:
            changed = log_joint.of_call(replace(call, args=(), kwargs={**named, **moved}))
            found = changed.plain(z)
            if close(found, reference) or not close(found[:, half:], reference[:, half:]):
                continue
            now = _inputs(guide, **{**named, **moved})
        except Exception:  # a model may fail in any way on rows that have changed places; then nothing is known
            continue
        all_names.append(name)
        if all(map(torch.equal, now, inputs)):
            unseen.append(name)
    shown: Any = all_names
    if structure.groups:
        of_plate = {name: plates.get(len(named[name]), structure.datapoints.name) for name in all_names}
        shown = {plate: [n for n in all_names if of_plate[n] == plate] for plate in dict.fromkeys(of_plate.values())}
    return {_UNSEEN: ", ".join(map(repr, unseen)), _SHOWN: str(shown)} if unseen else {}


def _inputs(guide: LocalGuide, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """What the encoder sees of a call, of the same subsample each time; torch's own state is left alone."""
    with seeded(generator(0, 41)):
        return guide.encoder_inputs(*args, **kwargs)
