"""Random structures: what a model, its arguments and its guide look like, drawn from a seed and a number alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from random import Random

__all__ = ["CHANGES", "SOURCES", "GuideSpec", "Inner", "Site", "Structure", "generate"]

CONJUGATE = ("real", "positive", "unit", "ordered", "simplex", "correlated")
"""Normal in unconstrained coordinates, so that posterior and evidence are known where all is linear."""
OTHERS = ("gamma", "beta", "interval", "dirichlet", "cholesky", "student")
EVENTS: dict[str, tuple[tuple[int, ...], ...]] = {
    **dict.fromkeys(["real", "positive", "unit", "gamma", "beta", "interval", "student"], ((), (), (2,), (1, 2))),
    "ordered": ((2,),),
    "simplex": ((3,),),
    "correlated": ((2,),),
    "dirichlet": ((3,),),
    "cholesky": ((3, 3),),
}
FAMILIES = ("normal", "multivariate_normal", "low_rank_multivariate_normal", "structured", "mixture", "flow")
SOURCES = ("closure", "attribute", "dictionary", "deque", "environment", "context", "global", "property", "generator")
CHANGES = ("scale", "mask", "data", "size", "dim")
FORMS = ("positional", "keyword", "dictionary", "list", "tuple", "named", "closure")


@dataclass(frozen=True)
class Inner:
    """A plate inside the datapoint plate; ``batch`` is the size of its subsample, or None."""

    dim: int
    size: int
    batch: int | None = None


@dataclass(frozen=True)
class Site:
    """A site in the datapoint plate; ``anonymous`` is the size of a dimension at -1 outside all plates, or 0."""

    prior: str
    event: tuple[int, ...]
    plates: tuple[int, ...]
    depends: bool = True
    anonymous: int = 0


@dataclass(frozen=True)
class GuideSpec:
    """A guide: its class, family, encoder and what the encoder sees."""

    kind: str = "AmortizedGuide"
    family: str = "normal"
    encoder: str = "default"
    sees: str = "observed"


@dataclass(frozen=True)
class Structure:
    """A model, its arguments and its guide; everything follows from these fields and the seed.

    Few are ``traceable``: to trace a graph takes longer than all else together.
    """

    seed: int
    number: int
    theme: str
    guide: GuideSpec
    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    linear: bool = True
    size: int = 3
    second: int = 4
    batch: int = 2
    dim: int = -1
    subsample: str = "whole"
    cut: bool = False
    inner: tuple[Inner, ...] = ()
    inner_first: bool = False
    globals: str = "none"
    scale: str = "none"
    mask: str = "none"
    form: str = "positional"
    axis: str = "natural"
    numpy: bool = False
    shared: str = "none"
    covariate: str = "none"
    discrete: str = "none"
    steps: bool = False
    outside: str = "none"
    detach: str = "none"
    state: tuple[str, str] | None = None
    program: str = "function"
    draws: bool = False
    traceable: bool = False
    validate: bool = True

    def __str__(self) -> str:
        """The fields that are not as by default."""
        own = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return f"Structure({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in own)})"

    @property
    def command(self) -> str:
        """What runs this structure once more."""
        return f"make fuzz SEED={self.seed} START={self.number} NUM=1"

    @property
    def has_closed_form(self) -> bool:
        """Whether posterior and evidence are known, given global latents."""
        weighted = self.mask in ("latent", "obs_mask") or self.scale in ("all", "tensor_all") or self.state is not None
        return self.linear and self.outside == self.detach == self.discrete == "none" and not weighted

    @property
    def entrywise(self) -> bool:
        """Whether all sites lie in a further plate together, whose entries some ELBOs weigh on their own."""
        common = set.intersection(*(set(site.plates) for site in (*self.latents, *self.observed)))
        return bool(common) and self.globals == "none"

    @property
    def has_anonymous(self) -> bool:
        """Whether a site has a dimension outside all plates, over which Pyro's Rényi bound does not sum."""
        return any(site.anonymous for site in (*self.latents, *self.observed))

    @property
    def subsampled_inner(self) -> bool:
        """Whether an inner plate is subsampled."""
        return any(plate.batch is not None for plate in self.inner)


