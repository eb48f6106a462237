r"""One run of a model as the log-joints of its datapoints.

With the global latents held at given values, a model with a datapoint plate is a product over datapoints, so that
:math:`\log p(x_n, z)` is defined for each of them on its own. The plate's subsampling scale N/B is removed, masks and
the model's own ``poutine.scale`` are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_amortized.objective.draws import draws_plate
from pyro_amortized.objective.enumeration import depends, packed_factors, summed
from pyro_amortized.objective.unconstrained import unconstrained_log_prob
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.masking import SiteMask, site_mask
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import sample_sites

__all__ = ["Evaluation"]


@dataclass
class Evaluation:
    """Evaluates the log-joint of every datapoint in one run of the model.

    Attributes:
        call: The call of the model; it has local latents.
        num_draws: K; more than one in an outermost plate.
        with_priors: Whether the local latents' densities count.
        validate: Whether Pyro checks the values.
    """

    call: ModelCall
    num_draws: int
    with_priors: bool = True
    validate: bool = True

    @property
    def _layout(self) -> SiteLayout:
        return self.call.structure.layout  # type: ignore[return-value]

    def __call__(self, z: Tensor, normal: tuple[Tensor, Tensor] | None = None) -> Tensor:
        r"""Log-joints ``(K, N)`` in nats at ``(K, N, D)``; given location and scale of a normal q, less log q.

        For every site whose prior allows it, :math:`\log p(z) - \log q(z)` is then replaced by its expectation
        :math:`-\mathrm{KL}(q \| p)`, given the sites before it.
        """
        parts, values, log_dets = self._split(z), {}, {}
        posteriors: dict[str, dist.TorchDistribution] = {}
        if normal is not None:
            locs, scales = (self._split(part.expand_as(z)) for part in normal)
            posteriors = {site.name: site.normal(locs[site.name], scales[site.name]) for site in self._layout.sites}
        for site in self._layout.sites:
            values[site.name], log_dets[site.name] = site.constrain(parts[site.name])
        with nullcontext() if self.validate else pyro.validation_enabled(False):
            trace = self.call.run(values, self._handlers())
            summed_out, done = self._sum_out(trace)
            self._check_values(trace, values)
            log_joint = z.new_zeros(z.shape[:2]) + summed_out
            for site in self._layout.sites if self.with_priors else ():
                node: Site = trace.nodes[site.name]  # type: ignore[assignment]
                weight = site_mask(node)
                is_plain = not (site.is_real or posteriors or weight.is_masked or site.name in done)
                stable = unconstrained_log_prob(node["fn"], site.transform, parts[site.name]) if is_plain else None
                if stable is not None:
                    log_joint = log_joint + self._per_datapoint(_scaled(stable, node, self._frame(node)))
                    done.add(site.name)
                elif weight.is_masked or not (site.is_real or posteriors):
                    term = site.log_det_and_padding(log_dets[site.name], parts[site.name], weight)
                    log_joint = log_joint + self._per_datapoint(term)
            return log_joint + self._sum_sites(sample_sites(trace), posteriors, done)

    def of_run(self, trace: Trace) -> Tensor:
        """Log-probabilities ``(K, N)`` in nats of a run, of a model or a guide: of values in their supports."""
        summed_out, done = self._sum_out(trace)
        return (
            self.of_sites({name: site for name, site in sample_sites(trace).items() if name not in done}) + summed_out
        )

    def of_sites(self, sites: Mapping[str, Site]) -> Tensor:
        """Log-probabilities ``(K, N)`` of those of some sites that lie in the datapoint plate."""
        total = self._sum_sites(sites, {}, set())
        shape = self.num_draws, self.call.structure.datapoints.size
        return total.expand(shape) if isinstance(total, Tensor) else torch.full(shape, total)

    def outside(self, trace: Trace) -> dict[str, Tensor]:
        """Log-probabilities of a run's sites outside of the datapoint plate by name, masked and scaled, nats."""
        sites = {name: site for name, site in sample_sites(trace).items() if self.scale_of(site) is None}
        return {n: scale_and_mask(_log_prob(site), site["scale"], site["mask"]).sum() for n, site in sites.items()}

    def scale_of(self, site: Site) -> float | Tensor | None:
        """The model's own scale of a site of the datapoints, without those of subsamples; None for other sites."""
        frame = self._group_frame(site)
        return site_mask(site).scale if self._frame(site) else None if frame is None else self._group_scale(site, frame)

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        return self._layout.split(z, self.call.structure.depth) if self.num_draws > 1 else self._layout.split(z[0])

    def _handlers(self) -> list[Any]:
        depth = self.call.structure.depth
        handlers: list[Any] = [draws_plate(self.num_draws, depth)] if self.num_draws > 1 else []
        if self.call.structure.enumerated:
            handlers.append(poutine.enum(first_available_dim=-depth - 2))
        return handlers

    def _check_values(self, trace: Trace, values: Mapping[str, Tensor]) -> None:
        """Raises a ValueError if the run has latents that are given no value."""
        given = {*values, *self.call.given}
        for name, site in sample_sites(trace).items():
            if not site["is_observed"] and name not in given and "_enumerate_symbol" not in site["infer"]:
                raise ValueError(
                    f"Cannot evaluate the model's log-joint because site {name!r} is latent and the guide has no value "
                    "for it; try a model with the same latents in every run, whatever the values of its latents."
                )

    def _sum_out(self, trace: Trace) -> tuple[Tensor | float, set[str]]:
        """The part of the log-joint in which discrete sites are summed out, and the names of the sites in it."""
        if not self.call.structure.enumerated:
            return 0.0, set()
        factors, symbols = packed_factors(trace)
        sites, scales = sample_sites(trace), []
        factors = {n: f for n, f in factors.items() if depends(f, symbols) and not self._is_left_out(n)}
        for name in factors:
            frame = self._frame(sites[name])
            if frame is None:
                raise ValueError(
                    f"Cannot evaluate datapoints on their own because site {name!r} belongs to a discrete latent that "
                    f"is enumerated outside of plate {self._layout.plate!r}; try a discrete latent inside "
                    f"the plate, or for "
                    "entries in long format their mixture itself, dist.MixtureSameFamily(...)."
                )
            scales.append(sites[name]["scale"] * (frame.size / frame.full_size if frame.full_size else 1.0))
        if len({float(scale) for scale in scales}) > 1:
            raise ValueError(
                f"Cannot sum out the discrete latents among sites {sorted(factors)} because they have different "
                "scales; try poutine.scale around all of them."
            )
        total: Any = sum(self._per_datapoint(term) for term in summed(factors.values(), symbols, trace))
        return total * scales[0] if scales else total, set(factors)

    def _sum_sites(
        self, sites: Mapping[str, Site], posteriors: Mapping[str, dist.TorchDistribution], done: set[str]
    ) -> Tensor | float:
        total: Tensor | float = 0.0
        for name, site in sites.items():
            frame = self._frame(site)
            if frame is None:
                total = total + self._of_groups(site)
                continue
            if name in done or self._is_left_out(name):
                continue
            posterior = posteriors.get(name)
            if posterior is None:
                term = _scaled(_log_prob(site), site, frame)
            else:
                weight = site_mask(site)
                term = (
                    _masked_minus_kl(posterior, site, frame, weight)
                    if weight.is_masked
                    else _scaled(_minus_kl(posterior, site), site, frame)
                )
            total = total + self._per_datapoint(term)
        return total

    def _of_groups(self, site: Site) -> Tensor | float:
        """What the entries of a plate in long format add to their datapoints, ``(K, N)``."""
        frame = self._group_frame(site)
        if frame is None:
            return 0.0
        rank, datapoints = self.call.structure.depth + 1, self.call.structure.datapoints
        term = scale_and_mask(_log_prob(site), self._group_scale(site, frame), site["mask"])
        term = term.reshape((1,) * (rank - term.dim()) + term.shape)
        others = [axis for axis in range(1, rank) if axis != rank + frame.dim]
        term = term.sum(others) if others else term
        index = self.call.structure.groups[frame.name].datapoints.to(term.device)
        term = term.expand(self.num_draws, len(index))
        return term.new_zeros(self.num_draws, datapoints.size).index_add(1, index, term)

    def _group_frame(self, site: Site) -> Any:
        """The plate in long format in a site's stack, or None."""
        groups = self.call.structure.groups
        return next((frame for frame in site["cond_indep_stack"] if frame.name in groups), None)

    def _group_scale(self, site: Site, frame: Any) -> float | Tensor:
        """The scale of a site in a plate in long format, without those of subsamples."""
        datapoints = self.call.structure.datapoints
        scale = site["scale"] / (frame.full_size / frame.size if frame.full_size else 1.0)
        subsampling = datapoints.full_size / datapoints.size
        if isinstance(scale, Tensor) or scale != 1.0:  # with that of the datapoints, which a minibatch's entries share
            return scale / subsampling
        return 1.0

    def _is_left_out(self, name: str) -> bool:
        return not self.with_priors and any(site.name == name for site in self._layout.sites)

    def _frame(self, site: Site) -> Any:
        """The datapoint plate in a site's stack, or None."""
        return next((frame for frame in site["cond_indep_stack"] if frame.name == self._layout.plate), None)

    def _per_datapoint(self, log_prob: Tensor) -> Tensor:
        """Sums over all batch dimensions but those of the draws and of the datapoints: ``(K, N)``."""
        rank = self.call.structure.depth + 1
        log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
        others = [axis for axis in range(1, rank) if axis != rank + self._layout.dim]
        total = log_prob.sum(others) if others else log_prob
        return total.expand(self.num_draws, self.call.structure.datapoints.size)


def _log_prob(site: Site) -> Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def _minus_kl(posterior: dist.TorchDistribution, site: Site) -> Tensor:
    """Minus the KL divergence of a posterior from the prior of a site, or one draw's estimate of it."""
    try:
        return -kl_divergence(posterior, site["fn"])
    except NotImplementedError:
        return _log_prob(site) - posterior.log_prob(site["value"])


def _masked_minus_kl(posterior: dist.TorchDistribution, site: Site, frame: Any, weight: SiteMask) -> Tensor:
    """One draw's estimate of minus the KL divergence, where masked entries have a posterior but no prior."""
    return _scaled(_log_prob(site), site, frame) - posterior.log_prob(site["value"]) * weight.scale


def _scaled(log_prob: Tensor, site: Site, frame: Any) -> Tensor:
    """With the masks and scales of a site, but without the subsampling scale of ``frame``."""
    subsampling = frame.full_size / frame.size if frame.full_size else 1.0
    return scale_and_mask(log_prob, site["scale"] / subsampling, site["mask"])
