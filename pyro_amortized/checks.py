"""Checks of what a user hands in, before any work starts: each error says what is wanted, and what to try."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_count",
    "check_flag",
    "check_function",
    "check_positive",
    "check_probabilities",
    "check_real",
    "check_seed",
    "check_widths",
    "is_traced",
]


def _integer(value: Any) -> int | None:
    """An integer of Python, NumPy or torch as Python's own; None for all else, True and 2.0 too."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    with suppress(TypeError):
        return operator.index(value)
    return None


def check_count(name: str, value: Any, least: int, instead: Any = None) -> int:
    """A count as an integer.

    Args:
        name: What the user calls it.
        value: What the user gave.
        least: The least that makes sense.
        instead: What the error proposes; ``least``, or 1, by default.

    Raises:
        ValueError: If it is no integer from ``least`` on.
    """
    number = _integer(value)
    if number is None or not least <= number < 2**31:
        why = f"it must be an integer of at least {least}" + (
            "" if number is None or number < least else ", below 2**31"
        )
        raise ValueError(
            f"Cannot use {name}={value!r} because {why}; try {name}={max(least, 1) if instead is None else instead}."
        )
    return number


def check_seed(seed: Any) -> int:
    """A seed as an integer.

    Raises:
        ValueError: If it is none from 0 to 2**63 - 1.
    """
    number = _integer(seed)
    if number is None or not 0 <= number < 2**63:
        raise ValueError(f"Cannot use seed={seed!r} because it must be an integer from 0 to 2**63 - 1; try seed=0.")
    return number


def check_real(name: str, value: Any, wanted: str, holds: Callable[[float], bool], instead: Any) -> float:
    """A number.

    Args:
        name: What the user calls it.
        value: What the user gave.
        wanted: What is wanted, in words.
        holds: Whether a finite number is what is wanted.
        instead: What the error proposes.

    Raises:
        ValueError: If it is no number, not finite, or not what is wanted.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and holds(value)):
        raise ValueError(f"Cannot use {name}={value!r} because it must be {wanted}; try {name}={instead!r}.")
    return float(value)


def check_positive(name: str, value: Any, instead: Any) -> float:
    """A positive number; arguments and errors as for :func:`check_real`."""
    return check_real(name, value, "a positive number", lambda x: x > 0, instead)


def check_probabilities(values: Any) -> list[float]:
    """Probabilities, at least one, as a list.

    Raises:
        ValueError: If they are none.
    """
    with suppress(TypeError, ValueError, RuntimeError):
        tensor = torch.as_tensor(values, dtype=torch.float64)
        if tensor.dim() <= 1 and tensor.numel() and bool(((tensor >= 0) & (tensor <= 1)).all()):
            return [float(x) for x in tensor.flatten()]
    raise ValueError(
        f"Cannot take quantiles {values!r} because these must lie between 0 and 1, one after the other; try "
        "(0.05, 0.5, 0.95)."
    )


def check_widths(name: str, widths: Any, *, least: int = 0) -> tuple[int, ...]:
    """Widths of layers, at least so many.

    Raises:
        ValueError: If they are no sequence of positive integers.
    """
    found = (
        [_integer(width) for width in widths] if isinstance(widths, Sequence) and not isinstance(widths, str) else None
    )
    if found is None or len(found) < least or not all(width is not None and width > 0 for width in found):
        raise ValueError(
            f"Cannot use {name}={widths!r} because it must be a tuple of positive integers, the widths of layers; try "
            f"{name}=(64, 64)."
        )
    return tuple(width for width in found if width is not None)


def check_flag(name: str, value: Any, *, may_be_none: bool = False) -> None:
    """Raises a ValueError unless a value is True or False."""
    if not (isinstance(value, bool) or (may_be_none and value is None)):
        raise ValueError(f"Cannot use {name}={value!r} because it must be True or False; try {name}=True.")


def check_function(name: str, value: Any, wanted: str, instead: str) -> None:
    """Raises a ValueError unless a value can be called, and is no module or tensor."""
    if not callable(value) or isinstance(value, torch.nn.Module | Tensor):
        raise ValueError(f"Cannot use {name}={value!r} because it must be {wanted}; try {name}={instead}.")


def is_traced() -> bool:
    """Whether a graph is being made, so that values may not be looked at."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
