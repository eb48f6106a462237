"""The importance-weighted bound per datapoint: against formulas, plain loops and Monte Carlo."""

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import Normal

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    compare_gaps,
    estimate_gaps,
)
from pyro_amortized.families import Flow
from pyro_amortized.training import IWELBO, KLAnnealing
from pyro_amortized.training.particles import Particles
from pyro_amortized.training.plates import RowsOfPlate

FAMILIES = ("normal", "multivariate_normal", "low_rank_multivariate_normal", "structured", "mixture", "flow")
pytestmark = pytest.mark.usefixtures("_float64")
X = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)


class Recorded:
    """A guide that keeps its draws."""

    def __init__(self, guide: Any) -> None:
        self.guide, self.plate, self.groups = guide, guide.plate, guide.groups
        self.draws: list[dict[str, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.draws.append(self.guide(*args, **kwargs))
        return self.draws[-1]


def hierarchy(x: Tensor, index: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), subsample=torch.arange(len(x)) if index is None else index) as at:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[at])


def by_hand(guide: Any, draws: dict[str, Tensor], x: Tensor, scale: float = 1.0) -> Tensor:
    """The bound of ``hierarchy`` as its definition says."""
    loc, z = draws["loc"], draws["z"]
    q_loc, q_scale = guide.global_guide.locs.loc, guide.global_guide.scales.loc
    total = Normal(0.0, 2.0).log_prob(loc) - Normal(q_loc, q_scale).log_prob(loc)
    mean, log_scale = guide.variational_parameters(x).unbind(-1)
    for n in range(len(x)):
        weights = [
            Normal(loc, 1.0).log_prob(z[k, n])
            + Normal(z[k, n], 0.5).log_prob(x[n])
            - Normal(mean[n], log_scale[n].exp()).log_prob(z[k, n])
            for k in range(len(z))
        ]
        total = total + scale * (torch.stack(weights).exp().mean()).log()
    return total


@pytest.mark.parametrize("gradient", ["dreg", "plain"])
def test_the_bound_is_the_one_computed_by_hand(gradient: str) -> None:
    guide = Recorded(AmortizedGuide(hierarchy))
    guide.guide.setup(X)
    loss = IWELBO(7, gradient=gradient).differentiable_loss(hierarchy, guide, X)
    assert guide.draws[-1]["loc"].shape == ()
    assert guide.draws[-1]["z"].shape == (7, 4)
    exact = by_hand(guide.guide, guide.draws[-1], X)
    assert abs((loss + exact).item()) < 1e-10
    assert IWELBO(7).loss(hierarchy, guide, X) + by_hand(guide.guide, guide.draws[-1], X).item() == pytest.approx(
        0.0, abs=1e-10
    )
    if gradient == "plain":  # its gradient is that of the definition
        parameters = [p for p in guide.guide.parameters() if p.requires_grad]
        found, expected = (
            torch.autograd.grad(v, parameters, allow_unused=True, retain_graph=True) for v in (-loss, exact)
        )
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True) if b is not None)


def test_subsampled_datapoints_count_as_often_as_there_are_others() -> None:
    index = torch.tensor([2, 0])
    guide = Recorded(AmortizedGuide(hierarchy, name="by_index"))
    guide.guide.setup(X, index)
    loss = IWELBO(5).differentiable_loss(hierarchy, guide, X, index)
    phi = guide.guide.variational_parameters(X, index)
    guide.guide.variational_parameters = lambda x: phi
    assert abs((loss + by_hand(guide.guide, guide.draws[-1], X[index], scale=2.0)).item()) < 1e-10


def test_one_particle_is_the_elbo() -> None:
    guide = AmortizedGuide(hierarchy)
    guide.setup(X)
    losses = []
    for elbo in (IWELBO(1), Trace_ELBO()):
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(hierarchy, guide, X))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_exact_posteriors_give_the_evidence_without_noise() -> None:
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(5)
    guide = PerDatapointGuide(model.full)
    guide.setup(x)
    posterior = model.posterior(x)
    phi = torch.cat([posterior.mean, posterior.variance.sqrt().log().expand(5, -1)], -1)
    next(guide.inference.parameters()).data.copy_(phi)
    assert IWELBO(4).loss(model.full, guide, x) == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-10)


