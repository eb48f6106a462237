"""Diagnostics of data that several processes share."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_amortized import (
    AmortizedGuide,
    CertifiedPosterior,
    certified_posterior,
    collapse_report,
    estimate_gaps,
    log_evidence,
    posterior_summary,
    to_arviz,
)
from pyro_amortized.diagnostics.certificates import certified

SIZE = 9
BY_TURNS = [[0, 2], [1, 3], [4, 6], [5, 7], [8], [0]]
"""The batches of two processes, in turn; the last row is repeated for them to come out even."""


def model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)


def new_guide() -> AmortizedGuide:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AmortizedGuide(model)
    guide.setup(torch.linspace(0.0, 2.0, SIZE))
    return guide


def results(loader: DataLoader) -> dict[str, Any]:
    guide = new_guide()
    exported = to_arviz(model, guide, loader, num_samples=5)
    return {
        "gaps": estimate_gaps(model, guide, loader, tolerance=0.5).dataset,
        "evidence": log_evidence(model, guide, loader, tolerance=0.5),
        "summary": posterior_summary(model, guide, loader),
        **{name: exported[name] for name in ("posterior", "sample_stats", "observed_data")},
    }


def data() -> TensorDataset:
    return TensorDataset(torch.linspace(0.0, 2.0, SIZE))


def shared_loader() -> DataLoader:
    return DataLoader(data(), batch_size=2, sampler=DistributedSampler(data(), shuffle=False))


def certify(loader: DataLoader, path: str | None = None) -> CertifiedPosterior:
    return certified_posterior(model, new_guide(), loader, num_samples=400, path=path)


def leave_one_out(loader: DataLoader) -> dict[str, Any]:
    exported = to_arviz(model, new_guide(), loader, num_samples=30, log_likelihood="marginal")
    return {name: exported[name] for name in ("posterior", "sample_stats", "log_likelihood")}


def check_labels() -> None:
    """Rows are where their coordinates say, wherever the sampler lies and whatever it leaves out."""
    guide, rows = new_guide(), data()

    class Whole(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return SIZE

        def __getitem__(self, index: list[int]) -> tuple[Tensor]:
            return (rows.tensors[0][index],)

    sampler = DistributedSampler(rows, shuffle=False)
    some = DistributedSampler(rows, drop_last=True, shuffle=True, seed=1)
    for name, loader in (
        ("batches", DataLoader(rows, batch_sampler=BatchSampler(sampler, 2, False))),
        ("batches at once", DataLoader(Whole(), sampler=BatchSampler(sampler, 2, False), batch_size=None)),
        ("some", DataLoader(rows, batch_size=2, sampler=some)),
    ):
        found = to_arviz(model, guide, loader, num_samples=2, groups=["observed_data"])["observed_data"]["x"]
        assert found.sizes["data"] == (8 if name == "some" else SIZE)
        torch.testing.assert_close(torch.as_tensor(found.values), rows.tensors[0][found["data"].values])


def check_items() -> None:
    """Items that are batches of datapoints already cannot be told apart."""
    chunks = [torch.arange(3.0), torch.arange(3.0, 6.0)]
    loader = DataLoader(chunks, batch_size=None, sampler=DistributedSampler(chunks, shuffle=False))
    with pytest.raises(ValueError, match="because 2 items of the data set are 6 datapoints; try"):
        to_arviz(model, new_guide(), loader, num_samples=2)


def run_in_process(rank: int, size: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size)
    found = results(shared_loader())
    for name, dataset in found.items():
        dataset.to_netcdf(f"{path}/{name}-{rank}.nc")
    check_labels()
    check_items()
    with pytest.raises(ValueError, match=r"because a DistributedSampler gives .*; try a DataLoader without"):
        collapse_report(model, new_guide(), shared_loader())
    loader = shared_loader()
    guide = AmortizedGuide(model, name="other")
    for options, cause in (
        ({"store": f"{path}/store.nc"}, "write one store"),
        ({"prior": True}, "draw from the prior"),
    ):
        with pytest.raises(ValueError, match=f"Cannot {cause} in several processes"):
            to_arviz(model, guide, loader, num_samples=2, **options)
    torch.distributed.destroy_process_group()


def test_every_process_has_the_result_of_one_with_all_data(tmp_path: Path) -> None:
    import xarray

    torch.multiprocessing.spawn(run_in_process, (2, str(tmp_path)), nprocs=2)
    for name, expected in results(DataLoader(data(), batch_sampler=BY_TURNS)).items():
        if "data" in expected.dims:
            order = torch.tensor(sum(BY_TURNS, [])[:SIZE]).argsort().numpy()
            expected = expected.isel(data=order).assign_coords(data=range(SIZE))
        for rank in range(2):
            xarray.testing.assert_allclose(xarray.load_dataset(tmp_path / f"{name}-{rank}.nc"), expected, rtol=1e-6)


def weigh_in_process(rank: int, size: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size)
    for name, dataset in leave_one_out(shared_loader()).items():
        dataset.to_netcdf(f"{path}/{name}-{rank}.nc")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_draws_of_global_latents_are_weighed_by_the_data_of_all_processes(tmp_path: Path) -> None:
    """The row that is repeated counts once among the weights."""
    import xarray

    torch.multiprocessing.spawn(weigh_in_process, (2, str(tmp_path)), nprocs=2)
    once = DataLoader(data(), batch_sampler=BY_TURNS[:-1])
    order = torch.tensor(sum(BY_TURNS[:-1], [])).argsort().numpy()
    for name, expected in leave_one_out(once).items():
        if "data" in expected.dims:
            expected = expected.isel(data=order).assign_coords(data=range(SIZE))
        for rank in range(2):
            xarray.testing.assert_allclose(xarray.load_dataset(tmp_path / f"{name}-{rank}.nc"), expected, rtol=1e-6)
    assert float(expected["x"].std("draw").max()) > 0.01  # draws of the global latents differ in what they tell


def certify_in_process(rank: int, size: int, path: str) -> None:
    """Whole; then once more after an interruption that the second process's second batch did not survive."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size)
    certify(shared_loader(), f"{path}/saved").to_netcdf(f"{path}/certified-{rank}.nc")
    if rank == 0:
        (Path(path) / "saved" / "batch_00003.nc").unlink()
    torch.distributed.barrier()
    work, done = certified._certify, []
    certified._certify = lambda *args: done.append(args) or work(*args)  # type: ignore[assignment, func-returns-value]
    certify(shared_loader(), f"{path}/saved").to_netcdf(f"{path}/resumed-{rank}.nc")
    assert len(done) == rank
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_certificates_of_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import xarray

    torch.multiprocessing.spawn(certify_in_process, (2, str(tmp_path)), nprocs=2)
    by_turns = DataLoader(data(), batch_sampler=BY_TURNS)
    order = torch.tensor(sum(BY_TURNS, [])[:SIZE]).argsort().numpy()
    expected = certify(by_turns)
    for name in ("certified-0", "certified-1", "resumed-0", "resumed-1"):
        found = CertifiedPosterior.from_netcdf(tmp_path / f"{name}.nc")
        for part, whole in ((found.dataset, expected.dataset), (found.posterior, expected.posterior)):
            whole = whole.isel(data=order).assign_coords(data=range(SIZE))
            xarray.testing.assert_allclose(part, whole, rtol=1e-6)
        exported = found.to_arviz(keep="all")
        assert exported["posterior"]["z"].shape == (1, 400, SIZE)
        assert exported["sample_stats"]["stage"].dims == ("data",)
        assert str(found).startswith(f"Certified posteriors of {SIZE} datapoints")
    monkeypatch.setattr(certified, "_certify", lambda *_: pytest.fail("what processes have saved is there"))
    again = certify(by_turns, f"{tmp_path}/saved")  # numbered as those of one process that goes through the same ones
    xarray.testing.assert_allclose(again.posterior, expected.posterior, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "cause"), [({}, "shuffles"), ({"num_replicas": 2, "rank": 0, "shuffle": False}, "one of 2 parts")]
)
def test_a_process_alone_is_dealt_nothing(options: dict[str, Any], cause: str) -> None:
    options = {"num_replicas": 1, "rank": 0, **options}
    loader = DataLoader(data(), batch_size=2, sampler=DistributedSampler(data(), **options))
    with pytest.raises(ValueError, match=f"Cannot tell which datapoint .*{cause}"):
        posterior_summary(model, new_guide(), loader)
    ordered = DataLoader(data(), batch_size=2, sampler=DistributedSampler(data(), 1, 0, shuffle=False))
    assert posterior_summary(model, new_guide(), ordered).sizes["data"] == SIZE


@pytest.mark.slow
def test_other_batches_have_other_draws() -> None:
    """So that the test above would fail if each process went its own way."""
    import xarray

    plain, by_turns = (results(DataLoader(data(), **o)) for o in ({"batch_size": 2}, {"batch_sampler": BY_TURNS[:5]}))
    with pytest.raises(AssertionError):
        xarray.testing.assert_allclose(plain["gaps"], by_turns["gaps"].sortby("data"), rtol=1e-6)
