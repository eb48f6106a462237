"""The trainer's loaders: the first batch, and batches that gradients can pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["first_batch", "first_loader", "plain_tensors"]

_LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


def first_loader(trainer: Trainer, stage: str) -> Any:
    """The loader that a trainer will go over, the first one if there are several.

    The trainer shows its loaders only after it has asked for the optimizer, and so for the parameters.
    """
    loader = getattr(trainer, _LOOPS[stage])._data_source.dataloader()
    while isinstance(loader, list | tuple):
        loader = loader[0]
    return loader


def first_batch(loader: Any) -> Any:
    """The first batch of a loader.

    Raises:
        ValueError: If it has none.
    """
    for batch in loader:
        return batch
    raise ValueError("Cannot train because the loader has no batches; try one that has some, drop_last=False.")


@contextmanager
def plain_tensors(batch: Any) -> Iterator[Any]:
    """A batch outside of ``torch.inference_mode``, in which nothing can be refined by gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, batch)
