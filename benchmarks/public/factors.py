"""A deep exponential family of Pyro's examples, on scikit-learn's digits as counts.

Pyro's contributors, "Example: Sparse Gamma Deep Exponential Family" (2018, ``sparse_gamma_def.py``); the model is of
Rajesh Ranganath, Linpeng Tang, Laurent Charlin, David M. Blei, "Deep Exponential Families" (2015). The guide is the
example's custom one, whose clipping of the parameters after each step is done here as they are used.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from public._model import PublicModel

TOP, MID, BOTTOM, NUM_PIXELS = 20, 10, 5, 64
SIZES = {"top": (TOP, MID), "mid": (MID, BOTTOM), "bottom": (BOTTOM, NUM_PIXELS)}


def model(x: Tensor) -> None:
    alpha_z, beta_z, alpha_w, beta_w = 0.1, 0.1, 0.1, 0.3
    weights = {}
    for name, (above, below) in SIZES.items():
        with pyro.plate(f"w_{name}_plate", above * below):
            weight = pyro.sample(f"w_{name}", dist.Gamma(alpha_w, beta_w))
        weights[name] = weight.reshape(above, below) if weight.dim() == 1 else weight.reshape(-1, above, below)
    with pyro.plate("data", x.size(0)):
        z_top = pyro.sample("z_top", dist.Gamma(alpha_z, beta_z).expand([TOP]).to_event(1))
        mean_mid = torch.matmul(z_top, weights["top"])
        z_mid = pyro.sample("z_mid", dist.Gamma(alpha_z, beta_z / mean_mid).to_event(1))
        mean_bottom = torch.matmul(z_mid, weights["mid"])
        z_bottom = pyro.sample("z_bottom", dist.Gamma(alpha_z, beta_z / mean_bottom).to_event(1))
        mean_obs = torch.matmul(z_bottom, weights["bottom"])
        pyro.sample("obs", dist.Poisson(mean_obs).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    def gamma(name: str, *shape: int) -> dist.Gamma:
        alpha = pyro.param(f"alpha_q_{name}", lambda: 0.5 + 0.1 * torch.randn(shape)).clamp(min=-2.5)
        mean = pyro.param(f"mean_q_{name}", lambda: 0.1 * torch.randn(shape)).clamp(min=-4.5)
        alpha, mean = F.softplus(alpha), F.softplus(mean)
        return dist.Gamma(alpha, alpha / mean)

    for name, (above, below) in SIZES.items():
        with pyro.plate(f"w_{name}_plate", above * below):
            pyro.sample(f"w_{name}", gamma(f"w_{name}", above * below))
    with pyro.plate("data", x.size(0)):
        for name, (width, _) in SIZES.items():
            pyro.sample(f"z_{name}", gamma(f"z_{name}", x.size(0), width).to_event(1))


def sparse_gamma_def() -> PublicModel:
    x = torch.tensor(load_digits().data, dtype=torch.float)[torch.randperm(1797)[:200]]
    return PublicModel(make=lambda: (model, guide), calls=((x,),))
