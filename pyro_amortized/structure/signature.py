"""A model's arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

from pyro import poutine
from torch import nn

__all__ = ["named_arguments", "named_function"]


def named_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the model gives them, with its defaults."""
    function = named_function(model)
    names = _plain_names(function)
    if names is not None and len(names) == len(args) and not kwargs:
        return dict(zip(names, args, strict=True))
    signature = inspect.signature(function)
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


def _plain_names(function: Any) -> tuple[str, ...] | None:
    """The names of a function's arguments where all may be given by position, which is faster read than a signature."""
    given = 0
    if isinstance(function, MethodType):
        function, given = function.__func__, 1
    if type(function) is not FunctionType or vars(function):  # which may be wrapped, or have a signature of its own
        return None
    code = function.__code__
    if code.co_kwonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return None
    return code.co_varnames[given : code.co_argcount]
