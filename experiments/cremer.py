"""Inference Suboptimality in Variational Autoencoders, Chris Cremer, Xuechen Li, David Duvenaud (2018).

VAEs of scikit-learn's digits (64 binary pixels, 8 latents), each with its guide trained together for the same number of
steps: encoders and decoders of one hidden layer, small (32 units) or large (256), a mean-field normal or a flow. Their
slack is split into the approximation and the amortization gap, on training images and on images held out. For one of
the VAEs, held fixed, richer families get a guide each; and `estimate_gaps` is timed against the recipe of the paper
(q* by Adam from zeros, evidence by annealed importance sampling) on the same images.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from _evidence import Claim, Experiment, Table, run, with_error
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import textbook  # noqa: E402
from _common import load_images  # noqa: E402

from pyro_amortized import AmortizedGuide, MLPEncoder, estimate_gaps  # noqa: E402

SMALL, LARGE = 32, 256
CASES: dict[str, tuple[int, int, str]] = {
    "small encoder": (SMALL, SMALL, "normal"),
    "large encoder": (LARGE, SMALL, "normal"),
    "large decoder": (LARGE, LARGE, "normal"),
    "small encoder, flow": (SMALL, SMALL, "flow"),
    "large encoder, flow": (LARGE, SMALL, "flow"),
}
"""Widths of encoder and decoder, and the family, of every VAE."""
ENCODERS = ("small encoder", "large encoder")
FAMILIES = {"normal": "normal", "full rank": "multivariate_normal", "flow": "flow"}
SPLITS = ("training", "held-out")
PARTS = ("approximation_gap", "amortization_gap", "elbo", "log_evidence")
SHARES = (0.1, 0.3, 1.0, 3.0)
"""When gaps are measured in a long training, as shares of ``--steps``."""


class VAE(nn.Module):
    """p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z))."""

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> None:
        """The Pyro model of images ``(N, pixels)``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def train(model: VAE, guide: AmortizedGuide, images: Tensor, num_steps: int) -> None:
    """SVI with a learning rate that falls to a tenth."""
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    guide.train()
    for _ in range(num_steps):
        svi.step(images[torch.randint(len(images), (100,))])
    guide.eval()


def gaps_of(model: VAE, guide: AmortizedGuide, data: dict[str, Tensor]) -> xr.Dataset:
    """Means over the images of the parts of the decomposition, by split."""
    parts = []
    for images in data.values():
        gaps = estimate_gaps(model, guide, (images,), tolerance=0.05).dataset
        means = gaps[[*PARTS]].mean()
        parts.append(means.assign(unreliable=(~gaps["reliable"]).sum()))
    return xr.concat(parts, xr.IndexVariable("split", list(data)))


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """One repetition."""
    images, held_out = load_images(args.data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))]
    data = {"training": images[order[: args.images]], "held-out": chosen[: args.images]}
    results, models = [], {}
    for name, (encoder, decoder, family) in CASES.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        model = VAE(images.shape[1], args.latent, decoder)
        guide = AmortizedGuide(model, MLPEncoder(images.shape[1], (encoder,)), family=family)
        train(model, guide, images, args.steps)
        models[name] = (model.requires_grad_(False).eval(), guide)
        results.append(gaps_of(model, guide, data))
    runs = xr.concat(results, xr.IndexVariable("case", list(CASES)))
    fixed, guide = models["large encoder"]
    other = models["large encoder, flow"][0]
    return runs.merge(_families(fixed, guide, images, data, args)).merge(_normal_for(other, images, data, args)).merge(
        _over_training(images, data, args)
    ).merge(_recipe(fixed, guide, data["held-out"][: args.recipe_images], args))  # fmt: skip


def _prefixed(data: xr.Dataset, prefix: str) -> xr.Dataset:
    return data.rename({name: f"{prefix}_{name}" for name in data.data_vars})


def _guide_for(model: VAE, family: str, images: Tensor, steps: int) -> AmortizedGuide:
    """A guide trained for a model that is held fixed."""
    guide = AmortizedGuide(model, MLPEncoder(images.shape[1], (LARGE,)), family=family, name=f"{family}_guide")
    train(model, guide, images, steps)
    return guide


def _families(
    model: VAE, own: AmortizedGuide, images: Tensor, data: dict[str, Tensor], args: argparse.Namespace
) -> xr.Dataset:
    """Gaps of every family for one model."""
    parts = [
        gaps_of(model, own if family == "normal" else _guide_for(model, family, images, args.steps), data)
        for family in FAMILIES.values()
    ]
    return _prefixed(xr.concat(parts, xr.IndexVariable("family", list(FAMILIES))), "fixed")


