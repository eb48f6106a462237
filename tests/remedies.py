"""What the tests of remedies share: a case is what fails, what its error advises, and what follows the advice."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyro_amortized
from pyro_amortized import AmortizedGuide, collapse_report

X = torch.linspace(-1.0, 1.0, 6)
X2 = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
HALF = torch.tensor([True, False])


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_latent(
    prior: Callable[[], Any], *handlers: Any, likelihood: Callable[[Tensor], Any] | None = None
) -> Callable[[Tensor], None]:
    """A model with one local latent ``z``."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            loc = z.reshape(*z.shape[: z.dim() - len(prior().event_shape)], -1)[..., 0] if prior().event_shape else z
            pyro.sample("x", dist.Normal(loc, 1.0) if likelihood is None else likelihood(z), obs=x)

    return model


def global_only(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def subsampled(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def masked_global(event: bool, whole: bool = False) -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        prior = dist.LogNormal(torch.zeros(2), 1.0)
        if event:
            prior = prior.to_event(1).mask(torch.tensor(True)) if whole else prior.mask(HALF).to_event(1)
        else:
            prior = prior.to_event(1).mask(torch.tensor(False))
        pyro.sample("loc", prior)
        model(x)

    return other


def step(model: Any, guide: Any, *args: Any, elbo: Any = None) -> None:
    """A step of training, of a guide that then has answers."""
    args = args or (X,)
    loss = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo or Trace_ELBO()).step(*args)
    assert math.isfinite(loss)
    if isinstance(guide, pyro_amortized.guides.LocalGuide):
        assert all(value.isfinite().all() for value in guide.median(*args).values())


def made(model: Any = model, guide_class: Any = AmortizedGuide, *args: Any, data: Any = X, **options: Any) -> Any:
    pyro.clear_param_store()
    guide = guide_class(model, *args, **options)
    guide.setup(data)
    return guide


def train(
    model: Any = model, guide_class: Any = AmortizedGuide, *args: Any, data: Any = X, elbo: Any = None, **options: Any
) -> None:
    pyro.clear_param_store()
    step(model, guide_class(model, *args, **options), data, elbo=elbo)


def report(args: Any = (X,), **options: Any) -> Any:
    return collapse_report(model, made(), args, num_samples=20, **options)


class Cases(dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]]):
    """Cases by name."""

    def __call__(self, name: str, wrong: Callable[[], Any], advice: str, right: Callable[[], Any]) -> None:
        """What fails, its advice (a regular expression of the text after "try"), and what follows it."""
        assert name not in self
        self[name] = wrong, advice, right

    def check(self, name: str) -> None:
        """Provokes the error, and does what it says."""
        wrong, advice, right = self[name]
        with pytest.raises(ValueError, match=f"(?s)Cannot.*[Tt]ry .*{advice}"):
            wrong()
        right()
