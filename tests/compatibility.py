"""Which model structures work under which guides and ELBOs, found by running them.

Every combination is set up, trained for two steps and called with a second batch. Where it runs, the ELBO of a draw is
compared with a sum over the traces of guide and model, and Renyi's bound of several draws with the weights of all that
these sums are kept apart for, so that no combination can be silently wrong. Rewrite the tables
of the documentation by ``python tests/compatibility.py --write``.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import (
    CSIS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

__all__ = [
    "ELBOS",
    "FAMILIES",
    "GUIDES",
    "LOSSES",
    "NESTED",
    "STRUCTURES",
    "TABLE",
    "WORKS",
    "Structure",
    "cell",
    "elbo_by_hand",
    "family_outcomes",
    "loss_outcome",
    "outcome",
    "outcomes",
    "page",
]

TABLE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
WORKS = "works"
TOLERANCE = 1e-7
NESTING = 3
"""Number of plates that the ELBOs make room for."""

GUIDES: dict[str, Callable[..., Any]] = {
    "AmortizedGuide": AmortizedGuide,
    "SemiAmortizedGuide": partial(SemiAmortizedGuide, num_steps=1, keep_best=False),
    "IterativeAmortizedGuide": partial(IterativeAmortizedGuide, num_steps=1, num_particles=1, keep_best=False),
    "PerDatapointGuide": PerDatapointGuide,
    "DiscreteAmortizedGuide": DiscreteAmortizedGuide,
}
ELBOS: dict[str, Callable[..., Any]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": partial(TraceEnum_ELBO, strict_enumeration_warning=False),
    "RenyiELBO": partial(RenyiELBO, alpha=0, num_particles=3),
}
FAMILIES = ("normal", "multivariate_normal", "low_rank_multivariate_normal", "structured", "mixture", "flow")


# The ELBO by hand


def _sites(trace: Any) -> dict[str, Any]:
    nodes = trace.nodes.items()
    return {name: site for name, site in nodes if site["type"] == "sample" and not site_is_subsample(site)}


def _log_prob(site: Any, weights: Any = None) -> Tensor:
    """Scale times mask times log-density of a site, summed; scale and mask may be those of another site."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return _weighted(log_prob, site if weights is None else weights)


def _weighted(value: Tensor, site: Any) -> Tensor:
    if site["mask"] is not None:
        value = torch.where(torch.as_tensor(site["mask"]), value, torch.zeros_like(value))
    return (value * site["scale"]).sum()


def elbo_by_hand(
    model: Any, guide: Any, *args: Any, analytic: bool = False, enumerated: tuple[str, ...] = (), **kwargs: Any
) -> float:
    """log p minus log q of one draw of the guide, from the traces of guide and model.

    Both count with the scale and the mask that the model gives the site.

    Args:
        model: The model.
        guide: The guide.
        *args: The model's arguments.
        analytic: Whether to take closed forms of the KL divergence where torch knows them, as a mean-field ELBO does.
        enumerated: Names of binary sites, each in the datapoint plate, to be summed out.
        **kwargs: The model's keyword arguments.
    """
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    posterior = _sites(guide_trace)
    run = partial(_model_sites, model, guide_trace, args, kwargs)
    prior = run({})
    names = {name for name in prior if name not in enumerated}
    extra = {name for name in prior if not prior[name]["is_observed"]} - posterior.keys() - set(enumerated)
    if extra:
        raise AssertionError(f"sites {sorted(extra)} of the model have no guide")
    total = torch.zeros(())
    if enumerated:
        total, names = _summed_out(run, enumerated)
    for name in names:
        divergence = _kl_divergence(posterior.get(name), prior[name]) if analytic else None
        if divergence is None:
            total = total + _log_prob(prior[name])
        else:
            total = total - divergence
            del posterior[name]
    for name, site in posterior.items():
        total = total - _log_prob(site, prior.get(name))
    return torch.as_tensor(total).item()


