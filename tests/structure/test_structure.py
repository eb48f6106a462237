import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import runtime
from torch import Tensor

from pyro_amortized import AmortizedGuide
from pyro_amortized.graphs.reads import ValueReads
from pyro_amortized.structure.arguments import Arguments
from pyro_amortized.structure.cache import call_key
from pyro_amortized.structure.plates import probe
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import isolated, run_model
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.structure import Structure


@pytest.fixture(autouse=True)
def clean_pyro() -> Iterator[None]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    assert not runtime._PYRO_STACK
    assert not runtime._DIM_ALLOCATOR._stack


# isolated


def test_isolated_sets_handlers_and_dimensions_aside() -> None:
    with pyro.poutine.trace() as outer, pyro.plate("outer", 3, dim=-1):
        stack, dims = runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:]
        with isolated():
            assert not runtime._PYRO_STACK
            assert not runtime._DIM_ALLOCATOR._stack
            with pyro.plate("inner", 2) as inner:
                assert pyro.sample("unseen", dist.Normal(0.0, 1.0).expand([2])).shape == (2,)
            assert len(inner) == 2
        assert stack == runtime._PYRO_STACK
        assert dims == runtime._DIM_ALLOCATOR._stack
        assert pyro.sample("seen", dist.Normal(0.0, 1.0)).shape == (3,)
    assert "seen" in outer.trace.nodes
    assert "unseen" not in outer.trace.nodes


def test_isolated_puts_everything_back_after_an_exception() -> None:
    with pyro.poutine.trace(), pyro.plate("outer", 3):
        stack, dims = runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:]
        handlers = runtime._PYRO_STACK
        with pytest.raises(KeyError), isolated(), pyro.plate("inner", 2):
            raise KeyError("in the model")
        assert handlers is runtime._PYRO_STACK
        assert stack == runtime._PYRO_STACK
        assert dims == runtime._DIM_ALLOCATOR._stack


def test_run_model_gives_values_and_is_unseen_by_the_caller() -> None:
    def model() -> None:
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    values = {"z": torch.ones(2), "data": torch.tensor([3, 1])}
    with pyro.poutine.trace() as outer:
        trace = run_model(model, (), {}, values)
    assert torch.equal(trace.nodes["z"]["value"], values["z"])
    assert torch.equal(trace.nodes["data"]["value"], values["data"])
    assert set(outer.trace.nodes) <= {"_INPUT", "_RETURN"}


def test_run_model_names_empty_batches() -> None:
    with pytest.raises(ValueError, match="Cannot run the model on an empty batch .* try skipping empty batches"):
        run_model(gaussian, (torch.zeros(0),), {})


# Plates

KINDS: dict[str, tuple[Callable[[], pyro.plate], str, int, int]] = {
    "full": (lambda: pyro.plate("data", 6), "full", 6, 6),
    "size equal to the whole": (lambda: pyro.plate("data", 6, subsample_size=6), "full", 6, 6),
    "given indices": (lambda: pyro.plate("data", 6, subsample=torch.tensor([5, 0, 2])), "explicit", 3, 6),
    "all indices, in another order": (
        lambda: pyro.plate("data", 3, subsample=torch.tensor([2, 0, 1])),
        "explicit",
        3,
        3,
    ),
    "random": (lambda: pyro.plate("data", 6, subsample_size=2), "random", 2, 6),
    "unsized": (lambda: pyro.plate("data"), "unsized", 4, 4),
}


@pytest.mark.parametrize(("plate", "kind", "size", "full_size"), KINDS.values(), ids=KINDS)
def test_kinds_of_plates(plate: Callable[[], pyro.plate], kind: str, size: int, full_size: int) -> None:
    def model() -> None:
        with plate():
            pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))

    trace, frames = probe(model, (), {})
    frame = frames["data"]
    assert (frame.kind, frame.size, frame.full_size, frame.dim) == (kind, size, full_size, -1)
    assert frame.subsampled == (kind in ("explicit", "random"))
    indices = trace.nodes["data"]["value"] if frame.subsampled else None
    with frame.create(indices) as created:
        assert pyro.sample("z", dist.Normal(torch.zeros(size), 1.0)).shape == (size,)
    if kind == "explicit":
        assert torch.equal(created, indices)


def test_kind_is_seen_though_indices_are_given() -> None:
    def model() -> None:
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    trace, frames = probe(model, (), {}, {"data": torch.tensor([5, 3])})
    assert frames["data"].kind == "random"
    assert trace.nodes["data"]["value"].tolist() == [5, 3]


# Keys of calls

