"""What errors about guides advise: of their options, families and codes, of models that change, and of training."""

import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Function
from pyro import poutine
from pyro.distributions.transforms import conditional_spline
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_median,
)
from remedies import X2, Cases, X, made, model, of_latent, step, train
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    DeepSetEncoder,
    DiscreteAmortizedGuide,
    Flow,
    LearnedUpdate,
    MLPEncoder,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
    SequenceEncoder,
    Structured,
    VectorQuantizedGuide,
    collapse_report,
    optimize_local,
)
from pyro_amortized.inference.refined import Refined
from pyro_amortized.inference.strategies import PerDatapoint, Prior
from pyro_amortized.training import AggressiveEncoder, KLAnnealing, linear_schedule
from pyro_amortized.updates.gradient import Adam

case = Cases()
ENUM = TraceEnum_ELBO(max_plate_nesting=1)

# Options


def rows(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), dim=-1)


case(
    "a plate for create_plates",
    lambda: made(create_plates=nn.Identity()),
    "create_plates=None",
    lambda: made(create_plates=None),
)
case(
    "a value for init_loc_fn",
    lambda: made(init_loc_fn=torch.zeros(6)),
    "init_loc_fn=pyro.infer.autoguide.init_to_median",
    lambda: made(init_loc_fn=init_to_median),
)
for Encoder in (MLPEncoder, DeepSetEncoder):
    case(
        f"an instance of an activation, {Encoder.__name__}",
        lambda Encoder=Encoder: Encoder(1, activation=nn.ReLU()),  # type: ignore[misc]
        "activation=torch.nn.SiLU",
        lambda Encoder=Encoder: Encoder(1, activation=nn.SiLU),  # type: ignore[misc]
    )
    case(
        f"data for input_dim, {Encoder.__name__}",
        lambda Encoder=Encoder: Encoder(X2),  # type: ignore[misc]
        r"input_dim=x\[0\].numel\(\)",
        lambda Encoder=Encoder: Encoder(X2[0].numel()),  # type: ignore[misc]
    )
case(
    "an instance of an activation, LearnedUpdate",
    lambda: LearnedUpdate(activation=nn.ELU()),
    "activation=torch.nn.ELU",
    lambda: LearnedUpdate(activation=nn.ELU),
)
POSITIVE = of_latent(lambda: dist.LogNormal(0.0, 1.0))
case(
    "start at the edge of the support",
    lambda: made(POSITIVE, init_loc_fn=lambda site: torch.zeros(6)),
    "init_loc_fn=pyro.infer.autoguide.init_to_feasible",
    lambda: train(POSITIVE, init_loc_fn=init_to_feasible),
)


def in_a_list(*sizes: int, alone: bool = False) -> None:
    pyro.clear_param_store()
    model = with_global
    guide: Any = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["loc"])))
    guide.append(AmortizedGuide(poutine.block(model, hide=["loc"])))
    if alone:
        guide = AmortizedGuide(model, global_guide=AutoDelta)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for size in sizes:
        svi.step(torch.randn(size))


