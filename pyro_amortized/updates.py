r"""Update rules: how a refinement step changes phi, given the gradient of the per-datapoint ELBO.

A rule works on rows: every datapoint has its own phi and its own gradient, in nats and without the scale of a
subsampled plate, and what a rule makes of one row never depends on the others. So a step size means the same whatever
the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_amortized.families import Normal, VariationalFamily

__all__ = ["Adam", "GradientAscent", "LearnedUpdate", "NaturalGradient", "UpdateRule"]

State = tuple[Tensor, ...]
"""What a rule remembers from step to step: tensors only, so that steps can be recomputed and compiled."""


class UpdateRule(nn.Module, ABC):
    """Base class: ``init(phi) -> state`` and ``update(phi, grad, state) -> phi, state``.

    Attributes:
        is_learned: Whether the rule is a network that is trained by the gradient at each of its steps, rather than a
            formula that gradients pass through.
    """

    is_learned: bool = False

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


class _SteppedRule(UpdateRule):
    """A rule with a step size, given or learned.

    Args:
        step_size: The step size.
        learned: Whether it is a parameter, trained together with the encoder by unrolled gradients.
        max_norm: Longest gradient of a datapoint, in the Euclidean norm; longer ones are shortened. None for no limit.
    """

    def __init__(self, step_size: float, learned: bool, max_norm: float | None) -> None:
        super().__init__()
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(
                f"Cannot refine with step_size={step_size} because it must be a positive number; try {_TYPICAL}."
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(
                f"Cannot clip gradients to max_norm={max_norm} because a norm is positive; try 10.0, or None."
            )
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


_TYPICAL = "0.5 for NaturalGradient, 0.05 for Adam, 0.01 for GradientAscent"


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

    def __init__(
        self, step_size: float = 0.01, momentum: float = 0.5, *, max_norm: float | None = None, learned: bool = False
    ) -> None:
        super().__init__(step_size, learned, max_norm)
        if not 0 <= momentum < 1:
            raise ValueError(f"Cannot refine with momentum={momentum} because it must be in [0, 1); try 0.5.")
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
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Cannot refine with betas={betas} because they must be in [0, 1); try (0.9, 0.999).")
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

    def __init__(
        self, step_size: float = 0.5, *, max_shift: float = 3.0, max_log_ratio: float = 0.5, learned: bool = False
    ) -> None:
        super().__init__(step_size, learned, None)
        if not (max_shift > 0 and max_log_ratio > 0):
            raise ValueError(
                f"Cannot refine with max_shift={max_shift} and max_log_ratio={max_log_ratio} because both must be "
                "positive; try 3.0 and 0.5."
            )
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


class LearnedUpdate(UpdateRule):
    r"""A network that has learned to take the step.

    It sees the features h of the datapoint, phi, and the gradient as the logarithm of its size and its sign, entry by
    entry, and answers with a gated update,

    .. math:: \phi_t = a \odot \phi_{t-1} + (1 - a) \odot f + b \odot d, \qquad (\mathrm{logit}\,a, f,
        \mathrm{logit}\,b) = \mathrm{net}(h, \phi_{t-1}, \log|g|, \mathrm{sign}\,g).

    d is the natural gradient, for the normal family; for others the last term is missing, as in the paper. Phi and the
    gradient are detached: every step is trained on its own, to be good from wherever the last one led, so that it can
    be repeated more often than in training.

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
        self.hidden_dims = tuple(hidden_dims)
        self.activation = activation
        self.network: nn.Sequential | None = None
        self.natural: NaturalGradient | None = None

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Builds the network, or makes sure that it fits if it has been built already."""
        natural = isinstance(family, Normal)
        sizes = num_features + 3 * family.num_params, (3 if natural else 2) * family.num_params
        if self.network is None:
            self.natural = NaturalGradient(1.0) if natural else None
            dims = [sizes[0], *self.hidden_dims]
            layers: list[nn.Module] = []
            for first, second in zip(dims, dims[1:], strict=False):
                layers += [nn.Linear(first, second), self.activation()]
            output = nn.Linear(dims[-1], sizes[1])
            with torch.no_grad():  # the first answers: half of phi, half of the network, a small natural step
                output.weight.mul_(0.1)
                output.bias.zero_()
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
        if self.natural is not None:
            new = new + parts[2].sigmoid() * (self.natural.update(phi, grad, ())[0] - phi)
        return new, state


_SMALLEST = math.exp(-8.0)
"""Gradients below this, in nats, look like it to a learned rule."""
