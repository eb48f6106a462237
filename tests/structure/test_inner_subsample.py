"""A subsampled plate inside of the datapoint plate: the encoder sees all entries, whichever were drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, PerDatapointGuide, estimate_gaps, posterior_summary, to_arviz

N, M, B = 3, 8, 3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


class Exact(nn.Module):
    """The posterior given all entries; keeps what it has seen."""

    def forward(self, x: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = x
        x = x.reshape(len(x), -1)
        size = x.shape[1]
        return x.sum(1, keepdim=True) / (size + 1), x.new_full((len(x), 1), (size + 1) ** -0.5)


def random(y: Tensor) -> None:
    with pyro.plate("d", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("entries", M, subsample_size=B, dim=-1) as i:
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[:, i])


def explicit(y: Tensor, index: Tensor) -> None:
    with pyro.plate("d", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("entries", M, subsample=index, dim=-1) as i:
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[:, i])


def left(y: Tensor) -> None:
    datapoints = pyro.plate("d", len(y), dim=-1)
    with datapoints:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with datapoints, pyro.plate("entries", M, subsample_size=B, dim=-2):
        pyro.sample("y", dist.Normal(a, 1.0), obs=pyro.subsample(y.T, event_dim=0))


def both(y: Tensor) -> None:
    """The datapoints are subsampled too."""
    with pyro.plate("d", len(y), subsample_size=2, dim=-2) as n:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("entries", M, subsample_size=B, dim=-1) as i:
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[n][:, i])


def log_evidence(y: Tensor) -> float:
    covariance = torch.eye(y.shape[1]) + 1.0
    return float(dist.MultivariateNormal(torch.zeros(y.shape[1]), covariance).log_prob(y).sum())


def data() -> Tensor:
    return torch.randn(N, 1) + torch.randn(N, M)


def test_every_entry_is_seen() -> None:
    y, index = data(), torch.tensor([6, 0, 3])
    for model, args in ((random, (y,)), (explicit, (y, index)), (left, (y,))):
        encoder = Exact()
        guide = AmortizedGuide(model, encoder, plate="d", name=model.__name__)
        for _ in range(3):
            guide(*args)
            torch.testing.assert_close(encoder.seen, y)
        summary = posterior_summary(model, guide, args)
        torch.testing.assert_close(torch.tensor(summary["a"].sel(quantile=0.5).values), y.sum(1) / (M + 1))


def test_every_entry_of_the_datapoints_drawn_is_seen() -> None:
    y, encoder = data(), Exact()
    guide = AmortizedGuide(both, encoder, plate="d")
    guide(y)
    rows = [int((y == seen).all(-1).nonzero()) for seen in encoder.seen]
    assert len(set(rows)) == 2


def test_several_plates_masks_and_values_that_are_shared() -> None:
    """Values in two subsampled plates, in one of them, and in none; a mask of the entries."""
    y, present = torch.randn(N, 4, 5), torch.rand(5) > 0.3
    u, v = torch.randn(N, 4, 1), torch.randn(N, 1, 1)

    def model() -> None:
        rows, columns = (
            pyro.plate("rows", 4, subsample_size=3, dim=-2),
            pyro.plate("columns", 5, subsample_size=2, dim=-1),
        )
        with pyro.plate("d", N, dim=-3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(a, 1.0), obs=v)
            with rows as i:
                pyro.sample("u", dist.Normal(a, 1.0), obs=u[:, i])
                with columns as j:
                    pyro.sample("y", dist.Normal(a, 1.0).mask(present[j]), obs=y[:, i][:, :, j])
            with columns:
                pyro.sample("w", dist.Normal(a, 1.0), obs=v)

    class Recorder(nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            self.inputs = inputs
            return torch.zeros(N, 1), torch.ones(N, 1)

    encoder = Recorder()
    guide = AmortizedGuide(model, encoder, plate="d")
    for _ in range(2):
        guide()
        seen_v, seen_u, seen_y, seen_w = encoder.inputs
        torch.testing.assert_close(seen_y, torch.where(present, y, 0.0))
        torch.testing.assert_close(seen_u, u)
        torch.testing.assert_close(seen_v, v)
        torch.testing.assert_close(seen_w, v)


def test_the_loss_is_a_bound() -> None:
    """With the exact posterior minus the mean loss is the log evidence."""
    y = data()

    guide = AmortizedGuide(random, Exact(), plate="d")
    elbos = -torch.tensor([Trace_ELBO(max_plate_nesting=2).loss(random, guide, y) for _ in range(400)])
    assert abs(float(elbos.mean()) - log_evidence(y)) < 4 * float(elbos.std()) / 20


def cut(y: Tensor, index: Tensor) -> None:
    """The batch was cut before: the model has its entries only."""
    with pyro.plate("d", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("entries", M, subsample=index, dim=-1):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def own_index(y: Tensor, index: Tensor) -> None:
    """The model takes the entries at its argument instead of the plate's index."""
    with pyro.plate("d", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("entries", M, subsample=index, dim=-1):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y[:, index])


