"""Two Gaussian models whose gaps are exact: observations that share a mean, and a chain over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, MLPEncoder, PerDatapointGuide, SequenceEncoder

SHARED_WIDTHS = (-1, 0, 1, 2, 4, 8)
"""Of encoders with one hidden layer; -1 stands for an encoder that sees nothing, 0 for a linear one."""
CHAIN_WIDTHS = (0, 2, 4, 8, 16, 32)
SEEN = {"own": 0, "1 each side": 1, "3 each side": 3, "whole series": None}
"""What the encoder of z_n sees: the number of neighbours on each side."""
STEPS, CORRELATION, NOISE = 20, 0.9, 1.0


@dataclass
class Posterior:
    """A Gaussian posterior of D latents, for each of N datapoints.

    Attributes:
        mean: Its means ``(N, D)``.
        precision: Its precision matrix ``(D, D)``.
    """

    mean: Tensor
    precision: Tensor

    def gap(self, loc: Tensor, scale: Tensor) -> Tensor:
        """How much the ELBO of independent normals ``(N, D)`` lies below that of the best ones, ``(N,)``, exactly."""
        error = loc - self.mean
        ratio = scale.square() * self.precision.diagonal()
        return 0.5 * ((error @ self.precision * error).sum(-1) + (ratio - 1 - ratio.log()).sum(-1))


def minimise(loss: Callable[[], Tensor], parameters: Sequence[Tensor], num_steps: int) -> None:
    """L-BFGS with strong Wolfe conditions."""
    optimizer = torch.optim.LBFGS(
        list(parameters),
        max_iter=num_steps,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


class Nothing(nn.Module):
    """An encoder that sees nothing: the same features for every datapoint."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros ``(N, 1)``."""
        return x.new_zeros(len(x), 1)


def make_encoder(num_inputs: int, width: int) -> nn.Module:
    """An encoder with one hidden layer; without one if its width is 0."""
    return Nothing() if width < 0 else MLPEncoder(num_inputs, (width,) if width else ())


# Observations with a shared mean


def shared_mean(x: Tensor) -> None:
    """p(theta, z, x) = N(theta; 0, 1) prod_n N(z_n; 0, 1) N(x_n; z_n + theta, 1)."""
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("observations", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + theta, 1.0), obs=x)


def shared_mean_posterior(x: Tensor) -> Posterior:
    """Of theta and all z_n."""
    num = len(x)
    precision = torch.cat([x.new_full((1,), 1.0 + num), x.new_full((num,), 2.0)]).diag()
    precision[0, 1:] = precision[1:, 0] = 1.0
    mean = torch.linalg.solve(precision, torch.cat([x.sum().unsqueeze(0), x]))
    return Posterior(mean.unsqueeze(0), precision)


def shared_mean_gap(guide: Any, x: Tensor, posterior: Posterior) -> Tensor:
    """The gap per observation."""
    local = guide.posterior(x).base_dist
    locs, scales = guide.global_guide.locs.theta.reshape(1), guide.global_guide.scales.theta.reshape(1)
    loc, scale = torch.cat([locs, local.loc.squeeze(-1)]), torch.cat([scales, local.scale.squeeze(-1)])
    return posterior.gap(loc.unsqueeze(0), scale.unsqueeze(0)).sum() / len(x)


def measure_shared_mean(num: int, num_steps: int) -> dict[str, Any]:
    """Gaps in nats per observation, by width and of the table."""
    x = torch.randn((), dtype=torch.double) + 2**0.5 * torch.randn(num, dtype=torch.double)
    posterior = shared_mean_posterior(x)
    guides: list[Any] = [
        AmortizedGuide(shared_mean, make_encoder(1, width).double(), encoder_input="x") for width in SHARED_WIDTHS
    ]
    gaps = []
    for guide in [*guides, PerDatapointGuide(shared_mean)]:
        pyro.clear_param_store()
        guide.setup(x)
        minimise(lambda guide=guide: shared_mean_gap(guide, x, posterior), [*guide.parameters()], num_steps)  # type: ignore[misc]
        gaps.append(float(shared_mean_gap(guide, x, posterior).detach()))
    return {"shared_mean": ("shared_width", gaps[:-1]), "shared_mean_table": gaps[-1]}


