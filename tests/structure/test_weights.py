"""Local latents that the model masks or scales: the guide's ELBO leaves out, and scales, what the model does."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from torch import Tensor

from pyro_amortized import (
    AmortizedGuide,
    IterativeAmortizedGuide,
    MLPEncoder,
    NaturalGradient,
    PerDatapointGuide,
    SemiAmortizedGuide,
    estimate_gaps,
    optimize_local,
)

pytestmark = pytest.mark.usefixtures("_float64")

SIZE, WIDTH = 6, 3
ELBOS = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO]
FAMILIES = ["normal", "multivariate_normal"]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    present = torch.rand(SIZE, WIDTH, generator=generator) < 0.6
    assert 0 < present.sum() < present.numel()
    return torch.randn(SIZE, WIDTH, generator=generator), present


def within(x: Tensor, present: Tensor) -> None:
    """A mask inside of the event, as in a deep Markov model with ragged sequences."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(WIDTH), 1.0).mask(present).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).mask(present).to_event(1), obs=x)


def sequence(x: Tensor, present: Tensor) -> None:
    """A mask for each site."""
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(WIDTH)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0).mask(present[:, t]))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(present[:, t]), obs=x[:, t])


def handler(x: Tensor, present: Tensor) -> None:
    """A mask in an inner plate, from a handler."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", WIDTH, dim=-1), poutine.mask(mask=present):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


MASKED = [within, sequence, handler]


def exact_guide(model: Any, family: str, x: Tensor, present: Tensor, **options: Any) -> Any:
    """q is the posterior N(x/2, 1/2) of each entry that is present, and anything for the others."""
    guide = PerDatapointGuide(model, family=family, **options)
    guide.setup(x, present)
    with torch.no_grad():
        table = guide.inference.table
        rest = torch.zeros(len(x), table.shape[1] - 2 * WIDTH)
        scale = torch.full_like(x, -0.5 * math.log(2.0))
        other = (torch.ones_like(x), torch.full_like(x, 0.3)) if family == "normal" else (torch.zeros_like(x),) * 2
        loc, scale = torch.where(present, x / 2, other[0]), torch.where(present, scale, other[1])
        table.copy_(torch.cat([loc, scale, rest], -1))
    return guide


def log_evidence(x: Tensor, present: Tensor) -> Tensor:
    return (dist.Normal(0.0, math.sqrt(2.0)).log_prob(x) * present).sum(-1)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("Elbo", ELBOS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model", MASKED)
def test_exact_posterior_gives_the_evidence_of_what_is_present(
    model: Any, family: str, Elbo: Any, vectorized: bool
) -> None:
    x, present = data()
    guide = exact_guide(model, family, x, present)
    elbo = Elbo(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=2)
    noise = 0.2 if Elbo is TraceMeanField_ELBO and family == "normal" else 1e-10  # its KL has another variance
    for seed in range(3):
        pyro.set_rng_seed(seed)
        value = -elbo.loss(model, guide, x, present)
        assert value == pytest.approx(log_evidence(x, present).sum().item(), abs=30 * noise if noise > 0.1 else noise)


def test_unmasked_entropy_does_not_give_the_evidence() -> None:
    """The twin: a guide that ignores the mask."""
    x, present = data()

    def guide(x: Tensor, present: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)).to_event(1))

    assert abs(-Trace_ELBO().loss(within, guide, x, present) - log_evidence(x, present).sum().item()) > 1e-3


@pytest.mark.parametrize(
    ("model", "family"), [(within, "normal"), (sequence, "multivariate_normal"), (within, "flow"), (handler, "normal")]
)
def test_refinement_and_diagnostics_under_masks(model: Any, family: str) -> None:
    x, present = data()
    guide = PerDatapointGuide(model, family=family, init_scale=0.5)
    guide.setup(x, present)
    exact = log_evidence(x, present)
    gaps = estimate_gaps(model, guide, (x, present)).dataset
    error = torch.as_tensor(gaps["log_evidence"].values) - exact
    assert (error.abs() < 5 * torch.as_tensor(gaps["log_evidence_se"].values) + 1e-6).all()
    optimum = optimize_local(model, guide, (x, present))
    closed = torch.as_tensor(gaps["elbo_optimal"].values) - exact
    assert closed.abs().max() < (1e-4 if family == "normal" else 0.02)
    assert torch.as_tensor(optimum.phi).isfinite().all()
    refined = guide.refined(60)
    value = -Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=2).loss(
        model, refined, x, present
    )
    before = -Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=2).loss(
        model, guide, x, present
    )
    assert before < value < exact.sum().item() + 0.1
    assert exact.sum().item() - value < 0.35 * (exact.sum().item() - before)


@pytest.mark.slow
def test_mask_on_constrained_latents() -> None:
    """A masked simplex: the evidence is that of the datapoints that are present."""

    def model(x: Tensor, present: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=present):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(WIDTH)))
            pyro.sample("x", dist.Categorical(share), obs=x)

    x, present = torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, True, False])
    for family in FAMILIES:
        guide = PerDatapointGuide(model, family=family, name=family)
        guide.setup(x, present)
        gaps = estimate_gaps(model, guide, (x, present)).dataset
        expected = torch.where(present, math.log(1 / 3), 0.0)
        error = torch.as_tensor(gaps["log_evidence"].values) - expected
        assert (error.abs() < 5 * torch.as_tensor(gaps["log_evidence_se"].values) + 1e-6).all()
        loss = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1).loss(
            model, guide, x, present
        )
        assert -loss == pytest.approx(gaps["elbo"].values.sum(), abs=0.1)


def test_parts_of_constrained_events_cannot_be_masked() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).mask(torch.tensor([True, False])).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match="parts of its events are masked"):
        AmortizedGuide(model)(torch.zeros(3))


# Missing observations.


def missing(x: Tensor, present: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", WIDTH, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=present)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_observations_are_latent(family: str) -> None:
    x, present = data()
    guide = PerDatapointGuide(missing, family=family)
    guide.setup(x, present)
    assert guide.layout.latent_dim == 1 + WIDTH
    gaps = estimate_gaps(missing, guide, (x, present)).dataset
    for row in range(SIZE):
        seen = x[row, present[row]]
        covariance = torch.eye(len(seen)) + 1.0
        exact = dist.MultivariateNormal(torch.zeros(len(seen)), covariance).log_prob(seen) if len(seen) else 0.0
        error = abs(gaps["log_evidence"].values[row] - float(exact))
        assert error < 5 * gaps["log_evidence_se"].values[row] + 1e-6
        if family == "multivariate_normal":
            assert gaps["elbo_optimal"].values[row] == pytest.approx(float(exact), abs=0.01)


def test_missing_discrete_observations_are_masked_instead() -> None:
    """Pyro's obs_mask makes them latents, which no guide of these can draw."""

    def model(x: Tensor, present: Tensor, masked: bool) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", WIDTH, dim=-1):
                fn = dist.Bernoulli(logits=z.expand(x.shape))
                if masked:
                    pyro.sample("x", fn.mask(present), obs=x)
                else:
                    pyro.sample("x", fn, obs=x, obs_mask=present)

    x, present = data()
    x = (x > 0).to(x)
    with pytest.raises(ValueError, match=r"_unobserved' .*; try a mask in the place of obs_mask, `fn.mask\(present\)`"):
        AmortizedGuide(model)(x, present, False)
    guide = AmortizedGuide(model, name="masked")
    other = torch.where(present, x, 1 - x)
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(model, guide, x, present, True)))
    assert torch.equal(guide.median(x, present, True)["z"], guide.median(other, present, True)["z"])


