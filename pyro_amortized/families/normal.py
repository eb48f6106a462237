r"""Gaussian families: mean-field, full rank and low rank plus diagonal.

All three start phi with the location; they differ in how the rest of phi makes a covariance.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_amortized.checks import check_count
from pyro_amortized.families.base import VariationalFamily, register_family

__all__ = ["LowRankMultivariateNormal", "MultivariateNormal", "Normal"]


class _Gaussian(VariationalFamily):
    """What Gaussian families share: a location first in phi, and marginals that are normal."""

    loc_first = True

    def quantile(self, phi: Tensor, probs: Tensor, num_samples: int = 1000) -> Tensor:
        """Exact marginal quantiles; ``num_samples`` is not needed."""
        loc, scale = self.marginals(phi)
        whole = torch.promote_types(phi.dtype, torch.float32)  # torch has no quantiles of half precision
        z = torch.special.ndtri(probs.to(phi.device, whole)).to(phi)
        return loc + scale * z.reshape(-1, *[1] * phi.dim())

    def marginals(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and standard deviations of every dimension, each of shape ``(*, D)``."""
        distribution = self(phi)
        return phi[..., : self.latent_dim], distribution.variance.sqrt()

    def log_conditionals(self, phi: Tensor, z: Tensor) -> Tensor:
        """Exact: every dimension is normal given those before it."""
        scale_tril = self(phi).scale_tril
        centred = (z - phi[..., : self.latent_dim]).unsqueeze(-1)
        standard = torch.linalg.solve_triangular(scale_tril, centred, upper=False).squeeze(-1)
        return dist.Normal(0.0, 1.0).log_prob(standard) - scale_tril.diagonal(dim1=-2, dim2=-1).log()


