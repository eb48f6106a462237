"""A data set that comes in batches: what every function that takes ``model_args`` makes of a ``DataLoader``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from pyro_amortized.diagnostics.processes import num_processes
from pyro_amortized.structure.signature import named_function

__all__ = ["ModelArgs", "ToArgs", "call_of", "calls", "dealing_sampler", "loaded", "num_calls"]

ModelArgs = Sequence[Any] | Iterable[Any]
"""The positional arguments of one call, as a tuple or list; or a ``DataLoader`` (any iterable but these) of batches."""


ToArgs = Callable[[Any], Any]
"""From a batch to positional arguments, a tuple, or to a pair ``(args, kwargs)``."""


def is_single(model_args: ModelArgs) -> bool:
    """Whether these are the arguments of one call, and not an iterable of batches."""
    return isinstance(model_args, tuple | list)


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    samplers: list[Any] = [loader.sampler, loader.batch_sampler]  # a sampler of batches may lie in either place
    return samplers + [getattr(sampler, "sampler", None) for sampler in samplers]


def _is_shuffled(loader: DataLoader[Any]) -> bool:
    shuffling = RandomSampler | SubsetRandomSampler | WeightedRandomSampler
    return any(isinstance(sampler, shuffling) for sampler in _samplers(loader))


def dealing_sampler(model_args: Any) -> DistributedSampler[Any] | None:
    """What deals the data of a loader out to several processes; None if nothing does."""
    return None if num_processes() == 1 else _dealing(model_args)


def _dealing(loader: Any) -> DistributedSampler[Any] | None:
    samplers = _samplers(loader) if isinstance(loader, DataLoader) else []
    return next((sampler for sampler in samplers if isinstance(sampler, DistributedSampler)), None)


def _check_alone(batches: Any) -> None:
    """Raises a ValueError if a single process would go through a part of the data, or in another order."""
    dealing = _dealing(batches) if num_processes() == 1 else None
    if dealing is not None and (dealing.shuffle or dealing.num_replicas > 1):
        cause = "shuffles" if dealing.shuffle else f"gives this process one of {dealing.num_replicas} parts of the data"
        raise ValueError(
            f"Cannot tell which datapoint a result belongs to because the DataLoader's DistributedSampler {cause} and "
            "this process is alone; try a DataLoader without it, or DistributedSampler(..., shuffle=False) after "
            "torch.distributed.init_process_group."
        )


def _check_ends(batches: Any) -> None:
    """Raises a ValueError unless a pass over the batches is known to end, as far as can be seen."""
    endless = isinstance(batches, cycle)
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, IterableDataset):
        endless = num_calls(batches) is None
    if endless:
        raise ValueError(
            "Cannot go through all data because these batches do not say how many they are, and may never end; try an "
            "IterableDataset with __len__, its number of datapoints, or itertools.islice(loader, 100) for the first "
            "100 batches."
        )


_LOADING = {
    "stack expects each tensor to be equal size": (
        "they are of different sizes",
        "a collate_fn that pads them, such as torch.nn.utils.rnn.pad_sequence, and a model that masks what is padded, "
        "`dist.Normal(...).mask(present)`",
    ),
    "Batches of sparse tensors": (
        "they are sparse",
        "collate_fn=lambda rows: torch.stack([r.to_dense() for r in rows])",
    ),
    "length is ambiguous": (
        "SciPy's sparse arrays have no length",
        "a Dataset whose __getitem__ is torch.from_numpy(array[[row]].toarray()[0])",
    ),
}
"""What data cannot be loaded because of, by a part of torch's or SciPy's errors, and what to try."""


def loaded(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, as many as they say they are.

    Raises:
        ValueError: If datapoints cannot be put into a batch, or there are more batches.
    """
    iterator, number, stated = iter(batches), 0, num_calls(batches)
    most = (
        None if stated is None else stated + getattr(batches, "num_workers", 0)
    )  # each worker ends with a part of one
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, TypeError) as error:
            cause, remedy = next((told for part, told in _LOADING.items() if part in str(error)), (None, None))
            if cause is None:
                raise
            raise ValueError(f"Cannot put datapoints into a batch because {cause}; try {remedy}.") from error
        number += 1
        if most is not None and number > most:
            raise ValueError(
                f"Cannot go through all data because there are more batches than the {stated} that the loader's length "
                "says, as when it never ends or every worker goes through all data; try "
                "itertools.islice(loader, len(loader)), or torch.utils.data.get_worker_info() to share the data among "
                "workers."
            )
        yield batch


def num_calls(model_args: ModelArgs) -> int | None:
    """Number of calls, or None if an iterable does not tell."""
    if is_single(model_args):
        return 1
    try:
        return len(model_args)  # type: ignore[arg-type]
    except TypeError:
        return None


