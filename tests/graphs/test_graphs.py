"""Traced and compiled refinement: equal numbers, live parameters, and no stale graph."""

import math
import os
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, chains
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    GradientAscent,
    NaturalGradient,
    SemiAmortizedGuide,
    estimate_gaps,
    optimize_local,
)
from pyro_amortized.families import Normal
from pyro_amortized.graphs.cache import GraphCache, Use, _Entry
from pyro_amortized.graphs.recording import record
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Decoded(nn.Module):
    """A model with a network, and numbers and tensors in all the places where people keep them."""

    class_scale = 1.0

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.noise = 1.0
        self.register_buffer("shift", torch.zeros(5))
        self.settings = {"scale": 1.0}
        self.config = SimpleNamespace(scale=1.0)
        self.slotted = Slotted()
        self.array = np.ones(2)
        self.pair = (torch.zeros(5), 1.0)
        self.offset = torch.zeros(5)
        self.levels = deque([1.0])

    @property
    def level(self) -> float:
        return self.levels[-1]

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        width = pyro.param("width", lambda: x.new_ones(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = self.settings["scale"] * self.settings.get("extra", 1.0) * self.config.scale * self.slotted.scale
            scale = scale * self.class_scale * float(self.array[0]) * self.pair[1]
            scale = scale * float(os.environ.get("SCALE", "1.0")) * (1.0 if self.training else 0.5) * self.level
            loc = self.decoder(z) * scale + self.shift + self.offset + self.pair[0]
            pyro.sample("x", dist.Normal(loc, self.noise * width).to_event(1), obs=x)


FAMILY = Normal(2)


def objective(model: Any, *args: Any, graphs: GraphCache | None = None, estimator: str = "stl") -> LocalObjective:
    structure = StructureReader().read(model, args, {})
    return LocalObjective(LocalLogJoint(ModelCall(model, args, {}, structure)), FAMILY, estimator, graphs)


def graph_of_last(cache: GraphCache) -> Any:
    """The graph that a cache found last."""
    return list(cache._known.values())[-1].entries[0].graph


def phi_of(size: int, latents: int = 2) -> Tensor:
    return torch.linspace(-1.0, 0.5, size * 2 * latents).reshape(size, 2 * latents)


def graph_of(cache: GraphCache) -> Any:
    """The only graph in a cache."""
    (known,) = cache._known.values()
    return known.entries[0].graph


def all_traced(cache: GraphCache) -> bool:
    return all(entry.graph is not None for known in cache._known.values() for entry in known.entries)


@pytest.mark.usefixtures("_float64", "_compiler")
@pytest.mark.parametrize("estimator", ["stl", "plain", "analytic_kl"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_give_the_numbers_and_derivatives_of_the_model(estimator: str, compile: bool) -> None:
    model, x = Decoded(), torch.randn(6, 5)
    plain, cache = objective(model, x, estimator=estimator), GraphCache(compile)
    traced = LocalObjective(plain.log_joint, plain.family, estimator, cache)
    leaves = [phi_of(6).requires_grad_(), *model.decoder.parameters()]
    noise = plain.noise(leaves[0], 3)
    results = []
    for candidate in (plain, traced):
        grad = candidate.gradient(leaves[0], noise)
        second = torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True)
        results.append([grad, *second, candidate.value(leaves[0], noise)])
    assert all_traced(cache)
    assert len(cache._known) == 2
    for expected, actual in zip(*results, strict=True):
        if expected is not None and actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        else:  # the last bias shifts the location, whose second derivative is zero
            assert expected is None or not expected.any()


def test_a_graph_has_no_trace_of_handlers_left() -> None:
    """A decoder's gradient takes 2 products forward, 2 backward, and some twenty small operations."""
    model, cache = Decoded(), GraphCache()
    local = objective(model, torch.randn(6, 5), graphs=cache)
    local.gradient(phi_of(6), local.noise(phi_of(6), 1))
    operations = [node for node in graph_of(cache).graph.nodes if node.op == "call_function"]
    assert len(operations) < 60
    assert not any("detach" in str(node.target) for node in operations)


def test_parameters_stay_live_while_they_train() -> None:
    model, x, cache = Decoded(), torch.randn(6, 5), GraphCache()
    for _ in range(3):
        traced, plain = objective(model, x, graphs=cache), objective(model, x)
        noise = torch.randn(1, 6, 2)
        torch.testing.assert_close(traced.gradient(phi_of(6), noise), plain.gradient(phi_of(6), noise))
        with torch.no_grad():
            for parameter in [*model.decoder.parameters(), pyro.get_param_store()._params["width"]]:
                parameter.add_(0.1)
    assert len(cache._known) == 1
    assert graph_of(cache) is not None


def replace_number(model: Decoded) -> None:
    model.noise = 2.0


def replace_nested_number(model: Decoded) -> None:
    model.settings["scale"] = 3.0


def replace_buffer(model: Decoded) -> None:
    model.shift = torch.ones(5)


def fill_buffer(model: Decoded) -> None:
    model.shift.fill_(1.0)


def replace_tensor(model: Decoded) -> None:
    model.offset = torch.ones(5)


def replace_layer(model: Decoded) -> None:
    model.decoder[0] = nn.Linear(2, 8)


def replace_parameter(model: Decoded) -> None:
    model.decoder[3].bias = nn.Parameter(torch.ones(5))


def reload_parameters(model: Decoded) -> None:
    pyro.clear_param_store()
    pyro.param("width", torch.tensor(2.0), constraint=dist.constraints.positive)


def replace_dictionary(model: Decoded) -> None:
    model.settings = {"scale": 3.0}


def replace_object(model: Decoded) -> None:
    model.config = SimpleNamespace(scale=4.0)


def change_slot(model: Decoded) -> None:
    model.slotted.scale = 4.0


def change_class(model: Decoded) -> None:
    type(model).class_scale = 5.0


def change_array(model: Decoded) -> None:
    model.array[0] = 6.0


def add_key(model: Decoded) -> None:
    model.settings["extra"] = 2.0


def replace_tuple(model: Decoded) -> None:
    model.pair = (torch.ones(5), 2.0)


def set_environment(model: Decoded) -> None:
    os.environ["SCALE"] = "2.0"


def switch_mode(model: Decoded) -> None:
    model.eval()


def append_to_queue(model: Decoded) -> None:
    model.levels.append(3.0)


CHANGES: list[Callable[[Decoded], None]] = [
    replace_number,
    replace_nested_number,
    replace_buffer,
    fill_buffer,
    replace_tensor,
    replace_layer,
    replace_parameter,
    reload_parameters,
    replace_dictionary,
    replace_object,
    change_slot,
    change_class,
    change_array,
    add_key,
    replace_tuple,
    set_environment,
    switch_mode,
    append_to_queue,
]


@pytest.mark.thinned
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_graph_is_stale_after_a_change(change: Callable[[Decoded], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoded, "class_scale", 1.0)
    monkeypatch.setenv("SCALE", "1.0")
    model, x, cache = Decoded(), torch.randn(6, 5), GraphCache()
    noise = torch.randn(1, 6, 2)
    before = objective(model, x, graphs=cache).gradient(phi_of(6), noise)
    change(model)
    after = objective(model, x, graphs=cache).gradient(phi_of(6), noise)
    torch.testing.assert_close(after, objective(model, x).gradient(phi_of(6), noise))
    assert not torch.allclose(before, after)
    assert all_traced(cache)


GLOBALS = SimpleNamespace(noise=1.0)


def test_numbers_in_closures_globals_and_arguments_are_watched() -> None:
    noise = 1.0

    def model(x: Tensor, factor: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise * GLOBALS.noise * factor).to_event(1), obs=x)

    x, cache, eps = torch.randn(4, 2), GraphCache(), torch.randn(1, 4, 2)
    for mine, shared, factor in ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 3.0, 1.0), (2.0, 3.0, 4.0)):
        noise, GLOBALS.noise = mine, shared
        traced = objective(model, x, factor, graphs=cache).gradient(phi_of(4), eps)
        torch.testing.assert_close(traced, objective(model, x, factor).gradient(phi_of(4), eps))
        assert all_traced(cache)


def test_hidden_randomness_is_noticed() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0 + random.random()).to_event(1), obs=x)

    x, cache = torch.randn(4, 2), GraphCache(compile=True)
    with pytest.warns(UserWarning, match="compile=True has no effect.*other numbers"):
        objective(model, x, graphs=cache).gradient(phi_of(4), torch.randn(1, 4, 2))
    assert graph_of(cache) is None


