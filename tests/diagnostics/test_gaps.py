"""Gap decomposition and local optimum against closed forms, grids and quadrature; what is refused."""

import html
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from factor_models import FEATURES, LATENTS, POINTS, Factors, Oracle
from models import Function
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from pyro_amortized import AmortizedGuide, PerDatapointGuide, estimate_gaps, log_evidence, optimize_local
from pyro_amortized.diagnostics.optimum import local_optimum
from pyro_amortized.diagnostics.optimum.lbfgs import minimize_rows
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.families import Mixture

pytestmark = pytest.mark.usefixtures("_float64")


@pytest.fixture(params=[False, True], ids=["easy", "hard"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


def test_the_oracle_has_an_easy_and_a_hard_gap() -> None:
    assert 0.1 < Oracle(hard=False).gap < 1.0
    assert 3.0 < Oracle(hard=True).gap < 7.0


def test_gaps_of_the_best_mean_field_guide(oracle: Oracle) -> None:
    gaps = estimate_gaps(oracle.model, AmortizedGuide(oracle.model, oracle.encoder()), (oracle.x,)).dataset
    assert np.abs(gaps["approximation_gap"] - oracle.gap).max() < 0.02
    assert np.abs(gaps["log_evidence"] - oracle.log_evidence()).max() < 0.05
    assert np.abs(gaps["amortization_gap"]).max() < 0.02
    assert gaps["reliable"].all()


def test_an_encoder_with_a_shifted_mean_has_the_amortization_gap_of_its_shift(oracle: Oracle) -> None:
    shift = torch.linspace(-0.2, 0.2, LATENTS)
    expected = 0.5 * (shift @ oracle.precision @ shift).item()
    assert expected > 0.1
    gaps = estimate_gaps(oracle.model, AmortizedGuide(oracle.model, oracle.encoder(shift)), (oracle.x,)).dataset
    assert np.abs(gaps["amortization_gap"] - expected).max() < 0.02
    assert np.abs(gaps["approximation_gap"] - oracle.gap).max() < 0.02
    assert np.allclose(gaps["inference_gap"], gaps["approximation_gap"] + gaps["amortization_gap"])


@pytest.mark.slow
def test_the_full_rank_family_has_no_approximation_gap(oracle: Oracle) -> None:
    guide = AmortizedGuide(oracle.model, family="multivariate_normal")
    gaps = estimate_gaps(oracle.model, guide, (oracle.x,)).dataset
    assert np.abs(gaps["approximation_gap"]).max() < 0.02
    assert (gaps["amortization_gap"] > 0.1).all()  # untrained


def test_the_low_rank_family_lies_between() -> None:
    small = Oracle(hard=True, points=8)
    guide = AmortizedGuide(small.model, family="low_rank_multivariate_normal")
    gap = estimate_gaps(small.model, guide, (small.x,)).dataset["approximation_gap"].values
    assert (gap > 0.05).all()
    assert (gap < small.gap).all()


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "low_rank_multivariate_normal"])
@pytest.mark.parametrize("guide_class", [AmortizedGuide, PerDatapointGuide])
def test_a_skewed_posterior_against_a_grid(family: str, guide_class: type) -> None:
    factors = Factors()
    guide = guide_class(factors.model, family=family)
    gaps = estimate_gaps(factors.model, guide, (factors.x,)).dataset
    z_scores = (gaps["log_evidence"] - factors.log_evidence()) / gaps["log_evidence_se"]
    assert np.abs(z_scores).max() < 4.5  # 12 points
    assert np.abs(z_scores).max() > 0  # an estimate, not the truth itself
    assert (gaps["approximation_gap"] > -4 * gaps["approximation_gap_se"]).all()
    assert (gaps["amortization_gap"] > 0).all()
    assert gaps["reliable"].all()