# Other structures, against a loop over draws and datapoints of the traces


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, False, True, True])):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def entries_masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0).mask(x > 0), obs=x)


def constrained(x: Tensor) -> None:
    with pyro.plate("topics", 2):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        rate = pyro.sample("size", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(rate * share[..., 0], 1.0), obs=x)


def inner(x: Tensor) -> None:
    data = pyro.plate("data", len(x), dim=-2)
    with data:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with data, pyro.plate("tests", 3, dim=-1):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x.unsqueeze(-1))


def random(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def annealed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plain_bound(run: Particles) -> Tensor:
    """From the sites' own log-probabilities."""
    rank, total, weights, scale = run.call.structure.depth + 1, torch.zeros(()), torch.zeros(()), 1.0
    for sign, trace in ((1.0, run.model_trace), (-1.0, run.guide_trace)):
        trace.compute_log_prob()
        nodes: Any = trace.nodes
        for site in nodes.values():
            frame = next((f for f in site.get("cond_indep_stack", ()) if f.name == "data"), None)
            if frame is None:
                total = total + sign * site.get("log_prob_sum", 0.0)
                continue
            term, scale = site["log_prob"], frame.full_size / frame.size
            term = term.reshape((1,) * (rank - term.dim()) + term.shape)
            others = [axis for axis in range(1, rank) if axis != rank + frame.dim]
            weights = weights + sign * (term.sum(others) if others else term) / scale
    return total + (weights.logsumexp(0) - math.log(run.number)).sum() * scale


@pytest.mark.parametrize("family", ["normal", "multivariate_normal"])
@pytest.mark.parametrize("model", [masked, entries_masked, constrained, inner, random, annealed])
def test_other_structures(model: Callable[..., None], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AmortizedGuide(model, family=family)
    guide.setup(X)
    found = []
    real = IWELBO._run
    monkeypatch.setattr(IWELBO, "_run", lambda *args: found.extend(real(*args)) or found)
    loss = IWELBO(6).loss(model, guide, X)
    assert loss == pytest.approx(-plain_bound(found[0]).item(), abs=1e-10)


def test_a_scale_of_whole_datapoints_is_outside_of_the_logarithm() -> None:
    weights = torch.tensor([1.0, 0.5, 2.0, 0.1])

    def weighted(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=weights):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Recorded(AmortizedGuide(weighted))
    guide.guide.setup(X)
    loss = IWELBO(6).loss(weighted, guide, X)
    z, (mean, log_scale) = guide.draws[-1]["z"], guide.guide.variational_parameters(X).unbind(-1)
    log_w = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(X) - Normal(mean, log_scale.exp()).log_prob(z)
    expected = weights * (log_w.logsumexp(0) - math.log(6))
    assert loss == pytest.approx(-expected.sum().item(), abs=1e-10)


@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("gradient", ["dreg", "plain"])
@pytest.mark.parametrize("handler", [lambda: RowsOfPlate("data", 2), lambda: poutine.scale(scale=2.0)])
def test_what_the_caller_scales_is_outside_of_the_logarithm(handler: Any, gradient: str, annealed: bool) -> None:
    """As in several processes; beside scales of the model's, of some sites alone, too. The draws are made together."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    guide(X)
    annealing = KLAnnealing(model, guide, lambda step: 0.3)
    pair = (annealing.model, annealing.guide) if annealed else (model, guide)
    found = []
    for around in (nullcontext(), handler()):
        pyro.set_rng_seed(0)
        with around:
            loss = IWELBO(5, gradient=gradient).differentiable_loss(*pair, X)
        found.append([loss, *torch.autograd.grad(loss, list(guide.parameters()))])
    torch.testing.assert_close(found[1], [2.0 * value for value in found[0]])


def test_the_loss_per_datapoint_as_people_scale_it() -> None:
    guide = AmortizedGuide(hierarchy)
    guide.setup(X)
    losses, slopes = [], []
    for scale in (1.0, 0.25):
        pyro.set_rng_seed(2)
        model, scaled = poutine.scale(hierarchy, scale), poutine.scale(guide, scale)
        loss = IWELBO(6).differentiable_loss(model, scaled, X)
        losses.append(loss.item())
        parameters = [p for p in guide.parameters() if p.requires_grad]
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    assert losses[1] == pytest.approx(losses[0] / 4, abs=1e-10)
    assert torch.allclose(slopes[1], slopes[0] / 4, atol=1e-10)


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + torch.tensor([-1.0, 2.0])[y], 0.5), obs=x)


def summed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        parts = dist.Normal(z.unsqueeze(-1) + torch.tensor([-1.0, 2.0]), 0.5)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts), obs=x)


def test_enumerated_latents_are_summed_out() -> None:
    guide = AmortizedGuide(mixture)
    guide.setup(X)
    losses = []
    for model in (mixture, summed):
        pyro.set_rng_seed(1)
        losses.append(IWELBO(5).loss(model, guide, X))
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


def test_the_prior_may_depend_on_what_is_summed_out() -> None:
    """As in a mixture of Gaussians: the sum is over k in the prior and the likelihood together."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(3.0 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    guide.setup(X)
    recorded = Recorded(guide)
    loss = IWELBO(5).loss(model, recorded, X)
    z, (mean, log_scale) = recorded.draws[-1]["z"], guide.variational_parameters(X).unbind(-1)
    prior = torch.stack([math.log(p) + Normal(3.0 * k, 1.0).log_prob(z) for k, p in enumerate((0.3, 0.7))]).logsumexp(0)
    log_w = prior + Normal(z, 1.0).log_prob(X) - Normal(mean, log_scale.exp()).log_prob(z)
    assert loss == pytest.approx(-(log_w.logsumexp(0) - math.log(5)).sum().item(), abs=1e-10)
    assert math.isfinite(IWELBO(5, vectorize_particles=False).loss(model, guide, X))


def test_groups_in_long_format() -> None:
    county = torch.tensor([0, 0, 1, 2, 2])
    y = torch.arange(5.0)

    def long(y: Tensor, county: Tensor) -> None:
        with pyro.plate("county", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(a[..., county], 1.0), obs=y)

    guide = AmortizedGuide(long, plate="county", groups={"obs": "county"})
    guide.setup(y, county)
    recorded = Recorded(guide)
    loss = IWELBO(6).loss(long, recorded, y, county)
    a, (mean, log_scale) = recorded.draws[-1]["a"], guide.variational_parameters(y, county).unbind(-1)
    log_w = Normal(0.0, 1.0).log_prob(a) - Normal(mean, log_scale.exp()).log_prob(a)
    likelihood = Normal(a[:, county], 1.0).log_prob(y)
    log_w = log_w + torch.stack([likelihood[:, county == c].sum(-1) for c in range(3)], -1)
    assert loss == pytest.approx(-(log_w.logsumexp(0) - math.log(6)).sum().item(), abs=1e-10)


def test_global_latents_do_not_pool_the_weights() -> None:
    """Pyro's bound weighs all datapoints by their product; ours does not, and is as tight with as without them."""
    x = torch.randn(50)
    guide = AmortizedGuide(hierarchy)
    guide.setup(x)
    values = {}
    for name, elbo in (
        ("elbo", Trace_ELBO(200, vectorize_particles=True)),
        ("renyi", RenyiELBO(alpha=0.0, num_particles=200, vectorize_particles=True)),
        ("iwelbo", IWELBO(200)),
    ):
        values[name] = -sum(elbo.loss(hierarchy, guide, x) for _ in range(20)) / 20
    assert values["iwelbo"] - values["elbo"] > 3 * (values["renyi"] - values["elbo"]) > 0


# Gradients


def copies(size: int, parameters: dict[str, Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """As many copies of one datapoint, with parameters of their own: one run gives as many gradients."""

    def model() -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(parameters["theta"], 1.0))
            w = pyro.sample("w", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z + w.log(), 0.7), obs=torch.ones(size))

    def guide() -> None:
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(parameters["loc"], parameters["log_scale"].exp()))
            pyro.sample("w", dist.LogNormal(parameters["w_loc"], 0.6))

    return model, guide


def gradients(num_particles: int, gradient: str, size: int = 20000, seed: int = 0) -> dict[str, Tensor]:
    start = {"theta": 0.2, "loc": 0.9, "log_scale": -0.3, "w_loc": 0.4}
    parameters = {name: torch.full((size,), value, requires_grad=True) for name, value in start.items()}
    pyro.set_rng_seed(seed)
    loss = IWELBO(num_particles, gradient=gradient).differentiable_loss(*copies(size, parameters))
    return dict(zip(start, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def standard_scores(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((a.mean() - b.mean()) / ((a.var() + b.var()) / len(a)).sqrt())
        for name, a, b in ((name, first[name], second[name]) for name in first)
    }


def test_dreg_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(5, "plain")
    assert all(abs(score) < 4 for score in standard_scores(gradients(5, "dreg", seed=1), plain).values())
    monkeypatch.setattr(Particles, "gated", lambda self, site: site)  # weighs the model's part once, not twice
    wrong = standard_scores(gradients(5, "dreg", seed=1), plain)
    assert min(abs(wrong[name]) for name in ("loc", "log_scale", "w_loc")) > 10
    assert abs(wrong["theta"]) < 4


def test_dreg_varies_less_and_gets_better_with_more_particles() -> None:
    ratios = {}
    for number in (1, 16, 64):
        dreg, plain = (gradients(number, name, 4000) for name in ("dreg", "plain"))
        ratios[number] = {name: float(plain[name].var() / dreg[name].var()) for name in dreg}
        assert ratios[number]["theta"] == pytest.approx(1.0, abs=1e-6)  # the same draws, the same estimator
    for name in ("loc", "log_scale", "w_loc"):
        assert ratios[64][name] > 3 * ratios[16][name] / 2 > 3 * ratios[1][name] / 2
        assert ratios[64][name] > 10


def supports(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        part = pyro.sample("part", dist.Beta(2.0, 1.0))
        pyro.sample("x", dist.Normal(rate * share[..., 0] + part, 0.3), obs=x)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family: str) -> None:
    """A table of copies of one datapoint: each of its rows gets a gradient of its own."""
    size = 3000
    x = torch.ones(size)
    guide = PerDatapointGuide(supports, family=family)
    guide.setup(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn(parameter[:1].shape if len(parameter) == size else parameter.shape)
    (table,) = (p for p in guide.inference.parameters() if len(p) == size)
    found = {}
    for gradient in ("dreg", "plain"):
        pyro.set_rng_seed(1)
        loss = IWELBO(4, gradient=gradient).differentiable_loss(supports, guide, x)
        (found[gradient],) = torch.autograd.grad(loss, table)
    difference = found["dreg"] - found["plain"]  # at the same draws
    scores = difference.mean(0) / (difference.std(0) / size**0.5).clamp(min=1e-12)
    assert scores.abs().max() < 4.5
    assert difference.std(0).max() > 1e-3


@pytest.mark.parametrize("gradient", ["dreg", "plain"])
def test_draws_together_and_one_by_one_give_the_same_gradient(gradient: str) -> None:
    """At the same draws, with a global latent that the local ones depend on."""
    noise = torch.randn(5, len(X))
    table = torch.zeros(len(X), requires_grad=True)
    shared = torch.zeros((), requires_grad=True)
    at: list[int] = []

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Delta(shared, log_density=shared * 0.1))
        with pyro.plate("data", len(x)):
            fn = dist.Normal(table + shared, 0.8)
            vectorized = not at
            eps = noise if vectorized else noise[at.pop(0)]
            pyro.sample("z", Fixed(fn, eps))

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    found = []
    for vectorize in (True, False):
        at[:] = [] if vectorize else list(range(5))
        loss = IWELBO(5, gradient=gradient, vectorize_particles=vectorize).differentiable_loss(model, guide, X)
        found.append(torch.cat([loss.reshape(1), *(g.reshape(-1) for g in torch.autograd.grad(loss, [table, shared]))]))
    assert torch.allclose(found[0], found[1], atol=1e-12)


class Fixed(dist.TorchDistribution):
    """A normal that draws what it is told to."""

    has_rsample, arg_constraints = True, {}
    support = dist.constraints.real

    def __init__(self, base: dist.Normal, noise: Tensor) -> None:
        self.base, self.noise = base, noise
        super().__init__(base.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Fixed":
        return Fixed(self.base.expand(batch_shape), self.noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.loc + self.base.scale * self.noise

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


# Guides


def poisson(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


COUNTS = torch.tensor([0.0, 1.0, 3.0, 9.0], dtype=torch.float64)


def by_hand_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AmortizedGuide(poisson, name="a"),
        lambda: AmortizedGuide(poisson, family="mixture", name="f"),
        lambda: SemiAmortizedGuide(poisson, num_steps=3, name="s"),
        lambda: IterativeAmortizedGuide(poisson, num_steps=3, name="i"),
        lambda: PerDatapointGuide(poisson, name="p"),
        lambda: AutoNormal(poisson),
        lambda: by_hand_guide,
    ],
    ids=["amortized", "mixture", "semi_amortized", "iterative", "per_datapoint", "auto_normal", "by_hand"],
)
def test_guides_train(make: Callable[[], Any]) -> None:
    guide = make()
    guide(COUNTS)
    svi = SVI(poisson, guide, pyro.optim.ClippedAdam({"lr": 0.05}), loss=IWELBO(8))
    before = sum(svi.evaluate_loss(COUNTS) for _ in range(10))
    for _ in range(30):
        svi.step(COUNTS)
    assert sum(svi.evaluate_loss(COUNTS) for _ in range(10)) < before
    assert pyro.param("scale").item() != 1.0


@pytest.mark.slow
def test_learned_updates_get_their_signal() -> None:
    guide = IterativeAmortizedGuide(poisson, num_steps=2)
    guide.setup(COUNTS)
    loss = IWELBO(4).differentiable_loss(poisson, guide, COUNTS)
    found = torch.autograd.grad(loss, [p for p in guide.parameters() if p.requires_grad], allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in found)


def test_annealing_tempers_the_weights() -> None:
    guide = Recorded(AmortizedGuide(annealed))
    guide.guide.setup(X)

    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    own = Recorded(AmortizedGuide(plain, name="own"))
    own.guide.setup(X)
    annealing = KLAnnealing(plain, own, lambda step: 0.3)
    for recorded, model, given in ((guide, annealed, guide), (own, annealing.model, annealing.guide)):
        loss = IWELBO(4).loss(model, given, X)
        z, (mean, log_scale) = recorded.draws[-1]["z"], recorded.guide.variational_parameters(X).unbind(-1)
        log_w = 0.3 * (Normal(0.0, 1.0).log_prob(z) - Normal(mean, log_scale.exp()).log_prob(z))
        log_w = log_w + Normal(z, 1.0).log_prob(X)
        assert loss == pytest.approx(-(log_w.logsumexp(0) - math.log(4)).sum().item(), abs=1e-10)


def chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def chain_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 0.5))
        pyro.sample("w", dist.Normal(z, 0.5))


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(2)))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)


