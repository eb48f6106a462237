"""The Pyro model of a structure, its arguments, and the Python state that it reads behind a guide's back."""

from __future__ import annotations

import collections
import contextvars
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from structures import Inner, Site, Structure
from torch import Tensor, nn
from torch.distributions import biject_to

__all__ = ["NESTING", "Program"]

NESTING = 5
"""Number of plates that the ELBOs make room for; with less room than the shapes of some sites, Pyro cuts these wrongly
where it compares model and guide, and finds a difference that is none."""
Named = collections.namedtuple("Named", ["x_0", "x_1", "shared", "covariate", "index"])  # noqa: PYI024
MODE = 0


def spread(shape: tuple[int, ...]) -> Tensor:
    """Weights that differ from entry to entry."""
    count = max(1, torch.Size(shape).numel())
    return torch.linspace(0.5, 1.0, count).reshape(shape) / count**0.5


def weighted_sum(value: Tensor, event_dim: int) -> Tensor:
    """A weighted sum over the event dimensions."""
    if not event_dim:
        return 0.8 * value
    return (value * spread(tuple(value.shape[-event_dim:]))).flatten(-event_dim).sum(-1)


def expand(base: Any, event: tuple[int, ...]) -> Any:
    """Independent copies over the event dimensions; the parameters have size 1 there."""
    return base.expand(base.batch_shape[: len(base.batch_shape) - len(event)] + event).to_event(len(event))


def _transformed(*transforms: Any) -> Callable[..., Any]:
    return lambda h, event: dist.TransformedDistribution(expand(dist.Normal(h, 0.9), event), [t() for t in transforms])


def _simplex(h: Tensor, event: tuple[int, ...]) -> Any:
    base = expand(dist.Normal(h, 0.9), (event[0] - 1,))
    return dist.TransformedDistribution(base, [dist.transforms.StickBreakingTransform()])


PRIORS: dict[str, Callable[[Tensor, tuple[int, ...]], Any]] = {
    "real": lambda h, event: expand(dist.Normal(h, 1.2), event),
    "positive": lambda h, event: expand(dist.LogNormal(h, 0.7), event),
    "unit": _transformed(dist.transforms.SigmoidTransform),
    "ordered": _transformed(dist.transforms.OrderedTransform),
    "simplex": _simplex,
    "correlated": lambda h, event: dist.MultivariateNormal(
        h.expand(h.shape[:-1] + event), scale_tril=torch.eye(2) + 0.3 * torch.ones(2, 2).tril()
    ),
    "student": lambda h, event: expand(dist.StudentT(4.0, h, 1.0), event),
    "gamma": lambda h, event: expand(dist.Gamma(2.5 + h.tanh(), 1.5), event),
    "beta": lambda h, event: expand(dist.Beta(2.5 + h.tanh(), 1.5), event),
    "interval": lambda h, event: expand(dist.Uniform(-1.0, 3.0).expand(h.shape), event),
    "dirichlet": lambda h, event: dist.Dirichlet((2.5 + h.tanh()).expand(h.shape[:-1] + event)),
    "cholesky": lambda h, event: dist.LKJCholesky(3, 2.5 + h.tanh().squeeze(-1).squeeze(-1)),
}


def straight_through(h: Tensor) -> Tensor:
    return h + (h.clamp(-0.5, 0.5) - h).detach()


def stop(h: Tensor) -> Tensor:
    return 0.5 * h + 0.5 * h.detach()


def without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        bounded = h.tanh()
    return 0.5 * h + bounded


DETACHED = {"straight_through": straight_through, "stop": stop, "no_grad": without_gradient}


