"""What guides say of the posterior: shapes and supports, quantiles, parameters and draws."""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from plain_guides import FAMILIES, GUIDES, normals, regression
from pyro import poutine
from pyro.infer.autoguide import AutoCallable
from torch import Tensor

from pyro_amortized import AmortizedGuide


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_supports(Guide: Any, family: str) -> None:
    x = counts(7)
    guide = Guide(topics, family=family, init_scale=0.5)
    phi, posterior = guide.variational_parameters(x), guide.posterior(x)
    assert phi.shape == (7, guide.family.num_params)
    assert (posterior.batch_shape, posterior.event_shape) == ((7,), (3,))
    for values, sample_shape in ((guide.median(x), ()), (guide.quantiles([0.1, 0.5, 0.9], x), (3,)), (guide(x), ())):
        assert {name: value.shape for name, value in values.items()} == {
            "rate": (*sample_shape, 3),
            "size": (*sample_shape, 7),
            "share": (*sample_shape, 7, 3),
        }
        assert (values["rate"] > 0).all()
        assert (values["size"] > 0).all()
        torch.testing.assert_close(values["share"].sum(-1), torch.ones(*sample_shape, 7))
    quantiles = guide.quantiles([0.1, 0.5, 0.9], x)
    for name in ("rate", "size"):
        assert (quantiles[name].diff(dim=0) > 0).all()
        torch.testing.assert_close(quantiles[name][1], guide.median(x)[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles_agree_with_draws(family: str) -> None:
    x, draws, probs = counts(4), 4000, torch.tensor([0.1, 0.5, 0.8])
    guide = AmortizedGuide(topics, family=family, init_scale=0.5)
    quantiles = guide.quantiles(probs, x)
    with pyro.plate("draws", draws, dim=-2), torch.no_grad():
        samples = guide(x)
    for name in ("rate", "size"):
        share = (samples[name] < quantiles[name].unsqueeze(1)).float().mean(1)
        error = (share - probs.unsqueeze(-1)) / (probs * (1 - probs) / draws).sqrt().unsqueeze(-1)
        assert error.abs().max() < 4.5  # standard errors
        wrong = (samples[name] < 1.1 * quantiles[name].unsqueeze(1)).float().mean(1)
        assert ((wrong - probs.unsqueeze(-1)) / (probs * (1 - probs) / draws).sqrt().unsqueeze(-1)).abs().max() > 4.5


@pytest.mark.parametrize("family", FAMILIES)
def test_guide_samples_from_its_posterior(family: str) -> None:
    x = LinearGaussian.random_weights().simulate(4)
    model = LinearGaussian.random_weights().full
    guide = AmortizedGuide(model, family=family)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    site = "z" if family == "normal" else "AmortizedGuide_latent"
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(trace.nodes[site]["log_prob"], guide.posterior(x).log_prob(z))
    assert trace.nodes["z"]["infer"].get("is_auxiliary") is None
    assert site == "z" or trace.nodes[site]["infer"]["is_auxiliary"]


@pytest.mark.parametrize("Guide", GUIDES)
def test_looking_at_the_posterior_draws_nothing(Guide: Any) -> None:
    x = counts(6)
    guide = Guide(topics)
    guide.setup(x)
    state = torch.get_rng_state()
    first = guide.median(x)
    second = guide.quantiles([0.5], x)
    guide.posterior(x), guide.variational_parameters(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.allclose(first[name], second[name].squeeze(0)) for name in first)


def test_infer_is_all_that_a_guide_says() -> None:
    x, y = torch.randn(2, 4)
    guide = AmortizedGuide(regression)
    inferred = guide.infer(x, y)
    phi, family = inferred.local
    assert torch.equal(phi, guide.variational_parameters(x, y))
    assert family is guide.family
    assert [*inferred.global_values] == [*guide.global_sites] == ["w"]
    assert torch.equal(inferred.global_values["w"], guide.global_median(x, y)["w"])
    assert inferred.structure.indices["data"].shape == (4,)
    assert guide.plate == "data"
    assert torch.equal(guide.encoder_inputs(x, y)[0], y)
    draws = torch.stack([guide.sample_globals(x, y)["w"] for _ in range(3)])
    assert len(draws.unique()) == 3


def test_infer_without_local_latents() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = AmortizedGuide(model)
    inferred = guide.infer(torch.randn(3))
    assert inferred.phi is None
    assert "w" in inferred.global_values
    with pytest.raises(ValueError, match=r"no local latents; try guide.global_median"):
        _ = inferred.local
    assert guide.sample_globals(torch.randn(3)).keys() == {"w"}


def test_infer_leaves_the_inference_of_the_caller_alone() -> None:
    guide = AmortizedGuide(normals)
    with poutine.trace() as tracer:
        guide.infer(torch.randn(3))
    assert not tracer.trace.nodes


def test_global_guides_that_return_nothing_can_be_drawn_from() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def global_guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.1)), 0.5))

    guide = AmortizedGuide(model, global_guide=lambda m: AutoCallable(m, global_guide))
    assert guide.infer(torch.randn(3)).global_values.keys() == {"mu"}
    assert guide.sample_globals(torch.randn(3)).keys() == {"mu"}


def test_globals_in_plates_of_a_copy_can_be_drawn() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("K", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu.sum() + z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    guide.setup(torch.randn(3))
    assert copy.deepcopy(guide).sample_globals(torch.randn(3))["mu"].shape == (2,)


def test_variational_parameters_draw_nothing() -> None:
    guide = AmortizedGuide(regression, global_guide=lambda m: AutoCallable(m, lambda x, y: pyro.sample("w", NORMAL)))
    x, y = torch.randn(2, 10)
    guide.setup(x, y)
    state = torch.get_rng_state()
    guide.variational_parameters(x, y)
    assert torch.equal(torch.get_rng_state(), state)


NORMAL = dist.Normal(0.0, 1.0)
