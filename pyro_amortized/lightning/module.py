"""SVI as a module of Lightning, whose Trainer does epochs, validation, early stopping, checkpoints and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from lightning import LightningModule
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_amortized.diagnostics.batches import ToArgs, call_of
from pyro_amortized.diagnostics.processes import num_processes, of_all_processes, share_of_rows, weighted_sum
from pyro_amortized.lightning.checks import (
    check_averaged,
    check_built,
    check_clippable,
    check_counted,
    check_evaluated,
    check_loaded,
    check_median,
    check_module_options,
    check_optimizer,
    check_single,
    warn_of_pending,
    warn_of_shared,
    warn_of_unregistered,
)
from pyro_amortized.lightning.files import write_whole_files
from pyro_amortized.lightning.history import History, Record
from pyro_amortized.lightning.loaders import (
    all_loaders,
    deals,
    first_batch,
    generators_of,
    give_generators,
    loaders_of,
    plain_tensors,
    prepares_validation,
)
from pyro_amortized.lightning.resuming import accumulated, catch_up, go_on, left_to_do, restore_of_process
from pyro_amortized.training.generators import generator_state, restore_generators
from pyro_amortized.training.gradients import differentiable_loss
from pyro_amortized.training.kl_annealing import KLAnnealing
from pyro_amortized.training.parameters import ModulesCalled, StoreParameters, find_parameters, owners
from pyro_amortized.training.plates import DataPlate, RowsOfPlate, find_plate, is_of_batch

__all__ = ["SVIModule"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
_ADAM = partial(Adam, lr=1e-3)


class SVIModule(LightningModule):
    r"""Stochastic variational inference for ``lightning.Trainer``.

    Any model and guide, of this package or of Pyro, functions or modules, with any ELBO. Parameters are found by one
    evaluation of the loss on the first batch, before the optimizer asks for them; a guide that is built in its first
    call is built by it. Those in Pyro's parameter store are registered here, so that ``state_dict`` holds all of them,
    and stay in the store.

    Logged are ``train_loss`` after every step, what ``svi.step`` would return, and after a validation ``val_loss``, the
    loss of the model and the guide in evaluation mode, with ``val_elbo``, its negative: for early stopping and
    checkpoints. Where the model's plate has a size of its own, both stand for that many datapoints, and are averaged
    over batches, weighted by their rows; where the plate is as large as a batch, ``val_loss`` is the sum over batches.

    Several processes (``Trainer(strategy="ddp")``) have the gradient of one process on all their rows together, whether
    batches are equally large or not, global latents included.

    A run that is resumed from a checkpoint (``trainer.fit(..., ckpt_path=...)``) goes on with the same numbers, since
    the states of the random number generators are saved along. In the middle of an epoch this needs a loader that knows
    where it was: ``torchdata.stateful_dataloader.StatefulDataLoader``.

    Args:
        model: A Pyro model. With :class:`~pyro_amortized.training.KLAnnealing` pass ``annealing.model``: it is annealed
            in training, one step of the schedule after every step of the optimizer, and not in validation.
        guide: Its guide; ``annealing.guide`` likewise.
        elbo: Any ELBO of Pyro's or of this package; ``Trace_ELBO()`` by default.
        to_args: Where batches hold something else than the model's arguments: a function from a batch to positional
            arguments, a tuple, or to a pair ``(args, kwargs)``.
        optimizer: A function from parameters to a torch optimizer; Adam with lr 1e-3 by default.
        scheduler: A function from the optimizer to a scheduler, which steps after every epoch, or to a dictionary as
            Lightning's ``configure_optimizers`` describes.
        plate: Name of the plate of the datapoints that the loader goes over. By default that of the guide if it is one
            of this package, else the plate with data that a smaller batch makes smaller.

    Attributes:
        history: The course of training, a :class:`History`.

    Raises:
        ValueError: If an argument is of another kind, if a loader goes over another number of datapoints than the
            model's plate has, or if the parameter store holds other parameters under the same names.

    Example:
        >>> import lightning, torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> from pyro_amortized.lightning import SVIModule
        >>> pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> loader = torch.utils.data.DataLoader(torch.randn(64), batch_size=16)
        >>> module = SVIModule(model, AmortizedGuide(model))
        >>> quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
        >>> trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(module, loader, loader)
        >>> module.history.dataset.sizes["step"]
        8
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        elbo: ELBO | None = None,
        *,
        to_args: ToArgs | None = None,
        optimizer: MakeOptimizer = _ADAM,
        scheduler: Callable[[Optimizer], Any] | None = None,
        plate: str | None = None,
    ) -> None:
        check_module_options(model, guide, Trace_ELBO() if elbo is None else elbo, optimizer, scheduler, to_args, plate)
        super().__init__()
        annealing = getattr(model, "__self__", None)
        self.annealing = annealing if isinstance(annealing, KLAnnealing) else None
        self._trained = (model, guide)
        self.model, self.guide = self.annealing.bare if self.annealing is not None else (model, guide)
        self.methods_of = nn.ModuleList(owners((self.model, self.guide)))
        self.store, self.called = StoreParameters(), ModulesCalled()
        self.elbo: Any = Trace_ELBO() if elbo is None else elbo
        self.to_args = to_args
        self._optimizer, self._scheduler = optimizer, scheduler
        self._requested = plate
        self._plate: DataPlate | None = None
        self._ready = False
        self._pending: Mapping[str, Any] = {}
        self._record = Record()
        self._resumed: dict[str, Any] | None = None
        self._evaluated: list[tuple[float, int]] = []
        self._before_validation: dict[str, Any] | None = None
        self._at_end: dict[str, Any] | None = None

    @property
    def history(self) -> History:
        """The course of training so far."""
        return self._record.history(is_of_batch(self._plate))

    # Parameters

    def initialize(self, batch: Any) -> None:
        """Finds all parameters by one evaluation of the loss on a batch; the trainer does so with its first one.

        Args:
            batch: A batch, as the loader yields it.
        """
        if self._ready:
            return
        args, kwargs = call_of(batch, None, self.to_args, self.model)
        found = find_parameters(self, lambda: self.elbo.loss(self.model, self.guide, *args, **kwargs))
        warn_of_unregistered(self.called.adopt(found))
        shared = self.store.adopt(found.names, {id(parameter) for parameter in self.parameters()})
        read = partial(call_of, model_kwargs=None, to_args=self.to_args, model=self.model)
        self._plate = find_plate(self.model, batch, read, self._requested, getattr(self.guide, "plate", None))
        self._ready = True
        if self._pending:
            warn_of_shared(shared)
            self.load_state_dict(self._pending)
            self._pending = {}

    def setup(self, stage: str) -> None:
        """Finds the parameters, and checks the size of the data against the model's."""
        write_whole_files(self.trainer)
        loaders = loaders_of(self.trainer, stage)
        if stage == "fit":
            check_single(loaders)
        loader = next(all_loaders(loaders))
        if not self._ready:
            check_averaged(self.trainer)
            batch = self._on_before_batch_transfer(first_batch(loader))  # by hooks of the data's, as in training
            self.initialize(self.trainer.strategy.broadcast(self._apply_batch_transfer_handler(batch)))
        if stage == "fit" and self._plate is not None:
            self._plate.check_loader(loader, dealt=deals(self.trainer))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads parameters and buffers; those that are not known yet, as soon as they are.

        Raises:
            ValueError: If what is known already differs from what the file holds, as of another model.
        """
        if self._ready:
            return super().load_state_dict(state_dict, strict, assign)
        self._pending = dict(state_dict)
        pending = [name for name in state_dict if name.startswith(("store.", "called."))]
        found = super().load_state_dict({n: v for n, v in state_dict.items() if n not in pending}, False, assign)
        if strict:
            check_loaded(found.missing_keys, [n for n in found.unexpected_keys if not n.startswith("guide.")])
        warn_of_pending([name.partition(".")[2].replace("/", ".") for name in pending])
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves with what is known what waits to be."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self._pending.items()})

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler where there is one."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        check_built(self._ready, parameters)
        optimizer = check_optimizer(self._optimizer(parameters), self.modules())
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            every = getattr(self._trainer, "check_val_every_n_epoch", None) or 1
            scheduler = {"scheduler": scheduler, "monitor": "val_loss", "frequency": every}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimizer, and of the annealing."""
        super().optimizer_step(*args, **kwargs)
        if self.annealing is not None:
            self.annealing.step()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips gradients as the trainer is asked to."""
        check_clippable(self.parameters(), gradient_clip_val)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, with its gradient."""
        args, kwargs = call_of(batch, None, self.to_args)  # the first batch has shown that the model takes them
        evaluate = partial(differentiable_loss, self.elbo, self._trained, args, kwargs, self.parameters)
        loss = evaluate() if num_processes() == 1 else self._share(evaluate)
        self._record.step(loss)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def _share(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """This process's part of the loss: the mean of all parts is the loss of their rows together."""
        if self._plate is None:
            raise ValueError(
                "Cannot train in several processes because it is not clear in which plate of the model the datapoints "
                "lie that they share; try putting the data into a pyro.plate, and its name, SVIModule(..., plate=...)."
            )
        of_batch = self._plate.size is None
        groups = getattr(self.guide, "groups", None) or ()
        with RowsOfPlate(self._plate.name, num_processes() if of_batch else 1, groups) as plate:
            loss = evaluate()
        check_counted(plate.rows or of_batch, self.elbo)
        return loss if of_batch else loss * share_of_rows(plate.rows, self.device)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluates the loss of a batch."""
        if batch_idx == dataloader_idx == 0:
            self._evaluated = []  # what an evaluation has left that broke off
        with plain_tensors(batch) as plain, RowsOfPlate(self._plate.name if self._plate else "") as plate:
            args, kwargs = call_of(plain, None, self.to_args, self.model)
            self._evaluated.append((self.elbo.loss(self.model, self.guide, *args, **kwargs), plate.rows))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluates the loss of a batch."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The guide's medians of a batch, by site."""
        with plain_tensors(batch) as plain:
            args, kwargs = call_of(plain, None, self.to_args, self.model)
            return check_median(self.guide)(*args, **kwargs)

    def on_train_batch_end(self, *args: Any) -> None:
        """Keeps the generators' states before a validation: training draws the same numbers, interrupted or not."""
        self._before_validation = generator_state() if prepares_validation(self.trainer) else None

    def on_validation_end(self) -> None:
        """Puts them back."""
        if self._before_validation is not None:
            restore_generators(self._before_validation)
            self._before_validation = None

    def on_validation_epoch_end(self) -> None:
        """Logs the loss of all batches."""
        loss = self._log_evaluated("val")
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self._record.validation(self.current_epoch, loss)

    def on_test_epoch_end(self) -> None:
        """Logs the loss of all batches."""
        self._log_evaluated("test")

    def _log_evaluated(self, stage: str) -> float:
        evaluated, self._evaluated = self._evaluated, []
        of_batch = is_of_batch(self._plate)
        loss, rows = weighted_sum([(x, 1.0 if of_batch else n) for x, n in evaluated], self.device)
        check_evaluated(rows)
        loss = loss if of_batch else loss / rows
        logged = {f"{stage}_loss": loss, f"{stage}_elbo": -loss}
        self.log_dict(logged, prog_bar=True, sync_dist=num_processes() > 1)  # which leaves them as they are
        return loss

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves what a resumed run needs to go on with the same numbers."""
        generators = generators_of(self.trainer.train_dataloader)
        checkpoint["svi"] = {
            "generators": of_all_processes(self._before_validation or self._at_end or generator_state()),
            "of_loaders": of_all_processes([generator.get_state() for generator in generators]),
            "left": left_to_do(self.trainer),
            "gradients": of_all_processes(accumulated(self.trainer, self)),
            "histories": of_all_processes(self._record.state()),
            "annealing_steps": 0 if self.annealing is None else self.annealing.num_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was saved for the moment when training goes on."""
        if self._trainer is not None and self._trainer.precision == "64-true":
            self.double()  # which the trainer does after it has loaded
        goes_on = self._trainer is None or self._trainer.state.fn == "fit"  # a test is of the weights alone
        self._resumed = checkpoint.get("svi") if goes_on else None
        if self._resumed is None:
            return
        histories = self._resumed["histories"]
        self._record.restore(histories[self.global_rank if len(histories) == num_processes() else 0])
        if self.annealing is not None:
            self.annealing.num_steps = self._resumed["annealing_steps"]

    def on_fit_start(self) -> None:
        """Puts the generators into the state at the checkpoint, from which loaders draw the order of the data."""
        self._at_end = None
        if self.trainer.ckpt_path is None:
            self._resumed = None
        restore_of_process(self._resumed, self.global_rank)

    def on_train_start(self) -> None:
        """Puts loaders where they were; those for validation get generators of their own, not to disturb them."""
        give_generators(self.trainer)
        if self._resumed is None:
            return
        restore_of_process(self._resumed, self.global_rank)
        catch_up(self.trainer, self, self._resumed["left"])
        restore_of_process(self._resumed, self.global_rank)
        if len(self._resumed["of_loaders"]) == num_processes():
            states = self._resumed["of_loaders"][self.global_rank]
            for generator, state in zip(generators_of(self.trainer.train_dataloader), states, strict=False):
                generator.set_state(state.cpu())
            gradients = self._resumed["gradients"][self.global_rank]
            for name, parameter in self.named_parameters():
                parameter.grad = gradients[name].to(parameter) if name in gradients else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Does so again in an epoch that goes on, where the loader has drawn the order from its own state."""
        if self._resumed is not None:
            if not self._resumed["left"]["of_epoch"]:
                restore_of_process(self._resumed, self.global_rank)
            go_on(self.trainer)
            self._resumed = None

    def on_train_end(self) -> None:
        """Keeps the generators' states, which saving draws from with some loaders."""
        self._at_end = generator_state()
