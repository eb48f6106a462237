"""Several guides, or several data sets, side by side."""

import numpy as np
import pytest
import torch
from models import LinearGaussian
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, GapComparison, PerDatapointGuide, compare_gaps, estimate_gaps


@pytest.fixture
def linear(_float64: None) -> LinearGaussian:
    return LinearGaussian.random_weights(orthogonal=True)


class Encoder(nn.Module):
    """The exact posterior, its mean off by ``shift``."""

    def __init__(self, model: LinearGaussian, shift: float) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.posterior(x)
        return posterior.mean + self.shift, posterior.variance.sqrt().expand(len(x), -1)


def exact_guide(model: LinearGaussian, x: Tensor, name: str, shift: float = 0.0) -> AmortizedGuide:
    guide = AmortizedGuide(model.full, Encoder(model, shift), name=name)
    guide.setup(x)
    return guide


def guides(model: LinearGaussian, x: Tensor) -> dict[str, AmortizedGuide]:
    return {"exact": exact_guide(model, x, "a"), "shifted": exact_guide(model, x, "b", shift=0.1)}


@pytest.mark.slow
def test_paired_differences_are_those_of_the_datapoints(linear: LinearGaussian) -> None:
    x = linear.simulate(12)
    both = guides(linear, x)
    result = compare_gaps(linear.full, both, (x,))
    singles = [estimate_gaps(linear.full, guide, (x,)).dataset for guide in both.values()]
    difference = singles[1]["elbo"].values - singles[0]["elbo"].values
    data = result.dataset
    assert data["elbo"].values == pytest.approx([single["elbo"].values.mean() for single in singles], abs=1e-9)
    assert data["elbo_difference"].values == pytest.approx([0.0, difference.mean()], abs=1e-9)
    assert data["elbo_difference_se"].values[1] == pytest.approx(difference.std(ddof=1) / 12**0.5, rel=1e-6)
    assert data["elbo_difference_se"].values[0] == 0.0


class Varying(Encoder):
    """Far off, by as much as the datapoint says."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = super().forward(x)
        return loc + x.square().sum(-1, keepdim=True), scale


@pytest.mark.slow
def test_the_verdict_does_not_depend_on_the_order_of_the_guides(linear: LinearGaussian) -> None:
    """Nor on how much a third guide, with which all others are compared, varies."""
    x = linear.simulate(30)
    far = AmortizedGuide(linear.full, Varying(linear, 0.0), name="c")
    far.setup(x)
    found = compare_gaps(linear.full, {"far": far, **guides(linear, x)}, (x,))
    last = found.dataset.isel(case=2)
    assert last["elbo_difference_se"] > abs(last["elbo_lead"]) > 10 * last["elbo_lead_se"]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        cases = [[*found.estimates][k] for k in order]
        verdict = GapComparison.of({case: found.estimates[case] for case in cases}).verdict
        assert "The best ELBO is that of 'exact'" in verdict


@pytest.mark.slow
def test_pairing_shows_what_lies_within_the_spread_of_datapoints(linear: LinearGaussian) -> None:
    x = linear.simulate(40)
    result = compare_gaps(linear.full, guides(linear, x), (x,))
    last = result.dataset.isel(case=1)
    assert abs(last["elbo_difference"]) < 2 * last["elbo_se"]  # unpaired, nothing would be seen
    assert last["elbo_difference"] < -10 * last["elbo_difference_se"]
    assert "The best ELBO is that of 'exact'" in result.verdict
    assert result.dataset["log_evidence_difference"].values[1] == 0.0  # one evidence for both


def test_guides_that_do_not_differ_are_not_told_apart(linear: LinearGaussian) -> None:
    x = linear.simulate(10)
    same = [exact_guide(linear, x, "a"), exact_guide(linear, x, "b")]
    result = compare_gaps(linear.full, same, (x,))
    assert result.dataset["guide"].values.tolist() == ["AmortizedGuide 1", "AmortizedGuide 2"]
    assert "No guide stands out" in result.verdict


@pytest.mark.slow
def test_held_out_data_of_another_size(linear: LinearGaussian) -> None:
    x, y = linear.simulate(30), linear.simulate(45, seed=8)
    guide = exact_guide(linear, x, "a")
    result = compare_gaps(linear.full, guide, {"training": (x,), "held-out": (y,)})
    assert result.dataset["num_datapoints"].values.tolist() == [30, 45]
    assert result.dataset["reference"].values[1] == "AmortizedGuide on training"
    assert "is not shown" in result.verdict
    assert "training" in str(result)
    assert "held-out" in str(result)


def test_the_best_guide_is_found_by_pairs_on_every_data_set(linear: LinearGaussian) -> None:
    x, y = linear.simulate(30), linear.simulate(30, seed=8)
    result = compare_gaps(linear.full, guides(linear, x), {"training": (x,), "held-out": (y,)})
    for name in ("training", "held-out"):
        assert f"The best ELBO on {name} data is that of 'exact'" in result.verdict


def test_an_encoder_that_fails_on_new_data_is_found_out(linear: LinearGaussian) -> None:
    x = linear.simulate(30)
    guide = exact_guide(linear, x, "a")
    result = compare_gaps(linear.full, guide, {"training": (x,), "shifted": (x + 3.0,)})
    assert result.dataset["amortization_gap"].values == pytest.approx(0.0, abs=1e-9)  # exact everywhere
    wrong = AmortizedGuide(linear.full, name="wrong")
    wrong.setup(x)
    result = compare_gaps(linear.full, wrong, {"training": (x,), "far": (10 * x,)})
    assert "larger on far than on training data" in result.verdict


@pytest.mark.slow
def test_batches_of_a_loader_and_saving(linear: LinearGaussian, tmp_path) -> None:
    x = linear.simulate(10)
    both = guides(linear, x)
    whole = compare_gaps(linear.full, both, (x,)).dataset
    result = compare_gaps(linear.full, both, DataLoader(TensorDataset(x), batch_size=4))
    assert np.abs(result.dataset["elbo"] - whole["elbo"]).max() < 0.01
    result.to_netcdf(tmp_path / "comparison.nc")
    again = GapComparison.from_netcdf(tmp_path / "comparison.nc")
    assert str(again).splitlines()[:6] == str(result).splitlines()[:6]
    assert again.plot() is not None


def test_refusals(linear: LinearGaussian) -> None:
    x = linear.simulate(5)
    with pytest.raises(ValueError, match="there is no guide or no data set; try at least one"):
        compare_gaps(linear.full, {}, (x,))
    guide = PerDatapointGuide(linear.full)
    guide.setup(x)
    with pytest.raises(ValueError, match="it knows nothing of unseen data; try AmortizedGuide"):
        compare_gaps(linear.full, guide, {"training": (x,), "held-out": (linear.simulate(7),)})


@pytest.mark.slow
def test_an_encoder_without_parameters_is_refined(linear: LinearGaussian) -> None:
    x = linear.simulate(6)
    guide = exact_guide(linear, x, "shifted", shift=0.3)
    result = compare_gaps(linear.full, {"shifted": guide, "refined": guide.refined(20)}, (x,))
    assert result.dataset["amortization_gap"].values[1] < 0.05 * result.dataset["amortization_gap"].values[0]


def test_inference_mode_is_refused(linear: LinearGaussian) -> None:
    x = linear.simulate(3)
    guide = exact_guide(linear, x, "a")
    with torch.inference_mode(), pytest.raises(ValueError, match="because the log-joint's gradients are needed"):
        estimate_gaps(linear.full, guide, (x,))
