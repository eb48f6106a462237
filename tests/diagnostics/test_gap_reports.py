"""Reports of gaps: tables, plots, files, verdicts, and what they flag."""

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from factor_models import Factors, Oracle
from models import Function
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_amortized import AmortizedGuide, GapEstimate, estimate_gaps
from pyro_amortized.diagnostics.gaps.gaps import warn_of_violations
from pyro_amortized.diagnostics.report import Report

pytestmark = pytest.mark.usefixtures("_float64")


@pytest.mark.slow
def test_a_doubtful_estimate_is_flagged() -> None:
    """Far more draws would be needed for the tolerance than are allowed."""
    factors = Factors()
    guide = AmortizedGuide(factors.model)
    gaps = estimate_gaps(factors.model, guide, (factors.x,), tolerance=1e-4, max_samples=2000)
    assert not gaps.dataset["reliable"].any()
    assert "unreliable: 12 of 12" in str(gaps)


@pytest.fixture
def gaps() -> GapEstimate:
    factors = Factors()
    return estimate_gaps(factors.model, AmortizedGuide(factors.model), (factors.x,))


def test_table_says_what_it_holds(gaps: GapEstimate) -> None:
    table = str(gaps)
    for text in ("12 datapoints", "'data'", "nats", "approximation gap", "amortization gap", "unreliable: 0 of 12"):
        assert text in table
    assert f"{gaps.dataset['inference_gap'].values.mean():.3f}" in table


def test_netcdf_round_trip(gaps: GapEstimate, tmp_path: Path) -> None:
    gaps.to_netcdf(tmp_path / "gaps.nc")
    again = GapEstimate.from_netcdf(tmp_path / "gaps.nc")
    assert again.dataset.identical(gaps.dataset)
    assert again.dataset.attrs["units"] == "nats per datapoint"


def test_plot_returns_axes(gaps: GapEstimate) -> None:
    import matplotlib

    matplotlib.use("Agg")
    axes = gaps.plot()
    assert "nats" in axes.get_ylabel()
    assert len(axes.patches) == 24
    import matplotlib.pyplot as plt

    plt.close(axes.figure)


@pytest.mark.slow
def test_plot_leaves_out_what_is_far_above(gaps: GapEstimate) -> None:
    import matplotlib.pyplot as plt

    before = gaps.plot().get_ylim()[1]
    data = gaps.dataset.copy(deep=True)
    for name in ("amortization_gap", "inference_gap"):
        data[name].values[3] = 4321.0
    data["reliable"].values[:2] = False
    axes = GapEstimate(data).plot()
    assert axes.get_ylim()[1] < 5 * before
    assert [text.get_text() for text in axes.texts] == ["largest: 4.32e+03"]
    assert "unreliable (2)" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert "datapoints of plate 'data'" in axes.get_title()
    assert "gap" in axes.get_title().splitlines()[1]
    for name in ("amortization_gap", "inference_gap"):
        data[name].values[:] = np.inf
    GapEstimate(data).plot()
    plt.close("all")


def test_the_verdict_says_what_was_held(gaps: GapEstimate) -> None:
    assert "Global latents" not in gaps.verdict
    held = GapEstimate(gaps.dataset.assign_attrs(global_latents="held at the guide's median: pop"))
    assert (
        held.verdict == f"{gaps.verdict} Global latents are held at the guide's median: pop; how far off these are "
        "is not part of it."
    )


def test_reports_show_themselves(gaps: GapEstimate) -> None:
    assert repr(gaps) == str(gaps)
    assert repr(Report(gaps.dataset)).startswith("Report\n<xarray.Dataset>")
    html = gaps._repr_html_()
    assert html.count(" ".join(gaps.verdict.split()).replace('"', "&quot;")) == 1
    assert "log evidence  log p(x)" in html
    assert "<script" not in html


@pytest.mark.slow
def test_batches_concatenate_to_the_whole() -> None:
    oracle = Oracle(hard=False, points=10)
    guide = AmortizedGuide(oracle.model, oracle.encoder())
    joined = GapEstimate.concat([estimate_gaps(oracle.model, guide, (part,)) for part in oracle.x.split(4)])
    assert joined.dataset.sizes == {"data": 10}
    assert joined.dataset["data"].values.tolist() == list(range(10))
    assert np.abs(joined.dataset["approximation_gap"] - oracle.gap).max() < 0.02
    with pytest.raises(ValueError, match="there are none"):
        GapEstimate.concat([])


@pytest.mark.slow
def test_progress_bars_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    factors = Factors()
    guide = AmortizedGuide(factors.model)
    estimate_gaps(factors.model, guide, (factors.x,), tolerance=0.5)
    assert capfd.readouterr().err == ""
    estimate_gaps(factors.model, guide, (factors.x,), tolerance=0.5, progress=True)
    shown = capfd.readouterr().err
    assert "log evidence: 100%" in shown
    assert "ELBO of q and q*: 100%" in shown


