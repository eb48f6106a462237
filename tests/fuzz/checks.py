"""What is checked of a structure. Each check raises a :class:`Wrong` where a number is not what it must be."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pyro
import torch
from by_hand import Draw, Exact, LogJoint, coordinates, draw, elbo, log_density, moments, normal_elbo, renyi
from guides import Stored, build, hold
from programs import NESTING, Module, Program
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from structures import Structure
from torch import Tensor
from torch.distributions import biject_to

from pyro_amortized import GradientAscent, SemiAmortizedGuide, estimate_gaps, log_evidence, to_arviz

__all__ = ["CHECKS", "Case", "Wrong", "chosen"]

TOLERANCE = 1e-7
ELBOS: dict[str, Callable[..., Any]] = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, strict_enumeration_warning=False),
}
REFINING = ("SemiAmortizedGuide", "IterativeAmortizedGuide")
GAUSSIAN = ("normal", "multivariate_normal")


class Wrong(AssertionError):
    """A number is not what it must be."""


def close(what: str, found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    found, expected = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (found, expected))
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise Wrong(f"{what} is {_short(found)} and should be {_short(expected)}")


def _short(value: Tensor) -> str:
    return f"{value.item():.9g}" if value.numel() == 1 else f"{tuple(value.shape)} {value.flatten()[:4].tolist()}"


class Case:
    """A structure with its model and guide, set up on the first batch."""

    def __init__(self, structure: Structure, **options: Any) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(structure.number)
        self.structure = structure
        self.random = Random(structure.number)
        self.program = Program(structure)
        self.model = self.program.model
        self.guide = build(self.program, **options)
        args, kwargs = self.program.arguments(0)
        self.guide.setup(*args, **kwargs)
        if "encoder" not in options:
            self.move()

    def move(self) -> None:
        """Moves the parameters away from where they start."""
        with torch.no_grad():
            for parameter in self.guide.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def draw(self, part: int = 0, seed: int = 2, particles: int = 1) -> Draw:
        args, kwargs = self.program.arguments(part)
        pyro.set_rng_seed(seed)
        return draw(self.structure, self.model, self.guide, args, kwargs, particles)

    def check(self, name: str) -> None:
        """Makes a check, which chooses its settings by the structure's number and its own name alone."""
        self.random = Random(f"{self.structure.seed}:{self.structure.number}:{name}")
        CHECKS[name][0](self)

    def loss(self, loss: Any, part: int = 0, seed: int = 2) -> float:
        args, kwargs = self.program.arguments(part)
        pyro.set_rng_seed(seed)
        return loss.loss(self.model, self.guide, *args, **kwargs)

    def exact(self, drawn: Draw, part: int = 0) -> Exact:
        """Posterior and evidence of the datapoints of a draw, given the global values ``w`` in it."""
        args, kwargs = self.program.arguments(part)
        fixed = {"w": drawn.posterior["w"]["value"]} if "w" in drawn.posterior else {}
        log_joint = LogJoint(drawn, self.model, args, kwargs, fixed)
        flat = coordinates(drawn)[0][0]
        return Exact.of(log_joint, *flat.shape)


# ELBOs


