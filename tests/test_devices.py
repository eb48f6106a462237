"""Every guide and diagnostic on every device; what a step reads off it, which makes Python wait for an accelerator.

Without a device of CUDA, ``make test-device`` runs them on one of the host's that torch takes for another.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_device
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    ConvEncoder,
    CountEncoder,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    SequenceEncoder,
    SetEncoder,
    VectorQuantizedGuide,
    calibrate,
    certified_posterior,
    collapse_report,
    compare_gaps,
    estimate_gaps,
    evidence_bounds,
    log_evidence,
    optimize_local,
    over_datasets,
    posterior_summary,
    predict_gap,
    psis,
    simulate,
    to_arviz,
    typicality,
)
from pyro_amortized.encoders.layers import Head
from pyro_amortized.encoders.standardize import FAR
from pyro_amortized.graphs.reads import _reads_values
from pyro_amortized.training import IWELBO, FreeBitsELBO, KLAnnealing, linear_schedule, load_checkpoint, save_checkpoint
from pyro_amortized.updates import newton

ACCELERATORS = (pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("fake", marks=pytest.mark.fake_device))
DEVICES = ("cpu", *ACCELERATORS)
NOT_ON_THE_FAKE_DEVICE = ("per datapoint, sparse", "sequence", "images", "exported", "saved")
"""Sparse gradients, fused recurrent cells, convolutions, and copies of storages."""
WAITING = ("inference.refined", "guides.checks", "updates.newton")
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def available(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if request.param == "fake":
        if request.node.callspec.params.get("name") in NOT_ON_THE_FAKE_DEVICE:
            pytest.skip("the fake device cannot do it")
        fake_device.load()
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return available(request)


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> str:
    return available(request)


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the ways of an accelerator."""
    for module in WAITING:
        monkeypatch.setattr(f"pyro_amortized.{module}.has_to_wait", lambda value: True)


