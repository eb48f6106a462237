"""Posterior collapse and its remedies, under a decoder that can do without latents.

Lagging Inference Networks and Posterior Collapse in Variational Autoencoders, Junxian He, Daniel Spokoyny, Graham
Neubig, Taylor Berg-Kirkpatrick (2019); Semi-Amortized Variational Autoencoders, Yoon Kim, Sam Wiseman, Andrew Miller,
David Sontag, Alexander Rush (2018); Cyclical Annealing Schedule, Hao Fu, Chunyuan Li, Xiaodong Liu, Jianfeng Gao, Asli
Celikyilmaz, Lawrence Carin (2019).

In place of text: binary digits, each pixel predicted from those before it and from a latent of eight dimensions (the
masked autoencoder of the example on posterior collapse), trained with every remedy from the same weights for the same
number of steps of the model at the same learning rate. Encoder steps of the aggressive training come on top. The plain
VAE is measured a second time with the refinement of the SA-VAE at test time alone. Codes have a uniform prior in
training, and one fitted to the codes of the training images afterwards. All figures are of held-out images; the bound
is the plain ELBO of each guide as it is used, the log evidence that of its model, by importance sampling.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pyro
import xarray as xr
from _evidence import Claim, Experiment, Table, run, with_error
from matplotlib.figure import Figure
from torch import Tensor

from pyro_amortized import NaturalGradient, VectorQuantizedGuide, collapse_report, log_evidence

# isort: split
from _common import load_images  # _evidence knows where it is
from posterior_collapse import METHODS, Run, elbo, plain, prepare
from vq_vae import DECODERS, VQVAE, fit_prior

PLAIN, REFINED, CODES = "plain VAE", "plain VAE, refined", "codes"
REMEDIES = ("linear annealing", "cyclical annealing", "free bits", "aggressive encoder", "semi-amortized")
ROWS = (PLAIN, REFINED, *REMEDIES, CODES)


def train(name: str, images: Tensor, num_steps: int, seed: int) -> Run:
    """A model and its guide, trained with one of the methods of the example."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if name == CODES:
        model: Any = VQVAE(DECODERS["autoregressive"](images.shape[1]))
        guide = VectorQuantizedGuide(model, model.codebook, model.decoder.make_encoder())
        trained = Run(model, guide, images, num_steps)
    else:
        trained = prepare(name, images, num_steps)
    step = METHODS.get(name, plain)(trained)
    for number in range(num_steps):
        step(number)
    trained.guide.eval()
    return trained


def describe(trained: Run, held_out: Tensor, seed: int) -> dict[str, float]:
    """What a guide says of held-out images, in nats."""
    report = collapse_report(trained.model, trained.guide, (held_out,), seed=seed)
    found = {
        "bound": elbo(trained, held_out),
        "training_bound": elbo(trained, trained.images[: len(held_out)]),
        "kl": float(report.dataset.attrs["total_kl"]),
        "information": report.mutual_information,
        "active": float(report.active_units),
    }
    if isinstance(trained.guide, VectorQuantizedGuide):
        model: Any = trained.model
        fit_prior(model, trained.guide, trained.images)
        return found | {"bound": elbo(trained, held_out), "evidence": np.nan}
    evidence = log_evidence(trained.model, trained.guide, (held_out,), tolerance=0.1, seed=seed)
    return found | {"evidence": float(evidence["log_evidence"].mean())}


def measure(seed: int, args: argparse.Namespace) -> xr.Dataset:
    """All methods."""
    images, held_out = load_images(args.data)
    images, held_out = images[: args.num_train], held_out[: args.num_held_out]
    found = {}
    for name in (PLAIN, *REMEDIES, CODES):
        trained = train(name, images, args.num_steps, seed)
        found[name] = describe(trained, held_out, seed)
        if name == PLAIN:
            guide = trained.guide.refined(3, NaturalGradient(0.3), num_particles=2)  # as prepare() has it
            refined = Run(trained.model, guide, images, args.num_steps)
            found[REFINED] = describe(refined, held_out, seed)
    data = {key: ("remedy", [found[name][key] for name in ROWS]) for key in found[PLAIN]}
    return xr.Dataset(data, {"remedy": list(ROWS)})


