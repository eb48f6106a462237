"""Models, guides and trainers of the tests of Lightning's module."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

lightning = pytest.importorskip("lightning")

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
            pyro.sample("x", dist.Normal(z @ self.weights + loc.unsqueeze(-1), 1.0).to_event(1), obs=x)


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
        self.plate, self.groups = "data", guide.groups

    def forward(self, x: Tensor, index: Tensor) -> None:
        with NoiseByDatapoint(index):
            self.guide(x, index)


def county(x: Tensor, index: Tensor) -> Tensor:
    """The datapoint of each row: of datapoint n there are 1 + n mod 3."""
    return torch.arange(len(x)).repeat_interleave(1 + index % 3)


class LongFormat(PyroModule):
    """Rows in a plate beside that of the datapoints, which is as large as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.4, -1.0]]))

    def forward(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rows = county(x, index)
        with pyro.plate("rows", len(rows)):
            loc = z[rows] @ self.weights + torch.arange(3.0)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[rows])


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


def within_another(index: Tensor, x: Tensor) -> None:
    with pyro.plate("features", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", SIZE, subsample=index, dim=-2):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
