"""The causal effect VAE that comes with Pyro, ``pyro.contrib.cevae``, on data as in its example.

Christos Louizos, Uri Shalit, Joris Mooij, David Sontag, Richard Zemel, Max Welling, "Causal Effect Inference with Deep
Latent-Variable Models" (2017); Pyro's contributors (2019). Treatment and outcome are observed in training. That they
have parts in the authors' guide too serves predictions; these are left out here, as they are in its ELBO.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.contrib.cevae import CEVAE, PreWhitener
from torch import Tensor

from public._model import Program, PublicModel


def simulate(num_datapoints: int, feature_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    z = dist.Bernoulli(0.5).sample((num_datapoints,))
    x = dist.Normal(z, 5 * z + 3 * (1 - z)).sample((feature_dim,)).T
    t = dist.Bernoulli(0.75 * z + 0.25 * (1 - z)).sample()
    y = dist.Bernoulli(logits=3 * (z + 2 * (2 * t - 2))).sample()
    return PreWhitener(x)(x), t, y


def make() -> tuple[Program, Program]:
    parts = CEVAE(feature_dim=5, latent_dim=4, hidden_dim=32, num_layers=2)
    return parts.model, parts.guide


def cevae() -> PublicModel:
    torch.manual_seed(0)
    return PublicModel(make=make, calls=(simulate(500, 5),), hidden=("t", "y"))
