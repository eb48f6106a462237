"""What Pyro's own tests ask of an autoguide, asked of every guide; what test_guides.py asks is not repeated."""

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compatibility import elbo_by_hand
from models import counts, topics
from pyro import poutine
from pyro.infer import (
    CSIS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
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
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal", "flow"]
OPTIONS: dict[Any, dict[str, Any]] = {
    AmortizedGuide: {},
    PerDatapointGuide: {},
    DiscreteAmortizedGuide: {},
    SemiAmortizedGuide: {"num_steps": 2, "keep_best": False},
    IterativeAmortizedGuide: {"num_steps": 2, "num_particles": 2, "keep_best": False},
}
ONE_SHOT = [AmortizedGuide, PerDatapointGuide]
REFINING = [SemiAmortizedGuide, IterativeAmortizedGuide]
X = torch.linspace(-1.0, 1.5, 6)

every_guide = pytest.mark.parametrize("Guide", list(OPTIONS))
slow_iterative = pytest.param(IterativeAmortizedGuide, marks=pytest.mark.slow)
most_guides = pytest.mark.parametrize(
    "Guide", [*(G for G in OPTIONS if G is not IterativeAmortizedGuide), slow_iterative]
)
"""Every guide, the iterative one in the slow run: what it does here is what the semi-amortized one does."""
every_family = pytest.mark.parametrize(
    ("Guide", "family"),
    [
        *((Guide, family) for Guide in ONE_SHOT for family in FAMILIES),
        *((Guide, "normal") for Guide in (SemiAmortizedGuide, DiscreteAmortizedGuide)),
        pytest.param(IterativeAmortizedGuide, "normal", marks=pytest.mark.slow),
    ],
)


def build(Guide: Any, model: Any, **options: Any) -> Any:
    return Guide(model, **{**OPTIONS[Guide], **options})


def svi(model: Any, guide: Any, elbo: Any = None, lr: float = 0.01) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())


def train(model: Any, guide: Any, *args: Any) -> None:
    """A few steps of a torch optimizer; Pyro's own do not take modules whose parameters are local to them."""
    elbo = Trace_ELBO()(model, guide)
    elbo(*args)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss = elbo(*args)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()


