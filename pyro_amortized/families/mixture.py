r"""Mixtures of normals: several modes, skew and heavy tails, with a density that costs little at any point.

A draw is a smooth function of phi and of normal noise: :math:`\epsilon_d` picks the quantile of :math:`z_d` given
:math:`z_{<d}`, which is a mixture again, with weights that the dimensions before have changed. The derivative of a draw
with respect to phi follows by implicit differentiation, so that only the draw itself takes a search.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_amortized.checks import check_count, check_positive
from pyro_amortized.families.base import VariationalFamily, register_family

__all__ = ["Mixture"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_CLOSE = 0.8
"""How far components that share a mode start from it, in its standard deviations."""
_TRACED_STEPS, _MOST_STEPS = 30, 100
"""Steps of a search in a graph, and most of them elsewhere. Two normals 200 000 standard deviations apart take 28."""


@register_family("mixture")
class Mixture(VariationalFamily):
    r"""A mixture of normals with diagonal covariances.

    .. math:: q(z) = \sum_{c=1}^C \pi_c \prod_d N(z_d; \mu_{cd}, \sigma_{cd}^2), \quad
        \phi = (\mathrm{logits}\ \pi, \mu, \log\sigma)

    The components start apart, since equal ones have equal gradients and would stay equal, and in different places, so
    that they can find different modes.

    Refinement and local optima take draws from every component and weigh them, at C times the evaluations of the model
    (:meth:`weighted_draws`). Pyro's ELBOs take single draws: their gradients are right too, but those of the logits are
    very noisy where no draws lie between the modes.

    Args:
        latent_dim: D; ``num_params`` is C(2D + 1).
        num_components: C.
        spread: Standard deviation of the components' locations where they start, in unconstrained space.

    Raises:
        ValueError: If there is no component, or the spread is not positive.

    References:
        Stochastic Backpropagation through Mixture Density Distributions, Alex Graves (2016),
        https://arxiv.org/abs/1607.05690
        Implicit Reparameterization Gradients, Michael Figurnov, Shakir Mohamed, Andriy Mnih (2018),
        https://arxiv.org/abs/1805.08498
        Remarks on a Multivariate Transformation, Murray Rosenblatt (1952).
    """

    multimodal = True

    def __init__(self, latent_dim: int, num_components: int = 4, spread: float = 1.0) -> None:
        super().__init__(latent_dim)
        num_components = check_count("num_components", num_components, 1, 4)
        check_positive("spread", spread, 1.0)  # components that start in one place stay equal
        self.num_components = num_components
        self.spread = spread
        self.num_params = num_components * (2 * latent_dim + 1)
        self.noise_dim = latent_dim
        self.draws_per_noise = num_components

    @property
    def locations(self) -> slice:
        """Those of all components."""
        return slice(self.num_components, self.num_components * (1 + self.latent_dim))

    def centres(self, phi: Tensor) -> Tensor:
        """The components' locations, ``(C, *, D)``."""
        return self.components(phi)[1].movedim(-2, 0)

    def components(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the weights ``(*, C)``, locations and log scales ``(*, C, D)``."""
        count, dim = self.num_components, self.latent_dim
        logits, locs, log_scales = phi.split([count, count * dim, count * dim], -1)
        return logits, locs.unflatten(-1, (count, dim)), log_scales.unflatten(-1, (count, dim))

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        """A mixture of batch shape ``(*)`` and event shape ``(D,)``."""
        return _MixtureOfNormals(*self.components(phi))

    def rsample(self, phi: Tensor, noise: Tensor) -> Tensor:
        """Turns noise into draws: dimension by dimension, the quantiles of the conditional distributions."""
        parameters = self.components(phi.expand(*noise.shape[:-1], -1))
        return _Draw.apply(_quantile(noise.detach(), *(p.detach() for p in parameters)), noise, *parameters)

    def log_conditionals(self, phi: Tensor, z: Tensor) -> Tensor:
        """Exact: ratios of the densities of the first d dimensions, which are mixtures too."""
        logits, locs, log_scales = self.components(phi)
        log_joint = _log_normal(z, locs, log_scales).cumsum(-1) + logits.log_softmax(-1).unsqueeze(-1)
        log_density = log_joint.logsumexp(-2)
        return torch.cat([log_density[..., :1], log_density.diff(dim=-1)], -1)

    def weighted_draws(self, phi: Tensor, noise: Tensor, path: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Draws from every component on the same noise, ``(CK, *, D)``, weighted as the components are.

        Few draws lie between modes that are far apart, and only these tell how the expectation changes with the weights
        of the modes; here it is plain to see.
        """
        logits, locs, log_scales = self.components(phi if path is None else path)
        z = locs.movedim(-2, 0).unsqueeze(1) + log_scales.exp().movedim(-2, 0).unsqueeze(1) * noise
        weights = (logits.softmax(-1) / len(noise)).movedim(-1, 0).unsqueeze(1).expand(z.shape[:-1])
        z = z.flatten(0, 1)
        return z, self(phi).log_prob(z), weights.flatten(0, 1)

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """Equal weights, components of the given scale, their locations spread around ``loc``."""
        locs = loc.unsqueeze(-2) + self.spread * self._directions(loc)
        logits = loc.new_zeros(*loc.shape[:-1], self.num_components)
        return torch.cat([logits, locs.flatten(-2), torch.full_like(locs, scale).log().flatten(-2)], -1)

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor:
        """Components around the mean, with about the scales of the best mean-field normal."""
        return self.laplace_of_modes(loc[None], precision[None], torch.ones_like(loc[None, ..., 0]))

    def laplace_of_modes(self, locs: Tensor, precisions: Tensor, shares: Tensor) -> Tensor:
        """A component at each of the largest modes, and those left over around the largest one."""
        count = self.num_components
        share, order = shares.topk(min(count, len(shares)), 0)
        padding = count - len(share)
        share = torch.cat([share, share.new_zeros(padding, *share.shape[1:])])
        order = torch.cat([order, order[:1].expand(padding, *order.shape[1:])])
        order = torch.where(share > 0, order, order[:1]).unsqueeze(-1)
        left_over = (share == 0).sum(0, keepdim=True) + 1.0
        alone = torch.cat([left_over == 1, share[1:] > 0]).unsqueeze(-1)
        share = torch.where(share > 0, share, share[:1])
        share = torch.where(alone[..., 0], share, share / left_over)
        scale = precisions.diagonal(dim1=-2, dim2=-1).rsqrt().gather(0, order.expand(-1, *locs.shape[1:]))
        spread = torch.where(alone, 0.0, _CLOSE * scale) * self._directions(locs[0]).movedim(-2, 0)
        loc = locs.gather(0, order.expand(-1, *locs.shape[1:])) + spread
        log_scale = torch.where(alone, scale, scale * (1 - _CLOSE**2) ** 0.5).log()
        parts = [share.log().movedim(0, -1), loc.movedim(0, -2).flatten(-2), log_scale.movedim(0, -2).flatten(-2)]
        return torch.cat(parts, -1)

    def _directions(self, like: Tensor) -> Tensor:
        """Where components lie around a point, ``(*, C, D)``: on average 0, with squares that are 1 on average."""
        count, dim = self.num_components, self.latent_dim
        if count == 1:
            return like.new_zeros(*like.shape[:-1], 1, dim)
        angles = torch.arange(count * dim, dtype=like.dtype, device=like.device).unflatten(0, (count, dim))
        directions = torch.sin(1.0 + 2.4 * angles)
        directions = directions - directions.mean(0)
        return (directions / directions.square().mean(0).sqrt()).expand(*like.shape[:-1], count, dim)

    def quantile(self, phi: Tensor, probs: Tensor, num_samples: int = 1000) -> Tensor:
        """Marginal quantiles, by a search; ``num_samples`` is not needed."""
        logits, locs, log_scales = self.components(phi.detach())
        noise = torch.special.ndtri(probs.to(phi)).reshape(-1, *[1] * phi.dim())
        return _search(noise, logits.softmax(-1).unsqueeze(-2), locs.mT, log_scales.mT)


class _MixtureOfNormals(dist.TorchDistribution):
    r"""A mixture of diagonal normals, with reparameterised draws.

    Pyro's ``MixtureOfDiagNormals`` is of the same law, but the derivatives of its draws with respect to the logits are
    not those of the expectation, and it does without one dimension.

    Args:
        logits: Logits of the weights, ``(*, C)``.
        locs: Locations ``(*, C, D)``.
        log_scales: Logarithms of the scales, ``(*, C, D)``.
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "locs": constraints.independent(constraints.real, 2),
        "log_scales": constraints.independent(constraints.real, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, locs: Tensor, log_scales: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits, self.locs, self.log_scales = logits, locs, log_scales
        validate_args = validate_args if logits.numel() else False  # torch cannot check what is empty
        super().__init__(logits.shape[:-1], locs.shape[-1:], validate_args=validate_args)

    def _expanded(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and log scales for a larger batch shape."""
        locs, log_scales = (p.expand(shape + self.locs.shape[-2:]) for p in (self.locs, self.log_scales))
        return self.logits.expand(shape + self.logits.shape[-1:]), locs, log_scales

    def expand(self, batch_shape: Any, _instance: Any = None) -> _MixtureOfNormals:
        """The same distributions, repeated."""
        new = _MixtureOfNormals(*self._expanded(torch.Size(batch_shape)), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, ``(K, *)`` for points ``(K, *, D)``."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.logsumexp(self.logits.log_softmax(-1) + _log_normal(value, self.locs, self.log_scales).sum(-1), -1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws whose derivatives are those of :meth:`Mixture.rsample`, from a component chosen at random."""
        shape = torch.Size(sample_shape) + self.batch_shape
        logits, locs, log_scales = self._expanded(shape)
        with torch.no_grad():
            which = torch.distributions.Categorical(logits=logits, validate_args=False).sample()[..., None, None]
            which = which.expand(*shape, 1, locs.shape[-1])
            loc, log_scale = (p.gather(-2, which).squeeze(-2) for p in (locs, log_scales))
            z = loc + log_scale.exp() * torch.randn_like(loc)
        return _Draw.apply(z, None, logits, locs, log_scales)

    @property
    def mean(self) -> Tensor:
        """``(*, D)``."""
        return (self.logits.softmax(-1).unsqueeze(-1) * self.locs).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Of every dimension, ``(*, D)``."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    @property
    def covariance_matrix(self) -> Tensor:
        """``(*, D, D)``."""
        weights = self.logits.softmax(-1).unsqueeze(-1)
        centred = self.locs - self.mean.unsqueeze(-2)
        within = (weights * (2 * self.log_scales).exp()).sum(-2)
        return torch.diag_embed(within) + (weights * centred).transpose(-1, -2) @ centred


def _log_normal(z: Tensor, locs: Tensor, log_scales: Tensor) -> Tensor:
    """Log-densities of ``z`` ``(*, D)`` under every component and dimension, ``(*, C, D)``."""
    standard = (z.unsqueeze(-2) - locs) * (-log_scales).exp()
    return -0.5 * standard.square() - log_scales - _HALF_LOG_TWO_PI


class _Draw(torch.autograd.Function):
    r"""A draw z with its derivatives, those of :math:`F_d(z_d \mid z_{<d}; \phi) = \Phi(\epsilon_d)`.

    With the conditional weights :math:`w_{cd} \propto e^{a_{cd}}`, :math:`a_{cd} = \mathrm{logit}\,\pi_c + \sum_{j<d}
    \log N_{cj}`, and the conditional density :math:`f_d = \sum_c w_{cd} N_{cd}`, differentiation of the equation gives

    .. math:: dz_d = \frac{d\Phi(\epsilon_d)}{f_d} + \sum_c r_{cd} (d\mu_{cd} + x_{cd}\, d\sigma_{cd})
        - \sum_c s_{cd}\, da_{cd}, \quad r_{cd} = \frac{w_{cd} N_{cd}}{f_d}, \quad
        s_{cd} = \frac{w_{cd}}{f_d} \Big(\Phi(x_{cd}) - \sum_b w_{bd} \Phi(x_{bd})\Big)

    with :math:`x_{cd} = (z_d - \mu_{cd}) / \sigma_{cd}`. da holds :math:`dz_{<d}`: a triangular system. Written with
    differentiable operations, so that derivatives of any order are right.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, noise: Tensor | None, logits: Tensor, locs: Tensor, log_scales: Tensor) -> Tensor:
        z = z.clone()
        ctx.save_for_backward(z, noise, logits, locs, log_scales)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Draw.gradients(ctx, *grads)

    @staticmethod
    def gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The same in the precision of the parameters."""
        z, noise, logits, locs, log_scales = ctx.saved_tensors
        inverse_scale = (-log_scales).exp()
        x = (z.unsqueeze(-2) - locs) * inverse_scale
        log_n = -0.5 * x.square() - log_scales - _HALF_LOG_TWO_PI
        before = torch.nn.functional.pad(log_n[..., :-1].cumsum(-1), (1, 0))
        log_w = (logits.unsqueeze(-1) + before).log_softmax(-2)
        log_f = torch.logsumexp(log_w + log_n, -2)
        responsibility = (log_w + log_n - log_f.unsqueeze(-2)).exp()
        tail = _tail(x, log_w)
        sensitivity = (log_w - log_f.unsqueeze(-2)).exp() * (tail - (log_w.exp() * tail).sum(-2, keepdim=True))
        slope = -x * inverse_scale  # of log_n in z
        system = torch.tril(sensitivity.transpose(-1, -2) @ -slope, -1)
        (grad,) = grads
        v = _solve_transposed(system, grad)
        u = v.unsqueeze(-2) * sensitivity
        after = torch.nn.functional.pad(u[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
        direct = v.unsqueeze(-2) * responsibility
        grad_locs = direct + after * slope
        grad_log_scales = direct * (z.unsqueeze(-2) - locs) - after * (x.square() - 1)
        grad_noise = None
        if noise is not None:
            grad_noise = v * (-0.5 * noise.square() - _HALF_LOG_TWO_PI - log_f).exp()
        return None, grad_noise, -u.sum(-1), grad_locs, grad_log_scales


def _tail(x: Tensor, log_w: Tensor) -> Tensor:
    """The distribution function of every component, less 1 where that is the smaller number; weights sum to 1."""
    below = torch.special.ndtr(x)
    upper = (log_w.exp() * below).sum(-2, keepdim=True) > 0.5
    return torch.where(upper, -torch.special.ndtr(-x), below)


def _solve_transposed(system: Tensor, grad: Tensor) -> Tensor:
    """v with ``(I - system)^T v = grad``."""
    if grad.shape[-1] == 1:
        return grad
    matrix = -system.transpose(-1, -2)
    return torch.linalg.solve_triangular(matrix, grad.unsqueeze(-1), upper=True, unitriangular=True).squeeze(-1)


def _quantile(noise: Tensor, logits: Tensor, locs: Tensor, log_scales: Tensor) -> Tensor:
    """The draw of every noise ``(*, D)``, dimension by dimension."""
    parts = []
    for d in range(locs.shape[-1]):
        z = _search(noise[..., d], logits.softmax(-1), locs[..., d], log_scales[..., d])
        logits = logits + _log_normal(z.unsqueeze(-1), locs[..., d, None], log_scales[..., d, None]).squeeze(-1)
        parts.append(z)
    return torch.stack(parts, -1)


def _search(noise: Tensor, weights: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    r"""Solves :math:`\sum_c w_c \Phi((z - \mu_c) / \sigma_c) = \Phi(\epsilon)` for z, by Newton's method in a bracket.

    The components' own quantiles bracket the solution; a step that leaves the bracket, or does not halve the one
    before, gives way to bisection. Where noise is positive the problem is mirrored, so that the probabilities are small
    and exact. What has converged stays as it is while steps go on for the rest, so that it does not depend on these;
    while a graph is traced the number of steps is fixed.
    """
    sign = torch.where(noise > 0, -1.0, 1.0).to(noise)
    noise, loc, inverse_scale = -noise.abs(), sign.unsqueeze(-1) * loc, (-log_scale).exp()
    target, density = torch.special.ndtr(noise), weights * inverse_scale * math.exp(-_HALF_LOG_TWO_PI)
    bounds = loc + noise.unsqueeze(-1) / inverse_scale
    low, high = bounds.amin(-1), bounds.amax(-1)
    z, step = (weights * bounds).sum(-1), high - low
    precision, fixed, ended = torch.finfo(z.dtype).eps, _is_traced(), torch.zeros_like(z, dtype=torch.bool)
    for _ in range(_TRACED_STEPS if fixed else _MOST_STEPS):
        x = (z.unsqueeze(-1) - loc) * inverse_scale
        below = (weights * torch.special.ndtr(x)).sum(-1)
        slope = (density * (-0.5 * x.square()).exp()).sum(-1)
        low, high = torch.where(below < target, z, low), torch.where(below < target, high, z)
        error = (below / target).log()
        newton = z - error * below / slope
        good = (newton >= low) & (newton <= high) & (((newton - z).abs() < 0.5 * step) | (error.abs() < 1e-3))
        new = torch.where(ended, z, torch.where(good, newton, 0.5 * (low + high)))
        step, z = (new - z).abs(), new
        ended = ended | (good & (error.abs() < precision**0.5)) | (high - low <= 2 * precision * z.abs())
        if not fixed and bool((ended | z.isnan()).all()):
            break
    return sign * z


def _is_traced() -> bool:
    """Whether values may not be looked at, since a graph is being made."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # slow to import, and not needed to know that
    get_mode = getattr(tracer, "get_proxy_mode", None) or getattr(tracer, "get_innermost_proxy_mode", None)  # torch 2.4
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or bool(get_mode and get_mode())