def model(x: Tensor) -> None:
    """The posterior is Normal(x / 2, sqrt(1 / 2)), the evidence Normal(0, sqrt(2))."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def with_globals(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale.unsqueeze(-1)).to_event(1), obs=x)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).mask(x > -1.0).to_event(1), obs=x)


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", 100, subsample=torch.arange(len(x), device=x.device)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def nested(x: Tensor) -> None:
    with pyro.plate("school", x.shape[0], dim=-2):
        school = pyro.sample("school_level", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("pupil", x.shape[1], dim=-1):
            pupil = pyro.sample("pupil_level", dist.Normal(school, 1.0))
            pyro.sample("x", dist.Normal(pupil, 1.0), obs=x)


GROUP = torch.arange(12) % 5


def grouped(x: Tensor, group: Tensor) -> None:
    with pyro.plate("groups", 5):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z[group], 1.0).to_event(1), obs=x)


def clusters(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        code = pyro.sample("code", dist.Categorical(x.new_ones(4)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + code.unsqueeze(-1), 1.0).to_event(1), obs=x)


def quantized(device: str) -> tuple[Any, Any]:
    codebook = Codebook(num_codes=4, dim=3).to(device)

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(x.new_ones(4)))
            pyro.sample("x", dist.Normal(codebook(code), 1.0).to_event(1), obs=x)

    return program, VectorQuantizedGuide(program, codebook)


GUIDES: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "normal": lambda _: (model, AmortizedGuide(model)),
    "multivariate_normal": lambda _: (model, AmortizedGuide(model, family="multivariate_normal")),
    "structured": lambda _: (model, AmortizedGuide(model, family="structured")),
    "flow": lambda _: (model, AmortizedGuide(model, family="flow")),
    "mixture": lambda _: (model, AmortizedGuide(model, family="mixture")),
    "encoder_input": lambda _: (model, AmortizedGuide(model, encoder_input="x")),
    "global latents": lambda _: (with_globals, AmortizedGuide(with_globals)),
    "masks": lambda _: (masked, AmortizedGuide(masked)),
    "subsample": lambda _: (subsampled, AmortizedGuide(subsampled)),
    "inner plates": lambda _: (nested, AmortizedGuide(nested)),
    "semi-amortized": lambda _: (model, SemiAmortizedGuide(model, num_steps=2)),
    "semi-amortized, full rank": lambda _: (
        model,
        SemiAmortizedGuide(model, num_steps=2, family="multivariate_normal"),
    ),
    "distilled": lambda _: (model, SemiAmortizedGuide(model, num_steps=2, encoder_gradient="distill")),
    "semi-amortized, global latents": lambda _: (with_globals, SemiAmortizedGuide(with_globals, num_steps=2)),
    "iterative": lambda _: (model, IterativeAmortizedGuide(model, num_steps=2)),
    "per datapoint": lambda _: (subsampled, PerDatapointGuide(subsampled)),
    "per datapoint, sparse": lambda _: (subsampled, PerDatapointGuide(subsampled, sparse=True)),
    "discrete": lambda _: (clusters, DiscreteAmortizedGuide(clusters)),
    "groups": lambda _: (grouped, AmortizedGuide(grouped, plate="groups", groups={"rows": "group"})),
    "groups, semi-amortized": lambda _: (
        grouped,
        SemiAmortizedGuide(grouped, plate="groups", groups={"rows": "group"}, num_steps=2),
    ),
    "set": lambda device: (
        model,
        AmortizedGuide(model, SetEncoder(1).to(device), encoder_input=lambda x: x.unsqueeze(-1)),
    ),
    "sequence": lambda device: (
        model,
        AmortizedGuide(model, SequenceEncoder(1, pooled=True).to(device), encoder_input=lambda x: x.unsqueeze(-1)),
    ),
    "images": lambda device: (
        model,
        AmortizedGuide(model, ConvEncoder(1).to(device), encoder_input=lambda x: x[:, None, None]),
    ),
    "counts": lambda device: (
        model,
        AmortizedGuide(model, CountEncoder(3).to(device), encoder_input=lambda x: x.exp().round()),
    ),
    "vector quantized": quantized,
}
UNLESS_CUDA = {"groups": 1, "groups, semi-amortized": 1, "counts": 1}
"""Checks of values that CUDA makes by itself: whether positions and counts are in range."""
READS = {
    "semi-amortized": 2,
    "semi-amortized, full rank": 2,
    "distilled": 2,
    "semi-amortized, global latents": 2,
    "iterative": 1,
    # whether the features are finite, twice; whether the codebook has vectors, and dead ones; whether the last step is
    # over; whether the model has looked up all codes
    "vector quantized": 6,
}
"""How often a step of a guide reads a value: once for each traced graph in it, of gradients and of the ELBO."""


class Reads(TorchDispatchMode):
    """Counts what of the package reads values, and what it makes on the host for the device; not Pyro's own."""

    FACTORIES = ("lift_fresh", "eye", "arange", "zeros", "ones", "full", "empty", "scalar_tensor", "randn", "rand")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        made = name in self.FACTORIES and (kwargs or {}).get("device") is None
        if made or name == "equal" or _reads_values(func, args):
            where = _caller()
            if where.startswith("pyro_amortized"):
                self.found[name, where] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost module that is neither torch's nor of this file's mode."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("torch"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextmanager
def counting() -> Iterator[Counter[tuple[str, str]]]:
    with Reads() as reads:
        yield reads.found


def arguments(name: str, device: str) -> tuple[Tensor, ...]:
    return tuple(value.to(device) for value in ((X, GROUP) if name.startswith("groups") else (X,)))


def trained(name: str, device: str, num_steps: int = 3) -> tuple[Any, Any, SVI]:
    program, guide = GUIDES[name](device)
    elbo: Any = TraceEnum_ELBO(max_plate_nesting=1) if name == "discrete" else Trace_ELBO()
    svi = SVI(program, guide, pyro.optim.Adagrad({"lr": 0.01}), elbo)
    for _ in range(num_steps):
        svi.step(*arguments(name, device))
    return program, guide, svi


# What a step reads


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("name", GUIDES)
def test_a_step_reads_a_value_where_a_graph_is_checked_alone(name: str, device: str) -> None:
    with pyro.validation_enabled(False):
        svi = trained(name, device)[2]
        with counting() as found:
            svi.step(*arguments(name, device))
    expected = READS.get(name, 0) + (UNLESS_CUDA.get(name, 0) if device != "cuda" else 0)
    assert sum(found.values()) == expected, found


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_reads_are_counted(device: str) -> None:
    with counting() as found:
        Codebook(4, 3).to(device).initialize(X.to(device))
    assert any(name == "_local_scalar_dense" for name, _ in found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in GUIDES if name not in READS])
