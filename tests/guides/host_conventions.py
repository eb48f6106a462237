"""Every guide, with options that make it quick, and what the tests that ask the same of each of them share."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbos_by_hand import elbo_by_hand
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

OPTIONS: dict[Any, dict[str, Any]] = {
    AmortizedGuide: {},
    PerDatapointGuide: {},
    DiscreteAmortizedGuide: {},
    SemiAmortizedGuide: {"num_steps": 2, "keep_best": False},
    IterativeAmortizedGuide: {"num_steps": 2, "num_particles": 2, "keep_best": False},
}
ONE_SHOT = [AmortizedGuide, PerDatapointGuide]
X = torch.linspace(-1.0, 1.5, 6)

every_guide = pytest.mark.parametrize("Guide", list(OPTIONS))
slow_iterative = pytest.param(IterativeAmortizedGuide, marks=pytest.mark.slow)
most_guides = pytest.mark.parametrize(
    "Guide", [*(G for G in OPTIONS if G is not IterativeAmortizedGuide), slow_iterative]
)
"""Every guide, the iterative one in the slow run: what it does here is what the semi-amortized one does."""


def build(Guide: Any, model: Any, **options: Any) -> Any:
    return Guide(model, **{**OPTIONS[Guide], **options})


def assert_loss(model: Any, guide: Any, *args: Any) -> None:
    """The loss of ``Trace_ELBO`` is the number of a computation by hand, with the same noise."""
    guide.setup(*args)
    pyro.set_rng_seed(3)
    expected = elbo_by_hand(model, guide, *args)
    pyro.set_rng_seed(3)
    assert -Trace_ELBO().loss(model, guide, *args) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def centred(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
