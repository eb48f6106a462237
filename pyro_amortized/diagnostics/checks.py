"""What diagnostics refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_amortized.checks import check_count, check_real, check_seed
from pyro_amortized.diagnostics.batches import is_single
from pyro_amortized.guides import LocalGuide
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.structure import Structure

__all__ = [
    "Effort",
    "check_apart",
    "check_effort",
    "check_model",
    "check_repeatable",
    "check_request",
    "check_same_model",
    "check_unscaled",
]


def check_request(guide: Any, model_args: Any) -> None:
    """Raises a ValueError unless a guide of this package and the arguments of a single call are given."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Cannot diagnose a guide inside torch.inference_mode() because the log-joint's gradients are needed; try "
            "torch.no_grad(), or neither."
        )
    if not isinstance(guide, LocalGuide):
        raise ValueError(
            f"Cannot diagnose a {type(guide).__name__} because its variational parameters per datapoint are unknown; "
            "try an AmortizedGuide or PerDatapointGuide."
        )
    if isinstance(model_args, Tensor):
        raise ValueError(
            "Cannot call the model with model_args=<tensor> because arguments are passed as a tuple; try (x,)."
        )
    if not is_single(model_args):
        raise ValueError(
            f"Cannot call the model with model_args=<{type(model_args).__name__}> because the arguments of a single "
            "call are wanted; try a tuple with those of one batch."
        )


def check_model(model: Any) -> None:
    """Raises a ValueError unless a model can be called, and is no guide."""
    if not callable(model):
        raise ValueError(
            f"Cannot diagnose a guide of {model!r} because that is no model; try the Pyro model that the guide was "
            "made with, as the first argument."
        )
    if isinstance(model, LocalGuide):
        raise ValueError(
            f"Cannot take a guide, {type(model).__name__}, for the model because the Pyro model that it was made with "
            "comes first, and the guide second; try estimate_gaps(model, guide, (x,))."
        )


def check_same_model(guide: LocalGuide, call: ModelCall) -> None:
    """Raises a ValueError that says what differs if a guide was made for a model with other latents."""
    if call.model == guide.model_at_hand:
        return
    structure = call.structure
    reader = StructureReader(structure.plate, discrete=bool(structure.discrete), groups=guide.groups)
    try:
        other = reader.look(call.model, call.args, call.kwargs, structure.indices)
    except ValueError as error:
        if not str(error).startswith("Cannot use plate"):
            raise
        raise ValueError(
            "Cannot diagnose this guide on this model because the guide was made for another one, whose datapoints lie "
            f"in plate {structure.plate!r}, in which this model observes nothing; try the model that the guide was "
            "made with."
        ) from error
    mine, theirs = _latents(structure), _latents(other)
    held = set(structure.global_sites) - set(other.global_sites)  # which the model may be conditioned on
    if {name: mine[name] for name in mine if name not in held} != theirs:
        raise ValueError(
            f"Cannot diagnose this guide on this model because the guide was made for another one: its latents are "
            f"{mine}, and the model's {theirs}; try the model that the guide was made with."
        )


def _latents(structure: Structure) -> dict[str, str]:
    """The latents of a structure by name: shape and support in unconstrained space, and plates."""
    found = {name: "global" for name in structure.global_sites}
    for site in structure.layout.sites if structure.layout is not None else ():
        support = "real" if site.is_real else f"through {site.transform}"
        plates = [structure.plate, *(f"{n} of {size}" for n, (_, size) in zip(site.plates, site.inner, strict=True))]
        found[site.name] = f"{tuple(site.shape)} {support} in plate {', '.join(map(str, plates))}"
    return found


def check_apart(guide: LocalGuide) -> None:
    """Refuses guides in which datapoints are normalised by what else is in their batch."""
    for name, module in guide.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            remedy = "guide.eval()" if module.running_mean is not None else "track_running_stats=True in training"
            raise ValueError(
                f"Cannot ask this guide about single datapoints because {type(module).__name__} {name!r} normalises "
                "them by the other ones of their batch, so that answers depend on what else is asked, and each call "
                f"changes them; try {remedy}."
            )


@dataclass(frozen=True)
class Effort:
    """What was asked for, explained at ``estimate_gaps``."""

    tolerance: float = 0.02
    max_samples: int = 20000
    num_particles: int | None = None

    def __post_init__(self) -> None:
        if self.num_particles is not None:
            check_count("num_particles", self.num_particles, 1, 50)


def check_effort(tolerance: Any, max_samples: Any, seed: Any) -> tuple[float, int, int]:
    """The settings that diagnostics share, or a ValueError before any work starts."""
    return (
        check_real("tolerance", tolerance, "a number of nats, 0 or more", lambda x: x >= 0, 0.02),
        check_count("max_samples", max_samples, 1, 20000),
        check_seed(seed),
    )


def check_unscaled(structure: Structure) -> None:
    """Refuses models that scale their latents, as for KL annealing: these have no evidence."""
    for site in structure.layout.sites if structure.layout is not None else ():
        if site.weight.is_scaled:
            raise ValueError(
                f"Cannot diagnose this guide because the model scales local site {site.name!r} by {site.weight.scale}: "
                "a scaled prior is no density, so that there is no evidence to compare with; try the arguments that "
                "set the scale to 1."
            )


def check_repeatable(guide: LocalGuide, call: ModelCall, phi: Tensor) -> None:
    """Refuses encoders whose answer for a datapoint is another in another call, or in another batch."""
    check_apart(guide)
    if call.structure.random_plates:
        return
    if not torch.equal(guide.variational_parameters(*call.args, **call.kwargs), phi):
        raise ValueError(
            "Cannot diagnose this guide because its encoder gives different variational parameters for the same data "
            "in two calls; try guide.eval() if it holds dropout or batch normalisation."
        )
