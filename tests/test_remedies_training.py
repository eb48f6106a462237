"""What errors in training advise: of parameters that diverge or clash, annealing and free bits."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from remedies import Cases, X, made, model, of_latent, step, train
from torch import Tensor

from pyro_amortized import AmortizedGuide
from pyro_amortized.training import FreeBitsELBO, KLAnnealing, linear_schedule

case = Cases()


def two_guides(**options: Any) -> None:
    pyro.clear_param_store()
    step(model, AmortizedGuide(model))
    step(model, AmortizedGuide(model, **options), X)


def cleared() -> None:
    pyro.clear_param_store()
    step(model, AmortizedGuide(model))
    pyro.clear_param_store()
    step(model, AmortizedGuide(model))


case("another guide's parameters", two_guides, "a name=... of its own", lambda: two_guides(name="other"))
case("another guide's parameters, cleared", two_guides, r"pyro.clear_param_store\(\) before", cleared)


def diverged(optimizer: Any) -> None:
    pyro.clear_param_store()
    guide = AmortizedGuide(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in range(60):
        svi.step(X)
    guide.median(X)


case(
    "diverged parameters",
    lambda: diverged(pyro.optim.SGD({"lr": 1e3})),
    "a smaller learning rate",
    lambda: diverged(pyro.optim.SGD({"lr": 1e-3})),
)
case(
    "diverged parameters, clipped",
    lambda: diverged(pyro.optim.SGD({"lr": 1e3})),
    "pyro.optim.ClippedAdam",
    lambda: diverged(pyro.optim.ClippedAdam({"lr": 1e-2})),
)
ANALYTIC = of_latent(lambda: dist.Gamma(2.0, 1.0))


def annealed() -> None:
    annealing = KLAnnealing(ANALYTIC, made(ANALYTIC), linear_schedule(10))
    step(annealing.model, annealing.guide)


case("free bits without a closed form", lambda: train(ANALYTIC, elbo=FreeBitsELBO(0.1)), "KLAnnealing", annealed)
case(
    "free bits without a closed form, log-normal",
    lambda: train(ANALYTIC, elbo=FreeBitsELBO(0.1)),
    "independent normals or log-normals",
    lambda: train(of_latent(lambda: dist.LogNormal(0.0, 1.0)), elbo=FreeBitsELBO(0.1)),
)
case(
    "a number for a schedule",
    lambda: KLAnnealing(model, made(), 0.5),
    r"linear_schedule\(1000\)",
    lambda: KLAnnealing(model, made(), linear_schedule(1000)),
)
case(
    "annealing of no model",
    lambda: KLAnnealing(3, made(), linear_schedule(10)),
    "the model itself",
    lambda: KLAnnealing(model, made(), linear_schedule(10)),
)
case(
    "free bits per nothing",
    lambda: FreeBitsELBO(0.1, per="nothing"),
    'per="site"',
    lambda: FreeBitsELBO(0.1, per="site"),
)


def without_latents(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


case(
    "free bits without local latents",
    lambda: train(without_latents, elbo=FreeBitsELBO(0.1)),
    "TraceMeanField_ELBO",
    lambda: train(without_latents, elbo=TraceMeanField_ELBO()),
)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
