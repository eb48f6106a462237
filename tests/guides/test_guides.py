"""Guides under every ELBO: exact where the posterior is, at any batch size, beside global latents."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from plain_guides import FAMILIES, GUIDES, INDEX, SIZE, Recorder, X, exact_guide, svi
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from torch import Tensor

from pyro_amortized import AmortizedGuide, PerDatapointGuide

# 1. With the exact posterior, the ELBO is the log evidence, whatever the noise.


def oracle_errors(plates: str, kind: str, elbo: Any, error: float = 0.0) -> list[float]:
    """-loss minus N/B times the batch's log evidence, one difference per seed."""
    linear = LinearGaussian.random_weights(orthogonal=kind == "pair")
    x = linear.simulate(SIZE)
    args = {"explicit": (x, INDEX), "columns": (x.T.contiguous(),)}.get(plates, (x,))
    model = getattr(linear, plates)
    guide = exact_guide(linear, model, args, x, kind, error)
    indices: list[Tensor | None] = []
    guide.inference.register_forward_pre_hook(lambda module, inputs: indices.append(inputs[1]))
    elbo.loss(model, guide, *args)  # lets the ELBO count the plates
    errors = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        indices.clear()
        loss = elbo.loss(model, guide, *args)
        batches = [x if index is None else x[index] for index in indices]
        expected = [SIZE / len(batch) * linear.log_evidence(batch).sum().item() for batch in batches]
        errors.append(-loss - sum(expected) / len(expected))
        assert {len(batch) for batch in batches} == {{"explicit": 3, "random": linear.batch_size}.get(plates, SIZE)}
    return errors


PLATES = ["full", "explicit", "random", "unsized", "rows", "columns"]


@pytest.mark.thinned
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("kind", ["pair", "head", "table"])
@pytest.mark.parametrize("plates", PLATES)
def test_exact_posterior_gives_log_evidence(plates: str, kind: str, Elbo: Any, vectorized: bool) -> None:
    elbo = Elbo(num_particles=3, vectorize_particles=vectorized)
    assert max(map(abs, oracle_errors(plates, kind, elbo))) < 1e-10


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["pair", "head", "table"])
@pytest.mark.parametrize("plates", PLATES[:3])
def test_wrong_posterior_does_not_give_log_evidence(plates: str, kind: str) -> None:
    errors = oracle_errors(plates, kind, Trace_ELBO(num_particles=3), error=0.1)
    assert min(map(abs, errors)) > 1e-3


@pytest.mark.usefixtures("_float64")
def test_exact_posterior_gives_log_evidence_on_constrained_sites() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    x = torch.tensor([-1.0, 0.3, 2.0])
    expected = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum().item()
    for factor, fails in ((1.0, False), (1.1, True)):
        encoder = Recorder(lambda x, factor=factor: (x[:, None] / 2, torch.full((len(x), 1), 0.5**0.5 * factor)))
        guide = AmortizedGuide(model, encoder)
        error = abs(-Trace_ELBO().loss(model, guide, x) - expected)
        assert (error > 1e-10) == fails


# 2. Any batch size in any call.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("explicit", [False, True])
def test_any_batch_size_in_any_call(family: str, Elbo: Any, explicit: bool) -> None:
    linear = LinearGaussian.random_weights()
    model = linear.explicit if explicit else linear.full
    x = linear.simulate(16)
    guide = AmortizedGuide(model, family=family)
    steps = svi(model, guide, Elbo())
    for size in (8, 8, 3, 16, 1):
        args = (x, torch.arange(16).flip(0)[:size]) if explicit else (x[:size],)
        assert torch.tensor(steps.step(*args)).isfinite()
        phi = guide.variational_parameters(*args)
        assert phi.shape == (size, guide.family.num_params)
        assert guide(*args)["z"].shape == guide.median(*args)["z"].shape == (size, 3)
        batch = x[args[1]] if explicit else x[:size]
        everything = guide.variational_parameters(x, torch.arange(16)) if explicit else guide.variational_parameters(x)
        torch.testing.assert_close(phi, everything[[x.eq(row).all(-1).nonzero().item() for row in batch]])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["pair", "head"])
def test_exact_for_every_batch_size(kind: str) -> None:
    linear = LinearGaussian.random_weights(orthogonal=kind == "pair")
    x = linear.simulate(SIZE)
    guide = exact_guide(linear, linear.full, (x[:4],), x, kind)
    sizes = exact_guide(linear, linear.explicit, (x, INDEX), x, kind, name="explicit")
    for size in (4, 2, SIZE, 1):
        batch = linear.log_evidence(x[:size]).sum().item()
        assert -Trace_ELBO().loss(linear.full, guide, x[:size]) == pytest.approx(batch, abs=1e-10)
        loss = Trace_ELBO().loss(linear.explicit, sizes, x, torch.arange(size))
        assert -loss == pytest.approx(SIZE / size * batch, abs=1e-10)


# 3. Every ELBO.

ELBOS: list[Callable[..., Any]] = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO]


