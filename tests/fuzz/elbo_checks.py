"""ELBOs, densities, generators and summaries against computations by hand."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from by_hand import Draw, coordinates, draw, elbo, log_density, moments, renyi
from case import GAUSSIAN, REFINING, Case, Wrong, close
from guides import Stored, hold
from programs import NESTING, Module
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from structures import Structure
from torch.distributions import biject_to

__all__ = [
    "check_density",
    "check_elbo",
    "check_identity",
    "check_renyi",
    "check_repeatable",
    "check_summaries",
]

ELBOS: dict[str, Callable[..., Any]] = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, strict_enumeration_warning=False),
}

# ELBOs


def _names(s: Structure) -> list[str]:
    if s.discrete == "enumerated":
        return ["TraceEnum"]
    if s.has_anonymous:  # Pyro itself enumerates nothing beside a dimension outside all plates
        return [name for name in ELBOS if name != "TraceEnum"]
    return ["Trace", "TraceGraph"] if s.discrete != "none" else list(ELBOS)


def check_elbo(case: Case) -> None:
    """An ELBO, of one particle or several, on both batches, is log p less log q summed by hand."""
    s, random = case.structure, case.random
    name, particles = random.choice(_names(s)), random.choice([1, 1, 2, 3])
    vectorized = random.random() < 0.5 and s.discrete == "none"
    loss = ELBOS[name](num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=NESTING)
    for part in (0, 1):
        if part and s.guide.kind == "PerDatapointGuide" and s.subsample in ("whole", "unsized"):
            break
        with torch.no_grad() if random.random() < 0.5 else nullcontext():
            found = case.loss(loss, part)
            draws = _draws(case, part, particles, vectorized)
            expected = torch.cat([elbo(drawn, analytic=name == "TraceMeanField") for drawn in draws]).mean()
        close(f"{name} ELBO of {particles} particles on batch {part}", -found, expected)


def _draws(case: Case, part: int, particles: int, vectorized: bool) -> list[Draw]:
    """The draws of an ELBO with these particles, from the same seed."""
    if vectorized and particles > 1:
        return [case.draw(part, particles=particles)]
    args, kwargs = case.program.arguments(part)
    pyro.set_rng_seed(2)
    return [draw(case.structure, case.model, case.guide, args, kwargs) for _ in range(particles)]


def check_renyi(case: Case) -> None:
    """A Rényi bound is that of weights computed by hand; where there are none, it is no higher than the evidence."""
    random = case.random
    alpha, particles = random.choice([0.0, 0.5, 2.0]), random.choice([1, 2, 4])
    vectorized = random.random() < 0.5
    loss = RenyiELBO(alpha, num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=NESTING)
    with torch.no_grad():
        found = -case.loss(loss)
        draws = _draws(case, 0, particles, vectorized)
        expected = renyi(draws, alpha)
        if expected is not None:
            return close(f"Renyi bound at alpha {alpha} of {particles} particles", found, expected)
        if particles == 1:
            return close("Renyi bound of one particle", found, elbo(draws[0]).sum())
        _bounded(case)
    return None


def _bounded(case: Case) -> None:
    """The importance-weighted bound of many particles is no higher than the evidence, but for chance."""
    s = case.structure
    if not s.has_closed_form or s.globals != "none" or s.guide.kind in REFINING or s.subsampled_inner:
        return  # what is subsampled afresh in every run bounds no evidence
    loss = RenyiELBO(0.0, num_particles=200, vectorize_particles=True, max_plate_nesting=NESTING)
    bounds = torch.tensor([-case.loss(loss, seed=seed) for seed in range(4)])
    drawn = case.draw()
    with torch.enable_grad():
        if torch.as_tensor(drawn.prior[drawn.local[0]]["scale"] != 1).any():
            return  # scaled log-weights are powers of weights, whose mean is bounded by no evidence
        evidence = float(case.exact(drawn).log_evidence.sum())
    if bounds.mean() > evidence + 4 * float(bounds.std() / 2) + 0.5:
        raise Wrong(f"importance-weighted bound {float(bounds.mean()):.4f} above the log evidence {evidence:.4f}")


def check_density(case: Case) -> None:
    """log q of every datapoint is the family's at the flat latent less the log-determinant."""
    guide, family, seed = case.guide, case.structure.guide.family, 3
    args, kwargs = case.program.arguments(0)
    with torch.no_grad():
        drawn = case.draw(seed=seed)
        pyro.set_rng_seed(seed)
        q = guide.posterior(*args, **kwargs)
        z, log_det = coordinates(drawn)
        if family in GAUSSIAN:
            pyro.set_rng_seed(seed)
            by_hand = moments(family, guide.variational_parameters(*args, **kwargs))
            close("log q of the family", q.log_prob(z), by_hand.log_prob(z))
        close("log q per datapoint", log_density(drawn), q.log_prob(z) - log_det)