def with_global(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


case("batches in an AutoGuideList", lambda: in_a_list(6, 4), "batches of equal size", lambda: in_a_list(6, 6))
case(
    "batches in an AutoGuideList, alone",
    lambda: in_a_list(6, 4),
    "on its own with global_guide=",
    lambda: in_a_list(6, 4, alone=True),
)


def conditioned(vectorized: bool) -> None:
    guide = made(with_global, encoder_input=["x", "loc"])
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
    assert math.isfinite(elbo.loss(with_global, guide, X))


def predicted(parallel: bool) -> None:
    guide = made(with_global, encoder_input=["x", "loc"])
    Predictive(with_global, guide=guide, num_samples=3, parallel=parallel)(X)


case(
    "particles of a global latent that the encoder sees",
    lambda: conditioned(True),
    "vectorize_particles=False",
    lambda: conditioned(False),
)
case(
    "predictions from a global latent that the encoder sees",
    lambda: predicted(True),
    r"Predictive\(parallel=False\)",
    lambda: predicted(False),
)


def subsampled(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def created(index: Tensor, **options: Any) -> None:
    pyro.clear_param_store()
    step(subsampled, AmortizedGuide(subsampled, **options), X, index)


INDEX = torch.tensor([1, 3, 5])
case(
    "plates of other indices",
    lambda: created(INDEX, create_plates=lambda x, index: pyro.plate("data", 6, subsample=torch.arange(3))),
    "create_plates without that plate",
    lambda: created(INDEX, create_plates=lambda x, index: []),
)


def given_data(indices: bool) -> Callable[[Tensor], None]:
    """As in pyro.contrib.cevae, a plate is given data for indices; or indices."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 9, subsample=torch.arange(6) if indices else x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a table of data without indices",
    lambda: train(given_data(False), PerDatapointGuide),
    r"pyro.plate\('data', 9, subsample=index\)",
    lambda: train(given_data(True), PerDatapointGuide),
)
case(
    "a table of data without indices, an encoder",
    lambda: train(given_data(False), PerDatapointGuide),
    "an AmortizedGuide",
    lambda: train(given_data(False)),
)

# Encoders that return something else


def column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


def changed(then: Callable[[Tensor], Any], guide_class: Any = AmortizedGuide, **options: Any) -> None:
    encoder = Function(column)
    guide = made(model, guide_class, encoder, **options)
    encoder.function = then
    guide(X)


case(
    "features of another width than at first",
    lambda: changed(lambda x: torch.stack([x, x], -1)),
    r"returns \(N, 1\) in every call",
    lambda: changed(lambda x: 2 * x.unsqueeze(-1)),
)
case(
    "features of half of the datapoints",
    lambda: changed(lambda x: column(x[:3])),
    "an encoder and an encoder_input whose first dimension runs over the plate",
    lambda: changed(column),
)


def sequence(numbered: bool = True) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        z = torch.zeros(())
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}" if numbered else "z" + "ab"[t], dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    return model


def by_step(numbered: bool = True, function: Any = None, **options: Any) -> None:
    encoder = Function(function or (lambda x: x.unsqueeze(-1)))
    train(sequence(numbered), AmortizedGuide, encoder, data=X2, encoder_input="x", **options)


case(
    "features by step of sites without numbers",
    lambda: by_step(numbered=False),
    r"features of shape \(N, H\)",
    lambda: (by_step(numbered=True), by_step(numbered=False, function=lambda x: x)),
)
for family in ("normal", "structured"):
    case(
        f"features by step of a flow, {family}",
        lambda: by_step(family="flow"),
        r"features of shape \(N, H\)",
        lambda family=family: (by_step(family=family), by_step(family="flow", function=lambda x: x)),  # type: ignore[misc]
    )


def of_whole(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).to_event(1), obs=x)


def by_sequence(**options: Any) -> None:
    encoder = SequenceEncoder(1, hidden_dims=(4,), **options)
    train(of_whole, AmortizedGuide, encoder, data=X2, encoder_input=lambda x: x.unsqueeze(-1))


case(
    "features by step of latents of the whole",
    by_sequence,
    r"SequenceEncoder\(..., pooled=True\)",
    lambda: by_sequence(pooled=True),
)
case(
    "more steps than the model has",
    lambda: by_step(function=lambda x: x.repeat(1, 2).unsqueeze(-1)),
    "as many steps T as the model has",
    by_step,
)

# Families


def strict(x: Tensor) -> None:
    """A model with a part that takes no subclasses of tensors, by which Pyro tracks what depends on what."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        if type(w) is not Tensor:
            raise TypeError(f"a tensor is wanted, and no {type(w).__name__}")
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


PARENTS = torch.tensor([[False, False], [True, False]])
case(
    "dependencies that cannot be found, a joint family",
    lambda: train(strict, family="structured"),
    'family="multivariate_normal"',
    lambda: train(strict, family="multivariate_normal"),
)
case(
    "dependencies that cannot be found, given",
    lambda: train(strict, family="structured"),
    r"family=lambda latent_dim: Structured\(latent_dim, parents\)",
    lambda: train(strict, family=lambda latent_dim: Structured(latent_dim, PARENTS)),
)
case(
    "a flow of a transform without context",
    lambda: Flow(2, lambda dim, context_dim: dist.transforms.AffineTransform(0.0, 1.0)),
    "pyro.distributions.transforms.conditional_spline",
    lambda: train(family=lambda dim: Flow(dim, lambda dim, context_dim: conditional_spline(dim, context_dim))),
)


def test_a_flow_without_zuko(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zuko.flows", None)
        with pytest.raises(ValueError, match="zuko is not installed; try pip install zuko"):
            Flow(2, "zuko.NSF")
    Flow(2, "zuko.NSF")


def test_densities_of_planar_flows_at_other_points() -> None:
    pair = of_latent(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1))
    points = torch.zeros(6, 2)
    with pytest.raises(NotImplementedError, match='no inverse; try transform="affine_autoregressive"'):
        made(pair, family=lambda dim: Flow(dim, transform="planar")).posterior(X).log_prob(points)
    flow = made(pair, family=lambda dim: Flow(dim, transform="affine_autoregressive"))
    assert flow.posterior(X).log_prob(points).isfinite().all()


# Strategies on their own

case(
    "the prior without an objective",
    lambda: Prior()((), None),
    "a guide that refines",
    lambda: train(model, SemiAmortizedGuide, initial="prior", num_steps=1),
)


def refined(encoder_gradient: str) -> Refined:
    return Refined(PerDatapoint(torch.zeros(6, 2)), Adam(0.1), 1, encoder_gradient=encoder_gradient)


case(
    "refinement without an objective",
    lambda: refined("unrolled")((), None),
    "a guide that refines",
    lambda: train(model, SemiAmortizedGuide, num_steps=1),
)
case("another gradient of a start", lambda: refined("nothing"), '"anchored"', lambda: refined("anchored"))


def learned(setup: bool) -> None:
    update = LearnedUpdate((4,))
    if setup:
        update.setup(Normal(1), num_features=0)
    update.update(torch.zeros(3, 2), torch.ones(3, 2), ())


case(
    "a learned update without a network",
    lambda: learned(False),
    r"update.setup\(family, num_features\) first",
    lambda: learned(True),
)

# Guides from files


def loaded(guide_class: Any, with_model: bool, *args: Any, of: Any = model, **options: Any) -> None:
    """A guide from a file that has seen arguments of these shapes."""
    data = options.pop("data", X)
    guide = made(of, guide_class, *args, data=data, encoder_input=column, **options)
    guide(data)
    guide = pickle.loads(pickle.dumps(guide))
    pyro.clear_param_store()
    if with_model:
        guide.model = of
    guide(data)


case(
    "refinement by a loaded guide",
    lambda: loaded(SemiAmortizedGuide, False, num_steps=2),
    "`guide.model = model`",
    lambda: loaded(SemiAmortizedGuide, True, num_steps=2),
)


def built_later(with_model: bool) -> None:
    """A guide from a file that was written before the guide was built, as its encoder failed."""
    encoder = Fails()
    pyro.clear_param_store()
    guide = AmortizedGuide(model, encoder, encoder_input="x")
    with pytest.raises(RuntimeError, match="not yet"):
        guide(X)
    guide = pickle.loads(pickle.dumps(guide))
    guide._encoder_spec[0].fails = False
    if with_model:
        guide.model = model
    guide(X)


class Fails(nn.Module):
    fails = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("not yet")
        return column(x)


LATER = [False]


def strict_later(x: Tensor) -> None:
    """A model of which Pyro cannot tell what depends on what, at times."""
    z = torch.zeros(())
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            if LATER[0] and type(z) is not Tensor:
                raise TypeError("a tensor is wanted")
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def more_steps(with_model: bool) -> None:
    """A guide from a file, the last call of which, with more steps than before, has failed."""
    x = torch.randn(6, 4)
    options = {"encoder_input": "x", "family": "structured"}
    guide = made(strict_later, AmortizedGuide, Function(column), data=x[:, :2], **options)
    LATER[0] = True
    with pytest.raises(ValueError, match="Cannot find which"):
        guide(x)
    LATER[0] = False
    guide = pickle.loads(pickle.dumps(guide))
    pyro.clear_param_store()
    if with_model:
        guide.model = strict_later
    guide(x)


case("more steps in a loaded guide", lambda: more_steps(False), "`guide.model = model`", lambda: more_steps(True))
case(
    "a loaded guide that had not been built",
    lambda: built_later(False),
    "`guide.model = model`",
    lambda: built_later(True),
)

# Discrete latents and codes


def labelled(x: Tensor, k: Tensor | None = None, extra: bool = False) -> None:
    with pyro.plate("data", len(x)):
        label = pyro.sample("k", dist.Bernoulli(0.5), obs=k)
        if extra:
            pyro.sample("j", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(label, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def labels(*first: Any) -> None:
    guide = DiscreteAmortizedGuide(labelled)
    pyro.clear_param_store()
    guide.setup(X, *first)
    guide(X)
    guide(X, (X > 0).float())


case(
    "labels that were observed at first",
    lambda: labels((X > 0).float()),
    r"guide.setup\(...\) with a call in which they are not observed",
    labels,
)


def categories(*numbers: int) -> None:
    current = [numbers[0]]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(current[0])))
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    guide = made(model, DiscreteAmortizedGuide)
    for current[0] in numbers:
        guide(X)


case(
    "another number of categories than at first",
    lambda: categories(3, 4),
    "the same structure in every call",
    lambda: categories(3, 3),
)


class Coded(nn.Module):
    """A model of codes."""

    def __init__(self, *, prior: Any = None, scale: float = 1.0, other: bool = False, positions: int = 2) -> None:
        super().__init__()
        self.codebook = Codebook(4, 2)
        self.prior = prior or (lambda: dist.Categorical(torch.ones(self.positions, 4)).to_event(1))
        self.scale, self.other, self.positions = scale, other, positions

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.scale):
                code = pyro.sample("code", self.prior())
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) if self.other else 0.0
            pyro.sample("x", dist.Normal(self.codebook(code.long()).sum((-1, -2)) + z, 1.0), obs=x)


