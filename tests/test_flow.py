"""Flows of every kind of transform; the laws of all families are in test_families."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_amortized import AmortizedGuide, estimate_gaps
from pyro_amortized.families import Flow, Normal

KINDS = ["affine_autoregressive", "spline_autoregressive", "affine_coupling", "planar"]
CASES = [(kind, dim) for kind in KINDS for dim in (1, 2, 5) if (kind, dim) != ("affine_coupling", 1)]


def make(kind: str, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Flow, Tensor]:
    """A flow away from the identity, and phi of shape (3, P)."""
    torch.manual_seed(0)
    flow = Flow(dim, kind).to(dtype).requires_grad_(False)
    for parameter in flow.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return flow, 0.5 * torch.randn(3, flow.num_params, dtype=dtype)


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_draws_come_with_their_log_density(kind: str, dim: int) -> None:
    flow, phi = make(kind, dim)
    noise = torch.randn(2, 3, dim, dtype=phi.dtype)
    z, log_q = flow.sample_and_log_prob(phi, noise)
    for k in range(2):
        for n in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda e, n=n: flow.rsample(phi[n : n + 1], e.reshape(1, 1, -1)).flatten(), noise[k, n]
            )
            expected = dist.Normal(0.0, 1.0).log_prob(noise[k, n]).sum() - torch.linalg.slogdet(jacobian).logabsdet
            assert log_q[k, n] == pytest.approx(expected.item(), abs=1e-8)
    if kind != "planar":
        torch.testing.assert_close(flow(phi).log_prob(z), log_q, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("kind", "dim"), [case for case in CASES if case[0] != "planar"])
def test_new_flows_are_close_to_the_normal_at_their_location_and_scale(kind: str, dim: int) -> None:
    flow = Flow(dim, kind).double()
    loc = torch.randn(3, dim, dtype=torch.float64)
    noise = torch.randn(500, 3, dim, dtype=torch.float64)
    difference = flow.rsample(flow.initial(loc, 0.5), noise) - (loc + 0.5 * noise)
    assert difference.abs().mean() < (0.15 if kind == "spline_autoregressive" or dim == 1 else 0.05)


def test_a_datapoint_does_not_depend_on_the_others() -> None:
    flow, phi = make("affine_autoregressive", 4)
    noise = torch.randn(2, 3, 4, dtype=phi.dtype)
    torch.testing.assert_close(flow.rsample(phi, noise)[:, 1:2], flow.rsample(phi[1:2], noise[:, 1:2]))


def test_double_phi_through_networks_of_single_precision() -> None:
    flow, phi = make("spline_autoregressive", 2, torch.float32)
    z = flow.rsample(phi.double(), torch.randn(2, 3, 2, dtype=torch.float64))
    assert z.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"transform": "glow"}, "no transform has that name; try one of"),
        ({"transform": "affine_coupling"}, "there is nothing to couple"),
        ({"num_transforms": 0}, "both must be positive"),
        ({"context_dim": 0}, "both must be positive"),
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


def trained(family: object, x: Tensor, num_steps: int) -> AmortizedGuide:
    guide = AmortizedGuide(banana, family=family, name=str(family))
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(banana, guide, optimizer, Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(num_steps):
        svi.step(x[torch.randint(len(x), (100,))])
    return guide.eval()


@pytest.mark.slow
def test_a_flow_bends_where_normals_cannot() -> None:
    z = torch.randn(300, 2)
    x = 0.5 * z[:, 0] ** 2 + z[:, 1] + 0.3 * torch.randn(300)
    gaps = {
        name: estimate_gaps(banana, trained(family, x, 1000), (x[:20],)).dataset
        for name, family in {"normal": Normal, "flow": lambda dim: Flow(dim, "spline_autoregressive")}.items()
    }
    means = {name: data["approximation_gap"].where(data["reliable"]).mean().item() for name, data in gaps.items()}
    assert means["flow"] < 0.1 * means["normal"]
    axis = torch.linspace(-6, 6, 601)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
    log_joint = log_joint + dist.Normal(0.5 * grid[..., 0] ** 2 + grid[..., 1], 0.3).log_prob(x[:20])
    exact = log_joint.logsumexp(0) + 2 * math.log(0.02)
    good = gaps["flow"]["reliable"].values
    assert abs(gaps["flow"]["log_evidence"].values - exact.numpy())[good].max() < 0.05
