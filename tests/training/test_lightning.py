"""Training by Lightning's Trainer, in one process and in several."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    VectorQuantizedGuide,
)
from pyro_amortized.training import FreeBitsELBO, KLAnnealing, linear_schedule

lightning = pytest.importorskip("lightning")
from pyro_amortized.lightning import SVIModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of Lightning's on loaders, loggers and checkpoints

SIZE = 10
STEPS: dict[str, Any] = {"num_steps": 2, "keep_best": False, "fixed_noise": True}
GUIDES: dict[str, tuple[Any, dict[str, Any]]] = {
    "amortized": (AmortizedGuide, {}),
    "per datapoint": (PerDatapointGuide, {}),
    "sparse table": (PerDatapointGuide, {"sparse": True}),
    "discrete": (DiscreteAmortizedGuide, {}),
    **{
        gradient: (SemiAmortizedGuide, {**STEPS, "encoder_gradient": gradient})
        for gradient in ("anchored", "unrolled", "first_order", "initial", "distill")
    },
    "iterative": (IterativeAmortizedGuide, {**STEPS, "num_particles": 2}),
}


def data(size: int = SIZE) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(1)), torch.arange(size)


class Factors(PyroModule):
    """A global latent, a local one and a parameter; the plate knows how many datapoints there are in all, or not."""

    def __init__(self, sized: bool = True) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.4, -1.0]]))
        self.sized = sized

    def forward(self, x: Tensor, index: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", SIZE, subsample=index) if self.sized else pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weights + loc, 1.0).to_event(1), obs=x)


class NoiseByDatapoint(Messenger):
    """Latents are their means plus noise that belongs to the datapoint, whatever batch it comes in."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        z = torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(2))
        self.noise = {"z": z[index], "loc_unconstrained": torch.tensor(0.7)}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.noise:
            msg["value"] = msg["fn"].mean + msg["fn"].stddev * self.noise[msg["name"]]


class Repeatable(nn.Module):
    """A guide whose draws depend on nothing but the datapoints."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide
        self.plate = "data"

    def forward(self, x: Tensor, index: Tensor) -> None:
        with NoiseByDatapoint(index):
            self.guide(x, index)


class KeepGradients(lightning.Callback):
    """What optimizers are given."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.gradients.append({name: g.to_dense().clone() if g.is_sparse else g.clone() for name, g in found.items()})


def quiet(path: Path | str, **options: Any) -> Any:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {**off, "accelerator": "cpu", "default_root_dir": path, "max_epochs": 2, **options}
    return lightning.Trainer(**options)


def loader(size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=size, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)


# One process


@pytest.mark.parametrize("kind", list(GUIDES))
def test_trains_as_svi_does(kind: str, tmp_path: Path) -> None:
    """The same losses as SVI's with the same optimizer."""
    Guide, options = GUIDES[kind]
    found, expected = [], []
    for losses in (found, expected):
        pyro.clear_param_store()
        lightning.seed_everything(1)
        model = Factors()
        guide = Guide(model, **options)
        module = SVIModule(model, guide, optimizer=sgd)
        module.initialize(data())
        lightning.seed_everything(2)
        if losses is found:
            quiet(tmp_path).fit(module, loader())
            losses += module.history.dataset["train_loss"].values.tolist()
        else:
            svi = infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), infer.Trace_ELBO())
            losses += [svi.step(*batch) for _ in range(2) for batch in loader()]
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-6)


def functions() -> tuple[Any, Any, nn.Module]:
    """A model and a guide that are functions, with parameters of every kind."""
    decoder = nn.Linear(2, 3)

    def model(x: Tensor, index: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor, index: Tensor) -> None:
        weight = pyro.param("encoder.weight", lambda: torch.randn(3, 2))
        spread = pyro.param("spread", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, spread).to_event(1))

    return model, guide, decoder


def test_parameters_of_functions_are_trained_and_stay_in_the_store(tmp_path: Path) -> None:
    model, guide, decoder = functions()
    module = SVIModule(model, guide, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    module.initialize(data())
    assert {name for name, _ in module.named_parameters()} == {
        "store.decoder$$$weight",
        "store.decoder$$$bias",
        "store.scale",
        "store.encoder/weight",
        "store.spread",
    }
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    quiet(tmp_path).fit(module, loader())
    for name, value in pyro.get_param_store().items():
        assert not torch.equal(value, before[name])
    assert dict(module.named_parameters())["store.decoder$$$weight"] is decoder.weight
    assert pyro.param("scale") is not None
    assert pyro.param("scale").item() == pytest.approx(module.state_dict()["store.scale"].exp().item())


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("kind", ["functions", "AutoNormal", "AmortizedGuide", "method"])
def test_checkpoints_hold_everything(kind: str, built: bool, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        pyro.clear_param_store()
        model, guide, _ = functions()
        if kind == "method":
            holder = Factors()
            return holder.forward, AmortizedGuide(holder.forward)
        made = {"functions": lambda _: guide, "AutoNormal": AutoNormal, "AmortizedGuide": AmortizedGuide}
        return model, made[kind](model)

    batches = DataLoader(TensorDataset(*data()), batch_size=SIZE)
    trainer, module = quiet(tmp_path), SVIModule(*make())
    trainer.fit(module, batches, batches)
    trainer.save_checkpoint(tmp_path / "training.ckpt")
    state = {name: value.clone() for name, value in module.state_dict().items()}
    model, guide = make()
    if built:
        infer.Trace_ELBO().loss(model, guide, *data())
    loaded = SVIModule.load_from_checkpoint(tmp_path / "training.ckpt", model=model, guide=guide, weights_only=True)
    assert loaded.history.dataset.equals(module.history.dataset)
    loaded.initialize(data())
    torch.testing.assert_close(dict(loaded.state_dict()), state)
    values = [quiet(tmp_path).validate(loaded, batches, verbose=False)[0]["val_loss"] for _ in range(200)]
    exact = torch.tensor([infer.Trace_ELBO().loss(model, guide, *data()) for _ in range(200)])
    error = exact.std().item() * (2 / 200) ** 0.5
    assert sum(values) / 200 == pytest.approx(exact.mean().item(), abs=5 * error)