def coded(model: Coded, encoder: nn.Module | None = None) -> Any:
    return made(model, VectorQuantizedGuide, model.codebook, encoder)


def trained(model: Coded, encoder: nn.Module | None = None) -> None:
    pyro.clear_param_store()
    step(model, VectorQuantizedGuide(model, model.codebook, encoder), X)


def masked() -> Any:
    return dist.Categorical(torch.ones(2, 4)).to_event(1).mask(torch.tensor(False))


FLAT = {"prior": lambda: dist.Categorical(logits=torch.zeros(4))}
for name, prior in (("no Categorical", lambda: dist.Bernoulli(0.5)), ("masked", masked)):
    case(
        f"codes of which the prior is {name}",
        lambda prior=prior: trained(Coded(prior=prior)),  # type: ignore[misc]
        r"`pyro.sample\('code', Categorical\(logits=torch.zeros\(4\)\)\)`",
        lambda: train(flat_codes, VectorQuantizedGuide, BOOK),
    )
BOOK = Codebook(4, 2)


def flat_codes(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2), pyro.plate("positions", 3, dim=-1):
        code = pyro.sample("code", dist.Categorical(logits=torch.zeros(4)))
        pyro.sample("x", dist.Normal(BOOK(code).sum(-1), 1.0), obs=x.unsqueeze(-1).expand(-1, 3))


