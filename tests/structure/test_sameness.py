"""What a run shows is read once for runs that look alike, and only where all that decides it can be compared."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_amortized import AmortizedGuide


def one_latent(prior: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def loss(model: Any, guide: Any, x: Tensor) -> float:
    pyro.set_rng_seed(0)
    return Trace_ELBO().loss(model, guide, x)


@pytest.mark.parametrize("prior", [lambda x: dist.Normal(0.0, 1.0), lambda x: dist.Gamma(2.0, 1.0)])
def test_a_run_that_looks_like_another_is_not_read_again(prior: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_amortized.structure import reader

    guide, read = AmortizedGuide(one_latent(prior)), []
    guide.setup(torch.ones(3))
    real = reader._read_structure
    monkeypatch.setattr(reader, "_read_structure", lambda *args: read.append(args) or real(*args))
    for size in (3, 4, 3, 4):
        guide(torch.ones(size))
    assert len(read) == 1  # of four datapoints


def test_bounds_that_change_in_a_support_that_is_kept_are_followed() -> None:
    """An ImproperUniform gives the same object in every run, whatever becomes of its bounds."""
    high = torch.tensor(2.0)
    support = constraints.interval(torch.tensor(0.0), high)
    model = one_latent(lambda x: dist.ImproperUniform(support, (), ()))
    x = torch.full((6,), 15.0)
    guide = AmortizedGuide(model)
    guide.setup(x)
    guide(x)
    high.fill_(20.0)
    fresh = AmortizedGuide(model, name="fresh")
    fresh.setup(x)
    fresh.load_state_dict(guide.state_dict())
    assert loss(model, guide, x) == pytest.approx(loss(model, fresh, x), abs=1e-4)


@dataclass
class Above(constraints.Constraint):
    """Which cannot be hashed."""

    bound: float

    def check(self, value: Tensor) -> Tensor:
        return value > self.bound


@biject_to.register(Above)
def _above(support: Above) -> Any:
    return biject_to(constraints.greater_than(support.bound))


def test_supports_of_any_kind_are_served() -> None:
    model = one_latent(lambda x: dist.ImproperUniform(Above(1.0), (), ()))
    guide = AmortizedGuide(model)
    assert all((guide(torch.ones(3))["z"] > 1.0).all() for _ in range(3))
    pickle.dumps(guide.state_dict())


def test_bounds_made_of_the_data_are_not_kept() -> None:
    """Neither in memory nor in copies and files."""
    guide = AmortizedGuide(one_latent(lambda x: dist.Uniform(x - 1.0, x + 1.0)))
    for _ in range(5):
        guide(torch.randn(3))
    assert not guide._structures._read_before
    plain = AmortizedGuide(one_latent(lambda x: dist.Normal(0.0, 1.0)), name="plain")
    plain(torch.randn(3))
    assert plain._structures._read_before
    assert not pickle.loads(pickle.dumps(plain._structures))._read_before


def test_densities_made_of_others_are_read_each_time() -> None:
    """A component that becomes periodic is found, though the support stays the same."""
    other: list[Any] = [dist.Normal(0.0, 1.0)]

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.MaskedMixture(torch.tensor(True), dist.Normal(0.0, 1.0), other[0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    guide(torch.ones(3))
    other[0] = dist.VonMises(0.0, 1.0)
    with pytest.raises(ValueError, match="'shift', a VonMises, because its density is periodic"):
        guide(torch.ones(3))
