"""Loaders whose batches hold more than the model takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    calibrate,
    collapse_report,
    compare_gaps,
    estimate_gaps,
    log_evidence,
    posterior_summary,
    to_arviz,
)

X = torch.randn(12, generator=torch.Generator().manual_seed(0))
FAST = {"tolerance": 0.2, "max_samples": 500}


def model(x: Tensor, scale: float = 1.0) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


PAIRS = DataLoader(TensorDataset(X, (X > 0).float()), batch_size=6)
NAMED: Any = DataLoader([{"x": x, "label": x > 0} for x in X], batch_size=6)
BARE = DataLoader(X, batch_size=6)  # type: ignore[arg-type]

FUNCTIONS = {
    "estimate_gaps": lambda *args, **options: estimate_gaps(*args, **FAST, **options).dataset["elbo"],
    "compare_gaps": lambda m, g, data, **o: compare_gaps(m, [g], {"test": data}, **FAST, **o).dataset["elbo"],
    "log_evidence": lambda *args, **options: log_evidence(*args, **FAST, **options)["log_evidence"],
    "collapse_report": lambda *args, **options: collapse_report(*args, **options).dataset["kl"],
    "calibrate": lambda *args, **options: calibrate(*args, num_simulations=40, **options).dataset["rank"],
    "posterior_summary": lambda *args, **options: posterior_summary(*args, **options)["z"],
    "to_arviz": lambda *args, **options: to_arviz(*args, num_samples=3, **options)["posterior"]["z"],
}


SLOW = {"estimate_gaps", "compare_gaps", "log_evidence"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FUNCTIONS])
def test_to_args_says_what_the_model_takes(name: str) -> None:
    guide, run = AmortizedGuide(model), FUNCTIONS[name]
    guide(X)
    expected = run(model, guide, BARE)
    for loader, to_args in (
        (PAIRS, lambda batch: (batch[0],)),
        (NAMED, lambda batch: ((), {"x": batch["x"]})),
    ):
        assert np.array_equal(run(model, guide, loader, to_args=to_args), expected)


@pytest.mark.parametrize(
    ("loader", "to_args", "match"),
    [
        (
            DataLoader(TensorDataset(X, X, X), batch_size=6),
            None,
            r"takes \(x: .*, with batches of \(a tensor \(6,\), a tensor \(6,\), a tensor \(6,\)\) because of too "
            r"many positional arguments; try to_args=lambda batch: \(batch\[0\],\)",
        ),
        (NAMED, None, r"\{'x': a tensor \(6,\), 'label': .*try to_args=lambda batch: \(batch\['x'\],\)"),
        (
            PAIRS,
            lambda batch: batch[0],
            r"what to_args makes of a batch, a tensor \(6,\).*lambda batch: \(batch\[0\],\)",
        ),
        (PAIRS, lambda batch: (*batch, 1), r"as to_args turns them because of too many positional arguments"),
    ],
)
def test_batches_that_the_model_does_not_take(loader: Any, to_args: Any, match: str) -> None:
    guide = AmortizedGuide(model)
    guide(X)
    with pytest.raises(ValueError, match=match) as error:
        posterior_summary(model, guide, loader, to_args=to_args)
    remedy = str(error.value).partition("to_args=lambda")[2]
    if remedy:
        assert len(posterior_summary(model, guide, loader, to_args=eval(f"lambda{remedy.rstrip('.')}"))["data"]) == 12
