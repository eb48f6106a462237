"""Every example runs, with a step or two, and the README's example runs as printed."""

import importlib
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_amortized import AmortizedGuide

ROOT = Path(__file__).parent.parent


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(ROOT / "examples")  # where scripts look for the modules beside them
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_vae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(monkeypatch, "vae.py", "--num-steps", "2", "--out", str(tmp_path))
    assert "held-out: ELBO" in capsys.readouterr().out
    assert (tmp_path / "vae.png").exists()


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, ...]:
    """Options for tiny images and few of them."""
    images = np.random.default_rng(0).integers(0, 255, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    return "--data", str(tmp_path / "images.npz"), "--num-steps", "2", "--num-images", "2"


def test_gap_decomposition(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, images: tuple[str, ...]
) -> None:
    run(monkeypatch, "gap_decomposition.py", *images, "--out", str(tmp_path / "folder"))
    printed = capsys.readouterr().out
    assert "approximation gap" in printed
    printed = printed[: printed.index("Differences")]
    for guide in ("mean-field", "refined", "semi-amortized", "iterative", "full-rank"):
        assert len(re.findall(rf"^{guide}, (training|held-out) .*\d\.\d+( +\d of 2)?$", printed, re.MULTILINE)) == 2
    assert len(list(tmp_path.rglob("*.nc"))) == 10
    assert len(list(tmp_path.rglob("*.png"))) == 2


@pytest.mark.slow
def test_semi_amortized(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, images: tuple[str, ...]
) -> None:
    run(monkeypatch, "semi_amortized.py", *images, "--out", str(tmp_path))
    rows = re.findall(r"^\S.* +2( +-\d+\.\d{3}){3}$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 5
    assert (tmp_path / "semi_amortized.png").exists()


def test_distributed(images: tuple[str, ...]) -> None:
    """Under torchrun, which starts the processes; the first one prints the result of both."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--processes", "2", "--epochs", "1", "--images", "3", *images[:2]]
    process = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "distributed.py"), *options], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Gap decomposition over 3 datapoints") == 1
    assert "1 steps of training" in process.stdout


def test_training_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    common = importlib.import_module("_common")
    images = torch.ones(20, 16)
    model = common.VAE.for_images(images)
    start = time.perf_counter()
    assert common.train(model, AmortizedGuide(model), images, "VAE", num_steps=10**9, seconds=0.05) > 1
    assert time.perf_counter() - start < 60


@pytest.mark.slow
def test_iterative(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, images: tuple[str, ...]
) -> None:
    run(monkeypatch, "iterative.py", *images, "--out", str(tmp_path / "picture.png"))
    rows = re.findall(r"^\S.* \d+ +-\d+\.\d{3} \+- +\d\.\d{3}$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 4
    assert (tmp_path / "picture.png").exists()


@pytest.mark.slow
def test_posterior_collapse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, images: tuple[str, ...]
) -> None:
    run(monkeypatch, "posterior_collapse.py", *images, "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert "The plain VAE, Posterior collapse over 2 datapoints" in printed
    rows = re.findall(r"^\S.* +2 +\d+\.\d( +-?\d+\.\d\d){4} +\d$", printed, re.MULTILINE)
    assert len(rows) == 7
    assert (tmp_path / "posterior_collapse.png").exists()


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("range(1000)", "range(2)").replace("x[:100]", "x[:5]")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Gap decomposition over 5 datapoints" in printed
    gaps = [float(line.split()[1]) for line in printed.splitlines() if re.fullmatch(r"\d+ -?\d+\.\d+", line)]
    assert len(gaps) == 3
    assert gaps[2] < gaps[0]
