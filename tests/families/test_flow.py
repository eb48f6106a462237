"""Flows of every kind of transform; the laws of all families are in test_family_laws."""

import importlib
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_amortized import AmortizedGuide, estimate_gaps
from pyro_amortized.families import Flow, MultivariateNormal, Normal

KINDS = ["affine_autoregressive", "spline_autoregressive", "affine_coupling", "planar"]
CASES = [(kind, dim) for kind in KINDS for dim in (1, 2, 5) if (kind, dim) != ("affine_coupling", 1)]


def make(kind: str, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Flow, Tensor]:
    """A flow away from the identity, and phi of shape (3, P)."""
    torch.manual_seed(0)
    flow = Flow(dim, kind).to(dtype).requires_grad_(False)
    for parameter in flow.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return flow, 0.5 * torch.randn(3, flow.num_params, dtype=dtype)


@pytest.mark.parametrize(("kind", "dim"), [case for case in CASES if case[0] != "planar"])
def test_new_flows_are_close_to_the_normal_at_their_location_and_scale(kind: str, dim: int) -> None:
    flow = Flow(dim, kind).double()
    loc = torch.randn(3, dim, dtype=torch.float64)
    noise = torch.randn(500, 3, dim, dtype=torch.float64)
    difference = flow.rsample(flow.initial(loc, 0.5), noise) - (loc + 0.5 * noise)
    assert difference.abs().mean() < (0.15 if kind == "spline_autoregressive" or dim == 1 else 0.05)


@pytest.mark.parametrize("kind", ["affine_autoregressive", "affine_coupling"])
@pytest.mark.parametrize(("covariance", "normal"), [("full", MultivariateNormal), ("diagonal", Normal)])
def test_flows_hold_every_normal_whatever_their_networks_learned(kind: str, covariance: str, normal: type) -> None:
    torch.manual_seed(0)
    flow = Flow(4, kind, covariance=covariance).double().requires_grad_(False)
    for parameter in flow.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    family = normal(4)
    phi = torch.randn(3, family.num_params, dtype=torch.float64)
    context = torch.randn(3, flow.context_dim, dtype=torch.float64)
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    context[:, 0] = 0.0
    open_gate = flow(torch.cat([phi, context], -1)).log_prob(z)
    context[:, 0] = -1.0
    torch.testing.assert_close(flow(torch.cat([phi, context], -1)).log_prob(z), family(phi).log_prob(z))
    assert (open_gate - family(phi).log_prob(z)).abs().max() > 0.1
    precision = torch.linalg.inv(torch.cov(torch.randn(4, 50, dtype=torch.float64))).expand(3, 4, 4)
    loc = phi[:, :4]
    laplace = family(family.laplace(loc, precision)).log_prob(z)
    torch.testing.assert_close(flow(flow.laplace(loc, precision)).log_prob(z), laplace)


def test_double_phi_through_networks_of_single_precision() -> None:
    flow, phi = make("spline_autoregressive", 2, torch.float32)
    z = flow.rsample(phi.double(), torch.randn(2, 3, 2, dtype=torch.float64))
    assert z.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"transform": "glow"}, "no transform has that name; try one of"),
        ({"transform": "affine_coupling"}, "there is nothing to couple"),
        ({"covariance": "low rank"}, "there is none of that name; try one of"),
        ({"num_transforms": 0}, "num_transforms=0 because it must be an integer of at least 1"),
        ({"context_dim": 0}, "context_dim=0 because it must be an integer of at least 1"),
    ],
)
def test_flows_that_cannot_be_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Flow(1, **options)


def test_planar_flows_say_that_other_points_have_no_density() -> None:
    flow, phi = make("planar", 2)
    with pytest.raises(NotImplementedError, match="planar transforms have no inverse"):
        flow(phi).log_prob(torch.zeros(3, 2, dtype=phi.dtype))


def banana(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(0.5 * z[..., 0] ** 2 + z[..., 1], 0.3), obs=x)


def correlated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] + z[..., 1], 0.3), obs=x)


def trained(model: Callable[..., None], family: object, x: Tensor, num_steps: int) -> AmortizedGuide:
    pyro.clear_param_store()
    guide = AmortizedGuide(model, family=family)
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(num_steps):
        svi.step(x[torch.randint(len(x), (100,))])
    return guide.eval()