def assert_loss(model: Any, guide: Any, *args: Any) -> None:
    """The loss of ``Trace_ELBO`` is the number of a computation by hand, with the same noise."""
    guide.setup(*args)
    pyro.set_rng_seed(3)
    expected = elbo_by_hand(model, guide, *args)
    pyro.set_rng_seed(3)
    assert -Trace_ELBO().loss(model, guide, *args) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def normals(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def centred(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchy(x: Tensor) -> None:
    """Global latents alone and in plates of their own at two dimensions, local ones in and out of an inner plate."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("groups", 2, dim=-2), pyro.plate("parts", 3, dim=-1):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    offset = w.sum((-1, -2, -3)).reshape(w.shape[:-3] + (1, 1))
    data = pyro.plate("data", len(x), dim=-1)
    with data:
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        corr = pyro.sample("corr", dist.LKJCholesky(2, 1.0))
    with data, pyro.plate("sides", 2, dim=-2):
        side = pyro.sample("side", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(side[..., 0, 1] + share[..., 0] + corr[..., 1, 0] + offset, scale), obs=x)


# 1. Sites, plates, scales and values


@every_family
def test_guide_sites_are_those_of_the_model(Guide: Any, family: str) -> None:
    guide = build(Guide, topics, family=family)
    x = counts(6)
    values = guide(x)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    model_trace = poutine.trace(poutine.replay(topics, trace)).get_trace(x)
    latents = {"rate", "size", "share"}
    assert values.keys() == latents
    for name in latents:
        mine, theirs = trace.nodes[name], model_trace.nodes[name]
        assert mine["value"] is theirs["value"]
        assert mine["fn"].event_dim == theirs["fn"].event_dim
        assert mine["fn"].batch_shape == theirs["fn"].batch_shape
        assert [(f.name, f.dim, f.size) for f in mine["cond_indep_stack"]] == [
            (f.name, f.dim, f.size) for f in theirs["cond_indep_stack"]
        ]
        assert mine["scale"] == theirs["scale"]
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and name not in model_trace.nodes:
            assert site["infer"]["is_auxiliary"]


@every_family
def test_factors_of_the_model(Guide: Any, family: str) -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("outside", -0.3 * w**2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.factor("inside", -0.2 * z**2)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = build(Guide, model, family=family)
    assert_loss(model, guide, X)
    assert torch.tensor(svi(model, guide).step(X)).isfinite()


ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, RenyiELBO]


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("Guide", "Elbo", "vectorized"),
    [
        *product(ONE_SHOT, ELBOS, [True]),
        *((Guide, Trace_ELBO, False) for Guide in ONE_SHOT),
        *product(REFINING, [TraceMeanField_ELBO], [True]),
    ],
)
def test_event_shapes_and_plates_under_every_elbo(Guide: Any, Elbo: Any, vectorized: bool) -> None:
    options = {"strict_enumeration_warning": False} if Elbo is TraceEnum_ELBO else {}
    elbo = Elbo(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=2, **options)
    guide = build(Guide, hierarchy, global_guide=partial(AutoNormal, init_scale=0.1))
    steps = svi(hierarchy, guide, elbo, lr=0.002)
    assert torch.tensor([steps.step(X) for _ in range(3)]).isfinite().all()
    shapes = {"scale": (), "w": (2, 3, 2), "share": (6, 3), "side": (2, 6, 2, 2), "corr": (6, 2, 2)}
    assert {name: tuple(value.shape) for name, value in guide.median(X).items()} == shapes
    quantiles = guide.quantiles([0.2, 0.8], X)
    assert {name: tuple(value.shape) for name, value in quantiles.items()} == {n: (2, *s) for n, s in shapes.items()}
    assert_loss(hierarchy, guide, X)


@every_guide
def test_latents_in_a_sequential_plate_are_refused(Guide: Any) -> None:
    """As by Pyro's own autoguides."""

    def model(x: Tensor) -> None:
        locs = [pyro.sample(f"loc_{i}", dist.Normal(0.0, 1.0)) for i in pyro.plate("parts", 2)]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(locs[0] + locs[1], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(NotImplementedError, match="sequential"):
        AutoNormal(model)(X)
    with pytest.raises(ValueError, match="site 'loc_0' because it lies in the sequential plate 'parts'"):
        build(Guide, model)(X)


@every_guide
def test_observations_in_a_sequential_plate_are_refused(Guide: Any) -> None:
    """Unlike by Pyro's own autoguides: in such a plate a site has another name for every index."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in pyro.plate("features", 2):
                pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[:, i])

    x = torch.stack([X, -X], -1)
    with pytest.raises(ValueError, match=r"site 'x_0' because it lies in the sequential plate 'features'.*vectorised"):
        build(Guide, model)(x)


@every_guide
def test_global_latents_after_local_ones(Guide: Any) -> None:
    """Guides sample global latents first. Pyro's mean-field ELBO warns of another order, and is right all the same."""

    def model(x: Tensor) -> None:
        data = pyro.plate("data", len(x))
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with data:
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    guide = build(Guide, model)
    guide.setup(X)
    pyro.set_rng_seed(3)
    with pytest.warns(UserWarning, match="mean field restriction"):
        loss = TraceMeanField_ELBO().loss(model, guide, X)
    pyro.set_rng_seed(3)
    assert -loss == pytest.approx(elbo_by_hand(model, guide, X, analytic=True), rel=1e-5)


@pytest.mark.parametrize(("Guide", "rank"), [*product(ONE_SHOT, [1, 2, 3]), *product(REFINING, [3])])
def test_inside_plates_of_the_caller(Guide: Any, rank: int) -> None:
    x = counts(5)
    guide = build(Guide, topics)
    plates = [pyro.plate(f"outer_{i}", 2, dim=-2 - i) for i in range(rank)]
    guide.setup(x)
    for plate in plates:
        plate.__enter__()
    try:
        trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(topics, trace)).get_trace(x)
    finally:
        for plate in reversed(plates):
            plate.__exit__(None, None, None)
    outer = (2,) * rank
    for nodes in (trace.nodes, model_trace.nodes):
        assert nodes["size"]["value"].shape == (*outer, 5)
        assert nodes["share"]["value"].shape == (*outer, 5, 3)
        assert nodes["rate"]["value"].shape == (*outer, 3)
    model_trace.compute_log_prob()
    assert model_trace.nodes["x"]["log_prob"].shape == (*outer, 5)


# 2. Starting points

STARTS = {
    "feasible": init_to_feasible,
    "sample": init_to_sample,
    "median": init_to_median,
    "mean": init_to_mean,
    "uniform": init_to_uniform,
    "median_of_many": partial(init_to_median, num_samples=5),
    "value": init_to_value(values={"size": torch.tensor(2.0).expand(6)}),
    "generated": init_to_generated(generate=lambda: init_to_value(values={"size": torch.tensor(2.0).expand(6)})),
}


@pytest.mark.thinned
@pytest.mark.parametrize(("Guide", "start"), [*product(ONE_SHOT, STARTS), *product(REFINING, ["generated"])])
def test_every_start(Guide: Any, start: str) -> None:
    x = counts(6)
    guide = build(Guide, topics, init_loc_fn=STARTS[start], init_scale=0.01)
    guide.setup(x)
    median = guide.median(x)
    assert all(value.isfinite().all() for value in median.values())
    if Guide is PerDatapointGuide and start in ("value", "generated"):
        torch.testing.assert_close(median["size"], torch.full((6,), 2.0))
    if Guide is PerDatapointGuide and start == "mean":
        torch.testing.assert_close(median["size"], dist.LogNormal(0.5, 0.7).mean.expand(6))
        torch.testing.assert_close(median["rate"], torch.full((3,), 2.0))
    assert torch.tensor(svi(topics, guide, lr=0.001).step(x)).isfinite()


# 3. Lists and nesting


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


# 4. Models that are modules


class Regression(PyroModule):
    """Random weights and a noise parameter in a module, latents of the datapoints in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            z = self.local(mean)
            return pyro.sample("y", dist.Normal(z, self.log_scale.exp()), obs=y)

    def local(self, mean: Tensor) -> Tensor:
        return mean


class LocalRegression(Regression):
    """As above, with a latent per datapoint."""

    def local(self, mean: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(mean, 1.0))


@pytest.fixture(params=[False, True])
def _module_local(request: Any) -> Iterator[None]:
    with pyro.settings.context(module_local_params=request.param):
        yield


@most_guides
@pytest.mark.usefixtures("_module_local")
@pytest.mark.parametrize("Model", [Regression, LocalRegression])
def test_module_models_with_random_weights(Guide: Any, Model: Any) -> None:
    model, x, y = Model(), torch.randn(8, 2), torch.randn(8)
    guide = build(Guide, model)
    assert_loss(model, guide, x, y)
    weights = {"linear.weight", "linear.bias"}
    assert guide.median(x, y).keys() == weights | ({"z"} if Model is LocalRegression else set())
    assert not any(name.startswith("model") for name, _ in guide.named_parameters())
    train(model, guide, x, y)
    assert model.log_scale.item() != 0.0


@every_guide
@pytest.mark.usefixtures("_module_local")
def test_predicts_from_a_module_with_global_latents_alone(Guide: Any) -> None:
    """Pyro's regression tutorial: train on (x, y), then predict y at any x."""
    model, x, y = Regression(), torch.randn(8, 2), torch.randn(8)
    guide = build(Guide, model)
    train(model, guide, x, y)
    predictive = Predictive(model, guide=guide, num_samples=5, return_sites=("y", "_RETURN"))
    for size in (8, 3):
        samples = predictive(torch.randn(size, 2))
        assert samples["y"].reshape(5, size).std(0).min() > 0


@every_guide
def test_predicts_what_was_observed_in_training(Guide: Any) -> None:
    """A guide whose encoder sees covariates alone needs no y to predict y."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    options = {} if Guide is PerDatapointGuide else {"encoder_input": "x"}
    guide = build(Guide, model, plate="data", **options)
    svi(model, guide).step(X, 2 * X)
    samples = Predictive(model, guide=guide, num_samples=4)(X)
    assert samples["y"].reshape(4, 6).std(0).min() > 0


@most_guides
@pytest.mark.parametrize("parallel", [False, True])
def test_replicates_what_was_observed(Guide: Any, parallel: bool) -> None:
    guide = build(Guide, normals)
    svi(normals, guide).step(X)
    predictive = Predictive(poutine.uncondition(normals), guide=guide, num_samples=4, parallel=parallel)
    assert predictive(X)["x"].reshape(4, 6).std(0).min() > 0


@most_guides
def test_two_guides_of_one_name_with_local_parameters(Guide: Any) -> None:
    with pyro.settings.context(module_local_params=True):
        guides = [build(Guide, normals) for _ in range(2)]
        for guide in guides:
            train(normals, guide, X)
        assert not pyro.get_param_store().keys()
        first = [value.clone() for value in guides[0].state_dict().values()]
        train(normals, guides[1], X)
        assert all(map(torch.equal, first, guides[0].state_dict().values()))


def alone(x: Tensor) -> None:
    """Nothing but a global latent."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize(
    ("Guide", "model", "options"),
    [*((Guide, alone, {}) for Guide in OPTIONS), (SemiAmortizedGuide, centred, {"initial": "prior"})],
)
def test_two_guides_of_one_name_without_encoder_parameters(Guide: Any, model: Any, options: Any) -> None:
    """With global latents alone, or a start at the prior, it is the parameters of the global guide that clash."""
    svi(model, build(Guide, model, **options)).step(X)
    with pytest.raises(ValueError, match=r"already holds other parameters.*name="):
        svi(model, build(Guide, model, **options)).step(X)
    svi(model, build(Guide, model, name="other", **options)).step(X)


@most_guides
def test_options_of_the_optimizer_by_parameter(Guide: Any) -> None:
    names = []

    def options(name: str) -> dict[str, float]:
        names.append(name)
        return {"lr": 0.0}

    guide = build(Guide, topics)
    steps = SVI(topics, guide, pyro.optim.Adam(options), Trace_ELBO())
    x = counts(6)
    steps.step(x)
    before = copy.deepcopy(dict(guide.named_parameters()))
    steps.step(x)
    assert any("inference" in name for name in names)
    assert any("global_guide" in name for name in names)
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name]), name


