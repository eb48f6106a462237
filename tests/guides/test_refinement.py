"""Where refinement leads: optima against closed forms, batches, noise and scales."""

import copy
import math
import warnings
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from refinement_by_hand import (
    ESTIMATORS,
    FAMILIES,
    FAST,
    GRADIENTS,
    KINDS,
    LATENTS,
    REFINING,
    STEPS,
    VAE,
    exact_elbo,
    gradients,
    guide_of_kind,
    kl_from_posterior,
    mean_field_gap,
    mixture,
    pixels,
    refining_guide,
    relative_error,
    semi_amortized,
    small_encoder,
    some_slow,
    svi,
)
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    GradientAscent,
    IterativeAmortizedGuide,
    NaturalGradient,
    SemiAmortizedGuide,
    UpdateRule,
    VariationalFamily,
)
from pyro_amortized.graphs import cache
from pyro_amortized.objective.elbo import LocalObjective


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("estimator", some_slow(["stl"], ESTIMATORS))
def test_refinement_converges_to_the_mean_field_optimum(estimator: str) -> None:
    """Means are exact, as the noise is antithetic; four standard errors for the noise in the last log scales.

    The gradient of a log scale is the mean of K draws with a standard deviation s, below 2 (sqrt(2) for its own
    quadratic part); steps of 0.25 times it contract by a half, so that the error's deviation is 0.29 s / sqrt(K).
    """
    linear, draws = LinearGaussian.random_weights(), 4000
    x = linear.simulate(5)
    guide = SemiAmortizedGuide(
        linear.full, num_steps=80, initial="prior", num_particles=draws, estimator=estimator, keep_best=False
    )
    with torch.no_grad():
        loc, log_scale = guide.variational_parameters(x).chunk(2, -1)
    posterior = linear.posterior(x)
    optimum = -0.5 * torch.linalg.inv(posterior.covariance_matrix).diagonal(dim1=-2, dim2=-1).log()
    tolerance = 4 * 0.29 * 2 / draws**0.5
    torch.testing.assert_close(loc, posterior.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_scale, optimum, rtol=0, atol=tolerance)
    assert (log_scale - posterior.stddev.log()).abs().max() > 3 * tolerance  # the posterior's own are others


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("kind", "family"),
    some_slow([("iterative", "normal"), ("per_datapoint", "multivariate_normal")], KINDS, FAMILIES),
)
def test_every_guide_can_be_refined_to_its_familys_optimum(kind: str, family: str) -> None:
    """Tolerance: what the last steps wander by on 128 draws; Newton's, less. The start is far from that."""
    linear = LinearGaussian.random_weights()
    x = linear.simulate(5)
    guide = guide_of_kind(kind, linear.full, family)
    guide.setup(x)
    steps, update = (40, None) if family == "normal" else (150, Adam(0.1))
    refined = guide.refined(steps, update, num_particles=128)
    assert isinstance(refined, SemiAmortizedGuide)
    with torch.no_grad():
        optimum = mean_field_gap(linear) if family == "normal" else 0.0
        before, after = (kl_from_posterior(linear, x, g, g.variational_parameters(x)) for g in (guide, refined))
    tolerance = 0.03 if family == "normal" else 0.1
    assert (after - optimum).max() < tolerance
    assert (after - optimum).min() > -1e-6
    assert (before - optimum).min() > 3 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_refined_guide_shares_parameters_and_leaves_the_guide_alone(kind: str) -> None:
    x = counts(6)
    options = {"fixed_noise": True} if kind in KINDS[2:] else {}
    guide = guide_of_kind(kind, topics, "normal", init_scale=0.3, **options)
    steps = svi(topics, guide)
    steps.step(x)
    refined = guide.refined(3, Adam(0.05), fixed_noise=True, num_particles=2)
    assert not refined.training
    assert not refined.inference.training
    assert all(module.training for module in guide.modules())
    assert {id(p) for p in refined.parameters()} == {id(p) for p in guide.parameters()}
    before = refined.median(x)
    assert before.keys() == {"rate", "size", "share"}
    assert torch.equal(before["rate"], guide.median(x)["rate"])
    assert not torch.equal(before["size"], guide.median(x)["size"])
    assert torch.equal(before["size"], refined.median(x)["size"])
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()
    assert not torch.equal(before["size"], refined.median(x)["size"])
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert torch.tensor(elbo.loss(topics, refined, x)).isfinite()
    again = guide.refined(3, Adam(0.05), fixed_noise=True, num_particles=2)
    assert torch.equal(again.median(x)["size"], refined.median(x)["size"])


