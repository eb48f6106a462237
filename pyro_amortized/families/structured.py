r"""A normal with the conditional independences of the model: a linear-Gaussian Bayesian network.

.. math:: q(z) = \prod_i N\Big(z_i;\; \mu_i + \sum_{j \in pa(i)} A_{ij} (z_j - \mu_j),\; \sigma_i^2\Big)

Every dimension is conditioned on some of those before it, its parents. With all of them the network is a full-rank
normal, with none a mean-field one; with those that the model couples it to, it has as many parameters as there are
couplings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_amortized.families.base import register_family
from pyro_amortized.families.normal import _Gaussian

__all__ = ["NetworkNormal", "Structured"]


class NetworkNormal(dist.MultivariateNormal):
    r"""A multivariate normal given by the conditional of each dimension given its parents, which come before it.

    .. math:: z - \mu = A (z - \mu) + \sigma \odot \epsilon, \quad \epsilon \sim N(0, I)

    The log-density costs as many operations as there are parents. A draw solves one triangular system; the covariance
    is computed only where it is asked for.

    Args:
        loc: :math:`\mu`, of shape ``(*, D)``.
        scale: :math:`\sigma`, the standard deviation of each dimension given its parents, ``(*, D)``.
        couplings: The E entries of A that are not zero, coefficients of regression on the parents, ``(*, E)``.
        rows: The dimensions that they belong to, ``(E,)``.
        columns: Their parents, each before its row, ``(E,)``.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        couplings: Tensor,
        rows: Tensor,
        columns: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.loc = loc
        self.scale = scale
        self.couplings = couplings
        self.rows = rows
        self.columns = columns
        torch.distributions.Distribution.__init__(self, loc.shape[:-1], loc.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NetworkNormal:
        """The same distribution for more datapoints."""
        shape = torch.Size(batch_shape)
        parts = [part.expand(shape + part.shape[-1:]) for part in (self.loc, self.scale, self.couplings)]
        new = type(self)(*parts, self.rows, self.columns, validate_args=False)  # type: ignore[call-arg, misc, arg-type]
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def network(self) -> Tensor:
        """A, of shape ``(*, D, D)``."""
        dim = self.loc.shape[-1]
        zeros = self.couplings.new_zeros(*self.couplings.shape[:-1], dim * dim)
        return zeros.index_copy(-1, self.rows * dim + self.columns, self.couplings).unflatten(-1, (dim, dim))

    @lazy_property
    def _unbroadcasted_scale_tril(self) -> Tensor:
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        unit = eye - self.network
        inverse = torch.linalg.solve_triangular(unit, eye.expand_as(unit), upper=False, unitriangular=True)
        return inverse * self.scale.unsqueeze(-2)

    def push(self, noise: Tensor) -> Tensor:
        """Turns standard normal noise of shape ``(K, *, D)`` into draws."""
        residual = self.scale * noise
        if self.rows.numel():
            unit = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device) - self.network
            columns = torch.linalg.solve_triangular(unit, residual.movedim(0, -1), upper=False, unitriangular=True)
            residual = columns.movedim(-1, 0)
        return self.loc + residual

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape ``(*sample_shape, *, D)``."""
        shape = torch.Size(sample_shape)
        noise = torch.randn(shape.numel(), *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.push(noise).reshape(shape + self.loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at values ``(*, D)``."""
        if self._validate_args:
            self._validate_sample(value)
        deviation = value - self.loc
        expected = self.couplings * deviation.index_select(-1, self.columns)
        noise = deviation.index_add(-1, self.rows, expected, alpha=-1) / self.scale
        constant = 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)
        return -0.5 * noise.square().sum(-1) - self.scale.log().sum(-1) - constant

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self.scale.log().sum(-1) + 0.5 * self.loc.shape[-1] * (1 + math.log(2 * math.pi))


