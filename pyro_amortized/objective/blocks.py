"""Log-joints by traced graphs, in blocks of rows of a few fixed sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_amortized.graphs.programs import run_traced

__all__ = ["InBlocks", "block_lengths"]

_SMALL, _LARGE = 256, 2048
"""Numbers of rows for which log-joints are traced."""


def block_lengths(total: int) -> list[int]:
    """Lengths of the blocks in which rows are evaluated, the last of them filled up."""
    lengths = []
    while total > 0:
        lengths.append(_LARGE if total > _LARGE // 2 else _SMALL)
        total -= lengths[-1]
    return lengths


def in_blocks(log_joint: Any, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Log-joints ``(K, N)`` and, if asked for, their gradients ``(K, N, D)``, without a graph of their own."""
    size = z.shape[1]
    flat, values, gradients = z.detach().flatten(0, 1), [], []
    program = _value_and_gradient if gradient else _value_alone
    start = 0
    for length in block_lengths(len(flat)):
        rows = torch.arange(start, start + length).clamp(max=len(flat) - 1)
        part = log_joint.cut(rows % size)
        inputs = [flat[rows].unsqueeze(0)]
        owner, graphs = part.call.model, part.graphs
        results, _ = run_traced(program, part, inputs, (), graphs, owner, verified=log_joint.verified)
        left = len(flat) - start
        values.append(results[0][0, :left])
        gradients += [grad[0, :left] for grad in results[1:]]
        start += length
    grads = torch.cat(gradients).reshape(z.shape) if gradients else z.new_empty(0)
    return torch.cat(values).reshape(z.shape[:2]), grads


class InBlocks(torch.autograd.Function):
    """:func:`in_blocks` as a function of z that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_joint: Any) -> Tensor:
        """Keeps the gradient, which comes with the values at little further cost."""
        values, gradient = in_blocks(log_joint, z, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        """Scales the gradient."""
        return ctx.saved_tensors[0] * cotangents[0].unsqueeze(-1), None


def _value_alone(log_joint: Any, z: Tensor) -> tuple[Tensor, ...]:
    return (log_joint.plain(z),)


def _value_and_gradient(log_joint: Any, z: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_joint.plain(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient
