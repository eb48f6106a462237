"""Gap decompositions side by side: of several guides on the same data, of one guide on training and unseen data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.checks import Effort, check_effort
from pyro_amortized.diagnostics.gaps.gaps import GapEstimate, decompose, warn_of_violations
from pyro_amortized.diagnostics.gaps.plots import AMORTIZATION, APPROXIMATION
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar
from pyro_amortized.diagnostics.report import Report, fill, in_style, new_axes, put_title, style_colour
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import batch_seed

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["GapComparison", "compare_gaps"]

_SHOWN = {
    "elbo": "ELBO",
    "importance_weighted_bound": "bound of draws",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
}


@dataclass(repr=False)
class GapComparison(Report):
    """Gap decompositions of several cases, a case being a guide on a data set.

    Attributes:
        dataset: Over ``case``, with coordinates ``guide`` and ``data``: for each quantity of a :class:`GapEstimate` the
            mean over datapoints, its standard error ``<name>_se``, the mean difference ``<name>_difference`` from the
            case's reference (coordinate ``reference``) and its standard error ``<name>_difference_se``;
            ``elbo_lead``, the mean difference of the ELBO from the best other guide's on the same data, with
            ``elbo_lead_se``, NaN where there is none; ``num_datapoints`` and ``num_unreliable``. All in nats per
            datapoint. Guides are compared with the first one
            on the same data, pairwise per datapoint; the first guide on further data with itself on the first data.
        estimates: The :class:`GapEstimate` of every case, by ``(guide, data)``; empty if read from a file.
    """

    estimates: dict[tuple[str, str], GapEstimate] = field(default_factory=dict)

    @classmethod
    def of(cls, estimates: Mapping[tuple[str, str], GapEstimate]) -> GapComparison:
        """Compares estimates by ``(guide, data)``, the first of which is the reference."""
        import xarray

        first_guide, first_data = next(iter(estimates))
        cases: list[tuple[str, str, str]] = []
        columns: dict[str, list[float]] = {}
        for (guide, data), gaps in estimates.items():
            reference = (first_guide, data if guide != first_guide else first_data)
            unreliable = int((~gaps.dataset["reliable"]).sum())
            row: dict[str, float] = {"num_datapoints": gaps.dataset.sizes[gaps.plate], "num_unreliable": unreliable}
            for name in gaps.quantities:
                row[name], row[f"{name}_se"] = gaps.mean(name)
                difference = _difference(gaps, estimates[reference], name, paired=reference[1] == data)
                row[f"{name}_difference"], row[f"{name}_difference_se"] = difference
            row["elbo_lead"], row["elbo_lead_se"] = _lead(estimates, guide, data)
            cases.append((guide, data, " on ".join(reference)))
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        guides, datas, references = zip(*cases, strict=True)
        attributes = next(iter(estimates.values())).dataset.attrs
        dataset = xarray.Dataset(
            {name: ("case", values) for name, values in columns.items()},
            coords={
                "case": np.arange(len(cases)),
                "guide": ("case", list(guides)),
                "data": ("case", list(datas)),
                "reference": ("case", list(references)),
            },
            attrs={key: value for key, value in attributes.items() if key not in {"family", "latent_dim"}},
        )
        return cls(dataset, dict(estimates))

    def __str__(self) -> str:
        """A table: means over datapoints, the differences from the reference below them, and a verdict."""
        data = self.dataset
        names = [self._name(case) for case in range(data.sizes["case"])]
        width, shown = max(map(len, names)) + 1, [name for name in _SHOWN if name in data]
        doubtful = bool(data["num_unreliable"].any())
        lines = [
            "Gap decompositions, nats per datapoint (+- standard error over datapoints)",
            f"{'':{width}s}{'log p(x)':>10s}{''.join(f'{_SHOWN[x]:>18s}' for x in shown)}"
            + (f"{'unreliable':>12s}" if doubtful else ""),
        ]
        for case, name in enumerate(names):
            row = data.isel(case=case)
            cells = "".join(f"{row[x].item():10.3f} +-{row[f'{x}_se'].item():5.3f}" for x in shown)
            flags = f"{row['num_unreliable'].item()} of {row['num_datapoints'].item()}"
            lines.append(
                f"{name:{width}s}{row['log_evidence'].item():10.3f}{cells}" + (f"{flags:>12s}" if doubtful else "")
            )
        same = len({self._reference(case) for case in range(1, len(names))}) == 1
        if len(names) > 1:
            lines.append(f"Differences from {self._reference(1)}" if same else "Differences")
        for case, name in list(enumerate(names))[1:]:
            row = data.isel(case=case)
            cells = "".join(
                f"{row[f'{x}_difference'].item():+10.3f} +-{row[f'{x}_difference_se'].item():5.3f}" for x in shown
            )
            lines.append(f"{name:{width}s}{'':10s}{cells}" + ("" if same else f"  from {self._reference(case)}"))
        return "\n".join([*lines, *fill(self.verdict)])

    def _name(self, case: int) -> str:
        row = self.dataset.isel(case=case)
        guides, datas = (len(set(self.dataset[key].values.tolist())) > 1 for key in ("guide", "data"))
        names = [row["guide"].item()] if guides or not datas else []
        return ", ".join(names + ([row["data"].item()] if datas else []))

    def _reference(self, case: int) -> str:
        wanted = self.dataset["reference"].values[case]
        cases = [f"{g} on {d}" for g, d in zip(self.dataset["guide"].values, self.dataset["data"].values, strict=True)]
        return self._name(cases.index(wanted))

    @property
    def verdict(self) -> str:
        """In words: which guide is best on each data set, and how the first generalises."""
        data, words = self.dataset, []
        for name in dict.fromkeys(data["data"].values.tolist()):
            part = data.isel(case=np.flatnonzero(data["data"].values == name))
            if part.sizes["case"] > 1:
                where = f" on {name} data" if len(set(data["data"].values)) > 1 else ""
                words.append(_best(part, where))
        first = data["guide"].values[0]
        later = np.flatnonzero((data["guide"].values == first) & (data["data"].values != data["data"].values[0]))
        words += [_generalisation(data.isel(case=int(case)), str(data["data"].values[0])) for case in later]
        for (guide, name), gaps in self.estimates.items():
            if gaps.concentration:
                case = f"{guide!r} on {name} data: " if len(self.estimates) > 1 else ""
                words.append(case + gaps.concentration)
        return " ".join(words)

    @in_style
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the two mean gaps of every case, stacked, with the standard error of their sum.

        Args:
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes.
        """
        data = self.dataset
        names = [self._name(case) for case in range(data.sizes["case"])]
        ax = new_axes(ax, (7, 1.2 + 0.4 * len(names)))
        position = np.arange(len(names))[::-1]
        left = np.zeros(len(names))
        for gap, colour in (("approximation_gap", APPROXIMATION), ("amortization_gap", AMORTIZATION)):
            ax.barh(position, data[gap].values, left=left, color=colour, label=gap.replace("_", " "))
            left = left + data[gap].values
        ax.errorbar(left, position, xerr=data["inference_gap_se"].values, fmt="none", color=style_colour(3), capsize=3)
        ax.set(yticks=position, yticklabels=names, xlabel="nats per datapoint")
        ax.legend()
        put_title(ax, "Mean gaps, with the standard error of their sum", self.verdict)
        return ax


