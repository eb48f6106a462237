"""A semi-supervised VAE: few images come with a label, for the others the label is a latent that is summed out.

Shown in two ways. In the first, as in M2 of Kingma and others and in Pyro's own example, the guide is
q(y | x) q(z | x, y): its labels are enumerated where they are latent, and taken from the data where they are known. In
the second the model enumerates y itself, and only z needs a guide; the table of guides compares these.

Run ``python examples/zoo/semi_supervised.py``. Needs scikit-learn for the images.

References:
    Semi-Supervised Learning with Deep Generative Models, Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed, Max
    Welling (2014), https://arxiv.org/abs/1406.5298
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from _problem import GUIDES, RATES, Problem, indices, main, rows_at_random
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.optim import ClippedAdam
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_amortized import DiscreteAmortizedGuide

NUM_PIXELS, NUM_LABELS = 64, 10


class SemiSupervisedVAE(nn.Module):
    """p(x, y, z) = Categorical(y) N(z; 0, I) Bernoulli(x; decoder(z, y))."""

    def __init__(self, latent_dim: int, hidden_dim: int, num_pixels: int, num_labels: int) -> None:
        super().__init__()
        self.latent_dim, self.num_labels = latent_dim, num_labels
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim + num_labels, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_pixels)
        )

    def logits(self, z: Tensor, y: Tensor) -> Tensor:
        """Of the pixels; z ``(*, D)`` and one-hot y ``(*, C)`` are broadcast, as one of them may be enumerated."""
        batch = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
        return self.decoder(torch.cat([part.expand(*batch, -1) for part in (z, y)], -1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """The model with the labels of all images known, or of none.

        Args:
            x: Images ``(N, P)``.
            y: Labels, one-hot ``(N, C)``; None if they are latent.
        """
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(self.num_labels)), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.logits(z, y)).to_event(1), obs=x)

    def summed_out(self, x: Tensor, label: Tensor, known: Tensor, index: Tensor | None = None) -> None:
        """The model with every y summed out; a known label is an observation of y.

        Args:
            x: Images ``(N, P)``.
            label: Labels ``(N,)``; anything where they are not known.
            known: Whether they are.
            index: Which images to take; None for all.
        """
        pyro.module("decoder", self.decoder)
        with images(x, label, known, index):
            if index is not None:
                x, label, known = x[index], label[index], known[index]
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            prior = dist.OneHotCategorical(logits=x.new_zeros(self.num_labels))
            y = pyro.sample("y", prior, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(logits=self.logits(z, y)).to_event(1), obs=x)
            with poutine.mask(mask=known):
                pyro.sample("label", dist.Categorical(logits=100.0 * y), obs=label)  # as good as certain

    def log_label_given(self, z: Tensor, x: Tensor) -> Tensor:
        """Log p(y | x, z) for all labels, ``(*, N, C)`` for z of shape ``(*, N, D)``."""
        labels = torch.eye(self.num_labels).to(x)
        logits = self.logits(z.unsqueeze(-2), labels)
        return dist.Bernoulli(logits=logits).log_prob(x.unsqueeze(-2)).sum(-1).log_softmax(-1)


def images(x: Tensor, label: Tensor, known: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("images", len(x), subsample=index)


def encoder_input(x: Tensor, label: Tensor, known: Tensor, index: Tensor | None = None) -> Tensor:
    return x if index is None else x[index]


def batches(args: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return ((*args, index) for index in indices(len(args[0]), 128))


def supervision(guide: DiscreteAmortizedGuide, weight: float) -> Callable[..., None]:
    """A model of known labels, to be maximised: ``weight`` times log q(y | x)."""

    def labels(x: Tensor, y: Tensor) -> None:
        with poutine.block(hide_types=["sample"]):  # the guide's parameters are trained, its draws are not wanted
            q = poutine.trace(guide).get_trace(x).nodes["y"]["fn"]
        with pyro.plate("images", len(x)), poutine.scale(scale=weight):
            pyro.sample("label", q, obs=y)

    return labels


def train(
    model: SemiSupervisedVAE,
    guide: DiscreteAmortizedGuide,
    labelled: tuple[Tensor, Tensor],
    unlabelled: Tensor,
    num_steps: int,
    *,
    weight: float = 20.0,
    lr: float = 5e-3,
) -> list[float]:
    """Takes turns with the ELBO of unlabelled images, that of labelled ones, and the log-probability of the labels.

    Args:
        model: The model.
        guide: Its guide.
        labelled: Images ``(M, P)`` and labels ``(M, C)``; all of them make a batch.
        unlabelled: Images ``(N, P)``; batches are drawn from them.
        num_steps: Number of turns.
        weight: Of log q(y | x) of the labelled images, relative to the ELBO.
        lr: Learning rate.

    Returns:
        The loss of each batch without labels, in nats per image.
    """
    optimizer = ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / num_steps)})
    guide.setup(unlabelled)  # with latent labels
    without_label = SVI(model, guide, optimizer, TraceEnum_ELBO(max_plate_nesting=1))
    with_label = SVI(model, guide, optimizer, Trace_ELBO())
    supervised = SVI(supervision(guide, weight), lambda x, y: None, optimizer, Trace_ELBO())
    losses = []
    for _, (x,) in zip(range(num_steps), rows_at_random(128)((unlabelled,)), strict=False):
        losses.append(without_label.step(x) / len(x))
        with_label.step(*labelled)
        if weight:
            supervised.step(*labelled)
    return losses


@torch.no_grad()
def accuracy(probability: Tensor, label: Tensor) -> float:
    """The share of labels that are the most probable ones; their probabilities, or logarithms, ``(N, C)``."""
    return (probability.argmax(-1) == label).float().mean().item()


@torch.no_grad()
def label_given_draws(
    model: SemiSupervisedVAE, guide: AutoGuide, args: tuple[Tensor, ...], num_draws: int = 50
) -> Tensor:
    """Log p(y | x, z), averaged over the guide's z, ``(N, C)``."""
    z = guide.posterior(*args).rsample((num_draws,))
    return model.log_label_given(z, args[0]).exp().mean(0).log()


