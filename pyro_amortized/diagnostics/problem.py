"""What every per-datapoint diagnostic starts from: a call bound to its log-joint, its family and the guide's phi."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.batches import calls
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.checks import check_log_joint
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.objective.noise import draw, generator, seeded
from pyro_amortized.structure.call import ModelCall

if TYPE_CHECKING:
    import xarray

from pyro_amortized.diagnostics.checks import (
    check_model,
    check_repeatable,
    check_request,
    check_same_model,
    check_unscaled,
)

__all__ = ["LocalProblem", "bind", "blocks", "progress_bar", "to_dataset", "value_and_gradient"]

_BLOCK = 256
"""Datapoints worked on at a time; bounds memory."""


@dataclass
class LocalProblem:
    """The inference problem of every datapoint in one call of a model.

    Attributes:
        objective: The per-datapoint ELBO.
        phi: The guide's variational parameters ``(N, P)``, without gradients.
        plate: Name of the datapoint plate.
        index: Positions of the datapoints in the full data set, ``(N,)``.
        global_sites: Names of the global latents that are held at their median.
        guide: Whose phi it is: the guide, or that of the other side of crossed plates.
    """

    objective: LocalObjective
    phi: Tensor
    plate: str
    index: Tensor
    global_sites: tuple[str, ...]
    guide: LocalGuide

    @property
    def held(self) -> Mapping[str, Tensor]:
        """What the global latents are held at, by name."""
        return self.objective.log_joint.call.global_values


def bind(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] | Tensor,
    model_kwargs: Mapping[str, Any] | None,
    seed: int,
    compile: bool = False,
    *,
    graphs: GraphCache | None = None,
    plate: str | None = None,
    held: Mapping[str, Tensor] | None = None,
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
        plate: The datapoint plate of the guide, by default, or of a global guide that amortizes the other side of
            crossed plates; the latents of all other sides are held at their medians.
        held: What to hold global latents at in place of their medians.

    Raises:
        ValueError: If the guide is none of this package, the model has no local latents, its log-joint is not finite at
            draws from the guide, or it is not the same in two runs.
    """
    check_model(model)
    check_request(guide, model_args)
    args, kwargs = next(calls(model_args, model_kwargs))
    with torch.no_grad(), seeded(generator(seed, 10)):
        guide.setup(*args, **kwargs)
    with torch.no_grad(), seeded(generator(seed, 10)), guide.repeatable():
        inferred = guide.infer(*args, **kwargs)
        structure, (phi, family) = inferred.structure, inferred.local
        call = ModelCall(model, args, kwargs, structure)
        check_same_model(guide, call)
        check_unscaled(structure)
        check_repeatable(guide, call, phi)
        medians, side = guide.global_median(*args, **kwargs), guide
        if plate is not None and plate != guide.plate:
            side = _side(guide, plate)
            inferred = side.infer(*args, **kwargs)
            structure, (phi, family) = inferred.structure, inferred.local
            call = ModelCall(model, args, kwargs, structure)
            check_unscaled(structure)
            own = {site.name for site in structure.layout.sites}  # type: ignore[union-attr]
            medians = {name: value for name, value in guide.median(*args, **kwargs).items() if name not in own}
    held = medians if held is None else held
    log_joint = LocalLogJoint(replace(call, global_values=held))
    z = draw(family, phi, 2, generator(seed, 0))
    check_log_joint(log_joint, z)
    if _takes_double(log_joint, z):
        phi, log_joint.like = phi.double(), z.new_empty(0, dtype=torch.float64)
    log_joint.graphs = GraphCache(compile) if graphs is None else graphs
    frame = structure.datapoints
    index = torch.arange(frame.size) if structure.positions is None else structure.positions
    return LocalProblem(LocalObjective(log_joint, family), phi.detach(), frame.name, index.cpu(), tuple(held), side)


def blocks(problem: LocalProblem, phi: Tensor) -> list[tuple[LocalProblem, Tensor]]:
    """The problem and phi in blocks of datapoints, where the model can be run on each of them."""
    if len(phi) <= _BLOCK:
        return [(problem, phi)]
    parts = []
    for rows in torch.arange(len(phi)).split(_BLOCK):
        objective = problem.objective.select(rows)
        if objective is None:
            return [(problem, phi)]
        part = replace(problem, objective=objective, phi=problem.phi[rows], index=problem.index[rows])
        parts.append((part, phi[rows]))
    return parts


def value_and_gradient(log_joint: Callable[[Tensor], Tensor], z: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Log-joints and their gradients in float64 on the CPU; minus infinity and zeros where they are not finite.

    Args:
        log_joint: From ``(K, n, D)`` to ``(K, n)``.
        z: Where, ``(K, n, D)``.
        like: A tensor of the dtype and device that the model runs with.
    """
    values, gradients = [], []
    with torch.enable_grad():
        for piece in chunks(len(z), z.shape[1]):
            x = z[piece].detach().to(like).requires_grad_()
            value = log_joint(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
            values.append(value.detach().cpu().double())
            gradients.append(gradient.cpu().double())
    value = torch.cat(values)
    return torch.where(value.isfinite(), value, -math.inf), torch.cat(gradients).nan_to_num(0.0, 0.0, 0.0)


def _side(guide: LocalGuide, plate: str) -> LocalGuide:
    """The guide, among a guide and its global guides, whose datapoints lie in a plate."""
    sides: Any = [guide]
    while isinstance(side := getattr(sides[-1], "global_guide", None), LocalGuide):
        sides.append(side)
    found = {side.plate: side for side in sides}
    if plate not in found:
        raise ValueError(
            f"Cannot diagnose the latents of plate {plate!r} because this guide amortizes those of {sorted(found)}; "
            "try one of these, or global_guide=lambda model: AmortizedGuide(model, plate=...)."
        )
    return found[plate]


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
