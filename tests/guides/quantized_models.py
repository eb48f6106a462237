"""A model of vector-quantised codes with its encoder and guide, and what the tests of codes share."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_amortized import Codebook, VectorQuantizedGuide

POSITIONS, CODES, DIM, PIXELS = 3, 5, 2, 4


class VQVAE(nn.Module):
    """p(x, k) = prod_i 1/K N(x; W e_k, 0.5), positions in a plate or in the event."""

    def __init__(self, *, to_event: bool = True, prior: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.codebook = Codebook(CODES, DIM, **options)
        self.weights = nn.Parameter(torch.randn(POSITIONS * DIM, PIXELS))
        self.to_event = to_event
        self.prior = torch.zeros(CODES) if prior is None else prior

    def code(self) -> Tensor:
        """The codes ``(N, P)``."""
        if self.to_event:
            return pyro.sample("code", dist.Categorical(logits=self.prior.expand(POSITIONS, -1)).to_event(1))
        with pyro.plate("positions", POSITIONS, dim=-2):
            return pyro.sample("code", dist.Categorical(logits=self.prior)).movedim(-2, -1)

    def forward(self, x: Tensor, size: int | None = None) -> None:
        pyro.module("vqvae", self)
        with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1):
            mean = self.codebook(self.code()).flatten(-2) @ self.weights
            if mean.dim() == 3 and not self.to_event:  # particles lie on the left of the plate of positions
                mean = mean.unsqueeze(1)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    def log_likelihood(self, x: Tensor, codes: Tensor) -> Tensor:
        """log p(x | k), ``(N,)``, of codes ``(N, P)``."""
        mean = self.codebook.embeddings[codes].flatten(1) @ self.weights
        return dist.Normal(mean, 0.5).log_prob(x).sum(-1)


class Encoder(nn.Module):
    """Features ``(N, P, D)``, linear in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(PIXELS, POSITIONS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(-1, POSITIONS, DIM)


def data(size: int = 30, seed: int = 3) -> Tensor:
    return torch.randn(size, PIXELS, generator=torch.Generator().manual_seed(seed))


def setup(x: Tensor, **options: Any) -> tuple[VQVAE, Encoder, VectorQuantizedGuide]:
    keys = {"to_event", "prior", "decay", "revive_below"} & options.keys()
    model, encoder = VQVAE(**{key: options.pop(key) for key in keys}), Encoder()
    guide = VectorQuantizedGuide(model, model.codebook, encoder, **options)
    guide.setup(x)
    return model, encoder, guide


def nearest(codebook: Codebook, features: Tensor) -> Tensor:
    """The definition."""
    return (features.unsqueeze(-2) - codebook.embeddings).square().sum(-1).argmin(-1)
