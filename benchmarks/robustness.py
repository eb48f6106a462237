"""How steady the defaults are: thirteen models, four learning rates, three seeds: ``make robustness``.

Every guide is made as ``Guide(model)``, with what the model needs said: the datapoint plate, and of two models what the
encoder sees. A run is 300 steps of Adam at a constant learning rate. It has failed if a loss was not finite or the
guide could not go on; its result is the ELBO of the training data afterwards, in nats per datapoint.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import tqdm

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "zoo"))
from _problem import GUIDES as ZOO_GUIDES
from _problem import Problem, rows_at_random

RATES = (0.001, 0.003, 0.01, 0.03)
NUM_SEEDS = 3
NUM_STEPS = 300
NUM_PARTICLES, REFINED_ROWS = 20, 2000
"""Evaluations of the ELBO at the end; guides that refine in each do fewer, of so many datapoints in all."""


# Models


def eight_schools() -> Problem:
    """Donald B. Rubin, "Estimation in Parallel Randomized Experiments" (1981); every school has latents of its own."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor) -> None:
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            tau = pyro.sample("tau", dist.HalfCauchy(25.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return Problem(name="eight schools", model=model, train=(y,), held_out=())


class Counts(nn.Module):
    """Poisson counts with an exponential link, size factors and batches."""

    def __init__(self, num_factors: int, num_genes: int, num_batches: int) -> None:
        super().__init__()
        self.loadings = nn.Parameter(0.1 * torch.randn(num_factors, num_genes))
        self.batch_effects = nn.Parameter(torch.zeros(num_batches, num_genes))

    def forward(self, counts: Tensor, size: Tensor, batch: Tensor) -> None:
        pyro.module("counts", self)
        with pyro.plate("cells", len(counts)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(self.loadings)), 1.0).to_event(1))
            log_rate = (z @ self.loadings + self.batch_effects[batch]).clamp(max=8.0)
            pyro.sample("counts", dist.Poisson(size.unsqueeze(-1) * log_rate.exp()).to_event(1), obs=counts)


def counts() -> Problem:
    num_cells, num_genes, num_factors, num_batches = 600, 40, 4, 3
    batch, size = torch.randint(num_batches, (num_cells,)), (0.5 * torch.randn(num_cells)).exp()
    effects = 0.5 * torch.randn(num_batches, num_genes) + 0.5
    log_rate = torch.randn(num_cells, num_factors) @ (0.6 * torch.randn(num_factors, num_genes)) + effects[batch]
    data = torch.poisson(size.unsqueeze(-1) * log_rate.exp()), size, batch
    model = Counts(num_factors, num_genes, num_batches)
    return Problem(name="counts", model=model, train=data, held_out=(), batches=rows_at_random(100))


def sparse_dirichlet() -> Problem:
    num_documents, num_words = 30, 50
    words = torch.distributions.Multinomial(20, torch.ones(num_words)).sample((num_documents,))

    def model(words: Tensor) -> None:
        with pyro.plate("documents", len(words)):
            shares = pyro.sample("shares", dist.Dirichlet(0.1 * torch.ones(num_words)))
            pyro.sample("words", dist.Multinomial(20, shares), obs=words)

    return Problem(name="sparse Dirichlet", model=model, train=(words,), held_out=())


def half_cauchy() -> Problem:
    """Three observations for each scale and location."""
    x = torch.randn(200, 3) * dist.HalfCauchy(1.0).sample((200, 1))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.HalfCauchy(1.0)).unsqueeze(-1)
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, scale).expand(x.shape).to_event(1), obs=x)

    return Problem(name="half-Cauchy", model=model, train=(x,), held_out=(), batches=rows_at_random(100))


