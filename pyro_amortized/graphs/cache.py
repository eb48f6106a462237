"""Tensor programs traced once and run many times: the model's Python code and Pyro's handlers leave the loop.

A function of tensors that runs a Pyro model is recorded as a graph of tensor operations, simplified, and, if asked for,
compiled. The graph holds the model's parameters by reference, so that it follows their training, and gradients pass
through it to them. It is believed only for a use in which it has given the numbers of the function that it was traced
from: what the function does may depend on anything, and only running it tells. Where they differ, it is traced anew.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from pyro_amortized.graphs.recording import Function, is_random, outside, record
from pyro_amortized.structure.state import untouched

__all__ = ["Function", "GraphCache", "Use"]

_MAX_MISSES = 8
"""Uses in a row without a graph that agrees, after which tracing is given up: something changes in every call."""

_REPLACED = "some number, flag or tensor that it uses is replaced in every call (pass it as a tensor)"

_STRICT = 1e-5
"""Relative difference in single precision up to which a graph agrees in a use."""

_LOOSE = 1e-3
"""Tolerance in single precision of what is compared when a graph is made: second derivatives, regressions."""

_MAX_STATES = 4
"""States of a model, such as training and evaluation, for which graphs are kept beside each other."""


class Use:
    """One use of a function, which may be a loop of many calls: what it is called with first, and plainly gives there.

    Args:
        function: From tensors to a tuple of tensors.
        inputs: Tensors of the first call.
        draws: Position of the input that holds K draws in its first axis, if the first result is a mean over them, so
            that one draw tells whether a graph agrees.
        derivatives: Whether the results are differentiated, by the inputs or by tensors that the function uses.

    Attributes:
        results: The results of the first call, if a graph that agrees has given them.
    """

    def __init__(
        self, function: Function, inputs: Sequence[Tensor], draws: int | None = None, derivatives: bool = False
    ) -> None:
        self.function = function
        self.inputs = list(inputs)
        self.draws = None if draws is None or len(inputs[draws]) == 1 else draws
        self.derivatives = derivatives
        self.results: tuple[Tensor, ...] | None = None

    def leaves(self) -> list[Tensor]:
        """The inputs, of which the first can always be differentiated by."""
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in self.inputs]
        leaves[0].requires_grad_()
        return leaves

    @cached_property
    def _of_all(self) -> tuple[Tensor, ...]:
        return self._plainly(self.leaves())

    @cached_property
    def _of_one(self) -> tuple[Tensor, ...]:
        return self._plainly([x[:1] if i == self.draws else x for i, x in enumerate(self.leaves())])

    def _repeated(self) -> list[Tensor]:
        """The first draw in place of all: only numbers differ, so that no graph has to be compiled for it."""
        return [x[:1].expand_as(x).contiguous() if i == self.draws else x for i, x in enumerate(self.leaves())]

    def _plainly(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with untouched(), torch.set_grad_enabled(self.derivatives):
            return self.function(*inputs)

    def agrees(self, graph: Function, whole: bool, tolerance: float) -> bool:
        """Whether a graph gives the numbers of the function: for all draws, or for one.

        Args:
            graph: A graph of the function.
            whole: Whether to compare all draws and results.
            tolerance: In single precision, relative to the numbers of a row.
        """
        self.results = None
        if whole or self.draws is None:
            with untouched():  # what is random is run once more for the caller
                self.results = graph(*self.inputs)
            return _close(self.results, self._of_all, tolerance)
        return _close(graph(*self._repeated())[:1], self._of_one[:1], tolerance)

    @cached_property
    def touched(self) -> frozenset[int]:
        """The parameters by which the function's results can be differentiated, by ``id``."""
        outputs = self._of_all if "_of_all" in vars(self) else self._of_one
        return frozenset(map(id, _leaves(outputs)))

    def has_derivatives_of(self, graph: Function, captured: Sequence[Tensor]) -> bool:
        """Whether a graph has the function's gradients, with random cotangents.

        Args:
            graph: A graph of the function.
            captured: The tensors from outside that it uses.
        """
        gradients = []
        for candidate in (graph, self.function):
            with untouched(), torch.enable_grad():
                leaves = self.leaves()
                sources = [x for x in (*leaves, *captured) if x.requires_grad]
                gradients.append(_gradients(candidate(*leaves), sources))
        return _close(gradients[0], gradients[1], _LOOSE)


