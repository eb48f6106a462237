"""Hierarchies: entries of plates inside the datapoint plate share heads, in any number."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    DeepSetEncoder,
    DiscreteAmortizedGuide,
    GradientAscent,
    IterativeAmortizedGuide,
    MLPEncoder,
    PerDatapointGuide,
    PlateEncoder,
    SemiAmortizedGuide,
    UnseenSizeWarning,
    estimate_gaps,
)
from pyro_amortized.objective.elbo import LocalObjective

pytestmark = pytest.mark.usefixtures("_float64")

PUPIL, TEST = 0.7, 0.5
"""Standard deviations of pupils within a school, and of tests of a pupil."""


def schools(y: Tensor, present: Tensor | None = None) -> None:
    """Latents for schools and pupils; a mask ``(N, P, T)`` says which tests there are, and pupils."""
    some: Any = True if present is None else present.any(-1, keepdim=True)
    with pyro.plate("school", y.shape[0], dim=-3):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-2):
            with pyro.poutine.mask(mask=some):
                p = pyro.sample("p", dist.Normal(s, PUPIL))
            with pyro.plate("test", y.shape[2], dim=-1):
                pyro.sample("y", dist.Normal(p, TEST).mask(True if present is None else present), obs=y)


def turned(y: Tensor) -> None:
    """The same of data ``(T, P, N)``, with the schools on the right."""
    with pyro.plate("school", y.shape[2], dim=-1):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-2):
            p = pyro.sample("p", dist.Normal(s, PUPIL))
            with pyro.plate("test", y.shape[0], dim=-3):
                pyro.sample("y", dist.Normal(p, TEST), obs=y)


def simulate(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    s = noise(shape[0], 1, 1)
    return s + PUPIL * noise(*shape[:2], 1) + TEST * noise(*shape)


def log_evidence(y: Tensor) -> Tensor:
    size, pupils, tests = y.shape
    same = torch.eye(pupils).repeat_interleave(tests, 0).repeat_interleave(tests, 1)
    covariance = 1.0 + PUPIL**2 * same + TEST**2 * torch.eye(pupils * tests)
    return dist.MultivariateNormal(torch.zeros(pupils * tests), covariance).log_prob(y.reshape(size, -1))


class Exact(nn.Module):
    """By level, what determines the exact posterior: of a pupil given the draw of the school."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, y: Tensor) -> dict[str, Tensor]:
        size, pupils, tests = y.shape
        precision = PUPIL**-2 + tests * TEST**-2
        mean, variance = y.mean(-1), PUPIL**2 + TEST**2 / tests
        school = 1.0 + pupils / variance
        ones = torch.ones(size, pupils)
        pupil = [y.sum(-1) * TEST**-2 / precision, ones * -0.5 * math.log(precision), ones * PUPIL**-2 / precision]
        root = [mean.sum(-1) / variance / school, torch.full((size,), -0.5 * math.log(school))]
        return {"school": torch.stack(root, -1), "pupil": torch.stack(pupil, -1)}


def exact(Guide: Any = AmortizedGuide, **options: Any) -> Any:
    guide = Guide(schools, Exact(), family="structured", plate="school", encoder_input="y", **options)
    guide.setup(simulate(3, 4, 2))
    heads = (guide.inference if Guide is AmortizedGuide else guide.inference.initial).head.heads
    with torch.no_grad():
        for head in heads:
            head.weight.copy_(torch.eye(len(head.bias)) * head.size)
            head.bias.zero_()
    return guide


SIZES = [(3, 4, 2), (5, 8, 3), (2, 1, 1), (4, 16, 9), (1, 5, 5), (3, 4, 2)]


def test_one_guide_is_exact_for_every_number_of_entries() -> None:
    guide = exact()
    first = guide.family
    for shape in SIZES:
        y = simulate(*shape)
        assert -Trace_ELBO().loss(schools, guide, y) == pytest.approx(log_evidence(y).sum().item(), abs=1e-8)
        assert guide.posterior(y).event_shape == (1 + shape[1],)
        assert guide.median(y)["p"].shape == (*shape[:2], 1)
    assert guide.family is first
    with torch.no_grad():  # the twin: a coupling that is off
        guide.inference.head.heads[1].bias[2] = 0.1
    assert abs(log_evidence(y).sum() + Trace_ELBO().loss(schools, guide, y)) > 0.01