def test_encoder_sees_zeros_and_the_mask() -> None:
    x, present = data()
    seen = {}

    class Encoder(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            seen["inputs"] = inputs
            return inputs[0]

    AmortizedGuide(missing, Encoder(), name="own")(x, present)
    assert len(seen["inputs"]) == 1
    assert torch.equal(seen["inputs"][0], x.masked_fill(~present, 0.0))
    guide = AmortizedGuide(missing, name="default")
    other = x.masked_fill(~present, 100.0)
    assert torch.equal(guide.variational_parameters(x, present), guide.variational_parameters(other, present))
    (level,) = [level for level in guide.inference.encoder.levels if level.inputs]
    assert level.masks == (0,)


@pytest.mark.thinned
@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide])
@pytest.mark.parametrize("model", [*MASKED, missing])
def test_masks_may_change_in_every_call(model: Any, Guide: Any) -> None:
    x, present = data()
    guide = Guide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=2))
    for k in range(3):
        assert math.isfinite(svi.step(x, present.roll(k, 0)))
    phi = guide.variational_parameters(x, present)
    flat = guide._structures.read(model, (x, present), {}).layout.present
    assert torch.equal(phi[:, : flat.shape[1]][~flat], torch.zeros(int((~flat).sum())))


# Scales.


def annealed(x: Tensor, beta: Any) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _in_draws(fn: Any, *args: Any) -> Any:
    with pyro.plate("draws", 1000, dim=-2):
        return fn(*args)


