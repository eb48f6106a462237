"""What Pyro's own tests ask of an autoguide, asked of every guide: sites, starting points, losses and precision."""

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
from elbos_by_hand import elbo_by_hand
from host_conventions import ONE_SHOT, X, assert_loss, build, centred, every_guide, most_guides
from models import counts, topics
from plain_guides import normals, svi
from pyro import poutine
from pyro.infer import (
    CSIS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
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
from torch import Tensor

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal", "flow"]
REFINING = [SemiAmortizedGuide, IterativeAmortizedGuide]
every_family = pytest.mark.parametrize(
    ("Guide", "family"),
    [
        *((Guide, family) for Guide in ONE_SHOT for family in FAMILIES),
        *((Guide, "normal") for Guide in (SemiAmortizedGuide, DiscreteAmortizedGuide)),
        pytest.param(IterativeAmortizedGuide, "normal", marks=pytest.mark.slow),
    ],
)


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


# 3. Other ELBOs and training loops

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


# 4. Precision and devices


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


# 5. Pyro's other tools


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
