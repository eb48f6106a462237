"""The amortization gap of every level of a hierarchy, against closed forms."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import GapEstimate, PerDatapointGuide, estimate_gaps

pytestmark = pytest.mark.usefixtures("_float64")

NUM, PUPILS, TESTS = 4, 3, 2
DIM = 1 + PUPILS
PRECISION = torch.zeros(DIM, DIM, dtype=torch.float64)
PRECISION[0, 0] = 1 + PUPILS / 0.7**2
PRECISION[1:, 1:] = torch.eye(PUPILS) * (1 / 0.7**2 + TESTS / 0.5**2)
PRECISION[0, 1:] = PRECISION[1:, 0] = -1 / 0.7**2


def schools(y: Tensor) -> None:
    with pyro.plate("school", len(y), dim=-2):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", PUPILS, dim=-1):
            pyro.sample("y", dist.Normal(pyro.sample("p", dist.Normal(s, 0.7)), 0.5 / TESTS**0.5), obs=y)


def gap(loc_error: Tensor, log_scale_error: Tensor) -> Tensor:
    """ELBO of the best mean-field normal less that of one whose locations and log scales are off, in nats."""
    quadratic = 0.5 * torch.einsum("ni,ij,nj->n", loc_error, PRECISION, loc_error)
    ratio = log_scale_error
    return quadratic + (0.5 * ((2 * ratio).exp() - 1) - ratio).sum(-1)


@pytest.fixture
def guide() -> tuple[PerDatapointGuide, Tensor, Tensor, Tensor]:
    """A guide that is off by known amounts, and its data."""
    y = torch.randn(NUM, PUPILS) + torch.randn(NUM, 1)
    mean = torch.linalg.solve(PRECISION, torch.cat([torch.zeros(NUM, 1), y * TESTS / 0.5**2], -1).T).T
    loc_error, log_scale_error = 0.3 * torch.randn(NUM, DIM), 0.3 * torch.randn(NUM, DIM)
    guide = PerDatapointGuide(schools, plate="school")
    guide.setup(y)
    with torch.no_grad():
        log_scale = (-0.5 * PRECISION.diagonal().log()).expand(NUM, DIM)
        guide.inference.table.copy_(torch.cat([mean + loc_error, log_scale + log_scale_error], -1))
    return guide, y, loc_error, log_scale_error


def test_shares_equal_the_closed_form(guide: tuple[PerDatapointGuide, Tensor, Tensor, Tensor]) -> None:
    answers, y, loc, log_scale = guide
    found = estimate_gaps(schools, answers, (y,))
    at_school = torch.tensor([1.0, 0.0, 0.0, 0.0])
    whole, without_school = gap(loc, log_scale), gap(loc * (1 - at_school), log_scale * (1 - at_school))
    only_school = gap(loc * at_school, log_scale * at_school)
    school = 0.5 * (whole - without_school + only_school)
    expected = torch.stack([school, whole - school], -1)
    parts, errors = found.dataset["amortization_gap_by_level"], found.dataset["amortization_gap_by_level_se"]
    assert [*parts["level"].values] == ["school", "pupil"]
    error = torch.from_numpy(parts.values) - expected
    assert (error.abs() < 4 * torch.from_numpy(errors.values) + 2e-3).all()  # the optimum is found to 0.002 nats
    other_way = torch.stack([whole - without_school, without_school], -1)
    assert ((torch.from_numpy(parts.values) - other_way).abs() > 4 * torch.from_numpy(errors.values) + 2e-3).any()
    rows = [line.split()[2] for line in str(found).splitlines() if "of level" in line]
    assert rows[:2] == ["school", "pupil"]
    leading = "school" if expected[:, 0].mean() > expected[:, 1].mean() else "pupil"
    assert f"of them at level '{leading}'" in " ".join(str(found).split())


@pytest.mark.slow
def test_a_level_that_is_not_off_has_no_share(guide: tuple[PerDatapointGuide, Tensor, Tensor, Tensor]) -> None:
    answers, y, loc, log_scale = guide
    with torch.no_grad():
        answers.inference.table[:, [0, DIM]] -= torch.stack([loc[:, 0], log_scale[:, 0]], -1)
        answers.inference.table[:, 1:DIM] -= loc[:, 1:]  # the posterior's coupling would carry it to the school
    shares = estimate_gaps(schools, answers, (y,)).dataset["amortization_gap_by_level"]
    assert abs(shares.sel(level="school")).max() < 2e-3
    expected = gap(torch.zeros(NUM, DIM), log_scale * torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert (torch.from_numpy(shares.sel(level="pupil").values) - expected).abs().max() < 0.02


@pytest.mark.slow
def test_batches_are_joined_and_files_hold_them(
    guide: tuple[PerDatapointGuide, Tensor, Tensor, Tensor], tmp_path
) -> None:
    from pyro_amortized import AmortizedGuide

    amortized = AmortizedGuide(schools, plate="school", family="structured")
    y = guide[1]
    amortized.setup(y)
    loader = DataLoader(TensorDataset(y), batch_size=2)
    found = estimate_gaps(schools, amortized, loader)
    assert found.dataset["amortization_gap_by_level"].dims == ("school", "level")
    assert found.dataset["amortization_gap_by_level"].shape == (NUM, 2)
    difference = found.dataset["amortization_gap_by_level"].sum("level") - found.dataset["amortization_gap"]
    assert (abs(difference) < 4 * found.dataset["amortization_gap_by_level_se"].sum("level")).all()
    found.to_netcdf(tmp_path / "gaps.nc")
    assert str(GapEstimate.from_netcdf(tmp_path / "gaps.nc")) == str(found)
    flat = AmortizedGuide(schools, plate="school", family="multivariate_normal", name="flat")
    assert "level" not in estimate_gaps(schools, flat, (y,)).dataset.dims
