"""Models whose structure or data are decided by something else than their arguments: never a stale answer."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import CSIS, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, DiscreteAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide

BETA = 1.0


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    global BETA
    yield
    BETA = 1.0


def observe(x: Tensor, scale: float = 1.0) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("Guide", [AmortizedGuide, PerDatapointGuide])
def test_scale_that_changes_through_a_global_is_the_guides_too(Guide: Any) -> None:
    global BETA

    def model(x: Tensor) -> None:
        observe(x, BETA)

    guide, x = Guide(model), torch.randn(5)
    guide(x)
    BETA = 0.1
    assert poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == 0.1
    BETA = 1.0
    assert poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == 1.0


def test_loaded_guide_knows_only_what_it_was_promised() -> None:
    x = torch.randn(5)
    for options in ({}, {"encoder_input": "x"}):
        guide = AmortizedGuide(observe, name=f"guide{len(options)}", **options)
        guide(x)
        loaded = pickle.loads(pickle.dumps(guide))
        with pytest.raises(ValueError, match="loaded without its model"):
            loaded.median(torch.randn(4) if options else x)
        loaded.model = observe
        torch.testing.assert_close(loaded.median(x), guide.median(x))


def test_copied_guide_has_the_model() -> None:
    guide, x = AmortizedGuide(observe), torch.randn(5)
    guide(x)
    torch.testing.assert_close(copy.deepcopy(guide).median(x), guide.median(x))


def test_model_that_holds_its_own_guide() -> None:
    """As a class with both does; a copy's guide has the copy's model."""

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flip = 1.0
            self.guide = AmortizedGuide(self.model)

        def model(self, x: Tensor) -> None:
            observe(self.flip * x)

    vae, x = Vae(), torch.randn(5)
    vae.guide(x)
    copied = copy.deepcopy(vae)
    copied.flip = -1.0
    assert copied.guide.model.__self__ is copied
    torch.testing.assert_close(copied.guide.median(-x), vae.guide.median(x))


def test_arguments_that_the_model_changes_in_place_are_refused() -> None:
    def model(x: Tensor) -> None:
        observe(x.clamp_(-1.0, 1.0))

    with pytest.raises(ValueError, match="changes its arguments in place"):
        AmortizedGuide(model)(torch.randn(5))


# Masks and scales


KNOWN = torch.arange(20) < 10


def masked_batch(x: Tensor) -> None:
    with pyro.plate("data", 20, subsample_size=6) as index, poutine.mask(mask=KNOWN[index]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def scaled_batch(x: Tensor) -> None:
    with pyro.plate("data", 20, subsample_size=6) as index:
        with poutine.scale(scale=1.0 + KNOWN[index]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize("model", [masked_batch, scaled_batch])
@pytest.mark.parametrize(
    ("Guide", "options"),
    [
        (AmortizedGuide, {}),
        (AmortizedGuide, {"encoder_input": "x"}),
        (PerDatapointGuide, {}),
        (SemiAmortizedGuide, {"initial": "prior"}),
    ],
)
def test_weights_are_those_of_the_subsample_that_was_drawn(model: Any, Guide: Any, options: dict[str, Any]) -> None:
    x = torch.randn(20)
    guide = Guide(model, **options)
    guide.setup(x)
    for _ in range(5):
        trace = poutine.trace(guide).get_trace(x)
        index, site = trace.nodes["data"]["value"], trace.nodes["z"]
        found = site["mask"] if model is masked_batch else site["scale"] / (20 / 6) - 1.0
        expected = KNOWN[index] if model is masked_batch else KNOWN[index].float()
        torch.testing.assert_close(torch.as_tensor(found).expand(6).float(), expected.float())


def test_masks_that_depend_on_latents_are_refused() -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            with poutine.mask(mask=y.bool()):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y * z, 0.5), obs=x)

    def continuous(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=y > 0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y * z, 0.5), obs=x)

    for guide in (DiscreteAmortizedGuide(discrete), AmortizedGuide(continuous)):
        with pytest.raises(ValueError, match="latent 'z' because its mask or scale depends on other latents"):
            guide(torch.randn(6))


# Plates and indices


def test_inner_plate_of_observations_drawn_at_random() -> None:
    """The encoder sees all columns, whichever the model observes in a call."""

    def model(x: Tensor) -> None:
        words = pyro.plate("words", x.shape[1], subsample_size=2, dim=-1)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with words as index:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])

    guide = AmortizedGuide(model, plate="data")
    guide.setup(torch.randn(4, 7))
    seen: list[Tensor] = []
    guide.inference.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for _ in range(3):
        x = torch.randn(4, 7)
        guide(x)
        assert torch.equal(seen.pop(), x)


def test_named_argument_of_a_permuted_plate_is_put_in_its_order() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.randn(6)
    seen: list[Tensor] = []
    for spec in ("x", None):
        guide = AmortizedGuide(model, encoder_input=spec, name=f"guide_{spec}")
        guide(x, torch.arange(6))
        guide.inference.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for index in (torch.arange(6), torch.arange(6).flip(0), torch.tensor([5, 0, 2, 4, 3, 1])):
            guide(x, index)
            assert torch.equal(seen.pop().flatten(), x[index])


def test_created_plates_that_contradict_the_model_are_refused() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    @contextmanager
    def unused() -> Iterator[None]:
        yield

    def create(x: Tensor, index: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x), subsample=torch.arange(3))

    guide = AmortizedGuide(model, create_plates=create)
    guide(torch.randn(9), torch.arange(3))
    with pytest.raises(ValueError, match="create_plates gives plate 'data' other indices"):
        guide(torch.randn(9), torch.tensor([6, 7, 8]))


def test_label_observed_where_datapoints_lie_at_another_dimension() -> None:
    centres = torch.tensor([-2.0, 0.0, 2.0])

    def model(x: Tensor, label: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-2):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=label)
            z = pyro.sample("z", dist.Normal(centres[y], 1.0))
            with pyro.plate("replicates", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, label = torch.randn(4, 3), torch.tensor([0, 2, 1, 0]).unsqueeze(-1)
    guide = DiscreteAmortizedGuide(model)
    guide.setup(x)
    assert guide.median(x, label)["z"].shape == (4, 1)
    trace = poutine.trace(guide).get_trace(x, label)
    assert trace.nodes["z"]["value"].shape == (4, 1)
    phi_by_hand = [guide.median(x[i : i + 1], label[i : i + 1])["z"] for i in range(4)]
    torch.testing.assert_close(guide.median(x, label)["z"], torch.cat(phi_by_hand))
    assert Trace_ELBO(num_particles=20, max_plate_nesting=2).loss(model, guide, x, label) < 100


# Arguments of other kinds


class Batch(NamedTuple):
    x: Tensor


def test_wake_sleep_keeps_the_type_of_arguments() -> None:
    def model(batch: Batch, observations: dict[str, Tensor] | None = None) -> None:
        with pyro.plate("data", len(batch.x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch.x if observations is None else observations["x"])

    batch = Batch(torch.randn(5))
    guide = AmortizedGuide(model)
    guide.setup(batch)
    CSIS(model, guide, pyro.optim.Adam({"lr": 0.01}), num_inference_samples=2).step(batch)


def test_inference_mode() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide, x = AmortizedGuide(model), torch.randn(5)
    expected = (guide(x), guide.median(x))[1]
    with torch.inference_mode():
        torch.testing.assert_close(guide.median(x + 0.0), expected)


def test_scalar_argument_of_a_subsampled_plate() -> None:
    def model(x: Tensor, s: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    class Encoder(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return torch.stack([x, s.expand(len(x))], -1)

    guide = AmortizedGuide(model, Encoder(), encoder_input=["x", "s"])
    assert guide(torch.randn(5), torch.tensor(1.0))["z"].shape == (2,)


def test_sequences_return_to_the_length_of_the_setup() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("series", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    guide = AmortizedGuide(model, nn.Unflatten(1, (-1, 1)), encoder_input="x")
    assert [len(guide(torch.randn(5, steps))) for steps in (3, 6, 3, 1, 3, 6)] == [3, 6, 3, 1, 3, 6]