# 5. Other ELBOs and training loops

PLAIN = {
    JitTrace_ELBO: Trace_ELBO,
    JitTraceGraph_ELBO: TraceGraph_ELBO,
    JitTraceMeanField_ELBO: TraceMeanField_ELBO,
    JitTraceEnum_ELBO: TraceEnum_ELBO,
}
JIT = list(PLAIN)
jit_warning = pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated:DeprecationWarning")


def jit_elbo(Elbo: Any, **options: Any) -> Any:
    options |= {"strict_enumeration_warning": False} if issubclass(Elbo, TraceEnum_ELBO) else {}
    return Elbo(ignore_jit_warnings=True, **options)


@pytest.mark.thinned
@jit_warning
@pytest.mark.parametrize("Guide", ONE_SHOT)
@pytest.mark.parametrize("Elbo", [Elbo for Elbo in JIT if Elbo is not JitTraceMeanField_ELBO])  # of other draws
@pytest.mark.parametrize(
    ("model", "family"),
    [
        (centred, "normal"),
        (centred, "multivariate_normal"),
        (topics, "normal"),
    ],
)
def test_jit_gives_the_same_loss_and_gradients(Guide: Any, Elbo: Any, model: Any, family: str) -> None:
    x = counts(6)
    guide = build(Guide, model, family=family)
    guide.setup(x)
    results = []
    for elbo in (jit_elbo(Elbo), jit_elbo(PLAIN[Elbo])):
        for _ in range(2):  # the first call traces
            guide.zero_grad()
            pyro.set_rng_seed(5)
            loss = elbo.loss_and_grads(model, guide, x)
        results.append((loss, [parameter.grad.clone() for parameter in guide.parameters()]))
    (loss, grads), (expected, expected_grads) = results
    assert loss == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-4)


