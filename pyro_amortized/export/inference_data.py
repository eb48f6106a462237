"""A guide's posterior as ArviZ knows it: groups of arrays whose axes are named after the model's plates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyro_amortized.checks import check_count, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.problem import progress_bar
from pyro_amortized.diagnostics.report import inference_data
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.export.batch import Options
from pyro_amortized.export.exporter import Exporter, check_guide
from pyro_amortized.export.joining import Joined
from pyro_amortized.export.marginal import marginal_likelihood
from pyro_amortized.export.store import Store, StorePath, open_groups
from pyro_amortized.guides import LocalGuide

if TYPE_CHECKING:
    import xarray

__all__ = ["open_store", "to_arviz"]

GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data")
"""The groups of an export, but for those of the prior."""
PRIOR_GROUPS = ("prior", "prior_predictive")
_NUM_SAMPLES, _NUM_MARGINAL = 1000, 200


def to_arviz(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int | None = None,
    log_likelihood: str | None = None,
    prior: bool = False,
    num_prior_samples: int | None = None,
    resample: bool = False,
    groups: Collection[str] | None = None,
    store: StorePath | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    r"""Draws from a guide's posterior, and all that ArviZ makes of them: tables, plots, predictive checks, files.

    One chain of independent draws :math:`\theta \sim q(\theta)`, :math:`z_n \sim q(z_n; \phi_n)`. Axes are named after
    the plates, outermost first, then ``<site>_dim_0`` and so on for event dimensions; a plate's coordinates are the
    positions of its datapoints in the full data set. Batches of a loader are inferred one at a time, with the same
    global draws, and joined along the datapoint plate.

    ======================  ==========================================================================================
    posterior               latents by site, in their supports, ``(chain, draw, *plates, *event)``; discrete latents
                            that the model sums out (``infer={"enumerate": "parallel"}``) are left out; what the model
                            computes of them (``pyro.deterministic``, sites under ``poutine.reparam``), but for what all
                            datapoints of a call give together
    posterior_predictive    new observations given each draw, ``(chain, draw, *plates, *event)``
    log_likelihood          :math:`\log p(x_n \mid z_n, \theta)` in nats, ``(chain, draw, *plates)``, masked, without
                            any scale, discrete latents summed out; where there are local latents only if asked for
    sample_stats            ``log_weight``, :math:`\log p(x_n, z_n \mid \theta) - \log q(z_n)` in nats, ``(chain, draw,
                            plate)``, and the Pareto ``khat`` of each datapoint's weights, ``(plate)``, where no global
                            latents are drawn; nothing for a model without local latents
    observed_data           observed values, ``(*plates, *event)``
    constant_data           dense tensors among the model's arguments that are not observed, such as covariates; axes
                            whose entries are seen to matter to one entry of a plate each are named after it
    prior                   draws of the latents from the prior, on request
    prior_predictive        observations given those, on request
    ======================  ==========================================================================================

    The log-likelihood is that of an observation *given its own latents*. Leave-one-out cross-validation (``arviz.loo``)
    and WAIC are wrong with it as soon as there are local latents, since :math:`x_n` is what informs :math:`z_n`: what
    they need is the marginal :math:`\log p(x_n \mid \theta)`, which :func:`~pyro_amortized.log_evidence` estimates. So
    that ``arviz.loo`` refuses the export, the group is then made only where ``groups`` names it.

    Args:
        model: The Pyro model.
        guide: A guide of this package.
        model_args: The model's positional arguments as a tuple, or a ``DataLoader`` of batches.
        model_kwargs: The model's keyword arguments.
        num_samples: Number of draws K; by default 1000, or 200 with ``log_likelihood="marginal"``.
        log_likelihood: ``"marginal"`` for :math:`\log p(x_n \mid \theta)`, ``(chain, draw, plate)``, with the local
            latents integrated out, on which ``arviz.loo``, ``arviz.waic`` and ``arviz.compare`` are right. The draws of
            the global latents are then drawn again, by Pareto-smoothed importance weights of
            :math:`p(x, \theta) / q(\theta)`, and are draws from the posterior; the weights' tail shape is
            ``global_khat`` of ``sample_stats``, and warned of above 0.7.
        prior: Whether to add the groups ``prior`` and ``prior_predictive``.
        num_prior_samples: Number of draws from the prior; by default K.
        resample: Whether to correct the guide by importance resampling: each datapoint's draws are drawn once more, in
            proportion to their Pareto-smoothed weights. ``khat`` is that of the weights before; above 0.7 the result
            cannot be trusted. All other groups belong to the resampled draws.
        groups: Which groups to make; by default all but those of the prior, and, beside local latents,
            ``log_likelihood``. Memory is that of the groups asked for:
            draws of large observations are best left out of large data sets.
        store: Path of a netCDF file, ``"posterior.nc"``, or of a Zarr directory, ``"posterior.zarr"`` (which needs
            ``pip install 'pyro-amortized[zarr]'``). Each batch of a loader is written there when it has been inferred,
            so that memory is that of one batch. The store appears at its path, in place of an older one, when it is
            complete; until then it is written to ``<path>.partial``, which an export that is killed leaves behind and
            the next one to the same path removes.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all draws; torch's global seed is not touched.
        progress: Whether to show a progress bar.

    Returns:
        An ``arviz.InferenceData`` (ArviZ below 1) or an ``xarray.DataTree`` (from 1 on); with ``store``, one that reads
        from it what is used, as :func:`~pyro_amortized.export.open_store` gives it again later.

    Raises:
        ValueError: If the guide is none of this package, the log-joint cannot be evaluated or is not finite, batches
            cannot be joined, nothing can be written to the store, or resampling is asked for a model whose global
            latents are drawn.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> data = to_arviz(model, AmortizedGuide(model), (torch.randn(8, 2),), num_samples=100)
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 100, 'data': 8, 'z_dim_0': 2}
        >>> data["sample_stats"]["log_weight"].dims
        ('chain', 'draw', 'data')
    """
    is_marginal = _is_marginal(log_likelihood)
    number = (_NUM_MARGINAL if is_marginal else _NUM_SAMPLES) if num_samples is None else num_samples
    options = _checked(number, num_prior_samples, prior, resample, groups, seed)
    check_guide(model, guide)
    total, num_samples, marginal = num_calls(model_args), options.num_samples, None
    shards = Shards(model_args)
    _check_shared(shards, store, options)
    if is_marginal:
        options = replace(options, groups=options.groups - {"log_likelihood"})
        asked: dict[str, Any] = {"num_samples": num_samples, "to_args": to_args, "seed": seed, "progress": progress}
        marginal = marginal_likelihood(model, guide, model_args, model_kwargs, shards=shards, **asked)
    exporter = Exporter(model, guide, options, shards, marginal)
    with (
        progress_bar(None if total is None else total * num_samples, "Drawing", progress) as bar,
        _InMemory() if store is None else Store(store) as written,
    ):
        batches = calls(model_args, model_kwargs, to_args, model, shared=True)
        for made, plate in shards.collect((exporter.export(*call, bar.update), exporter.plate) for call in batches):
            if groups is None and guide.has_local_latents and not is_marginal:
                made.pop("log_likelihood", None)
            written.add(made, plate)
    if not isinstance(written, _InMemory):
        return _inference_data(open_groups(written.path))
    return _inference_data({name: shards.in_order(part, plate) for name, part in written.joined().items()})


def _check_shared(shards: Shards, store: StorePath | None, options: Options) -> None:
    """Raises a ValueError if processes are to do together what each has to do by itself."""
    cause = None
    if store is not None:
        cause, remedy = "write one store", "a loader without DistributedSampler in one of them"
    elif options.groups & set(PRIOR_GROUPS):
        cause, remedy = "draw from the prior", "prior=False, and another export of the prior"
    if shards.shared and cause is not None:
        raise ValueError(f"Cannot {cause} in several processes because they share the data; try {remedy}.")


def open_store(path: StorePath) -> Any:
    """The export that :func:`~pyro_amortized.to_arviz` has written to a store.

    Args:
        path: The path that ``store`` was.

    Returns:
        What the export returned: an ``arviz.InferenceData`` (ArviZ below 1) or an ``xarray.DataTree`` (from 1 on),
        whose values are read when they are used.

    Raises:
        ValueError: If there is no store, or one whose export was not finished.

    Example:
        >>> open_store("never_written.nc")
        Traceback (most recent call last):
        ValueError: Cannot open store 'never_written.nc' because it does not exist; try to_arviz(..., store=...) again.
    """
    return _inference_data(open_groups(path))


class _InMemory(AbstractContextManager["_InMemory"]):
    """The batches of an export that is kept in memory."""

    def __init__(self) -> None:
        self._groups: dict[str, Joined] = {}

    def __exit__(self, *_: object) -> None:
        """Leaves everything as it is."""

    def add(self, groups: Mapping[str, xarray.Dataset], plate: str | None) -> None:
        """Keeps the groups of a batch."""
        for name, dataset in groups.items():
            self._groups.setdefault(name, Joined(name)).add(dataset, plate)

    def joined(self) -> dict[str, xarray.Dataset]:
        """The groups of all batches."""
        return {name: group.dataset() for name, group in self._groups.items()}


def _is_marginal(log_likelihood: Any) -> bool:
    if log_likelihood not in (None, "marginal"):
        raise ValueError(
            f"Cannot export log_likelihood={log_likelihood!r} because it is of no such kind; try "
            'log_likelihood="marginal", or groups=("posterior", "log_likelihood") for those given local latents.'
        )
    return log_likelihood is not None


def _checked(
    num_samples: int,
    num_prior_samples: int | None,
    prior: bool,
    resample: bool,
    groups: Collection[str] | None,
    seed: int,
) -> Options:
    num_prior_samples = num_samples if num_prior_samples is None else num_prior_samples
    num_samples = check_count("num_samples", num_samples, 1, 1000)
    num_prior_samples = check_count("num_prior_samples", num_prior_samples, 1, 1000)
    if groups is not None and not isinstance(groups, Collection):
        raise ValueError(
            f"Cannot make groups {groups!r} because names are wanted; try some of {[*GROUPS, *PRIOR_GROUPS]}."
        )
    asked = frozenset((groups,) if isinstance(groups, str) else GROUPS if groups is None else groups)
    unknown = sorted(asked.difference(GROUPS, PRIOR_GROUPS))
    if unknown:
        raise ValueError(
            f"Cannot make groups {unknown} because they are unknown; try some of {[*GROUPS, *PRIOR_GROUPS]}."
        )
    return Options(
        num_samples, num_prior_samples, resample, asked.union(PRIOR_GROUPS if prior else ()), check_seed(seed)
    )


def _inference_data(found: Mapping[str, xarray.Dataset]) -> Any:
    groups = (name for name in (*GROUPS, *PRIOR_GROUPS) if name in found and found[name].data_vars)
    return inference_data({name: found[name] for name in groups})
