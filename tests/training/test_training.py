"""Remedies for posterior collapse against exact losses."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LinearGaussian, counts, topics
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, SemiAmortizedGuide
from pyro_amortized.training import (
    AggressiveEncoder,
    CapacityELBO,
    FreeBitsELBO,
    KLAnnealing,
    cyclical_schedule,
    linear_schedule,
    sigmoid_schedule,
)

pytestmark = pytest.mark.usefixtures("_float64")

MODEL_SIZE, BATCH = 6, LinearGaussian.batch_size


@pytest.fixture
def model(_float64: None) -> LinearGaussian:
    return LinearGaussian.random_weights()


def loss(elbo: Any, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> float:
    """The loss with the same draws in every call."""
    pyro.set_rng_seed(1)
    with torch.no_grad():
        return float(elbo.loss(model, guide, *args))


def gradients(elbo: Any, model: Callable[..., Any], guide: Any, trained: nn.Module, *args: Any) -> list[Tensor]:
    pyro.set_rng_seed(1)
    trained.zero_grad()
    elbo.loss_and_grads(model, guide, *args)
    return [parameter.grad.clone() for parameter in trained.parameters()]


def at(beta: float, model: Callable[..., Any], guide: Callable[..., Any], **options: Any) -> KLAnnealing:
    return KLAnnealing(model, guide, lambda step: beta, **options)


@torch.no_grad()
def exact_kl(guide: AmortizedGuide, x: Tensor) -> Tensor:
    """KL divergences from standard normals, ``(N, D)``."""
    loc, scale = guide.family.marginals(guide.variational_parameters(x).detach())
    return 0.5 * (loc.square() + scale.square() - 1) - scale.log()


# Schedules


def test_schedules() -> None:
    linear = linear_schedule(10, start=0.2)
    assert [linear(step) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    sigmoid = sigmoid_schedule(100, 10)
    assert sigmoid(100) == 0.5
    assert sigmoid(110) == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()))
    assert (sigmoid(0), sigmoid(10**6)) == pytest.approx((0.0, 1.0), abs=1e-4)
    cyclical = cyclical_schedule(100, num_cycles=2, ramp=0.8)
    assert [cyclical(step) for step in (0, 20, 40, 49, 50, 70, 100)] == pytest.approx([0, 0.5, 1, 1, 0, 0.5, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear_schedule(0), "Cannot use num_steps=0 because it must be a positive number"),
        (lambda: linear_schedule(10, start=-1.0), "Cannot scale the KL divergence by beta=-1.0"),
        (lambda: sigmoid_schedule(5, 0), "Cannot use width=0"),
        (lambda: cyclical_schedule(10, num_cycles=0), "Cannot use num_cycles=0"),
        (lambda: cyclical_schedule(10, ramp=0.0), "Cannot use ramp=0.0"),
        (lambda: KLAnnealing(topics, topics, 0.5), "Cannot anneal by 0.5 because a schedule is a function"),
        (lambda: at(torch.ones(()), topics, topics).beta, "no tensor, which Pyro refuses"),
        (lambda: at(float("nan"), topics, topics).beta, "must be a finite number"),
    ],
)
def test_schedules_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# KL annealing


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "elbo",
    [
        TraceMeanField_ELBO(),
        TraceMeanField_ELBO(num_particles=3),
        TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=["one", "sequential", "vectorized"],
)
def test_annealed_loss_is_exact(beta: float, elbo: Any, model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    guide = AmortizedGuide(model.full)
    guide.setup(x)
    annealing = at(beta, model.full, guide)
    plain, annealed = loss(elbo, model.full, guide, x), loss(elbo, annealing.model, annealing.guide, x)
    assert annealed == pytest.approx(plain + (beta - 1) * exact_kl(guide, x).sum().item(), rel=1e-10)
    if beta == 1.0:
        assert annealed == plain


@pytest.mark.parametrize("family", ["normal", "multivariate_normal"])
@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        TraceMeanField_ELBO(),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_sampled_losses_are_annealed_draw_by_draw(elbo: Any, family: str, model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    guide = AmortizedGuide(model.full, family=family)
    guide.setup(x)

    def total(beta: float) -> float:
        annealing = at(beta, model.full, guide)
        return loss(elbo, annealing.model, annealing.guide, x)

    pyro.set_rng_seed(1)
    z = guide(x)["z"]
    log_likelihood = dist.Normal(z @ model.weights.T, 1.0).log_prob(x).sum().item()
    assert total(0.0) == pytest.approx(-log_likelihood, rel=1e-10)
    assert total(0.7) == pytest.approx(0.3 * total(0.0) + 0.7 * total(1.0), rel=1e-10)
    assert total(1.0) == pytest.approx(loss(elbo, model.full, guide, x), rel=1e-12)


def test_annealing_with_subsampling(model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    index = torch.tensor([4, 1])
    guide = AmortizedGuide(model.explicit, encoder_input=lambda x, index: x[index])
    guide.setup(x, index)
    annealing, elbo = at(0.25, model.explicit, guide), TraceMeanField_ELBO()
    loc, scale = guide.family.marginals(guide.variational_parameters(x, index).detach())
    kl = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum() * MODEL_SIZE / 2
    plain = loss(elbo, model.explicit, guide, x, index)
    assert loss(elbo, annealing.model, annealing.guide, x, index) == pytest.approx(plain - 0.75 * kl.item(), rel=1e-10)


def test_global_latents_and_observations_are_not_annealed() -> None:
    x = counts(12)
    guide = AmortizedGuide(topics)
    guide.setup(x)
    annealing = at(0.5, topics, guide)
    pyro.set_rng_seed(1)
    guide_trace = pyro.poutine.trace(annealing.guide).get_trace(x)
    model_trace = pyro.poutine.trace(pyro.poutine.replay(annealing.model, trace=guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        assert {name: site["scale"] for name, site in trace.nodes.items() if name in ("rate", "size", "share")} == {
            "rate": 1.0,
            "size": 0.5,
            "share": 0.5,
        }
    assert model_trace.nodes["x"]["scale"] == 1.0


def test_gradients_are_those_of_the_annealed_loss(model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    guide = AmortizedGuide(model.full)
    guide.setup(x)
    elbo = TraceMeanField_ELBO()
    parts = {}
    for beta in (0.0, 0.4, 1.0):
        annealing = at(beta, model.full, guide)
        parts[beta] = gradients(elbo, annealing.model, annealing.guide, guide, x)
    for none, some, full in zip(parts[0.0], parts[0.4], parts[1.0], strict=True):
        torch.testing.assert_close(some, 0.6 * none + 0.4 * full)
    assert any((none - full).abs().max() > 1e-3 for none, full in zip(parts[0.0], parts[1.0], strict=True))


@pytest.mark.parametrize("make", [SemiAmortizedGuide, IterativeAmortizedGuide])
def test_refinement_keeps_to_the_plain_elbo(make: Any, model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    guide = make(model.full, num_steps=2, fixed_noise=True)
    guide.setup(x)
    annealing = at(0.1, model.full, guide)
    phi = guide.variational_parameters(x)
    with pyro.poutine.scale(scale=0.1):
        torch.testing.assert_close(guide.variational_parameters(x), phi)
    elbo = TraceMeanField_ELBO()
    expected = loss(elbo, model.full, guide, x) - 0.9 * exact_kl(guide, x).sum().item()
    assert loss(elbo, annealing.model, annealing.guide, x) == pytest.approx(expected, rel=1e-10)
    svi = SVI(annealing.model, annealing.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert torch.isfinite(torch.tensor(svi.step(x)))


def test_annealing_goes_on_by_steps(model: LinearGaussian) -> None:
    annealing = KLAnnealing(model.full, AmortizedGuide(model.full), linear_schedule(4))
    betas = []
    for _ in range(6):
        betas.append(annealing.beta)
        annealing.step()
    assert betas == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_other_guides_are_annealed(model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    guide = AutoNormal(model.full)
    guide(x)
    annealing, elbo = at(0.25, model.full, guide), Trace_ELBO()
    z = dist.Normal(guide.locs.z.detach(), guide.scales.z.detach())
    pyro.set_rng_seed(1)
    value = guide(x)["z"]
    kl = (z.log_prob(value) - dist.Normal(0.0, 1.0).log_prob(value)).sum().item()
    plain = loss(elbo, model.full, guide, x)
    assert loss(elbo, annealing.model, annealing.guide, x) == pytest.approx(plain - 0.75 * kl, rel=1e-10)


def test_guides_that_draw_local_latents_elsewhere_are_refused(model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    annealing = at(0.5, model.full, AutoDiagonalNormal(model.full))
    with pytest.raises(ValueError, match="Cannot anneal the KL divergence of site 'z' because the guide draws it as a"):
        Trace_ELBO().loss(annealing.model, annealing.guide, x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("other", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    annealing = at(0.5, model.full, guide)
    with pytest.raises(
        ValueError, match=r"of sites \['z'\] because the guide does not draw them inside of plate 'data'"
    ):
        TraceMeanField_ELBO().loss(annealing.model, annealing.guide, x)


def globals_only(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_models_without_local_latents_are_refused() -> None:
    x = torch.randn(5)
    guide = AmortizedGuide(globals_only)
    annealing = at(0.5, globals_only, guide)
    with pytest.raises(ValueError, match="Cannot anneal the KL divergence of local latents because the model has none"):
        Trace_ELBO().loss(annealing.model, annealing.guide, x)
    with pytest.raises(ValueError, match="Cannot use FreeBitsELBO because the model has no local latents"):
        FreeBitsELBO(0.1).loss_and_grads(globals_only, guide, x)


def test_discrete_latents_that_the_model_sums_out() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    x = torch.randn(5)
    guide = AmortizedGuide(model)
    guide.setup(x)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def total(beta: float) -> float:
        annealing = at(beta, model, guide)
        return loss(elbo, annealing.model, annealing.guide, x)

    assert total(1.0) == pytest.approx(loss(elbo, model, guide, x))
    assert total(0.5) == pytest.approx(0.5 * (total(0.0) + total(1.0)))
    assert abs(total(0.0) - total(1.0)) > 0.1


# Free bits and capacity


def free_bits(kl: Tensor, amount: float) -> float:
    return (len(kl) * kl.mean(0).clamp(min=amount).sum()).item()


OBJECTIVES: list[tuple[Callable[..., Any], Callable[[Tensor], float]]] = [
    (lambda **options: FreeBitsELBO(0.0, **options), lambda kl: kl.sum().item()),
    (lambda **options: FreeBitsELBO(1.0, **options), lambda kl: free_bits(kl, 1.0)),
    (lambda **options: FreeBitsELBO(99.0, **options), lambda kl: free_bits(kl, 99.0)),
    (lambda **options: FreeBitsELBO(3.0, per="site", **options), lambda kl: max(3.0 * len(kl), kl.sum().item())),
    (lambda **options: FreeBitsELBO(99.0, per="site", **options), lambda kl: 99.0 * len(kl)),
    (lambda **options: CapacityELBO(0.0, 1.0, **options), lambda kl: kl.sum().item()),
    (lambda **options: CapacityELBO(2.0, 5.0, **options), lambda kl: 5 * abs(kl.sum().item() - 2 * len(kl))),
    (lambda **options: CapacityELBO(50.0, 5.0, **options), lambda kl: 5 * abs(kl.sum().item() - 50 * len(kl))),
]


def uneven(guide: AmortizedGuide) -> None:
    """Makes the KL divergences of the dimensions differ."""
    with torch.no_grad():
        guide.inference.head.bias[:] = torch.tensor([0.1, 0.5, 2.0, -0.1, -0.5, -1.0])


@pytest.mark.parametrize(("make", "penalty"), OBJECTIVES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}],
    ids=["one", "sequential", "vectorized"],
)
@pytest.mark.parametrize("call", ["full", "rows"])
def test_objectives_are_exact(
    make: Any, penalty: Callable[[Tensor], float], options: Any, call: str, model: LinearGaussian
) -> None:
    x = model.simulate(MODEL_SIZE)
    function = getattr(model, call)
    guide = AmortizedGuide(function)
    guide.setup(x)
    uneven(guide)
    kl = exact_kl(guide, x)
    plain = loss(TraceMeanField_ELBO(**options), function, guide, x)
    objective = make(**options)
    assert loss(objective, function, guide, x) == pytest.approx(plain, rel=1e-12)
    expected = plain - kl.sum().item() + penalty(kl)
    pyro.set_rng_seed(1)
    assert objective.differentiable_loss(function, guide, x).item() == pytest.approx(expected, rel=1e-10)
    pyro.set_rng_seed(1)
    assert objective.loss_and_grads(function, guide, x) == pytest.approx(expected, rel=1e-10)


def test_free_bits_take_the_gradient_of_the_divergence_away(model: LinearGaussian) -> None:
    x = model.simulate(MODEL_SIZE)
    guide = AmortizedGuide(model.full)
    guide.setup(x)
    annealing = at(0.0, model.full, guide)
    free = gradients(FreeBitsELBO(99.0), model.full, guide, guide, x)
    without = gradients(TraceMeanField_ELBO(), annealing.model, annealing.guide, guide, x)
    plain = gradients(TraceMeanField_ELBO(), model.full, guide, guide, x)
    for actual, expected in zip(free, without, strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(gradients(FreeBitsELBO(0.0), model.full, guide, guide, x), plain, strict=True):
        torch.testing.assert_close(actual, expected)
    assert max((a - b).abs().max() for a, b in zip(free, plain, strict=True)) > 1e-3


def test_objectives_with_subsampling(model: LinearGaussian) -> None:
    x, index = model.simulate(MODEL_SIZE), torch.tensor([4, 1])
    guide = AmortizedGuide(model.explicit, encoder_input=lambda x, index: x[index])
    guide.setup(x, index)
    uneven(guide)
    loc, scale = guide.family.marginals(guide.variational_parameters(x, index).detach())
    kl = 0.5 * (loc.square() + scale.square() - 1) - scale.log()
    plain = loss(TraceMeanField_ELBO(), model.explicit, guide, x, index)
    pyro.set_rng_seed(1)
    actual = FreeBitsELBO(1.0).differentiable_loss(model.explicit, guide, x, index).item()
    assert actual == pytest.approx(plain + (free_bits(kl, 1.0) - kl.sum().item()) * MODEL_SIZE / 2, rel=1e-10)


def test_free_bits_of_positive_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, scale.sum(-1)), obs=x)

    x = torch.randn(5)
    guide = AmortizedGuide(model)
    guide.setup(x)
    kl = exact_kl(guide, x)
    plain = loss(TraceMeanField_ELBO(), model, guide, x)
    pyro.set_rng_seed(1)
    actual = FreeBitsELBO(9.0).differentiable_loss(model, guide, x).item()
    assert actual == pytest.approx(plain - kl.sum().item() + 2 * 5 * 9.0, rel=1e-10)


def gamma(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (gamma, AmortizedGuide),
        (gamma, lambda model: AmortizedGuide(model, family="multivariate_normal")),
        (masked, lambda model: masked_guide),
    ],
    ids=["prior", "family", "mask"],
)
@pytest.mark.parametrize("objective", [FreeBitsELBO(0.1), CapacityELBO(1.0)], ids=["free bits", "capacity"])
def test_divergences_without_a_closed_form_are_refused(model: Any, make: Any, objective: Any) -> None:
    with pytest.raises(ValueError, match="Cannot tell the KL divergence of each dimension of site '(scale|z)'"):
        objective.loss_and_grads(model, make(model), torch.randn(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreeBitsELBO(-1.0), "Cannot use free_bits=-1.0 because it must be a number of nats"),
        (lambda: FreeBitsELBO(1.0, per="pixel"), "Cannot give free bits per 'pixel'"),
        (lambda: CapacityELBO(-1.0), "Cannot use capacity=-1.0 because it must be a number of nats"),
        (lambda: CapacityELBO(1.0, 0.0), "Cannot use gamma=0.0 because it must be a positive number"),
    ],
)
def test_objectives_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The aggressive encoder


class Decoder(nn.Module):
    """x_n ~ N(w z_n, 1) with a weight to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), 0.1))

    def forward(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 1.0).to_event(1), obs=x)


