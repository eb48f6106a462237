"""Exports of models with closed forms, and what is looked at in them."""

import math
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray
from models import Function, LinearGaussian
from torch import Tensor

from pyro_amortized import AmortizedGuide
from pyro_amortized.export import to_arviz

LATENTS, FEATURES, POINTS = 3, 4, 6


BEFORE_1 = int(arviz.__version__.split(".")[0]) < 1


DEFAULT = {"posterior", "posterior_predictive", "observed_data", "sample_stats"}


LIKELIHOOD = {*DEFAULT, "constant_data", "log_likelihood"}


def with_likelihood(*args: Any, **options: Any) -> Any:
    """An export with all groups: beside local latents the log-likelihood has to be asked for."""
    return to_arviz(*args, groups=LIKELIHOOD, **options)


def exact(oracle: LinearGaussian, model: Any = None, shift: float = 0.0, widen: float = 1.0) -> AmortizedGuide:
    """The exact posterior as a guide, or one that is off."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = oracle.posterior(x)
        return posterior.mean + shift, posterior.stddev * widen

    return AmortizedGuide(model or oracle.full, Function(encode))


def group_names(data: Any) -> set[str]:
    return set(data.groups() if callable(data.groups) else data.children)


def draws(data: Any, group: str, name: str) -> np.ndarray[Any, Any]:
    """Values without the chain axis."""
    return data[group][name].values[0]


def mean_error(values: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest error of means over draws, in standard errors."""
    return float(np.abs((values.mean(0) - expected) / (values.std(0) / math.sqrt(len(values)))).max())


KINDS = {
    "full": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "unsized": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "explicit": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "random": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "rows": (("data", "latents"), ("data", "features"), ("data", "features")),
    "columns": (("latents", "data"), ("features", "data"), ("features", "data")),
}


def call(oracle: LinearGaussian, kind: str) -> tuple[Any, tuple[Tensor, ...], AmortizedGuide]:
    x, model = oracle.simulate(POINTS), getattr(oracle, kind)
    index = (torch.tensor([4, 1, 3]),) if kind == "explicit" else ()
    args = (x.T if kind == "columns" else x, *index)
    return model, args, exact(oracle, model)


def regression(t: Tensor, y: Tensor, exposure: float = 1.0) -> None:
    """Groups as datapoints, each with an inner plate of observations; global latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("terms", 2):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    groups, times = pyro.plate("groups", len(y), dim=-2), pyro.plate("times", y.shape[1], dim=-1)
    with groups:
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with times:
            trend = (slope * torch.tensor([1.0, 0.0])).sum(-1, keepdim=True) * t
            pyro.sample("y", dist.Normal(level + exposure * trend, 0.5), obs=y)


def regression_data(groups: int = 5) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.0, 1.0, 4).expand(groups, 4).contiguous(), torch.randn(groups, 4)


def linear_regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, noise), obs=y)


def as_datasets(data: Any) -> dict[str, xarray.Dataset]:
    return {name: xarray.Dataset(dict(data[name].data_vars)) for name in group_names(data)}
