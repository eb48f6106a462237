"""What users hand in that cannot be right: an error at once that says what is wanted, and nothing lost."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Function
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    Codebook,
    CollapseReport,
    DeepSetEncoder,
    DiscreteAmortizedGuide,
    Flow,
    GapEstimate,
    GradientAscent,
    IterativeAmortizedGuide,
    LearnedUpdate,
    LowRankMultivariateNormal,
    Mixture,
    MLPEncoder,
    MultivariateNormal,
    NaturalGradient,
    Newton,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
    Structured,
    VectorQuantizedGuide,
    calibrate,
    collapse_report,
    compare_gaps,
    estimate_gaps,
    evidence_bounds,
    log_evidence,
    optimize_local,
    posterior_summary,
    psis,
    simulate,
    to_arviz,
)
from pyro_amortized.families import build_family
from pyro_amortized.guides.checks import check_values
from pyro_amortized.inference.strategies import Prior
from pyro_amortized.training import (
    AggressiveEncoder,
    CapacityELBO,
    FreeBitsELBO,
    KLAnnealing,
    cyclical_schedule,
    linear_schedule,
    sigmoid_schedule,
)

matplotlib.use("Agg")
nan, inf = math.nan, math.inf
X = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
VANISHED = torch.zeros(2, 16, dtype=torch.float64)
VANISHED[0] = torch.tensor(
    [-2.9, -2.5, -3.9, -5.1, -1.5, -526.1, -3.8, -10.3, 1.8, 2.0, -10.1, -25.4, -2.0, -4.7, -3.2, 1.0]
)
"""Of a low-rank normal in four dimensions; the second row has nothing wrong."""


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def with_latent(name: str, prior: Callable[[], Any], plate: str = "data") -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        with pyro.plate(plate, len(x)):
            z = pyro.sample(name, prior())
            pyro.sample("x", dist.Normal(z.reshape(len(x), -1)[:, :1], 1.0).expand([len(x), 2]).to_event(1), obs=x)

    return other


def with_global(x: Tensor) -> None:
    pyro.sample("scale", dist.Normal(0.0, 1.0))
    model(x)


def nan_decoder(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z - 1e9).log(), 1.0, validate_args=False).to_event(1), obs=x)


def made(guide_class: Any = AmortizedGuide, *args: Any, of: Any = model, **options: Any) -> Any:
    pyro.clear_param_store()
    guide = guide_class(of, *args, **options)
    guide.setup(X)
    return guide


@cache
def shared(guide_class: Any = AmortizedGuide) -> Any:
    return made(guide_class)


def goes_wrong(function: Callable[[Tensor], Any]) -> None:
    """A guide whose encoder returns something else than it did when the guide was set up."""
    encoder = Function(lambda x: x)
    guide = made(AmortizedGuide, encoder)
    encoder.function = function
    guide.median(X)


def steps(of: Any, guide: Any, elbo: Any) -> None:
    SVI(of, guide, pyro.optim.Adam({"lr": 0.1}), elbo).step(X)


def anneal(schedule: Any, **options: Any) -> None:
    annealing = KLAnnealing(model, shared(), schedule, **options)
    steps(annealing.model, annealing.guide, Trace_ELBO())


def load(state: Any, **options: Any) -> None:
    guide = made(**options)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    try:
        guide.load_state_dict(state)
    finally:
        assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())


def load_before_setup(state: Any, **options: Any) -> None:
    pyro.clear_param_store()
    guide = AmortizedGuide(model, **options)
    guide.load_state_dict(state)
    guide.median(X)


def state(**options: Any) -> dict[str, Any]:
    return dict(made(**options).state_dict())


DIAGNOSTICS: dict[str, Callable[..., Any]] = {
    "estimate_gaps": estimate_gaps,
    "log_evidence": log_evidence,
    "optimize_local": optimize_local,
    "collapse_report": collapse_report,
    "simulate": simulate,
    "calibrate": calibrate,
    "to_arviz": to_arviz,
    "evidence_bounds": evidence_bounds,
    "compare_gaps": compare_gaps,
    "posterior_summary": posterior_summary,
}
CASES: dict[str, tuple[Callable[[], Any], str]] = {}


def case(name: str, call: Callable[[], Any], match: str) -> None:
    assert name not in CASES
    CASES[name] = call, match


def each(name: str, values: dict[str, Any], call: Callable[[Any], Any], match: str) -> None:
    for label, value in values.items():
        case(f"{name}, {label}", lambda value=value: call(value), match)  # type: ignore[misc]


COUNTS = {"fraction": 2.5, "true": True, "negative": -1, "text": "10", "nan": nan, "huge": 10**30}
SEEDS = {"negative": -1, "none": None, "fraction": 1.5, "huge": 2**70, "text": "0", "true": True}
NUMBERS = {"negative": -1.0, "nan": nan, "infinite": inf, "text": "a", "none": None}

# Options of guides
each(
    "plate",
    {"int": 3, "list": ["data"], "object": torch.tensor(1)},
    lambda v: made(plate=v),
    "the name of a plate is wanted",
)
case("plate, unknown", lambda: made(plate="rows"), r"no plate of that name; try one of \['data'\]")
each(
    "family",
    {"Pyro's": dist.Normal, "torch's": torch.distributions.Normal},
    lambda v: made(family=v),
    "no VariationalFamily; try",
)
each("family", {"int": 3, "none": None}, lambda v: made(family=v), "neither a name nor a VariationalFamily")
case("family, unknown", lambda: made(family="norml"), "no variational family has that name")
case("family, wrong size", lambda: made(family=Normal(7)), "try latent_dim=2")
each(
    "init_scale",
    {**NUMBERS, "zero": 0.0, "true": True, "tensor": torch.ones(2)},
    lambda v: made(init_scale=v),
    "Cannot use init_scale",
)
each("name", {"int": 3, "empty": ""}, lambda v: made(name=v), "because it is no name")
each("global_guide", {"text": "normal", "none": None}, lambda v: made(global_guide=v), "try the class, global_guide=")
case("global_guide, instance", lambda: made(global_guide=AutoNormal(model)), "try the class, global_guide=")
each("init_loc_fn", {"tensor": X, "text": "median"}, lambda v: made(init_loc_fn=v), "a function of a site")
each(
    "init_loc_fn returns",
    {"other shape": torch.zeros(3), "text": "a", "nan": torch.full((6, 2), nan)},
    lambda v: made(init_loc_fn=lambda site: v),
    "Cannot start latent 'z'",
)
case("create_plates, int", lambda: made(create_plates=3), "a function of the model's arguments")
each(
    "create_plates returns",
    {"none": None, "int": 6, "ints": [6]},
    lambda v: made(create_plates=lambda x: v),
    "plates are wanted",
)
case("create_plates, other size", lambda: made(create_plates=lambda x: pyro.plate("data", 5, dim=-1)), "in the model 6")
each(
    "encoder_input",
    {"int": 3, "ints": [1], "tensor": X, "dict": {"data": [3]}},
    lambda v: made(encoder_input=v),
    "names are wanted",
)
case("encoder_input, twice", lambda: made(encoder_input={"data": ["x"], "inner": ["x"]}), "a name lies in it twice")
case("encoder_input, unknown", lambda: made(encoder_input="y"), r"no argument of that name; try one of \['x'\]")
case("encoder_input, none", lambda: made(encoder_input=[]), "the encoder then sees nothing")
each(
    "encoder_input returns",
    {
        "none": None,
        "nothing": (),
        "text": "x",
        "int": 3,
        "dict": {},
        "scalar": X.sum(),
        "half": [X, None],
        "array": X.numpy(),
        "no columns": X[:, :0],
    },
    lambda v: made(encoder_input=lambda x: v),
    "because tensors .* are wanted",
)
case("encoder_input returns, nan", lambda: made(encoder_input=lambda x: x * nan), "its input number 0 holds NaN")
case("encoder_input returns, rows", lambda: made(encoder_input=lambda x: x[:3]), "a row per datapoint")
case("encoder_input returns, complex", lambda: made(encoder_input=lambda x: x.cfloat()), "real tensors")
each("model", {"none": None, "text": "model", "tensor": X}, AmortizedGuide, "not callable; try passing the Pyro model")
case("sparse", lambda: PerDatapointGuide(model, sparse="yes"), "must be True or False")
case("table of other size", lambda: shared(PerDatapointGuide).median(X[:4]), "knows nothing of unseen data")

# Encoders of one's own
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: None,
    "int": lambda x: 3,
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x.cfloat(),
    "dict": lambda x: {"data": x},
    "list": lambda x: [x, x],
    "array": lambda x: x.numpy(),
    "text": lambda x: "a",
    "distribution": lambda x: dist.Normal(x, 1.0),
}
LEVELS = {"dict": lambda x: {"data": x.long()}, "list of levels": lambda x: {"data": [x]}}
each("encoder returns", {**WRONG, **LEVELS}, lambda v: made(AmortizedGuide, Function(v)), "floating tensors are wanted")
each("encoder turns to", {**WRONG, "pair": lambda x: (x, x)}, goes_wrong, "floating tensors are wanted")
for _class in (SemiAmortizedGuide, IterativeAmortizedGuide, DiscreteAmortizedGuide):
    no_levels = () if _class is SemiAmortizedGuide else ("dict",)
    some = {name: WRONG[name] for name in ("none", "integers", *no_levels)}
    each(
        f"encoder of {_class.__name__} returns",
        some,
        lambda v, c=_class: made(c, Function(v)),
        "floating tensors are wanted",
    )  # type: ignore[misc]
each(
    "encoder returns pair of",
    {"ints": lambda x: (1, 2), "none": lambda x: (x, None)},
    lambda v: made(AmortizedGuide, Function(v)),
    "floating tensors are wanted",
)
each(
    "encoder returns shape",
    {
        "vector": lambda x: x[:, 0],
        "4d": lambda x: x[:, :, None, None],
        "scalar": lambda x: x.sum(),
        "rows": lambda x: x[:3],
        "no features": lambda x: x[:, :0],
    },
    lambda v: made(AmortizedGuide, Function(v)),
    "a row per datapoint",
)
each(
    "encoder returns tuple of",
    {"three": lambda x: (x, x, x), "none": lambda x: ()},
    lambda v: made(AmortizedGuide, Function(v)),
    "pair",
)
case(
    "encoder returns nan",
    lambda: made(AmortizedGuide, Function(lambda x: x * nan)),
    "what it returned at first holds NaN",
)
each(
    "encoder returns scale",
    {"negative": -1.0, "zero": 0.0},
    lambda v: made(AmortizedGuide, Function(lambda x: (x, v + 0 * x))),
    "some scales are not positive",
)
case("encoder turns to nan", lambda: goes_wrong(lambda x: x * nan), "are not finite")
case(
    "encoder turns to other width",
    lambda: goes_wrong(lambda x: x[:, :1]),
    r"there were 2 .* try an encoder that returns \(N, 2\)",
)
case("encoder turns to rows", lambda: goes_wrong(lambda x: x[:3]), "whose first dimension")
each(
    "encoder",
    {"class": MLPEncoder, "function": len, "text": "mlp"},
    lambda v: made(AmortizedGuide, v),
    "try passing a constructed module",
)

# Data
case("data without dimensions", lambda: made().median(torch.tensor(1.0)), r"try x.reshape\(1\)")
case("empty data", lambda: shared().median(X[:0]), "try skipping empty batches")
case("nan data", lambda: AmortizedGuide(model).setup(X * nan), "holds 12 NaN values")
case("infinite data", lambda: AmortizedGuide(model).setup(X + inf), "holds NaN or infinite values")
case("other columns", lambda: shared().median(torch.zeros(6, 3)), "this MLPEncoder was built for 2")
each(
    "quantiles",
    {
        "negative": [-0.1],
        "above": [1.5],
        "nan": [nan],
        "empty": [],
        "text": "0.5",
        "none": None,
        "nested": [[0.1]],
        "dict": {0.5: 1},
        "complex": [1j],
        "texts": ["a"],
        "partly nan": torch.tensor([0.5, nan]),
    },
    lambda v: shared().quantiles(v, X),
    "between 0 and 1",
)
each(
    "quantiles of summary",
    {"negative": [-0.1], "zero": [0.0], "text": "0.5", "none": None},
    lambda v: posterior_summary(model, shared(), (X,), quantiles=v),
    "between 0 and 1",
)
each("quantiles of flow", {"above": [1.1]}, lambda v: made(family="flow").quantiles(v, X), "between 0 and 1")

# Settings of diagnostics
for _name, _settings in {
    "estimate_gaps": ["max_samples"],
    "log_evidence": ["max_samples"],
    "compare_gaps": ["max_samples"],
    "evidence_bounds": ["num_simulations", "num_samples", "max_samples"],
    "collapse_report": ["num_samples", "max_pairs"],
    "calibrate": ["num_simulations", "num_samples"],
    "simulate": ["num_datapoints"],
    "to_arviz": ["num_samples", "num_prior_samples"],
    "posterior_summary": ["num_samples"],
}.items():
    for _setting in _settings:
        each(
            f"{_name}({_setting})",
            COUNTS,
            lambda v, n=_name, s=_setting: DIAGNOSTICS[n](model, shared(), (X,), **{s: v}),
            f"Cannot use {_setting}=.* integer of at least",
        )  # type: ignore[misc]
for _name in DIAGNOSTICS:
    each(
        f"{_name}(seed)",
        SEEDS,
        lambda v, n=_name: DIAGNOSTICS[n](model, shared(), (X,), seed=v),
        "Cannot use seed=.* try seed=0",
    )  # type: ignore[misc]
for _name in ("estimate_gaps", "log_evidence", "evidence_bounds", "optimize_local", "compare_gaps"):
    each(
        f"{_name}(tolerance)",
        NUMBERS,
        lambda v, n=_name: DIAGNOSTICS[n](model, shared(), (X,), tolerance=v),
        "a number of nats, 0 or more",
    )  # type: ignore[misc]
for _setting in ("threshold", "epsilon", "delta"):
    each(
        _setting,
        NUMBERS,
        lambda v, s=_setting: collapse_report(model, shared(), (X,), **{s: v}),
        f"Cannot use {_setting}=.* because it must be",
    )  # type: ignore[misc]
each(
    "groups",
    {"unknown": ["foo"], "int": 3},
    lambda v: to_arviz(model, shared(), (X,), groups=v),
    "Cannot make groups .* try some of",
)

# Another model's guide, no guide, no model, no arguments
OTHERS: dict[str, tuple[Any, str]] = {
    "site": (
        with_latent("w", lambda: dist.Normal(0.0, 1.0)),
        r"'z': '\(2,\) real in plate data'\}, and the model's \{'w'",
    ),
    "size": (
        with_latent("z", lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1)),
        r"the model's \{'z': '\(3,\) real",
    ),
    "support": (
        with_latent("z", lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1)),
        r"the model's \{'z': '\(2,\) through",
    ),
    "plate": (
        with_latent("z", lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), "rows"),
        "in plate 'data', in which this model observes nothing",
    ),
    "global": (with_global, "'scale': 'global'"),
    "none": (None, "that is no model"),
}
for _name in DIAGNOSTICS:
    for _label, (_model, _match) in OTHERS.items():
        case(f"{_name}, model of another {_label}", lambda n=_name, m=_model: DIAGNOSTICS[n](m, shared(), (X,)), _match)  # type: ignore[misc]
    each(
        f"{_name}, guide",
        {"none": None, "model": model, "class": AmortizedGuide, "Pyro's": AutoNormal(model)},
        lambda v, n=_name: DIAGNOSTICS[n](model, v, (X,)),
        "Cannot (diagnose|export)",
    )  # type: ignore[misc]
    each(
        f"{_name}, model_args",
        {"tensor": X, "none": None, "int": 3, "text": "ab"},
        lambda v, n=_name: DIAGNOSTICS[n](model, shared(), v),
        "passed as a tuple|single call are wanted",
    )  # type: ignore[misc]
    case(f"{_name}, model_kwargs", lambda n=_name: DIAGNOSTICS[n](model, shared(), (X,), [1]), "passed as a dict")  # type: ignore[misc]
for _name in ("estimate_gaps", "log_evidence", "optimize_local", "collapse_report"):
    case(
        f"{_name}, non-finite decoder",
        lambda n=_name: DIAGNOSTICS[n](nan_decoder, shared(), (X,)),
        "log-joint is not finite",
    )  # type: ignore[misc]
each("compare", {"list": [], "dict": {}}, lambda v: compare_gaps(model, v, (X,)), "try at least one of each")
each(
    "refinement of a non-finite decoder by",
    {"steps": SemiAmortizedGuide, "network": IterativeAmortizedGuide},
    lambda v: made(v, of=nan_decoder, num_steps=2).median(X),
    "Cannot sample the latents of 6 datapoints",
)
case(
    "a low-rank normal of which a scale has vanished",  # torch's own is a LinAlgError
    lambda: check_values(VANISHED, build_family("low_rank_multivariate_normal", 4), Prior(), (X,)),
    "Cannot sample the latents of 1 datapoints",
)
case(
    "refined with a non-finite decoder",
    lambda: made(of=nan_decoder).refined(2).median(X),
    "Cannot sample the latents of 6 datapoints",
)


@cache
def optimum() -> Any:
    return optimize_local(model, shared(), (X,))


each(
    "optimum",
    {"dict": {}, "tensor": X, "text": "a"},
    lambda v: log_evidence(model, shared(), (X,), optimum=v),
    "belongs to another call: it is a",
)
case(
    "optimum of other rows",
    lambda: log_evidence(model, shared(), (X[:4],), optimum=optimum()),
    r"its phi has shape \(6, 4\)",
)
case(
    "optimum of other data",
    lambda: log_evidence(model, shared(), (X + 1.0,), optimum=optimum()),
    "the ELBO of its phi is another one",
)
case(
    "optimum of several",
    lambda: log_evidence(model, shared(), iter([(X,), (X,)]), optimum=optimum()),
    "belongs to one call",
)

# Refinement
for _class in (SemiAmortizedGuide, IterativeAmortizedGuide):
    for _setting in ("num_steps", "num_particles"):
        each(
            f"{_class.__name__}({_setting})",
            COUNTS,
            lambda v, c=_class, s=_setting: c(model, **{s: v}),
            f"Cannot use {_setting}=.* integer of at least",
        )  # type: ignore[misc]
    each(
        f"{_class.__name__}(update)",
        {"class": NaturalGradient, "torch's": torch.optim.Adam, "Pyro's": pyro.optim.Adam({"lr": 0.1}), "text": "adam"},
        lambda v, c=_class: c(model, update=v),
        "not an update rule; try",
    )  # type: ignore[misc]
    for _setting in ("compile", "keep_best", "fixed_noise"):
        case(
            f"{_class.__name__}({_setting})",
            lambda c=_class, s=_setting: c(model, **{s: "yes"}),
            f"{_setting}='yes' because it must be True or False",
        )  # type: ignore[misc]
    case(
        f"{_class.__name__}(initial)",
        lambda c=_class: c(model, initial="foo"),
        'try initial="encoder" or initial="prior"',
    )  # type: ignore[misc]
    case(
        f"{_class.__name__}(estimator)",
        lambda c=_class: c(model, estimator="foo"),
        "Cannot estimate gradients by 'foo'",
    )  # type: ignore[misc]
case("encoder_gradient", lambda: SemiAmortizedGuide(model, encoder_gradient="foo"), "Cannot use encoder_gradient='foo'")
case("checkpoint", lambda: SemiAmortizedGuide(model, checkpoint="a"), "must be True or False")
each(
    "num_steps set",
    {name: COUNTS[name] for name in ("fraction", "true", "negative")},
    lambda v: setattr(shared(SemiAmortizedGuide), "num_steps", v),
    "integer of at least 0",
)
each("refined(num_steps)", COUNTS, lambda v: shared().refined(v), "Cannot use num_steps=")
each("refined(num_particles)", COUNTS, lambda v: shared().refined(2, num_particles=v), "Cannot use num_particles=")
case("refined before setup", lambda: AmortizedGuide(model).refined(2), r"try training it, or guide.setup\(...\)")
for _rule in (GradientAscent, Adam, NaturalGradient, Newton):
    each(
        f"{_rule.__name__}(step_size)",
        {**NUMBERS, "true": True, "zero": 0.0, "tensor": torch.ones(2)},
        _rule,
        "Cannot use step_size=.* a positive number",
    )
each(
    "max_norm",
    {name: NUMBERS[name] for name in ("negative", "nan", "text")},
    lambda v: Adam(max_norm=v),
    "Cannot use max_norm=",
)
each("momentum", {**NUMBERS, "one": 1.0}, lambda v: GradientAscent(0.1, momentum=v), "Cannot use momentum=")
each("max_shift", NUMBERS, lambda v: NaturalGradient(max_shift=v), "Cannot use max_shift=")
each(
    "betas",
    {"one": (0.9,), "float": 0.9, "none": None, "text": ("a", "b"), "above": (1.0, 0.9), "nan": (nan, 0.9)},
    lambda v: Adam(betas=v),
    "Cannot use beta",
)
WIDTHS = {"zero": (0,), "negative": (-1,), "int": 5, "fraction": (2.5,), "text": "55", "none": None, "true": (True,)}
each(
    "hidden_dims of the update", WIDTHS, lambda v: LearnedUpdate(hidden_dims=v), "must be a tuple of positive integers"
)

# Encoders and families of the package
SIZES = {"zero": 0, "negative": -1, "fraction": 2.0, "text": "2", "none": None, "true": True, "shape": (28, 28)}
for _encoder in (MLPEncoder, DeepSetEncoder):
    each(f"{_encoder.__name__}(input_dim)", SIZES, _encoder, "Cannot use input_dim=")
    each(
        f"{_encoder.__name__}(hidden_dims)",
        WIDTHS,
        lambda v, e=_encoder: e(2, v),
        "must be a tuple of positive integers",
    )  # type: ignore[misc]
    each(
        f"{_encoder.__name__}(activation)",
        {"instance": nn.ReLU(), "text": "relu"},
        lambda v, e=_encoder: e(2, activation=v),
        "the class of an activation",
    )  # type: ignore[misc]
    case(f"{_encoder.__name__}(standardize)", lambda e=_encoder: e(2, standardize="yes"), "must be True or False")  # type: ignore[misc]
    each(
        f"inputs of {_encoder.__name__}",
        {"none": None, "scalar": torch.tensor(1.0), "complex": X.cfloat()},
        lambda v, e=_encoder: e(2)(v),
        "real tensors of at least",
    )  # type: ignore[misc]
case("DeepSetEncoder without layers", lambda: DeepSetEncoder(2, ()), "must be a tuple of positive integers")
case("no inputs", lambda: MLPEncoder(2)(), "real tensors of at least")
case("inputs of other rows", lambda: MLPEncoder(4)(X, X[:3]), "real tensors of at least")
each(
    "second input of DeepSetEncoder",
    {"values": X, "counts": torch.full((6, 2), 2), "nan": X * nan, "shape": torch.ones(6, 3)},
    lambda v: DeepSetEncoder(1)(X, v),
    "as a mask because",
)
case("second input of a guide's DeepSetEncoder", lambda: DeepSetEncoder(1).fit(X, X), "as a mask because")
case("three inputs of DeepSetEncoder", lambda: DeepSetEncoder(1)(X, X, X), "it takes a set and, if need be, a mask")
for _family in (Normal, MultivariateNormal, LowRankMultivariateNormal, Mixture, Flow, Structured):
    each(f"{_family.__name__}(latent_dim)", SIZES, _family, "Cannot use latent_dim=")
each("rank", {**COUNTS, "zero": 0}, lambda v: LowRankMultivariateNormal(3, rank=v), "Cannot use rank=")
each("num_components", {**COUNTS, "zero": 0}, lambda v: Mixture(2, num_components=v), "Cannot use num_components=")
each("spread", NUMBERS, lambda v: Mixture(2, spread=v), "Cannot use spread=")
each("num_transforms", {**COUNTS, "zero": 0}, lambda v: Flow(2, num_transforms=v), "Cannot use num_transforms=")
each("hidden_dims of the flow", WIDTHS, lambda v: Flow(2, hidden_dims=v), "must be a tuple of positive integers")
case("parents of other shape", lambda: Structured(2, torch.zeros(3, 3)), "a row and a column for each")
case("parents in a circle", lambda: Structured(2, torch.ones(2, 2)), "parents come before")

# Training
each("linear_schedule", {**NUMBERS, "zero": 0, "true": True}, linear_schedule, "Cannot use num_steps=")
each("start of a schedule", NUMBERS, lambda v: linear_schedule(10, v), "Cannot scale the KL divergence by beta")
each("sigmoid_schedule", NUMBERS, lambda v: sigmoid_schedule(500, v), "Cannot use width=")
each(
    "midpoint",
    {name: NUMBERS[name] for name in ("nan", "infinite", "text", "none")},
    lambda v: sigmoid_schedule(v, 50),
    "Cannot use midpoint=",
)
each("cycles", COUNTS, lambda v: cyclical_schedule(100, v), "Cannot use num_cycles=")
each("ramp", {**NUMBERS, "above": 1.5}, lambda v: cyclical_schedule(100, ramp=v), "Cannot use ramp=")
each("free_bits", NUMBERS, FreeBitsELBO, "Cannot use free_bits=")
case("free bits per", lambda: FreeBitsELBO(0.1, "foo"), 'try per="dimension" or per="site"')
each("capacity", NUMBERS, CapacityELBO, "Cannot use capacity=")
each("gamma", {**NUMBERS, "zero": 0.0}, lambda v: CapacityELBO(1.0, v), "Cannot use gamma=")
each("schedule", {"number": 3.0, "none": None, "text": "a"}, anneal, "a function from steps to beta")
each(
    "beta",
    {"none": None, "nan": nan, "negative": -1.0, "text": "a", "tensor": torch.tensor(1.0)},
    lambda v: anneal(lambda step: v),
    "Cannot scale the KL divergence by beta",
)
case("annealed plate", lambda: anneal(linear_schedule(5), plate="foo"), "no plate of that name")
case("annealed model", lambda: KLAnnealing(None, shared(), linear_schedule(5)), "Cannot anneal the model None")
case("annealed guide", lambda: KLAnnealing(model, None, linear_schedule(5)), "Cannot anneal the guide None")
case("plate of free bits", lambda: steps(model, made(), FreeBitsELBO(0.1, plate="foo")), "no plate of that name")
for _setting in ("window", "max_encoder_steps"):
    each(
        f"aggressive {_setting}",
        {**COUNTS, "zero": 0},
        lambda v, s=_setting: AggressiveEncoder(model, shared(), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **{s: v}),
        f"Cannot use {_setting}=",
    )  # type: ignore[misc]
case(
    "aggressive guide",
    lambda: AggressiveEncoder(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()),
    "Cannot train a AutoNormal aggressively",
)

# Codes, discrete latents, weights
each("num_codes", {**COUNTS, "one": 1}, lambda v: Codebook(v, 2), "Cannot use num_codes=")
each("decay", {**NUMBERS, "one": 1.0}, lambda v: Codebook(4, 2, decay=v), "Cannot use decay=")
each(
    "codes",
    {
        "list": [0, 1],
        "fraction": torch.tensor([0.5]),
        "out of range": torch.tensor([7]),
        "negative": torch.tensor([-1]),
    },
    lambda v: Codebook(4, 2)(v),
    "Cannot look up codes",
)
each(
    "features",
    {"width": torch.zeros(3, 5), "nan": torch.full((3, 2), nan)},
    lambda v: Codebook(4, 2).nearest(v),
    "Cannot quantize",
)
each(
    "commitment", NUMBERS, lambda v: VectorQuantizedGuide(model, Codebook(4, 2), commitment=v), "Cannot use commitment="
)
each("codebook", {"none": None, "class": Codebook}, lambda v: VectorQuantizedGuide(model, v), "it is no Codebook")
case("model without codes", lambda: made(VectorQuantizedGuide, Codebook(4, 2)), "infers sites of codes")
each(
    "temperature",
    {name: value for name, value in NUMBERS.items() if name != "none"} | {"zero": 0.0},
    lambda v: DiscreteAmortizedGuide(model, temperature=v),
    "Cannot use temperature=",
)
each(
    "weights",
    {
        "list": [1.0],
        "array": np.zeros(3),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0),
        "integers": torch.arange(5),
        "nan": torch.tensor([nan]),
        "none left": torch.full((5,), -inf),
    },
    psis,
    "Cannot smooth",
)

# Saved states
case(
    "state of another family",
    lambda: load(state(family="multivariate_normal")),
    "that of another guide.* of other shapes",
)
case("state that lacks a part", lambda: load(dict(list(state().items())[1:])), "it lacks")
case("state with more", lambda: load({**state(), "foo": X}), r"it holds besides \['foo'\]")
case("state of another encoder", lambda: load(shared(PerDatapointGuide).state_dict()), "it lacks .* it holds besides")
each("state", {"none": None, "list": [1]}, load, "parameters by name are wanted")
each("state before setup", {"none": None, "list": [1]}, load_before_setup, "parameters by name are wanted")
case(
    "state of another family before setup",
    lambda: load_before_setup(state(family="multivariate_normal")),
    "that of another guide",
)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_at_once(name: str) -> None:
    call, match = CASES[name]
    before = shared().median(X)["z"]
    with pytest.raises(ValueError, match=match) as caught:
        call()
    message = " ".join(str(caught.value).split())
    assert message.startswith("Cannot ")
    assert " because " in message
    assert "; try " in message
    assert torch.equal(shared().median(X)["z"], before)


def test_good_input_of_other_types_is_taken() -> None:
    guide = shared()
    assert guide.quantiles((0, np.float64(0.5), 1), X)["z"].shape == (3, 6, 2)
    assert guide.quantiles(torch.tensor([0.25]), X)["z"].shape == (1, 6, 2)
    assert made(init_scale=np.float32(0.2), family=lambda dim: Normal(np.int64(dim))).median(X)["z"].shape == (6, 2)
    assert MLPEncoder(np.int64(2), [3])(X).shape == (6, 3)
    simulation = simulate(model, guide, (X,), num_datapoints=np.int64(3), seed=np.int64(2**40))
    assert simulation.latents.shape == (3, 2)
    assert guide.refined(np.int32(2), num_particles=torch.tensor(4)).num_steps == 2


@pytest.fixture(scope="module")
def report() -> CollapseReport:
    return collapse_report(model, shared(), (X,))


@pytest.mark.parametrize("path", [None, 3, "", ".", "missing/report.nc", "/proc/report.nc"])
def test_paths_that_cannot_be_used(report: CollapseReport, path: Any) -> None:
    with pytest.raises(ValueError, match="Cannot (use path|save this report)"):
        report.to_netcdf(path)
    with pytest.raises(ValueError, match="Cannot (use path|read a report)"):
        CollapseReport.from_netcdf(path)


def test_files_that_hold_something_else(report: CollapseReport, tmp_path: Path) -> None:
    report.to_netcdf(tmp_path / "report.nc")
    with pytest.raises(ValueError, match=r"holds a CollapseReport; try .*CollapseReport.from_netcdf"):
        GapEstimate.from_netcdf(tmp_path / "report.nc")
    assert str(CollapseReport.from_netcdf(tmp_path / "report.nc")) == str(report)
    (tmp_path / "junk.nc").write_text("junk")
    with pytest.raises(ValueError, match="no file that xarray can read"):
        CollapseReport.from_netcdf(tmp_path / "junk.nc")


@pytest.mark.parametrize("ax", [3, "a", np.zeros(2)], ids=["int", "text", "array"])
def test_axes_that_are_none(report: CollapseReport, ax: Any) -> None:
    with pytest.raises(ValueError, match="matplotlib axes are wanted"):
        report.plot(ax)


@pytest.mark.parametrize("n", [-1, 0, 2.5, True, None])
def test_numbers_of_worst_datapoints(n: Any) -> None:
    import xarray

    gaps = GapEstimate(xarray.Dataset({"inference_gap": ("data", np.arange(6.0))}))
    with pytest.raises(ValueError, match="Cannot use n=.* integer of at least 1"):
        gaps.worst(n)
    assert gaps.worst(np.int64(2))["inference_gap"].values.tolist() == [5.0, 4.0]
