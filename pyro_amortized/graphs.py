"""Tensor programs traced once and run many times: the model's Python code and Pyro's handlers leave the loop.

A function of tensors that runs a Pyro model is recorded as a graph of tensor operations, simplified, and, if asked for,
compiled. The graph holds the model's parameters by reference, so that it follows their training, and gradients pass
through it to them. It is used only where that is safe: it must give the numbers and the derivatives of the function
that it was traced from, and is traced anew when anything that the model can reach (numbers, flags, tensors, submodules)
has been replaced since.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_amortized.guards import Guard, guards
from pyro_amortized.tracing import ValueReads

__all__ = ["GraphCache"]

Function = Callable[..., tuple[Tensor, ...]]
"""From tensors to a tuple of tensors."""

_MAX_MISSES = 8
"""Traces in a row without a hit after which tracing is given up: something changes in every call."""

_MAX_STATES = 4
"""States of a model, such as training and evaluation, for which graphs are kept beside each other."""


@dataclass
class _Entry:
    """A graph, or None for a function that cannot be traced, with the conditions under which it may be used."""

    graph: Function | None
    owner: Any
    guards: Sequence[Guard]
    calls: int = 0

    def is_valid(self, owner: Any) -> bool:
        """Whether nothing that the graph depends on has been replaced."""
        return self.owner == owner and all(guard.holds() for guard in self.guards)


class GraphCache:
    """Keeps the graphs of functions of tensors by key.

    Args:
        compile: Whether to compile the graphs.
        max_size: Number of graphs kept.
    """

    def __init__(self, compile: bool = False, max_size: int = 32) -> None:
        self.compile = compile
        self.max_size = max_size
        self._entries: OrderedDict[Any, list[_Entry]] = OrderedDict()
        self._misses = 0
        self._last_missed: Any = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are traced anew after loading."""
        return {**self.__dict__, "_entries": OrderedDict(), "_misses": 0}

    def __deepcopy__(self, memo: Any) -> GraphCache:
        return GraphCache(self.compile, self.max_size)

    def find(
        self, key: Any, function: Function, inputs: Sequence[Tensor], owner: Any, *, derivatives: bool = True
    ) -> Function | None:
        """A graph of ``function``, valid for inputs of these shapes.

        Args:
            key: What the graph depends on beside the state of ``owner``: shapes and Python values.
            function: What to trace.
            inputs: Tensors to trace it with.
            owner: The model, whose reachable state the graph depends on.
            derivatives: Whether the graph will be differentiated.

        Returns:
            The graph, or None if the function should be called itself.
        """
        known = self._entries.get(key, [])
        entry = next((entry for entry in known if entry.is_valid(owner)), None)
        if entry is not None:
            self._entries.move_to_end(key)
            self._misses = 0
            entry.calls += 1
            if entry.graph is not None and _is_due(entry.calls) and not self._agrees(entry.graph, function, inputs):
                self._give_up(entry, "its numbers change between calls for a reason that cannot be seen from outside")
            return entry.graph
        again, self._last_missed = key == self._last_missed and not known, key
        if self._misses > _MAX_MISSES and not again:
            return None
        self._misses += 1
        if self._misses > _MAX_MISSES and not again:
            self._warn("some number, flag or tensor that it uses is replaced in every call (pass it as a tensor)")
            return None
        entry = self._trace(function, inputs, owner, derivatives)
        self._entries[key] = [entry, *known[: _MAX_STATES - 1]]
        if len(self._entries) > self.max_size:
            self._entries.popitem(last=False)
        return entry.graph

    def _trace(self, function: Function, inputs: Sequence[Tensor], owner: Any, derivatives: bool) -> _Entry:
        try:
            with torch.enable_grad():
                graph, captured = trace(function, inputs)
            entry = _Entry(graph, owner, list(guards(owner, captured)))
            agrees = self._agrees(graph, function, inputs, derivatives)
        except Exception as error:  # models may do anything
            self._warn(_reason(error))
            return _Entry(None, owner, ())
        if not agrees:
            self._give_up(entry, "the traced graph gives other numbers")
        elif self.compile:
            entry.graph = _Compiled(graph, self._warn)
        return entry

    def _agrees(self, graph: Function, function: Function, inputs: Sequence[Tensor], derivatives: bool = False) -> bool:
        """Whether graph and function give the same numbers, and the same gradients with random cotangents."""
        results = []
        for candidate in (graph, function):
            with torch.random.fork_rng(), torch.set_grad_enabled(derivatives):
                leaves = [x.detach().requires_grad_(x.is_floating_point() and derivatives) for x in inputs]
                outputs = candidate(*leaves)
                results.append([*outputs, *(_gradients(outputs, leaves[:1], graph) if derivatives else ())])
        return all(_close(a, b) for a, b in zip(*results, strict=True))

    def _give_up(self, entry: _Entry, reason: str) -> None:
        entry.graph = None
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if self.compile and not self._warned:
            self._warned = True
            warnings.warn(
                f"compile=True has no effect because the model cannot be traced ({reason}); it runs uncompiled.",
                stacklevel=2,
            )


def _reason(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error).strip().split("\n")[0][:200]
    if "_local_scalar_dense" in text:  # make_fx's words for it
        return "it reads values of tensors in Python"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _is_due(calls: int) -> bool:
    """Whether to compare a graph with its function again: rarer and rarer, so that it costs nothing."""
    return calls & (calls - 1) == 0 if calls < 256 else calls % 256 == 0


