"""Exports to ArviZ, against closed forms and against the model evaluated by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exports import (
    DEFAULT,
    FEATURES,
    KINDS,
    LATENTS,
    POINTS,
    call,
    draws,
    exact,
    group_names,
    mean_error,
    regression,
    regression_data,
    with_likelihood,
)
from models import LinearGaussian, chains, counts, topics, uniform_bounds
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, Normal, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.export import to_arviz

pytestmark = pytest.mark.usefixtures("_float64")


@pytest.mark.parametrize("kind", KINDS)
def test_axes_are_named_after_the_plates(oracle: LinearGaussian, kind: str) -> None:
    model, args, guide = call(oracle, kind)
    data = with_likelihood(model, guide, args, num_samples=50, prior=True)
    latent, observed, batch = KINDS[kind]
    assert group_names(data) == DEFAULT | {"log_likelihood", "prior", "prior_predictive"}
    lead = ("chain", "draw")
    for group, name, dims in [
        ("posterior", "z", (*lead, *latent)),
        ("prior", "z", (*lead, *latent)),
        ("posterior_predictive", "x", (*lead, *observed)),
        ("prior_predictive", "x", (*lead, *observed)),
        ("observed_data", "x", observed),
        ("log_likelihood", "x", (*lead, *batch)),
        ("sample_stats", "log_weight", (*lead, "data")),
        ("sample_stats", "khat", ("data",)),
    ]:
        assert data[group][name].dims == dims, group
    assert data["posterior"].sizes["draw"] == 50
    assert data["posterior"].sizes["chain"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_the_exact_posterior_are_the_evidence(oracle: LinearGaussian, kind: str) -> None:
    model, args, guide = call(oracle, kind)
    stats = to_arviz(model, guide, args, num_samples=50)["sample_stats"]
    x = oracle.simulate(POINTS)
    evidence = oracle.log_evidence(x).numpy()[stats["data"].values]
    assert np.abs(stats["log_weight"].values - evidence).max() < 1e-10
    assert (stats["khat"] == -math.inf).all()
    wrong = to_arviz(model, exact(oracle, model, shift=0.1), args, num_samples=50)["sample_stats"]
    assert np.abs(wrong["log_weight"].values - evidence).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_observed_values_are_those_at_the_coordinates(oracle: LinearGaussian, kind: str) -> None:
    model, args, guide = call(oracle, kind)
    observed = to_arviz(model, guide, args, num_samples=2)["observed_data"]["x"]
    x = oracle.simulate(POINTS).numpy()[observed["data"].values]
    assert np.array_equal(observed.transpose("data", ...).values, x)
    if kind == "explicit":
        assert observed["data"].values.tolist() == [4, 1, 3]
    if kind == "random":
        assert len(observed["data"]) == oracle.batch_size


class OwnNoise(Normal):
    """A family that draws its own noise, as some flows do."""

    noise_dim = None  # type: ignore[assignment]

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.noise_dim = None


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "low_rank_multivariate_normal", OwnNoise])
def test_families(oracle: LinearGaussian, family: Any) -> None:
    guide = AmortizedGuide(oracle.full, family=family)
    data = to_arviz(oracle.full, guide, (oracle.simulate(POINTS),), num_samples=40)
    assert data["posterior"]["z"].shape == (1, 40, POINTS, LATENTS)
    assert data["posterior"].attrs["family"] == type(guide.family).__name__
    by_hand = guide.posterior(oracle.simulate(POINTS)).log_prob(torch.tensor(draws(data, "posterior", "z")))
    joint = _log_joint(oracle, draws(data, "posterior", "z"))
    assert np.allclose(draws(data, "sample_stats", "log_weight"), joint - by_hand.detach().numpy())


def _log_joint(oracle: LinearGaussian, z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = torch.as_tensor(z)
    likelihood = dist.Normal(z @ oracle.weights.T, 1.0).log_prob(oracle.simulate(z.shape[1])).sum(-1)
    return (dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + likelihood).numpy()


@pytest.mark.parametrize(
    "make",
    [
        AmortizedGuide,
        SemiAmortizedGuide,
        IterativeAmortizedGuide,
        PerDatapointGuide,
        lambda model: _refined(AmortizedGuide(model)),
    ],
    ids=["amortized", "semi_amortized", "iterative", "per_datapoint", "refined"],
)
@pytest.mark.parametrize("model", [topics, LinearGaussian.full], ids=["topics", "linear"])
def test_guides(oracle: LinearGaussian, make: Callable[..., Any], model: Any) -> None:
    x = counts(POINTS) if model is topics else oracle.simulate(POINTS)
    model = topics if model is topics else oracle.full
    guide = make(model)
    data = to_arviz(model, guide, (x,), num_samples=20)
    assert group_names(data) == DEFAULT
    assert np.isfinite(data["sample_stats"]["log_weight"].values).all()
    assert ("khat" in data["sample_stats"]) == (model is not topics)
    assert data["posterior"].attrs["guide"] == type(guide).__name__


def _refined(guide: AmortizedGuide) -> SemiAmortizedGuide:
    guide.setup(counts(POINTS) if guide.model is topics else torch.randn(POINTS, FEATURES))
    return guide.refined(3)


def test_constrained_latents_lie_in_their_supports() -> None:
    posterior = to_arviz(topics, AmortizedGuide(topics), (counts(POINTS),), num_samples=30, prior=True)
    for group in ("posterior", "prior"):
        assert posterior[group]["rate"].dims == ("chain", "draw", "topics")
        assert posterior[group]["share"].dims == ("chain", "draw", "data", "share_dim_0")
        assert (posterior[group]["size"] > 0).all()
        assert np.allclose(posterior[group]["share"].sum("share_dim_0"), 1.0)


def test_sites_of_a_sequence() -> None:
    x, lengths = torch.randn(5, 3), torch.tensor([3, 1, 2, 3, 2])
    data = with_likelihood(chains, AmortizedGuide(chains), (x, lengths), num_samples=10)
    assert set(data["posterior"].data_vars) == {"z_0", "z_1", "z_2"}
    assert np.array_equal(data["observed_data"]["x_1"].values, x[:, 1].numpy())
    assert (draws(data, "log_likelihood", "x_2")[:, lengths.numpy() < 3] == 0).all()
    assert (draws(data, "log_likelihood", "x_2")[:, lengths.numpy() == 3] < 0).all()
    assert data["constant_data"]["lengths"].dims == ("data",)


def test_a_support_that_an_argument_decides() -> None:
    x = torch.linspace(0.0, 1.0, 5)
    data = to_arviz(uniform_bounds, AmortizedGuide(uniform_bounds), (x, torch.tensor(3.0)), num_samples=50)
    assert (data["posterior"]["z"] >= 3).all()
    assert data["constant_data"]["low"].dims == ()


def test_moments_of_the_exact_posterior(oracle: LinearGaussian) -> None:
    x = oracle.simulate(POINTS)
    posterior, predicted_mean = oracle.posterior(x), (oracle.posterior(x).mean @ oracle.weights.T).numpy()
    data = to_arviz(oracle.full, exact(oracle), (x,), num_samples=4000)
    z = draws(data, "posterior", "z")
    assert mean_error(z, posterior.mean.numpy()) < 4.5
    squares = np.square(z - posterior.mean.numpy())
    assert mean_error(squares, posterior.variance.numpy()) < 4.5
    cross = (z - posterior.mean.numpy())[..., 0] * (z - posterior.mean.numpy())[..., 1]
    assert mean_error(cross, np.zeros(POINTS)) < 4.5
    new = draws(data, "posterior_predictive", "x")
    assert mean_error(new, predicted_mean) < 4.5
    noise = new - z @ oracle.weights.T.numpy()  # predictions belong to the draws of the same position
    assert mean_error(np.square(noise), np.ones((POINTS, FEATURES))) < 4.5
    wrong = to_arviz(oracle.full, exact(oracle, shift=0.1, widen=1.2), (x,), num_samples=4000)
    assert mean_error(draws(wrong, "posterior", "z"), posterior.mean.numpy()) > 6
    assert mean_error(draws(wrong, "posterior_predictive", "x"), predicted_mean) > 6


def test_log_likelihoods_are_those_of_the_draws(oracle: LinearGaussian) -> None:
    x = oracle.simulate(POINTS)
    data = with_likelihood(oracle.full, exact(oracle), (x,), num_samples=30)
    z = torch.tensor(draws(data, "posterior", "z"))
    expected = dist.Normal(z @ oracle.weights.T, 1.0).log_prob(x).sum(-1).numpy()
    assert np.allclose(draws(data, "log_likelihood", "x"), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_log_likelihoods_are_masked_but_not_scaled(scale: float) -> None:
    present = torch.tensor([True, False, True, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(z, 1.0).mask(present), obs=x)

    x = torch.randn(4)
    data = with_likelihood(model, AmortizedGuide(model), (x,), num_samples=10)
    expected = dist.Normal(torch.tensor(draws(data, "posterior", "z")), 1.0).log_prob(x) * present
    assert np.allclose(draws(data, "log_likelihood", "x"), expected)


def check_regression(data: Any, t: Tensor, y: Tensor, guide: AmortizedGuide) -> None:
    """Log-likelihoods and weights by hand, from the draws of latents in the same position."""
    mu, slope, level = (torch.tensor(draws(data, "posterior", name)) for name in ("mu", "slope", "level"))
    likelihood = dist.Normal(level.unsqueeze(-1) + slope[:, 0, None, None] * t, 0.5).log_prob(y)
    assert np.allclose(draws(data, "log_likelihood", "y"), likelihood)
    log_q = guide.posterior(t, y).log_prob(level.unsqueeze(-1)).detach()
    log_joint = dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(level) + likelihood.sum(-1)
    assert np.allclose(draws(data, "sample_stats", "log_weight"), log_joint - log_q)


def test_inner_plates_and_global_draws() -> None:
    t, y = regression_data()
    guide = AmortizedGuide(regression)
    data = with_likelihood(regression, guide, (t, y), num_samples=30)
    assert data["posterior"]["slope"].dims == ("chain", "draw", "terms")
    assert data["posterior"]["level"].dims == ("chain", "draw", "groups")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "groups", "times")
    assert data["constant_data"]["t"].dims == ("groups", "times")
    assert len(np.unique(draws(data, "posterior", "mu"))) == 30
    check_regression(data, t, y, guide)


def test_batches_share_the_global_draws() -> None:
    t, y = regression_data(7)
    guide = AmortizedGuide(regression)
    guide.setup(t, y)
    loader = DataLoader(TensorDataset(t, y), batch_size=3)
    data = with_likelihood(regression, guide, loader, num_samples=20, prior=True)
    assert data["posterior"]["mu"].shape == (1, 20)
    assert data["posterior"]["groups"].values.tolist() == list(range(7))
    assert np.array_equal(data["observed_data"]["y"].values, y.numpy())
    assert np.array_equal(data["constant_data"]["t"].values, t.numpy())
    check_regression(data, t, y, guide)
    once = with_likelihood(regression, guide, (t, y), num_samples=20, prior=True)
    for name in group_names(once):
        assert {n: v.dims for n, v in data[name].data_vars.items()} == {
            n: v.dims for n, v in once[name].data_vars.items()
        }
        assert dict(data[name].sizes) == dict(once[name].sizes)
    mu, level = draws(data, "prior", "mu"), draws(data, "prior", "level")
    assert abs((level - mu[:, None]).std() - 1.0) < 0.25  # around the same mu in all batches


@pytest.mark.parametrize("global_guide", [AutoNormal, AutoMultivariateNormal, AutoDelta, AutoIAFNormal])
def test_global_guides(global_guide: Any) -> None:
    t, y = regression_data()
    guide = AmortizedGuide(regression, global_guide=global_guide)
    data = with_likelihood(regression, guide, (t, y), num_samples=10)
    check_regression(data, t, y, guide)
    assert data["posterior"].attrs["global_latents"] == f"drawn from {global_guide.__name__}: mu, slope"
