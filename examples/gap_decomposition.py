"""How far is an amortized guide from exact inference, and why? The gap decomposition of a VAE, on real images.

Trains a VAE with a mean-field guide, and then a full-rank guide for the same model held fixed. Splits the slack of each
guide's ELBO into approximation gap (what the family cannot represent) and amortization gap (what the encoder misses),
on training images and on images the encoder has not seen. Run ``make demo``, or this file with ``--help``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn
from tqdm.auto import trange

from pyro_amortized import AmortizedGuide, GapEstimate, MLPEncoder, estimate_gaps

FAMILIES = {"normal": "mean-field", "multivariate_normal": "full-rank"}
BATCH_SIZE = 100


class VAE(nn.Module):
    """p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z))."""

    def __init__(self, num_pixels: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.hidden_dim = latent_dim, hidden_dim
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, num_pixels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> None:
        """The Pyro model."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def load_images(path: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary training and held-out images, shuffled, one per row.

    Args:
        path: An .npz file with arrays ``train_images`` and ``test_images``; scikit-learn's digits if None.
    """
    if path is None:
        from sklearn.datasets import load_digits

        images = load_digits().images
        order = np.random.default_rng(0).permutation(len(images))
        train, held_out = images[order[:1400]], images[order[1400:]]
    else:
        with np.load(path) as arrays:
            missing = {"train_images", "test_images"} - set(arrays.files)
            if missing:
                raise SystemExit(f"{path} has no arrays {sorted(missing)}; it has {sorted(arrays.files)}")
            train, held_out = arrays["train_images"], arrays["test_images"]
    threshold = train.max() / 2
    return tuple(torch.tensor(x.reshape(len(x), -1) > threshold, dtype=torch.float) for x in (train, held_out))


def train_guide(model: VAE, family: str, train: torch.Tensor, num_steps: int) -> AmortizedGuide:
    """An amortized guide, trained together with the model if that is in training mode."""
    encoder = MLPEncoder(train.shape[1], (model.hidden_dim,) * 2, standardize=False)
    guide = AmortizedGuide(model, encoder, family=family, name=f"{family}_guide")
    optimizer = ClippedAdam({"lr": 2e-3, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    with trange(num_steps, desc=f"training, {FAMILIES[family]} guide") as bar:
        average = None
        for step in bar:
            loss = svi.step(train[torch.randint(len(train), (BATCH_SIZE,))]) / BATCH_SIZE
            average = loss if average is None else 0.99 * average + 0.01 * loss
            if step % 50 == 0:
                bar.set_postfix(elbo=f"{-average:.2f}")
    return guide


def print_table(results: dict[tuple[str, str], GapEstimate]) -> None:
    """One row per guide and data: means in nats per image, each +- its Monte Carlo standard error."""
    columns = ("log_evidence", "elbo", "approximation_gap", "amortization_gap")
    header = f"{'guide':12s}{'images':10s}" + "".join(f"{name.replace('_', ' '):>20s}" for name in columns)
    print("\nMeans in nats per image +- Monte Carlo standard error\n" + header + f"{'unreliable':>12s}")
    for (family, split), gaps in results.items():
        count = gaps.dataset.sizes["images"]
        cells = ""
        for name in columns:
            error = np.sqrt(np.square(gaps.dataset[f"{name}_se"].values).sum()) / count
            cells += f"{gaps.dataset[name].values.mean():11.3f} +- {error:5.3f}"
        unreliable = int((~gaps.dataset["reliable"]).sum())
        print(f"{FAMILIES[family]:12s}{split:10s}{cells}{unreliable:>6d} of {count}")
    print("log evidence = ELBO + approximation gap (what the family cannot represent) + amortization gap (what the")
    print("encoder misses within the family). A richer family shrinks the first, a better encoder the second.")


def save_picture(results: dict[tuple[str, str], GapEstimate], path: Path) -> None:
    """A panel per guide and data: both gaps of every image, stacked."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharey=True, layout="constrained")
    for ax, ((family, split), gaps) in zip(axes.flat, results.items(), strict=True):
        gaps.plot(ax)
        ax.set_title(f"{FAMILIES[family]} guide, {split} images")
    figure.suptitle("Gap between the log evidence and the ELBO, image by image")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, prints the table, saves the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=".npz with train_images and test_images, such as MNIST (default: digits)")
    parser.add_argument("--num-steps", type=int, default=5000, help="SVI steps per guide (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=100, help="images per estimate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder, or .png file, for the results")
    args = parser.parse_args(argv)
    if args.num_steps < 1 or args.num_images < 1:
        parser.error("--num-steps and --num-images must be positive")

    start = time.perf_counter()
    train, held_out = load_images(args.data)
    picture = args.out if args.out.suffix else args.out / "gap_decomposition.png"
    results: dict[tuple[str, str], GapEstimate] = {}
    pyro.set_rng_seed(args.seed)
    latent_dim, hidden_dim = (8, 64) if train.shape[1] < 100 else (20, 200)
    model = VAE(train.shape[1], latent_dim, hidden_dim)
    for family in FAMILIES:
        guide = train_guide(model, family, train, args.num_steps)
        model.requires_grad_(False).eval()  # the first guide's model, for all
        for split, images in (("training", train), ("held-out", held_out)):
            print(f"gaps of the {FAMILIES[family]} guide on {args.num_images} {split} images")
            gaps = estimate_gaps(model, guide, (images[: args.num_images],), seed=args.seed, progress=True)
            results[family, split] = gaps
    print_table(results)
    save_picture(results, picture)
    for (family, split), gaps in results.items():
        gaps.to_netcdf(picture.with_name(f"{picture.stem}_{family}_{split}.nc"))
    print(
        f"\nsaved {picture} and the numbers of every image as .nc files beside it ({time.perf_counter() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
