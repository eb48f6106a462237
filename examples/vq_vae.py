"""Codes that a powerful decoder keeps using: VQ-VAEs beside Gaussian VAEs, on digits.

Two decoders, one of independent pixels and one that predicts each pixel from those before it as well (a masked
autoencoder, MADE), each with a Gaussian latent and with vector-quantised codes: four positions with one of sixteen
codes each, under a uniform prior, that are looked up in a codebook. The Gaussian latent of the second decoder collapses
to the prior; its codes stay in use, as the KL divergence that the ELBO takes for them is the same whatever they tell.
Prints the collapse reports of both and a table of all four, and draws KL, entropy of the codes and reconstructions.
Run this file, with ``--help`` for its options.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _common import VAE, drawing, load_images, make_parser, picture_path
from posterior_collapse import AutoregressiveVAE
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm.auto import trange

from pyro_amortized import AmortizedGuide, Codebook, CollapseReport, VectorQuantizedGuide, collapse_report

BATCH_SIZE, RATE = 100, 2e-3
POSITIONS, CODES, DIM = 4, 16, 4


class IndependentVAE(VAE):
    """p(x, z) = N(z; 0, I) prod_i Bernoulli(x_i; f_i(z))."""

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """The logit of every pixel given z."""
        return self.decoder(z)


class VQVAE(nn.Module):
    """p(x, k) = prod_j 1/K prod_i Bernoulli(x_i; f_i(..., e_k)): the decoder of a VAE, with codes in place of z."""

    def __init__(self, decoder: IndependentVAE | AutoregressiveVAE) -> None:
        super().__init__()
        self.decoder = decoder
        self.codebook = Codebook(CODES, DIM)
        self.register_buffer("prior", torch.zeros(POSITIONS, CODES))

    def forward(self, x: Tensor) -> None:
        """The Pyro model."""
        pyro.module("vqvae", self)
        with pyro.plate("images", x.shape[0]):
            code = pyro.sample("code", dist.Categorical(logits=self.prior).to_event(1))
            z = self.codebook(code).flatten(-2)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder.logits(x, z)).to_event(1), obs=x)


DECODERS: dict[str, Callable[[int], IndependentVAE | AutoregressiveVAE]] = {
    "independent": lambda num_pixels: IndependentVAE(num_pixels, POSITIONS * DIM, 64 if num_pixels < 100 else 200),
    "autoregressive": lambda num_pixels: AutoregressiveVAE(num_pixels, POSITIONS * DIM),
}


def train(model: nn.Module, guide: Any, images: Tensor, num_steps: int, title: str) -> None:
    """Plain SVI, the same for all."""
    svi = SVI(model, guide, ClippedAdam({"lr": RATE}), TraceMeanField_ELBO())
    for _ in trange(num_steps, desc=f"training, {title}"):
        svi.step(images[torch.randint(len(images), (BATCH_SIZE,))])
    guide.eval()


@torch.no_grad()
def elbo(model: nn.Module, guide: Any, images: Tensor) -> float:
    """The ELBO, nats per image; of codes it has no noise."""
    torch.manual_seed(0)
    repeats = 1 if isinstance(model, VQVAE) else 50
    return -sum(TraceMeanField_ELBO().loss(model, guide, images) for _ in range(repeats)) / repeats / len(images)


@torch.no_grad()
def fit_prior(model: VQVAE, guide: VectorQuantizedGuide, images: Tensor) -> None:
    """Gives every position the code frequencies of the images, as a prior learned after training."""
    counts = nn.functional.one_hot(guide.codes(images), CODES).sum(0)
    model.prior.copy_((counts + 1.0).log())


@torch.no_grad()
def reconstruct(model: nn.Module, guide: Any, images: Tensor) -> Tensor:
    """The decoder's own images: pixel after pixel the more probable value, given those it has made itself and z."""
    is_coded = isinstance(model, VQVAE)
    z = model.codebook(guide.codes(images)).flatten(-2) if is_coded else guide.median(images)["z"]
    decoder = model.decoder if is_coded else model
    made = torch.zeros_like(images)
    for pixel in range(images.shape[1] if isinstance(decoder, AutoregressiveVAE) else 0):
        made[:, pixel] = (decoder.logits(made, z)[:, pixel] > 0).to(made)
    return made if isinstance(decoder, AutoregressiveVAE) else (decoder.logits(made, z) > 0).to(made)


@dataclass(frozen=True)
class Result:
    """What came of one decoder with one kind of latent.

    Attributes:
        report: What its latents hold.
        elbo: Of the held-out images, nats per image.
        fitted: With a prior of each position fitted to the training images' codes; None without codes.
        images: The held-out images from their own latents.
    """

    report: CollapseReport
    elbo: float
    fitted: float | None
    images: Tensor


