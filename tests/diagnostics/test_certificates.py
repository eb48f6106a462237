"""Certified posteriors against exact ones; what must not be certified is not."""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import arviz
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from certified import encode_exactly, error, guided, oracle
from models import LinearGaussian
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, CertifiedPosterior, calibrate, certified_posterior
from pyro_amortized.objective.noise import generator

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("_float64")


# The whole


@pytest.mark.parametrize(
    ("shift", "scale", "stage"), [(0.0, 1.0, None), (0.0, 0.2, "full_rank"), (4.0, 0.2, "full_rank")]
)
def test_a_bad_guide_changes_the_cost_and_nothing_else(shift: float, scale: float, stage: str | None) -> None:
    """Overconfident, and far off: certified all the same, and right."""
    model = oracle()
    x = model.simulate(6)
    found = certified_posterior(model.full, guided(model.full, encode_exactly(shift, scale)), (x,))
    q = model.posterior(x)
    assert bool(found.dataset["certified"].all())
    assert not bool(found.dataset["local"].any())
    assert error(found.draws, q.mean, q.stddev) < 1
    if stage is not None:
        assert "encoder" not in found.dataset["stage"].values
        assert all("encoder: khat" in reason for reason in found.dataset["reason"].values)


def test_an_exact_encoder_is_certified_at_once() -> None:
    model = LinearGaussian.random_weights(orthogonal=True)
    x = model.simulate(6)
    q = model.posterior(x)
    encode = lambda x: (model.posterior(x).mean, q.stddev.expand(len(x), -1))  # noqa: E731
    found = certified_posterior(model.full, guided(model.full, encode), (x,))
    assert set(found.dataset["stage"].values) == {"encoder"}
    assert bool(found.dataset["certified"].all())
    assert found.dataset["reason"].values.tolist() == [""] * 6
    assert bool((found.dataset["num_evaluations"] >= 4000).all())
    assert "The encoder's weighted draws do" in str(found)


def test_where_weights_do_not_do_chains_are_certified() -> None:
    """Heavy tails with a sharp peak: normals and mixtures of t's fail, chains and particles agree with a grid."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0].square(), 0.7), obs=x)

    x = torch.tensor([0.0, 0.5])
    line = torch.linspace(-8.0, 8.0, 801)
    z = torch.cartesian_prod(line, line)
    log_p = dist.Normal(0.0, 1.5).log_prob(z).sum(-1) + dist.Normal(z[:, 1] + z[:, 0].square(), 0.7).log_prob(
        x[:, None]
    )
    weights = log_p.softmax(-1)
    mean = weights @ z
    scale = (weights @ z.square() - mean.square()).sqrt()
    found = certified_posterior(model, guided(model), (x,))
    assert found.dataset["certified"].values.tolist() == [True, True]
    assert error(found.draws, mean, scale) < 1


@pytest.mark.slow
def test_curved_ridges_are_certified_by_mixtures_fitted_to_them() -> None:
    """In two dimensions, against a fine grid: chains mix slowly along them."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0].square(), 0.3), obs=x)

    x = torch.linspace(-2.0, 3.0, 12)
    found = certified_posterior(model, guided(model), (x,))
    certified = torch.tensor(found.dataset["certified"].values)
    assert int((certified & torch.tensor(found.dataset["stage"].values == "full_rank")).sum()) >= 8
    line = torch.linspace(-8.0, 8.0, 801)
    z = torch.cartesian_prod(line, line)
    log_joint = dist.Normal(0.0, 1.5).log_prob(z).sum(-1) + dist.Normal(z[:, 1] + z[:, 0].square(), 0.3).log_prob(
        x.unsqueeze(-1)
    )
    weights = log_joint.softmax(-1)
    mean = weights @ z
    scale = (weights @ z.square() - mean.square()).sqrt()
    assert error(found.draws[:, certified].double(), mean[certified], scale[certified]) < 1


