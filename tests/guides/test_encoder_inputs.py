"""What the encoder sees, what cannot be its answer, and how often the model and it run."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, chains, counts, topics, uniform_bounds
from plain_guides import FAMILIES, GUIDES, INDEX, SIZE, Recorder, X, normals, svi
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, MLPEncoder


class Counted:
    """A model that counts its runs."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.calls: list[None] = []  # not a number, which might be one that decides the model's structure

    def __call__(self, *args: Any) -> Any:
        self.calls.append(None)
        return self.model(*args)


@pytest.mark.parametrize(
    ("encoder", "options", "match"),
    [
        (Recorder(lambda x: x.sum().reshape(1, 1)), {}, r"4 datapoints of plate 'data'.*shape \(1, 1\)"),
        (Recorder(lambda x: x), {}, r"features of shape \(4,\)"),
        (
            Recorder(lambda x: (x[:, None], x[:, None].exp())),
            {"family": "multivariate_normal"},
            r'family="normal" \(this guide has MultivariateNormal\)',
        ),
        (Recorder(lambda x: (x, x.exp())), {}, r"must have shapes \(4, 1\)"),
        (None, {"encoder_input": "y"}, r"encoder_input='y' .*no argument of that name; try one of \['x'\]"),
        (None, {"encoder_input": ["x", "y"]}, r"encoder_input='y'"),
        (MLPEncoder(3), {}, r"1 features .*built for 3"),
    ],
)
def test_encoders_that_do_not_fit(encoder: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AmortizedGuide(normals, encoder, **options)(X)


@pytest.mark.parametrize("encoder", [MLPEncoder, lambda x: x, "mlp"])
def test_encoder_that_is_no_module(encoder: Any) -> None:
    with pytest.raises(ValueError, match="not a torch.nn.Module instance"):
        AmortizedGuide(normals, encoder)


def test_encoder_whose_batch_size_goes_wrong_later() -> None:
    guide = AmortizedGuide(normals, Recorder(lambda x: torch.ones(4, 2)))
    guide(X)
    with pytest.raises(ValueError, match=r"2 datapoints in plate 'data'.*\(4, 2\) and not \(2, 2\)"):
        guide(X[:2])


def covariates(x: Tensor, label: Tensor, index: Tensor | None = None, *, scale: float = 1.0) -> None:
    with pyro.plate("data", len(x), subsample=index):
        x, label = (pyro.subsample(value, event_dim=value.dim() - 1) for value in (x, label))
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)
        pyro.sample("label", dist.Normal(z, 1.0), obs=label)


def both(x: Tensor, label: Tensor, index: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    return pyro.subsample(label, event_dim=0), 2 * pyro.subsample(x, event_dim=1)


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("index", [None, INDEX])
@pytest.mark.parametrize(
    ("encoder_input", "expected"),
    [
        (None, lambda x, label: (x, label)),
        ("x", lambda x, label: (x,)),
        ("label", lambda x, label: (label,)),
        (["label", "x"], lambda x, label: (label, x)),
        (both, lambda x, label: (label, 2 * x)),
        (lambda x, label, index, **_: pyro.subsample(x, event_dim=1), lambda x, label: (x,)),
    ],
)
def test_encoder_sees_exactly(encoder_input: Any, expected: Any, index: Any, keywords: bool) -> None:
    x, label = torch.randn(SIZE, 2), torch.randn(SIZE)
    encoder = Recorder()
    guide = AmortizedGuide(covariates, encoder, encoder_input=encoder_input)
    args, kwargs = ((), {"x": x, "label": label, "index": index}) if keywords else ((x, label, index), {})
    rows = slice(None) if index is None else index
    for _ in range(2):
        guide(*args, **kwargs)
        for seen, value in zip(encoder.inputs[-1], expected(x[rows], label[rows]), strict=True):
            assert torch.equal(seen, value)
    guide.median(*args, **kwargs)
    assert torch.equal(encoder.inputs[-1][0], encoder.inputs[0][0])


@pytest.mark.parametrize(("plates", "transpose"), [("columns", True), ("rows", False), ("unsized", False)])
def test_encoder_sees_datapoints_first(plates: str, transpose: bool) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(SIZE)
    encoder = Recorder()
    guide = AmortizedGuide(getattr(linear, plates), encoder, plate="data")
    for size in (SIZE, SIZE, 3):
        guide(x[:size].T.contiguous() if transpose else x[:size])
        assert torch.equal(encoder.inputs[-1][0], x[:size])


def test_encoder_sees_the_random_subsample_of_the_model() -> None:
    linear = LinearGaussian.random_weights()
    x, encoder = linear.simulate(SIZE), Recorder()
    guide = AmortizedGuide(linear.random, encoder)
    batches = set()
    for _ in range(5):
        trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(linear.random, trace)).get_trace(x)
        index = trace.nodes["data"]["value"]
        assert torch.equal(model_trace.nodes["data"]["value"], index)
        assert torch.equal(encoder.inputs[-1][0], x[index])
        batches.add(tuple(index.tolist()))
    assert len(batches) > 1


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("model", "args"),
    [(normals, (X,)), (topics, (counts(6),)), (LinearGaussian.random_weights().rows, (torch.randn(6, 4),))],
)
def test_one_look_and_one_encoder_pass_per_step(Guide: Any, model: Any, args: Any) -> None:
    """The ELBO runs the model once; the look is spared in the fourth step where the user says what is encoded."""
    for promise in [False, True] if Guide is AmortizedGuide else [False]:
        pyro.clear_param_store()
        counted, encoder = Counted(model), Recorder()
        options = {"encoder": encoder} if Guide is AmortizedGuide else {}
        options |= {"encoder_input": lambda x: x} if promise else {}
        steps = svi(counted, Guide(counted, plate="data", **options))
        for _ in range(3):
            steps.step(*args)
        counted.calls.clear()
        encoder.inputs.clear()
        steps.step(*(torch.ones_like(arg) for arg in args))
        assert len(counted.calls) == (1 if promise else 2)
        assert len(encoder.inputs) == (Guide is AmortizedGuide)


