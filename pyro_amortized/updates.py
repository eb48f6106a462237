r"""Update rules: how a refinement step changes phi, given the gradient of the per-datapoint ELBO.

A rule works on rows: every datapoint has its own phi and its own gradient, in nats and without the scale of a
subsampled plate, and what a rule makes of one row never depends on the others. So a step size means the same whatever
the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_function, check_positive, check_real, check_widths
from pyro_amortized.encoders import Head, hidden_layers
from pyro_amortized.families import MultivariateNormal, Normal, VariationalFamily

__all__ = [
    "Adam",
    "Curvature",
    "GradientAscent",
    "LearnedUpdate",
    "NaturalGradient",
    "Newton",
    "UpdateRule",
    "rule_for",
]

State = tuple[Tensor, ...]
"""What a rule remembers from step to step: tensors only, so that steps can be recomputed and compiled."""


@dataclass(frozen=True)
class Curvature:
    """What the draws of a step say about the ELBO around the location of q, in the units of q.

    Attributes:
        slope: The gradient by the location, ``(N, D)``, in nats per standard deviation of q.
        precision: The negative second derivative, ``(N, D, D)``, in nats per squared standard deviation of q: the
            identity where q is the posterior.
        family: The family of q, which knows how phi moves in these units.
    """

    slope: Tensor
    precision: Tensor
    family: VariationalFamily


class UpdateRule(nn.Module, ABC):
    """Base class: ``init(phi) -> state`` and ``update(phi, grad, state) -> phi, state``.

    Attributes:
        is_learned: Whether the rule is a network that is trained by the gradient at each of its steps, rather than a
            formula that gradients pass through.
        uses_curvature: Whether :meth:`update_with_curvature` is called instead of :meth:`update` where the curvature is
            known: for the normal and the full-rank family, with more than one particle and a reparameterised gradient.
    """

    is_learned: bool = False
    uses_curvature: bool = False

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Sizes the rule for a family; called once, before the first step.

        Args:
            family: The variational family.
            num_features: Number of features of a datapoint that :meth:`init` will be given.

        Raises:
            ValueError: If the rule does not fit the family.
        """

    @abstractmethod
    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """The state before the first step.

        Args:
            phi: Where refinement starts, ``(N, P)``.
            features: Features of the datapoints ``(N, H)``, for rules that are networks.
        """

    @abstractmethod
    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """One step uphill.

        Args:
            phi: Variational parameters ``(N, P)``.
            grad: Gradient of the per-datapoint ELBO there, ``(N, P)``, in nats.
            state: What :meth:`init` or the last step returned.

        Returns:
            The new phi and the new state.
        """

    def update_with_curvature(
        self, phi: Tensor, grad: Tensor, state: State, curvature: Curvature
    ) -> tuple[Tensor, State]:
        """One step uphill, of a rule that uses the curvature.

        Args:
            phi: Variational parameters ``(N, P)``.
            grad: Gradient of the per-datapoint ELBO there, ``(N, P)``, in nats.
            state: What :meth:`init` or the last step returned.
            curvature: The curvature of the ELBO there.

        Returns:
            The new phi and the new state.
        """
        return self.update(phi, grad, state)


class _SteppedRule(UpdateRule):
    """A rule with a step size, given or learned.

    Args:
        step_size: The step size.
        learned: Whether it is a parameter, trained together with the encoder by unrolled gradients.
        max_norm: Longest gradient of a datapoint, in the Euclidean norm; longer ones are shortened. None for no limit.
    """

    _usual_step: ClassVar[float]

    def __init__(self, step_size: float, learned: bool, max_norm: float | None) -> None:
        super().__init__()
        check_positive("step_size", step_size, self._usual_step)
        if max_norm is not None:
            check_positive("max_norm", max_norm, 10.0)
        self.max_norm = max_norm
        self._step_size = float(step_size)
        self.log_step_size = nn.Parameter(torch.tensor(math.log(step_size))) if learned else None

    @property
    def step_size(self) -> float | Tensor:
        """The step size; a tensor if it is learned."""
        return self._step_size if self.log_step_size is None else self.log_step_size.exp()

    def _clip(self, grad: Tensor) -> Tensor:
        if self.max_norm is None:
            return grad
        norm = grad.square().sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
        return grad * (self.max_norm / norm).clamp(max=1.0)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        step_size = self.step_size
        number = step_size if isinstance(step_size, float) else step_size.item()
        return f"step_size={number:.4g}, learned={self.log_step_size is not None}"


