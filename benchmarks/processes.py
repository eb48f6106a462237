"""A training step in one process and in two: time, and what is sent.

``make bench-processes``, or ``python benchmarks/processes.py NAME ...`` with names of the cases. All are trained by
``SVIModule`` and ``Trainer(strategy="ddp")`` with gloo, one thread for each process, on the same global batch. One and
two processes are measured in turn, each time in new ones. Printed are medians over these pairs, of times and of their
ratios, with the least and the largest ratio: by the clock, which others on the machine disturb, and of the processor,
which is what a process itself does. What is sent is counted thrice: what is handed over to be added up, by the reducer
of gradients or ``all_reduce``; what is worked out from the numbers of parameters and rows; and what the system has sent
through its loopback device, for each process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, MLPEncoder, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.lightning import SVIModule

NUM_WARM, NUM_STEPS = 5, 30
PIXELS, WIDTH, LATENT = 784, 400, 20
ROWS, COUNTS = 100_000, 8
ITEM, INDEX = 4, 8
"""Bytes of a parameter, and of a position in a table."""


class Images(nn.Module):
    """A VAE of binary images."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PIXELS))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class Factors(nn.Module):
    """A Poisson factor model of many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.loading = nn.Parameter(0.3 * torch.randn(2, COUNTS))

    def forward(self, index: Tensor, x: Tensor) -> None:
        with pyro.plate("data", ROWS, subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((z @ self.loading).exp()).to_event(1), obs=x)


def images(Guide: Any, **options: Any) -> tuple[nn.Module, Any, TensorDataset]:
    model, encoder = Images(), MLPEncoder(PIXELS, (WIDTH,))
    return model, Guide(model, encoder, **options), TensorDataset((torch.rand(4096, PIXELS) < 0.2).float())


def table() -> tuple[nn.Module, Any, TensorDataset]:
    model, x = Factors(), torch.poisson(torch.ones(ROWS, COUNTS))
    return model, PerDatapointGuide(model, sparse=True), TensorDataset(torch.arange(ROWS), x)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        make: Makes a model, a guide and data.
        batch: Rows of all processes together.
        optimizer: From parameters to an optimizer.
    """

    make: Callable[[], tuple[nn.Module, Any, TensorDataset]]
    batch: int
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam


CASES = {
    "amortized, 64 rows": Case(lambda: images(AmortizedGuide), 64),
    "amortized, 256 rows": Case(lambda: images(AmortizedGuide), 256),
    "amortized, 1024 rows": Case(lambda: images(AmortizedGuide), 1024),
    "semi-amortized, 2 steps, 256 rows": Case(lambda: images(SemiAmortizedGuide, num_steps=2), 256),
    "table, sparse, 1000 rows": Case(table, 1000, torch.optim.Adagrad),
}


# What is measured in each process


def sent_by_loopback() -> int:
    """Bytes that this machine has sent to itself."""
    statistics = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(statistics.read_text()) if statistics.exists() else 0


