"""Directive ``names``: a table of what a module exports, one line each."""

from importlib import import_module

from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.autosummary import Autosummary


class Names(Autosummary):
    """``.. names:: MODULE`` is the autosummary of all names in the module's ``__all__``."""

    required_arguments = 1

    def run(self) -> list:
        """The table."""
        module = self.arguments[0]
        names = [f"~{module}.{name}" for name in import_module(module).__all__]
        self.content = StringList(names, source=module)
        self.options["nosignatures"] = None
        return super().run()


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the directive."""
    app.add_directive("names", Names)
    return {"parallel_read_safe": True}
