"""Datapoints whose log evidence is hard to estimate and known: in closed form, or by quadrature on a fine grid."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["DEVELOPED", "HELD_OUT", "Hard", "integrate"]

SIZE = 25


@dataclass
class Hard:
    """A model, the arguments of one call of it, and the log evidence of every datapoint there, ``(N,)``."""

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    truth: Tensor


DEVELOPED: dict[str, Callable[[], Hard]] = {}
"""Families that the estimator was developed on."""
HELD_OUT: dict[str, Callable[[], Hard]] = {}
"""Families whose results were looked at once it was finished."""


def developed(function: Callable[[], Hard]) -> Callable[[], Hard]:
    DEVELOPED[function.__name__] = function
    return function


def held_out(function: Callable[[], Hard]) -> Callable[[], Hard]:
    HELD_OUT[function.__name__] = function
    return function


def integrate(log_f: Callable[[Tensor], Tensor], centres: Tensor, scale: float, reach: float = 12.0) -> Tensor:
    """Log of an integral over the real line, ``(N,)``, by the trapezoidal rule.

    Args:
        log_f: Log of the integrand at points ``(N, G)``.
        centres: Where the grid is finest, ``(N, C)``; its spacing grows in proportion to the distance.
        scale: Distance from a centre at which it starts to grow.
        reach: The grid ends ``scale * sinh(reach)`` from the centres.
    """
    offsets = scale * torch.sinh(torch.linspace(-reach, reach, int(3000 * reach) + 1))
    grid = (centres.unsqueeze(-1) + offsets).flatten(1).sort(-1).values
    widths = grid.diff(dim=-1)
    weights = 0.5 * (torch.nn.functional.pad(widths, (1, 0)) + torch.nn.functional.pad(widths, (0, 1)))
    return (log_f(grid) + weights.log()).nan_to_num(nan=-math.inf).logsumexp(-1)


def between(low: float, high: float, *shape: int, seed: int = 0) -> Tensor:
    """Numbers between two positive ones, evenly on the scale of logarithms."""
    uniform = torch.rand(SIZE, *shape, generator=torch.Generator().manual_seed(seed))
    return (math.log(low) + uniform * math.log(high / low)).exp()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(SIZE, *shape, generator=torch.Generator().manual_seed(seed))


def mixture(log_shares: Tensor, log_probs: Tensor) -> Tensor:
    """Log-density of a mixture over the last axis."""
    return (log_shares + log_probs).logsumexp(-1)


@developed
def heavy_tails() -> Hard:
    """Prior and likelihood with heavy tails, far from each other: one mode at each."""
    x, df = between(2.0, 100.0), between(0.8, 4.0, seed=1)
    prior, noise = between(0.05, 0.5, seed=2), between(0.05, 0.5, seed=3)

    def model(x: Tensor, df: Tensor, prior: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(df, 0.0, prior))
            pyro.sample("x", dist.StudentT(df, z, noise), obs=x)

    def log_joint(z: Tensor) -> Tensor:
        a, b, c, d = (v.unsqueeze(-1) for v in (x, df, prior, noise))
        return dist.StudentT(b, 0.0, c).log_prob(z) + dist.StudentT(b, z, d).log_prob(a)

    return Hard(model, (x, df, prior, noise), integrate(log_joint, torch.stack([0 * x, x], -1), 0.5))


def squares(dim: int) -> Hard:
    """Two modes in every dimension, of equal mass."""
    noise = between(0.02, 0.3, dim, seed=dim)
    x = normals(dim, seed=dim + 1).square() + noise * normals(dim, seed=dim + 2)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square(), noise).to_event(1), obs=x)

    a, b = x.flatten(), noise.flatten()
    root = a.clamp(min=0.0).sqrt()

    def log_joint(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), b.unsqueeze(-1)).log_prob(a.unsqueeze(-1))

    truth = integrate(log_joint, root.unsqueeze(-1), 0.1, 8.0).reshape(-1, dim).sum(-1)
    return Hard(model, (x, noise), truth)


@developed
def squares_4d() -> Hard:
    return squares(4)


@developed
def squares_8d() -> Hard:
    whole = squares(8)
    few = slice(5)  # 256 modes each
    return Hard(whole.model, (whole.args[0][few], whole.args[1][few]), whole.truth[few])


@developed
def saturated_beta() -> Hard:
    """Beta priors of small shapes, whose mass lies where the transform saturates, and no successes or no failures."""
    shapes = between(0.02, 0.5, 2)
    total = torch.tensor([1.0, 2.0, 10.0, 100.0, 10000.0]).repeat(5)
    share = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.1]).repeat_interleave(5)
    x = (share * total).round()

    def model(x: Tensor, shapes: Tensor, total: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(shapes[:, 0], shapes[:, 1]))
            pyro.sample("x", dist.Binomial(total, z), obs=x)

    return Hard(model, (x, shapes, total), dist.BetaBinomial(shapes[:, 0], shapes[:, 1], total).log_prob(x))


@developed
def tiny_gamma() -> Hard:
    """Gamma priors of tiny shape."""
    shape, rate = between(0.01, 0.3), between(0.05, 5.0, seed=1)
    x = torch.tensor([0.0, 0.0, 1.0, 3.0, 200.0]).repeat(5)

    def model(x: Tensor, shape: Tensor, rate: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(shape, rate))
            pyro.sample("x", dist.Poisson(z), obs=x)

    return Hard(model, (x, shape, rate), dist.GammaPoisson(shape, rate).log_prob(x))


@developed
def half_cauchy_scale() -> Hard:
    """A half-Cauchy standard deviation, and observations that are far smaller or larger than its scale."""
    x = between(0.001, 100.0, 1) * normals(2, seed=1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfCauchy(1.0))
            pyro.sample("x", dist.Normal(torch.zeros(2), z.unsqueeze(-1)).to_event(1), obs=x)

    def log_joint(u: Tensor) -> Tensor:
        likelihood = dist.Normal(0.0, u.exp().unsqueeze(-1)).log_prob(x.unsqueeze(1)).sum(-1)
        return dist.HalfCauchy(1.0).log_prob(u.exp()) + u + likelihood

    size = x.square().mean(-1).sqrt().log()
    return Hard(model, (x,), integrate(lambda u: log_joint(u.clamp(-60, 60)) - 1e9 * (u.abs() > 60), size[:, None], 1))


@developed
def enumerated_mixture() -> Hard:
    """A discrete latent, summed out, chooses the prior's mean and scale in two dimensions."""
    locs = torch.tensor([[-4.0, 0.0], [4.0, 1.0], [0.0, 9.0]])
    scales, shares = torch.tensor([0.1, 1.0, 0.3]), torch.tensor([0.2, 0.7, 0.1])
    noise, x = between(0.3, 6.0), 4 * normals(2, seed=1)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(shares), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(locs[k], scales[k].unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z, noise.unsqueeze(-1)).to_event(1), obs=x)

    spread = (scales.square() + noise.square().unsqueeze(-1)).sqrt().unsqueeze(-1)
    log_probs = dist.Normal(locs, spread).log_prob(x.unsqueeze(1)).sum(-1)
    return Hard(model, (x, noise), mixture(shares.log(), log_probs))


