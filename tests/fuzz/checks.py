"""All checks of a structure. Each raises a :class:`Wrong` where a number is not what it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pyro
import torch
from by_hand import Draw, Exact, LogJoint, coordinates, elbo, moments, normal_elbo
from case import GAUSSIAN, REFINING, Case, Wrong, close, short
from elbo_checks import check_density, check_elbo, check_identity, check_renyi, check_repeatable, check_summaries
from guides import Bounded, build
from programs import NESTING, Program
from pyro import poutine
from pyro.infer import Trace_ELBO
from structures import Structure
from torch import Tensor

from pyro_amortized import GradientAscent, estimate_gaps, log_evidence, to_arviz
from pyro_amortized.structure.reader import StructureReader

__all__ = ["CHECKS", "chosen", "make"]

# Refinement


def check_refined(case: Case) -> None:
    """Refinement goes towards the optimum, and does not depend on whether graphs are traced."""
    s = case.structure
    args, kwargs = case.program.arguments(0)
    layout = case.guide.layout
    particles = 8 if layout is None else max(8, layout.latent_dim)  # Newton steps on fewer draws than latents are slow
    guide = case.guide.refined(5, num_particles=particles, fixed_noise=True)
    phi = guide.variational_parameters(*args, **kwargs)
    drawn = case.draw()
    if s.has_closed_form and s.globals == "none" and s.guide.family in GAUSSIAN and s.guide.kind not in REFINING:
        exact = case.exact(drawn)
        start = moments(s.guide.family, case.guide.variational_parameters(*args, **kwargs).detach())
        before, after = (normal_elbo(exact, q) for q in (start, moments(s.guide.family, phi.detach())))
        best = _optimum(exact, s.guide.family)
        left = (best - after) - 0.5 * (best - before)
        if (left > 0.05).any():
            raise Wrong(f"five Newton steps went from {short(before)} to {short(after)}; the optimum is {short(best)}")


def _optimum(exact: Exact, family: str) -> Tensor:
    if family != "normal":
        return exact.log_evidence
    scale = exact.precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    return normal_elbo(exact, torch.distributions.MultivariateNormal(exact.mean, scale_tril=scale.diag_embed()))


def check_traced(case: Case) -> None:
    """Answers and gradients of unrolled steps are the same where the model can be traced and where it cannot."""
    s, found = case.structure, []
    if s.detach == "none" and case.random.random() < 0.5:
        s = replace(s, guide=replace(s.guide, encoder="features"))
    for traceable in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(11)
        program = Program(replace(s, traceable=traceable))
        encoder = {} if s.guide.encoder in ("pair", "features") else {"encoder": Bounded()}
        guide = build(program, **_unrolled(), **encoder)
        args, kwargs = program.arguments(0)
        guide.setup(*args, **kwargs)
        for _ in range(2):
            pyro.set_rng_seed(12)
            phi = guide.variational_parameters(*args, **kwargs)
        weights = torch.linspace(0.5, 1.5, phi.numel()).reshape(phi.shape)
        parameters = [p for p in guide.inference.parameters() if p.requires_grad]
        gradient = torch.autograd.grad((weights * phi).sum(), parameters, allow_unused=True)
        found.append([phi, *(g for g in gradient if g is not None)])
    for i, (traced, plain) in enumerate(zip(*found, strict=True)):
        close("phi of traced steps" if i == 0 else "gradient through traced steps", traced, plain, 1e-6)


def _unrolled() -> dict[str, Any]:
    return {"num_steps": 2, "num_particles": 2, "update": GradientAscent(0.05), "fixed_noise": True, "keep_best": False}


def check_gradient(case: Case) -> None:
    """The gradient through unrolled steps is that of finite differences."""
    s = case.structure
    guide = replace(s.guide, encoder="features" if s.guide.encoder != "pair" else "pair")
    case = Case(replace(s, guide=guide), **_unrolled())
    args, kwargs = case.program.arguments(0)
    shift = next(p for name, p in case.guide.inference.named_parameters() if name.endswith("shift"))

    def answer() -> Tensor:
        phi = case.guide.variational_parameters(*args, **kwargs)
        return (torch.linspace(0.5, 1.5, phi.numel()).reshape(phi.shape) * phi).sum()

    gradient = torch.autograd.grad(answer(), shift)[0]
    slopes = []
    for step in (1e-5, 1e-7):  # at one of them there may be a kink in between
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                shift.add_(sign * step)
                values.append(float(answer()))
                shift.sub_(sign * step)
        slopes.append((values[0] - values[1]) / (2 * step))
    known = (
        abs(slopes[0] - slopes[1]) <= 0.1 * max(map(abs, slopes)) + 1e-4
    )  # not so where steps throw what is far out about
    if known and not torch.isclose(gradient, torch.tensor(slopes[1]), rtol=1e-5, atol=1e-5):
        close("gradient through unrolled steps", gradient, slopes[0], 1e-5)


# Diagnostics


def _evidence(case: Case) -> tuple[Tensor, Draw]:
    """The log evidence of every datapoint, with global latents at the guide's median."""
    args, kwargs = case.program.arguments(0)
    drawn = case.draw()
    median = case.guide.median(*args, **kwargs)
    fixed = {"w": median["w"]} if "w" in median else {}
    flat = coordinates(drawn)[0][0]
    return Exact.of(LogJoint(drawn, case.model, args, kwargs, fixed), *flat.shape).log_evidence, drawn


