r"""Training of the encoder on data that the model makes itself, against encoders that learn their data by heart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from torch import Tensor, nn

from pyro_amortized.diagnostics.simulation import redraw, simulate
from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import generator
from pyro_amortized.structure.arguments import CallArguments
from pyro_amortized.structure.state import kept_state
from pyro_amortized.training.parameters import parameters_of

__all__ = ["DecoderDraws"]

_CHECKED_EVERY = 64
"""Steps from one simulation with all checks to the next."""


class DecoderDraws(SVI):
    r"""SVI that trains the encoder on draws of the model beside the data.

    An encoder that sees few data many times learns them by heart: its amortization gap falls on them and grows on
    others. The model can make any number of others. Every :meth:`step` simulates as many datapoints as the call has,
    and follows

    .. math:: \nabla_\theta \sum_n L(x_n; \theta, \phi), \qquad
        \nabla_\phi \Big[ \sum_n L(x_n; \theta, \phi) + \sum_n L(x'_n; \theta, \phi) \Big], \qquad
        x'_n \sim p_\theta(x),

    where :math:`L(x) = \log p_\theta(x) - KL(q_\phi(z|x) \| p_\theta(z|x))` is the ELBO, or what ``loss`` computes,
    :math:`\phi` the parameters of the encoder and its heads and :math:`\theta` all others: the model's, those that it
    shares with the guide and those of the global latents, which are held at their median for the draws. So the model
    never learns from its own draws. A step takes 2 to 3 times as long as one of ``SVI``.

    Draws are made by :func:`pyro_amortized.simulate`, with the model's other arguments (covariates, masks, indices) as
    they are in the call, in evaluation mode if the model is a module, and with all checks in the first and every 64th
    step. They follow torch's global seed.

    Args:
        model: The Pyro model.
        guide: A guide of this package that serves unseen data; other arguments than the data keep their shapes.
        optim: Pyro's optimizer.
        loss: An ELBO.

    Raises:
        ValueError: From the first step, if the model is none that :func:`pyro_amortized.simulate` can simulate: its
            data are not among its arguments, it draws random subsamples, or it has scales of its own.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> optimizer = pyro.optim.Adam({"lr": 0.01})
        >>> svi = DecoderDraws(model, AmortizedGuide(model), optimizer, pyro.infer.Trace_ELBO())
        >>> x = torch.randn(8)
        >>> losses = [svi.step(x) for _ in range(10)]

    References:
        Generalization Gap in Amortized Inference, Mingtian Zhang, Peter Hayes, David Barber (2022),
        https://arxiv.org/abs/2205.11640
    """

    def __init__(self, model: Callable[..., Any], guide: LocalGuide, optim: Any, loss: Any) -> None:
        if not isinstance(guide, LocalGuide):
            raise ValueError(
                f"Cannot train a {type(guide).__name__} on draws of the model because it has no encoder that is known "
                "here; try an AmortizedGuide."
            )
        super().__init__(model, guide, optim, loss)
        self._steps = 0

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update: of the model by the data, of the encoder by the data and by draws of the model.

        Returns:
            The loss of the data before the update.
        """
        of_model: set[Tensor] = set()

        def model(*args: Any, **kwargs: Any) -> Any:
            with poutine.trace(param_only=True) as capture:
                result = self.model(*args, **kwargs)
            of_model.update(parameters_of(capture.trace))
            return result

        with poutine.trace(param_only=True) as capture:
            loss = torch_item(self.loss_and_grads(model, self.guide, *args, **kwargs))
        parameters = parameters_of(capture.trace)
        drawn_args, drawn_kwargs = self._draw(args, kwargs)
        others = parameters - (set(self.guide.inference.parameters()) - of_model)
        kept = [(parameter, None if parameter.grad is None else parameter.grad.clone()) for parameter in others]
        with kept_state():
            self.loss_and_grads(self.model, self.guide, *drawn_args, **drawn_kwargs)
        for parameter, grad in kept:
            parameter.grad = grad
        self.optim(parameters)
        zero_grads(parameters)
        return loss

    def _draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
        """The arguments with simulated data."""
        guide: Any = self.guide
        seed = int(torch.randint(2**31, ()))
        self._steps += 1
        with evaluating(guide), evaluating(self.model) if isinstance(self.model, nn.Module) else nullcontext():
            if self._steps % _CHECKED_EVERY != 1:
                return redraw(self.model, guide, args, kwargs, generator(seed, 20))
            simulation = simulate(self.model, guide, args, kwargs, seed=seed)
            return simulation.args, simulation.kwargs
