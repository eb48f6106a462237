"""What errors advise: each is provoked, and then what it says is done, and succeeds."""

import ast
import itertools
import math
import pickle
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import ProjectedNormalReparam
from remedies import X2, Cases, X, made, model, of_latent, step, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_amortized
from pyro_amortized import (
    Adam,
    AmortizedGuide,
    Codebook,
    CollapseReport,
    ConvEncoder,
    CountEncoder,
    DeepSetEncoder,
    DiscreteAmortizedGuide,
    Flow,
    GapEstimate,
    IterativeAmortizedGuide,
    LearnedUpdate,
    LowRankMultivariateNormal,
    Mixture,
    MLPEncoder,
    NaturalGradient,
    Newton,
    Normal,
    PerDatapointGuide,
    SemiAmortizedGuide,
    SequenceEncoder,
    Structured,
    VectorQuantizedGuide,
    calibrate,
    collapse_report,
    compare_gaps,
    estimate_gaps,
    log_evidence,
    optimize_local,
    posterior_summary,
    psis,
    simulate,
    to_arviz,
)
from pyro_amortized.training import (
    CapacityELBO,
    FreeBitsELBO,
    KLAnnealing,
    cyclical_schedule,
    linear_schedule,
    sigmoid_schedule,
)

case = Cases()


# Data sets


def loader(**options: Any) -> Any:
    return DataLoader(TensorDataset(X), batch_size=3, **options)


def report(args: Any = (X,), **options: Any) -> Any:
    return collapse_report(model, made(), args, num_samples=20, **options)


case("a bare tensor", lambda: report(X), r"\(x,\)", report)
case("no arguments", lambda: report(None), r"\(x,\)", report)
case("kwargs in a list", lambda: report((), model_kwargs=[X]), r'\{"x": x\}', lambda: report((), model_kwargs={"x": X}))
case("a shuffled loader", lambda: report(loader(shuffle=True)), "shuffle=False", lambda: report(loader(shuffle=False)))
case("an empty loader", lambda: report(DataLoader([])), "data set that is not empty", lambda: report(loader()))
case("a single datapoint", lambda: report((X[:1],)), "more", report)
case(
    "a tensor without dimensions",
    lambda: made().median(X[0]),
    r"x.reshape\(1\)",
    lambda: made().median(X[0].reshape(1)),
)
case("an empty batch", lambda: made().median(X[:0]), "skipping empty batches", lambda: made().median(X))
case(
    "inference mode",
    torch.inference_mode()(report),
    r"torch.no_grad\(\), or neither",
    lambda: torch.no_grad()(report)(),
)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()), obs=torch.nan_to_num(x))


HOLES = torch.tensor([0.0, math.nan, 1.0])
case("NaN observations", lambda: train(data=HOLES), "mask them in the model", lambda: train(masked, data=HOLES))
case(
    "NaN observations, dropped",
    lambda: train(data=HOLES),
    "dropping or imputing",
    lambda: train(data=HOLES[~HOLES.isnan()]),
)

# Latents
case(
    "a discrete latent",
    lambda: train(of_latent(lambda: dist.Bernoulli(0.5))),
    "DiscreteAmortizedGuide",
    lambda: train(
        of_latent(lambda: dist.Bernoulli(0.5)), DiscreteAmortizedGuide, elbo=TraceEnum_ELBO(max_plate_nesting=1)
    ),
)


def enumerated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete(x: Tensor, prior: Any = None) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


ENUM = TraceEnum_ELBO(max_plate_nesting=1)
case(
    "a discrete latent beside others",
    lambda: train(discrete),
    "summing it out in the model",
    lambda: train(enumerated, elbo=ENUM),
)
case(
    "a Poisson latent",
    lambda: train(of_latent(lambda: dist.Poisson(1.0))),
    "a Categorical over the values that matter",
    lambda: train(of_latent(lambda: dist.Categorical(torch.ones(4))), DiscreteAmortizedGuide, elbo=ENUM),
)
case(
    "a Poisson latent, DiscreteAmortizedGuide",
    lambda: train(of_latent(lambda: dist.Poisson(1.0)), DiscreteAmortizedGuide),
    "a Categorical, OneHotCategorical or Bernoulli prior",
    lambda: train(of_latent(lambda: dist.Categorical(torch.ones(4))), DiscreteAmortizedGuide, elbo=ENUM),
)


