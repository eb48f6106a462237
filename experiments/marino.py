"""A network that takes the steps of inference: Marino, Yue and Mandt (2018), Iterative Amortized Inference.

VAEs are trained with an encoder and with the paper's learned update (``IterativeAmortizedGuide`` with a
``LearnedUpdate`` that sees the gradient), with one level of latents and with two (z2 -> z1 -> x), for the same number
of optimizer's steps; and with an encoder for six times as many. The decoder of the last is then frozen, and inference
for single images begins at the prior: by the paper's learned update, by this package's, which is offered Newton's step
beside, and by fixed rules. The step size of a rule is for every number of steps the best one on training images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from _evidence import Claim, Experiment, Table, run, with_error
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    GradientAscent,
    IterativeAmortizedGuide,
    MLPEncoder,
    NaturalGradient,
    Newton,
    SemiAmortizedGuide,
    optimize_local,
)
from pyro_amortized.families import VariationalFamily
from pyro_amortized.updates import LearnedUpdate, State, UpdateRule

# isort: split
from _common import VAE, Guide, elbo_draws, load_images, train  # _evidence knows where it is

PAPER = "Marino et al. 2018"
LEARNED, OFFERED = "learned", "learned, offered Newton's step"
LONGER = "standard, 6 times the steps"
NUM_STEPS, NUM_PARTICLES, TOLERANCE = 5, 10, 0.02
STEPS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60])


class RMSProp(UpdateRule[Tensor]):
    """RMSProp, which the package lacks, as a user would write it."""

    def __init__(self, step_size: float) -> None:
        super().__init__()
        self.step_size = step_size

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """The mean square of the gradients."""
        return (torch.zeros_like(phi),)

    def update(self, phi: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """One step."""
        square = 0.9 * state[0] + 0.1 * grad.square()
        return phi + self.step_size * grad / (square.sqrt() + 1e-8), (square,)


class GradientOnly(LearnedUpdate):
    """The paper's learned update: it sees the gradient, and is offered no step of another rule."""

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """As every learned update's."""
        super().setup(family, num_features)
        self.natural = self.newton = None


class Recorded(UpdateRule[Any]):
    """Another rule, and where it went."""

    def __init__(self, rule: UpdateRule[Any]) -> None:
        super().__init__()
        self.rule, self.is_learned, self.takes = rule, rule.is_learned, rule.takes
        self.phis: list[Tensor] = []

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """As the rule's; learned ones have been set up."""
        if not self.is_learned:
            self.rule.setup(family, num_features)

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """As the rule's."""
        self.phis = [phi]
        return self.rule.init(phi, features)

    def update(self, phi: Tensor, grad: Any, state: State) -> tuple[Tensor, State]:
        """As the rule's."""
        phi, state = self.rule.update(phi, grad, state)
        self.phis.append(phi)
        return phi, state