# A chain over time


def chain_precision() -> Tensor:
    """The prior's precision of a stationary autoregressive chain with variance 1."""
    time = torch.arange(STEPS, dtype=torch.double)
    return (CORRELATION ** (time[:, None] - time).abs()).inverse()


def chain(x: Tensor) -> None:
    """p(z_n | z_{n-1}) = N(0.9 z_{n-1}, 1 - 0.9^2), p(x_n | z_n) = N(z_n, 1), for every series ``(N, T)``."""
    with pyro.plate("series", len(x)):
        prior = dist.MultivariateNormal(x.new_zeros(STEPS), precision_matrix=chain_precision())
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def neighbours(x: Tensor, num: int) -> Tensor:
    """Each step's value with those of its neighbours, 0 beyond the ends: ``(N, T, 2 num + 1)``."""
    return nn.functional.pad(x, (num, num)).unfold(-1, 2 * num + 1, 1)


class StepEncoder(nn.Module):
    """Location and scale of z_n from what is seen at step n, by one network for all steps.

    Args:
        num_seen: Number of values seen at a step; None for the whole series.
        width: Of the hidden layer, or of the recurrent network; 0 for a linear function.
    """

    def __init__(self, num_seen: int | None, width: int) -> None:
        super().__init__()
        if num_seen is None:
            self.features: nn.Module = SequenceEncoder(1, hidden_dims=(width,), standardize=False)
        else:
            self.features = nn.Sequential(nn.Linear(num_seen, width), nn.SiLU()) if width else nn.Identity()
        self.head = nn.Linear(width or num_seen or 1, 2)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(N, T, F)``."""
        loc, log_scale = self.head(self.features(seen)).unbind(-1)
        return loc, (5 * (log_scale / 5).tanh()).exp()  # a step of L-BFGS may try anything


def chain_guide(num: int | None, width: int) -> AmortizedGuide:
    """An encoder of each step's neighbours, or of the whole series."""
    encoder = StepEncoder(None if num is None else 2 * num + 1, width).double()
    return AmortizedGuide(chain, encoder, encoder_input=lambda x: neighbours(x, num or 0))


def best_linear(x: Tensor, posterior: Posterior, num: int) -> float:
    """The gap of the best linear function of the neighbours and the best shared scale, per observation, exactly."""
    seen, precision = neighbours(x, num), posterior.precision
    gram = torch.einsum("nta,ts,nsb->ab", seen, precision, seen)
    weights = torch.linalg.solve(gram, torch.einsum("nta,ts,ns->a", seen, precision, posterior.mean))
    scale = precision.diagonal().mean() ** -0.5
    return float(posterior.gap(seen @ weights, scale.expand(STEPS)).mean() / STEPS)


def measure_chain(num_series: int, num_steps: int) -> dict[str, Any]:
    """Gaps in nats per observation by what is seen and by width; of linear functions in closed form."""
    covariance = chain_precision().inverse()
    z = torch.randn(num_series, STEPS, dtype=torch.double) @ torch.linalg.cholesky(covariance).T
    x = z + NOISE * torch.randn_like(z)
    precision = chain_precision() + torch.eye(STEPS, dtype=torch.double) / NOISE**2
    posterior = Posterior(torch.linalg.solve(precision, x.T / NOISE**2).T, precision)
    gaps = np.full((len(SEEN), len(CHAIN_WIDTHS)), np.nan)
    for row, num in enumerate(SEEN.values()):
        for column, width in enumerate(CHAIN_WIDTHS):
            if num is None and not width:
                continue
            pyro.clear_param_store()
            guide = chain_guide(num, width)
            guide.setup(x)

            def loss(guide: AmortizedGuide = guide) -> Tensor:
                q: Any = guide.posterior(x)
                return posterior.gap(q.base_dist.loc, q.base_dist.scale).mean() / STEPS

            minimise(loss, [*guide.parameters()], num_steps)
            gaps[row, column] = float(loss().detach())
    linear = [np.nan if num is None else best_linear(x, posterior, num) for num in SEEN.values()]
    return {"chain": (("seen", "chain_width"), gaps), "chain_linear": ("seen", linear)}
