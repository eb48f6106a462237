"""Loaders: batches that hold more than the model takes, sparse, mapped and streamed data, and what cannot be loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

import pyro_amortized
from pyro_amortized import (
    AmortizedGuide,
    PerDatapointGuide,
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


# What data sets hold, and how they come


def summarised(data: Any, **options: Any) -> np.ndarray[Any, Any]:
    """Medians by an encoder that is a function of a datapoint."""
    guide = AmortizedGuide(model_of_rows, nn.Identity())
    torch.manual_seed(0)
    guide.setup(DENSE)
    return posterior_summary(model_of_rows, guide, data, **options)["z"].sel(quantile=0.5).values


def model_of_rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([*z.shape[:-1], 4]).to_event(1), obs=x)


DENSE = torch.poisson(torch.full((10, 4), 0.7), generator=torch.Generator().manual_seed(0))


class SparseRows(Dataset[Tensor]):
    """Rows of a sparse matrix, made dense a batch at a time."""

    def __init__(self, counts: Any) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(self.counts[rows].toarray())


def in_batches(rows: Any, **options: Any) -> Any:
    """A loader that asks a data set for whole batches."""
    return DataLoader(
        rows, sampler=BatchSampler(SequentialSampler(rows), 4, drop_last=False), batch_size=None, **options
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning", "ignore:Sparse invariant checks")
def test_sparse_counts_are_made_dense_a_batch_at_a_time() -> None:
    expected = summarised((DENSE,))
    counts, tensor = scipy.sparse.csr_array(DENSE.numpy()), DENSE.to_sparse_csr()
    parts = tensor.values().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy()
    shared = scipy.sparse.csr_array(parts, shape=tuple(tensor.shape))
    assert np.shares_memory(shared.data, tensor.values().numpy())
    for rows in (counts, shared):
        np.testing.assert_allclose(summarised(in_batches(SparseRows(rows))), expected, rtol=1e-6)
    pieces = [counts[start : start + 4] for start in (0, 4, 8)]
    found = summarised(iter(pieces), to_args=lambda batch: (torch.from_numpy(batch.toarray()),))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    rows = [row.to_sparse() for row in DENSE]
    with pytest.raises(ValueError, match="because they are sparse; try collate_fn=lambda rows: ") as error:
        summarised(DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    collate = eval(str(error.value).partition("collate_fn=")[2].rstrip("."))
    dense: Any = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    np.testing.assert_allclose(summarised(dense), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="SciPy's sparse arrays have no length"):
        summarised(DataLoader(counts, batch_size=4))


class MappedRows(Dataset[Tensor]):
    """Rows of a file, of which a batch is read at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(self.array[rows])


def test_data_mapped_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", DENSE.numpy())
    rows = MappedRows(tmp_path / "x.npy")
    assert isinstance(rows.array, np.memmap)
    assert np.array_equal(summarised(in_batches(rows)), summarised(DataLoader(TensorDataset(DENSE), batch_size=4)))


@pytest.mark.slow
def test_workers_that_are_spawned() -> None:
    loader: Any = DataLoader(TensorDataset(DENSE), batch_size=4, num_workers=2, multiprocessing_context="spawn")
    assert np.array_equal(summarised(loader), summarised(DataLoader(TensorDataset(DENSE), batch_size=4)))


class Stream(IterableDataset[Tensor]):
    """Datapoints that come by themselves; ``None`` for no end."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        return iter(DENSE) if self.number is not None else cycle(DENSE)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(DENSE)


def test_streams() -> None:
    expected = summarised(DataLoader(TensorDataset(DENSE), batch_size=4))
    assert np.array_equal(summarised(DataLoader(SizedStream(10), batch_size=4)), expected)
    for number in (10, None):
        loader = DataLoader(Stream(number), batch_size=4)
        with pytest.raises(ValueError, match="may never end; try an IterableDataset with __len__.* itertools.islice"):
            summarised(loader)
        assert np.array_equal(summarised(islice(loader, 2)), expected[:8])
    with pytest.raises(ValueError, match="may never end"):
        summarised(cycle([DENSE]))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_streams_longer_than_they_say() -> None:
    loader = DataLoader(SizedStream(None), batch_size=5)
    with pytest.raises(ValueError, match=r"more batches than the 2 that the loader's length says.*islice\(loader, len"):
        summarised(loader)
    assert len(summarised(islice(loader, len(loader)))) == 10


def test_loaders_that_yield_nothing() -> None:
    used = iter([DENSE])
    next(used)
    for loader, remedy in (
        (used, "a new iterator"),
        (DataLoader(TensorDataset(DENSE), batch_size=11, drop_last=True), "drop_last=False"),
        (DataLoader([], batch_size=2), "a data set that is not empty"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=f"because the loader has no batches; try .*{remedy}"):
            summarised(loader)
    assert len(summarised(DataLoader(TensorDataset(DENSE), batch_size=11))) == 10


def test_datapoints_of_different_sizes() -> None:
    rows = [DENSE[0], DENSE[1, :3]]
    with pytest.raises(ValueError, match="they are of different sizes; try a collate_fn that pads them, such as torch"):
        summarised(DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    padded: Any = DataLoader(rows, batch_size=2, collate_fn=lambda r: pad_sequence(r, batch_first=True))  # type: ignore[arg-type]
    assert len(summarised(padded)) == 2


def test_other_errors_of_a_data_set_are_its_own() -> None:
    class Broken(Dataset[Tensor]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, row: int) -> Tensor:
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        summarised(DataLoader(Broken()))


def test_tables_take_no_batches_of_other_sizes() -> None:
    guide = PerDatapointGuide(model_of_rows)
    guide.setup(DENSE)
    with pytest.raises(ValueError, match="now has 4 datapoints and the guide's table was set up with 10"):
        posterior_summary(model_of_rows, guide, DataLoader(TensorDataset(DENSE), batch_size=4))


@pytest.mark.parametrize("where", ["sampler", "batch_sampler"])
def test_shuffled_batches_are_refused_wherever_they_are_drawn(where: str) -> None:
    rows = MappedRows.__new__(MappedRows)
    rows.array = DENSE.numpy()  # type: ignore[assignment]
    sampler = BatchSampler(RandomSampler(rows), 4, drop_last=False)
    options: Any = {"sampler": sampler, "batch_size": None} if where == "sampler" else {"batch_sampler": sampler}
    with pytest.raises(ValueError, match="the DataLoader shuffles"):
        summarised(DataLoader(rows, **options))


def test_whatever_takes_a_loader_takes_to_args() -> None:
    public = [getattr(pyro_amortized, name) for name in pyro_amortized.__all__]
    takes = {
        function.__name__: "to_args" in inspect.signature(function).parameters
        for function in public
        if inspect.isfunction(function) and "ModelArgs" in str(inspect.signature(function).parameters.get("model_args"))
    }
    assert takes == dict.fromkeys(takes, True)
    assert set(FUNCTIONS) <= set(takes)


def test_models_of_whole_batches_are_given_them() -> None:
    """The error's remedy, for a model that takes the dictionary itself."""

    def of_batch(batch: dict[str, Tensor]) -> None:
        model(batch["x"])

    guide = AmortizedGuide(of_batch)
    guide({"x": X})
    with pytest.raises(ValueError, match=r"try to_args=lambda batch: \(batch,\)\.$"):
        posterior_summary(of_batch, guide, NAMED)
    assert len(posterior_summary(of_batch, guide, NAMED, to_args=lambda batch: (batch,))["data"]) == 12
