"""How several draws of the latents are evaluated in one run of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyro

from pyro_amortized.structure.arguments import Axis
from pyro_amortized.structure.running import isolated

__all__ = ["MAX_ROWS", "Copying", "Mode", "agrees", "chunks", "draws_plate"]

MAX_ROWS = 8192
"""How many draws times datapoints to evaluate at once; bounds memory."""


@dataclass
class Copying:
    """How to evaluate draws as copies of the datapoints.

    Attributes:
        axes: The axes of the arguments that hold the datapoints.
        serves: Whether it gives the numbers that single draws give, by the number of draws.
        uses: What has been run once to find that out.
    """

    axes: Sequence[Axis]
    serves: dict[int, bool] = field(default_factory=dict)
    uses: set[Any] = field(default_factory=set)


Mode = tuple[bool, Copying | None]
"""Whether draws are evaluated together in an outermost plate, and else how they are as copies of the datapoints."""


def draws_plate(number: int, depth: int) -> pyro.plate:
    """A plate of draws outside of a model's own batch dimensions."""
    with isolated():
        return pyro.plate("_local_draws", number, dim=-depth - 1)


Result = TypeVar("Result")


def agrees(evaluate: Callable[[], Result], is_right: Callable[[Result], bool]) -> bool:
    """Whether a way to evaluate draws works and gives the right numbers."""
    try:
        return is_right(evaluate())
    except Exception:  # a model may fail in any way on a batch of draws; then it is run otherwise
        return False


def chunks(num_draws: int, num_datapoints: int, max_rows: int = MAX_ROWS) -> list[slice]:
    """Cuts draws into pieces such that a piece times the datapoints stays below ``max_rows``."""
    step = max(1, max_rows // max(1, num_datapoints))
    return [slice(start, min(start + step, num_draws)) for start in range(0, num_draws, step)]