def test_refined_guide_shows_an_encoder_of_ones_own_no_masks() -> None:
    """Only the default encoder sees which observed values are masked, refined or not."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 0), obs=x)

    class Encoder(nn.Module):
        def forward(self, *inputs):
            assert len(inputs) == 1
            return inputs[0].unsqueeze(-1)

    x = torch.randn(5)
    guide = AmortizedGuide(model, Encoder())
    guide.setup(x)
    assert guide.refined(1).median(x)["z"].shape == (5,)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_refined_guide_with_fixed_noise_can_be_repeated_whatever_it_refines(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = guide_of_kind(kind, linear.full, "normal")
    guide.setup(x)
    refined = guide.refined(1, fixed_noise=True, num_particles=2)
    assert torch.equal(refined.variational_parameters(x), refined.variational_parameters(x))


def test_refined_guide_can_be_trained() -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(8)
    guide = AmortizedGuide(linear.full)
    svi(linear.full, guide).step(x)
    refined = guide.refined(3, fixed_noise=True, num_particles=2)
    pyro.clear_param_store()
    before = refined.variational_parameters(x).detach()
    steps = svi(linear.full, refined)
    assert torch.tensor([steps.step(x) for _ in range(3)]).isfinite().all()
    assert not torch.equal(before, refined.variational_parameters(x))


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_keep_best_never_lowers_the_elbo_even_by_steps_that_diverge() -> None:
    """Judged by 512 draws that all candidates share: a tenth of a nat is lost by chance at most."""
    linear = LinearGaussian.random_weights()
    x = linear.simulate(10)
    guide = AmortizedGuide(linear.full)
    guide.setup(x)
    gains = {}
    with torch.no_grad():
        start = exact_elbo(linear, x, guide, guide.variational_parameters(x))
        for name, rule, keep_best in (
            ("diverging", GradientAscent(10.0), True),
            ("converging", NaturalGradient(), True),
            ("not kept", GradientAscent(0.5, 0.0), False),
        ):
            options = {"keep_best": keep_best, "fixed_noise": True, "num_particles": 512}
            refined = guide.refined(3 if name == "not kept" else 10, rule, **options)
            gains[name] = exact_elbo(linear, x, guide, refined.variational_parameters(x)) - start
    assert gains["diverging"].min() > -0.1
    assert gains["converging"].min() > -0.1
    assert gains["converging"].mean() > 1.0
    assert gains["not kept"].min() < -10.0


@pytest.mark.parametrize("kind", GRADIENTS)
def test_divergence_in_training_names_the_datapoints(kind: str) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = SemiAmortizedGuide(
        linear.full, num_steps=30, update=GradientAscent(10.0), encoder_gradient=kind, init_scale=1.0
    )
    guide.setup(x)
    with pytest.raises(ValueError, match=r"latents of 4 datapoints \(first: \[0, 1, 2, 3\]\).*refinement has diverged"):
        svi(linear.full, guide).step(x)
    assert torch.tensor(svi(linear.full, guide).evaluate_loss(x)).isfinite()  # without gradients the best is kept
    guide.eval()
    assert guide.variational_parameters(x).isfinite().all()


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(["unrolled", "distill"], GRADIENTS))
def test_what_is_compared_has_noise_of_its_own(kind: str, noises: list[Any]) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, encoder_gradient=kind, keep_best=None)
    assert guide.inference.keep_best is None
    for training, keep_best, enabled in product((True, False), (None, True, False), (True, False)):
        guide.train(training)
        guide.inference.keep_best = keep_best
        noises.clear()
        with torch.set_grad_enabled(enabled):
            guide.variational_parameters(x)
        compares = keep_best is not False  # in training with the start alone
        assert len(noises) == STEPS + compares, (keep_best, training, enabled)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("family", "kind", "training"),
    some_slow(
        [("normal", "unrolled", True), ("normal", "iterative", False)],
        FAMILIES,
        ["unrolled", "iterative"],
        [False, True],
    ),
)
def test_answers_do_not_depend_on_the_batch(family: str, kind: str, training: bool) -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(10)
    guide = refining_guide(kind, linear.full, family=family, num_steps=3, fixed_noise=True).train(training)
    together = guide.variational_parameters(x).detach()
    with torch.no_grad():
        assert not torch.equal(refined_by(guide, x, 0), refined_by(guide, x, 3))
    for size in (5, 1):
        parts = [guide.variational_parameters(batch).detach() for batch in x.split(size)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-10)
    torch.testing.assert_close(guide.variational_parameters(x.flip(0)).detach().flip(0), together, rtol=0, atol=1e-10)
    guide.inference.fixed_noise = False
    assert (guide.variational_parameters(x).detach() - together).abs().max() > 1e-4


def refined_by(guide: Any, x: Tensor, num_steps: int) -> Tensor:
    before, guide.num_steps = guide.num_steps, num_steps
    phi = guide.variational_parameters(x).detach()
    guide.num_steps = before
    return phi


@pytest.mark.parametrize(
    ("name", "kind", "initial"),
    some_slow(
        [("topics", "unrolled", "encoder"), ("mixture", "unrolled", "prior"), ("mixture", "iterative", "prior")],
        ["topics", "mixture"],
        ["unrolled", "iterative"],
        ["encoder", "prior"],
    ),
)
def test_fixed_noise_leaves_the_global_generator_alone(name: str, kind: str, initial: str) -> None:
    model, x = {"topics": (topics, counts(6)), "mixture": (mixture, torch.randn(6))}[name]
    guide = refining_guide(kind, model, num_steps=2, fixed_noise=True, initial=initial)
    guide.setup(x)
    for call in (lambda: guide.variational_parameters(x), lambda: guide.median(x)):
        before = torch.get_rng_state()
        first = call()
        assert torch.equal(torch.get_rng_state(), before)
        torch.randn(1)
        torch.testing.assert_close(call(), first, rtol=0, atol=0)
    before = torch.get_rng_state()
    guide.inference.fixed_noise = False
    guide.variational_parameters(x)
    assert not torch.equal(torch.get_rng_state(), before)


class OwnNoise(VariationalFamily):
    """A family that draws its own noise."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_params = 2 * latent_dim

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        loc, log_scale = phi.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def test_fixed_noise_holds_for_families_that_draw_their_own() -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(6)
    guide = SemiAmortizedGuide(linear.full, num_steps=3, family=OwnNoise, fixed_noise=True)
    first = guide.variational_parameters(x)
    assert first.isfinite().all()
    torch.testing.assert_close(guide.variational_parameters(x), first)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(FAST, REFINING))
