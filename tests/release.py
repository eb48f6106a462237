"""What can be checked of a release without publishing it: ``make release-check``.

Builds the wheel and the source distribution and checks versions, changelog, links, what both hold, the metadata as the
index reads them, an installation of the wheel, and the tests of the unpacked source distribution.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = (
    ".ci/run", "CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "benchmarks/run.py", "constraints.txt", "docs/conf.py", "docs/index.md", "examples/vae.py",
    "examples/zoo/vae.py", "pyproject.toml", "setup.cfg", "tests/conftest.py", "tests/models.py",
)  # fmt: skip
"""What the source distribution holds beside the package."""
QUICK = ("tests/test_house.py", "tests/test_examples.py", "tests/families", "tests/updates", "tests/encoders")


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Runs a command, and ends if it fails."""
    print("$", *command, flush=True)
    subprocess.run(command, cwd=cwd, check=True)


def versions(tag: str | None) -> str:
    """The version, if all places agree on it and the changelog dates it."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "pyro_amortized/__init__.py").read_text())[1]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    changes = (ROOT / "CHANGELOG.md").read_text()
    dated = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE)
    unreleased = re.search(r"^## \[Unreleased\]\s+(?!## )\S", changes, re.MULTILINE)
    assert cited == version, f"CITATION.cff says {cited}, the package {version}"
    assert dated, f"CHANGELOG.md has no line '## [{version}] - YYYY-MM-DD'"
    assert not unreleased, f"CHANGELOG.md has unreleased changes; move them under '## [{version}]'"
    assert tag in (None, f"v{version}"), f"the tag is {tag}, the version {version}"
    return version


def links() -> None:
    """No link of the README is relative, and all to the repository use its address in pyproject.toml."""
    text, project = (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = [target for target in targets if not target.startswith(("https://", "#"))]
    assert not relative, f"relative links in README.md: {relative}"
    source = re.search(r'^Source = "(.+)"$', project, re.MULTILINE)[1]
    foreign = [t for t in targets if "github" in t and "/".join(source.split("/")[-2:]) not in t]
    assert not foreign, f"links to another repository than {source}: {foreign}"
    for path in re.findall(rf"{'/'.join(source.split('/')[-2:])}/(?:(?:blob|tree)/)?main/([^)\s]+)", text):
        assert (ROOT / path).exists(), f"README.md links to {path}, which is not there"


def contents(wheel: Path, sdist: Path) -> None:
    """The wheel is the package, all of it; the source distribution holds what tests, docs and examples need."""
    package = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "pyro_amortized").rglob("*")
        if p.suffix in (".py", ".typed", ".mplstyle")
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == package, f"the wheel differs from the package: {sorted(held ^ package)}"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in (*NEEDED, *package) if name not in names]
    assert not missing, f"the source distribution lacks {missing}"
    foreign = [name for name in names if "__pycache__" in name or name.startswith(("docs/_build", ".venv"))]
    assert not foreign, f"the source distribution holds {foreign[:5]}"


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the source distribution, made anew without a network."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir())
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def installation(wheel: Path, version: str) -> None:
    """The wheel by itself, beside the packages at hand."""
    code = f"import pyro_amortized as p; assert p.__version__ == {version!r}; assert 'site' in p.__file__, p.__file__"
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
        run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}", cwd=Path(folder))


def tests(sdist: Path, chosen: Sequence[str]) -> None:
    """The tests of the unpacked source distribution, of the package in it."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        run("env", f"PYTHONPATH={unpacked}", sys.executable, "-m", "pytest", "-q", *chosen, cwd=unpacked)


def main() -> None:
    """Does all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the tag that the release is to have")
    parser.add_argument("--all", action="store_true", help="all default tests from the source distribution, not a part")
    args = parser.parse_args()
    version = versions(args.tag)
    links()
    wheel, sdist = build(ROOT / "dist")
    contents(wheel, sdist)
    installation(wheel, version)
    tests(sdist, () if args.all else QUICK)
    print(f"{wheel.name} and {sdist.name} are as they should be")


if __name__ == "__main__":
    main()
