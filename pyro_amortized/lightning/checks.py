"""Checks of what users hand to Lightning's module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, SparseAdam
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

__all__ = [
    "check_averaged",
    "check_batches",
    "check_built",
    "check_clippable",
    "check_counted",
    "check_evaluated",
    "check_loaded",
    "check_median",
    "check_module_options",
    "check_optimizer",
    "check_single",
    "warn_of_pending",
    "warn_of_shared",
    "warn_of_unregistered",
]


def check_module_options(
    model: Any, guide: Any, elbo: Any, optimizer: Any, scheduler: Any, to_args: Any, plate: Any
) -> None:
    """Raises a ValueError unless every argument of ``SVIModule`` is what it is to be."""
    for name, value in (("model", model), ("guide", guide)):
        if isinstance(value, SVI):
            raise ValueError(
                f"Cannot train with {name}=<SVI> because the trainer takes its place; try SVIModule(svi.model, "
                "svi.guide), with the ELBO that svi was given as third argument."
            )
        if not callable(value) or isinstance(value, type):
            cause, remedy = "it is not callable", f"the Pyro {name} itself"
            if isinstance(value, type):
                cause, remedy = (
                    "it is a class",
                    f"an instance, as {value.__name__}({'model' if name == 'guide' else ''})",
                )
            raise ValueError(f"Cannot train with {name}={value!r} because {cause}; try {remedy}.")
    if isinstance(elbo, type) or not (hasattr(elbo, "loss") and hasattr(elbo, "loss_and_grads")):
        raise ValueError(
            f"Cannot train with elbo={elbo!r} because it is no ELBO of Pyro's; try elbo=pyro.infer.Trace_ELBO()."
        )
    if isinstance(optimizer, PyroOptim | Optimizer) or not callable(optimizer):
        raise ValueError(
            f"Cannot train with optimizer={optimizer!r} because a function from parameters to a torch optimizer is "
            "wanted; try optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)."
        )
    if plate is not None and (not isinstance(plate, str) or not plate):
        raise ValueError(
            f"Cannot train with plate={plate!r} because it is no name; try the name of one plate of the model, "
            "plate='data'."
        )
    for name, function in (("scheduler", scheduler), ("to_args", to_args)):
        if function is not None and not callable(function):
            example = {
                "scheduler": "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)",
                "to_args": "lambda batch: (batch[0],)",
            }[name]
            raise ValueError(f"Cannot train with {name}={function!r} because it is no function; try {name}={example}.")


def check_optimizer(optimizer: Any, modules: Iterable[nn.Module]) -> Optimizer:
    """What the user's function made of the parameters, if that is a torch optimizer, and takes their gradients.

    Raises:
        ValueError: If it is something else.
    """
    sparse = {id(module.weight) for module in modules if isinstance(module, nn.Embedding) and module.sparse}
    if sparse and type(optimizer) in (Adam, AdamW, SparseAdam):
        kinds = {id(p) in sparse for group in optimizer.param_groups for p in group["params"]}
        unfit = "dense" if isinstance(optimizer, SparseAdam) else "sparse"
        if (unfit == "sparse") in kinds:
            raise ValueError(
                f"Cannot train a sparse table by {type(optimizer).__name__} because it takes no {unfit} gradients, of "
                "which there are some; try torch.optim.Adagrad or torch.optim.SGD, which take both, or a guide with "
                "sparse=False."
            )
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"Cannot train with the {type(optimizer).__name__} that optimizer returned because it is no torch "
            "optimizer; try optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)."
        )
    return optimizer


def check_averaged(trainer: Any) -> None:
    """Raises a ValueError if callbacks average parameters, of which they have taken a copy before these are found."""
    kinds = {type(c): [kind.__name__ for kind in type(c).__mro__] for c in trainer.callbacks}
    averaging = [kind for kind, names in kinds.items() if any(name.endswith("WeightAveraging") for name in names)]
    if averaging:
        raise ValueError(
            f"Cannot average parameters by {averaging[0].__name__} because it has copied the module before its "
            "parameters were found; try module.initialize(batch) before trainer.fit."
        )


def check_built(ready: bool, parameters: Sequence[nn.Parameter]) -> None:
    """Raises a ValueError unless the parameters have been found, and there are some."""
    if not ready:
        raise ValueError(
            "Cannot tell the optimizer which parameters to train because the model has not run yet; try "
            "module.initialize(batch) before."
        )
    if not parameters:
        raise ValueError(
            "Cannot train because neither the model nor the guide has parameters; try a latent site in the model, for "
            "which AmortizedGuide makes some, or pyro.param."
        )


def check_clippable(parameters: Iterable[nn.Parameter], gradient_clip_val: float | None) -> None:
    """Raises a ValueError if gradients are to be clipped of which some are sparse."""
    if gradient_clip_val and any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise ValueError(
            f"Cannot clip gradients by gradient_clip_val={gradient_clip_val} because those of a sparse table have no "
            "norm in torch; try a guide with sparse=False, or a Trainer without gradient_clip_val."
        )


def check_evaluated(weight: float) -> None:
    """Raises a ValueError if no batch has been evaluated, whose loss would count as 0."""
    if not weight:
        raise ValueError(
            "Cannot evaluate the loss because the loader has no batches; try one that has some, drop_last=False, or a "
            "Trainer with limit_val_batches=0."
        )


def check_counted(counted: Any, elbo: Any) -> None:
    """Raises a ValueError unless the model has run, and shown how many rows a process has."""
    if not counted:
        raise ValueError(
            f"Cannot share the datapoints among processes with a {type(elbo).__name__} because a loss that is compiled "
            "does not run the model again, which tells how many there are in a batch; try elbo=pyro.infer.Trace_ELBO()."
        )


def check_single(loaders: Any) -> None:
    """Raises a ValueError if there are several loaders to train on."""
    if isinstance(loaders, Mapping | list | tuple | CombinedLoader):
        raise ValueError(
            f"Cannot train on a {type(loaders).__name__} of loaders because a step takes the model's arguments from "
            "one batch; try one DataLoader, of a torch.utils.data.StackDataset or ConcatDataset of the data, or "
            "DataLoader(batches, batch_size=None) of a list of batches."
        )


def check_batches(loader: Any) -> None:
    """Raises a ValueError if a loader gives datapoints one by one, each of which would pass for a batch."""
    plain = isinstance(loader, DataLoader) and isinstance(loader.dataset, TensorDataset)
    one_by_one = plain and loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler)
    if one_by_one or isinstance(loader, Tensor):
        raise ValueError(
            f"Cannot train on this {type(loader).__name__} because it gives the datapoints one by one, and a model "
            "takes batches of them; try DataLoader(TensorDataset(x), batch_size=128)."
        )


def check_median(guide: Any) -> Callable[..., Any]:
    """The guide's ``median``, if it has one.

    Raises:
        ValueError: If it has none.
    """
    if not hasattr(guide, "median"):
        raise ValueError(
            f"Cannot predict by a {type(guide).__name__} because it knows no medians; try pyro.infer.Predictive(model, "
            "guide=guide, num_samples=...), or a guide of this package."
        )
    median: Callable[..., Any] = guide.median
    return median


def check_loaded(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises a ValueError if a file lacks parameters that the module has, or holds those of another one."""
    if missing or unexpected:
        names = f"lacks {missing[:3]}" if missing else ""
        names += (" and " if missing and unexpected else "") + (f"holds {unexpected[:3]}" if unexpected else "")
        raise ValueError(
            f"Cannot load this state because it {names}, as of another model or guide; try the model and the guide "
            "that it was saved with."
        )


def warn_of_pending(names: Sequence[str]) -> None:
    """Warns of parameters of functions, which cannot be put in their place before the model has run."""
    if names:
        warnings.warn(
            f"the parameters {names} of pyro.param and pyro.module wait for the first batch of a trainer, and until "
            "then the model has others: call module.initialize(batch) before using model or guide without one.",
            stacklevel=3,
        )


def warn_of_shared(names: Sequence[str]) -> None:
    """Warns of parameters that are loaded into another module as well."""
    if names:
        warnings.warn(
            f"the parameters {names} of pyro.param are also those of another SVIModule, since Pyro keeps one of each "
            "name, and it has the loaded values from now on: to compare two of them, write the model as a plain "
            "nn.Module, whose parameters are its own, or load one after the other.",
            stacklevel=3,
        )


def warn_of_unregistered(kinds: Sequence[str]) -> None:
    """Warns of modules that functions call without training them."""
    if kinds:
        warnings.warn(
            f"the model or the guide calls modules ({', '.join(kinds)}) with parameters that are not trained, since "
            "pyro.module has not been given them, so that they stay in the mode in which they are and are not saved: "
            'call pyro.module("name", module) in the function, or module.requires_grad_(False).eval() before.',
            stacklevel=3,
        )