def test_steps_do_not_see_the_scale_of_a_subsampled_plate(kind: str) -> None:
    """phi is the same whatever the full size, and the gradient of what trains the encoder is in proportion to it."""
    vae, x = VAE(), pixels(5)

    def model(x: Tensor, full_size: int) -> None:
        with pyro.plate("data", full_size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z)).to_event(1), obs=x)

    guide = refining_guide(kind, model, encoder=small_encoder(), num_steps=3, fixed_noise=True, num_particles=2)
    results = {}
    for full_size in (5, 1000):
        torch.manual_seed(0)
        phi = guide.variational_parameters(x, full_size).detach()
        torch.manual_seed(1)
        loss = Trace_ELBO().differentiable_loss(model, guide, x, full_size)
        results[full_size] = phi, [loss, *gradients(loss, guide, vae)]
    torch.testing.assert_close(results[1000][0], results[5][0], rtol=0, atol=1e-12)
    assert relative_error(results[1000][1], [200.0 * g for g in results[5][1]]) < 1e-9


def test_switching_between_training_and_evaluation_traces_once_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[None] = []
    original = cache.record

    def counted(*args: Any) -> Any:
        traced.append(None)
        return original(*args)

    monkeypatch.setattr(cache, "record", counted)
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = SemiAmortizedGuide(linear.full, num_steps=2, keep_best=False)
    for mode in (True, False) * 4:
        guide.train(mode).variational_parameters(x)
    assert 1 <= len(traced) <= 2


@pytest.mark.slow
def test_another_model_is_refined_on_its_own_elbo() -> None:
    first, second, x = VAE(), VAE(), pixels()
    for parameter in second.parameters():
        parameter.data.mul_(3.0)
    guide = semi_amortized(first, x, fixed_noise=True)
    for _ in range(6):
        before = guide.variational_parameters(x).detach()
    guide.model = second
    after = guide.variational_parameters(x).detach()
    fresh = semi_amortized(second, x, fixed_noise=True)
    fresh.load_state_dict(guide.state_dict())
    torch.testing.assert_close(after, fresh.variational_parameters(x).detach())
    assert (after - before).abs().max() > 1e-3


