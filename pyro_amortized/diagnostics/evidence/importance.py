"""Pareto-smoothed importance sampling, batched.

The largest weights of every column are replaced by the expected order statistics of a generalized Pareto distribution
fitted to them; the fitted shape `khat` says whether importance sampling can be trusted at all. Three steps: take the
tail, fit it, replace it.
"""

__all__ = ["fit_generalized_pareto", "psis", "systematic"]

import math

import torch

MIN_TAIL_LENGTH = 5
# Largest (columns x prior points x tail) intermediate of the fit, in elements: 32 MiB in float64.
MAX_GRID_ELEMENTS = 2**22


def psis(log_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Smooths the largest of each column's importance weights and estimates the shape of their tail.

    With :math:`S` samples the tail is the :math:`M = \lceil \min(S / 5, 3 \sqrt{S}) \rceil` largest weights, less any
    that tie with the cutoff :math:`u`, the largest weight below them. Their excesses over :math:`u` are fitted by a
    generalized Pareto distribution with quantile function

    .. math:: F^{-1}(p) = \sigma \, \frac{(1 - p)^{-k} - 1}{k},

    and the :math:`j`-th smallest weight of the tail is replaced by :math:`u + F^{-1}((j - 1/2) / M)`, capped at the
    largest raw weight. The shape used and returned is drawn towards one half, :math:`\hat k = (M k + 5) / (M + 10)`.
    Weights have finite moments of order below :math:`1 / k`; compare :math:`\hat k` with :func:`reliability_threshold`.

    The smoothed log-weights are not normalised, so that their log-mean-exp still estimates the log-evidence. Entries
    outside the tail are returned bit for bit. Computations run in float64, without gradients.

    Some columns are returned unsmoothed:

    - :math:`\hat k = \infty`, "unreliable": fewer than 5 weights in the tail (always so for 20 samples or fewer), or a
      tail too wide for the fit to stay finite.
    - :math:`\hat k = -\infty`, "no tail": the tail's log-weights spread no further than floats resolve, that is
      :math:`\max(\sqrt{\epsilon}, 16 \epsilon |\max \log w|)` with :math:`\epsilon` the machine epsilon of the dtype
      given. A fit would see only rounding there: of equal weights it returns anything from below :math:`-5` to
      :math:`\infty`, and shrinks them. Why :math:`\sqrt{\epsilon}`: a log-weight is the difference of larger
      log-densities, whose rounding cannot be read off it, and weights this close cannot move an estimate. The value
      says nothing of how many weights are zero.

    Args:
        log_weights: Log importance ratios, shape `(num_samples, *batch)`; `-inf` marks a weight of zero.

    Returns:
        The smoothed log-weights, shape `(num_samples, *batch)`, and `khat`, shape `batch`, both of the input's dtype.

    Raises:
        ValueError: If `log_weights` is empty, a scalar or not of floating dtype, or if a column has a NaN, a `+inf` or
            no finite entry.

    Example:
        >>> log_weights = torch.linspace(-1.0, 0.0, 100, dtype=torch.float64)
        >>> smoothed, khat = psis(log_weights)
        >>> print(f"{khat:.3f}")
        -0.360
        >>> torch.equal(smoothed[:80], log_weights[:80])
        True

    References:
        Pareto Smoothed Importance Sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, 2024,
        https://jmlr.org/papers/v25/19-556.html

        A New and Efficient Estimation Method for the Generalized Pareto Distribution, Jin Zhang, Michael A. Stephens,
        2009, https://doi.org/10.1198/tech.2009.08017
    """
    with torch.no_grad():
        _check_log_weights(log_weights)
        num_samples, *batch = log_weights.shape
        columns = log_weights.reshape(num_samples, -1)
        length = _tail_length(num_samples)
        if length < MIN_TAIL_LENGTH:
            return log_weights.clone(), log_weights.new_full(batch, math.inf)
        # The last is the cutoff. Only the tail is needed in order, so the columns are never sorted.
        largest, index = columns.T.contiguous().topk(length + 1, dim=-1)
        chunk = max(1, MAX_GRID_ELEMENTS // (_num_prior_points(length) * length))
        parts = [_smooth_tail(part) for part in torch.split(largest, chunk)]
        tail = torch.cat([part[0] for part in parts])
        khat = torch.cat([part[1] for part in parts])
        smoothed = columns.clone().scatter_(0, index[:, :-1].T, tail.T)
        return smoothed.reshape(log_weights.shape), khat.reshape(batch)


def reliability_threshold(num_samples: int) -> float:
    r"""Largest tail shape at which importance sampling can be trusted, :math:`\min(1 - 1 / \log_{10} S, 0.7)`.

    Args:
        num_samples: Number of samples :math:`S`.

    Returns:
        The threshold for `khat`; minus infinity for a single sample, whose `khat` is infinite.

    Raises:
        ValueError: If `num_samples` is below one.

    Example:
        >>> reliability_threshold(100)
        0.5

    References:
        Pareto Smoothed Importance Sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry, 2024,
        https://jmlr.org/papers/v25/19-556.html
    """
    if num_samples < 1:
        raise ValueError(f"Cannot give a reliability threshold because num_samples is {num_samples}; try at least 1.")
    return -math.inf if num_samples == 1 else min(1.0 - 1.0 / math.log10(num_samples), 0.7)


def _check_log_weights(log_weights: torch.Tensor) -> None:
    if not isinstance(log_weights, torch.Tensor):
        raise ValueError(
            f"Cannot smooth a {type(log_weights).__name__} because a tensor is wanted; try "
            "torch.as_tensor(log_weights)."
        )
    if log_weights.dim() == 0 or log_weights.numel() == 0:
        raise ValueError(
            f"Cannot smooth log_weights of shape {tuple(log_weights.shape)} because it holds no samples; "
            "try shape (num_samples, *batch) with num_samples first."
        )
    if not log_weights.is_floating_point():
        raise ValueError(
            f"Cannot smooth log_weights of dtype {log_weights.dtype} because logarithms need a floating dtype; "
            "try log_weights.double()."
        )
    # The maximum shows all three faults at once: NaN propagates, +inf wins, -inf is left only where nothing is finite.
    bad = ~log_weights.amax(dim=0).isfinite()
    if bad.any():
        raise ValueError(
            f"Cannot smooth {_column_names(bad)} because a column holds NaN, +inf or only -inf; "
            "try to find the log-density that is not finite there, or leave these columns out."
        )


def _column_names(bad: torch.Tensor, shown: int = 5) -> str:
    """Names the columns marked in `bad`, shape `batch`, as a user would index them."""
    positions = bad.nonzero().tolist()
    names = ["log_weights[" + ", ".join([":", *map(str, position)]) + "]" for position in positions[:shown]]
    return ", ".join(names) + (f" and {len(positions) - shown} more" if len(positions) > shown else "")


def _tail_length(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5.0, 3.0 * math.sqrt(num_samples)))


def _num_prior_points(length: int) -> int:
    return 30 + math.isqrt(length)


def _smooth_tail(largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooths the tails of some columns.

    Args:
        largest: Each column's largest log-weights in descending order, the cutoff last, shape `(columns, length + 1)`.

    Returns:
        The tails, shape `(columns, length)`, and `khat`, shape `(columns,)`, both of the input's dtype.
    """
    top = largest.double()
    peak = top[:, :1]
    # The fit would underflow on a cutoff of weight zero, so the cutoff is kept at the smallest normal float64.
    cutoff = (top[:, -1:] - peak).clamp(min=math.log(torch.finfo(torch.float64).tiny))
    tail = top[:, :-1] - peak
    in_tail = tail > cutoff
    length = in_tail.sum(dim=-1, keepdim=True)
    # In units of the cutoff's weight: the shape stays the same, and expm1 keeps digits that close weights would lose.
    excess = torch.where(in_tail, torch.expm1(tail - cutoff), 0.0)
    khat, sigma = fit_generalized_pareto(excess, length)

    flat = _tail_spread(tail, cutoff, length) <= _resolution(peak, largest.dtype)
    fitted = ~flat & (length >= MIN_TAIL_LENGTH) & khat.isfinite()
    khat = torch.where(fitted, khat, torch.where(flat, -math.inf, math.inf))
    smoothed = cutoff + torch.log1p(_expected_order_statistics(khat, sigma, length, tail.shape[-1]))
    tail = torch.where(fitted & in_tail, peak + smoothed.clamp(max=0.0), top[:, :-1])
    return tail.to(largest.dtype), khat.squeeze(-1).to(largest.dtype)


def _tail_spread(tail: torch.Tensor, cutoff: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Distance in log-weight from the peak, at 0, to the smallest of the tail, or to the cutoff of too short a tail."""
    smallest = tail.gather(-1, (length - 1).clamp(min=0))
    return -torch.where(length >= MIN_TAIL_LENGTH, smallest, cutoff)


def _resolution(peak: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spread of log-weights about `peak` up to which rounding in `dtype` may have made all of it."""
    eps = torch.finfo(dtype).eps
    return (16.0 * eps * peak.abs()).clamp(min=math.sqrt(eps))


def fit_generalized_pareto(excess: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Fits generalized Pareto distributions by the empirical Bayes estimate of Zhang and Stephens.

    For given :math:`b = -k / \sigma` the likelihood is maximal at :math:`k(b) = \frac1M \sum_j \log(1 - b x_j)`, so
    :math:`b` alone is averaged, over a grid and under its profile likelihood.

    Args:
        excess: Excesses in descending order, zero beyond a column's length, shape `(columns, max_length)`.
        length: Number :math:`M` of excesses in each column, shape `(columns, 1)`.

    Returns:
        The shape, drawn towards one half, and the scale, both of shape `(columns, 1)`.
    """
    b = _prior_points(excess, length)
    k, sigma = _profile(b, excess, length)
    log_likelihood = length * (-sigma.log() - k - 1.0)
    weights = torch.softmax(log_likelihood.masked_fill(b.isnan(), -math.inf), dim=-1)
    weights = weights * (weights >= 10.0 * torch.finfo(weights.dtype).eps)
    # A point of no weight may be infinite or missing, and must not reach the sum as 0 * inf.
    b_mean = torch.where(weights > 0.0, weights * b, 0.0).sum(dim=-1, keepdim=True)
    b_mean = b_mean / weights.sum(dim=-1, keepdim=True)
    k, sigma = _profile(b_mean, excess, length)
    return (length * k + 5.0) / (length + 10.0), sigma


def _prior_points(excess: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Grid of `b`, shape `(columns, points)`; columns of shorter tails have fewer points and end in NaN."""
    num_points = 30 + length.double().sqrt().floor()
    point = torch.arange(1, _num_prior_points(excess.shape[-1]) + 1, dtype=excess.dtype, device=excess.device)
    # The excesses descend: of M of them the j-th smallest is at M - j.
    quartile = excess.gather(-1, length - (length / 4 + 0.5).long())
    grid = (1.0 - (num_points / (point - 0.5)).sqrt()) / (3.0 * quartile) + 1.0 / excess[:, :1]
    return torch.where(point <= num_points, grid, math.nan)


def _profile(b: torch.Tensor, excess: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape and scale that maximise the likelihood given `b`, both of the shape of `b`, `(columns, points)`."""
    k = (-b.unsqueeze(-1) * excess.unsqueeze(-2)).log1p_().sum(dim=-1) / length
    # b = 0 is the exponential distribution; heavily tied tails can put a grid point there.
    sigma = torch.where(b == 0.0, excess.sum(dim=-1, keepdim=True) / length, -k / b)
    return k, sigma


def _expected_order_statistics(
    k: torch.Tensor, sigma: torch.Tensor, length: torch.Tensor, max_length: int
) -> torch.Tensor:
    """Quantiles at `(j - 1/2) / M` in descending order, shape `(columns, max_length)`; meaningless beyond `length`."""
    rank = torch.arange(max_length, dtype=sigma.dtype, device=sigma.device)
    # log(1 - p), with p counted down from the largest.
    log_survival = torch.log1p(-((length - rank - 0.5) / length))
    exponential = k.abs() < torch.finfo(k.dtype).eps
    return sigma * torch.where(exponential, -log_survival, torch.expm1(-k * log_survival) / k)


def systematic(weights: torch.Tensor, rng: torch.Generator, number: int | None = None) -> torch.Tensor:
    """`number` positions, `(S, N)`, K by default, in proportion to weights `(K, N)`, evenly spaced, in random order."""
    number = len(weights) if number is None else number
    shape = (weights.shape[1], 1)
    positions = (torch.arange(number) + torch.rand(shape, generator=rng, dtype=torch.float64)) / number
    cumulative = weights.T.cpu().double().cumsum(-1)
    chosen = torch.searchsorted(cumulative / cumulative[:, -1:], positions).clamp(max=len(weights) - 1)
    order = torch.rand(chosen.shape, generator=rng).argsort(-1)
    return chosen.gather(-1, order).T.to(weights.device)