Call = tuple[tuple[Any, ...], dict[str, Any]]
SAME: list[tuple[Any, Any]] = [
    (torch.zeros(3), torch.ones(3)),
    ((torch.zeros(3), {"y": [torch.zeros(2), None]}), (torch.ones(3), {"y": [torch.ones(2), None]})),
    (3, 3),
    ({"a": 1, "b": "x"}, {"a": 1, "b": "x"}),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (torch.zeros(3), torch.zeros(4)),
    (torch.zeros(3), torch.zeros(3, 1)),
    (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
    (1, 2),
    (1, True),
    (1, 1.0),
    ("a", "b"),
    (None, 0),
    ([1, 2], (1, 2)),
    ([1], [1, 1]),
    ({"a": 1}, {"b": 1}),
    ({"a": torch.zeros(2)}, {"a": None}),
    ((torch.zeros(3), None), (torch.zeros(3),)),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_equal_shapes_and_values_have_equal_keys(first: Any, second: Any) -> None:
    assert call_key(first) == call_key(second) is not None
    assert hash(call_key(first)) == hash(call_key(second))


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_other_shapes_and_values_have_other_keys(first: Any, second: Any) -> None:
    assert call_key(first) != call_key(second)


@pytest.mark.parametrize("unknown", [object(), np.zeros(3), lambda: None, {1}, torch.nn.Linear(1, 1), b"x"])
@pytest.mark.parametrize("nest", [lambda x: x, lambda x: [1, x], lambda x: {"a": (x,)}])
def test_unknown_objects_have_no_key(unknown: Any, nest: Callable[[Any], Any]) -> None:
    assert call_key(nest(unknown)) is None


# Sources of tensors


def arguments(seed: int = 0) -> Call:
    rng = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(shape, generator=rng) for shape in ((4, 6), (5,), (2, 2)))
    return (x, {"deep": [y, 3, None]}), {"z": z}


SEEN: dict[str, Callable[[Call], Tensor]] = {
    "itself": lambda call: call[0][0],
    "reshaped": lambda call: call[0][0].reshape(4, 2, 3),
    "view": lambda call: call[0][0].view(-1),
    "detached": lambda call: call[0][0].detach(),
    "nested": lambda call: call[0][1]["deep"][0],
    "keyword": lambda call: call[1]["z"].unsqueeze(-1),
}
UNSEEN: dict[str, Callable[[Call], Tensor]] = {
    "row": lambda call: call[0][0][0],
    "first rows": lambda call: call[0][0][:2],
    "indexed": lambda call: call[0][0][torch.tensor([0, 1, 2, 3])],
    "transposed": lambda call: call[1]["z"].T,
    "expanded": lambda call: call[0][1]["deep"][0].expand(3, 5),
    "computed": lambda call: call[0][0] + 0.0,
    "copied": lambda call: call[0][0].clone(),
    "cast": lambda call: call[0][0].double(),
    "other bits": lambda call: call[0][0].view(torch.int32),
}


@pytest.mark.parametrize("look", SEEN.values(), ids=SEEN)
def test_source_of_an_argument_is_found(look: Callable[[Call], Tensor]) -> None:
    call = arguments()
    position = Arguments(*call).position(look(call))
    assert position is not None
    assert torch.equal(Arguments(*call).leaves[position].flatten(), look(call).flatten())


@pytest.mark.parametrize("look", UNSEEN.values(), ids=UNSEEN)
def test_source_of_other_data_is_not_found(look: Callable[[Call], Tensor]) -> None:
    call = arguments()
    assert Arguments(*call).position(look(call)) is None


# Reads of values

READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: 1 if (x > 0).any() else 0,
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "np.asarray": np.asarray,
    "range": lambda x: range(x[2].long()),
    "list index": lambda x: [0, 1, 2, 3][x[2].long()],
    "contains": lambda x: 2.0 in x,
    "format": lambda x: f"{x[0]:.2f}",
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 1),
    "mask": lambda x: x[x > 1],
    "unique": torch.unique,
    "unique_consecutive": torch.unique_consecutive,
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "size of a new tensor": lambda x: torch.zeros(x[2].long()),
}
ARITHMETIC: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: (x + 1).log().sum() * x.mean(),
    "shapes": lambda x: x.reshape(2, 2).T.unsqueeze(0).expand(3, 2, 2).contiguous(),
    "slices": lambda x: x[1:] + x[None, 0],
    "integer index": lambda x: x[torch.tensor([2, 1])],
    "embedding": lambda x: torch.nn.functional.embedding(x.long(), torch.eye(4)),
    "gather": lambda x: x.gather(0, x.long()),
    "choice": lambda x: torch.where(x > 1, x, 0.0),
    "linear algebra": lambda x: torch.linalg.cholesky(torch.diag(x + 1)) @ x,
    "network": lambda x: torch.nn.Linear(4, 2)(x).relu(),
    "draws": lambda x: dist.Gamma(x + 1, 1.0).sample() + dist.Normal(x, 1.0).rsample(),
    "sizes": lambda x: len(x) + x.dim() + x.numel(),
}


