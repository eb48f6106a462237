"""Exports to a store, against the same export in memory; exports that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, to_arviz
from pyro_amortized.export import formats, open_store, store
from pyro_amortized.export.store import Store

SUFFIXES = (".nc", ".zarr") if find_spec("zarr") else (".nc",)
X, T = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(-1.0, 1.0, 10)


def model(x: Tensor, t: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + t.unsqueeze(-1), scale.unsqueeze(-1)).to_event(1), obs=x)


def subset(index: Tensor) -> None:
    with pyro.plate("data", 10, subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=T[rows])


def nested(y: Tensor) -> None:
    with pyro.plate("group", y.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("member", y.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=level), obs=y)


def shared(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def weighted(x: Tensor, weights: Tensor, covariate: Tensor, flag: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.where(flag, z + weights.sum() + covariate * (covariate > 0), z)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


WEIGHTS = torch.randn(3, generator=torch.Generator().manual_seed(1))
POSITIVE, NEGATIVE = torch.rand(4) + 0.1, -torch.rand(4) - 0.1
FLAG = torch.tensor([True, False, True, True])
CALLS: dict[str, tuple[Any, Any]] = {
    "ragged": (model, DataLoader(TensorDataset(X, T), batch_size=4)),
    "one call": (model, (X, T)),
    "positions": (subset, [torch.tensor([7, 2, 9, 0]), torch.tensor([4, 1])]),
    "repeated positions": (subset, [torch.tensor([7, 2]), torch.tensor([2, 4])]),
    "positions that count at first": (subset, [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([9, 4])]),
    "repeated after they counted": (subset, [torch.tensor([0, 1, 2]), torch.tensor([7]), torch.tensor([3, 1])]),
    "inner plate": (nested, [(T.reshape(5, 2) > 0).float(), (X[:3] > 0).float()]),
    "no local latents": (shared, (T,)),
    # an axis that only a later batch tells to be the plate's, and one that is none
    "constants": (weighted, [(T[:4], WEIGHTS, NEGATIVE, FLAG), (T[4:8], WEIGHTS, POSITIVE, FLAG)]),
}


def batches(data: Any) -> Any:
    """A list is of batches."""
    return iter(data) if isinstance(data, list) else data


def set_up(program: Any, data: Any) -> AmortizedGuide:
    """A guide whose draws depend on the seed alone from its first export on."""
    guide = AmortizedGuide(program)
    first = data if isinstance(data, tuple) else next(iter(data))
    guide.setup(*(first if isinstance(first, tuple | list) else (first,)))
    return guide


def as_dataset(group: Any) -> xarray.Dataset:
    return group if isinstance(group, xarray.Dataset) else group.to_dataset()


def assert_equal(found: Any, expected: Any) -> None:
    """All but when they were made."""
    names = expected.groups() if callable(expected.groups) else list(expected.children)
    assert set(names) == set(found.groups() if callable(found.groups) else found.children)
    for name in names:
        first, second = (as_dataset(data[name]).copy() for data in (found, expected))
        for dataset in (first, second):
            assert dataset.attrs.pop("created_at")
        xarray.testing.assert_identical(first.load(), second.load())
        assert all(first[v].dtype == second[v].dtype for v in second.variables), name


@pytest.mark.thinned
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", CALLS)
def test_a_store_holds_what_memory_would(kind: str, suffix: str, tmp_path: Path) -> None:
    program, data = CALLS[kind]
    guide, options = set_up(program, data), {"num_samples": 3, "prior": True}
    expected = to_arviz(program, guide, batches(data), **options)
    found = to_arviz(program, guide, batches(data), store=tmp_path / f"p{suffix}", **options)
    assert_equal(found, expected)
    assert_equal(open_store(str(tmp_path / f"p{suffix}")), expected)
    assert os.listdir(tmp_path) == [f"p{suffix}"]
    if kind == "constants":
        assert expected["constant_data"]["covariate"].dims == ("data",)
        assert expected["constant_data"]["weights"].dims == ("weights_dim_0",)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_large_batches_are_stored_in_pieces(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_CHUNK", 10)
    loader = DataLoader(TensorDataset(X, T), batch_size=4)
    guide = set_up(model, loader)
    found = to_arviz(model, guide, loader, num_samples=3, store=tmp_path / f"p{suffix}")
    encoding = found["posterior"]["z"].encoding
    assert (encoding.get("chunksizes") or encoding["chunks"]) == (1, 3, 2, 2)
    assert_equal(found, to_arviz(model, guide, loader, num_samples=3))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_are_read_when_they_are_used(suffix: str, tmp_path: Path) -> None:
    found = to_arviz(model, AmortizedGuide(model), (X, T), num_samples=3, store=tmp_path / f"p{suffix}")
    assert not found["posterior"]["z"].variable._in_memory
    assert found["posterior"]["z"].isel(data=slice(2)).values.shape == (1, 3, 2, 2)
    assert not found["posterior"]["z"].variable._in_memory
    table = arviz.summary(found, var_names=["scale"], kind="stats")
    assert len(table) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("last", [8, 9])
def test_of_indices_that_count_sizes_are_held(
    suffix: str, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight bytes for every datapoint and group else; what does not count, if only at its end, is held."""
    monkeypatch.setattr(formats, "MAX_PIECE", 4)
    path = tmp_path / f"p{suffix}"
    positions = [torch.arange(5), torch.arange(5, 8), torch.tensor([last])]
    guide = set_up(subset, positions)
    for found in (to_arviz(subset, guide, iter(positions), num_samples=3, store=path), open_store(path)):
        for name in ("posterior", "observed_data"):
            index = found[name].indexes["data"]
            assert isinstance(index, pandas.RangeIndex) == (last == 8)
            assert index.tolist() == torch.cat(positions).tolist()
            assert found[name]["data"].dtype == np.int64
            assert as_dataset(found[name]).sel(data=[last, 1]).sizes["data"] == 2


