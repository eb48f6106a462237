"""A deep Markov model of binary sequences of unequal length, with an encoder that reads them backwards.

The model has a site for each step, ``z_1``, ``z_2``, ..., in ``pyro.markov``; masks take the steps beyond a sequence's
end out of prior and likelihood, and ``annealing`` scales the latents, as KL annealing does. The guide follows: it masks
and scales its own sites as the model does. The encoder returns features ``(N, T, H)``, which share one head, so that
every batch may have another number T of steps. For comparison, a guide written by hand in the manner of Pyro's own
example, in which q(z_t) also depends on z_{t-1}.

Run ``python examples/zoo/deep_markov.py``.

References:
    Structured Inference Networks for Nonlinear State Space Models, Rahul G. Krishnan, Uri Shalit, David Sontag (2016),
    https://arxiv.org/abs/1609.09869
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _problem import GUIDES, RATES, Problem, elbo, indices, main
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.functional import softplus


class NormalNetwork(nn.Module):
    """From an input to location and scale."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())
        self.loc, self.scale = nn.Linear(hidden_dim, output_dim), nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x)
        return self.loc(hidden), softplus(self.scale(hidden)) + 0.01


class DeepMarkovModel(nn.Module):
    """p(x, z) = prod_t N(z_t; transition(z_{t-1})) Bernoulli(x_t; emission(z_t))."""

    def __init__(self, num_notes: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latent_dim))
        self.transition = NormalNetwork(latent_dim, hidden_dim, latent_dim)
        self.emission = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_notes))

    def forward(self, x: Tensor, lengths: Tensor, index: Tensor | None = None, *, annealing: float = 1.0) -> None:
        """The model.

        Args:
            x: Sequences ``(N, T, P)``, with any zeros and ones beyond their ends.
            lengths: Number of steps of each sequence ``(N,)``.
            index: Which sequences to take; None for all.
            annealing: Scale of the latents' terms.
        """
        pyro.module("deep_markov", self)
        plate = sequences(x, lengths, index)
        x, lengths = rows(x, lengths, index)
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        z = self.start.expand(len(x), -1)
        with plate:
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                present = mask[:, t - 1 : t]
                loc, scale = self.transition(z)
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(z + loc, scale).mask(present).to_event(1))
                notes = dist.Bernoulli(logits=self.emission(z)).mask(present).to_event(1)
                pyro.sample(f"x_{t}", notes, obs=x[:, t - 1])


