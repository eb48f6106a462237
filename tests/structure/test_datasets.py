"""A model of one data set as a model of many."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    DeepSetEncoder,
    PlateEncoder,
    SemiAmortizedGuide,
    SetEncoder,
    calibrate,
    estimate_gaps,
    over_datasets,
    simulate,
)
from pyro_amortized.structure.datasets import _Stack

pytestmark = pytest.mark.usefixtures("_float64")

NET = nn.Linear(1, 1).double()


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def random_effects(y: Tensor) -> None:
    """Plates with latents, a mask, a scale, a factor, a deterministic site, a transform and a parameter."""
    shift = pyro.param("shift", torch.tensor(0.3))
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("group", y.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(shift, s))
        pyro.deterministic("twice", 2 * a)
        with pyro.plate("entry", y.shape[1], dim=-1), poutine.scale(scale=0.5), poutine.mask(mask=y > -1.0):
            pyro.sample("y", dist.StudentT(4.0, a, 1.0), obs=y)
    pyro.factor("penalty", -a.square().sum())


def correlated(y: Tensor) -> None:
    tril = torch.linalg.cholesky(torch.eye(3) + 0.5)
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("obs", len(y)):
        base = dist.Normal(z.sum(), 1.0)
        pushed = dist.TransformedDistribution(base, [dist.transforms.AffineTransform(p[0], 1.0 + p[1])])
        pyro.sample("y", pushed.mask(y > -2.0), obs=y)


def looks(y: Tensor) -> None:
    """A model that asks for numbers, which ``torch.vmap`` cannot give."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0 if float(y.sum()) > -1e9 else 2.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def network(y: Tensor) -> None:
    pyro.module("net", NET)
    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(NET(z), 1.0), obs=y)


MODELS: list[tuple[Any, Any, bool]] = [
    (regression, lambda b: (torch.randn(b, 5, 2), torch.randn(b, 5)), True),
    (random_effects, lambda b: (torch.randn(b, 3, 4),), True),
    (correlated, lambda b: (torch.randn(b, 6),), True),
    (looks, lambda b: (torch.randn(b, 4),), False),
    (network, lambda b: (torch.randn(b, 4),), True),
]


@pytest.mark.parametrize(("model", "data", "together"), MODELS)
def test_log_probabilities_are_those_of_each_data_set(model: Any, data: Any, together: bool) -> None:
    args = data(3)
    assert _Stack(model, args, {}, {}).find_way()[1] == together
    trace = poutine.trace(over_datasets(model)).get_trace(*args)
    trace.compute_log_prob()
    for b in range(3):
        latents = {name: trace.nodes[name]["value"][b] for name in trace.stochastic_nodes if name in ALL_LATENTS}
        one = poutine.trace(poutine.condition(model, {n: v.reshape(SHAPES[n]) for n, v in latents.items()}))
        own = one.get_trace(*(x[b] for x in args))
        own.compute_log_prob()
        for name in own.observation_nodes + [*latents]:
            if "log_prob" in own.nodes[name] and name in trace.nodes:
                expected = own.nodes[name]["log_prob_sum"]
                assert trace.nodes[name]["log_prob"][b].sum().item() == pytest.approx(expected.item(), abs=1e-10)


SHAPES = {"w": (2,), "scale": (), "s": (), "a": (3, 1), "z": (-1,), "p": (3,)}
ALL_LATENTS = {*SHAPES}
SHAPES_OF_LOOKS = {"z": ()}


def test_gradients_reach_the_models_parameters() -> None:
    pyro.clear_param_store()
    model = over_datasets(network)
    guide = AmortizedGuide(model, DeepSetEncoder(1))
    before = NET.weight.detach().clone()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(torch.randn(4, 6))
    assert not torch.equal(before, NET.weight)


