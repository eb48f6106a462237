"""Functions of a log-joint as functions of tensors alone, which can be traced once and run without effect handlers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_amortized.graphs.cache import Function, GraphCache, Use
from pyro_amortized.structure.cache import call_key

__all__ = ["run_traced"]


def run_traced(
    program: Callable[..., tuple[Tensor, ...]],
    log_joint: Any,
    inputs: Sequence[Tensor],
    settings: tuple[Any, ...],
    graphs: GraphCache | None,
    owner: Any,
    *,
    draws: int | None = None,
    derivatives: bool = False,
    verified: dict[Any, Function | None] | None = None,
) -> tuple[tuple[Tensor, ...], Function]:
    """Runs a program, by a graph if one can be had that agrees with it in this use.

    Args:
        program: A function of a log-joint and the inputs.
        log_joint: The log-joint of the call, a :class:`~pyro_amortized.objective.LocalLogJoint`.
        inputs: Tensors to run it with.
        settings: What else it depends on.
        graphs: Where to keep graphs; None not to trace.
        owner: The model, and what else is called.
        draws: Position of the input that holds draws in its first axis, if the first result is a mean over them.
        derivatives: Whether its results are differentiated.
        verified: The graphs that have been found in this use, where it runs programs of several shapes.

    Returns:
        The results, and a function of inputs of the same shapes, for the rest of the use.
    """
    call = _Tensors.of(log_joint)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        with pyro.validation_enabled(False):  # a step too far gives a value that is not taken
            return program(call.put_back(tensors[len(inputs) :], log_joint), *tensors[: len(inputs)])

    tensors = [_plain(tensor) for tensor in (*inputs, *call.tensors)]
    key = _key(program, log_joint, tensors, settings)
    if graphs is None or key is None:
        return function(*tensors), lambda *given: function(*given, *call.tensors)
    use, verified = Use(function, tensors, draws, derivatives), {} if verified is None else verified
    if key not in verified:
        verified[key] = graphs.find(key, use, owner)
    graph = verified[key] or function
    results = graph(*tensors) if use.results is None or graph is function else use.results
    return results, lambda *given: graph(*map(_plain, given), *tensors[len(inputs) :])


def _key(
    program: Callable[..., Any], log_joint: Any, tensors: Sequence[Tensor], settings: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """What a graph depends on as far as can be seen; None if it may depend on more than can be compared."""
    shapes = call_key((log_joint.call.args, dict(log_joint.call.kwargs)))
    scale = log_joint.layout.scale if log_joint.layout.is_scaled else 1.0
    if shapes is None or not log_joint.structure.is_static or isinstance(scale, Tensor):  # which would be a constant
        return None
    device = tensors[0].device.type
    modes = torch.get_default_dtype(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    model = getattr(log_joint.call.model, "__self__", log_joint.call.model)
    training = tuple(part.training for part in model.modules()) if isinstance(model, nn.Module) else ()
    frames = tuple(log_joint.structure.frames.values())
    mode = log_joint.vectorized or tuple((log_joint.copying.serves if log_joint.copying else {}).items())
    seen = (shapes, call_key(list(tensors)), frames, mode, modes, training, scale)
    return (program.__name__, *settings, *seen)


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
        call = log_joint.call
        parts = call.args, dict(call.kwargs), dict(call.structure.indices), dict(call.global_values)
        return cls(*tree_flatten(parts))

    def put_back(self, tensors: Sequence[Tensor], log_joint: Any) -> Any:
        """The log-joint of other tensors of the same shapes."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs, indices, values = tree_unflatten(leaves, self.spec)
        structure = replace(log_joint.structure, indices=indices, observed=None)
        call = replace(log_joint.call, args=args, kwargs=kwargs, structure=structure, global_values=values)
        same = log_joint.of_call(call)
        same.validate, same.selectable = False, False
        return same
