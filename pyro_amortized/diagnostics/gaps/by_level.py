r"""At which level of a hierarchy the amortization gap arises.

A datapoint's variational parameters :math:`\phi = (\phi_1, \dots, \phi_m)` are those of its levels, as of a school and
of its pupils. Going from the encoder's to the optimal ones level by level, every level gains some of the gap, and the
gains add up to it. What a level gains depends on those that went before, so that its share is the mean over going down,
from the coarsest level, and going up, which for two levels is the Shapley value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.elbo import log_weights
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.diagnostics.report import widening
from pyro_amortized.families import VariationalFamily
from pyro_amortized.guides.levels import inner_plates, levels_of
from pyro_amortized.objective.noise import generator, quasi_normal

if TYPE_CHECKING:
    import xarray

__all__ = ["gap_by_level", "leading_level", "level_lines", "with_levels"]

_DRAWS, _LEAST_ROUNDS, _MOST_ROUNDS = 128, 10, 80


_LEVEL, _BY_LEVEL = "level", "amortization_gap_by_level"
"""Names of the dimension, and of the variable."""


def level_lines(dataset: xarray.Dataset, plate: str) -> list[str]:
    """The rows of a table of gaps that say at which level the amortization gap arises."""
    if _BY_LEVEL not in dataset:
        return []
    parts, errors = dataset[_BY_LEVEL], dataset[f"{_BY_LEVEL}_se"]
    lines = []
    for name in dataset[_LEVEL].values:
        values, error = parts.sel({_LEVEL: name}).values, errors.sel({_LEVEL: name}).values
        spread = values.std(ddof=1) if len(values) > 1 else float("nan")
        mean_error = np.sqrt(np.square(error).sum()) / len(values)
        lines.append(f"  {f'of level {name}':22s}{values.mean():10.3f}{mean_error:13.4f}{spread:9.3f}")
    return lines


def leading_level(dataset: xarray.Dataset) -> str:
    """In words, the level at which most of the amortization gap arises; empty where there is only one."""
    if _BY_LEVEL not in dataset:
        return ""
    means = dataset[_BY_LEVEL].mean([dim for dim in dataset[_BY_LEVEL].dims if dim != _LEVEL])
    first = int(means.values.argmax())
    return f", {float(means[first]):.3g} of them at level {str(means[_LEVEL].values[first])!r}"


def with_levels(
    dataset: xarray.Dataset, problem: LocalProblem, optimum: Tensor, target: float, seed: int
) -> xarray.Dataset:
    """A dataset of gaps with the amortization gap of every level, where there are several; arguments as below."""
    import xarray

    shares, errors = gap_by_level(problem, optimum, target, seed)
    if not shares:
        return dataset
    parts = {
        name: xarray.DataArray(torch.stack([*values.values()], -1).numpy(), dims=(problem.plate, _LEVEL))
        for name, values in ((_BY_LEVEL, shares), (f"{_BY_LEVEL}_se", errors))
    }
    return dataset.assign(parts).assign_coords({_LEVEL: [*shares]})


@torch.no_grad()
def gap_by_level(
    problem: LocalProblem, optimum: Tensor, target: float, seed: int
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The share of the amortization gap of every level, and its standard error, in nats per datapoint.

    Args:
        problem: The guide's answers.
        optimum: The best ones, ``(N, P)``.
        target: Standard error wanted.
        seed: Seed of the draws, which are the same for all levels.

    Returns:
        Shares ``(N,)`` by the name of the level, coarsest first, and their errors; nothing where there is one level
        only, or the family has parameters that are of no level.
    """
    levels = _levels(problem)
    if len(levels) < 2:
        return {}, {}
    down, up = (_way(problem.phi, optimum, order) for order in ([*levels.values()], [*levels.values()][::-1]))
    dim = problem.objective.family.noise_dim or 0
    rounds: list[Tensor] = []
    while True:
        rng = generator(seed, 19, len(rounds))
        noise = quasi_normal(max(_DRAWS, 4 * dim), len(optimum), dim, rng, whiten=False)
        first = [_elbo(problem, phi, noise) for phi in down]
        second = [first[0], *(_elbo(problem, phi, noise) for phi in up[1:-1]), first[-1]]
        gains = torch.stack(first).diff(dim=0) + torch.stack(second).diff(dim=0).flip(0)
        rounds.append(gains / 2)
        if len(rounds) < _LEAST_ROUNDS:
            continue
        every = torch.stack(rounds)
        errors = widening(torch.tensor([len(rounds) - 1.0])) * every.std(0) / len(rounds) ** 0.5
        if len(rounds) == _MOST_ROUNDS or not bool((errors > target).any()):
            shares = every.mean(0)
            return dict(zip(levels, shares, strict=True)), dict(zip(levels, errors, strict=True))


def _levels(problem: LocalProblem) -> dict[str, Tensor]:
    """Of every level its entries of phi, coarsest first; none where there is no more than one."""
    structure, family = problem.objective.log_joint.call.structure, problem.objective.family
    if not family.shares_heads or not inner_plates(structure.layout):
        return {}
    found = {level.name: level.positions.flatten() for level in levels_of(structure, inner_plates(structure.layout))}
    return {name: _entries(family, dims) for name, dims in found.items()}


def _entries(family: VariationalFamily, dims: Tensor) -> Tensor:
    """The entries of phi that belong to some dimensions: locations, log scales, and couplings to their parents."""
    rows = family.couplings[0].cpu()
    couplings = torch.isin(rows, dims).nonzero().squeeze(-1)
    return torch.cat([dims, family.latent_dim + dims, 2 * family.latent_dim + couplings])


def _way(start: Tensor, end: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """phi from the start to the end, level by level."""
    way = [start]
    for level in columns:
        way.append(way[-1].index_copy(-1, level.to(start.device), end[:, level].to(start)))
    return way


def _elbo(problem: LocalProblem, phi: Tensor, noise: Tensor) -> Tensor:
    """ELBOs ``(N,)`` on given noise."""
    return log_weights(problem.objective, phi, noise).mean(0).nan_to_num(nan=-torch.inf)
