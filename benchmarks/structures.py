"""What a guide costs per SVI step, by how the model is written: ``python benchmarks/structures.py``.

For every structure: passes through the encoder and runs of the model per step (one of each is the least, as the ELBO
itself runs the model once), and the time of a step over that of a hand-written guide with the same networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer import SVI, Trace_ELBO
from run import paired_ratio
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide

N, BATCH, PIXELS, HIDDEN, LATENT = 1000, 128, 784, 400, 20


class Counted(nn.Module):
    """A module that counts its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.module(*inputs)


def networks() -> tuple[Counted, Counted]:
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU())
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))
    return Counted(encoder), Counted(decoder)


@dataclass
class Structure:
    """A way to write the VAE: which handlers and plate options, and the arguments of a call."""

    plate: Callable[..., dict[str, Any]] = lambda x, *rest: {"size": len(x)}
    handler: Callable[..., Any] | None = None
    arguments: Callable[[Tensor], tuple[Any, ...]] = lambda x: (x[:BATCH],)
    in_closure: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def subsampled(x: Tensor, *rest: Any) -> dict[str, Any]:
    return {"size": len(x), "subsample_size": BATCH}


def explicit(x: Tensor, index: Tensor) -> dict[str, Any]:
    return {"size": len(x), "subsample": index}


STRUCTURES = {
    "data as an argument": Structure(),
    "subsample=index": Structure(explicit, arguments=lambda x: (x, torch.randint(N, (BATCH,)))),
    "subsample_size=": Structure(subsampled, arguments=lambda x: (x,)),
    "subsample_size=, encoder_input=": Structure(subsampled, arguments=lambda x: (x,), options={"encoder_input": "x"}),
    "data in a closure": Structure(in_closure=True),
    "masked datapoints": Structure(
        handler=lambda x, mask: poutine.mask(mask=mask), arguments=lambda x: (x[:BATCH], torch.rand(BATCH) < 0.9)
    ),
    "annealed by poutine.scale": Structure(
        handler=lambda x, scale: poutine.scale(scale=scale), arguments=lambda x: (x[:BATCH], 0.5)
    ),
}


def build(structure: Structure, decoder: nn.Module, name: str, data: Tensor) -> Callable[..., None]:
    def model(x: Tensor, *rest: Any) -> None:
        pyro.module(name, decoder)
        with pyro.plate("data", **structure.plate(x, *rest)) as index:
            x = x[index]
            with structure.handler(x, *rest) if structure.handler else poutine.block(hide=[]):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    return (lambda: model(data[:BATCH])) if structure.in_closure else model


def by_hand(structure: Structure, encoder: nn.Module, head: nn.Module, data: Tensor) -> Callable[..., None]:
    def guide(x: Tensor, *rest: Any) -> None:
        pyro.module("encoder_by_hand", encoder)
        pyro.module("head_by_hand", head)
        with pyro.plate("data", **structure.plate(x, *rest)) as index:
            x = x[index]
            with structure.handler(x, *rest) if structure.handler else poutine.block(hide=[]):
                loc, log_scale = head(encoder(x)).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return (lambda: guide(data[:BATCH])) if structure.in_closure else guide


def main() -> None:
    """Prints the table."""
    print(f"VAE {PIXELS}-{HIDDEN}-{LATENT}, batch {BATCH}; per SVI step of AmortizedGuide")
    print(f"{'structure':34s}{'encoder':>9s}{'model':>7s}  time / hand-written guide")
    for title, structure in STRUCTURES.items():
        torch.manual_seed(0)
        pyro.clear_param_store()
        data = torch.rand(N, PIXELS).round()
        arguments = () if structure.in_closure else structure.arguments(data)
        encoder, decoder = networks()
        model = build(structure, decoder, "decoder", data)
        guide = AmortizedGuide(model, encoder, **structure.options)
        ours = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        other_encoder, other_decoder = networks()
        other_model = build(structure, other_decoder, "decoder_by_hand", data)
        other_guide = by_hand(structure, other_encoder, nn.Linear(HIDDEN, 2 * LATENT), data)
        hand = SVI(other_model, other_guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        for _ in range(3):
            ours.step(*arguments)
        encoder.calls = decoder.calls = 0
        for _ in range(10):
            ours.step(*arguments)
        calls = encoder.calls / 10, decoder.calls / 10
        ratio = paired_ratio(lambda: ours.step(*arguments), lambda: hand.step(*arguments), repeats=11, inner=20)  # noqa: B023
        print(f"{title:34s}{calls[0]:9.1f}{calls[1]:7.1f}  {ratio}")


if __name__ == "__main__":
    main()