def test_what_does_not_converge_is_marked() -> None:
    """A centred hierarchy is a funnel: nothing serves it within the draws allowed."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(8), (v / 2).exp().unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(w.sum(-1), 5.0), obs=x)

    found = certified_posterior(model, guided(model), (torch.tensor([0.0, 1.0]),), num_samples=400)
    data = found.dataset
    assert not bool(data["certified"].any())
    assert "draws are not to be used" in str(found)
    with pytest.warns(UserWarning, match=r"2 of 2 datapoints are not certified: their draws are NaN"):
        exported = found.to_arviz()
    assert bool(exported["posterior"]["w"].isnull().all())
    assert not bool(found.to_arviz("all")["posterior"]["w"].isnull().any())
    with pytest.raises(ValueError, match=r"Cannot keep the draws of keep='some' because it is unknown; try one of"):
        found.to_arviz("some")


def conjugate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_constrained_latents() -> None:
    x = torch.tensor([0.0, 1.0, 12.0])
    found = certified_posterior(conjugate, guided(conjugate), (x,))
    assert bool(found.dataset["certified"].all())
    q = dist.Gamma(2.0 + x, 2.0)
    rate = torch.from_numpy(found.posterior["rate"].values)
    assert rate.shape == (4000, 3)
    assert error(rate, q.mean, q.stddev) < 1


def test_discrete_latents_that_the_model_sums_out() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2.0 * c, 1.0), obs=x)

    x = torch.tensor([-1.0, 0.5, 1.5])
    shifts, prior = torch.tensor([0.0, 2.0]), torch.tensor([0.7, 0.3])
    share = (prior.log() + dist.Normal(shifts, 2.0**0.5).log_prob(x[:, None])).softmax(-1)
    means = (x[:, None] - shifts) / 2
    mean = (share * means).sum(-1)
    scale = ((share * (means.square() + 0.5)).sum(-1) - mean.square()).sqrt()
    found = certified_posterior(model, guided(model), (x,))
    assert bool(found.dataset["certified"].all())
    assert error(found.draws[..., 0], mean, scale) < 1


@pytest.mark.slow
def test_inner_plates_and_global_latents() -> None:
    """Two levels of normal means have a normal posterior, given the global latent's median."""

    def model(x: Tensor) -> None:
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.1))
        with pyro.plate("school", len(x), dim=-2):
            school = pyro.sample("school_mean", dist.Normal(0.0, 1.0))
            with pyro.plate("pupil", x.shape[1], dim=-1):
                pupil = pyro.sample("pupil_mean", dist.Normal(school, spread))
                pyro.sample("x", dist.Normal(pupil, 0.5), obs=x)

    x = torch.randn(4, 3, generator=generator(0))
    guide = guided(model, plate="school")
    found = certified_posterior(model, guide, (x,))
    spread = guide.median(x)["spread"].item()
    precision = torch.zeros(4, 4)
    precision[0, 0] = 1 + 3 / spread**2
    precision[0, 1:] = precision[1:, 0] = -1 / spread**2
    precision[1:, 1:] = torch.eye(3) * (1 / spread**2 + 4.0)
    covariance = torch.linalg.inv(precision)
    mean = torch.cat([torch.zeros(4, 1), 4.0 * x], -1) @ covariance
    assert bool(found.dataset["certified"].all())
    assert error(found.draws, mean, covariance.diagonal().sqrt().expand(4, -1)) < 1
    assert found.posterior["pupil_mean"].dims == ("draw", "school", "pupil")
    assert found.posterior["school_mean"].dims == ("draw", "school")
    assert found.dataset.attrs["global_latents"] == "held at the guide's median: spread"
    assert "given the global latents, held at the guide's median" in found.verdict


def test_datapoints_that_matter_to_each_other_run_together() -> None:
    """A model that can only run on all of its data has the same posteriors."""
    model = oracle()
    x = model.simulate(4)

    def fixed(x: Tensor) -> None:
        assert len(x) == 4
        model.full(x)

    found = certified_posterior(fixed, guided(fixed), (x,), num_samples=1000)
    q = model.posterior(x)
    assert bool(found.dataset["certified"].all())
    assert error(found.draws, q.mean, q.stddev) < 2.2


