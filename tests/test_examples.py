"""Every example runs, with a step or two, and the README's example runs as printed."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_vae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "vae.py", "--num-steps", "2")
    assert "held-out: ELBO" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["folder", "picture.png"])
def test_gap_decomposition(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, out: str
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    arguments = ("--num-steps", "2", "--num-images", "3", "--data", str(tmp_path / "images.npz"))
    run(monkeypatch, "gap_decomposition.py", *arguments, "--out", str(tmp_path / out))
    assert "approximation gap" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.nc"))) == 4
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1].replace("range(1000)", "range(2)").replace("x[:100]", "x[:5]"), "README.md", "exec"), {})
    assert "Gap decomposition over 5 datapoints" in capsys.readouterr().out