def batch(seed: int, size: int = 20) -> Tensor:
    return torch.randn(size, 2, generator=torch.Generator().manual_seed(seed)) * 3.0


def changes(svi: SVI, decoder: Decoder, guide: AmortizedGuide, num_steps: int) -> str:
    """Which parameters each step changed: e of the encoder, d of the decoder, b of both."""
    found = []
    for seed in range(num_steps):
        before = decoder.weight.clone(), guide.inference.head.weight.clone()
        svi.step(batch(seed))
        decoded, encoded = (
            not torch.equal(old, new)
            for old, new in zip(before, (decoder.weight, guide.inference.head.weight), strict=True)
        )
        found.append("b" if decoded and encoded else "d" if decoded else "e" if encoded else "-")
    return "".join(found)


def make_aggressive(**options: Any) -> tuple[Decoder, AmortizedGuide, AggressiveEncoder]:
    decoder = Decoder()
    guide = AmortizedGuide(decoder)
    guide.setup(batch(99))
    return decoder, guide, AggressiveEncoder(decoder, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)


def test_encoder_and_model_take_turns() -> None:
    decoder, guide, svi = make_aggressive(max_encoder_steps=5)
    assert changes(svi, decoder, guide, 13) == "eeeeedeeeeede"
    svi.aggressive = False
    assert changes(svi, decoder, guide, 3) == "bbb"


