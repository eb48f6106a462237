"""Losses in which the guide's log-density counts negatively train the guides' own gradients in the right direction."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from torch import Tensor

from pyro_amortized import IterativeAmortizedGuide, SemiAmortizedGuide
from pyro_amortized.guides import LocalGuide

pytestmark = pytest.mark.usefixtures("_float64")

GUIDES: dict[str, Callable[[], LocalGuide]] = {
    "initial": lambda: SemiAmortizedGuide(model, num_steps=2, encoder_gradient="initial"),
    "distill": lambda: SemiAmortizedGuide(model, num_steps=2, encoder_gradient="distill"),
    "iterative": lambda: IterativeAmortizedGuide(model, num_steps=2),
}


def model(x: Tensor) -> None:
    """p(z | x) = N(0.8 x, 0.2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def data(size: int = 32) -> Tensor:
    return 1.1 * torch.randn(size, generator=torch.Generator().manual_seed(0))


def wake_sleep(num_particles: int) -> Any:
    return ReweightedWakeSleep(num_particles=num_particles, insomnia=1.0)


def gradient(name: str, elbo: Any) -> Tensor:
    """The gradient of the encoder, or of the update network."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, guide = data(), GUIDES[name]()
    guide.setup(x)
    elbo.loss_and_grads(model, guide, x)
    return torch.cat([p.grad.flatten() for p in guide.inference.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", GUIDES)
def test_wake_sleep_trains_the_guide_as_the_elbo_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradient(name, Trace_ELBO(num_particles=50))
    similarity = torch.cosine_similarity(gradient(name, wake_sleep(50)), right, 0)
    assert similarity > 0.5
    monkeypatch.setattr(  # the twin, which must fail
        "pyro_amortized.guides.base.add_gradient",
        lambda name, term: pyro.factor(name, term - term.detach(), has_rsample=True),
    )
    wrong = torch.cosine_similarity(gradient(name, wake_sleep(50)), right, 0)
    assert wrong < (0.3 if name == "iterative" else -0.5)  # whose last step has a gradient of its own, the right one


@pytest.mark.parametrize("name", GUIDES)
def test_training_by_wake_sleep_does_not_diverge(name: str) -> None:
    x = data()
    pyro.set_rng_seed(0)
    guide: Any = GUIDES[name]()
    guide.setup(x)

    def loss() -> float:
        """That of the encoder's own answer, nats per datapoint; of the last update where there is no encoder."""
        num_steps = guide.num_steps
        if name != "iterative":
            guide.num_steps = 0
        elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
        try:
            return elbo.loss(model, guide, x) / len(x)
        finally:
            guide.num_steps = num_steps

    before = loss()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), wake_sleep(5))
    for _ in range(100):
        svi.step(x)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(x).mean()
    assert loss() < before - 0.1 * (before + float(evidence))
