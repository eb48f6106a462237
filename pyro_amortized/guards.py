"""Watching what a model can reach: whether anything that its graph was traced from has been replaced since."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyro import get_param_store
from pyro.nn.module import _Context  # what PyroModules keep while they are called
from torch import Tensor, nn

__all__ = ["Guard", "guards", "undisturbed"]


@dataclass(frozen=True)
class Guard:
    """A place that the model can reach, and what was there when a graph was traced.

    Attributes:
        read: Reads what is there now.
        value: What was there.
        container: The list, dict or set that the place is in, by ``id``; None for an attribute or a variable.
    """

    read: Callable[[], Any] = field(repr=False)
    value: Any = field(repr=False)
    container: int | None = None

    @property
    def place(self) -> tuple[Any, ...]:
        """What tells the place from others."""
        function, args = (self.read.func, self.read.args) if isinstance(self.read, partial) else (self.read, ())
        named = tuple(arg if isinstance(arg, str | int) else id(arg) for arg in args)
        return id(getattr(function, "__self__", function)), getattr(function, "__name__", ""), named

    def holds(self) -> bool:
        """Whether the same is there now."""
        try:
            now = self.read()
        except (KeyError, IndexError, AttributeError, ValueError):
            return False
        if now is self.value:
            return True
        same = isinstance(self.value, _SCALARS) and type(now) is type(self.value)
        return same and (now == self.value or (now != now and self.value != self.value))


_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_LIBRARIES = ("torch", "pyro", "numpy", "functools", "contextlib", "builtins", "typing", "pyro_amortized")
_MAX_PLACES = 20000
_MANY = 100
"""Collections of more numbers and strings than this, such as vocabularies, are watched by their length only."""


def guards(owner: Any, captured: Sequence[Tensor] = ()) -> Iterator[Guard]:
    """Guards of all that a model can reach, and of the tensors that its graph uses.

    Classes of objects that change in every call name these attributes in ``_unwatched``, or set it to True if nothing
    in them decides what a model does.

    Raises:
        ValueError: If that is too much, or holds something that can change unseen.
    """
    known = {id(tensor) for tensor in captured}
    for name, tensor in get_param_store()._params.items():
        if id(tensor) in known:
            yield Guard(partial(_stored, name), tensor)
    seen: set[int] = set()
    pending = [(owner, frozenset[str]())]
    places = 0
    while pending:
        holder, names = pending.pop()
        if id(holder) in seen or _is_foreign(holder):
            continue
        seen.add(id(holder))
        if type(holder).__module__ == "numpy" and hasattr(holder, "tobytes"):
            yield Guard(holder.tobytes, holder.tobytes())
            continue
        container = id(holder) if isinstance(holder, dict | list | set) else None
        if container is not None:
            yield Guard(holder.__len__, len(holder), container)
            if len(holder) > _MANY and all(isinstance(value, _SCALARS) for value in _values(holder)):
                continue
        for read, value in _places(holder, names):
            places += 1
            if places > _MAX_PLACES:
                raise ValueError("it can reach too many objects to watch them all")
            if read is not None and (not isinstance(value, Tensor) or id(value) in known):
                yield Guard(read, value, container)
            if not isinstance(value, (*_SCALARS, Tensor)):
                code = getattr(holder, "__code__", None)
                pending.append((value, frozenset(_names(code)) if isinstance(value, types.ModuleType) else names))


def undisturbed(before: Sequence[Guard], after: Sequence[Guard]) -> list[Guard]:
    """The guards after a run of the model, without those of counters and logs.

    Counters are what the run itself has changed, logs are lists, dicts and sets that it has written to.
    """
    changed = [guard for guard in before if not guard.holds()]
    counters, logs = {guard.place for guard in changed}, {guard.container for guard in changed} - {None}
    return [guard for guard in after if guard.place not in counters and guard.container not in logs]


def _values(holder: Any) -> Any:
    return holder.values() if isinstance(holder, dict) else holder


def _stored(name: str) -> Tensor:
    return get_param_store()._params[name]


def _in_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").split(".")[0] in _LIBRARIES


def _is_foreign(holder: Any) -> bool:
    """Whether something belongs to a library, or to Python, and is taken to stay as it is."""
    if isinstance(holder, types.ModuleType):
        return holder.__name__.split(".")[0] in _LIBRARIES or holder.__name__.split(".")[0] in sys.stdlib_module_names
    if isinstance(holder, type):
        return _in_library(holder) or holder.__module__.split(".")[0] in sys.stdlib_module_names
    if isinstance(holder, types.FunctionType):
        return _in_library(holder) and holder.__closure__ is None
    unwatched = type(holder) is _Context or getattr(type(holder), "_unwatched", ()) is True
    return isinstance(holder, types.BuiltinFunctionType) or unwatched


_Place = tuple[Callable[[], Any] | None, Any]


def _places(holder: Any, names: frozenset[str]) -> Iterator[_Place]:
    """What an object holds, each with a function that reads it again; None for what cannot be replaced.

    Args:
        holder: The object.
        names: For a module of Python code, the names that the function that uses it knows.
    """
    if isinstance(holder, types.FunctionType):
        yield from _places_of_function(holder)
    elif isinstance(holder, types.MethodType):
        yield from ((None, holder.__self__), (None, holder.__func__))
    elif isinstance(holder, partial):
        yield from ((None, holder.func), (None, holder.args), (None, holder.keywords))
    elif isinstance(holder, dict):
        yield from ((partial(holder.__getitem__, key), value) for key, value in list(holder.items()))
    elif isinstance(holder, list | tuple):
        yield from ((partial(holder.__getitem__, i), value) for i, value in enumerate(holder))
    elif isinstance(holder, types.ModuleType):
        space = vars(holder)
        yield from ((partial(space.__getitem__, name), space[name]) for name in names & space.keys())
    elif isinstance(holder, type):
        yield from _places_of_class(holder)
    else:
        yield from _places_of_object(holder)


def _places_of_function(function: types.FunctionType) -> Iterator[_Place]:
    for cell in function.__closure__ or ():
        try:
            yield partial(getattr, cell, "cell_contents"), cell.cell_contents
        except ValueError:  # not filled yet
            continue
    space = function.__globals__
    names = () if _in_library(function) else _names(function.__code__)
    yield from ((partial(space.__getitem__, name), space[name]) for name in names if name in space)
    yield from ((None, default) for default in (function.__defaults__ or ()))
    yield from ((None, default) for default in (function.__kwdefaults__ or {}).values())


def _places_of_object(holder: Any) -> Iterator[_Place]:
    space = getattr(holder, "__dict__", {})
    skip = {*getattr(type(holder), "_unwatched", ()), *(_MODULE_INTERNALS if isinstance(holder, nn.Module) else ())}
    yield space.__len__, len(space)  # an attribute of its own may hide one of its class
    yield from ((partial(space.__getitem__, name), value) for name, value in list(space.items()) if name not in skip)
    for kind in type(holder).__mro__:
        if _is_foreign(kind):
            continue
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(holder, name):
                yield partial(getattr, holder, name), getattr(holder, name)
        yield None, kind


def _places_of_class(kind: type) -> Iterator[_Place]:
    for name, value in list(vars(kind).items()):
        if isinstance(value, types.FunctionType) or not (name.startswith("__") or hasattr(value, "__get__")):
            yield partial(vars(kind).__getitem__, name), value


def _names(code: types.CodeType | None) -> set[str]:
    """Names of globals and attributes that a function, and the functions inside it, may read."""
    found = set(code.co_names) if code is not None else set()
    for constant in code.co_consts if code is not None else ():
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


_MODULE_INTERNALS = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"}
