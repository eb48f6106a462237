"""Long format: observations in a plate beside the datapoint plate, tied to the datapoints by an index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.observed import observed_values
from pyro_amortized.structure.plates import PlateFrame
from pyro_amortized.structure.signature import named_arguments
from pyro_amortized.structure.sites import latent_sites

__all__ = ["Group", "GroupSpec", "check_groups", "check_index_failed", "group_indices", "read_groups"]

GroupSpec = Mapping[str, "str | Callable[..., Any]"]
"""For each plate in long format, the name of the argument that is its index, or a function of the arguments."""


@dataclass(frozen=True)
class Group:
    """A plate in long format.

    Attributes:
        parent: Name of the plate that its index points into: the datapoint plate, or another one in long format.
        index: Positions there of the entries, ``(R,)``.
        datapoints: Their positions in the datapoint plate, ``(R,)``.
        observed: Observed values by site, ``(R, ...)``.
        present: Which of them are not masked, of the sites that have a mask.
    """

    parent: str
    index: Tensor
    datapoints: Tensor
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)

    def of_rows(self, rows: Tensor, size: int) -> tuple[Tensor, Group]:
        """The entries of some of so many datapoints, given by position, and these entries as a group of their own."""
        if len(rows) == size and torch.equal(rows.cpu(), torch.arange(size)):
            return torch.arange(len(self.index), device=self.index.device), replace(self, observed={}, present={})
        order = torch.argsort(self.datapoints, stable=True)
        counts = self.datapoints.bincount(minlength=size)
        rows = rows.to(counts.device)
        lengths = counts[rows]
        number = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
        within = torch.arange(len(number), device=rows.device) - (lengths.cumsum(0) - lengths)[number]
        entries = order[(counts.cumsum(0) - counts)[rows][number] + within]
        return entries, Group(self.parent, number, number)


def check_groups(groups: Any, plate: str | None) -> None:
    """Raises a ValueError unless ``groups`` says of plates in long format what their index is."""
    if not isinstance(groups, Mapping) or not all(
        isinstance(name, str) and (isinstance(spec, str) or callable(spec)) for name, spec in groups.items()
    ):
        raise ValueError(
            f"Cannot use groups={groups!r} because a dict is wanted from the name of a plate in long format to that of "
            'the argument with the position of each entry; try groups={"obs": "county_index"}.'
        )
    if groups and plate is None:
        raise ValueError(
            f"Cannot tell what the entries of plates {sorted(groups)} belong to because the datapoint plate is not "
            'named; try plate=... with the name of the plate that holds the latents, plate="county".'
        )


def group_indices(
    spec: GroupSpec, model: Callable[..., Any], args: Any, kwargs: Any, frames: Mapping[str, PlateFrame], plate: str
) -> dict[str, Group]:
    """The groups of a call, by the name of the plate, from its arguments alone; a parent comes before its child.

    Args:
        spec: What the user says of them.
        model: The model, for the names of its arguments.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        frames: The plates of the call.
        plate: Name of the datapoint plate.

    Raises:
        ValueError: If an index is none: of another length, with positions that there are not, or of a chain that does
            not end at the datapoint plate.
    """
    given = named_arguments(model, args, kwargs)
    parents = {name: _parent(name, of, spec, frames, plate) for name, of in spec.items()}
    groups: dict[str, Group] = {}
    while len(groups) < len(spec):
        ready = [name for name in spec if name not in groups and parents[name] in (plate, *groups)]
        if not ready:
            raise ValueError(
                f"Cannot tell which datapoints the entries of plates {sorted(set(spec) - set(groups))} belong to "
                f"because their indices do not lead to plate {plate!r}; try an index into {plate!r}."
            )
        for name in ready:
            index = _index(name, spec[name], given, args, kwargs, frames, parents[name])
            parent = groups.get(parents[name])
            groups[name] = Group(parents[name], index, index if parent is None else parent.datapoints[index])
    return groups


def _parent(name: str, of: Any, spec: GroupSpec, frames: Mapping[str, PlateFrame], plate: str) -> str:
    """The plate that an index points into: one in long format if it has its name, else the datapoint plate."""
    if name not in frames:
        raise ValueError(
            f"Cannot group the entries of plate {name!r} because the model has no plate of that name; try one of "
            f"{sorted(frames)}."
        )
    return of if isinstance(of, str) and of in spec and of != name else plate


def _index(
    name: str, of: Any, given: Mapping[str, Any], args: Any, kwargs: Any, frames: Mapping[str, PlateFrame], parent: str
) -> Tensor:
    """The index of a plate's entries."""
    if isinstance(of, str) and of not in given:
        raise ValueError(
            f"Cannot group the entries of plate {name!r} by {of!r} because the model has no argument of that name; "
            f"try one of {sorted(given)}, or a function of the model's arguments."
        )
    index, frame, size = given[of] if isinstance(of, str) else of(*args, **kwargs), frames[name], frames[parent].size
    index = index if isinstance(index, Tensor) else torch.as_tensor(index)
    if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"Cannot group the entries of plate {name!r} by an index of shape {tuple(index.shape)} and type "
            f"{index.dtype} because positions (R,) are wanted, whole numbers; try index.long()."
        )
    if len(index) != frame.size:
        raise ValueError(
            f"Cannot group the {frame.size} entries of plate {name!r} by an index of {len(index)} positions because "
            "there must be one for each; try index[rows] for the rows at hand."
        )
    known = ((index >= 0) & (index < size)).all()
    if known.is_cuda:
        torch._assert_async(known)  # the device stops at an error, and Python need not wait to read
    elif not known:
        raise ValueError(
            f"Cannot group the entries of plate {name!r} by positions {int(index.min())} to {int(index.max())} "
            f"because plate {parent!r} has {size} entries in this call, 0 to {size - 1}; try {_to_positions(index)}."
        )
    return index.long()