# Batches, files and pictures


@pytest.mark.slow
def test_a_loader_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle()
    x = model.simulate(7)
    guide = guided(model.full, encode_exactly())
    loader = DataLoader(TensorDataset(x), batch_size=3)
    options: dict[str, Any] = {"num_samples": 400, "path": tmp_path / "saved"}

    def interrupted() -> Iterator[Any]:
        yield from list(loader)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certified_posterior(model.full, guide, interrupted(), **options)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["batch_00000.nc", "batch_00001.nc"]
    calls = []
    name = "pyro_amortized.diagnostics.certificates.certified._certify"
    monkeypatch.setattr(
        name, lambda *args, real=certified_posterior.__globals__["_certify"]: calls.append(1) or real(*args)
    )
    found = certified_posterior(model.full, guide, loader, **options)
    assert len(calls) == 1
    whole = certified_posterior(model.full, guide, loader, num_samples=400)
    assert found.dataset["data"].values.tolist() == list(range(7))
    assert found.dataset.equals(whole.dataset)
    assert torch.equal(found.draws, whole.draws)
    other = DataLoader(TensorDataset(x + 1), batch_size=3)
    with pytest.raises(
        ValueError, match=r"Cannot go on .*because batch_00000.nc belongs to other data.*try another dir"
    ):
        certified_posterior(model.full, guide, other, **options)
    certified_posterior(model.full, guide, other, num_samples=400, path=tmp_path / "another")


@pytest.mark.parametrize("change", ["of the model", "of the arguments"])
def test_batches_of_another_model_are_not_taken(change: str, tmp_path: Path) -> None:
    """One that is the same at the origin, and in all that the encoder sees."""
    slope = 1.0

    def model(x: Tensor, factor: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slope * factor * z, 1.0), obs=x)

    x, options = torch.tensor([0.3, -1.0]), {"num_samples": 400, "path": tmp_path}
    guide = guided(model)
    first = certified_posterior(model, guide, (x, 1.0), **options)
    assert certified_posterior(model, guide, (x, 1.0), **options).dataset.equals(first.dataset)
    factor = 1.0
    if change == "of the model":
        slope = 3.0
    else:
        factor = 3.0
    with pytest.raises(ValueError, match=r"Cannot go on .*because batch_00000.nc belongs to other data"):
        certified_posterior(model, guide, (x, factor), **options)


