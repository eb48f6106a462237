"""A learned optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_function, check_widths
from pyro_amortized.encoders.layers import Head, hidden_layers
from pyro_amortized.families import VariationalFamily
from pyro_amortized.updates.base import Curvature, State, UpdateRule
from pyro_amortized.updates.gradient import NaturalGradient
from pyro_amortized.updates.newton import Newton
from pyro_amortized.updates.rules import MOST_LATENTS

__all__ = ["LearnedUpdate"]


class LearnedUpdate(UpdateRule[Tensor | Curvature]):
    r"""A network that has learned to take the step.

    It sees the features h of the datapoint, phi, and the gradient as the logarithm of its size and its sign, entry by
    entry, and answers with a gated update,

    .. math:: \phi_t = a \odot \phi_{t-1} + (1 - a) \odot f + b \odot d, \qquad (\mathrm{logit}\,a, f,
        \mathrm{logit}\,b) = \mathrm{net}(h, \phi_{t-1}, \log|g|, \mathrm{sign}\,g).

    d is the step of :class:`Newton`, for the normal family; with one particle, or more than 128 latents, it is the
    natural gradient; for other families the last term is missing, as in the paper. Phi and the gradient are detached:
    every step is trained on its own, to be good from wherever the last one led, so that it can be repeated more often
    than in training.

    Args:
        hidden_dims: Widths of the hidden layers.
        activation: Constructor of the activation after each layer.

    References:
        Iterative Amortized Inference, Joseph Marino, Yisong Yue, Stephan Mandt (2018),
        https://arxiv.org/abs/1807.09356
    """

    is_learned = True

    def __init__(self, hidden_dims: Sequence[int] = (200, 200), activation: Callable[[], nn.Module] = nn.ELU) -> None:
        super().__init__()
        self.hidden_dims = check_widths("hidden_dims", hidden_dims)
        check_function("activation", activation, "the class of an activation", "torch.nn.ELU")
        self.activation = activation
        self.network: nn.Sequential | None = None
        self.natural: NaturalGradient | None = None
        self.newton: Newton | None = None

    @property
    def takes(self) -> type[Tensor] | type[Curvature]:  # type: ignore[override]
        """The curvature, if the family is one that :class:`Newton` can refine, of few enough latents."""
        return Tensor if self.newton is None else Curvature

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Builds the network, or makes sure that it fits if it has been built already."""
        natural = family.is_mean_field
        sizes = num_features + 3 * family.num_params, (3 if natural else 2) * family.num_params
        if self.network is None:
            self.natural = NaturalGradient(1.0) if natural else None
            if natural and family.latent_dim <= MOST_LATENTS:
                self.newton = Newton(1.0)
            layers = hidden_layers(sizes[0], self.hidden_dims, self.activation)
            width = (sizes[0], *self.hidden_dims)[-1]
            output = Head(torch.ones(1, width), sizes[1])  # its answers are close to zero at first,
            nn.init.zeros_(output.bias)  # so that half of phi is kept, and of the direct step a share taken
            self.network = nn.Sequential(*layers, output)
        built = self.network[0].in_features, self.network[-1].out_features
        if built != sizes:  # type: ignore[comparison-overlap]
            raise ValueError(
                f"Cannot refine with this LearnedUpdate because it was built for {built[0]} inputs and {built[1]} "
                f"outputs, and {family.num_params} variational parameters with {num_features} features need {sizes[0]} "
                f"and {sizes[1]}; try a new LearnedUpdate for each guide."
            )

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """The features, which stay the same."""
        return () if features is None else (features,)

    def update(self, phi: Tensor, grad: Tensor | Curvature, state: State) -> tuple[Tensor, State]:
        """One step; beside the network's own it is offered that of :class:`Newton`, or the natural gradient's."""
        if isinstance(grad, Curvature) and self.newton is not None:
            seen = replace(grad, slope=grad.slope.detach(), precision=grad.precision.detach())
            newton = self.newton.update(phi.detach(), seen, ())[0]
            return self._update(phi, grad.grad, state, newton, _NEWTON_SHARE)
        grad = grad.grad if isinstance(grad, Curvature) else grad
        natural = None if self.natural is None else self.natural.update(phi.detach(), grad.detach(), ())[0]
        return self._update(phi, grad, state, natural, 0.0)

    def _update(
        self, phi: Tensor, grad: Tensor, state: State, direct: Tensor | None, share: float
    ) -> tuple[Tensor, State]:
        phi, grad = phi.detach(), grad.detach()
        size = grad.abs().clamp(min=_SMALLEST).log() / -math.log(_SMALLEST)
        if self.network is None:
            raise ValueError(
                "Cannot refine with this LearnedUpdate because it has no network yet; try update.setup(family, "
                "num_features) first, as IterativeAmortizedGuide does."
            )
        parts = self.network(torch.cat([*state, phi, size, grad.sign()], -1)).split(phi.shape[-1], -1)
        keep = parts[0].sigmoid()
        new = keep * phi + (1 - keep) * parts[1]
        if direct is not None:
            new = new + (parts[2] + share).sigmoid() * (direct - phi)
        return new, state


_NEWTON_SHARE = 2.0
"""Logit of the share of a Newton step that a learned rule starts with."""

_SMALLEST = math.exp(-8.0)
"""Gradients below this, in nats, look like it to a learned rule."""
