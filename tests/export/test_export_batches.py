"""Exports of resampled draws, and of loaders."""

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exports import POINTS, draws, exact, group_names, mean_error, regression, regression_data, with_likelihood
from models import LinearGaussian
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, psis
from pyro_amortized.export import to_arviz

pytestmark = pytest.mark.usefixtures("_float64")


# Resampling


def test_resampling_leads_to_the_exact_posterior(oracle: LinearGaussian) -> None:
    x = oracle.simulate(POINTS)
    wrong = exact(oracle, shift=0.1, widen=1.3)
    posterior = oracle.posterior(x)
    plain, better = (with_likelihood(oracle.full, wrong, (x,), num_samples=8000, resample=r) for r in (False, True))
    for data, right in ((plain, False), (better, True)):
        z = draws(data, "posterior", "z")
        # resampled draws repeat: their standard errors are at most sqrt(K / ESS) < 2 times those of independent ones
        assert (mean_error(z, posterior.mean.numpy()) < 8) == right
        assert (mean_error(np.square(z - posterior.mean.numpy()), posterior.variance.numpy()) < 8) == right
    assert (better["sample_stats"]["khat"] < 0.7).all()
    assert np.allclose(better["sample_stats"]["khat"], plain["sample_stats"]["khat"])
    khat = psis(torch.tensor(draws(plain, "sample_stats", "log_weight")))[1]
    assert np.allclose(plain["sample_stats"]["khat"], khat)
    likelihood = dist.Normal(torch.tensor(draws(better, "posterior", "z")) @ oracle.weights.T, 1.0).log_prob(x).sum(-1)
    assert np.allclose(draws(better, "log_likelihood", "x"), likelihood)
    assert better["posterior"].attrs["resampled"] == 1


def test_resampled_datapoints_are_independent(oracle: LinearGaussian) -> None:
    data = to_arviz(oracle.full, exact(oracle, widen=1.5), (oracle.simulate(POINTS),), num_samples=4000, resample=True)
    z = draws(data, "posterior", "z")[..., 0]
    correlation = np.corrcoef(z.T)[np.triu_indices(POINTS, 1)]
    assert np.abs(correlation).max() < 4.5 / math.sqrt(2000)
    assert abs(np.corrcoef(z[1:, 0], z[:-1, 0])[0, 1]) < 4.5 / math.sqrt(2000)


def test_resampling_with_global_latents_held() -> None:
    t, y = regression_data()
    guide = AmortizedGuide(regression)
    with pytest.raises(ValueError, match=r"Cannot resample .* global latents \['mu', 'slope'\] are drawn"):
        to_arviz(regression, guide, (t, y), resample=True)
    held = pyro.condition(regression, data=guide.global_median(t, y))
    data = to_arviz(held, guide.refined(10), (t, y), num_samples=4000, resample=True)
    assert set(data["posterior"].data_vars) == {"level"}
    assert set(data["observed_data"].data_vars) == {"y"}
    median = guide.global_median(t, y)
    residual = (y - median["slope"][0] * t).sum(-1)
    mean, variance = (median["mu"] + residual / 0.25) / (1 + 4 / 0.25), 1 / (1 + 4 / 0.25)
    error = (draws(data, "posterior", "level") - mean.numpy()) / math.sqrt(variance)
    assert np.abs(error.mean(0)).max() < 0.1
    assert set(data["posterior"].attrs["global_latents"].split()) == {"none"}


# Batches


def test_a_loader_gives_what_a_single_call_gives(oracle: LinearGaussian) -> None:
    x = oracle.simulate(10)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    joined, once = (to_arviz(oracle.full, exact(oracle), a, num_samples=2000, prior=True) for a in (loader, (x,)))
    assert group_names(joined) == group_names(once)
    for name in group_names(once):
        for variable, values in once[name].data_vars.items():
            assert joined[name][variable].dims == values.dims
            assert joined[name][variable].shape == values.shape
            assert joined[name][variable].dtype == values.dtype
        for coordinate, values in once[name].coords.items():
            assert np.array_equal(joined[name][coordinate], values)
    assert joined["observed_data"]["x"].equals(once["observed_data"]["x"])
    assert np.allclose(joined["sample_stats"]["log_weight"], once["sample_stats"]["log_weight"], atol=1e-10)
    assert mean_error(draws(joined, "posterior", "z"), oracle.posterior(x).mean.numpy()) < 4.5
    assert not np.allclose(draws(joined, "posterior", "z")[:, :4], draws(joined, "posterior", "z")[:, 4:8])


def test_a_loader_of_indices_keeps_them_as_coordinates(oracle: LinearGaussian) -> None:
    x = oracle.simulate(10)

    def model(index: Tensor) -> None:
        oracle.explicit(x, index)

    loader = DataLoader(torch.tensor([7, 2, 9, 0, 4]), batch_size=2)
    data = to_arviz(model, exact(oracle, model), loader, num_samples=5)
    assert data["observed_data"]["data"].values.tolist() == [7, 2, 9, 0, 4]
    assert np.array_equal(data["observed_data"]["x"].values, x.numpy()[[7, 2, 9, 0, 4]])
    assert "constant_data" not in group_names(data)


def test_a_loader_of_mappings(oracle: LinearGaussian) -> None:
    batches = DataLoader([{"x": row} for row in oracle.simulate(5)], batch_size=2)
    data = to_arviz(oracle.full, exact(oracle), batches, num_samples=5)
    assert np.array_equal(data["observed_data"]["x"].values, oracle.simulate(5).numpy())


def test_arguments_that_do_not_run_over_the_plate() -> None:
    def model(x: Tensor, weights: Tensor, number: Tensor, flag: bool = True) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + weights.sum(), 1.0), obs=x)

    weights = torch.randn(3)
    batches = [(torch.randn(4), weights, torch.tensor(0)), (torch.randn(3), weights, torch.tensor(1))]
    constant = to_arviz(model, AmortizedGuide(model), iter(batches), num_samples=5)["constant_data"]
    assert constant["weights"].dims == ("weights_dim_0",)  # also in the batch of as many datapoints
    assert set(constant.data_vars) == {"weights"}  # the number is another in each batch


@pytest.mark.slow
def test_inputs_of_earlier_batches_are_not_kept(oracle: LinearGaussian) -> None:
    alive: list[Any] = []
    most = 0

    def batches() -> Iterator[tuple[Tensor]]:
        nonlocal most
        for seed in range(8):
            x = oracle.simulate(20, seed)
            alive.append(weakref.ref(x))
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            yield (x,)

    to_arviz(oracle.full, exact(oracle), batches(), num_samples=5)
    assert len(alive) == 8
    assert most <= 3  # the batch at hand, the one before, and the one that sized the guide
