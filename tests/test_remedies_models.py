"""What errors about models advise: of their latents, scales, masks and plates, and of what changes between calls."""

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.reparam import ProjectedNormalReparam
from remedies import HALF, X2, Cases, X, made, model, of_latent, step, train
from torch import Tensor

from pyro_amortized import AmortizedGuide, DiscreteAmortizedGuide, SemiAmortizedGuide, collapse_report, log_evidence

case = Cases()

# Latents
case(
    "a discrete latent",
    lambda: train(of_latent(lambda: dist.Bernoulli(0.5))),
    "DiscreteAmortizedGuide",
    lambda: train(
        of_latent(lambda: dist.Bernoulli(0.5)), DiscreteAmortizedGuide, elbo=TraceEnum_ELBO(max_plate_nesting=1)
    ),
)


def enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete(x: Tensor, prior: Any = None) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def derived(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        z = pyro.deterministic("z", 2 * u)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


ENUM = TraceEnum_ELBO(max_plate_nesting=1)
case(
    "a discrete latent beside others",
    lambda: train(discrete),
    "summing it out in the model",
    lambda: train(enumerated, elbo=ENUM),
)
case(
    "a latent that is a function of others",
    lambda: train(of_latent(lambda: dist.Delta(torch.tensor(1.0)))),
    "pyro.deterministic",
    lambda: train(derived),
)
case(
    "a Poisson latent",
    lambda: train(of_latent(lambda: dist.Poisson(1.0))),
    "a Categorical over the values that matter",
    lambda: train(of_latent(lambda: dist.Categorical(torch.ones(4))), DiscreteAmortizedGuide, elbo=ENUM),
)
case(
    "a Poisson latent, DiscreteAmortizedGuide",
    lambda: train(of_latent(lambda: dist.Poisson(1.0)), DiscreteAmortizedGuide),
    "a Categorical, OneHotCategorical or Bernoulli prior",
    lambda: train(of_latent(lambda: dist.Categorical(torch.ones(4))), DiscreteAmortizedGuide, elbo=ENUM),
)


def discrete_global(infer: dict[str, Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5), infer=infer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    return model


case(
    "a discrete global latent",
    lambda: train(discrete_global({})),
    "summing it out in the model",
    lambda: train(discrete_global({"enumerate": "parallel"}), elbo=ENUM),
)
JOINED = of_latent(lambda: dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
case(
    "joined discrete latents",
    lambda: train(JOINED, DiscreteAmortizedGuide),
    "temperature=1.0",
    lambda: train(JOINED, DiscreteAmortizedGuide, temperature=1.0),
)
CATEGORICAL = of_latent(lambda: dist.Categorical(torch.ones(3)))
case(
    "a relaxed Categorical",
    lambda: train(CATEGORICAL, DiscreteAmortizedGuide, temperature=1.0),
    "temperature=None",
    lambda: train(CATEGORICAL, DiscreteAmortizedGuide, elbo=ENUM),
)
case(
    "a relaxed Categorical, one-hot",
    lambda: train(CATEGORICAL, DiscreteAmortizedGuide, temperature=1.0),
    "a OneHotCategorical prior",
    lambda: train(of_latent(lambda: dist.OneHotCategorical(torch.ones(3))), DiscreteAmortizedGuide, temperature=1.0),
)
case(
    "phi beside discrete latents",
    lambda: made(discrete, DiscreteAmortizedGuide).posterior(X),
    r"guide.probabilities\(...\) and guide.median",
    lambda: (made(discrete, DiscreteAmortizedGuide).probabilities(X), made(discrete, DiscreteAmortizedGuide).median(X)),
)
case(
    "a diagnostic beside discrete latents",
    lambda: collapse_report(discrete, made(discrete, DiscreteAmortizedGuide), (X,)),
    "sums the discrete latents out",
    lambda: collapse_report(enumerated, made(enumerated), (X,), num_samples=20),
)


def bounded(fraction: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
            if fraction:
                z = top * pyro.sample("share", dist.Uniform(0.0, 1.0))
            else:
                z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a support that depends on a latent",
    lambda: train(bounded(False)),
    "a fraction of the interval",
    lambda: train(bounded(True)),
)
case(
    "a part of an event masked",
    lambda: train(of_latent(lambda: dist.LogNormal(torch.zeros(2), 1.0).mask(HALF).to_event(1))),
    "a mask for whole events",
    lambda: train(of_latent(lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1).mask(torch.tensor(True)))),
)


def scaled(together: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0 if together else 1.0):
            with poutine.scale(scale=1.0 if together else 2.0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    return model


case(
    "scales that differ",
    lambda: train(scaled(False), SemiAmortizedGuide, num_steps=2),
    "one poutine.scale around all",
    lambda: train(scaled(True), SemiAmortizedGuide, num_steps=2),
)
SCALED = poutine.scale(model, 2.0)
case(
    "a scaled prior in a diagnostic",
    lambda: collapse_report(SCALED, made(SCALED), (X,)),
    "arguments that set the scale to 1",
    lambda: collapse_report(model, made(), (X,), num_samples=20),
)


def random_mask(given: bool) -> Callable[..., None]:
    def model(x: Tensor, present: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            present = present if given else torch.rand(len(x)) < 0.5
            with poutine.mask(mask=present):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def random_mask_given() -> None:
    model = random_mask(True)
    step(model, AmortizedGuide(model), X, X > 0)


case("a random mask", lambda: train(random_mask(False)), "a mask that is an argument", random_mask_given)


def in_place(clone: bool) -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        x = x.clone() if clone else x
        x += 1.0
        model(x)

    return other


case(
    "arguments changed in place",
    lambda: train(in_place(False), data=X.clone()),
    r"x = x.clone\(\)",
    lambda: train(in_place(True)),
)


# Plates


def two_plates(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    with pyro.plate("others", len(x)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)


def sequential(vectorised: bool) -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    return model if vectorised else other


def unobserved(x: Tensor | None = None) -> None:
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def unobserved_setup() -> None:
    AmortizedGuide(unobserved, plate="data").setup()


def inner(**options: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 2, dim=-1, **options) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])

    return model


def sizeless(size: int | None) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case("several plates", lambda: train(two_plates), "plate=... with one of", lambda: train(two_plates, plate="rows"))
case("an unknown plate", lambda: train(plate="rows"), r"one of \['data'\]", lambda: train(plate="data"))
case(
    "an unknown plate, in a model without",
    lambda: made(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), plate="rows"),
    r"`with pyro.plate\('rows', ...\):` in the model",
    lambda: train(two_plates, plate="rows"),
)
case(
    "a plate without data", unobserved_setup, "calling the guide with the data", lambda: train(unobserved, plate="data")
)
case("a sequential plate", lambda: train(sequential(False)), "the vectorised form", lambda: train(sequential(True)))
case(
    "an inner plate subsampled",
    lambda: train(inner(subsample_size=1), data=X2),
    "over all of that plate",
    lambda: train(inner(), data=X2),
)
case("a plate without size", lambda: train(sizeless(None)), r"`pyro.plate\('data', 6\)`", lambda: train(sizeless(6)))
case(
    "created plates",
    lambda: made(create_plates=lambda x: pyro.plate("data", 5, dim=-1)),
    "the size that the model gives it",
    lambda: train(create_plates=lambda x: pyro.plate("data", len(x), dim=-1)),
)
case(
    "create_plates that makes none",
    lambda: made(create_plates=lambda x: 6),
    'pyro.plate\\("data", len\\(x\\), dim=-1\\)',
    lambda: train(create_plates=lambda x: pyro.plate("data", len(x), dim=-1)),
)
case(
    "no bijection to the support",
    lambda: train(of_latent(lambda: NoBijection(0.0, 1.0))),
    "another prior for it",
    lambda: train(of_latent(lambda: dist.Normal(0.0, 1.0))),
)


class Unknown(dist.constraints.Constraint):
    """A support that no transform is registered for."""

    def check(self, value: Tensor) -> Tensor:
        return value == value


class NoBijection(dist.Normal):
    support = Unknown()


def size_free(sized: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)) if sized else pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a plate without a size",
    lambda: train(size_free(False)),
    r"pyro.plate\('data', 6\)",
    lambda: train(size_free(True)),
)


