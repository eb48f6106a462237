"""What exports can be asked for, and what they refuse."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exports import (
    LATENTS,
    POINTS,
    Function,
    as_datasets,
    draws,
    exact,
    group_names,
    linear_regression,
    mean_error,
    regression,
    regression_data,
    with_likelihood,
)
from models import LinearGaussian, counts, topics
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_amortized import AmortizedGuide, SemiAmortizedGuide
from pyro_amortized.export import posterior_summary, to_arviz

pytestmark = pytest.mark.usefixtures("_float64")


# What was asked for


def test_groups_asked_for(oracle: LinearGaussian) -> None:
    args = (oracle.simulate(POINTS),)
    for groups in (["posterior"], ["log_likelihood", "prior"], {"posterior_predictive"}, "sample_stats"):
        data = to_arviz(oracle.full, exact(oracle), args, num_samples=5, groups=groups)
        assert group_names(data) == ({groups} if isinstance(groups, str) else set(groups))


def test_numbers_of_draws(oracle: LinearGaussian) -> None:
    args = (oracle.simulate(POINTS),)
    data = to_arviz(oracle.full, exact(oracle), args, num_samples=1, prior=True, num_prior_samples=7)
    assert (data["posterior"].sizes["draw"], data["prior"].sizes["draw"]) == (1, 7)
    assert data["prior_predictive"].sizes["draw"] == 7


def test_the_prior(oracle: LinearGaussian) -> None:
    data = to_arviz(oracle.full, exact(oracle), (oracle.simulate(POINTS),), num_samples=4000, prior=True)
    z = draws(data, "prior", "z")
    assert mean_error(z, np.zeros(z.shape[1:])) < 4.5
    assert mean_error(np.square(z), np.ones(z.shape[1:])) < 4.5
    noise = draws(data, "prior_predictive", "x") - z @ oracle.weights.T.numpy()
    assert mean_error(np.square(noise), np.ones(noise.shape[1:])) < 4.5
    assert mean_error(draws(data, "posterior", "z"), np.zeros(z.shape[1:])) > 6


@pytest.mark.parametrize("model", [topics, linear_regression], ids=["together", "one_by_one"])
def test_the_seed_decides(model: Any) -> None:
    args = (counts(POINTS),) if model is topics else (torch.randn(5, 2), torch.randn(5))
    guide = AmortizedGuide(model)
    guide.setup(*args)
    state = torch.get_rng_state()
    first, again, other = (to_arviz(model, guide, args, num_samples=10, seed=seed, prior=True) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert as_datasets(first).keys() == as_datasets(again).keys()
    assert all(values.equals(as_datasets(again)[name]) for name, values in as_datasets(first).items())
    assert not as_datasets(first)["posterior"].equals(as_datasets(other)["posterior"])
    assert first["posterior"].attrs["seed"] == 1


def test_dtypes_are_kept() -> None:
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x.float())

    x = torch.tensor([0, 1, 1], dtype=torch.uint8)
    data = to_arviz(model, AmortizedGuide(model), (x,), num_samples=30)
    for group, name in [("posterior", "z"), ("sample_stats", "log_weight"), ("observed_data", "x")]:
        assert data[group][name].dtype == np.float32
    assert "constant_data" not in group_names(data)  # the observed values in another dtype


def test_attributes() -> None:
    t, y = regression_data()
    data = with_likelihood(regression, SemiAmortizedGuide(regression), (t, y), num_samples=5, seed=3)
    for name in group_names(data):
        attributes = data[name].attrs
        assert attributes["inference_library"] == "pyro_amortized"
        assert attributes["inference_library_version"]
        assert (attributes["guide"], attributes["family"], attributes["seed"]) == ("SemiAmortizedGuide", "Normal", 3)
        assert attributes["datapoint_plate"] == "groups"
    assert data["sample_stats"]["log_weight"].attrs["units"] == "nats"
    assert data["log_likelihood"]["y"].attrs["units"] == "nats"


def test_progress(oracle: LinearGaussian, capsys: pytest.CaptureFixture[str]) -> None:
    to_arviz(oracle.full, exact(oracle), (oracle.simulate(POINTS),), num_samples=12, progress=True)
    assert "12/12" in capsys.readouterr().err
    to_arviz(oracle.full, exact(oracle), iter([(oracle.simulate(3),)] * 2), num_samples=12)
    posterior_summary(oracle.full, exact(oracle), DataLoader(oracle.simulate(9), batch_size=4), progress=True)
    assert "3/3" in capsys.readouterr().err


# What cannot be done


def test_other_guides_are_refused(oracle: LinearGaussian) -> None:
    guide = AutoNormal(oracle.full)
    for function in (to_arviz, posterior_summary):
        with pytest.raises(ValueError, match="Cannot export the posterior of a AutoNormal .*; try an AmortizedGuide"):
            function(oracle.full, guide, (oracle.simulate(POINTS),))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "Cannot use num_samples=0 because"),
        ({"num_samples": 2.5}, "Cannot use num_samples=2.5 because"),
        ({"num_prior_samples": True}, "Cannot use num_prior_samples=True because"),
        ({"groups": ["posterior", "loo"]}, r"Cannot make groups \['loo'\] because they are unknown; try"),
    ],
)
def test_bad_options(oracle: LinearGaussian, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_arviz(oracle.full, exact(oracle), (oracle.simulate(POINTS),), **options)


def test_bad_arguments(oracle: LinearGaussian) -> None:
    x = oracle.simulate(POINTS)
    with pytest.raises(ValueError, match=r"Cannot call the model with model_args=<Tensor>"):
        to_arviz(oracle.full, exact(oracle), x)
    with pytest.raises(ValueError, match=r"the DataLoader shuffles"):
        to_arviz(oracle.full, exact(oracle), DataLoader(x, shuffle=True))
    with pytest.raises(ValueError, match="the guide was made for another one"):
        to_arviz(
            pyro.condition(oracle.full, {"z": torch.zeros(POINTS, LATENTS)}), exact(oracle), (x,), groups="posterior"
        )


def test_resampling_without_local_latents() -> None:
    args = (torch.randn(5, 2), torch.randn(5))
    with pytest.raises(ValueError, match="Cannot resample .* because the model has no local latents"):
        to_arviz(linear_regression, AmortizedGuide(linear_regression), args, resample=True)


def test_batches_that_do_not_fit_together() -> None:
    def model(x: Tensor, outside: Tensor) -> None:
        pyro.sample("outside", dist.Normal(0.0, 1.0).expand(outside.shape).to_event(), obs=outside)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(model, Function(lambda x: x[:, :2]))
    ragged = [(torch.randn(3, 2), torch.zeros(2)), (torch.randn(3, 4), torch.zeros(2))]
    with pytest.raises(ValueError, match="Cannot join .* dimension 'inner' has size 2 in the first and 4 in a"):
        to_arviz(model, guide, iter(ragged), num_samples=5)
    changing = [(torch.randn(3, 2), torch.zeros(2)), (torch.randn(3, 2), torch.ones(2))]
    with pytest.raises(ValueError, match=r"observed sites \['outside'\] lie outside of plate 'data' and differ"):
        to_arviz(model, guide, iter(changing), num_samples=5)


def test_weights_that_are_not_numbers() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((1.5 + z).sqrt(), 1.0), obs=x)

    guide = AmortizedGuide(model, Function(lambda x: (torch.zeros(len(x), 1), torch.ones(len(x), 1))))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="not a number|not finite"):
        to_arviz(model, guide, (torch.randn(3),), num_samples=2000)