@developed
def spike_and_slab() -> Hard:
    """A narrow and a wide component of the prior in each of three dimensions."""
    scales, shares = torch.tensor([0.01, 3.0]), torch.tensor([0.7, 0.3])
    noise, x = between(0.05, 1.0, 3), 1.5 * normals(3, seed=1)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for i in range(3):
                k = pyro.sample(f"k{i}", dist.Categorical(shares), infer={"enumerate": "parallel"})
                z = pyro.sample(f"z{i}", dist.Normal(0.0, scales[k]))
                pyro.sample(f"x{i}", dist.Normal(z, noise[:, i]), obs=x[:, i])

    spread = (scales.square() + noise.square().unsqueeze(-1)).sqrt()
    log_prob = mixture(shares.log(), dist.Normal(0.0, spread).log_prob(x.unsqueeze(-1)))
    return Hard(model, (x, noise), log_prob.sum(-1))


@developed
def label_switching() -> Hard:
    """Four observations of a mixture of three normals of unknown means: all permutations of the means are modes."""
    noise = between(0.1, 1.0)
    x = 2 * normals(4, seed=1)
    count = 3

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(count), 2.0).to_event(1))
            parts = dist.Normal(z.unsqueeze(-2).expand(*z.shape[:-1], 4, count), noise[:, None, None])
            shares = dist.Categorical(torch.full((4, count), 1 / count))
            pyro.sample("x", dist.MixtureSameFamily(shares, parts).to_event(1), obs=x)

    total = torch.empty(0, SIZE)
    for labels in product(range(count), repeat=4):
        same = (torch.tensor(labels).unsqueeze(0) == torch.tensor(labels).unsqueeze(1)).to(x)
        covariance = 4 * same + noise[:, None, None].square() * torch.eye(4)
        log_prob = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x)
        total = torch.cat([total, log_prob.unsqueeze(0)])
    return Hard(model, (x, noise), total.logsumexp(0) - 4 * math.log(count))


