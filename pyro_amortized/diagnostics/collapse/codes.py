"""What vector-quantised codes tell of the data: the part of the collapse report that is about codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import Independent
from torch import Tensor

from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.checks import check_apart
from pyro_amortized.diagnostics.collapse.report import report_dataset
from pyro_amortized.diagnostics.problem import progress_bar
from pyro_amortized.guides import VectorQuantizedGuide
from pyro_amortized.guides.codes import code_place, code_values
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.running import isolated, run_model

if TYPE_CHECKING:
    import xarray

__all__ = ["Codes", "codes_dataset", "find_codes"]


@dataclass
class Codes:
    """The codes of all datapoints.

    Attributes:
        codes: The codes, ``(N, P)``, numbered through all codebooks.
        kl: KL divergence of the point mass from the prior, ``-log p(k)`` given the sites before, ``(N, P)`` nats.
        num_codes: Number of codes K of all codebooks.
        num_by_position: Number of codes that each position may have.
        places: Where the codes of a datapoint lie in their sites.
        plate: Name of the datapoint plate.
        global_sites: Names of the global latents that are held at their median.
    """

    codes: Tensor
    kl: Tensor
    num_codes: int
    num_by_position: list[int]
    places: tuple[LocalSite, ...]
    plate: str
    global_sites: tuple[str, ...]


def find_codes(
    model: Callable[..., Any],
    guide: VectorQuantizedGuide,
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None,
    to_args: ToArgs | None,
    progress: bool,
) -> Codes:
    """The codes of a data set; arguments as for :func:`~pyro_amortized.collapse_report`.

    Raises:
        ValueError: If the model scales the codes' prior, or the encoder answers differently when asked again.
    """
    parts = []
    with progress_bar(num_calls(model_args) or 0, "codes", progress) as bar:
        for args, kwargs in calls(model_args, model_kwargs, to_args, model):
            parts.append(_find(model, guide, args, kwargs))
            bar.update()
    return replace(parts[-1], codes=torch.cat([p.codes for p in parts]), kl=torch.cat([p.kl for p in parts]))


@torch.no_grad()
def _find(
    model: Callable[..., Any], guide: VectorQuantizedGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Codes:
    check_apart(guide)
    with isolated():
        structure, codes = guide.find_codes(*args, **kwargs)
        if not structure.random_plates and not all(map(torch.equal, codes, guide.find_codes(*args, **kwargs)[1])):
            raise ValueError(
                "Cannot diagnose this guide because its encoder gives different codes for the same data in two calls; "
                "try guide.eval() if it holds dropout or batch normalisation."
            )
        values = guide.global_median(*args, **kwargs)
    sites, frame = structure.discrete, structure.datapoints
    for site in sites:
        if site.weight.is_scaled:
            raise ValueError(
                f"Cannot diagnose this guide because the model scales its codes {site.name!r} by {site.weight.scale}: "
                "a scaled prior is no density; try the arguments that set the scale to 1."
            )
    chosen = code_values(structure, codes)
    trace = run_model(model, args, kwargs, {**values, **structure.indices, **chosen})
    kl = [code_place(site).flatten(_divergence(trace, site.name, chosen[site.name]), frame.dim) for site in sites]
    starts, num_codes = guide.code_books.numbers(sites)
    return Codes(
        torch.cat([start + k for start, k in zip(starts, codes, strict=True)], -1).cpu(),
        torch.cat(kl, -1).cpu().double(),
        num_codes,
        [site.num_categories for site in sites for _ in range(code_place(site).stop)],
        _one_after_the_other([code_place(site) for site in sites]),
        frame.name,
        structure.global_sites,
    )


def _divergence(trace: Any, name: str, value: Tensor) -> Tensor:
    prior: Any = trace.nodes[name]["fn"]
    while isinstance(prior, Independent):
        prior = prior.base_dist
    return -prior.log_prob(value).expand(value.shape)


def _one_after_the_other(places: Sequence[LocalSite]) -> tuple[LocalSite, ...]:
    ends = np.cumsum([place.stop for place in places]).tolist()
    return tuple(replace(x, start=end - x.stop, stop=end) for x, end in zip(places, ends, strict=True))


def codes_dataset(found: Codes, settings: Mapping[str, Any]) -> xarray.Dataset:
    """The dataset of a collapse report, with a latent for each position of the codes.

    Args:
        found: The codes of at least two datapoints.
        settings: The report's settings.
    """
    count, positions = found.codes.shape
    shifted = found.codes + found.num_codes * torch.arange(positions)  # a range of integers for each position
    counts = shifted.flatten().bincount(minlength=positions * found.num_codes).reshape(positions, found.num_codes)
    usage = counts.double() / count
    # of the posterior mean of the indicator vector, over its K entries: N / (N - 1) sum_k p_k (1 - p_k)
    variance = (count / (count - 1) * (usage * (1 - usage)).sum(-1)).numpy()
    active, zero = variance > settings["threshold"], np.zeros(positions)
    names = SiteLayout(found.plate, -1, found.places, positions).names
    per_latent = {
        "kl_se": zero,
        "perplexity": _entropy(usage).exp().numpy(),
        "posterior_mean_variance": variance,
        "posterior_mean_variance_se": zero,
        "relative_variance": variance,
        "information": _entropy(usage).numpy(),
        "active": active,
    }
    codebook = {
        "active_units": int(active.sum()),
        "perplexity": float(_entropy(usage.mean(0)).exp()),
        "num_codes": found.num_codes,
        "codes_per_position": max(found.num_by_position),
        "codes_used": int((usage.sum(0) > 0).sum()),
    }
    coords = {"latent": list(names), "code": np.arange(found.num_codes)}
    attributes = {**codebook, **_totals(found), **settings}
    shares = (("latent", "code"), usage.numpy())
    return report_dataset(per_latent, found.kl.numpy(), coords, attributes, usage=shares)


def _totals(found: Codes) -> dict[str, Any]:
    """What the codes tell together, and what the numbers are of."""
    count = len(found.codes)
    total = float(found.kl.sum(-1).mean())
    distinct = torch.unique(found.codes, dim=0, return_counts=True)[1]
    information = float(_entropy(distinct.double()))
    held = ", ".join(found.global_sites)
    return {
        "mutual_information": information,
        "mutual_information_se": 0.0,
        "mutual_information_bound": min(math.log(count), float(np.log(found.num_by_position).sum())),
        "mutual_information_datapoints": count,
        "num_datapoints": count,
        "total_kl": total,
        "total_kl_se": 0.0,
        "aggregate_kl": total - information,
        "aggregate_kl_se": 0.0,
        "units": "nats per datapoint",
        "plate": found.plate,
        "family": "nearest code",
        "global_latents": f"held at the guide's median: {held}" if held else "none",
    }


def _entropy(counts: Tensor) -> Tensor:
    """Entropy of how often each of K codes is used, ``(*, K)``, in nats; its exponential is the perplexity."""
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1)