def test_arviz_reads_netcdf(tmp_path: Path) -> None:
    guide, path = AmortizedGuide(model), tmp_path / "p.nc"
    found = to_arviz(model, guide, DataLoader(TensorDataset(X, T), batch_size=4), num_samples=3, store=path)
    assert_equal(arviz.from_netcdf(str(path)), found)


def test_batches_that_are_written_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    most = 0

    def add(self: Store, groups: Any, plate: Any) -> None:
        nonlocal most
        alive.extend(weakref.ref(value.data) for group in groups.values() for value in group.data_vars.values())
        of_batch = sum(len(group.data_vars) for group in groups.values())
        most = max(most, sum(reference() is not None for reference in alive) - of_batch)
        added(self, groups, plate)

    added = Store.add
    monkeypatch.setattr(Store, "add", add)
    options: Any = {"num_samples": 3, "groups": ("posterior", "posterior_predictive", "observed_data")}
    loader = DataLoader(TensorDataset(X, T), batch_size=1)
    to_arviz(model, AmortizedGuide(model), loader, store=tmp_path / "p.nc", **options)
    assert most == 1  # the global draws of the first batch are kept, for all


KILLED = """
import os, signal, torch, pyro, pyro.distributions as dist
from pyro_amortized import AmortizedGuide, to_arviz

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

def batches():
    for number in range(4):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield torch.zeros(3)

to_arviz(model, AmortizedGuide(model), batches(), num_samples=5, store=PATH)
"""


