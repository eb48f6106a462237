"""Directive ``zoo``: a model of ``examples/zoo`` with what its docstring says, its results and its code."""

import ast
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

EXAMPLES = Path(__file__).parents[2] / "examples" / "zoo"
RESULTS = Path(__file__).parents[1] / "zoo"


class Zoo(SphinxDirective):
    """``.. zoo:: NAME``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Paragraphs, the table that the script printed, and the code, folded away."""
        name = self.arguments[0]
        source = EXAMPLES / f"{name}.py"
        printed = RESULTS / f"{name}.txt"
        for path in (source, printed):
            self.env.note_dependency(str(path))
        text = ast.get_docstring(ast.parse(source.read_text())) or ""
        parts = [part for part in text.split("\n\n") if not part.startswith(("Run ``", "References:"))]
        said = self.parse_text_to_nodes("\n\n".join(parts).replace("``", "`"))
        shown: list[nodes.Node] = []
        if printed.exists():
            command = nodes.literal(text=f"python examples/zoo/{name}.py")
            shown += [nodes.paragraph("", "", command, nodes.Text(" prints"))]
            shown += [nodes.literal_block(text=printed.read_text().rstrip(), language="text")]
        return [
            *said,
            *shown,
            nodes.raw("", f"<details><summary>examples/zoo/{name}.py</summary>", format="html"),
            nodes.literal_block(text=source.read_text(), language="python"),
            nodes.raw("", "</details>", format="html"),
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("zoo", Zoo)
    return {"parallel_read_safe": True}
