r"""Whether chains agree, and what their draws are worth: R-hat and effective sample sizes, for many chains at once.

The definitions are those of ArviZ. All functions take draws of C chains as ``(C, T, *)`` and give one number for each
of the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["bulk_ess", "mean_ess", "rank_rhat", "scale_ess", "tail_ess"]


def rank_rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of that of the draws and that of their distance from the median.

    Args:
        draws: Of C chains, ``(C, T, *)``, T at least 4.

    Returns:
        R-hat ``(*)``; NaN where all draws are equal.

    References:
        Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC, Aki Vehtari,
        Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner (2021), https://arxiv.org/abs/1903.08008

    Example:
        >>> chains = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool(rank_rhat(chains) < 1.01), bool(rank_rhat(chains + torch.arange(4.0)[:, None]) > 1.5)
        (True, True)
    """
    split = _split(draws)
    pooled = split.flatten(0, 1)
    centre = pooled.quantile(0.5, dim=0)
    return torch.maximum(_rhat(_normal_scores(split)), _rhat(_normal_scores((split - centre).abs())))


def bulk_ess(draws: Tensor) -> Tensor:
    """Effective sample size for the centre of the distribution, ``(*)``; draws ``(C, T, *)`` as for :func:`rank_rhat`.

    Of draws that vary against each other it is more than their number.
    """
    return _ess(_normal_scores(_split(draws)))


def mean_ess(draws: Tensor) -> Tensor:
    """Effective sample size for the mean, ``(*)``, without ranks; draws ``(C, T, *)``."""
    return _ess(_split(draws))


def scale_ess(draws: Tensor) -> Tensor:
    r"""Effective sample size for the standard deviation, ``(*)``; draws ``(C, T, *)`` as for :func:`rank_rhat`.

    It is the number M of independent normal draws whose standard deviation has the same relative error,
    :math:`1 / \sqrt{2 M}`: of independent draws of heavier tails it is less than their number.
    """
    squares = (draws.double() - draws.double().mean((0, 1))).square()
    relative = squares.flatten(0, 1).var(0, correction=0) / squares.mean((0, 1)).square()
    return 2 * _ess(_split(squares)) / relative


def tail_ess(draws: Tensor) -> Tensor:
    """Effective sample size for the 5 % and 95 % quantiles, the smaller one, ``(*)``; draws ``(C, T, *)``."""
    pooled = draws.double().flatten(0, 1)
    sizes = [_ess(_split(draws.double() <= pooled.quantile(prob, dim=0))) for prob in (0.05, 0.95)]
    return torch.minimum(*sizes)


def _split(draws: Tensor) -> Tensor:
    """Both halves of every chain, ``(2C, T // 2, *)``, in float64."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


def _normal_scores(draws: Tensor) -> Tensor:
    """Normal scores of the ranks among all draws, those of ties averaged."""
    columns = draws.reshape(draws.shape[0] * draws.shape[1], -1).T.contiguous()
    ordered = columns.sort(-1).values
    below, upto = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    rank = (below + upto + 1) / 2
    scores = torch.special.ndtri((rank.double() - 0.375) / (columns.shape[-1] + 0.25))
    return scores.T.reshape(draws.shape)


def _rhat(draws: Tensor) -> Tensor:
    length = draws.shape[1]
    between, within = length * draws.mean(1).var(0), draws.var(1).mean(0)
    return ((between / within + length - 1) / length).sqrt()


def _ess(draws: Tensor) -> Tensor:
    """From Geyer's initial monotone sequence of sums of autocorrelations in pairs."""
    chains, length = draws.shape[:2]
    covariance = _autocovariance(draws)
    within = covariance[:, 0].mean(0) * length / (length - 1)
    total = within * (length - 1) / length
    if chains > 1:
        total = total + draws.mean(1).var(0)
    correlation = 1 - (within - covariance.mean(0)) / total
    correlation[0] = 1.0
    number = (length - 1) // 2  # of the pairs that are looked at
    pairs = correlation[0 : 2 * number : 2] + correlation[1 : 2 * number : 2]
    positive = (pairs[1:] >= 0).long().cumprod(0)
    kept = torch.cat([torch.ones_like(positive[:1]), positive])
    last = kept.sum(0).clamp(max=number - 1)  # the first pair that does not count, of which the even term may
    counted = torch.arange(number).reshape(-1, *[1] * last.dim()) < last
    even = correlation[0 : 2 * number : 2].gather(0, last.unsqueeze(0)).squeeze(0)
    tau = -1 + 2 * (pairs.cummin(0).values * counted).sum(0) + even.clamp(min=0.0)
    count = chains * length
    ess = count / tau.clamp(min=1 / math.log10(count))
    constant = draws.amax((0, 1)) - draws.amin((0, 1)) < 1e-15
    return torch.where(constant, float(count), ess)


def _autocovariance(draws: Tensor) -> Tensor:
    length = draws.shape[1]
    centred = draws - draws.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * length, dim=1)
    return torch.fft.irfft(spectrum.abs().square(), n=2 * length, dim=1)[:, :length] / length
