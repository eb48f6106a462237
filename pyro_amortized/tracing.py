"""Running a Pyro model apart from the caller, and learning from one run what its structure is.

Everything that runs the user's model outside the caller's own inference goes through :func:`run_model`: with Pyro's
handlers and plate dimensions set aside, with given values for some of its sites. Guides use it to see the plates, the
subsample indices and the observed values of a call, diagnostics to evaluate log-joints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace, runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "PlateFrame",
    "call_key",
    "find_source",
    "isolated",
    "probe",
    "read_source",
    "run_model",
    "sample_sites",
    "size_at",
    "subsample_indices",
    "versions",
    "without_floats",
]

Site = dict[str, Any]


@contextmanager
def isolated() -> Iterator[None]:
    """Sets the caller's Pyro handlers and plate dimensions aside, and puts them back at the end."""
    stack, dims, enumeration = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack, vars(runtime._ENUM_ALLOCATOR)
    saved = stack[:], dims[:], dict(enumeration)
    stack[:], dims[:] = [], []
    try:
        yield
    finally:
        stack[:], dims[:] = saved[:2]
        enumeration.update(saved[2])


class _Substitute(Messenger):
    """Gives sites their values: latent ones, and the indices of subsampled plates."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class _PlateKinds(Messenger):
    """Notes for each plate how its indices come about, which the finished trace does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):  # type: ignore[arg-type]
            size = msg["fn"].subsample_size
            if msg["value"] is not None:
                kind = "explicit"
            else:
                kind = "full" if size is None or size >= msg["fn"].size else "random"
            self.kinds[msg["name"]] = kind


def run_model(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    handlers: Sequence[Any] = (),
) -> Trace:
    """Runs a model once with the caller's handlers set aside.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values for latent sites, and indices for subsampled plates, by name.
        handlers: Further handlers to put around the model, outermost first, inside those that give values.

    Returns:
        The trace, without log-probabilities.

    Raises:
        ValueError: If a plate of the model is empty.
    """
    with isolated(), ExitStack() as stack:
        tracer = stack.enter_context(poutine.trace())
        for handler in (_Substitute(values or {}), *handlers):
            stack.enter_context(handler)
        try:
            model(*args, **kwargs)
        except ZeroDivisionError as error:
            if "size cannot be zero" not in str(error):
                raise
            raise ValueError(
                "Cannot run the model on an empty batch because one of its plates then has size zero; "
                "try skipping empty batches."
            ) from error
    return tracer.trace


@dataclass(frozen=True)
class PlateFrame:
    """A vectorised plate as one run of the model showed it.

    Attributes:
        name: Name of the plate.
        dim: Its batch dimension, negative.
        size: Number of datapoints in this run.
        full_size: Number of datapoints in all.
        kind: ``"full"``, ``"explicit"`` (``subsample=``), ``"random"`` (``subsample_size=``), or ``"unsized"``.
    """

    name: str
    dim: int
    size: int
    full_size: int
    kind: str

    @property
    def subsampled(self) -> bool:
        """Whether the plate holds a part of its datapoints."""
        return self.kind in ("explicit", "random")

    def create(self, indices: Tensor | None = None) -> pyro.plate:
        """A plate like this one, with the given indices if it is subsampled explicitly."""
        if self.kind == "unsized":
            return pyro.plate(self.name, dim=self.dim)
        if self.kind == "explicit":
            return pyro.plate(self.name, self.full_size, subsample=indices, dim=self.dim)
        return pyro.plate(self.name, self.full_size, subsample_size=self.size, dim=self.dim)


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace without those that only draw the indices of a plate."""
    nodes: dict[str, Any] = trace.nodes
    return {name: site for name, site in nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}


def plate_frames(trace: Trace, kinds: Mapping[str, str]) -> dict[str, PlateFrame]:
    """The vectorised plates in a trace by name, outermost first within each site.

    Raises:
        ValueError: If a latent or observed site lies in a sequential plate.
    """
    frames: dict[str, PlateFrame] = {}
    for name, site in sample_sites(trace).items():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                raise ValueError(
                    f"Cannot build a guide for site {name!r} because it lies in the sequential plate {frame.name!r}; "
                    f"try the vectorised form, `with pyro.plate({frame.name!r}, ...):`."
                )
            size, full_size, kind = frame.size, frame.full_size, kinds.get(frame.name, "unsized")
            if kind == "unsized":
                size = full_size = max(size_at(site, frame.dim), getattr(frames.get(frame.name), "size", 1))
            frames[frame.name] = PlateFrame(frame.name, frame.dim, int(size), int(full_size), kind)
    return frames


def size_at(site: Site, dim: int) -> int:
    """Size of a site's batch shape at a dimension, 1 where it has none."""
    shape = site["fn"].batch_shape
    return shape[dim] if len(shape) >= -dim else 1


