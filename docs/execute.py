"""Executes tutorials and writes their outputs into them: ``make tutorials``, or ``python docs/execute.py NAME ...``.

Names are those of files in ``docs/tutorials``, without the ending; all by default.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
KEPT = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def execute(path: Path) -> None:
    """Runs a notebook and saves it, without what differs from run to run for nothing."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, coalesce_streams=True, resources=where).execute()
    notebook.metadata = KEPT
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    path.write_text(nbformat.writes(notebook) + "\n")


def main(names: list[str]) -> None:
    """Runs those named."""
    style = HERE.parent / "pyro_amortized/style.mplstyle"
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MATPLOTLIBRC=str(style))
    for path in sorted((HERE / "tutorials").glob("*.ipynb")):
        if not names or path.stem in names:
            start = time.perf_counter()
            execute(path)
            print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
