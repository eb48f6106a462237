"""What an interrupted run has still to do: the trainer saves before validations, and schedulers that wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer

from pyro_amortized.diagnostics.processes import num_processes
from pyro_amortized.training.generators import restore_generators

__all__ = ["accumulated", "catch_up", "go_on", "left_to_do", "restore_of_process"]


def left_to_do(trainer: Trainer) -> dict[str, Any]:
    """What a trainer that saves would have done next, and leaves out when it resumes.

    Returns:
        Whether there is a ``validation``; which of the ``schedulers`` that watch a metric are to step then; the
        ``metrics``, which these and other callbacks look at; whether the epoch is at its end, ``of_epoch``; and the
        number of ``steps`` after this one, by which loggers count.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    batch: Any = loop.batch_progress.current
    epoch: Any = trainer.fit_loop.epoch_progress.current
    after_batch = not trainer.validating and batch.completed < batch.processed
    within = after_batch or trainer.validating
    of_epoch = (within or epoch.processed == epoch.ready) and trainer.is_last_batch and epoch.completed < epoch.ready
    of_step = after_batch and not loop._should_accumulate()
    due = {"epoch": (of_epoch, trainer.current_epoch), "step": (of_step, loop.batch_idx)}
    return {
        "validation": after_batch and loop._should_check_val_fx(trainer.fit_loop._data_fetcher),
        "schedulers": [
            config.reduce_on_plateau
            and due[config.interval][0]
            and (due[config.interval][1] + 1) % config.frequency == 0
            for config in trainer.lr_scheduler_configs
        ],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "of_epoch": bool(trainer.is_last_batch),
        "steps": loop._batches_that_stepped + int(within and not loop._should_accumulate()),
        "reloaded": (trainer.fit_loop._last_train_dl_reload_epoch, loop.val_loop._last_val_dl_reload_epoch),
    }


def accumulated(trainer: Trainer, module: LightningModule) -> dict[str, torch.Tensor]:
    """The gradients of batches of which the optimizer has not made a step yet."""
    if not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def catch_up(trainer: Trainer, module: LightningModule, left: Mapping[str, Any]) -> None:
    """Does what was left to do."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in left["metrics"].items()})
    if left["validation"]:
        loop = trainer.fit_loop.epoch_loop.val_loop
        epochs = trainer.fit_loop.epoch_progress.current
        epochs.completed = epochs.ready - 1
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True
    for config, due in zip(trainer.lr_scheduler_configs, left["schedulers"], strict=False):
        if due and config.monitor in trainer.callback_metrics:
            module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])
    if left["of_epoch"]:
        _end_epoch(trainer, left["steps"])
    of_training, of_validation = left["reloaded"]
    trainer.fit_loop._last_train_dl_reload_epoch = of_training
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = of_validation


def _end_epoch(trainer: Trainer, steps: int) -> None:
    """Puts the trainer between two epochs, as one is that has not been resumed, which starts its loaders next.

    Left alone, one with ``max_steps`` would go on within the epoch that ended.
    """
    loop: Any = trainer.fit_loop
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        epochs.started = epochs.processed = epochs.completed = epochs.ready
    for resumed in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        resumed._restarting = resumed._resuming_from_checkpoint = False
        resumed.reset_restart_stage()
    loop.epoch_loop._batches_that_stepped = steps


def go_on(trainer: Trainer) -> None:
    """Makes the rest of a resumed epoch one like others: at its end schedulers step that watch a metric."""
    trainer.fit_loop._restarting = False


def restore_of_process(saved: Mapping[str, Any] | None, rank: int) -> None:
    """Puts the generators of this process back to where they were, if there were as many processes."""
    if saved is not None and len(saved["generators"]) == num_processes():
        restore_generators(saved["generators"][rank])
