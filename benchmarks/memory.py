"""Memory of steps and of diagnostics: run by ``make bench``."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from measure import MOMENTUM, NUM_STEPS, STEP_SIZE, paired_ratio, resident_memory, vae_model
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_amortized import (
    AmortizedGuide,
    GradientAscent,
    MLPEncoder,
    SemiAmortizedGuide,
    estimate_gaps,
    to_arviz,
)


def checkpoint_memory() -> None:
    """Peak memory and time of unrolled steps with and without ``checkpoint=True``."""
    x = torch.rand(512, 784).round()
    for num_steps, checkpoint in ((3, False), (NUM_STEPS, False), (NUM_STEPS, True)):
        pyro.clear_param_store()
        model = vae_model(400, 20, "decoder")
        update = GradientAscent(STEP_SIZE, MOMENTUM)
        guide = SemiAmortizedGuide(model, num_steps=num_steps, update=update, checkpoint=checkpoint)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        svi.step(x)
        start = time.perf_counter()
        with SavedBytes() as saved:
            svi.step(x)
        seconds = time.perf_counter() - start
        print(
            f"{num_steps} unrolled steps 784-400-20, batch 512, checkpoint={checkpoint}: "
            f"{saved.peak / 2**20:.0f} MiB of activations at the peak, {1e3 * seconds:.0f} ms"
        )


class SavedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, among those made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        """Adds a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        """Takes a storage out again."""
        self.known.discard(key)
        self.alive -= size


def many_datapoints() -> None:
    """Memory and time of estimate_gaps and to_arviz on a loader: 4 times the batches of 500, 200 counts each."""
    weights = 0.3 * torch.randn(2, 200)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((z @ weights).exp()).to_event(1), obs=x)

    def counts(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.poisson((torch.randn(500, 2, generator=rng) @ weights).exp(), generator=rng)

    guide = AmortizedGuide(model, MLPEncoder(200, (64,)), name="many")
    guide.setup(counts(0))

    def work(function: Callable[[Iterator[torch.Tensor]], object], count: int) -> tuple[float, float]:
        resident: list[float] = []

        def batches() -> Iterator[torch.Tensor]:
            for seed in range(count):
                resident.append(resident_memory())
                yield counts(seed)

        start = time.perf_counter()
        function(batches())
        return time.perf_counter() - start, max(resident[1:]) - resident[1]

    tasks = {
        "estimate_gaps": lambda batches: estimate_gaps(model, guide, batches, tolerance=0.1, max_samples=2000),
        "to_arviz": lambda batches: to_arviz(
            model, guide, batches, num_samples=20, groups=("posterior", "sample_stats")
        ),
    }
    for name, task in tasks.items():
        work(task, 2)
        (short, _), (long, growth) = work(task, 5), work(task, 20)
        print(
            f"{name}, 10000 datapoints / 2500: time {long / short:.2f} ({long:.1f} s); resident memory grew by "
            f"{growth:.0f} MiB (the inputs: {10000 * 200 * 4 / 2**20:.0f} MiB)"
        )


def numpy_in_model() -> None:
    """Time and memory of a step where the model holds a NumPy array of 400 MB, against one where it holds none."""

    def step(megabytes: int) -> Callable[[], object]:
        held = np.ones(megabytes * 2**17)

        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(5), float(held.size > 0)).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        svi = SVI(model, AmortizedGuide(model, name=f"guide_{megabytes}"), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        return lambda: svi.step(torch.randn(int(torch.randint(32, 64, ())), 5))  # a new batch size now and then

    large, small = step(400), step(1)
    for _ in range(200):
        large()
    before = resident_memory()
    ratio = paired_ratio(large, small, repeats=11, inner=20)
    grown = resident_memory() - before
    print(f"SVI step, model with 400 MB of NumPy / with 1 MB = {ratio}; resident memory grew by {grown:.0f} MiB")
