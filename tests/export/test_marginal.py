"""Marginal log-likelihoods: leave-one-out cross-validation against the exact one of a Gaussian hierarchy."""

import math
from collections.abc import Callable
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_amortized import AmortizedGuide, log_evidence, to_arviz

pytestmark = pytest.mark.usefixtures("_float64")
PRIOR, BETWEEN, NOISE = 10.0, 1.0, 0.5


def hierarchy(x: Tensor, between: float = BETWEEN) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, between))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def data(size: int = 25) -> Tensor:
    return 2.0 + math.hypot(BETWEEN, NOISE) * torch.randn(size, generator=torch.Generator().manual_seed(1))


def posterior(x: Tensor, between: float = BETWEEN) -> tuple[float, float]:
    """Mean and standard deviation of mu."""
    variance = between**2 + NOISE**2
    precision = len(x) / variance + 1 / PRIOR**2
    return float(x.sum()) / variance / precision, precision**-0.5


def exact_loo(x: Tensor, between: float = BETWEEN) -> Tensor:
    found = []
    for n in range(len(x)):
        mean, scale = posterior(torch.cat([x[:n], x[n + 1 :]]), between)
        total = (between**2 + NOISE**2 + scale**2) ** 0.5
        found.append(dist.Normal(mean, total).log_prob(x[n]))
    return torch.stack(found)


def make_guide(
    x: Tensor, model: Callable[..., None] = hierarchy, shift: float = 0.5, widen: float = 1.3, between: float = BETWEEN
) -> AmortizedGuide:
    """A guide whose global part is off on purpose, and whose encoder knows nothing."""
    guide = AmortizedGuide(model, name=f"guide_{between}_{shift}")
    guide.setup(x)
    mean, scale = posterior(x, between)
    with torch.no_grad():
        guide.global_guide.locs.mu.fill_(mean + shift * scale)
        guide.global_guide.scales.mu = torch.tensor(widen * scale)
    return guide


def loo(exported: Any) -> tuple[float, Any]:
    """PSIS-LOO in all and by datapoint, as ArviZ 0.x and 1.x name them."""
    found = arviz.loo(exported, pointwise=True)
    old = hasattr(found, "elpd_loo")
    return (found.elpd_loo, found.loo_i) if old else (found.elpd, found.elpd_i)


def test_leave_one_out_is_the_exact_one() -> None:
    x = data()
    exported = to_arviz(hierarchy, make_guide(x), (x,), log_likelihood="marginal")
    group = exported["log_likelihood"]["x"]
    assert group.dims == ("chain", "draw", "data")
    assert group.shape == (1, 200, 25)
    assert float(exported["sample_stats"]["global_khat"]) < 0.7
    (total, by_point), exact = loo(exported), exact_loo(x)
    assert abs(total / 25 - float(exact.mean())) < 0.02
    assert np.abs(by_point.values - exact.numpy()).max() < 0.15
    if hasattr(arviz, "waic"):  # not from ArviZ 1.0 on
        assert abs(arviz.waic(exported).elpd_waic - float(exact.sum())) < 0.5
    mean, scale = posterior(x)
    draws = exported["posterior"]["mu"].values[0]
    assert abs(draws.mean() - mean) < 4 * scale * 1.5 / 200**0.5
    marginal = dist.Normal(torch.from_numpy(draws), math.hypot(BETWEEN, NOISE)).log_prob(x.unsqueeze(-1)).T
    assert np.abs(group.values[0] - marginal.numpy()).max() < 0.03


@pytest.mark.slow
def test_without_drawing_again_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide that is far too narrow and off: the twin, which keeps the guide's own draws, must fail."""
    x = data(12)
    guide = make_guide(x, shift=1.2, widen=1.6)
    exact = float(exact_loo(x).sum())
    right = abs(loo(to_arviz(hierarchy, guide, (x,), log_likelihood="marginal", num_samples=400))[0] - exact)
    keep = lambda weights, rng: torch.arange(len(weights)).unsqueeze(-1)  # noqa: E731
    monkeypatch.setattr("pyro_amortized.export.marginal.systematic", keep)
    wrong = abs(loo(to_arviz(hierarchy, guide, (x,), log_likelihood="marginal", num_samples=400))[0] - exact)
    assert right < 0.24
    assert wrong > 2 * right


