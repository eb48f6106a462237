"""The shortest honest VAE: trained on digits, judged on images it has not seen, and drawn.

Run ``python examples/vae.py``. Needs scikit-learn for the images and matplotlib for the pictures: reconstructions of
unseen images, draws from the prior, traversals of each latent dimension, and the latent space.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _common import drawing, picture_path
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch import nn

from pyro_amortized import AmortizedGuide


class VAE(nn.Module):
    """p(x, z) with z of 8 dimensions and binary pixels x."""

    def __init__(self, num_pixels: int, latent_dim: int = 8) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 128), nn.ReLU(), nn.Linear(128, num_pixels))

    def forward(self, x: torch.Tensor) -> None:
        """The Pyro model."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def images(self, z: torch.Tensor) -> torch.Tensor:
        """The probabilities of the pixels, ``(*, side, side)``, at latents ``(*, latent_dim)``."""
        probabilities = self.decoder(z).sigmoid()
        side = round(probabilities.shape[-1] ** 0.5)
        return probabilities.reshape(*z.shape[:-1], side, side)


def tiles(images: torch.Tensor) -> torch.Tensor:
    """One image of images ``(rows, columns, side, side)``, with space between them."""
    images = nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns, side, _ = images.shape
    return images.transpose(1, 2).reshape(rows * side, columns * side)


@torch.no_grad()
def save_pictures(model: VAE, guide: AmortizedGuide, x: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    """Four panels: reconstructions, samples, traversals, and the two main directions of the latent space."""
    z = guide.median(x)["z"]
    pairs = torch.stack([x[:10].view(10, 8, 8), model.images(z[:10])])
    samples = model.images(torch.randn(6, 10, model.latent_dim))
    grid = torch.linspace(-2.0, 2.0, 10)
    walks = z[0].expand(model.latent_dim, 10, -1).clone()
    for dim in range(model.latent_dim):
        walks[dim, :, dim] = grid
    centred = z - z.mean(0)
    plane = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    with drawing(path, "A VAE of digits", 2, 2, figsize=(9, 8)) as axes:
        titles = ("unseen images, and from their medians", "draws from the prior", "one latent at a time, -2 to 2")
        for ax, images, title in zip(axes, (pairs, samples, model.images(walks)), titles, strict=False):
            ax.imshow(tiles(images).numpy(), cmap="gray_r")
            ax.set(title=title, xticks=[], yticks=[])
        for digit in range(10):  # as its own mark, by which it is told apart where its colour is not
            axes[3].scatter(*plane[labels == digit].T.numpy(), marker=f"${digit}$", color=f"C{digit % 6}", s=24, lw=0.2)
        axes[3].set(title="posterior medians of unseen images", xlabel="first direction", ylabel="second direction")


def main(argv: list[str] | None = None) -> None:
    """Trains, prints the ELBO on both parts of the data, and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder, or .png file, for the pictures")
    args = parser.parse_args(argv)

    pyro.set_rng_seed(args.seed)
    digits, order = load_digits(), torch.randperm(1797)
    images, labels = torch.tensor(digits.data > 8, dtype=torch.float)[order], torch.tensor(digits.target)[order]
    train, held_out = images[:1400], images[1400:]

    model = VAE(num_pixels=64)
    guide = AmortizedGuide(model)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    for step in range(args.num_steps):
        loss = svi.step(train[torch.randint(len(train), (128,))])
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: ELBO {-loss / 128:.2f} nats per image (this batch)")

    for name, x in (("training", train), ("held-out", held_out)):
        elbo = -sum(svi.evaluate_loss(x) for _ in range(20)) / 20 / len(x)
        print(f"{name}: ELBO {elbo:.2f} nats per image")
    print("posterior medians of unseen images:", tuple(guide.median(held_out)["z"].shape))
    path = picture_path(args.out, "vae")
    save_pictures(model, guide, held_out, labels[1400:], path)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
