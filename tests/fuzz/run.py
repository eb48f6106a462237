"""Runs structures and counts what came of them: ``make fuzz SEED=0 NUM=5000``, one again by ``START=417 NUM=1``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyro
import torch
from case import Case, Wrong
from checks import chosen, make
from refusals import is_needed
from structures import Structure, generate
from tqdm import tqdm

__all__ = ["FOREIGN", "NEEDLESS", "REFUSED", "RIGHT", "WRONG", "Outcome", "outcomes", "run", "table"]

RIGHT, REFUSED, NEEDLESS, FOREIGN, WRONG = "right", "refused", "needless", "foreign", "wrong"
RESULTS = (RIGHT, REFUSED, NEEDLESS, FOREIGN, WRONG)


@dataclass(frozen=True)
class Outcome:
    """What came of one check of one structure."""

    structure: Structure
    check: str
    result: str
    message: str = ""
    seconds: float = 0.0


@contextmanager
def double_precision(validate: bool) -> Iterator[None]:
    """The conditions that a structure runs in; nothing of them is left behind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(validate), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
        pyro.clear_param_store()
        os.environ.pop("FUZZ_MODE", None)


def outcomes(structure: Structure, names: list[str] | None = None) -> list[Outcome]:
    """What comes of the checks that are made of a structure, or of those named."""
    found, case = [], None
    with double_precision(structure.validate):
        for name in chosen(structure) if names is None else names:
            start, result, message = time.process_time(), RIGHT, ""
            try:
                case = case or Case(structure)
                make(case, name)
            except Exception as error:
                case = None  # an error may leave anything behind
                result, message = _result(structure, name, error)
            found.append(Outcome(structure, name, result, message, time.process_time() - start))
    return found


def _result(structure: Structure, name: str, error: Exception) -> tuple[str, str]:
    """What an exception means."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, Wrong):
        return WRONG, message
    if isinstance(error, ValueError) and str(error).startswith("Cannot"):
        return REFUSED if is_needed(structure, name, str(error)) else NEEDLESS, message
    where = traceback.extract_tb(error.__traceback__)[-1]
    return FOREIGN, f"{message} ({os.path.basename(where.filename)}:{where.lineno})"


def _numbered(seed: int, number: int) -> list[Outcome]:
    return outcomes(generate(seed, number))


def run(seed: int, numbers: range, workers: int = 2, *, progress: bool = False) -> list[Outcome]:
    """Outcomes of all numbers, from a pool of processes or, with one worker, from this one."""
    job, found = partial(_numbered, seed), list[Outcome]()
    torch.set_num_threads(1)
    pool = multiprocessing.get_context("fork").Pool(workers) if workers > 1 else None
    try:
        results = map(job, numbers) if pool is None else pool.imap_unordered(job, numbers, chunksize=4)
        for part in tqdm(results, total=len(numbers), disable=not progress, unit="structure"):
            found += part
    except KeyboardInterrupt:
        print("stopped before the end", file=sys.stderr)
    finally:
        if pool is not None:
            pool.terminate()
    return sorted(found, key=lambda o: (o.structure.number, o.check))


def table(found: list[Outcome]) -> str:
    """Counts of results by check and by guide."""
    keys: dict[str, Callable[[Outcome], str]] = {
        "check": lambda o: o.check,
        "guide": lambda o: o.structure.guide.kind,
        "family": lambda o: o.structure.guide.family,
        "theme": lambda o: o.structure.theme,
    }
    lines = []
    for title, key in keys.items():
        counts = Counter((key(o), o.result) for o in found)
        seconds: Counter[str] = Counter()
        for o in found:
            seconds[key(o)] += o.seconds
        lines.append(f"{title:30}" + "".join(f"{result:>10}" for result in RESULTS) + f"{'seconds':>10}")
        for name in dict.fromkeys(sorted(key(o) for o in found)):
            lines.append(f"{name:30}" + "".join(f"{counts[name, r]:10}" for r in RESULTS) + f"{seconds[name]:10.1f}")
        lines.append("")
    total = Counter(o.result for o in found)
    lines.append(f"{'all':30}" + "".join(f"{total[result]:10}" for result in RESULTS))
    return "\n".join(lines)


def failures(found: list[Outcome], limit: int) -> str:
    """Structures that failed by message, those that are not mere refusals first, with what runs them again."""
    kinds: dict[str, list[Outcome]] = {}
    for o in found:
        if o.result not in (RIGHT, REFUSED):
            words = "".join(c for c in o.message if not c.isdigit())[:60]
            kinds.setdefault(f"{o.result} {o.check} {words}", []).append(o)
    lines = []
    order = sorted(kinds.values(), key=lambda same: (same[0].result != NEEDLESS, len(same)), reverse=True)
    for same in order[:limit]:
        o = same[0]
        lines.append(f"{len(same)} x {o.result} in {o.check}: {o.message[:300]}\n    {o.structure}")
        lines.append(f"    {o.structure.command}  (numbers {[other.structure.number for other in same[:12]]})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", type=int, default=20, help="number of kinds of failures to print")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.perf_counter()
    numbers = range(options.start, options.start + options.num)
    found = run(options.seed, numbers, options.workers if options.num > 1 else 1, progress=True)
    seconds = time.perf_counter() - start
    if options.num == 1:
        for o in found:
            print(f"{o.structure}\n{o.check}: {o.result} {o.message}")
    print(table(found))
    print(failures(found, options.show))
    done, used = len({o.structure.number for o in found}), options.workers if options.num > 1 else 1
    print(f"{done} structures in {seconds:.0f} s, {done / seconds / used:.2f} per second and process")
    sys.exit(any(o.result in (FOREIGN, WRONG) for o in found))


if __name__ == "__main__":
    main()
