r"""Whether inputs are like those that the encoder knows: conformal p-values of its features and of the ELBO."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_real, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs
from pyro_amortized.diagnostics.conformal import (
    conformal_p_values,
    count_p_value,
    discoveries,
    extrapolated_p_values,
    shift_p_value,
    split,
)
from pyro_amortized.diagnostics.datapoints import Batch, batches, joined_features
from pyro_amortized.diagnostics.optimum.elbo import log_weights
from pyro_amortized.diagnostics.problem import to_dataset
from pyro_amortized.diagnostics.report import Report, fill, in_style, join, new_axes
from pyro_amortized.diagnostics.typicality.scores import Oddness
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AtypicalDataWarning", "TypicalityReport", "typicality"]

_NUM_DRAWS = 64
_LEAST_REFERENCE = 40
_RATE = 0.01
"""False discovery rate, and level of the test of the batch, at which data count as atypical beyond chance."""
_MOST = 0.3
"""Share of atypical datapoints from which on it is the data set that is another one."""


class AtypicalDataWarning(UserWarning):
    """Data look to an encoder unlike those that it knows, so that its answers may be far off."""


@dataclass(repr=False)
class TypicalityReport(Report):
    """How unlike the reference data every datapoint looks.

    Attributes:
        dataset: Over the plate's dimension: ``p_value``, of the sum of the two statistics, with ``atypical``,
            whether it is at most the level; ``p_features`` and ``p_elbo``, of each of them; ``found``, whether it is
            among those found at a false discovery rate of 1 %, with p-values that a fitted Pareto tail extends beyond
            the reference data; ``distance``, of the features, and ``elbo``, nats.
            ``reference_distance`` and ``reference_elbo`` are those of the datapoints that p-values count. Attribute
            ``batch_p_value`` is that of the batch as a whole: five times the smallest of those of scores, distances and
            ELBOs by ranks, of the number of atypical datapoints, and of the shift of the features' mean.
    """

    @property
    def plate(self) -> str:
        """Name of the datapoint plate, which is the dataset's dimension."""
        return str(self.dataset["p_value"].dims[0])

    @property
    def batch_p_value(self) -> float:
        """Of the hypothesis that all datapoints are drawn as the reference data are; for one of them its p-value."""
        return float(self.dataset.attrs["batch_p_value"])

    @property
    def typical(self) -> bool:
        """Whether no datapoint is found, nor the batch as a whole, at a level of 1 %."""
        return not bool(self.dataset["found"].any()) and self.batch_p_value > _RATE

    def __str__(self) -> str:
        """The verdict with the figures that it rests on."""
        data, attrs = self.dataset, self.dataset.attrs
        count, level = data.sizes[self.plate], attrs["level"]
        flagged, found = int(data["atypical"].sum()), int(data["found"].sum())
        lines = [
            f"Typicality of {count} datapoints of plate {self.plate!r} against {attrs['num_reference']} reference ones "
            f"({data.sizes['reference']} to calibrate)",
            f"atypical at level {level:g}: {flagged} of {count} ({level * count:.3g} expected of reference data), "
            f"{found} of them beyond chance",
            f"by features alone {int((data['p_features'] <= level).sum())}, by the ELBO alone "
            f"{int((data['p_elbo'] <= level).sum())}; p-value of the batch {self.batch_p_value:.2g}",
        ]
        return "\n".join([*lines, *fill(self.verdict)])

    @property
    def verdict(self) -> str:
        """In words: whether the data are such as the encoder knows, and what to do next."""
        if self.typical:
            return (
                "The data look like the reference data, as far as can be told: what estimate_gaps says of the "
                "encoder's answers there holds here."
            )
        data = self.dataset
        share = float((data["atypical"] if self.batch_p_value <= _RATE else data["found"]).mean())
        lower = float((data["elbo"] < data["reference_elbo"].quantile(data.attrs["level"])).mean())
        if share < _MOST and bool(data["found"].any()):
            first = data[self.plate].values[data["found"].values][:5].tolist()
            return (
                f"{int(data['found'].sum())} datapoints are unlike the reference data (first: {first}): do not take "
                "the encoder's answers for them as they are; try guide.refined(20) or certified_posterior(...) there, "
                "and a look at their data."
            )
        what = "The data as a whole are unlike the reference data: "
        if lower > _MOST:
            return (
                f"{what}their ELBOs are low. Try guide.refined(20): where it mends them, the encoder alone is to blame "
                "and more training on such data will do; where it does not, the model does not describe them."
            )
        return (
            f"{what}the model may describe them as well, but the encoder has not learned them; try guide.refined(20) "
            "or certified_posterior(...), and training on such data, if more of them are to come."
        )

    @in_style
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws distances and ELBOs, with those of the reference data; atypical datapoints are marked.

        Args:
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        data = self.dataset
        atypical = data["atypical"].values
        ax.plot(data["reference_distance"], data["reference_elbo"], ".", color="0.7", label="reference")
        for chosen, style, name in ((~atypical, "o", "typical"), (atypical, "x", "atypical")):
            x, y = data["distance"].values[chosen], data["elbo"].values[chosen]
            ax.plot(x, y, style, ms=4, label=f"{name} ({int(chosen.sum())})")
        ax.set(xlabel="distance of the features", ylabel="ELBO (nats)", xscale="log", yscale="symlog")
        ax.set_title(f"{'typical' if self.typical else 'unlike the reference data'} (p = {self.batch_p_value:.2g})")
        ax.legend(frameon=False)
        return ax


