"""Every guide of models that are modules, predictions from them, and the names of their parameters."""

import copy
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from host_conventions import OPTIONS, X, assert_loss, build, centred, every_guide, most_guides
from models import counts, topics
from plain_guides import normals, svi
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_amortized import PerDatapointGuide, SemiAmortizedGuide


def train(model: Any, guide: Any, *args: Any) -> None:
    """A few steps of a torch optimizer; Pyro's own do not take modules whose parameters are local to them."""
    elbo = Trace_ELBO()(model, guide)
    elbo(*args)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss = elbo(*args)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()


class Regression(PyroModule):
    """Random weights and a noise parameter in a module, latents of the datapoints in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            z = self.local(mean)
            return pyro.sample("y", dist.Normal(z, self.log_scale.exp()), obs=y)

    def local(self, mean: Tensor) -> Tensor:
        return mean


class LocalRegression(Regression):
    """As above, with a latent per datapoint."""

    def local(self, mean: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(mean, 1.0))


@pytest.fixture(params=[False, True])
def _module_local(request: Any) -> Iterator[None]:
    with pyro.settings.context(module_local_params=request.param):
        yield


@most_guides
@pytest.mark.usefixtures("_module_local")
@pytest.mark.parametrize("Model", [Regression, LocalRegression])
def test_module_models_with_random_weights(Guide: Any, Model: Any) -> None:
    model, x, y = Model(), torch.randn(8, 2), torch.randn(8)
    guide = build(Guide, model)
    assert_loss(model, guide, x, y)
    weights = {"linear.weight", "linear.bias"}
    assert guide.median(x, y).keys() == weights | ({"z"} if Model is LocalRegression else set())
    assert not any(name.startswith("model") for name, _ in guide.named_parameters())
    train(model, guide, x, y)
    assert model.log_scale.item() != 0.0


@every_guide
@pytest.mark.usefixtures("_module_local")
def test_predicts_from_a_module_with_global_latents_alone(Guide: Any) -> None:
    """Pyro's regression tutorial: train on (x, y), then predict y at any x."""
    model, x, y = Regression(), torch.randn(8, 2), torch.randn(8)
    guide = build(Guide, model)
    train(model, guide, x, y)
    predictive = Predictive(model, guide=guide, num_samples=5, return_sites=("y", "_RETURN"))
    for size in (8, 3):
        samples = predictive(torch.randn(size, 2))
        assert samples["y"].reshape(5, size).std(0).min() > 0


@every_guide
def test_predicts_what_was_observed_in_training(Guide: Any) -> None:
    """A guide whose encoder sees covariates alone needs no y to predict y."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    options = {} if Guide is PerDatapointGuide else {"encoder_input": "x"}
    guide = build(Guide, model, plate="data", **options)
    svi(model, guide).step(X, 2 * X)
    samples = Predictive(model, guide=guide, num_samples=4)(X)
    assert samples["y"].reshape(4, 6).std(0).min() > 0


@most_guides
@pytest.mark.parametrize("parallel", [False, True])
def test_replicates_what_was_observed(Guide: Any, parallel: bool) -> None:
    guide = build(Guide, normals)
    svi(normals, guide).step(X)
    predictive = Predictive(poutine.uncondition(normals), guide=guide, num_samples=4, parallel=parallel)
    assert predictive(X)["x"].reshape(4, 6).std(0).min() > 0


@most_guides
def test_two_guides_of_one_name_with_local_parameters(Guide: Any) -> None:
    with pyro.settings.context(module_local_params=True):
        guides = [build(Guide, normals) for _ in range(2)]
        for guide in guides:
            train(normals, guide, X)
        assert not pyro.get_param_store().keys()
        first = [value.clone() for value in guides[0].state_dict().values()]
        train(normals, guides[1], X)
        assert all(map(torch.equal, first, guides[0].state_dict().values()))


def alone(x: Tensor) -> None:
    """Nothing but a global latent."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("Guide", "model", "options"),
    [*((Guide, alone, {}) for Guide in OPTIONS), (SemiAmortizedGuide, centred, {"initial": "prior"})],
)
def test_two_guides_of_one_name_without_encoder_parameters(Guide: Any, model: Any, options: Any) -> None:
    """With global latents alone, or a start at the prior, it is the parameters of the global guide that clash."""
    svi(model, build(Guide, model, **options)).step(X)
    with pytest.raises(ValueError, match=r"already holds other parameters.*name="):
        svi(model, build(Guide, model, **options)).step(X)
    svi(model, build(Guide, model, name="other", **options)).step(X)


@most_guides
def test_options_of_the_optimizer_by_parameter(Guide: Any) -> None:
    names = []

    def options(name: str) -> dict[str, float]:
        names.append(name)
        return {"lr": 0.0}

    guide = build(Guide, topics)
    steps = SVI(topics, guide, pyro.optim.Adam(options), Trace_ELBO())
    x = counts(6)
    steps.step(x)
    before = copy.deepcopy(dict(guide.named_parameters()))
    steps.step(x)
    assert any("inference" in name for name in names)
    assert any("global_guide" in name for name in names)
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name]), name
