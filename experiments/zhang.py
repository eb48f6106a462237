"""Encoders learn their data by heart: Zhang, Hayes and Barber (2022), Generalization Gap in Amortized Inference.

VAEs are trained for many epochs on few images, all from the same decoder weights and with the same batches. After some
epochs the amortization gap is measured on training and on held-out images, under each method's own decoder as it is
then. Beside plain training: the encoder trained on draws of its own model too (the paper's proposal,
``pyro_amortized.training.DecoderDraws``), dropout in the encoder, both, a small encoder, and the plain encoder's
answers refined by five steps at test time.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyro
import torch
import xarray as xr
from _evidence import Claim, Experiment, Table, run, with_error
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn

from pyro_amortized import AmortizedGuide, MLPEncoder, optimize_local
from pyro_amortized.training import DecoderDraws

# isort: split
from _common import BATCH_SIZE, VAE, elbo_draws, load_images  # _evidence knows where it is

PLAIN, DRAWS, DROPOUT, BOTH, SMALL = "plain", "decoder draws", "dropout", "dropout and draws", "small encoder"
REFINED = "plain, refined"
METHODS = (PLAIN, DRAWS, DROPOUT, BOTH, SMALL)
SPLITS = ("training", "held-out")
DROPOUT_RATE, SMALL_WIDTH, REFINEMENT_STEPS, RATE = 0.2, 16, 5, 1e-3
PAPER = "Zhang et al. 2022"


def make_encoder(method: str, model: VAE) -> nn.Module:
    """A new encoder: the example's, the same with dropout, or a small one."""
    num_pixels, width = model.decoder[-1].out_features, model.hidden_dim
    if method == SMALL:
        return MLPEncoder(num_pixels, (SMALL_WIDTH,), standardize=False)
    if method not in (DROPOUT, BOTH):
        return model.make_encoder()
    layers = [layer for size in (num_pixels, width) for layer in (nn.Linear(size, width), nn.SiLU())]
    return nn.Sequential(nn.Dropout(DROPOUT_RATE), *layers[:2], nn.Dropout(DROPOUT_RATE), *layers[2:])


def train_epochs(svi: SVI, images: torch.Tensor, num_epochs: int, batches: torch.Generator) -> None:
    """Trains for some epochs."""
    svi.guide.train()
    for _ in range(num_epochs):
        for rows in torch.randperm(len(images), generator=batches).split(BATCH_SIZE):
            svi.step(images[rows])
    svi.guide.eval()


@torch.no_grad()
def measured(model: VAE, guide: AmortizedGuide, images: dict[str, torch.Tensor]) -> xr.Dataset:
    """Amortization gaps and ELBOs on both kinds of images, of the guide and of its answers after refinement."""
    num_images = len(images["held-out"])
    parts = images["training"][:num_images], images["held-out"]
    optimum = optimize_local(model, guide, (torch.cat(parts),), tolerance=0.06)
    phis = [g.variational_parameters(torch.cat(parts)) for g in (guide, guide.refined(REFINEMENT_STEPS))]
    results = []
    for start, part in zip((0, num_images), parts, strict=True):
        rows = slice(start, start + num_images)
        before, after = (elbo_draws(model, guide.family(phi[rows]), part) for phi in phis)
        gain = (after - before).mean().item()
        gap, elbo = optimum.improvement[rows].mean().item(), optimum.initial_elbo[rows].mean().item()
        values = {"gap": gap, "elbo": elbo, "refined_gap": gap - gain, "refined_elbo": elbo + gain}
        results.append(xr.Dataset({name: ((), value, {"units": "nats"}) for name, value in values.items()}))
    return xr.concat(results, xr.IndexVariable("split", list(SPLITS)))


