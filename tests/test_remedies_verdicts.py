"""What reports and warnings advise: each is brought about, and then what it says is done, and helps."""

import math
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Function
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    Codebook,
    CollapseReport,
    GapEstimate,
    MLPEncoder,
    NaturalGradient,
    SemiAmortizedGuide,
    VectorQuantizedGuide,
    calibrate,
    collapse_report,
    compare_gaps,
    estimate_gaps,
)
from pyro_amortized.training import FreeBitsELBO, KLAnnealing, linear_schedule

matplotlib.use("Agg")
NOISE = 0.7
MANY = {"vectorize_particles": True, "max_plate_nesting": 1}


def words(report: Any) -> str:
    """What a report prints, in one line."""
    return " ".join(str(report).split())


def draws(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, generator=generator) + NOISE * torch.randn(size, 2, generator=generator)


X = draws(8)


def independent(x: Tensor) -> None:
    """Two latents, each seen by itself: the mean-field family holds the posterior."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def correlated(x: Tensor) -> None:
    """Two latents of which only the sum is seen, twice."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 2)
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


def exact(x: Tensor, shift: float = 0.0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """The posterior of the independent model, shifted by so many of its standard deviations, and wider or narrower."""
    scale = (1 + NOISE**-2) ** -0.5
    return x / (1 + NOISE**2) + shift * scale, torch.full_like(x, spread * scale)


def mean_field(x: Tensor, marginal: bool = False) -> tuple[Tensor, Tensor]:
    """The best mean-field normal of the correlated model, or its marginals."""
    weight = 2 / NOISE**2
    precision = torch.eye(2) + weight
    loc = x.mean(-1, keepdim=True).expand(-1, 2) * weight / (1 + 2 * weight)
    variance = torch.linalg.inv(precision)[0, 0] if marginal else 1 / precision[0, 0]
    return loc, variance.sqrt().expand(len(x), 2)


def made(model: Any, *args: Any, guide_class: Any = AmortizedGuide, data: Tensor = X, **options: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = guide_class(model, *args, **options)
    guide.setup(data)
    return guide


def trained(model: Any, guide: Any, steps: int, data: Tensor = X, lr: float = 0.02) -> Any:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(num_particles=4, **MANY))
    for _ in range(steps):
        svi.step(data)
    return guide.eval()


# Gaps


def gaps(model: Any, guide: Any, **options: Any) -> GapEstimate:
    return estimate_gaps(model, guide, (X,), **options)


def gap(estimate: GapEstimate, name: str) -> float:
    return estimate.mean(f"{name}_gap")[0]


def test_a_richer_family_closes_the_approximation_gap() -> None:
    before = gaps(correlated, made(correlated, Function(mean_field)))
    assert 'try a richer one, such as family="multivariate_normal" or "flow"' in before.verdict
    assert gap(before, "approximation") > 0.4
    assert gap(gaps(correlated, made(correlated, family="multivariate_normal")), "approximation") < 0.02


@pytest.mark.slow
def test_a_flow_closes_the_approximation_gap() -> None:
    guide = trained(correlated, made(correlated, family="flow"), 150)
    assert gap(gaps(correlated, guide), "approximation") < 0.1


def first_column(x: Tensor) -> tuple[Tensor, Tensor]:
    return exact(torch.stack([x[:, 0], torch.zeros(len(x))], -1))


def test_an_encoder_that_sees_more_and_refinement_close_the_amortization_gap() -> None:
    guide = made(independent, Function(first_column))
    before = gaps(independent, guide)
    assert "try guide.refined(20), an encoder that is larger or sees more, longer training or more" in before.verdict
    assert gap(before, "amortization") > 0.3
    assert gap(gaps(independent, guide.refined(20)), "amortization") < 0.02
    assert gap(gaps(independent, made(independent, Function(exact))), "amortization") < 0.01


def bent(x: Tensor) -> None:
    """A latent that is seen through a curve, so that the posterior is no linear function of the data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).exp(), 0.3).expand([*z.shape, 2]).to_event(1), obs=x)


CURVE = torch.linspace(-1.5, 1.5, 40).exp().unsqueeze(-1) + torch.tensor([-0.2, 0.2])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["larger", "longer", "more"])
def test_larger_encoders_longer_training_and_more_data_close_the_amortization_gap(what: str) -> None:
    def left(hidden: int, steps: int, data: Tensor) -> float:
        guide = made(bent, MLPEncoder(2, (hidden,)), data=data)
        guide = trained(bent, guide, steps, data)
        return gap(estimate_gaps(bent, guide, (CURVE[1::4],), max_samples=1000), "amortization")

    sizes = {"larger": (1, 300, CURVE), "longer": (50, 20, CURVE), "more": (50, 300, CURVE[18:22])}
    assert left(*sizes[what]) > 1.5 * left(50, 300, CURVE)


def heavy(x: Tensor) -> None:
    """A posterior with tails far heavier than a normal's."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.StudentT(1.5, torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.StudentT(1.5, z, 1.0).to_event(1), obs=x)


@pytest.mark.slow
def test_more_samples_or_a_wider_tolerance_make_estimates_reliable() -> None:
    def estimate(**options: Any) -> GapEstimate:
        return estimate_gaps(heavy, made(heavy, data=X.exp()), (X.exp(),), **options)

    few = estimate(max_samples=100)
    assert "try a larger max_samples, or a wider tolerance if errors of that size do not matter" in few.verdict
    assert estimate(max_samples=1000).dataset["reliable"].all()
    assert estimate(max_samples=100, tolerance=0.5).dataset["reliable"].all()


def root(constrained: bool) -> Callable[[Tensor], None]:
    """A model without a density at latents below minus the second column of the data, where it is not constrained."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0) if constrained else dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 0.1 + (z if constrained else z + x[:, 1]).sqrt()), obs=x[:, 0])

    return model


@pytest.mark.parametrize(
    "starts", [[50.0] * 11 + [2.0], pytest.param([2.0] * 6, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_datapoints_without_density_are_left_out_or_their_latents_constrained(starts: list[float]) -> None:
    data = torch.stack([torch.linspace(-1.0, 1.0, len(starts)), torch.tensor(starts)], -1)

    def estimate(constrained: bool) -> GapEstimate:
        model = root(constrained)
        with pyro.validation_enabled(False):
            return estimate_gaps(model, made(model, init_scale=1.0, data=data), (data,), max_samples=500)

    found = estimate(False)
    assert "no density; try" in found.verdict
    assert "constraints on the latents" in found.verdict
    assert ("for the others" in found.verdict) == (len(starts) == 12)
    if len(starts) == 12:
        assert found.verdict.count("dataset.where(dataset.reliable)") == 2
        dataset = found.dataset
        others = dataset.where(dataset.reliable)
        assert int(others["elbo"].count()) >= 10
        assert math.isfinite(float(others["elbo"].mean()))
    assert "no density" not in estimate(True).verdict


def test_worst_shows_the_datapoints_that_hold_most_of_the_gap() -> None:
    data = torch.cat([draws(11), torch.full((1, 2), 9.0)])
    guide = made(independent, Function(lambda x: exact(x.clamp(-4.0, 4.0))))
    found = estimate_gaps(independent, guide, (data,))
    assert re.search(r"One datapoint holds \d+% of the inference gap \(11\): see worst\(\)", found.verdict)
    assert found.worst(1)["data"].values.tolist() == [11]


# Comparisons


class Dropout(nn.Sequential):
    def __init__(self) -> None:
        blocks = [(nn.Linear(size, 100), nn.LayerNorm(100), nn.SiLU(), nn.Dropout(0.3)) for size in (2, 100)]
        super().__init__(*blocks[0], *blocks[1])


def gap_of_new_data(remedy: str = "") -> tuple[float, str]:
    pyro.set_rng_seed(0)
    data = draws(64, 7) if remedy == "more data" else draws(6, 5)
    encoder = Dropout() if remedy == "dropout in it" else MLPEncoder(2, (16,) if "smaller" in remedy else (100, 100))
    guide = trained(independent, made(independent, encoder, data=data), 300, data)
    guide = guide.refined(20) if "refined" in remedy else guide
    found = compare_gaps(
        independent, guide, {"training": (data,), "new": (draws(40, 6).clamp(-1.5, 1.5),)}, max_samples=500
    )
    return float(found.dataset["amortization_gap"][1]), found.verdict


@cache
def overfitted() -> tuple[float, str]:
    return gap_of_new_data()


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["more data", "a smaller encoder", "dropout in it", "refined(...) at test time"])
def test_an_encoder_that_has_learned_its_data_is_mended(remedy: str) -> None:
    before, verdict = overfitted()
    assert re.search(f"larger on new than on training data: .*try .*{re.escape(remedy)}", verdict)
    assert gap_of_new_data(remedy)[0] < 0.8 * before


# Posterior collapse


def paired(strong: bool) -> Callable[[Tensor], None]:
    """A model that can foretell the one column of the data by the other, so that it does without its latent; or not."""

    def model(x: Tensor) -> None:
        loading = pyro.param("loading", torch.full((2,), 0.03))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        weight = pyro.param("weight", torch.tensor(0.0))
        scale, weight = (scale, weight) if strong else (torch.full((2,), 0.5), torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("first", dist.Normal(loading[0] * z, scale[0]), obs=x[:, 0])
            pyro.sample("second", dist.Normal(loading[1] * z + weight * x[:, 0], scale[1]), obs=x[:, 1])

    return model


@cache
def paired_data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 1, generator=generator) + 0.5 * torch.randn(60, 2, generator=generator)


def collapse(remedy: str = "") -> Any:
    steps, options = 200, {"num_particles": 8, **MANY}
    model = paired(strong=remedy != "a weaker likelihood")
    kind, update = (SemiAmortizedGuide, {"num_steps": 5, "update": NaturalGradient(0.5)})
    if remedy != "a SemiAmortizedGuide":
        kind, update = AmortizedGuide, {}
    guide = made(model, guide_class=kind, data=paired_data(), encoder_input="x", **update)
    annealing = KLAnnealing(model, guide, linear_schedule(steps)) if remedy == "KL annealing" else None
    handled = (annealing.model, annealing.guide) if annealing else (model, guide)
    elbo = FreeBitsELBO(0.5, **options) if remedy == "free bits" else TraceMeanField_ELBO(**options)
    svi = SVI(*handled, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(steps):
        svi.step(paired_data())
        if annealing:
            annealing.step()
    return collapse_report(model, guide, (paired_data(),), num_samples=50, threshold=0.05)


@cache
def collapsed() -> str:
    return collapse().verdict


REMEDIES = ["KL annealing", "free bits", "a SemiAmortizedGuide", "a weaker likelihood"]
"""An aggressive encoder is advised too: it does not help in this problem, whose encoder is at its optimum early."""


@pytest.mark.slow
@pytest.mark.parametrize("remedy", REMEDIES)
def test_collapse_is_mended(remedy: str) -> None:
    assert re.search(f"^Collapsed: .* Try .*{remedy}", collapsed())
    assert "No collapse" in collapse(remedy).verdict


def test_more_datapoints_raise_the_bound_of_the_information() -> None:
    guide = made(independent, Function(lambda x: (x, torch.full_like(x, 0.01))))
    few = collapse_report(independent, guide, (X,), num_samples=50)
    assert "close to its bound, so that it may be larger; try more datapoints" in words(few)
    many = collapse_report(independent, guide, (draws(64),), num_samples=50)
    assert many.mutual_information > few.mutual_information + 0.5


def shifted(learned: bool) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        loc = pyro.param("prior_loc", torch.zeros(())) if learned else torch.zeros(())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x + 0 * z.unsqueeze(-1))

    return model


def test_a_learned_prior_meets_a_q_that_differs_from_it_everywhere() -> None:
    def report(learned: bool) -> Any:
        model = shifted(learned)
        encoder = Function(lambda x: (torch.full((len(x), 1), 2.0), torch.ones(len(x), 1)))
        guide = made(model, encoder)
        if learned:
            trained(model, guide, 60, lr=0.1)
        return collapse_report(model, guide, (X,), num_samples=50)

    assert "same way everywhere; try a prior with learned parameters" in report(False).verdict
    after = report(True)
    assert float(after.dataset["kl"].max()) < 0.1
    assert "learned parameters" not in after.verdict


# Calibration


def findings(model: Any, guide: Any, count: int = 400) -> Any:
    return calibrate(model, guide, (X,), num_simulations=count, num_samples=39)


NARROW, WIDE, BIASED = ({"spread": 0.6}, {"spread": 1.6}, {"shift": 0.6})


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (BIASED, "biased"),
        pytest.param(NARROW, "too narrow", marks=pytest.mark.slow),
        pytest.param(WIDE, "too wide", marks=pytest.mark.slow),
    ],
)
def test_refinement_calibrates(wrong: dict[str, float], advice: str) -> None:
    guide = made(independent, Function(lambda x: exact(x, **wrong)))
    assert re.search(rf"- {advice}: try .*guide.refined\(20\)", words(findings(independent, guide)))
    assert findings(independent, guide.refined(20, num_particles=32)).calibrated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "advice"),
    [
        (mean_field, 'too narrow: try a richer family such as "multivariate_normal"'),
        (lambda x: mean_field(x, marginal=True), 'wrong together: try family="multivariate_normal"'),
    ],
    ids=["narrow", "together"],
)
def test_a_richer_family_calibrates(encoder: Any, advice: str) -> None:
    assert advice in words(findings(correlated, made(correlated, Function(encoder))))
    guide = made(correlated, family="multivariate_normal").refined(30, num_particles=16)
    assert findings(correlated, guide).calibrated


def weighted(beta: float, steps: int = 200) -> str:
    """The report of a guide that was trained with the KL term at a weight."""
    data = draws(64, 3)
    guide = made(independent, data=data)
    annealing = KLAnnealing(independent, guide, lambda step: beta)
    elbo = TraceMeanField_ELBO(num_particles=4, **MANY)
    svi = SVI(annealing.model, annealing.guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(steps):
        svi.step(data)
    return words(calibrate(independent, guide.eval(), (data,), num_simulations=400, num_samples=39))


@pytest.mark.slow
def test_longer_training_at_the_full_weight_of_the_kl_term_calibrates() -> None:
    longer = "try .*longer training with a KL term of no {} than its full weight"
    assert re.search(f"- too narrow: {longer.format('less')}", weighted(0.3))
    assert re.search(f"- too wide: {longer.format('more')}", weighted(3.0))
    assert re.search("- biased: ", weighted(1.0, steps=5))
    assert "family) CALIBRATED" in weighted(1.0)


def covariate(x: Tensor, offset: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + offset, NOISE).to_event(1), obs=x)


class Centred(nn.Module):
    """The posterior given the data less the offset, if that is seen."""

    def forward(self, x: Tensor, *offset: Tensor) -> tuple[Tensor, Tensor]:
        return exact(x - sum(offset))


def test_an_encoder_that_sees_covariates_calibrates() -> None:
    args = (X + 1.0, torch.ones(8, 2))

    def report(*names: str) -> Any:
        pyro.clear_param_store()
        guide = AmortizedGuide(covariate, Centred(), encoder_input=names)
        return calibrate(covariate, guide, args, num_simulations=400, num_samples=39)

    assert "- biased: try a larger encoder, an encoder_input with all data and covariates" in words(report("x"))
    assert report("x", "offset").calibrated


def waiting(x: Tensor) -> None:
    """A prior that is skewed where it is unconstrained, and data that tell little."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(1.0))
        pyro.sample("x", dist.Normal(0.1 * z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)


@pytest.mark.slow
def test_a_more_flexible_family_calibrates() -> None:
    mean, deviation = -0.577, math.pi / math.sqrt(6)  # of the logarithm of an exponential variable
    encoder = Function(lambda x: (torch.full((len(x), 1), mean), torch.full((len(x), 1), deviation)))
    found = findings(waiting, made(waiting, encoder), 1000)
    assert '- another shape: try a more flexible family, "mixture" or "flow"; plot("ecdf") shows' in words(found)
    assert found.plot("ecdf").lines
    after = findings(waiting, made(waiting, family="mixture").refined(100, Adam(0.1), num_particles=32), 1000)
    assert after.dataset["finding"].sel(quantity="z").item() == "ok"
    p_joint = [float(report.dataset["p_value"].sel(quantity="log_joint")) for report in (found, after)]
    assert p_joint[0] < 1e-4 < 1e-2 < p_joint[1]  # few steps on few draws leave some noise in the answers


# Codes


def clusters() -> Tensor:
    corners = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    return corners.repeat(10, 1) + 0.2 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


def codes(
    num_codes: int = 4, *, revive: float = 0.0, commitment: float = 0.25, strong: bool = False, start: float = 0.0
) -> CollapseReport:
    """The report of codes of four clusters; the codebook was set up with data at ``start``."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    codebook, decoder = Codebook(num_codes, 2, revive_below=revive), nn.Linear(2, 2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive) if strong else 1.0
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(logits=torch.zeros(num_codes)))
            loc = decoder(codebook(code)) + (pyro.param("weight", torch.tensor(0.9)) * x if strong else 0.0)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    guide = VectorQuantizedGuide(model, codebook, nn.Linear(2, 2), commitment=commitment)
    guide.setup((0.05 if start else 1.0) * clusters() + start)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(200 if start else 100):
        svi.step(clusters())
    return collapse_report(model, guide.eval(), (clusters(),))


FAR = {"start": 20.0, "commitment": 10.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remedy", "before", "after"),
    [
        ("a smaller commitment", FAR, {"start": 20.0, "commitment": 0.1}),
        (r"a codebook that revives more codes \(revive_below\)", FAR, {**FAR, "revive": 0.5}),
        ("a weaker likelihood", {"start": 5.0, "strong": True}, {"start": 5.0, "strong": False}),
    ],
)
def test_collapsed_codes_are_mended(remedy: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert re.search(f"Collapsed: every datapoint has the same codes.* Try .*{remedy}", codes(**before).verdict)
    assert "No collapse" in codes(**after).verdict


def test_codes_that_few_datapoints_use() -> None:
    few = codes(64)
    assert "in effective use; try fewer codes, or a larger revive_below" in few.verdict
    assert codes(64, revive=0.5).perplexity > 2 * few.perplexity
    assert "effective use" not in codes(8).verdict


# Compilation


def drifting(given: bool) -> None:
    state = [1.0]

    def model(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale if given else state[0]).to_event(1), obs=x)

    pyro.clear_param_store()
    guide = SemiAmortizedGuide(model, num_steps=1, compile=True)
    for _ in range(20):
        state[0] *= 1.01
        guide(X, torch.tensor(state[0]))


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
def test_what_changes_in_every_call_is_passed_as_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda module, inputs, options: module)
    with pytest.warns(UserWarning, match=r"replaced in every call \(pass it as a tensor\)"):
        drifting(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True has no effect")
        drifting(True)