case(
    "codes beside another latent",
    lambda: trained(Coded(other=True)),
    "Categorical sites alone",
    lambda: trained(Coded(other=False)),
)
case(
    "a pair for codes",
    lambda: trained(Coded(), Function(lambda x: (column(x), torch.ones(6, 1)))),
    r"\(N, ...\) to \(N, H\), or to \(N, P, D\)",
    lambda: [trained(Coded(), Function(f)) for f in (column, lambda x: column(column(x)).expand(-1, 2, 2))],
)
case(
    "features of other positions",
    lambda: trained(Coded(), Function(lambda x: column(column(x)).expand(-1, 3, 2))),
    r"an encoder to \(N, 2, 2\)",
    lambda: trained(Coded(), Function(lambda x: column(column(x)).expand(-1, 2, 2))),
)


def positions(*numbers: int) -> None:
    model = Coded(positions=numbers[0])
    guide = coded(model)
    for model.positions in numbers:
        guide(X)


case(
    "another number of positions than at first",
    lambda: positions(2, 3),
    "the same structure in every call",
    lambda: positions(2, 2),
)


def code_report(model: Coded, *, dropout: bool = False, evaluated: bool = False) -> None:
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 40), nn.Dropout(0.5)) if dropout else None
    guide = coded(model, encoder)
    collapse_report(model, guide.eval() if evaluated else guide, (X,))