def sees_reads(action: Callable[[Tensor], Any]) -> bool:
    reads = ValueReads()
    with pyro.validation_enabled(False), reads:
        action(torch.arange(4.0))
    return reads.seen


@pytest.mark.parametrize("action", READS.values(), ids=READS)
def test_reads_of_values_are_seen(action: Callable[[Tensor], Any]) -> None:
    assert sees_reads(action)


@pytest.mark.parametrize("action", ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_is_not_a_read(action: Callable[[Tensor], Any]) -> None:
    assert not sees_reads(action)


def test_watch_ends_with_its_block() -> None:
    reads = ValueReads()
    with pytest.raises(KeyError), reads:
        raise KeyError
    torch.ones(1).item()
    assert not reads.seen


# The reader


class Counted:
    """A model that counts its runs."""

    def __init__(self, model: Callable[..., None]) -> None:
        self.model = model
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.runs += 1
        self.model(*args, **kwargs)


def gaussian(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x if y is None else y)


def explicit(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", 100, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def random_batch(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def bounded(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, x.max()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled(x: Tensor) -> None:
    with pyro.poutine.scale(scale=0.5):
        gaussian(x)


def masked(x: Tensor) -> None:
    with pyro.poutine.mask(mask=x > 0):
        gaussian(x)


def positive(x: Tensor) -> None:
    gaussian(x[x > 0])


def closure() -> None:
    gaussian(torch.ones(5))


INDEX = torch.tensor([3, 1, 4])


def read(model: Callable[..., None], calls: list[tuple[Any, ...]], *, promised: bool) -> tuple[list[Structure], int]:
    """The structures of calls by one reader, and the number of model runs it took."""
    reader, counted = StructureReader(promised=promised), Counted(model)
    return [reader.read(counted, call, {}) for call in calls], counted.runs


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (gaussian, [(torch.full((5,), float(i)),) for i in range(3)]),
        (explicit, [(torch.full((3,), float(i)), INDEX + i) for i in range(3)]),
        (positive, [(torch.tensor([1.0, 1.0, -1.0]),), (torch.ones(3),)]),
        (closure, [(), ()]),
    ],
)
def test_model_runs_in_every_call_without_a_promise(model: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    structures, runs = read(model, calls, promised=False)
    assert runs == len(calls)
    for structure, call in zip(structures, calls, strict=True):
        assert torch.equal(structure.observed["x"], pyro.poutine.trace(model).get_trace(*call).nodes["x"]["value"])
        assert torch.equal(structure.indices.get("data", INDEX), call[1] if model is explicit else INDEX)


def test_promised_structure_is_looked_at_now_and_then() -> None:
    reader, counted = StructureReader(promised=True), Counted(gaussian)
    looked = []
    for call in range(1, 300):
        before = counted.runs
        reader.read(counted, (torch.randn(5),), {})
        looked += [call] * (counted.runs - before)
    assert looked == [1, 2, 3, 5, 9, 17, 33, 65, 129, 193, 257]


def test_other_shapes_are_another_promise() -> None:
    structures, runs = read(gaussian, [(torch.zeros(n),) for n in (5, 3, 5, 3, 5, 3, 5, 3)], promised=True)
    assert runs == 6
    assert [s.datapoints.size for s in structures] == [5, 3, 5, 3, 5, 3, 5, 3]


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (explicit, (torch.ones(3), INDEX)),
        (random_batch, (torch.ones(9),)),
        (bounded, (torch.ones(4),)),
        (scaled, (torch.ones(4),)),
        (masked, (torch.ones(4),)),
        (closure, ()),
        (lambda x, options: gaussian(x), (torch.ones(4), object())),
    ],
)
def test_models_that_run_in_every_call_all_the_same(model: Callable[..., None], args: tuple[Any, ...]) -> None:
    assert read(model, [args] * 4, promised=True)[1] == 4


def test_broken_promise_names_what_has_changed_and_since_when_and_can_be_repeated() -> None:
    x = torch.tensor([1.0, 1.0, -1.0])
    reader = StructureReader(promised=True)
    for value in (x, x, x, x.abs()):
        reader.read(positive, (value,), {})
    with pytest.raises(
        ValueError, match=r"plates .*2 of 2.* have become .*3 of 3.* since number 4 .* number 3 the model"
    ):
        reader.read(positive, (x.abs(),), {})
    assert [reader.read(positive, (value,), {}).datapoints.size for value in (x, x.abs(), x)] == [2, 3, 2]


