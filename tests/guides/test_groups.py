"""Long format: observations in a plate beside the datapoint plate, tied to the datapoints by an index."""

import ast
import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    UnseenSizeWarning,
    calibrate,
    collapse_report,
    estimate_gaps,
    evidence_bounds,
    log_evidence,
    simulate,
    to_arviz,
)
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.reader import StructureReader

pytestmark = pytest.mark.usefixtures("_float64")

SLOPE, COUNTY, HOUSE = -0.7, 0.6, 0.8


def radon(y: Tensor | None, floor: Tensor, county_index: Tensor, uranium: Tensor) -> None:
    with pyro.plate("county", len(uranium)):
        a = pyro.sample("a", dist.Normal(0.5 * uranium, COUNTY))
    with pyro.plate("obs", len(county_index)):
        pyro.sample("y", dist.Normal(a[county_index] + SLOPE * floor, HOUSE), obs=y)


def data(counties: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counties of 0, 1, 2, ... houses, whose rows are in no order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(counties), torch.arange(counties))
    index = index[torch.randperm(len(index), generator=generator)]
    y, floor, uranium = (torch.randn(size, generator=generator) for size in (len(index), len(index), counties))
    return y, floor, index, uranium


def exact_evidence(y: Tensor, floor: Tensor, index: Tensor, uranium: Tensor) -> Tensor:
    found = []
    for county, u in enumerate(uranium):
        rows = index == county
        number = int(rows.sum())
        covariance = COUNTY**2 * torch.ones(number, number) + HOUSE**2 * torch.eye(number)
        normal = dist.MultivariateNormal(0.5 * u + SLOPE * floor[rows], covariance) if number else None
        found.append(torch.zeros(()) if normal is None else normal.log_prob(y[rows]))
    return torch.stack(found)


GROUPS: Any = {"plate": "county", "groups": {"obs": "county_index"}}
NAMED: Any = {**GROUPS, "encoder_input": {"obs": ["y", "floor"], "county": ["uranium"]}}


def padded(y: Tensor, floor: Tensor, present: Tensor, uranium: Tensor) -> None:
    """The same of houses ``(N, M)`` of which a mask says which there are."""
    with pyro.plate("county", len(uranium), dim=-2):
        a = pyro.sample("a", dist.Normal(0.5 * uranium.unsqueeze(-1), COUNTY))
        with pyro.plate("house", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a + SLOPE * floor, HOUSE).mask(present), obs=y)


