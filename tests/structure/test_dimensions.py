"""Dimensions outside of every plate, beside a datapoint plate at another dimension: they belong to the datapoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
    posterior_summary,
    to_arviz,
)
from pyro_amortized.training import FreeBitsELBO

N, M = 5, 3
FAMILIES = ("normal", "multivariate_normal", "low_rank_multivariate_normal", "structured", "mixture", "flow")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def right(x: Tensor) -> None:
    """z (N, 3), on the right of the plate; x (N, 3)."""
    with pyro.plate("cells", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, M), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def left(x: Tensor) -> None:
    """z (3, N), on the left of the plate; x is given as (N, 3)."""
    with pyro.plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(M, 1), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)


def beside(x: Tensor) -> None:
    """z (3, N, 1) in no plate at -3 and x (3, N, 2) in an inner plate at -1, with half the variance each."""
    with pyro.plate("cells", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(M, 1, 1), 1.0))
        with pyro.plate("repeats", 2, dim=-1):
            pyro.sample("x", dist.Normal(z, 2**0.5), obs=x.T.unsqueeze(-1))


def summed(x: Tensor) -> None:
    """z (N, 1), of a size 1 that is none of the datapoint's own, beside x (N, 3)."""
    with pyro.plate("cells", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 1), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


MODELS = {model.__name__: model for model in (right, left, beside)}
NESTING = {"right": 2, "left": 1, "beside": 2}
"""With validation on, Pyro accepts dimensions on the left only where it is told how many there are in plates."""


def log_evidence(name: str, x: Tensor) -> Tensor:
    """Of each datapoint; that of two equal observations of variance 2 is known from their mean."""
    single = dist.Normal(0.0, 2**0.5).log_prob(x)
    if name == "beside":
        variance = 2.0 * torch.eye(2) + 1.0
        single = dist.MultivariateNormal(torch.zeros(2), variance).log_prob(torch.stack([x, x], -1))
    return single.sum(-1)


