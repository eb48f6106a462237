"""What errors about codes and codebooks advise."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO
from remedies import Cases, X, made, model, report, train
from torch import Tensor

from pyro_amortized import Codebook, VectorQuantizedGuide

case = Cases()

case("a float code", lambda: Codebook(4, 2)(torch.tensor([0.5])), "integers", lambda: Codebook(4, 2)(torch.tensor([1])))
case(
    "codes in a list",
    lambda: Codebook(4, 2)([0, 1]),
    r"torch.as_tensor\(codes\)",
    lambda: Codebook(4, 2)(torch.as_tensor([0, 1])),
)
case(
    "a codebook in another precision",
    lambda: Codebook(4, 2).nearest(torch.zeros(3, 2).double()),
    r"codebook.to\(features\)",
    lambda: initialized().to(torch.zeros(1).double()).nearest(torch.zeros(3, 2).double()),
)
case(
    "a codebook without vectors",
    lambda: Codebook(4, 2).nearest(torch.zeros(3, 2)),
    r"codebook.initialize\(features\)",
    lambda: initialized().nearest(torch.zeros(3, 2)),
)


def initialized() -> Codebook:
    codebook = Codebook(4, 2)
    codebook.initialize(torch.randn(10, 2))
    return codebook


def coded(num_codes: int, codebook: Codebook) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(logits=torch.zeros(num_codes)))
            pyro.sample("x", dist.Normal(codebook(code)[..., 0], 1.0), obs=x)

    return model


def quantized(num_codes: int, **options: Any) -> None:
    codebook = Codebook(4, 2)
    train(coded(num_codes, codebook), VectorQuantizedGuide, codebook, **options)


case("another number of codes", lambda: quantized(5), r"Categorical\(logits=torch.zeros\(4\)\)", lambda: quantized(4))
case("a family of codes", lambda: quantized(4, family="normal"), "leaving it out", lambda: quantized(4))
case(
    "phi of codes", lambda: vector_quantized().posterior(X), r"guide.codes\(...\)", lambda: vector_quantized().codes(X)
)
case(
    "a codebook under a compiled ELBO",
    lambda: quantized(4, elbo=JitTrace_ELBO(ignore_jit_warnings=True)),
    "Trace_ELBO instead",
    lambda: quantized(4),
)


def vector_quantized() -> Any:
    codebook = Codebook(4, 2)
    return made(coded(4, codebook), VectorQuantizedGuide, codebook)


case(
    "perplexity of no codes",
    lambda: report().perplexity,
    "active_units and mutual_information",
    lambda: (report().active_units, report().mutual_information),
)
case(
    "a Codebook of another dim",
    lambda: Codebook(4, 2).initialize(torch.zeros(3, 5)),
    r"features \(\*, 2\)",
    lambda: Codebook(4, 2).initialize(torch.randn(9, 2)),
)
case(
    "no codebook",
    lambda: VectorQuantizedGuide(model, 3),
    "the Codebook that the model looks codes up in",
    lambda: VectorQuantizedGuide(model, Codebook(4, 2)),
)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