def _check_limits(max_shift: float, max_log_ratio: float) -> None:
    check_positive("max_shift", max_shift, 3.0)
    check_positive("max_log_ratio", max_log_ratio, 0.5)


class GradientAscent(_SteppedRule):
    r"""Gradient ascent with momentum.

    .. math:: v_t = m v_{t-1} + g_t, \qquad \phi_t = \phi_{t-1} + \epsilon v_t

    Args:
        step_size: :math:`\epsilon`, for gradients of a single datapoint. (Kim et al. take steps of size 1 on the mean
            over a batch of 50: 0.02 here.)
        momentum: m, from 0 to below 1.
        max_norm: Longest gradient of a datapoint; None for no limit.
        learned: Whether the step size is trained with the encoder.

    References:
        Semi-Amortized Variational Autoencoders, Yoon Kim, Sam Wiseman, Andrew C. Miller, David Sontag, Alexander M.
        Rush (2018), https://arxiv.org/abs/1802.02550
    """

    _usual_step = 0.01

    def __init__(
        self, step_size: float = 0.01, momentum: float = 0.5, *, max_norm: float | None = None, learned: bool = False
    ) -> None:
        super().__init__(step_size, learned, max_norm)
        check_real("momentum", momentum, "in [0, 1)", lambda x: 0 <= x < 1, 0.5)
        self.momentum = momentum

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """No velocity."""
        return (torch.zeros_like(phi),) if self.momentum else ()

    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """One step."""
        velocity = self._clip(grad)
        if self.momentum:
            velocity = torch.add(velocity, state[0], alpha=self.momentum)
        if self.log_step_size is None:
            return torch.add(phi, velocity, alpha=self._step_size), (velocity,) if self.momentum else ()
        return phi + self.step_size * velocity, (velocity,) if self.momentum else ()


class Adam(_SteppedRule):
    """Adam on each datapoint's phi; fits every family.

    Args:
        step_size: The step size.
        betas: Decay rates of the means of gradients and of their squares.
        eps: Added to the root of the latter.
        max_norm: Longest gradient of a datapoint; None for no limit.
        learned: Whether the step size is trained with the encoder.

    References:
        Adam: A Method for Stochastic Optimization, Diederik P. Kingma, Jimmy Ba (2014),
        https://arxiv.org/abs/1412.6980
    """

    _usual_step = 0.05

    def __init__(
        self,
        step_size: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        max_norm: float | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__(step_size, learned, max_norm)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"Cannot use betas={betas!r} because there must be two; try betas=(0.9, 0.999).")
        for beta, usual in zip(betas, (0.9, 0.999), strict=True):
            check_real("beta", beta, "in [0, 1)", lambda x: 0 <= x < 1, usual)
        check_positive("eps", eps, 1e-8)
        self.betas = betas
        self.eps = eps

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """Zero moments, and the factors that make up for their start at zero."""
        return torch.zeros_like(phi), torch.zeros_like(phi), phi.new_ones(2)

    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """One step."""
        first, second, decays = state
        grad = self._clip(grad)
        decays = decays * decays.new_tensor(self.betas)
        first = torch.lerp(grad, first, self.betas[0])
        second = torch.lerp(grad.square(), second, self.betas[1])
        bias = 1 - decays
        root = (second / bias[1]).clamp(min=1e-30).sqrt()  # the root of zero has no derivative to unroll
        return phi + self.step_size * (first / bias[0]) / (root + self.eps), (first, second, decays)


