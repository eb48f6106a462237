"""Costs as ratios, both sides measured in turn in one run: ``make bench``, or ``python benchmarks/run.py NAME ...``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from measure import MOMENTUM, NUM_STEPS, STEP_SIZE, Decoder, paired_ratio, vae_model
from memory import checkpoint_memory, many_datapoints, numpy_in_model
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_amortized import (
    AmortizedGuide,
    GradientAscent,
    PerDatapointGuide,
    SemiAmortizedGuide,
)
from pyro_amortized.families import Flow
from pyro_amortized.families.base import FamilySpec


def svi_step() -> None:
    """An SVI step of AmortizedGuide against a hand-written Pyro guide with the same networks."""
    for hidden, batch in ((400, 128), (64, 64)):
        x = torch.rand(batch, 784).round()
        for name, options in (("", {}), (', encoder_input="x"', {"encoder_input": "x"})):
            pyro.clear_param_store()
            encoder, head = nn.Sequential(nn.Linear(784, hidden), nn.ReLU()), nn.Linear(hidden, 40)

            def hand_guide(x: torch.Tensor, encoder: nn.Module = encoder, head: nn.Module = head) -> None:
                pyro.module("encoder", encoder)
                pyro.module("head", head)
                with pyro.plate("data", x.shape[0]):
                    loc, log_scale = head(encoder(x)).chunk(2, -1)
                    pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

            our_model = vae_model(hidden, 20, "decoder_for_guide")
            our_guide = AmortizedGuide(our_model, nn.Sequential(nn.Linear(784, hidden), nn.ReLU()), **options)
            hand_model = vae_model(hidden, 20, "decoder_by_hand")
            ours = SVI(our_model, our_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
            hand = SVI(hand_model, hand_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
            ratio = paired_ratio(lambda: ours.step(x), lambda: hand.step(x))  # noqa: B023
            print(f"SVI step 784-{hidden}-20, batch {batch}: AmortizedGuide{name} / hand-written guide = {ratio}")


def lightning_throughput() -> None:
    """Batches per second of SVIModule under Lightning's trainer, over those of a bare SVI loop; epochs in turn."""
    import lightning

    from pyro_amortized.lightning import SVIModule

    batches = torch.utils.data.DataLoader(torch.rand(12_800, 784).round(), batch_size=128)
    pyro.clear_param_store()
    pairs = []
    for name in ("by_hand", "lightning"):
        model = vae_model(400, 20, f"decoder_{name}")
        pairs.append((model, AmortizedGuide(model, nn.Sequential(nn.Linear(784, 400), nn.ReLU()), name=name)))
    svi = SVI(*pairs[0], pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    ratios = []

    class Turns(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            ours, start = time.perf_counter() - self.start, time.perf_counter()
            for batch in batches:
                svi.step(batch)
            ratios.append((time.perf_counter() - start) / ours)

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=16, accelerator="cpu", callbacks=[Turns()], **off).fit(SVIModule(*pairs[1]), batches)
    low, middle, high = statistics.quantiles(ratios[1:], n=4)
    print(f"Throughput 784-400-20, batch 128: SVIModule / SVI loop = {middle:.3f}  (quartiles {low:.3f} .. {high:.3f})")


def families() -> None:
    """An SVI step with every family against one with the mean-field normal."""
    hidden, batch, latent = 64, 64, 10
    x = torch.rand(batch, 784).round()

    def step(family: FamilySpec, name: str) -> Callable[[], object]:
        model = vae_model(hidden, latent, f"decoder_{name}")
        encoder = nn.Sequential(nn.Linear(784, hidden), nn.ReLU())
        guide = AmortizedGuide(model, encoder, family=family, name=name)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        return lambda: svi.step(x)

    others: dict[str, FamilySpec] = {
        "low_rank_multivariate_normal": "low_rank_multivariate_normal",
        "multivariate_normal": "multivariate_normal",
        "structured": "structured",
        "mixture": "mixture",
        "flow": "flow",
        "spline_flow": lambda dim: Flow(dim, "spline_autoregressive"),
    }
    for name, family in others.items():
        pyro.clear_param_store()
        ratio = paired_ratio(step(family, name), step("normal", f"normal_beside_{name}"), repeats=15, inner=20)
        print(f"SVI step 784-{hidden}-{latent}, batch {batch}: {name} / normal = {ratio}")


def sparse_table() -> None:
    """A step of the sparse per-datapoint table at a million datapoints against ten thousand."""
    steps = {}
    for size in (1_000_000, 10_000):
        y = torch.randn(size, 5)

        def model(y: torch.Tensor, index: torch.Tensor, size: int = size) -> None:
            with pyro.plate("data", size, subsample=index):
                z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

        guide = PerDatapointGuide(model, sparse=True, name=f"table_{size}")
        svi = SVI(model, guide, pyro.optim.Adagrad({"lr": 0.1}), Trace_ELBO())
        steps[size] = lambda svi=svi, y=y, size=size: svi.step(y, torch.randint(size, (128,)))
    print(f"PerDatapointGuide(sparse=True) step, N = 1e6 / N = 1e4: {paired_ratio(steps[1_000_000], steps[10_000])}")


def hand_written_step(
    x: torch.Tensor, encoder: nn.Module, decoder: nn.Module, unrolled: bool
) -> Callable[[], torch.Tensor]:
    """A training step of the semi-amortized VAE as one writes it in plain torch, with the KL in closed form."""
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)

    def elbo(phi: torch.Tensor) -> torch.Tensor:
        loc, log_scale = phi.chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        log_likelihood = -F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(-1)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)
        return (log_likelihood - kl).sum()

    def step() -> torch.Tensor:
        start = encoder(x)
        phi = start if unrolled else start.detach().requires_grad_()
        velocity = torch.zeros_like(phi)
        for _ in range(NUM_STEPS):
            (grad,) = torch.autograd.grad(elbo(phi), phi, create_graph=unrolled)
            velocity = MOMENTUM * velocity + grad
            phi = phi + STEP_SIZE * velocity
            if not unrolled:
                phi = phi.detach().requires_grad_()
        loss = -elbo(phi if unrolled else start + (phi - start).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def matrix_products(hidden: int, batch: int, unrolled: bool, latent: int = 20, pixels: int = 784) -> Callable[[], None]:
    """The matrix products of such a step and nothing else: what no compiler can leave out.

    Each layer takes one product forward and one back to its input, and one for the gradient of its weights; to unroll a
    refinement step, which goes forward and back to phi, four more.
    """
    shapes = (latent, hidden), (hidden, pixels)  # the decoder
    first, rest = (pixels, hidden), (hidden, 2 * latent)  # the encoder
    data = {n: torch.randn(batch, n) for n in (latent, hidden, pixels, 2 * latent)}
    weights = {shape: torch.randn(shape) for shape in (*shapes, first, rest)}

    def forward(shape: tuple[int, int]) -> None:
        torch.mm(data[shape[0]], weights[shape])

    def backward(shape: tuple[int, int]) -> None:
        torch.mm(data[shape[1]], weights[shape].t())

    def weight(shape: tuple[int, int]) -> None:
        torch.mm(data[shape[0]].t(), data[shape[1]])

    def step() -> None:
        for shape in shapes:
            for _ in range(NUM_STEPS):
                forward(shape)
                backward(shape)
                for function in (forward, backward, weight, weight) if unrolled else ():
                    function(shape)
        for shape in (*shapes, first, rest):
            for function in (forward, weight) if shape == first else (forward, backward, weight):
                function(shape)

    return step


def semi_amortized_step() -> None:
    """An SVI step of SemiAmortizedGuide, uncompiled and compiled, against a hand-written torch step."""
    for hidden, batch in ((400, 128), (64, 64)):
        for mode in ("first_order", "unrolled"):
            pyro.clear_param_store()
            x = torch.rand(batch, 784).round()
            encoder = nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 40))
            hand = hand_written_step(x, encoder, Decoder(hidden), mode == "unrolled")
            floor = paired_ratio(matrix_products(hidden, batch, mode == "unrolled"), hand, repeats=15, inner=5)
            case = f"{NUM_STEPS} {mode} steps 784-{hidden}-20, batch {batch}"
            print(f"{case}: its matrix products alone / hand-written torch = {floor}")
            for compiled in (False, True):
                name = f"{mode}_{hidden}_{compiled}"
                model = vae_model(hidden, 20, f"decoder_{name}")
                guide = SemiAmortizedGuide(
                    model,
                    nn.Sequential(nn.Linear(784, hidden), nn.ReLU()),
                    num_steps=NUM_STEPS,
                    update=GradientAscent(STEP_SIZE, MOMENTUM),
                    encoder_gradient=mode,
                    compile=compiled,
                    name=f"guide_{name}",
                )
                svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
                ratio = paired_ratio(lambda: svi.step(x), hand, repeats=15, inner=5)  # noqa: B023
                kind = "compiled" if compiled else "eager"
                print(f"{case}: {kind} / hand-written torch = {ratio}")


BENCHMARKS = {
    "svi_step": svi_step,
    "lightning": lightning_throughput,
    "numpy_in_model": numpy_in_model,
    "families": families,
    "sparse_table": sparse_table,
    "semi_amortized_step": semi_amortized_step,
    "checkpoint_memory": checkpoint_memory,
    "many_datapoints": many_datapoints,
}


def main() -> None:
    """Runs the benchmarks named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    for name in parser.parse_args().names:
        torch.manual_seed(0)
        pyro.clear_param_store()
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