def made_up(count: int = 100, **means: float) -> GapEstimate:
    """An estimate with given gaps."""
    import xarray

    rng = np.random.default_rng(0)
    data = {"khat": np.zeros(count), "reliable": np.ones(count, dtype=bool)}
    for name in ("log_evidence", "elbo_optimal", "elbo", "approximation_gap", "amortization_gap", "inference_gap"):
        data[name] = means.get(name, 0.0) + 0.1 * means.get(name, 0.0) * rng.standard_normal(count)
        data[f"{name}_se"] = np.full(count, 0.001)
    data["inference_gap"] = data["approximation_gap"] + data["amortization_gap"]
    return GapEstimate(
        xarray.Dataset({name: ("data", values) for name, values in data.items()}, {"data": range(count)})
    )


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        (made_up(amortization_gap=1.0, approximation_gap=0.1), "The amortization gap dominates ("),
        (made_up(amortization_gap=0.1, approximation_gap=1.0), "The approximation gap dominates (0.996 of 1.1 nats)"),
        (made_up(amortization_gap=1.0, approximation_gap=0.9), "Both gaps matter"),
        (made_up(amortization_gap=0.01, approximation_gap=0.01), "Inference is close to exact"),
    ],
)
def test_verdict_names_the_gap_to_work_on(gaps: GapEstimate, words: str) -> None:
    assert words in gaps.verdict
    assert "can be trusted as far as checked: no datapoint is flagged" in gaps.verdict
    assert gaps.verdict[:40] in str(gaps)


def test_verdict_says_whether_to_trust_it() -> None:
    gaps = made_up(amortization_gap=1.0)
    gaps.dataset["reliable"][:30] = False
    gaps.dataset["khat"][:20] = 0.9
    assert "cannot be trusted: 30 of 100 datapoints are flagged, 20 for heavy-tailed weights" in gaps.verdict
    gaps.dataset["reliable"][5:] = True
    assert "as far as checked: 5 of 100" in gaps.verdict


def test_the_worst_datapoints_are_named() -> None:
    gaps = made_up(amortization_gap=0.1)
    gaps.dataset["inference_gap"][[7, 3]] = torch.tensor([500.0, 90.0])
    assert gaps.worst(2)["data"].values.tolist() == [7, 3]
    assert gaps.worst(1, by="khat").sizes["data"] == 1
    assert "5 of 100 datapoints hold" in gaps.verdict
    assert "(7, 3, " in gaps.verdict
    with pytest.raises(ValueError, match="Cannot sort datapoints by 'gap' because there is no such variable"):
        gaps.worst(by="gap")


def test_broken_bounds_raise_a_warning() -> None:
    gaps = made_up(approximation_gap=0.0)
    warn_of_violations(gaps)
    gaps.dataset["approximation_gap"][:15] = -0.01
    assert int(gaps.violations.sum()) == 15
    with pytest.warns(UserWarning, match=r"fails by more than two standard errors at 15 of 100 datapoints"):
        warn_of_violations(gaps)


@pytest.mark.slow
def test_guides_with_draws_of_no_density_have_no_finite_elbo() -> None:
    """A normal posterior of a scale that must be positive: the log-joint at negative draws is not a number."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, z.sqrt(), validate_args=False), obs=x)

    x = torch.randn(6)
    encoder = Function(lambda x: (x.new_ones(len(x), 1), x.new_full((len(x), 1), 0.4)))
    with pyro.validation_enabled(False):
        gaps = estimate_gaps(model, AmortizedGuide(model, encoder), (x,))
    assert np.isneginf(gaps.dataset["elbo"]).all()
    assert not gaps.dataset["reliable"].any()
    assert "The ELBO of 6 datapoints is not finite" in str(gaps)


@pytest.mark.slow
def test_arguments_that_the_encoder_lacks_are_named() -> None:
    """And the remedy works: with it none is, and the slope is not halved."""

    def mixed(x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * x + effect, 0.5), obs=y)

    x = torch.randn(50)
    y = 2 * x + 1.1 * torch.randn(50)
    slopes = []
    for spec in (None, ["x", "y"]):
        pyro.clear_param_store()
        guide = AmortizedGuide(mixed, encoder_input=spec)
        svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        for _ in range(250):
            svi.step(x, y)
        slopes.append(pyro.param("slope").item())
        gaps = estimate_gaps(mixed, guide, (x, y))
        words = "the encoder does not see 'x', on which posteriors depend"
        assert (words in " ".join(gaps.verdict.split())) == (spec is None)
        assert gaps.dataset.attrs.get("encoder_input_to_try") == (None if spec else "['x', 'y']")

    def shared(weights: Tensor, y: Tensor) -> None:
        """As many weights as datapoints, which are no data of these."""
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(weights * z.unsqueeze(-1), 0.5).to_event(1), obs=y)

    pyro.clear_param_store()
    gaps = estimate_gaps(shared, AmortizedGuide(shared), (torch.randn(6), torch.randn(6, 6)))
    assert "unseen_arguments" not in gaps.dataset.attrs
    least_squares = ((x * y).sum() / x.square().sum()).item()
    assert slopes[0] < 0.7 * least_squares
    assert slopes[1] > 0.9 * least_squares


@pytest.mark.slow
def test_one_datapoint_that_is_far_off_is_no_small_gap() -> None:
    """The spread between datapoints is no error of the mean over these."""
    oracle = Oracle(hard=False, points=20)
    shift = torch.zeros(20, 1)
    shift[3] = 30.0
    gaps = estimate_gaps(oracle.model, AmortizedGuide(oracle.model, oracle.encoder(shift)), (oracle.x,))
    value, error = gaps.mean("amortization_gap")
    assert value < 2 * error
    assert "The amortization gap dominates" in gaps.verdict
    assert "One datapoint holds 100% of the inference gap (3)" in gaps.verdict
