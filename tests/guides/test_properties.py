"""Random model structures: densities, ELBOs and coordinates against computations that do not use the package."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.objective.elbo import LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.structure import Structure

FULL_SIZE = 5
INDEX = torch.tensor([3, 0, 4])
PARTICLES = 2
TOLERANCE = 1e-8
OPTIONS: dict[Any, dict[str, Any]] = {
    SemiAmortizedGuide: {"num_steps": 1, "keep_best": False},
    IterativeAmortizedGuide: {"num_steps": 1, "num_particles": 1, "keep_best": False},
}

pytestmark = pytest.mark.usefixtures("_float64")


# Structures


@dataclass(frozen=True)
class SiteSpec:
    """A site in the datapoint plate: its distribution, its event shape and the inner plates that it is in."""

    kind: str
    event: tuple[int, ...]
    plates: tuple[int, ...]
    depends: bool


@dataclass(frozen=True)
class Spec:
    """A model structure."""

    dim: int
    inner: tuple[tuple[int, int], ...]
    latents: tuple[SiteSpec, ...]
    observed: tuple[SiteSpec, ...]
    subsample: str
    globals: str
    masked: bool
    scaled: bool
    inner_first: bool


def expand(base: Any, event: tuple[int, ...]) -> Any:
    """Independent copies over the event dimensions; the parameters have size 1 there."""
    return base.expand(base.batch_shape[: len(base.batch_shape) - len(event)] + event).to_event(len(event))


PRIORS: dict[str, Callable[[Tensor, tuple[int, ...]], Any]] = {
    "real": lambda h, event: expand(dist.Normal(h, 1.5), event),
    "positive": lambda h, event: expand(dist.LogNormal(h, 0.7), event),
    "gamma": lambda h, event: expand(dist.Gamma(2.0 + h, 1.5), event),
    "unit": lambda h, event: expand(dist.Beta(2.0 + h, 1.5), event),
    "interval": lambda h, event: expand(dist.Uniform(-1.0, 3.0).expand(h.shape), event),
    "correlated": lambda h, event: dist.MultivariateNormal(
        h.expand(h.shape[:-1] + event), scale_tril=torch.eye(2) + 0.3 * torch.ones(2, 2).tril()
    ),
    "simplex": lambda h, event: dist.Dirichlet((2.0 + h).expand(h.shape[:-1] + event)),
    "cholesky": lambda h, event: dist.LKJCholesky(3, 2.0 + h.squeeze(-1).squeeze(-1)),
    "ordered": lambda h, event: dist.TransformedDistribution(
        expand(dist.Normal(h, 1.0), event), [dist.transforms.OrderedTransform()]
    ),
}
EVENTS: dict[str, list[tuple[int, ...]]] = {
    **dict.fromkeys(["real", "positive", "gamma", "unit", "interval"], [(), (2,), (1, 2)]),
    "correlated": [(2,)],
    "simplex": [(3,)],
    "cholesky": [(3, 3)],
    "ordered": [(2,)],
}


@st.composite
def specs(draw: Any) -> Spec:
    """Any structure that the guides serve."""
    dim = draw(st.sampled_from([-1, -2, -3]))
    others = draw(st.lists(st.sampled_from([d for d in (-1, -2, -3) if d != dim]), max_size=2, unique=True))
    inner = tuple((d, draw(st.integers(1, 3))) for d in sorted(others))

    def site(kinds: list[str]) -> SiteSpec:
        kind = draw(st.sampled_from(kinds))
        plates = tuple(d for d, _ in inner if draw(st.booleans()))
        return SiteSpec(kind, draw(st.sampled_from(EVENTS[kind])), plates, draw(st.booleans()))

    return Spec(
        dim,
        inner,
        tuple(site(sorted(PRIORS)) for _ in range(draw(st.integers(1, 3)))),
        tuple(site(["real"]) for _ in range(draw(st.integers(1, 2)))),
        draw(st.sampled_from(["full", "explicit", "random"])),
        draw(st.sampled_from(["none", "single", "plate"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


class Model:
    """The Pyro model of a structure."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def data(self) -> list[Tensor]:
        return [torch.randn(self.shape(site, FULL_SIZE)) for site in self.spec.observed]

    def shape(self, site: SiteSpec, size: int) -> tuple[int, ...]:
        """Shape of a site's values, given the number of datapoints."""
        sizes = {self.spec.dim: size, **{d: n for d, n in self.spec.inner if d in site.plates}}
        return tuple(sizes.get(d, 1) for d in range(min(sizes), 0)) + site.event

    def __call__(self, data: list[Tensor], index: Tensor | None = None) -> None:
        spec = self.spec
        options = {"subsample": index} if spec.subsample == "explicit" else {}
        options = {"subsample_size": 3} if spec.subsample == "random" else options
        plates = {d: pyro.plate(f"inner_{-d}", n, dim=d) for d, n in spec.inner}
        plates[spec.dim] = pyro.plate("data", FULL_SIZE, dim=spec.dim, **options)
        offset = self.global_part()
        for i, site in enumerate(spec.latents):
            offset = offset + self.latent(f"z_{i}", site, plates, offset)
        for i, (site, x) in enumerate(zip(spec.observed, data, strict=True)):
            self.observe(f"x_{i}", site, plates, offset, x)

    def global_part(self) -> Tensor:
        if self.spec.globals == "plate":
            with pyro.plate("groups", 2, dim=-1):
                return pyro.sample("w", dist.LogNormal(0.0, 0.5)).sum(-1, keepdim=True)
        return pyro.sample("w", dist.Normal(0.0, 1.0)) if self.spec.globals == "single" else torch.zeros(())

    def enter(self, site: SiteSpec, plates: dict[int, pyro.plate], stack: ExitStack) -> None:
        held = [*site.plates, self.spec.dim] if self.spec.inner_first else [self.spec.dim, *site.plates]
        for d in held:
            stack.enter_context(plates[d])

    def latent(self, name: str, site: SiteSpec, plates: dict[int, pyro.plate], offset: Tensor) -> Tensor:
        """Samples a site; returns its mean over event and inner plates, bounded, one number per datapoint."""
        h = offset.tanh() if site.depends else torch.zeros(())
        h = h.reshape(h.shape + (1,) * len(site.event))
        with ExitStack() as stack:
            self.enter(site, plates, stack)
            value = pyro.sample(name, PRIORS[site.kind](h, site.event)).tanh()
        value = value.mean(tuple(range(-len(site.event), 0))) if site.event else value
        return value.mean(site.plates, keepdim=True) if site.plates else value

    def observe(self, name: str, site: SiteSpec, plates: dict[int, pyro.plate], offset: Tensor, x: Tensor) -> None:
        spec = self.spec
        with ExitStack() as stack:
            self.enter(site, plates, stack)
            if spec.scaled:
                stack.enter_context(poutine.scale(scale=0.3))
            if spec.subsample != "full":
                x = x.index_select(spec.dim - len(site.event), plates[spec.dim].indices)
            h = offset.reshape(offset.shape + (1,) * len(site.event))
            likelihood = expand(dist.Normal(h, 0.8), site.event)
            if spec.masked:
                likelihood = likelihood.mask(x.reshape(x.shape[: x.dim() - len(site.event)] + (-1,))[..., 0] > 0)
            pyro.sample(name, likelihood, obs=x)


