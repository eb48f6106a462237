"""Simulated data sets: that they come from the model, and that the guide meets them where the observed data were."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, chains, counts, topics, uniform_bounds
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, NaturalGradient, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.diagnostics.simulation import Simulator, simulate
from pyro_amortized.objective.noise import generator

pytestmark = pytest.mark.usefixtures("_float64")


def linear(size: int = 20) -> tuple[LinearGaussian, Tensor]:
    oracle = LinearGaussian.random_weights()
    return oracle, oracle.simulate(size)


def residuals(oracle: LinearGaussian, latents: Tensor, x: Tensor) -> Tensor:
    return torch.cat([latents, x - latents @ oracle.weights.T], -1)


def check_standard_normal(values: Tensor) -> None:
    """Means and second moments within 4.5 standard errors."""
    count = len(values)
    assert values.mean(0).abs().max() < 4.5 / math.sqrt(count)
    moments = values.T @ values / count - torch.eye(values.shape[1])
    assert moments.abs().max() < 4.5 * math.sqrt(2 / count)


@pytest.mark.parametrize("kind", ["full", "unsized", "rows", "columns"])
def test_draws_come_from_the_model(kind: str) -> None:
    oracle, x = linear()
    model = getattr(oracle, kind)
    x = x.T.contiguous() if kind == "columns" else x
    simulation = simulate(model, AmortizedGuide(model), (x,), None, 3000)
    found = simulation.args[0].T if kind == "columns" else simulation.args[0]
    assert simulation.latents.shape == (3000, 3)
    assert simulation.rows.bincount().tolist() == [150] * 20
    check_standard_normal(residuals(oracle, simulation.latents, found))


def test_the_whole_call_by_default_and_reproducibly() -> None:
    oracle, x = linear()
    guide, before, state = AmortizedGuide(oracle.full), x.clone(), torch.get_rng_state()
    first, again, other = (simulate(oracle.full, guide, (x,), seed=seed) for seed in (1, 1, 2))
    simulate(oracle.full, guide, (x,), None, 33)
    simulate(oracle.full, AmortizedGuide(oracle.full, name="new"), (x,), None, 7)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.args[0], again.args[0])
    assert not torch.equal(first.args[0], other.args[0])
    assert first.args[0].shape == x.shape
    assert first.rows.tolist() == list(range(20))
    assert torch.equal(first.observed["x"], first.args[0])


def test_the_guide_infers_the_simulated_latents() -> None:
    oracle = LinearGaussian.random_weights(orthogonal=True)
    guide = SemiAmortizedGuide(oracle.full, num_steps=30, update=NaturalGradient(0.5), num_particles=8)
    simulation = simulate(oracle.full, guide, (oracle.simulate(20),), None, 50)
    mean = guide.posterior(*simulation.args, **simulation.kwargs).mean
    assert (mean - oracle.posterior(simulation.args[0]).mean).abs().max() < 0.01


def regression(y: Tensor, covariates: dict[str, Tensor], *, sizes: list[Tensor]) -> None:
    slope = pyro.sample("slope", dist.Normal(1.0, 1.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("members", y.shape[1], dim=-1):
            mean = rate * (slope * covariates["t"]).exp() + 0 * sizes[0].unsqueeze(-1)
            pyro.sample("y", dist.Poisson(mean), obs=y)


def test_covariates_stay_with_their_rows_and_globals_are_held() -> None:
    rng = torch.Generator().manual_seed(0)
    t, sizes = torch.rand(8, 5, generator=rng), torch.arange(8.0)
    y = torch.poisson(3 * t.exp(), generator=rng)
    args, kwargs = (y, {"t": t}), {"sizes": [sizes]}
    guide = AmortizedGuide(regression)
    simulation = simulate(regression, guide, args, kwargs, 4000)
    rows = simulation.rows
    assert torch.equal(simulation.args[1]["t"], t[rows])
    assert torch.equal(simulation.kwargs["sizes"][0], sizes[rows])
    slope = guide.median(*args, **kwargs)["slope"]
    rate = simulation.latents[:, 0].exp()
    assert abs(rate.mean() - 2.0) < 4.5 * math.sqrt(2 / 4000)
    mean = rate.unsqueeze(-1) * (slope * t[rows]).exp()
    scores = (simulation.args[0] - mean) / mean.sqrt()
    assert scores.mean().abs() < 4.5 / math.sqrt(20000)
    assert abs(scores.square().mean() - 1) < 0.1


def test_fewer_datapoints_are_a_selection_of_rows() -> None:
    oracle, x = linear()
    simulation = simulate(oracle.full, AmortizedGuide(oracle.full), (x,), None, 7)
    assert len(simulation.rows.unique()) == len(simulation.args[0]) == 7


def views(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("first", dist.Normal(z, 1.0).to_event(1), obs=x[:, :2])
        pyro.sample("rest", dist.Normal(3.0, 1.0).expand([2, 2]).to_event(2), obs=x[:, 2:].reshape(-1, 2, 2))
        pyro.sample("y", dist.Bernoulli(logits=z[..., 0]), obs=y.double())


def test_views_and_other_dtypes_are_found() -> None:
    x, y = torch.zeros(10, 6), torch.arange(10) % 2
    simulation = simulate(views, AmortizedGuide(views), (x, y), None, 500)
    sim_x, sim_y = simulation.args
    assert sim_y.dtype == torch.int64
    assert set(sim_y.tolist()) == {0, 1}
    assert (sim_x[:, 2:].mean(0) - 3).abs().max() < 4.5 / math.sqrt(500)
    assert torch.equal(simulation.observed["first"], sim_x[:, :2])
    assert abs((sim_x[:, :2] - simulation.latents).square().mean() - 1) < 0.2


def test_an_argument_that_is_passed_twice_stays_one() -> None:
    oracle, x = linear()

    def model(x: Tensor, target: Tensor) -> None:
        oracle.full(target)

    guide = AmortizedGuide(model, encoder_input="x")
    for number in (None, 33):
        simulation = simulate(model, guide, (x, x), None, number)
        assert torch.equal(*simulation.args)
        assert not torch.equal(simulation.args[0], x[simulation.rows])


@pytest.mark.slow
def test_indexed_subsamples_write_their_rows() -> None:
    oracle, x = linear()
    index = torch.tensor([5, 1, 7, 11, 0])
    guide = AmortizedGuide(oracle.explicit)
    simulation = simulate(oracle.explicit, guide, (x, index))
    found, same_index = simulation.args
    assert torch.equal(same_index, index)
    others = [i for i in range(20) if i not in index]
    assert torch.equal(found[others], x[others])
    assert not torch.isclose(found[index], x[index]).any()
    assert len(simulate(oracle.explicit, guide, (x, index), None, 2).latents) == 2
    simulator = Simulator(bind(oracle.explicit, guide, (x, index), None, 0))
    latents, values = [], []
    for part in simulator.blocks(2000, generator(0)):
        latents.append(part.latents)
        values.append(part.args[0][part.args[1]])
    assert len(torch.cat(latents)) == 2000
    check_standard_normal(residuals(oracle, torch.cat(latents), torch.cat(values)))


def test_masked_observations_keep_their_values() -> None:
    def model(x: Tensor, present: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 3]).mask(present).to_event(1)
            with pyro.poutine.mask(mask=x[:, 0] > -5):
                pyro.sample("x", fn, obs=x)

    x = torch.zeros(6, 3)
    x[2] = -9.0
    present = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    kept = ~present
    kept[2] = True
    simulation = simulate(model, AmortizedGuide(model), (x, present))
    assert torch.equal(simulation.args[0] == x, kept)


def test_structures_that_depend_on_values() -> None:
    low = torch.tensor([0.0, 4.0, 8.0, 12.0])
    simulation = simulate(uniform_bounds, AmortizedGuide(uniform_bounds), (low + 1.0, low))
    z = low + 2 * torch.sigmoid(simulation.latents[:, 0])
    assert (simulation.args[0] - z).abs().max() < 6
    x, lengths = torch.zeros(5, 3), torch.tensor([1, 3, 2, 2, 1])
    simulation = simulate(chains, AmortizedGuide(chains), (x, lengths), None, 12)
    observed = torch.arange(3) < simulation.args[1].unsqueeze(-1)
    assert torch.equal(simulation.args[0] != 0, observed)
    guide = AmortizedGuide(chains)
    simulator = Simulator(bind(chains, guide, (x, lengths), None, 0))
    assert all(part.latents.shape[1] == 3 for part in simulator.blocks(1, generator(0)))


def test_constrained_and_enumerated_latents() -> None:
    simulation = simulate(topics, AmortizedGuide(topics), (counts(10),), None, 200)
    assert simulation.latents.shape == (200, 3)

    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 40 * k, 1.0), obs=x)

    simulation = simulate(mixture, AmortizedGuide(mixture), (torch.linspace(-1.0, 41.0, 10),), None, 400)
    assert abs((simulation.args[0] > 20).double().mean() - 0.5) < 0.1


def test_models_that_only_run_on_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, x = linear(6)

    def stubborn(x: Tensor) -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([6, 3]).to_event(1))
            pyro.sample("x", dist.Normal(z.reshape(6, 3) @ oracle.weights.T, 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(stubborn)
    assert len(simulate(stubborn, guide, (x,)).latents) == 6
    simulator = Simulator(bind(stubborn, guide, (x,), None, 0))
    assert [len(part.latents) for part in simulator.blocks(20, generator(0))] == [6] * 4
    with pytest.raises(
        ValueError, match=r"Cannot simulate 20 datapoints in one call.*own 6 rows; try num_datapoints=6"
    ):
        simulate(stubborn, guide, (x,), None, 20)


def with_site(site: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            site(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return model


class NoSampler(dist.Normal):
    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    rsample = sample


def _normal(z: Tensor, x: Tensor, name: str = "x") -> None:
    pyro.sample(name, dist.Normal(z, 1.0), obs=x)


def _factor(z: Tensor, x: Tensor) -> None:
    _normal(z, x)
    pyro.factor("extra", -z.square())


def _computed(z: Tensor, x: Tensor) -> None:
    _normal(z, x.log1p())


def _scaled(z: Tensor, x: Tensor) -> None:
    with pyro.poutine.scale(scale=0.5):
        _normal(z, x)


def _teacher_forced(z: Tensor, x: Tensor) -> None:
    _normal(z + x.roll(1), x)


def _shared_value(z: Tensor, x: Tensor) -> None:
    _normal(z, x)
    _normal(z, x[0], "shared")


def _dtype(z: Tensor, x: Tensor) -> None:
    _normal(z, x.long())


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (_factor, r"site 'extra' is a pyro.factor.*try a model whose prior and likelihood"),
        (
            _computed,
            r"observed site 'x' are not found among the model's arguments.*try passing the data as an argument",
        ),
        (_scaled, r"site 'x' has a scale of its own \(0.5\) from poutine.scale.*try the model without"),
        (_teacher_forced, r"log-probability of site 'x' is another.*try the values that pyro.sample returns"),
        (_shared_value, r"observed site 'shared' has a value of shape \(\) for a distribution of shape \(4,\)"),
        (_dtype, r"site 'x' holds torch.int64 and draws from its Normal distribution do not fit.*try data of dtype"),
        (
            lambda z, x: pyro.sample("x", NoSampler(z, 1.0), obs=x),
            r"site 'x' has the distribution NoSampler.*try a pro",
        ),
        (
            lambda z, x: pyro.sample("x", dist.LogNormal(900 * (1 + z.abs()), 1.0), obs=x),
            r"'x' are not finite; try a prior",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(site: Callable[[Tensor, Tensor], Any], match: str) -> None:
    model = with_site(site)
    with pytest.raises(ValueError, match=match):
        simulate(model, AmortizedGuide(model), (torch.tensor([1.0, 2.0, 3.0, 4.0]),))


def test_calls_and_guides_that_cannot_be_simulated_are_refused() -> None:
    oracle, x = linear()
    for guide in (PerDatapointGuide(oracle.full), _refined(PerDatapointGuide(oracle.full, name="table"), x)):
        with pytest.raises(ValueError, match=r"Guide because its table holds.*try AmortizedGuide"):
            simulate(oracle.full, guide, (x,))
    with pytest.raises(ValueError, match=r"plates \['data'\] draw another subsample.*try pyro.plate"):
        simulate(oracle.random, AmortizedGuide(oracle.random), (x,))
    with pytest.raises(ValueError, match=r"Cannot use num_datapoints=0 .*try num_datapoints=100"):
        simulate(oracle.full, AmortizedGuide(oracle.full), (x,), None, 0)
    guide = AmortizedGuide(oracle.full, encoder_input=lambda _: x)
    with pytest.raises(ValueError, match=r"inputs of the guide's encoder do not change.*try an encoder_input"):
        simulate(oracle.full, guide, (x,))

    def closure() -> None:
        oracle.full(x)

    with pytest.raises(ValueError, match=r"'x' are not found among the model's arguments"):
        simulate(closure, AmortizedGuide(closure))


def _refined(guide: PerDatapointGuide, x: Tensor) -> SemiAmortizedGuide:
    guide.setup(x)
    return guide.refined(2)


def test_dropout_in_the_model_is_refused() -> None:
    dropout = nn.Dropout(0.5)
    model = with_site(lambda z, x: _normal(dropout(z), x))
    with pytest.raises(ValueError, match=r"eval\(\) of modules"):
        simulate(model, AmortizedGuide(model), (torch.ones(4),))


def test_one_observation_of_many_datapoints_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(5))

    with pytest.raises(ValueError, match=r"'x' are not found among the model's arguments"):
        simulate(model, AmortizedGuide(model), (torch.zeros(()),))
