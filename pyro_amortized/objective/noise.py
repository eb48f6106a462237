"""Antithetic and orthogonal draws."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MOST_ORTHOGONAL", "orthogonal", "widened"]

MOST_ORTHOGONAL = 128
"""Dimensions up to which draws are made orthogonal, at a cost that grows with their cube."""


def orthogonal(noise: Tensor) -> Tensor:
    """Standard normal vectors ``(K, N, D)``, K at most D, turned to be orthogonal for each of N; lengths are kept."""
    q, r = torch.linalg.qr(widened(noise).permute(1, 2, 0))
    directions = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).permute(2, 0, 1)
    return (directions * noise.norm(dim=-1, keepdim=True)).to(noise)


def widened(tensor: Tensor) -> Tensor:
    """A tensor of a precision that linear algebra exists in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
