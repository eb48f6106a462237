import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, chains, counts, topics, uniform_bounds
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoCallable, AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule
from pyro.poutine import runtime
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from pyro_amortized import (
    AmortizedGuide,
    IterativeAmortizedGuide,
    MLPEncoder,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal"]
GUIDES = [AmortizedGuide, PerDatapointGuide]
SIZE = 10
INDEX = torch.tensor([7, 2, 4])


def normals(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsampled_normals(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def svi(model: Any, guide: Any, elbo: Any = None, lr: float = 0.01) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())


class Recorder(nn.Module):
    """An encoder that keeps what it is given and returns the features or pair of another function."""

    def __init__(self, function: Callable[..., Any] = lambda *inputs: inputs[0].reshape(len(inputs[0]), -1)) -> None:
        super().__init__()
        self.function = function
        self.inputs: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Tensor) -> Any:
        self.inputs.append(inputs)
        return self.function(*inputs)


class Counted:
    """A model that counts its runs."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.calls: list[None] = []  # not a number, which might be one that decides the model's structure

    def __call__(self, *args: Any) -> Any:
        self.calls.append(None)
        return self.model(*args)


# 1. With the exact posterior, the ELBO is the log evidence, whatever the noise.


def exact_phi(linear: LinearGaussian, x: Tensor) -> Tensor:
    """The exact posterior as parameters of the full-rank family."""
    q = linear.posterior(x)
    scale = q.scale_tril.diagonal(dim1=-1, dim2=-2)
    rows, columns = torch.tril_indices(q.event_shape[0], q.event_shape[0], -1)
    return torch.cat([q.loc, scale.log(), (q.scale_tril / scale.unsqueeze(-1))[..., rows, columns]], -1)


def exact_guide(
    linear: LinearGaussian, model: Any, args: Any, x: Tensor, kind: str, error: float = 0.0, **options: Any
) -> Any:
    """A guide at the exact posterior, with its log scales off by ``error``, put in by encoder, head or table."""
    latents = linear.weights.shape[1]
    wrong = torch.zeros(2 * latents + latents * (latents - 1) // 2)
    wrong[latents : 2 * latents] = error

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        q = linear.posterior(x)
        return q.loc, q.stddev * wrong[latents : 2 * latents].exp()

    if kind == "pair":
        guide: Any = AmortizedGuide(model, Recorder(pair), plate="data", **options)
        guide.setup(*args)
    elif kind == "head":
        encoder = Recorder(lambda x: exact_phi(linear, x) + wrong)
        guide = AmortizedGuide(model, encoder, plate="data", family="multivariate_normal", **options)
        guide.setup(*args)
        head = guide.inference.head
        head.weight.data = torch.eye(*head.weight.shape) * head.size
        nn.init.zeros_(head.bias)
    else:
        guide = PerDatapointGuide(model, plate="data", family="multivariate_normal", **options)
        guide.setup(*args)
        guide.inference.table.data.copy_(exact_phi(linear, x) + wrong)
    return guide


def oracle_errors(plates: str, kind: str, elbo: Any, error: float = 0.0) -> list[float]:
    """-loss minus N/B times the batch's log evidence, one difference per seed."""
    linear = LinearGaussian.random_weights(orthogonal=kind == "pair")
    x = linear.simulate(SIZE)
    args = {"explicit": (x, INDEX), "columns": (x.T.contiguous(),)}.get(plates, (x,))
    model = getattr(linear, plates)
    guide = exact_guide(linear, model, args, x, kind, error)
    indices: list[Tensor | None] = []
    guide.inference.register_forward_pre_hook(lambda module, inputs: indices.append(inputs[1]))
    elbo.loss(model, guide, *args)  # lets the ELBO count the plates
    errors = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        indices.clear()
        loss = elbo.loss(model, guide, *args)
        batches = [x if index is None else x[index] for index in indices]
        expected = [SIZE / len(batch) * linear.log_evidence(batch).sum().item() for batch in batches]
        errors.append(-loss - sum(expected) / len(expected))
        assert {len(batch) for batch in batches} == {{"explicit": 3, "random": linear.batch_size}.get(plates, SIZE)}
    return errors


PLATES = ["full", "explicit", "random", "unsized", "rows", "columns"]


@pytest.mark.thinned
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("kind", ["pair", "head", "table"])
@pytest.mark.parametrize("plates", PLATES)
def test_exact_posterior_gives_log_evidence(plates: str, kind: str, Elbo: Any, vectorized: bool) -> None:
    elbo = Elbo(num_particles=3, vectorize_particles=vectorized)
    assert max(map(abs, oracle_errors(plates, kind, elbo))) < 1e-10


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["pair", "head", "table"])
@pytest.mark.parametrize("plates", PLATES[:3])
def test_wrong_posterior_does_not_give_log_evidence(plates: str, kind: str) -> None:
    errors = oracle_errors(plates, kind, Trace_ELBO(num_particles=3), error=0.1)
    assert min(map(abs, errors)) > 1e-3


@pytest.mark.usefixtures("_float64")
def test_exact_posterior_gives_log_evidence_on_constrained_sites() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    x = torch.tensor([-1.0, 0.3, 2.0])
    expected = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum().item()
    for factor, fails in ((1.0, False), (1.1, True)):
        encoder = Recorder(lambda x, factor=factor: (x[:, None] / 2, torch.full((len(x), 1), 0.5**0.5 * factor)))
        guide = AmortizedGuide(model, encoder)
        error = abs(-Trace_ELBO().loss(model, guide, x) - expected)
        assert (error > 1e-10) == fails


