"""Gap decomposition, log evidence and local optimum against the closed forms of the linear-Gaussian model."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from pyro_amortized import AmortizedGuide, GapEstimate, PerDatapointGuide, estimate_gaps, log_evidence, optimize_local
from pyro_amortized.diagnostics.evidence.annealing import anneal
from pyro_amortized.diagnostics.evidence.evidence import summary
from pyro_amortized.diagnostics.evidence.proposal import first_proposals
from pyro_amortized.diagnostics.gaps.gaps import warn_of_violations
from pyro_amortized.diagnostics.optimum import local_optimum
from pyro_amortized.diagnostics.optimum.lbfgs import minimize_rows
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.families import Mixture

pytestmark = pytest.mark.usefixtures("_float64")

LATENTS, FEATURES, POINTS = 20, 100, 64


class Oracle:
    """x = W z + noise of variances psi; easy: weak, nearly orthogonal loadings; hard: strong correlations."""

    def __init__(self, hard: bool, points: int = POINTS, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        weights = torch.randn(FEATURES, LATENTS, generator=rng)
        if hard:
            correlation = 0.4 * torch.ones(LATENTS, LATENTS) + 0.6 * torch.eye(LATENTS)
            weights = weights @ torch.linalg.cholesky(correlation).T
        else:
            weights = 0.15 * weights
        self.weights, self.psi = weights, 0.5 + torch.rand(FEATURES, generator=rng)
        z = torch.randn(points, LATENTS, generator=rng)
        self.x = z @ weights.T + self.psi.sqrt() * torch.randn(points, FEATURES, generator=rng)
        self.precision = torch.eye(LATENTS) + weights.T @ (weights / self.psi[:, None])
        self.gap = 0.5 * (self.precision.diagonal().log().sum() - torch.logdet(self.precision)).item()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weights.T, self.psi.sqrt()).to_event(1), obs=x)

    def mean(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.precision, self.weights.T @ (x / self.psi).T).T

    def log_evidence(self) -> np.ndarray[Any, Any]:
        covariance = self.weights @ self.weights.T + torch.diag(self.psi)
        return dist.MultivariateNormal(torch.zeros(FEATURES), covariance).log_prob(self.x).numpy()

    def encoder(self, shift: Tensor | float = 0.0) -> nn.Module:
        """The best mean-field posterior, its mean off by ``shift``."""
        return _Function(lambda x: (self.mean(x) + shift, self.precision.diagonal().rsqrt().expand(len(x), LATENTS)))


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


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


@pytest.mark.slow
def test_standard_errors_of_the_log_evidence_cover_the_truth() -> None:
    """Of 5 x 64 independent estimates, 2-se intervals cover the truth in a share within 3 binomial s.e. of 95.4%."""
    oracle = Oracle(hard=True)
    guide = AmortizedGuide(oracle.model, oracle.encoder())
    optimum = optimize_local(oracle.model, guide, (oracle.x,))
    covered, covered_by_tenth = [], []
    for seed in range(5):
        result = log_evidence(oracle.model, guide, (oracle.x,), optimum=optimum, seed=seed, tolerance=0.1)
        error = np.abs(result["log_evidence"] - oracle.log_evidence())
        covered.append(error < 2 * result["log_evidence_se"])
        covered_by_tenth.append(error < 0.2 * result["log_evidence_se"])
    standard_error = math.sqrt(0.954 * 0.046 / (5 * POINTS))
    assert abs(np.mean(covered) - 0.954) < 3 * standard_error
    assert np.mean(covered_by_tenth) < 0.5  # the twin: intervals a tenth as wide do not cover


class Factors:
    """A Bernoulli factor model whose evidence a fine grid gives: two latents."""

    def __init__(self, points: int = 12) -> None:
        rng = torch.Generator().manual_seed(1)
        self.weights = 2.0 * torch.randn(6, 2, generator=rng)
        self.x = torch.bernoulli(torch.full((points, 6), 0.5), generator=rng)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ self.weights.T).to_event(1), obs=x)

    def log_evidence(self) -> np.ndarray[Any, Any]:
        axis = torch.linspace(-8, 8, 801)
        z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
        log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_joint = log_joint + dist.Bernoulli(logits=z @ self.weights.T).log_prob(self.x).sum(-1)
        return (log_joint.logsumexp(0) + 2 * math.log(16 / 800)).numpy()


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


def test_a_doubtful_estimate_is_flagged() -> None:
    """Far more draws would be needed for the tolerance than are allowed."""
    factors = Factors()
    guide = AmortizedGuide(factors.model)
    gaps = estimate_gaps(factors.model, guide, (factors.x,), tolerance=1e-4, max_samples=2000)
    assert not gaps.dataset["reliable"].any()
    assert "unreliable: 12 of 12" in str(gaps)


@pytest.fixture
def gaps() -> GapEstimate:
    factors = Factors()
    return estimate_gaps(factors.model, AmortizedGuide(factors.model), (factors.x,))


def test_table_says_what_it_holds(gaps: GapEstimate) -> None:
    table = str(gaps)
    for text in ("12 datapoints", "'data'", "nats", "approximation gap", "amortization gap", "unreliable: 0 of 12"):
        assert text in table
    assert f"{gaps.dataset['inference_gap'].values.mean():.3f}" in table


def test_netcdf_round_trip(gaps: GapEstimate, tmp_path: Path) -> None:
    gaps.to_netcdf(tmp_path / "gaps.nc")
    again = GapEstimate.from_netcdf(tmp_path / "gaps.nc")
    assert again.dataset.identical(gaps.dataset)
    assert again.dataset.attrs["units"] == "nats per datapoint"


def test_plot_returns_axes(gaps: GapEstimate) -> None:
    import matplotlib

    matplotlib.use("Agg")
    axes = gaps.plot()
    assert "nats" in axes.get_ylabel()
    assert len(axes.patches) == 24
    import matplotlib.pyplot as plt

    plt.close(axes.figure)


@pytest.mark.slow
def test_plot_leaves_out_what_is_far_above(gaps: GapEstimate) -> None:
    import matplotlib.pyplot as plt

    before = gaps.plot().get_ylim()[1]
    data = gaps.dataset.copy(deep=True)
    for name in ("amortization_gap", "inference_gap"):
        data[name].values[3] = 4321.0
    data["reliable"].values[:2] = False
    axes = GapEstimate(data).plot()
    assert axes.get_ylim()[1] < 5 * before
    assert [text.get_text() for text in axes.texts] == ["largest: 4.32e+03"]
    assert "unreliable (2)" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert "datapoints of plate 'data'" in axes.get_title()
    assert "gap" in axes.get_title().splitlines()[1]
    for name in ("amortization_gap", "inference_gap"):
        data[name].values[:] = np.inf
    GapEstimate(data).plot()
    plt.close("all")


def test_reports_have_an_html_form(gaps: GapEstimate) -> None:
    html = gaps._repr_html_()
    assert html.count(" ".join(gaps.verdict.split()).replace('"', "&quot;")) == 1
    assert "log evidence  log p(x)" in html
    assert "<script" not in html


@pytest.mark.slow
def test_batches_concatenate_to_the_whole() -> None:
    oracle = Oracle(hard=False, points=10)
    guide = AmortizedGuide(oracle.model, oracle.encoder())
    joined = GapEstimate.concat([estimate_gaps(oracle.model, guide, (part,)) for part in oracle.x.split(4)])
    assert joined.dataset.sizes == {"data": 10}
    assert joined.dataset["data"].values.tolist() == list(range(10))
    assert np.abs(joined.dataset["approximation_gap"] - oracle.gap).max() < 0.02
    with pytest.raises(ValueError, match="there are none"):
        GapEstimate.concat([])


def test_global_latents_are_held_at_their_median() -> None:
    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.0, 1.0, 5.0])
    guide = AmortizedGuide(model)
    result = log_evidence(model, guide, (x,))
    shift = guide.median(x)["shift"]
    truth = dist.Normal(shift, math.sqrt(2.0)).log_prob(x).detach().numpy()
    assert np.abs(result["log_evidence"] - truth).max() < 0.02
    assert "shift" in result.attrs["global_latents"]
    assert set(result) == {"log_evidence", "log_evidence_se", "khat", "ess", "num_samples", "reliable"}


def test_random_models_are_refused() -> None:
    dropout = nn.Dropout(0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(dropout(z), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"two runs at the same latent values.*model.eval"):
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


@pytest.mark.slow
def test_progress_bars_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    factors = Factors()
    guide = AmortizedGuide(factors.model)
    estimate_gaps(factors.model, guide, (factors.x,), tolerance=0.5)
    assert capfd.readouterr().err == ""
    estimate_gaps(factors.model, guide, (factors.x,), tolerance=0.5, progress=True)
    shown = capfd.readouterr().err
    assert "log evidence: 100%" in shown
    assert "ELBO of q and q*: 100%" in shown


# Posteriors that are not normal: here biased estimates, missed modes and early stops would show.


def quartic(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
        pyro.factor("tails", -0.05 * z.pow(4).sum(-1))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def test_reported_elbos_are_unbiased() -> None:
    """E[z^4] = 3 under q = N(0, I): the mean of 60 z-scores is standard normal over sqrt(60), and t with 9 df each."""
    x = torch.zeros(60)
    guide = AmortizedGuide(quartic, _Function(lambda x: (torch.zeros(len(x), LATENTS), torch.ones(len(x), LATENTS))))
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

    with pytest.raises(ValueError, match=r"depends on the latents of others.*model.eval"):
        estimate_gaps(model, AmortizedGuide(model), (torch.randn(5),))


def test_random_encoders_are_refused() -> None:
    factors = Factors()
    encoder = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"different variational parameters.*guide.eval"):
        estimate_gaps(factors.model, AmortizedGuide(factors.model, encoder), (factors.x,))


def mixed(x: Tensor) -> None:
    """A discrete latent chooses between two linear-Gaussian models: posteriors with a second mode or a shoulder."""
    weights = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z.unsqueeze(-2) @ weights[c]).squeeze(-2), 1.0).to_event(1), obs=x)


def mixed_data(size: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Data of :func:`mixed`, and its exact log evidence."""
    weights = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(3)
    c = (torch.rand(size, generator=rng) < 0.7).long()
    z = torch.randn(size, 3, generator=rng)
    x = (z.unsqueeze(-2) @ weights[c]).squeeze(-2) + torch.randn(size, 6, generator=rng)
    parts = [
        math.log(share) + dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + w.T @ w).log_prob(x)
        for share, w in zip((0.3, 0.7), weights, strict=True)
    ]
    return x, torch.stack(parts).logsumexp(0).numpy()


