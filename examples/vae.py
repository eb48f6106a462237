"""The shortest honest VAE: trained on digits, judged on images it has not seen.

Run ``python examples/vae.py``. Needs scikit-learn for the images.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
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


def main(argv: list[str] | None = None) -> None:
    """Trains and prints the ELBO on both parts of the data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pyro.set_rng_seed(args.seed)
    images = torch.tensor(load_digits().data > 8, dtype=torch.float)[torch.randperm(1797)]
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


if __name__ == "__main__":
    main()
