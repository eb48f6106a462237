"""Recording a function of tensors as a graph that has the derivatives of the function, and simplifying it.

What is recorded are operators below autograd, those of gradients taken inside the function among them. Which operands
carry a derivative is read from autograd at every operator while it runs: where it says that one does not, however the
function brought that about (``detach``, ``data``, ``no_grad``), the graph gets a ``detach`` of its own. All else that
tensors are passed through to cut them off, such as the copies in which autograd saves values, leaves no trace. A graph
so made can be differentiated like the function, unless derivatives were written by hand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_amortized.graphs.reads import ValueReads
from pyro_amortized.structure.state import untouched

__all__ = ["FOLDED", "Function", "Recording", "is_random", "outside", "record"]

Function = Callable[..., tuple[Tensor, ...]]
"""From tensors to a tuple of tensors."""

FOLDED = "_folded_"
"""Prefix of the names of a graph's own constants."""


@dataclass
class Recording:
    """A function as a graph.

    Attributes:
        graph: The graph.
        captured: The tensors from outside that it uses.
        is_differentiable: Whether differentiating it differentiates the function, as far as can be seen.
    """

    graph: fx.GraphModule
    captured: list[Tensor]
    is_differentiable: bool


def record(function: Function, inputs: Sequence[Tensor]) -> Recording:
    """Records a function of tensors as a graph, and simplifies it.

    Args:
        function: From tensors to a tuple of tensors; may take gradients inside.
        inputs: Tensors to run it with. Those that require gradients can be differentiated by.

    Raises:
        ValueError: If the function reads values of tensors in Python, or changes tensors from outside.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # not needed, and slow, where nothing is traced

    edges = _Edges()

    def watched(*tensors: Tensor) -> tuple[Tensor, ...]:
        with edges:
            return function(*tensors)

    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    with untouched(), ValueReads() as reads, torch.enable_grad():
        random.seed(1)  # what is drawn outside of torch becomes a constant, which shows by being another than at hand
        np.random.seed(1)
        graph = make_fx(watched)(*leaves)
    if reads.seen:
        raise ValueError("it reads values of tensors in Python")
    with untouched(), torch.no_grad():
        if _mutates(graph):  # such as dropout, which fills a new tensor with random numbers
            graph = make_fx(torch.func.functionalize(graph))(*(x.detach() for x in leaves))
        _Simplifier(graph, leaves).run()
    return Recording(graph, [getattr(graph, name) for name in outside(graph)], not edges.hidden)


def outside(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors from outside that a graph uses."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return sorted(name for name in names if not name.startswith(FOLDED))


# What carries a derivative

_ATEN = torch.ops.aten
_DETACH, _ALIAS = _ATEN.detach.default, _ATEN.alias.default
_HOOKS = {
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    vars(torch._C.TensorBase)["grad_fn"].__get__,
}
"""What changes derivatives, or lets one change them."""


class _Edges:
    """Writes into a graph, while it is recorded, which operands carry a derivative.

    Every operand that does not, although it depends on what has derivatives, is recorded as ``detach`` of a value, and
    every ``detach`` met as an ``alias``.

    Attributes:
        hidden: Whether derivatives were met that the operators do not tell of.
    """

    def __init__(self) -> None:
        self.hidden = False
        self.looking = False
        self.detached: dict[int, Tensor] = {}
        self.dependent: set[Any] = set()
        self.carrying: set[Any] = set()
        self._stack = ExitStack()

    def __enter__(self) -> _Edges:
        self._stack.enter_context(_Hooks(self))
        self._stack.enter_context(_Operands(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        self.detached.clear()

    def alias(self, value: Tensor) -> Tensor:
        """What stands for a ``detach``."""
        if value.requires_grad:
            self.dependent.add(_memory(value))
        result = _ALIAS(value)
        self.detached[id(result)] = result
        return result

    def carries(self, operand: Tensor) -> bool:
        """Whether an operand's derivative goes to where the operand came from."""
        if not (torch.is_grad_enabled() and operand.requires_grad):
            return False
        self.looking = True
        source: Any = operand.grad_fn
        self.looking = False
        if source is None:  # a leaf: from outside, or made of a value of the graph
            return id(operand) not in self.detached
        self.hidden |= isinstance(source, BackwardCFunction) or _memory(operand) not in self.carrying
        return True

    def depends(self, operand: Tensor) -> bool:
        """Whether an operand depends on something that has derivatives."""
        return operand.requires_grad or _memory(operand) in self.dependent

    def note(self, results: Sequence[Tensor], differentiable: bool, dependent: bool) -> None:
        """Takes down what operands passed on to results."""
        places = set(map(_memory, results))
        self.carrying |= places if differentiable else set()
        self.dependent |= places if dependent else set()


