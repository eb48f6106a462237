"""The log-likelihood of one observed site in a run of the model."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_data, sample_sites

__all__ = ["log_likelihood"]


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
        trace.compute_log_prob()
        trace.pack_tensors()
        symbols = {
            s["infer"]["_enumerate_symbol"] for s in sample_sites(trace).values() if "_enumerate_symbol" in s["infer"]
        }
        if not symbols.isdisjoint(site["packed"]["unscaled_log_prob"]._pyro_dims):
            return _marginal_log_likelihood(trace, name, symbols)
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def _marginal_log_likelihood(trace: Trace, name: str, symbols: set[str]) -> Tensor:
    r""":math:`\log \sum_k p(x, z, k) - \log \sum_k p(z, k)` over the discrete latents k that the site depends on."""
    factors = {
        n: (_factor(site), frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized))
        for n, site in sample_sites(trace).items()
        if n == name or not is_data(site)
    }
    reached, members = set(factors[name][0]._pyro_dims) & symbols, {name}
    grown = True
    while grown:  # all that the discrete latents of this site are connected with
        found = {n for n, (factor, _) in factors.items() if not reached.isdisjoint(factor._pyro_dims)}
        grown = found != members
        members = found
        reached |= {s for n in members for s in factors[n][0]._pyro_dims if s in symbols}
    connected = [n for n in factors if n in members]
    joint = _summed([factors[n] for n in connected], symbols, trace)
    return joint - _summed([factors[n] for n in connected if n != name], symbols, trace)


def _factor(site: Site) -> Any:
    factor = site["packed"]["unscaled_log_prob"]
    if "_enumerate_symbol" in site["infer"]:
        return factor
    return packed.scale_and_mask(factor, mask=site["packed"]["mask"])


def _summed(factors: list[tuple[Any, frozenset[str]]], symbols: set[str], trace: Trace) -> Tensor:
    tree: OrderedDict[Any, list[Tensor]] = OrderedDict()
    for factor, ordinal in factors:
        tree.setdefault(ordinal, []).append(factor)
    terms = [term for group in contract_tensor_tree(tree, symbols).values() for term in group]
    total: Any = 0.0
    for term in terms:
        total = total + packed.unpack(term, trace.symbol_to_dim)
    return total
