"""A sample statement whose distribution and value are those of several data sets, or of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

__all__ = ["StackedSite", "rebuilt", "tensors_of"]


@dataclass(frozen=True)
class StackedSite:
    """A sample statement; its tensors are those of one data set, or those of all once they are stacked."""

    name: str
    fn: Any
    value: Tensor | None
    is_observed: bool
    scale: Any
    mask: Any
    infer: dict[str, Any]
    plates: tuple[tuple[str, int, int], ...]
    rank: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for all data sets."""
        shape = None if self.value is None else tuple(self.value.shape)
        return self.name, type(self.fn), self.is_observed, self.plates, tuple(self.fn.shape()), shape

    def by_dataset(self, value: Tensor, size: int) -> Tensor:
        """A value of all data sets without the dimensions of size 1 that the model's own has not."""
        shape = (size, *self.fn.batch_shape[len(self.fn.batch_shape) - self.rank :], *self.fn.event_shape)
        if value.numel() != torch.Size(shape).numel():
            raise ValueError(
                f"Cannot evaluate several draws of latent {self.name!r} of all data sets in one run because each run "
                "of the model is one of all data sets; try vectorize_particles=False, Predictive(parallel=False)."
            )
        return value.reshape(shape)


_EVENT_DIMS = {"_unbroadcasted_scale_tril": 2, "_unbroadcasted_cov_factor": 2, "_unbroadcasted_cov_diag": 1}
"""Tensors that distributions hold without all of their batch dimensions, with their other dimensions."""


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """What a distribution or a transform holds."""
    return ((name, value) for name, value in vars(owner).items() if name not in ("_cached_x_y", "_inv"))


def _whole(owner: Any, name: str, value: Any, rank: int) -> Any:
    """A tensor with all batch dimensions of its owner, in front of which another one may be put."""
    if name in _EVENT_DIMS and isinstance(owner, Distribution):
        return value.expand(owner.batch_shape + value.shape[-_EVENT_DIMS[name] :])
    if isinstance(value, Tensor) and isinstance(owner, Transform) and owner.domain.event_dim == 0:
        return value.reshape((1,) * (rank - value.dim()) + value.shape)
    return value


def tensors_of(part: Any, rank: int = 0) -> list[Tensor]:
    """The tensors that a site holds, in order; ``rank`` is that of the values of the distribution that holds a part."""
    if isinstance(part, StackedSite):
        return [t for x in (part.fn, part.value, part.scale, part.mask) for t in tensors_of(x)]
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, Distribution | Transform):
        rank = len(part.batch_shape + part.event_shape) if isinstance(part, Distribution) else rank
        return [tensor for n, x in _attributes(part) for tensor in tensors_of(_whole(part, n, x, rank), rank)]
    return [tensor for value in part for tensor in tensors_of(value, rank)] if isinstance(part, list | tuple) else []


def rebuilt(part: Any, tensors: Iterator[Tensor], size: int) -> Any:
    """The same with other tensors, each with a further leading dimension."""
    if isinstance(part, StackedSite):
        fn, value, scale, mask = (rebuilt(x, tensors, size) for x in (part.fn, part.value, part.scale, part.mask))
        return replace(part, fn=fn, value=value, scale=scale, mask=mask)
    if isinstance(part, Tensor):
        return next(tensors)
    if isinstance(part, Distribution | Transform):
        new = copy.copy(part)
        for name, value in _attributes(part):
            new.__dict__[name] = rebuilt(value, tensors, size)
        if isinstance(part, Distribution):
            new.__dict__["_batch_shape"] = torch.Size((size, *part.batch_shape))
        return new
    if isinstance(part, torch.Size):
        return part
    return type(part)(rebuilt(value, tensors, size) for value in part) if isinstance(part, list | tuple) else part
