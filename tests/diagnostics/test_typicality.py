"""Typicality: exact error rates whatever the model, detection of what is known to be odd, words and warnings."""

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_amortized import AmortizedGuide, AtypicalDataWarning, SetEncoder, TypicalityReport, typicality
from pyro_amortized.diagnostics.conformal import (
    conformal_p_values,
    conformal_quantile,
    count_p_value,
    discoveries,
    extrapolated_p_values,
    shift_p_value,
    split,
)
from pyro_amortized.diagnostics.typicality.scores import Distance, Oddness


class ExactEncoder(nn.Module):
    """Of a linear-Gaussian model: the posterior's mean and marginal scales."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.posterior(x)
        return posterior.mean, posterior.variance.sqrt().expand_as(posterior.mean)


def linear() -> tuple[LinearGaussian, AmortizedGuide]:
    model = LinearGaussian.random_weights(6, 2)
    return model, AmortizedGuide(model.full, ExactEncoder(model))


def auroc(odd: TypicalityReport, usual: TypicalityReport) -> float:
    first, second = (-report.dataset["p_value"].values for report in (odd, usual))
    return float(mannwhitneyu(first, second).statistic / len(first) / len(second))


@pytest.mark.parametrize("name", ["features", "elbo", "both"])
def test_a_share_of_false_alarms_as_asked_for(name: str) -> None:
    """Of 40 dimensions known from 80 datapoints; calibrated on the data that tell what is usual, far too many."""
    alarms: dict[str, list[float]] = {"right": [], "wrong": []}
    for seed in range(200):
        numbers = torch.Generator().manual_seed(seed)
        features, elbo = (torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in ((80, 40), (80,)))
        new, new_elbo = (torch.randn(shape, generator=numbers, dtype=torch.float64) for shape in ((50, 40), (50,)))
        first, second, rest = split(80, numbers, 1 / 3, 1 / 6)
        oddness = Oddness.of(features, elbo, first, second)
        scores = oddness(new, new_elbo)[name]
        for kind, rows in (("right", rest), ("wrong", first)):
            p_values = conformal_p_values(scores, oddness(features[rows], elbo[rows])[name])
            alarms[kind].append(float((p_values <= 0.1).double().mean()))
    mean, error = np.mean(alarms["right"]), np.std(alarms["right"]) / 200**0.5
    exact = 4 / 41  # of 40 calibration points
    assert abs(mean - exact) < 4 * error
    assert name == "elbo" or np.mean(alarms["wrong"]) - exact > 4 * np.std(alarms["wrong"]) / 200**0.5


def test_discoveries_are_few_false_ones() -> None:
    numbers, shares = torch.Generator().manual_seed(0), []
    for _ in range(300):
        calibration = torch.randn(200, generator=numbers)
        scores = torch.cat([torch.randn(40, generator=numbers), 4 + torch.randn(10, generator=numbers)])
        found = discoveries(conformal_p_values(scores, calibration), 0.1)
        shares.append(float(found[:40].sum() / found.sum().clamp(min=1)))
    assert np.mean(shares) < 0.1 + 3 * np.std(shares) / 300**0.5
    assert not discoveries(torch.tensor([0.5, 0.9]), 0.1).any()


def test_one_far_out_among_many_is_found() -> None:
    """Where chance would not bring it, as far as the tail of the reference data tells."""
    numbers = torch.Generator().manual_seed(0)
    for size, place in ((1000, 12.0), (100, 500.0)):
        calibration, scores = torch.randn(size, generator=numbers), torch.randn(500, generator=numbers)
        scores[7] = place
        assert not discoveries(conformal_p_values(scores, calibration), 0.05).any()
        assert discoveries(extrapolated_p_values(scores, calibration), 0.05).nonzero().tolist() == [[7]]
    for spread, rate in ((0.0, 0.05), (1.0, 0.05)):  # tails that are exponential, and heavier
        false = []
        for _ in range(300):
            calibration, scores = (
                torch.exp(spread * torch.randn(n, generator=numbers)) * -torch.rand(n, generator=numbers).log()
                for n in (200, 400)
            )
            false.append(bool(discoveries(extrapolated_p_values(scores, calibration), 0.05).any()))
        assert np.mean(false) < rate + 3 * (rate / 300) ** 0.5
    same = torch.ones(60)
    assert extrapolated_p_values(torch.tensor([1.0, 2.0, math.inf]), same).tolist() == [1.0, 0.0, 0.0]


def test_the_count_of_small_p_values_has_its_exact_law() -> None:
    numbers, level = torch.Generator().manual_seed(0), 0.05
    counts, p_values = [], []
    for _ in range(3000):
        scores, calibration = torch.randn(40, generator=numbers), torch.randn(100, generator=numbers)
        counts.append(int((conformal_p_values(scores, calibration) <= level).sum()))
        p_values.append(count_p_value(counts[-1], 40, 100, level))
    for count in (1, 3, 6):
        share, exact = np.mean(np.array(counts) >= count), count_p_value(count, 40, 100, level)
        assert abs(share - exact) < 4 * (exact * (1 - exact) / 3000) ** 0.5
    independent = 1 - sum(math.comb(40, k) * level**k * (1 - level) ** (40 - k) for k in range(6))
    assert count_p_value(6, 40, 100, level) > 1.5 * independent  # p-values that share a calibration go together
    assert count_p_value(10, 40, 100, level) < 0.003
    assert count_p_value(0, 40, 10, level) == 1.0


def test_conformal_quantiles_cover() -> None:
    scores = torch.arange(1.0, 20.0)
    assert conformal_quantile(scores, 0.9) == 18.0  # rank 18 of 20
    assert conformal_quantile(scores[:5], 0.9) == float("inf")
    assert conformal_p_values(torch.tensor([19.0, 0.0, float("nan")]), scores).tolist() == [0.1, 1.0, 0.05]


def test_distances_are_those_of_mahalanobis_with_many_data_and_shrunk_with_few() -> None:
    numbers = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=numbers, dtype=torch.float64)
    features = torch.randn(20000, 5, generator=numbers, dtype=torch.float64) @ root
    white = features[:50] @ torch.linalg.inv(root)
    assert torch.allclose(Distance.of(features)(features[:50]), white.norm(dim=-1), rtol=0.05)
    few = Distance.of(features[:4])
    assert few(features[:50]).isfinite().all()
    dead = torch.cat([features, torch.zeros(20000, 1, dtype=torch.float64)], -1)  # a unit that is silent
    alive = dead[:1] + torch.tensor([0.0, 0, 0, 0, 0, 3.0], dtype=torch.float64)
    assert Distance.of(dead)(alive) > 3 * Distance.of(dead)(dead[:100]).max()


def test_shifted_data_are_found_and_usual_ones_are_not() -> None:
    model, guide = linear()
    reference, x = model.simulate(300, seed=1), model.simulate(200, seed=2)
    usual = typicality(model.full, guide, (x,), reference_args=(reference,))
    assert usual.typical
    assert "look like the reference data" in str(usual)
    with pytest.warns(AtypicalDataWarning, match="as a whole are unlike"):
        shifted = typicality(model.full, guide, (x + 6.0,), reference_args=(reference,))
    assert auroc(shifted, usual) > 0.95
    assert shifted.dataset["atypical"].all()
    with pytest.warns(AtypicalDataWarning, match="as a whole are unlike"):  # though few are far out by themselves
        typicality(model.full, guide, (x + 2.5,), reference_args=(reference,))
    with pytest.warns(AtypicalDataWarning, match=r"1 datapoints are unlike.*first: \[3\].*try guide.refined\(20\)"):
        mixed = typicality(model.full, guide, (torch.cat([x[:3], x[3:4] + 9.0, x[4:10]]),), reference_args=(reference,))
    assert mixed.dataset["found"].values.tolist() == [False] * 3 + [True] + [False] * 6


def test_data_that_are_too_likely_are_odd_too() -> None:
    model, guide = linear()
    reference = model.simulate(400, seed=1)
    with pytest.warns(AtypicalDataWarning):
        report = typicality(model.full, guide, (torch.zeros(50, 6),), reference_args=(reference,))
    assert report.dataset["elbo"].min() > report.dataset["reference_elbo"].quantile(0.9)
    assert report.dataset["p_elbo"].max() < 0.1


@pytest.mark.slow
def test_a_single_datapoint_and_errors_in_place_of_warnings() -> None:
    model, guide = linear()
    reference = model.simulate(300, seed=1)
    one = typicality(model.full, guide, (reference[:1],), reference_args=(reference[1:],))
    assert one.batch_p_value == float(one.dataset["p_value"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", AtypicalDataWarning)
        with pytest.raises(AtypicalDataWarning):
            typicality(model.full, guide, (reference[:1] + 20.0,), reference_args=(reference,))


@pytest.mark.slow
def test_loaders_files_and_pictures(tmp_path: Any) -> None:
    model, guide = linear()
    reference, x = model.simulate(120, seed=1), model.simulate(30, seed=2)
    whole = typicality(model.full, guide, (x,), reference_args=DataLoader(reference, batch_size=50))
    loaded = typicality(model.full, guide, DataLoader(x, batch_size=11), reference_args=DataLoader(reference, 50))
    assert np.allclose(whole.dataset["distance"], loaded.dataset["distance"])
    assert loaded.dataset.sizes["data"] == 30
    whole.to_netcdf(tmp_path / "report.nc")
    again = TypicalityReport.from_netcdf(tmp_path / "report.nc")
    assert str(again) == str(whole)
    assert "p =" in whole.plot().get_title()


def test_what_is_refused() -> None:
    model, guide = linear()
    x = model.simulate(100)
    with pytest.raises(ValueError, match="Cannot compare with 30 reference datapoints.*try reference_args with 40"):
        typicality(model.full, guide, (x,), reference_args=(x[:30],))
    with pytest.raises(ValueError, match="with 100 reference.*level=0.001.*try reference_args with 2000 or more"):
        typicality(model.full, guide, (x,), reference_args=(x,), level=0.001)
    with pytest.raises(ValueError, match="Cannot use level"):
        typicality(model.full, guide, (x,), reference_args=(x,), level=1.5)


@pytest.mark.usefixtures("_float64")
def test_reference_data_that_are_all_the_same() -> None:
    model, guide = linear()
    x = model.simulate(100)
    with pytest.warns(AtypicalDataWarning):
        report = typicality(model.full, guide, (x[:20],), reference_args=(x[:1].expand(100, -1).clone(),))
    assert not report.typical


def test_any_number_of_entries_in_each_datapoint() -> None:
    """Of a hierarchy with an encoder for groups of any size: many more entries than in training are odd."""

    def schools(x: Tensor) -> None:
        data = pyro.plate("schools", len(x), dim=-2)
        with data:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with data, pyro.plate("pupils", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def simulate(count: int, pupils: int) -> Tensor:
        return torch.randn(count, 1) + torch.randn(count, pupils)

    guide = AmortizedGuide(schools, SetEncoder(1))
    guide.setup(simulate(100, 8))
    assert guide.encoder_features(simulate(3, 8)).shape[0] == 3
    with pytest.warns(AtypicalDataWarning):
        report = typicality(schools, guide, (simulate(20, 60),), reference_args=(simulate(100, 8),))
    assert report.batch_p_value < 1e-4


@pytest.mark.slow
def test_digits_and_counts() -> None:
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images > 8, dtype=torch.float)
    order = torch.randperm(len(images))
    train, reference, new = images[order].split([1300, 250, 247])
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def digits(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    weights = 0.7 * torch.randn(3, 10)

    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((z @ weights + 1.0).exp()).to_event(1), obs=x)

    def simulate(size: int, shift: float = 0.0) -> Tensor:
        return torch.poisson((torch.randn(size, 3) @ weights + 1.0 + shift).exp())

    def flat(x: Tensor) -> Tensor:
        return x.flatten(1)

    cases = [
        (digits, flat(train), flat(reference), flat(new), [flat(new.rot90(1, (1, 2))), flat(1 - new)]),
        (counts, simulate(1000), simulate(400), simulate(400), [simulate(300, 1.0), simulate(300) + 5]),
    ]
    for model, x, known, usual, odd in cases:
        guide = AmortizedGuide(model, name=model.__name__)
        guide.setup(x)
        svi = SVI(model, guide, ClippedAdam({"lr": 3e-3}), Trace_ELBO())
        for _ in range(1500):
            svi.step(x[torch.randint(len(x), (100,))])
        first = typicality(model, guide, (usual,), reference_args=(known,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AtypicalDataWarning)  # in one call of fifty
            reports = [typicality(model, guide, (usual,), reference_args=(known,), seed=seed) for seed in range(8)]
        rates = [float(report.dataset["atypical"].mean()) for report in reports]
        assert 0.02 < np.mean(rates) < 0.09
        for other in odd:
            with pytest.warns(AtypicalDataWarning):
                report = typicality(model, guide, (other,), reference_args=(known,))
            assert auroc(report, first) > 0.95


@pytest.mark.slow
def test_a_shift_to_one_side_is_found_and_chance_is_not() -> None:
    rng = torch.Generator().manual_seed(0)
    by_chance = torch.tensor(
        [
            shift_p_value(torch.randn(15, 2, generator=rng), torch.randn(20, 2, generator=rng), rng, 99)
            for _ in range(300)
        ]
    )
    assert abs((by_chance <= 0.1).double().mean() - 0.1) < 4 * (0.1 * 0.9 / 300) ** 0.5
    shifted = torch.randn(100, 3, generator=rng) + torch.tensor([0.6, 0.0, 0.0])
    assert shift_p_value(shifted, torch.randn(100, 3, generator=rng), rng) <= 0.005
    assert shift_p_value(torch.ones(5, 1), torch.ones(9, 1), rng) == 1.0