RULES: dict[str, tuple[Callable[[float], UpdateRule[Any]], tuple[float, ...]]] = {
    "SGD": (lambda size: GradientAscent(size, 0.0), (0.003, 0.01, 0.03, 0.1, 0.3)),
    "momentum": (lambda size: GradientAscent(size, 0.9), (0.001, 0.003, 0.01, 0.03, 0.1)),
    "RMSProp": (RMSProp, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "Adam": (Adam, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "natural gradient": (NaturalGradient, (0.1, 0.2, 0.4, 0.7, 0.95)),
    "Newton": (Newton, (0.1, 0.2, 0.4, 0.7, 1.0)),
}
GIVEN, CURVED = ("SGD", "momentum", "RMSProp", "Adam"), ("natural gradient", "Newton")


class OneLevel(VAE):
    """p(z) p(x | z)."""

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        """The log-joint of draws ``(K, N, D)``."""
        return normal(0.0, 1.0, z) + dist.Bernoulli(logits=self.decoder(z)).log_prob(x).sum(-1)


class TwoLevels(VAE):
    """p(z2) p(z1 | z2) p(x | z1) with normal latents, z2 half as wide as z1."""

    def __init__(self, num_pixels: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__(num_pixels, latent_dim, hidden_dim)
        self.top = nn.Sequential(
            nn.Linear(latent_dim // 2, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * latent_dim)
        )

    def forward(self, x: Tensor) -> None:
        """The Pyro model."""
        pyro.module("decoder", self.decoder)
        pyro.module("top", self.top)
        with pyro.plate("images", x.shape[0]):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(self.latent_dim // 2), 1.0).to_event(1))
            loc, log_scale = self.top(z2).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z1)).to_event(1), obs=x)

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        """The log-joint of draws ``(K, N, D)``, z2 before z1."""
        z2, z1 = z.split((self.latent_dim // 2, self.latent_dim), -1)
        loc, log_scale = self.top(z2).chunk(2, -1)
        likelihood = dist.Bernoulli(logits=self.decoder(z1)).log_prob(x).sum(-1)
        return normal(0.0, 1.0, z2) + normal(loc, log_scale.exp(), z1) + likelihood


def normal(loc: Any, scale: Any, z: Tensor) -> Tensor:
    """Log-density of a diagonal normal."""
    return dist.Normal(loc, scale).log_prob(z).sum(-1)


def iterative_guide(model: VAE, update: LearnedUpdate, encoder: MLPEncoder | None = None) -> IterativeAmortizedGuide:
    """A guide of the learned update, from the prior."""
    options: dict[str, Any] = {"num_steps": NUM_STEPS, "num_particles": NUM_PARTICLES, "keep_best": False}
    return IterativeAmortizedGuide(model, encoder, update=update, name="iterative_guide", **options)


# A frozen decoder


@torch.no_grad()
def curves_of(model: VAE, guide: Any, rule: UpdateRule[Any], parts: Sequence[Tensor], steps: np.ndarray) -> np.ndarray:
    """ELBOs in nats per image of parts of the images after these steps; minus infinity where a rule has diverged."""
    images, sizes = torch.cat([*parts]), [len(part) for part in parts]
    guide.setup(images)
    guide.num_steps = int(steps[-1])
    guide.inference.update = record = Recorded(rule)
    record.setup(guide.family)
    with suppress(ValueError):  # of a rule that has diverged in the end
        guide.posterior(images)
    values = np.full((len(parts), len(steps)), -np.inf)
    for column, step in enumerate(steps):
        for row, (phi, part) in enumerate(zip(record.phis[step].split(sizes), parts, strict=True)):
            with suppress(ValueError):  # scales of zero
                values[row, column] = elbo_draws(model, guide.family(phi), part, 100).nan_to_num(-np.inf).mean().item()
    return values


def rule_curves(model: VAE, fitted: Tensor, held_out: Tensor, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Held-out ELBOs of every fixed rule, at each number of steps by the step size that is the best on other images."""
    options: dict[str, Any] = {"num_particles": NUM_PARTICLES, "initial": "prior", "keep_best": False}
    guide = SemiAmortizedGuide(model, update=Newton(), **options).eval()
    curves = {}
    for name, (make, sizes) in RULES.items():
        found = np.stack([curves_of(model, guide, make(size), (fitted, held_out), steps) for size in sizes])
        curves[name] = np.take_along_axis(found[:, 1], found[:, 0].argmax(0)[None], 0)[0]
    return curves


def learned_curves(
    model: VAE, images: Tensor, held_out: Tensor, num_steps: int, steps: np.ndarray
) -> dict[str, np.ndarray]:
    """Held-out ELBOs of the learned updates, trained for the frozen decoder."""
    curves = {}
    for name, update in ((LEARNED, GradientOnly()), (OFFERED, LearnedUpdate())):
        pyro.clear_param_store()
        guide = iterative_guide(model, update)
        train(model, guide, images, name, num_steps=num_steps)
        curves[name] = curves_of(model, guide, update, (held_out,), steps)[0]
    return curves


# Training


@torch.no_grad()
def bound(model: Any, guide: Guide, images: Tensor) -> float:
    """The ELBO in nats per image, by 250 draws that are the same in every call."""
    torch.manual_seed(0)
    posterior, means = guide.posterior(images), []
    for _ in range(10):
        z = posterior.rsample((25,))
        means.append((model.log_joint(z, images) - posterior.log_prob(z)).mean())
    return torch.stack(means).mean().item()


def train_level(
    make: Callable[[Tensor], Any], seed: int, images: Tensor, held_out: Tensor, num_steps: int
) -> tuple[dict[str, float], Any]:
    """Bounds on held-out images by kind of training, and the model of the longest."""
    bounds, models = {}, {}
    standards = {"standard": num_steps, LONGER: 6 * num_steps}
    for name, steps in {**standards, "iterative": num_steps}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        models[name] = model = make(images)
        encoder = model.make_encoder()
        guide = AmortizedGuide(model, encoder) if name in standards else iterative_guide(model, GradientOnly())
        train(model, guide, images, name, num_steps=steps)
        bounds[name] = bound(model, guide, held_out)
        if name == "standard":
            bounds["standard, refined at test time"] = bound(model, guide.refined(NUM_STEPS), held_out)
    return bounds, models[LONGER]


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """One repetition: training, and inference under the decoder of the longest standard training with one level."""
    images, held_out = load_images(args.data)
    levels, models = zip(
        *(
            train_level(make, seed, images, held_out, args.steps)
            for make in (OneLevel.for_images, TwoLevels.for_images)
        ),
        strict=True,
    )
    model = models[0].requires_grad_(False).eval()
    few = held_out[: args.images]
    pyro.set_rng_seed(seed)
    steps = STEPS[args.most >= STEPS]
    curves = learned_curves(model, images, few, args.learned_steps, steps)
    curves.update(rule_curves(model, images[: args.images], few, steps))
    reference = AmortizedGuide(model, model.make_encoder(), name="reference")
    best = optimize_local(model, reference, (few,), tolerance=0.1)
    optimum = elbo_draws(model, reference.family(best.phi), few, 100).mean().item()
    return xr.Dataset(
        {
            "elbo": (("rule", "step"), np.array([*curves.values()]), {"units": "nats"}),
            "optimum": ((), optimum, {"units": "nats"}),
            "bound": (("levels", "training"), [[*level.values()] for level in levels], {"units": "nats"}),
        },
        {"rule": [*curves], "step": steps, "levels": [1, 2], "training": [*levels[0]]},
    )


# Results

STYLES: dict[str, dict[str, str]] = {
    LEARNED: {"color": "C0", "marker": "o"},
    OFFERED: {"color": "C1", "marker": "o"},
    **{name: {"color": f"C{i + 2}", "marker": ".", "linestyle": "--"} for i, name in enumerate(GIVEN)},
    "natural gradient": {"color": "0.5", "marker": "^", "linestyle": ":"},
    "Newton": {"color": "0.5", "marker": "s", "linestyle": ":"},
}


def steps_to(runs: xr.Dataset, rule: str) -> np.ndarray:
    """Steps of a rule to the ELBO that the paper's learned update has after the steps it was trained for, but for 0.02.

    Between measured steps the ELBO is interpolated; one more than measured where it is not reached.
    """
    goals = runs.elbo.sel(rule=LEARNED, step=NUM_STEPS).values - TOLERANCE
    steps, found = runs.step.values, []
    for goal, values in zip(goals, runs.elbo.sel(rule=rule).transpose("seed", "step").values, strict=True):
        reached = np.flatnonzero(values >= goal)
        first = reached[0] if len(reached) else -1
        if first <= 0:
            found.append(float(steps[-1] + 1) if first < 0 else 0.0)
            continue
        below = max(values[first - 1], -1e9)
        share = (goal - below) / (values[first] - below)
        found.append(steps[first - 1] + share * (steps[first] - steps[first - 1]))
    return np.array(found)


def claims(runs: xr.Dataset) -> list[Claim]:
    """What the paper claims, and what we found."""
    after, last = runs.elbo.sel(step=NUM_STEPS), runs.elbo.isel(step=-1)
    bounds = {level: runs.bound.sel(levels=level) for level in (1, 2)}
    over = {}
    for name in ("standard", "standard, refined at test time", LONGER):
        over[name] = {
            ("one level" if level == 1 else "two levels"): (b.sel(training="iterative") - b.sel(training=name)).values
            for level, b in bounds.items()
        }
    return [
        Claim(f"The learned update reaches its ELBO after {NUM_STEPS} steps in fewer steps than given rules", PAPER,
              {rule: steps_to(runs, rule) - NUM_STEPS for rule in GIVEN}, "steps more"),
        Claim("Iterative training gives a better held-out bound than standard training", PAPER, over["standard"]),
        Claim("... than standard training followed by as many Newton steps at test time", "ours",
              over["standard, refined at test time"]),
        Claim("... than standard training with as many gradients of the ELBO", "ours",
              over[LONGER]),
        Claim("Rules that know the curvature need fewer steps than the paper's learned update", "ours",
              {rule: NUM_STEPS - steps_to(runs, rule) for rule in CURVED}, "steps fewer"),
        Claim("The learned update stops short of the optimum: given rules are better in the end", "ours",
              {rule: (last.sel(rule=rule) - last.sel(rule=LEARNED)).values for rule in ("SGD", *CURVED)}),
        Claim(f"Offered Newton's step, the learned update is better after {NUM_STEPS} steps", "ours",
              {"than the paper's": (after.sel(rule=OFFERED) - after.sel(rule=LEARNED)).values,
               "than Newton alone": (after.sel(rule=OFFERED) - after.sel(rule="Newton")).values}),
    ]  # fmt: skip


def tables(runs: xr.Dataset) -> list[Table]:
    """Distances from the optimum by steps, and bounds by kind of training."""
    below = runs.optimum - runs.elbo
    steps = [step for step in (1, 2, 5, 10, 20, 60) if step <= runs.step[-1]]
    rows = []
    for rule in runs.rule.values:
        reached = steps_to(runs, rule)
        count = with_error(reached, 1) if (reached <= runs.step.values[-1]).all() else f"more than {int(runs.step[-1])}"
        values = (below.sel(rule=rule, step=step).values for step in steps)
        rows.append((str(rule), *(with_error(value, 2) for value in values), count))
    columns = ("rule", *(f"{step} steps" for step in steps), "steps to the learned ELBO")
    note = (
        "In nats per held-out image, the decoder frozen. The last column: steps to the ELBO that the paper's learned "
        f"update has after the {NUM_STEPS} steps that it was trained for, less {TOLERANCE} nats."
    )
    first = Table("Distance from the best ELBO of the family, by steps from the prior", columns, rows, note)
    rows = [
        (str(kind), *(with_error(runs.bound.sel(training=kind, levels=level).values) for level in (1, 2)))
        for kind in runs.training.values
    ]
    note = "In nats per held-out image. MNIST in the paper, one level: -84.14 standard, -83.84 iterative."
    return [first, Table("Held-out bound by kind of training", ("training", "one level", "two levels"), rows, note)]


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """Distance from the optimum by steps, and bounds by kind of training."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    below = (runs.optimum - runs.elbo).mean("seed")
    for rule in runs.rule.values:
        left.plot(runs.step, below.sel(rule=rule), label=str(rule), **STYLES[str(rule)])
    left.axvline(NUM_STEPS, color="0.6", linewidth=1)
    left.set(title="inference from the prior, decoder frozen", xlabel="steps", yscale="log", xscale="symlog")
    left.set(ylabel="nats per held-out image below the optimum", xticks=[0, 1, 2, 5, 10, 20, 60])
    left.set(xlim=(-0.1, None), ylim=(0.004, None))
    left.set_xticklabels(["0", "1", "2", "5", "10", "20", "60"])
    left.legend(fontsize="small", loc="lower left")
    for level, shift in ((1, -0.12), (2, 0.12)):
        values = runs.bound.sel(levels=level).transpose("training", "seed")
        error = values.std("seed", ddof=1) / values.sizes["seed"] ** 0.5 if values.sizes["seed"] > 1 else None
        height = np.arange(len(values))[::-1] + shift
        label = "one level" if level == 1 else "two levels"
        right.errorbar(values.mean("seed"), height, xerr=error, fmt="o", label=label)
    names = [str(name).replace(", ", ",\n") for name in runs.training.values][::-1]
    right.set(title="training", xlabel="held-out ELBO, nats per image", yticks=range(len(names)), yticklabels=names)
    right.legend(fontsize="small")


EXPERIMENT = Experiment(
    name="marino",
    title="A network that takes the steps of inference",
    doc=__doc__,
    measure=measure,
    tables=tables,
    claims=claims,
    draw=draw,
    num_seeds=3,
    sizes={
        "steps": (600, 50_000, "training steps of each VAE"),
        "learned_steps": (400, 20_000, "training steps of the learned updates, the decoder frozen"),
        "most": (60, 60, "most steps of inference"),
        "images": (100, 1000, "held-out images of the curves"),
    },
)

if __name__ == "__main__":
    run(EXPERIMENT)