def test_refined_and_diagnosed() -> None:
    """The exact answer is the optimum: no gap, and refinement leaves it."""
    guide, y = exact(), simulate(3, 5, 2, seed=1)
    gaps = estimate_gaps(schools, guide, (y,)).dataset
    for name in ("amortization_gap", "approximation_gap"):
        assert abs(gaps[name].values).max() < 1e-3
    refined = guide.refined(3)
    assert (refined.variational_parameters(y) - guide.variational_parameters(y)).abs().max() < 0.05
    assert exact(SemiAmortizedGuide, num_steps=2, name="semi")(y)["p"].shape == (3, 5, 1)


MODELS = {"left": (schools, lambda y: y), "right": (turned, lambda y: y.permute(2, 1, 0))}


@pytest.mark.parametrize("family", ["normal", "structured"])
@pytest.mark.parametrize("name", [*MODELS])
def test_the_default_encoder_serves_any_number_in_any_order(name: str, family: str) -> None:
    model, place = MODELS[name]
    guide = AmortizedGuide(model, family=family, plate="school")
    guide.setup(place(simulate(6, 4, 3)))
    assert isinstance(guide.inference.encoder, PlateEncoder)
    number = sum(p.numel() for p in guide.parameters())
    for shape in SIZES:
        y = simulate(*shape)
        guide(place(y))
        found = guide.median(place(y))
        pupils, tests = torch.randperm(shape[1]), torch.randperm(shape[2])
        other = guide.median(place(y[:, pupils][:, :, tests]))
        flat = found["p"].reshape(-1) if name == "left" else found["p"].reshape(shape[1], shape[0]).T.reshape(-1)
        moved = other["p"].reshape(-1) if name == "left" else other["p"].reshape(shape[1], shape[0]).T.reshape(-1)
        assert (moved - flat.reshape(shape[:2])[:, pupils].reshape(-1)).abs().max() < 1e-5
        assert (other["s"] - found["s"]).abs().max() < 1e-5
    assert sum(p.numel() for p in guide.parameters()) == number < 13_000


def test_layouts_agree() -> None:
    """Datapoints on the right or on the left: the same answers of the same weights."""
    guides = {}
    for name, (model, place) in MODELS.items():
        pyro.set_rng_seed(0)
        guides[name] = AmortizedGuide(model, plate="school", name=name)
        guides[name].setup(place(simulate(6, 4, 3)))
    y = simulate(3, 5, 2)
    left, right = guides["left"].median(y), guides["right"].median(y.permute(2, 1, 0))
    assert (left["p"].squeeze(-1) - right["p"].squeeze(0).T).abs().max() < 1e-12


def test_masked_entries_count_for_nothing() -> None:
    """Absent pupils and tests, whatever stands in their place, and a school without any."""
    y = simulate(4, 5, 3)
    present = torch.ones(y.shape, dtype=torch.bool)
    present[1, 3:] = False
    present[2, :, 1] = False
    present[3] = False
    guide = AmortizedGuide(schools, plate="school")
    guide.setup(y, present)
    found = guide.variational_parameters(y, present)
    assert torch.equal(found, guide.variational_parameters(y.masked_fill(~present, 100.0), present))
    cut = guide.median(y[1:2, :3], present[1:2, :3])
    assert (guide.median(y, present)["p"][1, :3] - cut["p"][0]).abs().max() < 1e-6
    assert (guide.median(y, present)["s"][1] - cut["s"][0]).abs().max() < 1e-6
    assert math.isfinite(Trace_ELBO().loss(schools, guide, y, present))
    assert math.isfinite(TraceMeanField_ELBO().loss(schools, guide, y, present))


def two_tests(y: Tensor, w: Tensor, took_y: Tensor, took_w: Tensor) -> None:
    """Every pupil takes one of two tests."""
    with pyro.plate("school", len(y), dim=-2):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-1):
            p = pyro.sample("p", dist.Normal(s, PUPIL))
            pyro.sample("y", dist.Normal(p, TEST).mask(took_y), obs=y)
            pyro.sample("w", dist.Normal(p, TEST).mask(took_w), obs=w)