def test_a_change_that_cannot_be_seen_is_noticed_by_its_numbers() -> None:
    hidden = iter([1.0] * 20 + [2.0] * 1000)

    class Number:
        __slots__ = ()

        def __float__(self) -> float:
            return next(hidden)

    number = Number()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, float(number)).to_event(1), obs=x)

    x, cache, eps = torch.randn(4, 2), GraphCache(), torch.randn(1, 4, 2)
    for _ in range(40):
        last = objective(model, x, graphs=cache).gradient(phi_of(4), eps)
    torch.testing.assert_close(last, objective(model, x).gradient(phi_of(4), eps))


def test_a_model_with_control_flow_on_values_runs_untraced_with_one_warning() -> None:
    x, lengths = torch.randn(5, 3), torch.tensor([1, 2, 3, 3, 1])
    guide = SemiAmortizedGuide(chains, encoder_input="x", num_steps=2, compile=True)
    svi = SVI(chains, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="compile=True has no effect because the model cannot be traced"):
        svi.step(x, lengths)
    svi.step(x, lengths)  # a second warning would be an error
    silent = SemiAmortizedGuide(chains, encoder_input="x", num_steps=2, name="silent")
    assert math.isfinite(SVI(chains, silent, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x, lengths))


def test_tensors_read_in_python_are_not_baked_in() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * float(x.numpy().max()), 1.0).to_event(1), obs=x)

    cache, eps = GraphCache(), torch.randn(1, 4, 2)
    for scale in (1.0, 5.0):
        x = torch.full((4, 2), scale)
        traced = objective(model, x, graphs=cache).gradient(phi_of(4), eps)
        torch.testing.assert_close(traced, objective(model, x).gradient(phi_of(4), eps))
    assert graph_of(cache) is None


