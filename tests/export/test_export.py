"""Exports to ArviZ and summaries, against closed forms and against the model evaluated by hand."""

import gc
import math
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import arviz
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from models import LinearGaussian, chains, counts, topics, uniform_bounds
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
    VectorQuantizedGuide,
    psis,
    simulate,
)
from pyro_amortized.export import posterior_summary, to_arviz
from pyro_amortized.export.runs import ModelRuns

pytestmark = pytest.mark.usefixtures("_float64")
mpl.use("Agg")

LATENTS, FEATURES, POINTS = 3, 4, 6
BEFORE_1 = int(arviz.__version__.split(".")[0]) < 1
DEFAULT = {"posterior", "posterior_predictive", "observed_data", "sample_stats"}
LIKELIHOOD = {*DEFAULT, "constant_data", "log_likelihood"}


class Function(nn.Module):
    """An encoder that is a function of the data."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def with_likelihood(*args: Any, **options: Any) -> Any:
    """An export with all groups: beside local latents the log-likelihood has to be asked for."""
    return to_arviz(*args, groups=LIKELIHOOD, **options)


@pytest.fixture
def oracle() -> LinearGaussian:
    """Its posterior is a product of normals."""
    return LinearGaussian.random_weights(FEATURES, LATENTS, orthogonal=True)


def exact(oracle: LinearGaussian, model: Any = None, shift: float = 0.0, widen: float = 1.0) -> AmortizedGuide:
    """The exact posterior as a guide, or one that is off."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = oracle.posterior(x)
        return posterior.mean + shift, posterior.stddev * widen

    return AmortizedGuide(model or oracle.full, Function(encode))


def group_names(data: Any) -> set[str]:
    return set(data.groups() if callable(data.groups) else data.children)


def draws(data: Any, group: str, name: str) -> np.ndarray[Any, Any]:
    """Values without the chain axis."""
    return data[group][name].values[0]


def mean_error(values: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest error of means over draws, in standard errors."""
    return float(np.abs((values.mean(0) - expected) / (values.std(0) / math.sqrt(len(values)))).max())


# Axes

KINDS = {
    "full": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "unsized": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "explicit": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "random": (("data", "z_dim_0"), ("data", "x_dim_0"), ("data",)),
    "rows": (("data", "latents"), ("data", "features"), ("data", "features")),
    "columns": (("latents", "data"), ("features", "data"), ("features", "data")),
}


def call(oracle: LinearGaussian, kind: str) -> tuple[Any, tuple[Tensor, ...], AmortizedGuide]:
    x, model = oracle.simulate(POINTS), getattr(oracle, kind)
    index = (torch.tensor([4, 1, 3]),) if kind == "explicit" else ()
    args = (x.T if kind == "columns" else x, *index)
    return model, args, exact(oracle, model)


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


# Numbers


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


def regression(t: Tensor, y: Tensor, exposure: float = 1.0) -> None:
    """Groups as datapoints, each with an inner plate of observations; global latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("terms", 2):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    groups, times = pyro.plate("groups", len(y), dim=-2), pyro.plate("times", y.shape[1], dim=-1)
    with groups:
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with times:
            trend = (slope * torch.tensor([1.0, 0.0])).sum(-1, keepdim=True) * t
            pyro.sample("y", dist.Normal(level + exposure * trend, 0.5), obs=y)


def regression_data(groups: int = 5) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.0, 1.0, 4).expand(groups, 4).contiguous(), torch.randn(groups, 4)


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


# Discrete latents, of which a guide has no draws that could be exported, or that the model sums out


@pytest.mark.parametrize("kind", ["classes", "codes"])
def test_discrete_latents_of_a_guide_are_refused(kind: str) -> None:
    """The model would draw them from their prior: predictions and log-likelihoods would be those of the prior."""
    book = Codebook(4, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal(book(k).squeeze(-1), 0.1), obs=x)

    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 1, 1)

    x = torch.randn(6)
    guide = DiscreteAmortizedGuide(model) if kind == "classes" else VectorQuantizedGuide(model, book, Encoder())
    guide.setup(x)
    for ask in (to_arviz, posterior_summary):
        with pytest.raises(ValueError, match=r"because (its local latents \['k'\] are discrete|q has one possible)"):
            ask(model, guide, (x,))
    drawn = pyro.infer.Predictive(model, guide=guide, num_samples=3)(x)
    assert drawn["k"].shape == (3, 6)


