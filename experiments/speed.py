"""How many seconds it takes to close the amortization gap, and how they grow.

A VAE with a small encoder is trained and held fixed; the encoder's answers for held-out images are then improved image
by image: by `guide.refined(k)` with each of its update rules, and by what people write by hand in eager PyTorch: Adam
on (mean, log scale), ten particles, at the best of three step sizes, and the stochastic gradient ascent with momentum
of Kim et al. (2018). Seconds are those of the processor in one thread, from the encoder's answer on, of a guide that
has not refined before; methods run in turn. The gap closed is measured on common draws.

Where NumPyro is installed, its `AutoSemiDAIS` goes on from the same encoder: leapfrog steps towards the posterior with
step size, damping, temperatures and masses that it has learned on the training images. Its seconds are those of one
draw, compiled and trained before, and every further draw takes them again; its bound is not one of a normal, and may
exceed the best of these.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from _dais import dais_bounds
from _evidence import Claim, Experiment, Table, run, with_error
from matplotlib.figure import Figure
from pyro.distributions import Bernoulli, Normal
from torch import Tensor

from pyro_amortized import Adam, AmortizedGuide, MLPEncoder, NaturalGradient, Newton, UpdateRule, optimize_local

# isort: split
from _common import VAE, load_images, train  # _evidence knows where it is

SHARES = (0.95, 0.99)
STEPS = {
    "Newton": (1, 2, 3, 4, 5, 7, 10), "Newton, compiled": (3, 5, 10),
    "natural gradient": (1, 2, 3, 5, 7, 10, 15, 20), "Adam rule": (10, 20, 40),
}  # fmt: skip
RULES: dict[str, tuple[Callable[[], UpdateRule], dict[str, Any]]] = {
    "Newton": (Newton, {}), "Newton, compiled": (Newton, {"compile": True}), "natural gradient": (NaturalGradient, {}),
    "Adam rule": (lambda: Adam(0.1), {}),
}  # fmt: skip
NAMES = {name: f"refined, {name}" for name in STEPS}
RATES = (0.02, 0.05, 0.1)
HAND = "by hand: Adam"
KIM = "by hand: momentum, Kim et al."
DAIS = "AutoSemiDAIS of NumPyro, a draw"
METHODS = (*NAMES.values(), HAND, KIM, *([DAIS] if importlib.util.find_spec("numpyro") else []))
LEAPFROG = (4, 8, 16, 32)
HAND_STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100, 130, 160, 200)
MOST = 16
GROWTH = {"images": (50, 100, 200, 400), "latents": (4, 8, 16, 32), "steps": (5, 10, 20, 40)}


class Judge:
    """The ELBO of means and log scales on draws that are the same for all."""

    def __init__(self, model: VAE, x: Tensor, draws: int = 100) -> None:
        self.model, self.x = model, x
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(draws // 2, len(x), model.latent_dim, generator=generator)
        self.noise = torch.cat([half, -half])

    @torch.no_grad()
    def __call__(self, phi: Tensor) -> float:
        """The mean over the images."""
        loc, log_scale = phi.chunk(2, -1)
        return torch.stack([elbo(self.model, self.x, loc, log_scale, eps[None]) for eps in self.noise]).mean().item()


def elbo(model: VAE, x: Tensor, loc: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
    """The ELBO of every image, as one writes it by hand."""
    z = loc + log_scale.exp() * noise
    log_joint = Normal(0.0, 1.0).log_prob(z).sum(-1) + Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    return (log_joint - Normal(loc, log_scale.exp()).log_prob(z).sum(-1)).mean(0)


def by_hand(
    model: VAE, x: Tensor, phi: Tensor, make: Callable[[list[Tensor]], Any], clip: float | None
) -> tuple[list[float], list[Tensor]]:
    """Seconds and phi after each of the numbers of steps."""
    loc, log_scale = (part.clone().requires_grad_() for part in phi.chunk(2, -1))
    optimizer, seconds, phis, spent = make([loc, log_scale]), [], [], 0.0
    for step in range(1, HAND_STEPS[-1] + 1):
        start = time.process_time()
        noise = torch.randn(10, *loc.shape)
        optimizer.zero_grad()
        (-elbo(model, x, loc, log_scale, noise).sum()).backward()
        if clip is not None:  # as coded: of mean and log scale apart, and over the batch's mean
            for part in (loc, log_scale):
                torch.nn.utils.clip_grad_norm_([part], clip * len(x))
        optimizer.step()
        spent += time.process_time() - start
        if step in HAND_STEPS:
            seconds.append(spent)
            phis.append(torch.cat([loc, log_scale], -1).detach())
    return seconds, phis


def refined(guide: AmortizedGuide, x: Tensor, rule: Callable[[], UpdateRule], steps: int, **options: Any) -> Any:
    """Seconds and phi of a fresh refined guide."""
    start = time.process_time()
    with torch.no_grad():
        phi = guide.refined(steps, rule(), **options).variational_parameters(x)
    return time.process_time() - start, phi


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """One repetition."""
    images, held_out = load_images(args.data)
    model = VAE.for_images(images)
    guide = AmortizedGuide(model, MLPEncoder(images.shape[1], (args.width,), standardize=False))
    train(model, guide, images, "VAE", num_steps=args.steps)
    model.requires_grad_(False).eval()
    x = held_out[torch.randperm(len(held_out))[: args.images]]
    with torch.no_grad():
        phi = guide.variational_parameters(x)
    judge = Judge(model, x)
    best, start = judge(optimize_local(model, guide, (x,)).phi), judge(phi)
    curves: dict[str, tuple[list[float], list[Tensor]]] = {}
    refined(guide, x[:2], Newton, 1)  # torch's own first calls
    for name, method in NAMES.items():
        pairs = [refined(guide, x, RULES[name][0], steps, **RULES[name][1]) for steps in STEPS[name]]
        curves[method] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for rate in RATES:
        curves[f"{HAND} {rate}"] = by_hand(model, x, phi, lambda p, rate=rate: torch.optim.Adam(p, rate), None)
    curves[KIM] = by_hand(model, x, phi, lambda p: torch.optim.SGD(p, 1.0 / 50, momentum=0.5), 5.0)
    seconds = np.full((len(METHODS), MOST), np.nan)
    closed = np.full((len(METHODS), MOST), np.nan)
    for row, method in enumerate(m for m in METHODS if m != DAIS):
        found = {name: [(judge(p) - start) / (best - start) for p in curve[1]] for name, curve in curves.items()
                 if name.startswith(method)}  # fmt: skip
        name = max(found, key=lambda name: (-_time_to(SHARES[0], curves[name][0], found[name]), found[name][-1]))
        seconds[row, : len(curves[name][0])] = curves[name][0]
        closed[row, : len(found[name])] = found[name]
    if DAIS in METHODS:
        with torch.no_grad():
            known = images, guide.variational_parameters(images)
        points = np.array(dais_bounds(model, known, (x, phi), LEAPFROG, seed))
        seconds[-1, : len(points)], closed[-1, : len(points)] = points[:, 0], (points[:, 1] - start) / (best - start)
    data = {"seconds": (("way", "point"), seconds), "closed": (("way", "point"), closed), "gap": best - start}
    return xr.Dataset(data, {"way": list(METHODS)}).merge(_growth(guide, model, x, images, args))


def _time_to(share: float, seconds: Any, closed: Any) -> float:
    """Seconds to the first point at which this share of the gap is closed; infinite if there is none."""
    reached = np.asarray(seconds)[np.nan_to_num(np.asarray(closed), nan=-1.0) >= share]
    return float(reached.min()) if len(reached) else np.inf


def _growth(guide: AmortizedGuide, model: VAE, x: Tensor, images: Tensor, args: argparse.Namespace) -> xr.Dataset:
    """Seconds of refinement by Newton's rule for several numbers of images, latents and steps."""
    seconds = np.zeros((len(GROWTH), 4))
    for column, number in enumerate(GROWTH["images"]):
        seconds[0, column] = refined(guide, images[:number], Newton, 5)[0]
    for column, latents in enumerate(GROWTH["latents"]):
        pyro.clear_param_store()
        other = VAE(images.shape[1], latents, model.hidden_dim).requires_grad_(False).eval()
        its = AmortizedGuide(other, other.make_encoder())
        its(images[:10])
        seconds[1, column] = refined(its.eval(), images[:100], Newton, 5, num_particles=64)[0]
    for column, steps in enumerate(GROWTH["steps"]):
        seconds[2, column] = refined(guide, images[:100], Newton, steps)[0]
    return xr.Dataset({"growth": (("what", "size"), seconds)}, {"what": list(GROWTH)})


