"""Crossed plates: a guide of one side is the global guide of the other's."""

import copy
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_amortized import (
    AmortizedGuide,
    DeepSetEncoder,
    SemiAmortizedGuide,
    calibrate,
    certified_posterior,
    collapse_report,
    compare_gaps,
    estimate_gaps,
    evidence_bounds,
    log_evidence,
    optimize_local,
    predict_gap,
    simulate,
    to_arviz,
    typicality,
)

pytestmark = pytest.mark.usefixtures("_float64")


def factors(x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, scale: float = 1.0) -> None:
    """x_ij ~ N(u_i v_j, 0.5) with cells on the left and genes on the right, both subsampled on request."""
    cells = pyro.plate("cells", x.shape[0], subsample=rows, dim=-2)
    genes = pyro.plate("genes", x.shape[1], subsample=columns, dim=-1)
    with genes, poutine.scale(scale=scale):
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with cells:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with cells as i, genes as j:
        pyro.sample("x", dist.Normal(u * v, 0.5), obs=x[i][:, j])


def both(model: Any = factors, encoder: Any = None, name: str = "both", **options: Any) -> AmortizedGuide:
    return AmortizedGuide(
        model,
        plate="cells",
        name=name,
        global_guide=lambda part: AmortizedGuide(part, encoder, plate="genes", **options),
    )


def data(cells: int = 6, genes: int = 4) -> Tensor:
    return torch.randn(cells, 1) * torch.randn(genes) + 0.5 * torch.randn(cells, genes)