# 2. Any batch size in any call.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("explicit", [False, True])
def test_any_batch_size_in_any_call(family: str, Elbo: Any, explicit: bool) -> None:
    linear = LinearGaussian.random_weights()
    model = linear.explicit if explicit else linear.full
    x = linear.simulate(16)
    guide = AmortizedGuide(model, family=family)
    steps = svi(model, guide, Elbo())
    for size in (8, 8, 3, 16, 1):
        args = (x, torch.arange(16).flip(0)[:size]) if explicit else (x[:size],)
        assert torch.tensor(steps.step(*args)).isfinite()
        phi = guide.variational_parameters(*args)
        assert phi.shape == (size, guide.family.num_params)
        assert guide(*args)["z"].shape == guide.median(*args)["z"].shape == (size, 3)
        batch = x[args[1]] if explicit else x[:size]
        everything = guide.variational_parameters(x, torch.arange(16)) if explicit else guide.variational_parameters(x)
        torch.testing.assert_close(phi, everything[[x.eq(row).all(-1).nonzero().item() for row in batch]])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["pair", "head"])
def test_exact_for_every_batch_size(kind: str) -> None:
    linear = LinearGaussian.random_weights(orthogonal=kind == "pair")
    x = linear.simulate(SIZE)
    guide = exact_guide(linear, linear.full, (x[:4],), x, kind)
    sizes = exact_guide(linear, linear.explicit, (x, INDEX), x, kind, name="explicit")
    for size in (4, 2, SIZE, 1):
        batch = linear.log_evidence(x[:size]).sum().item()
        assert -Trace_ELBO().loss(linear.full, guide, x[:size]) == pytest.approx(batch, abs=1e-10)
        loss = Trace_ELBO().loss(linear.explicit, sizes, x, torch.arange(size))
        assert -loss == pytest.approx(SIZE / size * batch, abs=1e-10)


# 3. Every ELBO.

ELBOS: list[Callable[..., Any]] = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO]


@pytest.mark.thinned
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("Elbo", ELBOS)
def test_every_elbo_trains(Elbo: Any, vectorized: bool, Guide: Any, family: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(12)
    options = {"strict_enumeration_warning": False} if Elbo is TraceEnum_ELBO else {}
    elbo = Elbo(num_particles=2, vectorize_particles=vectorized, **options)
    guide = Guide(linear.full, family=family)
    steps = svi(linear.full, guide, elbo, lr=0.05 if Guide is PerDatapointGuide else 0.005)
    losses = torch.tensor([steps.step(x) for _ in range(15)])
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    assert steps.evaluate_loss(x) < losses[:5].mean()


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_elbo_module_trains_with_torch_optim(Guide: Any, family: str) -> None:
    x = counts(12)
    guide = Guide(topics, family=family)
    loss_fn = Trace_ELBO(num_particles=4)(topics, guide)
    loss_fn(x)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.02 if Guide is PerDatapointGuide else 0.002)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    names = [name for name, _ in loss_fn.named_parameters()]
    assert all(parameter.grad is not None for parameter in loss_fn.parameters()), names
    assert any("global_guide" in name for name in names)
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("Guide", GUIDES)
def test_predictive(Guide: Any, family: str, parallel: bool) -> None:
    x = counts(6)
    guide = Guide(topics, family=family)
    guide(x)
    samples = Predictive(topics, guide=guide, num_samples=5, parallel=parallel)(x)
    assert samples["rate"].reshape(5, 3).isfinite().all()
    assert samples["size"].shape[-1] == 6
    assert samples["share"].reshape(5, 6, 3).sum(-1).sub(1).abs().max() < 1e-5
    draws = samples["size"].reshape(5, 6)
    assert draws.std(0).min() > 0


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_simulates_new_data(parallel: bool) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("new", dist.Normal(z, 1.0), infer={})
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    blocked = poutine.block(model, hide=["new"])
    guide = AmortizedGuide(blocked)
    guide(torch.randn(6))
    predictive = Predictive(model, guide=guide, num_samples=4, return_sites=["new"], parallel=parallel)
    assert predictive(torch.randn(6))["new"].reshape(4, -1).shape == (4, 6)


# 4. Global and local latents together, constrained ones too.


