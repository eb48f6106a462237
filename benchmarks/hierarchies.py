"""Hierarchies, with default guides: gaps on new groups, groups of other sizes, long format, crossed plates, data sets.

``make hierarchies``, or ``python benchmarks/hierarchies.py NAME ...`` with names of the parts; about half an hour on
two cores. Every figure is for one seed unless it has an error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_amortized import AmortizedGuide, PlateEncoder, SetEncoder, calibrate, estimate_gaps, over_datasets


def train(model: Any, guide: Any, batches: Callable[[], tuple[Any, ...]], num_steps: int, lr: float = 0.01) -> float:
    """Trains with a learning rate that ends at a tenth; milliseconds per step."""
    guide(*batches()) if isinstance(guide, AutoNormal) else guide.setup(*batches())
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / num_steps)})
    svi, start = SVI(model, guide, optimizer, Trace_ELBO()), time.perf_counter()
    for _ in range(num_steps):
        svi.step(*batches())
    guide.eval()
    return 1e3 * (time.perf_counter() - start) / num_steps


def mean_gaps(model: Any, guide: Any, args: tuple[Any, ...], **options: Any) -> str:
    gaps = estimate_gaps(model, guide, args, **options).dataset
    return "  ".join(f"{name} {float(gaps[f'{name}_gap'].mean()):7.4f}" for name in ("approximation", "amortization"))


# Schools, pupils, tests


def schools(y: Tensor) -> None:
    with pyro.plate("school", y.shape[0], dim=-3):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-2):
            p = pyro.sample("p", dist.Normal(s, 0.7))
            with pyro.plate("test", y.shape[2], dim=-1):
                pyro.sample("y", dist.Normal(p, 0.5), obs=y)


def some_schools(num: int, pupils: int = 8, tests: int = 5) -> Tensor:
    pupil = torch.randn(num, 1, 1) + 0.7 * torch.randn(num, pupils, 1)
    return pupil + 0.5 * torch.randn(num, pupils, tests)


def gaps_of_schools() -> None:
    """Trained on a number of schools of 8 pupils with 5 tests: gaps in nats per school."""
    for family in ("normal", "structured"):
        for num, num_steps in ((30, 2000), (300, 2000)):
            pyro.set_rng_seed(0)
            pyro.clear_param_store()
            y, new = some_schools(num), some_schools(100)
            guide = AmortizedGuide(schools, plate="school", family=family)
            ms = train(schools, guide, lambda y=y: (y[torch.randint(len(y), (min(len(y), 64),))],), num_steps)  # type: ignore[misc]
            size = sum(parameter.numel() for parameter in guide.parameters())
            print(f"{family:10} {num:3} schools, {size:,} parameters, {ms:.1f} ms a step")
            print(
                f"    training {mean_gaps(schools, guide, (y[:100],))}   held out {mean_gaps(schools, guide, (new,))}"
            )


def sizes_of_schools() -> None:
    """One guide, trained on batches of 5, 8 and 16 pupils with 3, 5 and 9 tests: held-out gaps of each size."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    shapes = [(pupils, tests) for pupils in (5, 8, 16) for tests in (3, 5, 9)]
    data = {shape: some_schools(300, *shape) for shape in shapes}

    def batch() -> tuple[Tensor]:
        y = data[shapes[int(torch.randint(len(shapes), ()))]]
        return (y[torch.randint(300, (64,))],)

    guide = AmortizedGuide(schools, plate="school", family="structured")
    train(schools, guide, batch, 3000)
    for shape in shapes:
        print(f"{shape[0]:3} pupils {shape[1]} tests   {mean_gaps(schools, guide, (some_schools(60, *shape),))}")


# Against Hamiltonian Monte Carlo


def counts(y: Tensor, likelihood: Callable[[Tensor], Any]) -> None:
    """Three levels: schools, classes, pupils of whom each has four answers."""
    with pyro.plate("school", y.shape[0], dim=-4):
        s = pyro.sample("s", dist.Normal(0.0, 0.7))
        with pyro.plate("class", y.shape[1], dim=-3):
            c = pyro.sample("c", dist.Normal(s, 0.5))
            with pyro.plate("pupil", y.shape[2], dim=-2):
                p = pyro.sample("p", dist.Normal(c, 0.5))
                with pyro.plate("answer", y.shape[3], dim=-1):
                    pyro.sample("y", likelihood(p), obs=y)


def bernoulli(y: Tensor) -> None:
    counts(y, lambda p: dist.Bernoulli(logits=p))


def poisson(y: Tensor) -> None:
    counts(y, lambda p: dist.Poisson((1.0 + p).exp()))


