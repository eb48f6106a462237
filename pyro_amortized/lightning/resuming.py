"""What an interrupted run has still to do: the trainer saves before validations, and schedulers that wait for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer

__all__ = ["catch_up", "go_on", "left_to_do"]


def left_to_do(trainer: Trainer) -> dict[str, Any]:
    """What a trainer that saves would have done next, and leaves out when it resumes.

    Returns:
        Whether there is a ``validation``; which of the ``schedulers`` that watch a metric are to step then; and the
        ``metrics``, which these and other callbacks look at; and whether the epoch was at its end, ``of_epoch``.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    batch: Any = loop.batch_progress.current
    epoch: Any = trainer.fit_loop.epoch_progress.current
    after_batch = not trainer.validating and batch.completed < batch.processed
    at_end = after_batch or trainer.validating or epoch.processed == epoch.ready
    of_epoch = at_end and trainer.is_last_batch and epoch.completed < epoch.ready
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
        "of_epoch": bool(trainer.is_last_batch),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def catch_up(trainer: Trainer, module: LightningModule, left: Mapping[str, Any]) -> None:
    """Does what was left to do.

    Warns where Lightning goes on otherwise than an unbroken run would: after the end of an epoch with ``max_steps``.
    """
    if left["of_epoch"] and trainer.max_steps != -1:
        warnings.warn(
            "this run was saved at the end of an epoch and goes on with max_steps, by which Lightning may start the "
            "next epoch otherwise than an unbroken run: its losses may differ. Try max_epochs, or checkpoints within "
            "an epoch with a torchdata.stateful_dataloader.StatefulDataLoader.",
            stacklevel=2,
        )
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in left["metrics"].items()})
    if left["validation"]:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        module.on_validation_model_zero_grad()
        loop.run()
        trainer.training = True
    for config, due in zip(trainer.lr_scheduler_configs, left["schedulers"], strict=False):
        if due and config.monitor in trainer.callback_metrics:
            module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])


def go_on(trainer: Trainer) -> None:
    """Makes the rest of a resumed epoch one like others: at its end schedulers step that watch a metric."""
    trainer.fit_loop._restarting = False
