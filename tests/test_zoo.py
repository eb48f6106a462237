"""Real models, each with every guide that applies: they train, take unseen data, and their gaps can be estimated."""

import importlib
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

ZOO = Path(__file__).parent.parent / "examples" / "zoo"
MODULES = ["vae", "lda", "sparse_gamma", "single_cell", "hierarchical", "cevae", "semi_supervised", "missing_data"]
AMORTIZED = ("amortized", "semi-amortized", "iterative")
CHEAP = {"semi-amortized": ("missing_data",), "iterative": ("missing_data",)}
"""Models on which guides that refine are trained by default too."""
REFINED = ("vae", "lda", "hierarchical", "missing_data")
"""Models on which guides that refine are tried at all; ``make robustness`` trains them on all."""
BUDGETS = {"sparse_gamma": (300, 2e-2)}
"""Steps and learning rate, where not 100 and 0.01."""
SHORT = (40, 1e-2)
"""The same for guides without an encoder, and for those that take long."""


def quick(name: str, guide: str) -> bool:
    return name in CHEAP.get(guide, MODULES)


def cases(*guides: str, quick: Callable[[str, str], bool] = quick) -> list[Any]:
    """Names of models and guides, those that are not quick marked as slow; a guide is trained once in one process."""
    found = []
    for name, guide in ((name, guide) for name in MODULES for guide in guides if name in REFINED or guide not in CHEAP):
        marks = [pytest.mark.xdist_group(f"{name} {guide}"), *(() if quick(name, guide) else (pytest.mark.slow,))]
        found.append(pytest.param(name, guide, marks=marks))
    return found


@cache
def load(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ZOO)
        return importlib.import_module(name)


@cache
def small(name: str) -> Any:
    return load(name).make_problem(small=True)


@cache
def trained(name: str, guide: str) -> tuple[Any, Any, Any]:
    """The problem, the guide trained on it, and what it reached, once for all tests; small problems."""
    zoo, kept = load("_problem"), []

    def make_guide(problem: Any) -> Any:
        kept.append((problem, zoo.GUIDES[guide](problem)))
        return kept[-1][1]

    num_steps, lr = BUDGETS.get(name, (100, 1e-2)) if guide in AMORTIZED and quick(name, guide) else SHORT
    result = zoo.compare(small(name), {guide: make_guide}, num_steps, lr=lr, gaps=False)[guide]
    return *kept[-1], result


def standardized(mean: tuple[float, float], other: tuple[float, float]) -> float:
    """How many Monte Carlo standard errors the first mean is above the second."""
    return (mean[0] - other[0]) / (mean[1] ** 2 + other[1] ** 2) ** 0.5


@pytest.mark.parametrize(("name", "guide"), cases("per datapoint", *AMORTIZED))
def test_trains(name: str, guide: str) -> None:
    losses = torch.tensor(trained(name, guide)[2].losses)
    assert losses.isfinite().all()
    assert losses[-20:].mean() < losses[:20].mean() - 2 * losses[-20:].std() / 20**0.5


def seen_and_unseen(problem: Any) -> tuple[Any, ...]:
    """Training and held-out data together."""
    pairs = zip(problem.train, problem.held_out, strict=True)
    return tuple(torch.cat(pair, axis) for pair, axis in zip(pairs, axes(problem, problem.train), strict=True))


