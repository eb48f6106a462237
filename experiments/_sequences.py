"""Sequences of tokens with one latent each: the generator, an encoder, and the bound of given sequences."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import nn

LATENT_DIM = 2


class Generator(nn.Module):
    """p(z) = N(0, I), p(x_t | x_<t, z) = softmax(A h_t + B z) with the states h_t of an LSTM that has read x_<t.

    Args:
        vocabulary: Number of tokens.
        hidden_dim: Units of the LSTM and of the embeddings.
    """

    def __init__(self, vocabulary: int, hidden_dim: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, hidden_dim)  # the last one stands before the first token
        self.lstm = nn.LSTMCell(hidden_dim, hidden_dim)
        self.from_state = nn.Linear(hidden_dim, vocabulary)
        self.from_latent = nn.Linear(LATENT_DIM, vocabulary, bias=False)

    @classmethod
    def oracle(cls, vocabulary: int, hidden_dim: int) -> Generator:
        """A generator that is held fixed: weights uniform on (-1, 1), those of the latent on (-5, 5)."""
        generator = cls(vocabulary, hidden_dim).requires_grad_(False)
        for parameter in generator.parameters():
            parameter.uniform_(-1.0, 1.0)
        generator.from_latent.weight.uniform_(-5.0, 5.0)
        return generator

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """What the LSTM knows before every token, ``(N, T, H)``."""
        start = torch.full_like(x[:, :1], self.vocabulary)
        state, states = None, []
        for token in self.embedding(torch.cat([start, x[:, :-1]], 1)).unbind(1):
            state = self.lstm(token, state)
            states.append(state[0])
        return torch.stack(states, 1)

    def logits(self, states: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Of every token, for draws ``(*, N, 2)`` of the latent: ``(*, N, T, V)``."""
        return self.from_state(states) + self.from_latent(z).unsqueeze(-2)

    def forward(self, x: torch.Tensor, states: torch.Tensor | None = None) -> None:
        """The Pyro model of sequences ``(N, T)``, whose states may be given if the generator is held fixed."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            pyro.module("generator", self)
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample(
                "x",
                dist.Categorical(logits=self.logits(self.states(x) if states is None else states, z)).to_event(1),
                obs=x,
            )

    def log_likelihood(self, x: torch.Tensor, states: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """log p(x | z) for draws ``(K, N, 2)``: ``(K, N)``."""
        logits = self.logits(states, z)
        tokens = x.unsqueeze(-1).expand(*logits.shape[:-1], 1)
        return (logits.gather(-1, tokens).squeeze(-1) - logits.logsumexp(-1)).sum(-1)

    @torch.no_grad()
    def generate(self, count: int, length: int) -> torch.Tensor:
        """Sequences from the model."""
        z, x = torch.randn(count, LATENT_DIM), torch.zeros(count, 0, dtype=torch.long)
        for _ in range(length):
            states = self.states(torch.cat([x, torch.zeros(count, 1, dtype=torch.long)], 1))
            probs = self.logits(states[:, -1:], z).squeeze(1).softmax(-1)
            x = torch.cat([x, torch.multinomial(probs, 1)], 1)
        return x


class TokenEncoder(nn.Module):
    """The last state of an LSTM over the tokens, ``(N, H)``."""

    def __init__(self, vocabulary: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden_dim)
        self.lstm = nn.LSTM(hidden_dim, hidden_dim, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of sequences ``(N, T)``."""
        return self.lstm(self.embedding(x.long()))[1][0][-1]


def quasi_noise(count: int) -> torch.Tensor:
    """Standard normal noise ``(count, 1, 2)``, the same in every call, from a scrambled Sobol sequence."""
    uniform = torch.quasirandom.SobolEngine(LATENT_DIM, scramble=True, seed=0).draw(count)
    return torch.special.ndtri(uniform.clamp(1e-5, 1 - 1e-5)).unsqueeze(1)


@torch.no_grad()
def bounds(generator: Generator, q: dist.Normal, x: torch.Tensor) -> torch.Tensor:
    """The ELBO of every sequence under normal posteriors, ``(N,)`` in nats, on noise that is the same for all."""
    states, parts = generator.states(x), []
    for noise in quasi_noise(256).split(16):
        parts.append(generator.log_likelihood(x, states, q.loc + q.scale * noise).mean(0))
    return torch.stack(parts).mean(0) - divergences(q)


def divergences(q: dist.Normal) -> torch.Tensor:
    """KL(q || p(z)) of every sequence, ``(N,)`` in nats."""
    return torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(()), 1.0)).sum(-1)
