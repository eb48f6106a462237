"""Where amortization can close the gap, and where it cannot.

Amortized Variational Inference: When and Why?, Charles C. Margossian, David M. Blei (2024),
https://arxiv.org/abs/2307.11018. Three models, each with one table of variational parameters
(``PerDatapointGuide``, the paper's F-VI) and with encoders of growing width: observations that share a mean, where
the best inference function is linear; a small deep generative model of digits; and a chain over time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from _evidence import Claim, Experiment, Table, run, with_error
from _gaussian_models import CHAIN_WIDTHS, SEEN, SHARED_WIDTHS, make_encoder, measure_chain, measure_shared_mean
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_amortized import AmortizedGuide, PerDatapointGuide, optimize_local

# isort: split
from _common import VAE, elbo_draws, load_images, train  # _evidence knows where it is

PAPER = "Margossian, Blei 2024"
IMAGE_WIDTHS = (-1, 0, 1, 4, 16, 64, 256)


# Digits


def image_gap(model: VAE, guide: Any, images: Tensor, best: Tensor) -> float:
    """The gap in nats per image to ELBO draws of the best posterior, on the same noise."""
    with torch.no_grad():
        return float((best - elbo_draws(model, guide.posterior(images), images)).mean())


def measure_images(args: argparse.Namespace) -> dict[str, Any]:
    """Gaps of encoders of the same frozen decoder in nats per image, by width, on training and held-out images."""
    train_images, held_out = load_images(args.data)
    fitted, new = train_images[: args.images], held_out[: args.images]
    model = VAE.for_images(train_images)
    train(model, AmortizedGuide(model, model.make_encoder()), train_images, "decoder", num_steps=args.decoder_steps)
    model.requires_grad_(False).eval()
    guides = [AmortizedGuide(model, make_encoder(fitted.shape[1], width)) for width in IMAGE_WIDTHS]
    for width, guide in zip(IMAGE_WIDTHS, guides, strict=True):
        pyro.clear_param_store()
        train(model, guide, fitted, f"width {width}", num_steps=args.image_steps)
    bests = []
    for images in (fitted, new):
        optimum = optimize_local(model, guides[-1], (images,), tolerance=0.1)
        best = guides[-1].family(optimum.phi)
        bests.append(elbo_draws(model, best, images))
    gaps = [[image_gap(model, g, x, best) for g in guides] for x, best in zip((fitted, new), bests, strict=True)]
    return {"images": (("images_of", "image_width"), gaps), **table_curve(model, fitted, bests[0], args)}


SPEED_STEPS = (10, 30, 100, 300)
RATES = {"table": (0.01, 0.03, 0.1, 0.3), "encoder": (1e-3, 3e-3, 1e-2, 3e-2)}


def table_curve(model: VAE, images: Tensor, best: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The gap by number of steps on all images and learning rate, of a table and of the widest encoder."""
    makers: dict[str, Callable[[], Any]] = {
        "table": lambda: PerDatapointGuide(model),
        "encoder": lambda: AmortizedGuide(model, make_encoder(images.shape[1], IMAGE_WIDTHS[-1])),
    }
    marks = [step for step in SPEED_STEPS if step <= args.speed_steps] or [args.speed_steps]
    curves = np.full((2, 4, len(SPEED_STEPS)), np.nan)
    for row, (name, make) in enumerate(makers.items()):
        for column, rate in enumerate(RATES[name]):
            pyro.clear_param_store()
            guide = make()
            svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": rate}), TraceMeanField_ELBO())
            for step in range(1, marks[-1] + 1):
                svi.step(images)
                if step in marks:
                    curves[row, column, marks.index(step)] = image_gap(model, guide, images, best)
    return {"speed": (("inference", "rate", "step"), curves)}


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """All three models at one seed."""
    numbers = {
        **measure_shared_mean(args.observations, args.exact_steps),
        **measure_chain(args.series, args.exact_steps),
        **measure_images(args),
    }
    coords = {
        "shared_width": list(SHARED_WIDTHS),
        "image_width": list(IMAGE_WIDTHS),
        "chain_width": list(CHAIN_WIDTHS),
        "images_of": ["training", "held out"],
        "seen": list(SEEN),
        "inference": list(RATES),
        "step": list(SPEED_STEPS),
    }
    data = xr.Dataset(numbers, coords)
    for name in data.data_vars:
        data[name].attrs["units"] = "nats per image" if name in ("images", "speed") else "nats per observation"
    return data


