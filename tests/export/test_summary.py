"""Summaries of posteriors."""

import math
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exports import DEFAULT, FEATURES, KINDS, POINTS, call, exact, group_names, with_likelihood
from models import LinearGaussian, counts, topics
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_amortized import AmortizedGuide
from pyro_amortized.export import posterior_summary, to_arviz

pytestmark = pytest.mark.usefixtures("_float64")


def test_summary_of_a_call() -> None:
    x = counts(POINTS)
    guide = AmortizedGuide(topics)
    guide.setup(x)
    summary = posterior_summary(topics, guide, (x,), quantiles=(0.1, 0.5))
    assert summary["share"].dims == ("quantile", "data", "share_dim_0")
    assert summary["rate"].dims == ("quantile", "topics")
    assert summary["quantile"].values.tolist() == [0.1, 0.5]
    for name, values in guide.quantiles([0.1, 0.5], x).items():
        assert np.allclose(summary[name], values)
    assert summary.attrs["guide"] == "AmortizedGuide"


def test_summary_of_a_loader() -> None:
    x = counts(11)
    guide = AmortizedGuide(topics)
    guide.setup(x)
    once = posterior_summary(topics, guide, (x,))
    joined = posterior_summary(topics, guide, DataLoader(x, batch_size=4), num_samples=300)
    for name in ("size", "share", "rate"):
        assert np.allclose(joined[name], once[name])
        assert joined[f"{name}_draws"].dims == ("draw", *once[name].dims[1:])
    assert joined.sizes["draw"] == 300
    below = (joined["size_draws"] < joined["size"].sel(quantile=0.5)).mean("draw")
    assert (abs(below - 0.5) < 4.5 * math.sqrt(0.25 / 300)).all()
    assert set(once.data_vars) == {"size", "share", "rate"}


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_belong_to_their_datapoints(oracle: LinearGaussian, kind: str) -> None:
    model, args, guide = call(oracle, kind)
    summary = posterior_summary(model, guide, args, num_samples=3)
    mean = oracle.posterior(oracle.simulate(POINTS)).mean.numpy()[summary["data"].values]
    assert np.allclose(summary["z"].sel(quantile=0.5).transpose("data", ...), mean)
    assert set(summary["z_draws"].dims) == {"draw", *KINDS[kind][0]}


def test_summary_of_a_refined_guide(oracle: LinearGaussian) -> None:
    guide = AmortizedGuide(oracle.full)
    x = oracle.simulate(POINTS)
    guide.setup(x)
    summary = posterior_summary(oracle.full, guide.refined(20), (x,))
    error = summary["z"].sel(quantile=0.5).values - oracle.posterior(x).mean.numpy()
    assert np.abs(error).max() < 0.1


def test_summaries_that_cannot_be_made(oracle: LinearGaussian) -> None:
    x = counts(POINTS)
    for quantiles in ((), (0.5, 1.0)):
        with pytest.raises(ValueError, match="Cannot take quantiles .* must lie between 0 and 1"):
            posterior_summary(topics, AmortizedGuide(topics), (x,), quantiles=quantiles)
    with pytest.raises(ValueError, match="Cannot use num_samples=-1"):
        posterior_summary(topics, AmortizedGuide(topics), (x,), num_samples=-1)
    guide = AmortizedGuide(topics, global_guide=AutoDelta)
    assert posterior_summary(topics, guide, (x,), quantiles=(0.5,))["rate"].shape == (1, 3)
    with pytest.raises(ValueError, match=r"Cannot take quantiles of global latents \['rate'\] because AutoDelta"):
        posterior_summary(topics, guide, (x,))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_leave_one_out_is_refused_where_it_would_be_wrong(oracle: LinearGaussian) -> None:
    guide, x = exact(oracle), torch.randn(POINTS, FEATURES)
    with pytest.raises((TypeError, ValueError), match="log.likelihood"):
        arviz.loo(to_arviz(oracle.full, guide, (x,), num_samples=100))
    arviz.loo(with_likelihood(oracle.full, guide, (x,), num_samples=100))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_arguments(layout: str) -> None:
    def model(counts: Tensor) -> None:
        x = counts.to_dense()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp().unsqueeze(-1).expand(z.shape + (6,))).to_event(1), obs=x)

    counts = getattr(torch.poisson(torch.ones(POINTS, 6)), layout)()
    assert group_names(to_arviz(model, AmortizedGuide(model), (counts,), num_samples=3)) == DEFAULT


def test_predictions_of_a_distribution_without_a_sampler_are_refused_with_the_groups_that_can_be_had() -> None:
    class Unsampled(dist.Normal):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            raise NotImplementedError

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Unsampled(z, 1.0), obs=x)

    x, guide = torch.randn(4), AmortizedGuide(model)
    guide(x)
    with pytest.raises(ValueError, match=r"site 'x' because its Unsampled .*; try groups=\[\"posterior\", \"log_lik"):
        to_arviz(model, guide, (x,))
    assert group_names(to_arviz(model, guide, (x,), groups=["posterior", "log_likelihood"])) >= {"log_likelihood"}
