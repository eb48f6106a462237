"""Directive ``messages``: every error and warning of the package, with its remedy, read off the source.

``python docs/_ext/messages.py`` prints them.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2] / "pyro_amortized"
TITLES = {
    "guides": "Building and calling guides",
    "structure": "What a model looks like",
    "encoders": "Encoders and their inputs",
    "families": "Families",
    "updates": "Update rules",
    "inference": "Refinement",
    "objective": "Log-joint and ELBO",
    "graphs": "Compilation",
    "training": "Training",
    "lightning": "Training by Lightning",
    "diagnostics": "Diagnostics",
    "export": "Export",
    "checks": "Values of options",
}


@dataclass(frozen=True, order=True)
class Message:
    """What fails or is doubtful, why, and what to try.

    Attributes:
        what: The text up to the remedy; what it is filled with is in angle brackets.
        remedy: The rest, from "try" on; empty where there is none.
        room: The folder, or the file beside the folders, that holds it.
        is_warning: Whether it is a warning.
    """

    what: str
    remedy: str
    room: str
    is_warning: bool


Strings = Mapping[str, str]


def text_of(node: ast.AST | None, strings: Strings) -> str | None:
    """The text of an expression that makes a string, with placeholders; None if it is none.

    Args:
        node: The expression.
        strings: Texts by the names that the module gives them.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, strings) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _placeholder(node.value, strings)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left, strings), text_of(node.right, strings)
        return None if left is None and right is None else (left or "") + (right or "")
    if isinstance(node, ast.IfExp):
        return text_of(node.body, strings) or text_of(node.orelse, strings)
    return None


def _placeholder(node: ast.AST, strings: Strings) -> str:
    """What is filled in, if it is a text of the module, or a word for it."""
    if isinstance(node, ast.Name):
        return strings.get(node.id, f"<{node.id}>")
    return f"<{node.attr.strip('_')}>" if isinstance(node, ast.Attribute) else "<...>"


def messages_in(source: str) -> Iterator[tuple[str, bool]]:
    """Texts of errors, which begin with "Cannot", and of warnings."""
    tree, strings = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = text_of(node.value, strings)
            if text is not None and " " in text:
                strings.setdefault(node.targets[0].id, text)

    def visit(node: ast.AST) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            text = text_of(node.args[0], strings)
            if text:
                yield text, True
            return
        text = text_of(node, strings)
        if text is not None and text.startswith("Cannot ") and "because" in text:
            yield text, False
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(tree)


def all_messages() -> list[Message]:
    """All messages of the package, without repetitions."""
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for text, is_warning in messages_in(path.read_text()):
            cut = max(text.rfind(mark) for mark in ("; try ", ". Try ", ", try ", "; add "))
            what, remedy = (text, "") if cut < 0 else (text[:cut] + ".", text[cut + 2 :])
            found.add(Message(" ".join(what.split()), " ".join(remedy.split()), room, is_warning))
    return sorted(found)


class Messages(SphinxDirective):
    """All messages, a section for each room."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        messages = all_messages()
        rooms = [*TITLES, *sorted({message.room for message in messages} - set(TITLES))]
        return [
            self._section(room, TITLES.get(room, room), chosen)
            for room in rooms
            if (chosen := [message for message in messages if message.room == room])
        ]

    def _section(self, room: str, title: str, messages: list[Message]) -> nodes.section:
        items = nodes.definition_list(classes=["messages"])
        for message in messages:
            kind = "Warning: " if message.is_warning else ""
            said = nodes.term("", f"{kind}{message.what}")
            remedy = message.remedy[:1].upper() + message.remedy[1:] if message.remedy else "See the text itself."
            items += nodes.definition_list_item("", said, nodes.definition("", nodes.paragraph(text=remedy)))
        name = f"messages-{room}"
        return nodes.section("", nodes.title(text=title), items, ids=[name], names=[name])


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("messages", Messages)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    for found in all_messages():
        print(f"{found.room}: {found.what}\n    {found.remedy}")
