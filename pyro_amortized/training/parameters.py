"""The parameters and modules of models and guides that are functions: found in a run, held by a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_amortized.encoders.modes import evaluating

__all__ = ["ModulesCalled", "StoreParameters", "find_parameters", "owners", "parameters_of"]


def owners(functions: Iterable[Callable[..., Any]]) -> Iterator[nn.Module]:
    """The modules that functions are methods of, each once; a function that is a module itself is left out."""
    found = {id(module): module for f in functions if isinstance(module := getattr(f, "__self__", None), nn.Module)}
    yield from found.values()


def parameters_of(trace: Any) -> set[Tensor]:
    """The unconstrained parameters in a trace of ``pyro.param`` sites."""
    return {site["value"].unconstrained() for site in trace.nodes.values()}


class _ParameterSites(Messenger):
    """Notes the names of the ``pyro.param`` sites that a run meets."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

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


def find_parameters(module: nn.Module, evaluate: Callable[[], Any]) -> tuple[list[str], list[nn.Module]]:
    """Names of the parameters in Pyro's store that an evaluation meets, which builds them if it is the first.

    Args:
        module: What holds model and guide, for the time in evaluation mode, and so all that they call.
        evaluate: Evaluates the loss.

    Returns:
        The names, and the modules that were called and are no part of ``module``, those around others first.

    Raises:
        ValueError: If the store holds another parameter than the module that is registered under its name.
    """
    with evaluating(module), _others_evaluating(module) as called, torch.no_grad(), _ParameterSites() as sites:
        evaluate()
    parts = set(module.modules())  # of which a guide has built some only now
    return sites.names, [other for other in called if other not in parts]


@contextmanager
def _others_evaluating(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Notes the modules that are called and are no part of this one, and runs them in evaluation mode.

    But for traced graphs, as refinement has them of models: what these hold belongs to others.
    """
    called: list[nn.Module] = []
    modes: dict[nn.Module, bool] = {}
    parts = set(module.modules())

    def note(other: nn.Module, _: Any) -> None:
        if other not in modes and other not in parts and not isinstance(other, GraphModule):
            called.append(other)
            modes[other], other.training = other.training, False

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()
        for other, training in modes.items():
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

    def adopt(self, called: Iterable[nn.Module], names: Iterable[str]) -> None:
        """Takes modules all of whose parameters are in the store; others are none of the model's.

        Args:
            called: The modules, those around others first.
            names: Names in the store.
        """
        store = pyro.get_param_store().get_state()["params"]
        name_of = {id(store[name]): name for name in names if name in store}
        for module in called:
            own = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
            if not own.keys() <= name_of.keys() or module in set(self.modules()):
                continue
            first = [name_of[key].removesuffix(name).rstrip("$.") for key, name in own.items()][:1]
            name = "".join(first).replace(".", "/") or type(module).__name__
            while hasattr(self, name) or name in self:
                name += "_"
            self[name] = module
