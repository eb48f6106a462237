"""What several benchmarks measure with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

NUM_STEPS, STEP_SIZE, MOMENTUM = 20, 0.002, 0.5
"""Of refinement."""


def paired_ratio(first: Callable[[], object], second: Callable[[], object], repeats: int = 31, inner: int = 40) -> str:
    """Time of ``first`` over time of ``second``: the median over alternating blocks, and the quartiles."""
    for function in (first, second):
        for _ in range(inner):
            function()
    ratios, seconds = [], []
    for repeat in range(repeats):
        times = {}
        for function in (first, second) if repeat % 2 else (second, first):
            start = time.perf_counter()
            for _ in range(inner):
                function()
            times[function] = (time.perf_counter() - start) / inner
        ratios.append(times[first] / times[second])
        seconds.append(times[first])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f}  (quartiles {low:.3f} .. {high:.3f}; {1e3 * statistics.median(seconds):.2f} ms)"


def resident_memory() -> float:
    """Memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Decoder(nn.Module):
    """z -> logits of pixels."""

    def __init__(self, hidden: int, latent: int = 20, pixels: int = 784) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z)


def vae_model(hidden: int, latent: int, name: str) -> Callable[..., None]:
    """A hand-written VAE model, its decoder registered as ``name``."""
    decoder = Decoder(hidden, latent)

    def model(x: torch.Tensor) -> None:
        pyro.module(name, decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model
