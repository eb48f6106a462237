"""Exports of models with discrete latents, and of those that take no plate of draws."""

import math
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exports import DEFAULT, LIKELIHOOD, POINTS, draws, group_names, linear_regression, mean_error, with_likelihood
from models import counts, topics
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, Codebook, DiscreteAmortizedGuide, VectorQuantizedGuide, simulate
from pyro_amortized.export import posterior_summary, to_arviz
from pyro_amortized.export.runs import ModelRuns

pytestmark = pytest.mark.usefixtures("_float64")


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
