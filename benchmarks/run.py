"""Costs as ratios, both sides measured in turn in one run: ``make bench``, or ``python benchmarks/run.py NAME ...``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_amortized import AmortizedGuide, PerDatapointGuide


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


def svi_step() -> None:
    """An SVI step of AmortizedGuide against a hand-written Pyro guide with the same networks."""
    for hidden, batch in ((400, 128), (64, 64)):
        pyro.clear_param_store()
        x = torch.rand(batch, 784).round()
        encoder, head = nn.Sequential(nn.Linear(784, hidden), nn.ReLU()), nn.Linear(hidden, 40)
        hand_model = vae_model(hidden, 20, "decoder_by_hand")

        def hand_guide(x: torch.Tensor, encoder: nn.Module = encoder, head: nn.Module = head) -> None:
            pyro.module("encoder", encoder)
            pyro.module("head", head)
            with pyro.plate("data", x.shape[0]):
                loc, log_scale = head(encoder(x)).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        our_model = vae_model(hidden, 20, "decoder_for_guide")
        our_guide = AmortizedGuide(our_model, nn.Sequential(nn.Linear(784, hidden), nn.ReLU()))
        hand = SVI(hand_model, hand_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        ours = SVI(our_model, our_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        ratio = paired_ratio(lambda: ours.step(x), lambda: hand.step(x))  # noqa: B023
        print(f"SVI step 784-{hidden}-20, batch {batch}: AmortizedGuide / hand-written guide = {ratio}")


def sparse_table() -> None:
    """A step of the sparse per-datapoint table at a million datapoints against ten thousand."""
    steps = {}
    for size in (1_000_000, 10_000):
        y = torch.randn(size, 5)

        def model(y: torch.Tensor, index: torch.Tensor, size: int = size) -> None:
            with pyro.plate("data", size, subsample=index):
                z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

        guide = PerDatapointGuide(model, sparse=True, name=f"table_{size}")
        svi = SVI(model, guide, pyro.optim.Adagrad({"lr": 0.1}), Trace_ELBO())
        steps[size] = lambda svi=svi, y=y, size=size: svi.step(y, torch.randint(size, (128,)))
    print(f"PerDatapointGuide(sparse=True) step, N = 1e6 / N = 1e4: {paired_ratio(steps[1_000_000], steps[10_000])}")


BENCHMARKS = {"svi_step": svi_step, "sparse_table": sparse_table}


def main() -> None:
    """Runs the benchmarks named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    for name in parser.parse_args().names:
        torch.manual_seed(0)
        pyro.clear_param_store()
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
