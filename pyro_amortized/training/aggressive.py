r"""Aggressive training of the encoder: it catches up with the posterior before the model learns to do without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from torch import Tensor

from pyro_amortized.checks import check_count
from pyro_amortized.diagnostics.collapse.divergence import mutual_information
from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import generator, seeded
from pyro_amortized.training.parameters import parameters_of

__all__ = ["AggressiveEncoder"]


class Turns:
    """Whose turn it is to be trained, the encoder's or the model's, by the losses of the encoder's steps.

    Attributes:
        aggressive: Whether the encoder is trained aggressively; may be set.
        encoder_steps: Number of the encoder's steps since the model's last one; 0 after a step of the model.
    """

    def __init__(self, window: int, max_encoder_steps: int) -> None:
        self.window = check_count("window", window, 1, 10)
        self.max_encoder_steps = check_count("max_encoder_steps", max_encoder_steps, 1, 100)
        self.aggressive = True
        self.encoder_steps = 0
        self._losses: list[float] = []
        self._before = float("inf")
        self._information = -float("inf")

    def is_encoders_turn(self, loss: float) -> bool:
        """Whether the encoder goes on; starts it anew if not."""
        if self.encoder_steps < self.max_encoder_steps and self._is_improving():
            self.encoder_steps += 1
            self._losses.append(loss)
            return True
        self.encoder_steps, self._losses, self._before = 0, [], float("inf")
        return False

    def _is_improving(self) -> bool:
        if len(self._losses) < self.window:
            return True
        mean, before = sum(self._losses) / self.window, self._before
        self._losses, self._before = [], mean
        return mean < before

    def learned(self, information: float) -> None:
        """Takes the mutual information of a validation: the aggressive training ends when it is below the last one."""
        self.aggressive &= information >= self._information
        self._information = information

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, as numbers by the names of the attributes."""
        names = ("aggressive", "encoder_steps", "_losses", "_before", "_information")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        for name, value in state_dict.items():
            setattr(self, name, value)


@torch.no_grad()
def information_of(
    guide: LocalGuide,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gather: Callable[[Tensor], list[Tensor]] | None = None,
) -> float:
    """Mutual information of datapoint and latent by a guide, in nats; also of datapoints that others have."""
    rng = generator(0, 14)
    with evaluating(guide), seeded(rng), guide.repeatable():
        phi, family = guide.infer(*args, **kwargs).local
        if gather is not None:
            phi = torch.cat([part.to(phi) for part in gather(phi)])
        return mutual_information(family, phi, rng)[0]


def check_knows_phi(guide: Any) -> None:
    """Raises a ValueError unless a guide knows its variational parameters per datapoint."""
    if not isinstance(guide, LocalGuide):
        raise ValueError(
            f"Cannot train a {type(guide).__name__} aggressively because its variational parameters per datapoint, "
            "and so the mutual information, are unknown; try an AmortizedGuide."
        )


class AggressiveEncoder(SVI, Turns):
    r"""SVI that trains the encoder alone until it stops improving, then the model for one step, and so on.

    While :attr:`aggressive`, each :meth:`step` changes either the guide's parameters or the model's: the guide's until
    the mean loss over ``window`` steps is not below that over the ``window`` before (or for ``max_encoder_steps``),
    then the model's once. Give every step a fresh batch, as usual. :meth:`validate`, called once per epoch or so, ends
    this when the mutual information of datapoint and latent has stopped rising; from then on this is plain SVI.

    Args:
        model: The Pyro model.
        guide: A guide of this package.
        optim: Pyro's optimizer.
        loss: An ELBO.
        window: Number of encoder steps between looks at the loss.
        max_encoder_steps: Most encoder steps for one step of the model.

    Attributes:
        aggressive: Whether the encoder is trained aggressively; may be set.
        encoder_steps: Number of the encoder's steps since the model's last one; 0 after a step of the model.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> optimizer = pyro.optim.Adam({"lr": 0.01})
        >>> svi = AggressiveEncoder(model, AmortizedGuide(model), optimizer, pyro.infer.Trace_ELBO())
        >>> for epoch in range(2):
        ...     for _ in range(3):
        ...         loss = svi.step(torch.randn(8))
        ...     information = svi.validate(torch.randn(20))
        >>> pyro.param("loc").item()  # the encoder has the first steps to itself
        0.0

    References:
        Lagging Inference Networks and Posterior Collapse in Variational Autoencoders, Junxian He, Daniel Spokoyny,
        Graham Neubig, Taylor Berg-Kirkpatrick (2019), https://arxiv.org/abs/1901.05534
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: LocalGuide,
        optim: Any,
        loss: Any,
        *,
        window: int = 10,
        max_encoder_steps: int = 100,
    ) -> None:
        check_knows_phi(guide)
        SVI.__init__(self, model, guide, optim, loss)
        Turns.__init__(self, window, max_encoder_steps)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update: of the encoder or of the model while aggressive, of both afterwards.

        Returns:
            The loss before the update.
        """
        encoder: set[Tensor] = set()

        def guide(*args: Any, **kwargs: Any) -> Any:
            with poutine.trace(param_only=True) as capture:
                result = self.guide(*args, **kwargs)
            encoder.update(parameters_of(capture.trace))
            return result

        with poutine.trace(param_only=True) as capture:
            loss = torch_item(self.loss_and_grads(self.model, guide, *args, **kwargs))
        parameters = parameters_of(capture.trace)
        chosen = parameters
        if self.aggressive:
            chosen = encoder if self.is_encoders_turn(loss) else parameters - encoder
        self.optim(chosen)
        zero_grads(parameters)
        return loss

    def validate(self, *args: Any, **kwargs: Any) -> float:
        """Ends the aggressive training if the mutual information is lower than in the last validation.

        Args:
            *args: The model's arguments with validation data: some 100 to 2000 datapoints, the same each time. The
                cost is quadratic in their number, the mutual information at most its logarithm.
            **kwargs: The model's keyword arguments.

        Returns:
            The mutual information, in nats.
        """
        guide: Any = self.guide
        information = information_of(guide, args, kwargs)
        self.learned(information)
        return information