def test_cuda_waits_for_pyro_alone(name: str) -> None:
    """The look from the other side: what CUDA itself calls a synchronisation, of a call of the guide."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    with pyro.validation_enabled(False):
        guide, args = trained(name, "cuda")[1], arguments(name, "cuda")
        guide(*args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            guide(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# The ways of an accelerator are right, as the CPU can tell


@pytest.mark.parametrize("name", ["normal", "distilled", "semi-amortized"])
def test_an_accelerator_trains_as_the_cpu_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for waits in (False, True):
        for module in WAITING:
            monkeypatch.setattr(f"pyro_amortized.{module}.has_to_wait", lambda value, waits=waits: waits)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = trained(name, "cpu")[2]
        losses.append([svi.step(X) for _ in range(3)])
    assert np.allclose(*losses, rtol=1e-5)


def test_far_features_go_on_as_a_logarithm() -> None:
    head = Head(torch.ones(1, 4), 2)
    near, far = torch.ones(2, 4, requires_grad=True), torch.full((1, 4), 10 * FAR)
    output = head(torch.cat([near, far]))
    plain = torch.nn.functional.linear(near, head.weight / head.size, head.bias)
    assert torch.allclose(output[:2], plain)
    (gradient,) = torch.autograd.grad(output[:2].sum(), near)
    assert torch.allclose(gradient, head.weight.sum(0) / head.size)
    assert (output[2] - head.bias).norm() < (FAR + 5.0) * (plain[0] - head.bias).norm()


def test_damping_without_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(50, 4, 4, dtype=torch.float64)
    matrices = matrices + matrices.mT + 2 * torch.rand(50, 1, 1, dtype=torch.float64) * torch.eye(4)
    matrices = torch.cat([matrices, 3.0 * torch.eye(4, dtype=torch.float64).unsqueeze(0)])
    exact = newton.damping(matrices)
    assert 0 < (exact > 0).sum() < len(exact)
    monkeypatch.setattr(newton, "has_to_wait", lambda value: True)
    found = newton.damping(matrices)
    excess = (found - exact) / torch.linalg.matrix_norm(matrices)
    assert excess.min() > -1e-6
    assert excess.max() < 2 / 256
    assert found[-1] == 0.0
    matrices[0] = torch.nan
    assert newton.damping(matrices)[0] == 0.0


class Diverged(nn.Module):
    """An encoder all of whose features are infinite from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight + (torch.inf if self.calls > 1 else 0.0)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.usefixtures("as_on_an_accelerator")
def test_divergence_is_seen_in_the_loss_or_in_an_error() -> None:
    guide = AmortizedGuide(model, Diverged())
    guide.setup(X)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    with pyro.validation_enabled(False):
        assert not np.isfinite(svi.step(X))
        with pytest.raises(ValueError, match="not finite"), torch.no_grad():
            guide(X)
    with pytest.raises(ValueError, match="not finite"):
        svi.step(X)


# Every guide and diagnostic


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n != "normal" else ()) for n in GUIDES])
def test_every_guide_trains_and_answers(name: str, device: str) -> None:
    program, guide, svi = trained(name, device)
    args = arguments(name, device)
    assert np.isfinite(svi.evaluate_loss(*args))
    assert {value.device.type for value in guide.state_dict().values() if isinstance(value, Tensor)} == {device}
    assert {value.device.type for value in guide(*args).values()} == {device}
    assert {value.device.type for value in guide.median(*args).values()} == {device}
    if name not in ("discrete", "vector quantized"):
        summary = posterior_summary(program, guide, args, num_samples=2)
        assert all(np.isfinite(value).all() for value in summary.data_vars.values())


