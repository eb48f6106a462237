"""Joint, branch and amortized branch families for more and more groups.

Amortized Variational Inference for Simple Hierarchical Models, Abhinav Agrawal, Justin Domke (2021),
https://arxiv.org/abs/2111.03144. Their synthetic hierarchical regression, whose evidence is known exactly: a Gaussian
over all latents, a table with one factor per group, and encoders of a group's data, for the same seconds of training.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from _evidence import Claim, Experiment, Table, run, with_error
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm.auto import tqdm

from pyro_amortized import AmortizedGuide, DeepSetEncoder, MLPEncoder, PerDatapointGuide

PAPER = "Agrawal, Domke 2021"
COVARIATES, OBSERVATIONS, BATCH = 3, 20, 100
MOST_JOINT = 1000
"""Groups up to which the joint family is run: at 10,000 its Cholesky factor takes 3.6 GB, and 14 GB in training."""
SLOWEST = 0.05
"""Share of the learning rate that is left in the end."""
Args = tuple[Tensor, Tensor, Tensor, int]


def regression(x: Tensor, y: Tensor, index: Tensor, num_groups: int) -> None:
    """p(theta) = N(0, I), p(z_n | theta) = N(theta, I), p(y_nm | z_n) = N(x_nm z_n, 1), of the groups at hand."""
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(COVARIATES), 1.0).to_event(1))
    with pyro.plate("groups", num_groups, subsample=index):
        z = pyro.sample("z", dist.Normal(theta, 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x @ z.unsqueeze(-1)).squeeze(-1), 1.0).to_event(1), obs=y)


def simulate(num_groups: int) -> tuple[Tensor, Tensor]:
    """Covariates ``(N, M, D)``, the first one constant, and observations ``(N, M)``."""
    z = torch.randn(COVARIATES) + torch.randn(num_groups, COVARIATES)
    x = torch.randn(num_groups, OBSERVATIONS, COVARIATES)
    x[..., 0] = 1.0
    return x, (x @ z.unsqueeze(-1)).squeeze(-1) + torch.randn(num_groups, OBSERVATIONS)


def evidence(x: Tensor, y: Tensor) -> float:
    """log p(y), exactly: z_n integrated out of each group, then theta."""
    x, y = x.double(), y.double().unsqueeze(-1)
    factor = torch.linalg.cholesky(x @ x.mT + torch.eye(OBSERVATIONS, dtype=torch.double))
    x, y = (torch.linalg.solve_triangular(factor, values, upper=False) for values in (x, y))
    precision = torch.eye(COVARIATES, dtype=torch.double) + (x.mT @ x).sum(0)
    linear = (x.mT @ y).sum(0)
    quadratic = y.square().sum() - (linear.mT @ torch.linalg.solve(precision, linear)).squeeze()
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum() + 0.5 * torch.logdet(precision)
    return float(-0.5 * y.numel() * math.log(2 * math.pi) - log_det - 0.5 * quadratic)


def rows(x: Tensor, y: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The observations of a group with their covariates ``(B, M, D + 1)``."""
    return torch.cat([x, y.unsqueeze(-1)], -1)