@jit_warning
@pytest.mark.parametrize(("Guide", "Elbo"), [*product([SemiAmortizedGuide], JIT), (IterativeAmortizedGuide, JIT[0])])
def test_jit_is_refused_where_gradients_are_needed(Guide: Any, Elbo: Any) -> None:
    guide = build(Guide, normals)
    guide.setup(X)
    with pytest.raises(ValueError, match="Cannot refine phi inside torch.jit.trace"):
        svi(normals, guide, jit_elbo(Elbo)).step(X)


@jit_warning
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("Guide", ONE_SHOT)
def test_traced_elbo_module(Guide: Any) -> None:
    """Pyro's own autoguides can be traced as a part of an ELBO module."""
    guide = build(Guide, centred)
    guide.setup(X)
    elbo = Trace_ELBO()(centred, guide)
    elbo(X)
    traced = torch.jit.trace(elbo, (X,), check_trace=False)
    pyro.set_rng_seed(3)
    expected = elbo(X)
    pyro.set_rng_seed(3)
    torch.testing.assert_close(traced(X), expected)


@most_guides
def test_renyi_elbo_with_one_particle_is_the_elbo(Guide: Any) -> None:
    x = counts(6)
    guide = build(Guide, topics)
    guide.setup(x)
    for alpha in (0.0, 0.5, 2.0):
        pyro.set_rng_seed(3)
        with torch.no_grad():  # as in this ELBO
            expected = elbo_by_hand(topics, guide, x)
        pyro.set_rng_seed(3)
        loss = RenyiELBO(alpha=alpha, num_particles=1).loss(topics, guide, x)
        assert -loss == pytest.approx(expected, rel=1e-4)


