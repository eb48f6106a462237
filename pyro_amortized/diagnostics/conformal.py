"""Conformal inference: p-values and intervals that hold for any score, if the data are exchangeable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_amortized.diagnostics.evidence.importance import fit_generalized_pareto

__all__ = [
    "conformal_p_values",
    "conformal_quantile",
    "count_p_value",
    "discoveries",
    "extrapolated_p_values",
    "shift_p_value",
    "split",
]

_TAIL, _LEAST_TAIL = 0.2, 10
"""Share of scores that tell how their tail goes on, and how many at least."""


def split(number: int, seed: torch.Generator, *shares: float) -> list[Tensor]:
    """Cuts the numbers below ``number``, in random order, into parts of given shares and a last one with the rest."""
    order = torch.randperm(number, generator=seed)
    counts = [round(share * number) for share in shares]
    return list(order.split([*counts, number - sum(counts)]))


def conformal_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    r""":math:`p_n = (1 + \#\{i : c_i \ge s_n\}) / (M + 1)`, for scores ``(N,)`` that are high where data are odd.

    If a datapoint is exchangeable with the M calibration ones, :math:`P(p_n \le \alpha) \le \alpha` for every
    :math:`\alpha`. A score that is not a number counts as the oddest.

    Args:
        scores: Of new datapoints, ``(N,)``.
        calibration: Of calibration datapoints, ``(M,)``.

    References:
        Algorithmic Learning in a Random World, Vladimir Vovk, Alexander Gammerman, Glenn Shafer (2005).
    """
    found = calibration.nan_to_num(nan=math.inf).sort().values
    below = torch.searchsorted(found, scores.nan_to_num(nan=math.inf).contiguous())
    return (1.0 + len(found) - below).double() / (len(found) + 1)


def extrapolated_p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """The same, but beyond the largest calibration score smaller, as far as the tail of these tells.

    A generalised Pareto distribution is fitted to the largest fifth, and its shape taken 1.5 standard errors larger:
    with light tails and many calibration scores p-values fall fast, with heavy ones and few slowly. With conformal ones
    alone, few datapoints among many could not be told from chance, however far out they are.

    References:
        A New and Efficient Estimation Method for the Generalized Pareto Distribution, Jin Zhang, Michael A. Stephens
        (2009).
    """
    found = conformal_p_values(scores, calibration)
    known = calibration.nan_to_num(nan=math.inf).double().sort(descending=True).values
    number = max(_LEAST_TAIL, round(_TAIL * len(known)))
    if not math.isfinite(known[0]) or number >= len(known):
        return found
    excess = (known[:number] - known[number]).unsqueeze(0)
    beyond = (scores.nan_to_num(nan=math.inf).double() - known[number]).clamp(min=excess[0, 0])
    if excess[0, number // 2] == 0:  # of scores that are all the same
        return torch.where(beyond > excess[0, 0], 0.0, found)
    shape, scale = fit_generalized_pareto(excess, torch.tensor([[number]]))
    shape = (shape + 1.5 * (1 + shape.clamp(min=0.0)) / math.sqrt(number)).clamp(min=1e-3)
    log_survival = -torch.log1p(shape * torch.cat([excess[0, :1], beyond]) / scale)[0] / shape[0]
    return found * (log_survival[1:] - log_survival[0]).exp()


def count_p_value(count: int, number: int, num_calibration: int, level: float) -> float:
    r"""Probability that so many or more of N datapoints have conformal p-values of at most ``level``.

    If they are exchangeable with the M calibration ones, the number of them above the (m + 1)-th largest calibration
    score, :math:`m = \lfloor \alpha (M + 1) \rfloor - 1`, is beta-binomial with parameters m + 1 and M - m.

    Args:
        count: Number of datapoints with such p-values.
        number: N.
        num_calibration: M.
        level: :math:`\alpha`.
    """
    from scipy.stats import betabinom

    above = math.floor(level * (num_calibration + 1) * (1 + 1e-12)) - 1
    return float(betabinom.sf(count - 1, number, above + 1, num_calibration - above)) if above >= 0 else 1.0


def shift_p_value(data: Tensor, calibration: Tensor, rng: torch.Generator, num_permutations: int = 999) -> float:
    r"""Of a test whether features ``(N, F)`` and calibration ones ``(M, F)`` have the same mean, exact by permutations.

    The statistic is :math:`\sum_f (\bar a_f - \bar b_f)^2 / s_f^2`, with the deviations of all of them together. It is
    no smaller than one in ``num_permutations`` and one.

    References:
        Permutation, Parametric and Bootstrap Tests of Hypotheses, Phillip Good (2005).
    """
    pooled = torch.cat([data, calibration]).double()
    scale = pooled.std(0)
    scores = torch.where(scale > 0, (pooled - pooled.mean(0)) / scale, 0.0).nan_to_num()
    total, count = scores.sum(0), len(data)

    def statistic(rows: Tensor) -> Tensor:
        part = scores[rows].sum(0)
        return (part / count - (total - part) / len(calibration)).square().sum()

    observed = statistic(torch.arange(count)) * (1 - 1e-9)
    drawn = [statistic(torch.randperm(len(scores), generator=rng)[:count]) for _ in range(num_permutations)]
    return (1 + sum(bool(value >= observed) for value in drawn)) / (1 + num_permutations)


def conformal_quantile(scores: Tensor, level: float) -> float:
    """What the score of a further datapoint exceeds with probability at most ``1 - level``; infinite for too few."""
    rank = math.ceil(level * (len(scores) + 1))
    return math.inf if rank > len(scores) else float(scores.sort().values[rank - 1])


def discoveries(p_values: Tensor, level: float) -> Tensor:
    """Which of N p-values are found at a false discovery rate, which conformal ones allow.

    References:
        Controlling the False Discovery Rate: A Practical and Powerful Approach to Multiple Testing, Yoav Benjamini,
        Yosef Hochberg (1995). Testing for Outliers with Conformal p-values, Stephen Bates, Emmanuel Candès, Lihua Lei,
        Yaniv Romano, Matteo Sesia (2023), https://arxiv.org/abs/2104.08279
    """
    ordered = p_values.sort().values
    bound = level * torch.arange(1, len(p_values) + 1, dtype=p_values.dtype) / len(p_values)
    below = (ordered <= bound).nonzero()
    return p_values <= (ordered[below[-1, 0]] if len(below) else -1.0)
