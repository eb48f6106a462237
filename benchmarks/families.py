"""The families beside each other: ``python benchmarks/families.py``, on scikit-learn's digits or ``--data images.npz``.

Trains a VAE with a mean-field guide, holds it fixed, trains an amortized guide of every family for it, and prints the
approximation and the amortization gap of held-out images, without and with test-time refinement.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_amortized import Adam, AmortizedGuide, MLPEncoder, estimate_gaps
from pyro_amortized.families import Flow
from pyro_amortized.families.base import FamilySpec

FAMILIES: dict[str, FamilySpec] = {
    "normal": "normal",
    "low rank": "low_rank_multivariate_normal",
    "structured": "structured",
    "full rank": "multivariate_normal",
    "mixture": "mixture",
    "flow": "flow",
    "spline flow": lambda dim: Flow(dim, "spline_autoregressive"),
}
REFINEMENT = 20


class VAE(nn.Module):
    """Black and white images from ``latent`` normal latents."""

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x: torch.Tensor) -> None:
        """The Pyro model of images ``(N, pixels)``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def load_images(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Binarised images for training and held-out ones, ``(N, pixels)``."""
    if path is not None:
        arrays = np.load(path)
        return tuple(
            torch.from_numpy(arrays[f"{part}_images"]).flatten(1).gt(127).float() for part in ("train", "test")
        )
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data > 8, dtype=torch.float)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1400], images[1400:]


def train(model: VAE, guide: AmortizedGuide, images: torch.Tensor, num_steps: int) -> float:
    """Trains the guide, and the model unless it is held fixed; returns milliseconds per step."""
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    svi.step(images[:100])
    start = time.process_time()
    for _ in range(num_steps):
        svi.step(images[torch.randint(len(images), (100,))])
    guide.eval()
    return 1e3 * (time.process_time() - start) / num_steps


def main(argv: list[str] | None = None) -> None:
    """Prints a row for every family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz file with train_images and test_images, uint8")
    parser.add_argument("--num-steps", type=int, default=2000, help="training steps of every guide")
    parser.add_argument("--num-images", type=int, default=50, help="held-out images of the table")
    parser.add_argument("--latent", type=int, default=8, help="latent dimensions")
    parser.add_argument("--hidden", type=int, default=64, help="width of encoder and decoder")
    parser.add_argument(
        "--families", nargs="*", default=list(FAMILIES)[:-1], choices=list(FAMILIES), help="all but the last"
    )
    args = parser.parse_args(argv)

    start = time.perf_counter()
    pyro.set_rng_seed(0)
    training, held_out = load_images(args.data)
    held_out = held_out[: args.num_images]
    model = VAE(training.shape[1], args.latent, args.hidden)
    own = AmortizedGuide(model, MLPEncoder(training.shape[1], (args.hidden,)), name="own")
    train(model, own, training, args.num_steps)
    model.requires_grad_(False).eval()
    print(f"VAE of {training.shape[1]} pixels, {args.latent} latents, trained with a mean-field guide and held fixed;")
    print(f"{len(held_out)} held-out images; nats per image, {REFINEMENT} refinement steps\n")
    print(f"{'family':<12} {'approximation':>13} {'amortization':>13} {'refined':>9} {'unreliable':>11} {'ms/step':>8}")
    for name in args.families:
        pyro.set_rng_seed(0)
        guide = AmortizedGuide(
            model, MLPEncoder(training.shape[1], (args.hidden,)), family=FAMILIES[name], name=name.replace(" ", "_")
        )
        milliseconds = train(model, guide, training, args.num_steps)
        gaps = estimate_gaps(model, guide, (held_out,)).dataset
        update = None if name in ("normal", "full rank") else Adam(0.1)
        refined = estimate_gaps(model, guide.refined(REFINEMENT, update), (held_out,)).dataset
        optimum = np.maximum(gaps["elbo_optimal"], refined["elbo_optimal"].values)
        print(
            f"{name:<12} {float((gaps['log_evidence'] - optimum).mean()):>13.3f} "
            f"{float((optimum - gaps['elbo']).mean()):>13.3f} "
            f"{float((optimum - refined['elbo'].values).mean()):>9.3f} "
            f"{int((~gaps['reliable']).sum()):>11} {milliseconds:>8.2f}",
            flush=True,
        )
    print(f"\n({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
