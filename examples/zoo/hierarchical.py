"""Hierarchical regression: an intercept and a slope for each group, as for counties in a survey or patients in a trial.

Andrew Gelman, Jennifer Hill, "Data Analysis Using Regression and Multilevel/Hierarchical Models" (2006), with simulated
data. The group is the datapoint, its observations lie in an inner plate; groups differ in size. Intercept and slope are
correlated given the data, so the guides use a full-rank normal family. That is all that they gain on AutoNormal, which
sees all data in every step here, as they do: with ``family="normal"`` the amortized guide falls behind it.

Run ``python examples/zoo/hierarchical.py``.
"""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _problem import RATES, Problem, main
from torch import Tensor

from pyro_amortized import DeepSetEncoder


def model(y: Tensor, x: Tensor, present: Tensor) -> None:
    """Outcomes ``(groups, observations)``, covariates ``(groups, observations, 2)``, and which of them are present."""
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    coefficient = pyro.sample("coefficient", dist.Normal(0.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", len(y), dim=-2):
        effects = pyro.sample("effects", dist.Normal(loc, spread).to_event(1))
        mean = effects[..., 0] + effects[..., 1] * x[..., 0] + coefficient * x[..., 1]
        with pyro.plate("observations", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(mean, noise).mask(present), obs=y)


def simulate(num_groups: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 2 to ``most`` observations; the first covariate is not centred, so that a group's effects correlate."""
    effects = torch.tensor([1.0, -0.5]) + torch.randn(num_groups, 2) * torch.tensor([1.0, 0.5])
    x = torch.randn(num_groups, most, 2) + torch.tensor([1.5, 0.0])
    y = effects[:, :1] + effects[:, 1:] * x[..., 0] + 0.7 * x[..., 1] + 0.8 * torch.randn(num_groups, most)
    present = torch.arange(most) < torch.randint(2, most + 1, (num_groups, 1))
    return torch.where(present, y, 0.0), torch.where(present.unsqueeze(-1), x, 0.0), present


def sets(y: Tensor, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder sees: each group as a set of observations, and which elements belong to it."""
    return torch.cat([y.unsqueeze(-1), x, x * y.unsqueeze(-1), x[..., :1].square()], -1), present


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    num_groups, num_unseen, most = (40, 4, 6) if small else (300, 40, 12)
    data = simulate(num_groups + num_unseen, most)
    return Problem(
        name="Hierarchical regression",
        model=model,
        train=tuple(part[:num_groups] for part in data),
        held_out=tuple(part[num_groups:] for part in data),
        options={"plate": "groups", "encoder_input": sets, "family": "multivariate_normal"},
        encoder=partial(DeepSetEncoder, 6),
        num_datapoints=lambda y, *_: len(y),
    )


if __name__ == "__main__":
    main(make_problem, num_steps=500, lr=1e-2, rates=RATES)