def subsample_indices(trace: Trace, frames: Mapping[str, PlateFrame]) -> dict[str, Tensor]:
    """The indices of the subsampled plates, by name, each of shape ``(size,)``."""
    return {name: torch.as_tensor(trace.nodes[name]["value"]) for name, frame in frames.items() if frame.subsampled}


_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _reads_values(func: Any, args: Any) -> bool:
    """Whether the result of an operator, or its shape, is decided by values outside the graph of tensors."""
    if func.overloadpacket is torch.ops.aten.index:  # only a mask gives a shape that depends on values
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _VALUE_TAGS.isdisjoint(func.tags)


@dataclass(frozen=True)
class Rows:
    """Rows that were taken from a tensor, ``result = source.index_select(dim, index)``."""

    result: Tensor
    source: Tensor
    dim: int
    index: Tensor

    def made(self, value: Tensor) -> bool:
        """Whether a tensor is the result, unchanged."""
        if value.is_inference():  # which does not tell whether it was changed
            return False
        return (self.result is value or _same_memory(self.result, value)) and value._version == 0


def _rows(func: Any, args: Any, result: Any) -> Rows | None:
    """What an operator took from where, if it took rows along one dimension."""
    if func is torch.ops.aten.index_select.default:
        return Rows(result, args[0], args[1] % args[0].dim(), args[2])
    if func is torch.ops.aten.index.Tensor:
        given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
        if len(given) == 1 and given[0][1].dim() == 1 and given[0][1].dtype == torch.long:
            return Rows(result, args[0], *given[0])
    return None


