"""What a step on an accelerator does without: reading values, for which Python would wait."""

from __future__ import annotations

from torch import Tensor

__all__ = ["has_to_wait"]


def has_to_wait(value: Tensor) -> bool:
    """Whether Python has to wait for a device if it reads a value."""
    return value.device.type != "cpu"