def check_evidence(case: Case) -> None:
    """The estimated log evidence is within 4 standard errors of the closed form, or called unreliable."""
    args, kwargs = case.program.arguments(0)
    expected = _evidence(case)[0]
    off = torch.ones(len(expected), dtype=torch.bool)
    for seed in (0, 1):  # once in a while chance alone is that far off; not twice
        found = log_evidence(case.model, case.guide, args, kwargs, tolerance=0.1, max_samples=2000, seed=seed)
        error = torch.as_tensor(found.log_evidence.values) - expected
        off &= (error.abs() > 4 * torch.as_tensor(found.log_evidence_se.values) + 1e-6) & torch.as_tensor(
            found.khat.values < 0.5
        )
        if not off.any():
            return
    raise Wrong(f"log evidence {found.log_evidence.values.tolist()} should be {expected.tolist()}")


def check_gaps(case: Case) -> None:
    """Evidence and both ELBOs of a gap estimate are the closed forms within 4 standard errors, or unreliable."""
    s = case.structure
    args, kwargs = case.program.arguments(0)
    expected, drawn = _evidence(case)
    found = estimate_gaps(case.model, case.guide, args, kwargs, tolerance=0.1, max_samples=2000).dataset
    reliable = torch.as_tensor(found.reliable.values)
    values = {"log_evidence": expected}
    if s.guide.family in GAUSSIAN and s.globals == "none":
        values["elbo_optimal"] = _optimum(case.exact(drawn), s.guide.family)
    for name, value in values.items():
        error = torch.as_tensor(found[name].values) - value
        if (reliable & (error.abs() > 5 * torch.as_tensor(found[f"{name}_se"].values) + 0.01)).any():
            raise Wrong(f"{name} {found[name].values.tolist()} should be {value.tolist()}")


def check_arviz(case: Case) -> None:
    """An export has the shapes of the draws, and its log-likelihood is the model's at them."""
    args, kwargs = case.program.arguments(0)
    found = to_arviz(case.model, case.guide, args, kwargs, num_samples=2, groups=["posterior", "log_likelihood"])
    drawn = case.draw()
    posterior = found["posterior"]
    for name, site in drawn.posterior.items():
        if name not in drawn.prior:
            continue
        sizes = [sorted(n for n in shape if n > 1) for shape in (posterior[name].shape[2:], site["value"].shape)]
        if sizes[0] != sizes[1]:
            raise Wrong(f"exported {name!r} has sizes {sizes[0]} and a draw {sizes[1]}")
    if case.structure.subsample == "random" or case.structure.subsampled_inner or case.structure.discrete != "none":
        return
    for k in range(2):
        values = {n: _value(posterior[n][0, k], drawn.posterior[n]) for n in drawn.posterior if n in drawn.prior}
        trace = poutine.trace(poutine.condition(partial(case.model, *args, **kwargs), values)).get_trace()
        for name, site in Draw(case.structure, trace, trace, lambda: None).prior.items():
            if name in found["log_likelihood"]:
                expected = torch.as_tensor(site["fn"].log_prob(site["value"]))
                if site["mask"] is not None:
                    expected = torch.where(torch.as_tensor(site["mask"]), expected, torch.zeros_like(expected))
                got = torch.as_tensor(found["log_likelihood"][name].values[0, k])
                close(f"log likelihood of {name!r}", got.sum(), expected.sum())


