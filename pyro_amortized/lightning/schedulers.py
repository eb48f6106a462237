"""Schedulers that wait for a validation: the trainer saves before they step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer

__all__ = ["steps_due", "take_steps"]


def steps_due(trainer: Trainer) -> list[float | None]:
    """What the trainer will tell each scheduler once the end of an epoch has been saved; None for all others."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    metrics = trainer.callback_metrics
    validated = trainer.validating or progress.processed == progress.ready
    at_end = validated and trainer.is_last_batch and progress.completed < progress.ready
    return [
        float(metrics[config.monitor])
        if at_end
        and config.reduce_on_plateau
        and config.interval == "epoch"
        and (trainer.current_epoch + 1) % config.frequency == 0
        and config.monitor in metrics
        else None
        for config in trainer.lr_scheduler_configs
    ]


def take_steps(trainer: Trainer, module: LightningModule, due: Sequence[Any]) -> None:
    """Takes the steps that were due when the epoch was saved."""
    for config, value in zip(trainer.lr_scheduler_configs, due, strict=False):
        if value is not None:
            module.lr_scheduler_step(config.scheduler, value)