class NaturalGradient(_SteppedRule):
    r"""Natural gradient: the gradient in units of the family's own Fisher information.

    For the mean-field normal, :math:`\mu \leftarrow \mu + \epsilon \sigma^2 \nabla_\mu L` and
    :math:`\log\sigma \leftarrow \log\sigma + \tfrac{\epsilon}{2} \nabla_{\log\sigma} L`: a step knows the scale of the
    posterior, so that one step size serves all models.

    Args:
        step_size: :math:`\epsilon`, below 1.
        max_shift: Most that a location moves in one step, in its own standard deviations.
        max_log_ratio: Most that the logarithm of a scale changes in one step.
        learned: Whether the step size is trained with the encoder.

    References:
        Natural Gradient Works Efficiently in Learning, Shun-ichi Amari (1998).
        Conjugate-Computation Variational Inference, Mohammad Emtiyaz Khan, Wu Lin (2017),
        https://arxiv.org/abs/1703.04265
    """

    _usual_step = 0.5

    def __init__(
        self, step_size: float = 0.5, *, max_shift: float = 3.0, max_log_ratio: float = 0.5, learned: bool = False
    ) -> None:
        super().__init__(step_size, learned, None)
        _check_limits(max_shift, max_log_ratio)
        self.max_shift = max_shift
        self.max_log_ratio = max_log_ratio

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Makes sure that the family is the mean-field normal."""
        if not isinstance(family, Normal):
            raise ValueError(
                f"Cannot refine a {type(family).__name__} family by NaturalGradient because its Fisher information is "
                'only known here for family="normal"; try update=Adam(0.05), which fits every family.'
            )

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """Nothing is remembered."""
        return ()

    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """One step."""
        dim = phi.shape[-1] // 2
        (loc, log_scale), (loc_grad, log_scale_grad) = phi.split(dim, -1), grad.split(dim, -1)
        scale = log_scale.exp()
        shift = (self.step_size * scale * loc_grad).clamp(-self.max_shift, self.max_shift) * scale
        ratio = (0.5 * self.step_size * log_scale_grad).clamp(-self.max_log_ratio, self.max_log_ratio)
        return torch.cat([loc + shift, log_scale + ratio], -1), ()


class Newton(_SteppedRule):
    r"""Newton's method: a natural gradient that knows how the latents of a datapoint depend on each other.

    The particles of a step, whose gradients are averaged for other rules, are regressed on where they were drawn: this
    gives the slope r and the curvature H of the ELBO in the location, in the coordinates
    :math:`\epsilon = L^{-1}(z - \mu)` of q, without a further evaluation of the model. The step goes towards the
    optimum of that quadratic, for a covariance :math:`L L^T` of q

    .. math:: \mu \leftarrow \mu + \rho L H^{-1} r, \qquad
        \Sigma^{-1} \leftarrow L^{-T} \big((1 - \rho) I + \rho H\big) L^{-1},

    of which the mean-field normal takes the diagonal in the coordinates of q. :class:`NaturalGradient` needs the more
    steps the more the latents are correlated in the posterior; this rule does not. It needs two particles at least; 10
    do for 20 latents, and 32 do better. The regression is shrunk towards H = I by as much as the draws fail to predict
    each other, and H is made positive definite. A step factorises a D x D matrix for each datapoint besides.

    Args:
        step_size: :math:`\rho`, at most 1.
        max_shift: Most that a location moves in one step, in standard deviations of q.
        max_log_ratio: Most that the logarithm of a scale changes in one step.
        learned: Whether the step size is trained with the encoder.

    References:
        Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression, Tim Salimans, David A.
        Knowles (2013), https://arxiv.org/abs/1206.6679
        The Variational Gaussian Approximation Revisited, Manfred Opper, Cédric Archambeau (2009).
    """

    _usual_step = 0.7
    uses_curvature = True

    def __init__(
        self, step_size: float = 0.7, *, max_shift: float = 3.0, max_log_ratio: float = 0.7, learned: bool = False
    ) -> None:
        super().__init__(step_size, learned, None)
        if step_size > 1:
            raise ValueError(
                f"Cannot refine with step_size={step_size} because a step of 1 goes to the optimum already; try 0.7."
            )
        _check_limits(max_shift, max_log_ratio)
        self.max_shift = max_shift
        self.max_log_ratio = max_log_ratio

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Makes sure that the family is a normal."""
        if not isinstance(family, (Normal, MultivariateNormal)):
            raise ValueError(
                f"Cannot refine a {type(family).__name__} family by Newton because its optimum under a quadratic is "
                'only known here for family="normal" and "multivariate_normal"; try update=Adam(0.05), which fits '
                "every family."
            )

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """Nothing is remembered."""
        return ()

    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """Says what the curvature needs."""
        raise ValueError(
            'Cannot refine by Newton with one particle, or with estimator="analytic_kl", because the curvature is '
            "taken from the gradients at several draws; try num_particles=32, or NaturalGradient(0.5)."
        )

    def update_with_curvature(
        self, phi: Tensor, grad: Tensor, state: State, curvature: Curvature
    ) -> tuple[Tensor, State]:
        """One step."""
        slope, precision, family = curvature.slope, curvature.precision, curvature.family
        eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
        step_size = self.step_size if self.log_step_size is None else self.step_size.clamp(max=1.0)  # type: ignore[union-attr]
        damped = precision + _damping(precision.detach())[:, None, None] * eye
        factor = torch.linalg.cholesky_ex(damped)[0]
        shift = step_size * torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        kept = self.max_shift / shift.abs().amax(-1, keepdim=True).clamp(min=self.max_shift)
        limit = (2.0 * self.max_log_ratio * kept).exp()  # q keeps its width as long as it has far to go
        if isinstance(family, Normal):
            size = precision.diagonal(dim1=-2, dim2=-1).clamp(min=_LEAST_CURVATURE)
            size = (1.0 + step_size * (size - 1.0)).clamp(1.0 / limit, limit)
            precision = torch.diag_embed(size)
        else:
            change = damped - eye
            most = (limit - 1.0) / torch.linalg.matrix_norm(change).clamp(min=1e-6).unsqueeze(-1)
            precision = eye + torch.as_tensor(step_size).to(most).clamp(max=most).unsqueeze(-1) * change
        return family.moved(phi.to(slope), kept * shift, precision).to(phi), ()  # type: ignore[operator]


