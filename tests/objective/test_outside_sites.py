"""Sites outside of the datapoint plate that depend on its latents: SVI counts them, what would lose them refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    IterativeAmortizedGuide,
    SemiAmortizedGuide,
    calibrate,
    collapse_report,
    estimate_gaps,
    log_evidence,
    optimize_local,
    posterior_summary,
    to_arviz,
)

N, J = 6, 3
PERSON = torch.arange(N).repeat_interleave(J)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def persons(x: Tensor) -> Tensor:
    with pyro.plate("persons", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return z


def responses(x: Tensor, y: Tensor) -> None:
    z = persons(x)
    with pyro.plate("responses", N * J):
        pyro.sample("y", dist.Normal(z[..., PERSON], 0.5), obs=y)


def nested(x: Tensor, y: Tensor) -> None:
    """The remedy: the same model with its responses in the plate."""
    with pyro.plate("persons", N, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.unsqueeze(-1))
        with pyro.plate("items", J, dim=-1):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y.view(N, J))


def subsampled(x: Tensor, y: Tensor) -> None:
    z = persons(x)
    with pyro.plate("responses", N * J, subsample_size=5) as index:
        pyro.sample("y", dist.Normal(z[..., PERSON[index]], 0.5), obs=y[index])


def factor(x: Tensor, y: Tensor) -> None:
    pyro.factor("smooth", -persons(x).diff(dim=-1).square().sum(-1))


def threshold(x: Tensor, y: Tensor) -> None:
    """Felt two prior standard deviations out only."""
    pyro.factor("limit", -1e-6 * (persons(x) - 2.0).relu().sum(-1))


def totals(x: Tensor, y: Tensor) -> None:
    pyro.sample("total", dist.Normal(persons(x).sum(-1), 1e4), obs=y.sum())


def masked(x: Tensor, y: Tensor) -> None:
    z = persons(x)
    with pyro.plate("responses", N * J), poutine.mask(mask=torch.arange(N * J) > 14), poutine.scale(scale=0.1):
        pyro.sample("y", dist.Normal(z[..., PERSON], 0.5), obs=y)


def latent(x: Tensor, y: Tensor) -> None:
    """A global latent whose prior depends on local ones."""
    pyro.sample("mean", dist.Normal(persons(x).mean(-1), 1.0))


def constrained(x: Tensor, y: Tensor) -> None:
    with pyro.plate("persons", N):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(rate, 1.0), obs=x)
    pyro.sample("total", dist.Poisson(rate.sum(-1)), obs=torch.tensor(7.0))


DEPENDENT: dict[str, tuple[Callable[..., None], str]] = {
    "responses": (responses, "observed site 'y', in plate 'responses'"),
    "subsampled": (subsampled, "observed site 'y', in plate 'responses'"),
    "factor": (factor, "observed site 'smooth', in no plate"),
    "threshold": (threshold, "observed site 'limit', in no plate"),
    "totals": (totals, "observed site 'total', in no plate"),
    "masked": (masked, "observed site 'y', in plate 'responses'"),
    "latent": (latent, "latent site 'mean', in no plate"),
    "constrained": (constrained, "observed site 'total', in no plate"),
}
"""Models, and how their site is named."""


def data() -> tuple[Tensor, Tensor]:
    z = torch.randn(N)
    return z + torch.randn(N), z[PERSON] + 0.5 * torch.randn(N * J)


@pytest.mark.parametrize("name", DEPENDENT)
def test_refinement_and_diagnostics_refuse(name: str) -> None:
    model, text = DEPENDENT[name]
    args = data()
    guide = AmortizedGuide(model, plate="persons", encoder_input="x")
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*args)
    for use in (
        lambda: guide.refined(2)(*args),
        lambda: estimate_gaps(model, guide, args),
        lambda: to_arviz(model, guide, args, num_samples=1),
    ):
        with pytest.raises(ValueError, match=f"Cannot evaluate the datapoints.*{text}"):
            use()


@pytest.mark.parametrize("function", [log_evidence, optimize_local, collapse_report, calibrate])
def test_every_diagnostic_refuses(function: Any) -> None:
    args = data()
    guide = AmortizedGuide(responses, plate="persons")
    with pytest.raises(ValueError, match="depends on local latents"):
        function(responses, guide, args)


@pytest.mark.parametrize("make", [SemiAmortizedGuide, IterativeAmortizedGuide])
def test_refining_guides_refuse(make: Any) -> None:
    args = data()
    with pytest.raises(ValueError, match=r"or an AmortizedGuide as it is, trained by SVI"):
        Trace_ELBO().loss(responses, make(responses, plate="persons"), *args)


def test_log_weights_are_refused_beside_a_global_guide_without_a_median() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("scale", dist.Dirichlet(torch.ones(2)))
        responses(x, y)

    class NoMedian(AutoMultivariateNormal):
        def median(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    args = data()
    guide = AmortizedGuide(model, plate="persons", global_guide=NoMedian)
    with pytest.raises(ValueError, match="depends on local latents"):
        to_arviz(model, guide, args, num_samples=2)
    draws = to_arviz(model, guide, args, num_samples=2, groups=["posterior", "posterior_predictive"])
    assert draws["posterior_predictive"]["y"].shape == (1, 2, N * J)


def log_evidence_of(x: Tensor, y: Tensor) -> Tensor:
    variance = torch.ones(J + 1, J + 1) + torch.diag(torch.tensor([1.0] + [0.25] * J))
    return dist.MultivariateNormal(torch.zeros(J + 1), variance).log_prob(torch.cat([x[:, None], y.view(N, J)], 1))


class Exact(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        precision = 2.0 + 4.0 * J
        return (x.view(N, 1) + 4.0 * y.view(N, J).sum(-1, keepdim=True)) / precision, x.new_full(
            (N, 1), precision**-0.5
        )


def test_remedies() -> None:
    """The guide as it is: its ELBO is exact. The responses in the plate: so are diagnostics and refinement."""
    args = data()
    exact = log_evidence_of(*args)
    guide = AmortizedGuide(responses, Exact(), plate="persons", encoder_input=["x", "y"])
    assert -Trace_ELBO().loss(responses, guide, *args) == pytest.approx(float(exact.sum()))
    assert posterior_summary(responses, guide, args)["z"].dims == ("quantile", "persons")
    guide = AmortizedGuide(nested, Exact(), name="nested", encoder_input=["x", "y"])
    found = estimate_gaps(nested, guide, args).dataset["log_evidence"].values
    torch.testing.assert_close(torch.tensor(found), exact, atol=3e-3, rtol=0.0)
    loss = Trace_ELBO().loss(nested, guide.refined(3), *args)
    assert loss == pytest.approx(-float(exact.sum()), abs=0.05)


def test_sites_outside_that_depend_on_nothing_local_are_served() -> None:
    """Other data, subsampled anew in every run, a regularising factor, a total of the data, a discrete latent."""

    def model(x: Tensor, y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("prior", -loc.square())
        pyro.sample("sum", dist.Normal(loc, 9.0), obs=x.sum())
        pyro.deterministic("total", persons(x - loc).sum(-1))
        with pyro.plate("others", N * J, subsample_size=4) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    args = data()
    guide = AmortizedGuide(model, plate="persons", encoder_input="x")
    guide.setup(*args)
    guide.refined(2)(*args)
    assert "log_evidence" in estimate_gaps(model, guide, args).dataset


def test_an_enumerated_latent_beside_the_plate() -> None:
    """A total that depends on local latents through an enumerated one."""

    def model(x: Tensor) -> None:
        z = persons(x)
        with pyro.plate("votes", 2):
            k = pyro.sample(
                "k", dist.Bernoulli(torch.sigmoid(z.sum(-1, keepdim=True))), infer={"enumerate": "parallel"}
            )
            pyro.sample("v", dist.Normal(k, 1.0), obs=torch.zeros(2))

    x, _ = data()
    guide = AmortizedGuide(model, plate="persons")
    TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    for use in (lambda: guide.refined(2)(x), lambda: estimate_gaps(model, guide, (x,))):
        with pytest.raises(ValueError, match="Cannot evaluate"):
            use()


@pytest.mark.slow
def test_random_numbers_of_the_model_are_no_dependence() -> None:
    """Dropout outside of the plate gives other numbers in every run; single precision is compared to the last digit."""
    torch.set_default_dtype(torch.float32)
    drop = nn.Dropout()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("noisy", dist.Normal(drop(torch.ones(5)), 1.0).to_event(1), obs=torch.zeros(5))
        persons(x)

    x = torch.randn(N)
    guide = AmortizedGuide(model, plate="persons")
    guide.setup(x, x)
    assert guide.refined(2).median(x, x)["z"].shape == (N,)
