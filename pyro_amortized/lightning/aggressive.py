"""Aggressive training of the encoder as a callback of Lightning's."""

from __future__ import annotations

from typing import Any

from lightning import Callback
from torch import Tensor

from pyro_amortized.diagnostics.batches import call_of
from pyro_amortized.diagnostics.processes import mean_of_all, of_all_processes
from pyro_amortized.lightning.loaders import plain_tensors
from pyro_amortized.training.aggressive import Turns, check_knows_phi, information_of

__all__ = ["AggressiveTraining"]


class AggressiveTraining(Turns, Callback):
    """Trains the encoder until it lags behind no longer, then the model for one step, and so on.

    As :class:`~pyro_amortized.training.AggressiveEncoder` does for SVI: while :attr:`aggressive`, a step of the
    optimizer moves either the guide's parameters or the others. It ends when the mutual information of datapoint and
    latent, on the first batch of each validation (in several processes, the first ones together), has stopped rising.

    Args:
        window: Number of encoder steps between looks at the loss.
        max_encoder_steps: Most encoder steps for one step of the model.

    Attributes:
        aggressive: Whether the encoder is trained aggressively; may be set.
        encoder_steps: Number of the encoder's steps since the model's last one; 0 after a step of the model.

    Raises:
        ValueError: If the guide is none of this package.

    References:
        Lagging Inference Networks and Posterior Collapse in Variational Autoencoders, Junxian He, Daniel Spokoyny,
        Graham Neubig, Taylor Berg-Kirkpatrick (2019), https://arxiv.org/abs/1901.05534
    """

    def __init__(self, window: int = 10, max_encoder_steps: int = 100) -> None:
        Turns.__init__(self, window, max_encoder_steps)
        self._loss: Tensor | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks the guide."""
        check_knows_phi(pl_module.guide)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Keeps the loss, by which the turn is decided."""
        self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Takes the gradients from those whose turn it is not."""
        if not self.aggressive or self._loss is None:
            return
        encoders = self.is_encoders_turn(mean_of_all(self._loss))
        of_guide = {id(parameter) for parameter in pl_module.guide.parameters()}
        for parameter in pl_module.parameters():
            if (id(parameter) in of_guide) is not encoders:
                parameter.grad = None

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Learns the mutual information from the first batch."""
        if batch_idx == dataloader_idx == 0 and not trainer.sanity_checking and trainer.state.fn == "fit":
            with plain_tensors(batch) as plain:
                call = call_of(plain, None, pl_module.to_args, pl_module.model)
                self.learned(information_of(pl_module.guide, *call, of_all_processes))
