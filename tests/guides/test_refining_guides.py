"""Refining guides in everything that Pyro does with a guide: ELBOs, settings, saving, errors."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from pyro.infer import (
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from refinement_by_hand import (
    FAMILIES,
    FAST,
    KINDS,
    OTHERS,
    REFINING,
    guide_of_kind,
    kl_from_posterior,
    mean_field_gap,
    mixture,
    refining_guide,
    some_slow,
    svi,
)
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    GradientAscent,
    IterativeAmortizedGuide,
    LearnedUpdate,
    NaturalGradient,
    SemiAmortizedGuide,
    estimate_gaps,
)

# Everything that Pyro does with a guide


def assert_trains(model: Any, guide: Any, args: Any, elbos: list[Any]) -> None:
    """Every ELBO gives a finite loss and every parameter of the guide a gradient."""
    for Elbo in elbos:
        for vectorized in (False, True):
            elbo = Elbo(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
            guide.zero_grad()
            assert torch.tensor(elbo.loss_and_grads(model, guide, *args)).isfinite()
            named = dict(nn.Module.named_parameters(guide))
            assert named
            for name, parameter in named.items():
                assert parameter.grad is not None, (Elbo, name)
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0 or "global" in name, (Elbo, name)
            assert torch.tensor(elbo.loss(model, guide, *args)).isfinite()


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("plates", "kind"),
    some_slow(
        [*product(["explicit"], REFINING), ("random", "iterative")],
        ["full", "explicit", "random"],
        REFINING,
    ),
)
def test_every_elbo_trains_on_every_plate(plates: str, kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(9)
    args = (x, torch.tensor([7, 2, 4])) if plates == "explicit" else (x,)
    model = getattr(linear, plates)
    guide = refining_guide(kind, model, num_steps=2, encoder=nn.Linear(4, 4))
    assert_trains(model, guide, args, [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])


@pytest.mark.parametrize("kind", some_slow(FAST[2:], REFINING))
def test_every_elbo_trains_with_global_latents(kind: str) -> None:
    guide = refining_guide(kind, topics, num_steps=2, encoder_input=lambda x: x.log1p().reshape(-1, 1))
    assert_trains(topics, guide, (counts(6),), [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])


@pytest.mark.parametrize("kind", some_slow(FAST[1:], REFINING))
def test_enumerated_latents_are_summed_out_in_refinement(kind: str) -> None:
    x = torch.randn(6) + 2.0
    guide = refining_guide(kind, mixture, num_steps=2)
    assert_trains(mixture, guide, (x,), [TraceEnum_ELBO])
    loss = svi(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1)).evaluate_loss(x)
    assert torch.tensor(loss).isfinite()


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_refinement_climbs_the_elbo_of_the_enumerated_model() -> None:
    """Against the mixture's own density, summed by hand: no step from its maximum over a grid would be uphill."""
    x = torch.tensor([0.0, 1.5, 4.0])
    guide = SemiAmortizedGuide(mixture, num_steps=200, initial="prior", num_particles=512, fixed_noise=True)
    with torch.no_grad():
        loc, log_scale = guide.variational_parameters(x).unbind(-1)
    z = torch.linspace(-10, 10, 4001).unsqueeze(-1)
    parts = [w * dist.Normal(z + shift, 1.0).log_prob(x).exp() for w, shift in ((0.3, 0.0), (0.7, 3.0))]
    log_joint = (parts[0] + parts[1]).log() + dist.Normal(0.0, 1.0).log_prob(z)

    def elbo(loc: Tensor, log_scale: Tensor) -> Tensor:
        q = dist.Normal(loc, log_scale.exp())
        density = q.log_prob(z).exp() * (z[1] - z[0])
        return (density * (log_joint - q.log_prob(z))).sum(0)

    at = elbo(loc, log_scale)
    for shift in (0.3, -0.3):
        assert (elbo(loc + shift, log_scale) < at + 1e-3).all()
        assert (elbo(loc, log_scale + shift) < at + 1e-3).all()
    start = elbo(torch.zeros(3), torch.zeros(3))
    assert (at >= start - 1e-3).all()
    assert (at - start).max() > 0.05


