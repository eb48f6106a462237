"""Data that an inference algorithm has simulated, as wake-sleep and CSIS do, in place of those of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_amortized.structure.arguments import Arguments
from pyro_amortized.structure.plates import probe
from pyro_amortized.structure.signature import named_function
from pyro_amortized.structure.sites import is_data, sample_sites

__all__ = ["simulated_call", "takes_observations"]


def takes_observations(model: Callable[..., Any]) -> bool:
    """Whether a model has an argument ``observations`` of its own."""
    parameters = inspect.signature(named_function(model)).parameters.values()
    return any(p.name == "observations" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def simulated_call(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observations: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]:
    """A call with simulated data in place of its own.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        observations: Simulated values of observed sites by name.
        indices: Indices of the subsampled plates.

    Returns:
        The model that observes them, its arguments with them in place of the data that were observed as they are, and
        whether this took in all of them.

    Raises:
        ValueError: If values have other shapes than those observed.
    """
    trace = probe(model, args, kwargs, indices)[0]
    arguments, replaced, complete = Arguments(args, kwargs), dict[int, Tensor](), True
    for name, site in sample_sites(trace).items():
        if name not in observations or not is_data(site):
            continue
        value, observed = observations[name], torch.as_tensor(site["value"])
        if value.shape != observed.shape:
            raise ValueError(
                f"Cannot infer latents from simulated values of site {name!r} because their shape is "
                f"{tuple(value.shape)} and {tuple(observed.shape)} is observed; try vectorize_particles=False."
            )
        position = arguments.position(observed)
        if position is None:
            complete = False
        else:
            leaf = arguments.leaves[position]
            replaced[position] = value.reshape(leaf.shape).to(leaf.dtype)
    model = poutine.condition(model, data=dict(observations))
    return model, *arguments.with_leaves(replaced), complete
