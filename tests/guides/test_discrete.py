"""Discrete local latents in the guide, against exact enumeration by hand in float64."""

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, DiscreteAmortizedGuide, MLPEncoder
from pyro_amortized.structure.discrete import discrete_sites, distribution
from pyro_amortized.structure.plates import probe

pytestmark = pytest.mark.usefixtures("_float64")

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
CENTRES = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)


def data(size: int = 6) -> Tensor:
    return torch.linspace(-4.0, 3.0, size)


def mixture(x: Tensor) -> None:
    """y_n ~ Categorical, x_n ~ Normal(centre of y_n, 1)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(CENTRES[y], 1.0), obs=x)


def one_hot_mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(WEIGHTS))
        pyro.sample("x", dist.Normal(y @ CENTRES, 1.0), obs=x)


def coin(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2.0 * y, 1.0), obs=x)


def semi_supervised(x: Tensor, y: Tensor | None = None) -> None:
    """z_n depends on y_n in the posterior: x_n ~ Normal(centre of y_n + z_n, 1/2)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), obs=y)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(CENTRES[y] + z, 0.5), obs=x)


def binary_code(x: Tensor) -> None:
    """x_n (4,) from three Bernoulli variables joined by `to_event`."""
    loadings = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.4).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(y @ loadings, 1.0).to_event(1), obs=x)


def joint(x: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """log p(x, y) for every y, (N, K)."""
    return weights.log() + dist.Normal(centres, 1.0).log_prob(x.unsqueeze(-1))


def exact_elbo(probs: Tensor, log_joint: Tensor) -> Tensor:
    return (probs * (log_joint - probs.log())).sum()


def random_heads(guide: DiscreteAmortizedGuide, *args: Tensor) -> DiscreteAmortizedGuide:
    guide.setup(*args)
    with torch.no_grad():
        for head in [*guide.inference.logits.modules(), *(guide.inference.head or nn.Identity()).modules()]:
            if isinstance(head, nn.Linear):
                head.weight.normal_(0.0, head.in_features**-0.5).mul_(getattr(head, "size", 1.0))
                head.bias.normal_(0.0, 0.5)
    return guide


CODE = torch.tensor([0.0, 1.0, 0.0])
ENUMERABLE: dict[str, tuple[Callable[..., None], Tensor, Tensor]] = {
    "categorical": (mixture, WEIGHTS, CENTRES),
    "one_hot": (one_hot_mixture, WEIGHTS, CENTRES),
    "bernoulli": (coin, torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)),
}


def full_probabilities(guide: DiscreteAmortizedGuide, x: Tensor) -> Tensor:
    probs = guide.probabilities(x)["y"].detach()
    return torch.stack([1 - probs, probs], -1) if probs.dim() == 1 else probs


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_enumerated_elbo_is_the_sum_over_values_and_its_gradient_has_no_noise(kind: str) -> None:
    model, weights, centres = ENUMERABLE[kind]
    guide, x = random_heads(DiscreteAmortizedGuide(model), data()), data()
    expected = exact_elbo(full_probabilities(guide, x), joint(x, weights, centres))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    losses = [elbo.differentiable_loss(model, guide, x) for _ in range(2)]
    torch.testing.assert_close(-losses[0].detach(), expected)
    parameters = list(guide.inference.parameters())
    first, second = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in first)
    for one, two in zip(first, second, strict=True):
        assert (one is None and two is None) or torch.allclose(one, two)


@pytest.mark.parametrize("kind", ENUMERABLE)
def test_training_finds_the_posterior_and_the_evidence(kind: str) -> None:
    model, weights, centres = ENUMERABLE[kind]
    guide, x = DiscreteAmortizedGuide(model, nn.Unflatten(0, (-1, 1))), data()  # the exact logits are linear in x
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    guide.setup(x)
    optimizer = torch.optim.LBFGS(guide.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    log_joint = joint(x, weights, centres)
    evidence = log_joint.logsumexp(-1).sum()
    assert -1e-9 < evidence + elbo.loss(model, guide, x) < 1e-3
    torch.testing.assert_close(full_probabilities(guide, x), log_joint.softmax(-1), atol=0.02, rtol=0)


def test_sampled_elbo_is_unbiased_for_the_enumerated_one() -> None:
    guide, x = random_heads(DiscreteAmortizedGuide(mixture), data()), data()
    exact = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, guide, x)
    with pytest.warns(UserWarning, match="TraceEnum_ELBO"):  # Pyro's
        draws = torch.tensor([Trace_ELBO().loss(mixture, guide, x) for _ in range(400)])
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - exact).abs() < 4 * error
    assert (draws.mean() - exact - 3.0).abs() > 4 * error  # the twin: three nats more would be noticed