def _times(runs: xr.Dataset, share: float) -> xr.DataArray:
    """Seconds to close a share of the gap, by method and seed; at least those of all its steps where it never does."""
    values = [
        [_time_to(share, runs["seconds"].sel(way=m, seed=s).values, runs["closed"].sel(way=m, seed=s).values)
         for s in runs["seed"].values] for m in runs["way"].values
    ]  # fmt: skip
    return xr.DataArray(values, {"way": runs["way"], "seed": runs["seed"]}, ("way", "seed"))


def claims(runs: xr.Dataset) -> list[Claim]:
    """All of ours."""
    most = runs["seconds"].max("point")
    times = {share: xr.where(np.isfinite(_times(runs, share)), _times(runs, share), most) for share in SHARES}
    newton, natural = NAMES["Newton"], NAMES["natural gradient"]

    def less(share: float, method: str, part: float = 1.0, other: str = HAND) -> np.ndarray:
        return (part * times[share].sel(way=other) - times[share].sel(way=method)).values

    closed, of_numpyro = runs["closed"].max("point"), []
    if DAIS in runs["way"].values:
        of_numpyro = [
            Claim("Newton's rule closes more of the gap than AutoSemiDAIS with up to 32 leapfrog steps", "ours",
                  {"Newton's less its share": (closed.sel(way=newton) - closed.sel(way=DAIS)).values}, "of the gap")
        ]  # fmt: skip
    return [
        Claim("Newton's rule closes the gap in at most 0.3 of the time of Adam by hand", "ours",
              {f"{100 * share:.0f} %, 0.3 Adam less Newton": less(share, newton, 0.3) for share in SHARES}, "seconds"),
        Claim("... and in less time than the natural gradient", "ours",
              {f"{100 * share:.0f} %": less(share, newton, other=natural) for share in SHARES}, "seconds"),
        Claim("The natural gradient is faster than Adam by hand", "ours",
              {f"{100 * share:.0f} %": less(share, natural) for share in SHARES}, "seconds"),
        Claim("Kim's steps on a VAE that was not trained with them close less than 95 % in 200 steps", "ours",
              {"0.95 less the share closed": 0.95 - runs["closed"].sel(way=KIM).max("point").values}, "of the gap"),
        Claim("Twice the images take at most 2.2 times the time", "ours",
              {"200 to 400": (2.2 * runs["growth"].sel(what="images")[:, 2]
                              - runs["growth"].sel(what="images")[:, 3]).values}, "seconds"),
        *of_numpyro,
    ]  # fmt: skip


