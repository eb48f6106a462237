import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_amortized import DeepSetEncoder, MLPEncoder
from pyro_amortized.encoders.layers import Head
from pyro_amortized.encoders.standardize import StandardizedEncoder

Build = Callable[..., StandardizedEncoder]

ENCODERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "mlp": (lambda **options: MLPEncoder(6, (8, 5), **options), (6,)),
    "set": (lambda **options: DeepSetEncoder(6, (8, 7), (5,), **options), (4, 6)),
}
"""By name: an encoder of 6 features to 5, and the shape of a datapoint."""


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def data(name: str, size: int = 50) -> Tensor:
    shape = ENCODERS[name][1]
    return 3.0 + torch.randn(size, *shape) * torch.logspace(-0.5, 1.0, 6)


# Shapes


@pytest.mark.parametrize("shapes", [[(6,)], [(2, 3)], [(), (5,)], [(2, 2), (1,), ()]])
def test_mlp_flattens_its_inputs(shapes: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(7, *shape) for shape in shapes]
    encoder = MLPEncoder(6, (8, 5))
    assert encoder(*inputs).shape == (7, 5)
    assert torch.equal(encoder(*inputs), encoder(torch.cat([x.reshape(7, -1) for x in inputs], -1)))


def test_deep_set_takes_sets_of_any_size_and_scalar_elements() -> None:
    encoder = DeepSetEncoder(1, (8,), (5,))
    assert encoder(torch.randn(7, 3)).shape == encoder(torch.randn(7, 9)).shape == (7, 5)
    x = torch.randn(7, 3)
    assert torch.equal(encoder(x), encoder(x.unsqueeze(-1)))
    assert DeepSetEncoder(6)(torch.randn(7, 4, 2, 3)).shape == (7, 64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
@pytest.mark.parametrize("name", ENCODERS)
def test_inputs_of_other_types_are_converted(name: str, dtype: torch.dtype) -> None:
    build, shape = ENCODERS[name]
    encoder, x = build(), torch.randint(0, 2, (20, *shape))
    encoder.fit(x.to(dtype))
    features = encoder(x.to(dtype))
    assert features.dtype == torch.float32
    assert torch.equal(features, encoder(x.float()))


def test_mlp_joins_inputs_of_different_types() -> None:
    counts, values = torch.randint(0, 9, (5, 2)), torch.randn(5, 4)
    encoder = MLPEncoder(6, (5,))
    assert torch.equal(encoder(counts, values), encoder(counts.float(), values))


@pytest.mark.parametrize("name", ENCODERS)
def test_double_precision(name: str) -> None:
    encoder = ENCODERS[name][0]().double()
    x = data(name)
    encoder.fit(x)
    assert encoder(x).dtype == torch.float64
    assert encoder.standardize.fitted.dtype == torch.bool


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    encoder, x = ENCODERS[name][0](), data(name)
    encoder.fit(x)
    torch.testing.assert_close(encoder(x)[[3, 1]], encoder(x[[3, 1]]))


@pytest.mark.parametrize(
    ("encoder", "shape", "message"),
    [
        (
            MLPEncoder(6),
            (3, 5),
            r"Cannot encode inputs with 5 features because this MLPEncoder was built for 6; try input_dim=5",
        ),
        (DeepSetEncoder(6), (3, 4, 5), r"with 5 features because this DeepSetEncoder was built for 6"),
        (DeepSetEncoder(6), (3, 4), r"with 1 features because this DeepSetEncoder was built for 6"),
    ],
)
def test_width_errors(encoder: StandardizedEncoder, shape: tuple[int, ...], message: str) -> None:
    for call in (encoder, encoder.fit):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


# Standardisation


def standardized(encoder: StandardizedEncoder, x: Tensor) -> Tensor:
    return encoder.standardize(x).reshape(-1, x.shape[-1])


@pytest.mark.parametrize("name", ENCODERS)
def test_fit_gives_mean_zero_and_deviation_one(name: str) -> None:
    encoder, x = ENCODERS[name][0](), data(name)
    raw = standardized(encoder, x)
    assert torch.equal(raw, x.reshape(-1, 6))
    encoder.fit(x)
    features = standardized(encoder, x)
    torch.testing.assert_close(features.mean(0), torch.zeros(6), atol=1e-5, rtol=0.0)
    scale = features.std(0, correction=0)
    torch.testing.assert_close(scale[2:], torch.ones(4))
    # Of the deviations from 0.3 to 10, those below a tenth of their root mean square are scaled by that tenth.
    deviation = x.reshape(-1, 6).std(0, correction=0)
    floor = 0.1 * deviation.square().mean().sqrt()
    torch.testing.assert_close(scale, deviation / deviation.clamp(min=floor))
    assert deviation[0] < floor


def test_far_features_go_on_as_a_logarithm() -> None:
    """Two rows leave the deviation of other data open."""
    encoder = MLPEncoder(1, hidden_dims=())
    x = torch.tensor([[-1e6], [-6.0], [-5.0], [0.0], [4.0], [5.0], [105.0]])
    assert torch.equal(encoder(x), x)  # not fitted yet
    encoder.fit(torch.tensor([[-1.0], [1.0]]))
    expected = torch.tensor(
        [-5.0 - math.log(1e6 - 4.0), -5.0 - math.log(2.0), -5.0, 0.0, 4.0, 5.0, 5.0 + math.log(101.0)]
    )
    torch.testing.assert_close(encoder(x).squeeze(-1), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_that_hardly_vary_do_not_blow_up(name: str) -> None:
    encoder, x = ENCODERS[name][0](), data(name)
    x[..., 0] = 0.0
    encoder.fit(x)
    lit = x.clone()
    lit[..., 0] = x.std()
    assert standardized(encoder, lit).abs().max() < 30


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", ENCODERS)
def test_constant_data_are_only_shifted(name: str, rows: int) -> None:
    build, shape = ENCODERS[name]
    encoder = build()
    encoder.fit(torch.full((rows, *shape), 7.0))
    features = encoder.standardize(torch.full((rows, *shape), 7.5))
    assert torch.equal(features, torch.full((rows, *shape), 0.5))


@pytest.mark.parametrize("name", ENCODERS)
def test_fit_counts_once(name: str) -> None:
    encoder, x = ENCODERS[name][0](), data(name)
    encoder.fit(x)
    before = encoder(x)
    encoder.fit(5.0 + 2.0 * x)
    assert torch.equal(encoder(x), before)


@pytest.mark.parametrize("name", ENCODERS)
def test_state_dict_keeps_the_standardisation(name: str) -> None:
    build, x = ENCODERS[name][0], data(name)
    encoder, other = build(), build()
    encoder.fit(x)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(x), encoder(x))
    other.fit(5.0 + 2.0 * x)
    assert torch.equal(other(x), encoder(x))


@pytest.mark.parametrize("name", ENCODERS)
def test_without_standardisation(name: str) -> None:
    encoder, x = ENCODERS[name][0](standardize=False), data(name)
    before = encoder(x)
    encoder.fit(x)
    assert torch.equal(encoder(x), before)
    assert not list(encoder.buffers())


def test_mlp_is_standardisation_then_normalised_layers() -> None:
    """Layers of fewer than 8 units, of which little would be left, are not normalised."""
    encoder, x = MLPEncoder(6, (8, 5), activation=nn.Tanh), data("mlp")
    encoder.fit(x)
    first, second = (layer for layer in encoder.layers if isinstance(layer, nn.Linear))
    hidden = first((x - x.mean(0)) / encoder.standardize.scale)
    deviation = hidden.var(-1, correction=0, keepdim=True).add(1e-5).sqrt()
    normalized = (hidden - hidden.mean(-1, keepdim=True)) / deviation
    torch.testing.assert_close(encoder(x), second(normalized.tanh()).tanh())


def test_a_head_divides_by_the_size_of_the_first_features() -> None:
    features = 3.0 * torch.randn(7, 40)
    head, large = Head(features, 4), Head(100.0 * features, 4)
    large.load_state_dict({**large.state_dict(), "weight": head.weight, "bias": head.bias})
    torch.testing.assert_close(head(features), large(100.0 * features))
    by_hand = features @ head.weight.T / (features.square().mean() * 40).sqrt() + head.bias
    torch.testing.assert_close(head(features), by_hand)
    assert Head(torch.zeros(2, 3), 4)(torch.zeros(2, 3)).isfinite().all()


def test_a_large_step_does_not_throw_the_answers_away() -> None:
    """Of an optimizer that moves every weight by 0.03; plain layers move their outputs by tens."""
    lr = 0.03
    features, target = torch.randn(100, 20), torch.randn(100, 1)

    def moved(encoder: nn.Module, head: nn.Module) -> float:
        before = head(encoder(features)).detach()
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=lr)
        (head(encoder(features)) - target).square().mean().backward()
        optimizer.step()
        return float((head(encoder(features)) - before).detach().abs().max())

    encoder = MLPEncoder(20)
    assert moved(encoder, Head(encoder(features), 1)) < 1.0
    plain = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU())
    assert moved(plain, nn.Linear(200, 1)) > 5.0