class State:
    """A mode, 0 or 1, that a model reads from where no guide looks."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.held: Any = {"dictionary": {f"option_{i}": i for i in range(120)} | {"mode": 0}}.get(source, 0)
        if source == "deque":
            self.held = collections.deque([0])
        if source == "context":
            self.held = contextvars.ContextVar("mode", default=0)
        if source == "generator":
            self.held = iter(lambda: self._mode, None)
        self._mode = 0
        cell = 0

        def read() -> int:
            return cell

        def write(mode: int) -> None:
            nonlocal cell
            cell = mode

        self._read, self._write = read, write
        self.write(0)

    @property
    def mode(self) -> int:
        return self._mode

    def read(self) -> int:
        match self.source:
            case "closure":
                return self._read()
            case "dictionary":
                return int(self.held["mode"])
            case "deque":
                return int(self.held[0])
            case "environment":
                return int(os.environ.get("FUZZ_MODE", "0"))
            case "context":
                return int(self.held.get())
            case "global":
                return MODE
            case "generator":
                return int(next(self.held))
            case "property":
                return self.mode
            case _:
                return self._mode

    def write(self, mode: int) -> None:
        global MODE  # noqa: PLW0603
        MODE = self._mode = mode
        self._write(mode)
        os.environ["FUZZ_MODE"] = str(mode)
        if self.source == "dictionary":
            self.held["mode"] = mode
        if self.source == "deque":
            self.held[0] = mode
        if self.source == "context":
            self.held.set(mode)


class Program:
    """The model of a structure. One that is not traceable reads values, so that no graph of it can be kept."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.part = 0
        self.state = State(structure.state[0]) if structure.state else None
        self.model = self._wrapped()

    def _wrapped(self) -> Any:
        if self.structure.program == "module":
            return Module(self)
        if self.structure.program == "object":
            return Object(self)

        def model(
            x_0: Any = None, x_1: Any = None, shared: Any = None, covariate: Any = None, index: Any = None
        ) -> None:
            self.run(x_0, x_1, shared, covariate, index)

        return model

    # Arguments

    def num_datapoints(self, part: int) -> int:
        """Number of datapoints in all data of a part; parts that subsample share their data."""
        s = self.structure
        return s.second if part and s.subsample in ("whole", "unsized") else s.size

    def index(self, part: int) -> Tensor | None:
        s = self.structure
        if s.subsample != "explicit":
            return None
        order = torch.randperm(s.size, generator=torch.Generator().manual_seed(s.number + part))
        return order[: s.batch if not part else 1 + s.number % s.size]

    def tensors(self, part: int) -> dict[str, Tensor | None]:
        """The arguments by name, before they take their form."""
        s, size = self.structure, self.num_datapoints(part)
        generator = torch.Generator().manual_seed(100 * s.seed + s.number + (part if size != s.size else 0))
        index = self.index(part)
        found: dict[str, Tensor | None] = {"x_0": None, "x_1": None, "shared": None, "covariate": None, "index": index}
        for i, site in enumerate(s.observed):
            x = torch.randn(self.shape(site, size), generator=generator)
            x = x.index_select(self.axis(site), index) if s.cut and index is not None else x
            found[f"x_{i}"] = self.moved(x, site)
        shapes = {"vector": (s.size,), "rows": (s.size, 2), "columns": (2, s.size)}
        fixed = torch.Generator().manual_seed(s.number)
        if s.shared != "none":
            first = found["x_0"]
            shape = tuple(first.shape) if s.shared == "alike" and first is not None else shapes.get(s.shared, (s.size,))
            found["shared"] = torch.randn(shape, generator=fixed)
        if s.covariate != "none" or s.scale.startswith("tensor") or s.mask == "latent":
            covariate = torch.randn((2, size), generator=generator)
            found["covariate"] = covariate.T.contiguous() if s.covariate == "rows" else covariate
        return found

    def shape(self, site: Site, size: int) -> tuple[int, ...]:
        """Shape of a site's values, given the number of datapoints."""
        s = self.structure
        sizes = {s.dim: size, **{p.dim: p.size for p in s.inner if p.dim in site.plates}}
        sizes |= {-1: site.anonymous} if site.anonymous else {}
        return tuple(sizes.get(d, 1) for d in range(min(sizes), 0)) + site.event

    def axis(self, site: Site) -> int:
        """Where the datapoints lie in a value, counted from the right."""
        return self.structure.dim - len(site.event)

    def moved(self, x: Tensor, site: Site) -> Tensor:
        where = {"first": 0, "last": -1}.get(self.structure.axis)
        return x if where is None else x.movedim(self.axis(site), where).contiguous()

    def moved_back(self, x: Tensor, site: Site) -> Tensor:
        where = {"first": 0, "last": -1}.get(self.structure.axis)
        return x if where is None else x.movedim(where, self.axis(site))

    def arguments(self, part: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call. Data in a closure are those of the part that was asked for last."""
        s = self.structure
        self.part = part
        found: dict[str, Any] = self.tensors(part)
        if s.numpy:
            found = {name: value if value is None else value.numpy() for name, value in found.items()}
        given = {name: value for name, value in found.items() if value is not None}
        match s.form:
            case "keyword":
                return (), given
            case "dictionary":
                return (given,), {}
            case "list":
                return (list(found.values()),), {}
            case "tuple":
                return (tuple(found.values()),), {}
            case "named":
                return (Named(**found),), {}
            case "closure":
                return (), {}
            case _:
                return tuple(found.values()), {}

    def unpacked(self, *values: Any) -> dict[str, Tensor | None]:
        form = self.structure.form
        if form == "closure":
            return self.tensors(self.part)
        names = Named._fields
        if form in ("dictionary", "list", "tuple", "named"):
            held = values[0]
            values = tuple(held.get(n) for n in names) if isinstance(held, dict) else tuple(held)
        return {n: None if v is None else torch.as_tensor(v) for n, v in zip(names, values, strict=True)}

    def rows(self, *args: Any, **kwargs: Any) -> Tensor:
        """What an encoder may see: the first observed site of the datapoints at hand, one row for each."""
        names = Named._fields
        values = self.unpacked(*(*args, *(kwargs.get(n) for n in names[len(args) :])))
        s, x = self.structure, values["x_0"]
        assert x is not None
        x = self.moved_back(x, s.observed[0]).movedim(self.axis(s.observed[0]), 0)
        if s.subsample == "explicit" and not s.cut:
            x = x[values["index"]]
        if s.subsample == "random":
            x = pyro.subsample(x.movedim(0, self.axis(s.observed[0])), event_dim=len(s.observed[0].event))
            x = x.movedim(self.axis(s.observed[0]), 0)
        return x.reshape(len(x), -1)

    # The model

    def detached(self, h: Tensor) -> Tensor:
        """A term of the linear predictor, of whose gradient some models cut off a part."""
        kind = self.structure.detach
        return h if kind == "none" else DETACHED[kind](h)

    def run(self, *values: Any) -> None:
        s = self.structure
        if s.draws:
            torch.rand(2), np.random.rand(), random.random()
        given = self.unpacked(*values)
        change = None if self.state is None or s.state is None else s.state[1]
        mode = 0 if self.state is None else self.state.read()
        size = self.num_datapoints(self.part if s.form == "closure" else self._part_of(given))
        dim = s.dim
        if change == "size":
            size -= mode
        if change == "dim":
            dim -= mode
        options: dict[str, Any] = {"subsample": given["index"]} if s.subsample == "explicit" else {}
        options |= {"subsample_size": s.batch} if s.subsample == "random" else {}
        plates = {p.dim: self._inner_plate(p) for p in s.inner}
        plates[s.dim] = pyro.plate("data", None if s.subsample == "unsized" else size, dim=dim, **options)
        Run(self, given, plates, size, change if mode else None)()

    def _part_of(self, given: dict[str, Tensor | None]) -> int:
        """Which part the data belong to, by their number: what a model would read off its arguments."""
        s, x = self.structure, given["x_0"]
        assert x is not None
        whole = s.subsample in ("whole", "unsized")
        return int(whole and self.moved_back(x, s.observed[0]).shape[self.axis(s.observed[0])] != s.size)

    def _inner_plate(self, plate: Inner) -> Any:
        return pyro.plate(f"inner_{-plate.dim}", plate.size, dim=plate.dim, subsample_size=plate.batch)


class Object:
    """A model that is an object."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(
        self, x_0: Any = None, x_1: Any = None, shared: Any = None, covariate: Any = None, index: Any = None
    ) -> None:
        self.program.run(x_0, x_1, shared, covariate, index)


