"""Functions of a log-joint as functions of tensors alone, which can be traced once and run without effect handlers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_amortized.graphs import Function, GraphCache
from pyro_amortized.tracing import call_key

__all__ = ["traced"]


def traced(
    program: Callable[..., tuple[Tensor, ...]],
    log_joint: Any,
    inputs: Sequence[Tensor],
    settings: tuple[Any, ...],
    graphs: GraphCache | None,
    owner: Any,
    *,
    derivatives: bool = True,
) -> tuple[Function, list[Tensor]]:
    """A program as a function of its inputs and of the tensors of a call: traced if that can be done.

    Args:
        program: A function of a log-joint and the inputs.
        log_joint: The log-joint of the call, a :class:`~pyro_amortized.log_joint.LocalLogJoint`.
        inputs: Tensors of the shapes that it will be run with.
        settings: What else it depends on.
        graphs: Where to keep graphs; None not to trace.
        owner: What reachable state it depends on.
        derivatives: Whether its results are differentiated.

    Returns:
        The function, and the tensors of the call that follow its inputs.
    """
    call = _Tensors.of(log_joint)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        with pyro.validation_enabled(False):  # a step too far gives a value that is not taken
            return program(call.put_back(tensors[len(inputs) :], log_joint), *tensors[: len(inputs)])

    shapes = call_key((log_joint.args, dict(log_joint.kwargs)))
    if graphs is not None and shapes is not None and log_joint.structure.is_static:
        frames = tuple(log_joint.structure.frames.values())
        modes = (log_joint.vectorized, torch.get_default_dtype(), torch.is_autocast_enabled())
        scale = log_joint.layout.scale if log_joint.layout.is_scaled else 1.0
        key = (program.__name__, *settings, shapes, call_key([*inputs, *call.tensors]), frames, modes, scale)
        fixed = not isinstance(scale, Tensor)  # a number that a tensor holds would be traced as a constant
        tensors = [_plain(tensor) for tensor in (*inputs, *call.tensors)]
        graph = graphs.find(key, function, tensors, owner, derivatives=derivatives) if fixed else None
        if graph is not None:
            return lambda *given: graph(*map(_plain, given)), call.tensors
    return function, call.tensors


def _plain(tensor: Tensor) -> Tensor:
    """A tensor without the strides of an expanded or transposed one, on which views in a graph depend."""
    return tensor.contiguous() if tensor.layout == torch.strided else tensor


class _Tensors:
    """The tensors among a call's arguments, indices and global values, apart from everything else."""

    def __init__(self, leaves: list[Any], spec: Any) -> None:
        self.leaves = leaves
        self.spec = spec
        self.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self.positions]

    @classmethod
    def of(cls, log_joint: Any) -> _Tensors:
        """Takes a log-joint's call apart."""
        parts = (tuple(log_joint.args), dict(log_joint.kwargs), dict(log_joint.structure.indices))
        return cls(*tree_flatten((*parts, log_joint.global_values)))

    def put_back(self, tensors: Sequence[Tensor], log_joint: Any) -> Any:
        """The log-joint of other tensors of the same shapes."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs, indices, global_values = tree_unflatten(leaves, self.spec)
        structure = replace(log_joint.structure, indices=indices, observed=None)
        same = log_joint.of_call(args, kwargs, structure, global_values)
        same.validate, same.selectable = False, False
        return same