class Spots(nn.Module):
    """Counts of cells with neighbours' among them: a mixture prior of cell types, a share of background for each cell.

    After resolVI (Can Ergen, Nir Yosef, "ResolVI: addressing noise and bias in spatial transcriptomics", 2025).
    """

    def __init__(self, num_types: int, num_factors: int, num_genes: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_types))
        self.locs = nn.Parameter(torch.randn(num_types, num_factors))
        self.log_scales = nn.Parameter(torch.zeros(num_types, num_factors))
        self.loadings = nn.Parameter(0.3 * torch.randn(num_factors, num_genes))
        self.background = nn.Parameter(torch.zeros(num_genes))

    def forward(self, counts: Tensor) -> None:
        pyro.module("spots", self)
        types = dist.Categorical(logits=self.weights), dist.Normal(self.locs, self.log_scales.exp()).to_event(1)
        with pyro.plate("cells", len(counts)):
            z = pyro.sample("z", dist.MixtureSameFamily(*types))
            share = pyro.sample("share", dist.Beta(2.0, 10.0)).unsqueeze(-1)
            profile = (1 - share) * (z @ self.loadings).softmax(-1) + share * self.background.softmax(-1)
            size = counts.sum(-1, keepdim=True) + 1.0
            pyro.sample("counts", dist.Poisson(size * profile).to_event(1), obs=counts)


def mixture_prior() -> Problem:
    num_cells, num_genes, num_types = 600, 40, 5
    profiles, background = (1.5 * torch.randn(num_types, num_genes)).softmax(-1), torch.randn(num_genes).softmax(-1)
    share = dist.Beta(2.0, 10.0).sample((num_cells, 1))
    rate = 100 * ((1 - share) * profiles[torch.randint(num_types, (num_cells,))] + share * background)
    data = (torch.poisson(rate),)
    model = Spots(num_types, 4, num_genes)
    return Problem(name="mixture prior", model=model, train=data, held_out=(), batches=rows_at_random(100))


ZOO = ("vae", "lda", "sparse_gamma", "single_cell", "hierarchical", "cevae", "semi_supervised", "missing_data")
MODELS: dict[str, Callable[[], Problem]] = {
    "eight_schools": eight_schools,
    "counts": counts,
    "sparse_dirichlet": sparse_dirichlet,
    "half_cauchy": half_cauchy,
    "mixture_prior": mixture_prior,
    **{name: partial(lambda name: importlib.import_module(name).make_problem(), name) for name in ZOO},
}


# Guides


def defaults(problem: Problem, *, encodes: bool = True) -> dict[str, Any]:
    """What of a problem's options is no choice: the plate, and what the encoder sees."""
    names = ("plate", "encoder_input") if encodes else ("plate", "create_plates")
    return {name: problem.options[name] for name in names if name in problem.options}


GUIDES: dict[str, Callable[[Problem], Any]] = {
    "AutoNormal": lambda p: ZOO_GUIDES["AutoNormal"](replace(p, options={})),
    "PerDatapoint": lambda p: PerDatapointGuide(p.model, **defaults(p, encodes=False)),
    "Amortized": lambda p: AmortizedGuide(p.model, **defaults(p)),
    "SemiAmortized": lambda p: SemiAmortizedGuide(p.model, **defaults(p)),
    "Iterative": lambda p: IterativeAmortizedGuide(p.model, **defaults(p)),
}


# Runs


@dataclass(frozen=True)
class Run:
    """What came of one training.

    Attributes:
        largest: The largest loss of steps 2 to 30, in nats per datapoint.
        elbo: The ELBO at the end, in nats per datapoint; None if the training failed.
        seconds: Seconds of training.
    """

    model: str
    guide: str
    lr: float
    seed: int
    largest: float
    elbo: float | None
    seconds: float


@cache
def problem_of(name: str) -> Problem:
    pyro.set_rng_seed(0)
    return MODELS[name]()