class Steps(lightning.Callback):
    """When every step began, by the clock and by the processor, and what had been sent until then."""

    def __init__(self) -> None:
        self.starts: list[tuple[float, ...]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append((time.perf_counter(), time.process_time(), sent_by_loopback()))

    def per_step(self) -> dict[str, float]:
        """Medians of seconds, seconds of the processor, and bytes."""
        pairs = list(zip(self.starts[NUM_WARM:], self.starts[NUM_WARM + 1 :], strict=False))
        names = ("seconds", "processor", "by_system")
        return {name: median(after[i] - before[i] for before, after in pairs) for i, name in enumerate(names)}


class Sent(lightning.Callback):
    """Counts what is handed over to be added up over all processes."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        trainer.strategy.model.register_comm_hook(None, allreduce_hook)  # which calls all_reduce, where it is counted
        self._all_reduce, torch.distributed.all_reduce = torch.distributed.all_reduce, self._reduce

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(0)

    def on_train_end(self, *_: Any) -> None:
        torch.distributed.all_reduce = self._all_reduce

    def _reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        self.steps[-1] += sum(part.numel() * part.element_size() for part in parts)
        return self._all_reduce(tensor, *args, **kwargs)


def worked_out(case: Case, guide: Any, model: nn.Module, size: int) -> float:
    """Bytes of a step that each process hands over: of parameters, rows of a table, and the number of rows."""
    own = {id(p): p for part in (guide, model) for p in part.parameters()}.values()
    if not getattr(guide, "sparse", False):
        return ITEM * sum(p.numel() for p in own)
    tables = [p for p in own if len(p) == ROWS]
    dense = sum(p.numel() for p in own) - sum(p.numel() for p in tables)
    looked_up = case.batch // size * sum(INDEX + ITEM * p[0].numel() for p in tables)
    return ITEM * dense + looked_up + ITEM


def measure(name: str, rank: int, size: int, counted: bool) -> None:
    """Trains in this process; the first prints what it has measured."""
    warnings.simplefilter("ignore")
    for part in ("fabric", "pytorch"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    case, steps, sent = CASES[name], Steps(), Sent()
    model, guide, data = case.make()
    loader = DataLoader(data, batch_size=case.batch // size, shuffle=True, drop_last=True)
    module = SVIModule(model, guide, optimizer=case.optimizer)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    options: dict[str, Any] = {"strategy": "ddp", "devices": size} if size > 1 else {"devices": 1}
    options |= {"max_steps": 5, "callbacks": sent} if counted else {"max_steps": NUM_WARM + NUM_STEPS + 1}
    options.setdefault("callbacks", steps)
    lightning.Trainer(accelerator="cpu", max_epochs=-1, **options, **quiet).fit(module, loader)
    if rank == 0 and counted:
        found = {"sent": median(sent.steps), "worked_out": worked_out(case, guide, model, size)}
        print(json.dumps(found))
    elif rank == 0:
        print(json.dumps(steps.per_step()))


# Comparing


def in_processes(name: str, size: int, *options: str) -> dict[str, float]:
    """What one process, or several as ``torchrun`` would start them, measure."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(size):
        own = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        own |= dict(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", TORCHELASTIC_RUN_ID="benchmark")
        command = [sys.executable, __file__, name, "--measure", str(rank), str(size), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (own if size > 1 else {})
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{name!r} failed in {size} processes.")
    return json.loads(outputs[0].splitlines()[-1])


def rows(names: list[str], num_pairs: int) -> Iterator[str]:
    """The table, line by line."""
    yield f"{'':34s}{'ms per step and process':38s}{'on the processor':26s}{'bytes per step and process':>36s}"
    columns = f"{'one':>8s}{'two':>8s}{'ratio':>7s}{'':15s}{'one':>8s}{'two':>8s}{'ratio':>7s}{'':3s}"
    yield f"{'':34s}{columns}{'handed over':>12s}{'worked out':>12s}{'sent':>12s}"
    for name in names:
        pairs = [(in_processes(name, 1), in_processes(name, 2)) for _ in range(num_pairs)]
        counts = in_processes(name, 2, "--counted")
        by_clock, spread = _times(pairs, "seconds")
        on_processor, _ = _times(pairs, "processor")
        sent = median(two["by_system"] for _, two in pairs) / 2
        sizes = f"{counts['sent']:12,.0f}{counts['worked_out']:12,.0f}{sent:12,.0f}"
        yield f"{name:34s}{by_clock} {spread:14s}{on_processor}{'':3s}{sizes}"


def _times(pairs: list[tuple[dict[str, float], dict[str, float]]], key: str) -> tuple[str, str]:
    """Medians for one process, for two, and of the ratios; the least and the largest ratio."""
    ratios = [one[key] / two[key] for one, two in pairs]
    one, two = (1000 * median(pair[i][key] for pair in pairs) for i in range(2))
    return f"{one:8.1f}{two:8.1f}{median(ratios):7.2f}", f"({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *CASES])
    parser.add_argument("--num-pairs", type=int, default=5)
    parser.add_argument("--measure", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.names[0], *options.measure, options.counted)
        return
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{platform.machine()}, {os.cpu_count()} cores{load}, torch {torch.__version__}, {options.num_pairs} pairs")
    for row in rows(options.names or [*CASES], options.num_pairs):
        print(row, flush=True)


if __name__ == "__main__":
    main()
