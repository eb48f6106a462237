"""Angles and directions: what is refused, and what the remedy gives."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import ProjectedNormalReparam
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform

from pyro_amortized import AmortizedGuide, log_evidence

pytestmark = pytest.mark.usefixtures("_float64")


class WrappedNormal(dist.TorchDistribution):
    """A density of one's own on the circle, with its support declared as Pyro does."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as torch wants it
    support = dist.constraints.real

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(torch.Size(sample_shape) + self.batch_shape).remainder(2 * math.pi)

    def log_prob(self, value: Tensor) -> Tensor:
        turns = 2 * math.pi * torch.arange(-3, 4)
        return dist.Normal(0.0, 1.0).log_prob(value.remainder(2 * math.pi).unsqueeze(-1) + turns).logsumexp(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return WrappedNormal(torch.Size(batch_shape))


def von_mises() -> Any:
    return dist.VonMises(torch.tensor(0.3), 2.0)


def bivariate() -> Any:
    return dist.SineBivariateVonMises(0.0, 0.0, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.2))


def transformed(*transforms: Any) -> Any:
    return dist.TransformedDistribution(von_mises(), list(transforms))


def mixture() -> Any:
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), 1.0))


PERIODIC: dict[str, Callable[[], Any]] = {
    "von Mises": von_mises,
    "independent": lambda: dist.VonMises(torch.zeros(3), 1.0).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(von_mises(), ()),
    "masked": lambda: von_mises().mask(torch.tensor(True)),
    "scaled": lambda: transformed(AffineTransform(1.0, 3.0)),
    "positive": lambda: transformed(ExpTransform()),
    "folded": lambda: dist.FoldedDistribution(von_mises()),
    "mixture": mixture,
    "masked mixture": lambda: dist.MaskedMixture(torch.tensor(True), von_mises(), dist.Normal(0.0, 1.0)),
    "bivariate": bivariate,
    "skewed": lambda: dist.SineSkewed(bivariate(), torch.tensor([0.2, 0.1])),
    "own": lambda: WrappedNormal(),
    "projected normal": lambda: dist.ProjectedNormal(torch.zeros(2)),
}


def model_of(prior: Callable[[], Any], local: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        if not local:
            pyro.sample("angle", prior())
        with pyro.plate("data", len(x)):
            if local:
                pyro.sample("angle", prior())
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


@pytest.mark.parametrize("local", [True, False], ids=["local", "global"])
@pytest.mark.parametrize("kind", PERIODIC)
def test_periodic_latents_are_refused(kind: str, local: bool) -> None:
    message = "cannot be mapped" if kind == "projected normal" else "is periodic.*ProjectedNormalReparam"
    with pytest.raises(ValueError, match=f"Cannot guide latent 'angle'.*{message}"):
        AmortizedGuide(model_of(PERIODIC[kind], local)).setup(torch.zeros(5))


@pytest.mark.parametrize("prior", [lambda: dist.Normal(0.0, 1.0), lambda: dist.StudentT(1.0)])
@pytest.mark.parametrize("local", [True, False], ids=["local", "global"])
def test_other_latents_are_not(prior: Callable[[], Any], local: bool) -> None:
    AmortizedGuide(model_of(prior, local)).setup(torch.zeros(5))


def test_observed_angles_are_not() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.VonMises(z, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 6)
    guide = AmortizedGuide(model)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x))


def concentration() -> Tensor:
    return torch.tensor([0.7, 0.2])


def directions(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        direction = pyro.sample("angle", dist.ProjectedNormal(concentration()))
        angle = torch.atan2(direction[..., 1], direction[..., 0])
        pyro.sample("x", dist.Normal(torch.stack([angle.cos(), angle.sin()], -1), 0.5).to_event(1), obs=x)


@pytest.mark.slow
def test_the_remedy_gives_the_evidence() -> None:
    pyro.set_rng_seed(0)
    x = directions_data(12)
    model = pyro.poutine.reparam(directions, {"angle": ProjectedNormalReparam()})
    guide = AmortizedGuide(model, family="multivariate_normal")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    estimate = log_evidence(model, guide, (x,))
    angle = torch.linspace(-math.pi, math.pi, 2001)[:-1]
    unit = torch.stack([angle.cos(), angle.sin()], -1)
    likelihood = dist.Normal(unit, 0.5).to_event(1).log_prob(x[:, None])
    prior = dist.ProjectedNormal(concentration()).log_prob(unit)
    exact = torch.logsumexp(prior + likelihood, -1) + math.log(2 * math.pi / 2000)
    error = torch.as_tensor(estimate["log_evidence"].values - exact.numpy())
    assert (error.abs() < 4 * torch.as_tensor(estimate["log_evidence_se"].values)).all()


def directions_data(size: int) -> Tensor:
    angle = (torch.rand(size) * 2 - 1) * math.pi
    return torch.stack([angle.cos(), angle.sin()], -1) + 0.5 * torch.randn(size, 2)
