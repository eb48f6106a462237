"""Does my VAE use its latents? A decoder that can do without them, and seven ways to train it.

The decoder predicts each pixel from those before it and from z (a masked autoencoder, MADE), so that a plain VAE has
little use for z: its posterior collapses to the prior. Trains it so, and with each of the remedies, for the same number
of SVI steps; prints what the collapse report says of the plain VAE and a table of all, and draws the collapse curves.
Run this file, with ``--help`` for its options.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from _common import drawing, load_images, make_parser, picture_path
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn
from tqdm.auto import trange

from pyro_amortized import (
    AmortizedGuide,
    CollapseReport,
    MLPEncoder,
    NaturalGradient,
    SemiAmortizedGuide,
    collapse_report,
)
from pyro_amortized.training import (
    AggressiveEncoder,
    CapacityELBO,
    FreeBitsELBO,
    KLAnnealing,
    cyclical_schedule,
    linear_schedule,
)

BATCH_SIZE, RATE = 100, 2e-3


class AutoregressiveVAE(nn.Module):
    """p(x, z) = N(z; 0, I) prod_i Bernoulli(x_i; f_i(x_1, ..., x_{i-1}, z))."""

    def __init__(self, num_pixels: int, latent_dim: int = 8, hidden_dim: int = 256) -> None:
        super().__init__()
        self.latent_dim, self.hidden_dim = latent_dim, hidden_dim
        pixel = torch.arange(num_pixels)
        degree = torch.arange(hidden_dim) % (num_pixels - 1)  # a hidden unit sees the pixels up to its degree
        self.register_buffer("see_pixel", (degree[:, None] >= pixel).float())
        self.register_buffer("see_hidden", (degree[:, None] >= degree).float())
        self.register_buffer("predict", (pixel[:, None] > degree).float())
        self.register_buffer("earlier", (pixel[:, None] > pixel).float())
        self.from_latent = nn.Linear(latent_dim, hidden_dim)
        self.from_pixels = nn.Linear(num_pixels, hidden_dim)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, num_pixels)
        self.skip = nn.Linear(num_pixels, num_pixels, bias=False)
        with torch.no_grad():
            self.from_latent.weight.mul_(0.1)  # z says little at first, and the pixels are soon known without it

    def logits(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The logit of every pixel given those before it, and z."""
        first = (_masked(self.from_pixels, self.see_pixel, x) + self.from_latent(z)).relu()
        second = _masked(self.hidden, self.see_hidden, first).relu()
        return _masked(self.out, self.predict, second) + _masked(self.skip, self.earlier, x)

    def forward(self, x: torch.Tensor) -> None:
        """The Pyro model."""
        pyro.module("decoder", self)
        with pyro.plate("images", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.logits(x, z)).to_event(1), obs=x)

    def make_encoder(self) -> MLPEncoder:
        """An encoder about as large as the decoder."""
        return MLPEncoder(self.out.out_features, (self.hidden_dim,) * 2, standardize=False)


def _masked(layer: nn.Linear, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight * mask, layer.bias)


@dataclass
class Run:
    """The training of one model and guide.

    Attributes:
        model: The model.
        guide: Its guide.
        images: Training images.
        num_steps: Number of steps of the model.
    """

    model: AutoregressiveVAE
    guide: Any
    images: torch.Tensor
    num_steps: int

    def batch(self) -> torch.Tensor:
        """Images drawn at random."""
        return self.images[torch.randint(len(self.images), (BATCH_SIZE,))]


Step = Callable[[int], Any]
"""Trains the model by one step, given the number of steps done."""


def plain(run: Run) -> Step:
    """SVI as it is."""
    svi = SVI(run.model, run.guide, ClippedAdam({"lr": RATE}), TraceMeanField_ELBO())
    return lambda step: svi.step(run.batch())


def annealed(run: Run, schedule: Callable[[int], float]) -> Step:
    """KL annealing."""
    annealing = KLAnnealing(run.model, run.guide, schedule)
    svi = SVI(annealing.model, annealing.guide, ClippedAdam({"lr": RATE}), TraceMeanField_ELBO())
    return lambda step: (svi.step(run.batch()), annealing.step())