def _value(value: Any, site: Any) -> Tensor:
    """An exported value in the shape of a draw: plates by their dimensions, and then the event's."""
    plates = [f.name for f in sorted(site["cond_indep_stack"], key=lambda f: f.dim)]
    plates = [name for name in plates if name in value.dims]
    ordered = value.transpose(*plates, *(name for name in value.dims if name not in plates))
    return torch.as_tensor(np.array(ordered.values)).reshape(site["value"].shape)


# Structures that change or have parts outside of the plate


def check_state(case: Case) -> None:
    """What the model reads from Python and changes is seen, or refused, in the next call."""
    loss = Trace_ELBO(max_plate_nesting=NESTING)
    with torch.no_grad():
        for _ in range(3):
            case.loss(loss)
        assert case.program.state is not None
        case.program.state.write(1)
        calls = 65 if case.structure.guide.sees in ("name", "names") else 1
        for _ in range(calls):
            try:
                found = case.loss(loss)
            except (ValueError, RuntimeError):
                if calls > 1:  # in the words of Pyro or of torch, where the promise is broken before it is checked
                    return
                raise
            expected = elbo(case.draw()).sum()
            if abs(found + float(expected)) < 1e-7 * (1 + abs(found)):
                return
        close(f"ELBO after the {case.structure.state} changed", -found, expected)


def check_read_again(case: Case) -> None:
    """What is known of an earlier run that looked alike is what the next run shows."""
    known = case.guide._structures
    for part in (0, 1):
        args, kwargs = case.program.arguments(part)
        pyro.set_rng_seed(part)
        found = known.look(case.program.model, args, kwargs)
        pyro.set_rng_seed(part)
        options = {"discrete": known.discrete, "encodes": known.encodes, "groups": known.groups}
        afresh = StructureReader(known.requested_plate, **options).look(case.program.model, args, kwargs)
        for field in fields(afresh):
            now, before = getattr(afresh, field.name), getattr(found, field.name)
            same = _same_layout(now, before) if field.name == "layout" else _same(now, before)
            if not same:
                raise Wrong(f"{field.name} is {now} and was taken for {before}")


def _same(first: Any, second: Any) -> bool:
    """Whether values are equal, and tensors in mappings too."""
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, Tensor) else str(first) == str(second)