def compare_gaps(
    model: Callable[..., Any],
    guides: LocalGuide | Mapping[str, LocalGuide] | Sequence[LocalGuide],
    model_args: ModelArgs | Mapping[str, ModelArgs] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    max_samples: int = 20000,
    num_particles: int | None = None,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    compile: bool = False,
    progress: bool = False,
) -> GapComparison:
    """Gap decompositions of several guides of a model, on one or more data sets.

    On the same data, guides are compared datapoint by datapoint: the standard errors of the differences are those of
    paired differences. Guides whose global latents have the same values share one estimate of the evidence. Between
    data sets (training and held-out, say) differences are not paired.

    Args:
        model: The Pyro model.
        guides: Trained guides by name, or in a list, or a single one. The first is the reference.
        model_args: The model's positional arguments, such as ``(x,)``, or a ``DataLoader``; or a dict of these by the
            name of a data set, such as ``{"training": (x,), "held-out": (y,)}``.
        model_kwargs: The model's keyword arguments.
        tolerance: As for :func:`estimate_gaps`.
        max_samples: As for :func:`estimate_gaps`.
        num_particles: As for :func:`estimate_gaps`.
        plate: As for :func:`estimate_gaps`.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: As for :func:`estimate_gaps`.
        compile: As for :func:`estimate_gaps`.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`GapComparison`; print it for a table and a verdict.

    Raises:
        ValueError: If there is no guide or no data set, or as :func:`estimate_gaps` does.

    Warns:
        UserWarning: As :func:`estimate_gaps` does.
    """
    by_name = guides if isinstance(guides, Mapping) else _named(guides)
    data: Mapping[str, ModelArgs] = model_args if isinstance(model_args, Mapping) else {"data": model_args}
    if not by_name or not data:
        raise ValueError("Cannot compare gaps because there is no guide or no data set; try at least one of each.")
    tolerance, max_samples, seed = check_effort(tolerance, max_samples, seed)
    effort = Effort(tolerance, max_samples, num_particles)
    graphs = GraphCache(compile)  # of the log-joint, which is the same for all guides
    parts: dict[tuple[str, str], list[GapEstimate]] = {(guide, d): [] for d in data for guide in by_name}
    counts = [num_calls(own_args) for own_args in data.values()]
    total = None if None in counts else len(by_name) * sum(filter(None, counts))
    with progress_bar(total, "gap decompositions", progress) as bar:
        for data_name, own_args in data.items():
            for number, (args, kwargs) in enumerate(calls(own_args, model_kwargs, to_args, model)):
                own_seed = batch_seed(seed, number)
                known: list[tuple[LocalProblem, dict[str, Tensor]]] = []
                for guide_name, guide in by_name.items():
                    problem = bind(model, guide, args, kwargs, own_seed, graphs=graphs, plate=plate)
                    shared = next((evidence for other, evidence in known if _same_globals(other, problem)), None)
                    part, evidence = decompose(problem, effort, own_seed, False, shared)
                    part.dataset.attrs["seed"] = seed
                    known.append((problem, evidence))
                    parts[guide_name, data_name].append(part)
                    bar.update()
    estimates = {case: GapEstimate.concat(found) for case, found in parts.items()}
    for gaps in estimates.values():
        warn_of_violations(gaps)
    return GapComparison.of(estimates)


