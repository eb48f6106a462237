"""Update rules of first order."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_amortized.checks import check_positive, check_real
from pyro_amortized.families import VariationalFamily
from pyro_amortized.updates.base import State, SteppedRule, check_limits

__all__ = ["Adam", "GradientAscent", "NaturalGradient"]


class GradientAscent(SteppedRule[Tensor]):
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


class Adam(SteppedRule[Tensor]):
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
        decays = torch.stack([decay * beta for decay, beta in zip(decays, self.betas, strict=True)])
        first = torch.lerp(grad, first, self.betas[0])
        second = torch.lerp(grad.square(), second, self.betas[1])
        bias = 1 - decays
        root = (second / bias[1]).clamp(min=1e-30).sqrt()  # the root of zero has no derivative to unroll
        return phi + self.step_size * (first / bias[0]) / (root + self.eps), (first, second, decays)


class NaturalGradient(SteppedRule[Tensor]):
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
        check_limits(max_shift, max_log_ratio)
        self.max_shift = max_shift
        self.max_log_ratio = max_log_ratio

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Makes sure that the family is the mean-field normal."""
        if not family.is_mean_field:
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