def dependent(plated: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if plated:
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)
        if not plated:
            pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=x.sum())

    return model


case(
    "a site outside of the plate that depends on its latents",
    lambda: log_evidence(dependent(False), made(dependent(False)), (X,)),
    "lies in plate 'data'",
    lambda: log_evidence(dependent(True), made(dependent(True)), (X,)),
)


def angle(projected: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if projected:
                direction = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
                z = torch.atan2(direction[..., 1], direction[..., 0])
            else:
                z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return poutine.reparam(model, {"z": ProjectedNormalReparam()}) if projected else model


case("a periodic latent", lambda: train(angle(False)), "ProjectedNormal", lambda: train(angle(True)))


def changing(fixed: bool, what: str) -> Callable[[], Any]:
    """A guide of a model that changes between two calls, or does not."""

    def run() -> None:
        state = {"changed": False}

        def model(x: Tensor) -> None:
            other = state["changed"] and not fixed
            with pyro.plate("rows" if other and what == "plate" else "data", len(x)):
                shape = (3,) if other and what == "shape" else (2,)
                z = pyro.sample(
                    "y" if other and what == "site" else "z", dist.Normal(torch.zeros(shape), 1.0).to_event(1)
                )
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
            if other and what == "global":
                pyro.sample("w", dist.Normal(0.0, 1.0))

        guide = made(model)
        state["changed"] = True
        guide(X)

    return run


for what in ("plate", "shape", "site", "global"):
    case(
        f"another {what} than at first",
        changing(False, what),
        "(the same structure in every call|one guide per structure)",
        changing(True, what),
    )


def forking(fixed: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if fixed or z.mean() > 0:
                z = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a random structure",
    lambda: train(forking(False)),
    "a structure that its arguments decide",
    lambda: train(forking(True)),
)


def iterating(given: bool) -> Callable[..., None]:
    batches = itertools.count()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if given else x + next(batches))

    return model


case(
    "the next data of an iterator",
    lambda: train(iterating(False)),
    "data that are an argument of the model",
    lambda: train(iterating(True)),
)


def twice_scaled(outside: bool) -> None:
    scaled = poutine.scale(model, 2.0)
    guide = made(scaled)
    step(scaled, poutine.scale(guide, 2.0) if outside else guide)


case(
    "a guide scaled twice",
    lambda: twice_scaled(True),
    "the guide without poutine.scale",
    lambda: twice_scaled(False),
)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def coin(enumerate_: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"} if enumerate_ else {})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    return model


case(
    "refined draws of discrete latents",
    lambda: made(coin(False), DiscreteAmortizedGuide).refined(2),
    r"a model that sums the discrete latents out, infer=\{\"enumerate\": \"parallel\"\}, with AmortizedGuide",
    lambda: made(coin(True)).refined(2).median(X),
)
case(
    "probabilities of latents that the model sums out",
    lambda: made(coin(True), DiscreteAmortizedGuide).probabilities(X),
    r"sites without infer=\{\"enumerate\": \"parallel\"\} in the model",
    lambda: made(coin(False), DiscreteAmortizedGuide).probabilities(X)["k"].tolist(),
)


@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