case(
    "an encoder of codes with dropout",
    lambda: code_report(Coded(), dropout=True),
    r"guide.eval\(\)",
    lambda: code_report(Coded(), dropout=True, evaluated=True),
)
case(
    "a report of scaled codes",
    lambda: code_report(Coded(scale=0.5)),
    "arguments that set the scale to 1",
    lambda: code_report(Coded(scale=1.0)),
)
case(
    "features that are not finite",
    lambda: changed_codes(lambda x: column(x) / 0.0),
    "a look at the data",
    lambda: changed_codes(column),
)


def changed_codes(then: Callable[[Tensor], Tensor]) -> None:
    encoder = Function(column)
    guide = coded(Coded(), encoder)
    encoder.function = then
    guide(X)


# Models that change


def local_or_not(*local: bool, one_each: bool = False) -> None:
    guides: dict[bool, Any] = {}
    pyro.clear_param_store()

    def model(x: Tensor, local: bool) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0)) if local else loc
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for value in local:
        key = value if one_each else True
        guides[key] = guides.get(key) or AmortizedGuide(model, name=f"guide_{key}")
        guides[key](X, value)


for before in (True, False):
    case(
        f"no local latents any more, or at first: {before}",
        lambda before=before: local_or_not(before, not before),  # type: ignore[misc]
        "the same structure in every call",
        lambda before=before: local_or_not(before, before),  # type: ignore[misc]
    )
case(
    "no local latents any more, two guides",
    lambda: local_or_not(True, False),
    "one guide per structure",
    lambda: local_or_not(True, False, True, one_each=True),
)


def unsized(size: int | None) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, torch.ones(6)), obs=x)

    return model


case(
    "a plate that has no size to expand a latent to",
    lambda: train(unsized(None)),
    r"`pyro.plate\('data', 6\)`",
    lambda: train(unsized(6)),
)


def scaled(scale: Tensor) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


WITHIN, BETWEEN = torch.tensor([1.0, 2.0]), torch.arange(1.0, 7.0).unsqueeze(-1)
case(
    "a scale within a datapoint",
    lambda: train(scaled(WITHIN), SemiAmortizedGuide, num_steps=1, data=X2),
    "one number for each datapoint",
    lambda: train(scaled(BETWEEN), SemiAmortizedGuide, num_steps=1, data=X2),
)


def mixture(*, together: bool = True, inside: bool = True) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        k = None if inside else pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0 if together else 1.0):
            with poutine.scale(scale=1.0 if together else 2.0):
                if inside:
                    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    return model


def refines(model: Any) -> None:
    train(model, SemiAmortizedGuide, num_steps=1, elbo=ENUM)


case(
    "discrete latents of other scales",
    lambda: refines(mixture(together=False)),
    "poutine.scale around all of them",
    lambda: refines(mixture(together=True)),
)
case(
    "a discrete latent of all datapoints",
    lambda: refines(mixture(inside=False)),
    "a discrete latent inside the plate",
    lambda: refines(mixture(inside=True)),
)