def pad(y: Tensor, floor: Tensor, index: Tensor, uranium: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = int(index.bincount().max())
    wide, low, present = (
        torch.zeros(len(uranium), size),
        torch.zeros(len(uranium), size),
        torch.zeros(len(uranium), size),
    )
    for county in range(len(uranium)):
        rows = index == county
        for table, values in ((wide, y[rows]), (low, floor[rows]), (present, torch.ones(int(rows.sum())))):
            table[county, : len(values)] = values
    return wide, low, present.bool(), uranium


def test_the_decomposition_is_that_of_padded_data() -> None:
    """For the same phi and noise, to rounding; the evidence, whose draws are others, within its error."""
    args = data()
    results = []
    for model, options, model_args in ((radon, GROUPS, args), (padded, {"plate": "county"}, pad(*args))):
        guide = PerDatapointGuide(model, name=model.__name__, **options)
        guide.setup(*model_args)
        with torch.no_grad():
            guide.inference.table.copy_(torch.linspace(-0.8, 0.3, guide.inference.table.numel()).reshape(-1, 2))
        results.append(estimate_gaps(model, guide, model_args).dataset)
    for name in ("elbo", "elbo_optimal", "amortization_gap"):
        assert np.abs(results[0][name].values - results[1][name].values).max() < 1e-6
    error = np.abs(results[0]["log_evidence"].values - results[1]["log_evidence"].values)  # its noise is of its own
    assert (error < 4 * results[0]["log_evidence_se"].values).all()
    assert np.abs(results[0]["log_evidence"].values - exact_evidence(*args).numpy()).max() < 1e-3
    without = exact_evidence(args[0], args[1], args[2].roll(1), args[3])  # the twin: rows of other counties
    assert np.abs(results[0]["log_evidence"].values - without.numpy()).max() > 0.1


def log_joint_of(args: Any, spec: Any = None) -> LocalLogJoint:
    structure = StructureReader("county", groups=spec or {"obs": "county_index"}).read(radon, args, {})
    return LocalLogJoint(ModelCall(radon, args, {}, structure))


def test_counties_can_be_selected_and_repeated() -> None:
    log_joint = log_joint_of(data())
    z = torch.randn(3, 6, 1)
    whole = torch.cat([log_joint.plain(draw.unsqueeze(0)) for draw in z])
    for rows in (torch.tensor([5, 2]), torch.tensor([3, 3, 0, 1]), torch.arange(6).repeat(3)):
        part = log_joint.select(rows)
        assert part is not None
        assert torch.allclose(part.plain(z[:1, rows]), whole[:1, rows], atol=1e-12)
    vectorized, copying = log_joint.choose_mode(z[:2])
    assert not vectorized  # `a[county_index]` takes no dimension of draws
    assert copying is not None
    assert torch.allclose(log_joint.plain(z), whole, atol=1e-12)


@pytest.mark.slow
def test_trained_refined_and_predicted() -> None:
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    args = data(20)
    guide = AmortizedGuide(radon, **NAMED)
    svi = SVI(radon, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / 300)}), Trace_ELBO())
    for _ in range(300):
        svi.step(*args)
    gaps = estimate_gaps(radon, guide, args).dataset
    assert float(gaps["amortization_gap"].mean()) < 0.1
    new = data(25, seed=1)
    refined = guide.refined(5)
    counts = new[2].bincount(minlength=25)
    precision = COUNTY**-2 + counts * HOUSE**-2
    total = torch.zeros(25).index_add(0, new[2], new[0] - SLOPE * new[1])
    mean = (0.5 * new[3] * COUNTY**-2 + total * HOUSE**-2) / precision
    assert ((refined.median(*new)["a"] - mean) * precision.sqrt()).abs().mean() < 0.1
    observed = AmortizedGuide(radon, name="observed", **GROUPS)
    observed.setup(*args)
    draws = Predictive(radon, guide=observed, num_samples=7)(None, *new[1:])
    assert draws["y"].shape == (7, len(new[0]))


def test_a_county_without_houses_has_the_prior() -> None:
    args = data(4)
    guide = AmortizedGuide(radon, **NAMED)
    guide.setup(*args)
    refined = guide.refined(10)
    assert (refined.median(*args)["a"][0] - 0.5 * args[3][0]).abs() < 0.05


