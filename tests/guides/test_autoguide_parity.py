"""Whatever Pyro's own autoguides take, every guide of the package takes: their checks, written afresh."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

from pyro_amortized import (
    AmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
    to_arviz,
)

GUIDES = [AutoNormal, AmortizedGuide, SemiAmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide]
"""AutoNormal first: a check that it does not pass says nothing."""

ELBOS = [Trace_ELBO, TraceGraph_ELBO, partial(TraceEnum_ELBO, strict_enumeration_warning=False), TraceMeanField_ELBO]


@pytest.fixture(params=GUIDES, ids=lambda Guide: Guide.__name__)
def Guide(request: Any) -> Any:
    return request.param


def train(model: Any, guide: Any, *args: Any, elbo: Any = None, num_steps: int = 2) -> None:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo or Trace_ELBO())
    for _ in range(num_steps):
        assert math.isfinite(svi.step(*args))


# Models


def normals(data: torch.Tensor) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def two_globals() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5)))


def observed_global() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("o", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def factors(data: torch.Tensor) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -((z - data) ** 2))


def masked_globals() -> None:
    present = torch.tensor([True, False, True])
    pyro.sample("a", dist.Normal(0.0, 1.0).mask(torch.tensor(True)))
    with poutine.mask(mask=present), pyro.plate("three", 3):
        pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("c", dist.Normal(torch.zeros(3), 1.0).mask(present).to_event(1))
    pyro.sample("o", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def masked_data() -> None:
    data = torch.tensor([0.0, 1.0, math.nan])
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(mean, 1.0).mask(~data.isnan()), obs=data.nan_to_num())


def scaled_global(data: torch.Tensor) -> None:
    with poutine.scale(scale=0.1):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("o", dist.Normal(x, 1.0), obs=data)


def supports() -> None:
    pyro.sample("z1", dist.Normal(0.0, 1.0))
    pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    with pyro.plate("three", 3):
        pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))
    pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
    pyro.sample("z6", dist.LogNormal(0.0, 1.0))
    pyro.sample("z7", dist.LKJCholesky(2, 1.0))


def no_latents(data: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", 10, subsample_size=len(data)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=data)


def directions(data: torch.Tensor) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
        mean = (x * self.linear.weight.squeeze(-2).unsqueeze(-2)).sum(-1) + self.linear.bias
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)


X = torch.linspace(-1.0, 1.0, 4)
MODELS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "normals": (normals, (X,)),
    "two globals": (two_globals, ()),
    "observed global": (observed_global, ()),
    "factors alone": (factors, (X,)),
    "masked globals": (masked_globals, ()),
    "masked data": (masked_data, ()),
    "scaled global": (scaled_global, (X,)),
    "supports": (supports, ()),
    "no latents": (no_latents, (X,)),
    "directions": (poutine.reparam(directions, {"z": ProjectedNormalReparam()}), (torch.randn(4, 3),)),
    "regression": (Regression(), (torch.randn(4, 3), X)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", MODELS)
def test_trains_by_every_elbo(Guide: Any, name: str) -> None:
    model, args = MODELS[name]
    guide = Guide(model)
    for elbo in ELBOS:
        train(model, guide, *args, elbo=elbo(), num_steps=1)


def test_summaries_have_the_shapes_of_the_sites(Guide: Any) -> None:
    guide = Guide(supports)
    guide()
    values = poutine.trace(supports).get_trace().nodes
    for name, median in guide.median().items():
        assert median.shape == values[name]["value"].shape
        assert values[name]["fn"].support.check(median).all()
    assert all(len(quantiles) == 3 for quantiles in guide.quantiles([0.1, 0.5, 0.9]).values())


@pytest.mark.parametrize("expose", [["y"], ["x", "y"]])
def test_lists_of_guides(Guide: Any, expose: list[str]) -> None:
    guide = AutoGuideList(two_globals)
    if "x" not in expose:
        guide.append(AutoDelta(poutine.block(two_globals, expose=["x"])))
    guide.append(Guide(poutine.block(two_globals, expose=expose)))
    train(two_globals, guide)
    assert guide().keys() == guide.median().keys() == {"x", "y"}


def test_beside_a_function(Guide: Any) -> None:
    guide = AutoGuideList(two_globals)
    guide.append(lambda: {"x": pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))})
    guide.append(Guide(poutine.block(two_globals, expose=["y"])))
    assert guide().keys() == {"x", "y"}


def test_beside_discrete_latents(Guide: Any) -> None:
    @config_enumerate
    def model(data: torch.Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[assignment], 1.0), obs=data)

    guide = AutoGuideList(model)
    guide.append(Guide(poutine.block(model, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    train(model, guide, X, elbo=TraceEnum_ELBO(max_plate_nesting=1))


@pytest.mark.filterwarnings("ignore")  # of tracing
@pytest.mark.parametrize("name", ["two globals", "observed global", "no latents"])
def test_calls_that_can_be_traced(Guide: Any, name: str) -> None:
    model, args = MODELS[name]
    guide = Guide(model)
    guide(*args)
    assert isinstance(guide.call(*args), tuple)
    if name != "no latents":
        torch.jit.trace_module(guide, {"call": args}, check_trace=False).call()


@pytest.mark.filterwarnings("ignore")  # of tracing
def test_jit_elbo(Guide: Any) -> None:
    train(scaled_global, Guide(scaled_global), X, elbo=JitTrace_ELBO(ignore_jit_warnings=True))


@pytest.mark.parametrize("module", [two_globals, supports])
def test_saved_without_its_model(Guide: Any, module: Any) -> None:
    guide = Guide(module)
    guide()
    stream = io.BytesIO()
    torch.save(guide, stream)
    pyro.set_rng_seed(0)
    before = guide()
    pyro.clear_param_store()
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    pyro.set_rng_seed(0)
    after = loaded()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in guide.named_parameters()}


def test_copies(Guide: Any) -> None:
    guide = Guide(two_globals)
    guide()
    copied = copy.deepcopy(guide)
    pyro.clear_param_store()  # where the guide's own parameters lie by the same names
    assert copied().keys() == {"x", "y"}


@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_of_new_data(Guide: Any, parallel: bool) -> None:
    model = Regression()
    guide = Guide(model)
    train(model, guide, torch.randn(6, 3), torch.randn(6))
    found = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(torch.randn(4, 3))
    assert found["y"].shape == (7, 4)
    assert guide.median(torch.randn(4, 3)).keys() == {"scale", "linear.weight", "linear.bias"}


def test_subsamples_of_created_plates(Guide: Any) -> None:
    def model(batch: torch.Tensor, index: torch.Tensor | None, size: int) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, subsample=index):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    guide = Guide(model, create_plates=lambda batch, index, size: pyro.plate("data", size, subsample=index))
    data = torch.randn(50)
    guide(data, None, 50)
    for index in torch.randperm(50).split(20)[:2]:
        train(model, guide, data[index], index, 50)


@pytest.mark.parametrize(
    "init_loc_fn",
    [
        init_to_feasible,
        init_to_mean,
        init_to_median,
        init_to_sample,
        init_to_uniform,
        init_to_value(values={"z6": torch.tensor(0.7)}),
        init_to_generated(generate=lambda: init_to_value(values={"z6": torch.tensor(0.7)})),
    ],
)
def test_starts(Guide: Any, init_loc_fn: Any) -> None:
    Guide(supports, init_loc_fn=init_loc_fn)()


def test_improper_priors(Guide: Any) -> None:
    def model(data: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.simplex, (len(data),), (3,)))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=data)

    start = init_to_value(values={"scale": torch.tensor(1.0), "z": torch.full((4, 3), 1 / 3)})
    guide = Guide(model, init_loc_fn=start)
    for elbo in ELBOS:
        train(model, guide, torch.randn(4, 3), elbo=elbo(), num_steps=1)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, data: torch.Tensor) -> None:
        normals(data)


def shifted(shift: float, data: torch.Tensor) -> None:
    normals(data + shift)


@pytest.mark.parametrize("model", [partial(shifted, 1.0), Unhashable()], ids=["partial", "unhashable"])
def test_models_of_any_kind(Guide: Any, model: Any) -> None:
    guide = Guide(model)
    train(model, guide, X)
    guide.median(X)
    if Guide is not AutoNormal:
        guide.refined(2).median(X)
    if Guide is AmortizedGuide:
        assert estimate_gaps(model, guide, (X,), tolerance=0.2, max_samples=1000).dataset.sizes["data"] == 4
        assert "posterior" in to_arviz(model, guide, (X,), num_samples=3)
