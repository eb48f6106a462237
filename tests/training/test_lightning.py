"""Training by others: Lightning's trainer, and the processes of DistributedDataParallel."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

SIZE = 8
OPTIONS: dict[Any, dict[str, Any]] = {
    AmortizedGuide: {},
    PerDatapointGuide: {},
    DiscreteAmortizedGuide: {},
    SemiAmortizedGuide: {"num_steps": 2, "keep_best": False, "fixed_noise": True},
    IterativeAmortizedGuide: {"num_steps": 2, "num_particles": 2, "keep_best": False, "fixed_noise": True},
}

every_guide = pytest.mark.parametrize("Guide", list(OPTIONS))


@pytest.fixture(autouse=True)
def _module_local() -> Iterator[None]:
    """Parameters are those of the modules, as torch's own tools expect; no parameter store."""
    with pyro.settings.context(module_local_params=True):
        yield


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1)), torch.arange(SIZE)


class Factors(PyroModule):
    """A global latent, a local one and a parameter. The plate knows how many datapoints there are in all."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.4, -1.0]]))

    def forward(self, x: Tensor, index: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", SIZE, subsample=index):
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

    def forward(self, x: Tensor, index: Tensor) -> None:
        with NoiseByDatapoint(index):
            self.guide(x, index)


def loss_module(Guide: Any) -> Any:
    """The ELBO of model and guide as a module, with the same parameters in every process."""
    pyro.set_rng_seed(0)
    model = Factors()
    guide = Guide(model, **OPTIONS[Guide])
    guide.setup(*data())
    return Trace_ELBO()(model, Repeatable(guide))


def train(loss: Any, batch: tuple[Tensor, Tensor], steps: int = 3) -> list[dict[str, Tensor]]:
    """Gradients of a few steps of gradient descent, by parameter."""
    parameters = dict(loss.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()
        gradients.append({name.removeprefix("module."): p.grad.clone() for name, p in parameters.items()})
    return gradients


def train_in_process(rank: int, size: int, path: str) -> None:
    """Every process trains on its part of the data, averaging gradients with the others."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=timedelta(seconds=100)
    )
    try:
        with pyro.settings.context(module_local_params=True):
            for Guide in OPTIONS:
                batch = tuple(part.reshape(size, -1, *part.shape[1:])[rank] for part in data())
                gradients = train(nn.parallel.DistributedDataParallel(loss_module(Guide)), batch)
                torch.save(gradients, f"{path}/{Guide.__name__}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def saved(path: Path, Guide: Any, rank: int) -> Any:
    return torch.load(path / f"{Guide.__name__}-{rank}.pt", weights_only=True)


def test_two_processes_have_the_gradients_of_one_with_all_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_process, (2, str(tmp_path)), nprocs=2)
    for Guide in OPTIONS:
        expected = train(loss_module(Guide), data())
        assert all(gradient.abs().sum() > 0 for gradient in expected[-1].values())
        for rank in range(2):
            torch.testing.assert_close(saved(tmp_path, Guide, rank), expected, rtol=1e-4, atol=1e-5)


def test_a_part_of_the_data_has_other_gradients() -> None:
    """So that the test above would fail if processes went their own ways."""
    part = tuple(values[: SIZE // 2] for values in data())
    expected, found = train(loss_module(AmortizedGuide), data()), train(loss_module(AmortizedGuide), part)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Lightning


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=3)  # the last one has two


def training_module(loss: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.loss = loss
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor]) -> Tensor:
            value = self.loss(*batch)
            self.losses.append(value.item())
            return value

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.loss.parameters(), lr=0.001)

    return Training()


def trainer(path: Path, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(quiet, False), "accelerator": "cpu", "default_root_dir": path, **options}
    return lightning.Trainer(max_epochs=2, **options)


lightning_warnings = pytest.mark.filterwarnings("ignore")  # advice on loaders, loggers and checkpoints


@lightning_warnings
@every_guide
def test_lightning_trains_as_a_loop_by_hand(Guide: Any, tmp_path: Path) -> None:
    training = training_module(loss_module(Guide))
    trainer(tmp_path).fit(training, loader())
    loss = loss_module(Guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.001)
    losses = []
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            value = loss(*batch)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert len(losses) == 6
    assert training.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(training.loss.state_dict(), loss.state_dict(), rtol=1e-4, atol=1e-6)


@lightning_warnings
@pytest.mark.parametrize("Guide", [AmortizedGuide, PerDatapointGuide, IterativeAmortizedGuide])
def test_lightning_checkpoint(Guide: Any, tmp_path: Path) -> None:
    """A checkpoint of Lightning's goes into a guide of its own, set up or not."""
    training = training_module(loss_module(Guide))
    fit = trainer(tmp_path)
    fit.fit(training, loader())
    fit.save_checkpoint(tmp_path / "training.ckpt")
    state = torch.load(tmp_path / "training.ckpt", weights_only=False)["state_dict"]
    prefix = "loss.guide.guide."
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    model = Factors()
    model.load_state_dict(training.loss.model.state_dict())
    expected = training.loss.guide.guide.eval().median(*data())
    for setup in (False, True):
        guide = Guide(model, **OPTIONS[Guide])
        if setup:
            guide.setup(*data())
        guide.load_state_dict(state)
        torch.testing.assert_close(guide.eval().median(*data()), expected)
