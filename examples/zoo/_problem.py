"""What the models of the zoo share: a description of the problem, training, a comparison of guides, and a main."""

from __future__ import annotations

import argparse
import copy
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_amortized import (
    AmortizedGuide,
    GapEstimate,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model with data.

    Attributes:
        name: The title of tables and plots.
        model: The model; an ``nn.Module``, or a bound method of one, if it has parameters.
        train: The model's arguments for all training data.
        held_out: Its arguments for some tens of unseen datapoints, of another number than the training data.
        options: Options of the guides, such as ``plate``, ``encoder_input`` and ``global_guide``.
        encoder: Makes a fresh encoder; None for the guides' default.
        loss: Makes the ELBO to train with.
        num_datapoints: From the model's arguments, the number of datapoints that the ELBO stands for: N for a batch in
            a plate of size N.
        batches: From ``train``, endless arguments of minibatches; None to train on all data in every step.
        create_plates: From the model's arguments, its subsampled datapoint plate. With it AutoNormal and
            PerDatapointGuide are trained on minibatches too; without it they, which are bound to the datapoints of
            their first call, are trained on all data in every step.
        global_rate: The learning rate for the posterior of global latents, as a multiple of the encoder's.
        autonormal: Whether Pyro's AutoNormal can run.
        diagnosed: The model that diagnostics use, where it differs.
    """

    name: str
    model: Callable[..., Any]
    train: tuple[Any, ...]
    held_out: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    encoder: Callable[[], nn.Module] | None = None
    loss: Callable[[], ELBO] = Trace_ELBO
    num_datapoints: Callable[..., int] = lambda x, *_: len(x)
    batches: Callable[[tuple[Any, ...]], Iterator[tuple[Any, ...]]] | None = None
    create_plates: Callable[..., pyro.plate] | None = None
    global_rate: float = 1.0
    autonormal: bool = True
    diagnosed: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Result:
    """What a guide reached.

    Attributes:
        losses: The loss of each training step, in nats per datapoint.
        seconds: Seconds of training.
        lr: The learning rate.
        train: The ELBO in nats per datapoint, and its standard error.
        held_out: The same on unseen data, without the terms of global latents; NaN for guides that know none.
        gaps: The gap decomposition of the unseen data.
    """

    losses: list[float]
    seconds: float
    lr: float = nan
    train: tuple[float, float] = (nan, nan)
    held_out: tuple[float, float] = (nan, nan)
    gaps: GapEstimate | None = None

    def mean_gap(self, name: str) -> float:
        return nan if self.gaps is None else float(self.gaps.dataset[name].mean())


def _encoder(problem: Problem) -> nn.Module | None:
    return problem.encoder() if problem.encoder else None


def _per_datapoint(problem: Problem) -> PerDatapointGuide:
    return PerDatapointGuide(problem.model, **{k: v for k, v in problem.options.items() if k != "encoder_input"})


def _auto_normal(problem: Problem) -> AutoNormal:
    """AutoNormal for the latents that are not enumerated in the model."""
    options = {key: problem.options[key] for key in ("init_loc_fn", "init_scale") if key in problem.options}
    model = poutine.block(problem.model, hide_fn=lambda site: "enumerate" in (site.get("infer") or {}))
    return AutoNormal(model, create_plates=problem.create_plates, **options)


MakeGuide = Callable[[Problem], AutoGuide]
GUIDES: dict[str, MakeGuide] = {
    "AutoNormal": _auto_normal,
    "per datapoint": _per_datapoint,
    "amortized": lambda p: AmortizedGuide(p.model, _encoder(p), **p.options),
    "semi-amortized": lambda p: SemiAmortizedGuide(
        p.model, _encoder(p), num_steps=5, num_particles=8, encoder_gradient="first_order", **p.options
    ),
    # Its update network sees the inputs beside the gradient; an encoder that answers by itself is no use to it.
    "iterative": lambda p: IterativeAmortizedGuide(p.model, num_steps=5, **p.options),
}


RATES = (1.0, 5.0, 25.0)
"""Learning rates at which AutoNormal may be tried, as multiples of the others': its parameters, one for each datapoint,
have further to go than an encoder's weights."""


def rows_at_random(size: int) -> Callable[[tuple[Any, ...]], Iterator[tuple[Any, ...]]]:
    """Minibatches of a model whose arguments are all tensors with one row per datapoint."""

    def batches(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        while True:
            rows = torch.randperm(len(args[0]))[:size]
            yield tuple(x[rows] for x in args)

    return batches


def indices(count: int, size: int) -> Iterator[Tensor]:
    """Endless random choices of ``size`` out of ``count`` datapoints."""
    while True:
        yield torch.randperm(count)[:size]


def fit(problem: Problem, guide: AutoGuide, num_steps: int, lr: float = 5e-3, progress: bool = False) -> list[float]:
    """Trains guide and model; the learning rates fall to a tenth meanwhile.

    Returns:
        The loss of each step, in nats per datapoint.
    """

    def options(*name: str) -> dict[str, float]:
        rate = problem.global_rate if "global_guide" in ".".join(name) else 1.0
        return {"lr": lr * rate, "lrd": 0.1 ** (1 / num_steps)}

    svi = SVI(problem.model, guide, ClippedAdam(options), problem.loss())
    bound = isinstance(guide, AutoNormal | PerDatapointGuide) and problem.create_plates is None
    batches = None if bound or problem.batches is None else problem.batches(problem.train)
    # AutoNormal is set up by a call; the plate is of the size of this one from then on.
    (guide if isinstance(guide, AutoNormal) else guide.setup)(*problem.train)
    losses = []
    for _ in tqdm(range(num_steps), desc=type(guide).__name__, unit="step", disable=not progress):
        args = problem.train if batches is None else next(batches)
        losses.append(svi.step(*args) / problem.num_datapoints(*args))
    guide.eval()
    return losses


@torch.no_grad()
def elbo(
    problem: Problem, guide: AutoGuide, args: tuple[Any, ...], num_particles: int = 20, *, global_terms: bool = True
) -> tuple[float, float]:
    """The ELBO in nats per datapoint, and its Monte Carlo standard error.

    Args:
        problem: The problem.
        guide: A trained guide.
        args: The model's arguments.
        num_particles: Number of draws.
        global_terms: Whether log p - log q of the global latents counts; shared out among few unseen datapoints, it
            would say little about them.
    """
    loss = problem.loss()
    draws = -torch.tensor([loss.loss(problem.model, guide, *args) for _ in range(num_particles)])
    global_guide = getattr(guide, "global_guide", None)
    if not global_terms and global_guide is not None:
        only_global = Trace_ELBO()
        draws += torch.tensor([only_global.loss(global_guide.model, global_guide, *args) for _ in draws])
    draws /= problem.num_datapoints(*args)
    return draws.mean().item(), draws.std().item() / num_particles**0.5


def compare(
    problem: Problem,
    guides: dict[str, MakeGuide] | None = None,
    num_steps: int = 2000,
    *,
    lr: float = 5e-3,
    rates: tuple[float, ...] = (1.0,),
    num_particles: int = 20,
    seed: int = 0,
    progress: bool = False,
    gaps: bool = True,
    **gap_options: Any,
) -> dict[str, Result]:
    """Trains each guide with a fresh copy of the model for as many steps, and prints a table.

    All guides get as many steps, on minibatches of one size where the model takes them (see
    :attr:`Problem.create_plates`), and AutoNormal may get the best of several learning rates. What AutoNormal would
    reach in the end is another matter: with parameters for every datapoint, it lacks only what its family lacks.

    Args:
        problem: The problem.
        guides: Guides by name; all of :data:`GUIDES` by default. AutoNormal is left out where it cannot run.
        num_steps: Number of SVI steps.
        lr: Learning rate.
        rates: Multiples of it at which AutoNormal is tried; the one with the best training ELBO counts.
        num_particles: Number of draws for an ELBO.
        seed: Seed before each training.
        progress: Whether to show progress bars.
        gaps: Whether to estimate the gaps, which takes longest.
        **gap_options: Options of ``estimate_gaps``.

    Returns:
        The figures, by name.
    """
    results = {}
    print(_heading(problem, num_steps, lr, rates))
    for name, make_guide in (GUIDES if guides is None else guides).items():
        if name == "AutoNormal" and not problem.autonormal:
            continue
        tried = [
            _train(problem, make_guide, num_steps, lr * rate, num_particles, seed, progress)
            for rate in (rates if name == "AutoNormal" else (1.0,))
        ]
        fresh, guide, result = max(tried, key=lambda trained: trained[-1].train[0])
        extra = _assess(fresh, guide, num_particles, gap_options if gaps else None)
        results[name] = result = replace(result, **extra)
        print(f"{name:15s}" + _row(result), flush=True)
    return results


def _train(
    problem: Problem, make_guide: MakeGuide, num_steps: int, lr: float, num_particles: int, seed: int, progress: bool
) -> tuple[Problem, AutoGuide, Result]:
    """The problem with a copy of the model, the guide, both trained, and what they reached."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, diagnosed = copy.deepcopy((problem.model, problem.diagnosed))
    fresh = replace(problem, model=model, diagnosed=diagnosed)
    guide, start = make_guide(fresh), time.perf_counter()
    losses = fit(fresh, guide, num_steps, lr, progress)
    seconds = time.perf_counter() - start
    reached = elbo(fresh, guide, fresh.train, num_particles)  # before the parameter store knows another guide
    return fresh, guide, Result(losses=losses, seconds=seconds, lr=lr, train=reached)


def _heading(problem: Problem, num_steps: int, lr: float, rates: tuple[float, ...]) -> str:
    """What was done, and the names of the columns."""
    lines = [
        f"{problem.name}: nats per datapoint after {num_steps} steps of ClippedAdam, lr {lr:g} falling to {lr / 10:g}"
    ]
    if problem.batches is not None and problem.create_plates is None:
        lines.append("AutoNormal and per datapoint see all data in every step, the others a minibatch")
    if problem.global_rate != 1.0:
        lines.append(f"global latents: lr {lr * problem.global_rate:g}, but in AutoNormal that of all its parameters")
    if len(rates) > 1 and problem.autonormal:
        lines.append(f"AutoNormal: the best of lr {', '.join(f'{lr * rate:g}' for rate in rates)}")
    columns = ("approx. gap", "amort. gap", "unreliable", "lr", "seconds")
    wide = "".join(f"{column:>18s}" for column in ("training ELBO", "held-out ELBO"))
    return "\n".join([*lines, f"{'':15s}" + wide + "".join(f"{column:>12s}" for column in columns)])


def _assess(
    problem: Problem, guide: AutoGuide, num_particles: int, gap_options: dict[str, Any] | None
) -> dict[str, Any]:
    """What a trained guide reached on unseen data: fields of a Result."""
    figures: dict[str, Any] = {}
    if isinstance(guide, AutoNormal | PerDatapointGuide):  # which know nothing of unseen datapoints
        return figures
    if gap_options is not None:
        options = {"tolerance": 0.05, "max_samples": 5000, **gap_options}
        figures["gaps"] = estimate_gaps(problem.diagnosed or problem.model, guide, problem.held_out, **options)
    figures["held_out"] = elbo(problem, guide, problem.held_out, num_particles, global_terms=False)
    return figures


def _row(result: Result) -> str:
    bounds = (f"{mean:.2f} +- {error:.2f}" for mean, error in (result.train, result.held_out))
    gaps = (f"{result.mean_gap(f'{gap}_gap'):.2f}" for gap in ("approximation", "amortization"))
    flagged = "-" if result.gaps is None else f"{int((~result.gaps.dataset['reliable']).sum())}"
    narrow = (*gaps, flagged, f"{result.lr:g}", f"{result.seconds:.0f}")
    cells = [f"{cell:>18s}" for cell in bounds] + [f"{cell:>12s}" for cell in narrow]
    return "".join(cells).replace("nan +- nan", "         -").replace("nan", "  -")


def save_bars(path: Path, title: str, results: dict[str, Result]) -> None:
    """Draws the ELBOs and the gaps of each guide."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    position = np.arange(len(results))
    for part in ("train", "held_out"):
        left.plot(position, [getattr(r, part)[0] for r in results.values()], "o", label=part.replace("_", "-"))
    for shift, part in ((-0.2, "approximation_gap"), (0.2, "amortization_gap")):
        right.bar(position + shift, [r.mean_gap(part) for r in results.values()], 0.4, label=part.replace("_", " "))
    for ax, label in ((left, "ELBO"), (right, "gap on held-out data")):
        ax.set(ylabel=f"{label}, nats per datapoint", xlim=(-0.5, len(results) - 0.5))
        ax.set_xticks(position, results, rotation=20)
        ax.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    make_problem: Callable[..., Problem],
    argv: list[str] | None = None,
    *,
    num_steps: int = 2000,
    lr: float = 5e-3,
    rates: tuple[float, ...] = (1.0,),
    guides: dict[str, MakeGuide] | None = None,
) -> dict[str, Result]:
    """Runs :func:`compare` with the options of the command line; the keywords are a model's own defaults."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(make_problem)))
    parser.add_argument("--num-steps", type=int, default=num_steps, help="SVI steps per guide (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few datapoints and small networks")
    parser.add_argument("--guides", nargs="+", metavar="NAME", help="names of guides (default: all of the table)")
    parser.add_argument("--out", type=Path, help="where to save a plot, such as plot.png (default: no plot)")
    args = parser.parse_args(argv)
    problem = make_problem(args.seed, args.small)
    guides = GUIDES if guides is None else guides
    if args.guides:
        unknown = [name for name in args.guides if name not in guides]
        if unknown:
            parser.error(f"no guides {unknown}; there are {list(guides)}")
        guides = {name: guides[name] for name in args.guides}
    results = compare(problem, guides, args.num_steps, lr=lr, rates=rates, seed=args.seed, progress=True)
    if args.out:
        save_bars(args.out, problem.name, results)
    return results