def outside_site(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("total", dist.Normal(z.sum(-1), 1.0), obs=x.sum())


def within(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("entries", 10, subsample_size=3, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.unsqueeze(-1))


def test_what_cannot_be_served_is_refused() -> None:
    def loss(model: Any, guide: Any, **options: Any) -> float:
        return IWELBO(4, **options).differentiable_loss(model, guide, X.abs().round()).item()

    with pytest.raises(ValueError, match='draws some of them given others.*try gradient="plain"'):
        loss(chain, chain_guide)
    assert math.isfinite(loss(chain, chain_guide, gradient="plain"))
    assert math.isfinite(loss(chain, AmortizedGuide(chain, family="structured")))
    for auto in (AutoDelta, AutoMultivariateNormal):
        with pytest.raises(ValueError, match="gives the same values for all of them.*try an AmortizedGuide.*AutoNor"):
            loss(poisson, auto(poisson))
    with pytest.raises(ValueError, match=r"'y' because it is discrete.*try infer=\{\"enumerate\": \"parallel\"\}"):
        loss(discrete, DiscreteAmortizedGuide(discrete))
    with pytest.raises(ValueError, match="3 of the 10 entries of plate 'entries'.*try a call with all entries"):
        loss(within, AmortizedGuide(within, encoder_input=lambda x: x))
    for vectorize in (True, False):
        with pytest.raises(ValueError, match=r"'total', outside of plate 'data', depends.*try a guide with groups="):
            loss(outside_site, AmortizedGuide(outside_site, name=f"o_{vectorize}"), vectorize_particles=vectorize)
    planar = AmortizedGuide(poisson, family=lambda dim: Flow(dim, "planar"), name="planar")
    with pytest.raises(ValueError, match='known where they have been drawn alone.*try gradient="plain"'):
        loss(poisson, planar)
    assert math.isfinite(loss(poisson, planar, gradient="plain"))
    with pytest.raises(ValueError, match="\"stl\" because it is none of|'stl' because it is none of"):
        IWELBO(4, gradient="stl")
    with pytest.raises(ValueError, match="Cannot use num_particles"):
        IWELBO(0)


def test_models_that_cannot_take_draws_together() -> None:
    """A model that sums over what it takes for the datapoints: draws go one by one, which a warning says."""

    def flawed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * (1.0 if z.dim() == 1 else 2.0), 1.0), obs=x)

    guide = Recorded(AmortizedGuide(flawed))
    guide.guide.setup(X)
    elbo = IWELBO(3)
    with pytest.warns(UserWarning, match="one after the other"):
        elbo.loss(flawed, guide, X)
    guide.draws.clear()
    loss = elbo.loss(flawed, guide, X)
    z = torch.stack([draw["z"] for draw in guide.draws])
    mean, log_scale = guide.guide.variational_parameters(X).unbind(-1)
    log_w = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(X) - Normal(mean, log_scale.exp()).log_prob(z)
    assert loss == pytest.approx(-(log_w.logsumexp(0) - math.log(3)).sum().item(), abs=1e-10)


