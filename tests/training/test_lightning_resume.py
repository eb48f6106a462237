"""Runs by Lightning's Trainer that are killed and go on."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
)

lightning = pytest.importorskip("lightning")
from lightning_runs import GUIDES, SIZE, Factors, data, loader, quiet  # noqa: E402

from pyro_amortized.lightning import SVIModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of Lightning's on loaders, loggers and checkpoints


class Varied(torch.utils.data.Sampler[list[int]]):
    """Batches of changing sizes, shuffled by torch's own generator."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        yield from (order[:3], order[3:4], order[4:])

    def __len__(self) -> int:
        return 3


def train(
    path: Path,
    epochs: int,
    kind: str = "amortized",
    ckpt: Path | None = None,
    mid: int = 0,
    scheduler: Any = None,
    options: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    **saves: Any,
) -> list[float]:
    """The losses of a run that saves after every epoch, or after every step of batches of ``mid`` datapoints."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    pyro.clear_param_store()
    lightning.seed_everything(0 if ckpt is None else 1)
    model = Factors()
    Guide, of_guide = GUIDES[kind]
    module = SVIModule(model, Guide(model, **of_guide), scheduler=scheduler)
    saves = {"every_n_train_steps": 1} if mid and not saves else saves
    saving = ModelCheckpoint(path, save_top_k=-1, filename="{step}", save_last=True, **saves)
    if mid:
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        batches = stateful.StatefulDataLoader(TensorDataset(*data()), batch_size=mid, shuffle=True)
    else:
        batches = DataLoader(TensorDataset(*data()), batch_sampler=Varied())
    callbacks = [*(callbacks or []), saving]
    trainer = quiet(path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, **(options or {}))
    trainer.fit(module, batches, DataLoader(TensorDataset(*data()), batch_size=4), ckpt_path=ckpt)
    history = module.history.dataset
    return history["train_loss"].values.tolist() + history["val_loss"].values.tolist()


@pytest.mark.parametrize("kind", ["amortized", "per datapoint", pytest.param("anchored", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", 4, kind)
    assert train(tmp_path / "broken", 2, kind) == expected[:6] + expected[12:14]
    assert train(tmp_path / "broken", 4, kind, tmp_path / "broken" / "last.ckpt") == expected
    assert train(tmp_path / "other", 4, kind, tmp_path / "broken" / "step=3.ckpt") == expected


def never_better(optimizer: Any) -> Any:
    """A tenth of the learning rate each time but the first."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs")


def by_step(optimizer: Any) -> Any:
    return {"scheduler": never_better(optimizer), "interval": "step", "monitor": "train_loss", "frequency": 3}


