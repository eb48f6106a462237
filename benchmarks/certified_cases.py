"""Models whose posteriors are known, for ``certificates.py``: exactly, by quadrature, or log-concave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]
"""Means and standard deviations of the flat unconstrained latents, ``(N, D)`` each."""


@dataclass(frozen=True)
class Case:
    """A model with data.

    Attributes:
        name: What it is.
        model: The model of ``x``, ``(N, ...)``.
        simulate: From N and a seed to x.
        truth: From x to the posterior's moments; None for log-concave posteriors: weighted draws around the one mode
            tell them.
    """

    name: str
    model: Callable[[Tensor], None]
    simulate: Callable[[int, int], Tensor]
    truth: Callable[[Tensor], Moments] | None = None


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _simulated(model: Callable[[Tensor], None], blank: Tensor) -> Callable[[int, int], Tensor]:
    """Draws x from the model itself."""

    def simulate(size: int, seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            trace: Any = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(blank.expand(size, *blank.shape))
        return trace.nodes["x"]["value"]

    return simulate


def linear_gaussian(latents: int = 6) -> Case:
    """Independent normal observations of linear functions: the posterior is normal."""
    weights = torch.randn(2 * latents, latents, generator=_rng(0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights.T, 1.0).to_event(1), obs=x)

    def truth(x: Tensor) -> Moments:
        covariance = torch.linalg.inv(torch.eye(latents) + weights.T @ weights)
        return x @ weights @ covariance, covariance.diagonal().sqrt().expand(len(x), -1)

    return Case("linear-Gaussian, D=6", model, _simulated(model, torch.zeros(2 * latents)), truth)


def poisson_factors(latents: int = 6, items: int = 15) -> Case:
    """Counts with log-linear rates: log-concave, skewed where counts are small."""
    weights = 0.5 * torch.randn(items, latents, generator=_rng(1))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((z @ weights.T + 1.0).exp()).to_event(1), obs=x)

    return Case("Poisson factors, D=6", model, _simulated(model, torch.zeros(items)))


def bernoulli_factors(latents: int = 10, items: int = 30) -> Case:
    """Binary answers with linear logits: log-concave."""
    weights = torch.randn(items, latents, generator=_rng(2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weights.T).to_event(1), obs=x)

    return Case("Bernoulli factors, D=10", model, _simulated(model, torch.zeros(items)))


def logit_hierarchy(groups: int = 9, trials: int = 10, *, centred: bool = False) -> Case:
    """Success rates of groups around a mean, with an unknown spread: non-centred or, with a funnel, centred."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.5))
            log_spread = pyro.sample("log_spread", dist.Normal(-0.5, 0.7))
            loc, scale = (mean, log_spread.exp()) if centred else (torch.zeros_like(mean), torch.ones_like(mean))
            effect = pyro.sample(
                "effect", dist.Normal(loc[..., None], scale[..., None]).expand([*loc.shape, groups]).to_event(1)
            )
            logits = effect if centred else mean[..., None] + log_spread.exp()[..., None] * effect
            pyro.sample("x", dist.Binomial(trials, logits=logits).to_event(1), obs=x)

    def truth(x: Tensor) -> Moments:
        """Given mean and spread the effects are independent: integrals over one, by its count, within a plane."""
        means, log_spreads = torch.linspace(-9.0, 9.0, 241), torch.linspace(-4.7, 3.7, 211)
        mean, log_spread = torch.cartesian_prod(means, log_spreads).unbind(-1)
        noise = torch.linspace(-7.0, 7.0, 281)
        logits = mean[:, None] + log_spread.exp()[:, None] * noise
        effect = logits if centred else noise.expand_as(logits)
        given = []
        for count in range(trials + 1):
            likelihood = dist.Binomial(trials, logits=logits).log_prob(torch.tensor(float(count)))
            log_weights = dist.Normal(0.0, 1.0).log_prob(noise) + likelihood
            weights = log_weights.softmax(-1)
            moments = (weights * effect).sum(-1), (weights * effect.square()).sum(-1)
            given.append(torch.stack([log_weights.logsumexp(-1), *moments]))
        tables = torch.stack(given)
        log_prior = dist.Normal(0.0, 1.5).log_prob(mean) + dist.Normal(-0.5, 0.7).log_prob(log_spread)
        above = torch.stack([mean, log_spread], -1)
        first, second = [], []
        for counts in x.long():
            weights = (log_prior + tables[counts, 0].sum(0)).softmax(0)
            first.append(torch.cat([weights @ above, tables[counts, 1] @ weights]))
            second.append(torch.cat([weights @ above.square(), tables[counts, 2] @ weights]))
        loc = torch.stack(first)
        return loc, (torch.stack(second) - loc.square()).sqrt()

    name = "centred" if centred else "non-centred"
    return Case(f"logit hierarchy, {name}, D=11", model, _simulated(model, torch.zeros(groups)), truth)