def check_identity(case: Case) -> None:
    """With the exact posterior in the guide, every ELBO and every Rényi bound is the log evidence in every draw."""
    s = case.structure
    guide = replace(s.guide, encoder="default", sees="observed")
    stored = Stored()
    options: dict[str, Any] = {}
    if s.guide.kind == "SemiAmortizedGuide":  # whose steps stay where they are if their gradient has no noise there
        options = {"num_steps": 0} if case.random.random() < 0.5 else {"estimator": "stl"}
    case = Case(replace(s, guide=guide), encoder=stored, **options)
    drawn = case.draw()
    exact = case.exact(drawn)
    if not hold(case.guide, stored, exact, case.program.index(0)):
        return
    expected = float((drawn.prior[drawn.local[0]]["scale"] * exact.log_evidence).sum())
    name = case.random.choice([name for name in _names(s) if name != "TraceMeanField"])  # whose KL is no draw's
    vectorized = case.random.random() < 0.5
    loss = ELBOS[name](num_particles=2, vectorize_particles=vectorized, max_plate_nesting=NESTING)
    close(f"{name} ELBO at the exact posterior", -case.loss(loss, seed=5), expected, 1e-6)
    bound = RenyiELBO(0.5, num_particles=3, vectorize_particles=vectorized, max_plate_nesting=NESTING)
    if s.subsample == "whole" and not s.has_anonymous:
        close("Renyi bound at the exact posterior", -case.loss(bound, seed=5), expected, 1e-6)


# Generators and buffers


def check_repeatable(case: Case) -> None:
    """Equal seeds give equal draws whatever ran before, and looks leave generators and buffers as they were."""
    s, guide, model = case.structure, case.guide, case.model
    first = case.draw(seed=7)
    args, kwargs = case.program.arguments(0)
    runs = model.runs.clone() if isinstance(model, Module) else None
    before = _generators()
    guide(*args, **kwargs)
    if runs is not None and not torch.equal(model.runs, runs):
        raise Wrong("a call of the guide changed a buffer of the model")
    if before[1:] != _generators()[1:] and s.guide.kind not in REFINING:
        raise Wrong("a call of the guide changed the generators of numpy or Python")
    if s.guide.kind in ("AmortizedGuide", "PerDatapointGuide") and s.subsample != "random" and not s.subsampled_inner:
        before = _generators()
        guide.variational_parameters(*args, **kwargs)
        if before != _generators():
            raise Wrong("variational_parameters changed a generator")
    second = s.guide.kind != "PerDatapointGuide" or s.subsample not in ("whole", "unsized")
    if second:
        new = case.draw(1, seed=9)
        _same("first draw of a new batch size", new, case.draw(1, seed=9))
    with torch.no_grad():
        guide.median(*case.program.arguments(0)[0], **case.program.arguments(0)[1])
    _same("draw after other calls", first, case.draw(seed=7))


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), python_random.getstate()


def _same(what: str, first: Draw, second: Draw) -> None:
    for name, site in first.posterior.items():
        if not torch.equal(site["value"], second.posterior[name]["value"]):
            raise Wrong(f"{what} of site {name!r} is another one at the same seed")


# What is known of the posterior


def check_summaries(case: Case) -> None:
    """Medians and quantiles are those of the family by hand, or of draws."""
    s, guide = case.structure, case.guide
    args, kwargs = case.program.arguments(0)
    probs = [0.1, 0.5, 0.8]
    found = guide.quantiles(probs, *args, **kwargs) if s.globals == "none" else None
    median = guide.median(*args, **kwargs)
    drawn = case.draw()
    for name, site in drawn.posterior.items():
        if name in drawn.prior and (name not in median or median[name].shape != site["value"].shape):
            raise Wrong(f"median of {name!r} has shape {median[name].shape} and its draws {site['value'].shape}")
    if s.guide.family not in GAUSSIAN or s.guide.kind in REFINING or found is None or s.discrete != "none":
        return
    q = moments(s.guide.family, guide.variational_parameters(*args, **kwargs))
    loc, start = q.mean, 0
    sd = q.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    for name in drawn.local:
        fn, value = drawn.prior[name]["fn"], drawn.posterior[name]["value"]
        transform, rank = biject_to(fn.support), value.dim() - fn.event_dim
        like = transform.inv(value).movedim(rank + s.dim, 0)
        stop = start + like.shape[1:].numel()
        for i, p in enumerate(probs):
            flat = loc[:, start:stop] + sd[:, start:stop] * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(p))
            expected = transform(flat.reshape(like.shape).movedim(0, rank + s.dim))
            close(f"quantile {p} of {name!r}", found[name][i], expected, 1e-6)
        start = stop