def calls(
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None = None,
    to_args: ToArgs | None = None,
    model: Callable[..., Any] | None = None,
    *,
    shared: bool = False,
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every call: of the only one, or of one per batch.

    A batch that is a tuple or list holds the positional arguments, as those of a ``TensorDataset`` do; a mapping holds
    keyword arguments; anything else is the only argument. Where batches hold something else, ``to_args`` says what.

    Args:
        model_args: The positional arguments of one call, or a ``DataLoader``.
        model_kwargs: Keyword arguments of every call.
        to_args: From a batch to the positional arguments, or a pair of these and keyword arguments.
        model: The model, to tell whether it takes what the batches hold.
        shared: Whether processes that are dealt parts of the data put their results together.

    Yields:
        Positional and keyword arguments.

    Raises:
        ValueError: If the argument is a bare tensor, a loader shuffles or deals data out to processes that do not put
            their results together, there is no batch, they may never end, datapoints cannot be put into one, or the
            model does not take what they hold.
    """
    if not isinstance(model_kwargs, Mapping | None):
        raise ValueError(
            f"Cannot call the model with model_kwargs=<{type(model_kwargs).__name__}> because keyword arguments are "
            'passed as a dict; try {"x": x}.'
        )
    kwargs = dict(model_kwargs or {})
    if isinstance(model_args, Tensor | Mapping | str):
        raise ValueError(
            f"Cannot call the model with model_args=<{type(model_args).__name__}> because positional arguments are "
            "passed as a tuple; try (x,), model_kwargs={...} for keyword arguments, or a DataLoader of batches."
        )
    if is_single(model_args):
        _check_single(model, tuple(model_args), kwargs)
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
    _check_alone(model_args)
    if not shared and dealing_sampler(model_args) is not None:
        raise ValueError(
            "Cannot go through the data because a DistributedSampler gives every process another part of them, and "
            "these results are not put together; try a DataLoader without it, which gives every process all data."
        )
    _check_ends(model_args)
    empty = True
    for batch in loaded(model_args):
        empty = False
        yield call_of(batch, kwargs, to_args, model)
    if empty:
        raise ValueError(
            "Cannot go through the data because the loader has no batches; try a new iterator if this one is used up, "
            "drop_last=False if there are fewer datapoints than in one batch, or a data set that is not empty."
        )


def call_of(
    batch: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    to_args: ToArgs | None = None,
    model: Callable[..., Any] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch makes, as :func:`calls` explains.

    Raises:
        ValueError: If the model does not take them.
    """
    args, named = _arguments(batch, to_args)
    kwargs = {**(model_kwargs or {}), **named}
    _check_taken(model, batch, args, kwargs, to_args)
    return args, kwargs


def _arguments(batch: Any, to_args: ToArgs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch."""
    if to_args is None:
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}
    found = to_args(batch)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], tuple) and isinstance(found[1], Mapping):
        return found[0], dict(found[1])
    if not isinstance(found, tuple):
        raise ValueError(
            f"Cannot call the model with what to_args makes of a batch, {_structure(found)}, because positional "
            "arguments are wanted as a tuple, or a pair of these and a dict; try to_args=lambda batch: (batch[0],)."
        )
    return found, {}


def _check_taken(
    model: Callable[..., Any] | None, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], to_args: Any
) -> None:
    """Raises a ValueError that shows the batch unless the model takes such arguments."""
    found = _mismatch(model, args, kwargs)
    if found is not None:
        signature, error = found
        few = isinstance(batch, tuple | list) and "missing" in str(error)
        remedy = "lambda batch: (*batch, ...), with what is missing" if few else "lambda batch: (batch[0],)"
        if isinstance(batch, Mapping):
            taken = [f"batch[{name!r}]" for name in batch if name in signature.parameters] or ["batch"]
            remedy = "lambda batch: (" + "".join(f"{value}, " for value in taken).rstrip(" ") + ")"
        raise ValueError(
            f"Cannot call the model, which takes {signature}, with batches of {_structure(batch)}"
            f"{' as to_args turns them' if to_args is not None else ''} because of {error}; try to_args={remedy}."
        ) from error


def _check_single(model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the model takes the arguments of the only call."""
    found = _mismatch(model, args, kwargs)
    if found is not None:
        raise ValueError(
            f"Cannot call the model, which takes {found[0]}, with the arguments {_structure(args)} because of "
            f"{found[1]}; try a tuple of as many as it takes, and for a list of batches "
            "DataLoader(batches, batch_size=None)."
        )


def _mismatch(
    model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[inspect.Signature, TypeError] | None:
    """What a model takes, and Python's error, if it does not take such arguments."""
    try:
        signature = inspect.signature(named_function(model))
    except (TypeError, ValueError):  # no model, or one that Python cannot look into
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return signature, error
    return None


def _structure(value: Any) -> str:
    """What a batch holds, in words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_structure(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_structure, value)) + ")"
    return type(value).__name__
