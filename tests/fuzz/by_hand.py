"""What ELBOs, densities, posteriors and evidence must be, from runs of Pyro's handlers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from programs import NESTING
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from structures import Structure
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

__all__ = ["Draw", "Exact", "LogJoint", "draw", "elbo", "normal_elbo", "renyi"]


@dataclass
class Draw:
    """Runs of a guide and of the model at its draw; ``again`` runs the model without any."""

    structure: Structure
    guide_trace: Any
    model_trace: Any
    again: Callable[[], Any]

    @cached_property
    def prior(self) -> dict[str, Any]:
        """The model's sites."""
        return _sites(self.model_trace)

    @cached_property
    def posterior(self) -> dict[str, Any]:
        """The guide's sites."""
        return _sites(self.guide_trace)

    @cached_property
    def local(self) -> list[str]:
        """Names of the latents in the datapoint plate."""
        found = [name for name, site in self.prior.items() if not site["is_observed"] and _in(site, "data")]
        return [name for name in found if name in self.posterior and name != "k"]

    def term(self, name: str, *, guide: bool) -> Tensor:
        """Scale times mask times log-density of a site; scale and mask are those that the model gives."""
        site = (self.posterior if guide else self.prior)[name]
        weights = self.prior.get(name, site)
        if guide and name not in self.prior:  # a flat latent, which counts as the sites do that are made of it
            like = self.local[0] if _in(site, "data") else "w"
            weights = {"scale": self.prior[like]["scale"], "mask": None}
        elif guide and _is_delta(site["fn"]):  # masked parts of a flat latent are padded, not left out
            weights = {"scale": weights["scale"], "mask": None}
        return weigh(site["fn"].log_prob(site["value"]), weights)


def draw(structure: Structure, model: Any, guide: Any, args: Any, kwargs: Any, particles: int = 1) -> Draw:
    """One draw of the guide with the model run at it."""
    if particles > 1:
        model, guide = (_in_particles(fn, particles) for fn in (model, guide))
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, guide_trace)
    if structure.discrete == "enumerated":  # which draws nothing
        replayed = poutine.condition(replayed, {"k": torch.tensor(0.0)})
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return Draw(structure, guide_trace, model_trace, lambda: model(*args, **kwargs))


def _in_particles(fn: Any, particles: int) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("particles", particles, dim=-1 - NESTING):
            return fn(*args, **kwargs)

    return run


def _sites(trace: Any) -> dict[str, Any]:
    nodes = trace.nodes.items()
    return {name: site for name, site in nodes if site["type"] == "sample" and not site_is_subsample(site)}


def _is_delta(fn: Any) -> bool:
    return type(fn).__name__.endswith("Delta")


def _in(site: Any, plate: str) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def weigh(value: Tensor, site: Any) -> Tensor:
    """Scale times mask times value."""
    if site["mask"] is not None:
        value = torch.where(torch.as_tensor(site["mask"]), value, torch.zeros_like(value))
    return value * site["scale"]


def _weighted(site: Any) -> Tensor:
    return weigh(site["fn"].log_prob(site["value"]), site)


