"""Measurements of which a part is missing: a factor model, and the missing values filled in.

Shown in two ways. In the first the likelihood of missing entries is masked, so that they are integrated out exactly;
in the second, by ``obs_mask``, they are latents of their datapoint as z is. Both have the same evidence, and the first
leaves the guide less to approximate.

Run ``python examples/zoo/missing_data.py``. Needs scikit-learn for the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from _problem import GUIDES, RATES, Problem, indices, main
from pyro.infer.autoguide import AutoGuide
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import softplus


class FactorModel(nn.Module):
    """p(x, z) = N(z; 0, I) N(x; W z + b, diag(scale^2)), for standardised x ``(N, P)`` of which a part is present."""

    def __init__(self, num_features: int, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.loc = nn.Linear(latent_dim, num_features)
        self.raw_scale = nn.Parameter(torch.zeros(num_features))

    @property
    def scale(self) -> Tensor:
        return softplus(self.raw_scale) + 0.05

    def forward(self, x: Tensor, present: Tensor, index: Tensor | None = None) -> None:
        """The model with the missing entries integrated out.

        Args:
            x: Measurements ``(N, P)``, with any finite numbers for the missing ones.
            present: Which are not missing ``(N, P)``.
            index: Which people to take; None for all.
        """
        pyro.module("factor_model", self)
        with people(x, present, index):
            x, present = rows(x, present, index)
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.loc(z), self.scale).mask(present).to_event(1), obs=x)

    def with_latent_entries(self, x: Tensor, present: Tensor, index: Tensor | None = None) -> None:
        """The model with the missing entries as latents, ``x_unobserved``."""
        pyro.module("factor_model", self)
        features = pyro.plate("features", x.shape[1], dim=-1)
        with pyro.plate("people", len(x), dim=-2, subsample=index):
            x, present = rows(x, present, index)
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            with features:
                pyro.sample("x", dist.Normal(self.loc(z).squeeze(-2), self.scale), obs=x, obs_mask=present)

    def exact_evidence(self, x: Tensor, present: Tensor) -> Tensor:
        """Log p(x_n) of the entries that are present, ``(N,)``."""
        covariance = self.loc.weight @ self.loc.weight.T + self.scale.square().diag()
        return torch.stack([
            dist.MultivariateNormal(self.loc.bias[at], covariance[at][:, at]).log_prob(row[at])
            for row, at in zip(x, present, strict=True)
        ])  # fmt: skip


def rows(x: Tensor, present: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, present) if index is None else (x[index], present[index])


def people(x: Tensor, present: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("people", len(x), subsample=index)


def batches(args: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return ((*args, index) for index in indices(len(args[0]), 100))


def imputation_errors(model: FactorModel, guide: AutoGuide, x: Tensor, present: Tensor) -> tuple[float, float]:
    """Root mean squared errors of missing entries, filled in from the guide's z, and by zeros, the features' means."""
    with torch.no_grad():
        z = guide.median(x, present)["z"].reshape(len(x), -1)
        errors = (model.loc(z) - x)[~present], x[~present]
    return tuple(error.square().mean().sqrt().item() for error in errors)


def load(small: bool = False) -> tuple[Tensor, Tensor]:
    """Standardised measurements ``(N, P)``, and which of them are taken for present: seven in ten.

    Those taken for missing keep their values, which neither model nor guide looks at, to be compared with.
    """
    x = torch.tensor(load_breast_cancer().data, dtype=torch.float)[torch.randperm(569)].log1p()
    x = ((x - x.mean(0)) / x.std(0))[:, : 8 if small else 30]
    return x, torch.rand(x.shape) < 0.7


def encoder_input(x: Tensor, present: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Zeros for missing entries, and which these are."""
    x, present = rows(x, present, index)
    return x.masked_fill(~present, 0.0), present.to(x)


def make_problem(seed: int = 0, small: bool = False, latent_entries: bool = False) -> Problem:
    """The problem; with ``latent_entries`` that of the second way."""
    pyro.set_rng_seed(seed)
    x, present = load(small)
    first, last = (slice(100), slice(-8, None)) if small else (slice(500), slice(-50, None))
    latent_dim, hidden_dim = (2, 16) if small else (5, 64)
    model = FactorModel(x.shape[1], latent_dim)
    return Problem(
        name="factor model with missing entries" + (" as latents" if latent_entries else ""),
        model=model.with_latent_entries if latent_entries else model,
        train=(x[first], present[first]),
        held_out=(x[last], present[last]),
        options={"encoder_input": encoder_input, "plate": "people"},
        batches=None if small else batches,
        create_plates=None if latent_entries else people,
        # AutoNormal has no masks: it would count an entropy for entries that are present, and so have no prior.
        autonormal=not latent_entries,
    )


def make_problem_with_latent_entries(seed: int = 0, small: bool = False) -> Problem:
    return make_problem(seed, small, latent_entries=True)


def keeping(name: str, kept: dict[str, tuple[Problem, AutoGuide]]) -> Callable[[Problem], AutoGuide]:
    """What makes a guide of the table, and keeps it with its problem."""

    def make_guide(problem: Problem) -> AutoGuide:
        kept[name] = problem, GUIDES[name](problem)
        return kept[name][1]

    return make_guide


def run(argv: list[str] | None = None, num_steps: int = 500) -> None:
    """The table of guides in both ways, and how well each of them fills in the missing training values."""
    for make in (make_problem, make_problem_with_latent_entries):
        kept: dict[str, tuple[Problem, AutoGuide]] = {}

        main(
            make, argv, num_steps=num_steps, lr=2e-2, rates=RATES, guides={name: keeping(name, kept) for name in GUIDES}
        )
        print("root mean squared error of the missing training values, and with the features' means")
        for name, (problem, guide) in kept.items():
            model = getattr(problem.model, "__self__", problem.model)
            print(
                f"{name:16s}" + "".join(f"{error:16.3f}" for error in imputation_errors(model, guide, *problem.train))
            )


if __name__ == "__main__":
    run()
