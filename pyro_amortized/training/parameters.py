"""The parameters and modules of models and guides that are functions: found in a run, held by a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.structure.state import watched_calls

__all__ = ["Found", "ModulesCalled", "StoreParameters", "find_parameters", "owners", "parameters_of"]


def owners(functions: Iterable[Callable[..., Any]]) -> Iterator[nn.Module]:
    """The modules that functions are methods of, each once; a function that is a module itself is left out."""
    found = {id(module): module for f in functions if isinstance(module := getattr(f, "__self__", None), nn.Module)}
    yield from found.values()


def parameters_of(trace: Any) -> set[Tensor]:
    """The unconstrained parameters in a trace of ``pyro.param`` sites."""
    return {site["value"].unconstrained() for site in trace.nodes.values()}


class _ParameterSites(Messenger):
    """Notes the names of the ``pyro.param`` sites that a run meets, and the modules that ``pyro.module`` registers.

    Args:
        evaluate: Is told of every such module, before it runs.
    """

    def __init__(self, evaluate: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.names: list[str] = []
        self.registered: dict[nn.Module, str] = {}
        self.evaluate = evaluate

    def _pyro_post_param(self, msg: Any) -> None:
        name, start, value = msg["name"], (*msg["args"][1:], None)[0], msg["value"]
        if isinstance(start, nn.Parameter) and value.unconstrained() is not start:
            raise ValueError(
                f"Cannot train parameter {name!r} because the parameter store holds another one of that name, from a "
                "model or guide that was made before, which Pyro would train in its place; try "
                "pyro.clear_param_store() before making this model and guide."
            )
        if name not in self.names:
            self.names.append(name)
            self._note_module()

    def _note_module(self) -> None:
        """Notes the argument of ``pyro.module``, which sends no message itself, if it is what makes this parameter."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not pyro.module.__code__:
            frame = frame.f_back
        if frame is not None and frame.f_locals["nn_module"] not in self.registered:
            self.registered[frame.f_locals["nn_module"]] = frame.f_locals["name"]
            self.evaluate(frame.f_locals["nn_module"])


@dataclass(frozen=True)
class Found:
    """What an evaluation of the loss has met.

    Attributes:
        names: Of parameters in Pyro's store.
        registered: The names of modules given to ``pyro.module`` that are no part of the whole.
        called: All modules that were called and are no part of the whole, those around others first.
    """

    names: list[str]
    registered: dict[nn.Module, str]
    called: list[nn.Module]


def find_parameters(module: nn.Module, evaluate: Callable[[], Any]) -> Found:
    """Finds what a loss is a function of by an evaluation, which builds it if it is the first.

    Args:
        module: What holds model and guide, for the time in evaluation mode, and so all that they call.
        evaluate: Evaluates the loss.

    Raises:
        ValueError: If the store holds another parameter than the module that is registered under its name.
    """
    with (
        evaluating(module),
        _OthersEvaluating(module) as others,
        torch.no_grad(),
        _ParameterSites(others.evaluate) as sites,
    ):
        evaluate()
    parts = set(module.modules())  # of which a guide has built some only now
    registered = {other: name for other, name in sites.registered.items() if other not in parts}
    return Found(sites.names, registered, [other for other in others.called if other not in parts])


class _OthersEvaluating:
    """Notes the modules that are called and are no part of this one, and runs them in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.called: list[nn.Module] = []
        self._parts, self._modes = set(module.modules()), dict[nn.Module, bool]()

    def evaluate(self, other: nn.Module) -> None:
        """Puts a module into evaluation mode."""
        if other not in self._parts and other not in self._modes:
            for part in other.modules():
                self._modes.setdefault(part, part.training)
                part.training = False

    def _note(self, other: nn.Module) -> None:
        if other not in self._parts and other not in self.called:
            self.called.append(other)
        self.evaluate(other)

    def __enter__(self) -> _OthersEvaluating:
        self._watch = watched_calls(self._note)
        self._watch.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)
        for other, training in self._modes.items():
            other.training = training


class StoreParameters(nn.Module):
    """The parameters in Pyro's store that belong to no module, registered so that optimizers and checkpoints see them.

    They are unconstrained, as in the store, whose entries are these parameters from then on.
    """

    _all: WeakSet[StoreParameters] = WeakSet()

    def adopt(self, names: list[str], held: set[int]) -> list[str]:
        """Takes over the parameters of these names, but for those that modules hold already.

        Args:
            names: Names in the store.
            held: The ``id`` of every parameter of modules.

        Returns:
            The names of those that another of these holds too, since the store has one parameter of each name.
        """
        others = {id(p) for other in self._all if other is not self for p in other.parameters()}
        shared, store = [], pyro.get_param_store()
        state = store.get_state()
        for name in names:
            entry = state["params"].get(name)
            if entry is None or id(entry) in held:
                continue
            parameter = entry if isinstance(entry, nn.Parameter) else nn.Parameter(entry.detach())
            own = name.replace(".", "/")
            while hasattr(self, own):  # such as "type", an attribute of every module
                own += "_"
            self.register_parameter(own, parameter)
            shared += [name] if id(parameter) in others else []
            store.set_state({"params": {name: parameter}, "constraints": {name: state["constraints"][name]}})
        self._all.add(self)
        return shared


class ModulesCalled(nn.ModuleDict):
    """The modules that functions call, by what ``pyro.module`` calls them: their mode and buffers go with the whole."""

    def adopt(self, found: Found) -> list[str]:
        """Takes modules that ``pyro.module`` was given, and others that are called and hold no further parameters.

        Returns:
            What is called and left out, since it holds parameters that are not registered.
        """
        for module, name in found.registered.items():
            self._take(module, name)
        store = pyro.get_param_store().get_state()["params"]
        known = {id(store[name]) for name in found.names if name in store}
        foreign: list[nn.Module] = []
        for module in found.called:
            own = {id(p) for p in module.parameters() if p.requires_grad}
            if own - known and not _is_part(module, foreign):
                foreign.append(module)
            wraps = not set(module.modules()).isdisjoint(set(self.modules()) - {self})
            if not _is_part(module, foreign) and not (wraps and own <= {id(p) for p in self.parameters()}):
                self._take(module, type(module).__name__)
        return [type(module).__name__ for module in foreign]

    def _take(self, module: nn.Module, name: str) -> None:
        if module in set(self.modules()):
            return
        name = name.replace(".", "/")
        while hasattr(self, name) or name in self:
            name += "_"
        self[name] = module


def _is_part(module: nn.Module, wholes: Iterable[nn.Module]) -> bool:
    return any(module in set(whole.modules()) for whole in wholes)