def elbo_gap(guide: Any, model: Any, args: Any, repeats: int = 40, particles: int = 200) -> float:
    """TraceMeanField_ELBO's mean loss minus Trace_ELBO's, in its Monte Carlo standard errors."""
    losses = torch.empty(2, repeats)
    for i, Elbo in enumerate((Trace_ELBO, TraceMeanField_ELBO)):
        elbo = Elbo(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
        losses[i] = torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)])
    mean, variance = losses.mean(1), losses.var(1) / repeats
    return ((mean[1] - mean[0]) / variance.sum().sqrt()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_field_elbo_agrees_in_expectation(family: str) -> None:
    x = counts(6)
    guide = AmortizedGuide(topics, family=family, init_scale=0.3)
    guide(x)
    assert abs(elbo_gap(guide, topics, (x,))) < 4


def test_mean_field_elbo_of_autoguide_disagrees() -> None:
    x = counts(6)
    guide = AutoDiagonalNormal(topics, init_scale=0.3)
    guide(x)
    assert abs(elbo_gap(guide, topics, (x,), repeats=10)) > 20


@pytest.mark.parametrize("global_guide", [AutoDelta, AutoDiagonalNormal])
def test_other_global_guides_train(global_guide: Any) -> None:
    x = counts(12)
    guide = AmortizedGuide(topics, global_guide=global_guide)
    steps = svi(topics, guide, lr=0.002)
    losses = [steps.step(x) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert guide.median(x)["rate"].shape == (3,)


@pytest.mark.parametrize("Guide", GUIDES)
def test_global_latents_alone(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.full((50,), 2.0)
    guide = Guide(model)
    steps = svi(model, guide, TraceMeanField_ELBO(), lr=0.05)
    for _ in range(300):
        steps.step(x)
    assert guide.median(x)["loc"].item() == pytest.approx(100 / 51, abs=0.1)
    with pytest.raises(ValueError, match="no local latents"):
        guide.posterior(x)


# 5. Saving.


def saved(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def trained(Guide: Any, family: str, x: Tensor) -> Any:
    guide = Guide(topics, family=family)
    steps = svi(topics, guide, lr=0.002)
    for _ in range(3):
        steps.step(x)
    return guide


def assert_same(guide: Any, other: Any, x: Tensor) -> None:
    for call in (lambda g: g.median(x), lambda g: g.quantiles([0.1, 0.9], x)):
        mine, theirs = call(guide), call(other)
        assert mine.keys() == theirs.keys() == {"rate", "size", "share"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert list(guide.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize(("Guide", "family"), [*product([AmortizedGuide], FAMILIES), (PerDatapointGuide, "normal")])
@pytest.mark.parametrize("setup", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dict(Guide: Any, family: str, setup: bool, nested: bool) -> None:
    x = counts(12)
    guide = trained(Guide, family, x)
    other = Guide(topics, family=family)
    if setup:
        other.setup(x)
    source, target = (nn.ModuleDict({"guide": g}) if nested else g for g in (guide, other))
    result = target.load_state_dict(saved(source.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(guide, other, x)


@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide, IterativeAmortizedGuide])
@pytest.mark.parametrize("first", ["eval", "load"])
def test_a_loaded_guide_in_evaluation_mode_answers_in_it(Guide: Any, first: str) -> None:
    """Its encoder is built by the first call."""

    def make() -> Any:
        layers = [
            nn.Unflatten(0, (-1, 1)),
            nn.Linear(1, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(8, 4),
        ]
        return Guide(normals, nn.Sequential(*layers))

    guide, other = make(), make()
    for _ in range(5):
        guide(torch.randn(16))
    state = guide.eval().state_dict()
    calls = [other.eval, lambda: other.load_state_dict(state)]
    for call in calls if first == "eval" else reversed(calls):
        call()
    with guide.repeatable(), other.repeatable():
        torch.testing.assert_close(other.median(X), guide.median(X), rtol=1e-3, atol=1e-3)
        assert other.median(X[:1])["z"].shape == (1,)  # too few for batch statistics
    buffers = {name: value for name, value in other.state_dict().items() if "running" in name}
    assert buffers
    assert all(torch.equal(value, state[name]) for name, value in buffers.items())
    assert not any(module.training for module in other.modules())


def test_wrong_state_dict_is_refused() -> None:
    x = counts(12)
    state = trained(AmortizedGuide, "normal", x).state_dict()
    for setup in (False, True):
        other = AmortizedGuide(topics, family="multivariate_normal")
        calls = [lambda other=other: other.load_state_dict(state), lambda other=other: other.setup(x)]
        first, second = reversed(calls) if setup else calls
        first()
        with pytest.raises(ValueError, match="that of another guide: .*of other shapes are"):
            second()


@pytest.mark.parametrize(("Guide", "family"), [*product([AmortizedGuide], FAMILIES), (PerDatapointGuide, "normal")])
@pytest.mark.parametrize(
    "duplicate", [lambda g: saved(g, weights_only=False), lambda g: pickle.loads(pickle.dumps(g)), copy.deepcopy]
)
def test_whole_guide_is_saved_and_copied(Guide: Any, family: str, duplicate: Any) -> None:
    x = counts(12)
    guide = trained(Guide, family, x)
    other = duplicate(guide)
    if duplicate is not copy.deepcopy:
        with pytest.raises(ValueError, match="guide.model = model"):
            other.median(x)
        other.model = topics
    assert_same(guide, other, x)
    before = {name: value.clone() for name, value in other.median(x).items()}
    steps = svi(topics, guide, lr=0.002)
    assert all(torch.tensor(steps.step(x)).isfinite() for _ in range(2))  # the original goes on, on its own
    assert all(torch.equal(value, other.median(x)[name]) for name, value in before.items())
    assert not torch.equal(guide.median(x)["size"], before["size"])
    new = torch.cat([x, counts(5)])
    pyro.clear_param_store()
    steps = svi(topics, other, lr=0.002)
    steps.step(x)
    assert other.median(x)["rate"].shape == (3,)
    if Guide is AmortizedGuide:
        assert torch.tensor(steps.step(new)).isfinite()
        assert other.median(new)["size"].shape == (17,)


# 6. What is known of the posterior.


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_supports(Guide: Any, family: str) -> None:
    x = counts(7)
    guide = Guide(topics, family=family, init_scale=0.5)
    phi, posterior = guide.variational_parameters(x), guide.posterior(x)
    assert phi.shape == (7, guide.family.num_params)
    assert (posterior.batch_shape, posterior.event_shape) == ((7,), (3,))
    for values, sample_shape in ((guide.median(x), ()), (guide.quantiles([0.1, 0.5, 0.9], x), (3,)), (guide(x), ())):
        assert {name: value.shape for name, value in values.items()} == {
            "rate": (*sample_shape, 3),
            "size": (*sample_shape, 7),
            "share": (*sample_shape, 7, 3),
        }
        assert (values["rate"] > 0).all()
        assert (values["size"] > 0).all()
        torch.testing.assert_close(values["share"].sum(-1), torch.ones(*sample_shape, 7))
    quantiles = guide.quantiles([0.1, 0.5, 0.9], x)
    for name in ("rate", "size"):
        assert (quantiles[name].diff(dim=0) > 0).all()
        torch.testing.assert_close(quantiles[name][1], guide.median(x)[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles_agree_with_draws(family: str) -> None:
    x, draws, probs = counts(4), 4000, torch.tensor([0.1, 0.5, 0.8])
    guide = AmortizedGuide(topics, family=family, init_scale=0.5)
    quantiles = guide.quantiles(probs, x)
    with pyro.plate("draws", draws, dim=-2), torch.no_grad():
        samples = guide(x)
    for name in ("rate", "size"):
        share = (samples[name] < quantiles[name].unsqueeze(1)).float().mean(1)
        error = (share - probs.unsqueeze(-1)) / (probs * (1 - probs) / draws).sqrt().unsqueeze(-1)
        assert error.abs().max() < 4.5  # standard errors
        wrong = (samples[name] < 1.1 * quantiles[name].unsqueeze(1)).float().mean(1)
        assert ((wrong - probs.unsqueeze(-1)) / (probs * (1 - probs) / draws).sqrt().unsqueeze(-1)).abs().max() > 4.5


@pytest.mark.parametrize("family", FAMILIES)
def test_guide_samples_from_its_posterior(family: str) -> None:
    x = LinearGaussian.random_weights().simulate(4)
    model = LinearGaussian.random_weights().full
    guide = AmortizedGuide(model, family=family)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    site = "z" if family == "normal" else "AmortizedGuide_latent"
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(trace.nodes[site]["log_prob"], guide.posterior(x).log_prob(z))
    assert trace.nodes["z"]["infer"].get("is_auxiliary") is None
    assert site == "z" or trace.nodes[site]["infer"]["is_auxiliary"]


@pytest.mark.parametrize("sparse", [False, True])
def test_only_rows_of_the_batch_receive_gradient(sparse: bool) -> None:
    x = torch.randn(SIZE)
    guide = PerDatapointGuide(subsampled_normals, sparse=sparse)
    Trace_ELBO().differentiable_loss(subsampled_normals, guide, x, INDEX).backward()
    grad = guide.inference.table.grad
    assert grad.is_sparse == sparse
    rows = grad.to_dense().abs().sum(-1).nonzero().squeeze(-1)
    assert rows.tolist() == sorted(INDEX.tolist())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's own Adagrad
def test_sparse_gradients_equal_dense_ones() -> None:
    x = torch.randn(SIZE)
    guides = [PerDatapointGuide(subsampled_normals, sparse=sparse, name=f"sparse_{sparse}") for sparse in (False, True)]
    steps = [SVI(subsampled_normals, g, pyro.optim.Adagrad({"lr": 0.1}), Trace_ELBO()) for g in guides]
    start = None
    for seed in range(6):
        index = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))[:4]
        for s in steps:
            pyro.set_rng_seed(seed)
            s.step(x, index)
        dense, sparse = (g.inference.table.detach() for g in guides)
        torch.testing.assert_close(dense, sparse)
        start = dense.clone() if start is None else start
    assert not torch.allclose(start, dense)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_table_without_subsampling(sparse: bool) -> None:
    x = torch.full((6,), 2.0)
    guide = PerDatapointGuide(normals, sparse=sparse)
    steps = SVI(normals, guide, pyro.optim.Adagrad({"lr": 0.3}), TraceMeanField_ELBO(num_particles=8))
    for _ in range(60):
        steps.step(x)
    torch.testing.assert_close(guide.median(x)["z"], torch.ones(6), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("Optim", [pyro.optim.Adam, pyro.optim.ClippedAdam, pyro.optim.RMSprop])
def test_dense_table_takes_any_optimizer(Optim: Any) -> None:
    x = torch.full((6,), 2.0)
    guide = PerDatapointGuide(subsampled_normals)
    steps = SVI(subsampled_normals, guide, Optim({"lr": 0.05}), Trace_ELBO(num_particles=8))
    for _ in range(20):
        steps.step(x, torch.tensor([0, 1, 2]))
    median = guide.median(x, torch.arange(6))["z"]
    assert (median[:3] > 0.3).all()
    assert (guide.variational_parameters(x, torch.tensor([3]))[0, 1] - torch.tensor(0.1).log()).abs() < 1e-6


@pytest.mark.parametrize("size", [5, 11])
def test_table_knows_no_unseen_datapoints(size: int) -> None:
    guide = PerDatapointGuide(normals)
    guide(torch.randn(SIZE))
    for call in (guide, guide.median, guide.posterior, guide.variational_parameters):
        with pytest.raises(ValueError, match=f"now has {size} .*set up with {SIZE}.*AmortizedGuide"):
            call(torch.randn(size))


# 7. Errors.


def with_nan(size: int = 4) -> Tensor:
    return torch.randn(size).index_fill(0, torch.tensor([1]), float("nan"))


def two_plates(x: Tensor, y: Tensor) -> None:
    with pyro.plate("xs", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    with pyro.plate("ys", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def latent_plate(x: Tensor) -> None:
    with pyro.plate("latents", 3):
        pyro.sample("w", dist.Normal(0.0, 1.0))
    normals(x)


def optional(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def longer(x: Tensor, steps: int) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(steps):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def more_globals(x: Tensor, extra: bool) -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    if extra:
        pyro.sample("b", dist.Normal(0.0, 1.0))
    normals(x)


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def sequential(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


X = torch.linspace(-1.0, 1.0, 4)


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("model", "options", "args", "match"),
    [
        (normals, {}, (with_nan(),), r"Cannot infer .*site 'x' holds 1 NaN values \(first rows: \[1\]\)"),
        (normals, {"plate": "rows"}, (X,), r"no plate of that name; try one of \['data'\]"),
        (latent_plate, {"plate": "latents"}, (X,), r"'latents' as the datapoint plate because no observed site"),
        (two_plates, {}, (X, X), r"several plates hold observed sites: \['xs', 'ys'\].*plate="),
        (normals, {}, (X[:0],), r"Cannot run the model on an empty batch"),
        (discrete, {}, (X,), r"discrete.*'k'|'k'.*discrete"),
        (sequential, {}, (X,), r"site 'z_0' .*sequential plate 'data'.*pyro.plate"),
        (normals, {"family": Normal(3)}, (X,), r"Normal\(latent_dim=3\).*1 unconstrained dimensions.*latent_dim=1"),
        (normals, {"family": lambda dim: None}, (X,), r"gave a NoneType"),
    ],
)
def test_models_that_no_guide_can_serve(Guide: Any, model: Any, options: Any, args: Any, match: str) -> None:
    guide = Guide(model, **options)
    with pytest.raises(ValueError, match=match):
        guide(*args)


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"family": "norml"}, r"Cannot use family 'norml'.*'multivariate_normal', 'normal'"),
        ({"family": 3}, r"neither a name nor a VariationalFamily"),
        ({"init_scale": 0.0}, r"init_scale=0.0 .*positive"),
        ({"init_scale": -1.0}, r"init_scale=-1.0 .*positive"),
    ],
)
def test_options_that_cannot_work(Guide: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Guide(normals, **options)
    with pytest.raises(ValueError, match="not callable"):
        Guide(3)


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("model", "first", "second", "match"),
    [
        (optional, (X, X), (X,), r"sites \['y'\] are latent in this call and were observed"),
        (optional, (X,), (X, X), r"site 'y' is no longer a latent site of plate 'data'"),
        (longer, (X, 2), (X, 3), r"site 'z_2' has become a latent site"),
        (longer, (X, 2), (X, 1), r"site 'z_1' is no longer a latent site"),
        (more_globals, (X, False), (X, True), r"global latent sites \['b'\] have appeared or disappeared"),
        (normals, (X,), (X[:0],), r"Cannot run the model on an empty batch"),
    ],
)
def test_structures_that_change(Guide: Any, model: Any, first: Any, second: Any, match: str) -> None:
    guide = Guide(model)
    steps = svi(model, guide)
    steps.step(*first)
    with pytest.raises(ValueError, match=match):
        steps.step(*second)
    steps.step(*first)


@pytest.mark.parametrize(
    ("encoder", "options", "match"),
    [
        (Recorder(lambda x: x.sum().reshape(1, 1)), {}, r"4 datapoints of plate 'data'.*shape \(1, 1\)"),
        (Recorder(lambda x: x), {}, r"features of shape \(4,\)"),
        (
            Recorder(lambda x: (x[:, None], x[:, None].exp())),
            {"family": "multivariate_normal"},
            r'family="normal" \(this guide has MultivariateNormal\)',
        ),
        (Recorder(lambda x: (x, x.exp())), {}, r"must have shapes \(4, 1\)"),
        (None, {"encoder_input": "y"}, r"encoder_input='y' .*no argument of that name; try one of \['x'\]"),
        (None, {"encoder_input": ["x", "y"]}, r"encoder_input='y'"),
        (MLPEncoder(3), {}, r"1 features .*built for 3"),
    ],
)
def test_encoders_that_do_not_fit(encoder: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AmortizedGuide(normals, encoder, **options)(X)


@pytest.mark.parametrize("encoder", [MLPEncoder, lambda x: x, "mlp"])
def test_encoder_that_is_no_module(encoder: Any) -> None:
    with pytest.raises(ValueError, match="not a torch.nn.Module instance"):
        AmortizedGuide(normals, encoder)


def test_encoder_whose_batch_size_goes_wrong_later() -> None:
    guide = AmortizedGuide(normals, Recorder(lambda x: torch.ones(4, 2)))
    guide(X)
    with pytest.raises(ValueError, match=r"2 datapoints in plate 'data'.*\(4, 2\) and not \(2, 2\)"):
        guide(X[:2])


def test_nan_in_later_batches() -> None:
    guide = AmortizedGuide(normals)
    guide(X)
    with pytest.raises(ValueError, match=r"1 datapoints \(first: \[1\]\).*input number 0 holds NaN"):
        guide(with_nan())


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "structured", "flow"])
def test_diverged_parameters(family: str) -> None:
    guide = AmortizedGuide(normals, family=family)
    guide(X)
    nn.init.constant_(guide.inference.head.bias, float("nan"))
    with pytest.raises(ValueError, match="have diverged.*learning rate"):
        guide(X)


def test_masked_nan_is_allowed_where_it_is_filled_in() -> None:
    def bare(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()), obs=x)

    with pytest.raises(ValueError, match="'x' holds 1 NaN values.*nan_to_num"):
        AmortizedGuide(bare)(with_nan())

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()), obs=x.nan_to_num())

    guide = AmortizedGuide(model)
    assert torch.tensor(svi(model, guide).step(with_nan())).isfinite()


@pytest.mark.parametrize("Guide", GUIDES)
def test_a_flag_of_the_model_is_part_of_its_structure(Guide: Any) -> None:
    class Supervised(nn.Module):
        observed = False

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=x if self.observed else None)
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = Supervised()
    model.observed = False
    guide = Guide(model)
    guide(X)
    model.observed = True
    with pytest.raises(ValueError, match="site 'y' is no longer a latent site"):
        guide(X)


def test_bounds_that_depend_on_other_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Uniform(0.0, high))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'z' because its support depends on other latents"):
        AmortizedGuide(model)(X)


def test_all_indices_given_in_another_order() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=len(index), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = PerDatapointGuide(model)
    index = torch.arange(len(X)).flip(0)
    guide.setup(X, index)
    nn.init.normal_(guide.inference.table)
    assert torch.equal(guide.median(X, index)["z"], guide.inference.table[:, 0].flip(0))


@pytest.mark.parametrize("Guide", GUIDES)
def test_two_guides_of_one_name(Guide: Any) -> None:
    svi(normals, Guide(normals)).step(X)
    with pytest.raises(ValueError, match="already holds other parameters.*name="):
        svi(normals, Guide(normals)).step(X)
    svi(normals, Guide(normals, name="other")).step(X)


# 8. What the encoder sees, and how often anything runs.


def covariates(x: Tensor, label: Tensor, index: Tensor | None = None, *, scale: float = 1.0) -> None:
    with pyro.plate("data", len(x), subsample=index):
        x, label = (pyro.subsample(value, event_dim=value.dim() - 1) for value in (x, label))
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)
        pyro.sample("label", dist.Normal(z, 1.0), obs=label)


def both(x: Tensor, label: Tensor, index: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    return pyro.subsample(label, event_dim=0), 2 * pyro.subsample(x, event_dim=1)


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("index", [None, INDEX])
@pytest.mark.parametrize(
    ("encoder_input", "expected"),
    [
        (None, lambda x, label: (x, label)),
        ("x", lambda x, label: (x,)),
        ("label", lambda x, label: (label,)),
        (["label", "x"], lambda x, label: (label, x)),
        (both, lambda x, label: (label, 2 * x)),
        (lambda x, label, index, **_: pyro.subsample(x, event_dim=1), lambda x, label: (x,)),
    ],
)
def test_encoder_sees_exactly(encoder_input: Any, expected: Any, index: Any, keywords: bool) -> None:
    x, label = torch.randn(SIZE, 2), torch.randn(SIZE)
    encoder = Recorder()
    guide = AmortizedGuide(covariates, encoder, encoder_input=encoder_input)
    args, kwargs = ((), {"x": x, "label": label, "index": index}) if keywords else ((x, label, index), {})
    rows = slice(None) if index is None else index
    for _ in range(2):
        guide(*args, **kwargs)
        for seen, value in zip(encoder.inputs[-1], expected(x[rows], label[rows]), strict=True):
            assert torch.equal(seen, value)
    guide.median(*args, **kwargs)
    assert torch.equal(encoder.inputs[-1][0], encoder.inputs[0][0])


@pytest.mark.parametrize(("plates", "transpose"), [("columns", True), ("rows", False), ("unsized", False)])
def test_encoder_sees_datapoints_first(plates: str, transpose: bool) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(SIZE)
    encoder = Recorder()
    guide = AmortizedGuide(getattr(linear, plates), encoder, plate="data")
    for size in (SIZE, SIZE, 3):
        guide(x[:size].T.contiguous() if transpose else x[:size])
        assert torch.equal(encoder.inputs[-1][0], x[:size])


def test_encoder_sees_the_random_subsample_of_the_model() -> None:
    linear = LinearGaussian.random_weights()
    x, encoder = linear.simulate(SIZE), Recorder()
    guide = AmortizedGuide(linear.random, encoder)
    batches = set()
    for _ in range(5):
        trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(linear.random, trace)).get_trace(x)
        index = trace.nodes["data"]["value"]
        assert torch.equal(model_trace.nodes["data"]["value"], index)
        assert torch.equal(encoder.inputs[-1][0], x[index])
        batches.add(tuple(index.tolist()))
    assert len(batches) > 1


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("model", "args"),
    [(normals, (X,)), (topics, (counts(6),)), (LinearGaussian.random_weights().rows, (torch.randn(6, 4),))],
)
def test_one_look_and_one_encoder_pass_per_step(Guide: Any, model: Any, args: Any) -> None:
    """The ELBO runs the model once; the look is spared in the fourth step where the user says what is encoded."""
    for promise in [False, True] if Guide is AmortizedGuide else [False]:
        pyro.clear_param_store()
        counted, encoder = Counted(model), Recorder()
        options = {"encoder": encoder} if Guide is AmortizedGuide else {}
        options |= {"encoder_input": lambda x: x} if promise else {}
        steps = svi(counted, Guide(counted, plate="data", **options))
        for _ in range(3):
            steps.step(*args)
        counted.calls.clear()
        encoder.inputs.clear()
        steps.step(*(torch.ones_like(arg) for arg in args))
        assert len(counted.calls) == (1 if promise else 2)
        assert len(encoder.inputs) == (Guide is AmortizedGuide)


