"""Factor models whose evidence and gaps are known: in closed form, or by a fine grid."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from models import Function
from torch import Tensor, nn

LATENTS, FEATURES, POINTS = 20, 100, 64


class Oracle:
    """x = W z + noise of variances psi; easy: weak, nearly orthogonal loadings; hard: strong correlations."""

    def __init__(self, hard: bool, points: int = POINTS, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        weights = torch.randn(FEATURES, LATENTS, generator=rng)
        if hard:
            correlation = 0.4 * torch.ones(LATENTS, LATENTS) + 0.6 * torch.eye(LATENTS)
            weights = weights @ torch.linalg.cholesky(correlation).T
        else:
            weights = 0.15 * weights
        self.weights, self.psi = weights, 0.5 + torch.rand(FEATURES, generator=rng)
        z = torch.randn(points, LATENTS, generator=rng)
        self.x = z @ weights.T + self.psi.sqrt() * torch.randn(points, FEATURES, generator=rng)
        self.precision = torch.eye(LATENTS) + weights.T @ (weights / self.psi[:, None])
        self.gap = 0.5 * (self.precision.diagonal().log().sum() - torch.logdet(self.precision)).item()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weights.T, self.psi.sqrt()).to_event(1), obs=x)

    def mean(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.precision, self.weights.T @ (x / self.psi).T).T

    def log_evidence(self) -> np.ndarray[Any, Any]:
        covariance = self.weights @ self.weights.T + torch.diag(self.psi)
        return dist.MultivariateNormal(torch.zeros(FEATURES), covariance).log_prob(self.x).numpy()

    def encoder(self, shift: Tensor | float = 0.0) -> nn.Module:
        """The best mean-field posterior, its mean off by ``shift``."""
        return Function(lambda x: (self.mean(x) + shift, self.precision.diagonal().rsqrt().expand(len(x), LATENTS)))


class Factors:
    """A Bernoulli factor model whose evidence a fine grid gives: two latents."""

    def __init__(self, points: int = 12) -> None:
        rng = torch.Generator().manual_seed(1)
        self.weights = 2.0 * torch.randn(6, 2, generator=rng)
        self.x = torch.bernoulli(torch.full((points, 6), 0.5), generator=rng)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ self.weights.T).to_event(1), obs=x)

    def log_evidence(self) -> np.ndarray[Any, Any]:
        axis = torch.linspace(-8, 8, 801)
        z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
        log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_joint = log_joint + dist.Bernoulli(logits=z @ self.weights.T).log_prob(self.x).sum(-1)
        return (log_joint.logsumexp(0) + 2 * math.log(16 / 800)).numpy()
