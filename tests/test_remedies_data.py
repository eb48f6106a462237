"""What errors about data advise: those of simulations, encoders' inputs, exports and reports."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep
from remedies import X2, Cases, X, made, model, of_latent, step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    DeepSetEncoder,
    GapEstimate,
    MLPEncoder,
    calibrate,
    collapse_report,
    estimate_gaps,
    log_evidence,
    optimize_local,
    posterior_summary,
    simulate,
    to_arviz,
)
from pyro_amortized.diagnostics.evidence.importance import reliability_threshold

case = Cases()
FEW = {"num_simulations": 20, "num_samples": 19}


def loader(data: Any = X) -> Any:
    return DataLoader(TensorDataset(data), batch_size=3)


def batches(x: Tensor = X) -> Iterator[Tensor]:
    yield from x.split(3)


# Lists of batches

case(
    "a list of batches for the arguments of one call",
    lambda: posterior_summary(model, made(), [*batches()]),
    r"DataLoader\(batches, batch_size=None\)",
    lambda: posterior_summary(model, made(), DataLoader([*batches()], batch_size=None)),
)


# Batches for tensors, and guides for models

LIST: Any = [X]
ORDER = r"estimate_gaps\(model, guide, \(x,\)\)"

case(
    "a batch for its tensors",
    lambda: step(model, made(), LIST),
    r"svi.step\(\*batch\)",
    lambda: step(model, made(), *LIST),
)
case(
    "a loader for tensors, at first",
    lambda: AmortizedGuide(model)(loader()),
    r"estimate_gaps\(model, guide, loader\)",
    lambda: estimate_gaps(model, made(), loader()),
)
case(
    "a guide for the model",
    lambda: estimate_gaps(made(), model, (X,)),
    ORDER,
    lambda: estimate_gaps(model, made(), (X,)),
)  # type: ignore[arg-type]
case("no model", lambda: estimate_gaps(made(), (X,)), ORDER, lambda: estimate_gaps(model, made(), (X,)))  # type: ignore[arg-type]
case("no model to export", lambda: to_arviz(made(), (X,)), ORDER, lambda: to_arviz(model, made(), (X,)))  # type: ignore[arg-type]


def of_two(x: Tensor, y: Tensor) -> None:
    model(x + y)


case(
    "batches of too few tensors",
    lambda: estimate_gaps(of_two, made(model), loader()),
    r"lambda batch: \(\*batch, ...\), with what is missing",
    lambda: posterior_summary(model, made(), loader(X2), to_args=lambda batch: (batch[0].sum(-1),)),
)


# Answers that depend on the batch


def normalized(**options: Any) -> AmortizedGuide:
    guide = made(
        model, AmortizedGuide, nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 4), nn.BatchNorm1d(4, **options))
    )
    guide(X)
    return guide


def dropping() -> nn.Module:
    return nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Linear(1, 40), nn.Dropout(0.5))


for name, ask in {
    "gaps": estimate_gaps,
    "a summary": posterior_summary,
    "an export": to_arviz,
    "collapse": partial(collapse_report, num_samples=20),
}.items():
    case(
        f"batch normalisation in training, {name}",
        lambda ask=ask: ask(model, normalized(), (X,)),
        r"guide.eval\(\)",
        lambda ask=ask: ask(model, normalized().eval(), (X,)),
    )
case(
    "batch normalisation by the batch alone",
    lambda: estimate_gaps(model, normalized(track_running_stats=False).eval(), (X,)),
    "track_running_stats=True in training",
    lambda: estimate_gaps(model, normalized(track_running_stats=True).eval(), (X,)),
)
case(
    "a summary with dropout",
    lambda: posterior_summary(model, made(model, AmortizedGuide, dropping()), (X,)),
    r"guide.eval\(\)",
    lambda: posterior_summary(model, made(model, AmortizedGuide, dropping()).eval(), (X,)),
)


# Latents outside of plates


def outside(x: Tensor, inside: bool = False) -> None:
    prior = dist.Normal(0.0, 1.0)
    z = None if inside else pyro.sample("z", prior.expand([len(x)]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", prior) if z is None else z, 1.0), obs=x)


case(
    "latents outside of the datapoint plate",
    lambda: made(outside).median(X[:4]),
    r"sampling it inside of the datapoint plate, `with pyro.plate\('rows', len\(x\)\):`",
    lambda: made(partial(outside, inside=True)).median(X[:4]),
)


def without_plate(x: Tensor) -> None:
    pyro.sample(
        "x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1)), 1.0).to_event(1), obs=x
    )


case(
    "latents without any plate",
    lambda: made(without_plate)(X[:4]),
    r"sampling it inside of the datapoint plate, `with pyro.plate\('data', len\(x\)\):`",
    lambda: made(model)(X[:4]),
)


# Indices of long format


def grouped(y: Tensor, index: Tensor, sizes: Tensor) -> None:
    with pyro.plate("group", len(sizes)):
        a = pyro.sample("a", dist.Normal(0.0, sizes))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(a[index], 1.0), obs=y)


LABELS = torch.tensor([3, 5, 8, 9])
ROWS = torch.tensor([3, 3, 5, 9, 9, 5])
POSITIONS = torch.tensor([0, 0, 1, 3, 3, 1])


def ask_groups(*indices: Tensor) -> None:
    pyro.clear_param_store()
    guide = AmortizedGuide(grouped, plate="group", groups={"obs": "index"})
    found = [guide.median(X, index, torch.ones(4))["a"] for index in indices]
    assert all(torch.equal(values, found[0]) for values in found)


case(
    "an index from 1",
    lambda: ask_groups(POSITIONS + 1),
    "index - 1, if it counts from 1",
    lambda: ask_groups(POSITIONS),
)
case(
    "an index from 1, later",
    lambda: ask_groups(POSITIONS, POSITIONS + 1),
    "index - 1, if it counts from 1",
    lambda: ask_groups(POSITIONS, POSITIONS + 1 - 1),
)
case(
    "labels for an index",
    lambda: ask_groups(ROWS),
    r"torch.searchsorted\(labels, index\)",
    lambda: ask_groups(POSITIONS, torch.searchsorted(LABELS, ROWS)),
)
case(
    "numbers with fractions for an index",
    lambda: ask_groups(POSITIONS.float()),
    r"index.long\(\)",
    lambda: ask_groups(POSITIONS, POSITIONS.float().long()),
)


# Calibration

case(
    "calibration on batches without a number",
    lambda: calibrate(model, made(), batches(), **FEW),
    "a DataLoader with a length",
    lambda: calibrate(model, made(), loader(), **FEW),
)
case(
    "calibration on batches without a number, one of them",
    lambda: calibrate(model, made(), batches(), **FEW),
    r"one batch, \(x,\)",
    lambda: calibrate(model, made(), (next(batches()),), **FEW),
)


def growing(scale: float) -> Callable[[Tensor], None]:
    return of_latent(lambda: dist.Normal(0.0, scale), likelihood=lambda z: dist.Normal(z.exp(), 1.0))


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.unsqueeze(-1), (0.1 * x.unsqueeze(-1)).exp()


def calibrated(model: Any) -> None:
    calibrate(model, made(model, AmortizedGuide, Exponential()), (X,), **FEW)


case(
    "data that a guide has no answer to",
    lambda: calibrated(growing(15.0)),
    "a prior that gives plausible data",
    lambda: calibrated(growing(1.0)),
)

# Simulations


def of_size(size: int | None) -> Callable[[Tensor], None]:
    """A model that runs on its own number of rows only, or on any."""

    def model(x: Tensor) -> None:
        number = len(x) if size is None else size
        with pyro.plate("data", number):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([number]))
            pyro.sample("x", dist.Normal(z.reshape(number), 1.0), obs=x)

    return model


case(
    "more rows than a model runs on",
    lambda: simulate(of_size(6), made(of_size(6)), (X,), num_datapoints=20),
    "num_datapoints=6",
    lambda: simulate(of_size(6), made(of_size(6)), (X,), num_datapoints=6),
)
case(
    "more rows than a model runs on, of any size",
    lambda: simulate(of_size(6), made(of_size(6)), (X,), num_datapoints=20),
    "a model whose plate takes its size from an argument that holds the data of its datapoints",
    lambda: simulate(of_size(None), made(of_size(None)), (X,), num_datapoints=20),
)
for name, seen in (("as it is", "x"), ("computed", lambda x: x.square())):
    case(
        f"an encoder that does not see simulated data, but {name}",
        lambda: simulate(model, made(encoder_input=lambda x: X), (X,)),
        "an encoder_input that is, or is computed from, the argument",
        lambda seen=seen: simulate(model, made(encoder_input=seen), (X,)),  # type: ignore[misc]
    )


def looks_elsewhere(mended: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            first = pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(z + (first if mended else x[:, 0]), 1.0), obs=x[:, 1])

    return model


case(
    "a model that looks at its data elsewhere",
    lambda: simulate(looks_elsewhere(False), made(looks_elsewhere(False), data=X2), (X2,)),
    "the values that pyro.sample returns in place of the argument",
    lambda: simulate(looks_elsewhere(True), made(looks_elsewhere(True), data=X2), (X2,)),
)


def narrow(scale: float, dtype: Any = torch.float32) -> Any:
    prior = partial(dist.LogNormal, torch.tensor(0.0, dtype=dtype), scale)
    return of_latent(prior, likelihood=lambda z: dist.Normal(z.log1p(), 1.0))


def extreme(scale: float, dtype: Any = torch.float32) -> Any:
    x = torch.linspace(0.2, 0.8, 6, dtype=dtype)
    return simulate(narrow(scale, dtype), made(narrow(scale, dtype), data=x), (x,), num_datapoints=60)


case(
    "draws on the boundary of a support",
    lambda: extreme(50.0),
    "a less extreme prior",
    lambda: extreme(1.0),
)
case(
    "draws on the boundary of a support, in double precision",
    lambda: extreme(50.0),
    "float64",
    lambda: extreme(50.0, torch.float64),
)


def overflowing(scale: float) -> Callable[[Tensor], None]:
    return of_latent(lambda: dist.Normal(0.0, 1.0), likelihood=lambda z: dist.LogNormal(scale * z, 1.0))


case(
    "observations that overflow",
    lambda: simulate(overflowing(900.0), made(overflowing(900.0), data=X.exp()), (X.exp(),)),
    "a moderate range",
    lambda: simulate(overflowing(1.0), made(overflowing(1.0), data=X.exp()), (X.exp(),)),
)


def observes(rows: slice) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows, 1])

    return model


FIRST, ALL = slice(1), slice(None)
case(
    "one value for all datapoints",
    lambda: simulate(observes(FIRST), made(observes(FIRST), data=X2), (X2,)),
    "a tensor with one value for each",
    lambda: simulate(observes(ALL), made(observes(ALL), data=X2), (X2,)),
)


class NoSampler(dist.Normal):
    def sample(self, *args: Any) -> Tensor:
        raise NotImplementedError

    rsample = sample


def likelihood(distribution: Any) -> Callable[[Tensor], None]:
    return of_latent(lambda: dist.Normal(0.0, 1.0), likelihood=lambda z: distribution(z, 1.0))


case(
    "a likelihood without a sampler",
    lambda: simulate(likelihood(NoSampler), made(likelihood(NoSampler)), (X,)),
    "a proper distribution with a sampler",
    lambda: simulate(likelihood(dist.Normal), made(likelihood(dist.Normal)), (X,)),
)

# Data that inference algorithms simulate


def computed(x: Tensor, observations: Any = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)


def given_observations(**options: Any) -> None:
    guide = made(computed, **options)
    guide(X, observations={"x": torch.randn(6)})


case(
    "simulated data that are no argument",
    lambda: given_observations(encoder_input="x"),
    "encoder_input=None",
    lambda: given_observations(encoder_input=None),
)


def simulated(x: Tensor, observations: Any = None) -> None:
    model(x)


def asleep(model: Any = None, insomnia: float = 0.5, vectorized: bool = False, **options: Any) -> None:
    model = simulated if model is None else model
    guide = made(model, **options)
    elbo = ReweightedWakeSleep(
        2, insomnia, model_has_params=False, vectorize_particles=vectorized, max_plate_nesting=1, num_sleep_particles=2
    )
    losses = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(X)
    assert all(math.isfinite(loss) for loss in losses)


def with_global(x: Tensor, observations: Any = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


JOINT = {"family": "multivariate_normal"}
case("wake-sleep of a joint family", lambda: asleep(**JOINT), 'family="normal"', lambda: asleep(family="normal"))
case("wake-sleep of a global latent", lambda: asleep(with_global), "a model without global latents", asleep)
case("the wake phase of a joint family", lambda: asleep(**JOINT), "insomnia=1.0", lambda: asleep(insomnia=1.0, **JOINT))


def of_particles(num: int) -> None:
    guide = made()
    guide(X, observations={"x": torch.randn(*[num] * (num > 1), 6)})


case(
    "simulated data of several particles", lambda: of_particles(3), "vectorize_particles=False", lambda: of_particles(1)
)

# What the encoder sees

for name, given in (("a list", [[0.5], [1.0]]), ("an array", X2[:, :1].numpy())):
    case(
        f"{name} for an encoder",
        lambda given=given: MLPEncoder(1)(given),  # type: ignore[misc]
        r"torch.as_tensor\(x\)",
        lambda given=given: MLPEncoder(1)(torch.as_tensor(given)),  # type: ignore[misc]
    )
case(
    "a single set",
    lambda: DeepSetEncoder(1)(X),
    r"x.unsqueeze\(0\)",
    lambda: DeepSetEncoder(1)(X.unsqueeze(0)),
)


class OneOfThree(DeepSetEncoder):
    def _mask(self, x: Tensor, *inputs: Any) -> Any:
        return super()._mask(x)


def three_inputs(x: Tensor, y: Tensor, z: Tensor) -> None:
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        for name, value in (("x", x), ("y", y), ("z", z)):
            pyro.sample(name, dist.Normal(w.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=value)


def seen(encoder: nn.Module, **options: Any) -> None:
    pyro.clear_param_store()
    step(three_inputs, AmortizedGuide(three_inputs, encoder, **options), X2, X2, X2)


case(
    "three inputs of DeepSetEncoder",
    lambda: seen(DeepSetEncoder(1)),
    "with the name of one argument",
    lambda: seen(DeepSetEncoder(1), encoder_input="x"),
)
case(
    "three inputs of DeepSetEncoder, of one's own",
    lambda: seen(DeepSetEncoder(1)),
    "an encoder of your own",
    lambda: seen(OneOfThree(1)),
)

# Log-joints


def root(mended: bool, start: float) -> Any:
    """A likelihood that is not defined at all latents, or is."""

    def scale(z: Tensor) -> Tensor:
        return nn.functional.softplus(z) if mended else (z + start).sqrt()

    return of_latent(lambda: dist.Normal(0.0, 1.0), likelihood=lambda z: dist.Normal(0.0, scale(z)))


def exported_root(mended: bool, start: float) -> None:
    model = root(mended, start)
    with pyro.validation_enabled(False):
        to_arviz(model, made(model, init_scale=1.0), (X,), num_samples=300, groups="sample_stats")


for name, start in (("everywhere", 0.0), ("in the tails", 2.5)):
    case(
        f"a likelihood that is not defined {name}",
        lambda start=start: exported_root(False, start),  # type: ignore[misc]
        "is not defined at all latents, .* but softplus",
        lambda start=start: exported_root(True, start),  # type: ignore[misc]
    )


def evidence(model: Any, data: Tensor = X) -> None:
    log_evidence(model, made(model, encoder_input=lambda x: x.nan_to_num(0.0, 0.0, 0.0)), (data,), max_samples=200)


INFINITE = torch.tensor([0.0, math.inf, 1.0])
case(
    "infinite observations",
    lambda: evidence(model, INFINITE),
    "invalid values in their data",
    lambda: evidence(model, INFINITE[INFINITE.isfinite()]),
)


def of_scale(scale: float) -> Callable[[Tensor], None]:
    return of_latent(lambda: dist.Normal(0.0, 1.0), likelihood=lambda z: dist.Normal(z, scale))


case(
    "a likelihood that underflows",
    lambda: evidence(of_scale(1e-30)),
    "for a likelihood that underflows",
    lambda: evidence(of_scale(0.1)),
)

# Reports

case("a threshold without draws", lambda: reliability_threshold(0), "at least 1", lambda: reliability_threshold(1))


@cache
def gaps(**options: Any) -> GapEstimate:
    return estimate_gaps(model, made(**options), (X,))


case(
    "gaps of different families",
    lambda: GapEstimate.concat([gaps(), gaps(family="multivariate_normal")]),
    "the batches of one guide",
    lambda: GapEstimate.concat([gaps(), gaps()]),
)


case(
    "a model called with its data alone",
    lambda: optimize_local(model, made(), X),
    r"\(x,\)",
    lambda: optimize_local(model, made(), (X,)),
)
case(
    "batches for one call",
    lambda: optimize_local(model, made(), loader()),
    "a tuple with those of one batch",
    lambda: [optimize_local(model, made(), tuple(batch)) for batch in loader()],
)


def on_plate(name: str) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate(name, len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


case(
    "a model of another plate",
    lambda: log_evidence(on_plate("rows"), made(plate="data"), (X,)),
    "the model that the guide was made with",
    lambda: log_evidence(model, made(plate="data"), (X,), max_samples=200),
)


def features(inner: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2 if inner else -1):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            if inner:
                with pyro.plate("features", 2, dim=-1):
                    z = pyro.sample("z", dist.Normal(k, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                z = pyro.sample("z", dist.Normal(k.unsqueeze(-1), 1.0).expand([*k.shape, 2]).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


case(
    "a prior given discrete latents, beside an inner plate",
    lambda: collapse_report(features(True), made(features(True), data=X2), (X2,), num_samples=20),
    r"to_event\(...\) instead of the inner plates",
    lambda: collapse_report(features(False), made(features(False), data=X2), (X2,), num_samples=20),
)

# Exports


def ragged(x: Tensor, present: Tensor, outside: Tensor) -> None:
    pyro.sample("outside", dist.Normal(0.0, 1.0), obs=outside)
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0).mask(present), obs=x)


def exported(*sizes: int, outside: tuple[float, ...] = (0.0, 0.0), pad: int = 0, one_by_one: bool = False) -> None:
    calls = []
    for size, value in zip(sizes, outside, strict=True):
        width = max(size, pad)
        x = torch.cat([torch.randn(3, size), torch.zeros(3, width - size)], 1)
        calls.append((x, torch.arange(width) < size, torch.tensor(value)))
    guide = AmortizedGuide(ragged, encoder_input=lambda x, present, outside: x[:, :2])
    pyro.clear_param_store()
    for args in calls if one_by_one else [iter(calls)]:
        to_arviz(ragged, guide, args, num_samples=5)


case("ragged batches", lambda: exported(2, 4), "padding to a common size", lambda: exported(2, 4, pad=4))
case("ragged batches, alone", lambda: exported(2, 4), "one call per batch", lambda: exported(2, 4, one_by_one=True))


def whole() -> None:
    pyro.clear_param_store()
    to_arviz(ragged, AmortizedGuide(ragged), (torch.randn(6, 2), torch.tensor(True), torch.tensor(1.0)), num_samples=5)


case(
    "an observation outside of the plate that differs",
    lambda: exported(2, 2, outside=(0.0, 1.0)),
    "a single call with all data",
    whole,
)
case(
    "a number for groups",
    lambda: to_arviz(model, made(), (X,), groups=3),
    "some of .*'posterior'",
    lambda: to_arviz(model, made(), (X,), groups=["posterior"], num_samples=5),
)


def summary(*quantiles: float) -> None:
    posterior_summary(model, made(), (X,), num_samples=20, quantiles=quantiles)


case("the quantile 0", lambda: summary(0.0, 0.5), r"\(0.05, 0.5, 0.95\)", lambda: summary(0.05, 0.5, 0.95))


def test_a_report_goes_where_one_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, path = gaps(), tmp_path / "report.nc"
    (tmp_path / "link.nc").symlink_to(tmp_path / "nowhere" / "report.nc")  # in no directory that exists
    with pytest.raises(ValueError, match=r'Cannot save this report.*try a file in a .* to_netcdf\("report.nc"\)'):
        report.to_netcdf(tmp_path / "link.nc")
    monkeypatch.chdir(tmp_path)
    report.to_netcdf("report.nc")
    assert GapEstimate.from_netcdf(path).dataset.equals(report.dataset)


@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