@pytest.mark.slow
def test_continuous_latents_are_inferred_for_every_value_of_the_label() -> None:
    """q(z | x, y) is exact once trained: the ELBO reaches the evidence, which one q(z | x) for all labels cannot."""
    guide, x = DiscreteAmortizedGuide(semi_supervised, MLPEncoder(1, (32, 32))), data(8)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=20, vectorize_particles=True)
    svi = SVI(semi_supervised, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.998}), elbo)
    for _ in range(1200):
        svi.step(x)
    log_joint = WEIGHTS.log() + dist.Normal(CENTRES, 1.25**0.5).log_prob(x.unsqueeze(-1))
    evidence = log_joint.logsumexp(-1).sum()
    draws = torch.tensor([-elbo.loss(semi_supervised, guide, x) for _ in range(50)])
    error = draws.std() / len(draws) ** 0.5
    assert evidence - 0.4 < draws.mean() < evidence + 4 * error
    labels = torch.tensor([0, 2, 1, 0, 2, 1, 2, 2])
    median = guide.median(x, labels)
    assert set(median) == {"z"}  # the label is observed in this call
    error = (median["z"] - (x - CENTRES[labels]) / 1.25).abs()
    probable = log_joint.softmax(-1)[torch.arange(8), labels] > 0.01  # the ELBO hardly counts the others
    assert probable.sum() >= 4
    assert (error[probable] < 0.35).all()
    by_mode = guide.median(x)
    labels = (WEIGHTS.log() + dist.Normal(CENTRES, 1.25**0.5).log_prob(x.unsqueeze(-1))).argmax(-1)
    assert torch.equal(by_mode["y"], labels)
    torch.testing.assert_close(by_mode["z"], guide.median(x, labels)["z"])


def test_labels_may_be_observed_in_some_calls_and_are_no_encoder_input() -> None:
    guide = random_heads(DiscreteAmortizedGuide(semi_supervised), data())
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    x, labels = data(5), torch.tensor([0, 1, 2, 1, 0])
    trace = pyro.poutine.trace(guide).get_trace(x, labels)
    assert "y" not in trace
    assert trace.nodes["z"]["fn"].batch_shape == (5,)
    assert math.isfinite(elbo.loss(semi_supervised, guide, x, labels))
    assert math.isfinite(elbo.loss(semi_supervised, guide, x))
    other = pyro.poutine.trace(guide).get_trace(x, torch.zeros(5, dtype=torch.long))
    same = labels == 0
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean[same], other.nodes["z"]["fn"].mean[same])
    assert not torch.allclose(trace.nodes["z"]["fn"].mean[~same], other.nodes["z"]["fn"].mean[~same])


def test_labels_observed_with_a_named_encoder_input() -> None:
    guide = random_heads(DiscreteAmortizedGuide(semi_supervised, encoder_input="x"), data())
    x = data(4)
    locs = [guide.median(x, torch.full((4,), k))["z"] for k in (0, 2)]
    again = [guide.median(x, torch.full((4,), k))["z"] for k in (0, 2)]
    assert not torch.allclose(*locs)
    torch.testing.assert_close(locs, again)


def two_labels(x: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(WEIGHTS), obs=first)
        b = pyro.sample("b", dist.Bernoulli(0.3), obs=second)
        pyro.sample("x", dist.Normal(CENTRES[a] + b, 1.0), obs=x)


def test_two_discrete_latents_are_enumerated_together_and_each_keeps_its_head() -> None:
    guide, x = random_heads(DiscreteAmortizedGuide(two_labels), data()), data()
    probs = {name: value.detach() for name, value in guide.probabilities(x).items()}
    coins = torch.stack([1 - probs["b"], probs["b"]], -1)
    q = probs["a"].unsqueeze(-1) * coins.unsqueeze(-2)
    log_joint = (
        WEIGHTS.log().unsqueeze(-1)
        + torch.tensor([0.7, 0.3]).log()
        + dist.Normal(CENTRES.unsqueeze(-1) + torch.arange(2.0), 1.0).log_prob(x[:, None, None])
    )
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    torch.testing.assert_close(-elbo.loss(two_labels, guide, x), exact_elbo(q, log_joint).item())
    given = guide.probabilities(x, torch.zeros(len(x), dtype=torch.long))  # the first is observed
    assert set(given) == {"b"}
    torch.testing.assert_close(given["b"].detach(), probs["b"])


