"""Small hierarchical models of Pyro's examples, of groups that share what they know.

Pyro's contributors, "Example: analyzing baseball stats with MCMC" (2018, ``baseball.py``) and ``eight_schools`` (2017).
The data are those of Bradley Efron, Carl Morris, "Data Analysis Using Stein's Estimator and its Generalizations"
(1975), and of Donald B. Rubin, "Estimation in Parallel Randomized Experiments" (1981).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from public._model import PublicModel

HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)
"""Of 18 players in their first 45 times at bat in 1970."""


def partially_pooled(at_bats: Tensor, hits: Tensor) -> Tensor:
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        return pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def partially_pooled_with_logit(at_bats: Tensor, hits: Tensor) -> Tensor:
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("num_players", at_bats.shape[0]):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        return pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)


def baseball() -> PublicModel:
    return PublicModel(make=lambda: (partially_pooled, None), calls=(_players(),))


def baseball_logit() -> PublicModel:
    return PublicModel(make=lambda: (partially_pooled_with_logit, None), calls=(_players(),))


def _players() -> tuple[Tensor, Tensor]:
    hits = torch.tensor(HITS, dtype=torch.float)
    return torch.full_like(hits, 45.0), hits


def schools(data: Tensor) -> None:
    """Effects and their standard errors ``(J, 2)``; there is no plate, in whose place SVI wants ``to_event``."""
    y, sigma = data.unbind(-1)
    eta = pyro.sample("eta", dist.Normal(torch.zeros(len(data)), torch.ones(len(data))).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10.0 * torch.ones(1)).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(scale=25.0 * torch.ones(1)).to_event(1))
    pyro.sample("obs", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)


def guide_of_schools(data: Tensor) -> None:
    def normal(name: str, size: int) -> dist.TorchDistribution:
        loc = pyro.param(f"loc_{name}", lambda: torch.randn(size))
        scale = pyro.param(f"scale_{name}", lambda: 0.1 * torch.rand(size), constraint=constraints.positive)
        return dist.Normal(loc, scale).to_event(1)

    pyro.sample("eta", normal("eta", len(data)))
    pyro.sample("mu", normal("mu", 1))
    pyro.sample("tau", dist.TransformedDistribution(normal("logtau", 1), [dist.transforms.ExpTransform()]))


def eight_schools() -> PublicModel:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return PublicModel(make=lambda: (schools, guide_of_schools), calls=((torch.stack([y, sigma], -1),),))