def rows(x: Tensor, lengths: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (x, lengths) if index is None else (x[index], lengths[index])


def encoder_input(
    x: Tensor, lengths: Tensor, index: Tensor | None = None, *, annealing: float = 1.0
) -> tuple[Tensor, Tensor]:
    return rows(x, lengths, index)


def sequences(x: Tensor, lengths: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("sequences", len(x), subsample=index)


def reversed_within(x: Tensor, lengths: Tensor) -> Tensor:
    """Every sequence turned round by itself; what lies beyond its end stays where it is."""
    steps = torch.arange(x.shape[1]).expand(len(x), -1)
    last = lengths.unsqueeze(-1) - 1
    order = torch.where(steps <= last, last - steps, steps)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


class Backwards(nn.Module):
    """From sequences to features ``(N, T, H)``: those of a step know the step and all later ones."""

    def __init__(self, num_notes: int, hidden_dim: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(num_notes, hidden_dim, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return reversed_within(self.rnn(reversed_within(x, lengths))[0], lengths)


class BothWays(nn.Module):
    """As :class:`Backwards`, with an RNN for the earlier steps too: what q(z_t) without z_{t-1} needs."""

    def __init__(self, num_notes: int, hidden_dim: int) -> None:
        super().__init__()
        self.backwards = Backwards(num_notes, hidden_dim)
        self.forwards = nn.GRU(num_notes, hidden_dim, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([self.backwards(x, lengths), self.forwards(x)[0]], -1)


class HandWritten(nn.Module):
    """q(z_t | z_{t-1}, x_t, x_{t+1}, ...), masked and scaled by hand as the model is."""

    def __init__(self, num_notes: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latent_dim))
        self.encoder = Backwards(num_notes, hidden_dim)
        self.combine = nn.Linear(latent_dim, hidden_dim)
        self.head = NormalNetwork(hidden_dim, hidden_dim, latent_dim)

    def forward(self, x: Tensor, lengths: Tensor, *, annealing: float = 1.0) -> None:
        pyro.module("hand_written", self)
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        features, z = self.encoder(x, lengths), self.start.expand(len(x), -1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                loc, scale = self.head(0.5 * (torch.tanh(self.combine(z)) + features[:, t - 1]))
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(mask[:, t - 1 : t]).to_event(1))


class MaskSteps(Messenger):
    """Masks the sites of steps beyond a sequence's end, in a guide that knows no masks."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        step = re.match(r"z_(\d+)", msg["name"])
        if step:
            msg["mask"] = self.mask[:, int(step[1]) - 1]


class MaskedAutoNormal(AutoNormal):
    """AutoNormal, whose ELBO would count an entropy of steps that have no prior, and so would not be a bound."""

    def forward(self, x: Tensor, lengths: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
        mask = torch.arange(x.shape[1]) < rows(x, lengths, index)[1].unsqueeze(-1)
        with MaskSteps(mask):
            return super().forward(x, lengths, index)


def simulate(num_sequences: int, max_length: int, num_notes: int) -> tuple[Tensor, Tensor]:
    """Binary sequences, driven by a point that goes round a circle at an uneven pace, and their lengths."""
    lengths = torch.randint(max(1, max_length // 3), max_length + 1, (num_sequences,))
    lengths[0] = max_length
    pace = 0.3 + 0.2 * torch.rand(num_sequences, 1) + 0.2 * torch.randn(num_sequences, max_length)
    angle = 6.28 * torch.rand(num_sequences, 1) + pace.cumsum(1)
    places = torch.linspace(0, 6.28, num_notes + 1)[:-1]
    x = dist.Bernoulli(logits=6 * (angle.unsqueeze(-1) - places).cos() - 4).sample()
    return x * (torch.arange(max_length) < lengths.unsqueeze(-1)).unsqueeze(-1), lengths


def trimmed(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A batch without the steps that none of its sequences has."""
    return x[:, : int(lengths.max())], lengths


def batches(size: int) -> Callable[[tuple[Any, ...]], Iterator[tuple[Any, ...]]]:
    """Batches of sequences of similar length, each with as many steps as the longest of them has."""

    def draw(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        x, lengths, *rest = args
        order = lengths.argsort()
        while True:
            first = int(torch.randint(0, max(1, len(x) - size + 1), ()))
            rows = order[first : first + size]
            yield (*trimmed(x[rows], lengths[rows]), *rest)

    return draw


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    num_notes, max_length, latent_dim, hidden_dim = (5, 3, 2, 8) if small else (12, 12, 3, 32)
    num_train, num_held_out = (60, 8) if small else (500, 50)
    x, lengths = simulate(num_train + num_held_out, max_length, num_notes)
    return Problem(
        name="deep Markov model",
        model=DeepMarkovModel(num_notes, latent_dim, hidden_dim),
        train=(x[:num_train], lengths[:num_train]),
        held_out=(x[num_train:], lengths[num_train:]),
        options={"encoder_input": encoder_input, "plate": "sequences"},
        encoder=lambda: BothWays(num_notes, hidden_dim),
        batches=batches(30 if small else 50),
    )


def make_padded_problem(seed: int = 0, small: bool = False) -> Problem:
    """For guides that need the same steps in every call: AutoNormal, and the iterative guide's update network."""
    problem, size = make_problem(seed, small), 30 if small else 50

    def padded(args: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        return ((*args, index) for index in indices(len(args[0]), size))

    name = "deep Markov model, in batches of full length"
    return replace(problem, name=name, batches=padded, create_plates=sequences)


STEPWISE = {name: GUIDES[name] for name in ("per datapoint", "amortized", "semi-amortized")}
PADDED = {
    "AutoNormal": lambda problem: MaskedAutoNormal(problem.model, create_plates=problem.create_plates),
    "amortized": GUIDES["amortized"],
    "iterative": GUIDES["iterative"],
}


def fit_hand_written(problem: Problem, num_steps: int, warm_up: float = 0.2, lr: float = 5e-3) -> HandWritten:
    """Trains the guide written by hand, and the model; the latents' scale rises to 1 in the first part of the steps."""
    x, lengths = problem.train
    latent_dim, hidden_dim = problem.model.transition.loc.out_features, problem.model.transition.loc.in_features
    guide = HandWritten(x.shape[2], latent_dim, hidden_dim)
    svi = SVI(problem.model, guide, ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / num_steps)}), problem.loss())
    for step, args in zip(range(num_steps), batches(50)((x, lengths)), strict=False):
        svi.step(*args, annealing=min(1.0, (step + 1) / (warm_up * num_steps)))
    return guide


def run(argv: list[str] | None = None, num_steps: int = 300) -> None:
    """The table of guides, and the ELBO of the guide written by hand."""
    results = main(make_problem, argv, num_steps=num_steps, lr=2e-2, guides=STEPWISE)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    problem = make_problem(small="--small" in (sys.argv if argv is None else argv))
    guide = fit_hand_written(problem, len(results["amortized"].losses), lr=2e-2)
    bounds = (elbo(problem, guide, args) for args in (problem.train, problem.held_out))
    print(f"{'by hand':15s}" + "".join(f"{f'{mean:.2f} +- {error:.2f}':>18s}" for mean, error in bounds) + "\n")
    main(make_padded_problem, argv, num_steps=num_steps, lr=2e-2, rates=RATES, guides=PADDED)


if __name__ == "__main__":
    run()