class Module(nn.Module):
    """A model that is a module with a buffer that every run of it in training mode changes."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("runs", torch.zeros(()))

    def forward(
        self, x_0: Any = None, x_1: Any = None, shared: Any = None, covariate: Any = None, index: Any = None
    ) -> None:
        if self.training:
            self.runs.add_(1.0)  # type: ignore[operator]
        self.program.run(x_0, x_1, shared, covariate, index)


class Run:
    """One run of the model."""

    def __init__(
        self, program: Program, given: dict[str, Any], plates: dict[int, Any], size: int, change: str | None
    ) -> None:
        self.program, self.given, self.plates, self.size, self.change = program, given, plates, size, change
        self.s = program.structure
        self.terms: list[tuple[Tensor, tuple[int, ...]]] = []
        self.offset = torch.zeros(())
        self.covariate = self._of_datapoints(given["covariate"])

    def __call__(self) -> None:
        s = self.s
        self.offset = self._globals()
        if self.given["shared"] is not None:
            shared = self.given["shared"]
            self.offset = self.offset + 0.3 * weighted_sum(shared, shared.dim())
        with ExitStack() as stack:
            if self.change == "scale" or s.scale == "all":
                stack.enter_context(poutine.scale(scale=0.5))
            if s.scale == "tensor_all":
                stack.enter_context(poutine.scale(scale=self._scale()))
            if s.mask == "latent":
                stack.enter_context(poutine.mask(mask=self._at_plate(self.covariate[0] > -0.5)))
            if s.discrete != "none":
                self._discrete()
            for i, site in enumerate(s.latents):
                self._latent(f"z_{i + 1}", site)
            for i, site in enumerate(s.observed):
                self._observe(f"x_{i}", site)
        if s.outside != "none":
            self._outside()

    def _of_datapoints(self, covariate: Tensor | None) -> Any:
        """The covariate of the datapoints at hand, ``(2, B)``."""
        if covariate is None:
            return None
        covariate = covariate.T if self.s.covariate == "rows" else covariate
        return covariate if self.s.subsample in ("whole", "unsized") else covariate[:, self.plates[self.s.dim].indices]

    def _at_plate(self, value: Tensor) -> Tensor:
        return value.reshape(value.shape + (1,) * (-self.s.dim - 1))

    def _scale(self) -> Tensor:
        return self._at_plate(0.4 + self.covariate[0].sigmoid())

    def _globals(self) -> Tensor:
        if self.s.globals == "plate":
            with pyro.plate("groups", 2, dim=-1):
                w = pyro.sample("w", dist.LogNormal(0.0, 0.5))
            return 0.3 * w.sum(-1, keepdim=True)
        return pyro.sample("w", dist.Normal(0.0, 1.0)) if self.s.globals == "single" else torch.zeros(())

    def _mean(self, site: Site) -> Tensor:
        """The linear predictor at a site: entry by entry in the plates it shares with a latent, else summed."""
        total = self.offset
        for value, dims in self.terms:
            for d in dims:
                if d not in site.plates:
                    value = (value * spread((value.shape[d],) + (1,) * (-d - 1))).sum(d, keepdim=True)
            total = total + 0.7 * value
        if site.anonymous:
            total = total + 0.1 * torch.arange(float(site.anonymous))
        while total.dim() > max(1, -self.s.dim, *(-d for d in site.plates)) and len(total) == 1:
            total = total.squeeze(0)  # left over from plates that the site is not in
        return total if self.s.linear else total.tanh()

    def _enter(self, site: Site, stack: ExitStack) -> None:
        s = self.s
        for d in [*site.plates, s.dim] if s.inner_first else [s.dim, *site.plates]:
            stack.enter_context(self.plates[d])

    def _rows(self, h: Tensor) -> Tensor:
        """Expanded to the datapoints where no plate does so."""
        if self.s.subsample != "unsized":
            return h
        return h.expand(torch.broadcast_shapes(h.shape, (self.size,) + (1,) * (-self.s.dim - 1)))

    def _discrete(self) -> None:
        kind = self.s.discrete
        with self.plates[self.s.dim]:
            if kind == "enumerated":
                k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            elif kind == "bernoulli":
                k = pyro.sample("k", dist.Bernoulli(0.4))
            else:
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))).to(torch.get_default_dtype())
        self.terms.append((k, ()))

    def _latent(self, name: str, site: Site) -> None:
        h = self._mean(site) if site.depends else torch.zeros((site.anonymous,) if site.anonymous else ())
        h = self._rows(h)
        with ExitStack() as stack:
            self._enter(site, stack)
            fn = PRIORS[site.prior](h.reshape(h.shape + (1,) * len(site.event)), site.event)
            value = pyro.sample(name, fn)
        u = biject_to(fn.support).inv(value) if self.s.linear else value.tanh()
        if not self.s.traceable:
            float(u.detach().sum())
        dims = (*site.plates, -1) if site.anonymous else site.plates
        term = weighted_sum(u, fn.event_dim)
        self.terms.append((self.program.detached(term), dims))

    def _data(self, name: str, site: Site) -> Tensor:
        s, axis = self.s, self.program.axis(site)
        x = self.program.moved_back(self.given[name], site)
        if self.change == "data":
            x = 1.0 - x
        if self.change == "size":
            x = x.narrow(axis, 0, self.size)
        if s.subsample in ("explicit", "random") and not s.cut:
            x = x.index_select(axis, self.plates[s.dim].indices)
        for plate in s.inner:
            if plate.batch is not None and plate.dim in site.plates:
                x = x.index_select(plate.dim - len(site.event), self.plates[plate.dim].indices)
        return x

    def _observe(self, name: str, site: Site) -> None:
        s = self.s
        with ExitStack() as stack:
            self._enter(site, stack)
            x = self._data(name, site)
            h = self._rows(self._mean(site))
            if s.covariate != "none":
                h = h + 0.5 * self._at_plate(self.covariate[1])
            present = x.reshape(x.shape[: x.dim() - len(site.event)] + (-1,))[..., 0] > 0
            if s.scale in ("number", "tensor"):
                stack.enter_context(poutine.scale(scale=0.3 if s.scale == "number" else self._scale()))
            if s.mask == "handler":
                stack.enter_context(poutine.mask(mask=present))
            fn = expand(dist.Normal(h.reshape(h.shape + (1,) * len(site.event)), 0.8), site.event)
            if s.mask == "dist" or self.change == "mask":
                fn = fn.mask(present)
            pyro.sample(name, fn, obs=x, obs_mask=present if s.mask == "obs_mask" else None)

    def _outside(self) -> None:
        """A site outside of the datapoint plate that depends on its latents."""
        h = self._mean(Site("real", (), ()))
        if self.s.outside == "factor":
            pyro.factor("penalty", -0.5 * h.square().sum(self.s.dim, keepdim=True))
        elif self.s.outside == "total":
            pyro.sample("total", dist.Normal(h.sum(self.s.dim, keepdim=True), 1.0), obs=torch.tensor(2.0))
        else:
            owner = torch.arange(self.size).repeat_interleave(2)
            with pyro.plate("responses", len(owner), dim=-1):
                pyro.sample("y", dist.Normal(h[..., owner], 0.5), obs=spread((len(owner),)) * 3)