def against_nuts() -> None:
    """Twenty new schools, ``family="structured"`` after ``refined(5)``: errors against NUTS (1,000 draws)."""
    for model in (bernoulli, poisson):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()

        def simulate(num: int, model: Any = model) -> Tensor:
            blank = torch.zeros(num, 3, 4, 4)
            return poutine.trace(poutine.uncondition(model)).get_trace(blank).nodes["y"]["value"]

        y, new = simulate(500), simulate(20)
        guide = AmortizedGuide(model, plate="school", family="structured")
        train(model, guide, lambda y=y: (y[torch.randint(500, (64,))],), 2000)  # type: ignore[misc]
        mcmc = MCMC(NUTS(model), num_samples=1000, warmup_steps=300, disable_progbar=True)
        mcmc.run(new)
        for name, one in (("encoder", guide), ("refined(5)", guide.refined(5))):
            errors, ratios = [], []
            quantiles = one.quantiles([0.15865525, 0.5, 0.84134475], new)
            for site, samples in mcmc.get_samples().items():
                mean, deviation = samples.mean(0), samples.std(0)
                errors.append(((quantiles[site][1] - mean) / deviation).abs().flatten())
                ratios.append(((quantiles[site][2] - quantiles[site][0]) / 2 / deviation).flatten())
            error, ratio = torch.cat(errors), torch.cat(ratios)
            print(
                f"{model.__name__:10} {name:10} means off by {error.mean():.3f} sd on average, "
                f"{error.quantile(0.95):.3f} at the 95th percentile; sds {ratio.quantile(0.05):.2f} to "
                f"{ratio.quantile(0.95):.2f} of NUTS's"
            )


# Long format


def radon(y: Tensor, floor: Tensor, county_index: Tensor, uranium: Tensor) -> None:
    with pyro.plate("county", len(uranium)):
        a = pyro.sample("a", dist.Normal(0.5 * uranium, 0.6))
    with pyro.plate("obs", len(county_index)):
        pyro.sample("y", dist.Normal(a[county_index] - 0.7 * floor, 0.8), obs=y)


def padded(y: Tensor, floor: Tensor, present: Tensor, uranium: Tensor) -> None:
    with pyro.plate("county", len(uranium), dim=-2):
        a = pyro.sample("a", dist.Normal(0.5 * uranium.unsqueeze(-1), 0.6))
        with pyro.plate("house", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a - 0.7 * floor, 0.8).mask(present), obs=y)


def some_counties(num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (torch.rand(num).pow(3) * 99).long() + 1
    index = torch.repeat_interleave(torch.arange(num), sizes)
    uranium, floor = torch.randn(num), (torch.rand(len(index)) < 0.3).float()
    a = 0.5 * uranium + 0.6 * torch.randn(num)
    return a[index] - 0.7 * floor + 0.8 * torch.randn(len(index)), floor, index, uranium


def pad(y: Tensor, floor: Tensor, index: Tensor, uranium: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.argsort(index, stable=True)
    place = torch.arange(len(index)) - torch.searchsorted(index[order], index[order])
    wide = torch.zeros(3, len(uranium), int(index.bincount().max()))
    wide[:, index[order], place] = torch.stack([y[order], floor[order], torch.ones(len(y))])
    return wide[0], wide[1], wide[2].bool(), uranium


def long_format() -> None:
    """Counties of 1 to 100 houses: gaps, and a step's time in long format and padded; then more and more counties."""
    named = {"obs": ["y", "floor"], "county": ["uranium"]}
    options: Any = {"plate": "county", "groups": {"obs": "county_index"}, "encoder_input": named}
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    args = some_counties(85)
    guide = AmortizedGuide(radon, **options)
    ms = train(radon, guide, lambda: args, 1000)
    print(f"85 counties, {ms:.1f} ms a step   training {mean_gaps(radon, guide, args)}")
    print(f"    new counties {mean_gaps(radon, guide, some_counties(85))}")
    args = some_counties(2000)
    other: Any = AmortizedGuide(
        padded, PlateEncoder(), plate="county", encoder_input={"house": ["y", "floor"], "county": ["uranium"]}, name="p"
    )
    wide = pad(*args)
    times = train(radon, guide, lambda: args, 30), train(padded, other, lambda: wide, 30)
    print(f"2,000 counties at once: {times[0]:.1f} ms a step in long format, {times[1]:.1f} ms padded")
    for num in (1_000, 10_000, 100_000):
        print(f"{num:7,} counties in batches of 100: {_minibatches(num):.1f} ms a step")


def minibatch(y: Tensor, county_index: Tensor, uranium: Tensor, rows: Tensor, num: int) -> None:
    with pyro.plate("county", num, subsample=rows):
        a = pyro.sample("a", dist.Normal(0.5 * uranium, 0.6))
    with poutine.scale(scale=num / len(rows)), pyro.plate("obs", len(county_index)):
        pyro.sample("y", dist.Normal(a[county_index], 0.8), obs=y)


def _minibatches(num: int) -> float:
    y, floor, index, uranium = some_counties(num)
    y, ends = y + 0.7 * floor, index.bincount(minlength=num).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])

    def batch() -> tuple[Any, ...]:
        rows = torch.randint(num, (100,)).unique()
        entries = torch.cat([torch.arange(int(starts[i]), int(ends[i])) for i in rows])
        position = torch.repeat_interleave(torch.arange(len(rows)), ends[rows] - starts[rows])
        return y[entries], position, uranium[rows], rows, num

    named = {"obs": ["y"], "county": ["uranium"]}
    guide = AmortizedGuide(
        minibatch, plate="county", groups={"obs": "county_index"}, encoder_input=named, name=f"minibatch_{num}"
    )
    return train(minibatch, guide, batch, 100)


