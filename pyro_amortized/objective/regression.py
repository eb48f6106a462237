"""The gradient and the curvature of the expected log-joint, by regression on its values and gradients at draws."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ridge"]


_PRIOR_DRAWS = 3.0
"""What the ridge counts for, in draws, where the draws tell nothing of each other; it is less where they do."""


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Coefficients ``(N, D, D)`` of a regression of y on x, both ``(N, K, D)`` and centred, shrunk towards zero.

    They are shrunk in proportion to the share of the variance of y that each draw's own prediction, without it, leaves
    unexplained.
    """
    gram, cross, eye = x.mT @ x, x.mT @ y, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky_ex(gram + _PRIOR_DRAWS * eye)[0]
    leverage = (x * torch.cholesky_solve(x.mT, factor).mT).sum(-1, keepdim=True) + 1.0 / x.shape[1]
    left_out = (y - x @ torch.cholesky_solve(cross, factor)) / (1.0 - leverage).clamp(min=0.05)
    unexplained = left_out.square().sum((-2, -1)) / y.square().sum((-2, -1)).clamp(min=1e-30)
    draws = _PRIOR_DRAWS * unexplained.clamp(0.01, 1.0)
    return torch.cholesky_solve(cross, torch.linalg.cholesky_ex(gram + draws[:, None, None] * eye)[0])
