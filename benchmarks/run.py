"""Costs as ratios, both sides measured in turn in one run: ``make bench``, or ``python benchmarks/run.py NAME ...``."""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_amortized import (
    AmortizedGuide,
    GradientAscent,
    MLPEncoder,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
    to_arviz,
)
from pyro_amortized.families import Flow
from pyro_amortized.families.base import FamilySpec


def paired_ratio(first: Callable[[], object], second: Callable[[], object], repeats: int = 31, inner: int = 40) -> str:
    """Time of ``first`` over time of ``second``: the median over alternating blocks, and the quartiles."""
    for function in (first, second):
        for _ in range(inner):
            function()
    ratios, seconds = [], []
    for repeat in range(repeats):
        times = {}
        for function in (first, second) if repeat % 2 else (second, first):
            start = time.perf_counter()
            for _ in range(inner):
                function()
            times[function] = (time.perf_counter() - start) / inner
        ratios.append(times[first] / times[second])
        seconds.append(times[first])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f}  (quartiles {low:.3f} .. {high:.3f}; {1e3 * statistics.median(seconds):.2f} ms)"


def resident_memory() -> float:
    """Memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Decoder(nn.Module):
    """z -> logits of pixels."""

    def __init__(self, hidden: int, latent: int = 20, pixels: int = 784) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z)


def vae_model(hidden: int, latent: int, name: str) -> Callable[..., None]:
    """A hand-written VAE model, its decoder registered as ``name``."""
    decoder = Decoder(hidden, latent)

    def model(x: torch.Tensor) -> None:
        pyro.module(name, decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return model


def svi_step() -> None:
    """An SVI step of AmortizedGuide against a hand-written Pyro guide with the same networks."""
    for hidden, batch in ((400, 128), (64, 64)):
        pyro.clear_param_store()
        x = torch.rand(batch, 784).round()
        encoder, head = nn.Sequential(nn.Linear(784, hidden), nn.ReLU()), nn.Linear(hidden, 40)
        hand_model = vae_model(hidden, 20, "decoder_by_hand")

        def hand_guide(x: torch.Tensor, encoder: nn.Module = encoder, head: nn.Module = head) -> None:
            pyro.module("encoder", encoder)
            pyro.module("head", head)
            with pyro.plate("data", x.shape[0]):
                loc, log_scale = head(encoder(x)).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        hand = SVI(hand_model, hand_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        for name, options in (("", {}), (', encoder_input="x"', {"encoder_input": "x"})):
            our_model = vae_model(hidden, 20, f"decoder_for_guide{name}")
            our_encoder = nn.Sequential(nn.Linear(784, hidden), nn.ReLU())
            our_guide = AmortizedGuide(our_model, our_encoder, name=f"guide{name}", **options)
            ours = SVI(our_model, our_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
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


NUM_STEPS = 20
STEP_SIZE, MOMENTUM = 0.002, 0.5


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


def checkpoint_memory() -> None:
    """Peak memory and time of unrolled steps with and without ``checkpoint=True``."""
    x = torch.rand(512, 784).round()
    for num_steps, checkpoint in ((3, False), (NUM_STEPS, False), (NUM_STEPS, True)):
        pyro.clear_param_store()
        model = vae_model(400, 20, "decoder")
        update = GradientAscent(STEP_SIZE, MOMENTUM)
        guide = SemiAmortizedGuide(model, num_steps=num_steps, update=update, checkpoint=checkpoint)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        svi.step(x)
        start = time.perf_counter()
        with SavedBytes() as saved:
            svi.step(x)
        seconds = time.perf_counter() - start
        print(
            f"{num_steps} unrolled steps 784-400-20, batch 512, checkpoint={checkpoint}: "
            f"{saved.peak / 2**20:.0f} MiB of activations at the peak, {1e3 * seconds:.0f} ms"
        )


class SavedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, among those made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        """Adds a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        """Takes a storage out again."""
        self.known.discard(key)
        self.alive -= size


def many_datapoints() -> None:
    """Memory and time of estimate_gaps and to_arviz on a loader: 4 times the batches of 500, 200 counts each."""
    weights = 0.3 * torch.randn(2, 200)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((z @ weights).exp()).to_event(1), obs=x)

    def counts(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.poisson((torch.randn(500, 2, generator=rng) @ weights).exp(), generator=rng)

    guide = AmortizedGuide(model, MLPEncoder(200, (64,)), name="many")
    guide.setup(counts(0))

    def work(function: Callable[[Iterator[torch.Tensor]], object], count: int) -> tuple[float, float]:
        resident: list[float] = []

        def batches() -> Iterator[torch.Tensor]:
            for seed in range(count):
                resident.append(resident_memory())
                yield counts(seed)

        start = time.perf_counter()
        function(batches())
        return time.perf_counter() - start, max(resident[1:]) - resident[1]

    tasks = {
        "estimate_gaps": lambda batches: estimate_gaps(model, guide, batches, tolerance=0.1, max_samples=2000),
        "to_arviz": lambda batches: to_arviz(
            model, guide, batches, num_samples=20, groups=("posterior", "sample_stats")
        ),
    }
    for name, task in tasks.items():
        work(task, 2)
        (short, _), (long, growth) = work(task, 5), work(task, 20)
        print(
            f"{name}, 10000 datapoints / 2500: time {long / short:.2f} ({long:.1f} s); resident memory grew by "
            f"{growth:.0f} MiB (the inputs: {10000 * 200 * 4 / 2**20:.0f} MiB)"
        )


def numpy_in_model() -> None:
    """Time and memory of a step where the model holds a NumPy array of 400 MB, against one where it holds none."""

    def step(megabytes: int) -> Callable[[], object]:
        held = np.ones(megabytes * 2**17)

        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(5), float(held.size > 0)).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        svi = SVI(model, AmortizedGuide(model, name=f"guide_{megabytes}"), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        return lambda: svi.step(torch.randn(int(torch.randint(32, 64, ())), 5))  # a new batch size now and then

    large, small = step(400), step(1)
    for _ in range(200):
        large()
    before = resident_memory()
    ratio = paired_ratio(large, small, repeats=11, inner=20)
    grown = resident_memory() - before
    print(f"SVI step, model with 400 MB of NumPy / with 1 MB = {ratio}; resident memory grew by {grown:.0f} MiB")


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