def neighbours(problem: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with every datapoint in its neighbour's place."""
    return tuple(x.roll(1, axis) for x, axis in zip(args, axes(problem, args), strict=True))


def axes(problem: Any, args: tuple[Any, ...]) -> list[int]:
    """The axis of the datapoints in each argument."""
    return [x.shape.index(problem.num_datapoints(*args)) for x in args]


@pytest.mark.parametrize(("name", "guide"), cases(*AMORTIZED))
def test_takes_unseen_data(name: str, guide: str) -> None:
    """Data of other sizes; the posterior of a datapoint suits it better than its neighbour."""
    problem, trained_guide, reached = trained(name, guide)
    assert problem.num_datapoints(*problem.held_out) != problem.num_datapoints(*problem.train)
    assert np.isfinite(reached.held_out).all()
    if not quick(name, guide):  # and so hardly trained
        return

    def of_neighbours(*args: Any) -> None:
        problem.model(*neighbours(problem, args))

    bounds = []
    for model in (problem.model, of_neighbours):
        pyro.set_rng_seed(0)
        shifted, data = replace(problem, model=model), seen_and_unseen(problem)
        bounds.append(load("_problem").elbo(shifted, trained_guide, data, num_particles=100))
    assert standardized(*bounds) > 3


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("name", "guide"), cases(*AMORTIZED, quick=lambda name, guide: guide == "amortized" and name != "semi_supervised")
)
def test_gaps_of_unseen_data(name: str, guide: str) -> None:
    problem, trained_guide, reached = trained(name, guide)
    model = problem.diagnosed or problem.model
    gaps = load("_problem").estimate_gaps(model, trained_guide, problem.held_out, tolerance=0.2, max_samples=500)
    data = gaps.dataset
    assert list(data.sizes.values()) == [problem.num_datapoints(*problem.held_out)]
    for quantity in ("log_evidence", "elbo_optimal", "elbo", "approximation_gap", "amortization_gap"):
        assert np.isfinite(data[quantity]).all()
    for gap in ("inference_gap", "amortization_gap"):
        assert (data[gap] >= -4 * data[f"{gap}_se"] - 0.01).all()
    if not trained_guide.global_sites:  # else they are held at their median
        error = float(np.sqrt(np.square(data["elbo_se"]).sum())) / data.sizes[gaps.plate]
        assert abs(standardized(reached.held_out, (float(data["elbo"].mean()), error))) < 5


# AutoNormal, at the best of three learning rates, after as many steps on minibatches as large

COMPARED = ["vae", "hierarchical"]
STEPS = {"hierarchical": 300}
"""Numbers of steps where not 200."""
RATES = {"vae": 2e-2, "hierarchical": 1e-2}
"""Learning rates."""


def compared(problem: Any, name: str, guide: str) -> tuple[float, float]:
    """The ELBO of all training data."""
    zoo = load("_problem")
    options: dict[str, Any] = {"lr": RATES[name], "rates": zoo.RATES, "gaps": False}
    return zoo.compare(problem, {guide: zoo.GUIDES[guide]}, STEPS.get(name, 200), **options)[guide].train


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_improves_on_auto_normal(name: str) -> None:
    problem = load(name).make_problem()
    ours, reference = (compared(problem, name, guide) for guide in ("amortized", "AutoNormal"))
    assert standardized(ours, reference) > 4


def blind(y: Tensor, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(*y.shape, 6), present


@pytest.mark.slow
def test_blind_encoder_does_not_improve_on_auto_normal() -> None:
    """The comparison above fails where the encoder is of no use."""
    problem = load("hierarchical").make_problem(small=True)
    unseeing = replace(problem, options={**problem.options, "encoder_input": blind})
    ours, reference = (
        compared(p, "hierarchical", guide) for p, guide in ((unseeing, "amortized"), (problem, "AutoNormal"))
    )
    assert standardized(ours, reference) < -4


# Scripts


@pytest.mark.parametrize("name", MODULES)
def test_example_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = load("_problem")
    plot = tmp_path / "folder" / "plot.png"
    arguments = ["--small", "--num-steps", "2", *(["--out", str(plot)] if name == "vae" else [])]
    zoo.main(load(name).make_problem, arguments, guides={"per datapoint": zoo.GUIDES["per datapoint"]})
    assert capsys.readouterr().out.splitlines()[-1].startswith("per datapoint ")
    assert plot.exists() == (name == "vae")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_script_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--small", "--num-steps", "2", "--guides", "amortized"])
    monkeypatch.syspath_prepend(ZOO)
    runpy.run_path(str(ZOO / f"{name}.py"), run_name="__main__")
    assert "\namortized " in capsys.readouterr().out
