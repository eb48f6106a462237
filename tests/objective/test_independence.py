"""Datapoints that depend on each other's latents, which no quantity of one datapoint may be computed for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_amortized import AmortizedGuide, log_evidence, to_arviz
from pyro_amortized.training import IWELBO

SIZE = 7
TWIN = torch.tensor([0, 2, 1, 4, 3, 6, 5])
ROWS = torch.arange(24) % 4


def twins(y: Tensor) -> None:
    """The first has none."""
    with pyro.plate("p", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + 0.8 * z[..., TWIN] * (torch.arange(SIZE) != TWIN), 0.5), obs=y)


def backwards(y: Tensor) -> None:
    """Nobody depends on the first."""
    with pyro.plate("p", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        following = torch.cat([z[..., 1:], torch.zeros_like(z[..., :1])], -1)
        pyro.sample("y", dist.Normal(following - z, 0.3), obs=y)


def last_two(y: Tensor) -> None:
    with pyro.plate("p", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        other = torch.cat([torch.zeros_like(z[..., :-1]), z[..., -2:-1]], -1)
        pyro.sample("y", dist.Normal(z + other, 0.3), obs=y)


def own(y: Tensor) -> None:
    with pyro.plate("p", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(2.0 * z, 0.3), obs=y)


def contrasts(y: Tensor, rows: Tensor, reference: int) -> None:
    with pyro.plate("p", 5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(rows)):
        pyro.sample("y", dist.Normal(z[..., rows] - z[..., reference : reference + 1], 0.5), obs=y)


USES: dict[str, Callable[..., Any]] = {
    "log_evidence": lambda model, guide, args: log_evidence(model, guide, args, tolerance=0.2, max_samples=1000),
    "refined": lambda model, guide, args: guide.refined(2).median(*args),
    "to_arviz": lambda model, guide, args: to_arviz(model, guide, args, num_samples=4),
    "IWELBO": lambda model, guide, args: IWELBO(3).loss(model, guide, *args),
    "IWELBO, one by one": lambda model, guide, args: IWELBO(3, vectorize_particles=False).loss(model, guide, *args),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("model", [twins, backwards, last_two])
def test_datapoints_that_depend_on_others_are_refused(model: Callable[..., None], use: str) -> None:
    guide, args = AmortizedGuide(model), (torch.randn(SIZE),)
    guide.setup(*args)
    with pytest.raises(ValueError, match="depends on the latents of others, by site 'y'"):
        USES[use](model, guide, args)


@pytest.mark.parametrize("use", USES)
def test_those_that_do_not_are_served(use: str) -> None:
    guide, args = AmortizedGuide(own), (torch.randn(SIZE),)
    guide.setup(*args)
    USES[use](own, guide, args)


class Normalized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)

    def forward(self, y: Tensor) -> None:
        with pyro.plate("p", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.norm(z), 0.5).to_event(1), obs=y.unsqueeze(-1))


def test_batch_normalisation_is_taken_as_meant_in_its_own_model_alone() -> None:
    model, y = Normalized(), torch.randn(SIZE)
    guide = AmortizedGuide(model)
    guide.setup(y)
    guide.refined(2).median(y)
    other = AmortizedGuide(twins, name="other")
    other.setup(y)
    with pytest.raises(ValueError, match="depends on the latents of others, by site 'y'"):
        other.refined(2).median(y)


@pytest.mark.slow
def test_svi_serves_them() -> None:
    """As the error says: the ELBO counts all."""
    guide, y = AmortizedGuide(twins), torch.randn(SIZE)
    svi = SVI(twins, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(num_particles=10, vectorize_particles=True))
    for _ in range(600):
        svi.step(y)
    loadings = torch.eye(SIZE)
    for i, j in enumerate(TWIN):
        loadings[i, j] += 0.8 * (i != j)
    precision = torch.eye(SIZE) + 4.0 * loadings.T @ loadings
    exact = torch.linalg.solve(precision, 4.0 * loadings.T @ y)
    assert (guide.median(y)["z"] - exact).abs().max() < 0.15


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("reference", [0, 1, 4])
def test_contrasts_in_long_format_are_refused(reference: int, use: str) -> None:
    args = torch.randn(24), ROWS, reference
    guide = AmortizedGuide(contrasts, plate="p", groups={"rows": "rows"}, encoder_input={"rows": ["y"]})
    guide.setup(*args)
    with pytest.raises(ValueError, match=r"depend on the latents of other datapoints than those that groups= names"):
        USES[use](contrasts, guide, args)


# Scales of minibatches in long format


def scaled(y: Tensor, rows: Tensor, groups: Tensor, scale: Any) -> None:
    with pyro.plate("p", 20, subsample=groups):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.poutine.scale(scale=scale), pyro.plate("rows", len(rows)):
        pyro.sample("y", dist.Normal(z[..., rows], 0.5), obs=y)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_scale_of_a_minibatch_is_known_whatever_its_type(kind: Callable[[float], Any], weighted: bool) -> None:
    """Evidence of four groups as in the whole data, with weights of rows too."""
    index = torch.cat([torch.arange(20), torch.randint(20, (40,))])
    y, weights = torch.randn(60), torch.rand(60) + 0.5
    groups = torch.tensor([3, 5, 7, 11])
    place = torch.full((20,), -1)
    place[groups] = torch.arange(4)
    rows = place[index] >= 0
    found = []
    for kept, positions, chosen in ((rows, place[index], groups), (torch.ones(60, dtype=torch.bool), index, None)):
        among = torch.arange(20) if chosen is None else chosen
        scale: Any = kind(20 / len(among))
        scale = scale * weights[kept] if weighted else scale
        args = y[kept], positions[kept], among, scale
        options: Any = {"plate": "p", "groups": {"rows": "rows"}, "encoder_input": {"rows": ["y"]}}
        guide = AmortizedGuide(scaled, name=f"guide_{len(among)}", **options)
        evidence = log_evidence(scaled, guide, args).log_evidence.values
        found.append(evidence if chosen is not None else evidence[groups])
    assert np.abs(found[0] - found[1]).max() < 0.02


# Priors that are masked


def test_a_masked_prior_that_data_depend_on_is_refused() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("p", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"Cannot guide latents \['z'\] because their prior is masked"):
        AmortizedGuide(model).setup(torch.randn(6, 3))


def test_a_wide_prior_in_its_place() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("p", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=y)

    y = torch.randn(6, 3)
    guide = AmortizedGuide(model)
    guide.setup(y)
    assert torch.allclose(guide.refined(10).median(y)["z"], y.mean(-1), atol=1e-3)


def test_an_improper_prior_is_refined_and_has_no_evidence() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("p", len(y)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=y)

    y = torch.randn(6, 3)
    guide = AmortizedGuide(model)
    guide.setup(y)
    assert torch.allclose(guide.refined(20).median(y)["z"], y.mean(-1), atol=0.01)
    with pytest.raises(ValueError, match="from their prior because it is improper"):
        log_evidence(model, guide, (y,))
