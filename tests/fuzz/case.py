"""A structure with its model and guide, and how numbers are compared."""

from __future__ import annotations

from random import Random
from typing import Any

import pyro
import torch
from by_hand import Draw, Exact, LogJoint, coordinates, draw
from guides import build
from programs import Program
from structures import Structure
from torch import Tensor

__all__ = ["GAUSSIAN", "REFINING", "Case", "Wrong", "close", "short"]

TOLERANCE = 1e-7
REFINING = ("SemiAmortizedGuide", "IterativeAmortizedGuide")
GAUSSIAN = ("normal", "multivariate_normal")


class Wrong(AssertionError):
    """A number is not what it must be."""


def close(what: str, found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    found, expected = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (found, expected))
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        raise Wrong(f"{what} is {short(found)} and should be {short(expected)}")


def short(value: Tensor) -> str:
    return f"{value.item():.9g}" if value.numel() == 1 else f"{tuple(value.shape)} {value.flatten()[:4].tolist()}"


class Case:
    """A structure with its model and guide, set up on the first batch."""

    def __init__(self, structure: Structure, **options: Any) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(structure.number)
        self.structure = structure
        self.random = Random(structure.number)
        self.program = Program(structure)
        self.model = self.program.model
        self.guide = build(self.program, **options)
        args, kwargs = self.program.arguments(0)
        self.guide.setup(*args, **kwargs)
        if "encoder" not in options:
            self.move()

    def move(self) -> None:
        """Moves the parameters away from where they start, to where couplings do not multiply beyond all digits."""
        with torch.no_grad():
            for parameter in self.guide.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            while self.structure.guide.family == "structured" and any(self._is_extreme(part) for part in (0, 1)):
                for parameter in self.guide.parameters():
                    parameter.mul_(0.5)

    def _is_extreme(self, part: int) -> bool:
        args, kwargs = self.program.arguments(part)
        try:
            phi = self.guide.variational_parameters(*args, **kwargs)
        except ValueError:  # refused; the checks will see
            return False
        draws = self.guide.family(phi).sample((20,))
        return bool((draws.abs() > 30.0).any())

    def draw(self, part: int = 0, seed: int = 2, particles: int = 1) -> Draw:
        args, kwargs = self.program.arguments(part)
        pyro.set_rng_seed(seed)
        return draw(self.structure, self.model, self.guide, args, kwargs, particles)

    def loss(self, loss: Any, part: int = 0, seed: int = 2) -> float:
        args, kwargs = self.program.arguments(part)
        pyro.set_rng_seed(seed)
        return loss.loss(self.model, self.guide, *args, **kwargs)

    def exact(self, drawn: Draw, part: int = 0) -> Exact:
        """Posterior and evidence of the datapoints of a draw, given the global values ``w`` in it."""
        args, kwargs = self.program.arguments(part)
        fixed = {"w": drawn.posterior["w"]["value"]} if "w" in drawn.posterior else {}
        log_joint = LogJoint(drawn, self.model, args, kwargs, fixed)
        flat = coordinates(drawn)[0][0]
        return Exact.of(log_joint, *flat.shape)
