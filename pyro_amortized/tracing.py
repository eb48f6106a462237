"""Running a Pyro model apart from the caller, and learning from one run what its structure is.

Everything that runs the user's model outside the caller's own inference goes through :func:`run_model`: with Pyro's
handlers and plate dimensions set aside, with given values for some of its sites. Guides use it to see the plates, the
subsample indices and the observed values of a call, diagnostics to evaluate log-joints.
"""

from __future__ import annotations

import ctypes
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine import Trace, runtime
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "Feasible",
    "PlateFrame",
    "batch_depth",
    "call_key",
    "is_predicting",
    "isolated",
    "kept_state",
    "modes_of_modules",
    "probe",
    "run_model",
    "sample_sites",
    "size_at",
    "subsample_indices",
    "untouched",
    "versions",
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


def is_predicting() -> bool:
    """Whether no log-probabilities are asked for, as by ``pyro.infer.Predictive``."""
    return any(isinstance(handler, MaskMessenger) and handler.mask is False for handler in runtime._PYRO_STACK)


class _NumpyGenerator:
    """NumPy's global generator. To read its state takes 0.1 ms, so it is read only where its memory has changed."""

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: Any = None

    def read(self) -> Any:
        """The state."""
        memory = self._peek()
        if memory is None or memory != self._memory:
            self._memory, self._state = memory, np.random.get_state()
        return self._state

    def restore(self, state: Any) -> None:
        """Puts a state back that was the last to be read."""
        memory = self._peek()
        if memory is None or memory != self._memory:
            np.random.set_state(state)

    @staticmethod
    def _peek() -> bytes | None:
        generator: Any = np.random.mtrand.get_bit_generator()
        if not isinstance(generator, np.random.MT19937):
            return None
        return ctypes.string_at(generator.ctypes.state_address, 4 * 624 + ctypes.sizeof(ctypes.c_int))


_NUMPY = _NumpyGenerator()


@contextmanager
def untouched(*, first: bool = False) -> Iterator[None]:
    """Leaves the generators of torch, NumPy and Python, the buffers of modules and the parameter store as they were.

    Args:
        first: As for :func:`kept_state`.
    """
    numpy_state, python_state, torch_state = _NUMPY.read(), random.getstate(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with kept_state(first=first):
            yield
    finally:
        torch.set_rng_state(torch_state)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        random.setstate(python_state)
        _NUMPY.restore(numpy_state)


_MAX_BUFFER = 2**20
"""Larger buffers, such as a data set that a module holds, are not copied in every run to undo changes to them."""

_WITH_BUFFERS: WeakSet[nn.Module] = WeakSet()
"""The modules with buffers that models have called."""


@contextmanager
def kept_state(*, first: bool = False) -> Iterator[None]:
    """Undoes what a run of a model does to buffers of the modules that it calls, and to the parameter store.

    Buffers are for example the running statistics of batch normalisation. Parameters are those that a run is the first
    to make.

    Args:
        first: Whether the model may call modules that no model has called before. A hook finds them then, which it does
            not do in every run because modules under ``torch.compile`` are compiled anew for it.
    """
    store, known = pyro.get_param_store(), set(pyro.get_param_store().keys())
    kept = {module: _buffers(module) for module in list(_WITH_BUFFERS)}

    def keep(module: nn.Module, inputs: Any) -> None:
        if (
            module._buffers and module not in kept and not isinstance(module, GraphModule)
        ):  # whose buffers are constants
            kept[module] = _buffers(module)
            _WITH_BUFFERS.add(module)

    hook = register_module_forward_pre_hook(keep) if first else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for module, buffers in kept.items():
            for name, buffer, value in buffers:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                buffer.data.copy_(value)  # unseen by autograd, for which the statistics are no part of a result
        for name in set(store.keys()) - known:
            with suppress(KeyError):  # Pyro's, for the second name of a parameter that has two
                del store[name]


def modes_of_modules() -> frozenset[tuple[int, bool]]:
    """Which of the modules with buffers that models have called, such as batch normalisation, are in training."""
    return frozenset((id(module), module.training) for module in list(_WITH_BUFFERS))


def _buffers(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Names, buffers and copies of what they hold; without large and expanded ones, which cannot be written to."""
    buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if b.numel() <= _MAX_BUFFER]
    return [(name, buffer, buffer.detach().clone()) for name, buffer in buffers if 0 not in buffer.stride()]


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


class Feasible(Messenger):
    """Gives latents whose prior cannot be drawn from, being no density, a value in their support."""

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, ImproperUniform) and msg["value"] is None:
            transform, shape = biject_to(msg["fn"].support), msg["fn"].shape()
            msg["value"] = transform(torch.zeros(transform.inverse_shape(shape)))


class _Untraced(Messenger):
    """Draws apart from ``torch.jit.trace``, in whose graph what a look draws would be drawn again in every call."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or msg["value"] is not None or msg["done"]:
            return
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


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
        for handler in ([_Substitute(values)] if values else []) + [*handlers]:
            stack.enter_context(handler)
        try:
            model(*args, **kwargs)
        except (TypeError, IndexError) as error:
            if "0-d tensor" not in str(error) and "0-dim" not in str(error):
                raise
            raise ValueError(
                f"Cannot run the model because it treats a tensor without dimensions as data of several datapoints "
                f"({error}); try x.reshape(1) for a single datapoint."
            ) from error
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


def batch_depth(trace: Trace, frames: Mapping[str, PlateFrame]) -> int:
    """The largest number of batch dimensions of a run's sites, in plates or outside of all."""
    ranks = [len(site["fn"].batch_shape) for site in sample_sites(trace).values()]
    return max([0, *ranks, *(-frame.dim for frame in frames.values())])


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


_PYTHON_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class ValueReads:
    """Watches whether code lets the values of tensors decide what Python does.

    Attributes:
        seen: Whether a tensor's value was read.
    """

    def __init__(self) -> None:
        self.seen = False
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
        return func(*args, **(kwargs or {}))


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


def versions(arguments: Any) -> list[int]:
    """How often each tensor among the arguments has been changed in place."""
    return [x._version for x in tree_leaves(arguments) if isinstance(x, Tensor) and not x.is_inference()]


def probe(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    *,
    first: bool = True,
) -> tuple[Trace, dict[str, PlateFrame]]:
    """Runs the model without gradients, log-probabilities, validation or traces of the run to see its structure.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values to give to sites, such as the indices of a plate.
        first: Whether the model may call modules that it did not call before.

    Returns:
        The trace, and its plates by name.
    """
    kinds = _PlateKinds()
    with torch.no_grad(), pyro.validation_enabled(False), untouched(first=first):
        handlers = (*((_Untraced(),) if torch._C._get_tracing_state() else ()), Feasible(), kinds)
        trace = run_model(model, args, kwargs, values, handlers=handlers)
    return trace, plate_frames(trace, kinds.kinds)
