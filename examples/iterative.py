"""How fast does inference find a good posterior? Learned steps, an encoder, Adam, and an encoder with refinement.

Trains a VAE, freezes its decoder, and trains an ``IterativeAmortizedGuide`` for it: a network that takes five steps
from the prior, each after a look at the gradient of the image's own ELBO. Compares it on held-out images with the
encoder that the VAE was trained with, with Adam from the prior, and with the encoder's answer after refinement. Run
this file, with ``--help`` for its options.
"""

from __future__ import annotations

import time

import pyro
from _common import VAE, elbo, elbo_by_steps, load_images, make_parser, picture_path, save_curves, train

from pyro_amortized import Adam, AmortizedGuide, IterativeAmortizedGuide, SemiAmortizedGuide

STEP_SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
STEPS = (0, 1, 2, 3, 4, 5, 8, 10, 12, 16)


def adam_from_prior(model: VAE, step_size: float) -> SemiAmortizedGuide:
    """Stochastic variational inference without an encoder: 100 steps of Adam for each image, from the prior."""
    update = Adam(step_size)
    return SemiAmortizedGuide(model, num_steps=100, update=update, num_particles=10, initial="prior").eval()


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, prints the table, saves the picture."""
    parser = make_parser(__doc__, num_steps=5000, num_images=400)
    args = parser.parse_args(argv)

    start = time.perf_counter()
    train_images, held_out = load_images(args.data)
    held_out = held_out[: args.num_images]
    pyro.set_rng_seed(args.seed)
    model = VAE.for_images(train_images)
    encoder = AmortizedGuide(model, model.make_encoder(), name="encoder_guide")
    train(model, encoder, train_images, "VAE", num_steps=args.num_steps)
    model.requires_grad_(False).eval()
    iterative = IterativeAmortizedGuide(model, num_steps=5, name="iterative_guide")
    num_steps = max(1, args.num_steps // 4)  # each costs several times as much as the VAE's
    train(model, iterative, train_images, "iterative guide", num_steps=num_steps)

    refined = encoder.refined(5)
    adams = {step_size: adam_from_prior(model, step_size) for step_size in STEP_SIZES}
    tried = {step_size: elbo(model, guide, held_out) for step_size, guide in adams.items()}
    best = max(tried, key=tried.__getitem__)
    rows = {
        "encoder": (0, elbo(model, encoder, held_out)),
        "encoder, refined": (5, elbo(model, refined, held_out)),
        "iterative, from the prior": (5, elbo(model, iterative, held_out)),
        f"Adam({best:g}), from the prior": (100, tried[best]),
    }
    print(f"\nELBO of {len(held_out)} held-out images, the decoder held fixed")
    print(f"{'inference':28s}{'steps':>6s}{'nats per image':>18s}")
    for name, (num_steps, (mean, error)) in rows.items():
        print(f"{name:28s}{num_steps:6d}{mean:11.3f} +- {error:5.3f}")
    print("100 steps of Adam by step size:", ", ".join(f"{size:g}: {value:.2f}" for size, (value, _) in tried.items()))

    picture = picture_path(args.out, "iterative")
    by_step_size = [elbo_by_steps(model, guide, held_out, STEPS) for guide in adams.values()]
    curves = {
        "encoder, refined": elbo_by_steps(model, refined, held_out, STEPS),
        "iterative, from the prior": elbo_by_steps(model, iterative, held_out, STEPS),
        "Adam from the prior, best step size for each number": [max(x) for x in zip(*by_step_size, strict=True)],
    }
    save_curves(picture, "ELBO by number of inference steps, the decoder held fixed", STEPS, curves, height=0.5)
    print(f"\nsaved {picture} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
