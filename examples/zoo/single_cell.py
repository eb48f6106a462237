"""Counts of genes in single cells: zero-inflated negative binomial, log-normal library size, batch effects.

In the spirit of scVI: Romain Lopez, Jeffrey Regier, Michael B. Cole, Michael I. Jordan, Nir Yosef, "Deep generative
modeling for single-cell transcriptomics" (2018), with simulated cells.

Run ``python examples/zoo/single_cell.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _problem import RATES, Problem, indices, main
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_amortized import MLPEncoder


class CellModel(nn.Module):
    """A cell's state z and the batch it was measured in decide the shares of its genes.

    Args:
        num_genes: Number of genes.
        num_batches: Number of batches.
        latent_dim: Dimension of z.
        hidden_dim: Width of the decoder.
        log_library: Mean and standard deviation of the log library sizes.
    """

    def __init__(
        self, num_genes: int, num_batches: int, latent_dim: int, hidden_dim: int, log_library: tuple[float, float]
    ) -> None:
        super().__init__()
        self.num_genes, self.latent_dim, self.log_library = num_genes, latent_dim, log_library
        self.hidden = nn.Sequential(nn.Linear(latent_dim + num_batches, hidden_dim), nn.Softplus())
        self.log_share, self.gate = nn.Linear(hidden_dim, num_genes), nn.Linear(hidden_dim, num_genes)

    def forward(self, counts: Tensor, batch: Tensor, index: Tensor | None = None) -> None:
        """Counts ``(N, genes)`` and one-hot batches ``(N, batches)``; all cells, or those at ``index``."""
        pyro.module("cell_model", self)
        with pyro.plate("genes", self.num_genes):
            dispersion = pyro.sample("dispersion", dist.LogNormal(0.0, 1.0))
        with cells(counts, batch, index):
            z = pyro.sample("z", dist.Normal(counts.new_zeros(self.latent_dim), 1.0).to_event(1))
            library = pyro.sample("library", dist.LogNormal(*map(counts.new_tensor, self.log_library)))
            covariates = pyro.subsample(batch, event_dim=1)
            hidden = self.hidden(torch.cat([z, covariates.expand(*z.shape[:-1], -1)], -1))
            log_mean = library.log().unsqueeze(-1) + self.log_share(hidden).log_softmax(-1)
            logits = log_mean - dispersion.log()
            likelihood = dist.ZeroInflatedNegativeBinomial(dispersion, logits=logits, gate_logits=self.gate(hidden))
            pyro.sample("counts", likelihood.to_event(1), obs=pyro.subsample(counts, event_dim=1))


def simulate(num_cells: int, num_genes: int, num_batches: int) -> tuple[Tensor, Tensor]:
    """Counts and one-hot batches of cells of four types."""
    types = torch.randint(4, (num_cells,))
    batch = one_hot(torch.randint(num_batches, (num_cells,)), num_batches).float()
    log_share = torch.randn(4, num_genes)[types] + batch @ (0.3 * torch.randn(num_batches, num_genes))
    library = dist.LogNormal(4.0, 0.4).sample((num_cells, 1))
    mean = library * log_share.softmax(-1)
    counts = torch.poisson(mean * dist.Gamma(3.0, 3.0).sample(mean.shape))
    return counts * (torch.rand(mean.shape) > 0.1), batch


def cells(counts: Tensor, batch: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("cells", len(counts), subsample=index)


def batches(args: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    return ((*args, index) for index in indices(len(args[0]), size))


def log_counts(counts: Tensor, batch: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the encoder sees: a cell's log counts and that of their sum, and beside them its batch."""
    counts = pyro.subsample(counts, event_dim=1)
    return torch.cat([counts, counts.sum(-1, keepdim=True)], -1).log1p(), pyro.subsample(batch, event_dim=1)


def make_encoder(num_genes: int, num_batches: int, hidden_dim: int) -> nn.Module:
    return MLPEncoder(num_genes + 1 + num_batches, (hidden_dim, hidden_dim))


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    num_genes, num_cells, num_unseen, latent_dim, hidden_dim = (10, 80, 4, 2, 16) if small else (30, 2000, 40, 4, 64)
    counts, batch = simulate(num_cells + num_unseen, num_genes, num_batches=3)
    log_sizes = counts[:num_cells].sum(-1).clamp(min=1.0).log()
    log_library = (log_sizes.mean().item(), log_sizes.std().item())
    return Problem(
        name="Gene counts of single cells",
        model=CellModel(num_genes, 3, latent_dim, hidden_dim, log_library),
        train=(counts[:num_cells], batch[:num_cells]),
        held_out=(counts[num_cells:], batch[num_cells:]),
        options={"plate": "cells", "encoder_input": log_counts, "init_loc_fn": init_to_median},
        encoder=partial(make_encoder, num_genes, 3, hidden_dim),
        num_datapoints=lambda counts, *_: len(counts),
        batches=partial(batches, size=num_cells // 2 if small else 64),
        create_plates=cells,
        global_rate=5.0,
    )


if __name__ == "__main__":
    main(make_problem, num_steps=500, rates=RATES)
