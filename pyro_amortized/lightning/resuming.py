"""What an interrupted run has still to do: the trainer saves before validations, and schedulers that wait for them."""

from __future__ import annotations

import warnings
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
        ``metrics``, which these and other callbacks look at; whether the epoch is at its end, ``of_epoch``, and its
        ``hooks`` are still to be called; the number of ``steps`` after this one, by which loggers count; and the epochs
        in which loaders were ``reloaded``.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    batch: Any = loop.batch_progress.current
    epoch: Any = trainer.fit_loop.epoch_progress.current
    after_batch = not trainer.validating and batch.completed < batch.processed
    within = after_batch or trainer.validating
    of_epoch = (within or epoch.processed == epoch.ready) and trainer.is_last_batch and epoch.completed < epoch.ready
    of_step = after_batch and not loop._should_accumulate()
    due = {"epoch": (of_epoch and not within, trainer.current_epoch), "step": (of_step, loop.batch_idx)}
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
        "hooks": of_epoch and within,
        "steps": loop._batches_that_stepped + int(within and not loop._should_accumulate()),
        "reloaded": (trainer.fit_loop._last_train_dl_reload_epoch, loop.val_loop._last_val_dl_reload_epoch),
    }


def accumulated(trainer: Trainer, module: LightningModule) -> dict[str, torch.Tensor]:
    """The gradients of batches of which the optimizer has not made a step yet."""
    if not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    return {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}


def catch_up(trainer: Trainer, module: LightningModule, left: Mapping[str, Any]) -> None:
    """Does what was left to do; warns where it is not known what was done."""
    loaders: Any = trainer.fit_loop._combined_loader
    if num_processes() > 1 and any(hasattr(loader, "load_state_dict") for loader in loaders.flattened):
        warnings.warn(
            "Lightning saves where the loader of the first process is, for all processes: a run of several that goes "
            "on with a stateful loader has other batches than an unbroken one. Try a plain DataLoader, and "
            "checkpoints at the end of epochs.",
            stacklevel=2,
        )
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
        _end_epoch(trainer, left["steps"], left["hooks"])
    of_training, of_validation = left["reloaded"]
    trainer.fit_loop._last_train_dl_reload_epoch = of_training
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = of_validation


def _end_epoch(trainer: Trainer, steps: int, hooks: bool) -> None:
    """Puts the trainer between two epochs, as one is that has not been resumed, which starts its loaders next.

    Left alone it would not call what is due at the end, such as early stopping, and with ``max_steps`` go on within the
    epoch that ended.
    """
    loop: Any = trainer.fit_loop
    for resumed in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        resumed._restarting = resumed._resuming_from_checkpoint = False
        resumed.reset_restart_stage()
    loop.epoch_loop._batches_that_stepped = steps
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        epochs.started = epochs.ready
        epochs.processed = epochs.completed = epochs.ready - int(hooks)
    if hooks:
        loop.on_advance_end()


def go_on(trainer: Trainer) -> None:
    """Makes the rest of a resumed epoch one like others: at its end schedulers step that watch a metric."""
    trainer.fit_loop._restarting = False


def restore_of_process(saved: Mapping[str, Any] | None, rank: int) -> None:
    """Puts the generators of this process back to where they were, if there were as many processes."""
    if saved is not None and len(saved["generators"]) == num_processes():
        restore_generators(saved["generators"][rank])
