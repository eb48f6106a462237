"""What errors of diagnostics and exports advise: of data sets, simulations, reports and files."""

import math
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from remedies import Cases, X, global_only, made, masked_global, model, report, subsampled, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    GapEstimate,
    PerDatapointGuide,
    SemiAmortizedGuide,
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

case = Cases()

# Data sets


def loader(**options: Any) -> Any:
    return DataLoader(TensorDataset(X), batch_size=3, **options)


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
    r"eval\(\) of modules",
    lambda: report_of(Decoder(nn.Dropout(0.5)).eval()),
)
case(
    "a decoder with batch normalisation",
    lambda: report_of(Decoder(nn.BatchNorm1d(4))),
    r"eval\(\) of modules",
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


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", case)
def test_the_remedy_helps(name: str) -> None:
    case.check(name)