def test_a_model_that_detaches_keeps_its_second_derivatives() -> None:
    """Autograd's own detaches are taken out of a graph; those of the model may not be."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * z.detach(), 1.0).to_event(1), obs=x)

    x, eps = torch.randn(4, 2), torch.randn(1, 4, 2)
    second = []
    for graphs in (None, GraphCache()):
        phi = phi_of(4).requires_grad_()
        grad = objective(model, x, graphs=graphs).gradient(phi, eps)
        second.append(torch.autograd.grad(grad.square().sum(), phi)[0])
    torch.testing.assert_close(*second)


def test_something_that_changes_in_every_call_ends_tracing() -> None:
    class Annealed(Decoded):
        def forward(self, x: Tensor) -> None:
            self.noise *= 1.01
            super().forward(x)

    model, x, cache = Annealed(), torch.randn(6, 5), GraphCache(compile=True)
    with pytest.warns(UserWarning, match="compile=True has no effect"):
        _ = [objective(model, x, graphs=cache).gradient(phi_of(6), torch.randn(1, 6, 2)) for _ in range(20)]
    assert sum(len(known.entries) for known in cache._known.values()) <= 10


@pytest.mark.slow
def test_tracing_begins_again_when_the_changes_end() -> None:
    def model(x: Tensor, beta: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(beta * z, 1.0).to_event(1), obs=x)

    x, cache, eps = torch.randn(4, 2), GraphCache(), torch.randn(1, 4, 2)
    for beta in [*(i / 20 for i in range(20)), 1.0, 1.0]:
        last = objective(model, x, beta, graphs=cache).gradient(phi_of(4), eps)
    assert graph_of_last(cache) is not None
    torch.testing.assert_close(last, objective(model, x, 1.0).gradient(phi_of(4), eps))
    assert sum(len(known.entries) for known in cache._known.values()) < 12


def test_another_batch_size_is_another_graph_and_an_old_one_is_kept() -> None:
    model, cache = Decoded(), GraphCache()
    for size in (6, 4, 6, 4):
        x = torch.randn(size, 5)
        traced, eps = objective(model, x, graphs=cache), torch.randn(1, size, 2)
        expected = objective(model, x).gradient(phi_of(size), eps)
        torch.testing.assert_close(traced.gradient(phi_of(size), eps), expected)
    assert len(cache._known) == 2


def test_dropout_draws_anew_in_every_run_of_a_graph() -> None:
    model, x, cache = Decoded(dropout=0.5).train(), torch.randn(6, 5), GraphCache()
    local = objective(model, x, graphs=cache)
    eps = torch.randn(1, 6, 2)
    grads = [local.gradient(phi_of(6), eps) for _ in range(2)]
    assert graph_of(cache) is not None
    assert not torch.equal(*grads)
    results = []
    for candidate in (local, objective(model, x)):
        torch.manual_seed(1)
        results.append(candidate.gradient(phi_of(6), eps))
    torch.testing.assert_close(*results)


def test_tracing_leaves_the_random_numbers_of_the_caller_alone() -> None:
    local = objective(Decoded(), torch.randn(6, 5), graphs=GraphCache())
    eps, state = torch.randn(1, 6, 2), torch.get_rng_state()
    local.gradient(phi_of(6), eps)
    assert torch.equal(state, torch.get_rng_state())


def test_functions_that_change_tensors_in_place_are_refused() -> None:
    kept = torch.zeros(3)

    def function(x: Tensor) -> tuple[Tensor]:
        kept.add_(x)
        return (kept * x,)

    cache = GraphCache(compile=True)
    with pytest.warns(UserWarning, match="compile=True has no effect because the model cannot be traced"):
        assert cache.find("key", Use(function, [torch.ones(3)]), function) is None


def test_simplification_keeps_the_numbers() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        shifted = (x + zero) * one / one - zero
        wide = shifted + y.new_zeros(2, 3)  # not the same shape
        return (
            shifted,
            wide,
            shifted.neg().neg(),
            (zero + shifted) * -1,
            shifted.t().t() if x.dim() == 2 else shifted,
            one * y,
        )

    x, y = torch.randn(3), torch.randn(2, 3)
    recording = record(function, [x, y])
    assert recording.captured == []
    for actual, expected in zip(recording.graph(x, y), function(x, y), strict=True):
        torch.testing.assert_close(actual, expected)


# What a model cuts off from derivatives, and what it replaces them by


def clamped(z: Tensor, weight: Tensor) -> Tensor:
    return weight * (z + (z.clamp(-1.0, 1.0) - z).detach())


def rounded(z: Tensor, weight: Tensor) -> Tensor:
    return weight * (z + (torch.round(4.0 * z) / 4.0 - z).detach())


def stopped_where_positive(z: Tensor, weight: Tensor) -> Tensor:
    return torch.where(z > 0.5, z.detach(), z) * (weight * z).exp()


def without_gradients(z: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        far = (z.abs() - 1.0).relu() * weight
    return z * weight + far * z


def through_data(z: Tensor, weight: Tensor) -> Tensor:
    return z * weight.data + z.data.clamp(-1.0, 1.0) * z * weight


def gumbel(z: Tensor, weight: Tensor) -> Tensor:
    soft = (z * weight + torch.tensor([0.3, -0.1])).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def gradient_inside(z: Tensor, weight: Tensor) -> Tensor:
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad((at * weight).relu().square().sum(), at, create_graph=True)
    return z + slope


def assigned(z: Tensor, weight: Tensor) -> Tensor:
    out = z.detach().clamp(-1.0, 1.0)
    out += weight * z
    return out * z


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return torch.round(4.0 * z) / 4.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        with torch.enable_grad():  # the operators themselves then look as if they could be differentiated
            return z.clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def custom(z: Tensor, weight: Tensor) -> Tensor:
    return Rounded.apply(z) * weight


def custom_with_operators(z: Tensor, weight: Tensor) -> Tensor:
    return Clamped.apply(z) * weight


def hooked(z: Tensor, weight: Tensor) -> Tensor:
    hidden = z * weight
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad.clamp(-5.0, 5.0))
    return hidden


def overwritten(z: Tensor, weight: Tensor) -> Tensor:
    hidden = z * weight
    hidden.data.clamp_(-1.0, 1.0)
    return hidden


def overwritten_without_gradients(z: Tensor, weight: Tensor) -> Tensor:
    hidden = z * weight
    with torch.no_grad():
        hidden.clamp_(-1.0, 1.0)
    return hidden.exp()


Link = Callable[[Tensor, Tensor], Tensor]
CUT: list[Link] = [
    clamped,
    rounded,
    stopped_where_positive,
    without_gradients,
    through_data,
    gumbel,
    gradient_inside,
    assigned,
]
HIDDEN: list[Link] = [custom, custom_with_operators, hooked, overwritten, overwritten_without_gradients]


def linked(link: Link, weight: Tensor) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(link(z, weight), 1.0).to_event(1), obs=x)

    return model


def derivatives(local: LocalObjective, phi: Tensor, noise: Tensor, weight: Tensor) -> list[Tensor]:
    """The gradient, and its derivatives by phi and by a parameter of the model."""
    phi = phi.clone().requires_grad_()
    grad = local.gradient(phi, noise)
    second = torch.autograd.grad(grad.square().sum(), [phi, weight], allow_unused=True)
    return [grad, *(torch.zeros(()) if x is None else x for x in second)]


@pytest.mark.thinned
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("link", [*CUT, *HIDDEN])
def test_derivatives_are_cut_off_where_the_model_does(link: Link) -> None:
    """Traced where nothing is clamped or stopped, and used where it is."""
    weight, x, cache = nn.Parameter(torch.tensor([0.9, 1.1])), 3.0 * torch.randn(4, 2), GraphCache()
    model, noise = linked(link, weight), 0.01 * torch.randn(1, 4, 2)
    for scale in (0.1, 3.0):
        phi = scale * phi_of(4) + scale / 10.0
        plain, traced = objective(model, x), objective(model, x, graphs=cache)
        expected = derivatives(plain, phi, noise, weight)
        for actual, exact in zip(derivatives(traced, phi, noise, weight), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(traced.gradient(phi, noise), expected[0], rtol=1e-10, atol=1e-10)
    (known,) = cache._known.values()
    (entry,) = known.entries
    assert entry.graph is not None  # first-order gradients are had from a graph all the same
    assert entry.is_differentiable is (link in CUT)


@pytest.mark.usefixtures("_float64")
def test_derivatives_that_are_not_cut_off_would_be_noticed() -> None:
    weight = nn.Parameter(torch.tensor([0.9, 1.1]))
    x, phi, noise = 3.0 * torch.randn(4, 2), 3.0 * phi_of(4), torch.randn(1, 4, 2)
    ours = derivatives(objective(linked(clamped, weight), x), phi, noise, weight)
    others = derivatives(objective(linked(lambda z, w: w * z.clamp(-1.0, 1.0), weight), x), phi, noise, weight)
    assert (ours[1] - others[1]).abs().max() > 0.1


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.shift + x, torch.full_like(x, 0.05)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("encoder_gradient", ["unrolled", "first_order"])
@pytest.mark.parametrize("link", [clamped, custom])
def test_guides_refine_and_train_as_without_graphs(link: Link, encoder_gradient: str) -> None:
    weight = torch.ones(2)
    results = []
    for graphs in (True, False):
        pyro.clear_param_store()
        encoder = Shifted()
        options: dict[str, Any] = {"num_steps": 3, "update": GradientAscent(0.2, 0.0), "fixed_noise": True}
        guide = SemiAmortizedGuide(linked(link, weight), encoder, encoder_gradient=encoder_gradient, **options)
        guide.setup(torch.zeros(4, 2))
        if not graphs:
            guide._graphs.find = lambda *args, **kwargs: None
        guide.variational_parameters(torch.zeros(4, 2))  # traced where nothing is clamped
        phi = guide.variational_parameters(torch.full((4, 2), 3.0))
        results.append([phi, *torch.autograd.grad(phi[:, :2].sum(), encoder.shift)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("link", [clamped, custom])
def test_refined_and_the_blocks_of_diagnostics_give_the_same_without_graphs(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, z = 2.0 * torch.randn(6, 2), 2.0 * torch.randn(3, 6, 2)
    guide = AmortizedGuide(linked(link, torch.ones(2)))
    guide.setup(x)
    results = []
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr(GraphCache, "find", lambda *args, **kwargs: None)
        log_joint = objective(guide.model, x).log_joint
        log_joint.like, log_joint.graphs = torch.empty(0), GraphCache()
        at = z.clone().requires_grad_()
        values = log_joint(at)
        refined = guide.refined(3, update=GradientAscent(0.05)).eval()
        torch.manual_seed(1)
        phi = refined.variational_parameters(x).detach()
        results.append([values, *torch.autograd.grad(values.sum(), at), phi])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


# What a graph is verified by


@pytest.mark.parametrize(("size", "compile", "traced"), [(20, False, True), (20000, False, False), (20000, True, True)])
def test_large_evaluations_are_not_traced_after_training(size: int, compile: bool, traced: bool) -> None:
    """Three steps are done before a graph of them is made."""
    guide = AmortizedGuide(plain_normal)
    guide(torch.randn(20))
    refined = guide.refined(2, NaturalGradient(0.5), num_particles=8, compile=compile)
    kept = []
    refined._graphs._trace = lambda use, owner: kept.append(use) or _Entry(owner)
    refined.variational_parameters(torch.randn(size))
    assert bool(kept) is traced
    if not traced:
        with torch.enable_grad():
            refined.train()(torch.randn(size))
        assert kept


def plain_normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_graph_is_not_differentiated_by_a_parameter_that_has_been_replaced() -> None:
    """The new one has the same numbers, so that only the account of autograd tells."""
    model, x, cache = Decoded(), torch.randn(6, 5), GraphCache()
    noise = torch.randn(1, 6, 2)
    derivatives(objective(model, x, graphs=cache), phi_of(6), noise, model.decoder[0].weight)
    model.decoder[0].weight = nn.Parameter(model.decoder[0].weight.detach().clone())
    traced = derivatives(objective(model, x, graphs=cache), phi_of(6), noise, model.decoder[0].weight)
    torch.testing.assert_close(traced, derivatives(objective(model, x), phi_of(6), noise, model.decoder[0].weight))
    assert traced[2].abs().max() > 0.1


@pytest.mark.slow
def test_a_parameter_that_is_trained_later_has_derivatives() -> None:
    weight, x, cache = nn.Parameter(torch.tensor([0.9, 1.1])), torch.randn(4, 2), GraphCache()
    model, noise = linked(through_data, weight), torch.randn(1, 4, 2)
    weight.requires_grad_(False)
    objective(model, x, graphs=cache).gradient(phi_of(4).requires_grad_(), noise)
    weight.requires_grad_(True)
    traced = derivatives(objective(model, x, graphs=cache), phi_of(4), noise, weight)
    torch.testing.assert_close(traced, derivatives(objective(model, x), phi_of(4), noise, weight))
    assert traced[2].any()


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("estimator", ["stl", "analytic_kl"])
def test_a_use_costs_one_run_of_the_model_with_one_draw(num_particles: int, estimator: str) -> None:
    draws: list[int] = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            draws.append(len(z) if z.dim() == 3 else 1)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x, cache = torch.randn(4, 2), GraphCache()
    objective(model, x, graphs=cache, estimator=estimator).gradient(phi_of(4), torch.randn(num_particles, 4, 2))
    local = objective(model, x, graphs=cache, estimator=estimator)
    draws.clear()
    for _ in range(3):
        local.gradient(phi_of(4), torch.randn(num_particles, 4, 2))
    assert draws == [1]


@pytest.mark.slow
def test_graphs_of_several_states_are_kept_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, cache = Decoded(), torch.randn(6, 5), GraphCache()
    noise, phi = torch.randn(1, 6, 2), phi_of(6)
    for state in ("1.0", "2.0", "1.0", "3.0", "2.0", "1.0"):
        monkeypatch.setenv("SCALE", state)
        expected = objective(model, x).gradient(phi, noise)
        torch.testing.assert_close(objective(model, x, graphs=cache).gradient(phi, noise), expected)
    (known,) = cache._known.values()
    assert len(known.entries) == 3


def test_a_small_change_is_noticed_in_single_precision() -> None:
    model, x, cache = Decoded(), torch.randn(6, 5), GraphCache()
    noise = torch.randn(1, 6, 2)
    for step in range(3):
        model.noise = 1.0 + 0.0005 * step
        traced = objective(model, x, graphs=cache).gradient(phi_of(6), noise)
        plain = objective(model, x).gradient(phi_of(6), noise)
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-5)


# Guides and diagnostics


def simulated(size: int = 12) -> tuple[LinearGaussian, Tensor]:
    linear = LinearGaussian.random_weights()
    return linear, linear.simulate(size)


@pytest.mark.slow
@pytest.mark.usefixtures("_float64", "_compiler")
def test_compiled_guides_train_as_uncompiled_ones() -> None:
    linear, x = simulated()
    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        update = GradientAscent(0.01)
        guide = SemiAmortizedGuide(linear.full, num_steps=4, update=update, compile=compile, num_particles=2)
        svi = SVI(linear.full, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses.append([svi.step(batch) for batch in (x, x[:7], x, x[:7])] + [svi.evaluate_loss(x)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("_float64", "_compiler")
def test_compiled_diagnostics_give_the_same_figures() -> None:
    linear, x = simulated()
    guide = AmortizedGuide(linear.full)
    first, second = (estimate_gaps(linear.full, guide, (x,), compile=compile).dataset for compile in (False, True))
    for name in ("log_evidence", "elbo_optimal", "elbo"):
        assert abs(first[name] - second[name]).max() < 1e-6


@pytest.mark.usefixtures("_float64")
def test_diagnostics_by_blocks_give_the_figures_of_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 datapoints times 64 draws: many blocks, the last one partly filled."""
    linear, x = simulated(300)
    guide = AmortizedGuide(linear.full)
    by_blocks = optimize_local(linear.full, guide, (x,))
    monkeypatch.setattr("pyro_amortized.diagnostics.problem.GraphCache", lambda compile: None)
    plain = optimize_local(linear.full, guide, (x,))
    torch.testing.assert_close(by_blocks.elbo, plain.elbo, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_blocks.phi, plain.phi, rtol=1e-5, atol=1e-5)


