"""Model structures that guides are tried on, each with two batches to call it with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

ELBOS: dict[str, Callable[..., Any]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": partial(TraceEnum_ELBO, strict_enumeration_warning=False),
    "RenyiELBO": partial(RenyiELBO, alpha=0, num_particles=3),
}


@dataclass(frozen=True)
class Structure:
    """A model with two batches to call it with.

    Attributes:
        title: What the table calls it.
        model: The model.
        batches: Makes the arguments of the first call and of the second.
        options: Options of the guides.
        enumerated: Names of the discrete sites that the model sums out, which takes ``TraceEnum_ELBO``.
        drawn: Name of the discrete site that a guide for discrete latents draws, or enumerates under that ELBO.
        encoder: Makes the encoder for guides that have one; None for the default.
    """

    title: str
    model: Callable[..., Any]
    batches: Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    enumerated: tuple[str, ...] = ()
    drawn: str | None = None
    encoder: Callable[[], nn.Module] | None = None

    @property
    def elbos(self) -> list[str]:
        """Names of the ELBOs that the structure is meant for."""
        return ["TraceEnum_ELBO"] if self.enumerated else list(ELBOS)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _two(*shape: int) -> Callable[[], Any]:
    """Batches of 6 and of 4 datapoints in the first axis."""
    return lambda: ((normal(6, *shape),), (normal(4, *shape),))


STRUCTURES: list[Structure] = []


def structure(
    title: str,
    batches: Callable[[], Any],
    enumerated: tuple[str, ...] = (),
    drawn: str | None = None,
    encoder: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> Any:
    """Registers a model as a structure."""

    def register(model: Callable[..., Any]) -> Callable[..., Any]:
        STRUCTURES.append(Structure(title, model, batches, options, enumerated, drawn, encoder))
        return model

    return register


@structure("local latents", _two())
def local_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("local and global latents", _two())
def _local_and_global(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("parts", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w.sum(-1, keepdim=True), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


@structure("several local latents that depend on each other, of several supports", _two())
def _dependent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        loc = pyro.sample("loc", dist.Normal(rate, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3) + loc.tanh().unsqueeze(-1).square()))
        pyro.sample("x", dist.Normal(loc + share[..., 0], 1.0), obs=x)


@structure("inner plate on the left of the datapoints", lambda: ((normal(3, 6),), (normal(3, 4),)), plate="data")
def _second_axis(x: Tensor) -> None:
    data = pyro.plate("data", x.shape[-1], dim=-1)
    with data:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with data, pyro.plate("features", len(x), dim=-2):
        w = pyro.sample("w", dist.LogNormal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@structure("inner plate on the right, datapoints at dim -2", _two(3))
def _nested(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", x.shape[-1], dim=-1):
            w = pyro.sample("w", dist.LogNormal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@structure("datapoints at dim -3, two inner plates", _two(2, 3))
def _third(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2):
            v = pyro.sample("v", dist.Normal(z, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(v, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@structure("all sites in an inner plate on the left", lambda: ((normal(3, 6),), (normal(3, 4),)), plate="data")
def _all_left(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1], dim=-1), pyro.plate("features", len(x), dim=-2):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), z.unsqueeze(-1)).to_event(1))
        pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x)


@structure("all sites in two inner plates, a global latent in one of them", _two(2, 3), plate="data")
def _all_in_two(x: Tensor) -> None:
    data = pyro.plate("data", len(x), dim=-3)
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with data:
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("a dimension outside of all plates", _two(3))
def _outside(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(1, 3), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("observations in a subsampled inner plate", _two(4))
def _subsampled_entries(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", x.shape[-1], dim=-1, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])


def _two_plates(x: Tensor, y: Tensor) -> None:
    with pyro.plate("ys", len(y)):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)
    with pyro.plate("xs", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _two_plates_batches() -> Any:
    return (normal(6), normal(3)), (normal(4), normal(3))


structure("two plates of observations", _two_plates_batches)(_two_plates)
structure('two plates of observations, `plate="xs"`', _two_plates_batches, plate="xs")(_two_plates)


@structure("plate without a size", _two(2))
def _unsized(x: Tensor) -> None:
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def _subsampled_batches() -> Any:
    return (normal(8), torch.tensor([7, 2, 4])), (normal(8), torch.tensor([1, 0]))


@structure("`subsample=indices`", _subsampled_batches)
def explicit_subsample(x: Tensor, index: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x[index])


def _sized_batches() -> Any:
    return (normal(8), 3), (normal(8), 5)


@structure("`subsample_size=...`", _sized_batches)
def _random(x: Tensor, size: int) -> None:
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@structure("`pyro.subsample` in the plate", _sized_batches)
def _pyro_subsample(x: Tensor, size: int) -> None:
    with pyro.plate("data", len(x), subsample_size=size):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch)


@structure("subsampled inner plate", _two(4))
def _subsampled_inner(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", x.shape[-1], dim=-1, subsample_size=2) as index:
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, index])


def _chain_batches() -> Any:
    return (normal(6, 3), torch.tensor([3, 1, 2, 3, 1, 2])), (normal(4, 3), torch.tensor([2, 3, 1, 1]))


@structure("Markov chain, latents and observations masked by length", _chain_batches)
def _chain(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=lengths > t):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


@structure("Markov chain, only observations masked", _chain_batches)
def _observed_chain(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(lengths > t), obs=x[:, t])


def _annealed_batches() -> Any:
    (x, lengths), (y, others) = _chain_batches()
    return (x, lengths, 0.2), (y, others, 0.7)


@structure("Markov chain, masked by length and annealed by `poutine.scale`", _annealed_batches)
def _annealed_chain(x: Tensor, lengths: Tensor, factor: float) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in pyro.markov(range(x.shape[1])):
            with poutine.scale(scale=factor):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0).mask(lengths > t))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(lengths > t), obs=x[:, t])


@structure("`poutine.scale` around local latents and observations", _two())
def _scaled(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("`poutine.scale` around some of the latents", _two())
def _partly_scaled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@structure("a weight for every datapoint", lambda: ((normal(6), normal(6).exp()), (normal(4), normal(4).exp())))
def _weighted_datapoints(x: Tensor, weights: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.scale(scale=weights):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("a site that is observed in some calls only", lambda: ((normal(6), normal(6)), (normal(4), None)))
def _sometimes(x: Tensor, y: Tensor | None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("as many latents as the call has steps", lambda: ((normal(6, 3),), (normal(4, 2),)))
def _lengths(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


class _Steps(nn.Module):
    """Features of shape (N, T, H), of the observation at each step."""

    def forward(self, *steps: Tensor) -> Tensor:
        return torch.stack([torch.stack([x, x.tanh()], -1) for x in steps], 1)


structure(
    "as many latents as the call has steps, encoder with features `(N, T, H)`",
    lambda: ((normal(6, 3),), (normal(4, 2),)),
    encoder=_Steps,
)(_lengths)


@structure("missing entries masked, `dist.mask(present)`", lambda: ((_missing(6),), (_missing(4),)))
def _missing_masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).mask(~x.isnan()).to_event(1), obs=x.nan_to_num())


@structure("missing values imputed, `obs_mask=present`", lambda: ((_missing(6)[:, 0],), (_missing(4)[:, 0],)))
def _missing_imputed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.nan_to_num(), obs_mask=~x.isnan())


@structure("missing values left as NaN", lambda: ((_missing(6)[:, 0],), (_missing(4)[:, 0],)))
def _missing_values(x: Tensor) -> None:
    local_latents(x)


def _missing(size: int) -> Tensor:
    x = normal(size, 3)
    return x.masked_fill(x.roll(1, 0) > 0.5, torch.nan)


@structure("`pyro.condition`", lambda: ((6, normal(6)), (4, normal(4))))
def _conditioned(size: int, x: Tensor) -> None:
    def free() -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    pyro.condition(free, {"x": x})()


_CLOSURE: dict[str, Tensor] = {}


@structure("data that are no argument of the model", lambda: (({"size": 6},), ({"size": 4},)))
def _closure(call: dict[str, int]) -> None:
    _CLOSURE["x"] = normal(call["size"])
    local_latents(_CLOSURE["x"])


@structure("discrete latents that the model enumerates", _two(), enumerated=("k",))
def _enumerated(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + 2.0 * k, 1.0), obs=x)


@structure("discrete Markov chain that the model enumerates", _two(3), enumerated=("k_0", "k_1", "k_2"))
def _enumerated_chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = torch.zeros(())
        for t in pyro.markov(range(3)):
            k = pyro.sample(f"k_{t}", dist.Bernoulli(0.2 + 0.5 * k), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(z + 2.0 * k, 1.0), obs=x[:, t])


@structure("discrete latents that the model enumerates in an inner plate", _two(3), enumerated=("k",))
def _enumerated_inner(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", 3, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2.0 * k, 1.0), obs=x)


@structure("discrete latents that are not enumerated", _two(), drawn="k")
def _discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


@structure("the same beside continuous latents, local and global", _subsampled_batches, drawn="k")
def _mixed(x: Tensor, index: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample=index):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.LogNormal(w + k, 1.0))
        pyro.sample("x", dist.Normal(k - z, 1.0), obs=x[index])


@structure(
    "discrete latents that are observed in some calls",
    lambda: ((normal(6), None), (normal(4), _LABELS)),
    drawn="k",
)
def _labels(x: Tensor, labels: Tensor | None) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4), obs=labels)
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


_LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)


@structure("datapoints in a sequential plate", _two())
def _sequential(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


@structure("global latents in a sequential plate", _two())
def _sequential_globals(x: Tensor) -> None:
    w = [pyro.sample(f"w_{i}", dist.Normal(0.0, 1.0)) for i in pyro.plate("parts", 2)]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w[0] + w[1], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("observations in a sequential plate", _two(2))
def _sequential_observations(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("features", x.shape[-1]):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[:, i])


@structure("datapoints without a plate", _two())
def _no_plate(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@structure("no local latents", _two())
def _no_local(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@structure("no latents", _two())
def _no_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@structure("spherical support", _two())
def _sphere(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ProjectedNormal(torch.ones(2)))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


@structure("support whose bounds are another latent", _two())
def _latent_bounds(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, high))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
