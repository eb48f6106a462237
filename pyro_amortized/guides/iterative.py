"""The iterative amortized guide: a network that learns to take the refinement steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from pyro_amortized.guides.refining import RefiningGuide, RefiningOptions, check_update
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.strategies import Prior
from pyro_amortized.structure.structure import Structure
from pyro_amortized.updates.base import Curvature, UpdateRule
from pyro_amortized.updates.learned import LearnedUpdate

__all__ = ["IterativeAmortizedGuide"]

_PARTICLES, _CURVED_PARTICLES = 10, 32
"""Draws for each step's gradient by default; more where they give its curvature too."""


class IterativeAmortizedGuide(RefiningGuide):
    r"""Iterative amortized inference: a network looks at the gradient of each datapoint's ELBO and takes the next step.

    .. math:: \phi_{n,t} = \mathrm{net}\big(h(x_n), \phi_{n,t-1}, \nabla_\phi L_n(\phi_{n,t-1})\big)

    Since it sees how well it did, it can correct itself, on data that it was not trained on too, and a few learned
    steps go as far as many of a fixed rule. Every step is trained to maximise the ELBO that it leads to, without
    backpropagation through the steps before; the model's gradient is that of the last step. The ELBO that Pyro
    reports is that of the last step.

    Args:
        model: A Pyro model.
        encoder: A module from inputs to the features ``(N, H)`` that the update network sees beside the gradient; by
            default the standardised inputs themselves.
        num_steps: Number of steps T; an attribute that may be changed at any time. More steps than in training are
            welcome.
        update: The update rule, by default a :class:`~pyro_amortized.LearnedUpdate`; give one to choose its size.
        num_particles: Number of draws for each step's gradient and, for the normal family, its curvature: by default 32
            where the curvature is used, else 10. Fewer make faster steps, more make steps that lead further.
        compile: As in :class:`SemiAmortizedGuide`.
        initial: ``"prior"`` to start at each datapoint's prior, or ``"encoder"`` to start at the encoder's answer,
            which is then trained too, by its own ELBO.
        **options: ``fixed_noise``, ``keep_best`` and ``estimator`` as in :class:`SemiAmortizedGuide`, and all options
            of :class:`AmortizedGuide`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = IterativeAmortizedGuide(model, num_steps=3)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.randn(8))
        >>> guide.num_steps = 10
        >>> guide.median(torch.randn(3))["z"].shape
        torch.Size([3])

    References:
        Iterative Amortized Inference, Joseph Marino, Yisong Yue, Stephan Mandt (2018),
        https://arxiv.org/abs/1807.09356
    """

    _shares_heads = False

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None = None,
        *,
        num_steps: int = 5,
        update: UpdateRule | None = None,
        num_particles: int | None = None,
        compile: bool = False,
        initial: str = "prior",
        **options: Unpack[RefiningOptions],
    ) -> None:
        check_update(update)
        if update is not None and not update.is_learned:
            raise ValueError(
                f"Cannot use {type(update).__name__} in IterativeAmortizedGuide because there is nothing to learn in "
                "it; try SemiAmortizedGuide, or update=LearnedUpdate()."
            )
        super().__init__(
            model,
            encoder,
            num_steps=num_steps,
            update=update,
            num_particles=_PARTICLES if num_particles is None else num_particles,
            compile=compile,
            initial=initial,
            **options,
        )
        self._chooses_particles = num_particles is None

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        start: InferenceStrategy = Prior()
        if self._initial_kind == "encoder":
            encoder = self._encoder_spec[0] or self._default_encoder(inputs, init_loc)
            encoded = self._encoded(encoder, inputs, init_loc, structure)
            start = encoded
        else:
            encoder = self._encoder_spec[0] or self._default_encoder(inputs, init_loc, hidden_dims=())
        features = self._first_features(encoder, inputs)
        if isinstance(features, tuple):
            raise ValueError(
                "Cannot use an encoder that returns a pair in IterativeAmortizedGuide because the update network needs "
                "features; try an encoder from (N, ...) to (N, H)."
            )
        self._check_features(features, inputs, structure)  # which must not be features of steps
        update = self._update_spec[0] or LearnedUpdate()
        update.setup(self._family, features.shape[1])
        if self._chooses_particles and update.takes is Curvature:
            self._settings["num_particles"] = _CURVED_PARTICLES
        return self._refined_from(start, update.to(init_loc), features=encoder)
