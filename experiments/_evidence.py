"""What the experiments share: repetitions over seeds, claims with verdicts, and the results as netCDF, figure and page.

An experiment is a file with four things: ``measure``, one repetition at one seed as a data set of raw numbers;
``tables``, what to print of all repetitions; ``claims``, what the paper says as differences that should be positive;
and ``draw``, the figure. :func:`run` does the rest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats
from tqdm.auto import tqdm

sys.path.append(str(Path(__file__).parents[1] / "examples"))

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"
LEVEL = 0.95


@dataclass(frozen=True)
class Claim:
    """A claim as numbers that should be positive, one per repetition.

    Attributes:
        text: What is claimed.
        source: Who claims it, such as ``"Cremer et al. 2018"``, or ``"ours"``.
        differences: What should be positive by name, each an array over the repetitions.
        unit: Of the differences.
    """

    text: str
    source: str
    differences: dict[str, np.ndarray]
    unit: str = "nats"

    @property
    def verdict(self) -> str:
        """``"confirmed"`` if Student's 95 % interval of every mean lies above 0, ``"refuted"`` if one's lies below."""
        intervals = [interval(values) for values in self.differences.values()]
        if any(high < 0 for _, high in intervals):
            return REFUTED
        return CONFIRMED if all(low > 0 for low, _ in intervals) else UNDECIDED

    @property
    def figures(self) -> str:
        """The means and their standard errors."""
        return "; ".join(f"{name} {with_error(values)}" for name, values in self.differences.items()) + f" {self.unit}"


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        title: One line above it.
        columns: Heads, that of the row names first.
        rows: Cells by row.
        note: What to know to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: Name of the file.
        title: Title of the section.
        doc: What is done, and on what.
        measure: One repetition: raw numbers at a seed, under the options.
        tables: The tables of all repetitions, along the dimension ``"seed"``.
        claims: The claims of all repetitions.
        draw: Draws the figure.
        num_seeds: Repetitions unless asked otherwise.
        sizes: Options ``--NAME`` by name: the default size, the size of ``--full`` and the help.
        timed: Whether times are compared, so that repetitions run one after the other.
    """

    name: str
    title: str
    doc: str
    measure: Callable[[int, argparse.Namespace], xr.Dataset]
    tables: Callable[[xr.Dataset], list[Table]]
    claims: Callable[[xr.Dataset], list[Claim]]
    draw: Callable[[xr.Dataset, Figure], None]
    num_seeds: int = 3
    sizes: dict[str, tuple[Any, Any, str]] = field(default_factory=dict)
    timed: bool = False


def interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return -math.inf, math.inf
    half = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def with_error(values: Any, digits: int = 3) -> str:
    """The mean over repetitions and its standard error."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


def run(experiment: Experiment, argv: list[str] | None = None) -> xr.Dataset:
    """Runs the repetitions, or reads them, and writes numbers, figure and page.

    Args:
        experiment: The experiment.
        argv: Command line.

    Returns:
        The raw numbers of all repetitions.
    """
    parser = argparse.ArgumentParser(description=experiment.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=experiment.num_seeds, help="repetitions (default: %(default)s)")
    parser.add_argument("--data", help=".npz with train_images and test_images, such as MNIST (default: digits)")
    parser.add_argument("--full", action="store_true", help="the size of the paper, for larger machines")
    parser.add_argument("--out", type=Path, default=Path("results/experiments"), help="folder (default: %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="write figure and page again from the saved numbers")
    workers = 1 if experiment.timed else min(2, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help="repetitions side by side (default: %(default)s)")
    for name, (size, full, text) in experiment.sizes.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(size), help=f"{text} (default: {size}; with --full {full})"
        )
    args = parser.parse_args(argv)
    for name, (size, full, _) in experiment.sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, full if args.full else size)
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = args.out / f"{experiment.name}.nc"
    if args.redraw:
        runs = xr.load_dataset(numbers)
    else:
        runs = _repeat(experiment, args, argv)
        runs.to_netcdf(numbers)
    runs.attrs["claims"] = json.dumps([[c.text, c.source, c.verdict, c.figures] for c in experiment.claims(runs)])
    runs.to_netcdf(numbers)
    text = _page(experiment, runs)
    (args.out / f"{experiment.name}.md").write_text(text)
    _save_figure(experiment, runs, args.out / f"{experiment.name}.png")
    _save_summary(args.out)
    print(text)
    print(f"saved {experiment.name}.nc, .md and .png in {args.out} ({runs.attrs['elapsed']:.0f} s)")
    return runs


def _repeat(experiment: Experiment, args: argparse.Namespace, argv: list[str] | None) -> xr.Dataset:
    """All repetitions along ``"seed"``, some of them side by side in processes of one thread."""
    start = time.perf_counter()
    done: dict[int, xr.Dataset] = {}
    with tqdm(total=args.seeds, desc=experiment.name, unit="run") as bar:
        if args.workers <= 1 or args.seeds == 1:
            for seed in range(args.seeds):
                done[seed] = _once(experiment.measure, seed, args)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
                tasks = {pool.submit(_once, experiment.measure, seed, args): seed for seed in range(args.seeds)}
                for task in as_completed(tasks):
                    done[tasks[task]] = task.result()
                    bar.update()
    runs = xr.concat([done[seed] for seed in sorted(done)], xr.IndexVariable("seed", sorted(done)))
    command = "make experiments NAME=" + experiment.name
    given = " ".join(_without_out(sys.argv[1:] if argv is None else argv))
    runs.attrs = {
        "command": f"{command} EXPERIMENT_ARGS='{given}'" if given else command,
        "date": datetime.date.today().isoformat(),
        "elapsed": time.perf_counter() - start,
        "torch": str(torch.__version__),
        "pyro": str(pyro.__version__),
        "data_file": Path(args.data).name if args.data else "",
        **{name: getattr(args, name) for name in experiment.sizes},
    }
    return runs


def _once(measure: Callable[[int, argparse.Namespace], xr.Dataset], seed: int, args: argparse.Namespace) -> xr.Dataset:
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return measure(seed, args)


def _without_out(argv: Sequence[str]) -> list[str]:
    """The options that matter for the numbers."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in ("--out", "--workers"):
            skip = True
        elif not word.startswith(("--out=", "--workers=")):
            kept.append(Path(word).name if word.endswith(".npz") else word)
    return kept


def _page(experiment: Experiment, runs: xr.Dataset) -> str:
    """The section of the documentation."""
    minutes = runs.attrs["elapsed"] / 60
    label, title = experiment.name, experiment.title
    if file := runs.attrs.get("data_file"):
        label, title = f"{label}-{Path(file).stem}", f"{title}, on {file}"
    lines = [
        f"({label})=", f"## {title}", "", textwrap.dedent(experiment.doc).strip(), "",
        f"`{runs.attrs['command']}`, {runs.sizes['seed']} repetitions, {runs.attrs['date']}, {minutes:.0f} minutes, "
        f"torch {runs.attrs['torch']}. Means over the repetitions ± standard errors.", "",
        "| claim | source | verdict | figures |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| {c.text} | {c.source} | **{c.verdict}** | {c.figures} |" for c in experiment.claims(runs)]
    lines += ["", f"![{title}]({experiment.name}.png)", ""]
    for table in experiment.tables(runs):
        lines += [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |"]
        lines += ["| " + " | ".join("---" for _ in table.columns) + " |"]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        lines += ["", *([table.note, ""] if table.note else [])]
    return "\n".join(lines)


def _save_summary(folder: Path) -> None:
    """The claims of all experiments of a folder, in one table."""
    lines = ["| experiment | claim | source | verdict |", "| --- | --- | --- | --- |"]
    counts = dict.fromkeys((CONFIRMED, REFUTED, UNDECIDED), 0)
    for path in sorted(folder.glob("*.nc")):
        with xr.open_dataset(path) as runs:
            for text, source, verdict, _ in json.loads(runs.attrs.get("claims", "[]")):
                lines.append(f"| [{path.stem}](#{path.stem}) | {text} | {source} | **{verdict}** |")
                counts[verdict] += 1
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    (folder / "claims.md").write_text("\n".join([f"Of {sum(counts.values())} claims, {said}.", "", *lines, ""]))


def _save_figure(experiment: Experiment, runs: xr.Dataset, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context("pyro_amortized.style"):
        figure = plt.figure(figsize=(11, 4.2), layout="constrained")
        experiment.draw(runs, figure)
        figure.savefig(path, dpi=110)
        plt.close(figure)
