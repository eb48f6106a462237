"""Transforms from unconstrained space to the supports of latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    StickBreakingTransform,
    Transform,
    biject_to,
    constraints,
    mixture_same_family,
)
from torch.nn.functional import logsigmoid, pad

__all__ = ["bounds", "is_identity", "kind_of", "to_support"]


_OF_MIXTURES: Any = getattr(mixture_same_family, "MixtureSameFamilyConstraint", ())
"""The support of ``MixtureSameFamily``, from torch 2.5 on; before, it is that of its components."""


def to_support(support: Any) -> Transform:
    """The transform from unconstrained space to a support.

    Raises:
        NotImplementedError: If none is known.
    """
    return _plain(biject_to(_without_mixtures(support)))


class _StrictlyOrdered(OrderedTransform):
    """Vectors whose entries increase in floating point too: Pyro's are equal where a step is below a rounding error."""

    def _call(self, x: Tensor) -> Tensor:
        first, steps = x[..., :1], x[..., 1:].exp()
        least = 2.0 * torch.finfo(x.dtype).eps * (first.abs() + steps.sum(-1, keepdim=True)).detach()
        return torch.cat([first, torch.maximum(steps, least)], -1).cumsum(-1)


class _StickBreaking(StickBreakingTransform):
    """torch's, by sums of logarithms in place of products: quick to differentiate twice, and no piece is ever zero."""

    def _call(self, x: Tensor) -> Tensor:
        logit = self._logit(x)
        log_pieces = pad(logsigmoid(logit), (0, 1)) + pad(logsigmoid(-logit).cumsum(-1), (1, 0))
        least = math.log(2.0 * torch.finfo(x.dtype).tiny)
        return log_pieces.clamp(min=least).softmax(-1)  # the pieces sum to 1 already, but for rounding

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.clamp(min=torch.finfo(y.dtype).tiny)
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return y[..., :-1].log() - rest.log() - self._logit(torch.zeros_like(rest))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        logit = self._logit(x)
        return (logsigmoid(logit) + logsigmoid(-logit).cumsum(-1)).sum(-1)

    @staticmethod
    def _logit(x: Tensor) -> Tensor:
        """Of the share of what is left that a piece takes; at x = 0 all pieces are equal."""
        return x - torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


def bounds(transform: Any) -> list[Tensor]:
    """The tensors that a transform holds, such as the bounds of an interval."""
    if isinstance(transform, Tensor):
        return [transform]
    if isinstance(transform, Transform):
        if type(transform).__name__ == "_InverseTransform":
            return bounds(transform.inv)
        transform = [value for name, value in vars(transform).items() if not name.startswith("_")]
    return [tensor for part in transform for tensor in bounds(part)] if isinstance(transform, list | tuple) else []


def _without_mixtures(support: Any) -> Any:
    """The support of the components in place of that of a ``MixtureSameFamily``, of which torch knows no bijection.

    Raises:
        NotImplementedError: If each component has bounds of its own.
    """
    if isinstance(support, _OF_MIXTURES):
        base = _without_mixtures(support.base_constraint)
        if any(bound.numel() > 1 for bound in bounds(biject_to(base))):
            raise NotImplementedError
        return base
    if isinstance(support, constraints.independent):
        return constraints.independent(_without_mixtures(support.base_constraint), support.reinterpreted_batch_ndims)
    return support


def _plain(transform: Transform) -> Transform:
    """Drops shifts by 0 and scales by 1: torch's way to the positive numbers then is that of a ``LogNormal``.

    Ordered vectors become strictly so, and sticks are broken by sums of logarithms.
    """
    if type(transform) is StickBreakingTransform:
        return _StickBreaking()
    if type(transform) is OrderedTransform:
        return _StrictlyOrdered()
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(_plain(transform.base_transform), transform.reinterpreted_batch_ndims)
    if not isinstance(transform, ComposeTransform) or not transform.parts:
        return transform
    parts = [_plain(part) for part in transform.parts if not _is_neutral(part)]
    return parts[0] if len(parts) == 1 else ComposeTransform(parts)


def _is_neutral(transform: Transform) -> bool:
    numbers = getattr(transform, "loc", None), getattr(transform, "scale", None)
    return type(transform) is AffineTransform and not any(isinstance(n, Tensor) for n in numbers) and numbers == (0, 1)


def is_identity(transform: Transform) -> bool:
    """Whether a transform leaves everything as it is, as that to real space."""
    base = getattr(transform, "base_transform", transform)
    return getattr(base, "parts", None) == []


def kind_of(transform: Any) -> Any:
    """The class of a transform with those of its parts, to tell supports apart."""
    parts = getattr(transform, "parts", None) or [getattr(transform, "base_transform", None)]
    return type(transform), *(kind_of(part) for part in parts if part is not None)
