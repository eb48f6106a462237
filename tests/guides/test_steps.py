"""Sites numbered by time, guided from features (N, T, H) that share one head, with another T in every call."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide, estimate_gaps

pytestmark = pytest.mark.usefixtures("_float64")


def sequence(x: Tensor, lengths: Tensor, *, level: bool = False) -> None:
    """Two latents in each step, independent of other steps: z_t ~ N(0, I), w_t ~ N(0, 1), x_t ~ N((z_t, w_t), I)."""
    present = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
    with pyro.plate("data", len(x)):
        if level:
            pyro.sample("level", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(x.shape[1])):
            mask = present[:, t : t + 1]
            z = pyro.sample(f"z_{t}", dist.Normal(torch.zeros(2), 1.0).mask(mask).to_event(1))
            w = pyro.sample(f"w_{t}", dist.Normal(0.0, 1.0).mask(mask[:, 0]))
            loc = torch.cat([z, w.unsqueeze(-1)], -1)
            pyro.sample(f"x_{t}", dist.Normal(loc, 1.0).mask(mask).to_event(1), obs=x[:, t])


class Steps(nn.Module):
    """The data as features; after a head that halves them, the exact posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, length, 3, generator=generator), torch.randint(1, length + 1, (size,), generator=generator)


def log_evidence(x: Tensor, lengths: Tensor) -> Tensor:
    present = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
    return (dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum(-1) * present).sum(-1)


def exact(Guide: Any = AmortizedGuide, **options: Any) -> Any:
    guide = Guide(sequence, Steps(), encoder_input="x", **options)
    guide.setup(*batch(5, 4))
    with torch.no_grad():
        head = (guide.inference if Guide is AmortizedGuide else guide.inference.initial).head.heads[0]
        head.weight.copy_(torch.cat([0.5 * torch.eye(3), torch.zeros(3, 3)]) * head.size)
        head.bias.copy_(torch.tensor([0.0] * 3 + [-0.5 * math.log(2.0)] * 3))
    return guide


def test_exact_for_every_number_of_steps() -> None:
    guide = exact()
    for size, length in ((5, 4), (3, 7), (6, 1), (5, 4)):
        args = batch(size, length)
        assert -Trace_ELBO().loss(sequence, guide, *args) == pytest.approx(log_evidence(*args).sum().item(), abs=1e-9)
        assert guide.posterior(*args).event_shape == (3 * length,)
        assert guide.median(*args)[f"z_{length - 1}"].shape == (size, 2)


def test_steps_of_one_length_are_not_those_of_another() -> None:
    """The twin: a head that mixes the steps up."""
    guide = exact()
    args = batch(5, 4)
    x = args[0].roll(1, 1)
    with torch.no_grad():
        wrong = guide.variational_parameters(x, args[1]) - guide.variational_parameters(*args)
    assert wrong.abs().max() > 0.1


@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide])
def test_trains_on_any_number_of_steps(Guide: Any, Elbo: Any) -> None:
    options = {} if Guide is AmortizedGuide else {"num_steps": 3}
    guide = Guide(sequence, Steps(), encoder_input="x", **options)
    svi = SVI(sequence, guide, pyro.optim.Adam({"lr": 0.05}), Elbo())
    losses = [svi.step(*batch(20, length)) / (20 * length) for length in (3, 2) * 12]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.slow
def test_refined_and_diagnosed_at_any_length() -> None:
    guide = AmortizedGuide(sequence, Steps(), encoder_input="x")
    guide.setup(*batch(5, 4))
    for length in (2, 5):
        args = batch(4, length)
        gaps = estimate_gaps(sequence, guide, args).dataset
        assert abs(gaps["log_evidence"].values - log_evidence(*args).numpy()).max() < 0.05
        assert abs(gaps["elbo_optimal"].values - log_evidence(*args).numpy()).max() < 1e-3
        refined = guide.refined(80)
        loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss(
            sequence, refined, *args
        )
        assert -loss == pytest.approx(log_evidence(*args).sum().item(), abs=0.2)


def test_state_dict_fits_any_length() -> None:
    guide, other = exact(), AmortizedGuide(sequence, Steps(), encoder_input="x", name="other")
    other.setup(*batch(2, 9))
    other.load_state_dict(guide.state_dict())
    args = batch(3, 6)
    assert torch.equal(other.variational_parameters(*args), guide.variational_parameters(*args))


def mixed(x: Tensor, lengths: Tensor) -> None:
    sequence(x, lengths, level=True)


def test_what_cannot_be_shared_is_refused() -> None:
    args = batch(5, 4)
    for options, match in (({"family": "multivariate_normal"}, "not numbered alike"), ({}, "not numbered alike")):
        model = sequence if options else mixed
        with pytest.raises(ValueError, match=match):
            AmortizedGuide(model, Steps(), encoder_input="x", **options)(*args)
    with pytest.raises(ValueError, match=r"try an encoder from \(N, ...\) to \(N, H\)"):
        IterativeAmortizedGuide(sequence, Steps(), encoder_input="x")(*args)
    short = AmortizedGuide(sequence, Steps(), encoder_input=lambda x, lengths: x[:, :3], name="short")
    with pytest.raises(ValueError, match="as many steps T as the model has"):
        short(*args)
    for Guide, options in ((PerDatapointGuide, {}), (AmortizedGuide, {"encoder_input": lambda x, lengths: x[:, 0]})):
        guide = Guide(sequence, name=Guide.__name__, **options)
        guide(*args)
        with pytest.raises(ValueError, match=r"'z_3' is no longer a latent.*features \(N, T, H\)"):
            guide(*batch(5, 3))
