"""How far is an amortized guide from exact inference, and why? The gap decomposition of a VAE, on real images.

Trains a VAE with a mean-field guide, and then further guides for the same model held fixed: semi-amortized, iterative
and full-rank. Splits the slack of each guide's ELBO into approximation gap (what the family cannot represent) and
amortization gap (what the guide misses within the family), on training images and on images that no guide has seen,
and shows how refinement steps close the amortization gap. Run ``make demo``, or this file with ``--help``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from _common import VAE, Guide, drawing, elbo_draws, load_images, make_parser, mean_and_error, picture_path, train

from pyro_amortized import (
    AmortizedGuide,
    GapEstimate,
    IterativeAmortizedGuide,
    SemiAmortizedGuide,
    compare_gaps,
    optimize_local,
)

REFINEMENT = (0, 1, 2, 3, 5, 10, 20)
Results = dict[tuple[str, str], GapEstimate]


def train_guides(images: torch.Tensor, num_steps: int) -> tuple[VAE, dict[str, Guide]]:
    """The model, trained with the mean-field guide, and guides for it by name."""
    model = VAE.for_images(images)
    mean_field = AmortizedGuide(model, model.make_encoder(), name="mean_field")
    train(model, mean_field, images, "mean-field guide", num_steps=num_steps)
    model.requires_grad_(False).eval()  # the first guide's model, for all
    guides: dict[str, Guide] = {
        "mean-field": mean_field,
        "refined": mean_field.refined(REFINEMENT[-1]),
        "semi-amortized": SemiAmortizedGuide(
            model, model.make_encoder(), num_steps=5, encoder_gradient="distill", num_particles=10
        ),
        "iterative": IterativeAmortizedGuide(model, num_steps=5, name="iterative"),
        "full-rank": AmortizedGuide(model, model.make_encoder(), family="multivariate_normal", name="full_rank"),
    }
    for name, share in (("semi-amortized", 4), ("iterative", 4), ("full-rank", 1)):
        steps = max(1, num_steps // share)  # a step of a guide that refines costs several times as much
        train(model, guides[name], images, f"{name} guide", num_steps=steps)
    return model, guides


def save_gaps(results: Results, path: Path) -> None:
    """A panel per guide and data: both gaps of every image, stacked."""
    title = "Gap between the log evidence and the ELBO, image by image"
    rows = len(results) // 2
    names = dict.fromkeys(name for name, _ in results)
    cases = [(name, split) for name in names for split in ("training", "held-out")]
    limits = []
    with drawing(path, title, rows, 2, figsize=(11, 2.5 * rows), sharex=True, sharey=True) as axes:
        for ax, (name, split) in zip(axes, cases, strict=True):
            results[name, split].plot(ax)
            limits.append(ax.get_ylim())
            ax.set_title(f"{name} guide, {split} images", fontsize="medium")
            ax.label_outer()
        axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


@dataclass(frozen=True)
class Refinement:
    """ELBOs by number of refinement steps, in nats per image.

    Attributes:
        best: That of the best member of the family.
        steps: After each number of steps.
        errors: Monte Carlo standard errors of the difference from ``best``, on common draws.
    """

    best: float
    steps: list[float]
    errors: list[float]

    @classmethod
    def measure(cls, model: VAE, guide: SemiAmortizedGuide, images: torch.Tensor) -> Refinement:
        """The curve of a refined guide."""
        family = guide.infer(images).family
        best = elbo_draws(model, family(optimize_local(model, guide, (images,)).phi), images)
        before, steps, errors = guide.num_steps, [], []
        for guide.num_steps in REFINEMENT:
            with guide.repeatable():  # as the diagnostics see it
                posterior = guide.posterior(images)
            mean, error = mean_and_error(elbo_draws(model, posterior, images) - best)
            steps.append(best.mean().item() + mean)
            errors.append(error)
        guide.num_steps = before
        return cls(best.mean().item(), steps, errors)


def save_refinement(curves: dict[str, Refinement], path: Path) -> None:
    """A panel per part of the data: the ELBO of the refined mean-field guide by number of steps, and the best one."""
    title = "Mean-field guide, refined for each image"
    with drawing(path, title, 1, len(curves), figsize=(11, 4)) as axes:
        for ax, (split, curve) in zip(axes, curves.items(), strict=True):
            ax.errorbar(REFINEMENT, curve.steps, curve.errors, fmt="o-", capsize=3, label="ELBO after refinement")
            ax.axhline(curve.best, color="0.5", linestyle="--", label="optimal ELBO  L[q*]")
            left = f"{curve.best - curve.steps[0]:.3f} nats missing before, {curve.best - curve.steps[-1]:.3f} after"
            ax.set(title=f"{split} images: {left}", xlabel="refinement steps", ylabel="nats per image")
            ax.set_xticks(REFINEMENT)
            ax.legend(loc="lower right")


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, prints the table, saves the pictures and the numbers."""
    parser = make_parser(__doc__, num_steps=5000, num_images=100)
    args = parser.parse_args(argv)

    start = time.perf_counter()
    train_images, held_out = load_images(args.data)
    data = {"training": train_images[: args.num_images], "held-out": held_out[: args.num_images]}
    picture = picture_path(args.out, "gap_decomposition")
    pyro.set_rng_seed(args.seed)
    model, guides = train_guides(train_images, args.num_steps)
    comparison = compare_gaps(
        model, guides, {split: (images,) for split, images in data.items()}, seed=args.seed, progress=True
    )
    results = comparison.estimates
    curves = {split: Refinement.measure(model, guides["refined"], images) for split, images in data.items()}
    print(f"\n{comparison}\n")
    print("log p(x) = ELBO + approximation gap (what the family cannot represent) + amortization gap (what the guide")
    print("misses within the family). A richer family shrinks the first, a better encoder or refinement the second:")
    print(f"'refined' is the mean-field guide followed by {REFINEMENT[-1]} gradient steps for each image.")
    save_gaps(results, picture)
    save_refinement(curves, picture.with_name(f"{picture.stem}_refinement.png"))
    for (name, split), gaps in results.items():
        gaps.to_netcdf(picture.with_name(f"{picture.stem}_{name}_{split}.nc"))
    print(f"\nsaved {picture}, {picture.stem}_refinement.png and the numbers of every image as .nc files beside it")
    print(f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