def tables(runs: xr.Dataset) -> list[Table]:
    """Times to close the gap, and how times grow."""
    times = {share: _times(runs, share) for share in SHARES}

    def cell(share: float, method: str) -> str:
        values = times[share].sel(way=method).values
        if np.isfinite(values).all():
            return with_error(values, 3 if method == DAIS else 2)
        return f"never in {int((~np.isfinite(values)).sum())} of {len(values)}"

    rows = [
        [method, *(cell(share, method) for share in SHARES),
         with_error(100 * runs["closed"].sel(way=method).max("point").values, 1),
         with_error(runs["seconds"].sel(way=method).max("point").values, 3 if method == DAIS else 2)]
        for method in runs["way"].values
    ]  # fmt: skip
    growth = [
        [
            what,
            *(f"{size}: {with_error(runs['growth'].sel(what=what)[:, i].values, 2)}" for i, size in enumerate(sizes)),
        ]
        for what, sizes in GROWTH.items()
    ]
    gap = with_error(runs["gap"].values, 2)
    return [
        Table(f"{runs.attrs['images']} images, encoder {gap} nats per image below the optimum",
              ["method", "seconds to 95 %", "seconds to 99 %", "most closed, %", "seconds for all its steps"], rows,
              "Adam by hand at the best of the step sizes .02, .05 and .1 for the first column."),
        Table("Seconds of five steps of Newton's rule by the number of images and of latents (64 draws), and by steps",
              ["", *[""] * 4], growth, "100 images where nothing else is said. A fresh guide each time."),
    ]  # fmt: skip


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """Gap left against seconds, and how seconds grow."""
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for number, method in enumerate(runs["way"].values):
        for seed in runs["seed"].values:
            one = runs.sel(way=method, seed=seed)
            color, marks = ("0.5", "s--") if method == DAIS else (f"C{number}", "o-")
            left.plot(one["seconds"], 100 * (1 - one["closed"]).clip(1e-3), marks, color=color, markersize=3,
                      alpha=0.8, label=method if seed == runs["seed"].values[0] else None)  # fmt: skip
    for share in SHARES:
        left.axhline(100 * (1 - share), color="0.5", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="seconds of one processor", ylabel="amortization gap left, %")
    left.set_title("From the encoder's answer towards the optimum")
    left.legend()
    for what, sizes in GROWTH.items():
        mean = runs["growth"].sel(what=what).mean("seed")
        right.plot(np.array(sizes) / sizes[0], mean / mean[0], "o-", label=what)
    right.plot([1, 8], [1, 8], ":", color="0.5", label="in proportion")
    right.set(xscale="log", yscale="log", xlabel="size, the smallest being 1", ylabel="seconds, the smallest being 1")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    right.set_title("Growth")
    right.legend()


EXPERIMENT = Experiment(
    "speed", "Seconds to close the amortization gap", __doc__.split("\n\n", 1)[1], measure, tables, claims, draw,
    num_seeds=4, timed=True,
    sizes={
        "steps": (2000, 10000, "training steps of the VAE"),
        "width": (16, 16, "hidden units of the encoder"),
        "images": (300, 300, "images that are refined"),
    },
)  # fmt: skip

if __name__ == "__main__":
    run(EXPERIMENT)