def test_structure_that_depends_on_values_is_looked_at_in_every_call() -> None:
    x, counted = torch.randn(5, 4), Counted(chains)
    guide = AmortizedGuide(counted)
    steps = svi(counted, guide)
    for lengths in ([2, 1, 3, 1, 1], [3, 3, 1, 2, 1], [3, 2, 1, 2, 1]):
        counted.calls.clear()
        steps.step(x, torch.tensor(lengths))
        assert len(counted.calls) >= 2
    for lengths, match in (([4, 1, 1, 1, 1], "'z_3' has become"), ([1, 2, 1, 1, 1], "'z_2' is no longer")):
        with pytest.raises(ValueError, match=match):
            steps.step(x, torch.tensor(lengths))
    assert guide.median(x, torch.tensor([3, 3, 1, 2, 1])).keys() == {"z_0", "z_1", "z_2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_that_depend_on_values_are_followed(family: str) -> None:
    guide = AmortizedGuide(uniform_bounds, family=family)
    steps = svi(uniform_bounds, guide, lr=0.001)
    for low in (0.0, 5.0, -30.0):
        bounds = torch.tensor(low) + torch.arange(4.0)
        assert torch.tensor(steps.step(X, bounds)).isfinite()
        for values in (guide(X, bounds), guide.median(X, bounds), guide.quantiles([0.01, 0.99], X, bounds)):
            assert ((values["z"] > bounds) & (values["z"] < bounds + 2)).all()


def positive_only(x: Tensor) -> None:
    x = x[x > 0]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def repeated(x: Tensor) -> None:
    size = torch.repeat_interleave(x.long().clamp(min=0)).shape[0]
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(size))


@pytest.mark.parametrize("model", [positive_only, repeated])
def test_sizes_that_depend_on_values_are_followed(model: Any) -> None:
    guide = AmortizedGuide(model)
    for x in ([1.0, 0.0, 1.0, -1.0], [1.0, 1.0, 0.0, 1.0], [-1.0, -1.0, 0.0, 1.0]):
        value = torch.tensor(x)
        assert guide(value)["z"].shape == (int(value.clamp(min=0).sum()),)


def test_arguments_that_were_one_tensor_once() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        normals(y)

    encoder, y = Recorder(), torch.randn(4)
    guide = AmortizedGuide(model, encoder)
    for x in (y, X):
        guide(x, y)
        assert torch.equal(encoder.inputs[-1][0], y)


def test_conditioned_model() -> None:
    def model(size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0))

    data = {"x": X}
    conditioned, encoder = pyro.condition(model, data), Recorder()
    guide = AmortizedGuide(conditioned, encoder)
    steps = svi(conditioned, guide)
    for shift in range(3):
        data["x"] = X + shift
        assert torch.tensor(steps.step(4)).isfinite()
        assert [len(inputs) for inputs in encoder.inputs] == [1] * len(encoder.inputs)
        assert torch.equal(encoder.inputs[-1][0], X + shift)


def test_created_plates_are_used() -> None:
    linear, encoder = LinearGaussian.random_weights(), Recorder()
    x = linear.simulate(SIZE)
    guide = AmortizedGuide(
        linear.random, encoder, create_plates=lambda x: pyro.plate("data", len(x), subsample_size=linear.batch_size)
    )
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(x)
        assert torch.equal(encoder.inputs[-1][0], x[trace.nodes["data"]["value"]])
    assert torch.tensor(svi(linear.random, guide).step(x)).isfinite()


def test_dropout_of_the_encoder_is_left_alone_by_setup() -> None:
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.BatchNorm1d(1), nn.Dropout(0.5))
    guide = AmortizedGuide(normals, encoder)
    guide.setup(X)
    assert all(module.training for module in encoder.modules())
    assert encoder[1].num_batches_tracked == 0
    guide(X)
    assert encoder[1].num_batches_tracked == 1


def test_default_encoders_can_be_made_modules_of_pyro() -> None:
    encoder = PyroModule[MLPEncoder](1, (5,))
    guide = AmortizedGuide(normals, encoder)
    assert guide.variational_parameters(torch.randn(3)).shape == (3, 2)
