"""A loss that can be differentiated, of any ELBO: also of those that give only gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["differentiable_loss"]


def differentiable_loss(
    elbo: Any,
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    find_parameters: Callable[[], Iterable[nn.Parameter]],
) -> Tensor:
    """The negative ELBO as a tensor with the gradient of the ELBO's own estimator.

    ``RenyiELBO``, ``TraceGraph_ELBO`` and others leave gradients at the parameters and return a number. Theirs is the
    number plus a term that is zero and has these gradients.

    Args:
        elbo: The ELBO.
        pair: Model and guide.
        args: Their positional arguments.
        kwargs: Their keyword arguments.
        find_parameters: Returns what is trained.
    """
    if hasattr(elbo, "differentiable_loss"):
        return torch.as_tensor(elbo.differentiable_loss(*pair, *args, **kwargs))
    parameters = [parameter for parameter in find_parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        found = elbo.loss_and_grads(*pair, *args, **kwargs)
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    loss = sum(found) if isinstance(found, tuple) else found  # wake-sleep has one loss for each of its phases
    surrogate = sum((parameter * gradient).sum() for parameter, gradient in gradients)
    return torch.as_tensor(loss) + surrogate - torch.as_tensor(surrogate).detach()
