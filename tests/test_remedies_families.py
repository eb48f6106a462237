"""What errors about families and starting points advise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from remedies import Cases, made, train
from torch import Tensor

from pyro_amortized import Flow, Normal, Structured

case = Cases()

case(
    "start of another shape",
    lambda: made(init_loc_fn=lambda site: torch.zeros(1)),
    r"value.expand\(\(6,\)\)",
    lambda: made(init_loc_fn=lambda site: torch.zeros(1).expand((6,))),
)
case(
    "start that is not finite",
    lambda: made(init_loc_fn=lambda site: torch.full((6,), math.inf)),
    "init_to_median",
    lambda: made(init_loc_fn=pyro.infer.autoguide.init_to_median),
)
case("a family of Pyro's", lambda: made(family=dist.Normal), "one of .*'normal'", lambda: train(family="normal"))
case(
    "a family of another size",
    lambda: made(family=Normal(3)),
    "latent_dim=1, or pass the class",
    lambda: (train(family=Normal(1)), train(family=Normal)),
)
case(
    "parents after their children",
    lambda: Structured(2, torch.ones(2, 2)),
    r"parents.tril\(-1\)",
    lambda: Structured(2, torch.ones(2, 2).tril(-1)),
)
case(
    "an unknown flow",
    lambda: Flow(2, "foo"),
    "one of .*'affine_autoregressive'",
    lambda: Flow(2, "affine_autoregressive"),
)
case("an unknown family", lambda: made(family="student"), "one of .*'normal'", lambda: made(family="normal"))
case("a family that is none", lambda: made(family=3), "one of .*'normal'", lambda: made(family="normal"))
case(
    "a function that makes no family",
    lambda: made(family=lambda latent_dim: latent_dim),
    "a function that returns a VariationalFamily",
    lambda: made(family=lambda latent_dim: Normal(latent_dim)),
)
case(
    "an affine flow of one latent",
    lambda: made(family=lambda latent_dim: Flow(latent_dim, "affine_coupling")),
    "spline_autoregressive",
    lambda: made(family=lambda latent_dim: Flow(latent_dim, "spline_autoregressive")),
)
case(
    "an unknown flow of zuko",
    lambda: Flow(2, "zuko.Nothing"),
    "zuko.NSF",
    lambda: Flow(2, "zuko.NSF"),
)
case(
    "parents of another size",
    lambda: Structured(2, torch.zeros(3, 3, dtype=torch.bool)),
    r"a boolean tensor \(2, 2\)",
    lambda: Structured(2, torch.zeros(2, 2, dtype=torch.bool)),
)


def in_a_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.plate("inner", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(3, -1))


for family in ("normal", "multivariate_normal"):
    case(
        f"a flow where all sites lie in an inner plate, {family}",
        lambda: train(in_a_plate, family="flow"),
        f'"{family}"',
        lambda family=family: train(in_a_plate, family=family),  # type: ignore[misc]
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
