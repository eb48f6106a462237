r"""How far q(z | x) is from the model's prior, dimension by dimension, and how much z tells of x.

The local latents of a datapoint, unconstrained, come site after site. For dimension d of site s this module measures

.. math:: \mathrm{KL}_d = E_{q(u_{<s})}\big[\mathrm{KL}\big(q(u_d \mid u_{<s}, x)\,\|\,p(u_d \mid u_{<s})\big)\big],

which is zero if and only if the guide answers with the prior there, whatever the earlier sites are. The conditionals of
Gaussian families are known; those of other families are estimated from draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from pyro_amortized.diagnostics.collapse.priors import SitePrior, site_priors
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.families import VariationalFamily
from pyro_amortized.objective.draws import MAX_ROWS
from pyro_amortized.objective.noise import draw, seeded
from pyro_amortized.structure.local_site import LocalSite

__all__ = ["Divergence", "local_divergence", "mutual_information"]


@dataclass
class Divergence:
    """What is known of q against the prior for every datapoint, in nats.

    Attributes:
        kl: KL divergences ``(N, D)``.
        kl_se: Their Monte Carlo standard errors ``(N, D)``; 0 where there is a closed form.
        total: KL divergence of the whole latent, ``(N,)``: the sum of ``kl`` if neither q nor the prior couples the
            dimensions of a site.
        total_se: Its standard error.
        mean: Mean of q in unconstrained space ``(N, D)``.
        mean_se: Its standard error; 0 for Gaussian families.
    """

    kl: Tensor
    kl_se: Tensor
    total: Tensor
    total_se: Tensor
    mean: Tensor
    mean_se: Tensor


@dataclass
class _Draws:
    """Draws u from q, ``(K, N, D)``, as ``u = mean + scale_tril @ noise`` with uncorrelated noise."""

    mean: Tensor
    scale_tril: Tensor
    noise: Tensor
    latents: Tensor
    log_q: Tensor
    gaussian: bool

    @classmethod
    def of(cls, family: VariationalFamily, phi: Tensor, num_samples: int, rng: torch.Generator) -> _Draws:
        """Draws from the family, with moments that are exact if it is Gaussian and the draws' own if not."""
        q = family(phi)
        gaussian = family.is_mean_field or isinstance(q, MultivariateNormal | LowRankMultivariateNormal)
        if gaussian:
            mean = q.mean
            scale_tril = torch.diag_embed(q.stddev) if family.is_mean_field else _cholesky(q.covariance_matrix)
            noise = torch.randn(num_samples, *mean.shape, generator=rng, dtype=torch.float64).to(mean)
            latents = mean + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        else:
            latents = draw(family, phi, max(num_samples, 10 * family.latent_dim), rng)
            mean = latents.mean(0)
            centred = (latents - mean).transpose(0, 1)
            scale_tril = _cholesky(centred.transpose(-1, -2) @ centred / (len(latents) - 1))
            noise = torch.linalg.solve_triangular(scale_tril, (latents - mean).unsqueeze(-1), upper=False).squeeze(-1)
        return cls(mean, scale_tril, noise, latents, q.log_prob(latents), gaussian)

    def given_earlier(self, site: LocalSite) -> tuple[Tensor, Tensor]:
        """Mean ``(K, N, d)`` and covariance ``(N, d, d)`` of a site given the sites before it."""
        own = slice(site.start, site.stop)
        mean = self.mean[:, own].expand(len(self.noise), -1, -1)
        if site.start:
            lower = self.scale_tril[:, own, : site.start]
            mean = mean + (lower @ self.noise[..., : site.start].unsqueeze(-1)).squeeze(-1)
        scale_tril = self.scale_tril[:, own, own]
        return mean, scale_tril @ scale_tril.transpose(-1, -2)

    def kl(self, prior: SitePrior, piece: slice) -> Tensor | None:
        """KL divergences of a site's units from their prior in closed form, ``(k, N, J)``, or None."""
        if not self.gaussian:
            return None
        mean, covariance = self.given_earlier(prior.site)
        return prior.kl_from_normal(mean[piece], covariance.diagonal(dim1=-2, dim2=-1).sqrt())

    def log_density(self, site: LocalSite, unit: int) -> Tensor:
        """Log density ``(K, N, J)`` of every unit of a site, given the sites before it."""
        if unit == self.latents.shape[-1]:
            return self.log_q.unsqueeze(-1)
        mean, covariance = self.given_earlier(site)
        residual = (self.latents[..., site.start : site.stop] - mean).unflatten(-1, (-1, unit))
        blocks = covariance.unflatten(-1, (-1, unit)).unflatten(-3, (-1, unit)).diagonal(dim1=-4, dim2=-2)
        scale_tril = torch.linalg.cholesky(blocks.permute(0, 3, 1, 2))
        white = torch.linalg.solve_triangular(scale_tril, residual.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_prob = -0.5 * (white.square() + math.log(2 * math.pi)) if self.gaussian else _log_density(white)
        return log_prob.sum(-1) - log_det


def _cholesky(covariance: Tensor) -> Tensor:
    jitter = 1e-6 if covariance.dtype == torch.float32 else 1e-12
    return torch.linalg.cholesky(covariance + torch.diag_embed(jitter * covariance.diagonal(dim1=-2, dim2=-1)))


def _log_density(draws: Tensor) -> Tensor:
    """Log densities at draws ``(K, *)`` from the distance to their m-th neighbours: minus an entropy on average.

    References:
        A Test for Normality Based on Sample Entropy, Oldrich Vasicek (1976).
    """
    count = len(draws)
    neighbours = max(1, round(count**0.5))
    ordered, order = draws.sort(0)
    position = torch.arange(count)
    low, high = (position - neighbours).clamp(min=0), (position + neighbours).clamp(max=count - 1)
    gap = (ordered[high] - ordered[low]).clamp(min=torch.finfo(draws.dtype).tiny)
    expected = torch.digamma((high - low).to(draws)) - torch.digamma(draws.new_tensor(count + 1.0))
    log_density = expected.reshape(-1, *[1] * (draws.dim() - 1)) - gap.log()
    return torch.empty_like(draws).scatter_(0, order, log_density)


@torch.no_grad()
def local_divergence(problem: LocalProblem, num_samples: int, rng: torch.Generator) -> Divergence:
    """Divergences of every datapoint of a call.

    Args:
        problem: The call.
        num_samples: Number of draws per datapoint; more are drawn for families that are not Gaussian, if need be.
        rng: Source of the draws.
    """
    objective = problem.objective
    draws = _Draws.of(objective.family, problem.phi, num_samples, rng)
    kls, total = torch.zeros_like(draws.latents), draws.log_q.clone()
    log_densities: dict[str, Tensor] = {}
    with pyro.validation_enabled(False), seeded(rng):
        for piece, priors in site_priors(objective.log_joint, draws.latents):
            for prior in priors:
                site = prior.site
                if site.name not in log_densities:
                    log_densities[site.name] = draws.log_density(site, prior.unit)
                sampled = log_densities[site.name][piece] - prior.log_p
                exact = draws.kl(prior, piece)
                kl = sampled if exact is None else exact
                kls[piece, :, site.start : site.stop] = (kl / prior.unit).repeat_interleave(prior.unit, -1)
                total[piece] += (kl - sampled).sum(-1) - prior.log_whole
    (kl, kl_se), (total, total_se) = _mean_and_error(kls), _mean_and_error(total)
    mean_se = torch.zeros_like(draws.mean) if draws.gaussian else draws.latents.std(0) / len(draws.latents) ** 0.5
    return Divergence(*(part.cpu().double() for part in (kl, kl_se, total, total_se, draws.mean, mean_se)))


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.double()
    return values.mean(0), values.std(0) / len(values) ** 0.5


@torch.no_grad()
def mutual_information(
    family: VariationalFamily,
    phi: Tensor,
    rng: torch.Generator,
    num_samples: int | None = None,
    units: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float]:
    r"""How much the latent tells of which datapoint it belongs to.

    .. math:: \frac{1}{N} \sum_n E_{q(z | x_n)}\Big[\log q(z | x_n) - \log \frac{1}{N} \sum_m q(z | x_m)\Big]
        \le \log N

    Args:
        family: The variational family.
        phi: Variational parameters ``(N, P)``.
        rng: Source of the draws.
        num_samples: Number of draws per datapoint, at least 2; by default such that there are 20000 in all, or fewer
            where their densities under all datapoints would take long.
        units: A location and a scale for each datapoint, ``(N, D)`` each: z is measured from the one, in units of the
            other. Where the prior differs from datapoint to datapoint, this leaves out what it tells by itself.

    Returns:
        The estimate in nats, and its Monte Carlo standard error.

    References:
        ELBO surgery: yet another way to carve up the variational evidence lower bound, Matthew D. Hoffman, Matthew J.
        Johnson (2016), http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf
    """
    size, dim = len(phi), family.latent_dim
    q = family(phi)
    if num_samples is None:
        pairs = 20_000_000 if family.is_mean_field else 2_000_000
        num_samples = max(2, min(1000, 20_000 // size, pairs // size**2))
    z = draw(family, phi, num_samples, rng)
    own = q.log_prob(z)
    loc, scale = (None, None) if units is None else (part.to(z) for part in units)
    if loc is None or scale is None or (loc == loc[:1]).all() and (scale == scale[:1]).all():
        loc, scale = z.new_zeros(1, dim), z.new_ones(1, dim)
    log_scale = scale.log().sum(-1)
    step = max(1, 100 * MAX_ROWS // size // dim)
    rows = ((z - loc) / scale).reshape(-1, 1, dim).split(step)
    densities = [(q.log_prob(loc + scale * part.expand(-1, size, -1)) + log_scale).logsumexp(-1) for part in rows]
    own, aggregate = own + log_scale, torch.cat(densities).reshape(own.shape)
    values = (own - aggregate).double() + math.log(size)
    error = (values.var(0) / num_samples).sum().sqrt() / size
    return values.mean().item(), error.item()