@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide, PerDatapointGuide])
def test_guides(Guide: Any) -> None:
    """Observed values by default; every diagnostic counts the rows."""
    args = data()
    guide = Guide(radon, **GROUPS, **({"num_steps": 2} if Guide is SemiAmortizedGuide else {}))
    svi = SVI(radon, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(*args)
    evidence = log_evidence(radon, guide, args)
    assert np.abs(evidence["log_evidence"].values - exact_evidence(*args).numpy()).max() < 0.01
    assert collapse_report(radon, guide, args).dataset is not None
    assert to_arviz(radon, guide, args, num_samples=5).posterior["a"].shape == (1, 5, 6)
    other = data(4, seed=3)
    if Guide is not PerDatapointGuide:
        assert guide(*other)["a"].shape == (4,)


def minibatch(y: Tensor, county_index: Tensor, uranium: Tensor, rows: Tensor, full_size: int) -> None:
    with pyro.plate("county", full_size, subsample=rows):
        a = pyro.sample("a", dist.Normal(0.5 * uranium, COUNTY))
    with pyro.poutine.scale(scale=full_size / len(rows)), pyro.plate("obs", len(county_index)):
        pyro.sample("y", dist.Normal(a[county_index], HOUSE), obs=y)


def test_the_scale_of_a_minibatch_of_counties_is_taken_out() -> None:
    y, floor, index, uranium = data()
    y = y - SLOPE * floor
    guide = PerDatapointGuide(minibatch, **GROUPS)
    guide.setup(y, index, uranium, torch.arange(6), 6)
    rows = torch.tensor([4, 1, 5])
    kept = torch.isin(index, rows)
    position = torch.zeros(6, dtype=torch.long).index_copy(0, rows, torch.arange(3))
    part = (y[kept], position[index[kept]], uranium[rows], rows, 6)
    found = log_evidence(minibatch, guide, part)["log_evidence"].values
    assert np.abs(found - exact_evidence(y, torch.zeros_like(y), index, uranium)[rows].numpy()).max() < 1e-3


def chained(y: Tensor, county: Tensor, w: Tensor, state: Tensor, num_states: int) -> None:
    """Houses in counties in states; latents of the states alone, counties observed too."""
    with pyro.plate("state", num_states):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("county", len(state)):
        pyro.sample("w", dist.Normal(s[state], 1.0), obs=w)
    with pyro.plate("obs", len(county)):
        pyro.sample("y", dist.Normal(s[state][county], 1.0), obs=y)


@pytest.mark.slow
def test_groups_may_chain() -> None:
    state, county = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 1, 2, 3, 3, 3])
    args = (torch.randn(7), county, torch.randn(5), state, 3)
    guide = AmortizedGuide(chained, plate="state", groups={"obs": "county", "county": "state"})
    guide.setup(*args)
    evidence = log_evidence(chained, guide, args, max_samples=1000)["log_evidence"].values
    for number in range(3):
        own = torch.cat([args[0][state[county] == number], args[2][state == number]])
        covariance = torch.ones(len(own), len(own)) + torch.eye(len(own))
        expected = dist.MultivariateNormal(torch.zeros(len(own)), covariance).log_prob(own) if len(own) else 0.0
        assert abs(evidence[number] - float(expected)) < 5e-3
    order = torch.tensor([3, 2, 1, 0, 4])  # counties in another order
    turned = (args[0], torch.argsort(order)[county], args[2][order], state[order], 3)
    assert (guide.median(*turned)["s"] - guide.median(*args)["s"]).abs().max() < 1e-10


