"""Posteriors that can be signed, datapoint by datapoint: the function that users call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_count, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, is_single, num_calls
from pyro_amortized.diagnostics.certificates.exploration import KINDS
from pyro_amortized.diagnostics.certificates.posterior import FLAT, CertifiedPosterior
from pyro_amortized.diagnostics.certificates.saving import SavedBatches
from pyro_amortized.diagnostics.certificates.stages import STAGES, Certificates, certify
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.problem import LocalProblem, bind, blocks, progress_bar, to_dataset
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.meter import Meter
from pyro_amortized.objective.noise import batch_seed
from pyro_amortized.structure.axes import SiteShape, label

if TYPE_CHECKING:
    import xarray

__all__ = ["certified_posterior"]

_LEAST_SAMPLES = 400


def certified_posterior(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 4000,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CertifiedPosterior:
    r"""Draws from every datapoint's posterior by the cheapest stage that passes its test, with a certificate.

    ==============  =============================================================  ===================================
    stage           draws                                                          passes if
    ==============  =============================================================  ===================================
    ``encoder``     of the guide, drawn again by Pareto-smoothed weights           :math:`\hat k < 0.7` and an
                                                                                   effective sample size of S / 2
    ``refined``     of the best member of its family for the datapoint, likewise   the same
    ``full_rank``   of a full-rank normal fitted to the datapoint, or a mixture    the same
                    at all modes that a search has found, fitted to weighted
                    draws if need be, likewise; up to 8 S of these are weighed
    ``hmc``         of 8 chains of Hamiltonian Monte Carlo, started at draws of    :math:`\hat R < 1.01`, effective
                    the normal                                                     sample sizes of S / 2, tails S / 4
    ==============  =============================================================  ===================================

    All of these look where the guide looks, and can pass with a mode missing. So draws must also agree, in means and
    standard deviations, with an exploration that did not start there: a search for modes from draws of the prior, wider
    ones and maxima of the likelihood, and importance samples of a mixture at all modes found; where their weights are
    no good, sequential Monte Carlo from a reference as wide as the prior, in up to 10 dimensions; in more, draws must
    have been at every mode found. A datapoint that agrees is ``certified``; one that has only converged is ``local``;
    one that has not converged is neither, and its draws are those of the last stage.

    Global latents are held at the guide's median: the posteriors are those given that, as the attribute
    ``global_latents`` says.

    Args:
        model: The Pyro model.
        guide: A guide of this package; only the cost depends on how well it is trained.
        model_args: The model's positional arguments, or a ``DataLoader``, whose batches are worked on one by one; that
            of a ``DistributedSampler`` is shared by all processes, each of which returns the whole result.
        model_kwargs: The model's keyword arguments.
        num_samples: S, draws of each datapoint, at least 400. With 4000, means of certified posteriors are known to
            about 0.02 standard deviations, standard deviations to 2 %.
        plate: The datapoint plate of the guide, by default; of guides that amortize both sides of crossed plates, the
            side, with the other side's latents held at their medians.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        path: A directory, made if need be, where each batch is saved when it is done. Called again after an
            interruption, batches that are there are read in place of being worked on. Processes may share it.
        seed: Seed of all draws; torch's global seed is not touched.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`CertifiedPosterior`; print it for a table and a verdict.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints; if a number is too
            small; if ``path`` holds the batches of other data or settings.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AmortizedGuide(model, name="uncertain")  # it has not been trained
        >>> posterior = certified_posterior(model, guide, (torch.tensor([-1.0, 2.0]),))
        >>> posterior.dataset["certified"].values.tolist()
        [True, True]
        >>> posterior.posterior["z"].mean("draw").round(1).values.tolist()
        [-0.5, 1.0]

    References:
        Pareto Smoothed Importance Sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry (2024),
        https://arxiv.org/abs/1507.02646

        Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC, Aki Vehtari,
        Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner (2021), https://arxiv.org/abs/1903.08008

        Amortized Bayesian Workflow, Marvin Schmitt, Chengkun Li, Aki Vehtari, Luigi Acerbi, Paul-Christian Bürkner,
        Stefan T. Radev (2024), https://arxiv.org/abs/2409.04332
    """
    target = Target(check_count("num_samples", num_samples, _LEAST_SAMPLES, 4000))
    seed, graphs = check_seed(seed), GraphCache(False)
    parts: list[CertifiedPosterior] = []
    saved, single, shards = None if path is None else SavedBatches(path), is_single(model_args), Shards(model_args)
    with progress_bar(num_calls(model_args), "certified batches", progress and not single) as bar:
        for turn, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model, shared=True)):
            number = shards.number(turn)
            own_seed = batch_seed(seed, number)
            problem = bind(model, guide, args, kwargs, own_seed, graphs=graphs, plate=plate)
            _check_names(problem)
            if parts:
                _check_alike(problem.objective.family.latent_dim, parts[0])
            part = None if saved is None else saved.read(number, problem, target, seed)
            if part is None:
                part = _certify(problem, target, own_seed, progress and single)
                part.dataset.attrs["seed"] = seed
                if saved is not None:
                    saved.write(number, problem, target, seed, part)
            parts.append(part)
            bar.update()
    return _gathered(shards, parts)


def _gathered(shards: Shards, parts: list[CertifiedPosterior]) -> CertifiedPosterior:
    """The result of the batches of all processes."""
    parts = list(shards.collect(parts))
    for part in parts:
        _check_alike(part.posterior.sizes["latent"], parts[0])
    whole = CertifiedPosterior.concat(parts)
    own, draws = (shards.in_order(x, whole.plate) for x in (whole.dataset, whole.posterior))
    return CertifiedPosterior(own, draws)


def _check_alike(dim: int, first: CertifiedPosterior) -> None:
    """Raises a ValueError, where it can before any work, if a batch has other latents than the first."""
    before = first.posterior.sizes["latent"]
    if dim != before:
        raise ValueError(
            f"Cannot join the draws of batches because a datapoint has {before} latent dimensions in the first and "
            f"{dim} in a later one, as of inner plates of other sizes; try one call for the batches of each size."
        )


_TAKEN = {"chain", "draw", "latent"}
"""Dimensions of every result."""
_COLUMNS = ("khat", "rhat", "ess", "divergences", "num_modes", "converged", "agrees", "stage", "exploration")
_FURTHER = {"certified", "local", "num_gradients", "num_evaluations", "reason"}
"""What a result holds of every datapoint: as the stages left it, and what is made of that."""


def _check_names(problem: LocalProblem) -> None:
    """Raises a ValueError, before any work, if a plate or a site has the name of something else in the result."""
    layout = problem.objective.log_joint.layout
    plates = {layout.plate, *(name for site in layout.sites for name in site.plates if name)}
    for kind, names, taken in (
        ("plate", plates, _TAKEN | {*_COLUMNS} | _FURTHER),
        ("site", {site.name for site in layout.sites}, (_TAKEN - {"latent"}) | {FLAT}),
    ):
        for name in sorted(names & taken):
            raise ValueError(
                f"Cannot certify posteriors of a model with a {kind} {name!r} because the result holds something else "
                f"of that name; try {name + '_of_data'!r} in the model, and a guide of it."
            )


def _certify(problem: LocalProblem, target: Target, seed: int, progress: bool) -> CertifiedPosterior:
    """The certificates of a call that is bound."""
    meter = problem.objective.log_joint.meter = Meter.of(len(problem.phi))
    with progress_bar(len(problem.phi), "certified posteriors", progress) as bar:
        found = [
            certify(part, phi, target, (seed, i), bar.update)
            for i, (part, phi) in enumerate(blocks(problem, problem.phi))
        ]
    draws = torch.cat([part.draws for part in found], 1).to(problem.phi.dtype)
    return CertifiedPosterior(_to_dataset(problem, found, meter, target), _sites(problem, draws))


def _to_dataset(problem: LocalProblem, found: list[Certificates], meter: Meter, target: Target) -> xarray.Dataset:
    columns = {name: torch.cat([getattr(part, name) for part in found]) for name in _COLUMNS}
    converged, agrees = columns.pop("converged"), columns.pop("agrees")
    words = {"stage": STAGES, "exploration": KINDS}
    named = {name: np.array(known, dtype=object)[columns.pop(name).numpy()] for name, known in words.items()}
    variables = {
        "certified": converged & agrees,
        "local": converged & ~agrees,
        **columns,
        "num_gradients": meter.gradients.clone(),  # the meter runs on
        "num_evaluations": meter.values.clone(),
    }
    named["reason"] = np.array(["; ".join(words) for part in found for words in part.reasons], dtype=object)
    dataset = to_dataset(problem, variables, num_samples=target.num_samples)
    return dataset.assign({name: (problem.plate, value) for name, value in named.items()}).assign_attrs(
        units="khat, rhat: none; ess: draws; num_gradients, num_evaluations: of the log-joint"
    )


def _sites(problem: LocalProblem, draws: Tensor) -> xarray.Dataset:
    """Draws ``(S, N, D)`` by site, in their supports, and flat."""
    import xarray

    log_joint = problem.objective.log_joint
    layout, frames = log_joint.layout, log_joint.structure.frames
    variables: dict[str, Any] = {FLAT: (("draw", layout.plate, "latent"), draws.numpy())}
    values = layout.values(draws.to(problem.phi))
    for site in layout.sites:
        value = values[site.name]
        plates = {layout.dim: layout.plate, **dict(zip([dim for dim, _ in site.inner], site.plates, strict=True))}
        plates = {dim: name for dim, name in plates.items() if name}
        shape = SiteShape(site.event_dim, value.dim() - 1 - site.event_dim, plates)
        dims, value = label(site.name, value, shape, frames, ("draw",))
        variables[site.name] = (dims, value.cpu().numpy())
    coords = {layout.plate: problem.index.numpy(), "draw": np.arange(len(draws))}
    return xarray.Dataset(variables, coords)