def in_an_inner_plate(x: Tensor) -> None:
    """Every datapoint has five tokens, each with a class of its own; the classes' frequencies are global."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("documents", x.shape[-1]), pyro.plate("words", 5):
        y = pyro.sample("y", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(CENTRES[y], 1.0), obs=x)


def test_in_inner_plates_beside_global_latents() -> None:
    guide = DiscreteAmortizedGuide(in_an_inner_plate, plate="documents")
    x = torch.randn(5, 7)
    guide.setup(x)
    assert guide.probabilities(x)["y"].shape == (5, 7, 3)
    svi = SVI(
        in_an_inner_plate, guide, pyro.optim.Adam({"lr": 0.02}), TraceEnum_ELBO(max_plate_nesting=2, num_particles=4)
    )
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert guide.probabilities(torch.randn(5, 3))["y"].shape == (5, 3, 3)
    assert guide.median(x)["y"].shape == (5, 7)


def deep_plate(x: Tensor) -> None:
    """The datapoints are at dimension -2, their replicates at -1."""
    with pyro.plate("data", len(x), dim=-2):
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("replicates", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(CENTRES[y] + z, 1.0), obs=x)


def test_datapoint_plate_at_another_dimension() -> None:
    guide, x = DiscreteAmortizedGuide(deep_plate, plate="data"), torch.randn(6, 3)
    svi = SVI(deep_plate, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=2))
    assert math.isfinite(svi.step(x))
    assert guide.median(x)["y"].shape == (6, 1)
    assert guide.median(x)["z"].shape == (6, 1)
    assert guide.probabilities(x)["y"].shape == (6, 1, 3)


def minibatches(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=4) as index:
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(CENTRES[y], 1.0), obs=x[index])


@pytest.mark.slow
def test_minibatches_are_unbiased_for_all_datapoints() -> None:
    x = data(12)
    guide = random_heads(DiscreteAmortizedGuide(minibatches, encoder_input=None), x)
    expected = exact_elbo(torch.softmax(_logits(guide, x), -1), joint(x, WEIGHTS, CENTRES))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    draws = torch.tensor([-elbo.loss(minibatches, guide, x) for _ in range(400)])
    assert (draws.mean() - expected).abs() < 4 * draws.std() / 20


def _logits(guide: DiscreteAmortizedGuide, x: Tensor) -> Tensor:
    return guide.inference.logits(guide.inference.encoder(x)).detach()


def annealed(x: Tensor, present: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=present):
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(CENTRES[y], 1.0), obs=x)


def test_masked_datapoints_count_in_neither_model_nor_guide() -> None:
    x, present = data(), torch.tensor([True, False, True, True, False, True])
    guide = random_heads(DiscreteAmortizedGuide(annealed, encoder_input="x"), x, present)
    probs = guide.probabilities(x, present)["y"].detach()
    expected = exact_elbo(probs[present], joint(x, WEIGHTS, CENTRES)[present])
    torch.testing.assert_close(-TraceEnum_ELBO(max_plate_nesting=1).loss(annealed, guide, x, present), expected.item())


# Straight-through draws


def _site(model: Callable[..., None], *args: Tensor):
    trace, frames = probe(model, args, {})
    return discrete_sites(trace, frames, "data")[0]


@pytest.mark.parametrize("model", [one_hot_mixture, coin, binary_code])
def test_straight_through_draws_are_exact_values_with_the_gradient_of_the_relaxed_ones(model) -> None:
    x = torch.randn(6, 4) if model is binary_code else data()
    site = _site(model, x)
    logits = torch.randn(20_000, *site.logits.shape, requires_grad=True)
    fn = distribution(site, logits, 0.5)
    assert fn.has_rsample
    assert fn.expand(torch.Size([2, 20_000])).rsample().shape == (2, 20_000) + fn.event_shape
    value = fn.rsample()
    assert set(value.unique().tolist()) == {0.0, 1.0}
    plain = distribution(site, logits)
    torch.testing.assert_close(fn.log_prob(value), plain.log_prob(value.detach()))
    probs = logits.softmax(-1) if site.kind == "one_hot" else logits.sigmoid().squeeze(-1)
    error = (probs * (1 - probs)).sum(0).sqrt() / len(logits)
    assert ((value - probs).mean(0).abs() < 4.5 * error).all()
    (grad,) = torch.autograd.grad((value * torch.randn(value.shape[1:])).sum(), logits)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0.01


@pytest.mark.slow
def test_straight_through_elbo_is_that_of_the_discrete_latents() -> None:
    guide, x = random_heads(DiscreteAmortizedGuide(one_hot_mixture, temperature=0.5), data()), data()
    exact = -exact_elbo(full_probabilities(guide, x), joint(x, WEIGHTS, CENTRES))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        draws = torch.tensor([elbo.loss(one_hot_mixture, guide, x) for _ in range(400)])
        error = draws.std() / len(draws) ** 0.5
        assert (draws.mean() - exact).abs() < 4 * error


def test_straight_through_gradient_is_exact_for_a_linear_model_without_evidence() -> None:
    """With the likelihood masked, the gradient under TraceMeanField_ELBO is that of KL(q || p), without noise."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(WEIGHTS))
            pyro.sample("x", dist.Normal(y @ CENTRES, 1.0).mask(False), obs=x)

    x = data()
    guide = random_heads(DiscreteAmortizedGuide(model, encoder_input="x", temperature=1.0), x)
    parameters = list(guide.inference.logits.parameters())
    found = torch.autograd.grad(TraceMeanField_ELBO().differentiable_loss(model, guide, x), parameters)
    log_q = guide.inference.logits(guide.inference.encoder(x)).log_softmax(-1)
    expected = torch.autograd.grad((log_q.exp() * (log_q - WEIGHTS.log())).sum(), parameters)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_straight_through_training_of_a_binary_code_nears_the_best_factorised_posterior() -> None:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)) + 1.0
    guide = DiscreteAmortizedGuide(binary_code, MLPEncoder(4, (64,)), temperature=0.5)
    elbo = TraceMeanField_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(binary_code, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.998}), elbo)
    svi.step(x)
    start = _code_elbo(guide, x)
    for _ in range(800):
        svi.step(x)
    values = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    log_joint = _code_log_joint(x, values)
    evidence = log_joint.logsumexp(-1).sum()
    reached = _code_elbo(guide, x)
    assert reached < evidence
    assert evidence - reached < 0.2 * (evidence - start)
    assert guide.median(x)["y"].shape == (10, 3)
    assert guide.probabilities(x)["y"].shape == (10, 3)