def mean_of(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Exact(nn.Module):
    """The exact posterior of a mean, for data sets of any size."""

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.full((len(y), 1), 1.0 + y.shape[1])
        return y.sum(1, keepdim=True) / precision, precision**-0.5


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_exact_posterior_has_the_evidence_for_every_size(elbo: Any) -> None:
    model = over_datasets(mean_of)
    guide = AmortizedGuide(model, Exact(), encoder_input="y")
    for size, number in ((3, 5), (2, 9), (4, 1)):
        y = torch.randn(size, number)
        covariance = torch.ones(number, number) + torch.eye(number)
        expected = dist.MultivariateNormal(torch.zeros(number), covariance).log_prob(y).sum()
        found = -elbo().loss(model, guide, y)
        if elbo is Trace_ELBO:
            assert found == pytest.approx(expected.item(), abs=1e-9)
    gaps = estimate_gaps(model, guide, (y,)).dataset
    assert abs(gaps["amortization_gap"].values).max() < 1e-3


@pytest.mark.parametrize(
    "make",
    [lambda: SetEncoder(3), lambda: SetEncoder(3, attention=False), lambda: DeepSetEncoder(3), lambda: PlateEncoder()],
)
def test_guides_of_data_sets_of_any_size(make: Any) -> None:
    encoder = make()
    spec: Any = {"obs": ["x", "y"]}
    if not isinstance(encoder, PlateEncoder):
        spec = lambda x, y: torch.cat([x, y.unsqueeze(-1)], -1)  # noqa: E731
    model = over_datasets(regression)
    guide = AmortizedGuide(model, encoder, encoder_input=spec, family="multivariate_normal")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for size in (5, 8, 3):
        assert math.isfinite(svi.step(torch.randn(4, size, 2), torch.randn(4, size)))
    x, y = torch.randn(3, 6, 2), torch.randn(3, 6)
    order = torch.randperm(6)
    one, other = guide.median(x, y), guide.median(x[:, order], y[:, order])
    assert all((one[name] - other[name]).abs().max() < 1e-8 for name in one)


def test_refined_predicted_simulated_and_calibrated() -> None:
    model = over_datasets(regression)
    spec = lambda x, y: torch.cat([x, y.unsqueeze(-1)], -1)  # noqa: E731
    guide = SemiAmortizedGuide(model, DeepSetEncoder(3), encoder_input=spec, num_steps=2)
    x, y = torch.randn(6, 10, 2), torch.randn(6, 10)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(x, y))
    assert Predictive(model, guide=guide, num_samples=3)(x, y)["w"].shape == (3, 6, 1, 2)
    simulation = simulate(model, guide, (x, y), num_datapoints=20)
    assert simulation.args[1].shape == (20, 10)
    loss = -guide.posterior(*simulation.args).log_prob(simulation.latents).mean()  # forward KL, by simulations
    assert loss.requires_grad
    assert calibrate(model, guide, (x, y), num_simulations=20, num_samples=19).dataset is not None
    with pytest.raises(ValueError, match="several draws .* try vectorize_particles=False"):
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2).loss(model, guide, x, y)
    assert math.isfinite(Trace_ELBO(num_particles=3, vectorize_particles=False).loss(model, guide, x, y))


def depends(y: Tensor) -> None:
    if y[0] > 0:
        pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("w", dist.Normal(0.0, 1.0))


def subsampled(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("obs", 10, subsample_size=3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def enumerated(y: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(k.to(y.dtype), 1.0).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "args", "match"),
    [
        (depends, (torch.tensor([[1.0], [-1.0]]),), "sites are not the same.*do not depend on the data"),
        (subsampled, (torch.zeros(2, 3),), "plate 'obs' of site 'y' is subsampled"),
        (enumerated, (torch.zeros(2, 3),), "latent 'k' is enumerated"),
        (regression, (torch.zeros(2, 3, 2), torch.zeros(3)), "no common leading dimension"),
        (mean_of, (3,), "no common leading dimension"),
    ],
)
def test_what_cannot_be_stacked_is_refused(model: Any, args: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        over_datasets(model)(*args)


def test_set_encoder_of_masked_and_empty_sets() -> None:
    encoder = SetEncoder(2)
    x, mask = torch.randn(3, 5, 2), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    encoder.fit(x, mask)
    found = encoder(x, mask)
    assert found.isfinite().all()
    assert (found - encoder(x.masked_fill(~mask.unsqueeze(-1), 9.0), mask)).abs().max() == 0
    assert (found[0] - encoder(x[:1, :2])[0]).abs().max() < 1e-9
    with pytest.raises(ValueError, match=r"64 features among 7 heads.*try hidden_dims=\(63,\)"):
        SetEncoder(2, num_heads=7)
    with pytest.raises(ValueError, match="second input of SetEncoder"):
        encoder(x, torch.full((3, 5), 2.0))