@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3), torch.linspace(0.1, 0.9, SIZE)])
@pytest.mark.parametrize("Elbo", ELBOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_latents_are_scaled_in_the_guide(family: str, Elbo: Any, beta: Any) -> None:
    """As a guide written by hand under the same scale, at the same draws."""
    if isinstance(beta, Tensor):
        beta = beta.double()
    x = data()[0][:, 0]
    guide = PerDatapointGuide(annealed, family=family, init_scale=0.5)
    guide.setup(x, beta)
    loc, log_scale = guide.inference.table.detach()[:, :2].T

    def by_hand(x: Tensor, beta: Any) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    elbo = Elbo(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)

    def value(candidate: Any) -> float:
        with pyro.plate("draws", 1000, dim=-2):
            draws = poutine.trace(guide).get_trace(x, beta)
        return Elbo(max_plate_nesting=2).loss(
            lambda *args: _in_draws(annealed, *args), poutine.replay(lambda *args: _in_draws(candidate, *args), draws),
            x, beta,
        )  # fmt: skip

    pyro.set_rng_seed(3)
    first = value(guide)
    pyro.set_rng_seed(3)
    assert first == pytest.approx(value(by_hand), rel=1e-10 if Elbo is not TraceMeanField_ELBO else 0.1)
    unscaled = PerDatapointGuide(annealed, family=family, init_scale=0.5, name="unscaled")
    unscaled.setup(x, 1.0)
    without = elbo.loss(annealed, lambda x, beta: unscaled(x, 1.0), x, beta)
    assert abs(without - elbo.loss(annealed, by_hand, x, beta)) > 0.5  # the twin that ignores the scale


@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3), torch.linspace(0.1, 0.9, SIZE)])
def test_refinement_climbs_the_scaled_elbo(beta: Any) -> None:
    """Its maximum is known: q(z) is proportional to p(z) p(x | z)^(1 / beta)."""
    if isinstance(beta, Tensor):
        beta = beta.double()
    x = data()[0][:, 0]
    guide = SemiAmortizedGuide(annealed, num_steps=300, update=NaturalGradient(0.5), num_particles=64).eval()
    for scale in (beta, beta / 2):
        phi = guide.variational_parameters(x, scale)
        precision = 1 + 1 / torch.as_tensor(scale)
        assert torch.allclose(phi[:, 0], x / torch.as_tensor(scale) / precision, atol=0.02)
        assert torch.allclose(phi[:, 1].exp(), precision.rsqrt().expand(SIZE), rtol=0.03)


