"""What the tests of guides share: small models, encoders that keep what they see, guides at the exact posterior."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from models import LinearGaussian
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, PerDatapointGuide

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal"]
GUIDES = [AmortizedGuide, PerDatapointGuide]
SIZE = 10
INDEX = torch.tensor([7, 2, 4])
X = torch.linspace(-1.0, 1.0, 4)


def normals(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def svi(model: Any, guide: Any, elbo: Any = None, lr: float = 0.01) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())


class Recorder(nn.Module):
    """An encoder that keeps what it is given and returns the features or pair of another function."""

    def __init__(self, function: Callable[..., Any] = lambda *inputs: inputs[0].reshape(len(inputs[0]), -1)) -> None:
        super().__init__()
        self.function = function
        self.inputs: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Tensor) -> Any:
        self.inputs.append(inputs)
        return self.function(*inputs)


def exact_phi(linear: LinearGaussian, x: Tensor) -> Tensor:
    """The exact posterior as parameters of the full-rank family."""
    q = linear.posterior(x)
    scale = q.scale_tril.diagonal(dim1=-1, dim2=-2)
    rows, columns = torch.tril_indices(q.event_shape[0], q.event_shape[0], -1)
    return torch.cat([q.loc, scale.log(), (q.scale_tril / scale.unsqueeze(-1))[..., rows, columns]], -1)


def exact_guide(
    linear: LinearGaussian, model: Any, args: Any, x: Tensor, kind: str, error: float = 0.0, **options: Any
) -> Any:
    """A guide at the exact posterior, with its log scales off by ``error``, put in by encoder, head or table."""
    latents = linear.weights.shape[1]
    wrong = torch.zeros(2 * latents + latents * (latents - 1) // 2)
    wrong[latents : 2 * latents] = error

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        q = linear.posterior(x)
        return q.loc, q.stddev * wrong[latents : 2 * latents].exp()

    if kind == "pair":
        guide: Any = AmortizedGuide(model, Recorder(pair), plate="data", **options)
        guide.setup(*args)
    elif kind == "head":
        encoder = Recorder(lambda x: exact_phi(linear, x) + wrong)
        guide = AmortizedGuide(model, encoder, plate="data", family="multivariate_normal", **options)
        guide.setup(*args)
        head = guide.inference.head
        head.weight.data = torch.eye(*head.weight.shape) * head.size
        nn.init.zeros_(head.bias)
    else:
        guide = PerDatapointGuide(model, plate="data", family="multivariate_normal", **options)
        guide.setup(*args)
        guide.inference.table.data.copy_(exact_phi(linear, x) + wrong)
    return guide


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x + z, 1.0), obs=y)
