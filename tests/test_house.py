"""The rooms of the package: which may import from which, how large their parts may be; importing it is cheap."""

import ast
import subprocess
import sys

import pytest
from house import (
    PACKAGE,
    ROOT,
    arrows_of_files,
    arrows_of_rooms,
    circles,
    floors,
    functions,
    imported,
    methods,
    private_uses,
    read_package,
    room_of,
    rooms_but_guides,
    without_faces,
)

SOURCES = read_package()
FILES = arrows_of_files(SOURCES)
BELOW = {
    "checks": set(),
    "structure": set(),
    "families": {"checks"},
    "encoders": {"checks"},
    "updates": {"checks", "families", "encoders"},
    "inference": {"checks", "families", "encoders", "updates"},
    "graphs": {"structure"},
    "objective": {"structure", "families", "graphs"},
    "guides": {"checks", "structure", "families", "encoders", "updates", "inference", "graphs", "objective"},
    "diagnostics": {"checks", "structure", "families", "encoders", "graphs", "objective", "guides"},
    "training": {"checks", "structure", "encoders", "objective", "guides", "diagnostics"},
    "lightning": {"training", "diagnostics"},
    "export": {"checks", "structure", "objective", "guides", "diagnostics"},
}
"""The rooms that each room may import from."""
WITHOUT_PYRO = {"checks", "families", "encoders", "updates", "inference"}
"""Rooms that know torch, not Pyro, but for its distributions."""
OPTIONAL = (
    *("arviz", "xarray", "matplotlib", "scipy", "pandas", "tqdm", "zuko", "h5netcdf", "zarr"),
    *("torch._", "torch.fx.experimental"),
)
"""Packages, and torch's compilers, that functions import when they are called."""


def strangers(sources: dict[str, str]) -> list[str]:
    """Imports from rooms that a room does not stand on."""
    rooms = arrows_of_rooms(arrows_of_files(sources))
    return [
        f"{room} -> {target}"
        for room, targets in rooms.items()
        for target in targets
        if room != PACKAGE and target.split(".")[-1] not in BELOW[room.split(".")[-1]]
    ]


def test_rooms_stand_on_those_below() -> None:
    assert strangers(SOURCES) == []
    assert floors(arrows_of_rooms(FILES)) <= 8
    assert sum(map(len, arrows_of_rooms(FILES).values())) <= 45


def test_no_files_import_each_other() -> None:
    assert circles(without_faces(FILES)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("families.normal", "from pyro_amortized.guides.amortized import AmortizedGuide"),
        ("families.normal", "def f():\n    from pyro_amortized.encoders.mlp import MLPEncoder"),
        ("objective.elbo", "import pyro_amortized.guides.base as g"),
        ("structure.layout", "from pyro_amortized import guides"),
    ],
)
def test_imports_that_point_up_are_found(module: str, line: str) -> None:
    name = f"{PACKAGE}.{module}"
    assert strangers({**SOURCES, name: f"{SOURCES[name]}\n{line}\n"})


def test_a_circle_is_found() -> None:
    name = f"{PACKAGE}.families.base"
    grown = {**SOURCES, name: f"{SOURCES[name]}\ndef f():\n    from pyro_amortized.families.normal import Normal\n"}
    assert len(circles(without_faces(arrows_of_files(grown)))) == 1


@pytest.mark.parametrize("module", [m for m in SOURCES if m != PACKAGE])
def test_sizes_and_imports(module: str) -> None:
    text, room = SOURCES[module], room_of(module).split(".")[-1]
    assert text.count("\n") <= 400
    assert all(function.size <= 40 for function in functions(module, text))
    assert all(count <= 25 for _, count in methods(module, text))
    assert not [f for f in functions(module, text) if {"args", "kwargs", "structure"} <= f.arguments]
    if room in WITHOUT_PYRO:
        foreign = [n for n in imported(text) if n.split(".")[0] == "pyro" and n.split(".")[1:2] != ["distributions"]]
        assert foreign == []
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            found = [name for name in imported(ast.unparse(function)) if not name.startswith(OPTIONAL)]
            assert found == [], function.name


def test_guides_have_one_door() -> None:
    assert sum(map(private_uses, rooms_but_guides(SOURCES))) == 0
    assert private_uses("x = self.guide._family") == 1


def test_families_state_what_they_can_do() -> None:
    for module, text in SOURCES.items():
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.args]
        asked = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "isinstance"]
        inside = room_of(module) == f"{PACKAGE}.families"
        assert inside or not [name for name in asked if name.split(".")[-1] in ("family", "_family")], module


def run_python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_leaves_heavy_packages_out() -> None:
    loaded = run_python("import sys, pyro_amortized; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert {"torch", "pyro", "pyro_amortized"} <= set(loaded)
    assert not {"arviz", "xarray", "matplotlib", "sklearn", "scipy", "pandas", "lightning"} & set(loaded)


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