@jit_warning
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("Guide", [*ONE_SHOT, DiscreteAmortizedGuide])
@pytest.mark.parametrize("data", [normals, centred])
def test_traced_call(Guide: Any, data: Any) -> None:
    """``guide.call()`` by ``torch.jit.trace_module``, of a model whose data are no argument."""

    def model() -> None:
        data(X)

    guide = build(Guide, model, init_scale=1e-5, global_guide=partial(AutoNormal, init_scale=1e-5))
    guide()
    traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    median = guide.median()
    for _ in range(2):
        values = traced.call()
        assert len(values) == len(median)
        torch.testing.assert_close(values, tuple(median.values()), rtol=0, atol=1e-3)
    first, second = (torch.cat([value.flatten() for value in traced.call()]) for _ in range(2))
    assert not torch.equal(first, second)  # draws, not constants


@jit_warning
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("Guide", REFINING)
def test_traced_call_is_refused_where_gradients_are_needed(Guide: Any) -> None:
    guide = build(Guide, lambda: normals(X))
    guide()
    with pytest.raises(ValueError, match="Cannot refine phi inside torch.jit.trace"):
        torch.jit.trace_module(guide, {"call": ()}, check_trace=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning", "ignore:Encountered:UserWarning")
@pytest.mark.parametrize("loss", ["wake_sleep", "csis"])
@pytest.mark.parametrize(("model", "family"), [(normals, "multivariate_normal"), (centred, "normal")])
def test_latents_that_no_draw_leads_to_are_refused(loss: str, model: Any, family: str) -> None:
    """Simulated latents cannot be put into a site that is a function of a flat latent."""
    guide = AmortizedGuide(model, family=family)
    guide.setup(X)
    optimizer = pyro.optim.Adam({"lr": 0.01})
    sleep = ReweightedWakeSleep(num_particles=2, insomnia=0.5, model_has_params=False, vectorize_particles=False)
    step = SVI(model, guide, optimizer, sleep).step if loss == "wake_sleep" else CSIS(model, guide, optimizer).step
    with pytest.raises(ValueError, match="Cannot evaluate the guide at other latents than its own draws"):
        step(X)


@pytest.mark.usefixtures("_float64")
@most_guides
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_renyi_elbo_of_several_particles(Guide: Any, alpha: float) -> None:
    guide = build(Guide, normals)
    guide.setup(X)
    particles = 4
    pyro.set_rng_seed(3)
    loss = RenyiELBO(alpha=alpha, num_particles=particles).loss(normals, guide, X)
    pyro.set_rng_seed(3)
    log_weights = torch.stack([datapoint_log_weights(guide) for _ in range(particles)])
    expected = ((1 - alpha) * log_weights).logsumexp(0) - torch.tensor(float(particles)).log()
    assert -loss == pytest.approx(expected.sum().item() / (1 - alpha), rel=1e-8)


@torch.no_grad()
def datapoint_log_weights(guide: Any) -> Tensor:
    trace = poutine.trace(guide).get_trace(X)
    z, q = trace.nodes["z"]["value"], trace.nodes["z"]["fn"]
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - q.log_prob(z)


@pytest.mark.usefixtures("_float64")
@most_guides
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_particles_are_averaged(Guide: Any, Elbo: Any) -> None:
    guide = build(Guide, normals)
    guide.setup(X)
    pyro.set_rng_seed(3)
    loss = Elbo(num_particles=3).loss(normals, guide, X)
    pyro.set_rng_seed(3)
    assert -loss == pytest.approx(sum(elbo_by_hand(normals, guide, X) for _ in range(3)) / 3, rel=1e-8)


@pytest.mark.parametrize("Guide", REFINING)
def test_elbo_module_with_a_torch_optimizer(Guide: Any) -> None:
    x = counts(8)
    guide = build(Guide, topics)
    guide.setup(x)
    elbo = Trace_ELBO(num_particles=2)(topics, guide)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.002)
    for _ in range(3):
        optimizer.zero_grad()
        loss = elbo(x)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    without = [name for name, parameter in elbo.named_parameters() if parameter.grad is None]
    assert not without