def test_blocks_cannot_be_differentiated_twice() -> None:
    linear, x = simulated()
    structure = StructureReader().read(linear.full, (x,), {})
    log_joint = LocalLogJoint(ModelCall(linear.full, (x,), {}, structure))
    log_joint.like, log_joint.graphs = torch.empty(0), GraphCache()
    z = torch.zeros(2, 12, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_joint(z).sum(), z, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(log_joint.plain(z).sum(), z)[0])
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient.sum(), z)


def test_inputs_of_other_strides_run_in_the_same_graph() -> None:
    """Starts that are equal for all datapoints come expanded, other phi not; both may have the same shape."""
    model = LinearGaussian.random_weights(4, 2)
    x = model.simulate(6)
    guide = SemiAmortizedGuide(model.full, initial="prior", num_steps=3, family="multivariate_normal")
    guide.setup(x)
    objective = guide._objective(guide._read((x,), {}))
    noise = torch.randn(8, 6, objective.family.noise_dim)
    phi = guide.variational_parameters(x).detach()[:1].expand(6, -1)
    expected = objective.value(phi.contiguous(), noise)
    for start in (phi, phi.T.contiguous().T):
        torch.testing.assert_close(objective.value(start, noise.transpose(0, 1).contiguous().transpose(0, 1)), expected)
