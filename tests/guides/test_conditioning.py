"""Local latents conditioned on the draw of the global ones, q(theta) q(z | x, theta)."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, SemiAmortizedGuide, estimate_gaps

pytestmark = pytest.mark.usefixtures("_float64")


def model(x: Tensor) -> None:
    """theta ~ N(0, 1), z_n ~ N(theta, 1), x_n ~ N(z_n, 1): given theta, z_n ~ N((x_n + theta) / 2, 1/2)."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Exact(nn.Module):
    """q(z | x, theta) of the model: the locations need theta."""

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        loc = (x.unsqueeze(-1) + theta) / 2
        return loc, torch.full_like(loc, 0.5**0.5)


def set_globals(guide: AmortizedGuide, x: Tensor) -> None:
    """The exact posterior of theta: x_n ~ N(theta, 2)."""
    precision = 1.0 + len(x) / 2
    guide.global_guide.locs.theta = torch.as_tensor(x.sum() / 2 / precision)
    guide.global_guide.scales.theta = torch.as_tensor(precision**-0.5)


def log_evidence(x: Tensor) -> Tensor:
    return dist.MultivariateNormal(torch.zeros(len(x)), 2 * torch.eye(len(x)) + torch.ones(len(x), len(x))).log_prob(x)


def test_exact_posterior_of_both_gives_the_evidence_without_variance() -> None:
    x = torch.randn(5)
    guide = AmortizedGuide(model, Exact(), encoder_input=["x", "theta"])
    guide.setup(x)
    set_globals(guide, x)
    for _ in range(3):
        torch.testing.assert_close(-Trace_ELBO().loss(model, guide, x), log_evidence(x).item())
    blind = AmortizedGuide(model, name="blind")  # the twin: one q(z | x) for all theta is not exact
    blind.setup(x)
    set_globals(blind, x)
    losses = [Trace_ELBO().loss(model, blind, x) for _ in range(3)]
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.slow
def test_training_finds_the_dependence() -> None:
    x = torch.randn(6) + 1.0
    guide = AmortizedGuide(model, nn.Identity(), encoder_input=["features", "theta"])
    with pytest.raises(ValueError, match=r"no argument of that name; try one of \['x', 'theta'\]"):
        guide.setup(x)

    class Features(nn.Module):
        def forward(self, x: Tensor, theta: Tensor) -> Tensor:
            return torch.cat([x.unsqueeze(-1), theta], -1)

    guide = AmortizedGuide(model, Features(), encoder_input=["x", "theta"])
    elbo = TraceMeanField_ELBO(num_particles=4)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.997}), elbo)
    for _ in range(1200):
        svi.step(x)
    draws = torch.tensor([-Trace_ELBO().loss(model, guide, x) for _ in range(200)])
    assert log_evidence(x) - draws.mean() < 0.03
    head = guide.inference.head
    coefficients = (head.weight[0] / head.size).detach()
    torch.testing.assert_close(coefficients, torch.full((2,), 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("Guide", [SemiAmortizedGuide, IterativeAmortizedGuide])
def test_refining_guides(Guide: Any) -> None:
    x = torch.randn(5)
    guide = Guide(model, encoder_input=["x", "theta"], num_steps=2)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    assert guide(torch.randn(3))["z"].shape == (3,)


def test_diagnostics_hold_theta_at_its_median() -> None:
    x = torch.randn(5)
    guide = AmortizedGuide(model, Exact(), encoder_input=["x", "theta"])
    guide.setup(x)
    set_globals(guide, x)
    torch.testing.assert_close(guide.median(x)["z"], (x + guide.global_median(x)["theta"]) / 2)
    gaps = estimate_gaps(model, guide, (x,)).dataset
    assert float(gaps["inference_gap"].max()) < 1e-3
    assert Predictive(model, guide=guide, num_samples=7)(x)["z"].shape == (7, 5)


def test_vectorised_particles_are_refused() -> None:
    x = torch.randn(5)
    guide = AmortizedGuide(model, Exact(), encoder_input=["x", "theta"])
    guide.setup(x)
    with pytest.raises(ValueError, match="there is one phi per datapoint; try vectorize_particles=False"):
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