@most_guides
def test_learning_rate_schedules(Guide: Any) -> None:
    scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.1})
    guide = build(Guide, normals)
    steps = SVI(normals, guide, scheduler, Trace_ELBO())
    for _ in range(2):
        assert torch.tensor(steps.step(X)).isfinite()
        scheduler.step()


# 6. Precision and devices


@every_family
def test_moved_to_double_precision(Guide: Any, family: str) -> None:
    guide = build(Guide, topics_in(torch.float32), family=family)
    guide.setup(counts(6))
    guide.to(torch.float64)
    guide.model = topics_in(torch.float64)
    x = counts(6).double()
    assert {value.dtype for value in guide.state_dict().values() if value.is_floating_point()} == {torch.float64}
    values = {**guide(x), **guide.median(x), **flat(guide, x)}
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert torch.tensor(svi(guide.model, guide, lr=0.001).step(x)).isfinite()


def flat(guide: Any, x: Tensor) -> dict[str, Tensor]:
    """What is known of the flat latents, of guides where they depend on nothing but the data."""
    if isinstance(guide, DiscreteAmortizedGuide):
        return {}
    return {"phi": guide.variational_parameters(x), "flat": guide.posterior(x).sample()}


def topics_in(dtype: torch.dtype) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("topics", 3):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=dtype), 1.0))
        with pyro.plate("data", len(x)):
            size = pyro.sample("size", dist.LogNormal(torch.tensor(0.5, dtype=dtype), 0.7))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=dtype)))
            pyro.sample("x", dist.Poisson(size * (share * rate.unsqueeze(-2)).sum(-1)), obs=x)

    return model