def bound_by_hand(model: Any, guide: Any, *args: Any, count: int) -> float:
    """Renyi's bound of order 0: the mean weight of several draws, its logarithm summed over the plates of all sites.

    Every log-density is summed but for the dimensions of plates that hold all sites of the model; a site of the guide
    must have an entry of its own for each of theirs, and for each one of a dimension outside of all plates.
    """
    log_weights = []
    for _ in range(count):
        guide_trace = poutine.trace(guide).get_trace(*args)
        prior, posterior = _model_sites(model, guide_trace, args, {}, {}), _sites(guide_trace)
        stacks = [{frame.name: frame for frame in site["cond_indep_stack"]} for site in prior.values()]
        common = {name for name in stacks[0] if all(name in stack for stack in stacks)}
        summed = {frame.dim for stack in stacks for name, frame in stack.items() if name not in common}
        terms = [_unsummed(site, site, summed) for site in prior.values()]
        shape = torch.broadcast_shapes(*(term.shape for term in terms))
        for name, site in posterior.items():
            term = -_unsummed(site, prior.get(name, site), summed)
            if term.any() and term.shape != shape:
                raise AssertionError(f"site {name!r} of the guide has shape {tuple(term.shape)} and not {tuple(shape)}")
            terms.append(term)
        log_weights.append(torch.stack(torch.broadcast_tensors(*terms)).sum(0))
    return (torch.stack(log_weights).logsumexp(0) - math.log(count)).sum().item()


