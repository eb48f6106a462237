"""Public models, as their authors wrote them, with default guides: ``make public-models``.

Every model is trained for equal steps of Adam on all of its data with each guide, at each learning rate. A cell of the
table is the loss afterwards, the negative ELBO in nats per datapoint (mean of 20 evaluations of all training data, all
modules in evaluation mode), its mean over seeds with their half-range, at the learning rate with the best mean, which
stands in brackets. The models are in ``benchmarks/public``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import pyro
import torch
from public import MODELS
from public._model import Program, PublicModel
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.nn import PyroModule
from torch import nn
from tqdm import tqdm

from pyro_amortized import AmortizedGuide, DiscreteAmortizedGuide, SemiAmortizedGuide

RATES = (0.003, 0.01, 0.03)
NUM_SEEDS = 2
SLOW = {"SemiAmortizedGuide": (0.01,)}
"""Guides that take minutes for each run get one seed, and these learning rates."""
NUM_STEPS = 300
NUM_EVALUATIONS = 20
PAGE = Path(__file__).parent.parent / "docs" / "robustness.md"
MARKS = "<!-- public models -->\n", "\n<!-- end of public models -->"


# Guides


class ByCall(PyroModule):
    """One AutoNormal for each call of a model, since it is bound to the datapoints of its first call."""

    def __init__(self, public: PublicModel, model: Program) -> None:
        super().__init__("auto")
        self.sizes = [len(args[0]) for args in public.calls]
        for size in self.sizes:
            setattr(self, f"of_{size}", public.auto_normal(model))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, f"of_{len(args[0])}")(*args, **kwargs)


def summed_out(public: PublicModel, model: Program) -> Program:
    """The model with the discrete latents enumerated in it that its authors enumerate in the guide."""
    return config_enumerate(model) if public.enumerated else model


def auto_normal(public: PublicModel, model: Program, _: Program | None) -> tuple[Program, Program]:
    model = summed_out(public, model)
    latent = poutine.block(model, hide_fn=lambda site: "enumerate" in (site.get("infer") or {}))
    return model, ByCall(public, latent) if len(public.calls) > 1 else public.auto_normal(latent)


def ours(kind: type[AmortizedGuide], public: PublicModel, model: Program, _: Program | None) -> tuple[Program, Program]:
    model = summed_out(public, model)
    return model, kind(model, **public.options)


def discrete(public: PublicModel, model: Program, _: Program | None) -> tuple[Program, Program]:
    options = public.options if public.discrete_options is None else public.discrete_options
    return model, DiscreteAmortizedGuide(model, **options)


def authors(public: PublicModel, model: Program, guide: Program | None) -> tuple[Program, Program]:
    guide = config_enumerate(guide, "parallel", expand=True) if public.enumerated else guide
    return model, guide  # type: ignore[return-value]


GUIDES: dict[str, Callable[[PublicModel, Program, Program | None], tuple[Program, Program]]] = {
    "AmortizedGuide": partial(ours, AmortizedGuide),
    "SemiAmortizedGuide": partial(ours, SemiAmortizedGuide),
    "DiscreteAmortizedGuide": discrete,
    "authors' guide": authors,
    "AutoNormal": auto_normal,
}


def applies(guide: str, public: PublicModel) -> bool:
    if guide == "DiscreteAmortizedGuide":
        return bool(public.enumerated)
    if guide == "authors' guide":
        return public.make()[1] is not None
    return guide != "SemiAmortizedGuide" or public.refined


# Runs


@dataclass(frozen=True)
class Run:
    """What came of one training.

    Attributes:
        loss: The negative ELBO at the end, in nats per datapoint; None if there is none.
        problem: Why there is none: "failed" or "refused", and an error.
        seconds: Seconds of training.
    """

    model: str
    guide: str
    lr: float
    seed: int
    loss: float | None
    problem: str
    seconds: float


@cache
def public_model(name: str) -> PublicModel:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return MODELS[name]()


def set_training(training: bool, *programs: Any) -> None:
    for program in programs:
        module = getattr(program, "__self__", program)
        if isinstance(module, nn.Module):
            module.train(training)


def run(job: tuple[str, str, float, int], num_steps: int = NUM_STEPS) -> Run:
    name, guide_name, lr, seed = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    public = public_model(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, by_hand = public.make()
    trained, start = 0, time.perf_counter()
    try:
        program, guide = GUIDES[guide_name](public, model, by_hand)
        if isinstance(guide, AmortizedGuide):
            guide.setup(*public.calls[0])
        start = time.perf_counter()
        svi = SVI(program, guide, pyro.optim.Adam({"lr": lr}), public.loss())
        for step in range(num_steps):
            further = public.annealing(step / num_steps) if public.annealing else {}
            if not math.isfinite(svi.step(*public.calls[step % len(public.calls)], **further)):
                problem = f"failed: the loss of step {step + 1} is not finite"
                return Run(*job, None, problem, time.perf_counter() - start)
            trained += 1
        seconds = time.perf_counter() - start
        set_training(False, model, by_hand, guide)
        return Run(*job, evaluate(public, program, poutine.block(guide, hide=[*public.hidden])), "", seconds)
    except (ValueError, RuntimeError, NotImplementedError) as error:  # a run that fails is a result
        text = " ".join(str(error).split("Trace Shapes")[0].split()) or type(error).__name__
        kind = "refused" if not trained or text.startswith("Cannot") else "failed"
        return Run(*job, None, f"{kind}: {text}", time.perf_counter() - start)


@torch.no_grad()
def evaluate(public: PublicModel, model: Program, guide: Program) -> float:
    """The mean loss of all training data, in nats per datapoint."""
    size = sum(public.num_datapoints(*args) for args in public.calls)
    losses = (sum(public.loss().loss(model, guide, *args) for args in public.calls) for _ in range(NUM_EVALUATIONS))
    return mean(losses) / size


# The table


Cells = dict[tuple[str, str], str]
"""What the table says of a model and a guide."""


def cells(runs: Iterable[Run]) -> Cells:
    of_pair: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for found in runs:
        of_pair[found.model, found.guide].append(found)
    return {pair: _cell(of_it) for pair, of_it in of_pair.items()}


def _cell(runs: list[Run]) -> str:
    by_rate: dict[float, list[float]] = defaultdict(list)
    for found in runs:
        by_rate[found.lr].append(math.inf if found.loss is None else found.loss)
    lr, losses = min(by_rate.items(), key=lambda item: mean(item[1]))
    if not math.isfinite(mean(losses)):
        problem = next(found.problem for found in runs if found.problem)
        return problem if problem.startswith("refused") else "failed"
    digits = 2 if abs(mean(losses)) < 1000 else 1
    spread = f" ± {(max(losses) - min(losses)) / 2:.{digits}f}" if len(losses) > 1 else ""
    failures = sum(found.loss is None or not math.isfinite(found.loss) for found in runs)
    noted = f", {failures} of {len(runs)} runs failed" if failures else ""
    return f"{mean(losses):.{digits}f}{spread} ({lr:g}{noted})"


def table(found: Cells) -> str:
    lines = ["| model | " + " | ".join(GUIDES) + " |", "|" + " --- |" * (len(GUIDES) + 1)]
    for model in (name for name in MODELS if any(name == of for of, _ in found)):
        lines.append(f"| {model} | " + " | ".join(found.get((model, guide), "") for guide in GUIDES) + " |")
    return "\n".join(lines)


def read(lines: str) -> Cells:
    """The inverse of :func:`table`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.strip().splitlines()]
    return {
        (row[0], guide): cell
        for row in rows[2:]
        for guide, cell in zip(rows[0][1:], row[1:], strict=True)
        if cell and row[0] in MODELS
    }


