"""Calibration reports: an exact posterior passes at the nominal rate, and every wrong one fails in its direction."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Function, LinearGaussian, counts, topics
from pyro.infer.autoguide import AutoDelta, init_to_value
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    CalibrationReport,
    NaturalGradient,
    PerDatapointGuide,
    SemiAmortizedGuide,
    calibrate,
)
from pyro_amortized.diagnostics.calibration.uniformity import holm, simultaneous_band, uniformity_test

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("_float64")


def orthogonal() -> LinearGaussian:
    return LinearGaussian.random_weights(orthogonal=True)


def scaled(oracle: LinearGaussian, scale: float = 1.0, shift: float = 0.0, dims: Any = slice(None)) -> AmortizedGuide:
    """The exact posterior of the orthogonal model, its scale and location off in some dimensions."""
    pyro.clear_param_store()

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        q = oracle.posterior(x)
        loc, sd = q.mean.clone(), q.stddev.clone()
        loc[:, dims] += shift * sd[:, dims]
        sd[:, dims] *= scale
        return loc, sd

    return AmortizedGuide(oracle.full, Function(encode))


def report(num_simulations: int = 300, seed: int = 0, **options: Any) -> CalibrationReport:
    oracle = orthogonal()
    x = oracle.simulate(50, seed)
    return calibrate(oracle.full, scaled(oracle, **options), (x,), num_simulations=num_simulations, seed=seed)


def false_alarms(num_runs: int, **options: Any) -> int:
    return sum(not report(seed=seed, **options).calibrated for seed in range(num_runs))


def most(num_runs: int, probability: float = 0.05) -> int:
    """What a binomial count exceeds once in a hundred."""
    return int(stats.binom.ppf(0.99, num_runs, probability))


def test_an_exact_posterior_passes() -> None:
    found = report()
    assert found.calibrated
    assert found.failing == ()
    assert found.dataset["quantity"].values.tolist() == ["z[0]", "z[1]", "z[2]", "log_joint", "log_q", "tarp"]
    assert "CALIBRATED: 0 of 6" in str(found)
    for level in (0.5, 0.9):
        share, error = found.coverage(level)
        assert abs(share - level) < 4 * error


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_promised() -> None:
    """Of 40 runs with all 6 quantities, at most 5% but for binomial error (1%)."""
    assert false_alarms(40, num_simulations=100) <= most(40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1.2}, "too wide (overdispersed, hump-shaped ranks), scale about 1.2"),
        ({"scale": 1 / 1.2}, "too narrow (underdispersed, U-shaped ranks), scale about 0.8"),
        ({"shift": 0.4}, "biased high by about 0."),
        ({"shift": -0.4}, "biased low by about 0."),
    ],
)
def test_wrong_posteriors_fail_in_their_direction(options: dict[str, float], words: str) -> None:
    found = report(500, dims=0, **options)
    assert found.failing[0] == "z[0]"
    assert "z[1]" not in found.failing
    finding = found.dataset["finding"].sel(quantity="z[0]").item()
    assert words in finding
    if "shift" in options:
        assert float(finding.partition(" about ")[2].split()[0]) == pytest.approx(0.4, abs=0.1)
    assert words.split()[0] in str(found)
    assert "NOT CALIBRATED" in str(found)
    assert f"{words.split(' (')[0].split(' high')[0].split(' low')[0]}: try" in str(found)


@pytest.mark.parametrize(("scale", "word", "sign"), [(1.3, "under", 1), (1 / 1.3, "over", -1)])
def test_expected_coverage_has_a_direction(scale: float, word: str, sign: int) -> None:
    found = report(500, scale=scale)
    assert f"{word}confident" in found.dataset["finding"].sel(quantity="log_q").item()
    assert ("too wide" if scale > 1 else "too narrow") in found.dataset["finding"].sel(quantity="tarp").item()
    share, error = found.coverage(0.8)
    assert sign * (share - 0.8) > 4 * error
    exact = dist.Chi2(torch.tensor(3.0)).cdf(torch.tensor(stats.chi2.ppf(0.8, 3) * scale**2)).item()
    assert abs(share - exact) < 4.5 * error


def test_missing_correlations_are_seen_by_the_log_joint() -> None:
    """All marginals are right, so that the ranks of the latents are uniform."""
    oracle = LinearGaussian.random_weights()

    def marginals(x: Tensor) -> tuple[Tensor, Tensor]:
        return oracle.posterior(x).mean, oracle.posterior(x).stddev

    guide = AmortizedGuide(oracle.full, Function(marginals))
    found = calibrate(oracle.full, guide, (oracle.simulate(50),), num_simulations=500)
    assert found.failing[0] == "log_joint"
    assert not {"z[0]", "z[1]", "z[2]"} & set(found.failing)
    assert "right one by one and wrong together" in str(found)


def full_rank(oracle: LinearGaussian) -> AmortizedGuide:
    """The exact posterior: its mean is linear in x, its covariance constant."""
    guide = AmortizedGuide(oracle.full, nn.Identity(), family="multivariate_normal")
    guide.setup(oracle.simulate(5))
    zero = oracle.posterior(torch.zeros(1, 4))
    head = guide.inference.head
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:3] = oracle.posterior(torch.eye(4)).mean.T * head.size
        head.bias.copy_(guide.family.laplace(zero.mean, zero.precision_matrix)[0])
    return guide


def test_an_exact_full_rank_posterior_passes() -> None:
    oracle = LinearGaussian.random_weights()
    assert calibrate(oracle.full, full_rank(oracle), (oracle.simulate(30),), num_simulations=500).calibrated


@pytest.mark.slow
def test_masked_latents_count_for_nothing() -> None:
    """Their prior is another one than the standard normal that guides have in its place."""
    present = torch.arange(12) % 2 == 0

    def model(x: Tensor, present: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Normal(5.0, 0.1).mask(present))
            pyro.sample("x", dist.Normal(torch.where(present, u + v - 5.0, u), 0.5), obs=x)

    guide = AmortizedGuide(model, family="multivariate_normal", encoder_input=["x", "present"])
    call = torch.randn(12), present
    guide.setup(*call)
    assert calibrate(model, guide.refined(20), call, num_simulations=480).calibrated
    assert not calibrate(model, guide, call, num_simulations=480).calibrated


@pytest.mark.slow
def test_refined_guides_are_calibrated_as_they_answer() -> None:
    oracle = orthogonal()
    x = oracle.simulate(40)
    untrained = AmortizedGuide(oracle.full, name="untrained")
    assert not calibrate(oracle.full, untrained, (x,), num_simulations=200).calibrated
    refined = untrained.refined(30, NaturalGradient(0.5))
    assert calibrate(oracle.full, refined, (x,), num_simulations=200).calibrated
    own = SemiAmortizedGuide(oracle.full, num_steps=30, update=NaturalGradient(0.5), name="own")
    assert calibrate(oracle.full, own, (x,), num_simulations=200).calibrated


def growth(x: Tensor, dose: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with pyro.plate("patients", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(slope * dose, 1.0))
        pyro.sample("x", dist.Normal(rate.log(), 0.5), obs=x)


def growth_guide(assumed: float) -> AmortizedGuide:
    """Exact for the given slope; the guide's own median of the slope is 2."""

    def encode(x: Tensor, dose: Tensor) -> tuple[Tensor, Tensor]:
        loc = (assumed * dose + x / 0.25) / (1 + 1 / 0.25)
        return loc.unsqueeze(-1), torch.full((len(x), 1), 5.0**-0.5)

    return AmortizedGuide(
        growth,
        Function(encode),
        encoder_input=["x", "dose"],
        global_guide=AutoDelta,
        init_loc_fn=init_to_value(values={"slope": torch.tensor(2.0)}),
        name=f"guide_{assumed}",
    )


