"""What every per-datapoint diagnostic starts from: a call bound to its log-joint, its family and the guide's phi."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.checks import check_count, check_real, check_seed
from pyro_amortized.diagnostics.batches import calls, is_single
from pyro_amortized.diagnostics.noise import draw, generator, seeded
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.checks import check_log_joint
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.structure import Structure

if TYPE_CHECKING:
    import xarray

__all__ = ["LocalProblem", "bind", "check_effort", "check_model", "check_same_model", "progress_bar", "to_dataset"]


@dataclass
class LocalProblem:
    """The inference problem of every datapoint in one call of a model.

    Attributes:
        objective: The per-datapoint ELBO.
        phi: The guide's variational parameters ``(N, P)``, without gradients.
        plate: Name of the datapoint plate.
        index: Positions of the datapoints in the full data set, ``(N,)``.
        global_sites: Names of the global latents that are held at their median.
    """

    objective: LocalObjective
    phi: Tensor
    plate: str
    index: Tensor
    global_sites: tuple[str, ...]


def bind(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] | Tensor,
    model_kwargs: Mapping[str, Any] | None,
    seed: int,
    compile: bool = False,
    *,
    graphs: GraphCache | None = None,
) -> LocalProblem:
    """Binds a call, and checks that its numbers can be trusted.

    Args:
        model: The Pyro model.
        guide: A guide of this package.
        model_args: The model's positional arguments.
        model_kwargs: Its keyword arguments.
        seed: Seed of the draws that the checks use.
        compile: Whether to compile the log-joint.
        graphs: Its traced forms, to share them between calls; new ones by default.

    Raises:
        ValueError: If the guide is none of this package, the model has no local latents, its log-joint is not finite at
            draws from the guide, or it is not the same in two runs.
    """
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
    check_model(model)
    args, kwargs = next(calls(model_args, model_kwargs))
    with torch.no_grad(), seeded(generator(seed, 10)):
        guide.setup(*args, **kwargs)
    with torch.no_grad(), seeded(generator(seed, 10)), guide.repeatable():
        inferred = guide.infer(*args, **kwargs)
        structure, (phi, family) = inferred.structure, inferred.local
        call = ModelCall(model, args, kwargs, structure)
        check_same_model(guide, call)
        _check_unscaled(structure)
        _check_repeatable(guide, call, phi)
        global_values = guide.global_median(*args, **kwargs)
    log_joint = LocalLogJoint(replace(call, global_values=global_values))
    z = draw(family, phi, 2, generator(seed, 0))
    check_log_joint(log_joint, z)
    if _takes_double(log_joint, z):
        phi, log_joint.like = phi.double(), z.new_empty(0, dtype=torch.float64)
    log_joint.graphs = GraphCache(compile) if graphs is None else graphs
    frame = structure.datapoints
    index = torch.arange(frame.size) if structure.positions is None else structure.positions
    return LocalProblem(
        LocalObjective(log_joint, family), phi.detach(), frame.name, index.cpu(), structure.global_sites
    )


def check_model(model: Any) -> None:
    """Raises a ValueError unless a model can be called."""
    if not callable(model):
        raise ValueError(
            f"Cannot diagnose a guide of {model!r} because that is no model; try the Pyro model that the guide was "
            "made with, as the first argument."
        )


def check_same_model(guide: LocalGuide, call: ModelCall) -> None:
    """Raises a ValueError that says what differs if a guide was made for a model with other latents."""
    if call.model == guide.model_at_hand:
        return
    structure = call.structure
    reader = StructureReader(structure.plate, discrete=bool(structure.discrete))
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


def check_effort(tolerance: Any, max_samples: Any, seed: Any) -> tuple[float, int, int]:
    """The settings that diagnostics share, or a ValueError before any work starts."""
    return (
        check_real("tolerance", tolerance, "a number of nats, 0 or more", lambda x: x >= 0, 0.02),
        check_count("max_samples", max_samples, 1, 20000),
        check_seed(seed),
    )


@torch.no_grad()
def _takes_double(log_joint: LocalLogJoint, z: Tensor) -> bool:
    """Whether a model whose data are of single precision runs on latents of double precision: no float is too far."""
    if z.dtype == torch.float64:
        return False
    try:
        double, single = log_joint.plain(z.double()), log_joint.plain(z)
    except Exception:  # a model may fail in any way, as where weights of single precision multiply the latents
        return False
    return double.dtype == torch.float64 and torch.allclose(double.to(single), single, rtol=1e-3, atol=1e-3)


def _check_unscaled(structure: Structure) -> None:
    """Refuses models that scale their latents, as for KL annealing: these have no evidence."""
    for site in structure.layout.sites if structure.layout is not None else ():
        if site.weight.is_scaled:
            raise ValueError(
                f"Cannot diagnose this guide because the model scales local site {site.name!r} by {site.weight.scale}: "
                "a scaled prior is no density, so that there is no evidence to compare with; try the arguments that "
                "set the scale to 1."
            )


def _check_repeatable(guide: LocalGuide, call: ModelCall, phi: Tensor) -> None:
    """Refuses encoders that give another answer when asked again about the same datapoints."""
    if call.structure.random_plates:
        return
    if not torch.equal(guide.variational_parameters(*call.args, **call.kwargs), phi):
        raise ValueError(
            "Cannot diagnose this guide because its encoder gives different variational parameters for the same data "
            "in two calls; try guide.eval() if it holds dropout or batch normalisation."
        )


def to_dataset(problem: LocalProblem, variables: Mapping[str, Tensor], **attributes: Any) -> xarray.Dataset:
    """Per-datapoint results as a dataset over the plate's dimension, with units and settings in its attributes."""
    import xarray

    held = ", ".join(problem.global_sites)
    return xarray.Dataset(
        {name: (problem.plate, value.detach().cpu().numpy()) for name, value in variables.items()},
        coords={problem.plate: problem.index.numpy()},
        attrs={
            "units": "nats per datapoint",
            "family": type(problem.objective.family).__name__,
            "latent_dim": problem.objective.family.latent_dim,
            "global_latents": f"held at the guide's median: {held}" if held else "none",
            **attributes,
        },
    )


def progress_bar(total: int | None, description: str, progress: bool) -> Any:
    """A tqdm bar, as in Pyro's MCMC; silent unless ``progress``."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, disable=not progress)
