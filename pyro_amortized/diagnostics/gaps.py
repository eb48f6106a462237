r"""The gap decomposition: how far a guide's ELBO is from the log evidence, and which of its two parts is to blame.

.. math::
    \log p(x) - L[q] = \underbrace{\log p(x) - L[q^*]}_{\text{approximation gap}}
                     + \underbrace{L[q^*] - L[q]}_{\text{amortization gap}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_amortized.diagnostics.evidence import estimate_evidence
from pyro_amortized.diagnostics.local_optimum import solve
from pyro_amortized.diagnostics.problem import bind, to_dataset
from pyro_amortized.diagnostics.report import Report, join, new_axes
from pyro_amortized.guides import LocalGuide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GapEstimate", "estimate_gaps"]

_ROWS = {
    "log_evidence": "log evidence  log p(x)",
    "elbo_optimal": "optimal ELBO  L[q*]",
    "elbo": "ELBO          L[q]",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "inference_gap": "inference gap",
}


@dataclass
class GapEstimate(Report):
    """Gaps of every datapoint.

    Attributes:
        dataset: Over the plate's dimension: ``log_evidence``, ``elbo_optimal``, ``elbo``, ``approximation_gap``,
            ``amortization_gap``, ``inference_gap``, each with its Monte Carlo standard error ``<name>_se``, in nats;
            ``khat``, the tail shape of the importance weights; ``reliable``, whether the datapoint's numbers can be
            trusted: its standard errors are within tolerance, ``khat`` is below 0.7, the optimisation converged, and
            ``elbo <= elbo_optimal <= log_evidence`` holds within three standard errors (as it should for all but one in
            a thousand datapoints).
    """

    @property
    def plate(self) -> str:
        """Name of the datapoint plate, which is the dataset's dimension."""
        return str(next(iter(self.dataset.sizes)))

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
        for name, label in _ROWS.items():
            values, errors = (self.dataset[key].values for key in (name, f"{name}_se"))
            error = float(np.sqrt(np.square(errors).sum()) / count)
            spread = float(values.std(ddof=1)) if count > 1 else float("nan")
            lines.append(f"{label:24s}{values.mean():10.3f}{error:13.4f}{spread:9.3f}")
        lines.append(f"unreliable: {unreliable} of {count} datapoints ({unreliable / count:.0%})")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws every datapoint's two gaps, stacked, in order of their sum; unreliable ones are marked.

        Args:
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        data = self.dataset.sortby("inference_gap")
        position = np.arange(data.sizes[self.plate])
        amortization, approximation = data["amortization_gap"].values, data["approximation_gap"].values
        ax.bar(position, approximation, width=1.0, label=f"approximation gap (mean {approximation.mean():.2f})")
        ax.bar(
            position,
            amortization,
            bottom=approximation,
            width=1.0,
            label=f"amortization gap (mean {amortization.mean():.2f})",
        )
        doubtful = position[~data["reliable"].values]
        if len(doubtful):
            ax.plot(doubtful, np.zeros_like(doubtful), "x", color="black", ms=4, label=f"unreliable ({len(doubtful)})")
        ax.set(xlabel=f"{self.plate} (sorted)", ylabel="nats", xlim=(-0.5, len(position) - 0.5))
        ax.legend(frameon=False)
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
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    max_samples: int = 20000,
    seed: int = 0,
    compile: bool = False,
    progress: bool = False,
) -> GapEstimate:
    """Splits the slack of a guide's ELBO into approximation and amortization gap, for every datapoint of a call.

    Finds the best member of the guide's family for every datapoint (:func:`optimize_local`), estimates the log evidence
    (:func:`log_evidence`) and the ELBOs of both members of the family from common draws.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package; for :class:`~pyro_amortized.PerDatapointGuide` the amortization gap is
            what its training has left.
        model_args: The model's positional arguments, such as ``(x,)``: training or unseen data.
        model_kwargs: The model's keyword arguments.
        tolerance: Error wanted per datapoint, in nats: standard errors aim at half of it, and a datapoint counts as
            unreliable if one exceeds it.
        max_samples: Most importance samples per datapoint and proposal.
        seed: Seed of all noise; torch's global seed is not touched.
        compile: Whether to compile the log-joint, which pays for many datapoints or a costly model.
        progress: Whether to show progress bars.

    Returns:
        A :class:`GapEstimate`; print it for a table. Global latents are held at the guide's median.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints.

    References:
        Inference Suboptimality in Variational Autoencoders, Chris Cremer, Xuechen Li, David Duvenaud (2018),
        https://arxiv.org/abs/1801.03558
    """
    problem = bind(model, guide, model_args, model_kwargs, seed, compile)
    optimum = solve(problem, tolerance, seed, progress)
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
    variables["reliable"] = _reliable(variables, tolerance) & optimum.converged
    settings = {"tolerance": tolerance, "max_samples": max_samples, "seed": seed}
    return GapEstimate(to_dataset(problem, variables, **settings))


def _reliable(variables: Mapping[str, torch.Tensor], tolerance: float) -> torch.Tensor:
    reliable = variables["khat"] < 0.7
    for name in ("approximation_gap", "amortization_gap"):
        gap, error = variables[name], variables[f"{name}_se"]
        reliable = reliable & (gap >= -3 * error - 1e-3) & (error <= tolerance)
    return reliable