@pytest.mark.parametrize("kind", some_slow(FAST[1:], REFINING))
def test_training_lowers_the_loss(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(16)
    guide = refining_guide(kind, linear.full, num_steps=2)
    steps = svi(linear.full, guide, Trace_ELBO(num_particles=4, vectorize_particles=True), lr=0.005)
    losses = torch.tensor([steps.step(x) for _ in range(30)])
    assert losses.isfinite().all()
    assert losses[-10:].mean() < losses[:5].mean()
    assert steps.evaluate_loss(x) < losses[:5].mean()


@pytest.mark.parametrize(
    ("kind", "parallel"),
    some_slow([("unrolled", False), ("iterative", True)], ["unrolled", "initial", "iterative"], [False, True]),
)
def test_predictive_and_calls_without_gradients(kind: str, parallel: bool) -> None:
    x = counts(6)
    guide = refining_guide(kind, topics, num_steps=2)
    guide.setup(x)
    samples = Predictive(topics, guide=guide, num_samples=3, parallel=parallel)(x)
    assert samples["share"].reshape(3, 6, 3).sum(-1).sub(1).abs().max() < 1e-5
    assert samples["size"].reshape(3, 6).std(0).min() > 0
    with torch.no_grad():
        values = guide(x)
        assert not guide.variational_parameters(x).requires_grad
    assert not any(value.requires_grad for value in values.values())
    assert guide.variational_parameters(x).requires_grad == (kind != "initial")  # which trains the encoder otherwise


# Settings


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(FAST, REFINING))
def test_num_steps_may_be_changed_at_any_time_and_zero_gives_the_start(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(5)
    guide = refining_guide(kind, linear.full, num_steps=4, fixed_noise=True, keep_best=False, initial="encoder")
    guide.num_steps = 0
    start = guide.variational_parameters(x)
    assert torch.equal(start, guide.inference.initial((x,), None))
    phis = [start]
    for count in (1, 2, 7):
        guide.num_steps = count
        assert guide.num_steps == guide.inference.num_steps == count
        phis.append(guide.variational_parameters(x))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(phis, phis[1:], strict=False))
    guide.num_steps = 2
    torch.testing.assert_close(guide.variational_parameters(x), phis[2])
    assert torch.tensor(svi(linear.full, guide).step(x)).isfinite()