@pytest.mark.slow
def test_loaders_give_what_one_call_gives() -> None:
    x = data(12)
    guide = make_guide(x)
    whole = to_arviz(hierarchy, guide, (x,), log_likelihood="marginal", num_samples=60)
    parts = to_arviz(hierarchy, guide, DataLoader(x, batch_size=5), log_likelihood="marginal", num_samples=60)
    for exported in (whole, parts):
        draws = torch.from_numpy(exported["posterior"]["mu"].values[0])
        exact = dist.Normal(draws, math.hypot(BETWEEN, NOISE)).log_prob(x.unsqueeze(-1)).T
        assert np.abs(exported["log_likelihood"]["x"].values[0] - exact.numpy()).max() < 0.03
    khats = [float(exported["sample_stats"]["global_khat"]) for exported in (whole, parts)]
    assert khats[0] == pytest.approx(khats[1], abs=0.05)
    with pytest.raises(ValueError, match="because an iterator ends; try a DataLoader"):
        to_arviz(hierarchy, guide, iter([x]), log_likelihood="marginal")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ's, of pandas
def test_three_models_are_ordered_as_their_exact_values() -> None:
    x = data(25)
    exported, exact = {}, {}
    for between in (1.0, 3.0, 0.2):

        def model(x: Tensor, between: float = between) -> None:
            hierarchy(x, between)

        name = f"between {between}"
        guide = make_guide(x, model, between=between)
        exported[name] = to_arviz(model, guide, (x,), log_likelihood="marginal")
        exact[name] = float(exact_loo(x, between).sum())
    table = arviz.compare(exported)
    assert list(table.index) == sorted(exact, key=lambda name: -exact[name])
    for name, value in exact.items():
        assert abs(table.loc[name, "elpd_loo"] - value) < 0.02 * 25


@pytest.mark.slow
def test_a_poor_guide_is_warned_of() -> None:
    x = data()
    with pytest.warns(UserWarning, match="khat = .*above 0.7.*try more training, global_guide=AutoMultivariateNormal"):
        exported = to_arviz(hierarchy, make_guide(x, shift=0.0, widen=0.2), (x,), log_likelihood="marginal")
    assert float(exported["sample_stats"]["global_khat"]) > 0.7


def test_log_evidence_over_draws_of_global_latents() -> None:
    x = data(10)
    guide = make_guide(x)
    found = log_evidence(hierarchy, guide, (x,), num_global_samples=150)
    mean, scale = posterior(x)
    total = math.sqrt((1.3 * scale) ** 2 + BETWEEN**2 + NOISE**2)
    exact = dist.Normal(mean + 0.5 * scale, total).log_prob(x).numpy()
    scores = (found["log_evidence"].values - exact) / found["log_evidence_se"].values
    assert np.abs(scores).max() < 4
    assert found["log_evidence_of_draw"].dims == ("global_draw", "data")
    assert "averaged over 150 draws" in found.attrs["global_latents"]
    held = log_evidence(hierarchy, guide, (x,))
    scores = (held["log_evidence"].values - exact) / found["log_evidence_se"].values
    assert np.abs(scores).max() > 4  # at the median


def local_only(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_only(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def half(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample=torch.arange(len(x) // 2)) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (local_only, "the model has none: the rest is point estimates.*try log_evidence"),
        (global_only, "because the model has none; try log_likelihood=None"),
        (half, "because 5 of the 10 datapoints are at hand.*try a loader over all data"),
    ],
)
def test_what_is_refused(model: Callable[..., None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        to_arviz(model, AmortizedGuide(model), (data(10),), log_likelihood="marginal", num_samples=20)


def test_datapoints_that_come_twice_are_no_others() -> None:
    """Three times the same ones would make a posterior that is too sure of itself."""
    x = data(12)

    def model(index: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    loader = torch.utils.data.DataLoader(torch.arange(4).repeat(3), batch_size=4)
    with pytest.raises(ValueError, match="because 4 of the 12 datapoints are at hand, and 8 of them again"):
        to_arviz(model, AmortizedGuide(model), loader, log_likelihood="marginal", num_samples=20)


def test_other_kinds_are_refused() -> None:
    guide = AmortizedGuide(local_only)
    with pytest.raises(ValueError, match="'conditional'.*try log_likelihood=\"marginal\", or groups="):
        to_arviz(local_only, guide, (data(10),), log_likelihood="conditional")
    with pytest.raises(ValueError, match="Cannot draw global latents.*try log_evidence"):
        log_evidence(local_only, guide, (data(10),), num_global_samples=10)


def test_a_point_has_no_weights() -> None:
    x = data(6)
    guide = AmortizedGuide(hierarchy, global_guide=AutoDelta)
    guide.setup(x)
    for call in (
        lambda guide: to_arviz(hierarchy, guide, (x,), log_likelihood="marginal", num_samples=5),
        lambda guide: log_evidence(hierarchy, guide, (x,), num_global_samples=5),
    ):
        with pytest.raises(ValueError, match=r"because AutoDelta gives one value of \['mu'\].*global_guide=AutoNormal"):
            call(guide)