def load() -> tuple[Tensor, Tensor]:
    """Binary digits and their labels, shuffled."""
    digits, order = load_digits(), torch.randperm(1797)
    return torch.tensor(digits.data > 8, dtype=torch.float)[order], torch.tensor(digits.target)[order]


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    x, label = load()
    known = torch.arange(len(x)) < (20 if small else 100)
    last = slice(-8, None) if small else slice(-100, None)
    first = slice(100 if small else 1400)
    latent_dim, hidden_dim = (2, 16) if small else (6, 128)
    return Problem(
        name="semi-supervised VAE of digits",
        model=SemiSupervisedVAE(latent_dim, hidden_dim, NUM_PIXELS, NUM_LABELS).summed_out,
        train=(x[first], label[first], known[first]),
        held_out=(x[last], label[last], known[last]),
        options={"encoder_input": encoder_input},
        loss=lambda: TraceEnum_ELBO(max_plate_nesting=1),
        batches=None if small else batches,
        create_plates=images,
    )


def fit_discrete(
    problem: Problem, num_steps: int, weight: float = 20.0
) -> tuple[SemiSupervisedVAE, DiscreteAmortizedGuide]:
    """A fresh model with a guide of y and z, trained on the same images and labels."""
    x, label, known = problem.train
    old = problem.model.__self__
    pyro.set_rng_seed(0)
    model = SemiSupervisedVAE(old.latent_dim, old.decoder[0].out_features, NUM_PIXELS, NUM_LABELS)
    guide = DiscreteAmortizedGuide(model)
    labels = nn.functional.one_hot(label[known], NUM_LABELS).to(x)
    train(model, guide, (x[known], labels), x[~known], num_steps, weight=weight)
    return model, guide.eval()


@torch.no_grad()
def elbo_of_unlabelled(model: SemiSupervisedVAE, guide: DiscreteAmortizedGuide, x: Tensor) -> tuple[float, float]:
    """The ELBO of images without labels in nats per image, and its Monte Carlo standard error."""
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    draws = -torch.tensor([loss.loss(model, guide, x) for _ in range(20)]) / len(x)
    return draws.mean().item(), draws.std().item() / len(draws) ** 0.5


def keeping(name: str, kept: dict[str, tuple[Problem, AutoGuide]]) -> Callable[[Problem], AutoGuide]:
    """What makes a guide of the table, and keeps it with its problem."""

    def make_guide(problem: Problem) -> AutoGuide:
        kept[name] = problem, GUIDES[name](problem)
        return kept[name][1]

    return make_guide


def run(argv: list[str] | None = None, num_steps: int = 300) -> None:
    """The table of guides for the model with y summed out, and the guide of y and z, with accuracies."""
    kept: dict[str, tuple[Problem, AutoGuide]] = {}

    guides = {name: keeping(name, kept) for name in GUIDES}
    results = main(make_problem, argv, num_steps=num_steps, lr=2e-2, rates=RATES, guides=guides)
    print("\naccuracy on held-out images, by p(y | x, z) averaged over the guide's z")
    for name in ("amortized", "semi-amortized", "iterative"):
        problem, guide = kept[name]
        log_label = label_given_draws(problem.model.__self__, guide, problem.held_out)
        print(f"{name:15s}{accuracy(log_label, problem.held_out[1]):15.3f}")

    print("\nwith labels enumerated in the guide, q(y | x) q(z | x, y), by the weight of the supervision of q(y | x)")
    print(f"{'weight':15s}{'held-out ELBO':>15s}{'accuracy':>15s}")
    problem = kept["amortized"][0]
    x, label, _ = problem.held_out
    for weight in (0.0, 20.0):
        pyro.clear_param_store()
        model, discrete = fit_discrete(problem, len(results["amortized"].losses), weight)
        found = accuracy(discrete.probabilities(x)["y"], label)
        print(f"{weight:<15.0f}{elbo_of_unlabelled(model, discrete, x)[0]:15.2f}{found:15.3f}")


if __name__ == "__main__":
    run()