def _unsummed(site: Any, weights: Any, summed: set[int]) -> Tensor:
    """Scale times mask times log-density of a site, summed over some dimensions, which stay."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if weights["mask"] is not None:
        value = torch.where(torch.as_tensor(weights["mask"]), value, torch.zeros_like(value))
    value = value * weights["scale"]
    value = value.reshape((1,) * (NESTING - value.dim()) + value.shape)
    return value.sum(sorted(summed), keepdim=True) if summed else value


def enumerated_elbo_by_hand(model: Any, guide: Any, name: str, *args: Any) -> float:
    """The ELBO with a binary site of the guide summed out: what q(y) gives each value times log p - log q there.

    The site lies in the plate "data" at dim -1, and nothing else of the model is in another plate.
    """
    guide_trace = poutine.trace(poutine.enum(guide, first_available_dim=-1 - NESTING)).get_trace(*args)
    posterior = _sites(guide_trace)
    prior = _model_sites(model, guide_trace, args, {}, {})
    if prior[name]["is_observed"]:
        raise AssertionError(f"site {name!r} is observed")
    shared, local, log_q = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for sites, sign in ((prior, 1.0), (posterior, -1.0)):
        for site in sites.values():
            log_prob = sign * site["fn"].log_prob(site["value"])
            if any(frame.name == "data" for frame in site["cond_indep_stack"]):
                local = local + log_prob
            else:
                shared = shared + log_prob.sum()
    log_q = posterior[name]["fn"].log_prob(posterior[name]["value"])
    if len(log_q) != 2 or not torch.allclose(log_q.exp().sum(0), torch.ones(())):
        raise AssertionError(f"site {name!r} has not been enumerated")
    return (shared + (log_q.exp() * local).sum() * float(prior[name]["scale"])).item()


def _model_sites(model: Any, guide_trace: Any, args: Any, kwargs: Any, values: Mapping[str, Tensor]) -> dict[str, Any]:
    replayed = poutine.replay(poutine.condition(model, dict(values)), guide_trace)
    return _sites(poutine.trace(replayed).get_trace(*args, **kwargs))


def _kl_divergence(q: Any, p: Any) -> Tensor | None:
    if q is None or isinstance(q["fn"], dist.Delta):
        return None
    try:
        divergence = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return _weighted(divergence, p)


def _summed_out(run: Callable[..., dict[str, Any]], enumerated: tuple[str, ...]) -> tuple[Tensor, set[str]]:
    """The sites in the innermost plates of the enumerated ones, summed over their values, and the other names."""
    found, outside = [], set()
    for values in product([0.0, 1.0], repeat=len(enumerated)):
        sites = run({name: torch.tensor(value) for name, value in zip(enumerated, values, strict=True)})
        plates = {frame.name for name in enumerated for frame in sites[name]["cond_indep_stack"]}
        within = {name for name, site in sites.items() if plates <= {frame.name for frame in site["cond_indep_stack"]}}
        log_probs = [sites[name]["fn"].log_prob(sites[name]["value"]) for name in within]
        found.append(torch.stack(torch.broadcast_tensors(*log_probs)).sum(0))
        outside = sites.keys() - within
    (scale,) = {float(sites[name]["scale"]) for name in within}
    return scale * torch.stack(found).logsumexp(0).sum(), outside


# Structures


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


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _two(*shape: int) -> Callable[[], Any]:
    """Batches of 6 and of 4 datapoints in the first axis."""
    return lambda: ((_normal(6, *shape),), (_normal(4, *shape),))


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
def _local(x: Tensor) -> None:
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


@structure("inner plate on the left of the datapoints", lambda: ((_normal(3, 6),), (_normal(3, 4),)), plate="data")
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


@structure("all sites in an inner plate on the left", lambda: ((_normal(3, 6),), (_normal(3, 4),)), plate="data")
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
    return (_normal(6), _normal(3)), (_normal(4), _normal(3))


structure("two plates of observations", _two_plates_batches)(_two_plates)
structure('two plates of observations, `plate="xs"`', _two_plates_batches, plate="xs")(_two_plates)


@structure("plate without a size", _two(2))
def _unsized(x: Tensor) -> None:
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def _subsampled_batches() -> Any:
    return (_normal(8), torch.tensor([7, 2, 4])), (_normal(8), torch.tensor([1, 0]))


@structure("`subsample=indices`", _subsampled_batches)
def _explicit(x: Tensor, index: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x[index])


def _sized_batches() -> Any:
    return (_normal(8), 3), (_normal(8), 5)


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
    return (_normal(6, 3), torch.tensor([3, 1, 2, 3, 1, 2])), (_normal(4, 3), torch.tensor([2, 3, 1, 1]))


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


@structure("a weight for every datapoint", lambda: ((_normal(6), _normal(6).exp()), (_normal(4), _normal(4).exp())))
def _weighted_datapoints(x: Tensor, weights: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.scale(scale=weights):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("a site that is observed in some calls only", lambda: ((_normal(6), _normal(6)), (_normal(4), None)))
def _sometimes(x: Tensor, y: Tensor | None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@structure("as many latents as the call has steps", lambda: ((_normal(6, 3),), (_normal(4, 2),)))
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
    lambda: ((_normal(6, 3),), (_normal(4, 2),)),
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
    _local(x)


def _missing(size: int) -> Tensor:
    x = _normal(size, 3)
    return x.masked_fill(x.roll(1, 0) > 0.5, torch.nan)


@structure("`pyro.condition`", lambda: ((6, _normal(6)), (4, _normal(4))))
def _conditioned(size: int, x: Tensor) -> None:
    def free() -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    pyro.condition(free, {"x": x})()


_CLOSURE: dict[str, Tensor] = {}


@structure("data that are no argument of the model", lambda: (({"size": 6},), ({"size": 4},)))
def _closure(call: dict[str, int]) -> None:
    _CLOSURE["x"] = _normal(call["size"])
    _local(_CLOSURE["x"])


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
    lambda: ((_normal(6), None), (_normal(4), _LABELS)),
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


# Outcomes


@contextmanager
def _double_precision() -> Iterator[None]:
    """Double precision, validation, an empty parameter store, and warnings as errors, as in the tests.

    But for Pyro's advice to enumerate what other ELBOs than ``TraceEnum_ELBO`` draw.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        with pyro.validation_enabled(True), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "(?s).*If you want to enumerate sites, you need to use TraceEnum_ELBO")
            yield
    finally:
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()


def outcome(structure: Structure, Guide: str, Elbo: str) -> str:
    """What comes of a structure under a guide and an ELBO: ``"works"``, or the first sentence of the refusal.

    Raises:
        AssertionError: If the ELBO is not the sum over the traces.
    """
    return outcomes(structure, Guide)[Elbo]


def outcomes(structure: Structure, Guide: str) -> dict[str, str]:
    """The outcomes of a structure and a guide by ELBO; the guide is set up once."""
    with _double_precision():
        options = dict(structure.options)
        if structure.encoder is not None and Guide != "PerDatapointGuide":
            options["encoder"] = structure.encoder()
        guide = GUIDES[Guide](structure.model, **options)
        first, second = structure.batches()
        try:
            guide.setup(*first)
        except ValueError as error:
            return dict.fromkeys(structure.elbos, _first_sentence(error))
        return {Elbo: _run(structure, guide, Elbo, first, second) for Elbo in structure.elbos}


