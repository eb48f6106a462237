"""What is known of a public model: how it is made, its data, its authors' guide, and what guides must be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal

Program = Callable[..., Any]
"""A model or a guide: a function, a module, or a bound method of one."""


@dataclass(frozen=True, kw_only=True)
class PublicModel:
    """A public model with data.

    Attributes:
        make: Makes the model anew, and its authors' guide, with fresh weights; None for the guide where there is none.
        calls: The model's arguments for all training data. They are several calls where some datapoints have labels;
            steps of training take turns with them, and the first one has most latents.
        num_datapoints: From the model's arguments, the number of datapoints that the ELBO stands for, times any scale
            that the model gives all of its sites.
        loss: Makes the ELBO to train and to evaluate with.
        options: What our guides must be told, beside the model.
        discrete_options: What DiscreteAmortizedGuide must be told, if that is something else.
        enumerated: Names of the discrete latents that are enumerated in the authors' guide. AutoNormal and the guides
            that know no discrete latents get a model that enumerates them.
        hidden: Names of sites of the authors' guide that are no part of the ELBO.
        annealing: From the share of the training that is done, further keyword arguments; None for none.
        auto_normal: Makes Pyro's AutoNormal.
        refined: Whether SemiAmortizedGuide applies.
    """

    make: Callable[[], tuple[Program, Program | None]]
    calls: tuple[tuple[Any, ...], ...]
    num_datapoints: Callable[..., float] = lambda x, *_: len(x)
    loss: Callable[[], ELBO] = Trace_ELBO
    options: dict[str, Any] = field(default_factory=dict)
    discrete_options: dict[str, Any] | None = None
    enumerated: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    annealing: Callable[[float], dict[str, Any]] | None = None
    auto_normal: Callable[[Program], AutoGuide] = AutoNormal
    refined: bool = True