@pytest.mark.parametrize("model", [cut, own_index])
@pytest.mark.parametrize("index", [torch.arange(B), torch.tensor([6, 0, 3]), torch.tensor([4])])
def test_a_subsample_that_is_all_there_is_is_refused(model: Callable[..., None], index: Tensor) -> None:
    y = data()
    args = (y if model is own_index else y[:, index], index)
    guide = AmortizedGuide(model, plate="d")
    with pytest.raises(ValueError, match=r"subsample of plate 'entries' \(. of 8 entries\).*try a model that is given"):
        guide.setup(*args)


def test_remedies() -> None:
    """The plate's own index, or an input that is the same for every subsample."""
    y, index, encoder = data(), torch.tensor([4]), Exact()
    AmortizedGuide(explicit, encoder, plate="d")(y, index)
    torch.testing.assert_close(encoder.seen, y)

    def named(y: Tensor, index: Tensor, whole: Tensor) -> None:
        cut(y, index)

    guide = AmortizedGuide(named, encoder, plate="d", encoder_input="whole", name="named")
    svi = SVI(named, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=2))
    svi.step(y[:, index], index, y)
    torch.testing.assert_close(encoder.seen, y)


def test_entries_that_are_all_equal() -> None:
    """They show nothing of the index: refused unless other data have shown it before."""
    y, same = data(), torch.ones(1, M)
    with pytest.raises(ValueError, match="cannot be seen, because all of them are equal"):
        AmortizedGuide(random, Exact(), plate="d").setup(same)
    encoder = Exact()
    guide = AmortizedGuide(random, encoder, plate="d")
    guide.setup(y)
    guide(same)
    torch.testing.assert_close(encoder.seen, same)


@pytest.mark.parametrize("model", [random, left])
def test_refinement_and_diagnostics_refuse(model: Callable[..., None]) -> None:
    """What they would fit is the posterior given the entries drawn."""
    y = data()
    guide = AmortizedGuide(model, Exact(), plate="d")
    guide.setup(y)
    uses: list[Callable[[], Any]] = [
        lambda: guide.refined(2)(y),
        lambda: estimate_gaps(model, guide, (y,)),
        lambda: to_arviz(model, guide, (y,), num_samples=2),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="sees only 3 of the 8 entries of plate 'entries'.*try a call with all"):
            use()
    assert PerDatapointGuide(model, plate="d", name="table")(y)["a"].numel() == N


def test_remedy_of_the_refusal() -> None:
    y = data()

    def whole(y: Tensor, size: int = M) -> None:
        with pyro.plate("d", len(y), dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("entries", M, subsample_size=size, dim=-1) as i:
                pyro.sample("y", dist.Normal(a, 1.0), obs=y[:, i])

    guide = AmortizedGuide(whole, Exact(), plate="d")
    guide(y, 3)
    found = estimate_gaps(whole, guide, (y,)).dataset["log_evidence"]
    assert float(found.sum()) == pytest.approx(log_evidence(y), abs=0.01)