def test_annealing_reaches_one_in_the_middle_of_training() -> None:
    x = data()[0][:, 0]
    guide = AmortizedGuide(annealed)
    svi = SVI(annealed, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    for step in range(6):
        beta = min(1.0, 0.2 * (step + 1))
        guide_trace = poutine.trace(guide).get_trace(x, beta)
        assert torch.as_tensor(guide_trace.nodes["z"]["scale"]) == pytest.approx(beta)
        assert math.isfinite(svi.step(x, beta))


def test_a_scale_held_by_the_model_is_read_anew() -> None:
    class Model:
        beta = 1.0

        def __init__(self) -> None:
            self.beta = 1.0

        def __call__(self, x: Tensor) -> None:
            annealed(x, self.beta)

    model, x = Model(), data()[0][:, 0]
    guide = AmortizedGuide(model)
    for beta in (1.0, 0.5, 0.25):
        model.beta = beta
        assert poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == pytest.approx(beta)


def different(x: Tensor) -> None:
    """Sites of scales of their own, as in scvi-tools' Decipher."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with poutine.scale(scale=0.5):
            b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(a.sum(-1) + b, 1.0), obs=x)


@pytest.mark.parametrize("family", ["multivariate_normal", "low_rank_multivariate_normal"])
@torch.no_grad()
def test_sites_scaled_differently_count_by_their_conditionals(family: str) -> None:
    """The loss is that of the chain rule by hand, sum_i s_i (log p_i - log q(z_i | z_<i)), at the same draws."""
    x = data()[0][:, 0]
    guide = PerDatapointGuide(different, family=family, init_scale=0.5)
    guide.setup(x)
    with torch.no_grad():
        guide.inference.table.add_(0.3 * torch.randn_like(guide.inference.table))
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(x)
        q, a, b = guide.posterior(x), trace.nodes["a"]["value"], trace.nodes["b"]["value"]
    log_q_a = dist.MultivariateNormal(q.mean[:, :2], q.covariance_matrix[:, :2, :2]).log_prob(a)
    log_q_b = q.log_prob(torch.cat([a, b.unsqueeze(-1)], -1)) - log_q_a
    log_p_a = dist.Normal(0.0, 1.0).log_prob(a).sum(-1)
    log_p_b, log_p_x = dist.Normal(a.sum(-1), 1.0).log_prob(b), dist.Normal(a.sum(-1) + b, 1.0).log_prob(x)
    elbo = (log_p_x + log_p_a - log_q_a + 0.5 * (log_p_b - log_q_b)).sum()
    found = Trace_ELBO().loss(different, poutine.replay(guide, trace), x)
    assert found == pytest.approx(-float(elbo), rel=1e-10)
    assert abs(found + float((log_p_x + log_p_a + 0.5 * log_p_b - log_q_a - log_q_b).sum())) > 0.1  # no other scale


@pytest.mark.parametrize("one", [torch.tensor(1.0), torch.ones(SIZE), 0.5 * torch.tensor(2.0)])
def test_a_scale_of_one_is_none(one: Tensor) -> None:
    x = data()[0][:, 0]
    guide = AmortizedGuide(annealed)
    guide(x, one)
    assert not guide._structures.look(annealed, (x, one), {}).is_weighted
    assert not guide._structures.look(annealed, (x, 0.9 * one), {}).is_fixed
    assert bool(estimate_gaps(annealed, guide, (x, one), tolerance=0.2).dataset["reliable"].all())


def test_scales_that_cannot_be_used_are_refused() -> None:
    x = data()[0][:, 0]
    assert math.isfinite(Trace_ELBO().loss(different, AmortizedGuide(different), x))
    with pytest.raises(ValueError, match="scales its local sites 'a' and 'b' differently"):
        SemiAmortizedGuide(different)(x)
    with pytest.raises(ValueError, match="scales its local sites 'a' and 'b' differently"):
        SemiAmortizedGuide(different, family="multivariate_normal", name="joint")(x)
    with pytest.raises(ValueError, match=r"one Flow because the model scales sites \['a', 'b'\].*differently"):
        AmortizedGuide(different, family="flow", name="flow")(x)
    AmortizedGuide(different, name="remedy")(x)
    guide = AmortizedGuide(annealed, name="annealed")
    with pytest.raises(ValueError, match="scales local site 'z' by 0.5.*no density"):
        estimate_gaps(annealed, guide, (x, 0.5))
    with pytest.raises(ValueError, match="'z' by as much itself"), poutine.scale(scale=0.5):
        guide(x, 0.5)
    with poutine.scale(scale=0.1):
        guide(x, 0.5)


def test_masks_and_scales_of_global_latents() -> None:
    """Maximum likelihood by a masked prior, and a model scaled as a whole."""
    x, y = data()[0][:, 0], data()[0][:, 1]

    def model(x: Tensor, y: Tensor, prior: bool, scale: float) -> None:
        with poutine.scale(scale=scale):
            with poutine.mask(mask=prior):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)

    guide = AmortizedGuide(model)
    trace = poutine.trace(guide).get_trace(x, y, False, 0.5)
    trace.compute_log_prob()
    assert trace.nodes["w"]["log_prob_sum"] == 0
    unscaled = trace.nodes["z"]["fn"].log_prob(trace.nodes["z"]["value"]).sum()
    assert trace.nodes["z"]["log_prob_sum"].item() == pytest.approx(0.5 * unscaled.item())
    trace = poutine.trace(guide).get_trace(x, y, True, 0.5)
    trace.compute_log_prob()
    unscaled = trace.nodes["w"]["fn"].log_prob(trace.nodes["w"]["value"]).sum()
    assert trace.nodes["w"]["log_prob_sum"].item() == pytest.approx(0.5 * unscaled.item())
    AmortizedGuide(model, global_guide=AutoDelta, name="delta")(x, y, False, 0.5)
    with pytest.raises(ValueError, match="jointly.*AutoNormal"):
        AmortizedGuide(model, global_guide=AutoDiagonalNormal, name="joint")(x, y, False, 0.5)


def test_entries_of_a_global_event_that_are_masked_count_in_neither_model_nor_guide() -> None:
    present = torch.tensor([True, False, True])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(present).to_event(1))
        pyro.sample("x", dist.Normal(z[present].sum(), 1.0), obs=torch.tensor(1.0))

    guide = AmortizedGuide(model)
    trace = poutine.trace(guide).get_trace()
    loc, scale = (getattr(guide.global_guide, name).z.detach() for name in ("locs", "scales"))
    z = trace.nodes["z"]["value"].detach()
    terms = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(loc, scale).log_prob(z)
    expected = terms[present].sum() + dist.Normal(z[present].sum(), 1.0).log_prob(torch.tensor(1.0))
    assert Trace_ELBO().loss(model, poutine.replay(guide, trace)) == pytest.approx(-float(expected), rel=1e-10)
    assert abs(terms[1]) > 1e-3, "the masked entry would not show"


def test_a_mask_costs_one_run_of_the_model() -> None:
    x, present = data()
    runs = []

    def counted(x: Tensor, present: Tensor) -> None:
        runs.append(1)
        within(x, present)

    guide = AmortizedGuide(counted, MLPEncoder(WIDTH), encoder_input="x")
    svi = SVI(counted, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, present)
    runs.clear()
    svi.step(x, present)
    assert len(runs) == 2  # masks are looked up before the latents are drawn
