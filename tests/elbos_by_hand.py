"""ELBOs and Renyi's bound by hand, from the traces of guide and model."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

NESTING = 3
"""Number of plates that the ELBOs make room for."""


def trace_sites(trace: Any) -> dict[str, Any]:
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
    posterior = trace_sites(guide_trace)
    run = partial(model_sites, model, guide_trace, args, kwargs)
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
        prior, posterior = model_sites(model, guide_trace, args, {}, {}), trace_sites(guide_trace)
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
    posterior = trace_sites(guide_trace)
    prior = model_sites(model, guide_trace, args, {}, {})
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


def model_sites(model: Any, guide_trace: Any, args: Any, kwargs: Any, values: Mapping[str, Tensor]) -> dict[str, Any]:
    replayed = poutine.replay(poutine.condition(model, dict(values)), guide_trace)
    return trace_sites(poutine.trace(replayed).get_trace(*args, **kwargs))


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
