"""Estimates of the log evidence of datapoints that are hard: right, or flagged."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hard_evidence import DEVELOPED, HELD_OUT, Hard
from torch import Tensor

from pyro_amortized import AmortizedGuide, LocalOptimum, log_evidence

pytestmark = pytest.mark.usefixtures("_float64")


def heavy_tails(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.StudentT(1.0, 0.0, 0.1))
        pyro.sample("x", dist.StudentT(1.0, z, 0.1), obs=x)


def test_modes_between_heavy_tails_are_found() -> None:
    """One mode at the prior, one at the observation, a hundred scales away: the sum of two Cauchys is one."""
    x = torch.tensor([5.0, 10.0, 20.0, 40.0])
    guide = AmortizedGuide(heavy_tails)
    data = log_evidence(heavy_tails, guide, (x,), optimum=as_it_is(guide, x))
    error = data["log_evidence"] - dist.StudentT(1.0, 0.0, 0.2).log_prob(x).numpy()
    assert np.abs(error).max() < 0.01
    assert data["reliable"].all()


def signs(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.05).to_event(1), obs=x)


@pytest.mark.slow
def test_all_changes_of_sign_are_found() -> None:
    """16 modes of equal mass, by products of one-dimensional quadratures."""
    x = torch.tensor([[1.0, 0.8, 1.5, 2.0], [0.5, 0.7, 3.0, 1.0]])
    z = torch.linspace(0.0, 4.0, 40001)[:, None, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), 0.05).log_prob(x)
    truth = (log_joint.logsumexp(0) + math.log(2e-4)).sum(-1).numpy()
    guide = AmortizedGuide(signs)
    result = log_evidence(signs, guide, (x,), optimum=as_it_is(guide, x))
    assert np.abs(result["log_evidence"] - truth).max() < 0.03
    assert result["reliable"].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mass_where_the_transform_saturates_counts(dtype: torch.dtype) -> None:
    """Successes alone under a prior of small shapes: a third of the mass lies where floats round to 1."""
    total = torch.tensor([1.0, 1000.0], dtype=dtype)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(x.new_tensor(0.1), 0.1))
            pyro.sample("x", dist.Binomial(total, z), obs=x)

    torch.set_default_dtype(dtype)
    guide = AmortizedGuide(model)
    result = log_evidence(model, guide, (total,), optimum=as_it_is(guide, total))
    shape = torch.tensor(0.1, dtype=torch.float64)
    truth = dist.BetaBinomial(shape, shape, total.double()).log_prob(total.double())
    assert np.abs(result["log_evidence"] - truth.numpy()).max() < 0.02
    assert result["reliable"].all()


def as_it_is(guide: AmortizedGuide, *args: Any) -> LocalOptimum:
    """The guide's own phi, of an ELBO that is unknown, in place of the best one, which only costs draws."""
    guide.setup(*args)
    phi = guide.variational_parameters(*args).detach()
    unknown = torch.full((len(phi),), math.inf)
    return LocalOptimum(phi, phi, *[unknown] * 8, dataset=None)  # type: ignore[arg-type]


def judged(hard: Hard) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which estimates are off by more than four standard errors, and which count as reliable."""
    guide = AmortizedGuide(hard.model)
    result = log_evidence(hard.model, guide, hard.args, optimum=as_it_is(guide, *hard.args), max_samples=4000)
    error = np.abs(result["log_evidence"].values - hard.truth.numpy())
    return (error > 4 * result["log_evidence_se"].values) & (error > 1e-4), result["reliable"].values


@pytest.mark.slow
def test_hard_datapoints_are_right_or_flagged() -> None:
    """Of all, and of those reliable, at most 1% are off by more than four standard errors without a word."""
    rows = []
    for name, make in {**DEVELOPED, **HELD_OUT}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        wrong, reliable = judged(make())
        rows.append((len(wrong), wrong.sum(), (wrong & ~reliable).sum(), (wrong & reliable).sum(), reliable.sum()))
        print(f"{name:20s} {len(wrong):4d} wrong {rows[-1][1]:3d} flagged {rows[-1][2]:3d} silent {rows[-1][3]:3d} "
              f"reliable {reliable.mean():.0%}")  # fmt: skip
    count, _, _, silent, reliable_count = np.sum(rows, 0)
    assert silent <= 0.01 * count
    assert reliable_count >= 0.7 * count