def test_structure_that_depends_on_values_is_looked_at_in_every_call() -> None:
    x, counted = torch.randn(5, 4), Counted(chains)
    guide = AmortizedGuide(counted)
    steps = svi(counted, guide)
    for lengths in ([2, 1, 3, 1, 1], [3, 3, 1, 2, 1], [3, 2, 1, 2, 1]):
        counted.calls.clear()
        steps.step(x, torch.tensor(lengths))
        assert len(counted.calls) >= 2
    for lengths, match in (([4, 1, 1, 1, 1], "'z_3' has become"), ([1, 2, 1, 1, 1], "'z_2' is no longer")):
        with pytest.raises(ValueError, match=match):
            steps.step(x, torch.tensor(lengths))
    assert guide.median(x, torch.tensor([3, 3, 1, 2, 1])).keys() == {"z_0", "z_1", "z_2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_that_depend_on_values_are_followed(family: str) -> None:
    guide = AmortizedGuide(uniform_bounds, family=family)
    steps = svi(uniform_bounds, guide, lr=0.001)
    for low in (0.0, 5.0, -30.0):
        bounds = torch.tensor(low) + torch.arange(4.0)
        assert torch.tensor(steps.step(X, bounds)).isfinite()
        for values in (guide(X, bounds), guide.median(X, bounds), guide.quantiles([0.01, 0.99], X, bounds)):
            assert ((values["z"] > bounds) & (values["z"] < bounds + 2)).all()


def positive_only(x: Tensor) -> None:
    x = x[x > 0]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def repeated(x: Tensor) -> None:
    size = torch.repeat_interleave(x.long().clamp(min=0)).shape[0]
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(size))