def _names(s: Structure) -> list[str]:
    if s.discrete == "enumerated":
        return ["TraceEnum"]
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
    """A Rényi bound is that of weights computed by hand; where these do not exist, it is no higher than the evidence."""
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
    if not case.structure.has_closed_form or case.structure.globals != "none" or case.structure.guide.kind in REFINING:
        return
    loss = RenyiELBO(0.0, num_particles=200, vectorize_particles=True, max_plate_nesting=NESTING)
    bounds = torch.tensor([-case.loss(loss, seed=seed) for seed in range(4)])
    drawn = case.draw()
    with torch.enable_grad():
        scale = drawn.prior[drawn.local[0]]["scale"]
        evidence = float((scale * case.exact(drawn).log_evidence).sum())
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
    options = {"num_steps": 0} if s.guide.kind == "SemiAmortizedGuide" and case.random.random() < 0.5 else {}
    case = Case(replace(s, guide=guide), encoder=stored, **options)
    drawn = case.draw()
    exact = case.exact(drawn)
    if not hold(case.guide, stored, exact, case.program.index(0)):
        return
    expected = float((drawn.prior[drawn.local[0]]["scale"] * exact.log_evidence).sum())
    name = case.random.choice(list(ELBOS))
    vectorized = case.random.random() < 0.5
    loss = ELBOS[name](num_particles=2, vectorize_particles=vectorized, max_plate_nesting=NESTING)
    close(f"{name} ELBO at the exact posterior", -case.loss(loss, seed=5), expected, 1e-6)
    bound = RenyiELBO(0.5, num_particles=3, vectorize_particles=vectorized, max_plate_nesting=NESTING)
    if s.subsample == "whole":
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
    if before[1:] != _generators()[1:]:
        raise Wrong("a call of the guide changed the generators of numpy or Python")
    if s.guide.kind in ("AmortizedGuide", "PerDatapointGuide") and s.subsample != "random":
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
        transform, rank = biject_to(fn.support), len(fn.batch_shape)
        like = transform.inv(value).movedim(rank + s.dim, 0)
        stop = start + like.shape[1:].numel()
        for i, p in enumerate(probs):
            flat = loc[:, start:stop] + sd[:, start:stop] * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(p))
            expected = transform(flat.reshape(like.shape).movedim(0, rank + s.dim))
            close(f"quantile {p} of {name!r}", found[name][i], expected, 1e-6)
        start = stop


def check_refined(case: Case) -> None:
    """Refinement goes towards the optimum, and does not depend on whether graphs are traced."""
    s = case.structure
    args, kwargs = case.program.arguments(0)
    guide = case.guide.refined(3, num_particles=8, fixed_noise=True)
    phi = guide.variational_parameters(*args, **kwargs)
    drawn = case.draw()
    if s.has_closed_form and s.globals == "none" and s.guide.family in GAUSSIAN and s.guide.kind not in REFINING:
        exact = case.exact(drawn)
        start = moments(s.guide.family, case.guide.variational_parameters(*args, **kwargs).detach())
        before, after = (normal_elbo(exact, q) for q in (start, moments(s.guide.family, phi.detach())))
        best = _optimum(exact, s.guide.family)
        left = (best - after) - 0.5 * (best - before)
        if (left > 0.05).any():
            raise Wrong(f"three Newton steps went from {_short(before)} to {_short(after)}; the optimum is {_short(best)}")


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
        guide = build(
            program, **_unrolled(s), **({} if s.guide.encoder in ("pair", "features") else _features(s, program))
        )
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


def _features(s: Structure, program: Program) -> dict[str, Any]:
    from guides import Bounded

    return {"encoder": Bounded()}


def _unrolled(s: Structure) -> dict[str, Any]:
    return {"num_steps": 2, "num_particles": 2, "update": GradientAscent(0.05), "fixed_noise": True, "keep_best": False}


def check_gradient(case: Case) -> None:
    """The gradient through unrolled steps is that of finite differences."""
    s = case.structure
    guide = replace(s.guide, encoder="features" if s.guide.encoder != "pair" else "pair")
    case = Case(replace(s, guide=guide), **_unrolled(s))
    args, kwargs = case.program.arguments(0)
    shift = next(p for name, p in case.guide.inference.named_parameters() if name.endswith("shift"))

    def answer() -> Tensor:
        phi = case.guide.variational_parameters(*args, **kwargs)
        return (torch.linspace(0.5, 1.5, phi.numel()).reshape(phi.shape) * phi).sum()

    gradient = torch.autograd.grad(answer(), shift)[0]
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            shift.add_(step)
            values.append(float(answer()))
            shift.sub_(step)
    close("gradient through unrolled steps", gradient, (values[0] - values[1]) / 2e-5, 1e-5)


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
        off &= (error.abs() > 4 * torch.as_tensor(found.log_evidence_se.values) + 1e-6) & torch.as_tensor(found.khat.values < 0.5)
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
        values = {n: _value(posterior[n].values[0, k], drawn, n) for n in drawn.posterior if n in drawn.prior}
        trace = poutine.trace(poutine.condition(partial(case.model, *args, **kwargs), values)).get_trace()
        for name, site in Draw(case.structure, trace, trace, lambda: None).prior.items():
            if name in found["log_likelihood"]:
                expected = torch.as_tensor(site["fn"].log_prob(site["value"]))
                if site["mask"] is not None:
                    expected = torch.where(torch.as_tensor(site["mask"]), expected, torch.zeros_like(expected))
                got = torch.as_tensor(found["log_likelihood"][name].values[0, k])
                close(f"log likelihood of {name!r}", got.sum(), expected.sum())


