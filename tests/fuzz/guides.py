"""The guide of a structure, with encoders whose answers stay moderate."""

from __future__ import annotations

from typing import Any

import torch
from by_hand import Draw, Exact, coordinates
from programs import Program, spread
from pyro import poutine
from structures import Structure
from torch import Tensor, nn

import pyro_amortized
from pyro_amortized import GradientAscent
from pyro_amortized.encoders.layers import Head

__all__ = ["Stored", "build", "hold", "latent_dim"]

OPTIONS: dict[str, dict[str, Any]] = {
    "SemiAmortizedGuide": {"num_steps": 2, "num_particles": 2},
    "IterativeAmortizedGuide": {"num_steps": 1, "num_particles": 1},
}
NUM_FEATURES = 8192


def _joined(inputs: tuple[Tensor, ...]) -> Tensor:
    rows = max(x.shape[0] for x in inputs)
    parts = [x.reshape(len(x), -1) for x in inputs]
    return torch.cat([part.expand(rows, -1) for part in parts], -1).to(torch.get_default_dtype()).tanh()


class Bounded(nn.Module):
    """Features that stay moderate, so that transforms can be inverted to all digits, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        return _joined(inputs) + self.shift


class Pair(Bounded):
    """Locations and scales."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, *inputs: Tensor) -> Any:
        loc = super().forward(*inputs).mean(-1, keepdim=True) * spread((self.latent_dim,))
        return loc, torch.full_like(loc, 0.4) + 0.1 * loc.tanh()


class Steps(Bounded):
    """Features of every step of time."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps

    def forward(self, *inputs: Tensor) -> Tensor:
        features = super().forward(*inputs).mean(-1, keepdim=True).unsqueeze(1)
        return torch.cat([features + 0.1 * t for t in range(self.num_steps)], 1)


class Stored(nn.Module):
    """Features that are variational parameters ``phi`` put there by hand, whatever the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = torch.zeros(0, NUM_FEATURES)

    def forward(self, *inputs: Tensor) -> Tensor:
        features = torch.full((max(len(x) for x in inputs), NUM_FEATURES), 100.0)  # that of phi is not far out
        if len(self.phi):
            features.zero_()
            features[:, : self.phi.shape[-1]] = self.phi
        return features


def latent_dim(program: Program) -> int:
    """D, counted in a run of the model from the prior."""
    args, kwargs = program.arguments(0)
    trace = poutine.trace(program.model).get_trace(*args, **kwargs)
    drawn = Draw(program.structure, trace, trace, lambda: None)
    return coordinates(drawn)[0].shape[-1]


def build(program: Program, *, encoder: nn.Module | None = None, sees: Any = False, **options: Any) -> Any:
    """The guide of the program's structure, not set up yet."""
    structure: Structure = program.structure
    spec = structure.guide
    Guide = getattr(pyro_amortized, spec.kind)
    settings: dict[str, Any] = {**OPTIONS.get(spec.kind, {}), "family": spec.family, "plate": "data", "init_scale": 0.4}
    if spec.kind == "SemiAmortizedGuide":
        settings["update"] = GradientAscent(0.05)
    if spec.kind != "PerDatapointGuide":
        settings["encoder"] = encoder or _encoder(program)
        seen = {"name": "x_0", "names": ["x_0"], "function": program.rows}
        settings["encoder_input"] = seen.get(spec.sees) if sees is False else sees
    if spec.sees == "names" and structure.globals == "single" and spec.kind != "PerDatapointGuide" and sees is False:
        settings["encoder_input"] = ["x_0", "w"]
    return Guide(program.model, **{**settings, **options})


def _encoder(program: Program) -> nn.Module | None:
    kind = program.structure.guide.encoder
    if kind == "pair":
        return Pair(latent_dim(program))
    if kind == "steps":
        return Steps(len(program.structure.latents))
    return Bounded() if kind == "features" else None


def hold(guide: Any, stored: Stored, exact: Exact, rows: Tensor | None) -> bool:
    """Puts the exact posterior into the guide's encoder, or into ``rows`` of its table, if its family can hold it."""
    phi = guide.family.laplace(exact.mean, exact.precision)
    if phi is None:
        return False
    offsets = torch.linspace(-1.0, 1.0, exact.mean.numel()).reshape(exact.mean.shape)
    with torch.no_grad():
        for z in (exact.mean, exact.mean + offsets):  # where one of them tells nothing, the other does
            if not torch.allclose(guide.family(phi).log_prob(z), exact.posterior.log_prob(z), rtol=0.0, atol=1e-9):
                return False
        sizes = [module.size for module in guide.inference.modules() if isinstance(module, Head)]
        for parameter in guide.inference.parameters():
            if parameter.shape[-1:] == (NUM_FEATURES,):
                parameter.copy_(torch.eye(len(parameter), NUM_FEATURES) * sizes[0])
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter[slice(None) if rows is None else rows] = phi
    stored.phi = phi
    return True
