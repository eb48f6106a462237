"""Models that the tests share. The linear-Gaussian one knows its posterior and evidence exactly."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class LinearGaussian:
    """z_n ~ N(0, I) of D dimensions, x_n ~ N(W z_n, I), for any number of datapoints, in plates of every kind."""

    batch_size = 4  # of the random subsample

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    def random_weights(cls, features: int = 4, latents: int = 3, *, orthogonal: bool = False) -> "LinearGaussian":
        """Orthogonal columns make the posterior of a datapoint a product over its latents."""
        weights = torch.randn(features, latents, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return cls(
            (torch.linalg.qr(weights)[0] * torch.arange(1.0, latents + 1) if orthogonal else weights).to(_dtype())
        )

    def simulate(self, size: int, seed: int = 7) -> Tensor:
        noise = torch.randn(
            size, sum(self.weights.shape), generator=torch.Generator().manual_seed(seed), dtype=_dtype()
        )
        return noise[:, : self.weights.shape[1]] @ self.weights.T + noise[:, self.weights.shape[1] :]

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        precision = torch.eye(self.weights.shape[1], dtype=_dtype()) + self.weights.T @ self.weights
        return dist.MultivariateNormal(
            torch.linalg.solve(precision, self.weights.T @ x.T).T, covariance_matrix=torch.linalg.inv(precision)
        )

    def log_evidence(self, x: Tensor) -> Tensor:
        covariance = torch.eye(len(self.weights), dtype=_dtype()) + self.weights @ self.weights.T
        return dist.MultivariateNormal(torch.zeros(len(self.weights), dtype=_dtype()), covariance).log_prob(x)

    def _datapoint(self, x: Tensor, batch_shape: tuple[int, ...] = ()) -> None:
        latents = self.weights.shape[1]
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([*batch_shape, latents]).to_event(1))
        pyro.sample("x", dist.Normal(z @ self.weights.T, 1.0).to_event(1), obs=x)

    def full(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self._datapoint(x)

    def explicit(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            self._datapoint(x[index])

    def random(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=self.batch_size) as index:
            self._datapoint(x[index])

    def unsized(self, x: Tensor) -> None:
        with pyro.plate("data"):
            self._datapoint(x, (len(x),))

    def rows(self, x: Tensor) -> None:
        """Datapoints at dim -2, with the latents in an inner plate on their right."""
        data = pyro.plate("data", len(x), dim=-2)
        with data, pyro.plate("latents", self.weights.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with data, pyro.plate("features", len(self.weights), dim=-1):
            pyro.sample("x", dist.Normal(z @ self.weights.T, 1.0), obs=x)

    def columns(self, x: Tensor) -> None:
        """Data of shape (features, N): datapoints at dim -1, with the latents in an inner plate on their left."""
        data = pyro.plate("data", x.shape[1], dim=-1)
        with data, pyro.plate("latents", self.weights.shape[1], dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with data, pyro.plate("features", len(self.weights), dim=-2):
            pyro.sample("x", dist.Normal(self.weights @ z, 1.0), obs=x)


class Function(nn.Module):
    """An encoder that is a function of its inputs, to features or to location and scale."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _dtype() -> torch.dtype:
    return torch.get_default_dtype()


def topics(x: Tensor) -> None:
    """Constrained global latents in a plate of their own, and constrained local ones."""
    with pyro.plate("topics", 3):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        size = pyro.sample("size", dist.LogNormal(0.5, 0.7))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Poisson(size * (share * rate.unsqueeze(-2)).sum(-1)), obs=x)


def counts(size: int) -> Tensor:
    return torch.poisson(torch.full((size,), 3.0), generator=torch.Generator().manual_seed(1))


def uniform_bounds(x: Tensor, low: Tensor) -> None:
    """A local latent whose support depends on an argument's values."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(low, low + 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def chains(x: Tensor, lengths: Tensor) -> None:
    """As many local latents as the longest sequence has steps: structure that depends on an argument's values."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(int(lengths.max())):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(lengths > t), obs=x[:, t])