def test_every_site_has_its_own_mask() -> None:
    y, w, took_y = torch.randn(4, 5), torch.randn(4, 5), torch.arange(20).reshape(4, 5) % 2 == 0
    guide = AmortizedGuide(two_tests, plate="school")
    guide.setup(y, w, took_y, ~took_y)
    found = guide.median(y, w, took_y, ~took_y)["p"]
    other = guide.median(y, torch.where(took_y, w, w + 1.0), took_y, ~took_y)["p"]
    assert ((found != other) == ~took_y)[~took_y].all()
    placeholders = guide.median(y, torch.where(took_y, w + 1.0, w), took_y, ~took_y)["p"]
    assert torch.equal(found, placeholders)


def absent(y: Tensor, age: Tensor, present: Tensor) -> None:
    with pyro.plate("school", len(y), dim=-2):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-1), pyro.poutine.mask(mask=present):
            p = pyro.sample("p", dist.Normal(s + age, PUPIL))
            pyro.sample("y", dist.Normal(p, TEST), obs=y)


@pytest.mark.slow
def test_refinement_is_not_moved_by_entries_that_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their couplings to the school, which an encoder gives all pupils alike, would pull at the school's scale."""
    present = torch.arange(6) < torch.arange(7).unsqueeze(-1)
    y, age = torch.randn(7, 6), torch.zeros(7, 6)
    precision = 1 + present.sum(-1) / (PUPIL**2 + TEST**2)
    school = (y * present).sum(-1) / (PUPIL**2 + TEST**2) / precision
    own = 1 / PUPIL**2 + 1 / TEST**2
    pupil = (school.unsqueeze(-1) / PUPIL**2 + y / TEST**2) / own
    guide = PerDatapointGuide(absent, plate="school", family="structured")
    guide.setup(y, age, present)
    with torch.no_grad():  # the posterior, with couplings of absent pupils
        locs = torch.cat([school.unsqueeze(-1), torch.where(present, pupil, 0.0)], -1)
        log_scales = torch.cat(
            [-0.5 * precision.log().unsqueeze(-1), torch.where(present, -0.5 * math.log(own), 0.0)], -1
        )
        couplings = torch.where(present, 1 / PUPIL**2 / own, 0.9)
        guide.inference.table.copy_(torch.cat([locs, log_scales, couplings], -1))

    def error() -> float:
        refined = guide.refined(20, GradientAscent(0.02), keep_best=False)  # which stays where the gradient is zero
        low, high = refined.quantiles([0.158655, 0.841345], y, age, present)["s"]
        return ((high - low).flatten() / 2 * precision.sqrt() - 1).abs().max().item()

    assert error() < 1e-3
    monkeypatch.setattr(LocalObjective, "masked", lambda self, phi: phi)
    assert error() > 0.05


@pytest.mark.parametrize("spec", [None, {"pupil": ["y"]}, {"pupil": ["y", "age"]}])
def test_absent_entries_with_covariates_count_for_nothing(spec: Any) -> None:
    y, age, present = torch.randn(4, 5), torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    present[1, 3:] = False
    guide = AmortizedGuide(absent, plate="school", encoder_input=spec)
    guide.setup(y, age, present)
    whole, cut = guide.median(y, age, present), guide.median(y[1:2, :3], age[1:2, :3], present[1:2, :3])
    assert (whole["s"][1] - cut["s"][0]).abs().max() < 1e-9
    assert (whole["p"][1, :3] - cut["p"][0]).abs().max() < 1e-9


def test_training_closes_the_gap_on_new_schools() -> None:
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    y = simulate(30, 8, 5)
    guide = AmortizedGuide(schools, family="structured", plate="school")
    svi = SVI(schools, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / 300)}), Trace_ELBO())
    for _ in range(300):
        svi.step(y)
    new = simulate(50, 8, 5, seed=1)
    with torch.no_grad():
        elbo = -Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=3).loss(schools, guide, new)
    assert (log_evidence(new).sum() - elbo) / 50 < 0.3  # nats per school; a flat encoder's is above 10


