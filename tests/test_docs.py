"""What the pages are made from: messages with their remedies, tutorials with their outputs, names on the reference."""

import importlib
import json
from pathlib import Path

import pytest

import pyro_amortized

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.ipynb"))


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return importlib.import_module("messages")


def test_messages_have_remedies(messages) -> None:
    found = messages.all_messages()
    assert len(found) > 200
    without = [message.what for message in found if not message.remedy and not message.is_warning]
    assert len(without) <= 3, without


def test_a_message_is_read_as_it_is_said(messages) -> None:
    source = """
reason = "it has no " + "plate"
def f(x):
    if x:
        warnings.warn(f"Odd value of {x.size}. Try another.", stacklevel=2)
    raise ValueError(
        f"Cannot use {x!r} because {reason}; "
        "try y."
    )
"""
    assert sorted(messages.messages_in(source)) == [
        ("Cannot use <x> because it has no plate; try y.", False),
        ("Odd value of <size>. Try another.", True),
    ]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_hold_their_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs) >= 3
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert path.stat().st_size < 400_000


def test_public_names_are_on_the_reference() -> None:
    modules = [
        line.split("::")[1].strip()
        for page in (DOCS / "reference").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith(".. automodule::")
    ]
    shown = {name for module in modules for name in importlib.import_module(module).__all__}
    assert set(pyro_amortized.__all__) <= shown
