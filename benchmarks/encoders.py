"""Where the ready-made encoders win against the multilayer perceptron: the ELBO of new datapoints, three seeds.

``make encoders``, or ``python benchmarks/encoders.py NAME ...`` with names of the models. In all but the last the model
is known, so that the encoder alone is on trial, and what one ELBO exceeds another by is what its amortization gap is
smaller by. Figures are in nats per datapoint. Seeds draw models and data anew, so that encoders are compared seed by
seed: the mean of what they gain over the perceptron, and its standard error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_amortized import AmortizedGuide, ConvEncoder, CountEncoder, MLPEncoder, SequenceEncoder

NUM_NEW, NUM_PARTICLES = 250, 50


@dataclass(frozen=True)
class Comparison:
    """A model with data, and the encoders to compare.

    Attributes:
        model: Makes the model.
        simulate: From a number of datapoints to the model's arguments.
        encoders: Makes the encoders, by name.
        options: Of the guides.
        num_train: Number of datapoints to train on.
        num_steps: Number of steps of training.
    """

    model: Callable[[], Callable[..., Any]]
    simulate: Callable[[int], tuple[Tensor, ...]]
    encoders: Mapping[str, Callable[[], nn.Module]]
    options: Mapping[str, Any]
    num_train: int = 1000
    num_steps: int = 500


# Counts of a process that goes on in time


def chain(x: Tensor) -> None:
    """A random walk, seen through Poisson counts."""
    with pyro.plate("series", len(x)):
        z = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(0.95 * z, 0.3))
            pyro.sample(f"x_{t}", dist.Poisson((1.0 + z).exp()), obs=x[:, t])


def some_chains(size: int, num_steps: int = 15) -> tuple[Tensor]:
    z, x = torch.zeros(size), []
    for _ in range(num_steps):
        z = 0.95 * z + 0.3 * torch.randn(size)
        x.append(torch.poisson((1.0 + z).exp()))
    return (torch.stack(x, -1),)


# Images of a spot


PLACES = torch.stack(torch.meshgrid(*[torch.linspace(-1.0, 1.0, 24)] * 2, indexing="ij"), -1)


def rendered(place: Tensor, brightness: Tensor) -> Tensor:
    """Images ``(*, 24, 24)`` of a round spot."""
    squared = (PLACES - place[..., None, None, :]).square().sum(-1)
    return brightness[..., None, None] * (-squared / (2 * 0.12**2)).exp()


def spots(x: Tensor) -> None:
    """A place and a brightness, seen through a noisy image."""
    with pyro.plate("images", len(x)):
        place = pyro.sample("place", dist.Normal(torch.zeros(2), 0.4).to_event(1))
        brightness = pyro.sample("brightness", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(rendered(place, brightness), 0.5).to_event(2), obs=x)


def some_spots(size: int) -> tuple[Tensor]:
    image = rendered(0.4 * torch.randn(size, 2), (0.3 * torch.randn(size)).exp())
    return (image + 0.5 * torch.randn(size, 24, 24),)


# Counts of genes


class Cells(nn.Module):
    """Negative binomial counts, whose shares a cell's state and batch decide; the size of a cell is known."""

    def __init__(self, num_genes: int, num_batches: int, latent_dim: int = 4) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.hidden = nn.Sequential(nn.Linear(latent_dim + num_batches, 64), nn.Softplus())
        self.share = nn.Linear(64, num_genes)
        self.log_dispersion = nn.Parameter(torch.zeros(num_genes))

    def forward(self, counts: Tensor, size: Tensor, batch: Tensor) -> None:
        pyro.module("cells", self)
        with pyro.plate("cells", len(counts)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1))
            share = self.share(self.hidden(torch.cat([z, batch], -1))).log_softmax(-1)
            logits = size.log().unsqueeze(-1) + share - self.log_dispersion
            likelihood = dist.NegativeBinomial(self.log_dispersion.exp(), logits=logits)
            pyro.sample("counts", likelihood.to_event(1), obs=counts)