THEMES = {
    "plain": 5,
    "linear": 6,
    "arguments": 3,
    "state": 3,
    "outside": 2,
    "anonymous": 2,
    "entries": 2,
    "detach": 0.5,
    "inner_subsample": 2,
    "discrete": 2,
    "steps": 1,
}


def generate(seed: int, number: int) -> Structure:
    """The structure of this number."""
    random = Random(f"{seed}:{number}")
    theme = random.choices(list(THEMES), list(THEMES.values()))[0]
    structure = _plates(random, seed, number, theme)
    structure = _arguments(random, _weights(random, structure))
    return _valid(replace(structure, guide=_guide(random, structure)))


def _plates(random: Random, seed: int, number: int, theme: str) -> Structure:
    """Plates and sites."""
    linear = theme in ("linear", "arguments") or (
        theme not in ("plain", "detach", "discrete") and random.random() < 0.7
    )
    dims = {"anonymous": [-2, -3], "steps": [-1], "state": [-1, -1, -2]}.get(theme, [-1, -1, -2, -3])
    dim = random.choice(dims)
    free = [d for d in (-1, -2, -3) if d != dim and not (theme == "anonymous" and d == -1)]
    least = 1 if theme in ("entries", "inner_subsample") else 0
    count = 0 if theme in ("steps", "state") else random.choice([least, least, 1, 2])
    size = random.randint(2, 5)
    inner = tuple(Inner(d, random.choice([1, 2, 3, size])) for d in sorted(random.sample(free, min(count, len(free)))))
    if theme == "inner_subsample":
        inner = (replace(inner[0], size=4, batch=2), *inner[1:])

    def site(priors: tuple[str, ...], whole: bool) -> Site:
        prior = random.choice(priors)
        plates = tuple(
            p.dim for p in inner if (whole or random.random() < 0.5) and (p.batch is None or priors == ("real",))
        )
        if theme == "inner_subsample" and priors == ("real",) and random.random() < 0.8:
            plates = tuple(sorted({*plates, inner[0].dim}))
        anonymous = random.choice([0, 2, 3]) if theme == "anonymous" and random.random() < 0.8 else 0
        return Site(prior, random.choice(EVENTS[prior]), plates, random.random() < 0.7, anonymous)

    priors = CONJUGATE if linear else CONJUGATE + OTHERS
    whole = theme == "entries"
    latents = tuple(site(priors, whole) for _ in range(random.choice([1, 1, 2, 3] if linear else [1, 2, 3])))
    if theme == "steps":
        latents = (replace(latents[0], event=random.choice([(), (2,)]), prior="real"),) * random.choice([2, 3])
    observed = tuple(site(("real",), whole) for _ in range(random.choice([1, 1, 2])))
    if theme == "anonymous" and not any(s.anonymous for s in latents):
        latents = (replace(latents[0], anonymous=random.choice([2, 3])), *latents[1:])
    return Structure(
        seed, number, theme, GuideSpec(), latents, observed, linear, size, random.randint(1, 6),
        random.randint(1, size), dim, inner=inner, inner_first=random.random() < 0.3, steps=theme == "steps",
    )  # fmt: skip


def _weights(random: Random, s: Structure) -> Structure:
    """Global latents, masks, scales, discrete latents, sites outside, what has no gradient and what changes."""
    quiet = s.theme in ("entries", "steps", "state")
    s = replace(
        s,
        globals="none" if quiet else random.choice(["none", "none", "single", "plate"]),
        mask=random.choice(["none", "none", "none", "dist", "handler", "latent", "obs_mask"]),
        scale=random.choice(["none", "none", "none", "number", "tensor", "all", "tensor_all"]),
        discrete=random.choice(["enumerated", "bernoulli", "categorical"]) if s.theme == "discrete" else "none",
        outside=random.choice(["factor", "total", "long"]) if s.theme == "outside" else "none",
        detach=random.choice(["straight_through", "stop", "no_grad"]) if s.theme == "detach" else "none",
        state=(random.choice(SOURCES), random.choice(CHANGES)) if s.theme == "state" else None,
    )
    if s.theme in ("state", "outside", "discrete", "entries"):
        s = replace(s, mask="none", scale="none")
    return replace(s, linear=s.linear and s.detach == "none")


