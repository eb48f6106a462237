"""Models of images with codes, whose prior is learned with the model, and with no latent at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_amortized import Codebook


class CodePrior(nn.Module):
    """A network from the codes of the positions before, and a context, to the logits of each position's code.

    Args:
        num_codes: Number of codes K.
        num_positions: Number of positions P.
        context_dim: Width of the context.
        hidden_dim: Width of the recurrent network.
    """

    def __init__(self, num_codes: int, num_positions: int, context_dim: int = 0, hidden_dim: int = 32) -> None:
        super().__init__()
        self.num_codes, self.num_positions = num_codes, num_positions
        self.embedding = nn.Embedding(num_codes, hidden_dim)
        self.start = nn.Parameter(torch.zeros(hidden_dim))
        self.place = nn.Parameter(0.1 * torch.randn(num_positions, hidden_dim))
        self.context = nn.Linear(context_dim, hidden_dim) if context_dim else None
        self.network = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        self.head = nn.Linear(hidden_dim, num_codes)

    def forward(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        """From codes ``(*, P)`` and context ``(*, C)`` to logits ``(*, P, K)``."""
        rows = codes.reshape(-1, self.num_positions)
        start = self.start.expand(len(rows), 1, -1)
        seen = torch.cat([start, self.embedding(rows[:, :-1])], 1) + self.place
        if self.context is not None and context is not None:
            seen = seen + self.context(context.expand(*codes.shape[:-1], -1).reshape(len(rows), 1, -1))
        return self.head(self.network(seen)[0]).reshape(*codes.shape, self.num_codes)


class Autoregressive(dist.Categorical):
    """Codes of P positions, each given those before it, and a context; with ``to_event(1)`` their joint distribution.

    Args:
        prior: The network.
        batch_shape: Shape of the codes, P last.
        context: What all positions depend on, ``(*, C)``.
    """

    def __init__(self, prior: CodePrior, batch_shape: Sequence[int] = (), context: Tensor | None = None) -> None:
        shape = tuple(batch_shape) or (prior.num_positions,)
        super().__init__(logits=prior.start.new_zeros(*shape, prior.num_codes), validate_args=False)
        self.prior, self.given = prior, context

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """The same distribution in another shape."""
        return Autoregressive(self.prior, batch_shape, self.given)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of each position given those before it, ``(*, P)``."""
        return dist.Categorical(logits=self.prior(value, self.given)).log_prob(value)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One position after the other."""
        codes = torch.zeros(self._extended_shape(torch.Size(sample_shape)), dtype=torch.long)
        for position in range(self.prior.num_positions):
            codes[..., position] = dist.Categorical(logits=self.prior(codes, self.given)[..., position, :]).sample()
        return codes


class CodeModel(nn.Module):
    """p(x, k) = prod_j p(k_j | k_1, ..., k_{j-1}) p(x | e_k), with the decoder of a VAE."""

    def __init__(self, decoder: Any, num_codes: int, num_positions: int, dim: int) -> None:
        super().__init__()
        self.decoder, self.codebook = decoder, Codebook(num_codes, dim)
        self.prior = CodePrior(num_codes, num_positions)

    def forward(self, x: Tensor) -> None:
        """The Pyro model."""
        pyro.module("codes", self)
        with pyro.plate("images", x.shape[0]):
            code = pyro.sample("code", Autoregressive(self.prior).to_event(1))
            z = self.codebook(code).flatten(-2)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder.logits(x, z)).to_event(1), obs=x)

    def latent(self, codes: Tensor) -> Tensor:
        """What the decoder is given of codes."""
        return self.codebook(codes).flatten(-2)


class WithoutLatent(nn.Module):
    """p(x), with the decoder of a VAE whose latent is 0."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> None:
        """The Pyro model."""
        pyro.module("without", self)
        with pyro.plate("images", x.shape[0]):
            z = x.new_zeros(x.shape[0], self.decoder.latent_dim)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder.logits(x, z)).to_event(1), obs=x)


class CoarseToFine(nn.Module):
    """Coarse codes and fine ones, whose prior depends on the coarse ones, with the decoder of a VAE."""

    def __init__(self, decoder: Any, num_codes: int, coarse: tuple[int, int], fine: tuple[int, int]) -> None:
        super().__init__()
        self.decoder = decoder
        (num_coarse, coarse_dim), (num_fine, fine_dim) = coarse, fine
        self.coarse, self.fine = Codebook(num_codes, coarse_dim), Codebook(num_codes, fine_dim)
        self.coarse_prior = CodePrior(num_codes, num_coarse)
        self.fine_prior = CodePrior(num_codes, num_fine, context_dim=num_coarse * coarse_dim)

    def forward(self, x: Tensor) -> None:
        """The Pyro model."""
        pyro.module("coarse_to_fine", self)
        with pyro.plate("images", x.shape[0]):
            coarse = pyro.sample("coarse", Autoregressive(self.coarse_prior).to_event(1))
            known = self.coarse(coarse).flatten(-2)
            prior = Autoregressive(self.fine_prior, (x.shape[0], self.fine_prior.num_positions), known.detach())
            fine = pyro.sample("fine", prior.to_event(1))
            z = torch.cat([known, self.fine(fine).flatten(-2)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder.logits(x, z)).to_event(1), obs=x)

    def latent(self, codes: dict[str, Tensor]) -> Tensor:
        """What the decoder is given of codes."""
        return torch.cat([self.coarse(codes["coarse"]).flatten(-2), self.fine(codes["fine"]).flatten(-2)], -1)

    def books(self) -> dict[str, Codebook]:
        """The codebooks by site."""
        return {"coarse": self.coarse, "fine": self.fine}
