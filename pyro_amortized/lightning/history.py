"""What a training run has seen: the loss of every step, and the ELBO of every validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pyro_amortized.diagnostics.report import Report, in_style, new_axes, style_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

__all__ = ["History", "Record"]


class History(Report):
    """The course of a training run, in nats.

    Attributes:
        dataset: ``train_loss`` over ``step``, as ``svi.step`` would return it; ``val_loss`` and ``val_elbo``, its
            negative, over ``validation``, with the ``epoch`` and the number of batches trained on before
            (``val_step``). The attribute ``of_batches`` says whether these are of the batch at hand and of the
            validation data, or of as many datapoints as the model has.
    """

    def __str__(self) -> str:
        """The last losses in words."""
        train, val = self.dataset["train_loss"].values, self.dataset["val_elbo"].values
        lines = [f"{len(train)} steps of training" + (f", last loss {train[-1]:.2f} nats" if len(train) else "")]
        if len(val):
            best = int(val.argmax())
            lines.append(
                f"{len(val)} validations: last ELBO {val[-1]:.2f} nats, best {val[best]:.2f} in epoch "
                f"{int(self.dataset['epoch'][best])}"
            )
        return "\n".join(lines)

    @in_style
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the losses over the steps of training; those of training as they come, and smoothed.

        Where the model's plate is as large as a batch, losses of batches and of the validation data stand for other
        numbers of datapoints: validation has the axis on the right then.

        Args:
            ax: Matplotlib axes; new ones by default.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        train = self.dataset["train_loss"]
        window = max(1, len(train) // 50)
        lines: list[Any] = []
        if len(train):
            ax.plot(train["step"], train, color=style_colour(0), alpha=0.3, lw=0.8)
            smooth = train.rolling(step=window, min_periods=1).mean()
            lines += ax.plot(train["step"], smooth, color=style_colour(0), label="training")
        ax.set(xlabel="steps", ylabel="loss (negative ELBO, nats)", title=str(self))
        if self.dataset.sizes["validation"]:
            own = ax.twinx() if self.dataset.attrs["of_batches"] else ax
            lines += own.plot(self.dataset["val_step"], self.dataset["val_loss"], "o-", color=style_colour(1), ms=3)
            lines[-1].set_label("validation data, axis on the right" if own is not ax else "validation")
        if lines:
            ax.legend(lines, [line.get_label() for line in lines])
        return ax


class Record:
    """What becomes a :class:`History`; no value is read off its device before it is asked for."""

    def __init__(self) -> None:
        self._train: list[float] = []
        self._new: list[Tensor] = []
        self._validations: list[tuple[int, int, float]] = []

    def step(self, loss: Tensor) -> None:
        """Keeps the loss of a step."""
        self._new.append(loss.detach())
        if len(self._new) >= 1000:
            self._read()

    def validation(self, epoch: int, loss: float) -> None:
        """Keeps the loss of a validation."""
        self._validations.append((epoch, len(self._train) + len(self._new), loss))

    def _read(self) -> list[float]:
        if self._new:
            self._train += torch.stack(self._new).double().tolist()
            self._new = []
        return self._train

    def state(self) -> dict[str, Any]:
        """All of it as numbers."""
        return {"train": list(self._read()), "validations": list(self._validations)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned."""
        self._train, self._new = list(state["train"]), []
        self._validations = [(int(epoch), int(step), loss) for epoch, step, loss in state["validations"]]

    def history(self, of_batches: bool) -> History:
        """The report; losses may be those of the batch at hand."""
        import xarray

        epoch, step, loss = zip(*self._validations, strict=True) if self._validations else ((), (), ())
        val = torch.tensor(loss, dtype=torch.float64).numpy()
        train = torch.tensor(self._read(), dtype=torch.float64).numpy()
        dataset = xarray.Dataset(
            {
                "train_loss": ("step", train, {"units": "nats"}),
                "val_loss": ("validation", val, {"units": "nats"}),
                "val_elbo": ("validation", -val, {"units": "nats"}),
            },
            {
                "step": range(1, len(train) + 1),
                "epoch": ("validation", torch.tensor(epoch, dtype=torch.int64).numpy()),
                "val_step": ("validation", torch.tensor(step, dtype=torch.int64).numpy()),
            },
            {"of_batches": int(of_batches)},
        )
        return History(dataset)