@pytest.mark.slow
def test_small_further_modes_and_shoulders_are_found() -> None:
    x, exact = mixed_data(60)
    result = log_evidence(mixed, AmortizedGuide(mixed), (x,))
    good = ((result["khat"] < 0.7) & (result["log_evidence_se"] <= 0.02)).values
    assert good.mean() >= 0.95
    error = np.abs(result["log_evidence"] - exact)[good]
    assert error.max() < 0.05
    assert (error / result["log_evidence_se"][good] < 3).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_annealing_from_a_poor_proposal(wrong: float) -> None:
    """Weights of annealed chains average to the evidence; a wrong one is told from it."""
    model = Oracle(hard=False, points=4)
    problem = bind(model.model, AmortizedGuide(model.model, model.encoder()), (model.x,), None, 0)
    ((_, proposal, _),) = first_proposals(problem, problem.phi, (0,))
    proposal.loc[0] += 2.0 / math.sqrt(LATENTS)
    weights = anneal(problem, proposal, torch.arange(4), 0.02, 100_000, (0,))
    relative = (weights - torch.from_numpy(model.log_evidence() + wrong)).exp()
    error = (relative.mean(0) - 1).abs() / (relative.std(0) / len(relative) ** 0.5)
    assert (error < 3.5).all() == (wrong == 0.0)


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


