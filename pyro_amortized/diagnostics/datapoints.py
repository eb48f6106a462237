"""What is known of the datapoints of a data set at the cost of an encoder and a few draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import batch_seed

__all__ = ["Batch", "batches", "joined_features"]


@dataclass(frozen=True)
class Batch:
    """A batch of a data set.

    Attributes:
        problem: The inference problem of its datapoints.
        features: The encoder's features beside the variational parameters, ``(N, F)``, in float64.
        seed: The batch's own.
    """

    problem: LocalProblem
    features: Tensor
    seed: int


def batches(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs,
    model_kwargs: Mapping[str, Any] | None,
    *,
    seed: int,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    progress: bool = False,
) -> Iterator[Batch]:
    """The batches of a data set, or the one that it is."""
    with progress_bar(num_calls(model_args), "batches", progress) as bar:
        for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model)):
            own = batch_seed(seed, number)
            problem = bind(model, guide, args, kwargs, own, plate=plate)
            with torch.no_grad():
                features = problem.guide.encoder_features(*args, **kwargs)
            known = torch.cat([features.to(problem.phi), problem.phi], -1)
            yield Batch(problem, known.cpu().double(), own)
            bar.update()


def joined_features(found: list[Tensor], known: int | None = None) -> Tensor:
    """Features of all batches, ``(N, F)``; a ValueError if they are of different sizes."""
    sizes = {part.shape[-1] for part in found} | ({known} if known is not None else set())
    if len(sizes) > 1:
        raise ValueError(
            f"Cannot compare datapoints because they have {sorted(sizes)} features and variational parameters: the "
            "latents of some have more entries than those of others; try reference data with as many entries as the "
            "data at hand."
        )
    return torch.cat(found)
