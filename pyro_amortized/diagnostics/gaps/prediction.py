r"""The amortization gap without optimisation: predicted from what an encoder and a few draws tell of a datapoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_real
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs
from pyro_amortized.diagnostics.checks import check_effort
from pyro_amortized.diagnostics.conformal import conformal_quantile, split
from pyro_amortized.diagnostics.datapoints import Batch, batches, joined_features
from pyro_amortized.diagnostics.gaps.regression import GaussianProcess
from pyro_amortized.diagnostics.optimum.elbo import log_weights
from pyro_amortized.diagnostics.optimum.laplace import moments
from pyro_amortized.diagnostics.optimum.local_optimum import solve
from pyro_amortized.diagnostics.problem import to_dataset
from pyro_amortized.diagnostics.report import join
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import generator, seeded

if TYPE_CHECKING:
    import xarray

__all__ = ["predict_gap"]

_NUM_DRAWS, _NUM_SLOPES = 64, 32
"""Draws for the spread of log weights, and for the gradient of the ELBO."""
_LEAST_REFERENCE = 40
_MOST_REFERENCE = 1500
"""Datapoints that the regression takes; it costs their number to the third power."""
_GOOD = 0.6
"""Rank correlation on reference data from which on the order can be used."""


def predict_gap(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    reference_args: ModelArgs,
    reference_kwargs: Mapping[str, Any] | None = None,
    budget: float = 0.2,
    level: float = 0.9,
    tolerance: float = 0.02,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> xarray.Dataset:
    r"""Predicts every datapoint's amortization gap, and says which datapoints to refine first.

    For reference data the gap is found by :func:`optimize_local`. A Gaussian process learns the logarithm of it from
    what one look at a datapoint tells: the variational parameters, mean and standard deviation of the log weights of 64
    draws, and the slope of the ELBO from 32. (The encoder alone tells little: draws are what tells most.) Part of the
    reference data is kept for calibration: the interval of a datapoint that is drawn as they are holds its gap with
    probability ``level``, however good the prediction.

    Args:
        model: The Pyro model.
        guide: A trained guide of this package.
        model_args: The model's positional arguments, such as ``(x,)``, or a ``DataLoader``.
        model_kwargs: The model's keyword arguments.
        reference_args: Those of the reference data, held out from training, whose gaps are measured; at least 40
            datapoints, better some hundreds. Of more than 1500, so many are used, chosen at random.
        reference_kwargs: The model's keyword arguments there; by default ``model_kwargs``.
        budget: The share of datapoints that may be refined.
        level: What the interval is to hold with.
        tolerance: As for :func:`optimize_local`, of the reference data.
        plate: As for :func:`estimate_gaps`.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all noise; torch's global seed is not touched.
        progress: Whether to show progress bars.

    Returns:
        A dataset over the plate's dimension: ``amortization_gap``, the expected gap in nats, with
        ``amortization_gap_low`` and ``amortization_gap_high``, the ends of its interval; ``order``, 0 for the datapoint
        to refine first; ``refine``, whether it is within the budget. Attributes: ``rank_correlation``, of predicted and
        true gaps of the reference data kept for calibration; ``share_closed``, the share of the total gap that the
        budget is expected to close; ``advice``, in words.

    Raises:
        ValueError: If there are too few reference data, or the log-joint cannot be evaluated.

    References:
        Semi-Amortized Variational Autoencoders, Yoon Kim, Sam Wiseman, Andrew C. Miller, David Sontag, Alexander M.
        Rush (2018), https://arxiv.org/abs/1802.02550
        Distribution-Free Predictive Inference for Regression, Jing Lei, Max G'Sell, Alessandro Rinaldo, Ryan J.
        Tibshirani, Larry Wasserman (2018), https://arxiv.org/abs/1604.04173

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AmortizedGuide(model)
        >>> gaps = predict_gap(model, guide, (torch.randn(50),), reference_args=(torch.randn(60),))
        >>> int(gaps["refine"].sum())
        10
    """
    tolerance, _, seed = check_effort(tolerance, 1, seed)
    for name, value in (("budget", budget), ("level", level)):
        check_real(name, value, "a share, above 0 and below 1", lambda x: 0 < x < 1, 0.2 if name == "budget" else 0.9)
    kwargs = model_kwargs if reference_kwargs is None else reference_kwargs
    options: dict[str, Any] = {"plate": plate, "to_args": to_args, "progress": progress}
    known, gaps = [], []
    for batch in batches(model, guide, reference_args, kwargs, seed=seed, **options):
        optimum = solve(batch.problem, tolerance, batch.seed, progress)
        known.append(_inputs(batch)[optimum.converged])
        gaps.append(optimum.improvement[optimum.converged])
    inputs = joined_features(known)
    chosen = torch.randperm(len(inputs), generator=generator(seed, 77))[:_MOST_REFERENCE]
    head = _Head.fit(inputs[chosen], torch.cat(gaps)[chosen], level, tolerance, seed)
    parts = []
    for batch in batches(model, guide, model_args, model_kwargs, seed=seed + 1, **options):
        found = joined_features([_inputs(batch)], inputs.shape[-1])
        parts.append(to_dataset(batch.problem, head(found), level=level, seed=seed, tolerance=tolerance))
    return _planned(join(parts, batch.problem.plate), head, budget, len(chosen))


@torch.no_grad()
def _inputs(batch: Batch) -> Tensor:
    """Mean and log standard deviation of log weights, log slope of the ELBO, variational parameters, ``(N, 3 + P)``."""
    problem = batch.problem
    weights = log_weights(problem.objective, problem.phi, None, _NUM_DRAWS, batch.seed)
    weights = weights.clamp(min=-1e30)  # where there is no density at all
    spread, slope = (value.clamp(min=1e-6).log() for value in (weights.std(0), _slope(batch)))
    return torch.cat([torch.stack([weights.mean(0), spread, slope], -1), problem.phi.cpu().double()], -1)


def _slope(batch: Batch) -> Tensor:
    """The norm ``(N,)`` of the gradient of the ELBO by the variational parameters, locations in units of q."""
    objective, phi = batch.problem.objective, batch.problem.phi
    family, root = objective.family, moments(objective.family, phi, generator(batch.seed, 62))[1]
    with seeded(generator(batch.seed, 63)):
        gradient = objective.gradient(phi, objective.noise(phi, _NUM_SLOPES)).cpu().double().nan_to_num()
    locs = gradient[:, family.locations].unflatten(-1, (-1, family.latent_dim)) @ root
    rest = gradient.clone()
    rest[:, family.locations] = 0.0
    return (locs.square().sum((-1, -2)) + rest.square().sum(-1)).sqrt()


@dataclass(frozen=True)
class _Head:
    """Predicts gaps from inputs.

    Attributes:
        process: Predicts ``log(gap + offset)``.
        largest: The largest value of that in the data that it has learned from: beyond, an exponential would make gaps
            of any size of a small extrapolation.
        offset: Nats.
        margin: Half of the interval of that.
        mean_ratio: Mean of a gap with the offset, relative to what is predicted.
        rank_correlation: On the calibration data.
    """

    process: GaussianProcess
    largest: float
    offset: float
    margin: float
    mean_ratio: float
    rank_correlation: float

    @classmethod
    def fit(cls, inputs: Tensor, gaps: Tensor, level: float, tolerance: float, seed: int) -> _Head:
        least = max(_LEAST_REFERENCE, int(3.1 / (1 - level)) + 1)
        if len(gaps) < least:
            raise ValueError(
                f"Cannot learn to predict gaps from {len(gaps)} reference datapoints with a local optimum because an "
                f"interval of level={level:g} wants more; try reference_args with {least} or more of them."
            )
        offset = max(tolerance, 0.05 * float(gaps.median()))
        targets = (gaps.clamp(min=0.0) + offset).log()
        first, rest = split(len(gaps), generator(seed, 61), 2 / 3)
        process = GaussianProcess.fit(inputs[first], targets[first], [slice(0, 3), slice(0, None)])
        found, largest = process(inputs[rest]), float(targets[first].max())
        residual = targets[rest] - found.clamp(max=largest)
        return cls(
            process,
            largest,
            offset,
            conformal_quantile(residual.abs(), level),
            float(residual.exp().mean()),
            _rank_correlation(found, targets[rest]),
        )

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        score = self.process(inputs)
        found = score.clamp(max=self.largest)
        ends = ((found + sign * self.margin).exp() - self.offset for sign in (-1, 1))
        low, high = (end.clamp(min=0.0) for end in ends)
        mean = (found.exp() * self.mean_ratio - self.offset).clamp(min=0.0)
        return {
            "amortization_gap": mean,
            "amortization_gap_low": low,
            "amortization_gap_high": high,
            "score": score,
        }


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's; 1 where all values are the same, so that any order is right."""
    from scipy.stats import spearmanr

    if len(second.unique()) == 1:
        return 1.0
    return float(np.nan_to_num(spearmanr(first.numpy(), second.numpy()).statistic))