def made_up(count: int = 100, **means: float) -> GapEstimate:
    """An estimate with given gaps."""
    import xarray

    rng = np.random.default_rng(0)
    data = {"khat": np.zeros(count), "reliable": np.ones(count, dtype=bool)}
    for name in ("log_evidence", "elbo_optimal", "elbo", "approximation_gap", "amortization_gap", "inference_gap"):
        data[name] = means.get(name, 0.0) + 0.1 * means.get(name, 0.0) * rng.standard_normal(count)
        data[f"{name}_se"] = np.full(count, 0.001)
    data["inference_gap"] = data["approximation_gap"] + data["amortization_gap"]
    return GapEstimate(
        xarray.Dataset({name: ("data", values) for name, values in data.items()}, {"data": range(count)})
    )


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        (made_up(amortization_gap=1.0, approximation_gap=0.1), "The amortization gap dominates ("),
        (made_up(amortization_gap=0.1, approximation_gap=1.0), "The approximation gap dominates (0.996 of 1.1 nats)"),
        (made_up(amortization_gap=1.0, approximation_gap=0.9), "Both gaps matter"),
        (made_up(amortization_gap=0.01, approximation_gap=0.01), "Inference is close to exact"),
    ],
)
def test_verdict_names_the_gap_to_work_on(gaps: GapEstimate, words: str) -> None:
    assert words in gaps.verdict
    assert "can be trusted as far as checked: no datapoint is flagged" in gaps.verdict
    assert gaps.verdict[:40] in str(gaps)