# What the encoder sees


def with_covariates(y: Tensor, age: Tensor, size: Tensor) -> None:
    with pyro.plate("school", len(y), dim=-2):
        s = pyro.sample("s", dist.Normal(0.1 * size.unsqueeze(-1), 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-1):
            p = pyro.sample("p", dist.Normal(s + age, PUPIL))
            pyro.sample("y", dist.Normal(p, TEST), obs=y)


def covariates(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape), torch.randn(shape[0])


def test_covariates_are_named_by_plate() -> None:
    spec: Any
    for number, spec in enumerate(
        (
            {"pupil": ["y", "age"], "school": "size"},
            lambda y, age, size: {"pupil": [y, age], "school": size},
        )
    ):
        guide = AmortizedGuide(with_covariates, plate="school", encoder_input=spec, name=f"q{number}")
        guide.setup(*covariates(6, 4))
        args = covariates(4, 4)  # as many schools as pupils
        before = guide.median(*args)
        after = guide.median(args[0], args[1].index_fill(1, torch.tensor([2]), 3.0), args[2])
        assert (before["p"] != after["p"]).all()
        alone = guide.median(args[0], args[1], args[2].index_fill(0, torch.tensor([1]), 3.0))
        assert (before["s"] != alone["s"]).squeeze().tolist() == [False, True, False, False]


def test_an_argument_of_an_unknown_level_is_refused_and_the_remedy_works() -> None:
    args = covariates(6, 4)
    with pytest.raises(ValueError, match=r"which of the plates .* 'age' belongs to.*try a dict, encoder_input="):
        AmortizedGuide(with_covariates, plate="school", encoder_input=["y", "age"])(*args)
    with pytest.raises(ValueError, match=r"'y' as a value of plate 'teacher'.*try one of \['pupil', 'school'\]"):
        AmortizedGuide(with_covariates, plate="school", encoder_input={"teacher": ["y", "age"]}, name="b")(*args)
    AmortizedGuide(with_covariates, plate="school", encoder_input={"pupil": ["y", "age"]}, name="c")(*args)
    AmortizedGuide(with_covariates, plate="school", encoder_input="y", name="d")(*args)  # which is what a site observes


def test_encoders_that_cannot_tell_entries_apart_are_refused() -> None:
    args = covariates(6, 4)
    with pytest.raises(ValueError, match="cannot tell them apart; try PlateEncoder"):
        AmortizedGuide(with_covariates, DeepSetEncoder(1), plate="school")(*args)
    AmortizedGuide(with_covariates, MLPEncoder(4), plate="school", name="flat")(*args)
    AmortizedGuide(with_covariates, PlateEncoder(), plate="school", name="levels")(*args)


def test_numbers_that_a_guide_cannot_serve_are_refused() -> None:
    for number, options in enumerate(({"encoder": MLPEncoder(4)}, {"family": "multivariate_normal"})):
        guide = AmortizedGuide(with_covariates, plate="school", name=f"q{number}", **options)
        guide(*covariates(6, 4))
        with pytest.raises(ValueError, match=r"local site 'p' now has .*PlateEncoder"):
            guide(*covariates(6, 5))
    for Guide in (IterativeAmortizedGuide, DiscreteAmortizedGuide):
        with pytest.raises(ValueError, match=f"PlateEncoder in {Guide.__name__}"):
            Guide(with_covariates, PlateEncoder(), plate="school", name=Guide.__name__)(*covariates(6, 4))
    with pytest.raises(ValueError, match=r"level 'pupil', NoneType.*a dict from the name of each plate"):
        AmortizedGuide(with_covariates, OneLevel(), plate="school", name="one")(*covariates(6, 4))


class OneLevel(nn.Module):
    def forward(self, y: Tensor) -> dict[str, Tensor]:
        return {"school": y[:, :3]}


# Whether entries are exchangeable


def items(y: Tensor) -> None:
    """Entries that the model tells apart, by a parameter that starts the same for all of them."""
    difficulty = pyro.param("difficulty", torch.zeros(y.shape[1]))
    with pyro.plate("person", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("item", y.shape[1], dim=-1):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + e - difficulty, 1.0), obs=y)


