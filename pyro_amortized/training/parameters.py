"""The parameters of models and guides that are functions: found in Pyro's parameter store, held by a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_amortized.encoders.modes import evaluating

__all__ = ["StoreParameters", "find_parameters", "owners", "parameters_of"]


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


def find_parameters(module: nn.Module, evaluate: Callable[[], Any]) -> list[str]:
    """Names of the parameters in Pyro's store that an evaluation meets, which builds them if it is the first.

    Args:
        module: What holds model and guide, for the time in evaluation mode.
        evaluate: Evaluates the loss.

    Raises:
        ValueError: If the store holds another parameter than the module that is registered under its name.
    """
    with evaluating(module), torch.no_grad(), _ParameterSites() as sites:
        evaluate()
    return sites.names


class StoreParameters(nn.Module):
    """The parameters in Pyro's store that belong to no module, registered so that optimizers and checkpoints see them.

    They are unconstrained, as in the store, whose entries are these parameters from then on.
    """

    def adopt(self, names: list[str], held: set[int]) -> None:
        """Takes over the parameters of these names, but for those that modules hold already.

        Args:
            names: Names in the store.
            held: The ``id`` of every parameter of modules.
        """
        store = pyro.get_param_store()
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
            store.set_state({"params": {name: parameter}, "constraints": {name: state["constraints"][name]}})