def reduced(value: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Sums over all dimensions but some, counted from the right, and that of particles."""
    value = value.reshape((1,) * (1 + NESTING - value.dim()) + tuple(value.shape))
    others = [d for d in range(-NESTING, 0) if d not in keep]
    return value.sum(others, keepdim=True) if others else value


# ELBOs


def elbo(drawn: Draw, *, analytic: bool = False, keep: tuple[int, ...] = ()) -> Tensor:
    """log p minus log q of a draw, for each particle and each entry of the plates at dims ``keep``."""
    prior, posterior = drawn.prior, drawn.posterior
    if drawn.structure.discrete == "enumerated":
        return _summed_out(drawn)
    missing = {name for name, site in prior.items() if not site["is_observed"]} - posterior.keys()
    assert not missing, f"sites {sorted(missing)} of the model have no guide"
    total, done = torch.zeros((1,) * (1 + NESTING)), set()
    for name, site in prior.items():
        divergence = _kl_divergence(posterior.get(name), site) if analytic and name in posterior else None
        if divergence is None:
            total = total + reduced(drawn.term(name, guide=False), keep)
        else:
            total = total - reduced(divergence, keep)
            done.add(name)
    for name in posterior.keys() - done:
        total = total - reduced(drawn.term(name, guide=True), keep)
    return total


def _kl_divergence(q: Any, p: Any) -> Tensor | None:
    if _is_delta(q["fn"]):
        return None
    try:
        return weigh(kl_divergence(q["fn"], p["fn"]), p)
    except NotImplementedError:
        return None


def _summed_out(drawn: Draw) -> Tensor:
    """The ELBO with the binary site k of the datapoints summed out."""
    dim, found, shared, scale = drawn.structure.dim, [], torch.zeros(()), 1.0
    for k in (0.0, 1.0):
        replayed = poutine.replay(poutine.condition(drawn.again, {"k": torch.tensor(k)}), drawn.model_trace)
        sites = _sites(poutine.trace(replayed).get_trace()).values()
        scale = float(next(site["scale"] for site in sites if site["name"] == "k"))
        inside = [site for site in sites if _in(site, "data")]
        found.append(sum((reduced(_weighted(site), (dim,)) for site in inside), torch.zeros(())) / scale)
        shared = sum((reduced(_weighted(site), ()) for site in sites if not _in(site, "data")), torch.zeros(()))
    total = scale * reduced(torch.stack(found).logsumexp(0), ()) + shared
    for name in drawn.posterior:
        total = total - reduced(drawn.term(name, guide=True), ())
    return total


def renyi(draws: list[Draw], alpha: float) -> Tensor | None:
    """The bound that Pyro defines: a mean over particles for each entry of the plates that all sites share.

    None where the guide's sites lie in fewer plates, so that their entries have no weights of their own.
    """
    stacks = [{f.name: f.dim for f in s["cond_indep_stack"] if f.name != "particles"} for s in draws[0].prior.values()]
    common = set.intersection(*(set(stack) for stack in stacks))
    if any(not common <= {f.name for f in s["cond_indep_stack"]} for s in draws[0].posterior.values()):
        return None
    keep = tuple(stacks[0][name] for name in common)
    log_weights = torch.cat([elbo(drawn, keep=keep) for drawn in draws]) * (1.0 - alpha)
    return (log_weights.logsumexp(0) - math.log(len(log_weights))).sum() / (1.0 - alpha)


# Coordinates and densities of datapoints


def coordinates(drawn: Draw) -> tuple[Tensor, Tensor]:
    """Flat unconstrained latents ``(K, N, D)`` of a draw, and the log-determinants ``(K, N)``."""
    dim, flat, log_dets = drawn.structure.dim, [], []
    for name in drawn.local:
        value, fn = drawn.posterior[name]["value"], drawn.prior[name]["fn"]
        transform = biject_to(fn.support)
        u = transform.inv(value)
        log_det = transform.log_abs_det_jacobian(u, value)
        rank = value.dim() - fn.event_dim
        u, log_det = (part.reshape((1,) * (1 + NESTING - rank) + tuple(part.shape)) for part in (u, log_det))
        flat.append(u.movedim(1 + NESTING + dim, 1).flatten(2))
        log_dets.append(log_det.movedim(1 + NESTING + dim, 1).flatten(2).sum(-1))
    return torch.cat(flat, -1), torch.stack(log_dets).sum(0)


def log_density(drawn: Draw) -> Tensor:
    """log q of the local latents of every datapoint ``(K, N)``, without scales, as the guide's sites have it."""
    total: Any = 0.0
    for name, site in drawn.posterior.items():
        if _in(site, "data") and not site["is_observed"] and name != "k":
            log_prob = reduced(site["fn"].log_prob(site["value"]), (drawn.structure.dim,))
            total = total + log_prob.reshape(len(log_prob), -1)
    return total


def normal_log_prob(family: str, phi: Tensor, z: Tensor) -> Tensor:
    """Log-density of the mean-field or the full-rank normal at flat latents ``(K, N, D)``."""
    return moments(family, phi).log_prob(z)


def moments(family: str, phi: Tensor) -> torch.distributions.MultivariateNormal:
    """The mean-field or the full-rank normal of phi ``(N, P)``."""
    dim = phi.shape[-1] // 2 if family == "normal" else _latent_dim(phi.shape[-1])
    loc, log_scale, entries = phi.split([dim, dim, phi.shape[-1] - 2 * dim], -1)
    relative = torch.eye(dim).repeat(len(phi), 1, 1)
    if family != "normal":
        row, column = torch.tril_indices(dim, dim, -1)
        relative[:, row, column] = entries
    scale_tril = log_scale.exp().unsqueeze(-1) * relative
    return torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)


