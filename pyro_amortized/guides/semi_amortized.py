"""The semi-amortized guide: an encoder's answer, refined by a few gradient steps for each datapoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self, Unpack

from pyro_amortized.checks import check_flag
from pyro_amortized.guides.base import LocalGuide
from pyro_amortized.guides.refining import RefiningGuide, RefiningOptions, check_update
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import ENCODER_GRADIENTS
from pyro_amortized.inference.strategies import Prior
from pyro_amortized.structure.structure import Structure
from pyro_amortized.updates.base import UpdateRule
from pyro_amortized.updates.gradient import Adam, NaturalGradient

__all__ = ["SemiAmortizedGuide"]


class SemiAmortizedGuide(RefiningGuide):
    r"""Semi-amortized variational inference: an encoder starts, and gradient steps on each datapoint's ELBO refine.

    .. math:: \phi_{n,0} = f(x_n), \qquad
        \phi_{n,t} = \mathrm{update}\big(\phi_{n,t-1}, \nabla_\phi L_n(\phi_{n,t-1})\big), \qquad
        q(z_n) = q_{\phi_{n,T}}

    The steps use the ELBO of a single datapoint, in nats and without the scale of a subsampled plate; global latents
    are held at their median meanwhile. Memory grows with ``num_steps`` where gradients pass through the steps;
    ``checkpoint=True`` keeps it at that of a single step.

    Args:
        model: A Pyro model.
        encoder: As in :class:`AmortizedGuide`.
        num_steps: Number of steps T; an attribute that may be changed at any time.
        update: The update rule: :class:`~pyro_amortized.NaturalGradient`, the default for the normal family,
            :class:`~pyro_amortized.Adam`, the default for others, :class:`~pyro_amortized.GradientAscent`, or
            :class:`~pyro_amortized.Newton`, which goes furthest in a step, for more than one particle. The default's
            step size is 2 / ``num_steps``, at most 0.5: larger ones make the steps forget where they started, so that
            nothing trains the encoder.
        encoder_gradient: How the encoder learns; by default ``"anchored"``, or ``"unrolled"`` with an ``update`` of
            your own. ``"anchored"``: by the exact gradient of the refined ELBO through all steps, in which medians of
            global latents count as constants, and that of the ELBO of its own answer; ``"unrolled"``: by the first of
            them alone, as in the SA-VAE, so that an answer that the steps mend in any case may drift away from one
            training step to the next;
            ``"first_order"``: the same with the Jacobian of the steps taken for the identity,
            which is cheaper; ``"initial"``: by the ELBO of its own answer, the model by that of the refined one
            (VAE+SVI); ``"distill"``: by the KL divergence from its answer to the refined one (VAE+SVI+KL).
        num_particles: Number of draws for each step's gradient; antithetic pairs if it is even. With one, as in the
            paper, steps may end at worse answers than they started from.
        compile: Whether to compile the refinement gradient with ``torch.compile``, once per structure. The numbers stay
            the same; models that cannot be traced run uncompiled, with a warning.
        initial: ``"encoder"``, or ``"prior"`` to start every datapoint at its prior: plain stochastic variational
            inference of a few steps, without an encoder.
        checkpoint: Whether to recompute the steps of ``"anchored"`` and ``"unrolled"`` in the backward pass instead of
            keeping them.
        fixed_noise: Whether every call uses the same noise, for all datapoints, so that results can be repeated exactly
            and do not depend on the batch.
        keep_best: Whether each datapoint gets the best phi on its way instead of the last; None for: outside training,
            that is in ``eval()`` mode or without gradients, and in training the start where the last one is worse.
        estimator: Estimator of the gradient: ``"stl"`` (sticking the landing; by default, but for flows), ``"plain"``,
            or ``"analytic_kl"`` (for the normal family).
        **options: ``family``, ``plate``, ``encoder_input``, ``global_guide``, ``create_plates``, ``init_loc_fn``,
            ``init_scale`` and ``name`` as in :class:`AmortizedGuide`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = SemiAmortizedGuide(model, num_steps=5)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.randn(8))
        >>> guide.num_steps = 20  # more steps for new data
        >>> guide.median(torch.randn(3))["z"].shape
        torch.Size([3])

    References:
        Semi-Amortized Variational Autoencoders, Yoon Kim, Sam Wiseman, Andrew C. Miller, David Sontag, Alexander M.
        Rush (2018), https://arxiv.org/abs/1802.02550
        On the Challenges of Learning with Inference Networks on Sparse, High-Dimensional Data, Rahul G. Krishnan,
        Dawen Liang, Matthew D. Hoffman (2018), https://arxiv.org/abs/1710.06085
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None = None,
        *,
        num_steps: int = 20,
        update: UpdateRule | None = None,
        encoder_gradient: str | None = None,
        num_particles: int = 8,
        compile: bool = False,
        initial: str = "encoder",
        checkpoint: bool = False,
        **options: Unpack[RefiningOptions],
    ) -> None:
        if encoder_gradient is None:
            encoder_gradient = "anchored" if update is None else "unrolled"
        if encoder_gradient not in ENCODER_GRADIENTS:
            raise ValueError(
                f"Cannot use encoder_gradient={encoder_gradient!r} because it is none of {ENCODER_GRADIENTS}; try "
                '"anchored".'
            )
        check_update(update)
        check_flag("checkpoint", checkpoint)
        if update is not None and update.is_learned:
            raise ValueError(
                f"Cannot use {type(update).__name__} in SemiAmortizedGuide because it has to be trained at every step; "
                "try IterativeAmortizedGuide."
            )
        if encoder_gradient not in ("anchored", "unrolled") and any(
            True for _ in (update.parameters() if update is not None else ())
        ):
            raise ValueError(
                f"Cannot learn the step size with encoder_gradient={encoder_gradient!r} because no gradient passes "
                'through the steps; try encoder_gradient="unrolled", or a given step size.'
            )
        if initial == "prior" and encoder is not None:
            raise ValueError(
                'Cannot use an encoder with initial="prior" because nothing is encoded; try leaving one of them out.'
            )
        super().__init__(
            model,
            encoder,
            num_steps=num_steps,
            update=update,
            num_particles=num_particles,
            compile=compile,
            initial=initial,
            **options,
        )
        self._settings.update(encoder_gradient=encoder_gradient, checkpoint=checkpoint)
        self._structures.encodes &= initial == "encoder"
        self._shares = False

    @property
    def _needs_inputs(self) -> bool:
        return super()._needs_inputs if self._ready else self._initial_kind == "encoder"

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        prior = self._initial_kind == "prior"
        initial = Prior() if prior else super()._build_strategy(inputs, init_loc, structure)
        return self._refine_from(initial, init_loc)

    def _refine_from(self, initial: InferenceStrategy, like: Tensor) -> InferenceStrategy:
        update = (self._update_spec[0] or self._default_update()).to(like)
        update.setup(self._family)
        self._like = like.new_empty(0)
        return self._refined_from(initial, update)

    def _default_update(self) -> UpdateRule:
        """For an encoder, steps so small that its start still matters after all of them, lest nothing trains it."""
        if not self._family.is_mean_field:
            return Adam()
        prior = self._initial_kind == "prior"
        return NaturalGradient(0.5 if prior else min(0.5, 2.0 / max(1, self._first_num_steps)))

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; that of what is shared with the guide whose answers are refined is left to that guide."""
        if not self._shares:
            return super().train(mode)
        inference: Any = self.inference
        self.training = inference.training = mode
        inference.update.train(mode)
        return self

    def _adopt(self, guide: LocalGuide) -> None:
        """Takes another guide's answers as the start, sharing its parameters."""
        for name in (
            "layout",
            "_built_structure",
            "_structures",
            "_encoder_input",
            "create_plates",
            "_encoder_plates",
            "_levels",
            "_sharing",
        ):
            self.__dict__[name] = getattr(guide, name)
        self._encoder_spec = getattr(guide, "_encoder_spec", (None,))  # which sees what it saw there, masks or not
        self.family = guide._family
        if self.global_sites:
            self._modules["global_guide"] = guide.global_guide  # which stays the other guide's for Pyro
        initial: Any = guide._modules["inference"]
        like = next((p for p in initial.parameters()), None)
        self.inference = self._refine_from(initial, like if like is not None else guide._like)
        self._ready = self._shares = True
        self.eval()


LocalGuide.refining = SemiAmortizedGuide