@pytest.mark.thinned
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("Elbo", ELBOS)
def test_every_elbo_trains(Elbo: Any, vectorized: bool, Guide: Any, family: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(12)
    options = {"strict_enumeration_warning": False} if Elbo is TraceEnum_ELBO else {}
    elbo = Elbo(num_particles=2, vectorize_particles=vectorized, **options)
    guide = Guide(linear.full, family=family)
    steps = svi(linear.full, guide, elbo, lr=0.05 if Guide is PerDatapointGuide else 0.005)
    losses = torch.tensor([steps.step(x) for _ in range(15)])
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    assert steps.evaluate_loss(x) < losses[:5].mean()


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_elbo_module_trains_with_torch_optim(Guide: Any, family: str) -> None:
    x = counts(12)
    guide = Guide(topics, family=family)
    loss_fn = Trace_ELBO(num_particles=4)(topics, guide)
    loss_fn(x)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.02 if Guide is PerDatapointGuide else 0.002)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    names = [name for name, _ in loss_fn.named_parameters()]
    assert all(parameter.grad is not None for parameter in loss_fn.parameters()), names
    assert any("global_guide" in name for name in names)
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("Guide", GUIDES)
def test_predictive(Guide: Any, family: str, parallel: bool) -> None:
    x = counts(6)
    guide = Guide(topics, family=family)
    guide(x)
    samples = Predictive(topics, guide=guide, num_samples=5, parallel=parallel)(x)
    assert samples["rate"].reshape(5, 3).isfinite().all()
    assert samples["size"].shape[-1] == 6
    assert samples["share"].reshape(5, 6, 3).sum(-1).sub(1).abs().max() < 1e-5
    draws = samples["size"].reshape(5, 6)
    assert draws.std(0).min() > 0


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_simulates_new_data(parallel: bool) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("new", dist.Normal(z, 1.0), infer={})
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    blocked = poutine.block(model, hide=["new"])
    guide = AmortizedGuide(blocked)
    guide(torch.randn(6))
    predictive = Predictive(model, guide=guide, num_samples=4, return_sites=["new"], parallel=parallel)
    assert predictive(torch.randn(6))["new"].reshape(4, -1).shape == (4, 6)


# 4. Global and local latents together, constrained ones too.


def elbo_gap(guide: Any, model: Any, args: Any, repeats: int = 40, particles: int = 200) -> float:
    """TraceMeanField_ELBO's mean loss minus Trace_ELBO's, in its Monte Carlo standard errors."""
    losses = torch.empty(2, repeats)
    for i, Elbo in enumerate((Trace_ELBO, TraceMeanField_ELBO)):
        elbo = Elbo(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
        losses[i] = torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)])
    mean, variance = losses.mean(1), losses.var(1) / repeats
    return ((mean[1] - mean[0]) / variance.sum().sqrt()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_field_elbo_agrees_in_expectation(family: str) -> None:
    x = counts(6)
    guide = AmortizedGuide(topics, family=family, init_scale=0.3)
    guide(x)
    assert abs(elbo_gap(guide, topics, (x,))) < 4


def test_mean_field_elbo_of_autoguide_disagrees() -> None:
    x = counts(6)
    guide = AutoDiagonalNormal(topics, init_scale=0.3)
    guide(x)
    assert abs(elbo_gap(guide, topics, (x,), repeats=10)) > 20


@pytest.mark.parametrize("global_guide", [AutoDelta, AutoDiagonalNormal])
def test_other_global_guides_train(global_guide: Any) -> None:
    x = counts(12)
    guide = AmortizedGuide(topics, global_guide=global_guide)
    steps = svi(topics, guide, lr=0.002)
    losses = [steps.step(x) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert guide.median(x)["rate"].shape == (3,)


@pytest.mark.parametrize("Guide", GUIDES)
def test_global_latents_alone(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.full((50,), 2.0)
    guide = Guide(model)
    steps = svi(model, guide, TraceMeanField_ELBO(), lr=0.05)
    for _ in range(300):
        steps.step(x)
    assert guide.median(x)["loc"].item() == pytest.approx(100 / 51, abs=0.1)
    with pytest.raises(ValueError, match="no local latents"):
        guide.posterior(x)


def test_in_a_list_with_other_guides() -> None:
    x = counts(6)
    guide = AutoGuideList(topics)
    guide.append(AutoNormal(poutine.block(topics, expose=["rate"])))
    guide.append(AmortizedGuide(poutine.block(topics, hide=["rate"])))
    steps = svi(topics, guide, lr=0.002)
    losses = [steps.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert guide.median(x).keys() == {"rate", "size", "share"}


@pytest.mark.parametrize("vectorized", [False, True])
def test_enumerated_discrete_latents(vectorized: bool) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=x)

    guide = AmortizedGuide(model)
    elbo = TraceEnum_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    steps = svi(model, guide, elbo)
    assert torch.tensor([steps.step(X) for _ in range(5)]).isfinite().all()
    assert guide.median(X).keys() == {"z"}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("Guide", GUIDES)
def test_compiled_by_the_jit(Guide: Any) -> None:
    x = counts(6)
    guide = Guide(topics)
    guide.setup(x)
    steps = svi(topics, guide, JitTrace_ELBO(ignore_jit_warnings=True), lr=0.002)
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()