@pytest.mark.parametrize("model", [positive_only, repeated])
def test_sizes_that_depend_on_values_are_followed(model: Any) -> None:
    guide = AmortizedGuide(model)
    for x in ([1.0, 0.0, 1.0, -1.0], [1.0, 1.0, 0.0, 1.0], [-1.0, -1.0, 0.0, 1.0]):
        value = torch.tensor(x)
        assert guide(value)["z"].shape == (int(value.clamp(min=0).sum()),)


def test_arguments_that_were_one_tensor_once() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        normals(y)

    encoder, y = Recorder(), torch.randn(4)
    guide = AmortizedGuide(model, encoder)
    for x in (y, X):
        guide(x, y)
        assert torch.equal(encoder.inputs[-1][0], y)


def test_conditioned_model() -> None:
    def model(size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0))

    data = {"x": X}
    conditioned, encoder = pyro.condition(model, data), Recorder()
    guide = AmortizedGuide(conditioned, encoder)
    steps = svi(conditioned, guide)
    for shift in range(3):
        data["x"] = X + shift
        assert torch.tensor(steps.step(4)).isfinite()
        assert [len(inputs) for inputs in encoder.inputs] == [1] * len(encoder.inputs)
        assert torch.equal(encoder.inputs[-1][0], X + shift)


