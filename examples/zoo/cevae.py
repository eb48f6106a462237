"""The causal effect VAE that comes with Pyro: its model with the guides of this package in place of its own.

A treatment t, its outcome y and features x have a hidden common cause z. The model, ``pyro.contrib.cevae.Model``, is
used as it is. Given z, the effect of the treatment is the difference of the model's two expected outcomes; it is
averaged over q(z | x, t, y) and over all datapoints. For people of whom only x is known, t and y are latents too: one
guide, q(t | x) q(y | x) q(z | x, t, y), serves both kinds of calls, as Pyro's own does. (In that one y depends on t.)

Run ``python examples/zoo/cevae.py``.

References:
    Causal Effect Inference with Deep Latent-Variable Models, Christos Louizos, Uri Shalit, Joris Mooij, David Sontag,
    Richard Zemel, Max Welling (2017), https://arxiv.org/abs/1705.08821
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import nan
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _problem import GUIDES, RATES, Problem, elbo, indices, main, rows_at_random
from pyro import poutine
from pyro.contrib.cevae import CEVAE, Model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_amortized import DiscreteAmortizedGuide, MLPEncoder, PerDatapointGuide

NUM_FEATURES, NUM_LAYERS = 5, 2


class CausalModel(Model):
    """Pyro's model, of all data or of those at ``index``."""

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        y: Tensor | None = None,
        index: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        if index is None:
            return super().forward(x, t, y, size)
        return super().forward(x[index], t[index], y[index], len(x))


def outcome(z: Tensor, t: Tensor) -> Tensor:
    """P(y = 1 | z, do(t))."""
    return torch.sigmoid(3 * (z + 2 * (2 * t - 2)))


def true_effect() -> float:
    """The average treatment effect; the cause z is one of two, equally probable."""
    z = torch.tensor([0.0, 1.0])
    return (outcome(z, torch.ones(2)) - outcome(z, torch.zeros(2))).mean().item()


def simulate(num_datapoints: int) -> tuple[Tensor, Tensor, Tensor]:
    """The data ``(x, t, y)`` of Pyro's example, after the paper's."""
    z = dist.Bernoulli(0.5).sample((num_datapoints,))
    x = dist.Normal(z, 5 * z + 3 * (1 - z)).sample((NUM_FEATURES,)).T
    t = dist.Bernoulli(0.75 * z + 0.25 * (1 - z)).sample()
    return (x - 0.5) / 4.15, t, dist.Bernoulli(outcome(z, t)).sample()


def average_effect(model: Model, guide: Callable[..., Any], data: tuple[Tensor, ...], num_samples: int = 50) -> float:
    """The estimated average treatment effect.

    Args:
        model: The trained model.
        guide: Its guide.
        data: ``(x, t, y)``; or ``(x,)`` for a guide that knows t and y as latents.
        num_samples: Number of draws of z for each datapoint.
    """
    total, people = 0.0, data[0].new_ones(len(data[0]))
    with torch.no_grad():
        for _ in range(num_samples):
            z = poutine.trace(guide).get_trace(*data).nodes["z"]["value"]
            treated, untreated = (model.y_dist(t * people, z).mean for t in (1, 0))
            total += (treated - untreated).mean().item()
    return total / num_samples


def difference_in_means(t: Tensor, y: Tensor) -> float:
    """What one would take for the effect if nothing but the treatment differed."""
    return (y[t == 1].mean() - y[t == 0].mean()).item()


def people(x: Tensor, t: Tensor | None = None, y: Tensor | None = None, index: Tensor | None = None) -> pyro.plate:
    """The model's plate with positions as ``subsample``, where the model gives the data, which are none."""
    return pyro.plate("data", len(x), subsample=index)