def test_the_vectorised_bound_is_a_torch_module_too() -> None:
    guide = AmortizedGuide(poisson)
    guide.setup(COUNTS)
    loss = IWELBO(4)(poisson, guide)(COUNTS)
    loss.backward()
    assert isinstance(loss, Tensor)


@pytest.mark.slow
def test_gap_estimates_show_the_bound_of_some_draws() -> None:
    model = LinearGaussian.random_weights()
    x = model.simulate(6)
    guides = {"plain": AmortizedGuide(model.full, name="one"), "other": AmortizedGuide(model.full, name="other")}
    for guide in guides.values():
        guide.setup(x)
    gaps = estimate_gaps(model.full, guides["plain"], (x,), num_particles=5)
    data = gaps.dataset
    loss = [IWELBO(5).loss(model.full, guides["plain"], x) for _ in range(200)]
    mean, error = torch.tensor(loss).mean().item() / 6, torch.tensor(loss).std().item() / 6 / 200**0.5
    found = data["importance_weighted_bound"].values
    own = float((data["importance_weighted_bound_se"].values ** 2).sum() ** 0.5 / 6)
    assert found.mean() == pytest.approx(-mean, abs=4 * math.hypot(error, own))
    assert (data["elbo"].values < found).all()
    assert (found < data["log_evidence"].values).all()
    assert "bound of 5 draws L_5[q]" in str(gaps)
    comparison = compare_gaps(model.full, guides, (x,), num_particles=5)
    assert "bound of draws" in str(comparison)
    assert comparison.dataset["importance_weighted_bound"].values[0] == pytest.approx(found.mean())
    with pytest.raises(ValueError, match="Cannot use num_particles"):
        estimate_gaps(model.full, guides["plain"], (x,), num_particles=0)