def test_the_model_goes_on_once_the_loss_stops_falling() -> None:
    decoder, guide, svi = make_aggressive(window=2)
    losses = iter([9.0, 8.0, 7.0, 6.0, 6.0, 7.5, 0.0, 0.0])
    svi.loss_and_grads = lambda model, guide, x: (Trace_ELBO().loss_and_grads(model, guide, x), next(losses))[1]
    assert changes(svi, decoder, guide, 8) == "eeeeeede"


def test_plain_svi_once_no_longer_aggressive() -> None:
    states = []
    for make in (AggressiveEncoder, SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        decoder = Decoder()
        svi = make(decoder, AmortizedGuide(decoder), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.aggressive = False
        losses = [svi.step(batch(seed)) for seed in range(3)]
        states.append((losses, decoder.weight.detach().clone()))
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])


def test_validation_ends_it_when_the_information_falls() -> None:
    decoder, guide, svi = make_aggressive()
    x = batch(7, 200)
    head = guide.inference.head
    found = []
    for gain in (0.0, 0.5, 1.0, 1.0, 0.2, 5.0):
        with torch.no_grad():
            head.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0)).mul_(gain * head.size)
        state = torch.get_rng_state()
        information = svi.validate(x)
        assert torch.equal(torch.get_rng_state(), state)
        found.append((information, svi.aggressive))
    assert found[0][0] == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < found[1][0] < found[2][0]
    assert [flag for _, flag in found] == [True, True, True, True, False, False]
    assert guide.training


