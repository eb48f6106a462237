import inspect
import math
import time
import warnings
from collections.abc import Callable

import pytest
import torch

from pyro_amortized.diagnostics.evidence import importance
from pyro_amortized.diagnostics.evidence.importance import psis, reliability_threshold

INF = math.inf
NAN = math.nan

Shape = tuple[int, ...]
Oracle = Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor] | None]


def normal(shape: Shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(shape: Shape, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Each makes log-weights of a shape; the names say what their largest weights do.
TAILS: dict[str, Callable[[Shape], torch.Tensor]] = {
    "lognormal": normal,
    "lognormal far from zero": lambda shape: normal(shape) - 1000.0,
    "lognormal, nearly equal weights": lambda shape: 1e-3 * normal(shape),
    "half-Cauchy": lambda shape: torch.tan(0.5 * math.pi * uniform(shape)).log(),
    "Pareto with k = 3": lambda shape: -3.0 * uniform(shape).log(),
    "wider than float64": lambda shape: 300.0 * normal(shape),
    "bounded": lambda shape: uniform(shape).log(),
    "bounded with a point mass": lambda shape: normal(shape).clamp(max=2.4),
    "ties": lambda shape: (20.0 * normal(shape)).round() / 10.0,
    "half zero": lambda shape: normal(shape).where(uniform(shape, seed=1) < 0.5, -INF),
    "fewer than the tail above zero": lambda shape: normal(shape).where(uniform(shape, seed=1) < 0.06, -INF),
}


@pytest.fixture(scope="module")
def arviz_psislw() -> Oracle:
    """`arviz.psislw` with samples along the first axis, as here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("this arviz has no psislw")

    has_option = "normalize" in inspect.signature(arviz.psislw).parameters

    def oracle(log_weights: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not normalize and not has_option:
            return None  # of an older version, which always does
        options = {"normalize": normalize} if has_option else {}
        # A column without a tail, or one that overflows, makes NumPy warn.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smoothed, khat = arviz.psislw(log_weights.movedim(0, -1).contiguous().numpy(), **options)
        return torch.as_tensor(smoothed).movedim(-1, 0), torch.as_tensor(khat, dtype=torch.float64)

    return oracle


def assert_equal_to_arviz(log_weights: torch.Tensor, oracle: Oracle) -> None:
    """Compares the columns but those declared without a tail, where the difference is meant."""
    smoothed, khat = psis(log_weights)
    compared = ~khat.isneginf()
    assert compared.double().mean() > 0.7
    normalised = smoothed - smoothed.logsumexp(dim=0)
    for ours, normalize in ((normalised, True), (smoothed, False)):
        known = oracle(log_weights, normalize)
        if known is None:
            continue
        theirs, their_khat = known
        # Sorted, for which of two equal weights gets the larger of two smoothed values is arbitrary.
        ours, theirs = ours.sort(dim=0).values[:, compared], theirs.sort(dim=0).values[:, compared]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(khat[compared], their_khat[compared], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num_samples", [25, 100, 1000, 5000])
def test_equals_arviz(num_samples: int, tail: str, arviz_psislw: Oracle) -> None:
    log_weights = TAILS[tail]((num_samples, 16))
    assert_equal_to_arviz(log_weights[:, log_weights.isfinite().any(dim=0)], arviz_psislw)


# Around the first sample size with 5 in the tail, and where the tail's length turns from S / 5 to 3 sqrt(S).
@pytest.mark.parametrize("num_samples", [2, 5, 20, 21, 26, 224, 225, 226, 400, 1111])
def test_equals_arviz_at_every_tail_length(num_samples: int, arviz_psislw: Oracle) -> None:
    assert_equal_to_arviz(normal((num_samples, 16)), arviz_psislw)


@pytest.mark.parametrize("batch", [(), (3,), (2, 4)])
def test_batch_shapes(batch: Shape, arviz_psislw: Oracle) -> None:
    log_weights = normal((200, *batch))
    smoothed, khat = psis(log_weights)
    assert smoothed.shape == log_weights.shape
    assert khat.shape == batch
    assert_equal_to_arviz(log_weights, arviz_psislw)


def test_columns_do_not_depend_on_each_other_or_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    log_weights = torch.cat([TAILS[tail]((500, 2)) for tail in TAILS], dim=-1)
    smoothed, khat = psis(log_weights)
    alone = [psis(column) for column in log_weights.unbind(dim=-1)]
    # Sums over the tail may be grouped differently, hence not bit for bit.
    torch.testing.assert_close(smoothed, torch.stack([part[0] for part in alone], dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(khat, torch.stack([part[1] for part in alone]), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(importance, "MAX_GRID_ELEMENTS", 1)
    torch.testing.assert_close(psis(log_weights), (smoothed, khat), rtol=1e-12, atol=1e-12)


def generalized_pareto_log_weights(k: float, shape: Shape) -> torch.Tensor:
    """Weights `1 + x` with `x` exactly generalized Pareto: their excesses over any cutoff have shape `k` too."""
    log_survival = torch.log1p(-uniform(shape))
    return torch.log1p(-log_survival if k == 0.0 else torch.expm1(-k * log_survival) / k)


@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 0.5, 0.7, 1.0])
def test_khat_recovers_the_shape_of_generalized_pareto_weights(k: float) -> None:
    num_replicates = 100
    _, khat = psis(generalized_pareto_log_weights(k, (10_000, num_replicates)))
    # The tail is 300 long; undo the pull of khat towards one half.
    estimate = (khat * 310.0 - 5.0) / 300.0
    standard_error = estimate.std().item() / math.sqrt(num_replicates)
    error = estimate.mean().item() - k
    assert abs(error) < 4.0 * standard_error
    # A shape off by a tenth is told apart.
    assert abs(error - 0.1) > 4.0 * standard_error
    assert abs(error + 0.1) > 4.0 * standard_error


def test_khat_tells_reliable_from_unreliable_weights() -> None:
    threshold = reliability_threshold(4000)
    _, light = psis(generalized_pareto_log_weights(0.2, (4000, 20)))
    _, heavy = psis(generalized_pareto_log_weights(1.2, (4000, 20)))
    assert (light < threshold).all()
    assert (heavy > threshold).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("level", [0.0, 3.0, -1e4])
@pytest.mark.parametrize("ulps", [0.0, 0.5, 2.0])
def test_weights_constant_up_to_rounding_have_no_tail(ulps: float, level: float, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps * max(1.0, abs(level))
    log_weights = (level + ulps * unit * normal((1000, 5))).to(dtype)
    smoothed, khat = psis(log_weights)
    assert khat.isneginf().all()
    assert torch.equal(smoothed, log_weights)


def test_rounding_of_larger_log_densities_is_no_tail() -> None:
    log_q = -100.0 * uniform((50, 1000, 5))
    # The exact posterior of 50 observations: equal weights but for the rounding of sums larger than they are.
    log_weights = (log_q + 0.1).sum(dim=0) - log_q.sum(dim=0)
    assert log_weights.max() - log_weights.min() > 100.0 * torch.finfo(torch.float64).eps
    assert psis(log_weights)[1].isneginf().all()


@pytest.mark.parametrize("level", [0.0, -1e4])
def test_small_spread_above_rounding_has_a_tail(level: float) -> None:
    noise = normal((1000, 5))
    _, khat = psis(level + 1e-6 * noise)
    # Weights 1 + 1e-6 z have the tail of z: a normal's, slightly below exponential.
    assert khat.isfinite().all()
    assert (khat.abs() < 0.5).all()


def test_equal_weights_in_the_tail_are_left_alone() -> None:
    equal = torch.full((1300, 3), -INF, dtype=torch.float64)
    equal[:200, 0] = equal[:100, 1] = equal[:5, 2] = 0.0
    smoothed, khat = psis(equal)
    assert khat.isneginf().all()
    assert torch.equal(smoothed, equal)


def test_mostly_tied_tail_is_fitted_where_a_prior_point_is_zero() -> None:
    # The tail of 109 has 40 prior points, of which the third is zero where the lower quartile equals the maximum.
    log_weights = torch.full((1300,), -math.log(2.0), dtype=torch.float64)
    log_weights[:99] = 0.0
    log_weights[99:109] = torch.linspace(-0.6, -0.1, 10, dtype=torch.float64)
    smoothed, khat = psis(log_weights)
    assert khat < 0.0
    assert not smoothed.isnan().any()


@pytest.mark.parametrize("num_samples", [1, 4, 20])
def test_few_samples_cannot_be_judged(num_samples: int) -> None:
    log_weights = normal((num_samples, 3))
    smoothed, khat = psis(log_weights)
    assert khat.isposinf().all()
    assert torch.equal(smoothed, log_weights)


@pytest.mark.parametrize("num_dominant", [1, 4])
@pytest.mark.parametrize("rest", [-5.0, -INF])
def test_few_dominant_weights_are_unreliable(rest: float, num_dominant: int) -> None:
    log_weights = torch.full((1000,), rest, dtype=torch.float64)
    log_weights[:num_dominant] = 0.0
    smoothed, khat = psis(log_weights)
    assert khat == INF
    assert torch.equal(smoothed, log_weights)


@pytest.mark.parametrize("tail", TAILS)
def test_only_the_tail_is_replaced(tail: str) -> None:
    num_samples, length = 1000, 95
    log_weights = TAILS[tail]((num_samples, 8))
    smoothed, _ = psis(log_weights)
    cutoff = log_weights.sort(dim=0, descending=True).values[length]
    bulk = log_weights <= cutoff
    assert torch.equal(smoothed[bulk], log_weights[bulk])
    assert (~bulk).sum(dim=0).max() <= length
    assert not smoothed.isnan().any()
    assert (smoothed <= log_weights.amax(dim=0)).all()
    assert (smoothed > cutoff)[~bulk].all()
    assert (smoothed != log_weights)[~bulk].any()


def test_shift_of_log_weights_shifts_the_result() -> None:
    log_weights = normal((1000, 8))
    smoothed, khat = psis(log_weights)
    shifted, shifted_khat = psis(log_weights - 700.0)
    torch.testing.assert_close(shifted + 700.0, smoothed, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(shifted_khat, khat, rtol=0.0, atol=1e-9)


def shift_of_log_mean_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """How far smoothing moves the estimate of the evidence, in the standard errors of the raw one."""
    smoothed, _ = psis(log_weights)
    weights = log_weights.exp()
    standard_error = weights.std(dim=0) / weights.mean(dim=0) / math.sqrt(len(weights))
    return (smoothed.logsumexp(dim=0) - log_weights.logsumexp(dim=0)).abs() / standard_error


def test_smoothing_keeps_the_log_mean_exp_of_light_tails() -> None:
    assert shift_of_log_mean_exp(0.3 * normal((5000, 50))).max() < 0.1
    # Heavy tails are what it is there to change.
    assert shift_of_log_mean_exp(3.0 * normal((5000, 50))).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    log_weights = normal((1000, 4)).to(dtype)
    smoothed, khat = psis(log_weights)
    assert smoothed.dtype == khat.dtype == dtype
    expected, expected_khat = psis(log_weights.double())
    rounding = torch.finfo(dtype).eps
    # Sorted, for coarse dtypes have ties.
    smoothed, expected = smoothed.sort(dim=0).values.double(), expected.sort(dim=0).values
    torch.testing.assert_close(smoothed, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(khat.double(), expected_khat, rtol=rounding, atol=rounding)


def test_input_is_untouched_and_no_gradient_is_recorded() -> None:
    log_weights = normal((1000, 4)).requires_grad_()
    before = log_weights.detach().clone()
    smoothed, khat = psis(log_weights)
    assert torch.equal(log_weights.detach(), before)
    assert not smoothed.requires_grad
    assert not khat.requires_grad
    few = normal((10,)).requires_grad_()
    result, _ = psis(few)
    assert not result.requires_grad
    assert result.data_ptr() != few.data_ptr()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (10, 0)])
def test_empty_log_weights_are_refused(shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"Cannot smooth log_weights of shape .* because it holds no samples"):
        psis(torch.zeros(shape))


def test_integer_log_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.int64 because logarithms need a floating dtype"):
        psis(torch.zeros(10, 2, dtype=torch.int64))


@pytest.mark.parametrize("num_samples", [4, 100])
@pytest.mark.parametrize("entry", [NAN, INF])
def test_columns_with_a_nonfinite_weight_are_named(entry: float, num_samples: int) -> None:
    log_weights = normal((num_samples, 2, 4))
    log_weights[2, 0, 3] = log_weights[0, 1, 1] = entry
    with pytest.raises(ValueError, match=r"log_weights\[:, 0, 3\], log_weights\[:, 1, 1\] because .* NaN, \+inf"):
        psis(log_weights)


def test_columns_of_zero_weights_are_named() -> None:
    log_weights = normal((100, 8))
    log_weights[:, 1:] = -INF
    with pytest.raises(ValueError, match=r"smooth log_weights\[:, 1\], .*\[:, 5\] and 2 more because .* only -inf"):
        psis(log_weights)
    with pytest.raises(ValueError, match=r"smooth log_weights\[:\] because .* only -inf"):
        psis(log_weights[:, 1])


@pytest.mark.parametrize(
    ("num_samples", "threshold"), [(1, -INF), (10, 0.0), (100, 0.5), (1000, 2.0 / 3.0), (2200, 0.7), (10**6, 0.7)]
)
def test_reliability_threshold(num_samples: int, threshold: float) -> None:
    assert reliability_threshold(num_samples) == pytest.approx(threshold)


def test_reliability_threshold_needs_samples() -> None:
    with pytest.raises(ValueError, match="Cannot give a reliability threshold because num_samples is 0"):
        reliability_threshold(0)


@pytest.mark.benchmark
def test_speed() -> None:
    log_weights = 2.0 * normal((10_000, 1000))
    psis(log_weights[:, :10])
    start = time.perf_counter()
    psis(log_weights)
    assert time.perf_counter() - start < 1.5


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    log_weights = torch.cat([TAILS[tail]((1000, 4)) for tail in TAILS], dim=-1)
    smoothed, khat = psis(log_weights)
    on_device, khat_on_device = psis(log_weights.cuda())
    assert on_device.is_cuda
    on_device, smoothed = on_device.cpu().sort(dim=0).values, smoothed.sort(dim=0).values
    torch.testing.assert_close(on_device, smoothed, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(khat_on_device.cpu(), khat, rtol=1e-10, atol=1e-10)