def _latent_dim(num_params: int) -> int:
    return next(d for d in range(1, num_params + 1) if 2 * d + d * (d - 1) // 2 == num_params)


class LogJoint:
    """log p(x_n, z_n) with the log-determinant at flat latents ``(N, D)``, without the scale of the datapoint plate."""

    def __init__(self, drawn: Draw, model: Any, args: Any, kwargs: Any, fixed: Mapping[str, Tensor]) -> None:
        self.drawn, self.dim, self.fixed = drawn, drawn.structure.dim, dict(fixed)
        self.run: Callable[[], Any] = lambda: model(*args, **kwargs)
        index = drawn.model_trace.nodes.get("data", {}).get("value")
        if isinstance(index, Tensor):
            self.fixed["data"] = index

    def __call__(self, flat: Tensor) -> Tensor:
        values, total, start = dict(self.fixed), torch.zeros(len(flat)), 0
        for name in self.drawn.local:
            site = self.drawn.prior[name]
            transform, rank = biject_to(site["fn"].support), site["value"].dim() - site["fn"].event_dim
            like = transform.inv(site["value"])
            shape = like.movedim(rank + self.dim, 0).shape
            stop = start + shape[1:].numel()
            u = flat[:, start:stop].reshape(shape).movedim(0, rank + self.dim)
            values[name], start = transform(u), stop
            log_det = transform.log_abs_det_jacobian(u, values[name])
            total = total + log_det.movedim(rank + self.dim, 0).flatten(1).sum(-1) if rank > 1 else total + log_det
        trace = poutine.trace(poutine.condition(self.run, values)).get_trace()
        frame = next(f for s in _sites(trace).values() for f in s["cond_indep_stack"] if f.name == "data")
        full = self.drawn.structure.size if self.drawn.structure.subsample in ("explicit", "random") else frame.size
        for site in _sites(trace).values():
            if _in(site, "data"):
                term = reduced(_weighted(site), (self.dim,)) * frame.size / full
                total = total + term.reshape(-1)
        return total


@dataclass
class Exact:
    """The normal posterior of every datapoint in flat coordinates, and its evidence, of a quadratic log-joint."""

    mean: Tensor
    precision: Tensor
    log_evidence: Tensor

    @classmethod
    def of(cls, log_joint: LogJoint, num_datapoints: int, latent_dim: int) -> Exact:
        def gradient(z: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_()
            value = log_joint(z)
            return value.detach(), torch.autograd.grad(value.sum(), z)[0]

        zero = torch.zeros(num_datapoints, latent_dim)
        value, slope = gradient(zero)
        rows = [slope - gradient(zero + torch.eye(latent_dim)[d])[1] for d in range(latent_dim)]
        precision = torch.stack(rows, -2)
        mean = torch.linalg.solve(precision, slope.unsqueeze(-1)).squeeze(-1)
        log_evidence = value + 0.5 * (mean * slope).sum(-1) + 0.5 * latent_dim * math.log(2 * math.pi)
        found = cls(mean, precision, log_evidence - 0.5 * torch.logdet(precision))
        z = torch.linspace(-1.0, 1.0, zero.numel()).reshape(zero.shape)
        expected = found.log_evidence + found.posterior.log_prob(z)
        assert torch.allclose(log_joint(z), expected, atol=1e-6), "the fuzzer's own log-joint is not quadratic"
        return found

    @property
    def posterior(self) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(self.mean, precision_matrix=self.precision)


def normal_elbo(exact: Exact, q: torch.distributions.MultivariateNormal) -> Tensor:
    """The ELBO ``(N,)`` of a normal q: the evidence less its divergence from the posterior."""
    return exact.log_evidence - kl_divergence(q, exact.posterior)