_MOST_LATENTS = 128
"""Latents of a datapoint beyond which nothing uses the curvature unasked, since its cost grows with their cube."""


def rule_for(family: VariationalFamily, num_particles: int, estimator: str | None) -> UpdateRule | None:
    """The rule that refines a trained guide best, or None for the default of guides in training.

    Args:
        family: The variational family.
        num_particles: Number of draws for each step's gradient.
        estimator: The estimator of the gradient.
    """
    curved = num_particles > 1 and estimator != "analytic_kl" and family.latent_dim <= _MOST_LATENTS
    if curved and isinstance(family, (Normal, MultivariateNormal)):
        return Newton()
    return NaturalGradient() if isinstance(family, Normal) else None


_LEAST_CURVATURE = 0.05
"""Least eigenvalue of the curvature, in units of the precision of q, that a Newton step trusts."""


@torch.no_grad()
def _damping(curvature: Tensor) -> Tensor:
    """What has to be added to the diagonal of each curvature ``(N, D, D)`` to make it safely positive, ``(N,)``."""
    norm = torch.linalg.matrix_norm(curvature)
    least = (100.0 * torch.finfo(curvature.dtype).eps * norm).clamp(min=_LEAST_CURVATURE)  # beyond rounding errors
    lowered = curvature - least[:, None, None] * torch.eye(curvature.shape[-1]).to(curvature)
    rows = (torch.linalg.cholesky_ex(lowered)[1] > 0) & norm.isfinite()
    damping = torch.zeros_like(norm)
    damping[rows] = (-torch.linalg.eigvalsh(lowered[rows])[:, 0]).clamp(min=0.0)
    return damping


