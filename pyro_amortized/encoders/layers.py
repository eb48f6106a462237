"""Layers that steps of Adam at any usual learning rate leave steady."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_amortized.encoders.standardize import FAR

__all__ = ["LEAST_NORMALIZED", "Head", "hidden_layers"]


def hidden_layers(
    input_dim: int, hidden_dims: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU
) -> nn.Sequential:
    """Linear layers, each normalised over its units and followed by an activation.

    Without the normalisation a step of Adam, which moves all weights alike, moves the last layer by the product of what
    it moves each of them.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise((input_dim, *hidden_dims)):
        norm = [nn.LayerNorm(after)] if after >= LEAST_NORMALIZED else []
        layers += [nn.Linear(before, after), *norm, activation()]
    return nn.Sequential(*layers)


LEAST_NORMALIZED = 8
"""Layers of fewer units are not normalised: little would be left of what they hold."""


class Head(nn.Linear):
    r"""The linear layer from features to variational parameters, :math:`\phi = b + W f / (r \sqrt{H})`.

    r is the root mean square of the features at first. A step of Adam at learning rate :math:`\eta` moves an output by
    up to :math:`\eta \sqrt{H}` so, whatever the scale of the features, where a plain layer moves by
    :math:`\eta \sum_h |f_h|`; and at the start outputs differ little from b. Features of a datapoint whose norm exceeds
    :math:`5 r \sqrt{H}`, as an outlier's, or when the encoder is about to diverge, go on as a logarithm of it.

    Args:
        features: The features of the first call, ``(..., H)``.
        num_outputs: Number of outputs.
        room: A factor of that limit, for features that are not normalised and grow with the data.
    """

    size: Tensor
    limits: Tensor

    def __init__(self, features: Tensor, num_outputs: int, room: float = 1.0) -> None:
        num_features = features.shape[-1]
        super().__init__(num_features, num_outputs, dtype=features.dtype, device=features.device)
        self.room = room
        size = features.detach().square().mean().sqrt() * num_features**0.5
        self.register_buffer("size", torch.where(size > 0, size, num_features**0.5))
        unit = room * self.size
        self.register_buffer("limits", torch.stack([FAR * unit, (FAR - 1.0) * unit, FAR - unit.log()]))

    def forward(self, features: Tensor) -> Tensor:
        """Outputs ``(..., P)`` of features ``(..., H)``."""
        far, near, offset = self.limits.unbind()  # log_shrinkage(norm / (room size)) / size, in fewer operations
        norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=far)
        shrinkage = ((norm - near).log() + offset) / norm
        scaled = features * (shrinkage if self.room == 1.0 else self.room * shrinkage)
        output = F.linear(scaled, self.weight, self.bias)
        return output.to(self.weight.dtype)  # under autocast, where it has fewer digits than scales need