def test_trains_on_both_sides() -> None:
    pyro.set_rng_seed(0)
    x = data(30, 20)
    guide = both()
    svi = SVI(factors, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert guide.global_guide.layout.sites[0].name == "v"
    assert guide.median(x)["v"].shape == (20,)
    assert guide.quantiles([0.1, 0.9], x)["u"].shape == (2, 30, 1)
    assert guide.global_median(x).keys() == {"v"}


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_elbo_is_that_by_hand_with_subsamples_and_scales(scale: float) -> None:
    """Both guides use the model's indices and scales, once."""
    x, rows, columns = data(), torch.tensor([4, 1, 5]), torch.tensor([2, 0])
    guide = both(family="multivariate_normal" if scale == 1.0 else "normal")
    args = (x, rows, columns, scale)
    guide.setup(*args)
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(factors, guide, *args)
    pyro.set_rng_seed(1)
    drawn = poutine.trace(guide).get_trace(*args).nodes
    u, v = drawn["u"]["value"], drawn["v"]["value"]
    inner = guide.global_guide
    q_u, q_v = guide.posterior(*args), inner.posterior(*args)
    log_p_u = dist.Normal(0.0, 1.0).log_prob(u.reshape(-1)) - q_u.log_prob(u.reshape(-1, 1))
    log_p_v = dist.Normal(0.0, 1.0).log_prob(v) - q_v.log_prob(v.reshape(-1, 1))
    likelihood = dist.Normal(u * v, 0.5).log_prob(x[rows][:, columns]).sum()
    expected = 2.0 * log_p_u.sum() + scale * 2.0 * log_p_v.sum() + 4.0 * likelihood
    assert -loss == pytest.approx(expected.item(), abs=1e-9)


def test_sizes_may_change_where_encoders_serve_any() -> None:
    guide = AmortizedGuide(
        factors,
        plate="cells",
        encoder_input={"genes": ["x", "v"]},
        global_guide=lambda part: AmortizedGuide(part, DeepSetEncoder(1), plate="genes"),
    )
    svi = SVI(factors, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for shape in ((50, 8), (9, 8), (12, 10)):
        assert math.isfinite(svi.step(data(*shape)))
    x, order = data(7, 9), torch.randperm(9)
    one, other = guide.median(x), guide.median(x[:, order])
    assert (one["v"][order] - other["v"]).abs().max() < 1e-10
    assert (one["u"] - other["u"]).abs().max() < 1e-10


def test_the_outer_encoder_sees_the_draw_of_the_other_side() -> None:
    x = data()
    guide = AmortizedGuide(
        factors,
        plate="cells",
        encoder_input={"genes": ["x", "v"]},
        global_guide=lambda part: AmortizedGuide(part, plate="genes"),
    )
    guide.setup(x)
    call = guide._read((x,), {})
    seen = []
    for v in (torch.zeros(4), torch.tensor([0.0, 0.0, 3.0, 0.0])):
        call.global_values = {"v": v}
        seen.append(guide._inputs(call)[1])
    assert seen[0].shape == (6, 4, 1)
    assert (seen[0] != seen[1]).squeeze(-1).sum(0).tolist() == [0, 0, 6, 0]


@pytest.mark.slow
def test_diagnostics_of_either_side() -> None:
    x = data()
    guide = both()
    guide.setup(x)
    for plate, size, other in (("cells", 6, "v"), ("genes", 4, "u")):
        found = log_evidence(factors, guide, (x,), plate=plate)
        held = guide.median(x)[other].reshape(-1)
        data_of = x if plate == "cells" else x.T
        covariance = held.unsqueeze(-1) * held + 0.25 * torch.eye(len(held))
        expected = dist.MultivariateNormal(torch.zeros(len(held)), covariance).log_prob(data_of)
        assert found.sizes == {plate: size}
        assert other in found.attrs["global_latents"]
        assert np.abs(found["log_evidence"].values - expected.numpy()).max() < 0.01
        assert optimize_local(factors, guide, (x,), plate=plate).elbo.shape == (size,)
    assert estimate_gaps(factors, guide, (x,), plate="genes").dataset.sizes["genes"] == 4
    assert collapse_report(factors, guide, (x,), plate="genes").dataset is not None
    compared = compare_gaps(factors, {"one": guide, "again": guide}, (x,), plate="genes")
    assert all(gaps.dataset.sizes["genes"] == 4 for gaps in compared.estimates.values())
    with pytest.raises(ValueError, match=r"amortizes those of \['cells', 'genes'\]"):
        log_evidence(factors, guide, (x,), plate="batches")


class Exact(torch.nn.Module):
    """The posterior of one side of :func:`factors` given the other, with scales that may be wrong by a factor."""

    def __init__(self, wrong: float, other: Tensor | None = None) -> None:
        super().__init__()
        self.wrong, self.other = wrong, other

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given = self.other if given is None else given
        precision = (1.0 + 4.0 * given.square().sum(-1, keepdim=True)).expand(len(x), 1)
        return 4.0 * (x * given).sum(-1, keepdim=True) / precision, self.wrong * precision.rsqrt()


@pytest.mark.parametrize("wrong", [1.0, 0.6])
@pytest.mark.parametrize("plate", ["cells", "genes"])
def test_either_side_is_calibrated_given_the_other(plate: str, wrong: float) -> None:
    """The simulations hold the other side, and so does the guide where its encoder sees it."""
    x, exact = data(20, 12), Exact(wrong, torch.ones(20))
    if plate == "genes":
        guide = both(encoder=exact)
    else:
        options: dict[str, Any] = {"global_guide": lambda part: AmortizedGuide(part, plate="genes")}
        guide = AmortizedGuide(factors, exact, plate="cells", encoder_input=["x", "v"], **options)
    guide.setup(x)
    exact.other = guide.median(x)["u"].reshape(-1)
    report = calibrate(factors, guide, (x,), num_simulations=400, num_samples=99, plate=plate)
    assert report.dataset.attrs["plate"] == plate
    assert report.calibrated == (wrong == 1.0)
    simulation = simulate(factors, guide, (x,), plate=plate)
    assert len(simulation.latents) == x.shape[0 if plate == "cells" else 1]
    with pytest.raises(ValueError, match="beside crossed plates .*try posterior=None"):
        calibrate(factors, guide, (x,), posterior=certified_posterior, plate=plate)


@pytest.mark.parametrize("plate", [pytest.param("cells", marks=pytest.mark.slow), "genes"])
def test_bounds_of_either_side_enclose_the_evidence(plate: str) -> None:
    x = data(20, 12)
    guide = both()
    guide.setup(x)
    number = x.shape[0 if plate == "cells" else 1]
    found = evidence_bounds(factors, guide, (x,), num_simulations=number, num_samples=500, plate=plate)
    held = guide.median(x)["v" if plate == "cells" else "u"].reshape(-1)
    covariance = held.unsqueeze(-1) * held + 0.25 * torch.eye(len(held))
    simulated = simulate(factors, guide, (x,), num_datapoints=number, plate=plate).args[0]
    data_of = simulated if plate == "cells" else simulated.T
    expected = dist.MultivariateNormal(torch.zeros(len(held)), covariance).log_prob(data_of)
    assert np.abs(found["log_evidence"].values - expected.numpy()).max() < 0.02
    assert -0.02 < found.attrs["mean_width"] < 0.05


def test_typicality_and_predicted_gaps_of_either_side() -> None:
    x, more = data(6, 5), data(6, 42)
    guide = AmortizedGuide(
        factors,
        plate="cells",
        encoder_input={"genes": ["x", "v"]},
        global_guide=lambda part: AmortizedGuide(part, plate="genes"),
    )
    guide.setup(more)
    assert typicality(factors, guide, (x,), reference_args=(more,), plate="genes").dataset.sizes["genes"] == 5
    gaps = predict_gap(factors, guide, (x,), reference_args=(more,), plate="genes")
    assert gaps["amortization_gap"].sizes == {"genes": 5}


def test_refined_predicted_exported_and_saved() -> None:
    x = data()
    guide = both()
    guide.setup(x)
    assert guide.refined(3).median(x)["u"].shape == (6, 1)
    assert Predictive(factors, guide=guide, num_samples=5)(x)["v"].shape == (5, 1, 4)
    assert to_arviz(factors, guide, (x,), num_samples=4).posterior["v"].shape == (1, 4, 4)
    loaded = copy.deepcopy(guide)
    assert torch.equal(loaded.median(x)["v"], guide.median(x)["v"])
    fresh = both(name="fresh")
    fresh.load_state_dict(guide.state_dict())
    assert torch.equal(fresh.median(x)["v"], guide.median(x)["v"])


def test_an_inner_guide_that_refines_is_refused() -> None:
    guide = AmortizedGuide(factors, plate="cells", global_guide=lambda part: SemiAmortizedGuide(part, plate="genes"))
    with pytest.raises(ValueError, match="by SemiAmortizedGuide because refinement .* try AmortizedGuide here"):
        guide(data())
    outer = SemiAmortizedGuide(
        factors, plate="cells", num_steps=2, global_guide=lambda part: AmortizedGuide(part, plate="genes")
    )
    assert outer(data())["v"].shape == (4,)


@pytest.mark.slow
def test_as_good_as_a_table() -> None:
    """As good as AutoNormal, which knows every row and column, within a few percent."""
    pyro.set_rng_seed(0)
    x = data(30, 20)
    losses = {}
    for name, guide in (("table", AutoNormal(factors, init_scale=0.1)), ("amortized", both(name="trained"))):
        pyro.clear_param_store()
        svi = SVI(factors, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / 400)}), Trace_ELBO())
        for _ in range(400):
            svi.step(x)
        losses[name] = sum(svi.evaluate_loss(x) for _ in range(20)) / 20
    assert losses["amortized"] < 1.05 * losses["table"]
