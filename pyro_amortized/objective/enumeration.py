"""Summing out the discrete sites that a model enumerates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions.utils import probs_to_logits

from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_data, sample_sites

__all__ = ["Factor", "log_likelihood", "packed_factors", "summed"]

Factor = tuple[Any, frozenset[str]]
"""A packed log-probability, masked but not scaled, and the plates that it lies in."""


def packed_factors(trace: Trace) -> tuple[dict[str, Factor], set[str]]:
    """The factors of a run under ``poutine.enum`` by site, and the symbols of the dimensions to sum out."""
    sites = sample_sites(trace)
    for site in sites.values():
        _take_logarithms_once(site["fn"])
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = {site["infer"]["_enumerate_symbol"] for site in sites.values() if "_enumerate_symbol" in site["infer"]}
    return {name: _factor(site, trace) for name, site in sites.items()}, symbols


def _take_logarithms_once(fn: Any) -> None:
    """Takes those of probabilities that a plate repeats before they are repeated, where torch takes those of all."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    fn = getattr(fn, "_categorical", fn)
    probs = vars(fn).get("probs")
    if isinstance(fn, Categorical) and probs is not None and "logits" not in vars(fn):
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in probs.stride()[:-1])
        fn.logits = probs_to_logits(probs[once]).expand(probs.shape)


def _factor(site: Site, trace: Trace) -> Factor:
    factor = site["packed"]["unscaled_log_prob"]
    if "_enumerate_symbol" not in site["infer"]:
        factor = packed.scale_and_mask(factor, mask=site["packed"]["mask"])
    return factor, frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)


def depends(factor: Factor, symbols: set[str]) -> bool:
    """Whether a factor has one of the dimensions."""
    return not symbols.isdisjoint(factor[0]._pyro_dims)


def summed(factors: Iterable[Factor], symbols: set[str], trace: Trace) -> list[Tensor]:
    """The terms of the sum over the dimensions, which add up to the log of the sum of the product of all factors."""
    tree: OrderedDict[Any, list[Tensor]] = OrderedDict()
    for factor, ordinal in factors:
        tree.setdefault(ordinal, []).append(factor)
    terms = [term for group in contract_tensor_tree(tree, symbols).values() for term in group]
    return [packed.unpack(term, trace.symbol_to_dim) for term in terms]


def log_likelihood(trace: Trace, name: str, enumerated: bool) -> Tensor:
    """The log-likelihood of a data site over its batch dimensions: masked, not scaled, discrete latents summed out.

    Args:
        trace: A run of the model, under ``poutine.enum`` if it has discrete latents to sum out.
        name: The site.
        enumerated: Whether it has any.

    Returns:
        Nats, of the site's batch shape; of size 1 where a plate lies within a discrete latent.
    """
    site: Site = trace.nodes[name]  # type: ignore[assignment]
    if enumerated:
        factors, symbols = packed_factors(trace)
        if depends(factors[name], symbols):
            return _marginal_log_likelihood(trace, name, factors, symbols)
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def _marginal_log_likelihood(trace: Trace, name: str, factors: dict[str, Factor], symbols: set[str]) -> Tensor:
    r""":math:`\log \sum_k p(x, z, k) - \log \sum_k p(z, k)` over the discrete latents k that the site depends on."""
    sites = sample_sites(trace)
    factors = {n: factor for n, factor in factors.items() if n == name or not is_data(sites[n])}
    reached, members = set(factors[name][0]._pyro_dims) & symbols, {name}
    grown = True
    while grown:  # all that the discrete latents of this site are connected with
        found = {n for n, factor in factors.items() if depends(factor, reached)}
        grown = found != members
        members = found
        reached |= {s for n in members for s in factors[n][0]._pyro_dims if s in symbols}
    connected = {n: factor for n, factor in factors.items() if n in members}
    joint: Any = sum(summed(connected.values(), symbols, trace))
    del connected[name]
    return joint - sum(summed(connected.values(), symbols, trace))