def discrete_global(infer: dict[str, Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5), infer=infer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    return model


case(
    "a discrete global latent",
    lambda: train(discrete_global({})),
    "summing it out in the model",
    lambda: train(discrete_global({"enumerate": "parallel"}), elbo=ENUM),
)
JOINED = of_latent(lambda: dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
case(
    "joined discrete latents",
    lambda: train(JOINED, DiscreteAmortizedGuide),
    "temperature=1.0",
    lambda: train(JOINED, DiscreteAmortizedGuide, temperature=1.0),
)
CATEGORICAL = of_latent(lambda: dist.Categorical(torch.ones(3)))
case(
    "a relaxed Categorical",
    lambda: train(CATEGORICAL, DiscreteAmortizedGuide, temperature=1.0),
    "temperature=None",
    lambda: train(CATEGORICAL, DiscreteAmortizedGuide, elbo=ENUM),
)
case(
    "a relaxed Categorical, one-hot",
    lambda: train(CATEGORICAL, DiscreteAmortizedGuide, temperature=1.0),
    "a OneHotCategorical prior",
    lambda: train(of_latent(lambda: dist.OneHotCategorical(torch.ones(3))), DiscreteAmortizedGuide, temperature=1.0),
)
case(
    "phi beside discrete latents",
    lambda: made(discrete, DiscreteAmortizedGuide).posterior(X),
    r"guide.probabilities\(...\) and guide.median",
    lambda: (made(discrete, DiscreteAmortizedGuide).probabilities(X), made(discrete, DiscreteAmortizedGuide).median(X)),
)
case(
    "a diagnostic beside discrete latents",
    lambda: collapse_report(discrete, made(discrete, DiscreteAmortizedGuide), (X,)),
    "sums the discrete latents out",
    lambda: collapse_report(enumerated, made(enumerated), (X,), num_samples=20),
)


def bounded(fraction: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
            if fraction:
                z = top * pyro.sample("share", dist.Uniform(0.0, 1.0))
            else:
                z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a support that depends on a latent",
    lambda: train(bounded(False)),
    "a fraction of the interval",
    lambda: train(bounded(True)),
)
HALF = torch.tensor([True, False])
case(
    "a part of an event masked",
    lambda: train(of_latent(lambda: dist.LogNormal(torch.zeros(2), 1.0).mask(HALF).to_event(1))),
    "a mask for whole events",
    lambda: train(of_latent(lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1).mask(torch.tensor(True)))),
)


def scaled(together: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0 if together else 1.0):
            with poutine.scale(scale=1.0 if together else 2.0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    return model


case(
    "scales that differ",
    lambda: train(scaled(False), SemiAmortizedGuide, num_steps=2),
    "one poutine.scale around all",
    lambda: train(scaled(True), SemiAmortizedGuide, num_steps=2),
)
SCALED = poutine.scale(model, 2.0)
case(
    "a scaled prior in a diagnostic",
    lambda: collapse_report(SCALED, made(SCALED), (X,)),
    "arguments that set the scale to 1",
    lambda: collapse_report(model, made(), (X,), num_samples=20),
)


def random_mask(given: bool) -> Callable[..., None]:
    def model(x: Tensor, present: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            present = present if given else torch.rand(len(x)) < 0.5
            with poutine.mask(mask=present):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def random_mask_given() -> None:
    model = random_mask(True)
    step(model, AmortizedGuide(model), X, X > 0)


case("a random mask", lambda: train(random_mask(False)), "a mask that is an argument", random_mask_given)


def in_place(clone: bool) -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        x = x.clone() if clone else x
        x += 1.0
        model(x)

    return other


case(
    "arguments changed in place",
    lambda: train(in_place(False), data=X.clone()),
    r"x = x.clone\(\)",
    lambda: train(in_place(True)),
)

# Plates


def two_plates(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    with pyro.plate("others", len(x)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)


def sequential(vectorised: bool) -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    return model if vectorised else other


def unobserved(x: Tensor | None = None) -> None:
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def unobserved_setup() -> None:
    AmortizedGuide(unobserved, plate="data").setup()


def inner(**options: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 2, dim=-1, **options) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])

    return model


def sizeless(size: int | None) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case("several plates", lambda: train(two_plates), "plate=... with one of", lambda: train(two_plates, plate="rows"))
case("an unknown plate", lambda: train(plate="rows"), r"one of \['data'\]", lambda: train(plate="data"))
case(
    "an unknown plate, in a model without",
    lambda: made(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), plate="rows"),
    r"`with pyro.plate\('rows', ...\):` in the model",
    lambda: train(two_plates, plate="rows"),
)
case(
    "a plate without data", unobserved_setup, "calling the guide with the data", lambda: train(unobserved, plate="data")
)
case("a sequential plate", lambda: train(sequential(False)), "the vectorised form", lambda: train(sequential(True)))
case(
    "an inner plate subsampled",
    lambda: train(inner(subsample_size=1), data=X2),
    "over all of that plate",
    lambda: train(inner(), data=X2),
)
case("a plate without size", lambda: train(sizeless(None)), r"`pyro.plate\('data', 6\)`", lambda: train(sizeless(6)))
case(
    "created plates",
    lambda: made(create_plates=lambda x: pyro.plate("data", 5, dim=-1)),
    "the size that the model gives it",
    lambda: train(create_plates=lambda x: pyro.plate("data", len(x), dim=-1)),
)
case(
    "create_plates that makes none",
    lambda: made(create_plates=lambda x: 6),
    'pyro.plate\\("data", len\\(x\\), dim=-1\\)',
    lambda: train(create_plates=lambda x: pyro.plate("data", len(x), dim=-1)),
)

# What the encoder sees, and says
case("an unknown argument", lambda: train(encoder_input="y"), r"one of \['x'\]", lambda: train(encoder_input="x"))


def without_arguments() -> None:
    model(X)


def run_without_arguments(**options: Any) -> None:
    step(without_arguments, AmortizedGuide(without_arguments, **options), *())


case(
    "an unknown argument of a model without",
    lambda: AmortizedGuide(without_arguments, encoder_input="y").setup(),
    "a function of the model's arguments",
    lambda: AmortizedGuide(without_arguments, encoder_input=lambda: X).setup(),
)
case("an encoder input that is none", lambda: train(encoder_input=lambda x: None), "encoder_input=None", train)
case(
    "an encoder input in NumPy",
    lambda: train(encoder_input=lambda x: x.numpy()),
    r"torch.as_tensor\(...\)",
    lambda: train(encoder_input=lambda x: torch.as_tensor(x.numpy())),
)
case(
    "an encoder input with holes",
    lambda: train(encoder_input=lambda x: x / 0),
    "fills them in",
    lambda: train(encoder_input=lambda x: (x / 0).nan_to_num()),
)
case(
    "inputs of other width",
    lambda: (
        train(encoder_input="x", guide_class=AmortizedGuide, model=model) or made(model, AmortizedGuide, MLPEncoder(5))
    ),
    "input_dim=1",
    lambda: train(model, AmortizedGuide, MLPEncoder(1)),
)


def two_inputs(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=y)


def deep_set(dim: int, **options: Any) -> None:
    pyro.clear_param_store()
    step(two_inputs, AmortizedGuide(two_inputs, DeepSetEncoder(dim), **options), X2, X2 + 1.0)


case(
    "two inputs of DeepSetEncoder",
    lambda: deep_set(2),
    "with the name of one argument",
    lambda: deep_set(1, encoder_input="x"),
)
case(
    "two inputs of DeepSetEncoder(1)",
    lambda: deep_set(1),
    "with the name of one argument",
    lambda: deep_set(1, encoder_input="x"),
)
case(
    "features of other width in DeepSetEncoder",
    lambda: deep_set(2, encoder_input="x"),
    "input_dim=1",
    lambda: deep_set(1, encoder_input="x"),
)


class Returns(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def with_output(
    function: Callable[[Tensor], Any], guide_class: Any = AmortizedGuide, **options: Any
) -> Callable[[], None]:
    return lambda: train(model, guide_class, Returns(function), **options)


def column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return column(x), torch.ones(len(x), 1)


FEATURES = with_output(column)
case("an encoder that returns none", with_output(lambda x: None), r"features of shape \(N, H\)", FEATURES)
case(
    "an encoder that returns integers",
    with_output(lambda x: column(x).long()),
    r"as .float\(\)",
    with_output(lambda x: column(x).long().float()),
)
case("an encoder that returns a vector", with_output(lambda x: x), r"an encoder from \(N, ...\) to \(N, H\)", FEATURES)
case(
    "an encoder that returns negative scales",
    with_output(lambda x: (column(x), column(x))),
    "softplus",
    with_output(lambda x: (column(x), nn.functional.softplus(column(x)))),
)
case(
    "a pair in a joint family",
    with_output(pair, family="multivariate_normal"),
    r"features of shape \(N, H\)",
    with_output(column, family="multivariate_normal"),
)
case(
    "a pair in IterativeAmortizedGuide",
    with_output(pair, IterativeAmortizedGuide),
    r"\(N, ...\) to \(N, H\)",
    with_output(column, IterativeAmortizedGuide),
)
case(
    "a pair in DiscreteAmortizedGuide",
    with_output(pair, DiscreteAmortizedGuide),
    "AmortizedGuide if no latent is discrete",
    with_output(pair),
)
case(
    "an encoder's class",
    lambda: train(model, AmortizedGuide, MLPEncoder),
    "a constructed module",
    lambda: train(model, AmortizedGuide, MLPEncoder(1)),
)


def factored(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))


case(
    "no observations to encode",
    lambda: train(factored, plate="data"),
    "with the name of an argument",
    lambda: train(factored, encoder_input="x"),
)

# Guides


def global_only(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def loaded() -> Any:
    pyro.clear_param_store()
    return pickle.loads(pickle.dumps(made()))  # noqa: S301 - of its own making


def loaded_with_model() -> None:
    guide = loaded()
    guide.model = model
    guide.median(X)
    guide.refined(2).median(X)


def two_guides(**options: Any) -> None:
    pyro.clear_param_store()
    step(model, AmortizedGuide(model))
    step(model, AmortizedGuide(model, **options), X)


def cleared() -> None:
    pyro.clear_param_store()
    step(model, AmortizedGuide(model))
    pyro.clear_param_store()
    step(model, AmortizedGuide(model))


case(
    "phi of a model without local latents",
    lambda: made(global_only).variational_parameters(X),
    "guide.global_median",
    lambda: made(global_only).global_median(X),
)
case(
    "posterior of a model without local latents",
    lambda: made(global_only).posterior(X),
    "guide.quantiles",
    lambda: made(global_only).quantiles([0.1], X),
)
case(
    "refined before setup",
    lambda: AmortizedGuide(model).refined(2),
    r"guide.setup\(...\)",
    lambda: made().refined(2).median(X),
)
case(
    "refined without local latents",
    lambda: made(global_only).refined(2),
    "this guide as it is",
    lambda: made(global_only).median(X),
)
case(
    "refined with another family",
    lambda: made().refined(2, family="normal"),
    "a new SemiAmortizedGuide",
    lambda: train(guide_class=SemiAmortizedGuide, num_steps=2, family="normal"),
)
case("loaded without its model", lambda: loaded().refined(2), "`guide.model = model`", loaded_with_model)
case("another guide's parameters", two_guides, "a name=... of its own", lambda: two_guides(name="other"))
case("another guide's parameters, cleared", two_guides, r"pyro.clear_param_store\(\) before", cleared)
case(
    "a table and new data",
    lambda: made(guide_class=PerDatapointGuide).median(X[:3]),
    "AmortizedGuide",
    lambda: made().median(X[:3]),
)


def subsampled(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def table_of_all() -> None:
    guide = PerDatapointGuide(subsampled)
    step(subsampled, guide, X, torch.arange(6))
    step(subsampled, guide, X, torch.tensor([1, 3]))


case(
    "a table and a batch",
    lambda: made(guide_class=PerDatapointGuide).median(X[:3]),
    r"pyro.plate\(name, full_size, subsample=indices\)",
    table_of_all,
)
case(
    "a table with an encoder input",
    lambda: PerDatapointGuide(model, encoder_input="x"),
    "AmortizedGuide",
    lambda: train(encoder_input="x"),
)


def masked_global(event: bool, whole: bool = False) -> Callable[[Tensor], None]:
    def other(x: Tensor) -> None:
        prior = dist.LogNormal(torch.zeros(2), 1.0)
        if event:
            prior = prior.to_event(1).mask(torch.tensor(True)) if whole else prior.mask(HALF).to_event(1)
        else:
            prior = prior.to_event(1).mask(torch.tensor(False))
        pyro.sample("loc", prior)
        model(x)

    return other


case(
    "a joint global guide of masked latents",
    lambda: train(masked_global(False), global_guide=AutoMultivariateNormal),
    "global_guide=AutoNormal",
    lambda: train(masked_global(False), global_guide=AutoNormal),
)
case(
    "a global latent masked in part",
    lambda: train(masked_global(True)),
    "a mask for whole events",
    lambda: train(masked_global(True, whole=True)),
)
case(
    "an instance of a global guide",
    lambda: AmortizedGuide(model, global_guide=AutoNormal(model)),
    "the class, global_guide=",
    lambda: train(global_guide=AutoNormal),
)
case(
    "start of another shape",
    lambda: made(init_loc_fn=lambda site: torch.zeros(1)),
    r"value.expand\(\(6,\)\)",
    lambda: made(init_loc_fn=lambda site: torch.zeros(1).expand((6,))),
)
case(
    "start that is not finite",
    lambda: made(init_loc_fn=lambda site: torch.full((6,), math.inf)),
    "init_to_median",
    lambda: made(init_loc_fn=pyro.infer.autoguide.init_to_median),
)
case("a family of Pyro's", lambda: made(family=dist.Normal), "one of .*'normal'", lambda: train(family="normal"))
case(
    "a family of another size",
    lambda: made(family=Normal(3)),
    "latent_dim=1, or pass the class",
    lambda: (train(family=Normal(1)), train(family=Normal)),
)
case(
    "parents after their children",
    lambda: Structured(2, torch.ones(2, 2)),
    r"parents.tril\(-1\)",
    lambda: Structured(2, torch.ones(2, 2).tril(-1)),
)
case(
    "an unknown flow",
    lambda: Flow(2, "foo"),
    "one of .*'affine_autoregressive'",
    lambda: Flow(2, "affine_autoregressive"),
)


def diverged(optimizer: Any) -> None:
    pyro.clear_param_store()
    guide = AmortizedGuide(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in range(60):
        svi.step(X)
    guide.median(X)


case(
    "diverged parameters",
    lambda: diverged(pyro.optim.SGD({"lr": 1e3})),
    "a smaller learning rate",
    lambda: diverged(pyro.optim.SGD({"lr": 1e-3})),
)
case(
    "diverged parameters, clipped",
    lambda: diverged(pyro.optim.SGD({"lr": 1e3})),
    "pyro.optim.ClippedAdam",
    lambda: diverged(pyro.optim.ClippedAdam({"lr": 1e-2})),
)

# Refinement
MIXTURE = {"family": "mixture", "num_steps": 2}
case(
    "NaturalGradient of a mixture",
    lambda: train(guide_class=SemiAmortizedGuide, update=NaturalGradient(0.5), **MIXTURE),
    r"update=Adam\(0.05\)",
    lambda: train(guide_class=SemiAmortizedGuide, update=Adam(0.05), **MIXTURE),
)
case(
    "Newton of a mixture",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_particles=8, **MIXTURE),
    r"update=Adam\(0.05\)",
    lambda: train(guide_class=SemiAmortizedGuide, update=Adam(0.05), **MIXTURE),
)
case(
    "Newton of one particle",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_steps=2, num_particles=1),
    "num_particles=32",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_steps=2, num_particles=32),
)
case(
    "Newton of one particle, natural",
    lambda: train(guide_class=SemiAmortizedGuide, update=Newton(), num_steps=2, num_particles=1),
    r"NaturalGradient\(0.5\)",
    lambda: train(guide_class=SemiAmortizedGuide, update=NaturalGradient(0.5), num_steps=2),
)
case(
    "an update that is none",
    lambda: SemiAmortizedGuide(model, update=torch.optim.Adam),
    r"NaturalGradient\(0.5\) or pyro_amortized.Adam\(0.05\)",
    lambda: [train(guide_class=SemiAmortizedGuide, update=u, num_steps=2) for u in (NaturalGradient(0.5), Adam(0.05))],
)
case(
    "a learned update in SemiAmortizedGuide",
    lambda: SemiAmortizedGuide(model, update=LearnedUpdate()),
    "IterativeAmortizedGuide",
    lambda: train(guide_class=IterativeAmortizedGuide, update=LearnedUpdate((8,)), num_steps=2),
)
case(
    "a given update in IterativeAmortizedGuide",
    lambda: IterativeAmortizedGuide(model, update=Adam(0.05)),
    r"update=LearnedUpdate\(\)",
    lambda: train(guide_class=IterativeAmortizedGuide, update=LearnedUpdate((8,)), num_steps=2),
)


def learned_twice(again: bool) -> None:
    update = LearnedUpdate((8,))
    train(guide_class=IterativeAmortizedGuide, update=update, num_steps=2)
    update = LearnedUpdate((8,)) if again else update
    train(
        of_latent(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        IterativeAmortizedGuide,
        update=update,
        num_steps=2,
    )


case(
    "a learned update of two guides",
    lambda: learned_twice(False),
    "a new LearnedUpdate for each guide",
    lambda: learned_twice(True),
)
case(
    "a learned step size",
    lambda: SemiAmortizedGuide(model, update=Adam(0.05, learned=True), encoder_gradient="first_order"),
    'encoder_gradient="unrolled"',
    lambda: train(guide_class=SemiAmortizedGuide, update=Adam(0.05, learned=True), num_steps=2),
)
case(
    "an encoder and the prior",
    lambda: SemiAmortizedGuide(model, MLPEncoder(1), initial="prior"),
    "leaving one of them out",
    lambda: [
        train(model, SemiAmortizedGuide, MLPEncoder(1), num_steps=2),
        train(guide_class=SemiAmortizedGuide, initial="prior", num_steps=2),
    ],
)
case(
    "an unknown start",
    lambda: SemiAmortizedGuide(model, initial="foo"),
    'initial="encoder" or initial="prior"',
    lambda: SemiAmortizedGuide(model, initial="prior"),
)
case(
    "a closed form of a mixture",
    lambda: train(guide_class=SemiAmortizedGuide, estimator="analytic_kl", **MIXTURE),
    'estimator="stl"',
    lambda: train(guide_class=SemiAmortizedGuide, estimator="stl", **MIXTURE),
)
case(
    "refinement in JitTrace_ELBO",
    lambda: train(guide_class=SemiAmortizedGuide, num_steps=2, elbo=JitTrace_ELBO(ignore_jit_warnings=True)),
    "Trace_ELBO, and compile=True",
    lambda: train(guide_class=SemiAmortizedGuide, num_steps=2),
)

# Codes
case("a float code", lambda: Codebook(4, 2)(torch.tensor([0.5])), "integers", lambda: Codebook(4, 2)(torch.tensor([1])))
case(
    "codes in a list",
    lambda: Codebook(4, 2)([0, 1]),
    r"torch.as_tensor\(codes\)",
    lambda: Codebook(4, 2)(torch.as_tensor([0, 1])),
)
case(
    "a codebook in another precision",
    lambda: Codebook(4, 2).nearest(torch.zeros(3, 2).double()),
    r"codebook.to\(features\)",
    lambda: initialized().to(torch.zeros(1).double()).nearest(torch.zeros(3, 2).double()),
)
case(
    "a codebook without vectors",
    lambda: Codebook(4, 2).nearest(torch.zeros(3, 2)),
    r"codebook.initialize\(features\)",
    lambda: initialized().nearest(torch.zeros(3, 2)),
)


def initialized() -> Codebook:
    codebook = Codebook(4, 2)
    codebook.initialize(torch.randn(10, 2))
    return codebook


def coded(num_codes: int, codebook: Codebook) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(logits=torch.zeros(num_codes)))
            pyro.sample("x", dist.Normal(codebook(code)[..., 0], 1.0), obs=x)

    return model


def quantized(num_codes: int, **options: Any) -> None:
    codebook = Codebook(4, 2)
    train(coded(num_codes, codebook), VectorQuantizedGuide, codebook, **options)


case("another number of codes", lambda: quantized(5), r"Categorical\(logits=torch.zeros\(4\)\)", lambda: quantized(4))
case("a family of codes", lambda: quantized(4, family="normal"), "leaving it out", lambda: quantized(4))
case(
    "phi of codes", lambda: vector_quantized().posterior(X), r"guide.codes\(...\)", lambda: vector_quantized().codes(X)
)
case(
    "a codebook under a compiled ELBO",
    lambda: quantized(4, elbo=JitTrace_ELBO(ignore_jit_warnings=True)),
    "Trace_ELBO instead",
    lambda: quantized(4),
)


def vector_quantized() -> Any:
    codebook = Codebook(4, 2)
    return made(coded(4, codebook), VectorQuantizedGuide, codebook)


# Diagnostics and export


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(-1))


