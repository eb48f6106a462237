"""Sequences, images and counts: what their encoders see, and what they leave out of account."""

import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, ConvEncoder, CountEncoder, SequenceEncoder
from pyro_amortized.encoders import StandardizedEncoder

Build = Callable[..., StandardizedEncoder]
LENGTHS = torch.tensor([7, 3, 5, 1, 0])

ENCODERS: dict[str, tuple[Build, Callable[[int], tuple[Tensor, ...]]]] = {
    "gru": (lambda **o: SequenceEncoder(2, **o), lambda n: (torch.randn(n, 7, 2),)),
    "causal": (lambda **o: SequenceEncoder(2, causal=True, num_layers=2, **o), lambda n: (torch.randn(n, 7, 2),)),
    "transformer": (lambda **o: SequenceEncoder(2, network="transformer", **o), lambda n: (torch.randn(n, 7, 2),)),
    "pooled": (
        lambda **o: SequenceEncoder(2, pooled=True, **o),
        lambda n: (torch.randn(n, 7, 2), LENGTHS[torch.arange(n) % 5]),
    ),
    "pooled transformer": (
        lambda **o: SequenceEncoder(2, network="transformer", pooled=True, **o),
        lambda n: (torch.randn(n, 7, 2), LENGTHS[torch.arange(n) % 5]),
    ),
    "images": (lambda **o: ConvEncoder(3, **o), lambda n: (torch.rand(n, 3, 9, 11),)),
    "counts": (
        lambda **o: CountEncoder(6, num_batches=3, **o),
        lambda n: (torch.poisson(torch.full((n, 6), 4.0)), torch.rand(n) + 0.5, torch.arange(n) % 3),
    ),
}
"""By name: an encoder, and inputs of a number of datapoints."""
SEQUENCES = [
    pytest.param({"network": network, "causal": causal, "pooled": pooled}, id=f"{network}-{causal}-{pooled}")
    for network in ("gru", "transformer")
    for causal in (False, True)
    for pooled in (False, True)
]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# What all of them keep


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    build, data = ENCODERS[name]
    encoder, inputs = build(), data(9)
    encoder.fit(*inputs)
    torch.testing.assert_close(encoder(*inputs)[[3, 1]], encoder(*(x[[3, 1]] for x in inputs)))


@pytest.mark.parametrize("name", ENCODERS)
def test_states_and_pickles_give_the_same_features(name: str) -> None:
    build, data = ENCODERS[name]
    encoder, other, inputs = build(), build(), data(9)
    encoder.fit(*inputs)
    assert not torch.equal(other(*inputs), encoder(*inputs))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(*inputs), encoder(*inputs))
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(*inputs), encoder(*inputs))
    assert torch.equal(encoder.eval()(*inputs), other.train()(*inputs))  # nothing is drawn, in no mode