@developed
def banana() -> Hard:
    """A curved ridge with two arms."""
    curve, width, noise = between(0.5, 5.0), between(0.03, 0.3, seed=1), between(0.1, 1.0, seed=2)
    x = curve * normals(seed=3).square() + noise * normals(seed=4)

    def model(x: Tensor, curve: Tensor, width: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(curve * z.square(), width))
            pyro.sample("x", dist.Normal(w, noise), obs=x)

    def log_joint(z: Tensor) -> Tensor:
        spread = (width.square() + noise.square()).sqrt().unsqueeze(-1)
        likelihood = dist.Normal(curve.unsqueeze(-1) * z.square(), spread).log_prob(x.unsqueeze(-1))
        return dist.Normal(0.0, 1.0).log_prob(z) + likelihood

    root = (x / curve).clamp(min=0.0).sqrt()
    return Hard(model, (x, curve, width, noise), integrate(log_joint, torch.stack([-root, root], -1), 0.05))


@developed
def funnel() -> Hard:
    """A scale mixture: three normals whose variance is log-normal."""
    noise = between(0.1, 1.0)
    x = between(0.1, 10.0, 1, seed=1) * normals(3, seed=2)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(3), (0.5 * v).exp().unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z, noise.unsqueeze(-1)).to_event(1), obs=x)

    def log_joint(v: Tensor) -> Tensor:
        spread = (v.clamp(max=200).exp() + noise.square().unsqueeze(-1)).sqrt().unsqueeze(-1)
        return dist.Normal(0.0, 3.0).log_prob(v) + dist.Normal(0.0, spread).log_prob(x.unsqueeze(1)).sum(-1)

    return Hard(model, (x, noise), integrate(log_joint, torch.zeros(SIZE, 1), 1.0))


@developed
def outliers() -> Hard:
    """A robust likelihood: each observation is close to the latent, or has nothing to do with it."""
    noise, x = between(0.02, 0.5), 3 * normals(3, seed=1)
    shares = torch.tensor([0.8, 0.2])

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            locs = torch.stack([z, 0 * z], -1).unsqueeze(-2).expand(*z.shape, 3, 2)
            scales = torch.stack([noise, torch.full_like(noise, 5.0)], -1).unsqueeze(-2)
            each = dist.MixtureSameFamily(dist.Categorical(shares.expand(3, 2)), dist.Normal(locs, scales))
            pyro.sample("x", each.to_event(1), obs=x)

    total = []
    for own in product((True, False), repeat=3):
        keep = torch.tensor(own)
        log_prob = dist.Normal(0.0, 5.0).log_prob(x[:, ~keep]).sum(-1) + keep.sum() * math.log(0.8)
        log_prob = log_prob + (~keep).sum() * math.log(0.2)
        if keep.any():
            size = int(keep.sum())
            covariance = 9.0 + noise[:, None, None].square() * torch.eye(size)
            log_prob = log_prob + dist.MultivariateNormal(torch.zeros(size), covariance).log_prob(x[:, keep])
        total.append(log_prob)
    return Hard(model, (x, noise), torch.stack(total).logsumexp(0))


@held_out
def horseshoe() -> Hard:
    """Two coefficients with half-Cauchy scales of their own."""
    noise = between(0.1, 1.0)
    x = between(0.1, 20.0, 2, seed=1) * normals(2, seed=2)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2)).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, noise.unsqueeze(-1)).to_event(1), obs=x)

    a, b = x.flatten().unsqueeze(-1), noise.repeat_interleave(2).unsqueeze(-1)

    def log_joint(u: Tensor) -> Tensor:
        u = u.clamp(-60, 60)
        spread = (u.mul(2).exp() + b.square()).sqrt()
        return dist.HalfCauchy(1.0).log_prob(u.exp()) + u + dist.Normal(0.0, spread).log_prob(a)

    size = a.abs().clamp(min=0.1).log()
    each = integrate(lambda u: log_joint(u) - 1e9 * (u.abs() > 60), size, 1.0)
    return Hard(model, (x, noise), each.reshape(-1, 2).sum(-1))


@held_out
def products() -> Hard:
    """Only the product of two latents is observed: two ridges."""
    noise = between(0.05, 1.0)
    x = normals(seed=1) * normals(seed=2) * 2 + noise * normals(seed=3)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.prod(-1), noise), obs=x)

    def log_joint(z: Tensor) -> Tensor:
        spread = (z.square() + noise.square().unsqueeze(-1)).sqrt()
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(0.0, spread).log_prob(x.unsqueeze(-1))

    return Hard(model, (x, noise), integrate(log_joint, torch.zeros(SIZE, 1), 0.05))


@held_out
def sparse_dirichlet() -> Hard:
    """Proportions with most of their mass at the corners, and counts with zeros."""
    concentration = between(0.05, 1.0, 4)
    x = (
        (3 * normals(4, seed=1)).softmax(-1) * torch.tensor([2.0, 5.0, 20.0, 100.0, 1000.0]).repeat(5)[:, None]
    ).round()

    def model(x: Tensor, concentration: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Multinomial(probs=z, validate_args=False), obs=x)

    total, counts = concentration.sum(-1), x.sum(-1)
    truth = (counts + 1).lgamma() + total.lgamma() - (counts + total).lgamma()
    truth = truth + ((x + concentration).lgamma() - (x + 1).lgamma() - concentration.lgamma()).sum(-1)
    return Hard(model, (x, concentration), truth)


