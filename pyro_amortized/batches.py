"""A data set that comes in batches: what every function that takes ``model_args`` makes of a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

__all__ = ["ModelArgs", "calls", "num_calls"]

ModelArgs = Sequence[Any] | Iterable[Any]
"""The positional arguments of one call, as a tuple or list; or a ``DataLoader`` (any iterable but these) of batches."""


def is_single(model_args: ModelArgs) -> bool:
    """Whether these are the arguments of one call, and not an iterable of batches."""
    return isinstance(model_args, tuple | list)


def _is_shuffled(loader: DataLoader[Any]) -> bool:
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(x, RandomSampler | SubsetRandomSampler | WeightedRandomSampler) for x in samplers)


def num_calls(model_args: ModelArgs) -> int | None:
    """Number of calls, or None if an iterable does not tell."""
    if is_single(model_args):
        return 1
    try:
        return len(model_args)  # type: ignore[arg-type]
    except TypeError:
        return None


def calls(
    model_args: ModelArgs, model_kwargs: Mapping[str, Any] | None = None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every call: of the only one, or of one per batch.

    A batch that is a tuple or list holds the positional arguments, as those of a ``TensorDataset`` do; a mapping holds
    keyword arguments; anything else is the only argument.

    Args:
        model_args: The positional arguments of one call, or a ``DataLoader``.
        model_kwargs: Keyword arguments of every call.

    Yields:
        Positional and keyword arguments.

    Raises:
        ValueError: If the argument is a bare tensor, a loader shuffles, or there is no batch.
    """
    if not isinstance(model_kwargs, Mapping | None):
        raise ValueError(
            f"Cannot call the model with model_kwargs=<{type(model_kwargs).__name__}> because keyword arguments are "
            "passed "
            'as a dict; try {"x": x}.'
        )
    kwargs = dict(model_kwargs or {})
    if isinstance(model_args, Tensor | Mapping | str):
        raise ValueError(
            f"Cannot call the model with model_args=<{type(model_args).__name__}> because positional arguments are "
            "passed as a tuple; try (x,), model_kwargs={...} for keyword arguments, or a DataLoader of batches."
        )
    if is_single(model_args):
        yield tuple(model_args), kwargs
        return
    if not isinstance(model_args, Iterable):
        raise ValueError(
            f"Cannot call the model with model_args=<{type(model_args).__name__}> because positional arguments are "
            "passed as a tuple; try (x,)."
        )
    if isinstance(model_args, DataLoader) and _is_shuffled(model_args):
        raise ValueError(
            "Cannot tell which datapoint a result belongs to because the DataLoader shuffles; try shuffle=False."
        )
    empty = True
    for batch in model_args:
        empty = False
        if isinstance(batch, Mapping):
            yield (), {**kwargs, **batch}
        else:
            yield tuple(batch) if isinstance(batch, tuple | list) else (batch,), kwargs
    if empty:
        raise ValueError("Cannot go through the data because the loader has no batches; try one that has some.")