def _close(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return all(x is None or not bool(x.any()) for x in (actual, expected))
    tolerance = 1e-8 if expected.dtype == torch.float64 else 1e-3
    size = expected.detach().abs().nan_to_num(posinf=0.0).max().item() if expected.numel() else 0.0
    return actual.shape == expected.shape and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance * max(size, 1.0), equal_nan=True
    )


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], graph: Any) -> Sequence[Tensor | None]:
    parameters = [p for p in _captured(graph) if p.requires_grad]
    live = [x for x in outputs if x.requires_grad]
    if not live:
        return [None] * (len(leaves) + len(parameters))
    cotangents = [torch.linspace(-1.0, 1.0, x.numel()).to(x).reshape(x.shape) for x in live]
    return torch.autograd.grad(live, [*leaves, *parameters], cotangents, allow_unused=True)


# Tracing


def trace(function: Function, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """Records a function of tensors as a graph, and simplifies it.

    Args:
        function: From tensors to a tuple of tensors; may take gradients inside.
        inputs: Tensors to run it with.

    Returns:
        The graph, and the tensors from outside that it uses.

    Raises:
        ValueError: If the function reads values of tensors in Python.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # not needed, and slow, where nothing is traced

    with torch.random.fork_rng(), ValueReads() as reads:
        graph = make_fx(function)(*(x.detach() for x in inputs))
        if _mutates(graph):  # such as dropout, which fills a new tensor with random numbers
            graph = make_fx(torch.func.functionalize(graph))(*(x.detach() for x in inputs))
    if reads.seen:
        raise ValueError("it reads values of tensors in Python")
    with torch.random.fork_rng(), torch.no_grad():
        _Simplifier(graph).run(inputs)
    return graph, _captured(graph)


_FOLDED = "_folded_"
_ATEN = torch.ops.aten
_SAME_SHAPE = {_ATEN.view.default, _ATEN.expand.default, _ATEN._unsafe_view.default, _ATEN.reshape.default}
_ALIASES = {_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default}
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
            derived = sources and all(source in self.constants for source in sources) and not _is_random(n)
            if n.op == "call_function" and (fresh or derived):
                self.constants[n] = value
        return value


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Simplifier:
    """Takes out of a graph what the handlers and autograd left in it without need.

    Constants are folded; views to the same shape, additions of zero and multiplications by one go, as do repeated
    operations. ``detach`` goes too: autograd records it for each value that it saves, and it would cut off second
    derivatives. Where a model detaches on purpose the graph then has other second derivatives, which the comparison
    with the function finds.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module = graph
        self.graph = graph.graph
        self.recorder = _Recorder(graph)

    def run(self, inputs: Sequence[Tensor]) -> None:
        """Simplifies in place."""
        if _mutates(self.module):
            raise ValueError("it changes tensors in place")
        self.recorder.run(*inputs)
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
        if target in _ALIASES or (target in _SAME_SHAPE and same):
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
            if node.op not in ("call_function", "get_attr") or _is_random(node) or node in self.recorder.constants:
                continue
            key = (node.op, node.target, repr(node.args), repr(node.kwargs))
            if seen.setdefault(key, node) is not node:
                node.replace_all_uses_with(seen[key])

    def _fold_constants(self) -> None:
        constants = self.recorder.constants
        for number, (node, value) in enumerate(constants.items()):
            if any(user not in constants for user in node.users):
                name = f"{_FOLDED}{number}"
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


# Compiling


class _Compiled:
    """A graph compiled by TorchInductor, once with and once without gradients as they are asked for.

    The tensors from outside become inputs, so that they stay live and gradients reach them.

    Args:
        graph: The graph.
        warn: Called with a reason if it cannot be compiled; the graph itself is run then.
    """

    def __init__(self, graph: fx.GraphModule, warn: Callable[[str], None]) -> None:
        self.graph = graph
        self.warn = warn
        self.captured = _captured(graph)
        self.variants: dict[Any, Function] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = (*(x.contiguous() for x in inputs), *self.captured)
        gradients = torch.is_grad_enabled() and tuple(x.requires_grad for x in tensors)
        compiled = self.variants.get(gradients)
        if compiled is None:
            compiled = self.variants[gradients] = self._compile(tensors)
        return compiled(*tensors)

    def _compile(self, tensors: Sequence[Tensor]) -> Function:
        import torch._functorch.config
        import torch._inductor

        module, number = _lifted(self.graph), len(tensors) - len(self.captured)
        # random operators, such as dropout's, must draw what they draw uncompiled
        options = {"fallback_random": True} if any(map(_is_random, module.graph.nodes)) else None
        # Elementwise results are computed again in the backward pass: storing the masks of ReLUs, as by default, takes
        # several times as long on CPUs.
        recomputing = torch._functorch.config.patch(aggressive_recomputation=True)
        try:
            with recomputing:
                return torch._inductor.compile(module, list(tensors), options=options)
        except Exception as error:  # a missing C++ compiler, or an operator that it cannot handle
            self.warn(_reason(error))
            return lambda *tensors: self.graph(*tensors[:number])


def _outside(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors from outside that a graph uses."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return sorted(name for name in names if not name.startswith(_FOLDED))


def _captured(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors from outside that a graph uses."""
    return [getattr(graph, name) for name in _outside(graph)]


def _lifted(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with the tensors from outside as further inputs, in the order of :func:`_outside`."""
    copied = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        known[node] = copied.placeholder(node.name)
    lifted = {name: copied.placeholder(f"captured{name}") for name in _outside(graph)}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in lifted:
            known[node] = lifted[node.target]
        elif node not in known:
            known[node] = copied.node_copy(node, known.__getitem__)
            known[node].meta.clear()
    return fx.GraphModule(graph, copied)