@pytest.mark.parametrize("Guide", GUIDES)
def test_permuted_subsample_of_all_datapoints(Guide: Any) -> None:
    x, order = torch.randn(SIZE), torch.randperm(SIZE)
    guide = Guide(subsampled_normals, init_loc_fn=init_to_value(values={"z": x}))
    straight = guide.variational_parameters(x, torch.arange(SIZE))
    torch.testing.assert_close(guide.variational_parameters(x, order), straight[order])
    if Guide is PerDatapointGuide:
        torch.testing.assert_close(guide.median(x, order)["z"], x[order])


def test_created_plates_are_used() -> None:
    linear, encoder = LinearGaussian.random_weights(), Recorder()
    x = linear.simulate(SIZE)
    guide = AmortizedGuide(
        linear.random, encoder, create_plates=lambda x: pyro.plate("data", len(x), subsample_size=linear.batch_size)
    )
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(x)
        assert torch.equal(encoder.inputs[-1][0], x[trace.nodes["data"]["value"]])
    assert torch.tensor(svi(linear.random, guide).step(x)).isfinite()


def test_in_a_list_with_other_guides() -> None:
    x = counts(6)
    guide = AutoGuideList(topics)
    guide.append(AutoNormal(poutine.block(topics, expose=["rate"])))
    guide.append(AmortizedGuide(poutine.block(topics, hide=["rate"])))
    steps = svi(topics, guide, lr=0.002)
    losses = [steps.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert guide.median(x).keys() == {"rate", "size", "share"}


@pytest.mark.parametrize("vectorized", [False, True])
def test_enumerated_discrete_latents(vectorized: bool) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=x)

    guide = AmortizedGuide(model)
    elbo = TraceEnum_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    steps = svi(model, guide, elbo)
    assert torch.tensor([steps.step(X) for _ in range(5)]).isfinite().all()
    assert guide.median(X).keys() == {"z"}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("Guide", GUIDES)