@every_family
def test_double_precision_model_under_single_precision_default(Guide: Any, family: str) -> None:
    model, x = topics_in(torch.float64), counts(6).double()
    guide = build(Guide, model, family=family)
    assert torch.tensor(svi(model, guide, lr=0.001).step(x)).isfinite()
    values = {**guide(x), **guide.median(x), **flat(guide, x)}
    assert {value.dtype for value in values.values()} == {torch.float64}


@pytest.mark.thinned
@most_guides
@pytest.mark.parametrize("setup", [False, True])
def test_single_precision_state_in_a_double_precision_guide(Guide: Any, setup: bool) -> None:
    x = counts(6)
    guide = build(Guide, topics_in(torch.float32))
    guide.setup(x)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    pyro.clear_param_store()
    other = build(Guide, topics_in(torch.float64))
    if setup:
        other.setup(x.double())
    other.load_state_dict(torch.load(file, weights_only=True))
    median = other.median(x.double())
    assert median["size"].dtype == torch.float64
    if Guide in ONE_SHOT:
        torch.testing.assert_close(median["size"].float(), guide.median(x)["size"])


def held(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Every tensor, device and text that an object holds in itself, in containers or in objects of this package."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | torch.device | str):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from held(child, f"{path}.{key}", seen)
    elif isinstance(value, list | tuple | set):
        for i, child in enumerate(value):
            yield from held(child, f"{path}.{i}", seen)
    elif type(value).__module__.split(".")[0] in ("pyro_amortized", "torch") and hasattr(value, "__dict__"):
        yield from held(vars(value), path, seen)


@every_family
def test_nothing_remembers_precision_or_device(Guide: Any, family: str) -> None:
    """After a move every tensor of the guide has moved; call keys of structures seen before may name devices."""
    x = counts(6)
    guide = build(Guide, topics, family=family)
    svi(topics, guide, lr=0.001).step(x)
    guide.median(x)
    guide.to(torch.float64)
    state = {k: v for k, v in vars(guide).items() if k not in ("_structures", "_modes", "_graphs", "global_guide")}
    modules = {name: module for name, module in state["_modules"].items() if name != "global_guide"}
    for path, value in held({**state, "_modules": modules}, "", set()):
        if isinstance(value, Tensor):
            assert not (value.is_floating_point() and value.dtype == torch.float32), path
        else:
            assert not isinstance(value, torch.device), path
            assert value not in ("cpu", "cuda", "meta"), path


@every_guide
def test_moves_to_the_meta_device(Guide: Any) -> None:
    guide = build(Guide, topics)
    guide.setup(counts(6))
    guide.to("meta")
    assert {value.device.type for value in guide.state_dict().values()} == {"meta"}
    for path, value in held(vars(guide)["_modules"]["inference"], "", set()):
        assert not isinstance(value, Tensor) or value.device.type == "meta", path


# 7. Pyro's other tools


@most_guides
def test_inspection(Guide: Any) -> None:
    x = counts(6)
    guide = build(Guide, topics)
    guide.setup(x)
    relations = get_model_relations(guide, (x,))
    assert {"rate", "size", "share"} <= set(relations["sample_sample"])
    assert relations["plate_sample"]["data"] == ["size", "share"]
    dependencies = get_dependencies(guide, (x,))["prior_dependencies"]
    assert {"rate", "size", "share"} <= set(dependencies)
    assert "size" in poutine.trace(guide).get_trace(x).format_shapes()


@every_guide
def test_spherical_support_is_refused(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ProjectedNormal(torch.ones(2)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    with pytest.raises(ValueError, match=r"(?s)'z'.*ProjectedNormalReparam"):
        build(Guide, model)(X)


@most_guides
def test_frozen_parameters_stay(Guide: Any) -> None:
    guide = build(Guide, normals)
    guide.setup(X)
    guide.requires_grad_(False).train(False)
    before = copy.deepcopy(guide.state_dict())
    loss = Trace_ELBO().differentiable_loss(normals, guide, X)
    assert torch.isfinite(torch.as_tensor(loss))
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
