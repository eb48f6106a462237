"""Checkpoints that are whole, or are not there."""

from __future__ import annotations

import os
from typing import Any

from lightning import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

__all__ = ["write_whole_files"]


class _WholeFiles(TorchCheckpointIO):
    """Writes beside a checkpoint first.

    Lightning writes to the directory for temporary files, from where a file can be moved in one piece only if that lies
    on the same file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves a checkpoint, under its name once all of it is there."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part = f"{path}.part"
        super().save_checkpoint(checkpoint, part, storage_options)
        os.replace(part, path)


def write_whole_files(trainer: Trainer) -> None:
    """Makes a trainer write so, unless it writes in a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = _WholeFiles()
