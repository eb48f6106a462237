"""Quantiles and draws of every latent, for data sets larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyro_amortized.checks import check_count, check_probabilities, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.problem import progress_bar
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.export.batch import Options
from pyro_amortized.export.exporter import Exporter, check_guide
from pyro_amortized.export.joining import Joined
from pyro_amortized.guides import LocalGuide

if TYPE_CHECKING:
    import xarray

__all__ = ["posterior_summary"]


def posterior_summary(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    num_samples: int = 0,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> xarray.Dataset:
    r"""Marginal quantiles of every latent, and draws if asked for.

    Batches of a loader are inferred one at a time and joined along the datapoint plate; memory is that of the result
    and of one batch.

    Args:
        model: The Pyro model.
        guide: A guide of this package.
        model_args: The model's positional arguments as a tuple, or a ``DataLoader`` of batches.
        model_kwargs: The model's keyword arguments.
        quantiles: Q probabilities between 0 and 1; 0.5 is the median. See :meth:`LocalGuide.quantiles`.
        num_samples: Number of draws K.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all draws; torch's global seed is not touched.
        progress: Whether to show a progress bar over batches.

    Returns:
        A dataset with the quantiles of every latent under its name, ``(quantile, *plates, *event)``, in the site's own
        units; and, if asked for, draws under ``<site>_draws``, ``(draw, *plates, *event)``. Coordinates of a plate are
        the positions in the full data set; the attribute ``global_latents`` names those that all datapoints share.

    Raises:
        ValueError: If the guide is none of this package, a probability lies outside of 0 and 1, or the guide of the
            global latents has no quantiles.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from torch.utils.data import DataLoader
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> loader = DataLoader(torch.randn(10), batch_size=4)
        >>> summary = posterior_summary(model, AmortizedGuide(model), loader)
        >>> dict(summary.sizes)
        {'quantile': 3, 'data': 10}
        >>> median = summary["z"].sel(quantile=0.5)
    """
    check_guide(model, guide)
    probs = _checked(quantiles)
    num_samples, seed = check_count("num_samples", num_samples, 0, 1000), check_seed(seed)
    names = {"quantiles", "posterior"} if num_samples else {"quantiles"}
    shards = Shards(model_args)
    exporter = Exporter(model, guide, Options(num_samples, 0, False, frozenset(names), seed, probs), shards)
    joined = {name: Joined(name) for name in names}
    with progress_bar(num_calls(model_args), "Summarising", progress) as bar:
        batches = calls(model_args, model_kwargs, to_args, model, shared=True)
        for made, plate in shards.collect((exporter.export(*call), exporter.plate) for call in batches):
            for name, dataset in made.items():
                joined[name].add(dataset, plate)
            bar.update()
    groups = {name: shards.in_order(group.dataset(), plate) for name, group in joined.items()}
    summary = groups["quantiles"].assign_coords(quantile=list(probs))
    summary.attrs["global_latents"] = ", ".join(guide.global_sites)
    if not num_samples:
        return summary
    draws = groups["posterior"].squeeze("chain", drop=True)
    return summary.merge(draws.rename({name: f"{name}_draws" for name in draws.data_vars}))


def _checked(quantiles: Sequence[float]) -> tuple[float, ...]:
    probs = tuple(check_probabilities(quantiles))
    if not all(0.0 < q < 1.0 for q in probs):
        raise ValueError(
            f"Cannot take quantiles {list(probs)} because these must lie between 0 and 1; try (0.05, 0.5, 0.95)."
        )
    return probs