def train_and_measure(method: str, seed: int, images: dict[str, torch.Tensor], epochs: np.ndarray) -> xr.Dataset:
    """Trains one method, and measures it after these epochs."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = VAE.for_images(images["training"])
    guide = AmortizedGuide(model, make_encoder(method, model))
    steps = DecoderDraws if method in (DRAWS, BOTH) else SVI
    svi = steps(model, guide, ClippedAdam({"lr": RATE}), TraceMeanField_ELBO())
    batches = torch.Generator().manual_seed(seed)
    results = []
    for start, stop in zip([0, *epochs[:-1]], epochs, strict=True):
        train_epochs(svi, images["training"], int(stop - start), batches)
        result = measured(model, guide, images)
        validation = elbo_draws(model, guide.posterior(images["validation"]), images["validation"]).mean().item()
        results.append(result.assign(validation_elbo=((), validation, {"units": "nats"})))
    return xr.concat(results, xr.IndexVariable("epoch", epochs))


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """All methods on one selection of the images."""
    train_images, held_out = load_images(args.data)
    order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(seed))
    images = {
        "training": train_images[order[: args.images]],
        "held-out": held_out[: args.measured],
        "validation": held_out[args.measured : 2 * args.measured],
    }
    epochs = np.unique(np.ceil(np.array([0.25, 0.5, 0.75, 1.0]) * args.epochs).astype(int))
    parts = [train_and_measure(method, seed, images, epochs) for method in METHODS]
    return xr.concat(parts, xr.IndexVariable("arm", list(METHODS)))


def of_method(runs: xr.Dataset, method: str, name: str, split: str = "held-out") -> xr.DataArray:
    """``"gap"`` or ``"elbo"`` of a method, or of the refined answers, over repetitions and epochs."""
    refined = method == REFINED
    found = runs[f"refined_{name}" if refined else name].sel(arm=PLAIN if refined else method, split=split)
    return found.transpose("seed", "epoch")


def at_best(runs: xr.Dataset, method: str, name: str) -> np.ndarray:
    """The same at the epoch of the highest bound on validation images."""
    best = runs.validation_elbo.sel(arm=PLAIN if method == REFINED else method).argmax("epoch")
    return of_method(runs, method, name).isel(epoch=best).values


def claims(runs: xr.Dataset) -> list[Claim]:
    """What the paper claims, and what we found."""
    last = {m: of_method(runs, m, "gap").isel(epoch=-1).values for m in (*METHODS, REFINED)}
    bound = {m: of_method(runs, m, "elbo").isel(epoch=-1).values for m in (*METHODS, REFINED)}
    early = dict(epoch=0)
    held_out, training = (of_method(runs, PLAIN, "gap", split) for split in reversed(SPLITS))
    epochs = f"epoch {int(runs.epoch[early['epoch']])} to {int(runs.epoch[-1])}"
    growth = (held_out.isel(epoch=-1) - held_out.isel(early)).values
    fall = (training.isel(early) - training.isel(epoch=-1)).values
    best = {m: at_best(runs, m, "elbo") for m in METHODS}
    best_gap = {m: at_best(runs, m, "gap") for m in METHODS}
    return [
        Claim("The encoder overfits: its amortization gap grows on held-out images", PAPER, {epochs: growth}),
        Claim("... while it falls on training images", PAPER, {epochs: fall}),
        Claim("Decoder draws make the held-out amortization gap smaller", PAPER,
              {"last epoch": last[PLAIN] - last[DRAWS], "best epoch": best_gap[PLAIN] - best_gap[DRAWS]}),
        Claim("... and the held-out bound better", PAPER,
              {"last epoch": bound[DRAWS] - bound[PLAIN], "best epoch": best[DRAWS] - best[PLAIN]}),
        Claim("Dropout in the encoder gives a better held-out bound than decoder draws", "ours",
              {"last epoch": bound[DROPOUT] - bound[DRAWS], "best epoch": best[DROPOUT] - best[DRAWS]}),
        Claim("Draws add to dropout: a smaller held-out gap than dropout alone", "ours",
              {"last epoch": last[DROPOUT] - last[BOTH]}),
        Claim("A small encoder has a smaller held-out gap", "ours", {"last epoch": last[PLAIN] - last[SMALL]}),
        Claim(f"{REFINEMENT_STEPS} steps of refinement leave less of the held-out gap than any training", "ours",
              {"last epoch": np.min([last[m] for m in METHODS], 0) - last[REFINED]}),
    ]  # fmt: skip


def tables(runs: xr.Dataset) -> list[Table]:
    """Gaps and bounds at the last epoch, and the bound at the best one."""
    rows = []
    for method in (*METHODS, REFINED):
        cells = [with_error(of_method(runs, method, "gap", split).isel(epoch=-1).values) for split in SPLITS]
        cells += [with_error(of_method(runs, method, "elbo").isel(epoch=-1).values)]
        rows.append((method, *cells, with_error(at_best(runs, method, "elbo"))))
    columns = ("method", "gap, training", "gap, held-out", "held-out bound", "held-out bound at the best epoch")
    note = "In nats per image. The best epoch is that of the highest bound on validation images, among those measured."
    return [Table(f"Amortization gaps after {int(runs.epoch[-1])} epochs", columns, rows, note)]


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """The gap over epochs, on training and held-out images; held-out gaps and bounds of all methods."""
    first, gaps, bounds = figure.subplots(1, 3)
    for split, style in zip(SPLITS, ("o--", "o-"), strict=True):
        values = of_method(runs, PLAIN, "gap", split)
        first.errorbar(runs.epoch, values.mean("seed"), _error(values), fmt=style, color="C0", label=split)
    first.set(title="plain training", xlabel="epoch", ylabel="amortization gap, nats per image", ylim=(0, None))
    for method in (*METHODS, REFINED):
        for ax, name in ((gaps, "gap"), (bounds, "elbo")):
            values = of_method(runs, method, name)
            ax.errorbar(runs.epoch, values.mean("seed"), _error(values), fmt="o-", label=method)
    gaps.set(title="held-out images", xlabel="epoch", ylabel="amortization gap, nats per image", ylim=(0, None))
    bounds.set(title="held-out images", xlabel="epoch", ylabel="ELBO, nats per image")
    first.legend()
    bounds.legend(fontsize="small")


def _error(values: xr.DataArray) -> xr.DataArray:
    return values.std("seed", ddof=1) / values.sizes["seed"] ** 0.5 if values.sizes["seed"] > 1 else 0 * values[0]


EXPERIMENT = Experiment(
    name="zhang",
    title="Encoders that learn their data by heart",
    doc=__doc__,
    measure=measure,
    tables=tables,
    claims=claims,
    draw=draw,
    num_seeds=4,
    sizes={
        "images": (500, 2000, "training images"),
        "epochs": (800, 1000, "epochs"),
        "measured": (100, 500, "images of each kind on which gaps are measured"),
    },
)

if __name__ == "__main__":
    run(EXPERIMENT)
