"""Reports of posterior collapse against closed forms and quadrature."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    IterativeAmortizedGuide,
    LowRankMultivariateNormal,
    PerDatapointGuide,
    SemiAmortizedGuide,
)
from pyro_amortized.diagnostics.collapse.collapse import CollapseReport, collapse_report
from pyro_amortized.families.base import VariationalFamily

matplotlib.use("Agg")


class Linear(nn.Module):
    """An encoder whose answer is ``x @ weights`` with fixed scales."""

    def __init__(self, weights: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weights, self.scale = weights, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc = x.reshape(len(x), -1) @ self.weights
        return loc, self.scale.expand_as(loc)


WEIGHTS = torch.tensor([[0.9, 0.0, 0.02], [0.3, 0.0, 0.01]], dtype=torch.float64)
SCALE = torch.tensor([0.4, 1.0, 1.5], dtype=torch.float64)


def independent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :2], 1.0).to_event(1), obs=x)


def make_data(size: int = 60) -> Tensor:
    return torch.randn(size, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def kl_normal(loc: Tensor, scale: Tensor | float) -> Tensor:
    """KL of normals from the standard normal."""
    scale = torch.as_tensor(scale, dtype=loc.dtype)
    return 0.5 * (loc.square() + scale.square() - 1) - scale.log()


def close(actual: Any, expected: Any, **tolerances: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **{"rtol": 1e-6, "atol": 1e-9, **tolerances})


def set_phi(guide: AmortizedGuide, phi: Tensor, *args: Any) -> AmortizedGuide:
    """Makes the encoder answer with the same phi for all datapoints."""
    guide.setup(*args)
    head = guide.inference.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(phi)
    return guide


def with_normal(model: Callable[..., None], loc: list[float], scale: list[float], x: Tensor) -> AmortizedGuide:
    """A mean-field guide with the same q for all datapoints."""
    phi = torch.cat([torch.tensor(loc, dtype=x.dtype), torch.tensor(scale, dtype=x.dtype).log()])
    return set_phi(AmortizedGuide(model), phi, x)


pytestmark = pytest.mark.usefixtures("_float64")


# Against closed forms


def test_normal_family_and_prior_have_no_error() -> None:
    x = make_data()
    report = collapse_report(independent, AmortizedGuide(independent, Linear(WEIGHTS, SCALE)), (x,))
    loc = x @ WEIGHTS
    kl = kl_normal(loc, SCALE)
    close(report.dataset["kl"], kl.mean(0))
    close(report.dataset["kl_se"], 0.0)
    close(report.dataset["posterior_mean_variance"], loc.var(0))
    close(report.dataset.attrs["total_kl"], kl.sum(-1).mean())
    assert list(report.dataset["latent"].values) == ["z[0]", "z[1]", "z[2]"]
    assert report.dataset["active"].values.tolist() == [True, False, False]
    assert report.dataset["collapsed"].values.tolist() == [False, True, False]
    assert report.active_units == report.dataset.attrs["active_units"] == 1
    assert report.num_datapoints == 60
    below = (kl[..., None] < torch.tensor(report.dataset["epsilon"].values)).double().mean(0)
    close(report.dataset["share_below"], below)
    close(report.collapse_curve(), (below >= 0.99).double().mean(0))


def test_delta_allows_exceptions() -> None:
    x = make_data(50) * 0.01
    x[7] = 30.0
    guide = AmortizedGuide(independent, Linear(WEIGHTS, torch.ones(3)))
    strict, lax = (collapse_report(independent, guide, (x,), delta=delta) for delta in (0.01, 0.02))
    assert strict.dataset["collapsed"].values.tolist() == [False, True, False]
    assert lax.dataset["collapsed"].values.all()


@pytest.mark.slow
def test_mutual_information_and_elbo_surgery() -> None:
    x = make_data(40)
    report = collapse_report(independent, AmortizedGuide(independent, Linear(WEIGHTS, SCALE)), (x,))
    loc = x @ WEIGHTS
    aggregate = dist.MixtureSameFamily(dist.Categorical(torch.ones(40)), dist.Normal(loc, SCALE).to_event(1))
    z = aggregate.sample((200_000,))
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    ratio = aggregate.log_prob(z) - log_p
    entropy = dist.Normal(loc, SCALE).to_event(1).entropy().mean()
    information = -aggregate.log_prob(z).mean() - entropy
    assert abs(report.mutual_information - information) < 4 * report.dataset.attrs["mutual_information_se"] + 0.01
    error = math.hypot(report.dataset.attrs["aggregate_kl_se"], float(ratio.std()) / len(z) ** 0.5)
    assert abs(report.dataset.attrs["aggregate_kl"] - ratio.mean()) < 4 * error
    assert error < 0.02


def test_mutual_information_does_not_exceed_its_bound() -> None:
    x = make_data(20)
    guide = AmortizedGuide(independent, Linear(1e3 * WEIGHTS, 1e-3 * SCALE))
    report = collapse_report(independent, guide, (x,))
    assert report.mutual_information == pytest.approx(math.log(20), abs=1e-3)
    assert "close to its bound" in str(report)
    assert "close to its bound" not in str(
        collapse_report(independent, with_normal(independent, [0] * 3, [1] * 3, x), (x,))
    )


def test_multivariate_normal() -> None:
    model = LinearGaussian.random_weights()
    x = model.simulate(50)
    guide = AmortizedGuide(model.full, nn.Identity(), family="multivariate_normal")
    guide.setup(x)
    exact = model.posterior(x)
    scale = exact.scale_tril[0].diagonal()
    relative = (exact.scale_tril[0] / scale.unsqueeze(-1)).flatten()[guide.family.lower]
    gain = torch.linalg.lstsq(x, exact.mean).solution.T
    with torch.no_grad():
        guide.inference.head.weight.zero_()[:3] = gain * guide.inference.head.size
        guide.inference.head.bias.copy_(torch.cat([torch.zeros(3), scale.log(), relative]))
    report = collapse_report(model.full, guide, (x,))
    close(report.dataset["kl"], kl_normal(exact.mean, exact.stddev).mean(0), rtol=1e-4)
    prior = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    total = torch.distributions.kl_divergence(exact, prior).mean()
    assert abs(report.dataset.attrs["total_kl"] - total) < 4 * report.dataset.attrs["total_kl_se"]
    assert float(total) - report.dataset["kl"].values.sum() > 0.1  # what q couples is in the total only


def hierarchical(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        second = pyro.sample("second", dist.Normal(first, 0.5))
        pyro.sample("x", dist.Normal(second, 10.0), obs=x)


def test_hierarchical_prior() -> None:
    x = make_data()[:, 0]
    report = collapse_report(hierarchical, with_normal(hierarchical, [0.3, -0.2], [0.6, 0.7], x), (x,), num_samples=500)
    expected = 0.5 * ((0.7**2 + 0.5**2 + 0.6**2) / 0.5**2 - 1) - math.log(0.7 / 0.5)
    kl, error = (report.dataset[name].sel(latent="second") for name in ("kl", "kl_se"))
    assert abs(kl - expected) < 4 * error
    assert 0 < error < 0.02
    close(report.dataset["kl_se"].sel(latent="first"), 0.0)
    assert list(report.dataset["latent"].values) == ["first", "second"]


def test_a_guide_that_answers_with_a_hierarchical_prior_has_collapsed() -> None:
    x = make_data()[:, 0]
    phi = torch.tensor([0.0, 0.0, 0.0, math.log(0.5), 2.0])  # scale_tril [[1, 0], [1, 0.5]]
    joint = set_phi(AmortizedGuide(hierarchical, family="multivariate_normal"), phi, x)
    report = collapse_report(hierarchical, joint, (x,))
    close(report.dataset["kl"], 0.0, atol=1e-8)
    assert report.dataset["collapsed"].values.all()
    pyro.clear_param_store()
    marginals = with_normal(hierarchical, [0.0, 0.0], [1.0, 1.25**0.5], x)
    twin = collapse_report(hierarchical, marginals, (x,))
    assert twin.dataset["collapsed"].values.tolist() == [True, False]


def lognormal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(0.5, 0.7))
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def gamma(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.5))
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def quadrature(log_p: Callable[[Tensor], Tensor], loc: float, scale: float) -> Tensor:
    """KL of a normal from a density, by a fine grid."""
    u = torch.linspace(loc - 9 * scale, loc + 9 * scale, 20001)
    q = dist.Normal(loc, scale)
    return torch.trapezoid(q.log_prob(u).exp() * (q.log_prob(u) - log_p(u)), u)


def test_constrained_sites() -> None:
    x = make_data()[:, 0]
    exact = collapse_report(lognormal, with_normal(lognormal, [0.2], [0.3], x), (x,))
    close(exact.dataset["kl"], [float(kl_normal(torch.tensor((0.2 - 0.5) / 0.7), 0.3 / 0.7))])
    close(exact.dataset["kl_se"], 0.0)
    pyro.clear_param_store()
    sampled = collapse_report(gamma, with_normal(gamma, [0.2], [0.3], x), (x,))
    expected = quadrature(lambda u: dist.Gamma(2.0, 1.5).log_prob(u.exp()) + u, 0.2, 0.3)
    assert abs(sampled.dataset["kl"].item() - expected) < 4 * sampled.dataset["kl_se"].item()
    assert 0 < sampled.dataset["kl_se"].item() < 0.01


def simplexes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
        pyro.sample("x", dist.Normal(share[..., 0].sum(-1), 1.0), obs=x)


def test_events_that_are_coupled_share_their_divergence() -> None:
    x = make_data()[:, 0]
    guide = with_normal(simplexes, [0.0, 0.0, 3.0, 0.0], [0.8, 0.8, 0.1, 0.8], x)
    report = collapse_report(simplexes, guide, (x,))
    assert list(report.dataset["latent"].values) == [f"share[{i},{j}]" for i in range(2) for j in range(2)]
    kl = report.dataset["kl"].values
    assert kl[0] == pytest.approx(kl[1])
    assert kl[2] == pytest.approx(kl[3])
    assert kl[2] > kl[0] + 0.5
    close(report.dataset.attrs["total_kl"], kl.sum())
    with torch.no_grad():
        u = guide.posterior(x).sample((20_000,))[:, 0]
        transform = torch.distributions.biject_to(torch.distributions.constraints.simplex)
        parts = u.unflatten(-1, (2, 2))
        log_p = dist.Dirichlet(torch.ones(3)).log_prob(transform(parts))
        log_p = log_p + transform.log_abs_det_jacobian(parts, transform(parts))
        expected = guide.posterior(x).base_dist.log_prob(u.unsqueeze(1))[:, 0].unflatten(-1, (2, 2)).sum(-1) - log_p
    close(kl[[0, 2]], expected.mean(0) / 2, rtol=0.03)


def correlated(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 1.5], [1.5, 3.0]])))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def test_multivariate_normal_prior_is_met_by_its_marginals() -> None:
    x = make_data()[:, 0]
    report = collapse_report(correlated, with_normal(correlated, [1.0, 1.0], [2.0**0.5, 3.0**0.5], x), (x,))
    close(report.dataset["kl"], 0.0, atol=1e-12)
    q = dist.MultivariateNormal(torch.ones(2), torch.diag(torch.tensor([2.0, 3.0])))
    p = dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 1.5], [1.5, 3.0]]))
    total = torch.distributions.kl_divergence(q, p)
    assert abs(report.dataset.attrs["total_kl"] - total) < 4 * report.dataset.attrs["total_kl_se"]


# Families that are not Gaussian


class Transformed(VariationalFamily):
    """Correlated normals behind a transform that may be nothing, as a family that says nothing of itself."""

    def __init__(self, latent_dim: int, shape: Callable[[], Any] | None = None) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        loc, log_scale = phi.split(self.latent_dim, -1)
        return dist.TransformedDistribution(dist.Normal(loc, log_scale.exp()).to_event(1), [])


def test_other_families_are_estimated() -> None:
    x = make_data()
    phi = torch.cat([torch.tensor([0.8, 0.0, 0.0]), torch.tensor([0.5, 1.0, 1.5]).log()])
    guide = set_phi(AmortizedGuide(independent, family=Transformed), phi, x)
    report = collapse_report(independent, guide, (x,), num_samples=1000)
    expected = kl_normal(phi[:3], phi[3:].exp())
    close(report.dataset["kl"], expected, rtol=0, atol=0.03)
    assert abs(report.dataset.attrs["total_kl"] - expected.sum()) < 4 * report.dataset.attrs["total_kl_se"]
    assert report.dataset["kl"].values.argmin() == 1
    assert not report.dataset["active"].values.any()


def test_other_families_of_one_dimension_are_exact_on_average() -> None:
    x = make_data()[:, 0]
    phi = torch.tensor([0.2, math.log(0.3)])
    guide = set_phi(AmortizedGuide(gamma, family=Transformed), phi, x)
    report = collapse_report(gamma, guide, (x,))
    expected = quadrature(lambda u: dist.Gamma(2.0, 1.5).log_prob(u.exp()) + u, 0.2, 0.3)
    assert abs(report.dataset["kl"].item() - expected) < 4 * report.dataset["kl_se"].item()


# Models of every kind


def exact_guide(call: str, model: LinearGaussian, guide_class: Any = AmortizedGuide) -> Any:
    gain = model.posterior(torch.eye(4)).mean
    scale = model.posterior(torch.zeros(1, 4)).stddev[0]
    return guide_class(getattr(model, call), Linear(gain, scale), encoder_input="x")


@pytest.mark.parametrize("call", ["full", "explicit", "random", "unsized", "rows"])
def test_plates(call: str) -> None:
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(30)
    kl = kl_normal(model.posterior(x).mean, model.posterior(x).stddev)
    index = torch.tensor([3, 0, 17])
    args = (x, index) if call == "explicit" else (x,)
    encoder_input = {"explicit": lambda x, index: x[index], "random": lambda x: pyro.subsample(x, event_dim=1)}
    guide = exact_guide(call, model)
    guide._encoder_input = encoder_input.get(call, "x")
    report = collapse_report(getattr(model, call), guide, args)
    assert list(report.dataset["latent"].values) == ["z[0]", "z[1]", "z[2]"]
    if call == "random":
        assert report.num_datapoints == 4
    else:
        close(report.dataset["kl"], (kl[index] if call == "explicit" else kl).mean(0))


def test_plates_left_of_the_data() -> None:
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(30)
    guide = AmortizedGuide(model.columns, Linear(*exact_linear(model)), encoder_input=lambda x: x.T)
    report = collapse_report(model.columns, guide, (x.T,))
    close(report.dataset["kl"], kl_normal(model.posterior(x).mean, model.posterior(x).stddev).mean(0))


def exact_linear(model: LinearGaussian) -> tuple[Tensor, Tensor]:
    return model.posterior(torch.eye(4)).mean, model.posterior(torch.zeros(1, 4)).stddev[0]


def test_loader_gives_the_same_as_one_call() -> None:
    x = make_data(50)
    guide = AmortizedGuide(independent, Linear(WEIGHTS, SCALE))
    whole = collapse_report(independent, guide, (x,))
    batches = collapse_report(independent, guide, DataLoader(TensorDataset(x), batch_size=20))
    for name in ("kl", "posterior_mean_variance", "share_below", "active", "collapsed"):
        close(batches.dataset[name], whole.dataset[name])
    assert batches.num_datapoints == 50
    error = whole.dataset.attrs["mutual_information_se"]
    assert abs(whole.mutual_information - batches.mutual_information) < 6 * error


@pytest.mark.slow
def test_mutual_information_of_a_part_of_the_data() -> None:
    x = make_data(400)
    guide = AmortizedGuide(independent, Linear(WEIGHTS, SCALE))
    loader = DataLoader(TensorDataset(x), batch_size=100)
    part = collapse_report(independent, guide, loader, max_pairs=150)
    whole = collapse_report(independent, guide, (x,))
    assert part.dataset.attrs["mutual_information_datapoints"] == 150
    assert "150 datapoints drawn at random" in str(part)
    assert part.mutual_information == pytest.approx(whole.mutual_information, abs=0.15)
    close(part.dataset["kl"], whole.dataset["kl"])


@pytest.mark.parametrize(
    "make",
    [
        lambda model: AmortizedGuide(model, family=LowRankMultivariateNormal),
        lambda model: SemiAmortizedGuide(model, num_steps=2),
        lambda model: IterativeAmortizedGuide(model, num_steps=2),
        PerDatapointGuide,
    ],
    ids=["low rank", "semi-amortized", "iterative", "per datapoint"],
)
def test_all_guides_with_global_latents(make: Callable[..., Any]) -> None:
    x = counts(12)
    report = collapse_report(topics, make(topics), (x,))
    assert list(report.dataset["latent"].values) == ["size", "share[0]", "share[1]"]
    assert np.isfinite(report.dataset["kl"]).all()
    assert "rate" in report.dataset.attrs["global_latents"]


def clusters(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 2.0])[k], torch.tensor([0.5, 0.8])[k]))
        w = pyro.sample("w", dist.Normal(torch.tensor([1.0, -1.0])[k] + z, 1.0))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)


def test_discrete_latents_are_summed_out_of_the_prior() -> None:
    x = make_data()[:, 0]
    report = collapse_report(clusters, with_normal(clusters, [0.5, 0.1], [0.6, 0.4], x), (x,), num_samples=2000)
    prior = torch.tensor([0.3, 0.7]).log()

    def log_joint_k(z: Tensor) -> Tensor:
        return prior + dist.Normal(torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 0.8])).log_prob(z[..., None])

    first = quadrature(lambda z: log_joint_k(z).logsumexp(-1), 0.5, 0.6)
    z = dist.Normal(0.5, 0.6).sample((20_000,))
    w = dist.Normal(0.1, 0.4).sample((20_000,))
    given = dist.Normal(torch.tensor([1.0, -1.0]) + z[:, None], 1.0).log_prob(w[:, None])
    log_p = (log_joint_k(z) + given).logsumexp(-1) - log_joint_k(z).logsumexp(-1)
    second = (dist.Normal(0.1, 0.4).log_prob(w) - log_p).mean()
    close(report.dataset["kl"], [float(first), float(second)], atol=0.04)
    close(report.dataset.attrs["total_kl"], report.dataset["kl"].sum())


def test_discrete_latents_of_the_likelihood_do_not_matter() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    x = make_data()[:, 0]
    report = collapse_report(model, with_normal(model, [0.5], [0.6], x), (x,))
    close(report.dataset["kl"], [float(kl_normal(torch.tensor(0.5), 0.6))])


def test_a_model_that_takes_one_draw_at_a_time() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(z.reshape(len(x), 2).sum(-1), 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    x = make_data()[:, 0]
    report = collapse_report(model, with_normal(model, [0.1, 0.2, 0.3], [0.5, 0.5, 0.5], x), (x,))
    expected = 0.5 * (0.5**2 + 2 * 0.5**2 - 1) - math.log(0.5)
    assert abs(report.dataset["kl"].values[2] - expected) < 4 * report.dataset["kl_se"].values[2]


# Activity does not depend on units


def scaled(scale: Tensor, constrained: bool = False) -> Callable[[Tensor], None]:
    """A latent of three dimensions in given units; the data see the first two, in units of the prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(3), scale)
            z = pyro.sample("z", (dist.LogNormal(x.new_zeros(3), scale) if constrained else prior).to_event(1))
            unit = (z.log() if constrained else z) / scale
            pyro.sample("x", dist.Normal(unit[..., :2], 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("constrained", [False, True])
def test_activity_does_not_depend_on_units(constrained: bool) -> None:
    x = make_data()
    expected = collapse_report(independent, AmortizedGuide(independent, Linear(WEIGHTS, SCALE)), (x,))
    for scale in (torch.full((3,), 0.05), torch.tensor([1e-3, 1.0, 20.0])):
        model = scaled(scale, constrained)
        report = collapse_report(model, AmortizedGuide(model, Linear(WEIGHTS * scale, SCALE * scale)), (x,))
        assert report.dataset["active"].values.tolist() == [True, False, False]
        close(report.dataset["relative_variance"], (x @ WEIGHTS).var(0), rtol=0.1)
        close(report.dataset["information"], expected.dataset["information"], atol=1e-3)
        close(report.mutual_information, expected.mutual_information, rtol=1e-3)


def test_information_of_a_dimension_against_quadrature() -> None:
    x = make_data()
    report = collapse_report(independent, AmortizedGuide(independent, Linear(WEIGHTS, SCALE)), (x,))
    z = torch.linspace(-6, 6, 4001)
    p = dist.Normal((x @ WEIGHTS)[:, 0], SCALE[0]).log_prob(z[:, None]).exp()
    exact = torch.trapezoid(torch.special.xlogy(p, p / p.mean(-1, keepdim=True)).mean(-1), z)
    found = float(report.dataset["information"][0])
    assert 0.97 * exact - 0.01 < found < exact + 0.01
    assert report.dataset["information"].values[1] < 1e-3


def test_a_narrow_posterior_under_a_wide_prior_is_active_and_one_like_the_prior_is_not() -> None:
    x = make_data()
    model = scaled(torch.full((3,), 1e3))
    report = collapse_report(model, AmortizedGuide(model, Linear(WEIGHTS, SCALE)), (x,))
    assert report.dataset["active"].values.tolist() == [True, False, False]
    jitter = AmortizedGuide(model, Linear(torch.ones(2, 3), torch.full((3,), 1e3)))
    dead = collapse_report(model, jitter, (x,))
    assert dead.dataset["posterior_mean_variance"].values.min() > 1
    assert "Collapsed: none of the 3" in dead.verdict


def cauchy(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.StudentT(1.0, 0.0, 0.01 * scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_priors_without_moments_that_depend_on_other_latents() -> None:
    x = make_data()
    guide = AmortizedGuide(cauchy, Linear(torch.tensor([[0.0, 0.01], [0.0, 0.0]]), torch.tensor([1.0, 0.003])))
    guide._encoder_input = lambda _: x
    report = collapse_report(cauchy, guide, (x[:, 0],))
    assert report.dataset["active"].values.tolist() == [False, True]
    assert np.isfinite(report.dataset["relative_variance"]).all()


def test_what_a_prior_of_each_datapoint_tells_is_no_information_of_the_data() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(3 * x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 10.0).to_event(1), obs=x)

    x = make_data()
    same = collapse_report(model, AmortizedGuide(model, Linear(3 * torch.eye(2), torch.ones(2))), (x,))
    assert "Collapsed" in same.verdict
    assert same.mutual_information < 0.01
    assert abs(same.dataset.attrs["aggregate_kl"]) < 0.01
    moved = collapse_report(model, AmortizedGuide(model, Linear(2 * torch.eye(2), torch.ones(2))), (x,))
    assert "No collapse" in moved.verdict


def test_information_that_no_dimension_holds_by_itself_is_told() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.prod(-1), 1.0), obs=x)

    x = make_data()[:, 0]
    angle = x.sign() * 1.3
    phi = torch.stack([torch.zeros_like(x)] * 2 + [torch.zeros_like(x), angle.cos().abs().log(), angle.tan()], -1)
    table = PerDatapointGuide(model, family="multivariate_normal")
    table.setup(x)
    with torch.no_grad():
        table.inference.table.copy_(phi)
    report = collapse_report(model, table, (x,))
    assert report.active_units == 0
    assert report.mutual_information > 0.3
    assert "None of the 2 latent dimensions is active by itself, yet together they hold" in report.verdict


# The report


def test_collapse_is_told_from_use() -> None:
    x = make_data()
    used = collapse_report(independent, AmortizedGuide(independent, Linear(torch.eye(2, 3), SCALE)), (x,))
    assert "1 of 3 latent dimensions are dead: z[2]" in str(used)
    dead = collapse_report(independent, with_normal(independent, [0.0] * 3, [1.0] * 3, x), (x,))
    assert "Collapsed: none of the 3 latent dimensions" in dead.verdict
    assert "KL annealing" in dead.verdict
    assert dead.mutual_information == pytest.approx(0.0, abs=1e-9)
    pyro.clear_param_store()
    alive = collapse_report(independent, AmortizedGuide(independent, Linear(torch.ones(2, 3), SCALE)), (x,))
    assert "No collapse" in alive.verdict


def test_dimensions_that_are_active_but_close_to_the_prior_are_named() -> None:
    """The means of one vary by .02 of the prior's variance: its KL divergence is below .1 nats for 99.7 % of data."""
    x = make_data()
    weak = torch.tensor([[1.0, 0.15, 1.0], [1.0, 0.0, 1.0]])
    report = collapse_report(independent, AmortizedGuide(independent, Linear(weak, SCALE)), (x,))
    assert report.active_units == 3
    assert "All 3 latent dimensions are active, 1 of them hardly: the KL divergence of z[1] is below 0.1" in str(report)


def test_a_divergence_without_information_is_told() -> None:
    x = make_data()
    report = collapse_report(independent, with_normal(independent, [2.0, 0.0, 0.0], [1.0] * 3, x), (x,))
    assert report.active_units == 0
    assert "1 dead dimensions have a KL divergence above 0.1 nats all the same" in report.verdict
    assert report.dataset.attrs["aggregate_kl"] == pytest.approx(2.0, abs=1e-6)


def test_saved_and_read(tmp_path: Path) -> None:
    x = make_data()
    report = collapse_report(independent, AmortizedGuide(independent, Linear(WEIGHTS, SCALE)), (x,))
    report.to_netcdf(tmp_path / "report.nc")
    again = CollapseReport.from_netcdf(tmp_path / "report.nc")
    assert str(again) == str(report)
    assert again.active_units == 1
    assert again.mutual_information == report.mutual_information


def test_plots() -> None:
    from matplotlib import pyplot

    x = make_data()
    report = collapse_report(independent, AmortizedGuide(independent, Linear(WEIGHTS, SCALE)), (x,))
    axes = report.plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["epsilon", "active (1)", "not active (2)"]
    assert report.plot(axes) is axes
    curve = report.plot_curve(label="VAE")
    close(curve.lines[0].get_ydata(), 100 * report.collapse_curve().values)
    pyplot.close("all")


def test_seeds() -> None:
    x = make_data()[:, 0]
    guide = with_normal(gamma, [0.2], [0.3], x)
    before = torch.get_rng_state()
    first, same, other = (collapse_report(gamma, guide, (x,), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dataset.identical(same.dataset)
    assert first.dataset["kl"].item() != other.dataset["kl"].item()


# What is refused


def test_models_without_local_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match="because the model has no local latents"):
        collapse_report(model, AmortizedGuide(model), (make_data()[:, 0],))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "Cannot use num_samples=1 because it must be an integer of at least 2"),
        ({"max_pairs": 1}, "Cannot use max_pairs=1 because it must be an integer of at least 2"),
        ({"threshold": 0.0}, "Cannot use threshold=0.0 because it must be a positive number"),
        ({"epsilon": -1.0}, "Cannot use epsilon=-1.0 because it must be a positive number"),
        ({"delta": 1.0}, "Cannot use delta=1.0 because it must be a share"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collapse_report(independent, AmortizedGuide(independent), (make_data(),), **options)


def test_one_datapoint_is_refused() -> None:
    with pytest.raises(ValueError, match="because there is only one datapoint"):
        collapse_report(independent, AmortizedGuide(independent), (make_data(1),))


def test_other_guides_are_refused() -> None:
    guide = pyro.infer.autoguide.AutoNormal(independent)
    with pytest.raises(ValueError, match="Cannot diagnose a AutoNormal"):
        collapse_report(independent, guide, (make_data(),))


def test_discrete_latents_beside_inner_plates_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            with pyro.plate("features", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Normal(k, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="depends on a discrete latent in a model with nested plates"):
        collapse_report(model, AmortizedGuide(model), (make_data(),))


def test_a_latent_over_time_has_one_row() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(2)
            for t in range(1, 4):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 1.0), obs=x[:, t - 1])

    x = torch.randn(20, 3)
    guide = AmortizedGuide(model)
    guide(x)
    report = collapse_report(model, guide, (x,))
    assert list(report.dataset["over_time"].values) == ["z_*[0]", "z_*[1]"] * 3
    rows = [line.split() for line in str(report).splitlines() if line.startswith("z_")]
    assert [row[0] for row in rows] == ["z_*[0]", "z_*[1]"]
    assert [float(row[1]) for row in rows] == pytest.approx(report.dataset["kl"].values.reshape(3, 2).mean(0), abs=1e-4)


def test_levels_of_a_ladder_are_not_steps_of_time() -> None:
    def ladder(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(0.5 * z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    report = collapse_report(ladder, AmortizedGuide(ladder), (torch.randn(20),))
    assert "over_time" not in report.dataset.coords
    assert {"z1", "z2"} <= set(str(report).split())