# What is made of the numbers


def with_power(values: Any) -> str:
    """Mean and standard error of numbers that may be tiny."""
    values = np.asarray(values, dtype=float)
    if abs(values.mean()) > 1e-3:
        return with_error(values, 4)
    return f"{values.mean():.1e} ± {values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0:.0e}"


def names_of(widths: Any) -> list[str]:
    """The widths in words."""
    return [{-1: "none", 0: "linear"}.get(int(width), str(int(width))) for width in widths]


def fastest(runs: xr.Dataset) -> xr.DataArray:
    """The gap by method and number of steps, each at the learning rate that is best on average then."""
    best = runs["speed"].mean("seed").fillna(np.inf).argmin("rate")
    return runs["speed"].isel(rate=best).dropna("step")


def tables(runs: xr.Dataset) -> list[Table]:
    """Gaps of the three models, and over training."""
    shared = [["encoder", with_power(runs["shared_mean"].sel(shared_width=w))] for w in runs["shared_width"].values]
    for row, name in zip(shared, names_of(runs["shared_width"].values), strict=True):
        row[0] = name
    shared.append(["a table", with_power(runs["shared_mean_table"])])
    digits = [
        [name, *(with_error(runs["images"].sel(image_width=w, images_of=of)) for of in ("training", "held out"))]
        for name, w in zip(names_of(runs["image_width"].values), runs["image_width"].values, strict=True)
    ]
    widths = runs["chain_width"].values
    series = [
        [
            str(seen),
            *(_cell(runs["chain"].sel(seen=seen, chain_width=w)) for w in widths),
            _cell(runs["chain_linear"].sel(seen=seen)),
        ]
        for seen in runs["seen"].values
    ]
    speed = fastest(runs)
    curves = [
        [str(m), *(with_error(speed.sel(inference=m, step=k)) for k in speed["step"])]
        for m in speed["inference"].values
    ]
    return [
        Table("Shared mean: gap, nats per observation", ["width", "gap"], shared, "Exact, in float64."),
        Table("Digits: gap, nats per image", ["width", "training images", "held-out images"], digits),
        Table(
            "Chain: gap, nats per observation, by what the encoder of a step sees and by its width",
            ["seen", *names_of(widths), "linear, closed form"],
            series,
            "Exact, in float64, on the series of training; the whole series is read by a recurrent network.",
        ),
        Table(
            "Digits: gap after so many steps on all images, nats per image",
            ["", *(str(int(k)) for k in speed["step"])],
            curves,
            "A table is PerDatapointGuide, an encoder the widest one; each at the best of four learning rates.",
        ),
    ]


def _cell(values: xr.DataArray) -> str:
    return with_error(values, 4) if values.notnull().all() else ""


def claims(runs: xr.Dataset) -> list[Claim]:
    """The paper's, and ours."""
    images, chains = runs["images"].isel(image_width=-1), runs["chain"]
    own, whole = chains.sel(seen="own"), chains.sel(seen="whole series").isel(chain_width=-1)
    speed = fastest(runs)
    faster = {
        f"{int(k)} steps": (speed.sel(inference="table") - speed.sel(inference="encoder")).sel(step=k)
        for k in speed["step"]
    }
    linear = 1e6 * (1e-6 - runs["shared_mean"].sel(shared_width=0))
    return [
        Claim(
            "Shared mean: a linear encoder closes the gap, to less than a millionth of a nat",
            PAPER, {"what is left of it": linear.values}, "µnats per observation",
        ),
        Claim(
            "Digits: a wide encoder closes the gap on the images that it is trained on, to less than 0.1 nats",
            PAPER, {"0.1 less the gap": (0.1 - images.sel(images_of="training")).values}, "nats per image",
        ),
        Claim(
            "Digits: an encoder converges in fewer steps than a table of parameters per image",
            PAPER, {name: values.values for name, values in faster.items()}, "nats per image",
        ),
        Claim(
            "Chain: an encoder of its own observation alone never closes it: the widest keeps 90 % of a linear one's",
            PAPER, {"widest less 90 %": (own.isel(chain_width=-1) - 0.9 * own.isel(chain_width=0)).values},
            "nats per observation",
        ),
        Claim(
            "Chain: an encoder of the whole series closes 95 % of that gap",
            PAPER, {"5 % less the gap": (0.05 * own.isel(chain_width=-1) - whole).values}, "nats per observation",
        ),
        Claim(
            "Chain: what is seen counts, not width: one neighbour on each side, linear, beats any width without",
            "ours",
            {"difference of the gaps": (own[..., -1] - chains.sel(seen="1 each side", chain_width=0)).values},
            "nats per observation",
        ),
        Claim(
            "Digits: on held-out images the widest encoder keeps a gap of more than 0.1 nats",
            "ours", {"the gap less 0.1": (images.sel(images_of="held out") - 0.1).values}, "nats per image",
        ),
    ]  # fmt: skip


