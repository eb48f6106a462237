"""Training on draws of the model changes the encoder alone, and by the draws that the model makes."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, DiscreteAmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, simulate
from pyro_amortized.diagnostics.simulation import redraw
from pyro_amortized.objective.noise import generator
from pyro_amortized.training import DecoderDraws

pytestmark = pytest.mark.usefixtures("_float64")


class Decoder(nn.Module):
    """Two latents, batch normalisation, three pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> None:
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


def shared_loc(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def gamma(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def covariates(x: Tensor, *, shift: Tensor, present: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        with pyro.poutine.mask(mask=present):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def classes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def changes(kind: Callable[..., SVI], make: Callable[[], tuple[Any, Any]], x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """What a step of plain gradient descent adds to the parameters, from the same start and with the same noise."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = make()
    guide.setup(x)
    svi = kind(model, guide, pyro.optim.SGD({"lr": 1.0}), Trace_ELBO())
    modules = {"model": model if isinstance(model, nn.Module) else nn.Module(), "guide": guide}
    start = {f"{m}.{n}": p.detach().clone() for m, module in modules.items() for n, p in module.named_parameters()}
    pyro.set_rng_seed(1)
    svi.step(x)
    end = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    buffers = dict(modules["model"].named_buffers())
    return buffers, {name: (end[name] - start[name]).detach() for name in start}


def with_decoder() -> tuple[Any, Any]:
    decoder = Decoder()
    return decoder, AmortizedGuide(decoder)


@pytest.mark.parametrize(
    "make",
    [
        with_decoder,
        lambda: (shared_loc, AmortizedGuide(shared_loc)),
        lambda: (plain, IterativeAmortizedGuide(plain, num_steps=2)),
    ],
    ids=["decoder", "global", "iterative"],
)
def test_only_the_encoder_sees_draws(make: Callable[[], tuple[Any, Any]]) -> None:
    x = torch.randn(6, 3) if make is with_decoder else torch.randn(6)
    (buffers, alone), (same_buffers, beside) = changes(SVI, make, x), changes(DecoderDraws, make, x)
    for name, change in alone.items():
        assert torch.equal(change, beside[name]) != name.startswith("guide.inference"), name
    assert all(torch.equal(buffer, same_buffers[name]) for name, buffer in buffers.items())


def test_gradients_are_those_of_data_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw that repeats the data, under the same noise, doubles the gradient of the encoder."""
    x = torch.randn(6, 3)

    def repeat(self: Any, args: Any, kwargs: Any) -> Any:
        pyro.set_rng_seed(1)
        return args, kwargs

    def make() -> tuple[Any, Any]:
        decoder = Decoder().eval()
        return decoder, AmortizedGuide(decoder)

    monkeypatch.setattr(DecoderDraws, "_draw", repeat)
    once, twice = changes(SVI, make, x)[1], changes(DecoderDraws, make, x)[1]
    for name, change in once.items():
        factor = 2.0 if name.startswith("guide.inference") else 1.0
        torch.testing.assert_close(twice[name], factor * change)


@pytest.mark.slow
def test_encoder_learns_data_that_it_never_sees() -> None:
    """The posterior of x is N(x / 2, 1 / 2); all data are zeros."""
    pyro.set_rng_seed(0)
    unseen = torch.tensor([-2.0, 1.0, 2.0])
    errors = {}
    for kind in (SVI, DecoderDraws):
        pyro.clear_param_store()
        guide = AmortizedGuide(plain)
        guide.setup(torch.randn(100))
        svi = kind(plain, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}), Trace_ELBO())
        for _ in range(300):
            svi.step(torch.zeros(100))
        errors[kind] = (guide.median(unseen)["z"] - unseen / 2).abs().max().item()
    assert errors[DecoderDraws] < 0.1 < errors[SVI]


@pytest.mark.parametrize(
    ("model", "make", "args", "kwargs"),
    [
        (plain, AmortizedGuide, (torch.randn(7),), {}),
        (shared_loc, AmortizedGuide, (torch.randn(7),), {}),
        (covariates, AmortizedGuide, (torch.randn(7),), {"shift": torch.arange(7.0), "present": torch.arange(7) > 2}),
        (classes, DiscreteAmortizedGuide, (torch.randn(7),), {}),
    ],
)
def test_unchecked_draws_are_those_of_simulate(model: Any, make: Any, args: Any, kwargs: Any) -> None:
    args, kwargs = (args[0].double(),), {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    guide = make(model)
    guide.setup(*args, **kwargs)
    state = torch.get_rng_state()
    drawn_args, drawn_kwargs = redraw(model, guide, args, kwargs, generator(3, 20))
    assert torch.equal(torch.get_rng_state(), state)
    simulation = simulate(model, guide, args, kwargs, seed=3)
    assert torch.equal(drawn_args[0], simulation.args[0])
    assert not torch.equal(drawn_args[0], args[0])
    assert all(torch.equal(value, kwargs[name]) for name, value in drawn_kwargs.items())
    if "present" in kwargs:
        assert torch.equal(drawn_args[0][:3], args[0][:3])


def test_discrete_latents() -> None:
    guide = DiscreteAmortizedGuide(classes)
    svi = DecoderDraws(classes, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(torch.tensor(svi.step(torch.randn(8))).isfinite() for _ in range(3))


def test_draws_follow_torchs_seed() -> None:
    found = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AmortizedGuide(gamma)
        svi = DecoderDraws(gamma, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        x = torch.randn(8)
        losses = [svi.step(x[: 4 + step % 4]) for step in range(5)]
        found.append((losses, guide.variational_parameters(x).detach()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_wrong_arguments_are_refused() -> None:
    optimizer, x = pyro.optim.Adam({"lr": 0.01}), torch.randn(8)
    with pytest.raises(ValueError, match="Cannot train a AutoNormal on draws of the model"):
        DecoderDraws(plain, AutoNormal(plain), optimizer, Trace_ELBO())
    table = DecoderDraws(plain, PerDatapointGuide(plain), optimizer, Trace_ELBO())
    with pytest.raises(ValueError, match="Cannot infer the latents of simulated data"):
        table.step(x)

    def closure() -> None:
        plain(x)

    closed = DecoderDraws(closure, AmortizedGuide(closure), optimizer, Trace_ELBO())
    with pytest.raises(ValueError, match="Cannot simulate data because the values of observed site 'x' are not found"):
        closed.step()