@held_out
def waves() -> Hard:
    """Several modes of different height in each of three dimensions."""
    speed, noise = between(0.8, 2.0, 3), between(0.1, 0.5, 3, seed=1)
    x = (speed * 2 * normals(3, seed=2)).sin() + noise * normals(3, seed=3)

    def model(x: Tensor, speed: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            pyro.sample("x", dist.Normal((speed * z).sin(), noise).to_event(1), obs=x)

    a, b, c = (v.flatten().unsqueeze(-1) for v in (x, speed, noise))

    def log_joint(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal((b * z).sin(), c).log_prob(a)

    each = integrate(log_joint, torch.zeros(len(a), 1), 1.0)
    return Hard(model, (x, speed, noise), each.reshape(-1, 3).sum(-1))


@held_out
def far_component() -> Hard:
    """A rare and narrow component of the prior, far from the common one; some data speak for it."""
    far, width, noise = between(5.0, 60.0), between(0.02, 1.0, seed=1), between(1.0, 20.0, seed=2)
    x = torch.where(torch.arange(SIZE) % 2 == 0, far, 2 * normals(seed=3)) + noise * normals(seed=4)

    def model(x: Tensor, far: Tensor, width: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.05), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(k * far, 1 + k * (width - 1)))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    locs, scales = torch.stack([0 * far, far], -1), torch.stack([torch.ones_like(far), width], -1)
    spread = (scales.square() + noise.square().unsqueeze(-1)).sqrt()
    log_probs = dist.Normal(locs, spread).log_prob(x.unsqueeze(-1))
    return Hard(model, (x, far, width, noise), mixture(torch.tensor([0.95, 0.05]).log(), log_probs))


@held_out
def rings() -> Hard:
    """The distance from the origin is observed: the posterior is a thin shell in three dimensions."""
    noise = between(0.02, 0.3)
    x = normals(3, seed=1).norm(dim=-1) + noise * normals(seed=2)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.norm(dim=-1), noise), obs=x)

    def log_joint(r: Tensor) -> Tensor:
        log_prior = 2 * r.abs().log() - 0.5 * r.square() + 0.5 * math.log(2 / math.pi)
        value = log_prior + dist.Normal(r, noise.unsqueeze(-1)).log_prob(x.unsqueeze(-1))
        return torch.where(r > 0, value, -math.inf)

    return Hard(model, (x, noise), integrate(log_joint, x.unsqueeze(-1), 0.02))


@held_out
def certain_logits() -> Hard:
    """Wide priors of a logit, and many successes without a failure."""
    width = between(1.0, 30.0)
    total = torch.tensor([1.0, 10.0, 100.0, 1000.0, 100000.0]).repeat(5)
    x = torch.where(torch.arange(SIZE) % 3 == 0, 0.0, total)

    def model(x: Tensor, width: Tensor, total: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0.0, width))
            pyro.sample("x", dist.Binomial(total, logits=z), obs=x)

    def log_joint(z: Tensor) -> Tensor:
        sign = torch.where(x == 0, 1.0, -1.0).unsqueeze(-1)
        return dist.Cauchy(0.0, width.unsqueeze(-1)).log_prob(z) - total.unsqueeze(-1) * torch.nn.functional.softplus(
            sign * z
        )

    return Hard(model, (x, width, total), integrate(log_joint, torch.zeros(SIZE, 1), 1.0, 20.0))


@held_out
def sensors() -> Hard:
    """A place in the plane whose distances to two sensors are observed: a mirror image that is no change of sign."""
    ends = torch.tensor([[-1.0, 0.5], [1.5, -0.5]])
    noise = between(0.05, 0.3)
    place = 1.5 * normals(2, seed=1)
    x = (place.unsqueeze(1) - ends).norm(dim=-1) + noise.unsqueeze(-1) * normals(2, seed=2)

    def model(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))
            far = (z.unsqueeze(-2) - ends).norm(dim=-1)
            pyro.sample("x", dist.Normal(far, noise.unsqueeze(-1)).to_event(1), obs=x)

    axis = torch.linspace(-9, 9, 1401)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_prior = dist.Normal(0.0, 1.5).log_prob(grid).sum(-1)
    far = (grid.unsqueeze(1) - ends).norm(dim=-1)
    values = [
        (log_prior + dist.Normal(far, s).log_prob(row).sum(-1)).logsumexp(0) for row, s in zip(x, noise, strict=True)
    ]
    return Hard(model, (x, noise), torch.stack(values) + 2 * math.log(18 / 1400))