class LearnedUpdate(UpdateRule):
    r"""A network that has learned to take the step.

    It sees the features h of the datapoint, phi, and the gradient as the logarithm of its size and its sign, entry by
    entry, and answers with a gated update,

    .. math:: \phi_t = a \odot \phi_{t-1} + (1 - a) \odot f + b \odot d, \qquad (\mathrm{logit}\,a, f,
        \mathrm{logit}\,b) = \mathrm{net}(h, \phi_{t-1}, \log|g|, \mathrm{sign}\,g).

    d is the step of :class:`Newton`, for the normal family; with one particle, or more than 128 latents, it is the
    natural gradient; for other families the last term is missing, as in the paper. Phi and the gradient are detached:
    every step is trained on its own, to be good from wherever the last one led, so that it can be repeated more often
    than in training.

    Args:
        hidden_dims: Widths of the hidden layers.
        activation: Constructor of the activation after each layer.

    References:
        Iterative Amortized Inference, Joseph Marino, Yisong Yue, Stephan Mandt (2018),
        https://arxiv.org/abs/1807.09356
    """

    is_learned = True

    def __init__(self, hidden_dims: Sequence[int] = (200, 200), activation: Callable[[], nn.Module] = nn.ELU) -> None:
        super().__init__()
        self.hidden_dims = check_widths("hidden_dims", hidden_dims)
        check_function("activation", activation, "the class of an activation", "torch.nn.ELU")
        self.activation = activation
        self.network: nn.Sequential | None = None
        self.natural: NaturalGradient | None = None
        self.newton: Newton | None = None

    @property
    def uses_curvature(self) -> bool:  # type: ignore[override]
        """Whether the family is one that :class:`Newton` can refine, of few enough latents."""
        return self.newton is not None

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Builds the network, or makes sure that it fits if it has been built already."""
        natural = isinstance(family, Normal)
        sizes = num_features + 3 * family.num_params, (3 if natural else 2) * family.num_params
        if self.network is None:
            self.natural = NaturalGradient(1.0) if natural else None
            if natural and family.latent_dim <= _MOST_LATENTS:
                self.newton = Newton(1.0)
            layers = hidden_layers(sizes[0], self.hidden_dims, self.activation)
            width = (sizes[0], *self.hidden_dims)[-1]
            output = Head(torch.ones(1, width), sizes[1])  # its answers are close to zero at first,
            nn.init.zeros_(output.bias)  # so that half of phi is kept, and of the direct step a share taken
            self.network = nn.Sequential(*layers, output)
        built = self.network[0].in_features, self.network[-1].out_features
        if built != sizes:  # type: ignore[comparison-overlap]
            raise ValueError(
                f"Cannot refine with this LearnedUpdate because it was built for {built[0]} inputs and {built[1]} "
                f"outputs, and {family.num_params} variational parameters with {num_features} features need {sizes[0]} "
                f"and {sizes[1]}; try a new LearnedUpdate for each guide."
            )

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """The features, which stay the same."""
        return () if features is None else (features,)

    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """One step."""
        natural = None if self.natural is None else self.natural.update(phi.detach(), grad.detach(), ())[0]
        return self._update(phi, grad, state, natural, 0.0)

    def update_with_curvature(
        self, phi: Tensor, grad: Tensor, state: State, curvature: Curvature
    ) -> tuple[Tensor, State]:
        """One step, with that of :class:`Newton` in the place of the natural gradient."""
        if self.newton is None:
            return self.update(phi, grad, state)
        seen = Curvature(curvature.slope.detach(), curvature.precision.detach(), curvature.family)
        newton = self.newton.update_with_curvature(phi.detach(), grad.detach(), (), seen)[0]
        return self._update(phi, grad, state, newton, _NEWTON_SHARE)

    def _update(
        self, phi: Tensor, grad: Tensor, state: State, direct: Tensor | None, share: float
    ) -> tuple[Tensor, State]:
        phi, grad = phi.detach(), grad.detach()
        size = grad.abs().clamp(min=_SMALLEST).log() / -math.log(_SMALLEST)
        if self.network is None:
            raise ValueError(
                "Cannot refine with this LearnedUpdate because it has no network yet; try update.setup(family, "
                "num_features) first, as IterativeAmortizedGuide does."
            )
        parts = self.network(torch.cat([*state, phi, size, grad.sign()], -1)).split(phi.shape[-1], -1)
        keep = parts[0].sigmoid()
        new = keep * phi + (1 - keep) * parts[1]
        if direct is not None:
            new = new + (parts[2] + share).sigmoid() * (direct - phi)
        return new, state


_NEWTON_SHARE = 2.0
"""Logit of the share of a Newton step that a learned rule starts with."""

_SMALLEST = math.exp(-8.0)
"""Gradients below this, in nats, look like it to a learned rule."""