def _planned(dataset: xarray.Dataset, head: _Head, budget: float, num_reference: int) -> xarray.Dataset:
    """With the order in which to refine, and what that is expected to bring."""
    plate = str(dataset["score"].dims[0])
    order = (-torch.from_numpy(dataset["score"].values)).argsort(stable=True).argsort()
    count = max(1, round(budget * len(order)))
    refine = order < count
    gaps = torch.from_numpy(dataset["amortization_gap"].values)
    share = float(gaps[refine].sum() / gaps.sum().clamp(min=1e-300))
    found = {"order": (plate, order.numpy()), "refine": (plate, refine.numpy())}
    if float(gaps.mean()) < 0.05:
        advice = f"The gaps are small ({float(gaps.mean()):.2g} nats on average): refinement brings little."
    elif head.rank_correlation < _GOOD:
        advice = (
            f"The order cannot be relied on: predicted and true gaps of reference data have a rank correlation of "
            f"{head.rank_correlation:.2f}; try more reference_args, or optimize_local on the data themselves."
        )
    else:
        advice = (
            f"Refine the {count} datapoints marked by `refine`, by guide.refined(20): this is expected to close "
            f"{share:.0%} of a total gap of {float(gaps.sum()):.3g} nats."
        )
    return (
        dataset.drop_vars("score")
        .assign(found)
        .assign_attrs(
            budget=budget,
            num_reference=num_reference,
            rank_correlation=head.rank_correlation,
            share_closed=share,
            advice=advice,
        )
    )
