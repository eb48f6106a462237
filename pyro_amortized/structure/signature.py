"""A model's arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from torch import nn

__all__ = ["named_arguments", "named_function"]


def named_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the model gives them, with its defaults."""
    signature = inspect.signature(named_function(model))
    bound = signature.bind_partial(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name))
    return arguments


def named_function(model: Any) -> Any:
    """The function whose parameters name a model's arguments, under Pyro's handlers and inside modules."""
    model = poutine.unwrap(model)
    return model.forward if isinstance(model, nn.Module) else model