_PYTHON_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class ValueReads:
    """Watches whether code lets the values of tensors decide what Python does.

    If it does not, then two calls with arguments of equal shapes have equal structure, and the structure of the first
    may be kept for the second.

    Attributes:
        seen: Whether a tensor's value was read.
        rows: The rows that were taken from tensors.
    """

    def __init__(self) -> None:
        self.seen = False
        self.rows: list[Rows] = []
        self._stack = ExitStack()

    def __enter__(self) -> ValueReads:
        self._stack.enter_context(_PythonReads(self))
        self._stack.enter_context(_OperatorReads(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


class _PythonReads(TorchFunctionMode):
    def __init__(self, watch: ValueReads) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.seen |= func in _PYTHON_READS
        return func(*args, **(kwargs or {}))


class _OperatorReads(TorchDispatchMode):
    def __init__(self, watch: ValueReads) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.seen |= _reads_values(func, args)
        result = func(*args, **(kwargs or {}))
        rows = _rows(func, args, result)
        if rows is not None:
            self.watch.rows.append(rows)
        return result


def call_key(value: Any) -> Any:
    """What of a call's arguments may decide the structure, hashable: shapes of tensors, values of everything else.

    Returns:
        A key, or None if the value holds something whose influence cannot be seen from outside.
    """
    if isinstance(value, Tensor):
        return _known_shape(value), value.dtype, value.device, value.layout
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        keys = tuple(map(call_key, value))
        return None if any(key is None for key in keys) else (type(value), keys)
    return None


def _known_shape(value: Tensor) -> torch.Size:
    """A shape that can be compared: inside ``torch.jit.trace`` its sizes are tensors, which equal no others."""
    if not torch._C._get_tracing_state():
        return value.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.Size([int(size) for size in value.shape])


def without_floats(key: Any) -> Any:
    """A key of :func:`call_key` without the values of floats, such as those of an annealing schedule."""
    if not isinstance(key, tuple) or isinstance(key, torch.Size):
        return key
    return (float,) if len(key) == 2 and key[0] is float else tuple(map(without_floats, key))


@dataclass(frozen=True)
class Source:
    """Where in the arguments a tensor lies.

    Attributes:
        path: Keys that lead to the argument.
        shape: The shape to view it in.
        rows: For a part of it, of what, along which dimension, and the plate whose indices say which rows.
    """

    path: tuple[Any, ...]
    shape: torch.Size
    rows: tuple[Source, int, str] | None = None


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(child, (*path, key))


def versions(arguments: Any) -> list[int]:
    """How often each tensor among the arguments has been changed in place."""
    return [leaf._version for _, leaf in _leaves(arguments) if not leaf.is_inference()]


def find_source(
    value: Tensor, arguments: Any, rows: Sequence[Rows] = (), plates: Mapping[str, Tensor] | None = None
) -> Source | None:
    """Finds the argument that a tensor is, or is a reshaped view of, or holds the rows of at a plate's indices.

    Args:
        value: A tensor met in the model.
        arguments: The model's arguments, nested in lists, tuples and dicts.
        rows: The rows that the model took from tensors.
        plates: Indices of plates by name.

    Returns:
        What :func:`read_source` needs to find the same tensor in another call's arguments, or None.
    """
    found = [path for path, leaf in _leaves(arguments) if leaf is value or _same_memory(leaf, value)]
    if found:
        return Source(found[0], value.shape) if len(found) == 1 else None  # equal ones may differ in another call
    for taken in rows:
        if taken.made(value):
            source = find_source(taken.source, arguments, rows, plates)
            names = [
                n for n, index in (plates or {}).items() if index is taken.index or _same_memory(index, taken.index)
            ]
            if source is not None and len(names) == 1:
                return Source(source.path, value.shape, (source, taken.dim, names[0]))
    return None


def _same_memory(first: Tensor, second: Tensor) -> bool:
    if first.layout != torch.strided or second.layout != torch.strided:
        return False
    return (
        first.data_ptr() == second.data_ptr()
        and first.numel() == second.numel() > 0
        and first.dtype == second.dtype
        and first.is_contiguous()
        and second.is_contiguous()
    )


def read_source(source: Source, arguments: Any, plates: Mapping[str, Tensor] | None = None) -> Tensor:
    """The tensor of another call that :func:`find_source` found in this one.

    Args:
        source: What was found.
        arguments: The arguments of the other call.
        plates: Indices of plates in the other call, by name.
    """
    if source.rows is not None:
        whole, dim, name = source.rows
        value = read_source(whole, arguments, plates)
        value = value[(slice(None),) * dim + ((plates or {})[name].to(value.device),)]
    else:
        value = arguments
        for key in source.path:
            value = value[key]
    return value if value.shape == source.shape else value.reshape(source.shape)


def probe(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    *,
    watch: bool = False,
) -> tuple[Trace, dict[str, PlateFrame], ValueReads]:
    """Runs the model without gradients, log-probabilities or validation to see its structure.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values to give to sites, such as the indices of a plate.
        watch: Whether to look for reads of tensor values (see :class:`ValueReads`).

    Returns:
        The trace, its plates by name, and what was read of tensors (anything may have been if it was not watched).
    """
    kinds, reads = _PlateKinds(), ValueReads()
    with torch.no_grad(), pyro.validation_enabled(False), reads if watch else nullcontext():
        trace = run_model(model, args, kwargs, values, handlers=(kinds,))
    reads.seen |= not watch
    return trace, plate_frames(trace, kinds.kinds), reads
