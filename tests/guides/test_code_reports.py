"""Reports of the collapse of codes, against their definitions."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from quantized_models import CODES, POSITIONS, data, setup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, CollapseReport, collapse_report
from pyro_amortized.diagnostics.collapse.codes import codes_dataset, find_codes

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("_float64")


def test_report_against_the_definition(tmp_path: Path) -> None:
    x, prior = data(40), torch.randn(CODES)
    model, _, guide = setup(x, prior=prior)
    guide.eval()
    codes = guide.codes(x)
    report = collapse_report(model, guide, (x,))
    usage = torch.nn.functional.one_hot(codes, CODES).double().mean(0)
    np.testing.assert_allclose(report.dataset["kl"], -prior.log_softmax(0)[codes].mean(0))
    np.testing.assert_allclose(report.dataset["perplexity"], torch.exp(-torch.xlogy(usage, usage).sum(-1)))
    np.testing.assert_allclose(report.dataset["usage"], usage)
    whole = usage.mean(0)
    assert report.perplexity == pytest.approx(float(torch.exp(-torch.xlogy(whole, whole).sum())))
    assert 1 < report.perplexity <= CODES
    rows = [tuple(row) for row in codes.tolist()]
    entropy = -sum(rows.count(row) / 40 * math.log(rows.count(row) / 40) for row in set(rows))
    assert report.mutual_information == pytest.approx(entropy)
    assert report.dataset.attrs["aggregate_kl"] == pytest.approx(report.dataset.attrs["total_kl"] - entropy)
    assert report.active_units == POSITIONS
    assert list(report.dataset["latent"].values) == ["code[0]", "code[1]", "code[2]"]
    assert "No collapse: all 3 positions are active" in str(report)
    assert "perplexity" in str(report)
    loader = DataLoader(TensorDataset(x), batch_size=16)
    batches = collapse_report(model, guide, loader)
    assert batches.dataset.equals(report.dataset)
    report.to_netcdf(tmp_path / "report.nc")
    assert str(CollapseReport.from_netcdf(tmp_path / "report.nc")) == str(report)
    ax = report.plot()
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], np.log(report.dataset["perplexity"]))
    report.plot_curve(label="codes")


class _LargestTensor(TorchDispatchMode):
    """Knows how many numbers the largest tensor made has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_report_of_a_large_codebook_takes_little_memory() -> None:
    model, _, guide = setup(data(40))
    found = find_codes(model, guide.eval(), (data(40),), None, None, False)
    found.num_codes, (count, positions) = 1000, found.codes.shape
    found.codes = torch.randint(0, 1000, (count, positions))
    settings = {"threshold": 0.01, "epsilon": 0.01, "delta": 0.01}
    with _LargestTensor() as largest:
        dataset = codes_dataset(found, settings)
    assert largest.size <= positions * 1000
    indicator = torch.nn.functional.one_hot(found.codes, 1000).double()
    np.testing.assert_allclose(dataset["posterior_mean_variance"], indicator.var(0).sum(-1))
    np.testing.assert_allclose(dataset["usage"], indicator.mean(0))


def test_report_with_positions_in_a_plate() -> None:
    x = data(40)
    pyro.set_rng_seed(1)
    event, _, first = setup(x)
    report = collapse_report(event, first.eval(), (x,))
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    plate, _, second = setup(x, to_event=False)
    assert collapse_report(plate, second.eval(), (x,)).dataset.equals(report.dataset)


def test_codes_that_tell_nothing_have_collapsed() -> None:
    x = data(40)
    model, encoder, guide = setup(x)
    guide.eval()
    with torch.no_grad():
        encoder.linear.weight.zero_()
    report = collapse_report(model, guide, (x,))
    assert report.active_units == 0
    assert report.mutual_information == 0
    np.testing.assert_allclose(report.dataset["perplexity"], 1.0)
    np.testing.assert_allclose(report.dataset["kl"], math.log(CODES))  # which is no sign of use
    assert "Collapsed: every datapoint has the same codes" in report.verdict
    with torch.no_grad():
        encoder.linear.weight[0] = 5.0
    verdict = collapse_report(model, guide, (x,)).verdict
    assert "2 of 3 positions have the same code everywhere: code[1], code[2]" in verdict


def test_continuous_latents_have_no_perplexity() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    report = collapse_report(model, AmortizedGuide(model), (torch.randn(5),), num_samples=2)
    with pytest.raises(ValueError, match="Cannot give the perplexity of the codebook because the latents are no codes"):
        _ = report.perplexity
