r"""The gap decomposition: how far a guide's ELBO is from the log evidence, and which of its two parts is to blame.

.. math::
    \log p(x) - L[q] = \underbrace{\log p(x) - L[q^*]}_{\text{approximation gap}}
                     + \underbrace{L[q^*] - L[q]}_{\text{amortization gap}}
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_count
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, is_single, num_calls
from pyro_amortized.diagnostics.checks import Effort, check_effort
from pyro_amortized.diagnostics.evidence.evidence import estimate_evidence, reliable_evidence
from pyro_amortized.diagnostics.gaps.by_level import leading_level, level_lines, with_levels
from pyro_amortized.diagnostics.gaps.importance_weighted import importance_weighted_bound
from pyro_amortized.diagnostics.gaps.plots import draw_stacks
from pyro_amortized.diagnostics.gaps.unseen import advice_on_inputs, on_globals, unseen_arguments
from pyro_amortized.diagnostics.optimum.local_optimum import solve
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar, to_dataset
from pyro_amortized.diagnostics.report import Report, fill, in_style, join, new_axes, put_title
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import batch_seed

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["QUANTITIES", "GapEstimate", "decompose", "estimate_gaps"]

QUANTITIES = {
    "log_evidence": "log evidence  log p(x)",
    "elbo_optimal": "optimal ELBO  L[q*]",
    "elbo": "ELBO          L[q]",
    "importance_weighted_bound": "bound of K draws L_K[q]",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "inference_gap": "inference gap",
}
"""The variables that come with standard errors; the bound of K draws where it is asked for."""


_NEGLIGIBLE = 1e-3
"""What rounding may do to a gap, in nats."""
_SMALL = 0.05
"""A mean gap below this, in nats, is small however well it is known."""


@dataclass(repr=False)
class GapEstimate(Report):
    """Gaps of every datapoint.

    Attributes:
        dataset: Over the plate's dimension: ``log_evidence``, ``elbo_optimal``, ``elbo``, ``approximation_gap``,
            ``amortization_gap``, ``inference_gap``, if asked for ``importance_weighted_bound``, each with its Monte
            Carlo standard error ``<name>_se``, in nats;
            ``khat``, the tail shape of the importance weights; ``reliable``, whether the datapoint's numbers can be
            trusted as far as that can be checked: its standard errors are within tolerance, ``khat`` is below 0.7, the
            search for modes settled, the optimisation converged, and ``elbo <= elbo_optimal <= log_evidence`` holds
            within three standard errors (as it should for all but one in a thousand datapoints). Modes that no search
            has met are not ruled out. Where latents lie in plates inside the datapoint plate, and the family's
            parameters are those of single latents (``"normal"``, ``"structured"``), also ``amortization_gap_by_level``
            over a further dimension ``level``: what of the amortization gap arises at the latents of each plate.
    """

    @property
    def plate(self) -> str:
        """Name of the datapoint plate, which is the dataset's dimension."""
        return str(next(iter(self.dataset.sizes)))

    @property
    def quantities(self) -> list[str]:
        """Names of the variables that come with standard errors."""
        return [name for name in QUANTITIES if name in self.dataset]

    def __str__(self) -> str:
        """A table of means over datapoints.

        ``+-`` is the Monte Carlo standard error of the mean over these datapoints; ``sd`` is the standard deviation of
        the values between datapoints.
        """
        count = self.dataset.sizes[self.plate]
        unreliable = int((~self.dataset["reliable"]).sum())
        lines = [
            f"Gap decomposition over {count} datapoints of plate {self.plate!r}, nats per datapoint "
            f"({self.dataset.attrs.get('family', '')} family)",
            f"{'':24s}{'mean':>10s}{'+- MC s.e.':>13s}{'sd':>9s}",
        ]
        for name in self.quantities:
            label = QUANTITIES[name].replace("K", str(self.dataset.attrs.get("num_particles", "K")))
            values, errors = (self.dataset[key].values for key in (name, f"{name}_se"))
            error = float(np.sqrt(np.square(errors).sum()) / count)
            spread = _spread(values) if count > 1 else float("nan")
            lines.append(f"{label:24s}{values.mean():10.3f}{error:13.4f}{spread:9.3f}")
            if name == "amortization_gap":
                lines += level_lines(self.dataset, self.plate)
        lines.append(f"unreliable: {unreliable} of {count} datapoints ({unreliable / count:.0%})")
        return "\n".join([*lines, *fill(self.verdict, 92)])

    @property
    def violations(self) -> xarray.DataArray:
        """Where ``elbo <= elbo_optimal <= log_evidence`` fails by more than two standard errors.

        Of datapoints whose gap is zero one in 44 does so by chance.
        """
        gaps = ("approximation_gap", "amortization_gap")
        first, second = (self.dataset[gap] < -2 * self.dataset[f"{gap}_se"] - _NEGLIGIBLE for gap in gaps)
        return (first | second).rename("violations")

    def mean(self, name: str) -> tuple[float, float]:
        """Mean of a variable over datapoints, and its standard error as an estimate for all data there could be.

        The error holds what differs between datapoints and, where that is less, the Monte Carlo error.
        """
        values, errors = self.dataset[name].values, self.dataset[f"{name}_se"].values
        spread = _spread(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return float(values.mean()), max(spread, _monte_carlo_error(errors))

    @property
    def verdict(self) -> str:
        """In words: whether the numbers can be trusted, which gap dominates, and what to try."""
        return " ".join(filter(None, (_trust(self), _dominance(self), self.concentration, on_globals(self.dataset))))

    @property
    def concentration(self) -> str:
        """Says where a twentieth of the datapoints, or one of them, holds most of the inference gap."""
        gap = self.dataset["inference_gap"].values.clip(min=0.0)
        if not np.isfinite(gap).all():
            return ""
        few = max(1, len(gap) // 20)
        order = np.argsort(-gap)[:few]
        share = gap[order].sum() / max(gap.sum(), 1e-300)
        if share < 0.5 or len(gap) < 10 or gap.mean() <= _SMALL:
            return ""
        names = ", ".join(map(str, self.dataset[self.plate].values[order[:3]].tolist())) + ("" if few <= 3 else ", ...")
        what = f"{few} of {len(gap)} datapoints hold" if few > 1 else "One datapoint holds"
        return f"{what} {share:.0%} of the inference gap ({names}): see worst()."

    def worst(self, n: int = 10, by: str = "inference_gap") -> xarray.Dataset:
        """The datapoints with the largest gaps, largest first.

        Args:
            n: How many.
            by: The variable to sort by, such as ``"amortization_gap"``.

        Returns:
            Their part of :attr:`dataset`; its coordinate says which datapoints they are.

        Raises:
            ValueError: If there is no such variable, or ``n`` is no count.
        """
        if by not in self.dataset:
            raise ValueError(
                f"Cannot sort datapoints by {by!r} because there is no such variable; try one of {self.quantities}."
            )
        order = np.argsort(-self.dataset[by].values, kind="stable")[: check_count("n", n, 1, 10)]
        return self.dataset.isel({self.plate: order})

    @in_style
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws every datapoint's two gaps, stacked, in order of their sum; unreliable ones are marked.

        The axis leaves out gaps far above the others, whose values are written beside it.

        Args:
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes.
        """
        ax = draw_stacks(self.dataset, new_axes(ax))
        count, family = self.dataset.sizes[self.plate], self.dataset.attrs.get("family", "")
        put_title(ax, f"Gaps of {count} datapoints of plate {self.plate!r} ({family} family)", _dominance(self))
        return ax

    @classmethod
    def concat(cls, estimates: Sequence[GapEstimate]) -> GapEstimate:
        """Joins the estimates of several batches along the plate.

        Batches whose coordinates overlap, as those of unsubsampled plates do, are numbered anew in their order.

        Raises:
            ValueError: If there are none, or they belong to different plates or families.
        """
        if not estimates:
            raise ValueError("Cannot join gap estimates because there are none; try passing at least one.")
        kinds = {(e.plate, e.dataset.attrs.get("family")) for e in estimates}
        if len(kinds) > 1:
            raise ValueError(
                f"Cannot join gap estimates because they belong to different plates or families: {sorted(kinds)}; "
                "try joining the batches of one guide."
            )
        return cls(join([e.dataset for e in estimates], estimates[0].plate))


def estimate_gaps(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
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
) -> GapEstimate:
    """Splits the slack of a guide's ELBO into approximation and amortization gap, for every datapoint.

    Finds the best member of the guide's family for every datapoint (:func:`optimize_local`), estimates the log evidence
    (:func:`log_evidence`) and the ELBOs of both members of the family from common draws.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package; for :class:`~pyro_amortized.PerDatapointGuide` the amortization gap is
            what its training has left.
        model_args: The model's positional arguments, such as ``(x,)``: training or unseen data. Or a ``DataLoader``,
            whose batches are worked on one by one, so that memory does not grow with their number.
        model_kwargs: The model's keyword arguments.
        tolerance: Error wanted per datapoint, in nats: standard errors aim at half of it, and a datapoint counts as
            unreliable if one exceeds it.
        max_samples: Most importance samples per datapoint and proposal.
        num_particles: Adds the importance-weighted bound of so many draws, ``importance_weighted_bound``, which
            :class:`~pyro_amortized.training.IWELBO` trains; it lies between the ELBO and the evidence.
        plate: The datapoint plate of the guide, by default; of guides that amortize both sides of crossed plates, the
            side, with the other side's latents held at their medians.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all noise; torch's global seed is not touched.
        compile: Whether to compile the log-joint, which pays for many datapoints or a costly model.
        progress: Whether to show progress bars.

    Returns:
        A :class:`GapEstimate`; print it for a table and a verdict. Global latents are held at the guide's median.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints.

    Warns:
        UserWarning: If ``elbo <= elbo_optimal <= log_evidence`` fails by more than two standard errors at more
            datapoints than chance explains.

    References:
        Inference Suboptimality in Variational Autoencoders, Chris Cremer, Xuechen Li, David Duvenaud (2018),
        https://arxiv.org/abs/1801.03558
    """
    tolerance, max_samples, seed = check_effort(tolerance, max_samples, seed)
    graphs = GraphCache(compile)
    estimates: list[GapEstimate] = []
    single, shards = is_single(model_args), Shards(model_args)
    with progress_bar(num_calls(model_args), "batches", progress and not single) as bar:
        for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model, shared=True)):
            own_seed = batch_seed(seed, shards.number(number))
            problem = bind(model, guide, args, kwargs, own_seed, graphs=graphs, plate=plate)
            effort = Effort(tolerance, max_samples, num_particles)
            part = decompose(problem, effort, own_seed, progress and single)[0]
            part.dataset.attrs.update({} if estimates else unseen_arguments(guide, problem), seed=seed)
            estimates.append(part)
            bar.update()
    gaps = GapEstimate.concat(list(shards.collect(estimates)))
    gaps = GapEstimate(shards.in_order(gaps.dataset, gaps.plate))
    warn_of_violations(gaps)
    return gaps


def decompose(
    problem: LocalProblem,
    effort: Effort,
    seed: int,
    progress: bool,
    evidence: dict[str, Tensor] | None = None,
) -> tuple[GapEstimate, dict[str, Tensor]]:
    """:func:`estimate_gaps` of a call that is bound already, and the evidence, which may be given."""
    tolerance, max_samples = effort.tolerance, effort.max_samples
    optimum = solve(problem, tolerance, seed, progress)
    if evidence is None:
        evidence = estimate_evidence(problem, optimum.phi, tolerance, max_samples, seed, progress)
    log_p, log_p_se, khat = evidence["log_evidence"], evidence["log_evidence_se"], evidence["khat"]
    variables = {
        "log_evidence": log_p,
        "log_evidence_se": log_p_se,
        "elbo_optimal": optimum.elbo,
        "elbo_optimal_se": optimum.elbo_se,
        "elbo": optimum.initial_elbo,
        "elbo_se": optimum.initial_elbo_se,
        "approximation_gap": log_p - optimum.elbo,
        "approximation_gap_se": (log_p_se.square() + optimum.elbo_se.square()).sqrt(),
        "amortization_gap": optimum.improvement,
        "amortization_gap_se": optimum.improvement_se,
        "inference_gap": log_p - optimum.initial_elbo,
        "inference_gap_se": (log_p_se.square() + optimum.initial_elbo_se.square()).sqrt(),
        "khat": khat,
    }
    settings: dict[str, Any] = {"tolerance": tolerance, "max_samples": max_samples, "seed": seed}
    if effort.num_particles is not None:
        settings["num_particles"] = effort.num_particles
        found = importance_weighted_bound(problem, effort.num_particles, tolerance, max_samples, seed)
        variables["importance_weighted_bound"], variables["importance_weighted_bound_se"] = found
    checked = optimum.converged & reliable_evidence(evidence, tolerance)
    variables["reliable"] = _reliable(variables, tolerance) & checked
    dataset = to_dataset(problem, variables, **settings)
    return GapEstimate(with_levels(dataset, problem, optimum.phi, tolerance / 3, seed)), evidence


def _reliable(variables: Mapping[str, Tensor], tolerance: float) -> Tensor:
    reliable = torch.ones_like(variables["khat"], dtype=torch.bool)
    for name in ("approximation_gap", "amortization_gap"):
        gap, error = variables[name], variables[f"{name}_se"]
        reliable = reliable & (gap >= -3 * error - _NEGLIGIBLE) & (error <= tolerance)
    return reliable


def _monte_carlo_error(errors: Any) -> float:
    """Standard error of a mean over these datapoints, from theirs."""
    return float(np.sqrt(np.square(errors).sum()) / len(errors))


def _spread(values: np.ndarray[Any, Any]) -> float:
    """Standard deviation; NaN where values are infinite."""
    return float(values.std(ddof=1)) if np.isfinite(values).all() else float("nan")


def warn_of_violations(gaps: GapEstimate) -> None:
    """Warns if the bounds fail at more datapoints than chance explains, were all gaps zero."""
    count, failed = gaps.dataset.sizes[gaps.plate], int(gaps.violations.sum())
    expected = 0.0455 * count  # two gaps per datapoint, each with one tail of two standard errors
    if failed > expected + 3 * expected**0.5 + 1:
        first = gaps.dataset[gaps.plate].values[gaps.violations.values][:5].tolist()
        warnings.warn(
            f"elbo <= elbo_optimal <= log_evidence fails by more than two standard errors at {failed} of {count} "
            f"datapoints of plate {gaps.plate!r} (first: {first}), more than chance explains: the evidence or the "
            "local optimum is doubtful there. Try a larger max_samples, a smaller tolerance, or float64.",
            stacklevel=3,
        )


def _trust(gaps: GapEstimate) -> str:
    data = gaps.dataset
    count, bad = data.sizes[gaps.plate], int((~data["reliable"]).sum())
    if bad == 0:
        return (
            "The estimate can be trusted as far as checked: no datapoint is flagged for its standard errors, the tail "
            "of its weights, its optimisation or its search for modes. Modes that no search has met are not ruled out."
        )
    heavy = int((data["khat"] >= 0.7).sum())
    reason = f"{bad} of {count} datapoints are flagged" + (f", {heavy} for heavy-tailed weights" if heavy else "")
    remedy = "try a larger max_samples, or a wider tolerance if errors of that size do not matter"
    if bad <= 0.1 * count:
        leave_out = "leave them out with `dataset.where(dataset.reliable)`"
        return f"The other datapoints can be trusted as far as checked: {reason}; {leave_out}."
    return (
        f"The log evidence and the approximation gap cannot be trusted: {reason}; {remedy}. The amortization gap does "
        "not depend on them."
    )


def _dominance(gaps: GapEstimate) -> str:
    names = ("approximation_gap", "amortization_gap", "inference_gap")
    approximation, amortization, total = (gaps.mean(name)[0] for name in names)
    if not np.isfinite(total + amortization):
        bad = int((~np.isfinite(gaps.dataset["elbo"] + gaps.dataset["elbo_optimal"])).sum())
        others = "`dataset.where(dataset.reliable)` for the others, and " if gaps.dataset["reliable"].any() else ""
        return (
            f"The ELBO of {bad} datapoints is not finite: the guide has draws at which the model has no density; try "
            f"{others}constraints on the latents."
        )
    errors = (_monte_carlo_error(gaps.dataset[f"{name}_se"].values) for name in names[:2])
    small = [gap <= max(_SMALL, 2 * error) for gap, error in zip((approximation, amortization), errors, strict=True)]
    remedies = {
        "amortization": advice_on_inputs(gaps.dataset)
        + "the encoder misses what its family can represent: try guide.refined(20), an encoder that is larger or sees "
        "more, longer training or more data",
        "approximation": "the family cannot represent the posteriors: try a richer one, such as "
        'family="multivariate_normal" or "flow"',
    }
    if all(small):
        return f"Inference is close to exact: both gaps are small or not told from zero ({total:.3g} nats in all)."
    values = {"amortization": amortization, "approximation": approximation}
    lead = max(values, key=lambda name: values[name])
    share = f"{values[lead]:.3g} of {total:.3g} nats"
    share += leading_level(gaps.dataset) if lead == "amortization" else ""
    if min(values.values()) > 0.5 * values[lead]:
        return (
            f"Both gaps matter ({amortization:.3g} nats of amortization, {approximation:.3g} of approximation): "
            f"{remedies['amortization']}; and {remedies['approximation']}."
        )
    return f"The {lead} gap dominates ({share}): {remedies[lead]}."