def _arguments(random: Random, s: Structure) -> Structure:
    """The form of the arguments."""
    subsample = random.choice(["whole", "whole", "whole", "unsized", "explicit", "random"])
    if s.theme in ("state", "outside", "anonymous"):
        subsample = "whole"
    eager = s.theme == "arguments"
    return replace(
        s,
        subsample=subsample,
        cut=subsample == "explicit" and random.random() < 0.3,
        form=random.choice(FORMS if s.state is None else ("positional", "closure")),
        axis=random.choice(["natural", "first", "last"]),
        numpy=random.random() < 0.1,
        shared=random.choice(["vector", "rows", "columns", "alike"]) if eager or random.random() < 0.2 else "none",
        covariate=random.choice(["rows", "columns"]) if eager or random.random() < 0.2 else "none",
        program=random.choice(["function", "function", "object", "module"]),
        draws=random.random() < 0.1,
        traceable=s.theme == "detach" or random.random() < 0.04,
        validate=random.random() < 0.7,
    )


def _guide(random: Random, s: Structure) -> GuideSpec:
    kinds = ["AmortizedGuide"] * 9 + ["SemiAmortizedGuide", "IterativeAmortizedGuide"] + ["PerDatapointGuide"] * 4
    kind = random.choice(kinds)
    if s.theme == "detach":
        kind = "SemiAmortizedGuide"
    if s.discrete in ("bernoulli", "categorical"):
        kind = "DiscreteAmortizedGuide"
    family = random.choice(FAMILIES if kind != "DiscreteAmortizedGuide" else FAMILIES[:1])
    encoder = random.choice(["default", "default", "features", "pair"])
    if encoder == "pair" and (family != "normal" or kind == "DiscreteAmortizedGuide"):
        encoder = "features"
    if s.steps and family in ("normal", "structured") and random.random() < 0.6:
        encoder = "steps"
    sees = random.choice(["observed", "observed", "function", "name", "names"])
    return GuideSpec(kind, family, encoder, sees)


def _valid(s: Structure) -> Structure:
    """Drops what cannot go together, in Pyro or by what a field means."""
    guide = s.guide
    if s.steps:
        s = replace(s, latents=tuple(replace(site, plates=()) for site in s.latents), inner=())
    if s.outside == "long" and (s.dim != -1 or s.inner):
        s = replace(s, outside="total")
    if s.state is not None:
        if s.state[1] == "dim" and s.dim == -3:
            s = replace(s, dim=-1)
        if s.state[1] == "size" and s.size < 3:
            s = replace(s, size=3)
        guide = replace(guide, family=guide.family if s.state[1] != "size" else "normal")
        s = replace(s, shared="none", covariate="none", axis="natural", numpy=False)
    if s.discrete != "none":
        s = replace(s, draws=False)
    if s.subsample == "unsized":  # nothing expands the sites of such a plate
        s = replace(s, inner=(), mask="none" if s.mask == "obs_mask" else s.mask, discrete="none")
        s = replace(s, latents=tuple(replace(z, plates=()) for z in s.latents))
        s = replace(s, observed=tuple(replace(x, plates=()) for x in s.observed))
        s = replace(s, theme="plain" if s.theme in ("discrete", "inner_subsample", "entries") else s.theme)
        if guide.kind == "DiscreteAmortizedGuide":
            guide = replace(guide, kind="AmortizedGuide")
    if guide.kind == "PerDatapointGuide":
        guide = replace(guide, encoder="default", sees="observed")
    named = s.form in ("positional", "keyword") and s.dim == -1 and not s.inner and s.axis != "last" and not s.cut
    if guide.sees in ("name", "names") and not named:
        guide = replace(guide, sees="observed" if s.form == "closure" else "function")
    if guide.sees == "function" and (s.form == "closure" or s.state is not None):
        guide = replace(guide, sees="observed")
    return replace(s, guide=guide)