@pytest.mark.slow
def test_digits_end_above_the_elbo() -> None:
    """In nats per image, each by its own bound, and by that of 50 draws after both."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images > 8, dtype=torch.float).flatten(1)
    bounds = {}
    for name, elbo in (("plain", Trace_ELBO()), ("draws", IWELBO(50))):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

        def model(x: Tensor, decoder: nn.Module = decoder) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("images", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

        guide = AmortizedGuide(model, name=name)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), elbo)
        for rows in torch.randint(len(images), (800, 100)):
            svi.step(images[rows])
        for loss in (elbo, IWELBO(50)):
            bounds[name, type(loss).__name__] = -loss.loss(model, guide.eval(), images) / len(images)
    assert bounds["draws", "IWELBO"] > bounds["plain", "Trace_ELBO"] + 0.3
    assert bounds["draws", "IWELBO"] > bounds["plain", "IWELBO"] + 0.3


def signal_to_noise(num_particles: int, gradient: str) -> float:
    """Of the gradient by the encoder's bias, near the optimum of a linear-Gaussian model of 20 latents."""
    latents, copies_of_each, size = 20, 100, 8
    numbers = torch.Generator().manual_seed(0)
    theta = torch.randn(latents, generator=numbers)
    x = (theta + 2**0.5 * torch.randn(size, latents, generator=numbers)).repeat(copies_of_each, 1)
    matrix = torch.eye(latents) / 2 + 0.01 * torch.randn(latents, latents, generator=numbers)
    bias = (theta / 2 + 0.01 * torch.randn(latents, generator=numbers)).expand(copies_of_each, -1).clone()
    bias.requires_grad_()

    def model() -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        with pyro.plate("data", len(x)):
            loc = x @ matrix.T + bias.repeat_interleave(size, 0)
            pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))

    loss = IWELBO(num_particles, gradient=gradient).differentiable_loss(model, guide)
    (found,) = torch.autograd.grad(loss, bias)
    return float((found.mean(0).abs() / found.std(0)).mean())


