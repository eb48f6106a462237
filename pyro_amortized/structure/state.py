"""What a look at a model leaves as it was: generators, buffers of modules, the parameter store."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakSet

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["kept_generators", "kept_state", "modes_of_modules", "untouched", "watched_calls"]


class _Generator:
    """A generator of which to read the state takes long, so that it is read only where its memory has changed.

    Args:
        peek: A copy of the memory that holds the state; None if it is not known where that lies.
        read: The state.
        write: Puts a state back.
    """

    def __init__(self, peek: Callable[[], Any], read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._peek, self._read, self._write = peek, read, write
        self._last: tuple[Any, Any] = (None, None)

    def keep(self) -> tuple[Any, Any]:
        """The memory and the state."""
        memory = self._peek()
        if memory is None or memory != self._last[0]:
            self._last = memory, self._read()
        return self._last

    def restore(self, kept: tuple[Any, Any]) -> None:
        """Puts back what was kept."""
        memory, state = kept
        if memory is None or memory != self._peek():
            self._write(state)


def _memory(generator: Any, kind: type) -> bytes:
    """What an object holds of its own as an instance of a class that is written in C; in CPython alone."""
    header = object.__basicsize__
    return ctypes.string_at(id(generator) + header, kind.__basicsize__ - header)


def _peek_numpy() -> tuple[bytes, bytes] | None:
    generator: Any = np.random.mtrand.get_bit_generator()
    if not (_IS_CPYTHON and isinstance(generator, np.random.MT19937)):
        return None
    words = ctypes.string_at(generator.ctypes.state_address, 4 * 624 + ctypes.sizeof(ctypes.c_int))
    around: Any = np.random.get_state
    return words, _memory(around.__self__, np.random.RandomState)  # which has the half of a pair of normal draws


def _peek_python() -> tuple[bytes, Any] | None:
    generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
    kind = random.Random.__base__
    if not _IS_CPYTHON or kind is None or kind.__basicsize__ < 4 * 624:  # its words would lie elsewhere
        return None
    return _memory(generator, kind), generator.gauss_next


_IS_CPYTHON = sys.implementation.name == "cpython"
_NUMPY = _Generator(_peek_numpy, np.random.get_state, np.random.set_state)
_PYTHON = _Generator(_peek_python, random.getstate, random.setstate)


@contextmanager
def watched_calls(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Tells of every module before it is called, but for traced graphs: what these hold belongs to others."""

    def tell(module: nn.Module, inputs: Any) -> None:
        if not isinstance(module, GraphModule):
            note(module)

    compiles = "torch._dynamo" in sys.modules  # which is not to look into the hook
    hook = register_module_forward_pre_hook(torch.compiler.disable(tell) if compiles else tell)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def untouched(*, first: bool = False) -> Iterator[None]:
    """Leaves the generators of torch, NumPy and Python, the buffers of modules and the parameter store as they were.

    Args:
        first: As for :func:`kept_state`.
    """
    with kept_generators(), kept_state(first=first):
        yield


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leaves the generators of torch, NumPy and Python as they were."""
    numpy_state, python_state, torch_state = _NUMPY.keep(), _PYTHON.keep(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        _PYTHON.restore(python_state)
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
    store = pyro.get_param_store()
    known = set(store.keys())
    kept = {module: _buffers(module) for module in list(_WITH_BUFFERS)}

    def keep(module: nn.Module) -> None:
        if module._buffers and module not in kept:
            kept[module] = _buffers(module)
            _WITH_BUFFERS.add(module)

    try:
        with watched_calls(keep) if first else nullcontext():
            yield
    finally:
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