def typicality(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    reference_args: ModelArgs,
    reference_kwargs: Mapping[str, Any] | None = None,
    level: float = 0.05,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TypicalityReport:
    r"""Tells whether datapoints look to an encoder like reference data, at the cost of an encoder and 64 draws.

    Two statistics: the Mahalanobis distance of the encoder's features and variational parameters from those of the
    reference data, and the ELBO, which is odd if it is too low or too high (data of constant value, for one, may have a
    higher likelihood than any real ones). Half of the reference data tell what is usual, and so the units in which
    both are added; the other half calibrate p-values: of datapoints drawn as the reference data are, at most a share
    ``level`` has a p-value of at most ``level``, whatever the model and however bad the guide.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package.
        model_args: The model's positional arguments, such as ``(x,)``, or a ``DataLoader``.
        model_kwargs: The model's keyword arguments.
        reference_args: Those of the reference data: held out from training, else the encoder knows them too well and
            everything new looks odd. At least 40 datapoints; p-values are no smaller than 2 by their number.
        reference_kwargs: The model's keyword arguments there; by default ``model_kwargs``.
        level: The share of false alarms.
        plate: As for :func:`estimate_gaps`.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of the draws and of the halves.
        progress: Whether to show progress bars.

    Returns:
        A :class:`TypicalityReport`; print it for a verdict.

    Raises:
        ValueError: If there are too few reference data, or the log-joint cannot be evaluated.

    Warns:
        AtypicalDataWarning: If the data are atypical beyond chance; ``warnings.simplefilter("error",
            AtypicalDataWarning)`` makes it an error.

    References:
        Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality, Eric Nalisnick, Akihiro
        Matsukawa, Yee Whye Teh, Balaji Lakshminarayanan (2019), https://arxiv.org/abs/1906.02994
        Detecting Model Misspecification in Amortized Bayesian Inference with Neural Networks, Marvin Schmitt, Paul-
        Christian Bürkner, Ullrich Köthe, Stefan T. Radev (2024), https://arxiv.org/abs/2112.08866

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AmortizedGuide(model)
        >>> report = typicality(model, guide, (torch.randn(3),), reference_args=(torch.randn(200),))
        >>> report.typical
        True
    """
    check_real("level", level, "a share of false alarms, above 0 and below 1", lambda x: 0 < x < 1, 0.05)
    seed = check_seed(seed)
    kwargs = model_kwargs if reference_kwargs is None else reference_kwargs
    options: dict[str, Any] = {"plate": plate, "to_args": to_args, "progress": progress}
    known = _Statistics.of(batches(model, guide, reference_args, kwargs, seed=seed, **options), seed)
    number = len(known.elbo)
    if number < _LEAST_REFERENCE or number * level < 2:
        least = max(_LEAST_REFERENCE, int(np.ceil(2 / level)))
        raise ValueError(
            f"Cannot compare with {number} reference datapoints because p-values of level={level:g} want more; try "
            f"reference_args with {least} or more of them."
        )
    found = list(batches(model, guide, model_args, model_kwargs, seed=seed + 1, **options))
    report = _report(found, _Statistics.of(found, seed, known.features.shape[-1]), known, level, seed)
    if not report.typical:
        warnings.warn(f"{report.verdict} (batch p-value {report.batch_p_value:.2g})", AtypicalDataWarning, stacklevel=2)
    return report


@dataclass(frozen=True)
class _Statistics:
    """Features ``(N, F)`` and ELBOs ``(N,)`` of a data set."""

    features: Tensor
    elbo: Tensor

    @classmethod
    def of(cls, found: Any, seed: int, known: int | None = None) -> _Statistics:
        features, elbo = zip(*((batch.features, _elbo(batch)) for batch in found), strict=True)
        return cls(joined_features(list(features), known), torch.cat(elbo))

    def __getitem__(self, rows: Tensor) -> _Statistics:
        return _Statistics(self.features[rows], self.elbo[rows])


@torch.no_grad()
def _elbo(batch: Batch) -> Tensor:
    problem = batch.problem
    return log_weights(problem.objective, problem.phi, None, _NUM_DRAWS, batch.seed).mean(0)


def _report(found: list[Batch], data: _Statistics, known: _Statistics, level: float, seed: int) -> TypicalityReport:
    import xarray

    first, second, rest = split(len(known.elbo), generator(seed, 60), 1 / 3, 1 / 6)
    oddness, held = Oddness.of(known.features, known.elbo, first, second), known[rest]
    scores, calibration = (oddness(part.features, part.elbo) for part in (data, held))
    p_values = {name: conformal_p_values(scores[name], calibration[name]) for name in scores}
    distance, reference = (oddness.distance(part.features) for part in (data, held))
    variables = {
        "p_value": p_values["both"],
        "atypical": p_values["both"] <= level,
        "found": discoveries(extrapolated_p_values(scores["both"], calibration["both"]), _RATE),
        "p_features": p_values["features"],
        "p_elbo": p_values["elbo"],
        "distance": distance,
        "elbo": data.elbo,
    }
    sizes = [len(batch.features) for batch in found]
    cut = {name: values.split(sizes) for name, values in variables.items()}
    columns = [{name: part[k] for name, part in cut.items()} for k in range(len(sizes))]
    settings = {"level": level, "num_reference": len(known.elbo), "seed": seed}
    joined = [to_dataset(batch.problem, part, **settings) for batch, part in zip(found, columns, strict=True)]
    dataset = join(joined, found[0].problem.plate)
    pairs = [(scores["both"], calibration["both"]), (distance, reference), (data.elbo, held.elbo)]
    of_count = count_p_value(int(variables["atypical"].sum()), len(data.elbo), len(held.elbo), level)
    of_shift = shift_p_value(data.features, held.features, generator(seed, 61))
    batch = _batch_p_value(pairs, of_count, of_shift) if len(data.elbo) > 1 else float(p_values["both"])
    dataset.attrs["batch_p_value"] = batch
    found_of_reference = {"reference_distance": reference, "reference_elbo": held.elbo}
    extra = {name: ("reference", value.numpy()) for name, value in found_of_reference.items()}
    return TypicalityReport(xarray.merge([dataset, xarray.Dataset(extra)], combine_attrs="override"))


def _batch_p_value(pairs: list[tuple[Tensor, Tensor]], *others: float) -> float:
    """Of the smallest of several p-values: of pairs of samples, by ranks, and others."""
    from scipy.stats import mannwhitneyu

    found = [mannwhitneyu(*(part.nan_to_num().numpy() for part in pair)).pvalue for pair in pairs]
    found += others
    return min(1.0, len(found) * float(min(found)))