@register_family("structured")
class Structured(_Gaussian):
    r"""Structured normal: every latent is conditioned on those before it that the model couples it to.

    .. math:: q(z) = \prod_i N\Big(z_i;\; \mu_i + \sum_{j \in pa(i)} A_{ij} (z_j - \mu_j),\; \sigma_i^2\Big),
        \qquad \phi = (\mu, \log\sigma, A)

    phi holds the location :math:`\mu`, which is the mean of q; the logarithm of the standard deviation :math:`\sigma_i`
    of each dimension given its parents; and the coefficients A, parent by parent. The number of parameters is 2D plus
    the number of couplings: for a chain of T sites of one dimension 3T - 1, where full rank has 2T + T(T - 1)/2.

    Guides find the parents from the model's own dependence (``pyro.infer.inspect.get_dependencies``), so that

    - two latents that have a factor of the log-joint in common, a parent and its child or two parents of one observed
      site, are coupled;
    - so are two latents that both have such a link to a later one: the order is that of the model, and what comes later
      has been integrated out;
    - all dimensions of one site's event are coupled, and of latents in inner plates those with equal indices, unless a
      site outside the plate depends on them.

    In the posterior, given the global latents, every latent depends on those before it through its parents alone. So
    the family holds the exact posterior of every linear-Gaussian model, as full rank does. Whatever the parents, q is a
    distribution that can be drawn from and whose density is exact. Where a model hides a dependence from Pyro (by
    ``.item()``, by numpy, by ``torch.vmap``, by writing latents into a tensor in place instead of ``torch.stack``),
    couplings are missing, so that q is less accurate and nothing else. ``guide.family.parents`` shows what was found,
    and ``family=lambda latent_dim: Structured(latent_dim, parents)`` gives others.

    Global latents are not among the parents: they are independent of the local ones in q.

    Args:
        latent_dim: D; ``num_params`` is 2D + E with E parents in all.
        parents: Which dimensions each one is conditioned on: boolean, of shape ``(D, D)``, with entry (i, j) true if j
            is a parent of i, which needs j < i. None for all that come before, which makes a full-rank normal.

    Raises:
        ValueError: If ``parents`` has another shape, or a parent does not come before its child.

    References:
        Structured Stochastic Variational Inference, Matthew D. Hoffman, David M. Blei (2015),
        https://arxiv.org/abs/1404.4114

        Faithful Inversion of Generative Models for Effective Amortized Inference, Stefan Webb, Adam Golinski, Robert
        Zinkov, N. Siddharth, Tom Rainforth, Yee Whye Teh, Frank Wood (2018), https://arxiv.org/abs/1712.00287

        Automatic Structured Variational Inference, Luca Ambrogioni, Kate Lin, Emily Fertig, Sharad Vikram, Max Hinne,
        Dave Moore, Marcel van Gerven (2021), https://arxiv.org/abs/2002.00643
    """

    takes_parents = True
    shares_heads = True
    rows: Tensor
    columns: Tensor

    def __init__(self, latent_dim: int, parents: Tensor | None = None) -> None:
        super().__init__(latent_dim)
        parents = torch.ones(latent_dim, latent_dim).tril(-1) if parents is None else torch.as_tensor(parents)
        parents = parents.bool().cpu()
        if parents.shape != (latent_dim, latent_dim):
            raise ValueError(
                f"Cannot condition {latent_dim} latent dimensions on parents of shape {tuple(parents.shape)} because "
                f"there must be a row and a column for each; try a boolean tensor {(latent_dim, latent_dim)}."
            )
        later = parents.triu().nonzero().tolist()
        if later:
            raise ValueError(
                f"Cannot condition dimension {later[0][0]} on dimension {later[0][1]} because parents come before "
                "their children; try parents.tril(-1)."
            )
        rows, columns = parents.nonzero().unbind(-1)
        self.noise_dim = latent_dim
        self.num_params = 2 * latent_dim + len(rows)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    @property
    def couplings(self) -> tuple[Tensor, Tensor]:
        """The dimensions that have parents, and these, ``(E,)`` each."""
        return self.rows, self.columns

    def resized(self, latent_dim: int, find_parents: Callable[[], Tensor]) -> Structured:
        """The structured normal of another number of dimensions, with the parents that they have."""
        return type(self)(latent_dim, find_parents())

    @property
    def parents(self) -> Tensor:
        """Which dimensions each one is conditioned on, boolean ``(D, D)``."""
        parents = torch.zeros(self.latent_dim, self.latent_dim, dtype=torch.bool, device=self.rows.device)
        parents[self.rows, self.columns] = True
        return parents

    def forward(self, phi: Tensor) -> NetworkNormal:
        """The normal of batch shape ``(*)``."""
        loc, log_scale, couplings = phi.split([self.latent_dim, self.latent_dim, len(self.rows)], -1)
        return NetworkNormal(loc, log_scale.exp(), couplings, self.rows, self.columns)

    def rsample(self, phi: Tensor, noise: Tensor) -> Tensor:
        """The solution z of ``z - loc = A (z - loc) + scale * noise``."""
        return self(phi).push(noise)

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """phi of independent normals."""
        log_scale = torch.full_like(loc, scale).log()
        return torch.cat([loc, log_scale, loc.new_zeros(*loc.shape[:-1], len(self.rows))], -1)

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor:
        r"""The posterior itself, if its precision matrix has the zeros of the network.

        Otherwise couplings that there are no parents for are left out, and the scales are those that then minimise
        KL(q || p): with :math:`M = (I - A)^{-1}`, the inverse
        roots of the diagonal of :math:`M^T \Lambda M`.
        """
        dim = self.latent_dim
        eye = torch.eye(dim, dtype=loc.dtype, device=loc.device)
        scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
        root = torch.linalg.solve_triangular(scale_tril, eye.expand_as(precision), upper=False)
        unit = root / root.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        couplings = -unit[..., self.rows.to(loc.device), self.columns.to(loc.device)]
        unit = torch.where(self.parents.to(loc.device) | eye.bool(), unit, 0.0)
        inverse = torch.linalg.solve_triangular(unit, eye.expand_as(unit), upper=False, unitriangular=True)
        scale = (inverse * (precision @ inverse)).sum(-2).rsqrt()
        return torch.cat([loc, scale.log(), couplings], -1)

    def masked(self, phi: Tensor, present: Tensor) -> Tensor:
        """phi with a standard normal, independent of all others, for latents that are masked."""
        coupled = present.index_select(-1, self.rows) & present.index_select(-1, self.columns)
        return phi.masked_fill(~torch.cat([present, present, coupled], -1), 0.0)

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"{super().extra_repr()}, num_parents={len(self.rows)}"
