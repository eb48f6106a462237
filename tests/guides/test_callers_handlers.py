"""Guides inside the caller's handlers and plates: what they leave in traces, and what they leave behind."""

from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from plain_guides import FAMILIES, GUIDES, SIZE, X, exact_guide
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine import runtime
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from pyro_amortized import AmortizedGuide, PerDatapointGuide


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