class Own(nn.Module):
    """An encoder of one's own gets values, then the index."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 4)

    def forward(self, y: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(6, 4).index_add(0, index, self.layer(y.unsqueeze(-1)))


def test_an_encoder_of_ones_own_and_any_family() -> None:
    guide = AmortizedGuide(radon, Own(), name="own", **GROUPS)
    assert guide(*data())["a"].shape == (6,)
    for family in ("multivariate_normal", "mixture"):
        assert AmortizedGuide(radon, family=family, name=family, **GROUPS)(*data())["a"].shape == (6,)


def inside(y: Tensor, county_index: Tensor, uranium: Tensor) -> None:
    with pyro.plate("county", len(uranium)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("obs", len(county_index)):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a[county_index] + e, HOUSE), obs=y)


def wrong(y: Tensor, floor: Tensor, county_index: Tensor, uranium: Tensor) -> None:
    radon(y, floor, county_index.flip(0), uranium)


def test_what_is_no_long_format_is_refused() -> None:
    y, floor, index, uranium = data()
    for options, match in (
        ({"groups": {"obs": "county_index"}}, "plate is not named; try plate="),
        ({"groups": "county_index", "plate": "county"}, "a dict is wanted"),
        ({"groups": {"houses": "county_index"}, "plate": "county"}, "no plate of that name; try one of"),
        ({"groups": {"obs": "index"}, "plate": "county"}, "no argument of that name; try one of"),
        ({"groups": {"obs": "floor"}, "plate": "county"}, r"whole numbers; try index.long\(\)"),
        ({"groups": {"obs": lambda *args: args[2][1:]}, "plate": "county"}, "one for each"),
        ({"groups": {"obs": lambda *args: args[2] + 3}, "plate": "county"}, "torch.unique"),
    ):
        with pytest.raises(ValueError, match=match):
            AmortizedGuide(radon, **options)(y, floor, index, uranium)
    with pytest.raises(ValueError, match="'e' because it lies in plate 'obs'"):
        AmortizedGuide(inside, **GROUPS)(y, index, uranium)
    with pytest.raises(ValueError, match="other datapoints than those that groups= names"):
        log_evidence(wrong, AmortizedGuide(wrong, name="wrong", **GROUPS), (y, floor, index, uranium))
    for Guide in (IterativeAmortizedGuide, DiscreteAmortizedGuide):
        with pytest.raises(ValueError, match=f"PlateEncoder in {Guide.__name__}"):
            Guide(radon, name=Guide.__name__, **GROUPS)(y, floor, index, uranium)
    guide = AmortizedGuide(radon, name="right", plate="county")
    with pytest.raises(
        ValueError, match=r"no observed site lies in it; try groups=\{'obs': \.\.\.\} with the argument"
    ):
        guide(y, floor, index, uranium)
    AmortizedGuide(radon, name="grouped", plate="county", groups={"obs": "county_index"})(y, floor, index, uranium)


@pytest.mark.slow
def test_a_spared_look_still_reads_the_index() -> None:
    """The shapes of two calls are the same, the index is not."""
    guide = AmortizedGuide(radon, **NAMED)
    args = data()
    guide.setup(*args)
    for seed in range(5):
        other = (
            *args[:2],
            args[2][torch.randperm(len(args[2]), generator=torch.Generator().manual_seed(seed))],
            args[3],
        )
        fresh = guide.refined(8).median(*other)["a"]
        counts = other[2].bincount(minlength=6)
        total = torch.zeros(6).index_add(0, other[2], other[0] - SLOPE * other[1])
        precision = COUNTY**-2 + counts * HOUSE**-2
        mean = (0.5 * other[3] * COUNTY**-2 + total * HOUSE**-2) / precision
        assert ((fresh - mean) * precision.sqrt()).abs().mean() < 0.1
        assert math.isfinite(Trace_ELBO().loss(radon, guide, *other))


def right(y: Tensor, floor: Tensor, county_index: Tensor, uranium: Tensor) -> None:
    """Indexed from the right, so that several draws can be evaluated at once."""
    with pyro.plate("county", len(uranium)):
        a = pyro.sample("a", dist.Normal(0.5 * uranium, COUNTY))
    with pyro.plate("obs", len(county_index)):
        pyro.sample("y", dist.Normal(a[..., county_index] + SLOPE * floor, HOUSE), obs=y)


@pytest.mark.slow
def test_several_draws_at_once_are_right_or_refused() -> None:
    """With more draws than counties, `a[county_index]` would take draws for counties."""
    args, elbo = data(), Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"other log-probabilities .* try indexing from the right, a\[..., index\]"):
        elbo.loss(radon, AmortizedGuide(radon, name="left", **GROUPS), *args)
    guide = AmortizedGuide(right, name="right", **GROUPS)
    guide.setup(*args)
    many = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(right, guide, *args)
    one_by_one = Trace_ELBO(num_particles=200).loss(right, guide, *args)
    assert many == pytest.approx(one_by_one, rel=0.05)


def test_data_sets_are_simulated_with_their_rows() -> None:
    args = data()
    for options in (GROUPS, NAMED):
        guide = AmortizedGuide(radon, name=f"q{len(options)}", **options)
        guide.setup(*args)
        simulation = simulate(radon, guide, args)
        assert (simulation.args[0] != args[0]).all()
        assert torch.equal(simulation.args[2], args[2])
        assert calibrate(radon, guide, args, num_simulations=30, num_samples=19).dataset is not None


def test_a_covariate_is_of_the_plate_that_it_is_named_for() -> None:
    """Whatever its values in the first call, here those of the data."""
    first = (torch.zeros(4), torch.zeros(4), torch.arange(4), torch.zeros(4))
    guide = AmortizedGuide(radon, **NAMED)
    guide.setup(*first)
    assert guide.median(*data())["a"].shape == (6,)


def test_groups_without_rows_are_warned_of_where_training_had_none_and_refined_to_their_prior() -> None:
    y, floor, index, uranium = data()
    guide = AmortizedGuide(radon, plate="county", groups={"obs": "county_index"})
    svi = SVI(radon, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(20):
        svi.step(y, floor, index - 1, uranium[1:])
    with torch.no_grad(), pytest.warns(UnseenSizeWarning, match=r"1 of 6 groups have no entries of plate 'obs'"):
        encoded = guide.posterior(y, floor, index, uranium)
    with torch.no_grad(), pytest.warns(UnseenSizeWarning, match="refined"):
        refined = guide.refined(20).posterior(y, floor, index, uranium)
    error = 2 * COUNTY / 32**0.5  # of the particles that refinement averages over
    assert refined.mean[0, 0].item() == pytest.approx(0.5 * uranium[0].item(), abs=error)
    assert refined.stddev[0, 0].item() == pytest.approx(COUNTY, rel=0.1)
    assert encoded.stddev[0, 0].item() != pytest.approx(COUNTY, rel=0.1)
    svi.step(y, floor, index, uranium)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.median(y, floor, index, uranium)


def test_a_global_latent_is_no_value_of_an_entry() -> None:
    """Nothing says which of the items' effects belongs to which rating."""
    user, item = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 1])

    def ratings(y: Tensor, user: Tensor, item: Tensor) -> None:
        with pyro.plate("items", 2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("users", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(a[..., user] + b[..., item], 1.0), obs=y)

    options = {"plate": "users", "groups": {"obs": "user"}}
    with pytest.raises(ValueError, match=r"'b' as a value of plate 'obs'.*try \{'users': \['b'\]\}"):
        AmortizedGuide(ratings, encoder_input={"obs": ["y", "b"]}, **options)(torch.randn(5), user, item)
    guide = AmortizedGuide(ratings, encoder_input={"obs": ["y"], "users": ["b"]}, name="remedy", **options)
    assert guide(torch.randn(5), user, item)["a"].shape == (3,)


@pytest.mark.slow
def test_what_the_encoder_lacks_is_named_by_plate_and_the_remedy_works() -> None:
    arguments = data()
    guide = AmortizedGuide(radon, plate="county", groups={"obs": "county_index"})
    attributes = estimate_gaps(radon, guide, arguments).dataset.attrs
    assert attributes["unseen_arguments"] == "'floor', 'uranium'"
    spec = ast.literal_eval(attributes["encoder_input_to_try"])
    assert spec == {"obs": ["y", "floor"], "county": ["uranium"]}
    mended = AmortizedGuide(radon, plate="county", groups={"obs": "county_index"}, encoder_input=spec, name="mended")
    assert "unseen_arguments" not in estimate_gaps(radon, mended, arguments).dataset.attrs


def test_latents_of_a_plate_without_data_are_not_answered_for_other_ones() -> None:
    """By default the datapoints are the rows, and what they share is global, for these groups alone."""

    def model(y: Tensor, index: Tensor, num: int) -> None:
        with pyro.plate("group", num):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(a[..., index], 1.0), obs=y)

    def data(num: int) -> tuple[Tensor, Tensor, int]:
        return torch.randn(3 * num), torch.arange(num).repeat_interleave(3), num

    guide = AmortizedGuide(model)
    told = r"'index' looks like .* AmortizedGuide\(model, plate='group', groups=\{'obs': 'index'\}\)"
    with pytest.warns(UserWarning, match=told):
        guide(*data(5))
    assert "global latents: a (in group)" in str(guide)
    remedy = r"AmortizedGuide\(model, plate='group', groups=\{'obs': ...\}\), with the index that ties entries of 'obs'"
    for ask in (guide, guide.median):
        with pytest.raises(ValueError, match=rf"plate 'group' because it now has 4 entries and had 5 .* try {remedy}"):
            ask(*data(4))
    with pytest.raises(ValueError, match=rf"no local latents; try {remedy}"):
        guide.variational_parameters(*data(5))
    mended = AmortizedGuide(model, plate="group", groups={"obs": "index"}, name="mended")
    mended(*data(5))
    assert "encoder sees: y" in str(mended)
    assert mended.median(*data(4))["a"].shape == (4,)
    with pytest.raises(ValueError, match="on their own 5 rows; try num_simulations=5"):
        evidence_bounds(model, mended, data(5))
    assert evidence_bounds(model, mended, data(5), num_simulations=5, num_samples=50).sizes == {"group": 5}