def test_verdict_says_whether_to_trust_it() -> None:
    gaps = made_up(amortization_gap=1.0)
    gaps.dataset["reliable"][:30] = False
    gaps.dataset["khat"][:20] = 0.9
    assert "cannot be trusted: 30 of 100 datapoints are flagged, 20 for heavy-tailed weights" in gaps.verdict
    gaps.dataset["reliable"][5:] = True
    assert "as far as checked: 5 of 100" in gaps.verdict


def test_the_worst_datapoints_are_named() -> None:
    gaps = made_up(amortization_gap=0.1)
    gaps.dataset["inference_gap"][[7, 3]] = torch.tensor([500.0, 90.0])
    assert gaps.worst(2)["data"].values.tolist() == [7, 3]
    assert gaps.worst(1, by="khat").sizes["data"] == 1
    assert "5 of 100 datapoints hold" in gaps.verdict
    assert "(7, 3, " in gaps.verdict
    with pytest.raises(ValueError, match="Cannot sort datapoints by 'gap' because there is no such variable"):
        gaps.worst(by="gap")


def test_broken_bounds_raise_a_warning() -> None:
    gaps = made_up(approximation_gap=0.0)
    warn_of_violations(gaps)
    gaps.dataset["approximation_gap"][:15] = -0.01
    assert int(gaps.violations.sum()) == 15
    with pytest.warns(UserWarning, match=r"fails by more than two standard errors at 15 of 100 datapoints"):
        warn_of_violations(gaps)


# Models on which estimates were once wrong without a word.


@pytest.mark.slow
def test_modes_are_found_though_other_climbs_led_to_known_ones() -> None:
    """Two modes in ten dimensions, of mass one half each: a missed one costs log 2."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal((2 * k - 1).unsqueeze(-1) * z, 0.1).to_event(1), obs=x)

    x = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    truth = dist.Normal(0.0, math.sqrt(1.01)).log_prob(x).sum(-1).numpy()
    result = log_evidence(model, AmortizedGuide(model), (x,))
    assert np.abs(result["log_evidence"] - truth).max() < 0.01


@pytest.mark.slow
def test_infinite_densities_where_numbers_underflow_have_no_weight() -> None:
    """A gamma density of shape below 1 is infinite at 0, which exp(z) is at z = -746."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(0.05, 0.1))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 100.0, 1000.0])
    truth = dist.GammaPoisson(torch.tensor(0.05), 0.1).log_prob(x).numpy()
    result = log_evidence(model, AmortizedGuide(model), (x,), tolerance=0.005)
    assert np.abs(result["log_evidence"] - truth).max() < 0.01


@pytest.mark.slow
def test_a_posterior_with_tails_as_heavy_as_those_of_a_cauchy_prior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    x = torch.linspace(-1.0, 1.0, 20)
    result = log_evidence(model, AmortizedGuide(model), (x,))
    z_scores = (result["log_evidence"] - dist.Normal(0.0, 1.0).log_prob(x).numpy()) / result["log_evidence_se"]
    assert np.abs(z_scores).max() < 4.0
    assert np.abs(z_scores.mean()) < 3 / math.sqrt(20)


@pytest.mark.slow
def test_standard_errors_from_few_draws_that_matter_are_wide_enough() -> None:
    """Where the proposal is close, most of the error comes from the few outermost draws."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    guide = AmortizedGuide(model)
    optimum = optimize_local(model, guide, (x,), tolerance=0.2)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum(-1).numpy()
    results = [log_evidence(model, guide, (x,), optimum=optimum, seed=seed) for seed in range(2)]
    z_scores = np.concatenate([(r["log_evidence"] - truth) / r["log_evidence_se"] for r in results])
    assert z_scores.std() < 1.35


@pytest.mark.slow
def test_guides_with_draws_of_no_density_have_no_finite_elbo() -> None:
    """A normal posterior of a scale that must be positive: the log-joint at negative draws is not a number."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, z.sqrt(), validate_args=False), obs=x)

    x = torch.randn(6)
    encoder = _Function(lambda x: (x.new_ones(len(x), 1), x.new_full((len(x), 1), 0.4)))
    with pyro.validation_enabled(False):
        gaps = estimate_gaps(model, AmortizedGuide(model, encoder), (x,))
    assert np.isneginf(gaps.dataset["elbo"]).all()
    assert not gaps.dataset["reliable"].any()
    assert "The ELBO of 6 datapoints is not finite" in str(gaps)