def _value(value: Any, drawn: Draw, name: str) -> Tensor:
    """An exported value in the shape of a draw: axes are plates, outermost first, and then the event's."""
    site = drawn.posterior[name]
    frames = [frame for frame in site["cond_indep_stack"]]
    like, found = site["value"], torch.as_tensor(np.asarray(value))
    order = sorted(range(len(frames)), key=lambda i: frames[i].dim)
    if len(frames) > 1:
        found = found.permute(*order, *range(len(frames), found.dim()))
    return found.reshape(like.shape)


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
            found = case.loss(loss)
            expected = elbo(case.draw()).sum()
            if abs(found + float(expected)) < 1e-7 * (1 + abs(found)):
                return
        close(f"ELBO after the {case.structure.state} changed", -found, expected)


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


ALL = dict[str, tuple[Callable[[Case], None], Callable[[Structure], bool], float]]
CHECKS: ALL = {
    "elbo": (check_elbo, lambda s: True, 1.0),
    "renyi": (check_renyi, lambda s: s.discrete == "none", 0.6),
    "density": (check_density, lambda s: _plain(s) and s.discrete == "none", 0.4),
    "repeatable": (check_repeatable, lambda s: True, 0.3),
    "summaries": (check_summaries, lambda s: s.subsample != "random" and _plain(s), 0.4),
    "refined": (check_refined, lambda s: _own(s), 0.15),
    "evidence": (check_evidence, lambda s: s.has_closed_form and _own(s), 0.2),
    "gaps": (check_gaps, lambda s: s.has_closed_form and _own(s), 0.06),
    "arviz": (check_arviz, lambda s: _own(s) and s.state is None, 0.2),
    "outside": (check_outside, lambda s: s.outside != "none" and s.guide.kind not in REFINING, 1.0),
    "inner_subsample": (check_inner_subsample, _sees_entries, 1.0),
    "state": (check_state, lambda s: s.state is not None, 1.0),
    "identity": (check_identity, lambda s: s.has_closed_form and s.globals == "none" and _held(s), 0.7),
    "traced": (check_traced, lambda s: s.guide.kind == "SemiAmortizedGuide" and _own(s) and s.traceable, 1.0),
    "gradient": (check_gradient, lambda s: s.guide.kind == "SemiAmortizedGuide" and _own(s) and s.detach == "none", 0.3),
}
"""Checks by name, with the structures that they are meant for and the share of those in which they are made; those that
change what the model reads, or build guides of their own, come last."""


def _plain(s: Structure) -> bool:
    return s.mask not in ("latent", "obs_mask")


def _own(s: Structure) -> bool:
    """Whether every datapoint has a log-joint of its own that does not change from run to run."""
    return s.subsample != "random" and not s.subsampled_inner and s.outside == "none" and s.discrete == "none"


def _sees_entries(s: Structure) -> bool:
    """Whether phi could depend on which entries of an inner plate are drawn."""
    return s.subsampled_inner and s.guide.kind not in REFINING and s.subsample != "random" and s.discrete == "none"


def _held(s: Structure) -> bool:
    """Whether the exact posterior can be put into the guide."""
    kinds = ("AmortizedGuide", "PerDatapointGuide", "SemiAmortizedGuide")
    return s.guide.kind in kinds and s.subsample != "random" and not s.subsampled_inner


def chosen(structure: Structure) -> list[str]:
    """The checks that are made of a structure."""
    random = Random(f"{structure.seed}:{structure.number}:chosen")
    return [name for name, (_, fits, share) in CHECKS.items() if random.random() < share and fits(structure)]