@pytest.mark.parametrize("name", ENCODERS)
def test_other_types_and_precisions(name: str) -> None:
    build, data = ENCODERS[name]
    inputs = tuple(x.round() for x in data(9)[:-1]) + data(9)[-1:]
    encoder = build(standardize=False)
    whole = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    torch.testing.assert_close(encoder(*whole), encoder(*(x.to(torch.float64) for x in whole)))
    assert encoder.float()(*inputs).dtype == torch.float32


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("first", ["zeros", "one row"])
def test_a_first_batch_that_says_nothing(name: str, first: str) -> None:
    """Data unlike it, and outliers among them, then give finite features of moderate size."""
    build, data = ENCODERS[name]
    encoder, inputs = build(), data(9)
    start = (torch.zeros_like(inputs[0]), *inputs[1:])
    encoder.fit(*(start if first == "zeros" else (x[:1] for x in inputs)))
    inputs[0][0] *= 1e8
    features = encoder(*inputs)
    assert features.isfinite().all()
    assert features.abs().max() < 100
    features.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def two_sides(x: Tensor, *rest: Tensor) -> None:
    """A latent with an exponential link, and nothing to see of the datapoint but what the encoder sees."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = x.flatten(1).abs().mean(-1).round()
        pyro.sample("y", dist.Poisson((1.0 + z.sum(-1)).exp()), obs=y)


@pytest.mark.thinned
@pytest.mark.parametrize("lr", [0.001, 0.03])
@pytest.mark.parametrize("name", ["pooled", "pooled transformer", "images", "counts"])
def test_training_is_steady(name: str, lr: float) -> None:
    build, data = ENCODERS[name]
    inputs = data(50)
    guide = AmortizedGuide(two_sides, build(), encoder_input=lambda *inputs: inputs)
    svi = SVI(two_sides, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    losses = torch.tensor([svi.step(*inputs) / 50 for _ in range(60)])
    assert losses.isfinite().all()
    assert losses[1:].max() < 60
    assert losses[-10:].mean() < losses[:5].mean()


# Sequences


def walks(x: Tensor) -> None:
    with pyro.plate("series", len(x)):
        z = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(0.95 * z, 0.3))
            pyro.sample(f"x_{t}", dist.Poisson((1.0 + z).exp()), obs=x[:, t])


@pytest.mark.thinned
@pytest.mark.parametrize("lr", [0.001, *(pytest.param(lr, marks=pytest.mark.slow) for lr in (0.003, 0.01)), 0.03])
@pytest.mark.parametrize("options", [{}, {"network": "transformer"}, {"network": "transformer", "num_layers": 2}])
def test_training_on_features_of_steps_is_steady(options: dict[str, Any], lr: float) -> None:
    """The loss never rises far above that of the start, as it did by 70 % before sums were normalised."""
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        x = torch.poisson((1.0 + 0.3 * torch.randn(100, 6).cumsum(1)).exp())
        guide = AmortizedGuide(walks, SequenceEncoder(1, **options), encoder_input="x")
        svi = SVI(walks, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
        losses = torch.tensor([svi.step(x) for _ in range(50)])
        assert losses.isfinite().all()
        assert losses[1:].max() < 1.3 * losses[0]
        assert losses[-10:].mean() < losses[:2].mean()


@pytest.mark.parametrize("options", SEQUENCES)
def test_steps_beyond_the_end_count_for_nothing(options: dict[str, Any]) -> None:
    encoder, x, y = SequenceEncoder(2, **options), torch.randn(5, 7, 2), torch.randn(5, 11, 2)
    y[:, :7] = x
    mask = torch.arange(7) < LENGTHS.unsqueeze(-1)
    encoder.fit(x, LENGTHS)
    features, longer = encoder(x, LENGTHS), encoder(y, LENGTHS)
    assert features.isfinite().all()
    if options["pooled"]:
        torch.testing.assert_close(longer, features)
    else:
        torch.testing.assert_close(longer[:, :7], features)
    torch.testing.assert_close(encoder(x, mask), features)
    torch.testing.assert_close(encoder(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask.double()), features)
    assert not torch.allclose(encoder(x), features)  # lengths do count


@pytest.mark.parametrize("options", SEQUENCES)
def test_of_one_sequence_as_of_many(options: dict[str, Any]) -> None:
    """Padded, a sequence has the features that it has alone."""
    encoder, x = SequenceEncoder(2, **options), torch.randn(5, 7, 2)
    features = encoder(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()[:-1]):
        alone = encoder(x[row : row + 1, :length])[0]
        torch.testing.assert_close(alone, features[row] if options["pooled"] else features[row, :length])


@pytest.mark.parametrize("network", ["gru", "transformer"])
def test_causal_features_know_no_later_steps(network: str) -> None:
    x = torch.randn(4, 7, 2)
    changed = x.clone()
    changed[:, 4:] += 1.0
    for causal in (True, False):
        encoder = SequenceEncoder(2, network=network, causal=causal)
        before, after = encoder(x), encoder(changed)
        assert torch.allclose(after[:, :4], before[:, :4]) == causal
        assert (after[:, 4:] - before[:, 4:]).abs().amax((0, 2)).gt(1e-6).all()
        earlier = encoder(torch.cat([x[:, :1] + 1.0, x[:, 1:]], 1))
        assert (earlier - before).abs().amax((0, 2)).gt(1e-6).all()  # but all earlier ones


@pytest.mark.parametrize("network", ["gru", "transformer"])
def test_ends_are_told_from_the_middle_in_sequences_of_one_value(network: str) -> None:
    for causal in (False, True):
        features = SequenceEncoder(2, network=network, causal=causal)(torch.ones(1, 40, 2))[0]
        assert (features[0] - features[20]).norm() > 0.05 * features[20].norm()
        assert (features[19] - features[20]).norm() < 1e-3 * features[20].norm()


@pytest.mark.parametrize("network", ["gru", "transformer"])
def test_order_counts(network: str) -> None:
    encoder, x = SequenceEncoder(2, network=network, pooled=True), torch.randn(4, 7, 2)
    assert not torch.allclose(encoder(x.flip(1)), encoder(x), atol=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_transformer_by_hand(causal: bool, num_heads: int, activation: Callable[[], nn.Module]) -> None:
    """In the evaluation mode too, without gradients, where torch's own layers take another path."""
    encoder = SequenceEncoder(2, network="transformer", causal=causal, num_heads=num_heads, activation=activation)
    x, layer = torch.randn(5, 7, 2), encoder.eval().over_time.layers[0]  # type: ignore[union-attr, index]
    hidden = encoder.step_layers(torch.cat([x, torch.arange(7).lt(LENGTHS[:, None])[..., None]], -1))
    query, key, value = layer.seek(layer.norms[0](hidden)).chunk(3, -1)
    size, expected = 64 // num_heads, torch.zeros(5, 7, 64)
    for row, length in enumerate(LENGTHS.tolist()):
        for head in range(num_heads):
            own = slice(head * size, (head + 1) * size)
            reach = 2.0 ** (head if causal else head // 2)
            for t in range(length):
                back, ahead = causal or head % 2 == 0, not causal and (head % 2 == 1 or num_heads == 1)
                seen = [s for s in range(length) if s == t or (back or num_heads == 1) * (s < t) or ahead * (s > t)]
                logits = key[row, seen, own] @ query[row, t, own] / size**0.5
                weights = (logits - (torch.tensor(seen) - t).abs() / reach).exp()
                expected[row, t, own] = weights @ value[row, seen, own] / (1 + weights.sum())  # 1 falls on nothing
    expected = hidden + layer.found(expected)
    expected = encoder.over_time.last_norm(expected + layer.layer(layer.norms[1](expected)))  # type: ignore[operator]
    within = torch.arange(7) < LENGTHS.unsqueeze(-1)
    with torch.no_grad():
        features = encoder(x.masked_fill(~within.unsqueeze(-1), 0.0), LENGTHS)
    torch.testing.assert_close(features[within], expected[within])


def test_missing_steps_within_have_features_of_their_neighbours() -> None:
    encoder, x = SequenceEncoder(1), torch.randn(4, 7)
    mask = torch.tensor([True, True, False, True, True, True, True]).expand(4, 7)
    before = encoder(x, mask)
    torch.testing.assert_close(encoder(x.masked_fill(~mask, 1e6), mask), before)
    moved = encoder(torch.cat([x[:, :3], x[:, 3:] + 1.0], 1), mask)
    assert (moved[:, 2] - before[:, 2]).abs().max() > 1e-4


def test_gru_is_torchs_own() -> None:
    """Of sequences without a mask, features are the states of a bidirectional GRU over the features of each step."""
    encoder, x = SequenceEncoder(2, hidden_dims=(8,), standardize=False), torch.randn(3, 7, 2)
    part: Any = encoder.over_time
    gru = nn.GRU(8, 4, batch_first=True, bidirectional=True)
    backwards = {f"{name}_reverse": x for name, x in part.backwards[0].state_dict().items()}
    gru.load_state_dict({**part.forwards[0].state_dict(), **backwards})
    torch.testing.assert_close(encoder(x), gru(encoder.step_layers(torch.cat([x, torch.ones(3, 7, 1)], -1)))[0])


def chains(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


@pytest.mark.parametrize("options", [{"encoder_input": ["x", "lengths"]}, {"encoder_input": "x"}])
def test_a_guide_serves_sequences_of_any_length(options: dict[str, Any]) -> None:
    guide = AmortizedGuide(chains, SequenceEncoder(1), **options)
    svi = SVI(chains, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for steps in (4, 6, 3):
        assert svi.step(torch.randn(5, steps), torch.arange(5) % (steps + 1)) < 1e3
    assert guide.median(torch.randn(2, 9), torch.tensor([9, 2]))["z_8"].shape == (2,)


@pytest.mark.parametrize("causal", [False, True])
def test_a_smoother_reaches_the_posterior_means_of_a_random_walk(causal: bool) -> None:
    """A filter cannot: that of the first of two states lacks a sixth of its variance without the later observation."""
    z = torch.randn(300, 2).cumsum(1)
    x = z + torch.randn(300, 2)
    exact = torch.linalg.solve(torch.tensor([[3.0, -1.0], [-1.0, 2.0]]), x.T).T
    encoder, head = SequenceEncoder(1, causal=causal, hidden_dims=(16,)), nn.Linear(16, 1)
    encoder.fit(x)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        error = (head(encoder(x)).squeeze(-1) - exact).square().mean(0) / exact.var(0)
        error.sum().backward()
        optimizer.step()
    assert error[1] < 0.02
    assert (error[0] > 0.1) == causal
    assert causal or error[0] < 0.02


# Images


def test_images_of_one_channel_and_several_inputs() -> None:
    encoder, x = ConvEncoder(1), torch.rand(4, 12, 10)
    torch.testing.assert_close(encoder(x), encoder(x.unsqueeze(1)))
    two = ConvEncoder(3)
    torch.testing.assert_close(
        two(x, torch.rand(4, 2, 12, 10) * 0), two(torch.cat([x[:, None], x[:, None].expand(-1, 2, -1, -1) * 0], 1))
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (28, 28), (65, 33)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    encoder = ConvEncoder(2, hidden_dims=(30, 20))
    assert encoder(torch.rand(3, 2, *size)).shape == (3, 20)


def test_channels_are_standardised_over_pixels() -> None:
    encoder, x = ConvEncoder(2), torch.rand(50, 2, 6, 6) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1)
    encoder.fit(x)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    scaled: Any = encoder.standardize
    torch.testing.assert_close(scaled(x.movedim(1, -1)).movedim(-1, 1)[:, 1], expected[:, 1])


# Counts


def test_counts_go_in_as_logarithms_beside_size_and_batch() -> None:
    encoder = CountEncoder(4, num_batches=3, hidden_dims=(5,), standardize=False)
    counts, size, batch = torch.tensor([[0.0, 1, 2, 9], [3, 0, 0, 0]]), torch.tensor([2.0, 0.5]), torch.tensor([2, 0])
    one_hot = torch.eye(3)[batch]
    for typical in (1.0, 8.0):  # of the first set-up, and only of that
        rates = typical * counts / size.unsqueeze(-1)
        by_hand = torch.cat([(1 + rates).log(), size.log().unsqueeze(-1), one_hot], -1)
        torch.testing.assert_close(encoder(counts, size, batch), encoder.layers(by_hand))
        encoder.fit(
            torch.ones(3, 4), torch.tensor([1.0, 8.0, 100.0]) * (10.0 if encoder.fitted else 1.0), torch.arange(3)
        )
    torch.testing.assert_close(encoder(counts, size, batch), encoder.layers(by_hand))
    torch.testing.assert_close(encoder(counts, size, one_hot), encoder(counts, size.unsqueeze(-1), batch.double()))
    torch.testing.assert_close(encoder(counts, batch), encoder(counts, 1 + counts.sum(-1), batch))
    alone = CountEncoder(4)
    torch.testing.assert_close(alone(counts.long()), alone(counts, 1 + counts.sum(-1)))


def test_a_cell_without_counts() -> None:
    encoder = CountEncoder(4)
    encoder.fit(torch.ones(3, 4))
    assert encoder(torch.zeros(2, 4)).isfinite().all()


# What they refuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SequenceEncoder(2, network="lstm"), 'try network="gru"'),
        (lambda: SequenceEncoder(2, network="transformer", num_heads=5), r"try hidden_dims=\(60,\), or num_heads=1"),
        (lambda: SequenceEncoder(2, hidden_dims=(1,)), r"try hidden_dims=\(2,\), or causal=True"),
        (lambda: SequenceEncoder(2, causal="yes"), "must be True or False"),
        (lambda: SequenceEncoder(2, hidden_dims=()), "try hidden_dims="),
        (lambda: SequenceEncoder(2)(torch.zeros(3, 4, 5)), "try input_dim=5"),
        (lambda: SequenceEncoder(2)(torch.zeros(3, 4, 2), torch.tensor([1, 2, 5])), "integers from 0 to 4"),
        (lambda: SequenceEncoder(2)(torch.zeros(3, 4, 2), torch.tensor([1.5, 2, 1])), "integers from 0 to 4"),
        (lambda: SequenceEncoder(2)(torch.zeros(3, 4, 2), torch.ones(3, 5)), "belong to a sequence"),
        (lambda: SequenceEncoder(2)(torch.zeros(3, 4, 2), *torch.ones(2, 3, 4)), "takes a sequence and"),
        (lambda: ConvEncoder((1, 16)), "try channels=1"),
        (lambda: ConvEncoder(1, conv_dims=()), "try conv_dims="),
        (lambda: ConvEncoder(1)(torch.zeros(3, 28 * 28)), "at least 3 dimensions"),
        (lambda: ConvEncoder(1)(torch.zeros(3, 2, 8, 8)), r"x.reshape\(-1, 1, height, width\)"),
        (lambda: CountEncoder(2, num_batches=-1), "try num_batches="),
        (lambda: CountEncoder(2, num_batches=3)(torch.ones(4, 2)), "the names of these"),
        (lambda: CountEncoder(2)(*torch.ones(3, 4, 2)), "the names of these"),
        (lambda: CountEncoder(2)(torch.ones(4, 3)), "try input_dim=3"),
        (lambda: CountEncoder(2)(-torch.ones(4, 2)), "try the raw counts, or MLPEncoder"),
        (lambda: CountEncoder(2)(torch.ones(4, 2), torch.zeros(4)), "a size factor is not positive"),
        (lambda: CountEncoder(2, num_batches=3)(torch.ones(4, 2), torch.tensor([0, 1, 2, 3])), "from 0 to 2"),
        (lambda: CountEncoder(2, num_batches=3)(torch.ones(4, 2), torch.ones(4, 2)), "try num_batches="),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)Cannot .*because.*{message}"):
        call()