@pytest.mark.slow
def test_log_evidence_takes_loaders() -> None:
    oracle = Oracle(hard=False, points=5)
    guide = AmortizedGuide(oracle.model, oracle.encoder())
    loader = DataLoader(TensorDataset(oracle.x), batch_size=2)
    result = log_evidence(oracle.model, guide, loader)
    assert result["data"].values.tolist() == list(range(5))
    assert np.abs(result["log_evidence"] - oracle.log_evidence()).max() < 0.05
    assert result.attrs["num_annealed"] == 0
    optimum = optimize_local(oracle.model, guide, (oracle.x[:2],))
    with pytest.raises(ValueError, match="one optimum for several batches"):
        log_evidence(oracle.model, guide, loader, optimum=optimum)
    with pytest.raises(ValueError, match=r"model_args=<DataLoader>.*one batch"):
        optimize_local(oracle.model, guide, loader)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_samples=0.*at least 1"):
        log_evidence(oracle.model, guide, (oracle.x[:2],), max_samples=0)


@pytest.mark.slow
def test_annealing_from_where_the_model_has_no_density() -> None:
    """Half of the chains start at negative latents, which are impossible, and must not set the pace of the others."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("positive", torch.where(z < 0, -math.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(1.0, 3.0, 5)
    encoder = _Function(lambda x: (0.5 * x.unsqueeze(-1), x.new_full((len(x), 1), 0.05)))
    problem = bind(model, AmortizedGuide(model, encoder), (x,), None, 0)
    ((_, proposal, _),) = first_proposals(problem, problem.phi, (0,))
    proposal.loc[0] -= 0.5 * x.unsqueeze(-1)
    weights = anneal(problem, proposal, torch.arange(5), 0.02, 100_000, (0,))
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x) + dist.Normal(0.0, 1.0).cdf(x / math.sqrt(2.0)).log()
    relative = (weights - truth).exp()
    assert ((relative.mean(0) - 1).abs() < 4 * relative.std(0) / len(relative) ** 0.5).all()


def test_datapoints_of_which_no_draw_has_weight_are_flagged() -> None:
    weights = torch.randn(1000, 2)
    weights[:, 1] = -math.inf
    found = summary(weights)
    assert found["log_evidence"][0].isfinite()
    assert found["log_evidence"][1].isneginf()
    assert found["khat"][1].isposinf()


@pytest.mark.slow
def test_arguments_that_the_encoder_lacks_are_named() -> None:
    """And the remedy works: with it none is, and the slope is not halved."""

    def mixed(x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * x + effect, 0.5), obs=y)

    x = torch.randn(50)
    y = 2 * x + 1.1 * torch.randn(50)
    slopes = []
    for spec in (None, ["x", "y"]):
        pyro.clear_param_store()
        guide = AmortizedGuide(mixed, encoder_input=spec)
        svi = SVI(mixed, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        for _ in range(250):
            svi.step(x, y)
        slopes.append(pyro.param("slope").item())
        gaps = estimate_gaps(mixed, guide, (x, y))
        words = "the encoder does not see 'x', on which posteriors depend"
        assert (words in " ".join(gaps.verdict.split())) == (spec is None)
        assert gaps.dataset.attrs.get("encoder_input_to_try") == (None if spec else "['x', 'y']")

    def shared(weights: Tensor, y: Tensor) -> None:
        """As many weights as datapoints, which are no data of these."""
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(weights * z.unsqueeze(-1), 0.5).to_event(1), obs=y)

    pyro.clear_param_store()
    gaps = estimate_gaps(shared, AmortizedGuide(shared), (torch.randn(6), torch.randn(6, 6)))
    assert "unseen_arguments" not in gaps.dataset.attrs
    least_squares = ((x * y).sum() / x.square().sum()).item()
    assert slopes[0] < 0.7 * least_squares
    assert slopes[1] > 0.9 * least_squares
