"""Sphinx configuration.

``make docs`` executes every page, and of the tutorials, whose outputs are committed, two a day in turn;
``make docs-full`` executes all of them (``DOCS_FULL=1``).
"""

import os
import sys
from datetime import date
from hashlib import sha256
from importlib.metadata import version as installed_version
from pathlib import Path

from jupyter_cache.cache.main import JupyterCacheBase

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_ext"))

project = "pyro_amortized"
author = "Contributors to the pyro_amortized project"
copyright = author
release = installed_version("pyro-amortized")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "messages",
    "names",
    "zoo",
]
exclude_patterns = ["_build", "_static", "jupyter_execute"]

# Kernels run on one core each and draw in the style of the package.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MATPLOTLIBRC=str(ROOT / "pyro_amortized/style.mplstyle"))
sources = b"".join(path.read_bytes() for path in sorted((ROOT / "pyro_amortized").rglob("*.py")))
tutorials = sorted(path.name for path in (HERE / "tutorials").glob("*.ipynb"))
day = date.today().toordinal()
in_turn = {tutorials[(2 * day + i) % len(tutorials)] for i in range(2)} if tutorials else set()
full = bool(os.environ.get("DOCS_FULL"))
# The figures of every page come from the code beside them; a page is run again when it or the package has changed.
nb_execution_mode = "force" if full or os.environ.get("CI") else "cache"
nb_execution_cache_path = str(HERE / "_build/outputs" / sha256(sources).hexdigest()[:12])
cache_of_outputs = JupyterCacheBase(nb_execution_cache_path).db  # made once, or every process of `-j` would make it
nb_execution_excludepatterns = [] if full else [f"tutorials/{name}" for name in tutorials if name not in in_turn]
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_merge_streams = True
nb_output_stderr = "remove"
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # messages and code are quoted as they are

mathjax_path = "mathjax-3.2.2-tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # whose parts would be loaded from elsewhere

# A method that says nothing new has no text of its own; torch's inherited docstrings are not ours to render.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # properties have descriptions of their own

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