def write(found: Cells, page: Path = PAGE) -> None:
    """Puts cells into the table of the page; others stay as they are."""
    text, (first, last) = page.read_text(), MARKS
    before, rest = text.split(first)
    old, after = rest.split(last)
    page.write_text(before + first + table(read(old) | found) + last + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--guides", nargs="+", default=[*GUIDES], choices=[*GUIDES])
    parser.add_argument("--rates", nargs="+", type=float, help=f"default: {RATES}, of slow guides {SLOW}")
    parser.add_argument("--num-seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--write", action="store_true", help=f"put the cells into {PAGE.name}")
    options = parser.parse_args()
    pairs = [(m, g) for m in options.models for g in options.guides if applies(g, public_model(m))]
    jobs = [
        (m, g, lr, seed)
        for m, g in pairs
        for lr in (SLOW.get(g, RATES) if options.rates is None else options.rates)
        for seed in range(1 if g in SLOW else options.num_seeds)
    ]
    work = partial(run, num_steps=options.num_steps)
    runs = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for found in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), unit="run"):
            runs.append(found)
            said = f"{found.problem or f'{found.loss:.3f}'} ({found.seconds:.0f} s)"
            tqdm.write(f"{found.model}, {found.guide}, lr {found.lr:g}, seed {found.seed}: {said}")
    print(table(cells(runs)))
    if options.write:
        write(cells(runs))


if __name__ == "__main__":
    main()