def _code_log_joint(x: Tensor, values: Tensor) -> Tensor:
    trace = pyro.poutine.trace(
        pyro.condition(pyro.poutine.broadcast(_code_vectorised), data={"y": values.unsqueeze(1)})
    ).get_trace(x)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample").T


def _code_vectorised(x: Tensor) -> None:
    with pyro.plate("values", 8, dim=-2):
        binary_code(x)


def _code_elbo(guide: DiscreteAmortizedGuide, x: Tensor) -> Tensor:
    values = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    probs = guide.probabilities(x)["y"].detach().unsqueeze(1)
    log_q = dist.Bernoulli(probs).log_prob(values).sum(-1)
    return (log_q.exp() * (_code_log_joint(x, values) - log_q)).sum()


# The guide as a Pyro guide


def test_predictive_save_and_load() -> None:
    guide, x = random_heads(DiscreteAmortizedGuide(semi_supervised), data()), data()
    samples = Predictive(semi_supervised, guide=guide, num_samples=50, return_sites=["y", "z"])(x)
    assert samples["y"].shape == (50, 6)
    assert samples["z"].shape == (50, 6)
    other = DiscreteAmortizedGuide(semi_supervised)
    other.setup(x)
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.probabilities(x), guide.probabilities(x))
    torch.testing.assert_close(copy.deepcopy(guide).probabilities(x), guide.probabilities(x))


@pytest.mark.parametrize("family", ["multivariate_normal", "flow"])
def test_families_beside_discrete_latents(family: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(CENTRES[y] + z.sum(-1), 0.5), obs=x)

    guide = DiscreteAmortizedGuide(model, family=family)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = [svi.step(data()) for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (binary_code, {}, "Cannot enumerate discrete local site 'y' because its values are joined by `to_event`"),
        (mixture, {"temperature": 1.0}, "Cannot relax discrete local site 'y' because no gradient flows"),
        (mixture, {"temperature": 0.0}, "temperature=0.0 because it must be a positive number"),
        (mixture, {"encoder": nn.Flatten(0)}, "heads are added to its features"),
    ],
)
def test_refused_at_setup(model, options: dict, message: str) -> None:
    x = torch.randn(6, 4) if model is binary_code else data()
    with pytest.raises(ValueError, match=message):
        DiscreteAmortizedGuide(model, **options).setup(x)


def test_other_kinds_of_discrete_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    with pytest.raises(ValueError, match="Cannot guide discrete local site 'n' because its prior is a Poisson"):
        DiscreteAmortizedGuide(model).setup(data())
    with pytest.raises(ValueError, match="discrete"):
        AmortizedGuide(mixture).setup(data())