# Recomputations


def kept(value: Tensor, axis: int) -> Tensor:
    """Sums over all dimensions but one, counted from the right."""
    others = [d for d in range(-value.dim(), 0) if d != axis]
    return value.sum(others) if others else value


def weighted(trace: Any, prefix: str = "") -> Tensor:
    """Scale times mask times log-density, summed over the sites of a trace, for each particle."""
    total = torch.zeros(PARTICLES)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and name.startswith(prefix):
            mask = torch.as_tensor(True if site["mask"] is None else site["mask"])
            log_prob = site["fn"].log_prob(site["value"]) * mask * site["scale"]
            if type(site["fn"]).__name__ != "_Subsample":
                total = total + kept(log_prob, -4)
    return total


def coordinates(spec: Spec, model_trace: Any) -> tuple[Tensor, Tensor]:
    """Flat unconstrained latents (K, N, D) of a trace, and the log-determinants (K, N)."""
    flat, log_dets = [], []
    for i in range(len(spec.latents)):
        site = model_trace.nodes[f"z_{i}"]
        transform = biject_to(site["fn"].support)
        u = transform.inv(site["value"])
        log_det = transform.log_abs_det_jacobian(u, site["value"])
        rank = site["value"].dim() - len(spec.latents[i].event)
        log_det = log_det.reshape(*log_det.shape[:rank], -1).sum(-1)
        flat.append(u.movedim(rank + spec.dim, 1).flatten(2))
        log_dets.append(log_det.movedim(rank + spec.dim, 1).flatten(2).sum(-1))
    return torch.cat(flat, -1), torch.stack(log_dets).sum(0)