def _normal_for(model: VAE, images: Tensor, data: dict[str, Tensor], args: argparse.Namespace) -> xr.Dataset:
    """Gaps of the mean-field normal for the model that was trained with a flow."""
    return _prefixed(gaps_of(model, _guide_for(model, "normal", images, args.steps // 3), data), "other")


def _over_training(images: Tensor, data: dict[str, Tensor], args: argparse.Namespace) -> xr.Dataset:
    """Gaps during a long training at a constant learning rate."""
    pyro.clear_param_store()
    model = VAE(images.shape[1], args.latent, SMALL)
    guide = AmortizedGuide(model, MLPEncoder(images.shape[1], (LARGE,)))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), TraceMeanField_ELBO())
    parts, done = [], 0
    for share in SHARES:
        guide.train()
        for _ in range(max(1, int(share * args.steps) - done)):
            svi.step(images[torch.randint(len(images), (100,))])
        done = int(share * args.steps)
        parts.append(gaps_of(model, guide.eval(), data))
    return _prefixed(xr.concat(parts, xr.IndexVariable("share", list(SHARES))), "during")


def _recipe(model: VAE, guide: AmortizedGuide, x: Tensor, args: argparse.Namespace) -> xr.Dataset:
    """Seconds and answers of `estimate_gaps` and of the paper's recipe on the same images."""
    start = time.perf_counter()
    gaps = estimate_gaps(model, guide, (x,)).dataset
    ours = time.perf_counter() - start
    start = time.perf_counter()
    loc, log_scale = textbook.best_normal(model.decoder, x, model.latent)
    draws = textbook.weights_of_draws(model.decoder, x, loc, log_scale, 5000)
    importance, importance_se = textbook.summary(draws)
    chains, chains_se = textbook.summary(textbook.weights_of_chains(model.decoder, x, model.latent, args.temperatures))
    seconds = time.perf_counter() - start
    larger = torch.maximum(importance, chains)
    values: dict[str, Any] = {
        "recipe_seconds": ("recipe", [ours, seconds]),
        "recipe_elbo_optimal": ("recipe", [float(gaps["elbo_optimal"].mean()), draws.mean().item()]),
        "recipe_log_evidence": ("recipe", [float(gaps["log_evidence"].mean()), larger.mean().item()]),
        "recipe_error": (
            "recipe",
            [
                float(gaps["log_evidence_se"].mean()),
                torch.where(importance > chains, importance_se, chains_se).mean().item(),
            ],
        ),
    }
    return xr.Dataset(values, {"recipe": ["estimate_gaps", "the paper's recipe"]})


def claims(runs: xr.Dataset) -> list[Claim]:
    """What the paper says, and what we add."""
    held = runs.sel(split="held-out")
    amortization, approximation = held["amortization_gap"], held["approximation_gap"]
    case = {name: {"case": name} for name in CASES}
    fixed = held["fixed_approximation_gap"]
    during = held["during_amortization_gap"]
    seconds, evidence = runs["recipe_seconds"], runs["recipe_log_evidence"]
    best = runs["recipe_elbo_optimal"]

    def less(values: xr.DataArray, small: str, large: str) -> np.ndarray:
        return (values.sel(case[large]) - values.sel(case[small])).values

    source = "Cremer et al. 2018"
    return [
        Claim(
            "Held out, a VAE loses more by amortization than by its family", source,
            {name: (amortization - approximation).sel(case[name]).values for name in ENCODERS},
        ),
        Claim("A larger encoder has a smaller amortization gap", source,
              {split: (runs["amortization_gap"].sel(split=split, case="small encoder")
                       - runs["amortization_gap"].sel(split=split, case="large encoder")).values for split in SPLITS}),
        Claim("A flow has a smaller approximation gap than the normal, models trained with each", source,
              {name: less(approximation, f"{name}, flow", name) for name in ENCODERS}),
        Claim("A flow has a smaller amortization gap too: its parameters help to generalise", source,
              {name: less(amortization, f"{name}, flow", name) for name in ENCODERS}),
        Claim("A larger decoder has posteriors that the normal fits better", source,
              {"approximation gap, small less large": less(approximation, "large decoder", "large encoder")}),
        Claim("The model accommodates its guide: the normal fits better where the model was trained with it", source,
              {"approximation gap": (held["other_approximation_gap"] - approximation.sel(case[ENCODERS[1]])).values}),
        Claim("The amortization gap of held-out images grows over training", source,
              {"last less first": (during.sel(share=SHARES[-1]) - during.sel(share=SHARES[0])).values,
               "last less at a third": (during.sel(share=SHARES[-1]) - during.sel(share=SHARES[2])).values}),
        Claim("On one model, the approximation gap falls from normal to full rank to flow", "ours",
              {"normal less full rank": (fixed.sel(family="normal") - fixed.sel(family="full rank")).values,
               "full rank less flow": (fixed.sel(family="full rank") - fixed.sel(family="flow")).values}),
        Claim("`estimate_gaps` takes less than a tenth of the time of the paper's recipe", "ours",
              {"a tenth, less ours": (0.1 * seconds[:, 1] - seconds[:, 0]).values}, "seconds"),
        Claim("... and finds a better q*", "ours", {"L[q*]": (best[:, 0] - best[:, 1]).values}),
        Claim("The paper's log p(x), a maximum of two noisy estimates, lies above ours", "ours",
              {"log p(x)": (evidence[:, 1] - evidence[:, 0]).values}),
    ]  # fmt: skip


def tables(runs: xr.Dataset) -> list[Table]:
    """The tables of the page."""

    def cells(data: xr.Dataset, prefix: str = "") -> list[str]:
        parts = [data[f"{prefix}{part}"].sel(split=split) for split in SPLITS for part in PARTS[:3]]
        return [with_error(part.values, 2 if i % 3 == 2 else 3) for i, part in enumerate(parts)]

    columns = [f"{part}, {split}" for split in SPLITS for part in ("approximation", "amortization", "ELBO")]
    rows = [[name, *cells(runs.sel(case=name))] for name in CASES]
    rows.append(["normal guide for the model of 'large encoder, flow'", *cells(runs, "other_")])
    during = [[f"{share:g}", *cells(runs.sel(share=share), "during_")] for share in SHARES]
    families = [[name, *cells(runs.sel(family=name), "fixed_")] for name in FAMILIES]
    recipe = [
        [str(name)] + [with_error(runs[f"recipe_{part}"].sel(recipe=name).values, digits) for part, digits in
                       (("seconds", 1), ("elbo_optimal", 4), ("log_evidence", 4), ("error", 4))]
        for name in runs["recipe"].values
    ]  # fmt: skip
    bad = int(sum(runs[name].sum() for name in runs.data_vars if str(name).endswith("unreliable")))
    return [
        Table("VAEs and their guides, trained together (nats per image)", ["VAE", *columns], rows,
              f"Of all gaps here, {bad} of single images count as unreliable; they are averaged with the others."),
        Table("Families for the VAE of 'large encoder', held fixed", ["family", *columns], families),
        Table("During a long training of 'large encoder', learning rate constant", ["of the steps", *columns], during),
        Table("`estimate_gaps` and the paper's recipe on the same images",
              ["", "seconds", "L[q*]", "log p(x)", "its estimated error"], recipe,
              f"The recipe's chains have {runs.attrs['temperatures']} temperatures here, 5000 in the paper."),
    ]  # fmt: skip


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """Gaps of every VAE, of every family, and during training."""
    bars, families, during = figure.subplots(1, 3, width_ratios=[2, 1.2, 1.5])
    means = runs.mean("seed")
    for axes, names, dim, prefix in ((bars, list(CASES), "case", ""), (families, list(FAMILIES), "family", "fixed_")):
        held = means.sel(split="held-out")
        low = held[f"{prefix}approximation_gap"].sel({dim: names}).values
        high = held[f"{prefix}amortization_gap"].sel({dim: names}).values
        places = np.arange(len(names))[::-1]
        axes.barh(places, low, label="approximation gap")
        axes.barh(places, high, left=low, label="amortization gap")
        axes.set_yticks(places, [name.replace(", ", ",\n") for name in names])
        axes.set_xlabel("nats per held-out image")
    bars.set_title("Trained together")
    bars.legend(loc="lower right")
    families.set_title("One model, three families")
    for number, split in enumerate(SPLITS):
        for part, style in (("approximation_gap", "--"), ("amortization_gap", "-")):
            values = runs[f"during_{part}"].sel(split=split)
            error = values.std("seed") / runs.sizes["seed"] ** 0.5
            during.errorbar(
                SHARES, values.mean("seed"), error, fmt=f"o{style}", color=f"C{number}", capsize=3,
                label=f"{part.split('_')[0]}, {split}",
            )  # fmt: skip
    during.set(xscale="log", xlabel="training steps (of the default number)", ylabel="nats per image")
    during.set_title("Gaps during training")
    during.legend()


EXPERIMENT = Experiment(
    "cremer", "Where does the slack of a VAE come from?", __doc__.split("\n\n", 1)[1], measure, tables, claims, draw,
    sizes={
        "steps": (3000, 100000, "training steps of a VAE"),
        "images": (60, 1000, "images per estimate"),
        "latent": (8, 50, "latent dimensions"),
        "recipe_images": (20, 100, "images on which the paper's recipe is timed"),
        "temperatures": (500, 5000, "of the paper's annealed chains"),
    },
)  # fmt: skip

if __name__ == "__main__":
    run(EXPERIMENT)
