"""A sparse gamma deep exponential family: three layers of Gamma latents per image, Gamma weights, Poisson counts.

Rajesh Ranganath, Linpeng Tang, Laurent Charlin, David M. Blei, "Deep Exponential Families" (2015); after Pyro's example
``sparse_gamma_def.py`` (2018). The posterior of a Gamma latent this sparse has a long tail towards zero in log space,
which no normal there fits well: expect a large approximation gap, and importance weights that the gap estimate flags.

Run ``python examples/zoo/sparse_gamma.py``. Needs scikit-learn: the pixels of its digits are counts up to 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _problem import RATES, Problem, indices, main
from pyro.infer.autoguide import init_to_mean
from sklearn.datasets import load_digits
from torch import Tensor

TINY = 1e-6
"""The least mean, and one over the largest, lest a Gamma or Poisson lose its density where those above it go wild."""


def model(counts: Tensor, index: Tensor | None = None, *, widths: tuple[int, ...], shape: float = 0.3) -> None:
    """Counts ``(N, pixels)``; all of them, or those at ``index``.

    Args:
        counts: The data.
        index: The images of the batch.
        widths: Widths of the layers, top first.
        shape: Shape of the Gammas of the layers: the smaller, the sparser.
    """
    dims = (*widths, counts.shape[1])
    weights = [
        pyro.sample(f"weights_{i}", dist.Gamma(torch.full((above, below), 0.5), 0.5 * above).to_event(2))
        for i, (above, below) in enumerate(zip(dims[:-1], dims[1:], strict=True))
    ]
    with images(counts, index):
        mean = torch.ones(widths[0])
        for i, weight in enumerate(weights):
            layer = pyro.sample(f"layer_{i}", dist.Gamma(torch.tensor(shape), shape / mean).to_event(1))
            mean = (layer @ weight).clamp(min=TINY, max=1 / TINY)
        pyro.sample("counts", dist.Poisson(mean).to_event(1), obs=pyro.subsample(counts, event_dim=1))


def images(counts: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("images", len(counts), subsample=index)


def batches(args: tuple[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return ((*args, index) for index in indices(len(args[0]), size))


def log_counts(counts: Tensor, index: Tensor | None = None) -> Tensor:
    """What the encoder sees."""
    return pyro.subsample(counts, event_dim=1).log1p()


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    counts = torch.tensor(load_digits().data, dtype=torch.float)[torch.randperm(1797)]
    if small:  # a quarter of the resolution
        counts = counts.reshape(-1, 4, 2, 4, 2).mean((2, 4)).round().flatten(1)
    size, num_unseen, widths = (80, 2, (2, 3, 4)) if small else (1500, 10, (5, 10, 20))
    return Problem(
        name="Sparse gamma deep exponential family",
        model=partial(model, widths=widths),
        train=(counts[:size],),
        held_out=(counts[size : size + num_unseen],),
        options={"encoder_input": log_counts, "init_loc_fn": init_to_mean},
        num_datapoints=lambda counts, *_: len(counts),
        batches=partial(batches, size=size // 2 if small else 64),
        create_plates=images,
        global_rate=25.0,
    )


if __name__ == "__main__":
    main(make_problem, num_steps=500, lr=1e-2, rates=RATES)