def statistics(x: Tensor, y: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The sufficient statistics of a group, X'X and X'y."""
    upper = torch.triu_indices(COVARIATES, COVARIATES)
    return torch.cat([(x.mT @ x)[..., upper[0], upper[1]], (x.mT @ y.unsqueeze(-1)).squeeze(-1)], -1)


def amortized(encoder: torch.nn.Module, encoder_input: Callable[..., Tensor]) -> AmortizedGuide:
    """A full-rank normal for theta, and for each group one from its data."""
    return AmortizedGuide(
        regression,
        encoder,
        family="multivariate_normal",
        global_guide=AutoMultivariateNormal,
        encoder_input=encoder_input,
    )


NUM_STATISTICS = COVARIATES * (COVARIATES + 3) // 2
GUIDES: dict[str, tuple[Callable[[], Any], tuple[float, float]]] = {
    "joint": (lambda: AutoMultivariateNormal(regression), (0.01, 0.03)),
    "branch": (
        lambda: PerDatapointGuide(regression, family="multivariate_normal", global_guide=AutoMultivariateNormal),
        (0.03, 0.1),
    ),
    "amortized, of rows": (lambda: amortized(DeepSetEncoder(COVARIATES + 1), rows), (0.003, 0.01)),
    "amortized, of statistics": (lambda: amortized(MLPEncoder(NUM_STATISTICS, (64, 64)), statistics), (0.003, 0.01)),
}
"""Guides, and the learning rates of which the better one counts."""


def train(guide: Any, batch: Callable[[], Args], rate: float, seconds: float) -> float:
    """SVI for some seconds of the processor, with a learning rate that falls; milliseconds per step."""
    guide.setup(*batch()) if hasattr(guide, "setup") else guide(*batch())
    optimizer = ClippedAdam({"lr": rate})
    svi = SVI(regression, guide, optimizer, Trace_ELBO())
    num_steps, start, progress = 0, time.process_time(), 0.0
    while progress < 1:
        svi.step(*batch())
        num_steps += 1
        progress = (time.process_time() - start) / seconds
        for torch_optimizer in optimizer.optim_objs.values():
            for group in torch_optimizer.param_groups:
                group["lr"] = rate * SLOWEST ** min(progress, 1.0)
    guide.eval()
    return 1e3 * (time.process_time() - start) / num_steps


@torch.no_grad()
def elbo(guide: Any, x: Tensor, y: Tensor, chunk: int, num_draws: int) -> float:
    """The ELBO of all groups, by draws for chunks of them."""
    torch.manual_seed(0)
    total, num = 0.0, len(x)
    for _ in range(num_draws):
        for index in torch.arange(num).split(chunk):
            loss = Trace_ELBO().loss(regression, guide, x[index], y[index], index, num)
            total -= loss * len(index) / num / num_draws
    return total


def measure_guide(name: str, x: Tensor, y: Tensor, rate: float, args: argparse.Namespace) -> tuple[float, float, int]:
    """The gap to the evidence in nats per group, milliseconds per step, number of parameters; NaN if it diverged."""
    num = len(x)
    size = num if name == "joint" else min(num, BATCH)

    def batch() -> Args:
        index = torch.randperm(num)[:size] if size < num else torch.arange(num)
        return x[index], y[index], index, num

    pyro.clear_param_store()
    guide = GUIDES[name][0]()
    try:
        milliseconds = train(guide, batch, rate, args.seconds)
    except ValueError as error:  # a distribution is given parameters that are no numbers any more
        if "found invalid values" not in str(error):
            raise
        return np.nan, np.nan, 0
    gap = (evidence(x, y) - elbo(guide, x, y, num if name == "joint" else 1000, args.draws)) / num
    return gap, milliseconds, sum(p.numel() for p in guide.parameters())


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """Every guide at every number of groups and both of its learning rates."""
    sizes = [10 * 10**i for i in range(args.magnitudes)]
    shape = (len(GUIDES), len(sizes), 2)
    gap, milliseconds, parameters = (np.full(shape, np.nan) for _ in range(3))
    with tqdm(total=gap.size, desc=f"seed {seed}", unit="run") as bar:
        for column, num in enumerate(sizes):
            x, y = simulate(num)
            for row, (name, (_, rates)) in enumerate(GUIDES.items()):
                for i, rate in enumerate(rates):
                    if name != "joint" or num <= MOST_JOINT:
                        place = row, column, i
                        gap[place], milliseconds[place], parameters[place] = measure_guide(name, x, y, rate, args)
                    bar.update()
    dims = ("guide", "groups", "rate")
    return xr.Dataset(
        {
            "gap": (dims, gap, {"units": "nats per group"}),
            "milliseconds": (dims, milliseconds, {"units": "ms per step"}),
            "parameters": (dims, parameters),
        },
        {"guide": list(GUIDES), "groups": sizes},
    )


# What is made of the numbers


def best(runs: xr.Dataset) -> xr.Dataset:
    """Every guide at the learning rate whose ELBO, which it is trained on, is best on average and never diverges."""
    rate = runs["gap"].mean("seed", skipna=False).fillna(np.inf).argmin("rate")
    return runs.isel(rate=rate)


def tables(runs: xr.Dataset) -> list[Table]:
    """Gap, time and memory by guide and number of groups."""
    chosen = best(runs)
    heads = ["guide", *(f"{int(n):,}" for n in runs["groups"])]

    def cells(values: xr.DataArray, digits: int) -> list[list[str]]:
        return [
            [str(name), *(_cell(values.sel(guide=name, groups=n), digits) for n in values["groups"])]
            for name in values["guide"].values
        ]

    return [
        Table(
            "ELBO below the evidence, nats per group, by the number of groups",
            heads,
            cells(chosen["gap"], 3),
            f"A group has {OBSERVATIONS} observations. All are trained for the same time, at the better of two rates.",
        ),
        Table(
            "Milliseconds per step", heads, cells(chosen["milliseconds"], 1), "On batches of 100 groups; joint: all."
        ),
        Table(
            "Memory in training, MB: parameters, gradients and the moments of Adam",
            heads,
            cells(chosen["parameters"] * 16e-6, 2),
            f"joint is not run above {MOST_JOINT:,} groups: at 10,000 it would need 14,000 MB.",
        ),
    ]


def _cell(values: xr.DataArray, digits: int) -> str:
    return with_error(values, digits) if values.notnull().all() else "not run"


def claims(runs: xr.Dataset) -> list[Claim]:
    """The paper's, and ours."""
    chosen = best(runs)
    gap, sizes = chosen["gap"], [int(n) for n in runs["groups"]]
    joint, branch, encoder, clever = (gap.sel(guide=name) for name in GUIDES)
    small, large, shared = sizes[0], sizes[-1], max(n for n in sizes if n <= MOST_JOINT)
    milliseconds = chosen["milliseconds"].sel(groups=shared)
    middle = [n for n in sizes if n < large]
    return [
        Claim(
            f"At {small} groups the amortized branch equals the joint family, to 0.1 nats per group",
            PAPER, {"0.1 less the difference": (0.1 - encoder + joint).sel(groups=small).values}, "nats per group",
        ),
        Claim(
            f"At {large:,} groups it has a better ELBO than the branch after the same time",
            PAPER, {"branch less amortized": (branch - encoder).sel(groups=large).values}, "nats per group",
        ),
        Claim(
            f"At {shared:,} groups a step of the joint family costs ten times as much as one of the amortized branch",
            PAPER,
            {
                "joint less ten times": (
                    milliseconds.sel(guide="joint") - 10 * milliseconds.sel(guide="amortized, of rows")
                ).values
            },
            "ms",
        ),
        Claim(
            "While every group is met often, a table is better than an encoder of rows",
            "ours", {f"{n:,} groups": (encoder - branch).sel(groups=n).values for n in middle}, "nats per group",
        ),
        Claim(
            f"An encoder of sufficient statistics is better than one of rows at {large:,} groups",
            "ours", {"rows less statistics": (encoder - clever).sel(groups=large).values}, "nats per group",
        ),
    ]  # fmt: skip


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """Gap, time and memory against the number of groups."""
    chosen = best(runs)
    axes: Any = figure.subplots(1, 3)
    values = (chosen["gap"].clip(1e-4), chosen["milliseconds"], chosen["parameters"] * 16e-6)
    labels = ("below the evidence, nats per group", "milliseconds per step", "memory in training, MB")
    titles = ("The same seconds of training", "Time", "Parameters and optimizer")
    for ax, array, label, title in zip(axes, values, labels, titles, strict=True):
        for name in GUIDES:
            one = array.sel(guide=name).dropna("groups")
            error = one.std("seed", ddof=1) / one.sizes["seed"] ** 0.5
            ax.errorbar(one["groups"], one.mean("seed"), error, fmt="o-", capsize=2, label=name)
        ax.set(xscale="log", yscale="log", xlabel="groups", ylabel=label, title=title)
    axes[0].legend(fontsize=8)


EXPERIMENT = Experiment(
    name="agrawal_domke",
    title="Families for more and more groups",
    doc="""
        Amortized Variational Inference for Simple Hierarchical Models, Abhinav Agrawal, Justin Domke (2021). Their
        synthetic regression, z_n ~ N(theta, I), y_nm ~ N(x_nm z_n, 1), with 3 covariates and 20 observations per group;
        the evidence is known. Joint: `AutoMultivariateNormal`. Branch: `PerDatapointGuide`, a normal of full rank for
        each group. Amortized branch: `AmortizedGuide`, with a `DeepSetEncoder` of the group's rows, or an `MLPEncoder`
        of its sufficient statistics. Here q(z_n) does not depend on theta, as theirs does, but for the joint family: in
        this model that costs less than 0.1 nats in all. Branches see batches of 100 groups.
    """,
    measure=measure,
    tables=tables,
    claims=claims,
    draw=draw,
    sizes={
        "magnitudes": (4, 5, "number of sizes, 10 groups and ten times as many each time"),
        "seconds": (6.0, 600.0, "seconds of the processor for each guide"),
        "draws": (20, 20, "draws of the ELBO"),
    },
    timed=True,
)

if __name__ == "__main__":
    run(EXPERIMENT)
