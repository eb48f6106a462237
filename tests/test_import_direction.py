"""The arrows between modules point one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_amortized

LAYERS: list[set[str]] = [
    {"checks"},
    {"arguments", "families", "encoders", "quantization"},
    {"updates"},
    {"inference"},
    {"tracing"},
    {"recording"},
    {"graphs", "influence", "periodic", "unconstrained", "weights"},
    {"layout"},
    {"discrete", "dependence"},
    {"structure"},
    {"programs", "sampling", "observed", "outside"},
    {"encoder_inputs"},
    {"batches", "simulated"},
    {"log_joint"},
    {"objective"},
    {"guides"},
    {"diagnostics"},
    {"training", "export"},
]
"""From low to high: a module imports from lower layers only. ``__init__`` gathers them all."""
WITHOUT_PYRO = {"arguments", "checks", "families", "encoders", "quantization", "updates", "inference"}
"""Modules that know torch, not Pyro, but for its distributions."""

ROOT = Path(pyro_amortized.__file__).parent
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(source: str) -> Iterator[str]:
    """Full names of all that a source imports, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int:
    """Position of a module of the package, from its full name."""
    name = module.split(".")[1]
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"pyro_amortized.{name} has no layer yet; add it to LAYERS"
    return found[0]


def violations(module: str, source: str) -> list[str]:
    """Imports of a module that point upwards or sideways, or to Pyro where it must not be known."""
    own = module.split(".")[1]
    found = []
    for name in imported(source):
        parts = name.split(".")
        if parts[0] == "pyro_amortized":
            inside = parts[1:2] == [own]
            if not inside and (len(parts) == 1 or layer(name) >= layer(module)):
                found.append(name)
        elif parts[0] == "pyro" and own in WITHOUT_PYRO and parts[1:2] != ["distributions"]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(["pyro_amortized", *path.relative_to(ROOT).with_suffix("").parts])
    assert violations(module, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_amortized.families.normal", "from pyro_amortized.guides import AmortizedGuide"),
        ("pyro_amortized.families.normal", "from pyro_amortized.encoders import MLPEncoder"),
        ("pyro_amortized.encoders", "import pyro"),
        ("pyro_amortized.encoders", "from pyro import poutine"),
        ("pyro_amortized.inference", "def f():\n    from pyro_amortized.tracing import probe"),
        ("pyro_amortized.objective", "import pyro_amortized.guides as g"),
        ("pyro_amortized.layout", "from pyro_amortized import guides"),
        ("pyro_amortized.layout", "import pyro_amortized"),
        ("pyro_amortized.guides", "from pyro_amortized.diagnostics.noise import draw"),
    ],
)
def test_wrong_imports_are_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_amortized.families.normal", "import torch, pyro.distributions as dist"),
        ("pyro_amortized.families.normal", "from pyro_amortized.families.base import VariationalFamily"),
        ("pyro_amortized.encoders", "from pyro.distributions import TorchDistribution"),
        ("pyro_amortized.guides", "from pyro_amortized import families\nimport pyro"),
        ("pyro_amortized.diagnostics.gaps", "from pyro_amortized.diagnostics.noise import draw"),
    ],
)
def test_right_imports_are_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_module_without_a_layer_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no layer yet"):
        violations("pyro_amortized.novel", "import pyro_amortized.guides")


def run_python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_leaves_heavy_packages_out() -> None:
    loaded = run_python("import sys, pyro_amortized; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert {"torch", "pyro", "pyro_amortized"} <= set(loaded)
    assert not {"arviz", "xarray", "matplotlib", "sklearn", "scipy", "pandas"} & set(loaded)


def test_import_changes_nothing_global() -> None:
    look = (
        "state = lambda: (torch.get_default_dtype(), torch.get_rng_state().tolist(), torch.is_grad_enabled(),"
        " pyro.distributions.is_validation_enabled(), torch.distributions.Distribution._validate_args,"
        " pyro.settings.get())"
    )
    code = f"import pyro, torch\n{look}\nbefore = state()\nimport pyro_amortized\nprint(before == state())"
    assert run_python(code).strip() == "True"


@pytest.mark.benchmark
def test_import_is_fast() -> None:
    code = "import time, pyro\nstart = time.perf_counter()\nimport pyro_amortized\nprint(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3