def test_discrete_latents_are_summed_out_of_the_log_likelihood() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(2 * k, 1.0))  # so that z tells something of k
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    x, y = torch.randn(5), torch.randn(5)
    data = with_likelihood(model, AmortizedGuide(model), (x, y), num_samples=20)
    assert set(data["posterior"].data_vars) == {"z"}
    z = torch.tensor(draws(data, "posterior", "z"))
    prior = torch.stack(
        [math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(z), math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(z)]
    )
    joint = prior + torch.stack([dist.Normal(z + k, 1.0).log_prob(x) for k in (0, 1)])
    expected = joint.logsumexp(0) - prior.logsumexp(0)
    assert np.allclose(draws(data, "log_likelihood", "x"), expected)
    assert np.allclose(draws(data, "log_likelihood", "y"), dist.Normal(z, 1.0).log_prob(y))


def mixture(x: Tensor) -> None:
    """Global locations; a discrete latent per datapoint, over an inner plate of observations."""
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x), dim=-2):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.25, 0.75])), infer={"enumerate": "parallel"})
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(Vindex(loc)[..., k], 1.0), obs=x)


def test_a_mixture_without_local_latents() -> None:
    x = torch.randn(5, 2)
    data = to_arviz(mixture, AmortizedGuide(mixture), (x,), num_samples=20)
    assert group_names(data) == (DEFAULT | {"log_likelihood"}) - {"sample_stats"}
    loc = torch.tensor(draws(data, "posterior", "loc"))
    joint = dist.Normal(loc[:, None, None], 1.0).log_prob(x.unsqueeze(-1)).sum(-2) + torch.tensor([0.25, 0.75]).log()
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert np.allclose(draws(data, "log_likelihood", "x"), joint.logsumexp(-1))


# Models that cannot take a plate of draws


def linear_regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, noise), obs=y)


@pytest.mark.parametrize("features", [2, 5])  # 5: as many as datapoints, which broadcasts, wrongly
def test_global_latents_alone(features: int) -> None:
    x, y = torch.randn(5, features), torch.randn(5)
    data = to_arviz(linear_regression, AmortizedGuide(linear_regression), (x, y), num_samples=20, prior=True)
    assert group_names(data) == (LIKELIHOOD | {"prior", "prior_predictive"}) - {"sample_stats"}
    weights, noise = (torch.tensor(draws(data, "posterior", name)) for name in ("weights", "noise"))
    expected = dist.Normal(weights @ x.T, noise.unsqueeze(-1)).log_prob(y)
    assert np.allclose(draws(data, "log_likelihood", "y"), expected)
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "data")
    assert data["constant_data"]["x"].dims == ("data", "x_dim_0")