def run(job: tuple[str, str, float, int], num_steps: int = NUM_STEPS) -> Run:
    name, guide_name, lr, seed = job
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # in some models all but known labels slow every step fivefold
    warnings.simplefilter("ignore")
    original = problem_of(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    problem = replace(original, model=copy.deepcopy(original.model))
    start, losses, elbo = time.perf_counter(), list[float](), None
    try:
        guide = GUIDES[guide_name](problem)
        bound = guide_name in ("AutoNormal", "PerDatapoint")  # to the datapoints of their first call
        if bound:
            (guide if guide_name == "AutoNormal" else guide.setup)(*problem.train)
        whole = problem.batches is None or (bound and problem.create_plates is None)
        batches = None if whole else problem.batches(problem.train)  # type: ignore[misc]
        svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": lr}), problem.loss())
        start = time.perf_counter()
        for _ in range(num_steps):
            args = problem.train if batches is None else next(batches)
            losses.append(svi.step(*args) / problem.num_datapoints(*args))
            if not math.isfinite(losses[-1]):
                break
        else:
            seconds = time.perf_counter() - start
            guide.eval()
            loss, size = problem.loss(), problem.num_datapoints(*problem.train)
            with torch.no_grad():
                refines = guide_name in ("SemiAmortized", "Iterative")
                number = min(NUM_PARTICLES, math.ceil(REFINED_ROWS / size)) if refines else NUM_PARTICLES
                elbo = mean(-loss.loss(problem.model, guide, *problem.train) / size for _ in range(number))
            elbo = elbo if math.isfinite(elbo) else None
            return Run(name, guide_name, lr, seed, max(losses[1:30]), elbo, seconds)
    except (ValueError, RuntimeError, NotImplementedError) as error:  # a run that fails is a result
        print(f"{name}, {guide_name}, lr {lr:g}, seed {seed}: {str(error).splitlines()[0]}", file=sys.stderr)
    return Run(name, guide_name, lr, seed, max([*losses[1:30], 0.0]), None, time.perf_counter() - start)


def table(runs: Iterable[Run]) -> str:
    """Markdown: a row for each model and guide, a column for each learning rate: the ELBO over seeds, or failures."""
    cells: dict[tuple[str, str], dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for found in runs:
        cells[found.model, found.guide][found.lr].append(found)
    rates = sorted({lr for row in cells.values() for lr in row})
    lines = ["| model | guide | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | seconds |"]
    lines.append("|" + " --- |" * (len(rates) + 3))
    for (model, guide), row in sorted(cells.items(), key=lambda item: ([*MODELS].index(item[0][0]), item[0][1])):
        seconds = mean(found.seconds for found in row[rates[-1]] + row[rates[0]])
        lines.append(f"| {model} | {guide} | " + " | ".join(_cell(row[lr]) for lr in rates) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(runs: list[Run]) -> str:
    elbos = [found.elbo for found in runs if found.elbo is not None]
    if len(elbos) < len(runs):
        return f"{len(runs) - len(elbos)} of {len(runs)} failed"
    spread = f" ± {stdev(elbos):.2f}" if len(elbos) > 1 else ""
    return f"{mean(elbos):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--guides", nargs="+", default=[*GUIDES], choices=[*GUIDES])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--num-seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument(
        "--results", type=Path, help="a file of JSON lines: runs in it are not repeated, new ones added"
    )
    options = parser.parse_args()
    seeds = range(options.num_seeds)
    jobs = [(m, g, lr, s) for s in seeds for g in options.guides for m in options.models for lr in options.rates]
    runs = saved(options.results)
    done = {(found.model, found.guide, found.lr, found.seed) for found in runs}
    left = [job for job in jobs if job not in done]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for found in tqdm(pool.imap_unordered(partial(run, num_steps=options.num_steps), left), total=len(left)):
            runs.append(found)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
    print(table(runs))


def saved(results: Path | None) -> list[Run]:
    return [Run(**json.loads(line)) for line in results.open()] if results and results.exists() else []


if __name__ == "__main__":
    main()