class Exact(nn.Module):
    """The exact posterior of the normal family: N(x / 2, 1 / 2) in all three models."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(len(x), M, -1)[..., 0]
        return x / 2, torch.full_like(x, 0.5**0.5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, JitTrace_ELBO])
def test_loss_of_the_exact_posterior_is_minus_the_evidence(name: str, elbo: Any) -> None:
    x = torch.randn(N, M)
    guide = AmortizedGuide(MODELS[name], Exact())
    loss = elbo(max_plate_nesting=NESTING[name]).loss(MODELS[name], guide, x)
    assert -loss == pytest.approx(float(log_evidence(name, x).sum()), abs=1e-9)
    assert guide(x)["z"].shape == poutine.trace(MODELS[name]).get_trace(x).nodes["z"]["value"].shape


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", FAMILIES[:-1])  # a flow is refused where all sites have the dimension
def test_every_family_has_the_density_of_its_draws(name: str, family: str) -> None:
    """The loss at one draw is log q less the log-joint, both written out by hand."""
    x = torch.randn(N, M)
    guide = AmortizedGuide(MODELS[name], family=family, init_scale=0.7)
    guide.setup(x)
    with torch.no_grad():
        pyro.set_rng_seed(1)
        loss = Trace_ELBO(max_plate_nesting=NESTING[name]).loss(MODELS[name], guide, x)
        pyro.set_rng_seed(1)
        z = guide(x)["z"].reshape(N, M) if name == "right" else guide(x)["z"].reshape(M, N).T
        pairs = 2 * dist.Normal(z, 2**0.5).log_prob(x) if name == "beside" else dist.Normal(z, 1.0).log_prob(x)
        log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum() + pairs.sum()
        assert loss == pytest.approx(float(guide.posterior(x).log_prob(z).sum() - log_joint), abs=1e-8)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (SemiAmortizedGuide, "left"),
        (SemiAmortizedGuide, "beside"),
        (IterativeAmortizedGuide, "right"),
        (PerDatapointGuide, "right"),
    ],
)
def test_other_guides(make: Any, name: str) -> None:
    x = torch.randn(N, M)
    guide = make(MODELS[name])
    SVI(MODELS[name], guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=NESTING[name])).step(x)
    guide = guide.refined(10)
    flat = x if name == "right" else x.T.unsqueeze(-1) if name == "beside" else x.T
    torch.testing.assert_close(guide.median(x)["z"], flat / 2, atol=0.1, rtol=0.0)
    assert guide.quantiles([0.1, 0.9], x)["z"].shape == (2, *flat.shape)


@pytest.mark.parametrize("name", ["left", "beside"])
def test_diagnostics_and_exports(name: str) -> None:
    x = torch.randn(N, M)
    guide = AmortizedGuide(MODELS[name], Exact(), family="normal")
    gaps = estimate_gaps(MODELS[name], guide, (x,))
    torch.testing.assert_close(
        torch.tensor(gaps.dataset["log_evidence"].values), log_evidence(name, x), atol=3e-3, rtol=0.0
    )
    data = to_arviz(MODELS[name], guide, (x,), num_samples=50, resample=True)
    axes = ("cells", "z_dim_0") if name == "right" else ("z_dim_0", "cells")
    assert data["posterior"]["z"].dims == ("chain", "draw", *axes)
    weights = torch.tensor(data["sample_stats"]["log_weight"].values[0])
    torch.testing.assert_close(weights, log_evidence(name, x).expand(50, N))
    summary = posterior_summary(MODELS[name], guide, (x,), num_samples=10)
    assert summary["z"].dims == ("quantile", *axes)


def test_batches_of_any_size_and_a_subsampled_plate() -> None:
    x = torch.randn(N, M)

    def model(x: Tensor) -> None:
        with pyro.plate("cells", len(x), subsample_size=2, dim=-2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(1, M), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AmortizedGuide(right, Exact())
    losses = [Trace_ELBO().loss(right, guide, x[:n]) for n in (N, 1, 3)]
    assert losses == pytest.approx([-float(log_evidence("right", x[:n]).sum()) for n in (N, 1, 3)])
    guide = AmortizedGuide(model, Exact())
    elbo = Trace_ELBO(num_particles=4)
    every = [
        -float(log_evidence("right", x)[list(pair)].sum()) * N / 2
        for pair in ((i, j) for i in range(N) for j in range(i))
    ]
    loss = Trace_ELBO().loss(model, guide, x)
    assert min(abs(loss - value) for value in every) < 1e-9
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(x)


@pytest.mark.slow
def test_a_dimension_of_size_one_is_none_of_the_datapoint() -> None:
    x = torch.randn(N, M)
    guide = AmortizedGuide(summed)
    guide.setup(x)
    assert guide.layout is not None
    assert guide.layout.latent_dim == 1
    guide = guide.refined(10)
    torch.testing.assert_close(guide.median(x)["z"], x.sum(-1, keepdim=True) / (M + 1), atol=0.1, rtol=0.0)


def test_a_mixed_matrix_of_loadings() -> None:
    """As in cell2location: latents of one width, observations of another; plain and validated."""
    loadings = torch.rand(M, 7)

    def model(x: Tensor) -> None:
        with pyro.plate("cells", len(x), dim=-2):
            scale = pyro.sample("scale", dist.Gamma(torch.full((1, 1), 9.0), 9.0))
            w = pyro.sample("w", dist.Gamma(torch.ones(1, M), torch.ones(1, 1)))
            pyro.sample("x", dist.Poisson(scale * (w @ loadings)), obs=x)

    x = torch.poisson(torch.rand(20, 7) * 5)
    for family in FAMILIES:
        guide = AmortizedGuide(model, family=family, name=family)
        guide.setup(x)
        assert guide.layout is not None
        assert guide.layout.latent_dim == M + 1
        with torch.no_grad():
            draws = guide(x)
        assert draws["scale"].shape == (20, 1)
        assert draws["w"].shape == (20, M)
    with torch.no_grad():
        weights = to_arviz(model, guide, (x,), num_samples=400, groups=["sample_stats"])["sample_stats"]["log_weight"]
        elbo = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=2)
        standard_error = float(weights.sum("cells").std()) / 20
        assert abs(float(weights.sum("cells").mean()) + elbo.loss(model, guide, x)) < 6 * standard_error


def test_free_bits_are_those_of_each_dimension() -> None:
    """Two of three dimensions carry nothing and are free; averaged over the dimension the third would be as well."""

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tensor([3.0, 0.0, 0.0]).expand(len(x), M), torch.ones(len(x), M)

    guide, x = AmortizedGuide(right, Narrow()), torch.randn(N, M)
    guide.setup(x)
    objective = FreeBitsELBO(free_bits=2.0)
    kl, free = N * 4.5, N * (4.5 + 2.0 + 2.0)
    pyro.set_rng_seed(1)
    plain = TraceMeanField_ELBO().differentiable_loss(right, guide, x)
    pyro.set_rng_seed(1)
    assert float(objective.differentiable_loss(right, guide, x) - plain) == pytest.approx(free - kl)


def test_discrete_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("cells", len(x), dim=-2):
            y = pyro.sample("y", dist.Bernoulli(torch.full((1, M), 0.5)))
            pyro.sample("x", dist.Normal(10.0 * y, 1.0), obs=x)

    x, guide = torch.randn(N, M), DiscreteAmortizedGuide(model, temperature=1.0)
    probabilities = guide.probabilities(x)["y"]
    pyro.set_rng_seed(1)
    with torch.no_grad():
        loss = Trace_ELBO().loss(model, guide, x)
    pyro.set_rng_seed(1)
    y = guide(x)["y"]
    log_joint = dist.Bernoulli(0.5).log_prob(y).sum() + dist.Normal(10.0 * y, 1.0).log_prob(x).sum()
    assert probabilities.shape == y.shape == (N, M)
    assert loss == pytest.approx(float((dist.Bernoulli(probabilities).log_prob(y).sum() - log_joint).detach()))