class Decoder(nn.Module):
    """A model with dropout or batch normalisation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), layer, nn.Linear(4, 1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z).squeeze(-1), 1.0), obs=x)


def report_of(module: Decoder) -> Any:
    return collapse_report(module, made(module), (X,), num_samples=20)


case(
    "an encoder with dropout",
    lambda: collapse_report(model, made(model, AmortizedGuide, Dropout()), (X,)),
    r"guide.eval\(\)",
    lambda: collapse_report(model, made(model, AmortizedGuide, Dropout()).eval(), (X,), num_samples=20),
)
case(
    "a decoder with dropout",
    lambda: report_of(Decoder(nn.Dropout(0.5))),
    r"model.eval\(\)",
    lambda: report_of(Decoder(nn.Dropout(0.5)).eval()),
)
case(
    "a decoder with batch normalisation",
    lambda: report_of(Decoder(nn.BatchNorm1d(4))),
    r"model.eval\(\)",
    lambda: report_of(Decoder(nn.BatchNorm1d(4)).eval()),
)
case(
    "another guide",
    lambda: collapse_report(model, AutoNormal(model), (X,)),
    "an AmortizedGuide or PerDatapointGuide",
    lambda: [
        collapse_report(model, made(guide_class=c), (X,), num_samples=20) for c in (AmortizedGuide, PerDatapointGuide)
    ],
)
case(
    "another model",
    lambda: collapse_report(masked_global(True, whole=True), made(), (X,)),
    "the model that the guide was made with",
    report,
)
case(
    "a model without local latents",
    lambda: collapse_report(global_only, made(global_only), (X,)),
    "guide.global_median",
    lambda: made(global_only).global_median(X),
)
case(
    "perplexity of no codes",
    lambda: report().perplexity,
    "active_units and mutual_information",
    lambda: (report().active_units, report().mutual_information),
)
case(
    "an optimum of another call",
    lambda: log_evidence(model, made(), (X,), optimum=optimize_local(model, made(), (X[:3],)), max_samples=100),
    r"optimize_local\(...\) with the arguments of this call",
    lambda: log_evidence(model, made(), (X,), optimum=optimize_local(model, made(), (X,)), max_samples=100),
)
case(
    "weights in integers",
    lambda: psis(torch.arange(30)),
    r"log_weights.double\(\)",
    lambda: psis(torch.arange(30).double()),
)
case("weights in a list", lambda: psis([1.0]), r"torch.as_tensor\(log_weights\)", lambda: psis(torch.as_tensor([1.0])))
case(
    "a simulation for a table",
    lambda: simulate(model, made(guide_class=PerDatapointGuide), (X,)),
    "AmortizedGuide, or SemiAmortizedGuide",
    lambda: [simulate(model, made(), (X,)), simulate(model, made(guide_class=SemiAmortizedGuide, num_steps=2), (X,))],
)


def doubled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)


case(
    "a simulation of computed data",
    lambda: simulate(doubled, made(doubled), (X,)),
    "just as the site observes them",
    lambda: simulate(model, made(), (2 * X,)),
)
LIKELIHOOD_SCALED = of_latent(lambda: dist.Normal(0.0, 1.0), likelihood=lambda z: dist.Normal(z, 1.0))


def weighted(scale: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a simulation of a scaled likelihood",
    lambda: simulate(weighted(2.0), made(weighted(2.0)), (X,)),
    "the model without it",
    lambda: simulate(model, made(), (X,)),
)


def random_batch(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def explicit_batch() -> None:
    guide = AmortizedGuide(subsampled)
    simulate(subsampled, guide, (X, torch.tensor([1, 3])))


case(
    "a simulation of a random batch",
    lambda: simulate(random_batch, made(random_batch), (X,)),
    r"subsample=index\)",
    explicit_batch,
)
case(
    "a simulation of a random batch, alone",
    lambda: simulate(random_batch, made(random_batch), (X,)),
    "only the batch itself",
    lambda: simulate(model, made(), (X[:2],)),
)


def with_global(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def resampled() -> None:
    guide = made(with_global)
    conditioned = pyro.condition(with_global, data=guide.global_median(X))
    to_arviz(conditioned, guide, (X,), num_samples=10, resample=True)


case(
    "resampling of global draws",
    lambda: to_arviz(with_global, made(with_global), (X,), num_samples=10, resample=True),
    "pyro.condition",
    resampled,
)
case(
    "quantiles of AutoDelta",
    lambda: posterior_summary(with_global, made(with_global, global_guide=AutoDelta), (X,)),
    r"quantiles=\(0.5,\)",
    lambda: posterior_summary(with_global, made(with_global, global_guide=AutoDelta), (X,), quantiles=(0.5,)),
)
case(
    "quantiles of AutoDelta, another guide",
    lambda: posterior_summary(with_global, made(with_global, global_guide=AutoDelta), (X,)),
    "another global_guide, such as AutoNormal",
    lambda: posterior_summary(with_global, made(with_global, global_guide=AutoNormal), (X,)),
)
case(
    "unknown groups",
    lambda: to_arviz(model, made(), (X,), groups=["foo"]),
    "some of .*'posterior'",
    lambda: to_arviz(model, made(), (X,), groups=["posterior"], num_samples=10),
)

# Training
ANALYTIC = of_latent(lambda: dist.Gamma(2.0, 1.0))


def annealed() -> None:
    annealing = KLAnnealing(ANALYTIC, made(ANALYTIC), linear_schedule(10))
    step(annealing.model, annealing.guide)


case("free bits without a closed form", lambda: train(ANALYTIC, elbo=FreeBitsELBO(0.1)), "KLAnnealing", annealed)
case(
    "free bits without a closed form, log-normal",
    lambda: train(ANALYTIC, elbo=FreeBitsELBO(0.1)),
    "independent normals or log-normals",
    lambda: train(of_latent(lambda: dist.LogNormal(0.0, 1.0)), elbo=FreeBitsELBO(0.1)),
)
case(
    "a number for a schedule",
    lambda: KLAnnealing(model, made(), 0.5),
    r"linear_schedule\(1000\)",
    lambda: KLAnnealing(model, made(), linear_schedule(1000)),
)


# Reports, exports and files


def gaps(**options: Any) -> GapEstimate:
    return estimate_gaps(model, made(), (X,), **options)


def loadings(guide: Any, **options: Any) -> Any:
    return posterior_summary(model, guide, (X,), num_samples=20, **options)


case(
    "quantiles above 1",
    lambda: made().quantiles([0.5, 1.5], X),
    r"\(0.05, 0.5, 0.95\)",
    lambda: made().quantiles((0.05, 0.5, 0.95), X),
)
case(
    "quantiles of a summary above 1",
    lambda: loadings(made(), quantiles=(0.5, 1.5)),
    r"\(0.05, 0.5, 0.95\)",
    lambda: loadings(made(), quantiles=(0.05, 0.5, 0.95)),
)
case("an unknown order", lambda: gaps().worst(2, by="nothing"), "one of .*'inference_gap'", lambda: gaps().worst(2))
case("no gap estimates", lambda: GapEstimate.concat([]), "at least one", lambda: GapEstimate.concat([gaps()]))
case(
    "no guide",
    lambda: compare_gaps(model, {}, {"x": (X,)}),
    "at least one of each",
    lambda: compare_gaps(model, {"a": made()}, {"x": (X,)}),
)
case(
    "an optimum for batches",
    lambda: log_evidence(model, (g := made()), loader(), optimum=optimize_local(model, g, (X,))),
    "leaving it out",
    lambda: log_evidence(model, made(), loader()),
)
case("weights without samples", lambda: psis(torch.zeros(0, 3)), "num_samples first", lambda: psis(torch.randn(50, 3)))
case(
    "weights that are not finite",
    lambda: psis(torch.tensor([[math.nan, 0.0]] * 50)),
    "leave these columns out",
    lambda: psis(torch.tensor([[0.0]] * 50)),
)
case("an unknown plot", lambda: CALIBRATED().plot(kind="nothing"), "'ecdf'", lambda: CALIBRATED().plot(kind="ecdf"))
case(
    "an unknown quantity",
    lambda: CALIBRATED().plot("ranks", quantity="nothing"),
    "one of .*'z'",
    lambda: CALIBRATED().plot("ranks", quantity="z"),
)
case("no axes", lambda: gaps().plot(ax=3), "or None", lambda: gaps().plot(ax=None))
case(
    "a report that cannot be read",
    lambda: GapEstimate.from_netcdf(__file__),
    "the path that to_netcdf was given",
    lambda: kept(lambda path: (gaps().to_netcdf(path), GapEstimate.from_netcdf(path))),
)
case(
    "no directory for a report",
    lambda: gaps().to_netcdf("nowhere/at/all/report.nc"),
    "a directory that exists",
    lambda: kept(lambda path: gaps().to_netcdf(path)),
)
case(
    "something else to diagnose",
    lambda: collapse_report(3, made(), (X,)),
    "the Pyro model that the guide was made with",
    report,
)
case(
    "export of Pyro's own guide",
    lambda: to_arviz(model, AutoNormal(model), (X,)),
    "an AmortizedGuide",
    lambda: to_arviz(model, made(), (X,), num_samples=10),
)
case(
    "groups that are no names",
    lambda: to_arviz(model, made(), (X,), groups=[3]),
    "some of .*'posterior'",
    lambda: to_arviz(model, made(), (X,), num_samples=10, groups=["posterior"]),
)


@cache
def CALIBRATED() -> Any:
    return calibrate(model, made(), (X,), num_simulations=40, num_samples=19)


def kept(write: Callable[[str], Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write(f"{directory}/report.nc")


# Simulations


def counted(floating: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.float() if floating else x)

    return model


def with_factor(as_density: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if as_density:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.factor("f", -z.square())

    return model


case(
    "a simulation of a factor",
    lambda: simulate(with_factor(False), made(with_factor(False)), (X,)),
    "prior and likelihood are distributions",
    lambda: simulate(with_factor(True), made(with_factor(True)), (X,)),
)


case(
    "integers for real draws",
    lambda: simulate(counted(False), made(counted(False), data=X.long()), (X.long(),)),
    "dtype torch.float32",
    lambda: simulate(counted(False), made(counted(False)), (X,)),
)

# Guides


case("no model", lambda: AmortizedGuide(3), "the Pyro model itself", made)
case(
    "encoder input of a number",
    lambda: made(encoder_input=3),
    "None for the observed values",
    lambda: made(encoder_input=None),
)
case("an empty encoder input", lambda: made(encoder_input=[]), "None", lambda: made(encoder_input=None))
case(
    "a state that is none",
    lambda: made().load_state_dict(3),
    r"guide.state_dict\(\) of a guide that was made alike",
    lambda: made().load_state_dict(made().state_dict()),
)
case(
    "the state of another guide",
    lambda: made().load_state_dict(made(model, AmortizedGuide, MLPEncoder(1, hidden_dims=(3,))).state_dict()),
    "the same model, family, encoder",
    lambda: made(model, AmortizedGuide, MLPEncoder(1, hidden_dims=(3,))).load_state_dict(
        made(model, AmortizedGuide, MLPEncoder(1, hidden_dims=(3,))).state_dict()
    ),
)
case("an unknown family", lambda: made(family="student"), "one of .*'normal'", lambda: made(family="normal"))
case("a family that is none", lambda: made(family=3), "one of .*'normal'", lambda: made(family="normal"))
case(
    "a function that makes no family",
    lambda: made(family=lambda latent_dim: latent_dim),
    "a function that returns a VariationalFamily",
    lambda: made(family=lambda latent_dim: Normal(latent_dim)),
)
case(
    "an affine flow of one latent",
    lambda: made(family=lambda latent_dim: Flow(latent_dim, "affine_coupling")),
    "spline_autoregressive",
    lambda: made(family=lambda latent_dim: Flow(latent_dim, "spline_autoregressive")),
)
case(
    "an unknown flow of zuko",
    lambda: Flow(2, "zuko.Nothing"),
    "zuko.NSF",
    lambda: Flow(2, "zuko.NSF"),
)
case(
    "parents of another size",
    lambda: Structured(2, torch.zeros(3, 3, dtype=torch.bool)),
    r"a boolean tensor \(2, 2\)",
    lambda: Structured(2, torch.zeros(2, 2, dtype=torch.bool)),
)
case(
    "an unknown estimator",
    lambda: made(model, SemiAmortizedGuide, estimator="nothing"),
    "'",
    lambda: made(model, SemiAmortizedGuide),
)
case(
    "an unknown gradient of the encoder",
    lambda: made(model, SemiAmortizedGuide, encoder_gradient="nothing"),
    '"anchored"',
    lambda: made(model, SemiAmortizedGuide, encoder_gradient="anchored"),
)
case(
    "an encoder without weights",
    lambda: made(model, AmortizedGuide, broken_encoder(math.nan)),
    "a look at its weights",
    lambda: made(model, AmortizedGuide, broken_encoder(1.0)),
)


def broken_encoder(weight: float) -> nn.Module:
    encoder = nn.Linear(1, 4)
    nn.init.constant_(encoder.weight, weight)
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), encoder)


case(
    "no bijection to the support",
    lambda: train(of_latent(lambda: NoBijection(0.0, 1.0))),
    "another prior for it",
    lambda: train(of_latent(lambda: dist.Normal(0.0, 1.0))),
)


class Unknown(dist.constraints.Constraint):
    """A support that no transform is registered for."""

    def check(self, value: Tensor) -> Tensor:
        return value == value


class NoBijection(dist.Normal):
    support = Unknown()


def size_free(sized: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)) if sized else pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a plate without a size",
    lambda: train(size_free(False)),
    r"pyro.plate\('data', 6\)",
    lambda: train(size_free(True)),
)


def dependent(plated: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if plated:
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)
        if not plated:
            pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=x.sum())

    return model


case(
    "a site outside of the plate that depends on its latents",
    lambda: log_evidence(dependent(False), made(dependent(False)), (X,)),
    "lies in plate 'data'",
    lambda: log_evidence(dependent(True), made(dependent(True)), (X,)),
)


def angle(projected: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if projected:
                direction = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
                z = torch.atan2(direction[..., 1], direction[..., 0])
            else:
                z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return poutine.reparam(model, {"z": ProjectedNormalReparam()}) if projected else model


case("a periodic latent", lambda: train(angle(False)), "ProjectedNormal", lambda: train(angle(True)))
case(
    "a step to the optimum already",
    lambda: Newton(step_size=1.5),
    "0.7",
    lambda: Newton(step_size=0.7),
)
case(
    "a Codebook of another dim",
    lambda: Codebook(4, 2).initialize(torch.zeros(3, 5)),
    r"features \(\*, 2\)",
    lambda: Codebook(4, 2).initialize(torch.randn(9, 2)),
)
case(
    "no codebook",
    lambda: VectorQuantizedGuide(model, 3),
    "the Codebook that the model looks codes up in",
    lambda: VectorQuantizedGuide(model, Codebook(4, 2)),
)
case(
    "annealing of no model",
    lambda: KLAnnealing(3, made(), linear_schedule(10)),
    "the model itself",
    lambda: KLAnnealing(model, made(), linear_schedule(10)),
)
case(
    "free bits per nothing",
    lambda: FreeBitsELBO(0.1, per="nothing"),
    'per="site"',
    lambda: FreeBitsELBO(0.1, per="site"),
)


def without_latents(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


case(
    "free bits without local latents",
    lambda: train(without_latents, elbo=FreeBitsELBO(0.1)),
    "TraceMeanField_ELBO",
    lambda: train(without_latents, elbo=TraceMeanField_ELBO()),
)


def reloaded(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))


def with_model(guide: Any) -> Any:
    guide = reloaded(guide)
    guide.model = model
    return guide


case(
    "a loaded guide without its model",
    lambda: reloaded(made())(X),
    "guide.model = model",
    lambda: with_model(made())(X),
)
case(
    "a loaded guide that refines",
    lambda: reloaded(made(model, SemiAmortizedGuide, num_steps=2, encoder_input="x"))(X),
    "guide.model = model",
    lambda: with_model(made(model, SemiAmortizedGuide, num_steps=2, encoder_input="x"))(X),
)
case(
    "an argument of a loaded guide",
    lambda: reloaded(made(encoder_input="x"))(x=X),
    "guide.model = model",
    lambda: with_model(made(encoder_input="x"))(x=X),
)


def changing(fixed: bool, what: str) -> Callable[[], Any]:
    """A guide of a model that changes between two calls, or does not."""

    def run() -> None:
        state = {"changed": False}

        def model(x: Tensor) -> None:
            other = state["changed"] and not fixed
            with pyro.plate("rows" if other and what == "plate" else "data", len(x)):
                shape = (3,) if other and what == "shape" else (2,)
                z = pyro.sample(
                    "y" if other and what == "site" else "z", dist.Normal(torch.zeros(shape), 1.0).to_event(1)
                )
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
            if other and what == "global":
                pyro.sample("w", dist.Normal(0.0, 1.0))

        guide = made(model)
        state["changed"] = True
        guide(X)

    return run


for what in ("plate", "shape", "site", "global"):
    case(
        f"another {what} than at first",
        changing(False, what),
        "(the same structure in every call|one guide per structure)",
        changing(True, what),
    )


def forking(fixed: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if fixed or z.mean() > 0:
                z = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a random structure",
    lambda: train(forking(False)),
    "a structure that its arguments decide",
    lambda: train(forking(True)),
)


def iterating(given: bool) -> Callable[..., None]:
    batches = itertools.count()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if given else x + next(batches))

    return model


case(
    "the next data of an iterator",
    lambda: train(iterating(False)),
    "data that are an argument of the model",
    lambda: train(iterating(True)),
)


def twice_scaled(outside: bool) -> None:
    scaled = poutine.scale(model, 2.0)
    guide = made(scaled)
    step(scaled, poutine.scale(guide, 2.0) if outside else guide)


case(
    "a guide scaled twice",
    lambda: twice_scaled(True),
    "the guide without poutine.scale",
    lambda: twice_scaled(False),
)


def in_a_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.plate("inner", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(3, -1))


for family in ("normal", "multivariate_normal"):
    case(
        f"a flow where all sites lie in an inner plate, {family}",
        lambda: train(in_a_plate, family="flow"),
        f'"{family}"',
        lambda family=family: train(in_a_plate, family=family),  # type: ignore[misc]
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)


def test_values_that_errors_propose_are_taken() -> None:
    """Where the remedy is a setting, it is read off the text."""
    settings: list[tuple[Callable[..., Any], list[str]]] = [
        (lambda **k: made(**k), ["init_scale", "name", "plate"]),
        (
            lambda **k: SemiAmortizedGuide(model, **k),
            ["num_steps", "num_particles", "compile", "keep_best", "fixed_noise", "checkpoint"],
        ),
        (lambda **k: report(**k), ["threshold", "epsilon", "delta", "max_pairs", "seed"]),
        (lambda **k: simulate(model, made(), (X,), **k), ["num_datapoints", "seed"]),
        (lambda **k: posterior_summary(model, made(), (X,), **k), ["num_samples", "seed"]),
        (lambda **k: Adam(**k), ["step_size", "max_norm", "betas"]),
        (lambda **k: NaturalGradient(**k), ["step_size", "max_shift", "max_log_ratio"]),
        (lambda **k: Newton(**k), ["step_size", "max_shift", "max_log_ratio"]),
        (lambda **k: LearnedUpdate(**k), ["hidden_dims"]),
        (lambda **k: MLPEncoder(1, **k), ["hidden_dims", "standardize"]),
        (lambda **k: DeepSetEncoder(1, **k), ["hidden_dims", "output_dims"]),
        (lambda **k: SequenceEncoder(1, **k), ["causal", "pooled", "hidden_dims", "num_layers", "num_heads"]),
        (lambda **k: ConvEncoder(1, **k), ["conv_dims", "hidden_dims", "kernel_size", "grid", "standardize"]),
        (lambda **k: CountEncoder(1, **k), ["num_batches", "hidden_dims", "standardize"]),
        (lambda **k: Normal(**k), ["latent_dim"]),
        (lambda **k: LowRankMultivariateNormal(3, **k), ["rank"]),
        (lambda **k: Mixture(2, **k), ["num_components", "spread"]),
        (lambda **k: Flow(2, **k), ["num_transforms", "context_dim", "hidden_dims"]),
        (lambda **k: Codebook(**{"num_codes": 4, "dim": 2, **k}), ["num_codes", "dim", "decay", "revive_below"]),
        (lambda **k: linear_schedule(**k), ["num_steps"]),
        (lambda **k: sigmoid_schedule(**{"midpoint": 5, "width": 2, **k}), ["midpoint", "width"]),
        (lambda **k: cyclical_schedule(**{"num_steps": 5, **k}), ["num_steps", "num_cycles", "ramp"]),
        (lambda **k: FreeBitsELBO(**k), ["free_bits"]),
        (lambda **k: CapacityELBO(**{"capacity": 1.0, **k}), ["capacity", "gamma"]),
        (lambda **k: DiscreteAmortizedGuide(model, **k), ["temperature"]),
        (lambda **k: VectorQuantizedGuide(model, Codebook(4, 2), **k), ["commitment"]),
    ]
    for call, names in settings:
        for name in names:
            with pytest.raises(ValueError, match="; try ") as caught:
                call(**{name: object()})
            setting, value = re.search(r"; try (\w+)=(.+?)\.?$", str(caught.value), re.DOTALL).groups()  # type: ignore[union-attr]
            assert setting == name, caught.value
            call(**{name: ast.literal_eval(value)})


def test_reports_are_read_by_the_class_that_the_error_names(tmp_path: Path) -> None:
    path = tmp_path / "report.nc"
    report().to_netcdf(path)
    with pytest.raises(ValueError, match="try the path that to_netcdf was given, or CollapseReport.from_netcdf"):
        GapEstimate.from_netcdf(path)
    assert CollapseReport.from_netcdf(path).num_datapoints == 6


def _texts(source: str) -> list[str]:
    """The texts of all ValueErrors that are raised, with what they insert as code."""
    calls = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    texts = [ast.unparse(c) for c in calls if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "ValueError"]
    return [
        text for text in texts if not text.startswith(("ValueError('it ", "ValueError('the "))
    ]  # which are caught in the package


ROOT = Path(pyro_amortized.__file__).parent


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_error_says_what_why_and_what_to_try(path: Path) -> None:
    for text in _texts(path.read_text()):
        assert "Cannot " in text, text
        assert re.search(r"because|\{why\}", text), text
        assert re.search(r"\b[Tt]ry\b|\{remedy\}", text), text
