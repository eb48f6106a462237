"""Models whose structure or data are decided by something else than their arguments: never a stale answer."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import CSIS, Trace_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, DiscreteAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.structure import StructureCache

FLAG = False
BETA = 1.0
SETTINGS = SimpleNamespace(flip=False)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    global FLAG, BETA
    yield
    FLAG, BETA, SETTINGS.flip = False, 1.0, False


def observe(x: Tensor, scale: float = 1.0) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Submodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Identity()

    def forward(self, x: Tensor) -> None:
        observe(x if self.noise.training else -x)


class Swapped:
    """Two attributes of which one is None: which one, decides."""

    def __init__(self) -> None:
        self.first: list[int] | None = None
        self.second: list[int] | None = [1]

    def __call__(self, x: Tensor) -> None:
        observe(x if self.first is None else -x)


def by_global() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    def flip() -> None:
        global FLAG
        FLAG = True

    return lambda x: observe(-x if FLAG else x), flip


def by_namespace() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    return lambda x: observe(-x if SETTINGS.flip else x), lambda: setattr(SETTINGS, "flip", True)


def by_dict() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    store: dict[str, bool] = {}
    return lambda x: observe(-x if store.get("flip") else x), lambda: store.update(flip=True)


def by_list() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    flips: list[bool] = []
    return lambda x: observe(-x if flips else x), lambda: flips.append(True)


def by_submodule() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    model = Submodule()
    return model, lambda: model.noise.eval() and None


def by_attributes() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    model = Swapped()

    def flip() -> None:
        model.first, model.second = model.second, model.first

    return model, flip


def by_class_attribute() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    class Model:
        flip = False

        def __call__(self, x: Tensor) -> None:
            observe(-x if self.flip else x)

    model = Model()
    return model, lambda: setattr(model, "flip", True)


def under_wrappers() -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    inner, flip = by_dict()
    return config_enumerate(poutine.condition(inner, data={})), flip


@pytest.mark.parametrize(
    "make", [by_global, by_namespace, by_dict, by_list, by_submodule, by_attributes, by_class_attribute, under_wrappers]
)
def test_encoder_sees_what_the_model_observes_after_its_state_has_changed(make: Callable[[], Any]) -> None:
    model, flip = make()
    x, cache = torch.randn(5), StructureCache()
    for _ in range(3):
        assert torch.equal(cache.find(model, (x,), {}, observed=True).observed["x"], x)
    flip()
    for _ in range(3):
        assert torch.equal(cache.find(model, (x,), {}, observed=True).observed["x"], -x)


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


def test_loaded_guide_does_not_guess_which_of_two_structures_it_is() -> None:
    global FLAG
    guide, x = AmortizedGuide(lambda x: observe(-x if FLAG else x)), torch.randn(5)
    guide(x)
    assert pickle.loads(pickle.dumps(guide)).median(x)["z"].shape == (5,)
    FLAG = True
    guide(x)
    with pytest.raises(ValueError, match="with which the model's structure has varied"):
        pickle.loads(pickle.dumps(guide))(x)


def test_copied_guide_looks_again() -> None:
    guide, x = AmortizedGuide(observe), torch.randn(5)
    guide(x)
    again = copy.deepcopy(guide)
    torch.testing.assert_close(again.median(x), guide.median(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(again)).median(x), guide.median(x))


def test_state_that_changes_nothing_of_the_structure_leaves_a_loaded_guide_usable() -> None:
    global BETA
    guide, x = AmortizedGuide(lambda x: observe(x if BETA > 0 else -x)), torch.randn(5)
    guide(x)
    BETA = 0.5
    guide(x)
    assert pickle.loads(pickle.dumps(guide)).median(x)["z"].shape == (5,)


def test_model_that_holds_its_own_guide() -> None:
    """As a class with both does; what the guide keeps changes in every call and is not watched."""

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs = 0
            self.guide = AmortizedGuide(self.model)

        def model(self, x: Tensor) -> None:
            self.runs += 1
            observe(x)

    vae = Vae()
    for _ in range(3):
        Trace_ELBO().loss(vae.model, vae.guide, torch.randn(5))
    before = vae.runs
    for _ in range(20):
        Trace_ELBO().loss(vae.model, vae.guide, torch.randn(5))
    assert vae.runs == before + 20


def test_arguments_that_the_model_changes_in_place_are_refused() -> None:
    def model(x: Tensor) -> None:
        observe(x.clamp_(-1.0, 1.0))

    with pytest.raises(ValueError, match="changes its arguments in place"):
        AmortizedGuide(model)(torch.randn(5))


def counted_by_variable() -> tuple[Callable[[Tensor], None], Callable[[], int]]:
    runs = 0

    def model(x: Tensor) -> None:
        nonlocal runs
        runs += 1
        observe(x)

    return model, lambda: runs


def counted_by_list() -> tuple[Callable[[Tensor], None], Callable[[], int]]:
    runs: list[int] = []

    def model(x: Tensor) -> None:
        runs.append(1)
        observe(x)

    return model, runs.__len__


def counted_by_dict() -> tuple[Callable[[Tensor], None], Callable[[], int]]:
    runs = {"model": 0, "other": 0}

    def model(x: Tensor) -> None:
        runs["model"] += 1
        observe(x)

    def read() -> int:
        runs["other"] += 1
        return runs["model"]

    return model, read


def counted_by_attribute() -> tuple[Callable[[Tensor], None], Callable[[], int]]:
    class Model:
        runs = 0

        def __call__(self, x: Tensor) -> None:
            self.runs += 1
            observe(x)

    model = Model()
    return model, lambda: model.runs


@pytest.mark.parametrize("make", [counted_by_variable, counted_by_list, counted_by_dict, counted_by_attribute])
def test_counters_and_logs_of_the_model_cost_no_runs(make: Callable[[], Any]) -> None:
    model, runs = make()
    guide = AmortizedGuide(model)
    elbo = Trace_ELBO()
    for _ in range(3):
        elbo.loss(model, guide, torch.randn(5))
    before = runs()
    for _ in range(10):
        elbo.loss(model, guide, torch.randn(5))
    assert runs() == before + 10


def test_state_that_changes_in_every_call_is_not_watched_for_long() -> None:
    settings, cache = SimpleNamespace(step=0), StructureCache()

    def model(x: Tensor) -> None:
        observe(x if settings.step < 25 else -x)

    x = torch.randn(5)
    for step in range(30):
        settings.step = step
        assert torch.equal(cache.find(model, (x,), {}, observed=True).observed["x"], x if step < 25 else -x)
    assert not cache._worth_watching(next(iter(cache._watched)))
    for i in range(500):
        cache.find(observe, (x, 1.0 / (i + 2)), {}, observed=True)
    assert len(cache._watched) <= cache.max_size
    assert len(cache._templates) <= cache.max_size


# Masks and scales


KNOWN = torch.arange(20) < 10


def masked_batch(x: Tensor) -> None:
    with pyro.plate("data", 20, subsample_size=6) as index:
        with poutine.mask(mask=KNOWN[index]):
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
    """The guide draws its indices too, so that the encoder sees the columns that the model observes."""

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
        trace = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
        assert torch.equal(seen.pop(), replayed.nodes["x"]["value"])


def test_named_argument_of_a_permuted_plate_is_refused_where_its_order_is_unknown() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.randn(6)
    guide = AmortizedGuide(model, encoder_input="x")
    guide(x, torch.arange(6))
    with pytest.raises(ValueError, match="as large as its subsample"):
        guide(x, torch.arange(6).flip(0))
    seen: list[Tensor] = []
    guide = AmortizedGuide(model, name="observed")
    for index in (torch.arange(6), torch.tensor([-1, 0, 2, 2, -3, 1])):
        guide(x, index)
        guide.inference.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
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
    guide._structures.clear()
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