def test_covariates_constrained_latents_and_globals_at_their_median() -> None:
    dose = torch.linspace(-1.0, 1.0, 30)
    found = calibrate(growth, growth_guide(2.0), (torch.zeros(30), dose), num_simulations=500)
    assert found.calibrated
    assert found.dataset.attrs["global_latents"] == "held at the guide's median: slope"
    assert "slope" in str(found)
    assert found.dataset.attrs["plate"] == "patients"
    assert not calibrate(growth, growth_guide(4.0), (torch.zeros(30), dose), num_simulations=500).calibrated


def test_models_that_run_only_on_all_their_rows_are_simulated_again_and_again() -> None:
    oracle = orthogonal()

    def stubborn(x: Tensor) -> None:
        with pyro.plate("data", 7):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([7, 3]).to_event(1))
            pyro.sample("x", dist.Normal(z.reshape(7, 3) @ oracle.weights.T, 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(stubborn, Function(lambda x: (oracle.posterior(x).mean, oracle.posterior(x).stddev)))
    found = calibrate(stubborn, guide, (oracle.simulate(7),), num_simulations=60, num_samples=19)
    assert found.calibrated
    assert found.dataset.sizes["simulation"] == 60


def test_simulations_are_spread_over_the_batches_of_a_loader() -> None:
    dose = torch.linspace(-1.0, 1.0, 50)
    loader = DataLoader(TensorDataset(torch.zeros(50), dose), batch_size=20)
    found = calibrate(growth, growth_guide(2.0), loader, num_simulations=200)
    assert found.calibrated
    assert found.dataset.sizes["simulation"] == 200
    two = DataLoader(TensorDataset(torch.zeros(50), dose), batch_size=1)
    assert calibrate(growth, growth_guide(2.0), two, num_simulations=20).dataset.sizes["simulation"] == 20


def test_enumerated_and_simplex_latents() -> None:
    found = calibrate(topics, AmortizedGuide(topics), (counts(20),), num_simulations=50)
    assert found.dataset["quantity"].values.tolist()[:3] == ["size", "share[0]", "share[1]"]

    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 20 * k, 1.0), obs=x)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - 20 * (x > 10)).unsqueeze(-1) / 2, torch.full((len(x), 1), math.sqrt(0.5))

    guide = AmortizedGuide(mixture, Function(encode), name="mixture")
    assert calibrate(mixture, guide, (torch.linspace(-1.0, 21.0, 30),), num_simulations=400).calibrated


