"""Reweighted wake-sleep and CSIS train the encoder on data that the model has simulated."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import CSIS, SVI, ReweightedWakeSleep
from torch import Tensor

from pyro_amortized import AmortizedGuide, SemiAmortizedGuide

WEIGHTS = torch.tensor([1.0, 2.0])
SIZE = 32


def datapoint(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z[..., None] * WEIGHTS, 1.0).to_event(1), obs=x)


def full(x: Tensor, observations: Any = None) -> None:
    with pyro.plate("data", len(x)):
        datapoint(x)


def closed(x: Tensor) -> None:
    full(x)


def explicit(x: Tensor, observations: Any = None) -> None:
    index = torch.arange(SIZE // 2)
    with pyro.plate("data", len(x), subsample=index):
        datapoint(x[index])


def random(x: Tensor, **unused: Any) -> None:
    with pyro.plate("data", len(x), subsample_size=SIZE // 2) as index:
        datapoint(x[index])


def keyword(x: Tensor | None = None, observations: Any = None) -> None:
    with pyro.plate("data", SIZE):
        datapoint(torch.zeros(SIZE, 2) if observations is None else observations["x"])


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZE, 1, generator=generator) * WEIGHTS + torch.randn(SIZE, 2, generator=generator)


def seen_by(guide: Any, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What is simulated, and where the guide puts q for it: the exact posterior has its location at w x / 6."""
    trace = poutine.trace(poutine.uncondition(model)).get_trace(x)
    simulated = trace.nodes["x"]["value"]
    guided = poutine.trace(poutine.replay(guide, trace)).get_trace(x, observations={"x": simulated})
    return simulated @ WEIGHTS / 6, guided.nodes["z"]["fn"].loc


@pytest.mark.parametrize("model", [full, closed, explicit, random])
def test_sleep_trains_on_what_the_model_simulates(model: Any) -> None:
    x = data() + 100.0  # so far off that training on the data themselves would show
    guide = AmortizedGuide(model)
    guide.setup(data())
    loss = ReweightedWakeSleep(
        num_particles=2, insomnia=0.0, model_has_params=False, num_sleep_particles=1, vectorize_particles=False
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    for _ in range(500):
        svi.step(x)
    expected, actual = seen_by(guide, model, x)
    assert (actual - expected).square().mean().sqrt() < 0.4


def test_encoder_sees_what_is_simulated() -> None:
    seen = []

    class Encoder(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    x, simulated = data(), torch.randn(SIZE, 2)
    for k, encoder_input in enumerate((None, "x", lambda x, observations=None: x)):
        guide = AmortizedGuide(full, Encoder(2, 3), encoder_input=encoder_input, name=f"guide_{k}")
        guide(x)
        assert torch.equal(seen[-1], x)
        guide(x, observations={"x": simulated})
        assert torch.equal(seen[-1], simulated)


@pytest.mark.thinned
@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide])
def test_wake_sleep_runs(Guide: Any, vectorized: bool, insomnia: float) -> None:
    options = {} if Guide is AmortizedGuide else {"num_steps": 1}
    guide = Guide(full, **options)
    loss = ReweightedWakeSleep(
        num_particles=2, insomnia=insomnia, model_has_params=False, num_sleep_particles=1,
        vectorize_particles=vectorized, max_plate_nesting=1,
    )  # fmt: skip
    svi = SVI(full, guide, pyro.optim.Adam({"lr": 0.001}), loss)
    for _ in range(3):
        assert all(torch.tensor(value).isfinite() for value in svi.step(data()))


@pytest.mark.parametrize("model", [full, keyword])
def test_compiled_inference(model: Any) -> None:
    x = data()
    guide = AmortizedGuide(model)
    csis = CSIS(model, guide, pyro.optim.Adam({"lr": 0.01}), num_inference_samples=10, training_batch_size=1)
    for _ in range(200):
        csis.step(x)
    expected, actual = seen_by(guide, model, x)
    assert (actual - expected).square().mean().sqrt() < 0.4
    if model is keyword:
        phi = guide.variational_parameters(observations={"x": x})
        assert (phi[:, 0] - x @ WEIGHTS / 6).square().mean().sqrt() < 0.4


def test_what_cannot_be_simulated_is_refused() -> None:
    x = data()
    guide = AmortizedGuide(explicit, encoder_input=lambda x, observations=None: x[: SIZE // 2])
    guide(x)
    with pytest.raises(ValueError, match="Cannot encode simulated data.*encoder_input=None"):
        guide(x, observations={"x": torch.randn(SIZE // 2, 2)})
    with pytest.raises(ValueError, match=r"simulated values of site 'x'.*\(3, 32, 2\).*vectorize_particles=False"):
        AmortizedGuide(full, name="other")(x, observations={"x": torch.randn(3, SIZE, 2)})
