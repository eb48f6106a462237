"""Recording a function of tensors as a graph that has the derivatives of the function, and simplifying it.

What is recorded are operators below autograd, those of gradients taken inside the function among them. Which operands
carry a derivative is read from autograd at every operator while it runs: where it says that one does not, however the
function brought that about (``detach``, ``data``, ``no_grad``), the graph gets a ``detach`` of its own. All else that
tensors are passed through to cut them off, such as the copies in which autograd saves values, leaves no trace. A graph
so made can be differentiated like the function, unless derivatives were written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_amortized.tracing import ValueReads

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
    with torch.random.fork_rng(), ValueReads() as reads, torch.enable_grad():
        graph = make_fx(watched)(*leaves)
    if reads.seen:
        raise ValueError("it reads values of tensors in Python")
    _join_leaves(graph)
    with torch.random.fork_rng(), torch.no_grad():
        in_place = _mutates(graph)
        if in_place:  # such as dropout, which fills a new tensor with random numbers
            graph = make_fx(torch.func.functionalize(graph))(*(x.detach() for x in leaves))
        simplifier = _Simplifier(graph, leaves)
        hidden = edges.hidden or (not in_place and simplifier.has_hidden_derivatives(leaves))
        simplifier.run()
    return Recording(graph, [getattr(graph, name) for name in outside(graph)], not hidden)


def outside(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors from outside that a graph uses."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return sorted(name for name in names if not name.startswith(FOLDED))


# What carries a derivative

_ATEN = torch.ops.aten
_DETACH, _ALIAS = _ATEN.detach.default, _ATEN.alias.default
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.grad_fn.__get__}  # type: ignore[attr-defined]
"""What changes derivatives, or lets one change them."""


class _Edges:
    """Writes into a graph, while it is recorded, which operands carry a derivative.

    Every operand that does not is recorded as ``detach`` of a value, every leaf, which has no derivative but by itself,
    as ``detach`` of that, and every ``detach`` met as an ``alias``.

    Attributes:
        hidden: Whether derivatives were met that the operators do not tell of.
    """

    def __init__(self) -> None:
        self.hidden = False
        self.inside = False
        self.cut: list[Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Edges:
        self._stack.enter_context(_Hooks(self))
        self._stack.enter_context(_Operands(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        self.cut.clear()

    def source(self, operand: Tensor) -> Any:
        """What autograd passes the derivatives of an operand on to: itself for a leaf, None for nothing."""
        if not (torch.is_grad_enabled() and operand.requires_grad):
            return None
        self.inside = True
        source = operand.grad_fn
        self.inside = False
        self.hidden |= isinstance(source, BackwardCFunction)
        return operand if source is None else source


class _Hooks(TorchFunctionMode):
    def __init__(self, edges: _Edges) -> None:
        super().__init__()
        self.edges = edges

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.edges.hidden |= func in _HOOKS and not self.edges.inside
        return func(*args, **(kwargs or {}))


class _Operands(TorchDispatchMode):
    def __init__(self, edges: _Edges) -> None:
        super().__init__()
        self.edges = edges

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DETACH:
            self.edges.cut.append(_ALIAS(args[0]))
            return self.edges.cut[-1]
        sources = {id(x): self.edges.source(x) for x in tree_leaves((args, kwargs)) if _is_continuous(x)}
        for target in filter(_is_continuous, _written(func, args, kwargs)):
            self._overwrite(target, sources)

        def operand(value: Any) -> Any:
            source = sources.get(id(value), func)
            marked = _DETACH(value) if source is None or source is value else value
            return _DETACH(marked) if source is value else marked

        return func(*tree_map(operand, args), **tree_map(operand, kwargs))

    def _overwrite(self, target: Tensor, sources: dict[int, Any]) -> None:
        """A tensor that is changed in place has the derivatives that autograd says it has."""
        if sources.pop(id(target)) is None:
            shared = any(_memory(x) == _memory(target) for x in self.edges.cut)
            self.edges.hidden |= target.requires_grad or shared  # the values change, and their derivatives do not
            if any(source is not None for source in sources.values()):
                _ATEN.copy_.default(target, _DETACH(target))


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


def _join_leaves(graph: fx.GraphModule) -> None:
    """Takes back the ``detach`` of leaves that come from outside; those made inside keep it."""
    for node in graph.graph.nodes:
        inner = node.args[0] if node.target is _DETACH else None
        if getattr(inner, "target", None) is _DETACH and inner.args[0].op in ("placeholder", "get_attr"):
            node.replace_all_uses_with(inner.args[0])
    graph.recompile()


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
        self.continuous: set[fx.Node] = set()
        self.constants: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = (value.shape, value.dtype)
            if _is_continuous(value):
                self.continuous.add(n)
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

    def _active(self, inputs: Sequence[Tensor], leaves: bool = False) -> set[fx.Node]:
        """The values that have derivatives by what comes from outside, or by leaves made inside."""
        placeholders, active = iter(inputs), set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                has_derivatives = next(placeholders).requires_grad
            elif node.op == "get_attr":
                has_derivatives = getattr(self.module, node.target).requires_grad
            elif node.target is _DETACH:
                has_derivatives = leaves and node.args[0].target is _DETACH
            else:
                has_derivatives = not active.isdisjoint(node.all_input_nodes)
            if has_derivatives:
                active.add(node)
        return active

    def has_hidden_derivatives(self, inputs: Sequence[Tensor]) -> bool:
        """Whether there are operands that carry a derivative which does not come from anywhere in the graph."""
        active = self._active(inputs, leaves=True)
        return any(
            source in self.recorder.continuous and source not in active
            for node in self.graph.nodes
            if node.op == "call_function" and node.target not in (_DETACH, _ALIAS)
            for source in node.all_input_nodes
            if source.target is not _DETACH
        )

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