class _Hooks(TorchFunctionMode):
    def __init__(self, edges: _Edges) -> None:
        super().__init__()
        self.edges = edges

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.edges.hidden |= func in _HOOKS and not self.edges.looking
        return func(*args, **(kwargs or {}))


class _Operands(TorchDispatchMode):
    def __init__(self, edges: _Edges) -> None:
        super().__init__()
        self.edges = edges

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DETACH:
            return self.edges.alias(args[0])
        args, kwargs = tuple(args), kwargs or {}
        operands = list(filter(_is_continuous, tree_leaves((args, kwargs))))
        carried = {id(x) for x in operands if self.edges.carries(x)}
        cut = {id(x) for x in operands if id(x) not in carried and self.edges.depends(x)}
        written = list(filter(_is_continuous, _written(func, args, kwargs)))
        for target in written:
            self._overwrite(target, cut, carried)
        if cut:
            args, kwargs = tree_map(lambda x: _DETACH(x) if id(x) in cut else x, (args, kwargs))
        results = func(*args, **kwargs)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
        self.edges.note([*filter(_is_continuous, tree_leaves(results)), *written], differentiable, bool(carried or cut))
        return results

    def _overwrite(self, target: Tensor, cut: set[int], carried: set[int]) -> None:
        """A tensor that is changed in place has the derivatives that autograd says it has."""
        if id(target) in carried:
            return
        shared = any(_memory(x) == _memory(target) for x in self.edges.detached.values())
        self.edges.hidden |= target.requires_grad or shared  # the values change, and their derivatives do not
        if carried and id(target) in cut:
            _ATEN.copy_.default(target, _DETACH(target))
        cut.discard(id(target))


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The operands that an operator changes in place."""
    found: list[Any] = []
    for position, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[position] if position < len(args) else kwargs.get(argument.name))
    return [value for value in found if isinstance(value, Tensor)]


def _is_continuous(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _memory(tensor: Tensor) -> Any:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


# Simplifying

_SAME_SHAPE = {_ATEN.view.default, _ATEN.expand.default, _ATEN._unsafe_view.default, _ATEN.reshape.default}
_ALIASES = {_ALIAS, _ATEN.lift_fresh.default}
_FILLS = {
    getattr(_ATEN, name).default
    for name in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "zeros", "ones", "full")
} | {_ATEN.scalar_tensor.default}


_COMMUTATIVE = {_ATEN.add.Tensor, _ATEN.mul.Tensor}
_NEUTRAL: dict[Any, int] = {
    _ATEN.add.Tensor: 0,
    _ATEN.sub.Tensor: 0,
    _ATEN.mul.Tensor: 1,
    _ATEN.div.Tensor: 1,
    _ATEN.pow.Tensor_Scalar: 1,
}
"""Second arguments that change nothing."""


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shapes and dtypes of all values, and those values that are constant."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}
        self.constants: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = (value.shape, value.dtype)
            sources = n.all_input_nodes
            fresh = n.target is _ATEN.lift_fresh_copy.default or n.target in _FILLS
            derived = sources and all(source in self.constants for source in sources) and not is_random(n)
            if n.op == "call_function" and (fresh or derived):
                self.constants[n] = value
        return value


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Simplifier:
    """Takes out of a graph what the handlers and autograd left in it without need.

    Constants are folded; views to the same shape, additions of zero and multiplications by one go, as do repeated
    operations, and each ``detach`` of what has no derivative.

    Args:
        graph: The graph.
        inputs: Tensors to run it with; those that require gradients can be differentiated by.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        if _mutates(graph):
            raise ValueError("it changes tensors in place")
        self.module = graph
        self.graph = graph.graph
        self.recorder = _Recorder(graph)
        self.recorder.run(*inputs)
        self.active = self._active(inputs)

    def _active(self, inputs: Sequence[Tensor]) -> set[fx.Node]:
        """The values that have derivatives."""
        placeholders, active = iter(inputs), set[fx.Node]()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                has_derivatives = next(placeholders).requires_grad
            elif node.op == "get_attr":
                has_derivatives = getattr(self.module, node.target).requires_grad
            else:
                has_derivatives = node.target is not _DETACH and not active.isdisjoint(node.all_input_nodes)
            if has_derivatives:
                active.add(node)
        return active

    def run(self) -> None:
        """Simplifies in place."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self.recorder.constants:
                self._rewrite(node)
        self._merge_repeated()
        self._fold_constants()
        self.graph.eliminate_dead_code()
        self.module.recompile()

    def _rewrite(self, node: fx.Node) -> None:
        """Puts what a node stands for in its place, if something simpler does."""
        target, args = node.target, node.args
        same = bool(args) and self._same_shape(node, args[0])
        replacement: Any = None
        useless = target is _DETACH and args[0] not in self.active
        if useless or target in _ALIASES or (target in _SAME_SHAPE and same):
            replacement = args[0]
        elif target in (_ATEN.t.default, _ATEN.neg.default) and getattr(args[0], "target", None) is target:
            replacement = args[0].args[0]  # type: ignore[union-attr]
        elif target is _ATEN.copy.default and same and self._same_shape(node, args[1]):
            replacement = args[1]  # functionalisation's form of an assignment, which has no derivative
        elif target in _NEUTRAL and not node.kwargs:
            if same and self._is(args[1], _NEUTRAL[target]):
                replacement = args[0]
            elif target in _COMMUTATIVE and self._same_shape(node, args[1]) and self._is(args[0], _NEUTRAL[target]):
                replacement = args[1]
        if replacement is not None:
            node.replace_all_uses_with(replacement)
        elif target in (_ATEN.mul.Tensor, _ATEN.div.Tensor) and same and self._is(args[1], -1):
            node.target, node.args = _ATEN.neg.default, args[:1]

    def _same_shape(self, node: fx.Node, other: Any) -> bool:
        shapes = self.recorder.shapes
        return isinstance(other, fx.Node) and node in shapes and shapes[node] == shapes.get(other)

    def _is(self, value: Any, number: float) -> bool:
        """Whether an argument is this number everywhere."""
        if isinstance(value, fx.Node):
            constant = self.recorder.constants.get(value)
            return constant is not None and bool((constant == number).all())
        return value == number

    def _merge_repeated(self) -> None:
        seen: dict[Any, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "get_attr") or is_random(node) or node in self.recorder.constants:
                continue
            key = (node.op, node.target, repr(node.args), repr(node.kwargs))
            if seen.setdefault(key, node) is not node:
                node.replace_all_uses_with(seen[key])

    def _fold_constants(self) -> None:
        constants = self.recorder.constants
        for number, (node, value) in enumerate(constants.items()):
            if any(user not in constants for user in node.users):
                name = f"{FOLDED}{number}"
                self.module.register_buffer(name, _compact(value), persistent=False)
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self.graph.get_attr(name))


def _mutates(graph: fx.GraphModule) -> bool:
    """Whether a graph changes tensors in place."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _compact(value: Tensor) -> Tensor:
    """A constant; one that is the same everywhere takes the memory of a number."""
    value = value.detach()
    if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
        return value.flatten()[0].clone().expand(value.shape)
    return value