@pytest.mark.parametrize(
    ("suffix", "before"),
    [(".nc", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(".nc", False), (".zarr", True)])],
)
def test_a_killed_export_leaves_nothing_that_opens(suffix: str, before: bool, tmp_path: Path) -> None:
    path, guide = tmp_path / f"p{suffix}", AmortizedGuide(model)
    if before:
        older = to_arviz(model, guide, (X, T), num_samples=3, store=path)
        expected = {name: older[name].load() for name in ("posterior", "observed_data")}
    code = KILLED.replace("PATH", repr(str(path)))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / f"p{suffix}.partial"
    assert (partial / f"unfinished{suffix}").exists()
    if before:
        found = open_store(path)
        assert all(found[name].identical(expected[name]) for name in expected)
    else:
        with pytest.raises(ValueError, match=r"the export to it was not finished.*partial' holds only some .*again"):
            open_store(path)
    with pytest.raises(ValueError, match=r"is no whole export \(this .* file is not marked as complete\)"):
        open_store(partial / f"unfinished{suffix}")
    to_arviz(model, guide, DataLoader(TensorDataset(X, T), batch_size=4), num_samples=3, store=path)
    assert os.listdir(tmp_path) == [f"p{suffix}"]
    assert open_store(path)["posterior"].sizes["data"] == 10


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_that_fails_leaves_the_older_one(suffix: str, tmp_path: Path) -> None:
    path, guide = tmp_path / f"p{suffix}", AmortizedGuide(nested, encoder_input=lambda y: y.mean(-1, keepdim=True))
    y = (T.reshape(5, 2) > 0).float()
    to_arviz(nested, guide, (y,), num_samples=3, store=path)
    with pytest.raises(ValueError, match="dimension 'member' has size 2 in the first and 1 in a later one"):
        to_arviz(nested, guide, iter([y, y[:, :1]]), num_samples=5, store=path)
    assert os.listdir(tmp_path) == [f"p{suffix}"]
    assert open_store(path)["posterior"].sizes["draw"] == 3


@pytest.mark.parametrize("store", [None, "p.nc"])
def test_other_entries_of_an_inner_plate_are_refused(store: str | None, tmp_path: Path) -> None:
    def inner(y: Tensor, index: Tensor) -> None:
        with pyro.plate("group", len(y), dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("member", 3, subsample=index, dim=-1):
                pyro.sample("y", dist.Normal(level, 1.0), obs=y[:, index])

    y, indices = torch.randn(4, 3), torch.tensor([[0, 1], [0, 2]])
    guide = AmortizedGuide(inner, encoder_input=lambda y, index: y)
    options: Any = {"num_samples": 3, "groups": ("posterior", "observed_data")}
    options["store"] = None if store is None else tmp_path / store
    with pytest.raises(
        ValueError, match="other entries of plate 'member'; try a subsample that is the same in all bat"
    ):
        to_arviz(inner, guide, iter([(y, indices[0]), (y, indices[1])]), **options)
    found = to_arviz(inner, guide, iter([(y, indices[1]), (y, indices[1])]), **options)
    assert found["observed_data"]["member"].values.tolist() == [0, 2]


def test_a_file_that_was_cut_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "p.nc"
    to_arviz(model, AmortizedGuide(model), (X, T), num_samples=3, store=path)
    cut = tmp_path / "cut.nc"  # another file: one that is open already is not checked again
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no whole export"):
        open_store(cut)


def to_store(path: Any) -> Callable[[], Any]:
    return lambda: to_arviz(model, AmortizedGuide(model), (X, T), num_samples=3, store=path)


@pytest.mark.skipif(".zarr" not in SUFFIXES, reason="Zarr is not installed, as on Python 3.10")
def test_a_directory_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(ValueError, match=r"a directory which is no Zarr store; try another name"):
        to_store(tmp_path / "mine.zarr")()
    assert (tmp_path / "mine.zarr").is_dir()


def test_stores_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"its suffix tells no format; try a path such as posterior.nc"):
        to_store("posterior")()
    with pytest.raises(ValueError, match=r"its suffix tells no format"):
        to_store(True)()
    with pytest.raises(ValueError, match=r"its directory does not exist; try"):
        to_store("absent/posterior.nc")()
    with pytest.raises(ValueError, match="'absent.nc' because it does not exist"):
        open_store("absent.nc")
    monkeypatch.setattr(store, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"zarr is not installed; try .*netCDF file, .* \"posterior.nc\""):
        to_store("posterior.zarr")()
    to_store("posterior.nc")()


def test_draws_are_not_taken_for_entries_of_an_event() -> None:
    """Two draws of a scale, in a model that would broadcast them against two entries of an event."""

    def broadcasting(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(100 * z, 1e-3 * scale).to_event(1), obs=x)

    found = to_arviz(broadcasting, AmortizedGuide(broadcasting), (X,), num_samples=2)
    scale = found["posterior"]["scale"].values[0][:, None, None]
    error = found["posterior_predictive"]["x"].values[0] - 100 * found["posterior"]["z"].values[0]
    assert np.abs(error / (1e-3 * scale)).max() < 6
