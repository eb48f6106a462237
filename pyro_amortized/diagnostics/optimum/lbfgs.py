"""L-BFGS for many small independent problems at once, one per row, each with its own step length and its own end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Minimum", "minimize_rows"]

RowFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points ``(n, P)``, rows ``(n,)``) -> values ``(n,)`` and gradients ``(n, P)`` of these rows' functions."""

_ARMIJO = 1e-4
_MAX_BACKTRACKS = 12
_GROWTH, _MAX_GROWTHS = 4.0, 10
"""By how much steps grow where there is no curvature, and how often before that counts as a stall."""


@dataclass
class Minimum:
    """Result of :func:`minimize_rows`.

    Attributes:
        x: Minimisers of shape ``(N, P)``.
        value: Values there, ``(N,)``.
        num_steps: Steps each row took, ``(N,)``.
        converged: Rows that ended because they no longer improved, ``(N,)``.
    """

    x: Tensor
    value: Tensor
    num_steps: Tensor
    converged: Tensor


class _History:
    """The last steps and gradient changes of every row, and the product with the inverse Hessian they imply."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.size = size
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.curvatures: list[Tensor] = []
        self.scale = torch.ones_like(like[:, :1])

    def push(self, rows: Tensor, step: Tensor, change: Tensor) -> Tensor:
        """Adds a pair for ``rows``; those without positive curvature, kept out of the product, are returned as True."""
        curvature = (step * change).sum(-1)
        good = curvature > 1e-10 * step.norm(dim=-1) * change.norm(dim=-1)
        inverse = torch.where(good, 1 / curvature.where(good, torch.ones_like(curvature)), 0.0)
        count = len(self.scale)
        for store, new in ((self.steps, step), (self.changes, change)):
            store.append(new.new_zeros(count, new.shape[1]).index_copy(0, rows, new))
        self.curvatures.append(inverse.new_zeros(count).index_copy(0, rows, inverse))
        scale = curvature / change.square().sum(-1).clamp(min=1e-30)
        self.scale[rows[good], 0] = scale[good]
        if len(self.steps) > self.size:
            for store in (self.steps, self.changes, self.curvatures):
                store.pop(0)
        return ~good & (step != 0).any(-1)

    def direction(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """The two-loop recursion (Nocedal 1980) for every row."""
        pairs = [
            (s[rows], y[rows], c[rows, None]) for s, y, c in zip(self.steps, self.changes, self.curvatures, strict=True)
        ]
        q, weights = gradient, []
        for step, change, curvature in reversed(pairs):
            weight = curvature * (step * q).sum(-1, keepdim=True)
            q = q - weight * change
            weights.append(weight)
        q = q * self.scale[rows]
        for (step, change, curvature), weight in zip(pairs, reversed(weights), strict=True):
            q = q + step * (weight - curvature * (change * q).sum(-1, keepdim=True))
        return -q


def minimize_rows(
    function: RowFunction,
    x: Tensor,
    *,
    history: int = 10,
    max_steps: int = 200,
    max_length: float = math.inf,
    tolerance: float = 1e-4,
    explore: bool = False,
    on_step: Callable[[int], None] = lambda finished: None,
) -> Minimum:
    """Minimises a function per row, each by L-BFGS with Armijo backtracking.

    A row ends when two steps running improve it by less than ``tolerance``; the function is evaluated no more for rows
    that have ended.

    Args:
        function: Values and gradients of some rows at given points.
        x: Starting points of shape ``(N, P)``.
        history: Number of steps remembered.
        max_steps: Limit on the number of steps.
        max_length: Longest step along any coordinate.
        tolerance: Smallest improvement worth a further step, in units of the function.
        explore: Whether steps grow where the function is not convex, as it is in heavy tails, before a row ends there.
        on_step: Called after each step with the number of rows that have ended.

    References:
        Updating Quasi-Newton Matrices with Limited Storage, Jorge Nocedal (1980).
    """
    x = x.clone()
    rows = torch.arange(len(x), device=x.device)
    value, gradient = function(x, rows)
    memory, stalls = _History(history, x), torch.zeros(len(x), dtype=torch.long, device=x.device)
    num_steps, failures, grown = torch.zeros_like(stalls), torch.zeros_like(stalls), torch.zeros_like(stalls)
    for step in range(max_steps):
        direction = memory.direction(rows, gradient[rows])
        if step == 0:
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1.0)
        uphill = (direction * gradient[rows]).sum(-1) >= 0
        direction = torch.where(uphill[:, None], -memory.scale[rows] * gradient[rows], direction)
        longest = direction.abs().amax(-1, keepdim=True)
        direction = direction * (max_length / longest).clamp(max=1.0)
        new_x, new_value, new_gradient = _line_search(function, x, value, gradient, direction, rows)
        bent = memory.push(rows, new_x - x[rows], new_gradient - gradient[rows])
        improvement = value[rows] - new_value
        promised = -0.5 * (direction * gradient[rows]).sum(-1)
        noise = tolerance + 1e-7 * value[rows].abs()
        failures[rows] += (new_x == x[rows]).all(-1) & ~(promised <= noise)
        x[rows], value[rows], gradient[rows] = new_x, new_value, new_gradient
        num_steps[rows] += 1
        stalled = (improvement < tolerance) & (promised <= 10 * noise)
        if explore:
            grown[rows] += bent & stalled
            memory.scale[rows[bent]] *= _GROWTH
            stalled &= ~bent | (grown[rows] > _MAX_GROWTHS)
        stalls[rows] = torch.where(stalled, stalls[rows] + 1, 0)
        rows = rows[(stalls[rows] < 2) & (failures[rows] < 3)]
        on_step(len(x) - len(rows))
        if len(rows) == 0:
            break
    return Minimum(x, value, num_steps, stalls >= 2)


def _line_search(
    function: RowFunction, x: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backtracks every row until it descends enough; rows that cannot stay where they are."""
    new_x, new_value, new_gradient = x[rows].clone(), value[rows].clone(), gradient[rows].clone()
    slope = (direction * gradient[rows]).sum(-1)
    length = torch.ones_like(slope)
    pending = torch.arange(len(rows), device=rows.device)
    for _ in range(_MAX_BACKTRACKS):
        candidate = x[rows[pending]] + length[pending, None] * direction[pending]
        trial, trial_gradient = function(candidate, rows[pending])
        start = value[rows[pending]]
        finite = trial.isfinite() & trial_gradient.isfinite().all(-1)
        passed = finite & (trial <= start + _ARMIJO * length[pending] * slope[pending])
        done = pending[passed]
        new_x[done], new_value[done], new_gradient[done] = candidate[passed], trial[passed], trial_gradient[passed]
        shrink = _interpolate(length[pending], slope[pending], trial - start)
        length[pending] *= torch.where(finite, shrink, 0.1)
        pending = pending[~passed]
        if len(pending) == 0:
            break
    return new_x, new_value, new_gradient


def _interpolate(length: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """The factor that takes a step to the minimum of the parabola through what is known, within [0.1, 0.5]."""
    rise = rise.nan_to_num(nan=1e30, posinf=1e30)
    return (-0.5 * slope * length / (rise - slope * length).clamp(min=1e-30)).clamp(0.1, 0.5)
