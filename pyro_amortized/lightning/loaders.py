"""The trainer's loaders: the first batch, and batches that gradients can pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_amortized.diagnostics.batches import loaded
from pyro_amortized.lightning.checks import check_batches

__all__ = [
    "all_loaders",
    "deals",
    "first_batch",
    "generators_of",
    "give_generators",
    "loaders_of",
    "plain_tensors",
    "prepares_validation",
]

_LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


def loaders_of(trainer: Trainer, stage: str) -> Any:
    """What a trainer will go over, which it shows only after it has asked for the optimizer, and so for parameters."""
    return getattr(trainer, _LOOPS[stage])._data_source.dataloader()


def deals(trainer: Any) -> bool:
    """Whether a trainer gives each process a part of the data, with a sampler of its own."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def all_loaders(loaders: Any) -> Iterator[Any]:
    """Loaders one by one, of which a trainer takes one, a sequence or a mapping; none for None."""
    if isinstance(loaders, Mapping | list | tuple):
        for part in loaders.values() if isinstance(loaders, Mapping) else loaders:
            yield from all_loaders(part)
    elif loaders is not None:
        yield loaders


def first_batch(loader: Any) -> Any:
    """The first batch of a loader.

    Raises:
        ValueError: If it has none, it would be missing later, or datapoints cannot be put into one.
    """
    check_batches(loader)
    stream = loader.dataset if isinstance(loader, DataLoader) else loader
    stored = isinstance(stream, Dataset | Sequence) and not isinstance(stream, IterableDataset)
    if not stored and iter(stream) is iter(stream):
        raise ValueError(
            "Cannot find parameters by the first batch because the data are a stream that goes on where it was left, "
            "so that training would miss it; try an __iter__ that starts anew each time, or module.initialize(batch) "
            "with a batch of other data."
        )
    for batch in loaded(loader):
        return batch
    raise ValueError("Cannot train because the loader has no batches; try one that has some, drop_last=False.")


def generators_of(loaders: Any) -> list[torch.Generator]:
    """The generators that loaders and their samplers were given, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in all_loaders(loaders):
        samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
        for part in (loader, *samplers):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def give_generators(trainer: Trainer) -> None:
    """Gives loaders for validation without a generator one of their own, for the number that each draws when it starts.

    One that is for training too keeps what it has.
    """
    if trainer.val_dataloaders is None and trainer.enable_validation:
        _make_for_validation(trainer)
    others = {id(loader) for loader in all_loaders(trainer.train_dataloader)}
    for loader in all_loaders(trainer.val_dataloaders):
        if isinstance(loader, DataLoader) and loader.generator is None and id(loader) not in others:
            loader.generator = torch.Generator()


def prepares_validation(trainer: Trainer) -> bool:
    """Whether there is a validation after this batch; makes loaders for it anew, with generators, if that is due."""
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    if not loop._should_check_val_fx(fetcher):
        return False
    if loop.val_loop._should_reload_val_dl:
        _make_for_validation(trainer)
        give_generators(trainer)
    return True


def _make_for_validation(trainer: Trainer) -> None:
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    trainer.training = True


@contextmanager
def plain_tensors(batch: Any) -> Iterator[Any]:
    """A batch outside of ``torch.inference_mode``, in which nothing can be refined by gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, batch)
