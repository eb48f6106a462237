"""Does it pay to refine the encoder's answer while training? Five ways to train a VAE, each with the same time.

A plain VAE, the SA-VAE with exact and with first-order gradients, VAE+SVI and VAE+SVI+KL (see ``encoder_gradient`` of
``SemiAmortizedGuide``) train the same networks for the same wall-clock time. Prints the ELBO on held-out images, as
trained and after the same test-time refinement for all, and draws it against the number of refinement steps. Run this
file, with ``--help`` for its options.
"""

from __future__ import annotations

import time

import pyro
import torch
from _common import VAE, elbo, elbo_by_steps, load_images, make_parser, picture_path, save_curves, train

from pyro_amortized import AmortizedGuide, NaturalGradient, SemiAmortizedGuide

METHODS = {
    "VAE": None,
    "SA-VAE, unrolled": "unrolled",
    "SA-VAE, first order": "first_order",
    "VAE+SVI": "initial",
    "VAE+SVI+KL": "distill",
}
REFINEMENT = (0, 1, 2, 3, 5, 10, 20)


def make_guide(model: VAE, gradient: str | None) -> AmortizedGuide | SemiAmortizedGuide:
    """The guide of a method; all have the same encoder network."""
    encoder, update = model.make_encoder(), NaturalGradient(0.3)
    if gradient is None:
        return AmortizedGuide(model, encoder)
    return SemiAmortizedGuide(model, encoder, num_steps=3, update=update, encoder_gradient=gradient, num_particles=2)


def measure(
    model: VAE, guide: AmortizedGuide | SemiAmortizedGuide, images: torch.Tensor
) -> tuple[tuple[float, float], list[float]]:
    """The ELBO as trained, with its standard error, and by the number of refinement steps from the encoder's answer."""
    as_trained = elbo(model, guide, images)
    if isinstance(guide, SemiAmortizedGuide):
        guide.num_steps = 0  # the encoder's own answer
    return as_trained, elbo_by_steps(model, guide.refined(REFINEMENT[-1]), images, REFINEMENT)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, prints the table, saves the picture."""
    parser = make_parser(__doc__, num_steps=None, num_images=400)
    parser.add_argument("--seconds", type=float, default=40.0, help="time per guide (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error("--seconds must be positive")

    start = time.perf_counter()
    train_images, held_out = load_images(args.data)
    held_out = held_out[: args.num_images]
    rows, curves = {}, {}
    for name, gradient in METHODS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        model = VAE.for_images(train_images)
        guide = make_guide(model, gradient)
        num_steps = train(model, guide, train_images, name, num_steps=args.num_steps, seconds=args.seconds)
        as_trained, curves[name] = measure(model, guide, held_out)
        rows[name] = (num_steps, as_trained)

    print(f"\nELBO of {len(held_out)} held-out images, nats per image (Monte Carlo standard errors below", end=" ")
    print(f"{max(error for _, (_, error) in rows.values()) + 0.0005:.3f})")
    print(f"{'method':22s}{'SVI steps':>10s}{'encoder alone':>15s}{'as trained':>12s}{'refined':>10s}")
    for name, (num_steps, (as_trained, _)) in rows.items():
        print(f"{name:22s}{num_steps:10d}{curves[name][0]:15.3f}{as_trained:12.3f}{curves[name][-1]:10.3f}")
    best = max(curves, key=lambda name: curves[name][-1])
    print("as trained: with the 3 refinement steps of training, but for the VAE. refined: all guides alike, with")
    print(f"{REFINEMENT[-1]} steps of guide.refined(...) from the encoder's answer; it compares the models that each")
    print(f"method has learned. Best of these, with this seed and {args.seconds:g} s of training each: {best}.")

    picture = picture_path(args.out, "semi_amortized")
    title = "Test-time refinement from the encoder's answer, for guides trained in different ways"
    save_curves(picture, title, REFINEMENT, curves, height=0.8)
    print(f"\nsaved {picture} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
