"""2-se intervals of gap estimates of 300 datapoints under 20 seeds, against closed forms and quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from torch import Tensor

from pyro_amortized import AmortizedGuide, GapEstimate, estimate_gaps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_float64")]

NUM_SEEDS, POINTS = 20, 15
LOW, HIGH = 0.90, 0.99


def estimates(model, data: list[Tensor]) -> tuple[GapEstimate, Tensor, Tensor]:
    """Gap estimates of an untrained guide, each data set under a seed of its own; the guide's locations and scales."""
    guide = AmortizedGuide(model)
    gaps = estimate_gaps(model, guide, iter(data))
    loc, scale = guide.family.marginals(guide.variational_parameters(torch.cat(data)).detach())
    return gaps, loc, scale


def check(gaps: GapEstimate, **truths: Tensor) -> None:
    """Every interval covers its truth in the right share of the unflagged datapoints; one a tenth as wide does not."""
    good = gaps.dataset["reliable"].values
    assert good.mean() > 0.95
    for name, truth in truths.items():
        error = np.abs(gaps.dataset[name].values - truth.numpy())[good]
        standard_error = gaps.dataset[f"{name}_se"].values[good]
        assert LOW <= (error < 2 * standard_error).mean() <= HIGH, name
        assert (error < 0.2 * standard_error).mean() < 0.5, name


def test_linear_gaussian() -> None:
    model = LinearGaussian.random_weights(features=8, latents=4)
    data = [model.simulate(POINTS, seed=seed) for seed in range(NUM_SEEDS)]
    gaps, loc, scale = estimates(model.full, data)
    x = torch.cat(data)
    posterior, log_p = model.posterior(x), model.log_evidence(x)
    precision = posterior.precision_matrix[0]
    best = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    q = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    slack = torch.distributions.kl_divergence(q, posterior)
    check(gaps, log_evidence=log_p, approximation_gap=best.expand(len(x)), inference_gap=slack)
    assert np.abs(gaps.dataset["elbo"].values - (log_p - slack).numpy()).max() < 1e-6  # no noise: quadratic


class Factors:
    """A Bernoulli factor model with two latents, whose integrals quadrature gives."""

    weights = 2.0 * torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ self.weights.T).to_event(1), obs=x)

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return log_prior + dist.Bernoulli(logits=z @ self.weights.T).log_prob(x).sum(-1)

    def log_evidence(self, x: Tensor) -> Tensor:
        axis = torch.linspace(-8, 8, 401)
        z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
        return torch.cat([self.log_joint(z, part).logsumexp(0) for part in x.split(50)]) + 2 * math.log(16 / 400)

    def elbo(self, loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        """By Gauss-Hermite quadrature, the entropy in closed form."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(30))
        grid = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 1, 2)
        share = (weights[:, None] * weights).reshape(-1, 1) / weights.sum().square()
        expected = (share * self.log_joint(loc + scale * grid, x)).sum(0)
        return expected + scale.log().sum(-1) + 1 + math.log(2 * math.pi)

    def best_elbo(self, x: Tensor) -> Tensor:
        phi = torch.zeros(len(x), 4, requires_grad=True)
        optimizer = torch.optim.LBFGS([phi], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -self.elbo(phi[:, :2], phi[:, 2:].exp(), x).sum()
            value.backward()
            return value

        optimizer.step(loss)
        return self.elbo(phi[:, :2], phi[:, 2:].exp(), x).detach()


def test_bernoulli_factors() -> None:
    model = Factors()
    half = torch.full((POINTS, 6), 0.5)
    data = [torch.bernoulli(half, generator=torch.Generator().manual_seed(100 + seed)) for seed in range(NUM_SEEDS)]
    gaps, loc, scale = estimates(model.model, data)
    x = torch.cat(data)
    log_p, elbo, best = model.log_evidence(x), model.elbo(loc, scale, x), model.best_elbo(x)
    check(
        gaps, log_evidence=log_p, elbo=elbo, inference_gap=log_p - elbo, approximation_gap=log_p - best,
        amortization_gap=best - elbo,
    )  # fmt: skip