def normal_log_prob(phi: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of the mean-field normal, and the noise that makes z."""
    loc, log_scale = phi.chunk(2, -1)
    noise = (z - loc) / log_scale.exp()
    return (-0.5 * noise.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1), noise


def multivariate_normal_log_prob(phi: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of the full-rank normal, and the noise that makes z."""
    dim = z.shape[-1]
    loc, log_scale, entries = phi.split([dim, dim, phi.shape[-1] - 2 * dim], -1)
    relative = torch.eye(dim).repeat(len(phi), 1, 1)
    for k, (row, column) in enumerate((r, c) for r in range(dim) for c in range(r)):
        relative[:, row, column] = entries[:, k]
    scale_tril = log_scale.exp().unsqueeze(-1) * relative
    noise = torch.linalg.solve_triangular(scale_tril, (z - loc).unsqueeze(-1), upper=False).squeeze(-1)
    return (-0.5 * noise.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1), noise


# The checks


@dataclass
class Draw:
    """Draws of a guide with the model run at them: traces in a plate of particles, phi, and the model's arguments."""

    spec: Spec
    model: Model
    guide: Any
    args: tuple[Any, ...]
    guide_trace: Any
    model_trace: Any
    phi: Tensor
    flat: Tensor
    log_q: Tensor

    @property
    def structure(self) -> Structure:
        structure = StructureReader("data").read(self.model, self.args, {})
        if self.spec.subsample == "random":
            structure = replace(structure, indices={"data": self.guide_trace.nodes["data"]["value"]})
        return structure

    @property
    def scale(self) -> float:
        return 1.0 if self.spec.subsample == "full" else FULL_SIZE / 3

    def log_joint(self, particle: int) -> LocalLogJoint:
        values = {}
        if self.spec.globals != "none":
            w = self.guide_trace.nodes["w"]["value"][particle]
            values["w"] = w.reshape(()) if self.spec.globals == "single" else w.reshape(2)
        return LocalLogJoint(ModelCall(self.model, self.args, {}, self.structure, values))


class Bounded(nn.Module):
    """An encoder whose features stay moderate, so that transforms can be inverted to all digits."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat([x.reshape(len(x), -1) for x in inputs], -1).tanh()


def drawn(spec: Spec, Guide: Any, family: str) -> Draw:
    """Draws from a guide whose parameters have been moved away from where they start."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    model = Model(spec)
    args = (model.data(), INDEX) if spec.subsample == "explicit" else (model.data(),)
    encoder = {} if Guide is PerDatapointGuide else {"encoder": Bounded()}
    guide = Guide(model, family=family, plate="data", init_scale=0.4, **encoder, **OPTIONS.get(Guide, {}))
    guide.setup(*args)
    with torch.no_grad():
        for parameter in guide.inference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    phis: list[Tensor] = []
    parameters = guide._phi
    guide.__dict__["_phi"] = lambda call: phis.append(parameters(call)) or phis[-1]
    with pyro.plate("particles", PARTICLES, dim=-4), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    guide_trace.compute_log_prob()
    flat, log_det = coordinates(spec, model_trace)
    if family == "flow":
        log_density = guide.family(phis[-1]).log_prob(flat)
    else:
        log_density = (normal_log_prob if family == "normal" else multivariate_normal_log_prob)(phis[-1], flat)[0]
    return Draw(spec, model, guide, args, guide_trace, model_trace, phis[-1], flat, log_density - log_det)


@torch.no_grad()
def check_density(draw: Draw) -> None:
    """The guide's log q of every datapoint and particle is the family's at the flat latent, less the log-det."""
    total = torch.zeros(PARTICLES, len(draw.phi))
    names = {f"z_{i}" for i in range(len(draw.spec.latents))} | {f"{draw.guide._pyro_name}_latent"}
    for name in names & set(draw.guide_trace.nodes):
        log_prob = draw.guide_trace.nodes[name]["unscaled_log_prob"]
        total = total + log_prob.movedim(log_prob.dim() + draw.spec.dim, 1).flatten(2).sum(-1)
    torch.testing.assert_close(total, draw.log_q, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def check_elbo(draw: Draw) -> None:
    """The ELBO of every draw is N/B times the sum of the per-datapoint log weights, plus the global terms."""
    by_hand = weighted(draw.model_trace) - weighted(draw.guide_trace)
    shared = weighted(draw.model_trace, "w") - weighted(draw.guide_trace, "w")
    log_det = coordinates(draw.spec, draw.model_trace)[1]
    objective = torch.stack([draw.log_joint(k)(draw.flat[k : k + 1])[0] for k in range(PARTICLES)])
    local = objective - (draw.log_q + log_det)
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    torch.testing.assert_close(by_hand, shared + draw.scale * local.sum(-1), **close)
    if draw.spec.globals == "none":
        torch.testing.assert_close(draw.log_joint(0)(draw.flat), objective, **close)
    if draw.phi.shape[-1] == 2 * draw.flat.shape[-1]:
        noise = normal_log_prob(draw.phi, draw.flat)[1]
        weights = LocalObjective(draw.log_joint(0), draw.guide.family).log_weights(draw.phi, noise[:1])[0]
        torch.testing.assert_close(weights, local[0], **close)


@torch.no_grad()
def check_loss(draw: Draw) -> None:
    """``Trace_ELBO`` gives the number that the two traces give, with the same noise."""
    pyro.set_rng_seed(2)
    loss = Trace_ELBO().loss(draw.model, draw.guide, *draw.args)
    pyro.set_rng_seed(2)
    guide_trace = poutine.trace(draw.guide).get_trace(*draw.args)
    model_trace = poutine.trace(poutine.replay(draw.model, guide_trace)).get_trace(*draw.args)
    names = {name for name, site in model_trace.nodes.items() if site["type"] == "sample" and name != "data"}
    total = sum(
        (site["scale"] * site["fn"].log_prob(site["value"]) * (1 if site["mask"] is None else site["mask"])).sum()
        for site in (model_trace.nodes[name] for name in names if not name.startswith(("inner", "groups")))
    )
    total = total - sum(
        (site["scale"] * site["fn"].log_prob(site["value"])).sum()
        for name, site in guide_trace.nodes.items()
        if site["type"] == "sample" and name != "data" and not name.startswith(("inner", "groups"))
    )
    assert -loss == pytest.approx(float(total), rel=TOLERANCE, abs=TOLERANCE)


@torch.no_grad()
def check_round_trip(draw: Draw) -> None:
    """Constrained to flat to constrained and back loses nothing, and the flat latents are those found by hand."""
    layout, close = draw.guide.layout, {"rtol": 1e-10, "atol": 1e-10}
    for k in range(PARTICLES):
        values = {f"z_{i}": draw.guide_trace.nodes[f"z_{i}"]["value"][k] for i in range(len(draw.spec.latents))}
        flat = layout.flatten(values)
        torch.testing.assert_close(flat, draw.flat[k], **close)
        again = layout.values(flat, depth=3)
        assert {name: value.shape for name, value in again.items()} == {n: v.shape for n, v in values.items()}
        for name, value in values.items():
            torch.testing.assert_close(again[name], value, **close)
        torch.testing.assert_close(layout.flatten(again), flat, **close)


def check_all(draw: Draw) -> None:
    for check in (check_density, check_elbo, check_loss, check_round_trip):
        check(draw)


def examples(count: int, **options: Any) -> Any:
    """Settings of a property test: the same examples in every run, nothing kept on disk."""
    ignored = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    options.setdefault("phases", [Phase.generate, Phase.shrink])
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=ignored, **options
    )


@pytest.mark.parametrize(
    ("Guide", "family"),
    [
        (AmortizedGuide, "normal"),
        (AmortizedGuide, "multivariate_normal"),
        (AmortizedGuide, "flow"),
        (PerDatapointGuide, "normal"),
        (PerDatapointGuide, "multivariate_normal"),
    ],
)
@examples(12)
@given(spec=specs())
def test_any_structure(spec: Spec, Guide: Any, family: str) -> None:
    assume(family != "flow" or not _share_a_plate(spec))  # refused
    check_all(drawn(spec, Guide, family))


def _share_a_plate(spec: Spec) -> bool:
    plates = [set(site.plates) for site in (*spec.latents, *spec.observed)]
    return spec.globals == "none" and bool(set.intersection(*plates))


REFINING = [(SemiAmortizedGuide, "normal"), (IterativeAmortizedGuide, "normal"), (SemiAmortizedGuide, "flow")]


@pytest.mark.parametrize(("Guide", "family"), REFINING[:2])
@examples(3)
@given(spec=specs())
def test_any_structure_refined(spec: Spec, Guide: Any, family: str) -> None:
    assume(family != "flow" or not _share_a_plate(spec))
    check_all(drawn(spec, Guide, family))


@pytest.mark.slow
@pytest.mark.parametrize(("Guide", "family"), REFINING)
@examples(5)
@given(spec=specs())
def test_any_structure_refined_at_length(spec: Spec, Guide: Any, family: str) -> None:
    assume(family != "flow" or not _share_a_plate(spec))
    check_all(drawn(spec, Guide, family))


# The checks find what is wrong


def wrong_log_det(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Jacobian of the transforms is forgotten for one kind of support."""
    right = LocalSite.constrain

    def constrain(self: LocalSite, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        value, log_det = right(self, unconstrained)
        return value, log_det * (0.999 if self.event_dim == 1 else 1.0)

    monkeypatch.setattr(LocalSite, "constrain", constrain)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's plate has another size than the model's, so that the two are scaled differently."""
    right = PlateFrame.create

    def create(self: PlateFrame, indices: Tensor | None = None) -> pyro.plate:
        size = self.full_size + (self.kind == "explicit")
        return right(replace(self, full_size=size), indices)

    monkeypatch.setattr(PlateFrame, "create", create)


def wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of two inner plates are taken for each other where their sizes allow it."""
    right = LocalSite.flatten

    def flatten(self: LocalSite, value: Tensor, dim: int) -> Tensor:
        flat = right(self, value, dim)
        return flat.flip(-1) if len(self.inner) == 2 else flat

    monkeypatch.setattr(LocalSite, "flatten", flatten)


def wrong_log_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The per-datapoint log-joint leaves the model's own scales out."""
    monkeypatch.setattr("pyro_amortized.objective.evaluation._scaled", lambda log_prob, site, frame: log_prob)


@pytest.mark.parametrize(
    ("mistake", "family", "check"),
    [
        (wrong_log_det, "multivariate_normal", check_density),
        (wrong_log_det, "flow", check_density),
        (wrong_scale, "normal", check_elbo),
        (wrong_log_joint, "normal", check_elbo),
        (wrong_order, "normal", check_round_trip),
    ],
)
def test_mistakes_are_found(mistake: Any, family: str, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @examples(40, phases=[Phase.generate])
    @given(spec=specs())
    def run(spec: Spec) -> None:
        check(drawn(spec, AmortizedGuide, family))

    run()
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        run()