def encoder_input(x: Tensor, t: Tensor, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
    return (x, t, y) if index is None else (x[index], t[index], y[index])


def batches(args: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return ((*args, index) for index in indices(len(args[0]), 100))


def make_model(latent_dim: int, hidden_dim: int) -> CausalModel:
    sizes = {"feature_dim": NUM_FEATURES, "latent_dim": latent_dim, "hidden_dim": hidden_dim, "num_layers": NUM_LAYERS}
    return CausalModel({**sizes, "outcome_dist": "bernoulli"})


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    data, held_out = simulate(200 if small else 2000), simulate(8 if small else 50)
    latent_dim, hidden_dim = (2, 8) if small else (4, 32)
    return Problem(
        name="causal effect VAE",
        model=make_model(latent_dim, hidden_dim),
        train=data,
        held_out=held_out,
        options={"encoder_input": encoder_input, "create_plates": people},
        encoder=lambda: MLPEncoder(NUM_FEATURES + 2, (hidden_dim,) * 2),
        batches=batches,
        create_plates=people,
    )


def untrained(problem: Problem) -> CEVAE:
    """A fresh model of the same sizes, and Pyro's guide."""
    sizes = {"latent_dim": problem.model.latent_dim, "hidden_dim": problem.model.x_nn.fc[0].out_features}
    cevae = CEVAE(NUM_FEATURES, num_layers=NUM_LAYERS, **sizes)
    cevae.model = make_model(**sizes)
    return cevae


def fit_baseline(problem: Problem, num_steps: int) -> tuple[Problem, Callable[..., Any]]:
    """Pyro's own training of its own guide.

    Returns:
        The problem with the trained model, and the guide of z given x, t and y, or given x alone.
    """
    cevae, batch_size = untrained(problem), 100
    num_epochs = max(1, num_steps * batch_size // len(problem.train[0]))
    cevae.fit(*problem.train, num_epochs=num_epochs, batch_size=batch_size, learning_rate=5e-3)
    return replace(problem, model=cevae.model), poutine.block(cevae.guide, hide=["t", "y"])


def fit_discrete(problem: Problem, num_steps: int, lr: float = 5e-3) -> tuple[Problem, DiscreteAmortizedGuide]:
    """A guide for which t and y may be latent, trained by the ELBO plus log q(t, y | x), as Pyro's is.

    Returns:
        The problem with the trained model, and the guide.
    """
    model = untrained(problem).model
    encoder = MLPEncoder(NUM_FEATURES, (problem.model.x_nn.fc[0].out_features,) * 2)
    guide = DiscreteAmortizedGuide(model, encoder, encoder_input="x", create_plates=people)
    guide.setup(problem.train[0])  # with t and y latent

    def log_q(x: Tensor, t: Tensor, y: Tensor) -> None:
        with poutine.block(hide_types=["sample"]):  # the guide's parameters are trained, its draws are not wanted
            q = poutine.trace(guide).get_trace(x).nodes
        with pyro.plate("people", len(x)):
            pyro.sample("treatment", q["t"]["fn"], obs=t)
            pyro.sample("outcome", q["y"]["fn"], obs=y)

    optimizer = ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    supervised = SVI(log_q, lambda *data: None, optimizer, Trace_ELBO())
    for _, batch in zip(range(num_steps), rows_at_random(100)(problem.train), strict=False):
        svi.step(*batch)
        supervised.step(*batch)
    return replace(problem, model=model), guide.eval()


def keeping(name: str, kept: dict[str, tuple[Problem, AutoGuide]]) -> Callable[[Problem], AutoGuide]:
    """What makes a guide of the table, and keeps it with its problem."""

    def make_guide(problem: Problem) -> AutoGuide:
        kept[name] = problem, GUIDES[name](problem)
        return kept[name][1]

    return make_guide


def run(argv: list[str] | None = None, num_steps: int = 500) -> None:
    """The table of guides, and what each of them takes for the effect."""
    kept: dict[str, tuple[Problem, Any]] = {}

    guides = {name: keeping(name, kept) for name in GUIDES}
    results = main(make_problem, argv, num_steps=num_steps, rates=RATES, guides=guides)
    problem, steps = kept["amortized"][0], len(results["amortized"].losses)
    for name, fit in (("Pyro's guide", fit_baseline), ("discrete", fit_discrete)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        kept[name] = fit(problem, steps)
    columns = ("training ELBO", "held-out ELBO", "average effect", "from unseen x")
    print("\n" + " " * 15 + "".join(f"{column:>18s}" for column in columns))
    for name, (fitted, guide) in kept.items():
        pyro.clear_param_store()
        cells = [elbo(fitted, guide, fitted.train)[0], nan, average_effect(fitted.model, guide, fitted.train), nan]
        if not isinstance(guide, AutoNormal | PerDatapointGuide):
            cells[1] = elbo(fitted, guide, fitted.held_out)[0]
        if name in ("Pyro's guide", "discrete"):
            cells[3] = average_effect(fitted.model, guide, fitted.held_out[:1])
        print(f"{name:15s}" + "".join(f"{cell:18.3f}" for cell in cells).replace("nan", "  -"))
    print(f"effect, truth: {true_effect():.3f}; difference in means: {difference_in_means(*problem.train[1:]):.3f}")


if __name__ == "__main__":
    run()
