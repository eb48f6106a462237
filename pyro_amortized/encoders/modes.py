"""Training and evaluation modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Runs a module, which may be shared with others in training, in evaluation mode.

    Parts that are built meanwhile, as those of a guide in its first call, are then in the mode of the whole.
    """
    whole, modes = module.training, {part: part.training for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part in [*modes, *module.modules()]:
            part.training = modes.get(part, whole)