def test_the_local_optimum_is_one(oracle: Oracle) -> None:
    """The closed form: mean of the posterior, precisions of its diagonal."""
    optimum = optimize_local(oracle.model, AmortizedGuide(oracle.model, oracle.encoder(0.3)), (oracle.x,))
    loc, log_scale = optimum.phi.chunk(2, -1)
    scale = oracle.precision.diagonal().rsqrt()
    assert ((loc - oracle.mean(oracle.x)) / scale).abs().max() < 0.02
    assert (log_scale - scale.log()).abs().max() < 0.02
    assert optimum.converged.all()
    assert str(optimum).split(" -> ")[0] in html.unescape(optimum._repr_html_())
    assert "64 converged" in str(optimum)


@pytest.mark.slow
def test_subsampled_plates_keep_their_coordinates_and_drop_their_scale() -> None:
    oracle = Oracle(hard=False)
    index = torch.tensor([5, 1, 40])

    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("rows", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ oracle.weights.T, oracle.psi.sqrt()).to_event(1), obs=x[index])

    gaps = estimate_gaps(model, AmortizedGuide(model, oracle.encoder()), (oracle.x, index)).dataset
    assert gaps["rows"].values.tolist() == [5, 1, 40]
    assert np.abs(gaps["log_evidence"] - oracle.log_evidence()[index.numpy()]).max() < 0.05


@pytest.mark.slow
def test_models_that_cannot_run_on_many_draws_or_few_rows_give_the_same_numbers() -> None:
    """Draws are then evaluated one by one, and finished datapoints along with the others."""
    oracle = Oracle(hard=False, points=6)

    def stubborn(x: Tensor) -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            loc = z.reshape(6, LATENTS) @ oracle.weights.T
            pyro.sample("x", dist.Normal(loc, oracle.psi.sqrt()).to_event(1), obs=x)

    results = []
    for number, model in enumerate((oracle.model, stubborn)):
        guide = AmortizedGuide(model, oracle.encoder(), name=f"guide_{number}")
        results.append(optimize_local(model, guide, (oracle.x,), tolerance=0.2))
    assert torch.allclose(results[0].phi, results[1].phi, atol=1e-3)
    assert torch.allclose(results[0].elbo, results[1].elbo, atol=1e-6)