def _in_a_plane(name: str, prior: Any, likelihood: Callable[[Tensor], Any], reach: float, blank: Tensor) -> Case:
    """A case of two latents whose moments are integrals over a fine grid."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    def truth(x: Tensor) -> Moments:
        line = torch.linspace(-reach, reach, 1201)
        z = torch.cartesian_prod(line, line)
        log_prior, means, scales = prior.log_prob(z), [], []
        for value in x:
            weights = (log_prior + likelihood(z).log_prob(value)).softmax(0)
            means.append(weights @ z)
            scales.append((weights @ (z - means[-1]).square()).sqrt())
        return torch.stack(means), torch.stack(scales)

    return Case(name, model, _simulated(model, blank), truth)


def banana() -> Case:
    """A sum with a square is observed: a curved ridge."""
    prior = dist.Normal(torch.zeros(2), torch.tensor([1.5, 1.5])).to_event(1)
    return _in_a_plane(
        "banana, D=2", prior, lambda z: dist.Normal(z[..., 1] + z[..., 0].square(), 0.3), 8.0, torch.zeros(())
    )


class _Funnel(dist.TorchDistribution):
    """v of scale 1.5, and w of scale exp(v / 2)."""

    support = dist.constraints.real_vector
    has_rsample = True
    arg_constraints: dict[str, Any] = {}

    def __init__(self, batch_shape: Any = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size([2]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Funnel:
        return _Funnel(batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)))
        v = 1.5 * noise[..., 0]
        return torch.stack([v, (v / 2).exp() * noise[..., 1]], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        v, w = z.unbind(-1)
        return dist.Normal(0.0, 1.5).log_prob(v) + dist.Normal(0.0, (v / 2).exp()).log_prob(w)


def funnel() -> Case:
    """A scale and what it scales, both latent: narrow at one end."""
    return _in_a_plane("funnel, D=2", _Funnel(), lambda z: dist.Normal(z[..., 1], 0.5), 12.0, torch.zeros(()))


def far_modes() -> Case:
    """A square is observed: two modes far apart, of unequal weight, for each datapoint."""
    prior = dist.Normal(torch.tensor([0.15, 0.0]), torch.tensor([2.0, 1.0])).to_event(1)

    def likelihood(z: Tensor) -> Any:
        means = torch.stack([z[..., 0].square(), z[..., 1] + 0.2 * z[..., 0]], -1)
        return dist.Normal(means, torch.tensor([0.3, 0.5])).to_event(1)

    return _in_a_plane("two far modes, D=2", prior, likelihood, 8.0, torch.zeros(2))


class _Clusters(dist.MixtureSameFamily):
    """A mixture whose support Pyro's NUTS knows."""

    support = dist.constraints.real_vector


def mixture_prior(latents: int = 6, observed: int = 3) -> Case:
    """Two clusters far apart, of which the data say little: the posterior is a mixture of two normals."""
    weights = 0.3 * torch.randn(observed, latents, generator=_rng(3))
    centre, scale = 1.5 * torch.ones(latents), 0.4
    shares = torch.tensor([0.65, 0.35])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            components = dist.Normal(torch.stack([-centre, centre]), scale).to_event(1)
            z = pyro.sample("z", _Clusters(dist.Categorical(shares), components))
            pyro.sample("x", dist.Normal(z @ weights.T, 3.0).to_event(1), obs=x)

    def truth(x: Tensor) -> Moments:
        precision = torch.eye(latents) / scale**2 + weights.T @ weights / 9.0
        covariance = torch.linalg.inv(precision)
        marginal = scale**2 * weights @ weights.T + 9.0 * torch.eye(observed)
        means, evidence = [], []
        for sign, share in zip((-1.0, 1.0), shares, strict=True):
            means.append((sign * centre / scale**2 + x @ weights / 9.0) @ covariance)
            evidence.append(share.log() + dist.MultivariateNormal(sign * centre @ weights.T, marginal).log_prob(x))
        share = torch.stack(evidence).softmax(0)[..., None]
        mean = (share * torch.stack(means)).sum(0)
        square = (share * (torch.stack(means).square() + covariance.diagonal())).sum(0)
        return mean, (square - mean.square()).sqrt()

    return Case("two clusters, D=6", model, _simulated(model, torch.zeros(observed)), truth)


CASES = {
    "linear": linear_gaussian,
    "poisson": poisson_factors,
    "bernoulli": bernoulli_factors,
    "hierarchy": logit_hierarchy,
    "centred": lambda: logit_hierarchy(centred=True),
    "banana": banana,
    "funnel": funnel,
    "far": far_modes,
    "clusters": mixture_prior,
}