def some_cells(size: int, num_genes: int = 60, num_batches: int = 4) -> tuple[Tensor, ...]:
    """Counts, sizes over a factor of 30, and one-hot batches."""
    loadings, effects = 0.7 * torch.randn(4, num_genes), 0.5 * torch.randn(num_batches, num_genes)
    base, z = torch.randn(num_genes), torch.randn(size, 4)
    batch = one_hot(torch.randint(num_batches, (size,)), num_batches).float()
    share = (base + z @ loadings + batch @ effects).softmax(-1)
    mean = 60 * 30 ** torch.rand(size, 1) * share
    counts = torch.poisson(mean * dist.Gamma(3.0, 3.0).sample(mean.shape))
    return counts, 1 + counts.sum(-1), batch


COMPARISONS: dict[str, Callable[[], Comparison]] = {
    "sequences": lambda: Comparison(
        lambda: chain,
        some_chains,
        {
            "MLPEncoder": lambda: MLPEncoder(15),
            "SequenceEncoder": lambda: SequenceEncoder(1),
            "by attention": lambda: SequenceEncoder(1, network="transformer"),
        },
        {"encoder_input": "x"},
        num_train=200,
        num_steps=300,
    ),
    "images": lambda: Comparison(
        lambda: spots,
        some_spots,
        {"MLPEncoder": lambda: MLPEncoder(24 * 24), "ConvEncoder": lambda: ConvEncoder(1)},
        {},
    ),
    "counts": lambda: Comparison(
        lambda: Cells(60, 4),
        some_cells,
        {"MLPEncoder": lambda: MLPEncoder(60 + 1 + 4), "CountEncoder": lambda: CountEncoder(60, num_batches=4)},
        {"encoder_input": ["counts", "size", "batch"]},
        num_train=2000,
    ),
}


def batches(args: tuple[Tensor, ...], size: int = 64) -> Iterator[tuple[Tensor, ...]]:
    while True:
        rows = torch.randint(len(args[0]), (size,))
        yield tuple(x[rows] for x in args)


def run(name: str, encoder: str, seed: int, lr: float) -> tuple[float, int, float]:
    """The ELBO of new datapoints, the number of the guide's parameters, and seconds of training."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    comparison = COMPARISONS[name]()
    data = comparison.simulate(comparison.num_train + NUM_NEW)
    train, new = (tuple(x[rows] for x in data) for rows in (slice(-NUM_NEW), slice(-NUM_NEW, None)))
    model, num_steps = comparison.model(), comparison.num_steps
    guide = AmortizedGuide(model, comparison.encoders[encoder](), **comparison.options)
    guide.setup(*train)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / num_steps)}), Trace_ELBO())
    start = time.perf_counter()
    for _, args in zip(range(num_steps), batches(train), strict=False):
        svi.step(*args)
    seconds = time.perf_counter() - start
    guide.eval()
    elbo = -mean(svi.evaluate_loss(*new) for _ in range(NUM_PARTICLES)) / len(new[0])
    return elbo, sum(p.numel() for p in guide.parameters()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*COMPARISONS])
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("ELBO", "over MLP", "+- s.e.", "parameters", "seconds")
    print(f"{'model':10s} {'encoder':16s}" + "".join(f"{column:>11s}" for column in columns))
    for name in options.names:
        base: list[float] = []
        for encoder in COMPARISONS[name]().encoders:
            runs = [run(name, encoder, seed, options.lr) for seed in range(options.num_seeds)]
            elbos = [elbo for elbo, _, _ in runs]
            base = base or elbos
            gains = [elbo - other for elbo, other in zip(elbos, base, strict=True)]
            figures = (mean(elbos), mean(gains), stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan"))
            row = "".join(f"{figure:11.3f}" for figure in figures)
            print(f"{name:10s} {encoder:16s}{row}{runs[0][1]:11d}{mean(s for _, _, s in runs):11.0f}", flush=True)


if __name__ == "__main__":
    main()
