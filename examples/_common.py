"""What the examples share: images, the VAE, training, and the ELBO on given images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import nn
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, MLPEncoder, SemiAmortizedGuide

BATCH_SIZE = 100
Guide = AmortizedGuide | SemiAmortizedGuide | IterativeAmortizedGuide


class VAE(nn.Module):
    """p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z))."""

    def __init__(self, num_pixels: int, latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.hidden_dim = latent_dim, hidden_dim
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, num_pixels),
        )  # fmt: skip

    @classmethod
    def for_images(cls, images: torch.Tensor) -> VAE:
        """A VAE of a size that suits the images."""
        num_pixels = images.shape[1]
        return cls(num_pixels, 8, 64) if num_pixels < 100 else cls(num_pixels, 20, 200)

    def forward(self, x: torch.Tensor) -> None:
        """The Pyro model."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def make_encoder(self) -> MLPEncoder:
        """A new encoder, as large as the decoder."""
        return MLPEncoder(self.decoder[-1].out_features, (self.hidden_dim,) * 2, standardize=False)


def make_parser(
    description: str | None, *, num_steps: int | None, num_images: int, share_refined: str = "a quarter of them"
) -> argparse.ArgumentParser:
    """The options that all examples have.

    Args:
        description: The text of ``--help``.
        num_steps: Default number of SVI steps per guide; None for no limit.
        num_images: Default number of images per estimate.
        share_refined: How many of the steps guides that refine get, in words.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=".npz with train_images and test_images, such as MNIST (default: digits)")
    limit = "most SVI steps per guide (default: any)"
    if num_steps:
        limit = f"SVI steps per guide; {share_refined} for guides that refine (default: %(default)s)"
    parser.add_argument("--num-steps", type=_positive, default=num_steps, help=limit)
    images = "most images per estimate (default: %(default)s)"
    parser.add_argument("--num-images", type=_positive, default=num_images, help=images)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder, or .png file, for the results")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def picture_path(out: Path, name: str) -> Path:
    """Where a picture goes: ``out`` itself if it is a file; its folder is made."""
    path = out if out.suffix else out / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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


def train(
    model: VAE,
    guide: Guide,
    images: torch.Tensor,
    title: str,
    *,
    num_steps: int | None = None,
    seconds: float | None = None,
) -> int:
    """Trains a guide, and the model with it unless its parameters are frozen.

    Ends after a number of SVI steps or of seconds, whichever comes first; the learning rate falls to a tenth meanwhile.

    Args:
        model: The model.
        guide: The guide; in ``eval()`` mode afterwards.
        images: Training images.
        title: The text of the progress bar.
        num_steps: Most SVI steps.
        seconds: Most seconds, not counting the first step, which builds the guide.

    Returns:
        Number of steps done.
    """
    rate = 2e-3
    optimizer = ClippedAdam({"lr": rate})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    step, average, progress, start = 0, None, 0.0, None
    with tqdm(desc=f"training, {title}", total=num_steps, unit="step") as bar:
        while progress < 1:
            loss = svi.step(images[torch.randint(len(images), (BATCH_SIZE,))]) / BATCH_SIZE
            average = loss if average is None else 0.99 * average + 0.01 * loss
            step += 1
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(elbo=f"{-average:.2f}", refresh=False)
            now = time.perf_counter()
            start = now if start is None else start
            progress = max(step / num_steps if num_steps else 0.0, (now - start) / seconds if seconds else 0.0)
            for torch_optimizer in optimizer.optim_objs.values():
                for group in torch_optimizer.param_groups:
                    group["lr"] = rate * 0.1**progress
    guide.eval()
    return step


@torch.no_grad()
def elbo_draws(model: VAE, posterior: Distribution, images: torch.Tensor, num_particles: int = 250) -> torch.Tensor:
    """The ELBO in nats per image, a mean over the images for each of ``num_particles`` draws.

    Draws are the same in every call, so that posteriors can be compared closely.
    """
    torch.manual_seed(0)
    draws = []
    for _ in range(num_particles // 25):
        z = posterior.rsample((25,))
        log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_joint += dist.Bernoulli(logits=model.decoder(z)).log_prob(images).sum(-1)
        draws.append((log_joint - posterior.log_prob(z)).mean(-1))
    return torch.cat(draws)


def mean_and_error(draws: torch.Tensor) -> tuple[float, float]:
    """The mean of draws and its standard error."""
    return draws.mean().item(), (draws.std() / len(draws) ** 0.5).item()


def elbo(model: VAE, guide: Guide, images: torch.Tensor) -> tuple[float, float]:
    """The ELBO of a guide in nats per image, and its Monte Carlo standard error."""
    with torch.no_grad():
        posterior = guide.posterior(images)
    return mean_and_error(elbo_draws(model, posterior, images))


def elbo_by_steps(
    model: VAE, guide: SemiAmortizedGuide | IterativeAmortizedGuide, images: torch.Tensor, steps: Sequence[int]
) -> list[float]:
    """The ELBO in nats per image after each of these numbers of refinement steps."""
    before, values = guide.num_steps, []
    for guide.num_steps in steps:
        values.append(elbo(model, guide, images)[0])
    guide.num_steps = before
    return values


@contextmanager
def drawing(path: Path, title: str, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Sequence[Axes]]:
    """Gives the axes of a new figure, and saves it in the end."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context("pyro_amortized.style"):
        figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
        yield axes.ravel()
        figure.suptitle(title)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def save_curves(
    path: Path, title: str, steps: Sequence[int], curves: dict[str, Sequence[float]], height: float
) -> None:
    """Draws held-out ELBOs against the number of steps: all of the curves, and their uppermost part.

    Args:
        path: Where to save the picture.
        title: Its title.
        steps: Numbers of steps.
        curves: ELBOs by name.
        height: Height of the uppermost part, in nats.
    """
    high = max(map(max, curves.values()))
    with drawing(path, title, 1, 2, figsize=(11, 4.5)) as (whole, detail):
        for ax in (whole, detail):
            for name, values in curves.items():
                ax.plot(steps, values, "o-", label=name)
            ax.set(xlabel="steps", ylabel="held-out ELBO, nats per image", xticks=steps)
        whole.set(title="all")
        whole.legend()
        detail.set(title="the uppermost part", ylim=(high - height, high + 0.05 * height))