@register_family("normal")
class Normal(_Gaussian):
    r"""Mean-field normal, :math:`q(z) = \prod_d N(z_d; \mu_d, \sigma_d^2)`, with :math:`\phi = (\mu, \log\sigma)`.

    Args:
        latent_dim: D; ``num_params`` is 2D.
    """

    is_mean_field = True
    shares_heads = True
    takes_newton_steps = True

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim
        self.noise_dim = latent_dim

    def marginals(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and scales, each of shape ``(*, D)``."""
        loc, log_scale = phi.chunk(2, -1)
        return loc, log_scale.exp()

    def log_conditionals(self, phi: Tensor, z: Tensor) -> Tensor:
        """Exact: all dimensions are independent."""
        return dist.Normal(*self.marginals(phi)).log_prob(z)

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        """Independent normals of batch shape ``(*)`` and event shape ``(D,)``."""
        return dist.Normal(*self.marginals(phi)).to_event(1)

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """phi of independent normals."""
        return torch.cat([loc, torch.full_like(loc, scale).log()], -1)

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor:
        """The scales that minimise KL(q || p) are those of the conditionals, the inverse roots of the diagonal."""
        return torch.cat([loc, -0.5 * precision.diagonal(dim1=-2, dim2=-1).log()], -1)

    def masked(self, phi: Tensor, present: Tensor) -> Tensor:
        """phi with a standard normal for latents that are masked."""
        return phi.masked_fill(~torch.cat([present, present], -1), 0.0)

    def rsample(self, phi: Tensor, noise: Tensor) -> Tensor:
        """``loc + scale * noise``."""
        loc, scale = self.marginals(phi)
        return loc + scale * noise

    def in_units(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """A gradient by z ``(K, *, D)`` as one by the noise, of the same shape."""
        return gradient * phi[..., self.latent_dim :].exp()

    def moved(self, phi: Tensor, shift: Tensor, precision: Tensor) -> Tensor:
        """phi after a step in units of the noise: the best mean-field approximation of N(shift, precision^-1) there.

        Args:
            phi: Variational parameters of shape ``(*, P)``.
            shift: The step of the location, ``(*, D)``.
            precision: The new precision, ``(*, D, D)``.
        """
        loc, log_scale = phi.split(self.latent_dim, -1)
        return torch.cat(
            [loc + log_scale.exp() * shift, log_scale - 0.5 * precision.diagonal(dim1=-2, dim2=-1).log()], -1
        )


@register_family("multivariate_normal")
class MultivariateNormal(_Gaussian):
    r"""Full-rank normal, :math:`q(z) = N(z; \mu, L L^T)`.

    phi holds :math:`\mu`, the logarithm of the diagonal of L, and the rows of its strict lower triangle relative to the
    diagonal entry of their row: :math:`L = \operatorname{diag}(s) (I + A)`, so that the scale of a dimension can change
    without its correlations.

    Args:
        latent_dim: D; ``num_params`` is 2D + D(D - 1)/2.
    """

    takes_newton_steps = True
    lower: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        self.noise_dim = latent_dim
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        self.register_buffer("lower", rows * latent_dim + columns, persistent=False)

    def scale_tril(self, phi: Tensor) -> Tensor:
        """L, of shape ``(*, D, D)``."""
        dim = self.latent_dim
        relative = phi.new_zeros(*phi.shape[:-1], dim * dim)
        relative = relative.index_copy(-1, self.lower, phi[..., 2 * dim :]).unflatten(-1, (dim, dim))
        scale = phi[..., dim : 2 * dim].exp()
        return scale.unsqueeze(-1) * relative + torch.diag_embed(scale)

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        """A multivariate normal of batch shape ``(*)``."""
        return dist.MultivariateNormal(phi[..., : self.latent_dim], scale_tril=self.scale_tril(phi))

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """phi of independent normals."""
        start = loc.new_zeros(*loc.shape[:-1], self.num_params)
        start[..., : 2 * self.latent_dim] = torch.cat([loc, torch.full_like(loc, scale).log()], -1)
        return start

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor:
        """The posterior itself."""
        return self._of(loc, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision))))

    def _of(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """phi of a location and L."""
        scale = scale_tril.diagonal(dim1=-2, dim2=-1)
        relative = (scale_tril / scale.unsqueeze(-1)).flatten(-2)[..., self.lower]
        return torch.cat([loc, scale.log(), relative], -1)

    def rsample(self, phi: Tensor, noise: Tensor) -> Tensor:
        """``loc + L @ noise``."""
        return phi[..., : self.latent_dim] + (self.scale_tril(phi) @ noise.unsqueeze(-1)).squeeze(-1)

    def in_units(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """A gradient by z ``(K, *, D)`` as one by the noise, of the same shape."""
        return (self.scale_tril(phi).mT @ gradient.unsqueeze(-1)).squeeze(-1)

    def moved(self, phi: Tensor, shift: Tensor, precision: Tensor) -> Tensor:
        """phi after a step in units of the noise, to N(shift, precision^-1) there; shapes as for :class:`Normal`."""
        scale_tril = self.scale_tril(phi)
        loc = phi[..., : self.latent_dim] + (scale_tril @ shift.unsqueeze(-1)).squeeze(-1)
        upper = torch.linalg.cholesky_ex(precision.flip(-2, -1))[0].flip(-2, -1)  # precision = upper @ upper.mT
        eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
        return self._of(loc, scale_tril @ torch.linalg.solve_triangular(upper.mT, eye, upper=False))


@register_family("low_rank_multivariate_normal")
class LowRankMultivariateNormal(_Gaussian):
    r"""Normal with low-rank plus diagonal covariance, :math:`q(z) = N(z; \mu, S (I + B B^T) S)`.

    phi holds :math:`\mu`, :math:`\log` of the diagonal of S, and the D x R factor B.

    Args:
        latent_dim: D; ``num_params`` is 2D + DR.
        rank: R; by default the square root of D, rounded up.
    """

    def __init__(self, latent_dim: int, rank: int | None = None) -> None:
        super().__init__(latent_dim)
        self.rank = int((self.latent_dim - 1) ** 0.5) + 1 if rank is None else check_count("rank", rank, 1)
        self.num_params = 2 * latent_dim + latent_dim * self.rank
        self.noise_dim = latent_dim + self.rank

    def _split(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = self.latent_dim
        loc, log_scale, factor = phi.split([dim, dim, dim * self.rank], -1)
        scale = log_scale.exp()
        return loc, scale, scale.unsqueeze(-1) * factor.unflatten(-1, (dim, self.rank))

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        """A low-rank multivariate normal of batch shape ``(*)``."""
        loc, scale, factor = self._split(phi)
        return dist.LowRankMultivariateNormal(loc, factor, scale.square())

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """phi of nearly independent normals.

        At a factor of zeros the gradient with respect to the factor vanishes, so that it starts at small values, of
        alternating sign and different in each column.
        """
        start = loc.new_zeros(*loc.shape[:-1], self.num_params)
        start[..., : 2 * self.latent_dim] = torch.cat([loc, torch.full_like(loc, scale).log()], -1)
        position = torch.arange(self.latent_dim * self.rank, dtype=loc.dtype, device=loc.device)
        start[..., 2 * self.latent_dim :] = 0.05 * torch.sin(1.0 + 2.4 * position)
        return start

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor:
        """The best mean-field member, with the factor of :meth:`initial`."""
        start = self.initial(loc, 1.0)
        start[..., self.latent_dim : 2 * self.latent_dim] = -0.5 * precision.diagonal(dim1=-2, dim2=-1).log()
        return start

    def rsample(self, phi: Tensor, noise: Tensor) -> Tensor:
        """``loc + S @ (e1 + B @ e2)`` for ``noise = (e1, e2)``."""
        loc, scale, factor = self._split(phi)
        diagonal, low_rank = noise.split([self.latent_dim, self.rank], -1)
        return loc + scale * diagonal + (factor @ low_rank.unsqueeze(-1)).squeeze(-1)