def test_compiled_by_the_jit(Guide: Any) -> None:
    x = counts(6)
    guide = Guide(topics)
    guide.setup(x)
    steps = svi(topics, guide, JitTrace_ELBO(ignore_jit_warnings=True), lr=0.002)
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()


def test_dropout_of_the_encoder_is_left_alone_by_setup() -> None:
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.BatchNorm1d(1), nn.Dropout(0.5))
    guide = AmortizedGuide(normals, encoder)
    guide.setup(X)
    assert all(module.training for module in encoder.modules())
    assert encoder[1].num_batches_tracked == 0
    guide(X)
    assert encoder[1].num_batches_tracked == 1


# 9. The caller's handlers.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["pair", "head", "table"])
def test_scale_and_mask_around_guide_and_model(kind: str) -> None:
    linear = LinearGaussian.random_weights(orthogonal=kind == "pair")
    x = linear.simulate(SIZE)
    guide = exact_guide(linear, linear.full, (x,), x, kind)
    mask = torch.arange(SIZE) % 3 == 0
    weights = torch.linspace(0.1, 1.0, SIZE)
    evidence = linear.log_evidence(x)
    for handler, expected in (
        (poutine.scale(scale=0.3), 0.3 * evidence.sum()),
        (poutine.scale(scale=weights), (weights * evidence).sum()),
        (poutine.mask(mask=mask), evidence[mask].sum()),
    ):
        for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)):
            with handler:
                loss = elbo.loss(linear.full, guide, x)
            assert -loss == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_guide_inside_particle_plates(family: str, Guide: Any, first: bool) -> None:
    x = counts(6)
    guide = Guide(topics, family=family)
    if not first:
        guide(x)
    with pyro.plate("outer", 2, dim=-3), pyro.plate("inner", 5, dim=-2):
        values = guide(x)
        phi = guide.variational_parameters(x)
        medians = guide.median(x)
    assert phi.shape == (6, guide.family.num_params)
    assert values["rate"].shape == (2, 5, 3)
    assert values["size"].shape == (2, 5, 6)
    assert values["share"].shape == (2, 5, 6, 3)
    assert medians["size"].shape == (6,)
    assert values["size"].flatten(0, 1).std(0).min() > 0


def global_state() -> tuple[Any, ...]:
    return (
        list(runtime._PYRO_STACK),
        list(runtime._DIM_ALLOCATOR._stack),
        list(_get_current_dispatch_mode_stack()),
        torch.overrides._get_current_function_mode_stack(),
        torch.is_grad_enabled(),
        torch.distributions.Distribution._validate_args,
        pyro.infer.util.is_validation_enabled(),
        torch.get_default_dtype(),
    )


def samples(trace: poutine.Trace) -> set[str]:
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {name for name, site in sites.items() if not site["infer"].get("is_auxiliary")}