def test_ties_are_broken_at_random() -> None:
    """Around 1e20 all draws are the same number."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1e20, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    guide = AmortizedGuide(model, Function(lambda x: (torch.full((len(x), 1), 1e20), torch.ones(len(x), 1))))
    assert calibrate(model, guide, (torch.zeros(10),), num_simulations=200).calibrated


def test_reproducible_and_without_a_trace_in_the_global_seed() -> None:
    state = torch.get_rng_state()
    first, again, other = (report(70, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dataset.identical(again.dataset)
    assert not first.dataset.identical(other.dataset)


def test_netcdf_round_trip(tmp_path: Path) -> None:
    found = report(100, scale=2.0)
    found.to_netcdf(tmp_path / "calibration.nc")
    again = CalibrationReport.from_netcdf(tmp_path / "calibration.nc")
    assert again.dataset.identical(found.dataset)
    assert str(again) == str(found)
    assert again.dataset.attrs["num_samples"] == 199
    lower, _ = simultaneous_band(100, found.dataset["point"].values, 0.05 / 6)
    assert np.array_equal(found.dataset["ecdf_lower"], lower)
    assert set(again.dataset.attrs) >= {"units", "seed", "family_wise_level", "plate", "guide", "family", "latents"}


def test_many_latents_are_abbreviated() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(model, Function(lambda x: (x / 2, torch.full_like(x, math.sqrt(0.5)))))
    found = str(calibrate(model, guide, (torch.zeros(20, 30),), num_simulations=100))
    assert "... and 21 with larger p" in found


def test_plots_return_axes() -> None:
    from matplotlib import pyplot as plt

    found = report(200, scale=1.4)
    for kind, label in (("ecdf", "difference"), ("ranks", "simul"), ("coverage", "coverage"), ("tarp", "coverage")):
        axes = found.plot(kind)
        assert label in axes.get_ylabel()
        assert "95% band" in axes.get_legend().get_texts()[0].get_text()
        axes.figure.draw_without_rendering()  # labels leave the axes most of the figure
        assert axes.get_window_extent().width > 0.8 * axes.figure.bbox.width
        assert axes.title.get_window_extent().width < axes.figure.bbox.width
        colours = {line.get_color() for line in axes.lines} - {"0.5"}
        assert all(colour.startswith("#") for colour in colours), colours  # of the style, outside of it too
        plt.close(axes.figure)
    ax = plt.figure().add_subplot()
    assert found.plot("ecdf", ax, quantity="z[1]") is ax
    assert len(ax.lines) == 1
    assert (
        found.plot("ranks", ax, quantity="log_q")
        .get_title()
        .endswith(found.dataset["finding"].sel(quantity="log_q").item())
    )
    plt.close("all")
    html = found._repr_html_()
    assert html.count("CALIBRATED") == 1
    assert max(map(len, str(found).splitlines())) <= 92
    with pytest.raises(ValueError, match=r"Cannot draw kind='pie'.*try 'ecdf'"):
        found.plot("pie")
    with pytest.raises(ValueError, match=r"Cannot draw quantity 'y'.*try one of \['z\[0\]'"):
        found.plot(quantity="y")


def test_coverage_curves_lie_on_the_right_side() -> None:
    from matplotlib import pyplot as plt

    for scale, sign in ((1.5, 1), (1 / 1.5, -1)):
        content, found = report(300, scale=scale).plot("coverage").lines[-1].get_data()
        middle = (content > 0.3) & (content < 0.7)
        assert (sign * (found - content)[middle] > 0.02).all()
    plt.close("all")


def test_what_cannot_be_calibrated_is_refused() -> None:
    oracle = orthogonal()
    x = oracle.simulate(10)
    guide = AmortizedGuide(oracle.full)
    with pytest.raises(ValueError, match=r"num_simulations=5 because it must be an integer of at least 20; try"):
        calibrate(oracle.full, guide, (x,), num_simulations=5)
    with pytest.raises(ValueError, match=r"num_samples=True because it must be an integer of at least 19; try"):
        calibrate(oracle.full, guide, (x,), num_samples=True)
    with pytest.raises(ValueError, match=r"PerDatapointGuide because its table.*try AmortizedGuide"):
        calibrate(oracle.full, PerDatapointGuide(oracle.full), (x,))
    with pytest.raises(ValueError, match=r"number is unknown; try a DataLoader with a length"):
        calibrate(oracle.full, guide, (batch for batch in [x, x]))

    def no_local(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def extreme(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)

    class Exponential(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.unsqueeze(-1), x.unsqueeze(-1).exp()

    with pytest.raises(ValueError, match=r"no answer to data simulated.*try a prior.*Cannot sample the latents of"):
        calibrate(extreme, AmortizedGuide(extreme, Exponential()), (torch.zeros(10),))
    with pytest.raises(ValueError, match="no local latents"):
        calibrate(no_local, AmortizedGuide(no_local), (torch.randn(5),))


def test_progress_bar_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    oracle = orthogonal()
    calibrate(oracle.full, scaled(oracle), (oracle.simulate(5),), num_simulations=20)
    assert capfd.readouterr().err == ""
    calibrate(oracle.full, scaled(oracle), (oracle.simulate(5),), num_simulations=20, progress=True)
    assert "calibration: 100%" in capfd.readouterr().err


# The tests of uniformity on their own


def test_p_values_are_uniform_where_they_should_be() -> None:
    """Rejection rates of 3000 tests within 4.5 binomial standard errors; the discrete one may be below."""
    values = np.random.default_rng(0).random((150, 3000))
    test = uniformity_test(values, np.arange(1, 50) / 50)
    for p in (test.p_shift, test.p_spread, test.p_ecdf):
        for level in (0.01, 0.05, 0.2):
            error = 4.5 * math.sqrt(level * (1 - level) / 3000)
            assert np.mean(p <= level) < level + error
            assert np.mean(p <= level) > 0.6 * level - error
    assert np.mean(test.p_value <= 0.05) <= 0.05 + 0.018


def test_the_band_holds_at_all_points_at_once() -> None:
    points, count = np.arange(1, 100) / 100, 80
    lower, upper = simultaneous_band(count, points, 0.1)
    values = np.random.default_rng(1).random((4000, count))
    found = (values[:, :, None] < points).mean(1)
    leaves = ((found < lower) | (found > upper)).any(1).mean()
    assert 0.06 < leaves < 0.1 + 4.5 * math.sqrt(0.09 / 4000)
    pointwise = stats.binom.ppf([0.05, 0.95], count, points[49]) / count
    assert lower[49] < pointwise[0]
    assert upper[49] > pointwise[1]


def test_shapes_without_shift_or_spread_are_seen_by_the_distribution_function() -> None:
    """Two modes of mean 0 and variance 1 in normal scores."""
    rng = np.random.default_rng(2)
    scores = np.where(rng.random(500) < 0.5, -1, 1) * 0.9 + math.sqrt(1 - 0.81) * rng.standard_normal(500)
    test = uniformity_test(stats.norm.cdf(scores)[:, None], np.arange(1, 100) / 100)
    assert min(test.p_shift[0], test.p_spread[0]) > 0.01
    assert test.p_ecdf[0] < 1e-4


def test_holm_keeps_order_and_bounds() -> None:
    adjusted = holm(np.array([0.04, 0.001, 0.03, 0.9]))
    assert np.allclose(adjusted, [0.09, 0.004, 0.09, 0.9])


@pytest.mark.slow
@pytest.mark.parametrize("dims", [slice(None), 0], ids=["all", "one"])
@pytest.mark.parametrize("scale", [1.2, 1 / 1.2])
def test_a_scale_error_of_a_fifth_is_detected(scale: float, dims: Any) -> None:
    """Always in all dimensions; in one of three, in all of 15 runs but one."""
    detected = false_alarms(15, num_simulations=500, scale=scale, dims=dims)
    assert detected == 15 or (dims == 0 and detected == 14)