def result_of(decoder: str, latent: str, train_images: Tensor, held_out: Tensor, num_steps: int, seed: int) -> Result:
    """Trains a decoder with one kind of latent and measures it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = DECODERS[decoder](held_out.shape[1])
    encoder, is_coded = vae.make_encoder(), latent == "codes"
    model: Any = VQVAE(vae) if is_coded else vae
    guide = VectorQuantizedGuide(model, model.codebook, encoder) if is_coded else AmortizedGuide(model, encoder)
    train(model, guide, train_images, num_steps, f"{decoder}, {latent}")
    report, value = collapse_report(model, guide, (held_out,), seed=seed), elbo(model, guide, held_out)
    if is_coded:
        fit_prior(model, guide, train_images)
    images = reconstruct(model, guide, held_out)
    return Result(report, value, elbo(model, guide, held_out) if is_coded else None, images)


def print_table(results: dict[str, Result], held_out: Tensor) -> None:
    """A row for each decoder and latent."""
    num_pixels = held_out.shape[1]
    bits = num_pixels * math.log(2)
    print(f"\n{len(held_out)} held-out images of {num_pixels} pixels")
    print(f"{'':26s}{'-- nats per image --':>32s}{'-- bits per pixel --':>24s}{'pixels':>9s}{'active':>8s}", end="")
    print(f"{'perplexity':>12s}")
    print(f"{'decoder, latent':26s}{'log p(x|z)':>12s}{'KL':>8s}{'ELBO':>12s}{'uniform':>12s}{'fitted':>12s}", end="")
    print(f"{'wrong, %':>9s}{'units':>8s}{'of ' + str(CODES):>12s}")
    for title, found in results.items():
        kl, wrong = found.report.dataset.attrs["total_kl"], float((found.images != held_out).float().mean())
        print(f"{title:26s}{found.elbo + kl:12.2f}{kl:8.2f}{found.elbo:12.2f}{-found.elbo / bits:12.3f}", end="")
        print(f"{'':12s}" if found.fitted is None else f"{-found.fitted / bits:12.3f}", end="")
        print(f"{100 * wrong:9.1f}{found.report.active_units:8d}", end="")
        print("" if found.fitted is None else f"{found.report.perplexity:12.2f}")
    print("bits per pixel: -ELBO; for codes also with a prior of each position fitted to the training images' codes")
    print("afterwards. pixels wrong: in the decoder's own image of the latent, against the image that it came from.")
    less = results["autoregressive, codes"].elbo - results["autoregressive, Gaussian"].elbo
    print(f"ELBO of the autoregressive decoder with codes, less that with a Gaussian latent: {less:.2f} nats.")
    print("A decoder that can do without a latent pays for the codes all the same.")


def draw(results: dict[str, Result], held_out: Tensor, picture: Path) -> None:
    """What the latents of the autoregressive decoder hold, and reconstructions by all."""
    with drawing(picture, "Codes beside a Gaussian latent", 1, 3, figsize=(14, 4.5)) as (left, middle, right):
        for ax, title in ((left, "autoregressive, Gaussian"), (middle, "autoregressive, codes")):
            results[title].report.plot(ax).set_title(title)
        side, pictures = math.isqrt(held_out.shape[1]), {"held-out": held_out}
        pictures |= {title: found.images for title, found in results.items()}
        strips = [x[:8].reshape(-1, side, side) for x in pictures.values()]
        tiles = torch.cat([torch.cat(list(nn.functional.pad(x, (0, 1, 0, 1), value=0.5)), -1) for x in strips])
        right.imshow(tiles.numpy(), cmap="gray")
        right.set_yticks([(i + 0.5) * (side + 1) for i in range(len(strips))], list(pictures))
        right.set_xticks([])
        right.set_title("reconstructions")


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, prints reports and table, saves the picture."""
    args = make_parser(__doc__, num_steps=1000, num_images=397, share_refined="all of them").parse_args(argv)
    start = time.perf_counter()
    train_images, held_out = load_images(args.data)
    held_out = held_out[: args.num_images]
    results = {
        f"{decoder}, {latent}": result_of(decoder, latent, train_images, held_out, args.num_steps, args.seed)
        for decoder in DECODERS
        for latent in ("Gaussian", "codes")
    }
    for title in ("autoregressive, Gaussian", "autoregressive, codes"):
        print(f"\n{title}: {results[title].report}")
    print_table(results, held_out)
    picture = picture_path(args.out, "vq_vae")
    draw(results, held_out, picture)
    print(f"\nsaved {picture} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
