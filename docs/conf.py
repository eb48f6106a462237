"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "pyro_amortized"
author = "Contributors to the pyro_amortized project"
copyright = author
release = installed_version("pyro-amortized")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute"]
nb_execution_mode = "force"  # the figures of every page come from the code beside them
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_merge_streams = True
nb_output_stderr = "remove"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# A method that says nothing new has no text of its own; torch's inherited docstrings are not ours to render.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"{project} {release}"