def _run(structure: Structure, guide: Any, Elbo: str, first: tuple[Any, ...], second: tuple[Any, ...]) -> str:
    elbo = ELBOS[Elbo](max_plate_nesting=NESTING)
    svi = SVI(structure.model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    result = WORKS
    for batch in (first, second):
        try:
            losses = [svi.step(*batch) for _ in range(2)]
        except (ValueError, NotImplementedError) as error:
            refused = _first_sentence(error)
            return refused if batch is first else f"{result} for the first batch, then: {refused}"
        if not torch.tensor(losses).isfinite().all():
            raise AssertionError(f"losses {losses} of {structure.title!r} under {Elbo}")
        _check_number(structure, guide, Elbo, elbo, batch)
    return result


@torch.no_grad()
def _check_number(structure: Structure, guide: Any, Elbo: str, elbo: Any, batch: tuple[Any, ...]) -> None:
    """Compares the loss with the computation by hand on the same noise."""
    model, analytic = structure.model, Elbo == "TraceMeanField_ELBO"
    guide(*batch)
    pyro.set_rng_seed(5)
    loss = elbo.loss(model, guide, *batch)
    pyro.set_rng_seed(5)
    if structure.drawn is not None and Elbo == "TraceEnum_ELBO" and not _is_observed(structure, batch):
        expected = enumerated_elbo_by_hand(model, guide, structure.drawn, *batch)
    elif Elbo == "RenyiELBO":
        expected = bound_by_hand(model, guide, *batch, count=elbo.num_particles)
    else:
        expected = elbo_by_hand(model, guide, *batch, analytic=analytic, enumerated=structure.enumerated)
    _compare(f"{structure.title!r} under {Elbo}", -loss, expected)


def _is_observed(structure: Structure, batch: tuple[Any, ...]) -> bool:
    with torch.random.fork_rng():
        return poutine.trace(structure.model).get_trace(*batch).nodes[structure.drawn]["is_observed"]


def _compare(what: str, found: float, expected: float) -> None:
    if not abs(found - expected) <= TOLERANCE * max(1.0, abs(expected)):
        raise AssertionError(f"{what}: the ELBO is {found} and should be {expected}")


def _first_sentence(error: Exception) -> str:
    """Up to the remedy."""
    return re.split(r"; try|\. |\n", str(error))[0].rstrip(".")


# Families of distributions by how plates are nested

NESTED = (
    "local latents",
    "local and global latents",
    "inner plate on the left of the datapoints",
    "inner plate on the right, datapoints at dim -2",
    "datapoints at dim -3, two inner plates",
    "all sites in an inner plate on the left",
    "all sites in two inner plates, a global latent in one of them",
    "a dimension outside of all plates",
    "observations in a subsampled inner plate",
    "`subsample=indices`",
)
"""Titles of the structures that every family is tried on. (Under masks a joint q has a normal prior in place of what is
masked, which the computation by hand does not know: exact evidence tests it.)"""


def family_outcomes(title: str, family: str) -> dict[str, str]:
    """What comes of a structure under a family, by ELBO; as for :func:`outcomes`."""
    (entry,) = (entry for entry in STRUCTURES if entry.title == title)
    entry = replace(entry, options={**entry.options, "family": family, "init_scale": 0.7})
    return outcomes(entry, "AmortizedGuide")


# Other ways to compute a loss, each on one model

Batch = tuple[Tensor, Tensor]


def _by_hand_in_order(guide: Any, batch: Batch, count: int) -> list[float]:
    return [elbo_by_hand(_explicit, guide, *batch) for _ in range(count)]


def _particles(Elbo: Any, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Draws one after the other, the ELBO their mean."""
    SVI(_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), Elbo(num_particles=3)).step(*batch)
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = Elbo(num_particles=3).loss(_explicit, guide, *batch)
        pyro.set_rng_seed(5)
        return [(-loss, sum(_by_hand_in_order(guide, batch, 3)) / 3)]


def _in_particles(fn: Callable[..., Any], size: int = 3) -> Callable[..., Any]:
    def vectorized(*args: Any, **kwargs: Any) -> None:
        with pyro.plate("particles", size, dim=-2):
            fn(*args, **kwargs)

    return vectorized


def _vectorized_particles(Elbo: Any, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Draws in a plate of particles, the ELBO their mean."""
    elbo = Elbo(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    SVI(_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(*batch)
    analytic = Elbo is TraceMeanField_ELBO
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = elbo.loss(_explicit, guide, *batch)
        pyro.set_rng_seed(5)
        total = elbo_by_hand(_in_particles(_explicit), _in_particles(guide), *batch, analytic=analytic)
        return [(-loss, total / 3)]


def _importance_weighted(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Renyi's bound of order 0, which averages the weights of every datapoint on its own."""
    elbo = RenyiELBO(alpha=0, num_particles=4)
    SVI(_local_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(*batch)
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = elbo.loss(_local_explicit, guide, *batch)
        pyro.set_rng_seed(5)
        log_p, log_q = _draws(guide, batch, 4)
        return [(-loss, ((log_p - log_q).logsumexp(0) - math.log(4)).sum().item())]


def _datapoints(guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p and log q of a draw, of every datapoint, as often as each counts."""
    guide_trace = poutine.trace(guide).get_trace(*batch)
    model_trace = poutine.trace(poutine.replay(_local_explicit, guide_trace)).get_trace(*batch)
    z, x = guide_trace.nodes["z"]["value"], model_trace.nodes["x"]
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x["value"])
    scale = len(batch[0]) / len(batch[1])
    return scale * log_p, scale * guide_trace.nodes["z"]["fn"].log_prob(z)


def _module(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """``elbo(model, guide)`` with a torch optimizer."""
    elbo = Trace_ELBO()(_explicit, guide)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-3)
    elbo(*batch).backward()
    optimizer.step()
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = elbo(*batch).item()
        pyro.set_rng_seed(5)
        return [(-loss, elbo_by_hand(_explicit, guide, *batch))]


def _compiled(Elbo: Any, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """The loss that has been compiled for one batch, on other data of its shape."""
    options = {"strict_enumeration_warning": False} if Elbo is JitTraceEnum_ELBO else {}
    elbo = Elbo(ignore_jit_warnings=True, max_plate_nesting=1, **options)
    SVI(_local, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(batch[0])
    results = []
    for data in (batch[0], batch[0].flip(0) - 1.0):
        pyro.set_rng_seed(5)
        loss = elbo.loss_and_grads(_local, guide, data)
        pyro.set_rng_seed(5)
        results.append((-loss, elbo_by_hand(_local, guide, data)))
    return results


def _compiled_mean_field(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """This compiled ELBO uses up other random numbers, with Pyro's guides too: q is made so narrow that it has none."""
    elbo = JitTraceMeanField_ELBO(ignore_jit_warnings=True)
    SVI(_local, guide, pyro.optim.Adam({"lr": 1e-12}), elbo).step(batch[0])
    results = []
    for data in (batch[0], batch[0].flip(0) - 1.0):
        loss = elbo.loss_and_grads(_local, guide, data)
        results.append((-loss, elbo_by_hand(_local, guide, data, analytic=True)))
    return results


def _wake_sleep(vectorized: bool, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Reweighted wake-sleep: the bound that trains the model, and the guide's loss, half wake and half sleep."""
    loss = ReweightedWakeSleep(
        num_particles=3,
        insomnia=0.5,
        model_has_params=True,
        num_sleep_particles=1,
        vectorize_particles=vectorized,
        max_plate_nesting=1,
    )
    SVI(_local_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step(*batch)
    with torch.no_grad():
        pyro.set_rng_seed(5)
        bound, both = (value.item() for value in loss.loss(_local_explicit, guide, *batch))
        pyro.set_rng_seed(5)
        log_p, log_q = _log_probs_in_particles(guide, batch) if vectorized else _log_probs(guide, batch)
        log_weights = log_p - log_q
        wake = -(log_weights.softmax(0) * log_q).sum().item()
        sleep = -_simulated_log_q(guide, batch)
    return [(-bound, log_weights.logsumexp(0).item() - math.log(3)), (-both, -0.5 * (wake + sleep))]


def _draws(guide: Any, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """log p and log q of several draws, one after the other, of every datapoint."""
    log_p, log_q = zip(*(_datapoints(guide, batch) for _ in range(count)), strict=True)
    return torch.stack(log_p), torch.stack(log_q)


def _log_probs(guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p and log q of three draws, one after the other."""
    log_p, log_q = _draws(guide, batch, 3)
    return log_p.sum(-1), log_q.sum(-1)


def _log_probs_in_particles(guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p and log q of three draws in a plate."""
    guide_trace = poutine.trace(_in_particles(guide)).get_trace(*batch)
    posterior = _sites(guide_trace)
    prior = _model_sites(_in_particles(_local_explicit), guide_trace, batch, {}, {})
    totals = []
    for sites in (prior, posterior):
        parts = [site["scale"] * site["fn"].log_prob(site["value"]) for site in sites.values()]
        totals.append(torch.stack([part.reshape(3, -1).sum(-1) for part in parts]).sum(0))
    return totals[0], totals[1]


def _simulated_log_q(guide: Any, batch: Batch) -> float:
    """log q, given data simulated by the model, of the latents that they were simulated from."""
    trace = poutine.trace(poutine.uncondition(_local_explicit)).get_trace(*batch)
    observations = {"x": trace.nodes["x"]["value"]}
    guide_trace = poutine.trace(poutine.replay(guide, trace)).get_trace(*batch, observations=observations)
    z, scale = trace.nodes["z"]["value"], len(batch[0]) / len(batch[1])
    if not torch.equal(guide_trace.nodes["z"]["value"], z):
        raise AssertionError("the guide has not been given the simulated latents")
    return scale * guide_trace.nodes["z"]["fn"].log_prob(z).sum().item()


def _compiled_inference(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """CSIS, Pyro's inference compilation."""
    csis = CSIS(_local_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), training_batch_size=2)
    csis.step(*batch)
    pyro.set_rng_seed(5)
    loss = csis.loss_and_grads(False, None, *batch)
    pyro.set_rng_seed(5)
    return [(-loss, sum(_simulated_log_q(guide, batch) for _ in range(2)) / 2)]


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {}
"""What computes loss and expectation, the model, and the guide's options, by what the table calls it."""


def _local_explicit(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


for _Elbo in (Trace_ELBO, TraceGraph_ELBO):
    LOSSES[f"`{_Elbo.__name__}(num_particles=3)`"] = partial(_particles, _Elbo), _explicit, {}
for _Elbo in (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO):
    LOSSES[f"`{_Elbo.__name__}(num_particles=3, vectorize_particles=True)`"] = (
        partial(_vectorized_particles, _Elbo),
        _explicit,
        {},
    )
LOSSES["`RenyiELBO(alpha=0, num_particles=4)`"] = _importance_weighted, _local_explicit, {}
LOSSES["`Trace_ELBO()(model, guide)` with a torch optimizer"] = _module, _explicit, {}
for _Elbo in (JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO):
    LOSSES[f"`{_Elbo.__name__}`"] = partial(_compiled, _Elbo), _local, {}
LOSSES["`JitTraceMeanField_ELBO`"] = _compiled_mean_field, _local, {"init_scale": 1e-12}
LOSSES["`ReweightedWakeSleep`"] = partial(_wake_sleep, False), _local_explicit, {}
LOSSES["`ReweightedWakeSleep(vectorize_particles=True)`"] = partial(_wake_sleep, True), _local_explicit, {}
LOSSES["`CSIS`"] = _compiled_inference, _local_explicit, {}


def loss_outcome(title: str, Guide: str) -> str:
    """What comes of a loss under a guide; results and exceptions as for :func:`outcome`."""
    compute, model, options = LOSSES[title]
    with _double_precision():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        guide = GUIDES[Guide](model, **options)
        x, index = _normal(8), torch.tensor([7, 2, 4])
        guide.setup(*((x,) if model is _local else (x, index)))
        try:
            results = compute(guide, (x, index))
        except ValueError as error:
            return _first_sentence(error)
        for found, expected in results:
            _compare(f"{title} and {Guide}", found, expected)
        return WORKS


# The tables


def page(
    results: Mapping[tuple[str, str], Mapping[str, str]],
    losses: Mapping[tuple[str, str], str],
    families: Mapping[tuple[str, str], Mapping[str, str]],
) -> str:
    """The page of the documentation, from outcomes by structure and guide, loss and guide, and structure and family."""
    notes: list[str] = []
    head = f" | {' | '.join(f'`{name}`' for name in GUIDES)} |\n| --- |" + " --- |" * len(GUIDES)
    lines = [f"| model{head}"]
    for entry in STRUCTURES:
        cells = [cell(results[entry.title, name], notes) for name in GUIDES]
        lines.append(f"| {entry.title} | {' | '.join(cells)} |")
    lines += ["", _LOSSES_HEAD, f"| loss{head}"]
    for title in LOSSES:
        lines.append(f"| {title} | {' | '.join(_text(losses[title, name], notes) for name in GUIDES)} |")
    lines += ["", _FAMILIES_HEAD, f"| family | {' | '.join(f'`{name}`' for name in FAMILIES)} |"]
    lines.append("| --- |" + " --- |" * len(FAMILIES))
    for title in NESTED:
        lines.append(f"| {title} | {' | '.join(cell(families[title, name], notes) for name in FAMILIES)} |")
    footnotes = [f"{i}. {_literal(note)}" for i, note in enumerate(notes, 1)]
    return "\n".join([_HEAD, *lines, "", _FOOT, "", *footnotes, ""])


_HEAD = """# What works with what

Each row is a small model, each column a guide. A plain *yes* means that the guide ran under every one of
`Trace_ELBO`, `TraceMeanField_ELBO`, `TraceGraph_ELBO`, `TraceEnum_ELBO` and `RenyiELBO`, with a second batch of another
size too, and that every ELBO equalled a sum over the sites of guide and model done by hand, and Renyi's bound (of order
0, with three draws) the mean of their weights. The numbers lead to the
error messages below; models that are refused are refused with a message, never served with a wrong ELBO.

This page is written by `python tests/compatibility.py --write`, and a test compares it with what the code does.
"""

_LOSSES_HEAD = """Other ways to train, on a model with a subsampled plate of datapoints. *Yes* means again that a step
of training ran and that the loss equalled a computation by hand.
"""

_FAMILIES_HEAD = """Families of distributions by how plates are nested, under `AmortizedGuide` and all these ELBOs.
`RenyiELBO` takes the mean weight of several draws for every entry of the plates that hold all sites of a model; along a
dimension outside of all plates too, where Pyro is told of no independence: it is a bound only if the entries are
independent and every site has the dimension, whatever the guide.
"""

_FOOT = """*first batch only*: the batch that the guide was set up with works, and the second of these models is refused
with the message given. A `PerDatapointGuide` has no answer for datapoints outside its table.

The messages, without the remedies that end them:"""


def cell(by_elbo: Mapping[str, str], notes: list[str]) -> str:
    """One cell: yes or no for all ELBOs alike, else by ELBO."""
    texts = {Elbo: _text(result, notes) for Elbo, result in by_elbo.items()}
    distinct = list(dict.fromkeys(texts.values()))
    if len(distinct) == 1:
        only = f" under `{next(iter(texts))}`" if len(texts) == 1 else ""
        return distinct[0] + only
    return "; ".join(f"{text} under {', '.join(f'`{e}`' for e in texts if texts[e] == text)}" for text in distinct)


def _text(result: str, notes: list[str]) -> str:
    if result == WORKS:
        return "yes"
    start, _, message = result.rpartition(", then: ")
    if message not in notes:
        notes.append(message)
    return f"{'first batch only' if start else 'no'} [{notes.index(message) + 1}]"


def _literal(message: str) -> str:
    return f"`{message}`" if "`" not in message else f"`` {message} ``"


def _all_results() -> tuple[Any, Any, Any]:
    found = {(entry.title, name): outcomes(entry, name) for entry in STRUCTURES for name in GUIDES}
    losses = {(title, name): loss_outcome(title, name) for title in LOSSES for name in GUIDES}
    return found, losses, {(title, name): family_outcomes(title, name) for title in NESTED for name in FAMILIES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = page(*_all_results())
    if "--write" in sys.argv:
        TABLE.write_text(text)
    else:
        print(text)
