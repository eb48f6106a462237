"""By what calls are told apart, so that what is known of one serves others like it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["call_key", "versions"]


def call_key(value: Any) -> Any:
    """What of a call's arguments may decide the structure, hashable: shapes of tensors, values of everything else.

    Returns:
        A key, or None if the value holds something whose influence cannot be seen from outside.
    """
    if isinstance(value, Tensor):
        return _known_shape(value), value.dtype, value.device, value.layout
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        keys = tuple([call_key(part) for part in value])
        return None if None in keys else (type(value), keys)
    return None


def _known_shape(value: Tensor) -> torch.Size:
    """A shape that can be compared: inside ``torch.jit.trace`` its sizes are tensors, which equal no others."""
    if not torch._C._get_tracing_state():
        return value.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.Size([int(size) for size in value.shape])


def versions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """How often each tensor among the arguments has been changed in place."""
    flat: Sequence[Any] = (*args, *kwargs.values())
    if not all(isinstance(x, Tensor | int | float | str | None) for x in flat):
        flat = tree_leaves(flat)
    return [x._version for x in flat if isinstance(x, Tensor) and not x.is_inference()]