# What a start, a shared encoder and a broken datapoint may not do.


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "update", [NaturalGradient(0.3), Adam(0.05), GradientAscent(0.01)], ids=lambda u: type(u).__name__
)
def test_gradients_reach_a_learned_prior_that_refinement_starts_at(update: Any) -> None:
    loc = torch.tensor(0.3, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z.tanh(), 0.5), obs=x)

    x = torch.tensor([0.1, -0.4, 1.0])
    guide = SemiAmortizedGuide(model, num_steps=3, update=update, initial="prior", fixed_noise=True, keep_best=False)
    (gradient,) = torch.autograd.grad(guide.variational_parameters(x).sum(), loc)
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            loc.add_(shift)
            values.append(guide.variational_parameters(x).sum().item())
            loc.sub_(shift)
    assert gradient.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("Guide", [SemiAmortizedGuide, IterativeAmortizedGuide])
def test_datapoints_without_an_elbo_get_no_answer(Guide: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    guide = Guide(model, num_steps=3, initial="prior")
    guide.setup(x)
    guide.eval()
    x[2] = torch.nan
    with pytest.raises(ValueError, match=r"1 datapoints \(first: \[2\]\)"):
        guide.median(x)


def test_keeping_the_best_hides_no_divergence_in_training() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    guide = SemiAmortizedGuide(model, num_steps=8, update=GradientAscent(1.0), keep_best=True, num_particles=4)
    with pytest.raises(ValueError, match="refinement has diverged"):
        svi(model, guide).step(torch.tensor([0.0, 1.0, 2.0, 500.0]))


def test_a_refined_guide_leaves_a_shared_encoder_in_training_alone() -> None:
    x = torch.randn(20, 5)
    encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 3)[:, :5], 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(model, encoder)
    guide.setup(x)
    refined = guide.refined(0)
    before = encoder[1].running_mean.clone()
    assert torch.equal(refined.variational_parameters(x), refined.variational_parameters(x))
    assert torch.equal(before, encoder[1].running_mean)
    assert all(module.training for module in encoder.modules())


def test_a_refined_guide_shares_what_it_cannot_change() -> None:
    linear = LinearGaussian.random_weights()
    guide = AmortizedGuide(linear.full)
    guide.setup(linear.simulate(4))
    with pytest.raises(ValueError, match=r"with other \['family', 'initial'\] because these are shared"):
        guide.refined(3, family="multivariate_normal", initial="prior")


def test_jit_tracing_is_refused() -> None:
    linear = LinearGaussian.random_weights()
    x = linear.simulate(4)
    guide = SemiAmortizedGuide(linear.full, num_steps=2)
    guide.setup(x)
    step = svi(linear.full, guide, JitTrace_ELBO()).step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="inside torch.jit.trace"):
            step(x)


# Models that take no dimension of draws in front


class Shares(nn.Module):
    """Shares along the last dimension, or along dimension 1, which is the last one without a dimension of draws."""

    def __init__(self, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.dim, self.runs = dim, 0
        self.layers = nn.Sequential(nn.Linear(3, 8), norm, nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> None:
        self.runs += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Multinomial(10, self.layers(z).softmax(self.dim)), obs=x)


def shares(dim: int, norm: nn.Module | None = None) -> Any:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = Shares(dim, nn.Identity() if norm is None else norm)
    guide = SemiAmortizedGuide(model, nn.Linear(6, 8), num_steps=3, fixed_noise=True, name=f"shares_{dim}")
    x = dist.Multinomial(10, torch.ones(6)).sample((7,))
    guide.setup(x)
    guide(x)  # finds how draws can be evaluated
    return model, guide, x


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_draws_are_evaluated_as_copies_of_the_datapoints() -> None:
    """In as many runs of the model as with a dimension of draws, with the same losses and gradients."""
    found = []
    for dim in (-1, 1):
        model, guide, x = shares(dim)
        model.runs = 0
        torch.manual_seed(1)
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
        found.append((loss, gradients(loss, guide, model), model.runs))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-9)
    assert relative_error(found[1][1], found[0][1]) < 1e-6
    assert found[0][2] == found[1][2]


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_draws_that_batch_normalisation_mixes_are_not_evaluated_together() -> None:
    """Copies of a datapoint at other draws would matter to it; in evaluation mode they do not."""
    runs = []
    for training in (False, True):
        norm = nn.BatchNorm1d(8)
        model, guide, x = shares(-1, norm)
        model.train(training)
        guide(x)
        model.runs, before = 0, norm.running_mean.clone()
        phi = guide.variational_parameters(x)
        runs.append(model.runs)
        assert phi.isfinite().all()
        assert torch.equal(norm.running_mean, before)
    assert runs[0] < 3 * 8 <= runs[1]


