"""Every guide in lists and modules, and of models inside Pyro's handlers, as Pyro's own tests ask of an autoguide."""

from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbos_by_hand import elbo_by_hand
from host_conventions import ONE_SHOT, OPTIONS, X, assert_loss, build, centred, most_guides
from models import counts, topics
from plain_guides import normals, svi
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule
from torch import Tensor

from pyro_amortized import PerDatapointGuide


@pytest.mark.parametrize(("Guide", "nested"), [*product(OPTIONS, [True]), *product(ONE_SHOT, [False])])
def test_in_a_list(Guide: Any, nested: bool) -> None:
    guide = AutoGuideList(centred)
    inner = build(Guide, poutine.block(centred, hide=["loc"]))
    if nested:
        part = AutoGuideList(poutine.block(centred, hide=["loc"]))
        part.append(inner)
        guide.append(part)
    else:
        guide.append(inner)
    guide.append(AutoDelta(poutine.block(centred, expose=["loc"])))
    steps = svi(centred, guide)
    assert torch.tensor([steps.step(X) for _ in range(3)]).isfinite().all()
    assert guide.median(X).keys() == {"loc", "z"}
    pyro.set_rng_seed(3)
    expected = elbo_by_hand(centred, guide, X)
    pyro.set_rng_seed(3)
    assert -Trace_ELBO().loss(centred, guide, X) == pytest.approx(expected, rel=1e-5)


@most_guides
def test_in_a_list_with_a_function(Guide: Any) -> None:
    def loc(x: Tensor) -> None:
        pyro.sample("loc", dist.Delta(pyro.param("loc_value", torch.tensor(0.3))))

    guide = AutoGuideList(centred)
    guide.append(loc)
    guide.append(build(Guide, poutine.block(centred, hide=["loc"])))
    steps = svi(centred, guide)
    assert torch.tensor([steps.step(X) for _ in range(3)]).isfinite().all()
    assert pyro.param("loc_value").item() != pytest.approx(0.3)


@most_guides
def test_as_a_part_of_a_larger_module(Guide: Any) -> None:
    """Parameters go to the store under the names of the modules that hold the guide."""

    class Both(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = build(Guide, poutine.block(topics, hide=["rate"]))

        def forward(self, x: Tensor) -> None:
            loc = pyro.param("rate_loc", torch.ones(3), constraint=dist.constraints.positive)
            with pyro.plate("topics", 3):
                pyro.sample("rate", dist.Delta(loc))
            self.first(x)

    x, both = counts(6), Both()
    steps = svi(topics, both, lr=0.002)
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()
    names = set(pyro.get_param_store().keys()) - {"rate_loc"}
    assert names
    assert all("first.inference" in name for name in names)


@most_guides
def test_discrete_latents_in_a_guide_of_their_own(Guide: Any) -> None:
    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=x)

    guide = AutoGuideList(model)
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    guide.append(build(Guide, poutine.block(model, hide=["k"])))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    steps = svi(model, guide, elbo)
    assert torch.tensor([steps.step(X) for _ in range(3)]).isfinite().all()


@most_guides
def test_hidden_latents_are_left_alone(Guide: Any) -> None:
    x = counts(6)
    guide = build(Guide, poutine.block(topics, hide=["rate"]))
    assert guide(x).keys() == {"size", "share"}
    assert_loss(topics, poutine_with_rate(guide), x)


def poutine_with_rate(guide: Any) -> Any:
    class WithRate:
        def setup(self, x: Tensor) -> None:
            guide.setup(x)

        def __call__(self, x: Tensor) -> None:
            with pyro.plate("topics", 3):
                pyro.sample("rate", dist.Gamma(2.0, 1.0))
            guide(x)

    return WithRate()


@most_guides
def test_reparametrised_model(Guide: Any) -> None:
    @poutine.reparam(config={"z": LocScaleReparam(0.0)})
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = build(Guide, model)
    assert_loss(model, guide, X)
    assert guide(X).keys() == {"loc", "z_decentered"}
    assert torch.tensor(svi(model, guide).step(X[:4] if Guide is not PerDatapointGuide else X)).isfinite()


@most_guides
def test_scoped_site_names(Guide: Any) -> None:
    from pyro.contrib.autoname import scope

    model = scope(normals, prefix="part")
    guide = build(Guide, model)
    assert_loss(model, guide, X)
    assert guide.median(X).keys() == {"part/z"}


@most_guides
def test_plates_of_the_user(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3, dim=-2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 2, dim=-1):
                v = pyro.sample("v", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(v, 1.0), obs=x[rows])

    def create_plates(x: Tensor) -> list[pyro.plate]:
        return [pyro.plate("data", len(x), subsample_size=3, dim=-2), pyro.plate("columns", 2, dim=-1)]

    x = torch.randn(6, 2)
    guide = build(Guide, model, create_plates=create_plates, plate="data")
    assert_loss(model, guide, x)
    batches = {tuple(poutine.trace(guide).get_trace(x).nodes["data"]["value"].tolist()) for _ in range(5)}
    assert len(batches) > 1
