r"""Whether numbers that should be uniform are: exact tests, and simultaneous bands for their distribution function.

Of S independent :math:`u_s`, uniform on (0, 1) if all is well, the counts :math:`C_i = \#\{u_s < t_i\}` at points
:math:`t_1 < \dots < t_K` are a Markov chain with binomial steps. Running that chain between two bounds gives the
probability that the empirical distribution function stays within a band at all points at once, without simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["UniformityTest", "holm", "simultaneous_band", "uniformity_test"]

Array = np.ndarray[Any, np.dtype[Any]]

_SMALLEST = 1e-13
"""Probabilities below this are not told apart."""


@dataclass(frozen=True)
class UniformityTest:
    """What :func:`uniformity_test` finds for each of Q quantities, all of shape ``(Q,)``.

    Attributes:
        shift: Mean of the normal scores, 0 if all is well.
        spread: Standard deviation of the normal scores around their mean, 1 if all is well.
        p_shift: p-value of the mean.
        p_spread: p-value of the standard deviation, two-sided.
        p_ecdf: p-value of the largest deviation of the empirical distribution function.
        p_value: Of the three together, by Bonferroni.
    """

    shift: Array
    spread: Array
    p_shift: Array
    p_spread: Array
    p_ecdf: Array
    p_value: Array


def uniformity_test(values: Array, points: Array) -> UniformityTest:
    r"""Tests numbers in (0, 1) for uniformity, in three ways that are each exact.

    The normal scores :math:`w_s = \Phi^{-1}(u_s)` are standard normal: :math:`\sqrt S \bar w` is so too, and
    :math:`\sum_s (w_s - \bar w)^2` is :math:`\chi^2_{S-1}`. These two see a shift and a wrong width long before any
    test of the whole distribution does; the third sees everything else: the least local p-value of a count :math:`C_i`
    over all points, with its exact distribution.

    Args:
        values: Numbers of shape ``(S, Q)``.
        points: Where to compare the distribution functions, ascending in (0, 1), ``(K,)``.

    Returns:
        The tests.
    """
    from scipy import special, stats

    count = len(values)
    scores = special.ndtri(np.clip(values, _SMALLEST, 1 - _SMALLEST))
    shift, spread = scores.mean(0), scores.std(0, ddof=1)
    squares = (count - 1) * np.square(spread)
    p_shift = 2 * stats.norm.sf(np.sqrt(count) * np.abs(shift))
    p_spread = 2 * np.minimum(stats.chi2.cdf(squares, count - 1), stats.chi2.sf(squares, count - 1))
    p_ecdf = _ecdf_p_values(values, points)
    p_value = np.minimum(1.0, 3 * np.minimum(np.minimum(p_shift, p_spread), p_ecdf))
    return UniformityTest(shift, spread, p_shift, np.minimum(1.0, p_spread), p_ecdf, p_value)


def holm(p_values: Array) -> Array:
    """p-values adjusted for their number: that any true hypothesis falls below alpha has probability at most alpha.

    References:
        A Simple Sequentially Rejective Multiple Test Procedure, Sture Holm (1979), https://www.jstor.org/stable/4615733
    """
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return adjusted


def simultaneous_band(count: int, points: Array, alpha: float) -> tuple[Array, Array]:
    """Bounds that the empirical distribution function of uniform numbers leaves anywhere with probability alpha.

    All points have the same local level, so that the band is as wide as binomial quantiles are at each.

    Args:
        count: S, how many numbers.
        points: Where the function is evaluated, ascending in (0, 1), ``(K,)``.
        alpha: Probability of leaving, at most.

    Returns:
        Lower and upper bounds of the function, ``(K,)`` each.

    References:
        Graphical Test for Discrete Uniformity and its Applications in Goodness-of-Fit Evaluation and Multiple Sample
        Comparison, Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari (2022), https://arxiv.org/abs/2103.10522
    """
    local = _local_levels(count, tuple(points))
    candidates = alpha * np.geomspace(1 / len(points), 1.0, 100)
    leaves = 1 - _stays(count, tuple(points), candidates)
    level = candidates[leaves <= alpha].max()
    inside = local > level
    lower = inside.argmax(1)
    upper = count - inside[:, ::-1].argmax(1)
    return lower / count, upper / count


def _ecdf_p_values(values: Array, points: Array) -> Array:
    """Probabilities that uniform numbers deviate as much, anywhere, as the given ones do; ``(Q,)``."""
    count, ordered = len(values), np.sort(values, 0)
    counts = np.stack([np.searchsorted(column, points) for column in ordered.T])
    least = _local_levels(count, tuple(points))[np.arange(len(points)), counts].min(1)
    levels, inverse = np.unique(np.maximum(least, _SMALLEST), return_inverse=True)
    return np.clip(1 - _stays(count, tuple(points), levels), _SMALLEST, 1.0)[inverse]


@lru_cache(maxsize=8)
def _local_levels(count: int, points: tuple[float, ...]) -> Array:
    """Two-sided p-value of every possible count at every point, ``(K, S + 1)``."""
    from scipy import stats

    counts = np.arange(count + 1)
    at = np.asarray(points)[:, None]
    below, above = stats.binom.cdf(counts, count, at), stats.binom.sf(counts - 1, count, at)
    return np.minimum(1.0, 2 * np.minimum(below, above))


def _stays(count: int, points: tuple[float, ...], levels: Array) -> Array:
    """Probabilities that counts of uniform numbers have local p-values above each level at all points, ``(G,)``."""
    local = _local_levels(count, points)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, count + 1)))])
    before, states = np.ones((len(levels), 1)), np.array([0])
    previous = 0.0
    for point, level in zip(points, local, strict=True):
        reached = np.flatnonzero(level > levels.min())
        steps = _binomial_steps(
            count - states, reached - states[:, None], (point - previous) / (1 - previous), log_factorial
        )
        before = (before @ steps) * (level[reached] > levels[:, None])
        states, previous = reached, point
    return before.sum(1)


def _binomial_steps(trials: Array, successes: Array, probability: float, log_factorial: Array) -> Array:
    """Probabilities of ``successes`` ``(A, B)`` in ``trials`` ``(A,)``."""
    possible = (successes >= 0) & (successes <= trials[:, None])
    k = np.where(possible, successes, 0)
    rest = trials[:, None] - k
    log_choose = log_factorial[trials][:, None] - log_factorial[k] - log_factorial[rest]
    log_probability = log_choose + k * np.log(probability) + rest * np.log1p(-probability)
    return np.where(possible, np.exp(log_probability), 0.0)
