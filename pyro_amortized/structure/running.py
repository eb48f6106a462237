"""Running a Pyro model apart from the caller.

Everything that runs the user's model outside the caller's own inference goes through :func:`run_model`: with Pyro's
handlers and plate dimensions set aside, with given values for some of its sites. Guides use it to see the plates, the
subsample indices and the observed values of a call, diagnostics to evaluate log-joints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from pyro.poutine import Trace, runtime
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["Feasible", "Site", "Untraced", "is_predicting", "isolated", "run_model"]

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


class _Substitute(Messenger):
    """Gives sites their values: latent ones, and the indices of subsampled plates."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class Feasible(Messenger):
    """Gives latents whose prior cannot be drawn from, being no density, a value in their support."""

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, ImproperUniform) and msg["value"] is None:
            transform, shape = biject_to(msg["fn"].support), msg["fn"].shape()
            msg["value"] = transform(torch.zeros(transform.inverse_shape(shape)))


class Untraced(Messenger):
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
    tracer: TraceMessenger | None = None,
) -> Trace:
    """Runs a model once with the caller's handlers set aside.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values for latent sites, and indices for subsampled plates, by name.
        handlers: Further handlers to put around the model, outermost first, inside those that give values.
        tracer: What records the run, inside all others; by default Pyro's own, outside of them.

    Returns:
        The trace, without log-probabilities.

    Raises:
        ValueError: If a plate of the model is empty.
    """
    with isolated(), ExitStack() as stack:
        around = [*((_Substitute(values),) if values else ()), *handlers]
        if tracer is None:
            around.insert(0, tracer := TraceMessenger())
        else:
            around.append(tracer)
        for handler in around:
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
