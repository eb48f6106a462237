r"""Update rules: how a refinement step changes phi, given the gradient of the per-datapoint ELBO.

A rule works on rows: every datapoint has its own phi and its own gradient, in nats and without the scale of a
subsampled plate, and what a rule makes of one row never depends on the others. So a step size means the same whatever
the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_positive
from pyro_amortized.families import VariationalFamily

__all__ = ["Curvature", "State", "SteppedRule", "UpdateRule", "check_limits"]

State = tuple[Tensor, ...]
"""What a rule remembers from step to step: tensors only, so that steps can be recomputed and compiled."""


@dataclass(frozen=True)
class Curvature:
    """What the draws of a step say about the ELBO around the location of q, in the units of q.

    Attributes:
        grad: The gradient of the ELBO by phi, ``(N, P)``, in nats.
        slope: The gradient by the location, ``(N, D)``, in nats per standard deviation of q.
        precision: The negative second derivative, ``(N, D, D)``, in nats per squared standard deviation of q: the
            identity where q is the posterior.
        family: The family of q, which knows how phi moves in these units.
    """

    grad: Tensor
    slope: Tensor
    precision: Tensor
    family: VariationalFamily


Evaluated = TypeVar("Evaluated", bound=Tensor | Curvature)
"""What a rule receives of the ELBO at phi: the gradient ``(N, P)`` in nats, or a :class:`Curvature`."""


class UpdateRule(nn.Module, ABC, Generic[Evaluated]):
    """Base class: ``init(phi) -> state`` and ``update(phi, grad, state) -> phi, state``.

    Attributes:
        is_learned: Whether the rule is a network that is trained by the gradient at each of its steps, rather than a
            formula that gradients pass through.
        takes: What :meth:`update` receives: ``Tensor`` for the gradient; :class:`Curvature` for that where it is known
            (for the normal and the full-rank family, with more than one particle and a reparameterised gradient), and
            for the gradient elsewhere.
    """

    is_learned: bool = False
    takes: type[Tensor] | type[Curvature] = Tensor

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Sizes the rule for a family; called once, before the first step.

        Args:
            family: The variational family.
            num_features: Number of features of a datapoint that :meth:`init` will be given.

        Raises:
            ValueError: If the rule does not fit the family.
        """

    @abstractmethod
    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """The state before the first step.

        Args:
            phi: Where refinement starts, ``(N, P)``.
            features: Features of the datapoints ``(N, H)``, for rules that are networks.
        """

    @abstractmethod
    def update(self, phi: Tensor, grad: Evaluated, state: State) -> tuple[Tensor, State]:
        """One step uphill.

        Args:
            phi: Variational parameters ``(N, P)``.
            grad: Gradient of the per-datapoint ELBO there, ``(N, P)``, in nats; or its curvature, see :attr:`takes`.
            state: What :meth:`init` or the last step returned.

        Returns:
            The new phi and the new state.
        """


class SteppedRule(UpdateRule[Evaluated]):
    """A rule with a step size, given or learned.

    Args:
        step_size: The step size.
        learned: Whether it is a parameter, trained together with the encoder by unrolled gradients.
        max_norm: Longest gradient of a datapoint, in the Euclidean norm; longer ones are shortened. None for no limit.
    """

    _usual_step: ClassVar[float]

    def __init__(self, step_size: float, learned: bool, max_norm: float | None) -> None:
        super().__init__()
        check_positive("step_size", step_size, self._usual_step)
        if max_norm is not None:
            check_positive("max_norm", max_norm, 10.0)
        self.max_norm = max_norm
        self._step_size = float(step_size)
        self.log_step_size = nn.Parameter(torch.tensor(math.log(step_size))) if learned else None

    @property
    def step_size(self) -> float | Tensor:
        """The step size; a tensor if it is learned."""
        return self._step_size if self.log_step_size is None else self.log_step_size.exp()

    def _clip(self, grad: Tensor) -> Tensor:
        if self.max_norm is None:
            return grad
        norm = grad.square().sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
        return grad * (self.max_norm / norm).clamp(max=1.0)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        step_size = self.step_size
        number = step_size if isinstance(step_size, float) else step_size.item()
        return f"step_size={number:.4g}, learned={self.log_step_size is not None}"


def check_limits(max_shift: float, max_log_ratio: float) -> None:
    """Raises a ValueError unless the limits of a step are positive."""
    check_positive("max_shift", max_shift, 3.0)
    check_positive("max_log_ratio", max_log_ratio, 0.5)