@pytest.mark.parametrize("name", ["normal", pytest.param("multivariate_normal", marks=pytest.mark.slow)])
def test_refinement_reaches_the_posterior(name: str, device: str) -> None:
    """By traced graphs, from an encoder that has not learned much."""
    guide, x = trained(name, device)[1], X.to(device)
    median = guide.refined(10).median(x)["z"]
    assert torch.allclose(median, x / 2, atol=0.02)


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiler")
def test_compiled_refinement() -> None:
    """On the CPU, the tests of graphs compile."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    guide, x = trained("normal", "cuda")[1], X.cuda()
    assert torch.allclose(guide.refined(10, compile=True).median(x)["z"], x / 2, atol=0.02)


class Exact(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / 2, torch.full_like(x, 0.5**0.5)


def evidence(x: Tensor) -> np.ndarray[Any, Any]:
    return dist.Normal(0.0, 2**0.5).log_prob(x.cpu()).sum(-1).numpy()


FAST: Any = {"tolerance": 0.1, "max_samples": 1000}


def check_gaps(guide: Any, x: Tensor) -> None:
    gaps = estimate_gaps(model, guide, (x,), **FAST).dataset
    assert np.abs(gaps["log_evidence"] - evidence(x)).max() < 0.01
    assert np.abs(gaps["inference_gap"]).max() < 0.05


def check_optimum(guide: Any, x: Tensor) -> None:
    elbo = optimize_local(model, guide, (x,), tolerance=0.05).elbo
    assert np.abs(elbo.cpu().numpy() - evidence(x)).max() < 0.02


def check_bounds(guide: Any, x: Tensor) -> None:
    bounds = evidence_bounds(model, guide, (x,), num_simulations=20)
    assert all(np.isfinite(value).all() for value in bounds.data_vars.values() if value.dtype.kind == "f")


def check_calibration(guide: Any, x: Tensor) -> None:
    assert calibrate(model, guide, (x,), num_simulations=60).dataset["rank"].notnull().all()


def check_export(guide: Any, x: Tensor) -> None:
    loader: Any = DataLoader(x, batch_size=8)  # type: ignore[arg-type]
    data = to_arviz(model, guide, loader, num_samples=200, resample=True)
    assert np.abs(data["sample_stats"]["log_weight"] - evidence(x)).max() < 1e-3
    assert np.abs(data["posterior"]["z"].mean(("chain", "draw")) - x.cpu().numpy() / 2).max() < 0.3


def check_certificates(guide: Any, x: Tensor) -> None:
    """The encoder's answers, and those of every later stage, from an encoder that has learned nothing."""
    certified = certified_posterior(model, guide, (x,), num_samples=1000).dataset
    assert certified["certified"].all()
    untrained = AmortizedGuide(model)
    untrained(x)
    later = certified_posterior(model, untrained, (x,), num_samples=1000)
    assert np.abs(later.posterior["z"].mean("draw") - x.cpu().numpy() / 2).max() < 0.2


def check_typicality(guide: Any, x: Tensor) -> None:
    reference = 2**0.5 * torch.randn(400, 3, device=x.device)
    assert typicality(model, guide, (reference[:200],), reference_args=(reference[200:],)).typical


def check_prediction_of_gaps(guide: Any, x: Tensor) -> None:
    reference = (x.repeat(5, 1) + torch.randn(60, 3, device=x.device),)
    predicted = predict_gap(model, guide, (x,), reference_args=reference, tolerance=0.1)
    assert np.isfinite(predicted["amortization_gap"]).all()


def check_psis(guide: Any, x: Tensor) -> None:
    weights, khat = psis(torch.randn(100, 4, device=x.device))
    assert weights.device == khat.device == x.device


DIAGNOSTICS: dict[str, Callable[[Any, Tensor], Any]] = {
    "estimate_gaps": check_gaps,
    "compare_gaps": lambda guide, x: compare_gaps(model, [guide, guide.refined(1)], (x,), **FAST),
    "log_evidence": lambda guide, x: np.testing.assert_allclose(
        log_evidence(model, guide, (x,), **FAST)["log_evidence"], evidence(x), atol=0.01
    ),
    "evidence_bounds": check_bounds,
    "optimize_local": check_optimum,
    "collapse_report": lambda guide, x: str(collapse_report(model, guide, (x,), num_samples=20)),
    "calibrate": check_calibration,
    "simulate": lambda guide, x: simulate(model, guide, (x,)),
    "to_arviz": check_export,
    "certified_posterior": check_certificates,
    "typicality": check_typicality,
    "predict_gap": check_prediction_of_gaps,
    "psis": check_psis,
}
FAST_ONES = {"log_evidence", "to_arviz", "psis", "simulate"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST_ONES else pytest.mark.slow) for n in DIAGNOSTICS]
)
def test_every_diagnostic(name: str, device: str) -> None:
    guide, x = AmortizedGuide(model, Exact()), X.to(device)
    guide(x)
    DIAGNOSTICS[name](guide, x)


