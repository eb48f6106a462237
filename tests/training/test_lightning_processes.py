"""Training by Lightning's Trainer in several processes."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    VectorQuantizedGuide,
)

lightning = pytest.importorskip("lightning")
from lightning_runs import (  # noqa: E402
    GUIDES,
    SIZE,
    Factors,
    KeepGradients,
    LongFormat,
    Repeatable,
    county,
    data,
    loader,
    quiet,
    sgd,
    within_another,
)

from pyro_amortized.lightning import SVIModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of Lightning's on loaders, loggers and checkpoints


class Codes(PyroModule):
    """A model of codes, whose codebook moves by the statistics of all processes."""

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        self.codebook = codebook
        self.decoder = nn.Linear(2, 3)

    def forward(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", SIZE, subsample=index):
            code = pyro.sample("code", dist.Categorical(logits=torch.zeros(self.codebook.num_codes)))
            pyro.sample("x", dist.Normal(self.decoder(self.codebook(code)), 1.0).to_event(1), obs=x)


FAST = ["amortized", "sparse table", "size of the batch", "long format", "codes", "revived codes"]
KINDS = [*FAST, *(kind for kind in GUIDES if kind not in FAST), "renyi"]
WHOLE = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [5, 0, 9]]
PARTS = [[[0, 1, 2, 3], [6], [5, 0]], [[4, 5], [7, 8, 9], [9]]]
"""The same rows in one process and in two, as unequally as can be."""


def gradients_of(kind: str, batches: list[list[int]], path: str, **options: Any) -> list[dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = None
    is_codes = "codes" in kind
    if is_codes:
        model: Any = Codes(Codebook(4, 2) if kind == "codes" else Codebook(12, 2, decay=0.5, revive_below=0.5))
        guide: Any = VectorQuantizedGuide(model, encoder=nn.Linear(3, 2), codebook=model.codebook)
    else:
        model = LongFormat() if kind == "long format" else Factors(sized=kind != "size of the batch")
        Guide, guide_options = GUIDES.get(kind, GUIDES["amortized"])
        if kind == "long format":
            guide_options = {"plate": "data", "groups": {"rows": county}}
        guide = Repeatable(Guide(model, **guide_options))
        elbo = infer.RenyiELBO(alpha=0.0, num_particles=1) if kind == "renyi" else None
    guide(*data()) if is_codes else guide.guide.setup(*data())
    kept = KeepGradients()
    module = SVIModule(model, guide, elbo, optimizer=sgd)
    batches = DataLoader(TensorDataset(*data()), batch_sampler=batches)
    quiet(path, max_epochs=1, callbacks=[kept], use_distributed_sampler=False, **options).fit(module, batches)
    if is_codes:
        kept.gradients.append({"embeddings": guide.eval() and model.codebook.embeddings})
    return kept.gradients


def train_in_process(rank: int, size: int, path: str, kinds: list[str]) -> None:
    """As ``torchrun`` starts it."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
    os.environ.update(zip(names, map(str, (rank, rank, size, size, 0, "tests")), strict=True))
    for kind in kinds:
        found = gradients_of(kind, PARTS[rank], path, strategy="ddp", devices=size)
        torch.save(found, f"{path}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def resume_in_process(rank: int, size: int, path: str) -> None:
    """A run of two processes that goes on from its checkpoint has the losses of an unbroken one."""
    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
    os.environ.update(zip(names, map(str, (rank, rank, size, size, 0, "tests")), strict=True))

    def losses(name: str, epochs: int, ckpt: str | None = None) -> list[float]:
        pyro.clear_param_store()
        lightning.seed_everything(0)  # of which Lightning makes the order of the data
        torch.manual_seed(rank if ckpt is None else 7 + rank)
        model = Factors()
        module = SVIModule(model, AmortizedGuide(model))
        options = {
            "strategy": "ddp",
            "devices": size,
            "enable_checkpointing": True,
            "default_root_dir": f"{path}/{name}",
        }
        trainer = quiet(path, max_epochs=epochs, **options)
        trainer.fit(module, loader(shuffle=True), ckpt_path=ckpt)
        trainer.save_checkpoint(f"{path}/{name}.ckpt")
        return module.history.dataset["train_loss"].values.tolist()

    expected = losses("whole", 3)
    broken = losses("broken", 1)
    assert expected[: len(broken)] == broken
    assert losses("resumed", 3, f"{path}/broken.ckpt") == expected
    pyro.clear_param_store()
    model, options = Factors(), {"strategy": "ddp", "devices": size, "max_epochs": 1}
    module = SVIModule(model, AmortizedGuide(model))
    half = DataLoader(torch.utils.data.Subset(TensorDataset(*data()), range(rank, SIZE, size)), batch_size=2)
    quiet(path, use_distributed_sampler=False, **options).fit(module, half)
    with pytest.raises(ValueError, match=f"over {SIZE // size} datapoints because plate 'data' .* has {SIZE}"):
        quiet(path, **options).fit(module, half)
    compiled = SVIModule(within_another, infer.autoguide.AutoDelta(within_another), infer.JitTrace_ELBO())
    swapped = DataLoader(TensorDataset(*data()[::-1]), batch_size=2)
    with pytest.raises(ValueError, match="Cannot share the datapoints among processes with a JitTrace_ELBO"):
        quiet(path, strategy="ddp", devices=size).fit(compiled, swapped)
    torch.distributed.destroy_process_group()


@pytest.fixture
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def _meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


@pytest.mark.slow
@pytest.mark.usefixtures("_meeting")
def test_two_processes_resume(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(resume_in_process, (2, str(tmp_path)), nprocs=2)


@pytest.mark.usefixtures("_double", "_meeting")
@pytest.mark.parametrize("kinds", [FAST, pytest.param(KINDS[len(FAST) :], marks=pytest.mark.slow)], ids=["few", "all"])
def test_two_processes_have_the_gradients_of_one_with_all_rows(kinds: list[str], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_process, (2, str(tmp_path), kinds), nprocs=2)
    for kind in kinds:
        of_processes = [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]
        expected = of_processes[0] if kind == "revived codes" else gradients_of(kind, WHOLE, str(tmp_path))
        assert len(expected) >= 3
        for found in of_processes:  # which draw the same codes, though not those that one process would
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=lambda m, kind=kind: f"{kind}: {m}")


@pytest.mark.usefixtures("_double")
def test_a_part_of_the_rows_has_other_gradients(tmp_path: Path) -> None:
    """So that the test above would fail if processes went their own ways."""
    expected, found = (gradients_of("amortized", batches, str(tmp_path)) for batches in (WHOLE, PARTS[0]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