def tables(runs: xr.Dataset) -> list[Table]:
    """All figures of all methods."""
    keys = ("training_bound", "bound", "evidence", "kl", "information", "active")
    rows = []
    for name in runs["remedy"].values:
        part = runs.sel(remedy=name)
        rows.append([name, *("" if part[key].isnull().any() else with_error(part[key].values, 2) for key in keys)])
    columns = ["training", "ELBO, training images", "ELBO", "log evidence", "KL", "mutual information", "active units"]
    note = (
        "The mutual information is at most the logarithm of the number of images. The KL of codes is that under their "
        "uniform prior; their held-out ELBO is under the fitted one."
    )
    return [Table("Held-out images, nats per image", columns, rows, note)]


def claims(runs: xr.Dataset) -> list[Claim]:
    """What the papers say of their remedies, and what these cost."""

    def less(key: str, first: str, *others: str) -> dict[str, np.ndarray]:
        value = runs[key].sel(remedy=first).values
        return {f"{key} above {name}": value - runs[key].sel(remedy=name).values for name in others}

    he, kim, fu = "He et al. 2019", "Kim et al. 2018", "Fu et al. 2019"
    aggressive, semi, cyclical = "aggressive encoder", "semi-amortized", "cyclical annealing"
    costs = {f"evidence above {name}": less("evidence", PLAIN, name)[f"evidence above {name}"] for name in REMEDIES}
    return [
        Claim("Aggressive training of the encoder raises the mutual information", he,
              less("information", aggressive, PLAIN)),
        Claim("It improves the likelihood", he, less("evidence", aggressive, PLAIN)),
        Claim("The SA-VAE has a larger KL divergence than the VAE", kim, less("kl", semi, PLAIN)),
        Claim("The SA-VAE has a better bound than the VAE", kim, less("bound", semi, PLAIN)),
        Claim("Cyclical annealing keeps a larger KL divergence than no annealing", fu, less("kl", cyclical, PLAIN)),
        Claim("Cyclical annealing keeps a larger KL divergence than annealing once", fu,
              less("kl", cyclical, "linear annealing")),
        Claim("The SA-VAE's larger divergence is learned: a plain VAE refined alike at test time has less", "ours",
              less("kl", semi, REFINED)),
        Claim("A VAE whose latents collapse is the best model of held-out images: all remedies cost likelihood", "ours",
              costs),
        Claim("Codes tell more than any Gaussian latent", "ours", less("information", CODES, *REMEDIES)),
        Claim("Their bound is worse than the plain VAE's all the same", "ours", less("bound", PLAIN, CODES)),
    ]  # fmt: skip


def draw(runs: xr.Dataset, figure: Figure) -> None:
    """Information used, and what it costs."""
    left, right = figure.subplots(1, 2)
    means = runs.mean("seed")
    errors = runs.std("seed", ddof=1) / runs.sizes["seed"] ** 0.5 if runs.sizes["seed"] > 1 else 0 * means
    rows = np.arange(len(ROWS))
    for shift, key, label in ((-0.2, "kl", "KL divergence"), (0.2, "information", "mutual information")):
        left.barh(rows + shift, means[key], 0.4, xerr=errors[key], label=label)
    left.set(yticks=rows, yticklabels=ROWS, xlabel="nats per image", title="what the latents tell")
    left.invert_yaxis()
    left.legend()
    for index, name in enumerate(ROWS[:-1]):
        part, error = means.sel(remedy=name), errors.sel(remedy=name)
        right.errorbar(
            part["information"], part["evidence"], xerr=error["information"], yerr=error["evidence"],
            fmt="os^vD<>"[index], color=f"C{index}" if index < 6 else "black", capsize=3, label=name,
        )  # fmt: skip
    right.set(
        xlabel="mutual information, nats",
        ylabel="held-out log evidence, nats per image",
        title="what this does to the likelihood",
    )
    right.margins(0.1, 0.4)
    right.legend(fontsize="small", loc="lower center", ncols=2)


EXPERIMENT = Experiment(
    name="collapse",
    title="Posterior collapse and its remedies",
    doc=__doc__ or "",
    measure=measure,
    tables=tables,
    claims=claims,
    draw=draw,
    num_seeds=3,
    sizes={
        "num_steps": (1000, 20000, "steps of each model"),
        "num_train": (10**6, 10**6, "most training images"),
        "num_held_out": (250, 1000, "most held-out images"),
    },
)

if __name__ == "__main__":
    run(EXPERIMENT)
