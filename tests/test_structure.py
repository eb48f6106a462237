import gc
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
from pyro_amortized.structure import Structure, StructureCache
from pyro_amortized.tracing import ValueReads, call_key, find_source, isolated, probe, read_source, run_model


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

    trace, frames, _ = probe(model, (), {})
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

    trace, frames, _ = probe(model, (), {}, {"data": torch.tensor([5, 3])})
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
    call, other = arguments(), arguments(seed=1)
    source = find_source(look(call), call)
    assert source is not None
    assert torch.equal(read_source(source, call), look(call))
    assert torch.equal(read_source(source, other), look(other))


@pytest.mark.parametrize("look", UNSEEN.values(), ids=UNSEEN)
def test_source_of_other_data_is_not_found(look: Callable[[Call], Tensor]) -> None:
    call = arguments()
    assert find_source(look(call), call) is None


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


# The cache


class Counted:
    """A model that counts its runs."""

    _unwatched = ("calls",)

    def __init__(self, model: Callable[..., None]) -> None:
        self.model = model
        self.calls: list[None] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(None)
        self.model(*args, **kwargs)


def gaussian(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x if y is None else y)


def subsampled(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", 100, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def reading(x: Tensor) -> None:
    gaussian(x if x.sum() > 0 else x.reshape(-1, 1).squeeze(-1))


def masking(x: Tensor) -> None:
    gaussian(x[x > 0])


def indexed(x: Tensor, index: Tensor) -> None:
    subsampled(x[index], index)


def sorted_rows(x: Tensor, index: Tensor) -> None:
    subsampled(x[index.sort(descending=True).values], index)


def changed_rows(x: Tensor, index: Tensor) -> None:
    rows = x[index]
    rows[0] += 1.0
    subsampled(rows, index)


def two_takes(x: Tensor) -> None:
    """Rows at indices of no plate: other values in every call."""
    gaussian(x[torch.arange(len(x) // 2)])


def columns(x: Tensor) -> None:
    """The datapoints lie on the second axis, and of both axes a part is drawn."""
    words = pyro.plate("words", x.shape[0], dim=-2)
    with pyro.plate("data", x.shape[1], subsample_size=2, dim=-1) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with words as rows:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows][:, index])


def by_pyro_subsample(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch)


def whole_by_index(x: Tensor) -> None:
    with pyro.plate("data", len(x)) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def computed(x: Tensor) -> None:
    gaussian(x / 2)


def bounded(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, x.max()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def random_batch(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def closure() -> None:
    gaussian(CLOSED_OVER)


CLOSED_OVER = torch.ones(5)
INDEX = torch.tensor([3, 1, 4])


def find(
    model: Callable[..., None], calls: list[tuple[Any, ...]], *, observed: bool = True
) -> tuple[list[Structure], int]:
    """The structures of calls by one cache, and the number of model runs it took."""
    cache, counted = StructureCache(), Counted(model)
    structures = [cache.find(counted, call, {}, observed=observed) for call in calls]
    return structures, len(counted.calls)


@pytest.mark.parametrize("observed", [True, False])
def test_equal_shapes_take_one_run(observed: bool) -> None:
    calls = [(torch.full((5,), float(i)),) for i in range(4)]
    structures, runs = find(gaussian, calls, observed=observed)
    assert runs == 1
    assert all(structure.layout is structures[0].layout for structure in structures)
    if observed:
        assert all(s.observed["x"] is call[0] for s, call in zip(structures, calls, strict=True))


def test_other_shapes_take_another_run_and_come_back() -> None:
    structures, runs = find(gaussian, [(torch.zeros(n),) for n in (5, 3, 5, 3)])
    assert runs == 2
    assert [s.datapoints.size for s in structures] == [5, 3, 5, 3]


def test_given_indices_are_read_from_the_arguments() -> None:
    calls = [(torch.full((3,), float(i)), INDEX + i) for i in range(3)]
    structures, runs = find(subsampled, calls)
    assert runs == 1
    assert all(torch.equal(s.indices["data"], call[1]) for s, call in zip(structures, calls, strict=True))
    assert all(torch.equal(s.observed["x"], call[0]) for s, call in zip(structures, calls, strict=True))


def test_rows_at_a_plates_indices_are_read_from_the_arguments() -> None:
    calls = [(torch.arange(100.0) * i, INDEX + i) for i in range(3)]
    structures, runs = find(indexed, calls)
    assert runs == 1
    assert all(torch.equal(s.observed["x"], x[index]) for s, (x, index) in zip(structures, calls, strict=True))
    structures, runs = find(whole_by_index, [(torch.arange(5.0) + i,) for i in range(3)])
    assert runs == 1
    assert all(torch.equal(s.observed["x"], torch.arange(5.0) + i) for i, s in enumerate(structures))


@pytest.mark.parametrize("model", [random_batch, by_pyro_subsample, columns])
def test_guide_takes_a_random_subsample_from_the_arguments(model: Callable[[Tensor], None]) -> None:
    counted = Counted(model)
    shape = (3, 7) if model is columns else (50,)
    guide = AmortizedGuide(counted, plate="data")
    seen: list[Tensor] = []
    guide.setup(torch.randn(shape))
    guide.inference.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    counted.calls.clear()
    for _ in range(3):
        x = torch.randn(shape)
        with pyro.poutine.trace() as tracer:
            guide(x)
        index = tracer.trace.nodes["data"]["value"]
        expected = x[:, index].T if model is columns else x[index]
        assert torch.equal(seen.pop().reshape(expected.shape), expected)
    assert not counted.calls


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (reading, [(torch.ones(4),), (-torch.ones(4),), (torch.ones(4),)]),
        (bounded, [(torch.ones(4),), (2 * torch.ones(4),), (3 * torch.ones(4),)]),
        (computed, [(torch.ones(4),), (torch.zeros(4),), (torch.ones(4),)]),
        (sorted_rows, [(torch.arange(100.0) * i, INDEX + i) for i in range(3)]),
        (changed_rows, [(torch.arange(100.0) * i, INDEX + i) for i in range(3)]),
        (two_takes, [(torch.arange(100.0) + i,) for i in range(3)]),
        (closure, [(), (), ()]),
    ],
)
def test_models_that_must_run_in_every_call(model: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    structures, runs = find(model, calls)
    assert runs == len(calls)
    expected = [pyro.poutine.trace(model).get_trace(*call).nodes["x"]["value"] for call in calls]
    assert all(torch.equal(s.observed["x"], e) for s, e in zip(structures, expected, strict=True))


@pytest.mark.parametrize(("model", "expected"), [(computed, 1), (indexed, 1), (closure, 3)])
def test_structure_alone_takes_one_run(model: Callable[..., None], expected: int) -> None:
    """But where no argument says what the data are, they may have changed."""
    calls = {"computed": (torch.ones(4),), "indexed": (torch.ones(100), INDEX), "closure": ()}
    structures, runs = find(model, [calls[model.__name__]] * 3, observed=False)
    assert runs == expected
    assert {s.datapoints.size for s in structures} == {structures[0].datapoints.size}


@pytest.mark.parametrize("observed", [True, False])
def test_sizes_that_depend_on_values_are_found_in_every_call(observed: bool) -> None:
    structures, _ = find(masking, [(torch.tensor([1.0, 1.0, -1.0, -1.0]),), (torch.ones(4),)], observed=observed)
    assert [s.datapoints.size for s in structures] == [2, 4]


def test_unknown_arguments_take_a_run_each() -> None:
    def model(x: Tensor, options: object) -> None:
        gaussian(x)

    assert find(model, [(torch.ones(4), object())] * 3)[1] == 3


@pytest.mark.parametrize("observed", [True, False])
def test_random_subsample_has_no_observed_values_before_it_is_drawn(observed: bool) -> None:
    structures, runs = find(random_batch, [(torch.arange(9.0),)] * 3, observed=observed)
    assert runs == 1
    assert all(structure.random_plates == ["data"] and structure.observed is None for structure in structures)


def test_guide_looks_at_a_random_subsample_that_the_model_computes() -> None:
    def halves(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index] / 2)

    model = Counted(halves)
    x = torch.arange(50.0)
    guide = AmortizedGuide(model)
    guide(x)
    seen: list[Tensor] = []
    guide.inference.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.calls.clear()
    with pyro.poutine.trace() as tracer:
        guide(x)
    assert len(model.calls) == 1
    assert torch.equal(seen[0].flatten(), x[tracer.trace.nodes["data"]["value"]] / 2)


def test_same_tensor_twice_is_not_taken_for_one_argument() -> None:
    x, y = torch.zeros(3), torch.ones(3)
    structures, _ = find(gaussian, [(x, x), (x, y)])
    assert torch.equal(structures[1].observed["x"], y)


def test_training_mode_is_part_of_the_key() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> None:
            gaussian(x[:2] if self.training else x)

    model, cache, x = Model(), StructureCache(), torch.ones(5)
    sizes = [cache.find(model.train(mode), (x,), {}, observed=True).datapoints.size for mode in (True, False, True)]
    assert sizes == [2, 5, 2]


def test_cache_forgets_the_oldest() -> None:
    cache, model = StructureCache(max_size=2), Counted(gaussian)
    for size in (3, 4, 5, 5, 3):
        cache.find(model, (torch.zeros(size),), {}, observed=True)
    assert len(model.calls) == 4


def test_cache_without_a_model() -> None:
    cache, x = StructureCache(), torch.zeros(3)
    cache.find(gaussian, (x,), {}, observed=True)
    assert cache.find(None, (x + 1,), {}, observed=True).datapoints.size == 3
    with pytest.raises(ValueError, match=r"loaded without its model .* new shapes.*try `guide.model = model`"):
        cache.find(None, (torch.zeros(4),), {}, observed=True)


@pytest.mark.parametrize("model", [gaussian, subsampled, indexed, computed, random_batch])
@pytest.mark.parametrize("observed", [True, False])
def test_cache_keeps_no_tensor_alive(model: Callable[..., None], observed: bool) -> None:
    cache, alive = StructureCache(), []

    def watched(*args: Tensor) -> None:
        with pyro.poutine.trace() as tracer:
            model(*args)
        values = [site["value"] for site in tracer.trace.nodes.values() if isinstance(site.get("value"), Tensor)]
        alive.extend(map(weakref.ref, values))

    x = torch.zeros(100 if model is indexed else 3)
    args = (x, INDEX.clone()) if model in (subsampled, indexed) else (x,)
    structures = [cache.find(watched, args, {}, observed=observed) for _ in range(2)]
    alive.extend(map(weakref.ref, args))
    assert cache._templates
    assert any(reference() is not None for reference in alive)
    del structures, x, args
    gc.collect()
    assert not any(reference() is not None for reference in alive)