def test_random_models_are_refused() -> None:
    dropout = nn.Dropout(0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(dropout(z), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"two runs at the same latent values.*eval\(\) of modules"):
        estimate_gaps(model, AmortizedGuide(model), (torch.randn(10),))


def test_bad_arguments_are_refused() -> None:
    factors = Factors()
    with pytest.raises(ValueError, match=r"Cannot diagnose a method.*AmortizedGuide"):
        estimate_gaps(factors.model, factors.model, (factors.x,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"try \(x,\)"):
        estimate_gaps(factors.model, AmortizedGuide(factors.model), factors.x)  # type: ignore[arg-type]

    def no_local(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="no local latents"):
        estimate_gaps(no_local, AmortizedGuide(no_local), (torch.randn(3),))


def test_infinite_log_joints_are_named() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("broken", torch.where(x > 1, -math.inf, 0.0) + 0 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"1 datapoints.*not finite.*\[2\]"):
        estimate_gaps(model, AmortizedGuide(model), (torch.tensor([0.0, 0.5, 2.0]),))


# Posteriors that are not normal: here biased estimates, missed modes and early stops would show.


def quartic(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
        pyro.factor("tails", -0.05 * z.pow(4).sum(-1))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.slow
def test_reported_elbos_are_unbiased() -> None:
    """E[z^4] = 3 under q = N(0, I): the mean of 60 z-scores is standard normal over sqrt(60), and t with 9 df each."""
    x = torch.zeros(60)
    guide = AmortizedGuide(quartic, Function(lambda x: (torch.zeros(len(x), LATENTS), torch.ones(len(x), LATENTS))))
    optimum = optimize_local(quartic, guide, (x,))
    truth = -0.05 * 3 * LATENTS - 0.5 * math.log(2 * math.pi)
    z_scores = (optimum.initial_elbo - truth) / optimum.initial_elbo_se
    assert z_scores.mean().abs() < 4 * math.sqrt(9 / 7) / math.sqrt(60)
    assert 0.7 < z_scores.std() < 1.6


def test_whitened_noise_would_be_biased() -> None:
    """The twin: the same estimate on whitened noise, which is why no estimate is made with it."""
    from pyro_amortized.objective.noise import generator, quasi_normal

    fourth = [quasi_normal(128, 200, LATENTS, generator(0, 0), whiten=w).pow(4).mean((0, 2)) - 3 for w in (True, False)]
    biased, unbiased = ((f.mean() / f.std() * math.sqrt(200)).abs() for f in fourth)
    assert unbiased < 4 < biased


def test_a_second_mode_is_found() -> None:
    """Two equal modes: the best normal covers one of them, and misses log 2."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)

    x = torch.linspace(0.4, 2.0, 20)
    z = torch.linspace(-6, 6, 20001).unsqueeze(-1)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.abs(), 0.1).log_prob(x)
    truth = (log_joint.logsumexp(0) + math.log(12 / 20000)).numpy()
    gaps = estimate_gaps(model, AmortizedGuide(model), (x,)).dataset
    assert np.abs(gaps["log_evidence"] - truth).max() < 0.01
    assert np.abs(gaps["approximation_gap"] - math.log(2)).max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["normal", "multivariate_normal"])
def test_strong_correlations_and_differences_of_scale(family: str, dtype: torch.dtype) -> None:
    """Loadings with singular values from 1 to 100: condition number 10^4."""
    rng = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(40, 20, generator=rng))[0]
    right = torch.linalg.qr(torch.randn(20, 20, generator=rng))[0]
    weights = ((left * torch.logspace(0, 2, 20)) @ right.T).to(dtype)
    x = torch.randn(10, 20, generator=rng).to(dtype) @ weights.T + torch.randn(10, 40, generator=rng).to(dtype)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights.T, x.new_ones(())).to_event(1), obs=x)

    precision = torch.eye(20) + weights.double().T @ weights.double()
    mean_field_gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    expected = mean_field_gap if family == "normal" else 0.0
    gaps = estimate_gaps(model, AmortizedGuide(model, family=family), (x,)).dataset
    assert mean_field_gap > 10
    assert np.abs(gaps["approximation_gap"] - expected).max() < 0.02
    if dtype == torch.float64:  # rounding in float32 may keep a line search from descending, which is flagged
        assert gaps["reliable"].all()


def test_enumerated_latents_are_summed_out() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 4 * k, 1.0), obs=x)

    x = torch.linspace(-2.0, 6.0, 9)
    components = [dist.Normal(mean, 2**0.5).log_prob(x) for mean in (0.0, 4.0)]
    truth = (torch.stack(components).logsumexp(0) - math.log(2)).numpy()
    gaps = estimate_gaps(model, AmortizedGuide(model), (x,)).dataset
    assert np.abs(gaps["log_evidence"] - truth).max() < 0.005


def test_latents_that_are_enumerated_for_all_datapoints_are_refused() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 4 * k, 1.0), obs=x)

    with pytest.raises(ValueError, match="'k' belongs to a discrete latent that is enumerated outside of plate 'data'"):
        estimate_gaps(model, AmortizedGuide(model), (torch.randn(5),))


def test_datapoints_that_depend_on_each_other_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"depends on the latents of others.*eval\(\) of modules"):
        estimate_gaps(model, AmortizedGuide(model), (torch.randn(5),))


def test_random_encoders_are_refused() -> None:
    factors = Factors()
    encoder = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"different variational parameters.*guide.eval"):
        estimate_gaps(factors.model, AmortizedGuide(factors.model, encoder), (factors.x,))


@pytest.mark.thinned
@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["fixed", "fixed_data", "closed_over", "fixed_indices", "free"])
def test_models_that_fix_their_size_run_on_all_their_data(size: int, kind: str) -> None:
    offset = torch.zeros(size)

    def model(x: Tensor) -> None:
        indices = torch.arange(size) * 5 // 2 if kind == "fixed_indices" else None
        total = {"fixed": size, "fixed_data": size, "fixed_indices": 3 * size}.get(kind, len(x))
        with pyro.plate("data", total, subsample=indices):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if kind == "fixed_data":
                x = offset + 1.0
            pyro.sample("x", dist.Normal(z + offset if kind == "closed_over" else z, 1.0), obs=x)

    x = torch.ones(size)
    guide = PerDatapointGuide(model)
    guide.setup(x)
    evidence = log_evidence(model, guide, (x,))["log_evidence"]
    assert np.abs(evidence - dist.Normal(0.0, 2**0.5).log_prob(x).numpy()).max() < 0.01
    log_joint = bind(model, guide, (x,), None, 0).objective.log_joint
    assert (log_joint.select(torch.tensor([0, 0, 0])) is not None) == (kind in ("fixed_indices", "free") and size > 1)


def two_squares(x: Tensor) -> None:
    """Two modes, at the roots of x, many standard deviations apart."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.01), obs=x)


def evidence_of_squares(x: Tensor) -> Tensor:
    """By quadrature, ``(N,)``."""
    z = x.sqrt() + torch.linspace(-0.1, 0.1, 20001).unsqueeze(-1)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 0.01).log_prob(x)
    return log_joint.logsumexp(0) + math.log(2 * 1e-5)


@pytest.mark.slow
def test_both_modes_count_where_the_mean_lies_between_them() -> None:
    x = torch.linspace(0.8, 4.0, 6)
    guide = PerDatapointGuide(two_squares, family=lambda dim: Mixture(dim, 2))
    guide.setup(x)
    log_scale = (0.01 / (2 * x.sqrt()) * 1.3).log()
    with torch.no_grad():
        guide.inference.table.data = torch.stack([0 * x, 0 * x + 1, -x.sqrt(), x.sqrt(), log_scale, log_scale], -1)
    gaps = estimate_gaps(two_squares, guide, (x,)).dataset
    exact = evidence_of_squares(x).numpy()
    assert np.abs(gaps["log_evidence"] - exact).max() < 0.01
    assert np.abs(gaps["elbo_optimal"] - exact).max() < 0.01
    assert gaps["reliable"].all()


def test_a_stalled_optimisation_has_not_converged(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    def stalled(*args: Any, **kwargs: Any) -> Any:
        return replace(minimize_rows(*args, **{**kwargs, "max_steps": 2}), converged=torch.ones(len(args[1])).bool())

    monkeypatch.setattr(local_optimum, "minimize_rows", stalled)
    monkeypatch.setattr(
        local_optimum, "_laplace_start", lambda problem, _: (torch.eye(LATENTS).expand(POINTS, -1, -1), None)
    )
    guide = AmortizedGuide(oracle.model, oracle.encoder(1.0))
    assert not optimize_local(oracle.model, guide, (oracle.x,)).converged.any()


@pytest.mark.slow
def test_loader_gives_what_the_whole_data_give() -> None:
    model = Oracle(hard=False, points=10)
    guide = AmortizedGuide(model.model, model.encoder(0.1))
    guide.setup(model.x)
    whole = estimate_gaps(model.model, guide, (model.x,)).dataset
    batches = estimate_gaps(model.model, guide, DataLoader(TensorDataset(model.x), batch_size=4)).dataset
    assert batches["data"].values.tolist() == list(range(10))
    for name in ("elbo", "elbo_optimal", "log_evidence"):
        error = np.hypot(whole[f"{name}_se"], batches[f"{name}_se"])
        assert (np.abs(whole[name] - batches[name]) < 4 * error + 1e-9).all()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (torch.zeros(3, FEATURES), r"positional arguments are passed as a tuple; try \(x,\)"),
        (
            DataLoader(TensorDataset(torch.zeros(4, FEATURES)), shuffle=True),
            "the DataLoader shuffles; try shuffle=False",
        ),
        (
            DataLoader(torch.zeros(4, FEATURES), batch_sampler=BatchSampler(RandomSampler(range(4)), 2, False)),
            "the DataLoader shuffles; try shuffle=False",
        ),
        (iter(()), "the loader has no batches"),
    ],
)
def test_data_of_the_wrong_kind_are_refused(args: Any, match: str) -> None:
    model = Oracle(hard=False, points=3)
    with pytest.raises(ValueError, match=match):
        estimate_gaps(model.model, AmortizedGuide(model.model), args)
