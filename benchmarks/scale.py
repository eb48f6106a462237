"""Time and memory at 10,000, 100,000 and 1,000,000 datapoints: ``make bench-scale``, 10 minutes on two cores.

The data lie in a file, mapped into memory; every part and size runs in a process of its own, on one thread, over all
datapoints once. ``python benchmarks/scale.py NAME ... --sizes 1000 10000`` runs some parts at other sizes. Time is that
of the processor; memory is the most that a process holds for itself (RssAnon, without the pages of the mapped file).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    MLPEncoder,
    PerDatapointGuide,
    SemiAmortizedGuide,
    VectorQuantizedGuide,
    posterior_summary,
    to_arviz,
)

FEATURES, BATCH, DRAWS = 8, 1000, 20


class Rows(Dataset[Any]):
    """Rows of an array in a file, a batch of them at a time: only these are read."""

    def __init__(self, path: Path) -> None:
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: list[int]) -> tuple[int, Tensor, Tensor]:
        return len(self), torch.tensor(rows), torch.from_numpy(self.array[rows])


def batches(path: Path) -> DataLoader[Any]:
    """The model's arguments, batch by batch."""
    rows: Any = Rows(path)
    return DataLoader(rows, sampler=BatchSampler(SequentialSampler(rows), BATCH, drop_last=False), batch_size=None)


def model(size: int, index: Tensor, x: Tensor) -> None:
    """A Poisson factor model with a learned loading."""
    loading = pyro.param("loading", lambda: 0.3 * torch.randn(2, FEATURES))
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((z @ loading).exp()).to_event(1), obs=x)


def mixture(size: int, index: Tensor, x: Tensor) -> None:
    """The same in four clusters, each with rates of its own."""
    loading = pyro.param("loading", lambda: 0.3 * torch.randn(2, FEATURES))
    base = pyro.param("base", lambda: 0.3 * torch.randn(4, FEATURES))
    with pyro.plate("data", size, subsample=index):
        y = pyro.sample("y", dist.Categorical(x.new_ones(4)))
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((base[y] + z @ loading).exp()).to_event(1), obs=x)


class Coded(nn.Module):
    """Counts whose rates are decoded from one of 16 codes."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook, self.decoder = Codebook(16, 2), nn.Linear(2, FEATURES)

    def forward(self, size: int, index: Tensor, x: Tensor) -> None:
        pyro.module("coded", self)
        with pyro.plate("data", size, subsample=index):
            code = pyro.sample("code", dist.Categorical(x.new_ones(self.codebook.num_codes)))
            pyro.sample("x", dist.Poisson(self.decoder(self.codebook(code)).exp()).to_event(1), obs=x)


def coded(path: Path) -> Callable[[], object]:
    model = Coded()
    return train(VectorQuantizedGuide(model, model.codebook, MLPEncoder(FEATURES, (64,))), path, model)


def write_data(path: Path, size: int) -> None:
    """Draws data from the model into a file, piece by piece."""
    rng, loading = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2, FEATURES)) * 0.3
    array = np.lib.format.open_memmap(path, "w+", np.float32, (size, FEATURES))
    for start in range(0, size, BATCH):
        rows = min(BATCH, size - start)
        array[start : start + rows] = rng.poisson(np.exp(rng.normal(size=(rows, 2)) @ loading))


# Parts: each prepares, and returns what is timed


def train(guide: Any, path: Path, model: Any = model, elbo: Any = TraceMeanField_ELBO) -> Callable[[], object]:
    """One epoch."""
    loader = batches(path)
    optimizer = pyro.optim.Adagrad({"lr": 0.01})  # which takes sparse gradients
    svi = SVI(model, guide, optimizer, elbo())
    first = next(iter(loader))
    for _ in range(3):
        svi.step(*first)

    def run() -> None:
        for batch in loader:
            svi.step(*batch)

    return run


def summarise(path: Path) -> Callable[[], object]:
    guide = _ready(path)
    posterior_summary(model, guide, next(iter(batches(path))))  # what is imported and found out once
    return lambda: posterior_summary(model, guide, batches(path))


def export(suffix: str, path: Path) -> Callable[[], object]:
    guide, store = _ready(path), path.with_suffix(suffix)
    options: Any = {"num_samples": DRAWS, "groups": ("posterior", "posterior_predictive", "observed_data")}
    to_arviz(model, guide, next(iter(batches(path))), **options, store=store)
    return lambda: to_arviz(model, guide, batches(path), **options, store=store)


def _ready(path: Path) -> AmortizedGuide:
    guide = AmortizedGuide(model)
    guide.setup(*next(iter(batches(path))))
    return guide


PARTS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "amortized": lambda path: train(AmortizedGuide(model), path),
    "semi-amortized, 2 steps": lambda path: train(SemiAmortizedGuide(model, num_steps=2, num_particles=2), path),
    "iterative, 2 steps": lambda path: train(IterativeAmortizedGuide(model, num_steps=2, num_particles=2), path),
    "per datapoint, sparse": lambda path: train(PerDatapointGuide(model, sparse=True), path),
    "discrete": lambda path: train(DiscreteAmortizedGuide(mixture), path, mixture, TraceEnum_ELBO),
    "vector-quantized": coded,
    "posterior_summary": summarise,
    "to_arviz to netCDF": lambda path: export(".nc", path),
    "to_arviz to Zarr": lambda path: export(".zarr", path),
}


# Measuring


def own_memory() -> float:
    """Memory that this process holds for itself, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


class Peak(threading.Thread):
    """The most memory, looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = own_memory()

    def run(self) -> None:
        while True:
            self.most = max(self.most, own_memory())
            time.sleep(0.005)


def measure(name: str, path: Path) -> None:
    """Runs one part in this process; prints seconds of the processor and MiB."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    run = PARTS[name](path)
    peak = Peak()
    peak.start()
    start = time.process_time()
    run()
    print(time.process_time() - start, peak.most)


def rows_of(name: str, sizes: list[int], folder: Path) -> Iterator[tuple[int, float, float]]:
    """Size, seconds and MiB, each measured in a new process."""
    for size in sizes:
        path = folder / f"{size}.npy"
        if not path.exists():
            write_data(path, size)
        command = [sys.executable, __file__, name, "--measure", str(path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise RuntimeError(found.stderr)
        seconds, memory = map(float, found.stdout.split())
        yield size, seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.names[0], args.measure)
        return
    print(f"{'':26s}" + "".join(f"{size:>12,d}{'':>8s}" for size in args.sizes))
    print(f"{'':26s}" + f"{'us per row':>12s}{'MiB':>8s}" * len(args.sizes))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or PARTS:
            found = list(rows_of(name, args.sizes, Path(folder)))
            cells = (f"{1e6 * seconds / size:12.2f}{memory:8.0f}" for size, seconds, memory in found)
            print(f"{name:26s}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
