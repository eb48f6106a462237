"""Saving, copying and loading of guides."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_amortized.guides.checks import check_state

__all__ = ["SavedGuide"]


class SavedGuide(AutoGuide):
    """An autoguide that is saved without its model, and takes a state before it has been built."""

    refines: ClassVar[bool] = False
    """Whether answers are refined by gradients of the model, given all latents but its own."""

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(model, **options)
        self._ready = False
        self._pending_state: dict[str, Tensor] = {}

    @property
    def model_at_hand(self) -> Callable[..., Any] | None:
        """The model, or None in a guide that was loaded without it."""
        return None if self._model is None else self._model[0]

    def _model_changed(self) -> None:
        """Forgets what is known of the model."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # not registered as a submodule, as in all of Pyro's autoguides
            self.__dict__["_model"] = (value,)
            self._model_changed()
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """The guide without its model, as in Pyro; set ``guide.model`` after loading to go on with new shapes."""
        for parameter in nn.Module.parameters(self):  # weak references that the store sets anew at every access
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedGuide:
        """A guide of the same model; of the copied one where the model, or what it is a method of, is copied along."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = self.model_at_hand
        holder = getattr(model, "__self__", None)
        if id(holder) in memo and isinstance(model, types.MethodType):
            model = types.MethodType(model.__func__, memo[id(holder)])
        copied.__dict__["_model"] = None if model is None else (memo.get(id(model), model),)
        return copied

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads parameters and buffers, in the first call if nothing has been built yet.

        Raises:
            ValueError: If they are those of another guide; nothing is loaded then.
        """
        check_state(self, state_dict, strict and self._ready)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keeps the state for the first call if nothing has been built yet."""
        if self._ready:
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            self._pending_state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves with what has been built what waits to be."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self._pending_state.items()})

    def _load_pending_state(self) -> None:
        """Loads what was to be loaded before the guide was built."""
        if self._pending_state:
            self.load_state_dict(self._pending_state)
            self._pending_state = {}
