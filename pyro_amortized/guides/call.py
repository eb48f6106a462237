"""One call of a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor

from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.structure import Structure

__all__ = ["Call"]


@dataclass
class Call:
    """One call of a guide.

    Attributes:
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        structure: What the model looks like in this call, with the indices of all subsampled plates.
        plates: The plates by name, opened by nobody yet.
        signal: Zeros ``(N,)`` whose gradient trains the guide beside that of the ELBO, or None.
        model: The model that observes the data at hand, if it is another than the guide's.
        complete: Whether the data at hand are among the arguments.
        global_values: The global latents that q(z) is conditioned on, by site: those drawn in this call, or medians.
        held: What global latents are held at, by site, in place of their medians.
        inputs: What the encoder sees, where that is all that is given; None to find it among the arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    plates: Mapping[str, pyro.plate]
    signal: Tensor | None = None
    model: Callable[..., Any] | None = None
    complete: bool = True
    global_values: Mapping[str, Tensor] | None = None
    held: Mapping[str, Tensor] | None = None
    inputs: tuple[Tensor, ...] | None = None

    def of_model(self, model: Callable[..., Any]) -> ModelCall:
        """The call of the model that observes the data at hand, given the guide's own model."""
        model = model if self.model is None else self.model
        return ModelCall(model, self.args, self.kwargs, self.structure, self.global_values or {})

    @property
    def index(self) -> Tensor | None:
        """Positions of the datapoints in the full data set; None if the plate holds all of them."""
        return self.structure.positions
