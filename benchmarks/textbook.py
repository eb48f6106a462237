"""estimate_gaps against the textbook way of finding the gaps of a VAE, on the same images: time, error, log evidence.

The textbook is Cremer et al. (2018) with the annealed importance sampling of Wu et al. (2017): the local optimum by
Adam from zeros with 50 draws a step, until ten windows of 100 steps running bring no gain; the log evidence by
importance sampling with 5000 draws from the local optimum, and by 100 chains of annealed importance sampling from the
prior. ``python benchmarks/textbook.py --data mnist.npz`` takes about fifteen minutes; with all 5000 temperatures of the
paper (``--temperatures 5000``) it takes hours.

Two ways to make one estimate of the two. The mean of the two estimates of p(x) is unbiased for p(x), so that its
logarithm is a lower bound of log p(x) in expectation, as each of the two is. The larger of the two for each image, as
in the code of the paper, is neither: where both are noisy it lies above log p(x) by about the size of their errors.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm, trange

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from _common import VAE, load_images, train  # noqa: E402

from pyro_amortized import AmortizedGuide, estimate_gaps  # noqa: E402

LOG_2PI = math.log(2 * math.pi)


def log_joint(decoder: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """log p(x, z) of shape (K, N)."""
    log_prior = -0.5 * (z.square() + LOG_2PI).sum(-1)
    logits = decoder(z)
    return log_prior - F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def best_normal(decoder: nn.Module, x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Location and logarithm of the scale of the best mean-field normal."""
    loc, log_scale = (torch.zeros(len(x), latent_dim, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([loc, log_scale], lr=1e-3)
    best, stale = -math.inf, 0
    with tqdm(desc="q* by Adam", unit="window") as bar:
        while stale < 10:
            total = 0.0
            for _ in range(100):
                noise = torch.randn(50, *loc.shape)
                elbo = log_joint(decoder, loc + log_scale.exp() * noise, x).mean(0) + log_scale.sum(-1)
                optimizer.zero_grad()
                (-elbo.sum()).backward()
                optimizer.step()
                total += elbo.mean().item() / 100
            best, stale = (total, 0) if total > best else (best, stale + 1)
            bar.update()
    return loc.detach(), log_scale.detach()


@torch.no_grad()
def weights_of_draws(decoder: nn.Module, x: Tensor, loc: Tensor, log_scale: Tensor, num_draws: int) -> Tensor:
    """Log-weights (K, N) of draws from a mean-field normal."""
    parts = []
    for _ in range(num_draws // 50):
        noise = torch.randn(50, *loc.shape)
        log_q = (-0.5 * (noise.square() + LOG_2PI) - log_scale).sum(-1)
        parts.append(log_joint(decoder, loc + log_scale.exp() * noise, x) - log_q)
    return torch.cat(parts).double()


def weights_of_chains(decoder: nn.Module, x: Tensor, latent_dim: int, num_temperatures: int) -> Tensor:
    """Log-weights (100, N) of annealed chains from the prior: ten leapfrog steps each, 65% of them accepted."""

    def evaluate(z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        z = z.requires_grad_()
        likelihood = log_joint(decoder, z, x) + 0.5 * (z.square() + LOG_2PI).sum(-1)
        target = beta * likelihood - 0.5 * z.square().sum(-1)
        (gradient,) = torch.autograd.grad(target.sum(), z)
        return likelihood.detach(), target.detach(), gradient

    sigmoid = torch.sigmoid(torch.linspace(-4, 4, num_temperatures + 1, dtype=torch.float64))
    schedule = ((sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])).tolist()
    z = torch.randn(100, len(x), latent_dim)
    step = torch.full((len(x), 1), 0.1)
    log_weights = torch.zeros(100, len(x), dtype=torch.float64)
    for t in trange(num_temperatures, desc="annealed importance sampling"):
        likelihood, target, gradient = evaluate(z, schedule[t + 1])
        log_weights += (schedule[t + 1] - schedule[t]) * likelihood
        momentum = torch.randn_like(z)
        new, p = z.detach(), momentum + 0.5 * step * gradient
        for leap in range(10):
            new = new.detach() + step * p
            _, new_target, gradient = evaluate(new, schedule[t + 1])
            p = p + (1.0 if leap < 9 else 0.5) * step * gradient
        gain = new_target - target + 0.5 * (momentum.square() - p.square()).sum(-1)
        accepted = gain.exp().clamp(max=1.0).nan_to_num(0.0)
        z = torch.where((torch.rand_like(accepted) < accepted).unsqueeze(-1), new.detach(), z.detach())
        step = step * torch.where(accepted.mean(0) > 0.65, 1.02, 0.98).unsqueeze(-1)
    return log_weights


def summary(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mean-exp and its standard error."""
    relative = (log_weights - log_weights.amax(0)).exp()
    error = relative.std(0) / relative.mean(0) / len(relative) ** 0.5
    return log_weights.logsumexp(0) - math.log(len(log_weights)), error


def main() -> None:
    """Trains a VAE, measures its gaps both ways, and prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=".npz with train_images and test_images (default: scikit-learn's digits)")
    parser.add_argument("--num-steps", type=int, default=5000, help="training steps of the VAE")
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--temperatures", type=int, default=500, help="of the annealed chains")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of estimate_gaps, nats (its own default: 0.02)")
    args = parser.parse_args()
    pyro.set_rng_seed(0)
    images, held_out = load_images(args.data)
    model, x = VAE.for_images(images), held_out[: args.num_images]
    guide = AmortizedGuide(model, model.make_encoder())
    train(model, guide, images, "VAE", num_steps=args.num_steps)
    model.requires_grad_(False).eval()

    start = time.perf_counter()
    gaps = estimate_gaps(model, guide, (x,), tolerance=args.tolerance, progress=True).dataset
    ours = time.perf_counter() - start

    start = time.perf_counter()
    loc, log_scale = best_normal(model.decoder, x, model.latent_dim)
    adam = time.perf_counter() - start
    draws = weights_of_draws(model.decoder, x, loc, log_scale, 5000)
    elbo, elbo_se = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    iwae, iwae_se = summary(draws)
    chains, chains_se = summary(weights_of_chains(model.decoder, x, model.latent_dim, args.temperatures))
    textbook = time.perf_counter() - start
    larger = torch.maximum(iwae, chains)
    larger_se = torch.where(iwae > chains, iwae_se, chains_se)
    pooled = torch.logaddexp(iwae, chains) - math.log(2)
    pooled_se = torch.hypot((iwae - pooled).exp() * iwae_se, (chains - pooled).exp() * chains_se) / 2

    print(f"\n{len(x)} images, nats per image: mean (mean of the estimated errors)")
    print(f"{'':34s}{'log p(x)':>20s}{'L[q*]':>20s}{'seconds':>10s}")
    best, rest = [v.numpy() for v in (elbo, elbo_se)], textbook - adam
    own = [gaps[name].values for name in ("log_evidence", "log_evidence_se", "elbo_optimal", "elbo_optimal_se")]
    rows = {
        "estimate_gaps": (own, ours),
        "textbook: the mean of": ([pooled.numpy(), pooled_se.numpy(), *best], textbook),
        "  or the larger of": ([larger.numpy(), larger_se.numpy(), *best], textbook),
        "  5000 draws from q*": ([iwae.numpy(), iwae_se.numpy(), *best], adam),
        f"  100 chains, {args.temperatures} temperatures": ([chains.numpy(), chains_se.numpy(), *best], rest),
    }
    for name, (values, seconds) in rows.items():
        cells = "".join(f"{np.mean(values[i]):11.3f} ({np.mean(values[i + 1]):.4f})" for i in (0, 2))
        print(f"{name:34s}{cells}{seconds:10.1f}")
    print(f"textbook / estimate_gaps, time: {textbook / ours:.1f}")
    print("log p(x) of estimate_gaps less the other's, mean over images (its standard error over images):")
    for name, (values, _) in list(rows.items())[1:]:
        difference = own[0] - values[0]
        print(f"{name:34s}{difference.mean():+11.3f} ({difference.std(ddof=1) / len(difference) ** 0.5:.4f})")
    print(f"unreliable in estimate_gaps: {int((~gaps['reliable']).sum())} of {len(x)}")


if __name__ == "__main__":
    main()