# Sets


def test_order_of_elements_does_not_matter() -> None:
    encoder, x = DeepSetEncoder(6), data("set")
    encoder.fit(x)
    torch.testing.assert_close(encoder(x[:, [2, 0, 3, 1]]), encoder(x))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("garbage", [0.0, 1e6, float("nan"), float("inf")])
def test_masked_elements_do_not_matter(garbage: float, dtype: torch.dtype) -> None:
    encoder, x = DeepSetEncoder(6), data("set")
    encoder.fit(x)
    mask = torch.tensor([True, False, True, True]).expand(len(x), 4)
    filled = x.masked_fill(~mask.unsqueeze(-1), garbage)
    features = encoder(filled, mask.to(dtype))
    torch.testing.assert_close(features, encoder(x[:, [0, 2, 3]]))
    features.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_standardisation_leaves_masked_elements_out(garbage: float) -> None:
    encoder, other, x = DeepSetEncoder(6), DeepSetEncoder(6), data("set")
    mask = torch.rand(len(x), 4) < 0.6
    encoder.fit(x.masked_fill(~mask.unsqueeze(-1), garbage), mask)
    other.fit(x[mask].unsqueeze(0))
    torch.testing.assert_close(encoder.standardize.state_dict(), other.standardize.state_dict())


def test_size_of_the_set_matters() -> None:
    encoder, x = DeepSetEncoder(6), data("set")
    assert not torch.allclose(encoder(torch.cat([x, x], 1)), encoder(x), atol=1e-3)


def test_empty_sets_have_finite_features() -> None:
    assert DeepSetEncoder(6)(data("set"), torch.zeros(50, 4)).isfinite().all()


# Parameters


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_the_same_under_a_seed(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(ENCODERS[name][0]().state_dict())
    first, second, other = states
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_head_limits_outliers_alone() -> None:
    features = torch.randn(50, 40)
    head, outlier = Head(features, 4), features.clone()
    outlier[0] *= 1e6
    torch.testing.assert_close(head(outlier)[1:], head(features)[1:])
    size = float(outlier[0].norm() / head.size)
    limited = outlier[0] * (5.0 + math.log1p(size - 5.0)) / size
    torch.testing.assert_close(head(outlier)[0], (limited / head.size) @ head.weight.T + head.bias)