class Failing:
    def __init__(self, runs: int) -> None:
        self.runs = runs

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            self.runs -= 1
            if self.runs < 0:
                raise KeyError("of the model")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize("method", ["__call__", "setup", "median", "posterior", "variational_parameters"])
@pytest.mark.parametrize("runs", [0, 1, 100])
def test_nothing_leaks_from_a_call(runs: int, method: str, Guide: Any) -> None:
    guide = Guide(Failing(runs))
    for x in (X, X + 1):
        with pyro.plate("particles", 3, dim=-2), poutine.trace() as tracer:
            before = global_state()
            with nullcontext() if runs == 100 else pytest.raises(KeyError, match="of the model"):
                getattr(guide, method)(x)
            assert global_state() == before
        assert samples(tracer.trace) <= ({"data", "z"} if method == "__call__" else set())
    assert runtime._PYRO_STACK == runtime._DIM_ALLOCATOR._stack == []


@pytest.mark.parametrize("Guide", GUIDES)
def test_looking_at_the_posterior_draws_nothing(Guide: Any) -> None:
    x = counts(6)
    guide = Guide(topics)
    guide.setup(x)
    state = torch.get_rng_state()
    first = guide.median(x)
    second = guide.quantiles([0.5], x)
    guide.posterior(x), guide.variational_parameters(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.allclose(first[name], second[name].squeeze(0)) for name in first)


def test_guide_adds_only_latents_to_the_trace() -> None:
    x = counts(6)
    guide = AmortizedGuide(topics)
    for _ in range(2):
        trace = poutine.trace(guide).get_trace(x)
        assert samples(trace) == {"topics", "data", "rate", "size", "share"}


@pytest.mark.parametrize("Guide", GUIDES)
def test_print_shows_what_is_guided_by_what(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + shift, 1.0), obs=x)

    guide = Guide(model)
    assert "model" in str(guide)
    assert "not set up yet" in str(guide)
    guide(X)
    number = sum(p.numel() for p in guide.parameters())
    for line in ("plate: data", "local latents: z (3)", "global latents: shift", "data: x", f"parameters: {number:,}"):
        assert f"  {line}" in str(guide)
    assert ("encoder: MLPEncoder" in str(guide)) == (Guide is not PerDatapointGuide)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x + z, 1.0), obs=y)


def test_infer_is_all_that_a_guide_says() -> None:
    x, y = torch.randn(2, 4)
    guide = AmortizedGuide(regression)
    inferred = guide.infer(x, y)
    phi, family = inferred.local
    assert torch.equal(phi, guide.variational_parameters(x, y))
    assert family is guide.family
    assert [*inferred.global_values] == [*guide.global_sites] == ["w"]
    assert torch.equal(inferred.global_values["w"], guide.global_median(x, y)["w"])
    assert inferred.structure.indices["data"].shape == (4,)
    assert guide.plate == "data"
    assert torch.equal(guide.encoder_inputs(x, y)[0], y)
    draws = torch.stack([guide.sample_globals(x, y)["w"] for _ in range(3)])
    assert len(draws.unique()) == 3


def test_infer_without_local_latents() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = AmortizedGuide(model)
    inferred = guide.infer(torch.randn(3))
    assert inferred.phi is None
    assert "w" in inferred.global_values
    with pytest.raises(ValueError, match=r"no local latents; try guide.global_median"):
        _ = inferred.local
    assert guide.sample_globals(torch.randn(3)).keys() == {"w"}


def test_infer_leaves_the_inference_of_the_caller_alone() -> None:
    guide = AmortizedGuide(normals)
    with poutine.trace() as tracer:
        guide.infer(torch.randn(3))
    assert not tracer.trace.nodes


def test_global_guides_that_return_nothing_can_be_drawn_from() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def global_guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.1)), 0.5))

    guide = AmortizedGuide(model, global_guide=lambda m: AutoCallable(m, global_guide))
    assert guide.infer(torch.randn(3)).global_values.keys() == {"mu"}
    assert guide.sample_globals(torch.randn(3)).keys() == {"mu"}


def test_globals_in_plates_of_a_copy_can_be_drawn() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("K", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu.sum() + z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    guide.setup(torch.randn(3))
    assert copy.deepcopy(guide).sample_globals(torch.randn(3))["mu"].shape == (2,)


def test_variational_parameters_draw_nothing() -> None:
    guide = AmortizedGuide(regression, global_guide=lambda m: AutoCallable(m, lambda x, y: pyro.sample("w", NORMAL)))
    x, y = torch.randn(2, 10)
    guide.setup(x, y)
    state = torch.get_rng_state()
    guide.variational_parameters(x, y)
    assert torch.equal(torch.get_rng_state(), state)


NORMAL = dist.Normal(0.0, 1.0)


def test_a_copy_of_a_guide_that_knows_a_structure_goes_on() -> None:
    guide = AmortizedGuide(normals, encoder_input="x")
    guide.setup(torch.randn(3))
    copied = copy.deepcopy(guide)
    for _ in range(3):
        copied(torch.randn(3))


def test_a_failed_load_leaves_a_guide_that_is_not_set_up() -> None:
    class Plain(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, 1))

    class Extra(Plain):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    x, y = torch.randn(2, 10)
    saved = AmortizedGuide(regression, Extra())
    saved.setup(x, y)
    guide = AmortizedGuide(regression, Plain(), name="other")
    guide.load_state_dict(saved.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="extra_state"):
            guide(x, y)
    assert "not set up yet" in repr(guide)
    assert "not set up yet" in guide._repr_html_()


def test_default_encoders_can_be_made_modules_of_pyro() -> None:
    encoder = PyroModule[MLPEncoder](1, (5,))
    guide = AmortizedGuide(normals, encoder)
    assert guide.variational_parameters(torch.randn(3)).shape == (3, 2)