@pytest.mark.parametrize(
    "family", ["multivariate_normal", "low_rank_multivariate_normal", "flow", "mixture", "structured"]
)
def test_every_family(family: str, accelerator: str) -> None:
    guide, x = AmortizedGuide(model, family=family), X.to(accelerator)
    guide(x)
    gaps = estimate_gaps(model, guide, (x,), **FAST).dataset
    assert np.abs(gaps["log_evidence"] - evidence(x)).max() < 0.02
    certified = certified_posterior(model, guide, (x,), num_samples=500)
    assert np.abs(certified.posterior["z"].mean("draw") - x.cpu().numpy() / 2).max() < 0.3


@pytest.mark.filterwarnings("ignore:The log-likelihoods are not at draws from the posterior")
def test_marginal_likelihoods(accelerator: str) -> None:
    guide, x = AmortizedGuide(with_globals), X.to(accelerator)
    guide(x)
    data = to_arviz(with_globals, guide, (x,), num_samples=10, log_likelihood="marginal")
    assert data["log_likelihood"]["x"].notnull().all()


@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide])
def test_subsamples_drawn_by_pyro(Guide: Any, accelerator: str) -> None:
    """Their indices are on the CPU."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index])

    svi = SVI(program, Guide(program), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(np.isfinite(svi.step(X.to(accelerator))) for _ in range(3))


def regression(x: Tensor, y: Tensor) -> None:
    noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("observations", len(x)):
        pyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def test_whole_data_sets(accelerator: str) -> None:
    program = over_datasets(regression)
    x = torch.randn(20, 15, device=accelerator)
    data = x, 2.0 * x + torch.randn(20, 15, device=accelerator)
    encoder = SetEncoder(2).to(accelerator)
    guide = AmortizedGuide(program, encoder, encoder_input=lambda x, y: torch.stack([x, y], -1))
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(np.isfinite(svi.step(*data)) for _ in range(3))
    assert np.isfinite(estimate_gaps(program, guide, data, **FAST).dataset["log_evidence"]).all()


# Training and serving


def exported(guide: Any, x: Tensor, path: Path) -> None:
    program = guide.exported(x)
    parameters = guide.variational_parameters(x)
    torch.testing.assert_close(program.module()(x), parameters, rtol=1e-5, atol=1e-6)


def saved(guide: Any, x: Tensor, path: Path) -> None:
    optimizer = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    svi.step(x)
    save_checkpoint(path / "checkpoint.pt", guide=guide, optimizer=optimizer)
    losses = [svi.step(x) for _ in range(3)]
    load_checkpoint(path / "checkpoint.pt", guide=guide, optimizer=optimizer)
    assert [svi.step(x) for _ in range(3)] == losses


def by_objective(objective: Callable[[], Any]) -> Callable[[Any, Tensor, Path], None]:
    def check(guide: Any, x: Tensor, path: Path) -> None:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective())
        assert all(np.isfinite(svi.step(x)) for _ in range(3))

    return check


def annealed(guide: Any, x: Tensor, path: Path) -> None:
    annealing = KLAnnealing(model, guide, linear_schedule(5))
    svi = SVI(annealing.model, annealing.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert np.isfinite(svi.step(x))


USES: dict[str, Callable[[Any, Tensor, Path], None]] = {
    "exported": exported,
    "saved": saved,
    "IWELBO": by_objective(lambda: IWELBO(num_particles=5)),
    "FreeBitsELBO": by_objective(lambda: FreeBitsELBO(0.1)),
    "annealed": annealed,
}


@pytest.mark.parametrize("name", USES)
def test_every_use(name: str, device: str, tmp_path: Path) -> None:
    guide, x = trained("normal", device)[1], X.to(device)
    USES[name](guide, x, tmp_path)
