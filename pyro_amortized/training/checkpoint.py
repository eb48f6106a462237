"""A training loop's state in one file: parameters, optimizers, generators, and whatever else goes along."""

from __future__ import annotations

import os
import pickle
import re
from contextlib import suppress
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import nn
from torch.optim import Optimizer

from pyro_amortized.training.generators import generator_state, restore_generators

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Saves all that a training loop needs to go on with the same numbers as if it had not been interrupted.

    Beside the parts this is Pyro's parameter store and the states of the generators of torch, NumPy and Python. The
    file is whole or not there: it takes the place of an older one of that name in a single step, at the end.

    Args:
        path: The file.
        **parts: What belongs to the run: modules, guides, torch's and Pyro's optimizers, schedulers, loaders with a
            ``state_dict``; or plain values, such as ``step=step``. Modules that a model calls which is a function are
            parts too, ``decoder=decoder``: the parameter store has their parameters, not the statistics of their batch
            normalisation.

    Raises:
        ValueError: If a part is neither, or the file cannot be written or would not be read again.

    Example:
        >>> import os, tempfile, torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> from pyro_amortized.training import load_checkpoint, save_checkpoint
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide, optimizer = AmortizedGuide(model), pyro.optim.Adam({"lr": 0.01})
        >>> svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.randn(8))
        >>> path = os.path.join(tempfile.mkdtemp(), "run.pt")
        >>> save_checkpoint(path, guide=guide, optimizer=optimizer, step=1)
        >>> expected = svi.step(torch.randn(8))
        >>> load_checkpoint(path, guide=guide, optimizer=optimizer)
        {'step': 1}
        >>> svi.step(torch.randn(8)) == expected
        True
    """
    state = {name: _state(name, part) for name, part in parts.items()}
    of_parts = _parameters_of(parts)
    entries = pyro.get_param_store().named_parameters()
    store = {name: value.detach() for name, value in entries if id(value) not in of_parts}
    saved = {"parts": state, "store": store, "generators": generator_state()}
    path = os.fspath(path)
    part = f"{path}.part"
    try:
        try:
            with open(part, "wb") as file:
                torch.save(saved, file)
                file.flush()
                os.fsync(file.fileno())
            _check_readable(part, parts)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
    except OSError as error:
        raise ValueError(
            f"Cannot save the checkpoint {path!r} because it cannot be written ({error.strerror or error}); try a file "
            "in a directory of your own, save_checkpoint('run.pt', ...)."
        ) from error


def load_checkpoint(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any]:
    """Puts everything back to where it was at :func:`save_checkpoint`.

    Guides of this package need not be set up; Pyro's own must be, as by ``svi.evaluate_loss(x)``. Parameters of models
    that are functions must be in the parameter store already, since only the model knows their constraints: evaluate
    the loss once before, as by ``svi.evaluate_loss(x)``. Parameters that the store has got since then leave it.

    Args:
        path: The file.
        **parts: The objects that were saved, under the same names.

    Returns:
        The plain values that were saved.

    Raises:
        ValueError: If the file is no checkpoint, a part was not saved or is another one, or a parameter is not in the
            store yet.
    """
    path = os.fspath(path)
    try:
        saved = torch.load(path, weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError(type(saved).__name__)
        state, store, generators = dict(saved["parts"]), saved["store"], saved["generators"]
    except FileNotFoundError as error:
        raise ValueError(
            f"Cannot read the checkpoint {path!r} because there is no such file; try the path that save_checkpoint was "
            "given."
        ) from error
    except (OSError, RuntimeError, LookupError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"Cannot read a checkpoint from {path!r} because it is none, or a part of one "
            f"({type(error).__name__}); try the path that save_checkpoint was given, and for files of torch.save "
            "torch.load."
        ) from error
    absent = sorted(set(parts) - set(state))
    if absent:
        raise ValueError(f"Cannot load {absent} because the checkpoint holds {sorted(state)}; try some of these.")
    for name, part in parts.items():
        _restore(name, part, state.pop(name))
    _restore_store(store, _parameters_of(parts))
    restore_generators(generators)
    return {name: value for name, value in state.items() if not isinstance(value, dict)}


def _state(name: str, part: Any) -> Any:
    if isinstance(part, PyroLRScheduler):
        raise ValueError(
            f"Cannot save {name}=<{type(part).__name__}> because Pyro's schedulers do not give the state of the "
            "optimizers that they hold; try a torch optimizer and scheduler, SVIModule(model, guide, scheduler=...)."
        )
    if isinstance(part, PyroOptim):  # of parameters not met since loading, the state still waits
        return {**part._state_waiting_to_be_consumed, **part.get_state()}
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if isinstance(part, np.generic):
        return part.item()
    if part is None or isinstance(part, int | float | str | torch.Tensor | list | tuple):
        return part
    raise ValueError(
        f"Cannot save {name}=<{type(part).__name__}> because it has no state_dict and is no plain value; try the "
        "module that holds its parameters, or leaving it out."
    )


def _check_readable(path: str, parts: dict[str, Any]) -> None:
    """Raises a ValueError if a file cannot be loaded again; reads no numbers."""
    try:
        torch.load(path, weights_only=True, mmap=True, map_location="meta")
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"Cannot save {sorted(parts)} because one holds a {kind[1] if kind else 'kind of object'} that torch does "
            "not load again with weights_only=True; try plain numbers, strings and tensors, float(value)."
        ) from error


def _restore(name: str, part: Any, state: Any) -> None:
    """Gives a part the state that was saved under its name."""
    kind = f"<{type(part).__name__}>"
    if not isinstance(part, PyroOptim) and not hasattr(part, "load_state_dict"):
        raise ValueError(
            f"Cannot load {name}={kind} because it has no state to be put back; try leaving it out: plain values are "
            f"returned, load_checkpoint(path, ...)[{name!r}]."
        )
    if not isinstance(state, dict):
        raise ValueError(
            f"Cannot load {name}={kind} because a plain value was saved under this name; try leaving it out, and "
            "load_checkpoint(path) for the value."
        )
    if isinstance(part, PyroOptim):
        part.optim_objs.clear()  # Pyro gives a state only to parameters that it meets for the first time
        part._state_waiting_to_be_consumed.clear()
        part.set_state(state)
        return
    if isinstance(part, Optimizer):
        _check_optimizer(name, part, state)
    try:
        part.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Cannot load {name}={kind} because its parameters are not those that were saved, or have not been made "
            f"yet ({error}); try the same {name}, and one evaluation of the loss before, svi.evaluate_loss(x)."
        ) from error


def _check_optimizer(name: str, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raises a ValueError unless a state is of torch's optimizer, with as many parameters and the same options."""
    own, saved = optimizer.state_dict()["param_groups"], state.get("param_groups", [])
    numbers = [[len(group["params"]) for group in groups] for groups in (own, saved)]
    absent = [key for before, now in zip(saved, own, strict=False) for key in set(now) - set(before)]
    if numbers[0] != numbers[1] or absent:
        cause = f"it has no option {absent[0]!r}" if numbers[0] == numbers[1] else f"it is of {numbers[1]} parameters"
        raise ValueError(
            f"Cannot load {name}=<{type(optimizer).__name__}>, which is of {numbers[0]} parameters in its groups, "
            f"because what was saved is of another optimizer: {cause}; try the optimizer that was saved, made of the "
            "same parameters."
        )


def _parameters_of(parts: dict[str, Any]) -> set[int]:
    return {id(p) for part in parts.values() if isinstance(part, nn.Module) for p in part.parameters()}


def _restore_store(saved: dict[str, torch.Tensor], of_parts: set[int]) -> None:
    """Gives the parameters in the store that belong to no part the values that were saved; later ones go."""
    entries = dict(pyro.get_param_store().named_parameters())
    absent = sorted(set(saved) - set(entries))
    if absent:
        raise ValueError(
            f"Cannot load parameters {absent} because the model and the guide have not made them yet, and only they "
            "know their constraints; try one evaluation of the loss before, svi.evaluate_loss(x)."
        )
    for name, value in saved.items():
        if entries[name].shape != value.shape:
            raise ValueError(
                f"Cannot load parameter {name!r} because the model makes it of shape {tuple(entries[name].shape)}, and "
                f"{tuple(value.shape)} was saved; try the model that was saved."
            )
    with torch.no_grad():
        for name, value in saved.items():
            entries[name].copy_(value)
    for name in set(entries) - set(saved) - {n for n, entry in entries.items() if id(entry) in of_parts}:
        del pyro.get_param_store()[name]