def units(y: Tensor) -> None:
    """A plate of latents without data of their own."""
    with pyro.plate("data", len(y)):
        with pyro.plate("unit", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.T @ torch.arange(6.0).reshape(3, 2), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(("model", "shape"), [(items, (6, 4)), (units, (6, 2))])
def test_entries_that_a_model_tells_apart_keep_places_of_their_own(model: Any, shape: Any) -> None:
    pyro.clear_param_store()
    guide = AmortizedGuide(model)
    guide(torch.randn(shape))
    assert isinstance(guide.inference.encoder, MLPEncoder)


def test_square_data_and_a_covariate_are_seen_to_be_exchangeable() -> None:
    guide = AmortizedGuide(with_covariates, plate="school")
    guide(*covariates(4, 4))
    assert isinstance(guide.inference.encoder, PlateEncoder)


# Levels of any shape


def three_levels(y: Tensor, w: Tensor) -> None:
    """A vector for schools, two latents for classes, observed too, one for pupils, of which each has three values."""
    with pyro.plate("school", y.shape[0], dim=-3):
        s = pyro.sample("s", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("class", y.shape[1], dim=-2):
            c = pyro.sample("c", dist.Normal(s[..., 0], 1.0))
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("w", dist.Normal(c, rate), obs=w.unsqueeze(-1))
            with pyro.plate("pupil", y.shape[2], dim=-1):
                p = pyro.sample("p", dist.Normal(c + s[..., 1], 1.0))
                pyro.sample("y", dist.Normal(p.unsqueeze(-1), torch.ones(3)).to_event(1), obs=y)


def side_by_side(y: Tensor, w: Tensor) -> None:
    with pyro.plate("school", y.shape[0], dim=-2):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-1):
            p = pyro.sample("p", dist.Normal(s, 1.0))
            pyro.sample("y", dist.Normal(p, 1.0), obs=y)
        with pyro.plate("teacher", w.shape[1], dim=-1):
            t = pyro.sample("t", dist.Normal(s, 1.0))
            pyro.sample("w", dist.Normal(t, 1.0), obs=w)


def crossed_inside(y: Tensor) -> None:
    """Pupils and subjects of a school, with latents for each and for their pairs."""
    pupil, subject = pyro.plate("pupil", y.shape[1], dim=-2), pyro.plate("subject", y.shape[2], dim=-1)
    with pyro.plate("school", y.shape[0], dim=-3):
        with pupil:
            p = pyro.sample("p", dist.Normal(0.0, 1.0))
        with subject:
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pupil, subject:
            z = pyro.sample("z", dist.Normal(p + t, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def sequences(y: Tensor) -> None:
    """Three steps of every pupil."""
    with pyro.plate("school", y.shape[0], dim=-2), pyro.plate("pupil", y.shape[1], dim=-1):
        z: Any = 0.0
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[..., t])


SHAPES: list[tuple[Any, Any, tuple[str, ...]]] = [
    (three_levels, lambda n, a, b: (torch.randn(n, a, b, 3), torch.randn(n, a)), ("school", "class", "pupil")),
    (side_by_side, lambda n, a, b: (torch.randn(n, a), torch.randn(n, b)), ("school", "pupil", "teacher")),
    (crossed_inside, lambda n, a, b: (torch.randn(n, a, b),), ("pupil", "subject", "pupil/subject")),
    (sequences, lambda n, a, b: (torch.randn(n, a, 3),), ("pupil",)),
]


@pytest.mark.parametrize(("model", "data", "names"), SHAPES)
@pytest.mark.parametrize("family", ["normal", "structured"])
def test_levels_of_any_shape(model: Any, data: Any, names: tuple[str, ...], family: str) -> None:
    guide = AmortizedGuide(model, plate="school", family=family, name=f"{model.__name__}_{family}")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    if (model, family) == (crossed_inside, "structured"):
        with pytest.raises(ValueError, match=r"entries that do not lie within each other.*family=\"normal\""):
            svi.step(*data(5, 3, 4))
        return
    for sizes in ((5, 3, 4), (2, 6, 2), (3, 1, 1)):
        args = data(*sizes)
        assert math.isfinite(svi.step(*args))
        assert {name: x.shape for name, x in guide(*args).items()} == {
            name: x.shape for name, x in guide.median(*args).items()
        }
    assert tuple(guide.inference.encoder.targets) == names


def test_steps_in_an_inner_plate_share_a_head() -> None:
    """Features by plate with an axis of steps: any number of pupils, and of steps."""

    class ByStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 4)

        def forward(self, y: Tensor) -> dict[str, Tensor]:
            return {"pupil": self.layer(y.unsqueeze(-1))}

    def model(y: Tensor) -> None:
        with pyro.plate("school", y.shape[0], dim=-2), pyro.plate("pupil", y.shape[1], dim=-1):
            z: Any = 0.0
            for t in range(y.shape[2]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[..., t])

    guide = AmortizedGuide(model, ByStep(), plate="school", family="structured", encoder_input="y")
    for shape in ((3, 2, 4), (2, 5, 3), (4, 1, 6)):
        y = torch.randn(shape)
        assert guide(y)[f"z_{shape[2] - 1}"].shape == shape[:2]
        assert len(guide.family.rows) == shape[1] * (shape[2] - 1)
        medians = guide.median(y)
        only = guide.median(y[:, :1])
        assert all(torch.allclose(only[name], x[:, :1]) for name, x in medians.items())


# Sizes, and what is kept


def test_sizes_far_from_those_of_training_are_warned_of() -> None:
    guide = AmortizedGuide(schools, plate="school")
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(simulate(3, 4, 2))
    svi.step(simulate(3, 7, 2))
    guide.median(simulate(3, 14, 2))
    with pytest.warns(UnseenSizeWarning, match=r"of 15 entries .* far from the 4 to 7 .* of such sizes, or guide"):
        guide.median(simulate(3, 15, 2))
    dropping = AmortizedGuide(schools, PlateEncoder(member_dropout=0.5), plate="school", name="dropping")
    y = simulate(3, 8, 2)
    assert not torch.equal(dropping.variational_parameters(y), dropping.variational_parameters(y))
    dropping.eval()
    assert torch.equal(dropping.variational_parameters(y), dropping.variational_parameters(y))


def test_a_state_fits_any_number_of_entries() -> None:
    guide, other = (AmortizedGuide(schools, plate="school", family="structured", name=name) for name in "ab")
    guide.setup(simulate(6, 4, 3))
    other.load_state_dict(guide.state_dict())
    for shape in ((2, 7, 2), (3, 4, 3)):
        y = simulate(*shape)
        assert torch.equal(guide.variational_parameters(y), other.variational_parameters(y))


def on_the_right(y: Tensor) -> None:
    with pyro.plate("school", y.shape[1], dim=-1):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[0], dim=-2):
            p = pyro.sample("p", dist.Normal(s, PUPIL))
            pyro.sample("y", dist.Normal(p, TEST), obs=y)


def test_a_first_call_of_zeros_does_not_turn_the_axes() -> None:
    guide = AmortizedGuide(on_the_right, plate="school", encoder_input="y")
    guide.setup(torch.zeros(4, 4))
    y = torch.randn(4, 4)
    changed = guide.median(y)["s"] != guide.median(y.index_fill(1, torch.tensor([1]), 9.0))["s"]
    assert changed.squeeze().tolist() == [False, True, False, False]
    assert guide(torch.randn(6, 3))["p"].shape == (6, 3)


def with_a_global(y: Tensor) -> None:
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("school", len(y), dim=-2):
        s = pyro.sample("s", dist.Normal(g, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-1):
            p = pyro.sample("p", dist.Normal(s, PUPIL))
            pyro.sample("y", dist.Normal(p, TEST), obs=y)


@pytest.mark.parametrize("spec", [["y", "g"], {"pupil": ["y", "g"]}, {"pupil": ["y"], "school": ["g"]}])
def test_a_global_latent_is_shown_to_any_level(spec: Any) -> None:
    guide = AmortizedGuide(with_a_global, plate="school", encoder_input=spec)
    for shape in ((5, 4), (3, 6)):
        assert guide(torch.randn(shape))["p"].shape == shape
