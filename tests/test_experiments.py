"""Every experiment runs at a tiny size, and its verdicts say what the numbers say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr

FOLDER = Path(__file__).parents[1] / "experiments"
SMALL: dict[str, list[str]] = {
    "codes": ["--steps=2", "--images=10", "--draws=2"],
    "agrawal_domke": ["--magnitudes=2", "--seconds=0.01", "--draws=1"],
    "collapse": ["--num-steps=1", "--num-train=50", "--num-held-out=3"],
    "cremer": ["--steps=5", "--images=2", "--recipe-images=1", "--temperatures=2"],
    "kim": ["--vocabulary=10", "--length=2", "--hidden-dim=4", "--num-steps=1", "--learned-steps=1"]
    + ["--num-train=50", "--num-held-out=3", "--most-methods=3"],
    "margossian_blei": ["--observations=10", "--series=3", "--exact-steps=2", "--images=5", "--decoder-steps=2"]
    + ["--image-steps=2", "--speed-steps=1"],
    "marino": ["--steps=1", "--learned-steps=1", "--images=2", "--most=5"],
    "speed": ["--steps=2", "--width=2", "--images=2"],
    "zhang": ["--images=20", "--epochs=1", "--measured=2"],
}
"""The tiniest options of every experiment."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.syspath_prepend(FOLDER.parent / "examples")


NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
QUICK = ("codes", "margossian_blei")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_runs(name: str, tmp_path: Path) -> None:
    experiment = load(name).EXPERIMENT
    assert experiment.name == name
    load("_evidence").run(experiment, [*SMALL[name], "--seeds", "1", "--out", str(tmp_path)])
    runs = xr.load_dataset(tmp_path / f"{name}.nc")
    assert runs.sizes["seed"] == 1
    assert (tmp_path / f"{name}.png").exists()
    page = (tmp_path / f"{name}.md").read_text()
    assert all(claim.text in page for claim in experiment.claims(runs))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ({"a": [1.0, 1.1, 0.9]}, "confirmed"),
        ({"a": [-1.0, -1.1, -0.9]}, "refuted"),
        ({"a": [1.0, -1.1, 0.9]}, "undecided"),
        ({"a": [1.0, 1.1, 0.9], "b": [0.5, -0.5, 0.1]}, "undecided"),
        ({"a": [1.0, 1.1, 0.9], "b": [-0.5, -0.5, -0.6]}, "refuted"),
        ({"a": [1.0]}, "undecided"),
        ({"a": [1.0, np.nan, 1.0]}, "undecided"),
    ],
)
def test_verdicts(differences: dict[str, list[float]], verdict: str) -> None:
    claim = load("_evidence").Claim("text", "ours", {name: np.array(x) for name, x in differences.items()})
    assert claim.verdict == verdict
