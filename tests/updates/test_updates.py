"""Update rules against torch's optimizers, closed forms and each other's rows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    GradientAscent,
    LearnedUpdate,
    MultivariateNormal,
    NaturalGradient,
    Newton,
    Normal,
    UpdateRule,
)
from pyro_amortized.families import LowRankMultivariateNormal
from pyro_amortized.updates.base import Curvature

pytestmark = pytest.mark.usefixtures("_float64")

ROWS, DIM = 5, 3
FORMULAS: list[Callable[..., Any]] = [GradientAscent, Adam, NaturalGradient]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def phi_and_gradients(steps: int = 4) -> tuple[Tensor, Tensor]:
    return 0.5 * draws(ROWS, 2 * DIM), draws(steps, ROWS, 2 * DIM, seed=1)


def learned_update(num_features: int = 0, **options: Any) -> LearnedUpdate:
    rule = LearnedUpdate(hidden_dims=(8,), **options)
    rule.setup(Normal(DIM), num_features)
    return rule


def climb(rule: UpdateRule, phi: Tensor, grads: Tensor, features: Tensor | None = None) -> Tensor:
    """phi after steps along given gradients."""
    state = rule.init(phi, features)
    for grad in grads:
        phi, state = rule.update(phi, grad, state)
    return phi


# Formulas


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gradient_ascent_equals_torch_sgd(momentum: float) -> None:
    phi, grads = phi_and_gradients()
    expected = phi.clone().requires_grad_()
    optimizer = torch.optim.SGD([expected], lr=0.03, momentum=momentum, maximize=True)
    for grad in grads:
        expected.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(climb(GradientAscent(0.03, momentum), phi, grads), expected.detach())
    other = climb(GradientAscent(0.03, 0.95), phi, grads)
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7), (0.0, 0.0)])
def test_adam_equals_torch_adam_row_by_row(betas: tuple[float, float], learned: bool) -> None:
    phi, grads = phi_and_gradients(6)
    refined = climb(Adam(0.05, betas, 1e-8, learned=learned), phi, grads).detach()
    for row in range(ROWS):
        expected = phi[row].clone().requires_grad_()
        optimizer = torch.optim.Adam([expected], lr=0.05, betas=betas, eps=1e-8, maximize=True)
        for grad in grads[:, row]:
            expected.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(refined[row], expected.detach(), rtol=1e-12, atol=1e-12)
    assert (climb(Adam(0.05, (0.8, 0.9)), phi, grads) - refined).abs().max() > 1e-3


def test_adam_stays_where_the_gradient_is_zero_and_can_be_differentiated_there() -> None:
    phi = draws(ROWS, 2).requires_grad_()
    grads = torch.zeros(3, ROWS, 2, requires_grad=True)
    refined = climb(Adam(0.05), phi, grads)
    assert torch.equal(refined, phi)
    assert all(g.isfinite().all() for g in torch.autograd.grad(refined.sum(), [phi, grads]))


@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.0])
def test_natural_gradient_equals_the_inverse_fisher_information(step_size: float) -> None:
    phi, grads = phi_and_gradients(1)
    refined = climb(NaturalGradient(step_size, max_shift=1e6, max_log_ratio=1e6), phi, grads)
    for row in range(ROWS):
        at = phi[row].clone()

        def minus_kl(new: Tensor, at: Tensor = at) -> Tensor:
            family = Normal(DIM)
            return torch.distributions.kl_divergence(family(at), family(new))

        fisher = torch.autograd.functional.hessian(minus_kl, at)  # the curvature of KL(q || q') at q' = q
        expected = at + step_size * torch.linalg.solve(fisher, grads[0, row])
        torch.testing.assert_close(refined[row], expected)
    assert (refined - (phi + step_size * grads[0])).abs().max() > 1e-2  # the plain gradient is another


def test_natural_gradient_of_full_step_solves_a_normal_target() -> None:
    phi = draws(ROWS, 2 * DIM)
    loc, scale = phi[:, :DIM], phi[:, DIM:].exp()
    target, precision = draws(ROWS, DIM, seed=2), draws(ROWS, DIM, seed=3).exp()
    grad = torch.cat([-precision * (loc - target), 1 - precision * scale.square()], -1)
    wide = {"max_shift": 1e6, "max_log_ratio": 1e6}
    moved = NaturalGradient(1.0, **wide).update(phi, grad, ())[0][:, :DIM]
    torch.testing.assert_close((moved - loc) / (target - loc), precision * scale.square())  # one where scales agree


@pytest.mark.parametrize(("max_shift", "max_log_ratio"), [(3.0, 0.5), (0.1, 0.02)])
def test_natural_gradient_is_clipped_in_standard_deviations(max_shift: float, max_log_ratio: float) -> None:
    phi, signs = draws(ROWS, 2 * DIM), draws(ROWS, 2 * DIM, seed=1).sign()
    rule = NaturalGradient(0.5, max_shift=max_shift, max_log_ratio=max_log_ratio)
    moved = rule.update(phi, 1e9 * signs, ())[0] - phi
    scale = phi[:, DIM:].exp()
    torch.testing.assert_close(moved[:, :DIM] / scale, max_shift * signs[:, :DIM])
    torch.testing.assert_close(moved[:, DIM:], max_log_ratio * signs[:, DIM:])
    small = 1e-6 * signs
    unclipped = rule.update(phi, small, ())[0]
    torch.testing.assert_close(
        unclipped,
        phi + 0.5 * torch.cat([scale.square() * small[:, :DIM], small[:, DIM:] / 2], -1),
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize("Rule", [GradientAscent, Adam])
def test_gradients_are_clipped_for_each_datapoint_on_its_own(Rule: Any) -> None:
    phi, grads = phi_and_gradients()
    grads[:, 0] *= 100.0
    grads[:, 1] *= 0.01
    norms = grads.norm(dim=-1, keepdim=True)
    shortened = grads * (2.0 / norms).clamp(max=1.0)
    clipped = climb(Rule(0.1, max_norm=2.0), phi, grads)
    torch.testing.assert_close(clipped, climb(Rule(0.1), phi, shortened))
    unclipped = climb(Rule(0.1), phi, grads)
    assert torch.equal(clipped[1], unclipped[1])
    assert (clipped[0] - unclipped[0]).abs().max() > 1e-3 or Rule is Adam  # Adam does not feel a constant factor
    torch.testing.assert_close(climb(Rule(0.1, max_norm=1e9), phi, grads), unclipped)


def test_clipping_can_be_differentiated_at_a_gradient_of_zero() -> None:
    grad = torch.zeros(ROWS, 2, requires_grad=True)
    refined = climb(GradientAscent(0.1, max_norm=1.0), torch.zeros(ROWS, 2), grad.unsqueeze(0))
    (slope,) = torch.autograd.grad(refined.sum(), grad)
    torch.testing.assert_close(slope, torch.full((ROWS, 2), 0.1))


# What all rules share


@pytest.mark.parametrize("Rule", [*FORMULAS, learned_update])
def test_rows_are_independent_of_each_other(Rule: Any) -> None:
    rule = Rule()
    phi, grads = phi_and_gradients()
    together = climb(rule, phi, grads)
    changed_phi, changed_grads = phi.clone(), grads.clone()
    changed_phi[0], changed_grads[:, 0] = 7.0, -50.0
    changed = climb(rule, changed_phi, changed_grads)
    torch.testing.assert_close(changed[1:], together[1:], rtol=0, atol=1e-14)
    assert (changed[0] - together[0]).abs().max() > 1e-3
    alone = torch.cat([climb(rule, phi[i : i + 1], grads[:, i : i + 1]) for i in range(ROWS)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-14)


@pytest.mark.parametrize("Rule", [*FORMULAS, learned_update])
def test_nothing_is_changed_in_place_and_dtypes_are_kept(Rule: Any) -> None:
    for dtype in (torch.float64, torch.float32):
        rule = Rule().to(dtype)
        phi, grads = (x.to(dtype) for x in phi_and_gradients())
        copies = phi.clone(), grads.clone()
        first = climb(rule, phi, grads)
        assert first.dtype == dtype
        assert first.shape == phi.shape
        assert torch.equal(phi, copies[0])
        assert torch.equal(grads, copies[1])
        assert torch.equal(climb(rule, phi, grads), first)  # and nothing is remembered from one call to the next


@pytest.mark.parametrize("Rule", FORMULAS)
def test_learned_step_size_gets_the_gradient_of_finite_differences(Rule: Any) -> None:
    phi, grads = phi_and_gradients()
    weights = draws(ROWS, 2 * DIM, seed=5)
    assert not list(Rule(0.07).parameters())
    rule = Rule(0.07, learned=True)
    (parameter,) = rule.parameters()
    assert rule.step_size.item() == pytest.approx(0.07)
    (slope,) = torch.autograd.grad((climb(rule, phi, grads) * weights).sum(), parameter)
    log_step = float(parameter.detach())
    up, down = ((climb(Rule(math.exp(log_step + h)), phi, grads) * weights).sum().item() for h in (1e-5, -1e-5))
    assert slope.item() == pytest.approx((up - down) / 2e-5, rel=1e-6)
    assert slope.item() != 0


@pytest.mark.parametrize("Rule", FORMULAS)
def test_formulas_are_differentiable_twice_in_phi_and_gradient(Rule: Any) -> None:
    phi, grads = (x.clone().requires_grad_() for x in phi_and_gradients(3))
    rule = Rule(0.1) if Rule is NaturalGradient else Rule(0.1, max_norm=1.5)

    def function(phi: Tensor, grads: Tensor) -> Tensor:
        return climb(rule, phi, grads)

    assert torch.autograd.gradcheck(function, (phi, grads))
    assert torch.autograd.gradgradcheck(function, (phi[:1], grads[:2, :1]))


@pytest.mark.parametrize("Rule", [*FORMULAS, LearnedUpdate])
def test_repr_names_the_settings(Rule: Any) -> None:
    for options in ({},) if Rule is LearnedUpdate else ({}, {"learned": True}):
        text = repr(Rule(**options))
        assert text.startswith(Rule.__name__)
        assert Rule is LearnedUpdate or f"learned={bool(options)}" in text


# Learned


@pytest.mark.parametrize("num_features", [0, 4])
@pytest.mark.parametrize("family", [Normal(DIM), MultivariateNormal(DIM), LowRankMultivariateNormal(DIM)])
def test_learned_update_is_sized_by_its_setup(family: Any, num_features: int) -> None:
    rule = LearnedUpdate((8, 7), nn.Tanh)
    assert not list(rule.parameters())
    rule.setup(family, num_features)
    layers = [m for m in rule.network or () if isinstance(m, nn.Linear)]
    count = family.num_params
    outputs = (3 if isinstance(family, Normal) else 2) * count
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    assert sizes == [(num_features + 3 * count, 8), (8, 7), (7, outputs)]
    assert sum(isinstance(m, nn.Tanh) for m in rule.modules()) == 2
    features = draws(ROWS, num_features) if num_features else None
    assert climb(rule, draws(ROWS, count), draws(2, ROWS, count), features).shape == (ROWS, count)


def test_learned_update_is_the_gated_formula() -> None:
    rule = learned_update(num_features=2)
    phi, grads = phi_and_gradients(1)
    features = draws(ROWS, 2, seed=4)
    smallest = math.exp(-8.0)
    assert rule.network is not None
    grads[0, 0, 0] = 0.0
    seen = torch.cat([features, phi, grads[0].abs().clamp(min=smallest).log() / 8.0, grads[0].sign()], -1)
    gate, fresh, natural = rule.network(seen).chunk(3, -1)
    expected = gate.sigmoid() * phi + (1 - gate.sigmoid()) * fresh
    expected = expected + natural.sigmoid() * (NaturalGradient(1.0).update(phi, grads[0], ())[0] - phi)
    torch.testing.assert_close(climb(rule, phi, grads, features), expected)
    other = climb(rule, phi, grads, features + 1.0)
    assert (other - expected).abs().max() > 1e-4  # the features matter


def test_learned_update_takes_a_share_of_the_newton_step_where_it_has_the_curvature() -> None:
    rule, family = learned_update(num_features=2), Normal(DIM)
    phi, grads = phi_and_gradients(1)
    factor = draws(ROWS, DIM, DIM, seed=5)
    curvature = Curvature(grads[0], draws(ROWS, DIM, seed=6), 0.5 * torch.eye(DIM) + factor @ factor.mT, family)
    state = rule.init(phi, draws(ROWS, 2, seed=4))
    natural = rule.update(phi, grads[0], state)[0]
    newton = rule.update(phi, curvature, state)[0]
    assert rule.takes is Curvature
    assert rule.network is not None
    size = grads[0].abs().clamp(min=math.exp(-8.0)).log() / 8.0
    logit = rule.network(torch.cat([*state, phi, size, grads[0].sign()], -1)).chunk(3, -1)[2]
    direct = Newton(1.0).update(phi, curvature, ())[0]
    other = NaturalGradient(1.0).update(phi, grads[0], ())[0]
    expected = (logit + 2.0).sigmoid() * (direct - phi) - logit.sigmoid() * (other - phi)
    torch.testing.assert_close(newton - natural, expected)
    assert (newton - natural).abs().max() > 1e-2


def test_learned_update_of_many_latents_does_without_the_curvature() -> None:
    for dim, expected in ((128, True), (129, False)):
        rule = LearnedUpdate((4,))
        rule.setup(Normal(dim))
        assert (rule.takes is Curvature) == expected


def test_learned_update_detaches_what_it_sees_but_trains_its_network_and_features() -> None:
    rule = learned_update(num_features=2)
    phi, grads = (x.requires_grad_() for x in phi_and_gradients(1))
    features = draws(ROWS, 2, seed=4).requires_grad_()
    refined, _ = rule.update(phi, grads[0], rule.init(phi, features))
    inputs = torch.autograd.grad(refined.sum(), [phi, grads], allow_unused=True, retain_graph=True)
    assert inputs == (None, None)
    trained = torch.autograd.grad(refined.square().sum(), [features, *rule.parameters()])
    assert all(g.abs().max() > 0 for g in trained)


def test_learned_update_may_be_set_up_again_for_the_same_sizes_only() -> None:
    rule = learned_update(num_features=2)
    network = rule.network
    rule.setup(Normal(DIM), 2)
    assert rule.network is network
    for family, num_features in ((Normal(DIM + 1), 2), (Normal(DIM), 3), (MultivariateNormal(DIM), 2)):
        with pytest.raises(ValueError, match="a new LearnedUpdate for each guide"):
            rule.setup(family, num_features)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_learned_update_is_finite_for_gradients_of_any_size(size: float) -> None:
    phi, grads = phi_and_gradients(3)
    assert climb(learned_update(), phi, size * grads).isfinite().all()


# Errors


@pytest.mark.parametrize("Rule", FORMULAS)
@pytest.mark.parametrize("step_size", [0.0, -0.1, math.inf, math.nan])
def test_step_size_must_be_positive_and_finite(Rule: Any, step_size: float) -> None:
    with pytest.raises(ValueError, match=r"step_size=.* because it must be a positive number; try"):
        Rule(step_size)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0, math.nan])
def test_momentum_must_be_below_one(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"momentum=.* because it must be in \[0, 1\)"):
        GradientAscent(0.01, momentum)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)])
def test_betas_must_be_below_one(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"Cannot use beta.*; try beta"):
        Adam(0.05, betas)


@pytest.mark.parametrize("Rule", [GradientAscent, Adam])
@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_max_norm_must_be_positive(Rule: Any, max_norm: float) -> None:
    with pytest.raises(ValueError, match=r"max_norm=.* because it must be a positive number"):
        Rule(0.05, max_norm=max_norm)


@pytest.mark.parametrize("family", [MultivariateNormal(DIM), LowRankMultivariateNormal(DIM)])
def test_natural_gradient_knows_the_mean_field_normal_only(family: Any) -> None:
    with pytest.raises(ValueError, match=r"by NaturalGradient because .*try update=Adam\(0.05\)"):
        NaturalGradient().setup(family)
    NaturalGradient().setup(Normal(DIM))
    for Rule in (Adam, GradientAscent):
        Rule().setup(family)