def grid_evidence(model: Callable[..., None], x: Tensor) -> Tensor:
    """By quadrature, ``(N,)``."""
    axis = torch.linspace(-6, 6, 601)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    loc = grid[..., 0] + grid[..., 1] if model is correlated else 0.5 * grid[..., 0] ** 2 + grid[..., 1]
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1) + dist.Normal(loc, 0.3).log_prob(x)
    return log_joint.logsumexp(0) + 2 * math.log(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("model", [banana])
def test_a_flow_bends_where_normals_cannot(model: Callable[..., None]) -> None:
    z = torch.randn(300, 2)
    x = (0.5 * z[:, 0] ** 2 if model is banana else z[:, 0]) + z[:, 1] + 0.3 * torch.randn(300)
    gaps = {
        name: estimate_gaps(model, trained(model, family, x, 500), (x[:8],)).dataset
        for name, family in {"normal": Normal, "flow": lambda dim: Flow(dim, "spline_autoregressive")}.items()
    }
    means = {name: data["approximation_gap"].where(data["reliable"]).mean().item() for name, data in gaps.items()}
    assert means["flow"] < 0.1 * means["normal"]
    good = gaps["flow"]["reliable"].values
    exact = grid_evidence(model, x[:8]).numpy()
    assert abs(gaps["flow"]["log_evidence"].values - exact)[good].max() < 0.05


# Flows of zuko

ZUKO = importlib.util.find_spec("zuko") is not None  # to import it here would switch torch's validation off
needs_zuko = pytest.mark.skipif(not ZUKO, reason="zuko is not installed")


@needs_zuko
@pytest.mark.parametrize("transform", ["zuko.NSF", "zuko.MAF", "zuko.NICE", "own", "lazy"])
def test_zuko_flows(transform: str) -> None:
    def own(dim: int, context_dim: int) -> Any:
        flow = importlib.import_module("zuko.flows").MAF(dim, context_dim, transforms=2, hidden_features=[16])
        return flow.transform if transform == "lazy" else flow

    flow = Flow(3, own if transform in ("own", "lazy") else transform, 2).double()
    phi, noise = torch.randn(4, flow.num_params, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    z, log_q = flow.sample_and_log_prob(phi, noise)
    torch.testing.assert_close(flow(phi).log_prob(z), log_q)


@needs_zuko
def test_zuko_flows_train_with_validation_on() -> None:
    guide = AmortizedGuide(banana, family=lambda dim: Flow(dim, "zuko.NSF"))
    assert torch.distributions.Distribution._validate_args
    svi = SVI(banana, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    x = torch.randn(20)
    losses = [svi.step(x) for _ in range(60)]
    assert torch.distributions.Distribution._validate_args
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.slow
@needs_zuko
def test_importing_zuko_by_name_leaves_validation_on() -> None:
    code = (
        "import torch; from pyro_amortized.families import Flow; Flow(2, 'zuko.MAF'); "
        "print(torch.distributions.Distribution._validate_args)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


@needs_zuko
def test_zuko_flows_that_there_are_not() -> None:
    with pytest.raises(ValueError, match='"zuko.ABC" because zuko has no such flow; try "zuko.NSF"'):
        Flow(2, "zuko.ABC")


def test_zuko_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ValueError, match="zuko is not installed; try pip install zuko"):
        Flow(2, "zuko.NSF")


def test_functions_that_give_no_transform_are_refused() -> None:
    with pytest.raises(ValueError, match="Cannot build a flow of 3 because it takes no context"):
        Flow(2, lambda dim, context_dim: 3)


def test_flows_of_simplexes_are_steady_from_the_first_steps() -> None:
    """Without a limit on the scales four of these eight runs diverge, and in the others losses rise by up to 70 %."""
    counts = torch.poisson(torch.ones(200, 30), generator=torch.Generator().manual_seed(0))

    def topics(x: Tensor) -> None:
        beta = pyro.param("beta", lambda: torch.randn(4, 30))
        with pyro.plate("documents", len(x)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(4)))
            pyro.sample("x", dist.Multinomial(1, probs=theta @ beta.softmax(-1), validate_args=False), obs=x)

    for seed in range(8):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svi = SVI(topics, AmortizedGuide(topics, family="flow"), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step(counts) for _ in range(10)]
        assert max(losses) < 1.4 * losses[0]