def _to_positions(index: Tensor) -> str:
    """What makes positions of an index that counts from 1, or of labels."""
    if int(index.min()) == 1:
        return "index - 1, if it counts from 1"
    return (
        "positions among those; of labels, torch.unique(index, return_inverse=True)[1] where each has rows, else "
        "torch.searchsorted(labels, index) with all labels, sorted"
    )


def check_index_failed(spec: GroupSpec, model: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> None:
    """Raises a ValueError that shows the indices if the model fails in a way that one of them may be to blame for."""
    given = {name: x for name, x in named_arguments(model, args, kwargs).items() if name in spec.values()}
    for name, x in given.items():
        if isinstance(x, Tensor) and x.dim() == 1 and len(x) and not x.is_complex():
            kind = str(x.dtype).removeprefix("torch.")
            whole = not x.is_floating_point() and x.dtype != torch.bool
            remedy = _to_positions(x) if whole else "index.long()"
            raise ValueError(
                f"Cannot run the model because of an index ({error}): argument {name!r} ties rows to groups by "
                f"{len(x)} numbers of type {kind}, {x.min().item()} to {x.max().item()}, where whole ones "
                f"from 0 to the number of groups less 1 are wanted; try {remedy}."
            ) from error


def read_groups(
    trace: Trace,
    frames: Mapping[str, PlateFrame],
    groups: Mapping[str, Group],
    plate: str,
    missing: Collection[str] = (),
) -> dict[str, Group]:
    """The groups with what is observed of their entries in a run, but for sites that are ``missing``.

    Raises:
        ValueError: If a latent lies in a plate in long format, or a plate in long format inside the datapoint plate.
    """
    for name, site in latent_sites(trace).items():
        within = [frame.name for frame in site["cond_indep_stack"] if frame.name in groups]
        if within:
            raise ValueError(
                f"Cannot guide latent {name!r} because it lies in plate {within[0]!r}, which is grouped by an index; "
                f"try a plate inside of {plate!r} for latents of single entries, with a mask for groups of other sizes."
            )
    found = {}
    for name, group in groups.items():
        values, masks = observed_values(trace, frames[name], missing)
        found[name] = replace(group, observed=values, present=masks)
    return found