def test_batches_with_other_latents_are_refused_before_any_work() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("school", len(x), dim=-2), pyro.plate("pupil", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guided(model, plate="school")
    batches = [(torch.zeros(2, 2),), (torch.zeros(2, 3),)]
    with pytest.raises(
        ValueError, match=r"Cannot join the draws .* 2 latent dimensions in the first and 3.*; try one call"
    ):
        certified_posterior(model, guide, iter(batches), num_samples=400)
    assert certified_posterior(model, guide, batches[1], num_samples=400).posterior["z"].shape == (400, 2, 3)


def test_files_and_exports(tmp_path: Path) -> None:
    x = torch.tensor([0.0, 3.0])
    found = certified_posterior(conjugate, guided(conjugate), (x,), num_samples=400)
    found.to_netcdf(tmp_path / "found.nc")
    again = CertifiedPosterior.from_netcdf(tmp_path / "found.nc")
    assert again.dataset.identical(found.dataset)
    assert again.posterior.equals(found.posterior)
    assert str(again) == str(found)
    exported = again.to_arviz()
    assert exported["posterior"]["rate"].dims == ("chain", "draw", "data")
    assert exported["sample_stats"]["certified"].values.tolist() == [True, True]
    assert arviz.summary(exported, kind="stats")["mean"].between(0.5, 3.5).all()
    axes = found.plot()
    assert axes.get_title() == "2 of 2 posteriors certified"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sum(any(stage in label for stage in ("encoder", "refined", "full_rank", "hmc")) for label in labels) >= 1


@pytest.mark.slow
def test_seeds_and_settings() -> None:
    x = torch.tensor([0.0, 3.0])
    guide = guided(conjugate)
    state = torch.random.get_rng_state()
    first, second, third = (
        certified_posterior(conjugate, guide, (x,), num_samples=400, seed=seed).draws for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(
        ValueError, match=r"Cannot use num_samples=100 because it must be .* at least 400; try num_samples=4"
    ):
        certified_posterior(conjugate, guide, (x,), num_samples=100)
    with pytest.raises(ValueError, match=r"Cannot save batches at path=3 because .*; try a directory of your own"):
        certified_posterior(conjugate, guide, (x,), path=3)  # type: ignore[arg-type]


# Calibration of the procedure


@pytest.mark.slow
def test_certified_posteriors_are_calibrated() -> None:
    guide = guided(conjugate)
    procedure = partial(certified_posterior, num_samples=400)
    found = calibrate(conjugate, guide, (torch.ones(20),), num_simulations=200, num_samples=99, posterior=procedure)
    assert found.calibrated
    assert found.dataset["quantity"].values.tolist() == ["rate", "log_joint", "tarp"]
    assert found.dataset.attrs["guide"] == "certified_posterior"
    assert found.dataset.sizes["simulation"] + found.dataset.attrs["num_left_out"] == 200
    assert not calibrate(conjugate, guide, (torch.ones(20),), num_simulations=200, num_samples=99).calibrated
    with pytest.raises(ValueError, match=r"Cannot tell the coverage .*; try plot\(\"tarp\"\)"):
        found.coverage(0.5)
    found.plot("tarp")


def few_counts(x: Tensor) -> None:
    """Skewed posteriors of two latents."""
    weights = torch.tensor([[0.7, -0.4, 0.3, 0.9], [0.2, 0.8, -0.6, 0.5]], dtype=torch.float64)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson((z @ weights).exp()).to_event(1), obs=x)


def spread_of_groups(x: Tensor) -> None:
    """A non-centred hierarchy, whose posteriors are bent."""
    with pyro.plate("data", len(x)):
        log_spread = pyro.sample("log_spread", dist.Normal(-0.5, 0.7))
        effect = pyro.sample("effect", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Binomial(8, logits=log_spread.exp()[..., None] * effect).to_event(1), obs=x)


def squares(x: Tensor) -> None:
    """Two modes of unequal mass."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.3, 1.5))
        pyro.sample("x", dist.Normal(z.square(), 1.0), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "features"), [(few_counts, (4,)), (spread_of_groups, (4,)), (squares, ())])
def test_what_is_certified_is_calibrated_from_an_overconfident_guide(model: Any, features: tuple[int, ...]) -> None:
    x = torch.ones(20, *features, dtype=torch.float64)
    guide = guided(model)
    guide.setup(x)
    with torch.no_grad():
        bias = [p for name, p in guide.named_parameters() if name.endswith("bias")][-1]
        bias[len(bias) // 2 :] += math.log(0.2)
    procedure = partial(certified_posterior, num_samples=1000)
    found = calibrate(model, guide, (x,), num_simulations=300, num_samples=99, posterior=procedure)
    assert found.calibrated, found
    assert found.dataset.attrs["num_left_out"] <= 15
    assert "narrow" in str(calibrate(model, guide, (x,), num_simulations=300, num_samples=99))


def test_a_procedure_whose_draws_are_too_narrow_fails() -> None:
    def narrow(*args: Any, **kwargs: Any) -> CertifiedPosterior:
        found = certified_posterior(*args, num_samples=400, **kwargs)
        flat = found.posterior["_unconstrained"]
        centre = flat.mean("draw")
        return CertifiedPosterior(found.dataset, found.posterior.assign(_unconstrained=centre + 0.6 * (flat - centre)))

    guide = guided(conjugate)
    found = calibrate(conjugate, guide, (torch.ones(20),), num_simulations=200, num_samples=99, posterior=narrow)
    assert "rate" in found.failing
    assert "too narrow" in str(found)
    with pytest.raises(ValueError, match=r"Cannot take num_samples=999 draws .* gives 400; try num_samples=100"):
        calibrate(conjugate, guide, (torch.ones(20),), num_samples=999, posterior=narrow)
    with pytest.raises(ValueError, match=r"Cannot use posterior=3 because it must be a function such as"):
        calibrate(conjugate, guide, (torch.ones(20),), posterior=3)  # type: ignore[arg-type]


def test_without_certificates_there_is_no_calibration() -> None:
    def refuses(*args: Any, **kwargs: Any) -> CertifiedPosterior:
        found = certified_posterior(*args, num_samples=400, **kwargs)
        return CertifiedPosterior(found.dataset.assign(certified=found.dataset["certified"] & False), found.posterior)

    with pytest.raises(ValueError, match=r"Cannot test calibration because 0 of 20 .*; try num_simulations=200"):
        calibrate(conjugate, guided(conjugate), (torch.ones(20),), num_simulations=20, posterior=refuses)


def test_words_of_batches_that_were_read_are_saved_whole(tmp_path: Path) -> None:
    x = torch.tensor([0.0, 1.0])
    found = certified_posterior(conjugate, guided(conjugate), (x,), num_samples=400)
    for stage in ("hmc", "full_rank"):
        named = found.dataset.assign(stage=("data", np.array([stage] * 2, dtype=object)))
        CertifiedPosterior(named, found.posterior).to_netcdf(tmp_path / stage)
    parts = [CertifiedPosterior.from_netcdf(tmp_path / stage) for stage in ("hmc", "full_rank")]
    CertifiedPosterior.concat(parts).to_netcdf(tmp_path / "all")
    stages = CertifiedPosterior.from_netcdf(tmp_path / "all").dataset["stage"].values.tolist()
    assert stages == ["hmc", "hmc", "full_rank", "full_rank"]


@pytest.mark.slow
def test_means_of_values_in_their_support_count() -> None:
    """On the scale of log z most draws tell nothing of the mean of z, which few large ones decide."""

    def model(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Gamma(0.2, 0.2))
            pyro.sample("x", dist.NegativeBinomial(0.2, logits=z.log()), obs=x)

    x = torch.zeros(2, dtype=torch.float64)
    guide = AmortizedGuide(model)
    guide.setup(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = certified_posterior(model, guide, (x,))
        values = found.to_arviz().posterior["z"].values.reshape(-1, 2)
    grid = torch.linspace(-60.0, 6.0, 20001, dtype=torch.float64).exp()
    density = (dist.Gamma(0.2, 0.2).log_prob(grid) + dist.NegativeBinomial(0.2, logits=grid.log()).log_prob(x[0])).exp()
    mean, square = ((density * grid * grid**power).sum() / (density * grid).sum() for power in (1, 2))
    certified = found.dataset["certified"].values
    assert certified.any()
    error = np.abs(values[:, certified].mean(0) - mean.item()) / (square - mean**2).sqrt().item()
    assert error.max() < 0.1


@pytest.mark.parametrize(("plate", "site"), [("latent", "z"), ("ess", "z"), ("data", "draw")])
def test_names_that_the_result_has_are_refused_before_any_work(plate: str, site: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate(plate, len(x)):
            z = pyro.sample(site, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    taken = plate if plate != "data" else site
    with pytest.raises(ValueError, match=f"Cannot certify .*{taken!r} because .* try '{taken}_of_data'"):
        certified_posterior(model, AmortizedGuide(model, name="named"), (torch.zeros(3),))


def test_sites_in_scopes_are_saved(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("inner/z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = certified_posterior(model, AmortizedGuide(model, name="scoped"), (torch.zeros(2),), num_samples=400)
    found.to_netcdf(tmp_path / "found.nc")
    assert CertifiedPosterior.from_netcdf(tmp_path / "found.nc").posterior.identical(found.posterior)