@pytest.mark.usefixtures("_float64")
def test_batch_normalisation_may_go_into_training_behind_a_function() -> None:
    """Draws were evaluated as copies of the datapoints before."""
    norm = nn.BatchNorm1d(8)
    net = Shares(1, norm)

    def model(x: Tensor) -> None:
        net(x)

    guide = SemiAmortizedGuide(model, nn.Linear(6, 8), num_steps=3, fixed_noise=True, keep_best=False)
    x = dist.Multinomial(10, torch.ones(6)).sample((7,))
    guide.setup(x)
    runs = []
    for training in (False, True):
        norm.train(training)
        guide(x)
        net.runs = 0
        guide.variational_parameters(x)
        runs.append(net.runs)
    assert runs[0] < 3 * 8 <= runs[1]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("family", ["normal", "multivariate_normal"])
def test_a_normal_posterior_is_found_exactly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.3, 0.0, 1.2], [1.0, 1.0, 1.0]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights.T, 0.5).to_event(1), obs=x)

    x = torch.randn(20, 4)
    precision = torch.eye(3) + weights.T @ weights / 0.25
    mean = torch.linalg.solve(precision, weights.T @ x.T / 0.25).T
    stddev = precision.diagonal() ** -0.5 if family == "normal" else precision.inverse().diagonal().sqrt()
    guide = AmortizedGuide(model, family=family)
    guide.setup(x)

    def error() -> float:
        with torch.no_grad():
            q = guide.refined(20).posterior(x)
        return max((q.mean - mean).abs().max().item(), (q.stddev - stddev).abs().max().item())

    assert error() < 1e-6
    original = LocalObjective.noise
    monkeypatch.setattr(LocalObjective, "noise", lambda self, phi, number, whiten: original(self, phi, number))
    assert error() > 1e-3, "draws as they come would do"


# Modes, scales and settings


def positions(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_modes_of_what_is_shared_are_those_of_the_guide() -> None:
    dropout = nn.Dropout(0.5)
    guide = AmortizedGuide(positions, nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 8), dropout))
    guide.setup(torch.randn(16))
    refined = guide.refined(2)
    assert not refined.eval().training
    assert guide.training
    assert dropout.training
    guide.eval()
    assert refined.train().training
    assert not dropout.training


@pytest.mark.parametrize("scale", [1 / 64, 5.0, torch.rand(64) + 0.1], ids=["small", "large", "own"])
@pytest.mark.parametrize("update", [NaturalGradient(0.5), GradientAscent(0.1)], ids=["natural", "ascent"])
def test_steps_are_as_long_whatever_the_scale_of_the_model(update: UpdateRule, scale: Any) -> None:
    x, found = torch.randn(64), []
    for model in (positions, poutine.scale(positions, scale)):
        pyro.clear_param_store()
        guide = SemiAmortizedGuide(model, num_steps=10, update=copy.deepcopy(update), initial="prior", fixed_noise=True)
        guide.setup(x)
        found.append(guide.eval().median(x)["z"])
    assert torch.allclose(*found, atol=1e-4)
    assert (found[0] - x / 2).abs().mean() < 0.2


def test_num_steps_set_before_the_first_call_leave_the_steps_as_long() -> None:
    x, found = torch.randn(16), []
    for early in (False, True):
        guide = SemiAmortizedGuide(positions, num_steps=2, name=f"guide_{early}")
        if early:
            guide.num_steps = 20
        guide.setup(x)
        guide.num_steps = 20
        found.append(guide.inference.update.step_size)  # type: ignore[union-attr]
    assert found[0] == found[1]


def test_inference_mode() -> None:
    """A guide may be built in it, and trained afterwards; refinement says what to do."""
    x, guide = torch.randn(16), AmortizedGuide(positions)
    with torch.inference_mode():
        guide.median(x)
    svi(positions, guide).step(x)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"try torch\.no_grad\(\)"):
        guide.refined(2).median(x)
    with torch.no_grad():
        guide.refined(2).median(x)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", some_slow(["anchored", "first_order"], GRADIENTS))
def test_where_the_elbo_has_fallen_training_goes_on_from_the_start(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, x = VAE(), pixels()
    guide = semi_amortized(vae, x, encoder_gradient=kind, keep_best=False)

    def phi() -> Tensor:
        pyro.set_rng_seed(1)
        return guide.variational_parameters(x)

    start, last = guide.inference.initial((x,), None), phi()
    assert not (start == last).any()
    values = iter([torch.zeros(4), torch.tensor([1.0, -1.0, 0.0, math.nan])])
    monkeypatch.setattr(LocalObjective, "value", lambda *_: next(values))
    guide.inference.keep_best = None
    assert torch.equal(phi(), torch.stack([last[0], start[1], last[2], last[3]]))