def test_wrong_arguments_of_the_aggressive_encoder_are_refused() -> None:
    optimizer = pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(ValueError, match="Cannot train a AutoNormal aggressively"):
        AggressiveEncoder(gamma, AutoNormal(gamma), optimizer, Trace_ELBO())
    for name in ("window", "max_encoder_steps"):
        with pytest.raises(ValueError, match=f"Cannot use {name}=0 because it must be an integer of at least 1"):
            AggressiveEncoder(gamma, AmortizedGuide(gamma), optimizer, Trace_ELBO(), **{name: 0})


def test_objectives_with_a_weight_for_every_datapoint() -> None:
    """Without free bits they are the plain ELBO; and the floor of a dimension is counted with the mean weight."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, weights = torch.randn(16), torch.rand(16) + 0.5
    weighted = pyro.poutine.scale(model, weights)  # type: ignore[arg-type]
    guide = AmortizedGuide(weighted)
    guide.setup(x)
    losses = []
    for elbo in (TraceMeanField_ELBO(), FreeBitsELBO(0.0), FreeBitsELBO(100.0)):
        pyro.set_rng_seed(0)
        losses.append(float(elbo.differentiable_loss(weighted, guide, x).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    with torch.no_grad():
        loc, scale = guide.posterior(x).mean.squeeze(-1), guide.posterior(x).stddev.squeeze(-1)
    kl = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
    assert losses[2] - losses[0] == pytest.approx(float(100.0 * weights.sum() - (weights * kl).sum()), rel=1e-4)