def computing(x: Tensor, scale: float = 0.5) -> None:
    """What is computed of latents: of each datapoint, of global ones, and of all datapoints together."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2.0 * mu)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        t = pyro.sample("t", dist.Normal(z, scale))
        pyro.deterministic("sum", z + t)
        pyro.deterministic("pair", torch.stack([z, -t], -1), event_dim=1)
        pyro.sample("x", dist.Normal(t, 1.0), obs=x)
    pyro.deterministic("total", z.sum(-1))


@pytest.mark.parametrize("batches", [False, True])
def test_what_is_computed_of_latents_goes_with_them(batches: bool) -> None:
    """Deterministic sites, and those that a reparametrisation has put others in the place of, which are no data."""
    model = poutine.reparam(computing, {"t": LocScaleReparam(0.0)})
    x = torch.randn(6)
    guide = AmortizedGuide(model)
    guide.setup(x)
    assert len(guide.encoder_inputs(x)) == 1
    loader = DataLoader(TensorDataset(x), batch_size=4)
    found = to_arviz(model, guide, loader if batches else (x,), num_samples=7)
    posterior = found.posterior
    assert {*found.observed_data} == {"x"}
    assert {*posterior} == {"mu", "z", "t_decentered", "double", "t", "sum", "pair"}
    z, t = posterior["z"].values, posterior["t"].values
    assert t == pytest.approx(z + 0.5 * posterior["t_decentered"].values, abs=1e-5)
    assert posterior["sum"].values == pytest.approx(z + t, abs=1e-5)
    assert posterior["pair"].dims == ("chain", "draw", "data", "pair_dim_0")
    assert posterior["pair"].values[..., 1] == pytest.approx(-t, abs=1e-5)
    assert posterior["double"].values == pytest.approx(2.0 * posterior["mu"].values, abs=1e-5)
    simulation = simulate(model, guide, (x,), num_datapoints=20)
    assert simulation.args[0].shape == (20,)


def test_a_plate_named_as_a_dimension_of_arviz_is_refused() -> None:
    def model(name: str, x: Tensor) -> None:
        with pyro.plate(name, len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"a plate 'draw' because .*; try `pyro.plate\('draws', ...\)` in the model"):
        to_arviz(partial(model, "draw"), AmortizedGuide(partial(model, "draw")), (torch.randn(3),), num_samples=2)
    guide = AmortizedGuide(partial(model, "draws"), name="renamed")
    found = to_arviz(partial(model, "draws"), guide, (torch.randn(3),), num_samples=2)
    assert found.posterior["z"].dims == ("chain", "draw", "draws")


def test_a_model_without_plates() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Bernoulli(p).expand([len(x)]).to_event(1), obs=x)

    data = to_arviz(model, AmortizedGuide(model), (torch.ones(4),), num_samples=20)
    assert data["observed_data"]["x"].dims == ("x_dim_0",)
    assert data["log_likelihood"]["x"].dims == ("chain", "draw")
    assert np.allclose(draws(data, "log_likelihood", "x"), 4 * np.log(draws(data, "posterior", "p")))


@pytest.mark.parametrize("likelihood", [dist.Bernoulli, dist.Poisson], ids=["vmap", "one_by_one"])
def test_a_decoder_of_images(likelihood: Any) -> None:
    """Convolutions take a single batch dimension."""
    decoder = nn.Sequential(
        nn.Unflatten(1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 3), nn.Softplus(), nn.Hardtanh(0.01, 0.99)
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", likelihood(decoder(z)).to_event(3), obs=x)

    x = torch.bernoulli(torch.full((4, 1, 3, 3), 0.5))
    data = with_likelihood(model, AmortizedGuide(model), (x,), num_samples=300)
    z = draws(data, "posterior", "z")
    means = decoder(torch.tensor(z[:5]).flatten(0, 1)).reshape(5, 4, 1, 3, 3)
    assert np.allclose(draws(data, "log_likelihood", "x")[:5], likelihood(means).log_prob(x).sum((-1, -2, -3)).detach())
    everywhere = decoder(torch.tensor(z).flatten(0, 1)).reshape(300, *x.shape).detach().numpy()
    residual = draws(data, "posterior_predictive", "x") - everywhere
    assert mean_error(residual, np.zeros(x.shape)) < 4.5
    assert len(np.unique(draws(data, "posterior_predictive", "x").reshape(300, -1), axis=0)) > 200


@pytest.mark.parametrize(
    ("model", "modes"),
    [
        (topics, {"weigh": "_together", "predict": "_together"}),
        (linear_regression, {"weigh": "_mapped", "predict": "_mapped"}),
    ],
)
def test_draws_are_vectorised(model: Any, modes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    runs = 0

    def choose(self: ModelRuns, function: Any, draws: Any) -> None:
        nonlocal runs
        original(self, function, draws)
        found.update({name: mode.__name__ for name, mode in self.modes.items()})
        runs = 0

    def count(*args: Any) -> None:
        nonlocal runs
        runs += 1
        model(*args)

    original = ModelRuns.choose_mode
    monkeypatch.setattr(ModelRuns, "choose_mode", choose)
    args = (counts(POINTS),) if model is topics else (torch.randn(5, 2), torch.randn(5))
    to_arviz(count, AmortizedGuide(model), args, num_samples=500)
    assert found == modes
    assert runs == 2


# Resampling


def test_resampling_leads_to_the_exact_posterior(oracle: LinearGaussian) -> None:
    x = oracle.simulate(POINTS)
    wrong = exact(oracle, shift=0.1, widen=1.3)
    posterior = oracle.posterior(x)
    plain, better = (with_likelihood(oracle.full, wrong, (x,), num_samples=8000, resample=r) for r in (False, True))
    for data, right in ((plain, False), (better, True)):
        z = draws(data, "posterior", "z")
        # resampled draws repeat: their standard errors are at most sqrt(K / ESS) < 2 times those of independent ones
        assert (mean_error(z, posterior.mean.numpy()) < 8) == right
        assert (mean_error(np.square(z - posterior.mean.numpy()), posterior.variance.numpy()) < 8) == right
    assert (better["sample_stats"]["khat"] < 0.7).all()
    assert np.allclose(better["sample_stats"]["khat"], plain["sample_stats"]["khat"])
    khat = psis(torch.tensor(draws(plain, "sample_stats", "log_weight")))[1]
    assert np.allclose(plain["sample_stats"]["khat"], khat)
    likelihood = dist.Normal(torch.tensor(draws(better, "posterior", "z")) @ oracle.weights.T, 1.0).log_prob(x).sum(-1)
    assert np.allclose(draws(better, "log_likelihood", "x"), likelihood)
    assert better["posterior"].attrs["resampled"] == 1


def test_resampled_datapoints_are_independent(oracle: LinearGaussian) -> None:
    data = to_arviz(oracle.full, exact(oracle, widen=1.5), (oracle.simulate(POINTS),), num_samples=4000, resample=True)
    z = draws(data, "posterior", "z")[..., 0]
    correlation = np.corrcoef(z.T)[np.triu_indices(POINTS, 1)]
    assert np.abs(correlation).max() < 4.5 / math.sqrt(2000)
    assert abs(np.corrcoef(z[1:, 0], z[:-1, 0])[0, 1]) < 4.5 / math.sqrt(2000)


def test_resampling_with_global_latents_held() -> None:
    t, y = regression_data()
    guide = AmortizedGuide(regression)
    with pytest.raises(ValueError, match=r"Cannot resample .* global latents \['mu', 'slope'\] are drawn"):
        to_arviz(regression, guide, (t, y), resample=True)
    held = pyro.condition(regression, data=guide.global_median(t, y))
    data = to_arviz(held, guide.refined(10), (t, y), num_samples=4000, resample=True)
    assert set(data["posterior"].data_vars) == {"level"}
    assert set(data["observed_data"].data_vars) == {"y"}
    median = guide.global_median(t, y)
    residual = (y - median["slope"][0] * t).sum(-1)
    mean, variance = (median["mu"] + residual / 0.25) / (1 + 4 / 0.25), 1 / (1 + 4 / 0.25)
    error = (draws(data, "posterior", "level") - mean.numpy()) / math.sqrt(variance)
    assert np.abs(error.mean(0)).max() < 0.1
    assert set(data["posterior"].attrs["global_latents"].split()) == {"none"}


# Batches


def test_a_loader_gives_what_a_single_call_gives(oracle: LinearGaussian) -> None:
    x = oracle.simulate(10)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    joined, once = (to_arviz(oracle.full, exact(oracle), a, num_samples=2000, prior=True) for a in (loader, (x,)))
    assert group_names(joined) == group_names(once)
    for name in group_names(once):
        for variable, values in once[name].data_vars.items():
            assert joined[name][variable].dims == values.dims
            assert joined[name][variable].shape == values.shape
            assert joined[name][variable].dtype == values.dtype
        for coordinate, values in once[name].coords.items():
            assert np.array_equal(joined[name][coordinate], values)
    assert joined["observed_data"]["x"].equals(once["observed_data"]["x"])
    assert np.allclose(joined["sample_stats"]["log_weight"], once["sample_stats"]["log_weight"], atol=1e-10)
    assert mean_error(draws(joined, "posterior", "z"), oracle.posterior(x).mean.numpy()) < 4.5
    assert not np.allclose(draws(joined, "posterior", "z")[:, :4], draws(joined, "posterior", "z")[:, 4:8])


def test_a_loader_of_indices_keeps_them_as_coordinates(oracle: LinearGaussian) -> None:
    x = oracle.simulate(10)

    def model(index: Tensor) -> None:
        oracle.explicit(x, index)

    loader = DataLoader(torch.tensor([7, 2, 9, 0, 4]), batch_size=2)
    data = to_arviz(model, exact(oracle, model), loader, num_samples=5)
    assert data["observed_data"]["data"].values.tolist() == [7, 2, 9, 0, 4]
    assert np.array_equal(data["observed_data"]["x"].values, x.numpy()[[7, 2, 9, 0, 4]])
    assert "constant_data" not in group_names(data)


def test_a_loader_of_mappings(oracle: LinearGaussian) -> None:
    batches = DataLoader([{"x": row} for row in oracle.simulate(5)], batch_size=2)
    data = to_arviz(oracle.full, exact(oracle), batches, num_samples=5)
    assert np.array_equal(data["observed_data"]["x"].values, oracle.simulate(5).numpy())


def test_arguments_that_do_not_run_over_the_plate() -> None:
    def model(x: Tensor, weights: Tensor, number: Tensor, flag: bool = True) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + weights.sum(), 1.0), obs=x)

    weights = torch.randn(3)
    batches = [(torch.randn(4), weights, torch.tensor(0)), (torch.randn(3), weights, torch.tensor(1))]
    constant = to_arviz(model, AmortizedGuide(model), iter(batches), num_samples=5)["constant_data"]
    assert constant["weights"].dims == ("weights_dim_0",)  # also in the batch of as many datapoints
    assert set(constant.data_vars) == {"weights"}  # the number is another in each batch


@pytest.mark.slow
def test_inputs_of_earlier_batches_are_not_kept(oracle: LinearGaussian) -> None:
    alive: list[Any] = []
    most = 0

    def batches() -> Iterator[tuple[Tensor]]:
        nonlocal most
        for seed in range(8):
            x = oracle.simulate(20, seed)
            alive.append(weakref.ref(x))
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            yield (x,)

    to_arviz(oracle.full, exact(oracle), batches(), num_samples=5)
    assert len(alive) == 8
    assert most <= 3  # the batch at hand, the one before, and the one that sized the guide


# What was asked for


def test_groups_asked_for(oracle: LinearGaussian) -> None:
    args = (oracle.simulate(POINTS),)
    for groups in (["posterior"], ["log_likelihood", "prior"], {"posterior_predictive"}, "sample_stats"):
        data = to_arviz(oracle.full, exact(oracle), args, num_samples=5, groups=groups)
        assert group_names(data) == ({groups} if isinstance(groups, str) else set(groups))


def test_numbers_of_draws(oracle: LinearGaussian) -> None:
    args = (oracle.simulate(POINTS),)
    data = to_arviz(oracle.full, exact(oracle), args, num_samples=1, prior=True, num_prior_samples=7)
    assert (data["posterior"].sizes["draw"], data["prior"].sizes["draw"]) == (1, 7)
    assert data["prior_predictive"].sizes["draw"] == 7


def test_the_prior(oracle: LinearGaussian) -> None:
    data = to_arviz(oracle.full, exact(oracle), (oracle.simulate(POINTS),), num_samples=4000, prior=True)
    z = draws(data, "prior", "z")
    assert mean_error(z, np.zeros(z.shape[1:])) < 4.5
    assert mean_error(np.square(z), np.ones(z.shape[1:])) < 4.5
    noise = draws(data, "prior_predictive", "x") - z @ oracle.weights.T.numpy()
    assert mean_error(np.square(noise), np.ones(noise.shape[1:])) < 4.5
    assert mean_error(draws(data, "posterior", "z"), np.zeros(z.shape[1:])) > 6


@pytest.mark.parametrize("model", [topics, linear_regression], ids=["together", "one_by_one"])
def test_the_seed_decides(model: Any) -> None:
    args = (counts(POINTS),) if model is topics else (torch.randn(5, 2), torch.randn(5))
    guide = AmortizedGuide(model)
    guide.setup(*args)
    state = torch.get_rng_state()
    first, again, other = (to_arviz(model, guide, args, num_samples=10, seed=seed, prior=True) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert as_datasets(first).keys() == as_datasets(again).keys()
    assert all(values.equals(as_datasets(again)[name]) for name, values in as_datasets(first).items())
    assert not as_datasets(first)["posterior"].equals(as_datasets(other)["posterior"])
    assert first["posterior"].attrs["seed"] == 1


def as_datasets(data: Any) -> dict[str, xarray.Dataset]:
    return {name: xarray.Dataset(dict(data[name].data_vars)) for name in group_names(data)}


def test_dtypes_are_kept() -> None:
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x.float())

    x = torch.tensor([0, 1, 1], dtype=torch.uint8)
    data = to_arviz(model, AmortizedGuide(model), (x,), num_samples=30)
    for group, name in [("posterior", "z"), ("sample_stats", "log_weight"), ("observed_data", "x")]:
        assert data[group][name].dtype == np.float32
    assert "constant_data" not in group_names(data)  # the observed values in another dtype


def test_attributes() -> None:
    t, y = regression_data()
    data = with_likelihood(regression, SemiAmortizedGuide(regression), (t, y), num_samples=5, seed=3)
    for name in group_names(data):
        attributes = data[name].attrs
        assert attributes["inference_library"] == "pyro_amortized"
        assert attributes["inference_library_version"]
        assert (attributes["guide"], attributes["family"], attributes["seed"]) == ("SemiAmortizedGuide", "Normal", 3)
        assert attributes["datapoint_plate"] == "groups"
    assert data["sample_stats"]["log_weight"].attrs["units"] == "nats"
    assert data["log_likelihood"]["y"].attrs["units"] == "nats"


def test_progress(oracle: LinearGaussian, capsys: pytest.CaptureFixture[str]) -> None:
    to_arviz(oracle.full, exact(oracle), (oracle.simulate(POINTS),), num_samples=12, progress=True)
    assert "12/12" in capsys.readouterr().err
    to_arviz(oracle.full, exact(oracle), iter([(oracle.simulate(3),)] * 2), num_samples=12)
    posterior_summary(oracle.full, exact(oracle), DataLoader(oracle.simulate(9), batch_size=4), progress=True)
    assert "3/3" in capsys.readouterr().err


# In ArviZ


@pytest.fixture
def exported() -> Any:
    t, y = regression_data()
    return to_arviz(regression, AmortizedGuide(regression), (t, y), num_samples=100, prior=True)


def test_type_and_summary(exported: Any) -> None:
    assert isinstance(exported, arviz.InferenceData if BEFORE_1 else xarray.DataTree)
    table = arviz.summary(exported, kind="stats")
    assert [str(name) for name in table.index[:3]] == ["mu", "slope[0]", "slope[1]"]
    assert "level[4]" in table.index


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of ArviZ 0.23 and matplotlib 3.11
def test_plots(exported: Any) -> None:
    posterior, predictive = ("plot_posterior", "plot_ppc") if BEFORE_1 else ("plot_dist", "plot_ppc_dist")
    getattr(arviz, posterior)(exported, var_names=["mu", "slope"])
    arviz.plot_forest(exported, var_names=["level"])
    getattr(arviz, predictive)(exported)
    oracle = LinearGaussian.random_weights(FEATURES, LATENTS, orthogonal=True)
    stats = to_arviz(oracle.full, exact(oracle, widen=1.2), (oracle.simulate(POINTS),), num_samples=50)["sample_stats"]
    khat = stats["khat"]
    arviz.plot_khat(khat if BEFORE_1 else types.SimpleNamespace(pareto_k=khat, good_k=0.7))
    plt.close("all")


def test_netcdf_round_trip(exported: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "posterior.nc")
    exported.to_netcdf(path, engine="h5netcdf")
    read = arviz.from_netcdf(path, engine="h5netcdf") if BEFORE_1 else xarray.open_datatree(path)
    assert group_names(read) == group_names(exported)
    for name, values in as_datasets(exported).items():
        assert values.equals(as_datasets(read)[name].load())
        assert read[name].attrs == exported[name].attrs
    read.close()


@pytest.mark.slow
def test_importing_loads_neither_arviz_nor_xarray() -> None:
    code = "import sys, pyro_amortized.export; print({'arviz', 'xarray', 'pandas'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# What cannot be done


def test_other_guides_are_refused(oracle: LinearGaussian) -> None:
    guide = AutoNormal(oracle.full)
    for function in (to_arviz, posterior_summary):
        with pytest.raises(ValueError, match="Cannot export the posterior of a AutoNormal .*; try an AmortizedGuide"):
            function(oracle.full, guide, (oracle.simulate(POINTS),))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "Cannot use num_samples=0 because"),
        ({"num_samples": 2.5}, "Cannot use num_samples=2.5 because"),
        ({"num_prior_samples": True}, "Cannot use num_prior_samples=True because"),
        ({"groups": ["posterior", "loo"]}, r"Cannot make groups \['loo'\] because they are unknown; try"),
    ],
)
def test_bad_options(oracle: LinearGaussian, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_arviz(oracle.full, exact(oracle), (oracle.simulate(POINTS),), **options)


def test_bad_arguments(oracle: LinearGaussian) -> None:
    x = oracle.simulate(POINTS)
    with pytest.raises(ValueError, match=r"Cannot call the model with model_args=<Tensor>"):
        to_arviz(oracle.full, exact(oracle), x)
    with pytest.raises(ValueError, match=r"the DataLoader shuffles"):
        to_arviz(oracle.full, exact(oracle), DataLoader(x, shuffle=True))
    with pytest.raises(ValueError, match="the guide was made for another one"):
        to_arviz(
            pyro.condition(oracle.full, {"z": torch.zeros(POINTS, LATENTS)}), exact(oracle), (x,), groups="posterior"
        )


def test_resampling_without_local_latents() -> None:
    args = (torch.randn(5, 2), torch.randn(5))
    with pytest.raises(ValueError, match="Cannot resample .* because the model has no local latents"):
        to_arviz(linear_regression, AmortizedGuide(linear_regression), args, resample=True)


def test_batches_that_do_not_fit_together() -> None:
    def model(x: Tensor, outside: Tensor) -> None:
        pyro.sample("outside", dist.Normal(0.0, 1.0).expand(outside.shape).to_event(), obs=outside)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(model, Function(lambda x: x[:, :2]))
    ragged = [(torch.randn(3, 2), torch.zeros(2)), (torch.randn(3, 4), torch.zeros(2))]
    with pytest.raises(ValueError, match="Cannot join .* dimension 'inner' has size 2 in the first and 4 in a"):
        to_arviz(model, guide, iter(ragged), num_samples=5)
    changing = [(torch.randn(3, 2), torch.zeros(2)), (torch.randn(3, 2), torch.ones(2))]
    with pytest.raises(ValueError, match=r"observed sites \['outside'\] lie outside of plate 'data' and differ"):
        to_arviz(model, guide, iter(changing), num_samples=5)


def test_weights_that_are_not_numbers() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((1.5 + z).sqrt(), 1.0), obs=x)

    guide = AmortizedGuide(model, Function(lambda x: (torch.zeros(len(x), 1), torch.ones(len(x), 1))))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="not a number|not finite"):
        to_arviz(model, guide, (torch.randn(3),), num_samples=2000)


# Summaries


def test_summary_of_a_call() -> None:
    x = counts(POINTS)
    guide = AmortizedGuide(topics)
    guide.setup(x)
    summary = posterior_summary(topics, guide, (x,), quantiles=(0.1, 0.5))
    assert summary["share"].dims == ("quantile", "data", "share_dim_0")
    assert summary["rate"].dims == ("quantile", "topics")
    assert summary["quantile"].values.tolist() == [0.1, 0.5]
    for name, values in guide.quantiles([0.1, 0.5], x).items():
        assert np.allclose(summary[name], values)
    assert summary.attrs["guide"] == "AmortizedGuide"


def test_summary_of_a_loader() -> None:
    x = counts(11)
    guide = AmortizedGuide(topics)
    guide.setup(x)
    once = posterior_summary(topics, guide, (x,))
    joined = posterior_summary(topics, guide, DataLoader(x, batch_size=4), num_samples=300)
    for name in ("size", "share", "rate"):
        assert np.allclose(joined[name], once[name])
        assert joined[f"{name}_draws"].dims == ("draw", *once[name].dims[1:])
    assert joined.sizes["draw"] == 300
    below = (joined["size_draws"] < joined["size"].sel(quantile=0.5)).mean("draw")
    assert (abs(below - 0.5) < 4.5 * math.sqrt(0.25 / 300)).all()
    assert set(once.data_vars) == {"size", "share", "rate"}


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_belong_to_their_datapoints(oracle: LinearGaussian, kind: str) -> None:
    model, args, guide = call(oracle, kind)
    summary = posterior_summary(model, guide, args, num_samples=3)
    mean = oracle.posterior(oracle.simulate(POINTS)).mean.numpy()[summary["data"].values]
    assert np.allclose(summary["z"].sel(quantile=0.5).transpose("data", ...), mean)
    assert set(summary["z_draws"].dims) == {"draw", *KINDS[kind][0]}


def test_summary_of_a_refined_guide(oracle: LinearGaussian) -> None:
    guide = AmortizedGuide(oracle.full)
    x = oracle.simulate(POINTS)
    guide.setup(x)
    summary = posterior_summary(oracle.full, guide.refined(20), (x,))
    error = summary["z"].sel(quantile=0.5).values - oracle.posterior(x).mean.numpy()
    assert np.abs(error).max() < 0.1


def test_summaries_that_cannot_be_made(oracle: LinearGaussian) -> None:
    x = counts(POINTS)
    for quantiles in ((), (0.5, 1.0)):
        with pytest.raises(ValueError, match="Cannot take quantiles .* must lie between 0 and 1"):
            posterior_summary(topics, AmortizedGuide(topics), (x,), quantiles=quantiles)
    with pytest.raises(ValueError, match="Cannot use num_samples=-1"):
        posterior_summary(topics, AmortizedGuide(topics), (x,), num_samples=-1)
    guide = AmortizedGuide(topics, global_guide=AutoDelta)
    assert posterior_summary(topics, guide, (x,), quantiles=(0.5,))["rate"].shape == (1, 3)
    with pytest.raises(ValueError, match=r"Cannot take quantiles of global latents \['rate'\] because AutoDelta"):
        posterior_summary(topics, guide, (x,))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_leave_one_out_is_refused_where_it_would_be_wrong(oracle: LinearGaussian) -> None:
    guide, x = exact(oracle), torch.randn(POINTS, FEATURES)
    with pytest.raises((TypeError, ValueError), match="log.likelihood"):
        arviz.loo(to_arviz(oracle.full, guide, (x,), num_samples=100))
    arviz.loo(with_likelihood(oracle.full, guide, (x,), num_samples=100))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_arguments(layout: str) -> None:
    def model(counts: Tensor) -> None:
        x = counts.to_dense()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp().unsqueeze(-1).expand(z.shape + (6,))).to_event(1), obs=x)

    counts = getattr(torch.poisson(torch.ones(POINTS, 6)), layout)()
    assert group_names(to_arviz(model, AmortizedGuide(model), (counts,), num_samples=3)) == DEFAULT


def test_predictions_of_a_distribution_without_a_sampler_are_refused_with_the_groups_that_can_be_had() -> None:
    class Unsampled(dist.Normal):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            raise NotImplementedError

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Unsampled(z, 1.0), obs=x)

    x, guide = torch.randn(4), AmortizedGuide(model)
    guide(x)
    with pytest.raises(ValueError, match=r"site 'x' because its Unsampled .*; try groups=\[\"posterior\", \"log_lik"):
        to_arviz(model, guide, (x,))
    assert group_names(to_arviz(model, guide, (x,), groups=["posterior", "log_likelihood"])) >= {"log_likelihood"}
