"""Bounds on the evidence of simulated data."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from torch import Tensor

from pyro_amortized import AmortizedGuide, PerDatapointGuide, evidence_bounds, simulate
from pyro_amortized.diagnostics.evidence import bounds

pytestmark = pytest.mark.usefixtures("_float64")


@pytest.mark.slow
def test_the_bounds_enclose_the_exact_evidence() -> None:
    model = LinearGaussian.random_weights()
    guide, x = AmortizedGuide(model.full), model.simulate(20)
    result = evidence_bounds(model.full, guide, (x,), num_simulations=60)
    exact = model.log_evidence(simulate(model.full, guide, (x,), num_datapoints=60).args[0]).numpy()
    assert result.sizes["data"] == 60
    for name, sign in (("lower_bound", 1.0), ("upper_bound", -1.0)):
        margin = sign * (exact - result[name].values)
        assert margin.mean() > -3 * margin.std(ddof=1) / 60**0.5
    assert abs(result.attrs["mean_width"]) < 0.005
    assert np.abs(result["log_evidence"] - exact).max() < 0.01


def test_a_poor_proposal_shows_in_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LinearGaussian.random_weights()
    adapted = bounds.adapted_proposals

    def misplaced(*args):
        for rows, proposal in adapted(*args):
            proposal.loc[0] += 3.0
            yield rows, proposal

    monkeypatch.setattr(bounds, "adapted_proposals", misplaced)
    result = evidence_bounds(model.full, AmortizedGuide(model.full), (model.simulate(30),), num_samples=200)
    assert result.attrs["mean_width"] > 0.1
    assert result.attrs["mean_width"] > 3 * result.attrs["mean_width_se"]


def test_models_that_cannot_be_simulated_are_refused() -> None:
    x = torch.randn(5)

    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="Cannot simulate"):
        evidence_bounds(model, AmortizedGuide(model))

    def passed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="try"):
        evidence_bounds(passed, PerDatapointGuide(passed), (x,))