def _same_layout(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    pairs = zip(first.sites, second.sites, strict=True)
    present = all((a.present is None) == (b.present is None) for a, b in pairs)
    return present and first.description == second.description and first.shared == second.shared


def check_outside(case: Case) -> None:
    """Whatever works with datapoints on their own refuses a model that has no such."""
    args, kwargs = case.program.arguments(0)
    uses: dict[str, Callable[[], Any]] = {
        "refined": lambda: case.guide.refined(2).variational_parameters(*args, **kwargs),
        "log_evidence": lambda: log_evidence(case.model, case.guide, args, kwargs, tolerance=0.2, max_samples=1000),
        "estimate_gaps": lambda: estimate_gaps(case.model, case.guide, args, kwargs, tolerance=0.2, max_samples=1000),
    }
    name = case.random.choice(list(uses))
    try:
        uses[name]()
    except ValueError as error:
        if not str(error).startswith("Cannot"):
            raise
        return
    raise Wrong(f"{name} serves a model with a site outside of the plate that depends on the latents in it")


def check_inner_subsample(case: Case) -> None:
    """q of a datapoint does not depend on which entries of an inner plate have been drawn."""
    args, kwargs = case.program.arguments(0)
    found = []
    for seed in (1, 2, 3):
        pyro.set_rng_seed(seed)
        found.append(case.guide.variational_parameters(*args, **kwargs))
    for other in found[1:]:
        close("phi with other entries drawn", other, found[0])


# Which checks are made


def _plain(s: Structure) -> bool:
    return s.mask not in ("latent", "obs_mask")


def _has_density(s: Structure) -> bool:
    """Whether phi of a call is known, and with it log q."""
    draws_first = s.subsample == "random" or s.globals != "none"  # so that refinement has other noise in a call
    conditioned = s.guide.sees == "names" and s.globals == "single"  # on a draw in a call, on the median in `posterior`
    return _plain(s) and s.discrete == "none" and not conditioned and not (draws_first and s.guide.kind in REFINING)


def _own(s: Structure) -> bool:
    """Whether every datapoint has a log-joint of its own that does not change from run to run."""
    return s.subsample != "random" and not s.subsampled_inner and s.outside == "none" and s.discrete == "none"


def _sees_entries(s: Structure) -> bool:
    """Whether phi could depend on which entries of an inner plate are drawn."""
    return s.subsampled_inner and s.guide.kind not in REFINING and s.subsample != "random" and s.discrete == "none"


def _unrolls(s: Structure) -> bool:
    return s.guide.kind == "SemiAmortizedGuide" and _own(s)


def _held(s: Structure) -> bool:
    """Whether the exact posterior can be put into the guide."""
    kinds = ("AmortizedGuide", "PerDatapointGuide", "SemiAmortizedGuide")
    return s.guide.kind in kinds and s.subsample != "random" and not s.subsampled_inner


ALL = dict[str, tuple[Callable[[Case], None], Callable[[Structure], bool], float]]
CHECKS: ALL = {
    "elbo": (check_elbo, lambda s: True, 1.0),
    "renyi": (check_renyi, lambda s: s.discrete == "none" and not s.has_anonymous, 0.6),
    "density": (check_density, _has_density, 0.4),
    "repeatable": (check_repeatable, lambda s: True, 0.3),
    "summaries": (check_summaries, lambda s: s.subsample != "random" and _plain(s), 0.4),
    "refined": (check_refined, lambda s: _own(s), 0.15),
    "evidence": (check_evidence, lambda s: s.has_closed_form and _own(s), 0.2),
    "gaps": (check_gaps, lambda s: s.has_closed_form and _own(s), 0.06),
    "arviz": (check_arviz, lambda s: _own(s) and s.state is None, 0.2),
    "outside": (check_outside, lambda s: s.outside != "none" and s.guide.kind not in REFINING, 1.0),
    "inner_subsample": (check_inner_subsample, _sees_entries, 1.0),
    "read_again": (check_read_again, lambda s: s.state is None, 0.5),
    "state": (check_state, lambda s: s.state is not None, 1.0),
    "identity": (check_identity, lambda s: s.has_closed_form and s.globals == "none" and _held(s), 0.7),
    "traced": (check_traced, lambda s: _unrolls(s) and s.traceable, 1.0),
    "gradient": (
        check_gradient,
        lambda s: s.guide.kind == "SemiAmortizedGuide" and _own(s) and s.detach == "none",
        0.3,
    ),
}
"""Checks by name, with the structures that they are meant for and the share of those in which they are made; those that
change what the model reads, or build guides of their own, come last."""


def make(case: Case, name: str) -> None:
    """Makes a check, which chooses its settings by the structure's number and its own name alone."""
    case.random = Random(f"{case.structure.seed}:{case.structure.number}:{name}")
    CHECKS[name][0](case)


def chosen(structure: Structure) -> list[str]:
    """The checks that are made of a structure."""
    random = Random(f"{structure.seed}:{structure.number}:chosen")
    return [name for name, (_, fits, share) in CHECKS.items() if random.random() < share and fits(structure)]
