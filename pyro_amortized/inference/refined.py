"""phi by steps of an update rule from where another strategy starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils.checkpoint import checkpoint

from pyro_amortized.encoders.devices import has_to_wait
from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.inference.base import InferenceStrategy, Objective
from pyro_amortized.inference.strategies import Prior
from pyro_amortized.updates.base import Curvature, UpdateRule

__all__ = ["ENCODER_GRADIENTS", "Refined", "Refinement", "start_of"]


ENCODER_GRADIENTS = ("anchored", "unrolled", "first_order", "initial", "distill")
"""How gradients go from a refined phi to where it started, see :class:`Refined`."""


@dataclass
class Refinement:
    """What refining phi gave.

    Attributes:
        phi: The refined phi, ``(N, P)``.
        signal: Zeros ``(N,)`` whose gradient, that of nats to be maximised, trains what phi started from or the update
            rule, beside the gradient that passes through phi; None if there is none.
    """

    phi: Tensor
    signal: Tensor | None = None


class Refined(InferenceStrategy):
    r"""phi from a few steps uphill on each datapoint's own ELBO, from where another strategy starts.

    .. math:: \phi_t = \mathrm{update}(\phi_{t-1}, \nabla L_n(\phi_{t-1}))

    Gradients reach the start, and the model's parameters inside the steps, as ``encoder_gradient`` says: ``"unrolled"``
    differentiates the steps exactly, and with ``"anchored"`` the start maximises its own ELBO beside; ``"first_order"``
    takes their Jacobian for the identity; with ``"initial"`` the start maximises its own ELBO instead, and with
    ``"distill"`` it minimises the KL divergence :math:`KL(q_{\phi_0} \| q_{\phi_T})`. A learned update rule is trained
    by the gradient of the ELBO at each of its results, whatever this setting.

    Args:
        initial: The strategy that says where to start.
        update: The update rule.
        num_steps: Number of steps T; may be changed at any time, and be 0.
        encoder_gradient: One of ``"anchored"``, ``"unrolled"``, ``"first_order"``, ``"initial"`` and ``"distill"``.
        num_particles: Number of draws for each gradient.
        fixed_noise: Whether every call uses the same noise, which is also the same for all datapoints, so that results
            can be repeated and do not depend on the batch. It differs from step to step all the same.
        keep_best: Whether to return the best phi met on the way, for each datapoint, instead of the last: of the start,
            the last two, and those after a half, a quarter, ... of the steps, judged by a further estimate of the ELBO
            on common noise; None for: where no training is going on, and in training the start where the last is worse.
        checkpoint: Whether to recompute steps in the backward pass of ``"anchored"`` and ``"unrolled"`` instead of
            keeping what they computed: memory for one step instead of all, for about half as much time again.
        features: A network from the inputs to the features that a learned rule sees beside phi and the gradient.
    """

    _BEST_OF = 16
    """Least number of draws by which the phis of different steps are compared."""

    def __init__(
        self,
        initial: InferenceStrategy,
        update: UpdateRule,
        num_steps: int,
        *,
        encoder_gradient: str = "anchored",
        num_particles: int = 1,
        fixed_noise: bool = False,
        keep_best: bool | None = None,
        checkpoint: bool = False,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if encoder_gradient not in ENCODER_GRADIENTS:
            raise ValueError(
                f"Cannot use encoder_gradient={encoder_gradient!r} because it is none of {ENCODER_GRADIENTS}; try "
                '"anchored".'
            )
        self.initial = initial
        self.update = update
        self.num_steps = num_steps
        self.encoder_gradient = encoder_gradient
        self.num_particles = num_particles
        self.fixed_noise = fixed_noise
        self.keep_best = keep_best
        self.checkpoint = checkpoint
        self.features = features

    @property
    def is_unrolled(self) -> bool:
        """Whether gradients pass through the steps."""
        return self.encoder_gradient in ("anchored", "unrolled")

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """Whether the start or the update rule looks at the data."""
        return self.initial.needs_inputs or self.update.is_learned

    @property
    def num_known(self) -> int | None:  # type: ignore[override]
        """Number of datapoints that the start knows."""
        return self.initial.num_known

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """The refined phi ``(N, P)``."""
        return self.refine(inputs, index, objective).phi

    def refine(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None) -> Refinement:
        """Refines phi.

        Args:
            inputs: Tensors of shape ``(N, ...)`` that describe the datapoints.
            index: Positions ``(N,)`` of the datapoints in the full data set, or None for all of them in order.
            objective: The per-datapoint ELBO.
        """
        if objective is None:
            raise ValueError("Cannot refine phi because no objective was given; try a guide that refines.")
        with self._fixing_initial(), nullcontext() if self.training else evaluating(self.initial):
            start = objective.masked(self.initial(inputs, index, objective))
        if not self.num_steps:
            return Refinement(start)
        features = self.features(*inputs) if self.update.is_learned and self.features is not None else None
        training = torch.is_grad_enabled()
        learned, unrolled = self.update.is_learned, self.is_unrolled
        if isinstance(self.initial, Prior) and (learned or not unrolled):
            start = start.detach()  # there is nothing to train in it
        with torch.set_grad_enabled(training and (learned or unrolled)):
            phi, nats = self._climb(
                start, features, objective, self._keeps_best(training), whiten=self.fixed_noise or not training
            )
        if not training or learned or unrolled or not start.requires_grad:
            return Refinement(phi, _zero(nats))
        if self.encoder_gradient == "first_order":
            return Refinement(start + (phi - start).detach())
        if self.encoder_gradient == "distill" and (has_to_wait(phi) or bool(phi.isfinite().all())):
            nats = -_kl(objective, start, phi.detach())
        return Refinement(phi.detach(), _zero(nats))

    def _climb(
        self, start: Tensor, features: Tensor | None, objective: Objective, keep_best: bool, *, whiten: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The refined phi, and the nats whose gradient trains what phi went through, if that is needed."""
        learned, training = self.update.is_learned, torch.is_grad_enabled()
        phi = start if self.is_unrolled or learned else start.detach()
        best, compared = self._start_comparison(objective, phi) if keep_best else None, _compared(self.num_steps)
        state, nats = self.update.init(phi, features), None
        curved = self.update.takes is Curvature and objective.has_curvature and self.num_particles > 1
        for step in range(self.num_steps):
            noise = self._noise(objective, phi, step, self.num_particles, whiten=whiten)
            if learned or (step == 0 and self.encoder_gradient == "initial"):
                with torch.no_grad(), self._seeding(noise, step):
                    grad, *curvature = _slopes(objective, phi.detach(), noise, curved)
                with torch.enable_grad():
                    own = (grad * (start if step == 0 else phi)).sum(-1)  # the gradient of the ELBO at this phi
                nats = own if nats is None else nats + own
                phi, state = self._move(phi.detach(), grad, state, curvature, objective)
            else:
                run = self._step
                if self.checkpoint and training:
                    objective.prepare(phi, noise, curved)
                    run = partial(checkpoint, self._step, use_reentrant=False)
                with self._seeding(noise, step):
                    after, grad, *rest = run(phi, noise, objective, curved, *state)
                if step == 0 and self.encoder_gradient == "anchored" and not isinstance(self.initial, Prior):
                    nats = (grad.detach() * phi).sum(-1)  # whose gradient is that of the start's own ELBO
                phi, state = after, tuple(rest)
            if best is not None:
                if training and self.training and not has_to_wait(phi) and not bool(phi.isfinite().all()):
                    return phi, nats  # no gradient would pass the steps that have diverged
                if step + 1 in compared:
                    best.offer(phi)
        if best is None and self.keep_best is None and self.training and not learned:
            phi = self._unless_worse(objective, start, phi)
        return (phi if best is None else best.phi), nats

    def _unless_worse(self, objective: Objective, start: Tensor, phi: Tensor) -> Tensor:
        """phi, but the start for datapoints where the steps have diverged: the ELBO is lower there, on common noise."""
        noise = self._noise(objective, start, -1, max(_PAIRED, self.num_particles), whiten=True)
        if isinstance(noise, int):  # of draws that are not common, which would not tell
            return phi
        with torch.no_grad():
            before, after = (objective.value(x.detach(), noise) for x in (start, phi))
        return torch.where((after < before).unsqueeze(-1), start, phi)

    def _step(self, phi: Tensor, noise: Any, objective: Objective, curved: bool, *state: Tensor) -> tuple[Tensor, ...]:
        grad, *curvature = _slopes(objective, phi, noise, curved)
        phi, state = self._move(phi, grad, state, curvature, objective)
        return (phi, grad, *state)

    def _move(
        self, phi: Tensor, grad: Tensor, state: tuple[Tensor, ...], curvature: list[Tensor], objective: Objective
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        grad = objective.unscaled(grad)
        taken: Tensor | Curvature = grad
        if curvature:
            slope, precision = curvature
            taken = Curvature(grad, slope, precision, objective.family)
        phi, state = self.update.update(phi, taken, state)
        return objective.masked(phi), state

    def _keeps_best(self, has_gradients: bool) -> bool:
        if self.keep_best is None or (self.update.is_learned and has_gradients):  # which trains every step
            return not (self.training and has_gradients)
        return self.keep_best

    def _start_comparison(self, objective: Objective, phi: Tensor) -> _Best:
        noise = self._noise(objective, phi, -1, max(self._BEST_OF, self.num_particles), whiten=True)
        return _Best(objective, phi, noise, partial(self._seeding, noise, -1))

    def _seeding(self, noise: Tensor | int, step: int) -> AbstractContextManager[None]:
        """For families that draw their own noise, which is fixed by a seed."""
        return _seeded(_SEED + step) if self.fixed_noise and isinstance(noise, int) else nullcontext()

    @contextmanager
    def _fixing_initial(self) -> Iterator[None]:
        """Fixes the noise of a start that is refined itself, if this refinement's is fixed."""
        inner = self.initial if isinstance(self.initial, Refined) and self.fixed_noise else None
        before = inner.fixed_noise if inner is not None else False
        if inner is not None:
            inner.fixed_noise = True
        try:
            yield
        finally:
            if inner is not None:
                inner.fixed_noise = before

    def _noise(self, objective: Objective, phi: Tensor, step: int, num_particles: int, *, whiten: bool) -> Tensor | int:
        """Noise of a step: fresh, or if it is fixed the same in every call and for every datapoint."""
        if not self.fixed_noise:
            return objective.noise(phi, num_particles, whiten)
        with _seeded(_SEED + step):
            noise = objective.noise(phi[:1], num_particles, whiten)
        return noise if isinstance(noise, int) else noise.expand(-1, len(phi), -1)


def start_of(strategy: Any) -> Any:
    """Where refinement starts; the strategy itself if it is none."""
    while isinstance(strategy, Refined):
        strategy = strategy.initial
    return strategy


_SEED = 20180207

_PAIRED = 8
"""Least number of draws by which a refined phi is compared with its start in training."""


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws under a seed, with torch's own state put back at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _compared(num_steps: int) -> set[int]:
    """After which steps phi is compared with the best so far: the last two, and a half, a quarter, ... of all."""
    return {num_steps, num_steps - 1, *(num_steps >> i for i in range(1, num_steps.bit_length()))}


class _Best:
    """The best phi of every datapoint so far, by the ELBO on noise that is the same for all."""

    def __init__(
        self,
        objective: Objective,
        phi: Tensor,
        noise: Tensor | int,
        seeding: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.objective = objective
        self.noise = noise
        self.seeding = seeding
        self.value = self._evaluate(phi)
        self.phi = torch.where(self.value.isfinite().unsqueeze(-1), phi, math.nan)  # no ELBO, no answer

    def _evaluate(self, phi: Tensor) -> Tensor:
        with torch.no_grad(), self.seeding():
            return self.objective.value(phi, self.noise).nan_to_num(nan=-math.inf)

    def offer(self, phi: Tensor) -> None:
        """Takes ``phi`` where it is better."""
        value = self._evaluate(phi)
        better = value > self.value
        self.phi = torch.where(better.unsqueeze(-1), phi, self.phi)
        self.value = torch.where(better, value, self.value)


def _slopes(objective: Objective, phi: Tensor, noise: Any, curved: bool) -> tuple[Tensor, ...]:
    """The gradient, and the slope and curvature if they are asked for."""
    return objective.curvature(phi, noise) if curved else (objective.gradient(phi, noise),)


def _zero(nats: Tensor | None) -> Tensor | None:
    """Zeros with the gradient of ``nats``, or None if there is no gradient."""
    return None if nats is None or not nats.requires_grad else nats - nats.detach()


def _kl(objective: Objective, first: Tensor, second: Tensor) -> Tensor:
    """KL divergence between two members of the family, ``(N,)``; estimated where there is no closed form."""
    q, p = objective.family(first), objective.family(second)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        z = q.rsample((8,))
        return (q.log_prob(z) - p.log_prob(z)).mean(0)