@pytest.mark.parametrize("value", [-1, 2.0, True, None, "3"])
@pytest.mark.parametrize("kind", ["unrolled", "iterative"])
def test_num_steps_must_be_a_count(kind: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"num_steps=.* because it must be an integer of at least 0"):
        refining_guide(kind, topics, num_steps=value)
    if kind != "iterative" or value is not None:  # which chooses for itself
        with pytest.raises(ValueError, match=r"num_particles=.* because it must be an integer of at least 1"):
            refining_guide(kind, topics, num_particles=value)
    guide = refining_guide(kind, topics, num_steps=1)
    for ready in (False, True):
        if ready:
            guide.setup(counts(4))
        with pytest.raises(ValueError, match="must be an integer of at least 0"):
            guide.num_steps = value
        assert guide.num_steps == 1


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_prior_start_is_the_prior(family: str) -> None:
    def model(x: Tensor, loc: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            y = pyro.sample("y", dist.Normal(2.0 * z[..., 0], 3.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    x, loc, log_scale = torch.randn(5), torch.randn(5, 2), torch.randn(5, 2)
    guide = SemiAmortizedGuide(model, num_steps=0, initial="prior", family=family)
    q = guide.posterior(x, loc, log_scale.exp())
    expected = torch.cat([loc, 2.0 * loc[:, :1]], -1), torch.cat([log_scale.exp(), torch.full((5, 1), 3.0)], -1)
    torch.testing.assert_close(q.mean, expected[0])
    if family != "low_rank_multivariate_normal":  # which starts with a small factor beside
        torch.testing.assert_close(q.stddev, expected[1])
    linear = LinearGaussian.random_weights()
    guide = SemiAmortizedGuide(linear.full, num_steps=0, initial="prior", name="standard")
    assert torch.equal(guide.variational_parameters(linear.simulate(4)), torch.zeros(4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_slow(["unrolled"], ["unrolled", "iterative"]))
def test_prior_start_serves_constrained_latents(kind: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            part = pyro.sample("part", dist.Beta(2.0, 5.0))
            heavy = pyro.sample("heavy", dist.Cauchy(0.0, 1.0))  # without moments
            pyro.sample("x", dist.Normal(rate * share[..., 0] + part + 0.1 * heavy, 0.3), obs=x)

    x = torch.rand(6)
    guide = refining_guide(kind, model, num_steps=0, initial="prior")
    median = guide.median(x)
    torch.testing.assert_close(median["rate"], torch.full((6,), 1.5))
    torch.testing.assert_close(median["share"], (torch.tensor([1.0, 2.0, 3.0]) / 6).expand(6, 3))
    torch.testing.assert_close(median["part"], torch.full((6,), 2 / 7))
    torch.testing.assert_close(median["heavy"], torch.zeros(6))
    slopes = 1.5, 2 / 7 * 5 / 7  # of exp and the logistic function
    scales = dist.Gamma(3.0, 2.0).stddev / slopes[0], dist.Beta(2.0, 5.0).stddev / slopes[1]
    found = guide.posterior(x).stddev[0]
    assert guide.layout is not None
    torch.testing.assert_close(found[0], scales[0])
    torch.testing.assert_close(found[3], scales[1])
    guide.num_steps = 3
    assert torch.tensor([svi(model, guide).step(x) for _ in range(3)]).isfinite().all()


def test_prior_start_needs_no_encoder_and_no_data_of_its_own() -> None:
    linear = LinearGaussian.random_weights()
    guide = SemiAmortizedGuide(linear.full, num_steps=3, initial="prior", num_particles=16)
    x = linear.simulate(8)
    assert torch.tensor(Trace_ELBO().loss(linear.full, guide, x)).isfinite()
    assert not list(guide.parameters())


# Saving


def saved(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


LINEAR = LinearGaussian.random_weights()


def unsaved(kind: str, model: Any) -> Any:
    rule = {} if kind == "iterative" else {"update": Adam(0.05, learned=kind == "unrolled")}
    return refining_guide(kind, model, num_steps=2, fixed_noise=True, **rule)


def trained(kind: str, model: Any, x: Tensor) -> Any:
    guide = unsaved(kind, model)
    steps = svi(model, guide, lr=0.002)
    for _ in range(3):
        steps.step(x)
    return guide


@pytest.mark.parametrize(
    ("kind", "setup"), some_slow([("unrolled", True), ("iterative", False)], ["unrolled", "iterative"], [False, True])
)
def test_state_dict_restores_every_answer(kind: str, setup: bool) -> None:
    x = LINEAR.simulate(8)
    guide = trained(kind, LINEAR.full, x)
    other = unsaved(kind, LINEAR.full)
    pyro.clear_param_store()
    if setup:
        other.setup(x)
        assert not torch.equal(other.median(x)["z"], guide.median(x)["z"])
        pyro.clear_param_store()
    state = saved(guide.state_dict())
    assert ("inference.update.log_step_size" in state) == (kind == "unrolled")
    assert any("inference.update.network" in name for name in state) == (kind == "iterative")
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    answer = other.median(x)["z"]
    pyro.clear_param_store()
    assert torch.equal(answer, guide.median(x)["z"])
    assert list(other.state_dict()) == list(state)


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "saved": lambda g: saved(g, weights_only=False),
    "pickled": lambda g: pickle.loads(pickle.dumps(g)),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize(
    ("kind", "duplicate"),
    some_slow([("iterative", "saved")], ["unrolled", "iterative"], list(DUPLICATES)),
)
def test_whole_guide_is_saved_and_copied(kind: str, duplicate: str) -> None:
    x = LINEAR.simulate(8)
    guide = trained(kind, LINEAR.full, x)
    other = DUPLICATES[duplicate](guide)
    if duplicate != "copied":
        with pytest.raises(ValueError, match="guide.model = model"):
            other.median(x)
        other.model = LINEAR.full
    before = other.median(x)["z"]
    assert torch.equal(before, guide.median(x)["z"])
    steps = svi(LINEAR.full, guide, lr=0.01)
    assert torch.tensor([steps.step(x) for _ in range(2)]).isfinite().all()  # the original goes on, on its own
    assert torch.equal(before, other.median(x)["z"])
    assert not torch.equal(before, guide.median(x)["z"])
    pyro.clear_param_store()
    assert torch.tensor(svi(LINEAR.full, other, lr=0.002).step(LINEAR.simulate(5))).isfinite()
    other.num_steps = 1
    assert other.inference.num_steps == 1
    assert guide.num_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distill", "iterative"])
def test_guide_with_global_latents_is_saved_and_copied(kind: str) -> None:
    x = counts(8)
    guide = trained(kind, topics, x)
    for duplicate in DUPLICATES.values():
        other = duplicate(guide)
        other.model = topics
        torch.testing.assert_close(other.median(x), guide.median(x), rtol=0, atol=0)
    other = unsaved(kind, topics)
    other.load_state_dict(saved(guide.state_dict()))
    expected = guide.median(x)
    pyro.clear_param_store()
    torch.testing.assert_close(other.median(x), expected, rtol=0, atol=0)


# Gaps


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", ["unrolled", pytest.param("iterative", marks=pytest.mark.slow)])
def test_refinement_narrows_the_amortization_gap(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(12)
    guide = refining_guide(kind, linear.full, initial="encoder", num_steps=6, num_particles=16)
    steps = svi(linear.full, guide, lr=0.01)
    for _ in range(20 if kind == "iterative" else 5):
        steps.step(x)
    gaps = {}
    for count in (0, 6):
        guide.num_steps = count
        estimate = estimate_gaps(linear.full, guide, (x,)).dataset
        gaps[count] = estimate["amortization_gap"]
        assert estimate["reliable"].all()
        assert abs(float(estimate["approximation_gap"].mean()) - mean_field_gap(linear)) < 0.05
        with guide.repeatable():  # the answers that the estimate is of
            exact = kl_from_posterior(linear, x, guide, guide.variational_parameters(x)).mean().item()
        assert abs(float(gaps[count].mean()) + mean_field_gap(linear) - exact) < (0.05 if count == 0 else 0.2)
    assert float(gaps[6].mean()) < 0.5 * float(gaps[0].mean())


# Errors


@pytest.mark.parametrize("wrong", [0.1, "adam", Adam, torch.optim.Adam])
def test_what_is_no_update_rule_is_refused(wrong: Any) -> None:
    for kind in REFINING:
        Guide = IterativeAmortizedGuide if kind == "iterative" else SemiAmortizedGuide
        options = {} if kind == "iterative" else {"encoder_gradient": kind}
        with pytest.raises(ValueError, match="because it is not an update rule; try pyro_amortized.NaturalGradient"):
            Guide(topics, update=wrong, **options)


def test_wrong_settings_are_refused() -> None:
    def refused(pattern: str, Guide: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=pattern):
            Guide(topics, *args, **options)

    for Guide in (SemiAmortizedGuide, IterativeAmortizedGuide):
        refused(r"Cannot start at 'zero' because there is no such start; try initial=", Guide, initial="zero")
        refused(r"estimate gradients by 'reinforce' because it is none of .*; try 'stl'", Guide, estimator="reinforce")
        refused("not a torch.nn.Module instance", Guide, lambda x: x)
        refused("init_scale=0", Guide, init_scale=0)
        refused("no variational family has that name", Guide, family="gamma")
    refused("encoder_gradient='exact' because it is none of", SemiAmortizedGuide, encoder_gradient="exact")
    for rule in (LearnedUpdate(), LearnedUpdate):
        refused("because it (has to be trained|is not an update rule)", SemiAmortizedGuide, update=rule)
    for rule in (GradientAscent(), Adam(), NaturalGradient()):
        refused(r"IterativeAmortizedGuide because there is nothing to learn", IterativeAmortizedGuide, update=rule)
    for kind in OTHERS:
        refused("learn the step size", SemiAmortizedGuide, update=Adam(learned=True), encoder_gradient=kind)
    SemiAmortizedGuide(topics, update=Adam(learned=True))
    refused('Cannot use an encoder with initial="prior"', SemiAmortizedGuide, nn.Linear(1, 2), initial="prior")


@pytest.mark.parametrize("kind", ["unrolled", "iterative"])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_what_only_the_normal_family_has_is_refused_for_others(family: str, kind: str) -> None:
    linear = LinearGaussian.random_weights()
    guide = refining_guide(kind, linear.full, family=family, estimator="analytic_kl")
    with pytest.raises(ValueError, match=r"by 'analytic_kl' because there is no closed form.*; try estimator="):
        guide(linear.simulate(4))
    if kind == "unrolled":
        guide = SemiAmortizedGuide(linear.full, family=family, update=NaturalGradient(), name="natural")
        with pytest.raises(ValueError, match="because its Fisher information is only known"):
            guide(linear.simulate(4))


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_guide_with_local_latents_that_is_set_up_can_be_refined(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = guide_of_kind(kind, linear.full, "normal")
    with pytest.raises(ValueError, match="it has not been set up"):
        guide.refined(3)
    guide.setup(x)
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ValueError, match="guide.model = model"):
        other.refined(3)
    with pytest.raises(ValueError, match="LearnedUpdate in SemiAmortizedGuide"):
        guide.refined(3, LearnedUpdate())

    def global_only(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    guide = guide_of_kind(kind, global_only, "normal", name="global_only")
    guide.setup(x[:, 0])
    with pytest.raises(ValueError, match="no local latents"):
        guide.refined(3)


def test_iterative_guide_needs_features() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :3], x[:, :3].exp()

    linear = LinearGaussian.random_weights()
    with pytest.raises(ValueError, match="the update network needs features"):
        IterativeAmortizedGuide(linear.full, Pair())(linear.simulate(4))
    guide = SemiAmortizedGuide(linear.full, Pair(), num_steps=2)  # for which a pair is as good a start as any
    assert torch.tensor(Trace_ELBO().loss(linear.full, guide, linear.simulate(4))).isfinite()


@pytest.mark.slow
def test_learned_update_serves_one_guide() -> None:
    rule, linear = LearnedUpdate((8,)), LinearGaussian.random_weights()
    IterativeAmortizedGuide(linear.full, update=rule)(linear.simulate(4))
    with pytest.raises(ValueError, match="a new LearnedUpdate for each guide"):
        IterativeAmortizedGuide(topics, update=rule, name="other")(counts(4))