def _gradients(outputs: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    live = [x for x in outputs if x.requires_grad]
    if not live:
        return [torch.zeros_like(x) for x in sources]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in live]
    found = torch.autograd.grad(live, sources, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(sources, found, strict=True)]


def _leaves(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves from which results were computed, by autograd's own account."""
    pending: list[Any] = [x.grad_fn for x in outputs]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            pending += [source for source, _ in node.next_functions]


def _close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether results are equal up to rounding; read off the device once."""
    if [x.shape for x in actual] != [x.shape for x in expected]:
        return False
    return not actual or bool(
        torch.stack([_is_close(*pair, tolerance) for pair in zip(actual, expected, strict=True)]).all()
    )


def _is_close(actual: Tensor, expected: Tensor, tolerance: float) -> Tensor:
    """Whether no number differs by more than a part of its row, or of the median row, in which sums may cancel."""
    actual, expected = actual.detach(), expected.detach()
    tolerance = {torch.float64: 1e-8, torch.float32: tolerance}.get(expected.dtype, 2e-2)
    sizes = expected.abs().nan_to_num(0.0, 0.0)
    if sizes.dim() > 1 and sizes.numel():
        sizes = sizes.amax(-1, keepdim=True)
    least = sizes.median().clamp(min=0.1) if sizes.numel() else sizes
    close = (actual - expected).abs() <= tolerance * torch.maximum(sizes, least)
    return (close | ~(actual.isfinite() | expected.isfinite())).all()


@dataclass
class _Entry:
    """A graph, or None for a function that cannot be traced.

    Attributes:
        owner: The model that it was traced from.
        graph: What to run.
        captured: The tensors from outside that it uses.
        flags: Which of the inputs and of these require gradients.
        touched: Those by which the results can be differentiated.
        is_random: Whether it draws random numbers.
        is_differentiable: Whether it has the function's derivatives; None as long as they have not been compared.
    """

    owner: Any
    graph: Function | None = None
    captured: Sequence[Tensor] = ()
    flags: tuple[bool, ...] = ()
    touched: frozenset[int] = frozenset()
    is_random: bool = False
    is_differentiable: bool | None = None

    def flags_of(self, use: Use) -> tuple[bool, ...]:
        """What of a use decides which derivatives there are."""
        return tuple(x.requires_grad for x in (*use.inputs[1:], *self.captured))

    def serves(self, use: Use, whole: bool = False) -> bool:
        """Whether the graph gives the function's numbers in a use, from the tensors that the function now uses."""
        if self.graph is None or (use.derivatives and self.flags != self.flags_of(use)):
            return False
        if not use.agrees(self.graph, whole or self.is_random, _LOOSE if whole else _STRICT):
            return False
        if self.is_random:
            use.results = None  # the caller's run draws from the caller's generator
        if use.derivatives and self.is_differentiable is None:
            self.is_differentiable = use.has_derivatives_of(self.graph, self.captured)
            self.touched = use.touched & frozenset(map(id, self.captured))
        return not use.derivatives or self.touched <= use.touched


@dataclass
class _Known:
    """The graphs of a function, newest first, and how often it has been used and traced."""

    entries: list[_Entry] = field(default_factory=list)
    uses: int = 0
    traces: int = 0

    @property
    def is_due(self) -> bool:
        """Whether to try again where tracing was given up: rarer and rarer, and what was traced in the next use."""
        return self.uses > 1 and any(n & (n - 1) == 0 for n in (self.uses, self.uses - 1))


class GraphCache:
    """Keeps the graphs of functions of tensors by key.

    Args:
        compile: Whether to compile the graphs.
        max_size: Number of keys for which graphs are kept.
    """

    def __init__(self, compile: bool = False, max_size: int = 32) -> None:
        self.compile = compile
        self.max_size = max_size
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._misses = 0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are traced anew after loading."""
        return {**self.__dict__, "_known": OrderedDict(), "_misses": 0}

    def __deepcopy__(self, memo: Any) -> GraphCache:
        return GraphCache(self.compile, self.max_size)

    def find(self, key: Any, use: Use, owner: Any) -> Function | None:
        """A graph that gives the function's numbers in this use, traced if there is none.

        Args:
            key: What a graph depends on as far as can be seen: shapes, Python values, modes.
            use: The function, and the inputs of its first call.
            owner: The model.

        Returns:
            The graph, or None if the function should be called itself.
        """
        known = self._look_up(key)
        if self._misses > _MAX_MISSES and not known.is_due:
            self.warn(_REPLACED)
            return None
        for entry in [entry for entry in known.entries if entry.owner == owner]:
            if entry.graph is None or (use.derivatives and entry.is_differentiable is False):
                return None
            if _serves(entry, use):
                known.entries.sort(key=lambda other: other is not entry)
                self._misses = 0
                return self._permitted(entry, use)
        self._misses += 1
        if (self._misses > _MAX_MISSES or known.traces > _MAX_MISSES + known.uses // 16) and not known.is_due:
            self.warn(_REPLACED)
            return None
        entry, known.traces = self._trace(use, owner), known.traces + 1
        known.entries = [entry, *known.entries[: _MAX_STATES - 1]]
        return self._permitted(entry, use)

    def _look_up(self, key: Any) -> _Known:
        known = self._known.setdefault(key, _Known())
        self._known.move_to_end(key)
        if len(self._known) > self.max_size:
            self._known.popitem(last=False)
        known.uses += 1
        return known

    def _permitted(self, entry: _Entry, use: Use) -> Function | None:
        if use.derivatives and entry.is_differentiable is False:
            self.warn("it has derivatives that are written by hand")
            return None
        return entry.graph

    def _trace(self, use: Use, owner: Any) -> _Entry:
        try:
            recording = record(use.function, use.leaves())
            entry = _Entry(owner, recording.graph, recording.captured)
            entry.flags, entry.is_random = entry.flags_of(use), any(map(is_random, recording.graph.graph.nodes))
            entry.is_differentiable = None if recording.is_differentiable else False
            compiled = replace(entry, graph=_Compiled(recording.graph, self.warn))
            if not entry.serves(use, whole=True):
                raise ValueError("the traced graph gives other numbers")
        except Exception as error:  # models may do anything
            self.warn(_reason(error))
            return _Entry(owner)
        if not self.compile:
            return entry
        if _serves(compiled, use, whole=True) and compiled.is_differentiable == entry.is_differentiable:
            return compiled
        self.warn("the compiled graph gives other numbers")
        use.results = None
        return entry

    def warn(self, reason: str) -> None:
        """Warns once that what was to be compiled is not."""
        if self.compile and not self._warned:
            self._warned = True
            warnings.warn(
                f"compile=True has no effect because the model cannot be traced ({reason}); it runs uncompiled.",
                stacklevel=2,
            )


def _serves(entry: _Entry, use: Use, whole: bool = False) -> bool:
    try:
        return entry.serves(use, whole)
    except Exception:  # a graph may fail in any way where the model has changed; if the model fails, so will its run
        return False


def _reason(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error).strip().split("\n")[0][:200]
    if "_local_scalar_dense" in text:  # make_fx's words for it
        return "it reads values of tensors in Python"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


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
        self.captured = [getattr(graph, name) for name in outside(graph)]
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
        options = {"fallback_random": True} if any(map(is_random, module.graph.nodes)) else None
        # Elementwise results are computed again in the backward pass: storing the masks of ReLUs, as by default, takes
        # several times as long on CPUs.
        recomputing = torch._functorch.config.patch(aggressive_recomputation=True)
        try:
            with recomputing:
                return torch._inductor.compile(module, list(tensors), options=options)
        except Exception as error:  # a missing C++ compiler, or an operator that it cannot handle
            self.warn(_reason(error))
            return lambda *tensors: self.graph(*tensors[:number])


def _lifted(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with the tensors from outside as further inputs, in the order of :func:`outside`."""
    copied = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        known[node] = copied.placeholder(node.name)
    lifted = {name: copied.placeholder(f"captured{name}") for name in outside(graph)}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in lifted:
            known[node] = lifted[node.target]
        elif node not in known:
            known[node] = copied.node_copy(node, known.__getitem__)
            known[node].meta.clear()
    return fx.GraphModule(graph, copied)