@pytest.mark.parametrize(
    ("saves", "scheduler", "options"),
    [
        ({"monitor": "val_elbo", "mode": "max"}, never_better, {}),
        ({}, never_better, {}),
        ({"save_on_train_epoch_end": False}, never_better, {}),
        ({"every_n_train_steps": 3}, never_better, {}),
        ({"every_n_train_steps": 3}, by_step, {}),
        ({"monitor": "val_elbo"}, never_better, {"check_val_every_n_epoch": 2}),
        ({"every_n_train_steps": 3}, never_better, {"precision": "64-true"}),
        ({}, never_better, {"max_steps": 16}),
        ({}, by_step, {"max_steps": 18, "limit_val_batches": 0}),
    ],
    ids=["monitored", "epoch", "validation", "last step", "by step", "every second epoch", "64 bits", "steps", "alone"],
)
def test_what_was_due_when_a_checkpoint_was_written_is_done(
    saves: dict[str, Any], scheduler: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """Lightning saves before validations, and before schedulers that wait for them, and leaves these out."""
    expected = train(tmp_path / "whole", 6, scheduler=scheduler, options=options, **saves)
    for step in (6, 12):
        ckpt = tmp_path / "whole" / f"step={step}.ckpt"
        assert train(tmp_path / "resumed", 6, ckpt=ckpt, scheduler=scheduler, options=options, **saves) == expected
    assert train(tmp_path / "steady", 6, ckpt=ckpt, options=options, **saves) != expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_loader_for_training_and_validation_resumes(shuffle: bool, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def losses(epochs: int, ckpt: Path | None = None) -> list[float]:
        pyro.clear_param_store()
        lightning.seed_everything(0 if ckpt is None else 1)
        model, both = Factors(), loader(shuffle=shuffle)
        module = SVIModule(model, AmortizedGuide(model))
        saving = ModelCheckpoint(tmp_path, save_last=True)
        trainer = quiet(tmp_path, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(module, both, both, ckpt_path=ckpt)
        return module.history.dataset["train_loss"].values.tolist()

    expected = losses(3)
    losses(1)
    assert losses(3, tmp_path / "last.ckpt") == expected


def test_validations_lie_where_they_were_made(tmp_path: Path) -> None:
    """In the order of batches, however many there are to a step of the optimizer, and over all trainers."""
    model = Factors()
    module = SVIModule(model, AmortizedGuide(model))
    for options in ({"accumulate_grad_batches": 3}, {}):
        quiet(tmp_path, **options).fit(module, loader(), loader())
    assert module.history.dataset["val_step"].values.tolist() == [3, 6, 9, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 2}, {"max_steps": 8}], ids=["at its end", "twice", "steps"]
)
def test_a_run_resumed_within_an_epoch(options: dict[str, Any], tmp_path: Path) -> None:
    """With a scheduler that steps when the epoch ends, and validations at the checkpoint, or later."""
    expected = train(tmp_path / "whole", 3, mid=4, scheduler=never_better, options=options)
    for step in (2, 6, 7):
        ckpt = tmp_path / "whole" / f"step={step}.ckpt"
        found = train(tmp_path / str(step), 3, ckpt=ckpt, mid=4, scheduler=never_better, options=options)
        assert found == expected


@pytest.mark.parametrize("saves", [{"every_n_train_steps": 3}, {"save_on_train_epoch_end": False}])
def test_early_stopping_looks_at_the_epoch_that_a_resumed_run_ends(saves: dict[str, Any], tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EarlyStopping

    def losses(name: str, ckpt: Path | None = None) -> list[float]:
        stopping = EarlyStopping("val_loss", patience=1, mode="max", min_delta=1e9)  # after the second epoch
        return train(tmp_path / name, 6, ckpt=ckpt, callbacks=[stopping], **saves)

    expected = losses("whole")
    assert len(expected) == 2 * 3 + 2
    for step in (3, 6):
        assert losses("resumed", tmp_path / "whole" / f"step={step}.ckpt") == expected


@pytest.mark.slow
def test_validation_loaders_that_draw_leave_training_alone(tmp_path: Path) -> None:
    def losses(validated: bool) -> list[float]:
        pyro.clear_param_store()
        lightning.seed_everything(0)
        model = Factors()
        module = SVIModule(model, AmortizedGuide(model))
        val = loader(shuffle=True, num_workers=1) if validated else None
        quiet(tmp_path, max_epochs=3).fit(module, loader(shuffle=True), val)
        return module.history.dataset["train_loss"].values.tolist()

    assert losses(True) == losses(False)


def test_gradients_that_wait_for_a_step_are_saved(tmp_path: Path) -> None:
    """Of five batches, two to a step, the third is validated after, and saved, before the fourth."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    expected = train(tmp_path / "whole", 3, mid=2, options=options, save_on_train_epoch_end=False)
    for step in (1, 4, 7):
        ckpt = tmp_path / "whole" / f"step={step}.ckpt"
        assert any(torch.load(ckpt, weights_only=True)["svi"]["gradients"])
        found = train(tmp_path / "resumed", 3, ckpt=ckpt, mid=2, options=options, save_on_train_epoch_end=False)
        assert found == expected


@pytest.mark.parametrize("every", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_loaders_that_are_made_anew_every_few_epochs(every: int, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Data(lightning.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader(shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return loader()

    def losses(ckpt: Path | None = None) -> list[float]:
        pyro.clear_param_store()
        lightning.seed_everything(0)
        model = Factors()
        module, saving = SVIModule(model, AmortizedGuide(model)), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        options = {"callbacks": [saving], "enable_checkpointing": True, "reload_dataloaders_every_n_epochs": every}
        quiet(tmp_path, max_epochs=6, **options).fit(module, datamodule=Data(), ckpt_path=ckpt)
        history = module.history.dataset
        return history["train_loss"].values.tolist() + history["val_loss"].values.tolist()

    expected = losses()
    for epoch in range(5):
        assert losses(tmp_path / f"epoch={epoch}.ckpt") == expected


def run_until_killed(path: str, epochs: int) -> None:
    torch.set_num_threads(1)
    last = Path(path) / "last.ckpt"
    train(Path(path), epochs, ckpt=last if last.exists() else None)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Killed at any moment, again and again; checkpoints are whole or absent."""
    context = torch.multiprocessing.get_context("spawn")
    for wait in (0.0, 0.4, 1.1):
        process = context.Process(target=run_until_killed, args=(str(tmp_path / "killed"), 10_000))
        process.start()
        before = len(list((tmp_path / "killed").glob("step*.ckpt")))
        while process.is_alive() and len(list((tmp_path / "killed").glob("step*.ckpt"))) < before + 3:
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -9
    state = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    epochs = state["epoch"] + 3
    found = train(tmp_path / "killed", epochs, ckpt=tmp_path / "killed" / "last.ckpt")
    assert found == train(tmp_path / "whole", epochs)
