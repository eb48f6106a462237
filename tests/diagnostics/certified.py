"""Guides whose posteriors are known, for the tests of certificates."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from models import Function, LinearGaussian
from torch import Tensor

from pyro_amortized import AmortizedGuide
from pyro_amortized.diagnostics.problem import LocalProblem, bind


def guided(model: Callable[..., Any], encode: Callable[..., Any] | None = None, **options: Any) -> AmortizedGuide:
    pyro.clear_param_store()
    return AmortizedGuide(model, None if encode is None else Function(encode), **options)


def oracle() -> LinearGaussian:
    return LinearGaussian.random_weights()


def encode_exactly(shift: float = 0.0, scale: float = 1.0) -> Callable[[Tensor], Any]:
    """Means and sds of the linear-Gaussian posterior, off by so much."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        q = oracle().posterior(x)
        return q.mean + shift * q.stddev, (scale * q.stddev).expand(len(x), -1)

    return encode


def error(draws: Tensor, mean: Tensor, scale: Tensor) -> float:
    """The worst error: of means in units of 0.1 sd, and of sds in units of 10 %."""
    shift, ratio = (draws.mean(0) - mean).abs() / scale, (draws.std(0) / scale - 1).abs()
    return 10 * float(torch.maximum(shift, ratio).max())


def bound(model: Callable[..., Any], guide: AmortizedGuide, *args: Any) -> LocalProblem:
    return bind(model, guide, args, None, 0)
