"""The variational autoencoder of Pyro's tutorial, with an encoder of its own that returns location and scale.

Diederik P. Kingma, Max Welling, "Auto-Encoding Variational Bayes" (2013); Pyro's tutorial "Variational Autoencoders"
(2017). Unlike the tutorial's, the model takes minibatches by ``subsample``, so that AutoNormal can be trained on them.

Run ``python examples/zoo/vae.py``. Needs scikit-learn for the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _problem import RATES, Problem, indices, main
from pyro.infer import TraceMeanField_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Encoder(nn.Module):
    """From images ``(N, 64)`` to location and scale of z, each ``(N, D)``."""

    def __init__(self, num_pixels: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(num_pixels, hidden_dim), nn.Softplus())
        self.loc = nn.Linear(hidden_dim, latent_dim)
        self.log_scale = nn.Linear(hidden_dim, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


class VAE(nn.Module):
    """p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z))."""

    def __init__(self, num_pixels: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, num_pixels)
        )

    def forward(self, x: Tensor, index: Tensor | None = None) -> None:
        """Images ``(N, 64)``; all of them, or those at ``index``."""
        pyro.module("decoder", self.decoder)
        with images(x, index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=pyro.subsample(x, event_dim=1))


def images(x: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("images", len(x), subsample=index)


def batches(args: tuple[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return ((*args, index) for index in indices(len(args[0]), size))


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    data = torch.tensor(load_digits().data > 8, dtype=torch.float)[torch.randperm(1797)]
    sizes = (64, 16, 2) if small else (64, 64, 8)
    return Problem(
        name="VAE of digits",
        model=VAE(*sizes),
        train=(data[:100] if small else data[:1400],),
        held_out=(data[-4:] if small else data[-50:],),
        encoder=lambda: Encoder(*sizes),
        loss=TraceMeanField_ELBO,
        num_datapoints=lambda x, *_: len(x),
        batches=partial(batches, size=50 if small else 64),
        create_plates=images,
    )


if __name__ == "__main__":
    main(make_problem, num_steps=500, lr=2e-2, rates=RATES)