def _named(guides: LocalGuide | Sequence[LocalGuide]) -> dict[str, LocalGuide]:
    """Guides by the name of their class, numbered where that is not enough."""
    items = list(guides) if isinstance(guides, list | tuple) else [guides]
    kinds = [type(guide).__name__ for guide in items]
    names = [f"{kind} {kinds[: i + 1].count(kind)}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)]
    return dict(zip(names, items, strict=True))  # type: ignore[arg-type]


def _same_globals(first: LocalProblem, second: LocalProblem) -> bool:
    """Whether the evidence of two bound calls is the same number."""
    a, b = (problem.objective.log_joint.call.global_values for problem in (first, second))
    if not torch.equal(first.index, second.index):
        return False
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def _difference(gaps: GapEstimate, reference: GapEstimate, name: str, *, paired: bool) -> tuple[float, float]:
    """Mean difference from a reference and its standard error."""
    if not paired:
        (value, error), (other, other_error) = gaps.mean(name), reference.mean(name)
        return value - other, float(np.hypot(error, other_error))
    difference = gaps.dataset[name].values - reference.dataset[name].values
    count = len(difference)
    noise = [np.square(x.dataset[f"{name}_se"].values).sum() for x in (gaps, reference)]
    spread = float(difference.std(ddof=1)) / count**0.5 if count > 1 else 0.0
    same = gaps is reference or not difference.any()
    return float(difference.mean()), 0.0 if same else max(spread, float(np.sqrt(sum(noise)) / count))


def _lead(estimates: Mapping[tuple[str, str], GapEstimate], guide: str, data: str) -> tuple[float, float]:
    """Mean difference of an ELBO from the best other one on the same data, by pairs, and its standard error."""
    others = [gaps for (name, where), gaps in estimates.items() if where == data and name != guide]
    if not others:
        return np.nan, np.nan
    best = max(others, key=lambda gaps: gaps.mean("elbo")[0])
    return _difference(estimates[guide, data], best, "elbo", paired=True)


def _best(part: xarray.Dataset, where: str) -> str:
    """Which guide has the highest ELBO on a data set, and whether that is more than chance."""
    order = part["elbo"].values.argsort()[::-1]
    best, second = (str(part["guide"].values[i]) for i in order[:2])
    gain, error = (part[name].values[order[0]] for name in ("elbo_lead", "elbo_lead_se"))
    if gain > 2 * error:
        return f"The best ELBO{where} is that of {best!r}, {gain:.3g} nats above the next."
    return f"No guide stands out{where}: {best!r} over {second!r} by {gain:.3g} nats is within two standard errors."


def _generalisation(row: xarray.Dataset, first: str) -> str:
    """How the amortization gap changes from the first data set to another."""
    difference, error = row["amortization_gap_difference"].item(), row["amortization_gap_difference_se"].item()
    name = row["data"].item()
    if difference > 2 * error and difference > 0.05:
        return (
            f"The amortization gap is {difference:.3g} nats larger on {name} than on {first} data: the encoder has "
            "learned its data rather than inference; try more data, a smaller encoder, dropout in it, or "
            "refined(...) at test time."
        )
    return (
        f"That the encoder does worse on {name} than on {first} data is not shown: its amortization gap differs by "
        f"{difference:+.3f} +- {error:.3f} nats."
    )