def test_the_signal_of_dreg_rises_with_the_root_of_the_draws_as_in_the_paper() -> None:
    """Rainforth and others (2018): plain falls with the root of K; Tucker and others (2019): DReG rises with it."""
    dreg, plain = ([signal_to_noise(number, name) for number in (4, 64)] for name in ("dreg", "plain"))
    assert dreg[1] / dreg[0] > 1.5
    assert plain[1] / plain[0] < 0.8
    assert dreg[1] / plain[1] > 20


def test_a_step_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, real = [], IWELBO._run

    def run(*args: Any) -> list[Particles]:
        found = real(*args)
        runs.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(IWELBO, "_run", run)
    guide = AmortizedGuide(poisson)
    SVI(poisson, guide, pyro.optim.Adam({"lr": 0.01}), loss=IWELBO(4)).step(COUNTS)
    gc.collect()
    assert [ref() for ref in runs] == [None]


def test_a_model_that_takes_no_draws_together_gets_them_one_by_one() -> None:
    """Not the error of its own that draws in a further dimension make."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1), obs=x)

    x = torch.randn(6, 3)
    guide = AmortizedGuide(model)
    guide.setup(x)
    values, losses = [], (IWELBO(4), IWELBO(4, vectorize_particles=False))
    with pytest.warns(UserWarning, match="cannot take them together .*vectorize_particles=False"):
        values.append([losses[0].loss(model, guide, x) for _ in range(100)])
    values.append([losses[1].loss(model, guide, x) for _ in range(100)])
    ours, plain = torch.tensor(values)
    assert abs(ours.mean() - plain.mean()) < 4 * (ours.var() / 100 + plain.var() / 100).sqrt()
