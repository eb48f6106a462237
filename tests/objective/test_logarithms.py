from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch

from pyro_amortized.objective.enumeration import _take_logarithms_once

PROBS = torch.rand(5, 1, 8, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: dist.Categorical(PROBS), torch.arange(8)[:, None, None]),
        (lambda: dist.Categorical(logits=PROBS), torch.arange(8)[:, None, None]),
        (lambda: dist.OneHotCategorical(PROBS), torch.eye(8)[:, None, None]),
        (lambda: dist.Bernoulli(PROBS[..., 0]), torch.ones(())),
    ],
    ids=["probabilities", "logits", "one-hot", "Bernoulli"],
)
def test_logarithms_of_probabilities_that_a_plate_repeats(
    make: Callable[[], dist.TorchDistribution], value: torch.Tensor
) -> None:
    expected = make().expand([5, 64]).log_prob(value)
    fn = make().expand([5, 64]).to_event(0)
    _take_logarithms_once(fn)
    assert torch.equal(fn.log_prob(value), expected)


def test_they_are_taken_once_and_have_gradients() -> None:
    probs = PROBS.clone().requires_grad_()
    fn = dist.Categorical(probs).expand([5, 64])
    _take_logarithms_once(fn)
    assert fn.logits.stride()[1] == 0
    (found,) = torch.autograd.grad(fn.log_prob(torch.tensor(3)).sum(), probs)
    (expected,) = torch.autograd.grad(dist.Categorical(probs).expand([5, 64]).log_prob(torch.tensor(3)).sum(), probs)
    assert torch.allclose(found, expected)
