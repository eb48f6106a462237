"""The guide of the latents that all datapoints share: an autoguide of Pyro's or the user's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

from pyro_amortized.guides.call import Call
from pyro_amortized.guides.saving import SavedGuide
from pyro_amortized.structure.local_site import check_continuous
from pyro_amortized.structure.running import Feasible, isolated, run_model
from pyro_amortized.structure.state import untouched

__all__ = [
    "build_global_guide",
    "check_parameter_store",
    "draw_globals",
    "global_median",
    "global_of",
    "global_quantiles",
    "is_amortized",
    "stored",
    "weighted_globals",
]


def build_global_guide(
    owner: Any, factory: Callable[[Callable[..., Any]], AutoGuide], init_loc_fn: Callable[..., Any], call: Call
) -> None:
    """Sets ``owner.global_guide``, with its parameters.

    Args:
        owner: The guide whose part it becomes, named so in Pyro's store.
        factory: From the model of the global latents alone to their guide.
        init_loc_fn: Where q starts.
        call: The first call.
    """
    expose = list(call.structure.global_sites)
    part = InitMessenger(init_loc_fn)(poutine.block(Feasible()(owner.model), expose=expose))
    owner.global_guide = guide = factory(part)
    if isinstance(guide, SavedGuide):
        if guide.refines:
            raise ValueError(
                f"Cannot guide the latents that datapoints share by {type(guide).__name__} because refinement would "
                "need the local latents, which are drawn later; try AmortizedGuide here, and a refining guide outside."
            )
        guide.model = _view(owner)  # type: ignore[misc]
    with isolated(), torch.no_grad(), untouched():
        try:
            owner.global_guide(*call.args, **call.kwargs)  # makes its parameters
        except ValueError as error:
            if "discrete sample site" in str(error):
                nodes: dict[str, Any] = run_model(owner.model, call.args, call.kwargs, call.structure.indices).nodes
                for name in expose:
                    check_continuous(name, nodes[name], f"global_guide={type(owner.global_guide).__name__}")
            raise


def _view(owner: Any) -> Callable[..., Any]:
    """The model of a guide with all that it observes, but without the latents that are not global."""
    structure = owner._built_structure
    local = [] if structure.layout is None else [site.name for site in structure.layout.sites]
    hidden = [*local, *(site.name for site in structure.discrete), *structure.enumerated]
    return poutine.block(owner.model, hide=hidden)


def is_amortized(guide: Any) -> bool:
    """Whether a global guide is one of this package, which gives latents the masks and scales of the model itself."""
    return isinstance(guide, SavedGuide)


def global_of(owner: Any) -> AutoGuide:
    """The global guide of a guide, knowing its owner: saving cuts it off, a refined guide shares it."""
    guide: AutoGuide = owner.global_guide
    if isinstance(guide, SavedGuide) and guide.model_at_hand is None and owner.model_at_hand is not None:
        guide.model = _view(owner)  # type: ignore[misc]
    if guide.master is None or guide.master() is not owner:
        guide._update_master(weakref.ref(owner))
    return guide


def global_median(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The global latents of a guide at their median, or for autoguides without one at a draw."""
    with isolated(), torch.no_grad():
        guide = global_of(owner)
        try:
            known = guide.median(*args, **kwargs)
        except NotImplementedError:  # autoguides without a closed form
            known = {}
        if all(name in known for name in owner.global_sites):
            return known
        return {**draw_globals(owner, args, kwargs), **known}


def draw_globals(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """One draw of the global latents of a guide, whatever the global guide returns."""
    nodes: dict[str, Any] = run_model(global_of(owner), args, kwargs).nodes
    return {name: nodes[name]["value"] for name in owner.global_sites}


def weighted_globals(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """One draw of the global latents of a guide, and its log-density."""
    trace = run_model(global_of(owner), args, kwargs)
    nodes: dict[str, Any] = trace.nodes
    return {name: nodes[name]["value"] for name in owner.global_sites}, torch.as_tensor(trace.log_prob_sum())


def global_quantiles(
    owner: Any, quantiles: Sequence[float] | Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Quantiles of the global latents of a guide, ``(Q, *batch, *event)`` each."""
    guide, probs = global_of(owner), torch.as_tensor(quantiles)
    if probs.tolist() == [0.5]:
        return {name: value.unsqueeze(0) for name, value in guide.median(*args, **kwargs).items()}
    return guide.quantiles(probs.tolist(), *args, **kwargs)


def stored(name: str) -> list[str]:
    """Names of parameters in Pyro's store that belong to the global guide of a guide of a name."""
    prefix = f"{name}.global_guide."
    return [key for key in pyro.get_param_store()._params if key.startswith(prefix)]


def check_parameter_store(taken: Sequence[str], own: Iterator[tuple[str, nn.Parameter]]) -> None:
    """Refuses to train on a parameter store that holds other parameters under a guide's names.

    Args:
        taken: Names that were taken when the guide was built.
        own: Parameters of the guide by name.
    """
    params = pyro.get_param_store()._params
    others = [name for name in taken if name in params]
    others += [name for name, parameter in own if params.get(name, parameter) is not parameter]
    if others and not pyro.settings.get("module_local_params"):
        raise ValueError(
            f"Cannot run this guide because the parameter store already holds other parameters named {others[0]!r}, "
            "from another guide of the same name or from a file; try a name=... of its own for each guide, "
            "pyro.clear_param_store() before a new one, or pyro.settings.set(module_local_params=True) with "
            "elbo(model, guide) and a torch optimizer."
        )