def test_reader_forgets_the_oldest() -> None:
    reader, model = StructureReader(promised=True, max_size=2), Counted(gaussian)
    for size in (3, 4, 4, 4, 4, 5, 3):
        reader.read(model, (torch.zeros(size),), {})
    assert model.runs == 6


def test_reader_without_a_model() -> None:
    reader, x = StructureReader(promised=True), torch.zeros(3)
    reader.read(gaussian, (x,), {})
    assert reader.read(None, (x + 1,), {}).datapoints.size == 3
    for other in (StructureReader(), reader):
        with pytest.raises(ValueError, match=r"loaded without its model.*try `guide.model = model`"):
            other.read(None, (torch.zeros(4),), {})


@pytest.mark.parametrize("model", [gaussian, explicit, random_batch])
@pytest.mark.parametrize("promised", [True, False])
def test_reader_keeps_no_tensor_alive(model: Callable[..., None], promised: bool) -> None:
    reader, alive = StructureReader(promised=promised), []

    def watched(*args: Tensor) -> None:
        with pyro.poutine.trace() as tracer:
            model(*args)
        values = [site["value"] for site in tracer.trace.nodes.values() if isinstance(site.get("value"), Tensor)]
        alive.extend(map(weakref.ref, values))

    x = torch.zeros(3)
    args = (x, INDEX.clone()) if model is explicit else (x,)
    structures = [reader.read(watched, args, {}) for _ in range(2)]
    alive.extend(map(weakref.ref, args))
    assert any(reference() is not None for reference in alive)
    del structures, x, args
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_random_subsample_takes_one_look_and_is_the_one_that_the_encoder_sees() -> None:
    for options in ({}, {"encoder_input": lambda x: pyro.subsample(x, event_dim=0)}):
        pyro.clear_param_store()
        counted = Counted(random_batch)
        guide = AmortizedGuide(counted, **options)
        seen: list[Tensor] = []
        guide.setup(torch.randn(50))
        guide.inference.encoder.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        guide(torch.randn(50))
        counted.runs = 0
        for _ in range(3):
            x = torch.randn(50)
            with pyro.poutine.trace() as tracer:
                guide(x)
            assert torch.equal(seen.pop().flatten(), x[tracer.trace.nodes["data"]["value"]])
        assert counted.runs == 3


def test_random_subsample_of_another_size_is_refused_once() -> None:
    sizes = {"batch": 2}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=sizes["batch"]) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide, x = AmortizedGuide(model), torch.randn(9)
    assert guide(x)["z"].shape == guide(x)["z"].shape == (2,)
    sizes["batch"] = 4
    with pytest.raises(ValueError, match=r"subsample .* because plates .*2 of 9.* have become .*4 of 9.*; try again"):
        guide(x)
    assert guide(x)["z"].shape == guide(x)["z"].shape == (4,)


# What a look leaves as it was


def test_looks_leave_generators_buffers_modes_and_parameters_as_they_were() -> None:
    norm = torch.nn.BatchNorm1d(1)

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.randn(()))
        pyro.module("norm", norm)
        noise = np.random.randn() + random.random() + torch.rand(())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = norm(z.reshape(-1, 1)).squeeze(-1)
            pyro.sample("x", dist.Normal(mean * weight, 1.0), obs=x + 0.0 * noise)

    def state() -> list[Any]:
        numpy_state: Any = np.random.get_state()
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy_state[1].tolist(),
            numpy_state[2:],
            {name: buffer.tolist() for name, buffer in norm.named_buffers()},
            norm.training,
        ]

    np.random.seed(1)
    guide = AmortizedGuide(model)
    guide.setup(torch.randn(8))
    assert all(name.startswith("AmortizedGuide") for name in pyro.get_param_store())
    before = state()
    for size in (8, 8, 5):
        guide.variational_parameters(torch.ones(size))
    assert state() == before
    guide.refined(2, num_particles=2).variational_parameters(torch.ones(5))
    assert state()[4:] == before[4:]


@pytest.mark.parametrize(
    ("seed", "draw"),
    [
        (np.random.seed, np.random.rand),
        (np.random.seed, np.random.randn),
        (random.seed, random.random),
        (random.seed, lambda: random.gauss(0.0, 1.0)),
        (torch.manual_seed, lambda: torch.rand(()).item()),
    ],
    ids=["numpy", "numpy's pairs", "python", "python's pairs", "torch"],
)
def test_draws_within_looks_are_undone_and_those_between_are_kept(seed: Any, draw: Callable[[], float]) -> None:
    seed(0)
    expected = [draw() for _ in range(9)]
    seed(0)
    found = []
    for _ in range(3):
        with untouched():
            draw()
            with untouched():
                found_within = [draw() for _ in range(1000)]
            assert draw() == found_within[0]
        found += [draw(), draw(), draw()]
    assert found == expected