def rare(always: bool) -> Callable[[Tensor], None]:
    """A model with a site that shows at latents that are rare under the prior, or always."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            if always or (z > 80.0).any():
                pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    return model


case(
    "a latent that shows at some values of others",
    lambda: optimize_local(rare(False), made(rare(False), data=X + 100.0), (X + 100.0,)),
    "whatever the values of its latents",
    lambda: optimize_local(rare(True), made(rare(True), data=X + 100.0), (X + 100.0,)),
)


def subsample(*sizes: int) -> Any:
    """Calls of a model with a random subsample, the size of which changes behind its arguments' back."""
    current = [sizes[0]]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=current[0]) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = made(model)
    for current[0] in sizes:
        guide(X)
    return guide, current


def test_another_subsample_is_taken_in_the_next_call() -> None:
    guide, size = subsample(2, 2)
    size[0] = 3
    with pytest.raises(ValueError, match=r"(?s)Cannot use the subsample .*; try again: the next call looks"):
        guide(X)
    assert guide(X)["z"].shape == (3,)


def test_a_broken_promise_is_mended_by_another_try_or_by_an_argument() -> None:
    scales = [1.0]

    def model(x: Tensor, scale: float | None = None) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=scales[0] if scale is None else scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = made(model, encoder_input="x")
    guide(X)
    scales[0] = 2.0
    with pytest.raises(ValueError, match="Try again: .*; or make what changes an argument of the model"):
        guide(X)
    step(model, guide, X)
    given = made(model, encoder_input="x")
    for scale in (1.0, 1.0, 2.0, 1.0, 2.0):
        given(X, scale)


# Training


def anneal(schedule: Any = None, guide: Any = None, of: Any = model, **options: Any) -> None:
    pyro.clear_param_store()
    guide = guide or AmortizedGuide(of)
    annealing = KLAnnealing(of, guide, schedule or linear_schedule(1000), **options)
    for _ in range(2):
        SVI(annealing.model, annealing.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO()).step(X)
        annealing.step()


for beta in (torch.tensor(0.5), -1.0, math.nan, True):
    case(
        f"beta={beta}",
        lambda beta=beta: anneal(lambda step: beta),  # type: ignore[misc]
        r"a schedule from steps to floats, linear_schedule\(1000\)",
        lambda: [anneal(linear_schedule(1000)), anneal(lambda step: 0.5)],
    )
for name, right in (("AmortizedGuide", AmortizedGuide), ("AutoNormal", AutoNormal)):
    case(
        f"annealing of AutoDiagonalNormal, {name}",
        lambda: anneal(guide=AutoDiagonalNormal(model)),
        name,
        lambda right=right: anneal(guide=right(model)),  # type: ignore[misc]
    )


def by_hand(plate: str) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        datapoints = pyro.plate("data", len(x))
        with datapoints:
            pyro.sample("w", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with datapoints if plate == "data" else pyro.plate(plate, len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return guide


case(
    "annealing of latents that are drawn elsewhere",
    lambda: anneal(guide=by_hand("other")),
    "drawing them there",
    lambda: anneal(guide=by_hand("data")),
)


def crossed(x: Tensor) -> None:
    items, persons = pyro.plate("items", 2, dim=-2), pyro.plate("persons", len(x), dim=-1)
    with persons:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with items, persons:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))


def global_only(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


case(
    "annealing in another plate",
    lambda: anneal(of=crossed, guide=AutoNormal(crossed)),
    "naming the plate with plate=",
    lambda: anneal(of=crossed, guide=AutoNormal(crossed), plate="persons"),
)
case(
    "annealing without local latents",
    lambda: anneal(of=global_only),
    "without annealing",
    lambda: step(global_only, AmortizedGuide(global_only)),
)


def aggressive(guide_class: Any) -> None:
    pyro.clear_param_store()
    trainer = AggressiveEncoder(model, guide_class(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(trainer.step(X))


case(
    "aggressive training of another guide",
    lambda: aggressive(AutoNormal),
    "an AmortizedGuide",
    lambda: aggressive(AmortizedGuide),
)


@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
