"""Drawing the observed values of a model anew, and putting them in their place among its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_amortized.tracing import Site

__all__ = ["Arguments", "Place", "SampleDatapoints"]


@dataclass(frozen=True)
class Place:
    """Where among the arguments a site's observed values lie.

    Attributes:
        leaf: Number of the argument, in the order of the nested arguments.
        view: Shape, strides and offset of the values in the argument's memory, if they are a view of it.
        index: Rows of the argument that the values are a copy of; None if of all.
    """

    leaf: int
    view: tuple[torch.Size, tuple[int, ...], int] | None
    index: Tensor | None

    def write(self, argument: Tensor, values: Tensor) -> None:
        """Writes values into an argument, in place."""
        if self.view is not None:
            shape, strides, offset = self.view
            argument.as_strided(shape, strides, offset).copy_(values)
        elif self.index is not None:
            argument[self.index] = values.reshape(argument[self.index].shape).to(argument)
        else:
            argument.copy_(values.reshape(argument.shape))


class Arguments:
    """A copy of a call's arguments, each tensor in memory of its own, so that places in it are unique.

    An argument that is passed twice stays one and the same.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        like: Arguments of the same nesting, which tell what is passed twice.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], like: tuple[Any, Any] | None = None) -> None:
        self.leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        originals = self.leaves if like is None else tree_flatten((tuple(like[0]), dict(like[1])))[0]
        first: dict[Any, int] = {}
        self._same = []
        for position, (leaf, original) in enumerate(zip(self.leaves, originals, strict=True)):
            key = (original.data_ptr(), original.shape, original.stride()) if _is_plain(original) else position
            self._same.append(first.setdefault(key, position))
            if self._same[position] < position:
                self.leaves[position] = self.leaves[self._same[position]]
            elif _is_plain(leaf):
                self.leaves[position] = leaf.detach().clone(memory_format=torch.contiguous_format)

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments."""
        return tree_unflatten(self.leaves, self._spec)

    def find(self, value: Tensor, indices: Sequence[Tensor]) -> Place | None:
        """Where a tensor that the model observes lies: a view of an argument, or a copy of one with the same values.

        Args:
            value: The tensor.
            indices: Of the subsampled plates around it.

        Returns:
            The place, or None if there is none or more than one.
        """
        distinct = [i for i, leaf in enumerate(self.leaves) if _is_plain(leaf) and self._same[i] == i]
        if _is_plain(value) and 0 not in value.stride():  # an expanded tensor holds one number for several
            memory = value.untyped_storage().data_ptr()
            for i in distinct:
                if self.leaves[i].untyped_storage().data_ptr() == memory and self.leaves[i].dtype == value.dtype:
                    return Place(i, (value.shape, value.stride(), int(value.storage_offset())), None)
        copies = [Place(i, None, None) for i in distinct if _equal(self.leaves[i], value)]
        for index in indices:
            copies += [Place(i, None, index) for i in distinct if _holds_rows(self.leaves[i], index, value)]
        return copies[0] if len(copies) == 1 else None

    def replaced(self, values: Sequence[tuple[Place, Tensor]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a new call with other values in the given places."""
        leaves = list(self.leaves)
        for leaf in {place.leaf for place, _ in values}:
            leaves[leaf] = self.leaves[leaf].clone()
        for place, value in values:
            place.write(leaves[place.leaf], value)
        return tree_unflatten([leaves[same] for same in self._same], self._spec)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.numel() > 0


def _equal(argument: Tensor, value: Tensor) -> bool:
    if argument.numel() != value.numel() or argument.device != value.device:
        return False
    return torch.allclose(
        argument.reshape(value.shape).to(value.dtype).double(), value.double(), rtol=0.0, atol=0.0, equal_nan=True
    )


def _holds_rows(argument: Tensor, index: Tensor, value: Tensor) -> bool:
    if argument.dim() == 0 or len(argument) <= int(index.max()) or argument[:1].numel() * len(index) != value.numel():
        return False
    return len(index.unique()) == len(index) and _equal(argument[index.to(argument.device)], value)


class SampleDatapoints(Messenger):
    """Draws all sites in the datapoint plate, the observed ones too, and keeps what was observed."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if msg["infer"].get("_deterministic") or all(f.name != self.plate for f in msg["cond_indep_stack"]):
            return
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, dist.Unit):
            raise ValueError(
                f"Cannot simulate data because site {name!r} is a pyro.factor, which nothing can be drawn from; try a "
                "model whose prior and likelihood are distributions."
            )
        try:
            value = fn(*msg["args"], **msg["kwargs"])
        except NotImplementedError as error:
            raise ValueError(
                f"Cannot simulate data because site {name!r} has the distribution {type(fn).__name__}, which cannot "
                "be sampled; try a proper distribution with a sampler."
            ) from error
        if msg["is_observed"]:
            self.observed[name] = msg["value"]
            value = _in_place_of(msg, value)
        msg["value"] = value


def _in_place_of(msg: Site, drawn: Tensor) -> Tensor:
    """A draw in the dtype of the observed value, with the observed value where it is masked."""
    name, observed = msg["name"], msg["value"]
    if not isinstance(observed, Tensor) or observed.shape != drawn.shape:
        raise ValueError(
            f"Cannot simulate data because observed site {name!r} has a value of shape "
            f"{tuple(getattr(observed, 'shape', ()))} for a distribution of shape {tuple(drawn.shape)}; try observing "
            "a tensor with one value for each."
        )
    value = drawn.to(observed.dtype)
    if not torch.equal(value.to(drawn.dtype), drawn) and drawn.isfinite().all():
        raise ValueError(
            f"Cannot simulate data because observed site {name!r} holds {observed.dtype} and draws from its "
            f"{type(msg['fn']).__name__} distribution do not fit that; try data of dtype {drawn.dtype}."
        )
    present = _present(msg)
    return value if present is None else torch.where(present, value, observed)


def _present(msg: Site) -> Tensor | None:
    """Which entries of a value are not masked, in a shape that broadcasts to it; None if all."""
    found = [(msg["mask"], msg["fn"].event_dim)]
    fn = msg["fn"]
    while fn is not None:
        found.append((getattr(fn, "_mask", None), len(fn.event_shape)))
        fn = getattr(fn, "base_dist", None)
    present = None
    for mask, event_dim in found:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=msg["value"].device).bool()
            mask = mask.reshape(mask.shape + (1,) * event_dim)
            present = mask if present is None else present & mask
    return present