# Crossed plates


def factors(x: Tensor) -> None:
    cells, genes = pyro.plate("cells", x.shape[0], dim=-2), pyro.plate("genes", x.shape[1], dim=-1)
    with genes:
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with cells:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with cells, genes:
        pyro.sample("x", dist.Normal((u * v).sum(-1), 0.5), obs=x)


def crossed() -> None:
    """A matrix of 300 x 200 of rank 2: loss after 1,500 steps, both sides amortized, and of AutoNormal's table."""
    pyro.set_rng_seed(0)
    x = torch.randn(300, 2) @ torch.randn(2, 200) + 0.5 * torch.randn(300, 200)
    both = {"plate": "cells", "global_guide": lambda model: AmortizedGuide(model, plate="genes")}
    guides: dict[str, Callable[[], Any]] = {
        "AutoNormal": lambda: AutoNormal(factors, init_loc_fn=pyro.infer.autoguide.init_to_sample),
        "rows and columns as vectors": lambda: AmortizedGuide(factors, **both),
        "entries with the other's draw": lambda: AmortizedGuide(factors, encoder_input={"genes": ["x", "v"]}, **both),
    }
    for name, make in guides.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = make()
        ms = train(factors, guide, lambda: (x,), 1500)
        loss = sum(Trace_ELBO().loss(factors, guide, x) for _ in range(20)) / 20
        print(f"{name:30} loss {loss:9.1f}   {ms:.1f} ms a step")


# Whole data sets


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def some_data_sets(num: int, size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Simulated data sets, and their latents: unconstrained, in one vector."""
    w, log_scale, x = torch.randn(num, 2), -0.5 + 0.5 * torch.randn(num, 1), torch.randn(num, size, 2)
    y = (x @ w.unsqueeze(-1)).squeeze(-1) + log_scale.exp() * torch.randn(num, size)
    return (x, y), torch.cat([w, log_scale], -1)


def data_sets(num_steps: int = 8000) -> None:
    """Linear regressions of 5 to 200 observations, noise unknown, trained on simulations: gaps and calibration."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    model = over_datasets(regression)
    guide = AmortizedGuide(
        model,
        SetEncoder(3),
        family="multivariate_normal",
        encoder_input=lambda x, y: torch.cat([x, y.unsqueeze(-1)], -1),
    )
    guide.setup(*some_data_sets(256, 30)[0])
    optimizer = torch.optim.Adam(guide.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps, pct_start=0.1)
    start = time.perf_counter()
    for _ in range(num_steps):
        args, latents = some_data_sets(64, int(torch.tensor(5.0).mul(40.0 ** float(torch.rand(()))).round()))
        loss = -guide.posterior(*args).log_prob(latents).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    guide.eval()
    print(f"{1e3 * (time.perf_counter() - start) / num_steps:.1f} ms a step of 64 data sets")
    for size in (5, 10, 30, 100, 200):
        args, _ = some_data_sets(100, size)
        for name, answers in (("encoder", guide), ("refined(5)", guide.refined(5))):
            report = calibrate(model, answers, args, num_simulations=200, num_samples=99)
            gaps = mean_gaps(model, answers, args)
            print(f"{size:4} observations, {name:10s}   {gaps}   {str(report).splitlines()[-1]}", flush=True)


PARTS = {
    function.__name__: function
    for function in (gaps_of_schools, sizes_of_schools, against_nuts, long_format, crossed, data_sets)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *PARTS], help="parts, by default all")
    for name in parser.parse_args().names or PARTS:
        print(f"\n{name}: {PARTS[name].__doc__}")
        PARTS[name]()
