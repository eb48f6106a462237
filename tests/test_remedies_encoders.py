"""What errors about encoders advise: of what they see, and of what they return."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Function
from remedies import X2, Cases, X, made, model, step, train
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, DeepSetEncoder, DiscreteAmortizedGuide, IterativeAmortizedGuide, MLPEncoder

case = Cases()

case("an unknown argument", lambda: train(encoder_input="y"), r"one of \['x'\]", lambda: train(encoder_input="x"))


def without_arguments() -> None:
    model(X)


case(
    "an unknown argument of a model without",
    lambda: AmortizedGuide(without_arguments, encoder_input="y").setup(),
    "a function of the model's arguments",
    lambda: AmortizedGuide(without_arguments, encoder_input=lambda: X).setup(),
)
case("an encoder input that is none", lambda: train(encoder_input=lambda x: None), "encoder_input=None", train)
case(
    "an encoder input in NumPy",
    lambda: train(encoder_input=lambda x: x.numpy()),
    r"torch.as_tensor\(...\)",
    lambda: train(encoder_input=lambda x: torch.as_tensor(x.numpy())),
)
case(
    "an encoder input with holes",
    lambda: train(encoder_input=lambda x: x / 0),
    "fills them in",
    lambda: train(encoder_input=lambda x: (x / 0).nan_to_num()),
)
case(
    "inputs of other width",
    lambda: (
        train(encoder_input="x", guide_class=AmortizedGuide, model=model) or made(model, AmortizedGuide, MLPEncoder(5))
    ),
    "input_dim=1",
    lambda: train(model, AmortizedGuide, MLPEncoder(1)),
)


def two_inputs(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=y)


def deep_set(dim: int, **options: Any) -> None:
    pyro.clear_param_store()
    step(two_inputs, AmortizedGuide(two_inputs, DeepSetEncoder(dim), **options), X2, X2 + 1.0)


case(
    "two inputs of DeepSetEncoder",
    lambda: deep_set(2),
    "with the name of one argument",
    lambda: deep_set(1, encoder_input="x"),
)
case(
    "two inputs of DeepSetEncoder(1)",
    lambda: deep_set(1),
    "with the name of one argument",
    lambda: deep_set(1, encoder_input="x"),
)
case(
    "features of other width in DeepSetEncoder",
    lambda: deep_set(2, encoder_input="x"),
    "input_dim=1",
    lambda: deep_set(1, encoder_input="x"),
)


def with_output(
    function: Callable[[Tensor], Any], guide_class: Any = AmortizedGuide, **options: Any
) -> Callable[[], None]:
    return lambda: train(model, guide_class, Function(function), **options)


def column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return column(x), torch.ones(len(x), 1)


FEATURES = with_output(column)
case("an encoder that returns none", with_output(lambda x: None), r"features of shape \(N, H\)", FEATURES)
case(
    "an encoder that returns integers",
    with_output(lambda x: column(x).long()),
    r"as .float\(\)",
    with_output(lambda x: column(x).long().float()),
)
case("an encoder that returns a vector", with_output(lambda x: x), r"an encoder from \(N, ...\) to \(N, H\)", FEATURES)
case(
    "an encoder that returns negative scales",
    with_output(lambda x: (column(x), column(x))),
    "softplus",
    with_output(lambda x: (column(x), nn.functional.softplus(column(x)))),
)
case(
    "a pair in a joint family",
    with_output(pair, family="multivariate_normal"),
    r"features of shape \(N, H\)",
    with_output(column, family="multivariate_normal"),
)
case(
    "a pair in IterativeAmortizedGuide",
    with_output(pair, IterativeAmortizedGuide),
    r"\(N, ...\) to \(N, H\)",
    with_output(column, IterativeAmortizedGuide),
)
case(
    "a pair in DiscreteAmortizedGuide",
    with_output(pair, DiscreteAmortizedGuide),
    "AmortizedGuide if no latent is discrete",
    with_output(pair),
)
case(
    "an encoder's class",
    lambda: train(model, AmortizedGuide, MLPEncoder),
    "a constructed module",
    lambda: train(model, AmortizedGuide, MLPEncoder(1)),
)


def factored(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))


case(
    "no observations to encode",
    lambda: train(factored, plate="data"),
    "with the name of an argument",
    lambda: train(factored, encoder_input="x"),
)
case(
    "encoder input of a number",
    lambda: made(encoder_input=3),
    "None for the observed values",
    lambda: made(encoder_input=None),
)
case("an empty encoder input", lambda: made(encoder_input=[]), "None", lambda: made(encoder_input=None))
case(
    "an encoder without weights",
    lambda: made(model, AmortizedGuide, broken_encoder(math.nan)),
    "a look at its weights",
    lambda: made(model, AmortizedGuide, broken_encoder(1.0)),
)


def broken_encoder(weight: float) -> nn.Module:
    encoder = nn.Linear(1, 4)
    nn.init.constant_(encoder.weight, weight)
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), encoder)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