def linear(run: Run) -> Step:
    """KL annealing in the first half of the training."""
    return annealed(run, linear_schedule(max(1, run.num_steps // 2)))


def cyclical(run: Run) -> Step:
    """KL annealing in four cycles."""
    return annealed(run, cyclical_schedule(run.num_steps))


def free_bits(run: Run) -> Step:
    """A quarter of a nat is free in every dimension."""
    svi = SVI(run.model, run.guide, ClippedAdam({"lr": RATE}), FreeBitsELBO(0.25))
    return lambda step: svi.step(run.batch())


def capacity(run: Run) -> Step:
    """The KL divergence is led to 2 nats in the first half of the training."""
    objective = CapacityELBO(0.0)
    svi = SVI(run.model, run.guide, ClippedAdam({"lr": RATE}), objective)

    def train(step: int) -> None:
        objective.capacity = 2.0 * min(1.0, 2 * step / run.num_steps)
        svi.step(run.batch())

    return train


def aggressive(run: Run) -> Step:
    """The encoder alone before every step of the model, for a quarter of them at most."""
    optimizer = ClippedAdam({"lr": RATE})
    svi = AggressiveEncoder(run.model, run.guide, optimizer, TraceMeanField_ELBO(), max_encoder_steps=20)

    def train(step: int) -> None:
        svi.step(run.batch())
        while svi.encoder_steps:
            svi.step(run.batch())
        if svi.aggressive and (step + 1) % 20 == 0:
            svi.validate(run.images[:400])
            svi.aggressive &= step < run.num_steps // 4

    return train


METHODS: dict[str, Callable[[Run], Step]] = {
    "plain VAE": plain,
    "linear annealing": linear,
    "cyclical annealing": cyclical,
    "free bits": free_bits,
    "capacity": capacity,
    "aggressive encoder": aggressive,
    "semi-amortized": plain,
}


def prepare(name: str, images: torch.Tensor, num_steps: int) -> Run:
    """A new model and guide."""
    model = AutoregressiveVAE(images.shape[1])
    if name != "semi-amortized":
        return Run(model, AmortizedGuide(model, model.make_encoder()), images, num_steps)
    update = NaturalGradient(0.3)
    guide = SemiAmortizedGuide(model, model.make_encoder(), num_steps=3, update=update, num_particles=2)
    return Run(model, guide, images, num_steps)


def elbo(run: Run, images: torch.Tensor) -> float:
    """The plain ELBO, nats per image, from the same draws for all methods."""
    torch.manual_seed(0)
    estimator = TraceMeanField_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return -sum(estimator.loss(run.model, run.guide, images) for _ in range(5)) / 5 / len(images)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, prints report and table, saves the picture."""
    parser = make_parser(__doc__, num_steps=1000, num_images=397, share_refined="all of them")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    train_images, held_out = load_images(args.data)
    held_out = held_out[: args.num_images]
    reports: dict[str, CollapseReport] = {}
    rows = []
    for name, method in METHODS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        run = prepare(name, train_images, args.num_steps)
        began, train = time.perf_counter(), method(run)
        for step in trange(run.num_steps, desc=f"training, {name}"):
            train(step)
        seconds = time.perf_counter() - began
        run.guide.eval()
        reports[name] = collapse_report(run.model, run.guide, (held_out,), seed=args.seed)
        rows.append((name, run.num_steps, seconds, elbo(run, train_images), elbo(run, held_out)))

    print(f"\nThe plain VAE, {reports['plain VAE']}\n")
    print(f"{len(held_out)} held-out images, nats per image")
    print(f"{'method':20s}{'steps':>6s}{'seconds':>9s}", end="")
    print(f"{'training ELBO':>15s}{'held-out ELBO':>15s}{'KL':>8s}{'mutual inf.':>13s}{'active':>8s}")
    for name, steps, seconds, training, test in rows:
        report = reports[name]
        kl, information = report.dataset.attrs["total_kl"], report.mutual_information
        print(f"{name:20s}{steps:6d}{seconds:9.1f}{training:15.2f}{test:15.2f}", end="")
        print(f"{kl:8.2f}{information:13.2f}{report.active_units:8d}")
    print("steps: of the model. The aggressive encoder has further ones of its own; the semi-amortized guide refines")
    print("its encoder's answer by 3 steps, in training and here. All ELBOs are plain ones, without beta or free bits.")

    picture = picture_path(args.out, "posterior_collapse")
    with drawing(picture, "Posterior collapse", 1, 2, figsize=(11, 4.5)) as (bars, curves):
        reports["plain VAE"].plot(bars).set_title("the plain VAE")
        for name, report in reports.items():
            report.plot_curve(curves, label=name)
        curves.set_title("dimensions collapsed at a threshold of epsilon")
    print(f"\nsaved {picture} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