def test_observed_at_setup_and_latent_later_is_refused() -> None:
    guide = DiscreteAmortizedGuide(semi_supervised)
    guide.setup(data(), torch.tensor([0, 1, 2, 1, 0, 0]))
    with pytest.raises(ValueError, match=r"\['y'\] were not latent when it was set up"):
        guide(data())


def test_parameters_per_datapoint_are_refused_with_the_remedy() -> None:
    guide = random_heads(DiscreteAmortizedGuide(semi_supervised), data())
    with pytest.raises(ValueError, match="they depend on discrete latents"):
        guide.variational_parameters(data())


def two_levels(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2 + y, 1.0))
        pyro.sample("x", dist.Normal(z1, 0.5), obs=x)


def test_latents_conditioned_on_labels_of_their_own() -> None:
    """The enumerated ELBO is that of q(z2 | x) q(y | x) q(z1 | x, y) by hand, at the same draws: one z2 for all y."""
    x = data()
    guide = DiscreteAmortizedGuide(two_levels, conditioned={"z2": []})
    random_heads(guide, x)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with torch.no_grad():
        pyro.set_rng_seed(3)
        found = -elbo.loss(two_levels, guide, x)
        pyro.set_rng_seed(3)
        enumerated = pyro.poutine.enum(config_enumerate(guide), first_available_dim=-2)
        sites = pyro.poutine.trace(enumerated).get_trace(x).nodes
        y, z1, z2 = (sites[name]["value"] for name in ("y", "z1", "z2"))
        log_q = {name: sites[name]["fn"].log_prob(sites[name]["value"]) for name in ("y", "z1", "z2")}
    assert z2.shape == (len(x),)
    assert z1.shape == (3, len(x))
    log_p = dist.Normal(z2 + y, 1.0).log_prob(z1) + dist.Normal(z1, 0.5).log_prob(x) - math.log(3)
    terms = log_p - log_q["y"] - log_q["z1"]
    expected = (log_q["y"].exp() * terms).sum() + (dist.Normal(0.0, 1.0).log_prob(z2) - log_q["z2"]).sum()
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert guide.median(x).keys() == {"y", "z1", "z2"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conditioned": {"q": []}}, r"because of \['q'\]: keys are continuous latents, \['z2', 'z1'\]"),
        ({"conditioned": {"z1": ["k"]}}, r"because of \['k'\].* a datapoint has one, \['y'\]"),
        ({"conditioned": {"z1": "y"}}, r"lists of names are wanted by name"),
        ({"conditioned": {"z2": []}, "family": "multivariate_normal"}, r"couples them; try family=\"normal\""),
    ],
)
def test_conditions_that_cannot_be_met(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DiscreteAmortizedGuide(two_levels, **options)(data())


@config_enumerate
def partly_labelled(x: Tensor, y: Tensor | None = None) -> None:
    """The label is summed out where it is not observed."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(2)), obs=y)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(3.0 * y + z, 1.0), obs=x)


def test_labels_that_are_summed_out_elsewhere_are_no_encoder_input() -> None:
    x, y = torch.randn(6), torch.tensor([0, 1, 1])
    guide = AmortizedGuide(partly_labelled)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    svi = SVI(partly_labelled, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert math.isfinite(svi.step(x) + svi.step(x[:3], y))
    (seen,) = guide.encoder_inputs(x[:3], y)
    assert torch.equal(seen, x[:3])


def test_set_up_with_labels_says_what_helps() -> None:
    x, y = torch.randn(6), torch.tensor([0, 1, 1, 0, 0, 1])
    guide = AmortizedGuide(partly_labelled)
    guide.setup(x, y)
    guide.variational_parameters(x, y)
    with pytest.raises(ValueError, match=r"sites \['y'\] are summed out in it .* try guide.setup\(...\) with a call"):
        guide.variational_parameters(x)
    other = AmortizedGuide(partly_labelled)
    other.setup(x)
    assert other.variational_parameters(x).shape == other.variational_parameters(x, y).shape == (6, 2)


def test_a_label_that_is_summed_out_beside_one_that_the_guide_draws_is_no_encoder_input() -> None:
    def model(x: Tensor, k: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            infer = {"enumerate": "parallel"} if k is None else {}
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=infer, obs=k)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(3.0 * y + k + z, 1.0), obs=x)

    x = torch.randn(5)
    guide = DiscreteAmortizedGuide(model)
    guide.setup(x)
    (seen,) = guide.encoder_inputs(x, torch.ones(5, dtype=torch.long))
    assert torch.equal(seen, x)