def _curve(ax: Any, values: xr.DataArray, label: str, places: Any) -> None:
    mean, error = values.mean("seed"), values.std("seed", ddof=1) / values.sizes["seed"] ** 0.5
    ax.errorbar(places, mean, error, fmt="o-", capsize=2, label=label)


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """Gap against width, of each model."""
    axes: Any = figure.subplots(1, 3)
    titles = ("Shared mean: linear is enough", "Digits: width closes it, in training", "Chain: the input decides")
    widths = [runs[f"{name}_width"].values for name in ("shared", "image", "chain")]
    for ax, title, of in zip(axes, titles, widths, strict=True):
        ax.set(title=title, xlabel="width of the encoder", yscale="log")
        ax.set_xticks(range(len(of)), names_of(of), fontsize=9 if len(of) < 9 else 7)
    _curve(axes[0], runs["shared_mean"].clip(1e-20), "encoder", range(len(widths[0])))
    axes[0].axhline(max(float(runs["shared_mean_table"].mean()), 1e-20), color="0.5", ls="--", label="a table")
    for part in ("training", "held out"):
        _curve(axes[1], runs["images"].sel(images_of=part), part, range(len(widths[1])))
    for seen in map(str, SEEN):
        _curve(axes[2], runs["chain"].sel(seen=seen), seen, range(len(widths[2])))
        bound = float(runs["chain_linear"].sel(seen=seen).mean())
        axes[2].axhline(bound, color="0.6", lw=0.8, ls="--")
    axes[0].set_ylabel("gap, nats per observation")
    axes[1].set_ylabel("gap, nats per image")
    axes[2].set_ylabel("gap, nats per observation")
    axes[2].set_ylim(top=3.0)
    for ax in axes[:2]:
        ax.legend(fontsize=8)
    axes[2].legend(fontsize=8, ncols=2, title="an encoder sees (dashed: best linear)", title_fontsize=8)


EXPERIMENT = Experiment(
    name="margossian_blei",
    title="Where amortization can close the gap",
    doc="""
        Amortized Variational Inference: When and Why?, Charles C. Margossian, David M. Blei (2024). The gap between
        the ELBO of an encoder and that of the best parameters of each datapoint (F-VI), against the encoder's width.
        Shared mean: x_n ~ N(z_n + theta, 1), 100 observations. Digits: a frozen deep generative model with 8 latents.
        Chain: an autoregressive Gaussian state of 20 steps, seen in noise, where the encoder of a step sees its own
        observation, some neighbours, or the whole series. Posteriors are independent normals throughout. Where the
        model is Gaussian, gaps are exact and encoders are trained on the exact ELBO; on digits they come from
        `optimize_local`.
    """,
    measure=measure,
    tables=tables,
    claims=claims,
    draw=draw,
    num_seeds=4,
    sizes={
        "observations": (100, 10_000, "observations with a shared mean"),
        "series": (50, 500, "series of the chain"),
        "exact_steps": (150, 1000, "L-BFGS steps where the ELBO is exact"),
        "images": (300, 1000, "images of the digits' encoders"),
        "decoder_steps": (2000, 20_000, "SVI steps of the decoder"),
        "image_steps": (2000, 50_000, "SVI steps of each encoder of digits"),
        "speed_steps": (300, 300, "steps of the comparison of speeds"),
    },
)

if __name__ == "__main__":
    run(EXPERIMENT)
