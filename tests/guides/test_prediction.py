"""Predictions of data that are not observed: from covariates, from the prior, or refused."""

from __future__ import annotations

import io
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    collapse_report,
    estimate_gaps,
    log_evidence,
    optimize_local,
    simulate,
    to_arviz,
)

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
Y = X.sum(-1)
GUIDES = [AmortizedGuide, SemiAmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide]


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(weight * x.sum(-1), 1.0))
        return pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def two_views(x: Tensor, y: Tensor | None, present: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(z.shape + (2,)), 1.0).to_event(1), obs=x)
        fn = dist.Normal(z, 1.0)
        pyro.sample("y", fn if present is None else fn.mask(present), obs=y)


def trained(Guide: Any, model: Any, *args: Any, num_steps: int = 3, elbo: Any = None, **options: Any) -> Any:
    guide = Guide(model, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo or Trace_ELBO())
    for _ in range(num_steps):
        svi.step(*args)
    return guide


@pytest.mark.thinned
@pytest.mark.parametrize("plate", [None, "data"])
@pytest.mark.parametrize("encoder_input", [None, "x"])
@pytest.mark.parametrize("Guide", GUIDES)
def test_new_datapoints(Guide: Any, encoder_input: str | None, plate: str | None) -> None:
    options = {} if Guide is PerDatapointGuide else {"encoder_input": encoder_input}
    guide = trained(Guide, regression, X, Y, plate=plate, **options)
    stream = io.BytesIO()
    torch.save(guide, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    loaded.model = guide.model = regression
    new = X if Guide is PerDatapointGuide else X[:5]
    for asked, parallel in ((guide, False), (guide, True), (loaded, True)):
        if asked is loaded:
            pyro.clear_param_store()
        found = Predictive(regression, guide=asked, num_samples=4, parallel=parallel)(new)
        assert found["z"].shape == found["y"].shape == (4, len(new))


@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide])
def test_an_encoder_of_covariates_is_asked(Guide: Any) -> None:
    guide = trained(Guide, regression, X, Y, encoder_input="x")
    found = Predictive(regression, guide=guide, num_samples=4000, parallel=True)(X[:5])["z"]
    q = guide.posterior(X[:5])
    error = q.stddev.squeeze(-1) / 4000**0.5
    assert ((found.mean(0) - q.mean.squeeze(-1)).abs() < 4 * error).all()
    prior = found.new_zeros(5)
    assert ((prior - q.mean.squeeze(-1)).abs() > 4 * error).any(), "the prior would pass as well"


def test_latents_of_which_nothing_is_known_have_their_prior_given_the_global_ones() -> None:
    guide = trained(AmortizedGuide, regression, X, Y, num_steps=200)
    found = Predictive(regression, guide=guide, num_samples=4000, parallel=True)(X[:5])
    standard = found["z"] - found["weight"] * X[:5].sum(-1)
    assert abs(standard.mean()) < 4 / 20000**0.5
    assert abs(standard.var() - 1) < 4 * (2 / 20000) ** 0.5
    assert abs(found["weight"].mean()) > 0.2, "the prior of the global latent would pass as well"


@pytest.mark.parametrize("Guide", GUIDES[:3])
def test_what_cannot_be_known_is_refused(Guide: Any) -> None:
    guide = trained(Guide, regression, X, Y)
    for ask in (guide.median, guide.posterior, guide.variational_parameters):
        with pytest.raises(ValueError, match=r"none of the data .*\('y',\).*Predictive"):
            ask(X[:5])
    with pytest.raises(ValueError, match=r"sites \['y'\] are latent in this call.*Predictive"):
        SVI(regression, guide, pyro.optim.Adam({}), Trace_ELBO()).step(X)
    with pytest.raises(ValueError, match=r"sites \['y'\] are latent in this call"):
        guide(X)


@pytest.mark.parametrize("function", [estimate_gaps, log_evidence, collapse_report, optimize_local, to_arviz, simulate])
@pytest.mark.parametrize("plate", [None, "data"])
def test_diagnostics_want_the_data(function: Any, plate: str | None) -> None:
    guide = trained(AmortizedGuide, regression, X, Y, encoder_input="x", plate=plate)
    guide.median(X)
    with pytest.raises(ValueError, match="are latent in this call|no observed site lies in it"):
        function(regression, guide, (X,))


@pytest.mark.parametrize("encoder_input", ["y", lambda x, y=None: y, ["x", "y"], lambda x, y=None: (x, y)])
def test_an_encoder_of_arguments_that_are_not_given_leaves_latents_to_the_prior(encoder_input: Any) -> None:
    guide = trained(AmortizedGuide, regression, X, Y, encoder_input=encoder_input)
    found = Predictive(regression, guide=guide, num_samples=2000, parallel=True)(X[:5])
    assert abs((found["z"] - found["weight"] * X[:5].sum(-1)).var() - 1) < 4 * (2 / 10000) ** 0.5
    both = trained(AmortizedGuide, two_views, X, Y, encoder_input=["x", "y"], name="both")
    with pytest.raises(ValueError, match=r"part of what encoder_input=\['x', 'y'\] gives.*all of them, or none"):
        Predictive(two_views, guide=both, num_samples=2)(X[:5], None)


def test_an_encoder_of_a_function_that_takes_no_none_is_refused() -> None:
    guide = trained(AmortizedGuide, regression, X, Y, encoder_input=lambda x, y=None: x.sum(-1) * y)
    with pytest.raises(ValueError, match=r"\['y'\] are not observed; try returning None in the place"):
        Predictive(regression, guide=guide, num_samples=2)(X[:5])


def test_part_of_the_data_needs_an_encoder_that_shows_masks() -> None:
    guide = trained(AmortizedGuide, two_views, X, Y)
    with pytest.raises(ValueError, match=r"part of the data because sites \['y'\].*mask"):
        Predictive(two_views, guide=guide, num_samples=4)(X[:5], None)
    present = torch.arange(60) % 2 == 0
    masked = trained(AmortizedGuide, two_views, X, Y, present, name="masked")
    found = Predictive(two_views, guide=masked, num_samples=4)(X[:5], None, present[:5])
    assert found["y"].shape == (4, 5)
    absent = torch.zeros(5, dtype=torch.bool)
    expected = masked.variational_parameters(X[:5], torch.zeros(5), absent)
    assert torch.equal(masked.variational_parameters(X[:5], None, absent), expected)


def test_refinement_to_part_of_the_data_is_refused() -> None:
    guide = trained(SemiAmortizedGuide, two_views, X, Y)
    with pytest.raises(ValueError, match=r"refine phi to part of the data because sites \['y'\].*\['x'\].*masks"):
        guide.median(X[:5], None)
    present = torch.arange(60) % 2 == 0
    masked = trained(SemiAmortizedGuide, two_views, X, Y, present, name="masked")
    assert masked.median(X[:5], torch.zeros(5), present[:5])["z"].shape == (5,)


def test_beside_discrete_latents() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + 5.0 * k, 1.0), obs=y)

    guide = trained(DiscreteAmortizedGuide, model, X, Y, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    found = Predictive(model, guide=guide, num_samples=4)(X[:5])
    assert found["k"].shape == found["z"].shape == found["y"].shape == (4, 5)


def test_a_subsampled_model() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), subsample_size=min(4, len(x))) as index:
            z = pyro.sample("z", dist.Normal(x[index].sum(-1), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=None if y is None else y[index])

    guide = trained(AmortizedGuide, model, X, Y)
    assert Predictive(model, guide=guide, num_samples=3)(X[:4])["z"].shape == (3, 4)
    SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step(X, Y)
