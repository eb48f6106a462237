"""A run resumed from a checkpoint goes on with the same numbers, whatever batch sizes a guide had met before."""

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("more", 3):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0)).sum(-1)
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.layers(z) + offset, 1.0).to_event(1), obs=x)


def start(Guide: Any, options: dict[str, Any]) -> tuple[Decoder, Any, Any]:
    pyro.clear_param_store()
    decoder = Decoder()
    guide = Guide(decoder.model, plate="data", **options)
    guide.setup(torch.randn(40, 4))
    return decoder, guide, pyro.optim.Adam({"lr": 0.01})


def losses(decoder: Decoder, guide: Any, optimizer: Any, sizes: list[int]) -> list[float]:
    svi = SVI(decoder.model, guide, optimizer, Trace_ELBO())
    return [svi.step(torch.randn(size, 4)) for size in sizes]


@pytest.mark.parametrize(
    ("Guide", "options"),
    [
        (AmortizedGuide, {}),
        (AmortizedGuide, {"family": "flow"}),
        (AmortizedGuide, {"encoder_input": "x"}),
        (PerDatapointGuide, {}),
        (SemiAmortizedGuide, {"num_steps": 2}),
        (IterativeAmortizedGuide, {"num_steps": 2, "num_particles": 2}),
    ],
)
def test_resumed_losses_are_equal_to_the_last_digit(Guide: Any, options: dict[str, Any]) -> None:
    decoder, guide, optimizer = start(Guide, options)
    losses(decoder, guide, optimizer, [12, 12, 7])
    states = copy.deepcopy((decoder.state_dict(), guide.state_dict(), optimizer.get_state(), pyro.util.get_rng_state()))
    expected = losses(decoder, guide, optimizer, [12, 7, 5, 12])
    decoder, guide, optimizer = start(Guide, options)
    decoder.load_state_dict(states[0])
    guide.load_state_dict(states[1])
    optimizer.set_state(states[2])
    pyro.util.set_rng_state(states[3])
    assert losses(decoder, guide, optimizer, [12, 7, 5, 12]) == expected
