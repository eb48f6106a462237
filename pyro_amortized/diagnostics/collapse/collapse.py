"""Posterior collapse: which latent dimensions tell nothing of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_count, check_positive, check_real, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.collapse.activity import PriorSpread, dimension_information, least_information
from pyro_amortized.diagnostics.collapse.codes import codes_dataset, find_codes
from pyro_amortized.diagnostics.collapse.divergence import Divergence, local_divergence, mutual_information
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar
from pyro_amortized.families import VariationalFamily
from pyro_amortized.guides import LocalGuide, VectorQuantizedGuide
from pyro_amortized.objective.noise import generator

if TYPE_CHECKING:
    import xarray

from pyro_amortized.diagnostics.collapse.report import CollapseReport, report_dataset

__all__ = ["CollapseReport", "collapse_report"]


def collapse_report(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 200,
    threshold: float = 0.01,
    epsilon: float = 0.1,
    delta: float = 0.01,
    max_pairs: int = 1000,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CollapseReport:
    r"""Which latent dimensions a model and its guide use, and which have collapsed to the prior.

    For dimension d of local site s, with the sites before it written :math:`u_{<s}`, all unconstrained,

    .. math:: \mathrm{KL}_d = \frac{1}{N} \sum_n E_{q(u_{<s})}\big[
        \mathrm{KL}\big(q(u_d \mid u_{<s}, x_n) \,\|\, p(u_d \mid u_{<s})\big)\big],

    exactly where there is a closed form given :math:`u_{<s}` (a Gaussian family against a normal prior, or a
    transformed normal on the same support), from draws elsewhere. Other dimensions of the same site are left out on
    both sides; where a prior couples them other than by a multivariate normal (a Dirichlet, a Cholesky factor), the
    divergence of the event is shared equally by its dimensions. For families that are not Gaussian it is estimated from
    nearest neighbours, with linear dependence on earlier sites taken into account; expect errors of some 0.02 nats.

    The mutual information of datapoint and latent, and the KL divergence of the aggregate posterior from the prior, add
    up to the KL divergence of the whole latent ("ELBO surgery"): a divergence without information is no use. Whether a
    dimension is active does not depend on its units, nor on those of the others.

    Args:
        model: The Pyro model. The scales of ``poutine.scale`` are left out.
        guide: A trained guide of this package. For a :class:`~pyro_amortized.VectorQuantizedGuide` the report is about
            the codes at each position, exactly, and holds the perplexity of the codebook.
        model_args: The model's positional arguments, or a ``DataLoader`` of batches.
        model_kwargs: The model's keyword arguments.
        num_samples: Number of draws per datapoint.
        threshold: Variance of the posterior mean, in units of the posterior's variance, above which a dimension is
            active; where the posteriors differ otherwise, by as much information.
        epsilon: KL divergence below which a datapoint counts as collapsed, nats.
        delta: Share of datapoints that may exceed it in a collapsed dimension.
        max_pairs: Most datapoints, drawn at random, for the mutual information: its cost is quadratic in their number.
        plate: The datapoint plate of the guide, by default; of guides that amortize both sides of crossed plates, the
            side, with the other side's latents held at their medians.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all noise; torch's global seed is not touched.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`CollapseReport`; print it for a table. Global latents are held at the guide's median.

    Raises:
        ValueError: If the model has no local latents, there are fewer than two datapoints, or an argument is out of
            its range.

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov (2015),
        https://arxiv.org/abs/1509.00519
        ELBO surgery: yet another way to carve up the variational evidence lower bound, Matthew D. Hoffman, Matthew J.
        Johnson (2016), http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse, James Lucas, George Tucker, Roger Grosse,
        Mohammad Norouzi (2019), https://arxiv.org/abs/1911.02469
    """
    num_samples, max_pairs = (
        check_count("num_samples", num_samples, 2, 200),
        check_count("max_pairs", max_pairs, 2, 1000),
    )
    threshold, epsilon = check_positive("threshold", threshold, 0.01), check_positive("epsilon", epsilon, 0.1)
    delta = check_real("delta", delta, "a share of the datapoints, at least 0 and below 1", lambda x: 0 <= x < 1, 0.01)
    seed = check_seed(seed)
    settings = {"threshold": threshold, "epsilon": epsilon, "delta": delta, "num_samples": num_samples, "seed": seed}
    if isinstance(guide, VectorQuantizedGuide):
        codes = find_codes(model, guide, model_args, model_kwargs, to_args, progress)
        _check_enough(len(codes.codes))
        return CollapseReport(codes_dataset(codes, settings))
    found = _Found(max_pairs)
    with progress_bar(num_calls(model_args) or 0, "posterior collapse", progress) as bar:
        for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model)):
            problem = bind(model, guide, args, kwargs, seed, plate=plate)
            found.add(problem, local_divergence(problem, num_samples, generator(seed, 11, number)), seed, number)
            bar.update()
    _check_enough(len(found.join("kl")))
    return CollapseReport(_to_dataset(found, settings))


def _check_enough(num_datapoints: int) -> None:
    """Refuses what gives no variance."""
    if num_datapoints < 2:
        raise ValueError(
            "Cannot tell whether the latents depend on the data because there is only one datapoint; try more."
        )


class _Found:
    """What the batches have given so far."""

    def __init__(self, max_pairs: int) -> None:
        self.max_pairs = max_pairs
        self.parts: list[Divergence] = []
        self.spreads: list[PriorSpread] = []
        self.problem: LocalProblem | None = None
        self.phi = torch.empty(0)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, dtype=torch.long)

    def add(self, problem: LocalProblem, divergence: Divergence, seed: int, number: int) -> None:
        """Adds a batch; keeps phi of those datapoints that are, so far, among the ``max_pairs`` with lowest keys."""
        start = sum(len(part.kl) for part in self.parts)
        self.parts.append(divergence)
        before = self.spreads[-1] if self.spreads else None
        self.spreads.append(PriorSpread.of(problem, generator(seed, 14, number), before))
        keys = torch.rand(len(problem.phi), generator=generator(seed, 12, number), dtype=torch.float64)
        rows = torch.arange(start, start + len(keys))
        phi = problem.phi if self.problem is None else torch.cat([self.phi, problem.phi])
        keys, rows = torch.cat([self.keys, keys]), torch.cat([self.rows, rows])
        kept = keys.argsort()[: self.max_pairs].sort().values
        self.phi, self.keys, self.rows = phi[kept], keys[kept], rows[kept]
        self.problem = problem

    def join(self, name: str) -> Tensor:
        """One attribute of the divergences, over all datapoints."""
        return torch.cat([getattr(part, name) for part in self.parts])

    def units(self) -> tuple[Tensor, Tensor]:
        """Location and scale of the priors of all datapoints, ``(N, D)`` each."""
        return torch.cat([part.loc for part in self.spreads]), torch.cat([part.scale for part in self.spreads])


def _to_dataset(found: _Found, settings: Mapping[str, Any]) -> xarray.Dataset:
    problem: Any = found.problem
    kl, mean, mean_se = found.join("kl").numpy(), found.join("mean").numpy(), found.join("mean_se").numpy()
    variance, variance_se = _variance_of_mean(mean, mean_se)
    loc, scale = found.units()
    relative, _ = _variance_of_mean((mean - loc.numpy()) / scale.numpy(), mean_se / scale.numpy())
    units = loc[found.rows], scale[found.rows]
    family: VariationalFamily = problem.objective.family
    of_dimension = dimension_information(family, found.phi, *units, generator(settings["seed"], 15)).numpy()
    active = of_dimension > least_information(settings["threshold"])
    layout = problem.objective.log_joint.layout
    coords: dict[str, Any] = {"latent": list(layout.names)}
    if layout.names_over_time is not None:
        coords["over_time"] = ("latent", list(layout.names_over_time))
    per_latent = {
        "kl_se": _error_of_mean(found.join("kl_se").numpy()),
        "posterior_mean_variance": variance,
        "posterior_mean_variance_se": variance_se,
        "relative_variance": relative,
        "information": of_dimension,
        "active": active,
    }
    attributes = {"active_units": int(active.sum()), **_totals(found, units, settings["seed"]), **settings}
    return report_dataset(per_latent, kl, coords, attributes)


def _totals(found: _Found, units: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """What the latents tell together, and what the numbers are of."""
    problem: Any = found.problem
    family: VariationalFamily = problem.objective.family
    information, information_se = mutual_information(family, found.phi, generator(seed, 13), units=units)
    total, total_se = found.join("total").numpy(), found.join("total_se").numpy()
    chosen = found.rows.numpy()
    held = ", ".join(problem.global_sites)
    return {
        "mutual_information": information,
        "mutual_information_se": information_se,
        "mutual_information_bound": math.log(len(chosen)),
        "mutual_information_datapoints": len(chosen),
        "num_datapoints": len(total),
        "total_kl": float(total.mean()),
        "total_kl_se": float(_error_of_mean(total_se)),
        "aggregate_kl": float(total[chosen].mean() - information),
        "aggregate_kl_se": float(np.hypot(_error_of_mean(total_se[chosen]), information_se)),
        "units": "nats per datapoint",
        "plate": problem.plate,
        "family": type(family).__name__,
        "global_latents": f"held at the guide's median: {held}" if held else "none",
    }


def _error_of_mean(errors: np.ndarray) -> Any:
    return np.sqrt(np.square(errors).sum(0)) / len(errors)


def _variance_of_mean(mean: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances over datapoints without what Monte Carlo noise adds, and their standard errors due to it."""
    noise = np.square(error).mean(0)
    variance = np.maximum(mean.var(0, ddof=1) - noise, 0.0)
    return variance, np.sqrt((4 * variance + 2 * noise) * noise / len(mean))
