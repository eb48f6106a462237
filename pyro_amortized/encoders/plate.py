"""The encoder of hierarchies: features of every entry of every plate, for any number of entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_flag, check_function, check_real, check_widths, is_traced
from pyro_amortized.encoders.pooling import Along, ByIndex, Grouping, Pool, statistics
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = ["PlateEncoder", "UnseenSizeWarning"]

Axes = tuple[str, ...]
"""Names of the inner plates of a level, in the order of its axes."""


class UnseenSizeWarning(UserWarning):
    """A group has a number of entries far from those that an encoder was trained on, or none and they all had some."""


FAR = 2.0
"""How many times as many entries as in training, or as few, are far."""


@dataclass(frozen=True)
class _Level:
    """One level of a hierarchy, by the numbers of its inputs, its masks, the next finer levels and the next coarser.

    The entries of a level with a number among the groups lie in those of the coarser level by an index.
    """

    axes: Axes
    inputs: tuple[int, ...]
    masks: tuple[int, ...]
    finer: tuple[int, ...]
    coarser: tuple[int, ...]
    group: int | None = None

    def within(self, other: _Level, sizes: Mapping[str, int], indices: Sequence[Tensor]) -> Grouping:
        """Which entries of this level lie in which of a coarser one."""
        if self.group is not None:
            return ByIndex(indices[2 * self.group], other.shape(sizes)[0])
        return Along(tuple(1 + i for i, axis in enumerate(self.axes) if axis not in other.axes))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the entries; the number of datapoints has the name ""."""
        return tuple(sizes[axis] for axis in (self.axes if self.group is not None else ("", *self.axes)))


class PlateEncoder(StandardizedEncoder):
    r"""Features of every entry of every plate inside the datapoint plate: the default where latents lie in such plates.

    A level is a set of nested plates, as the schools, their pupils, and the tests of these. From the finest level to
    the coarsest, the features of an entry come from what is observed of it and from the entries inside of it, pooled by
    weights, as precisions are, beside mean, deviation and number; then, from the coarsest to the finest, an entry is
    shown its parent's:

    .. math:: h_n^l = f_l\big(x_n^l, \operatorname{pool}_{m \in n} h_m^{l+1}\big), \qquad
        g_n^l = c_l\big(h_n^l, g_{pa(n)}^{l-1}\big)

    One network for each level serves all of its entries. So any call may have other numbers of entries, features do not
    depend on the order of the entries, and an entry that is masked counts for nothing. Guides call :meth:`build` when
    they know the plates; the number of parameters does not depend on the number of entries.

    Args:
        hidden_dims: Widths of the hidden layers of each level's network; the last one is the number of features H.
        activation: Constructor of the activation after each layer.
        standardize: Whether to shift and scale each input by mean and deviation over all entries of the first call.
        member_dropout: Probability, in training, that an entry is left out of what its group pools, so that the encoder
            learns of smaller groups than those at hand.

    Raises:
        ValueError: If a width or a probability is none.

    Example:
        >>> encoder = PlateEncoder(hidden_dims=(16,))
        >>> encoder.build(inputs=[("pupil",)], widths=[1], targets={"school": (), "pupil": ("pupil",)})
        >>> {name: tuple(h.shape) for name, h in encoder(torch.zeros(3, 7, 1)).items()}
        {'school': (3, 16), 'pupil': (3, 7, 16)}

    References:
        Deep Sets, Manzil Zaheer, Satwik Kottur, Siamak Ravanbakhsh, Barnabas Poczos, Ruslan Salakhutdinov, Alexander
        Smola (2017), https://arxiv.org/abs/1703.06114

        Amortized Variational Inference for Simple Hierarchical Models, Abhinav Agrawal, Justin Domke (2021),
        https://arxiv.org/abs/2111.03144
    """

    seen: Tensor

    def __init__(
        self,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
        member_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        check_function(
            "activation", activation, "the class of an activation, or a function that makes one", "torch.nn.SiLU"
        )
        check_flag("standardize", standardize)
        self.member_dropout = check_real(
            "member_dropout", member_dropout, "a probability below 1", lambda p: 0 <= p < 1, 0.3
        )
        self.activation = activation
        self.standardizes = standardize
        self.targets: dict[str, int] = {}
        self.levels: list[_Level] = []
        self.masked: tuple[int | None, ...] = ()
        self.covariates: frozenset[int] = frozenset()

    # Building

    @property
    def is_built(self) -> bool:
        """Whether the encoder knows its plates, and has networks."""
        return bool(self.levels)

    def build(
        self,
        inputs: Sequence[Axes],
        widths: Sequence[int],
        targets: Mapping[str, Axes],
        masks: Sequence[Axes] = (),
        mask_widths: Sequence[int] = (),
        masked: Sequence[int | None] = (),
        covariates: Collection[int] = (),
        groups: Mapping[str, Axes] | None = None,
    ) -> None:
        """Makes the networks.

        Args:
            inputs: Of each input, the names of the inner plates that it lies in, in the order of its axes.
            widths: Their numbers of values F for each entry.
            targets: The levels whose features are wanted, by name: their plates.
            masks: Of each mask, which come after the inputs, its plates.
            mask_widths: Their numbers of values for each entry.
            masked: The number of the input that each mask belongs to; None for data that are no input.
            covariates: Numbers of the inputs that are no data: an entry is there if any of its data are.
            groups: Plates beside the datapoint plate whose entries, ``(R, F)``, lie in those of another level by an
                index, with the plates of that level. After the masks come, for each of them, the index ``(R,)`` and a
                tensor with as many rows as that level has entries.
        """
        groups = {} if groups is None else groups
        self.masked, self.covariates = tuple(masked), frozenset(covariates)
        every = sorted({*inputs, *targets.values(), *masks, *((g,) for g in groups), ()}, key=lambda a: (len(a), a))
        every = sorted(every, key=lambda axes: _depth(axes, groups))
        self.levels = [_level(axes, every, inputs, masks, groups) for axes in every]
        self.targets = {name: every.index(axes) for name, axes in targets.items()}
        self.standardize = nn.ModuleList(Standardize(width) for width in widths if self.standardizes)
        plain: dict[int, int] = {}
        width = self.hidden_dims[-1]
        for number, level in reversed([*enumerate(self.levels)]):
            own = sum(widths[i] for i in level.inputs)
            plain[number] = max(1, own + sum(2 * plain[child] + 1 for child in level.finer))
        absent = [sum(mask_widths[i] for i in level.masks) for level in self.levels]
        learned = [2 * width * len(level.finer) for level in self.levels]
        up = [self._network(plain[i] + absent[i] + learned[i]) for i in range(len(every))]
        down = [
            self._network(width * (1 + len(level.coarser)), 1) if self._is_shown(level) else nn.Identity()
            for level in self.levels
        ]
        self.up, self.down = nn.ModuleList(up), nn.ModuleList(down)
        self.linear = nn.ModuleList(nn.Linear(plain[i], width) for i in range(len(self.levels)))
        self.pools = nn.ModuleList(Pool(width) for level in self.levels if level.axes)
        self.register_buffer("seen", torch.tensor([[torch.inf, 0.0, 0.0]] * len(every)))

    def _network(self, input_dim: int, num_layers: int | None = None) -> nn.Sequential:
        """Layers without normalisation: what they say of an entry may be linear in the data."""
        widths = self.hidden_dims if num_layers is None else self.hidden_dims[-num_layers:]
        layers = [[nn.Linear(before, after), self.activation()] for before, after in pairwise((input_dim, *widths))]
        return nn.Sequential(*(module for layer in layers for module in layer))

    def _is_shown(self, level: _Level) -> bool:
        """Whether entries of a level are shown their parents': its features are wanted, or those of a finer one."""
        return bool(level.axes) and any(set(level.axes) <= set(self.levels[i].axes) for i in self.targets.values())

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from inputs ``(N, *sizes, F)``, where they are not masked."""
        values, masks, _ = self._parts(inputs)
        for level in self.levels:
            for i in level.inputs if self.standardizes else ():
                rows = values[i].reshape(-1, values[i].shape[-1])
                mask = self._mask_of(i, masks)
                if mask is None and i in self.covariates and level.masks:
                    mask = torch.stack([masks[k].bool().any(-1, keepdim=True) for k in level.masks]).any(0)
                kept = rows if mask is None else rows[mask.bool().expand_as(values[i]).reshape(rows.shape).all(-1)]
                self.standardize[i].fit(kept if len(kept) else rows)  # type: ignore[operator]

    def _mask_of(self, number: int, masks: Sequence[Tensor]) -> Tensor | None:
        """The mask of an input."""
        return masks[self.masked.index(number)] if number in self.masked else None

    # Features

    def forward(self, *inputs: Tensor) -> dict[str, Tensor] | Tensor:
        """Features ``(N, *sizes, H)`` by level, of inputs ``(N, *sizes, F)``, masks of the same kind and indices.

        Where those of whole datapoints alone are wanted, they are no dict.
        """
        if not self.is_built:
            raise ValueError(
                "Cannot encode because this PlateEncoder does not know its plates; try passing it to a guide, or "
                "encoder.build(...)."
            )
        up = self._upwards(inputs)
        down: dict[int, Tensor] = {}
        for number, level in enumerate(self.levels):
            down[number] = up[number]
            if self._is_shown(level):
                parents = [_shown(down[parent], self.levels[parent], level) for parent in level.coarser]
                parents = [part.expand_as(up[number]) for part in parents]
                down[number] = up[number] + self.down[number](torch.cat([up[number], *parents], -1))
        found = {name: down[number] for name, number in self.targets.items()}
        return found[next(iter(found))] if [*self.targets.values()] == [0] else found

    def _upwards(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Features of every entry from what lies in it."""
        values, masks, indices = self._parts(inputs)
        sizes = self._sizes(inputs)
        up: dict[int, Tensor] = {}
        plain: dict[int, Tensor] = {}
        present: dict[int, Tensor | None] = {}
        for number, level in reversed([*enumerate(self.levels)]):
            shape = level.shape(sizes)
            groups = [(child, self.levels[child].within(level, sizes, indices)) for child in level.finer]
            present[number] = self._present(level, masks, [(present[child], dims) for child, dims in groups])
            members = {child: self._members(child, present[child], up[child], dims) for child, dims in groups}
            own = self._own(level, values, masks)
            own += [statistics(plain[child], members[child], dims) for child, dims in groups]
            own = [part.expand(*shape, part.shape[-1]) for part in own] or [self.seen.new_zeros(*shape, 1)]
            plain[number] = torch.cat(own, -1)
            learned = [self.pools[child - 1](up[child], members[child], dims) for child, dims in groups]
            learned += [1 - masks[i].to(self.seen.dtype) for i in level.masks]
            hidden = self.up[number](torch.cat([plain[number], *(x.expand(*shape, x.shape[-1]) for x in learned)], -1))
            up[number] = hidden + self.linear[number](plain[number])
        return up

    def _parts(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The values, the masks and the indices among the inputs."""
        first = sum(len(level.inputs) for level in self.levels)
        second = first + sum(len(level.masks) for level in self.levels)
        return inputs[:first], inputs[first:second], inputs[second:]

    def _own(self, level: _Level, values: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """What is observed of the entries of a level, standardised, with zeros where it is masked."""
        own = []
        for i in level.inputs:
            x = values[i].to(self.seen.dtype)
            x = self.standardize[i](x) if self.standardizes else x
            mask = self._mask_of(i, masks)
            own.append(x if mask is None else x * mask.to(x.dtype))
        return own

    def _present(
        self, level: _Level, masks: Sequence[Tensor], inside: Sequence[tuple[Tensor | None, Grouping]]
    ) -> Tensor | None:
        """Which entries of a level any data are there of, ``(N, *sizes, 1)``; None for all."""
        known = [masks[i].bool().any(-1, keepdim=True) for i in level.masks]
        if any(i not in self.covariates and i not in self.masked for i in level.inputs):
            return None
        if any(part is None for part, _ in inside) or not (known or inside):
            return None
        known += [groups.sum(part.float()) > 0 for part, groups in inside]  # type: ignore[union-attr]
        return torch.stack(torch.broadcast_tensors(*known)).any(0)

    def _members(self, number: int, present: Tensor | None, features: Tensor, groups: Grouping) -> Tensor | None:
        """Which entries of a level count in their groups; all that are present, but for those dropped in training."""
        self._check_sizes(number, features, present, groups)
        if not self.training or not self.member_dropout:
            return present
        kept = torch.rand(*features.shape[:-1], 1, device=features.device) >= self.member_dropout
        return kept if present is None else kept & present

    def _sizes(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Numbers of entries of the plates, and under the name "" of the datapoints."""
        values, masks, indices = self._parts(inputs)
        sizes = {"": 1}
        for level in self.levels:
            axes = level.axes if level.group is not None else ("", *level.axes)
            for x in [*(values[i] for i in level.inputs), *(masks[i] for i in level.masks)]:
                for axis, size in zip(axes, x.shape, strict=False):
                    sizes[axis] = max(sizes.get(axis, 1), size) if axis else size
            if level.group is not None:
                sizes[level.axes[0]] = indices[2 * level.group].shape[0]
                parent = self.levels[level.coarser[0]].axes
                sizes[parent[0] if parent else ""] = indices[2 * level.group + 1].shape[0]
        return sizes

    def _check_sizes(self, number: int, features: Tensor, present: Tensor | None, groups: Grouping) -> None:
        """Takes down the numbers of entries that gradients are taken for, and warns of others far from them."""
        if is_traced():
            return
        seen = self.seen[number]
        counts = groups.sum(seen.new_ones(*features.shape[:-1], 1) if present is None else present.to(seen))
        empty = (counts == 0).sum()
        now = torch.stack([torch.where(counts > 0, counts, torch.inf).min(), counts.max(), empty.to(seen)])
        if self.training and features.requires_grad:

            def learn(gradient: Tensor) -> None:
                seen.copy_(torch.cat([torch.minimum(seen[:1], now[:1]), torch.maximum(seen[1:], now[1:])]))

            features.register_hook(learn)
            return
        (least, most, most_empty), (low, high, num_empty) = torch.stack([seen, now]).tolist()
        if not most:
            return
        plate = self.levels[number].axes[-1]
        if low < least / FAR or high > most * FAR:
            sizes = f"{low:.0f}" + (f" to {high:.0f}" if high > low else "")
            fewer = "" if high > most * FAR else "PlateEncoder(member_dropout=0.3), "
            warnings.warn(
                f"Groups of {sizes} entries of plate {plate!r} are far from the {least:.0f} to {most:.0f} that this "
                "encoder was trained on: what it says of them may be far off; try training on groups of such sizes, "
                f"{fewer}or guide.refined(...).",
                UnseenSizeWarning,
                stacklevel=2,
            )
        if num_empty and not most_empty:
            warnings.warn(
                f"{num_empty:.0f} of {counts.numel()} groups have no entries of plate {plate!r}, and this encoder was "
                "trained on none such: what it says of them is not their prior; try training with some, or "
                "guide.refined(...).",
                UnseenSizeWarning,
                stacklevel=2,
            )


def _depth(axes: Axes, groups: Mapping[str, Axes]) -> int:
    """How many levels are coarser than one."""
    return 1 + _depth(groups[axes[0]], groups) if axes and axes[0] in groups else len(axes)


def _level(
    axes: Axes, every: Sequence[Axes], inputs: Sequence[Axes], masks: Sequence[Axes], groups: Mapping[str, Axes]
) -> _Level:
    grouped = [other for other in every if other and other[0] in groups]
    others = [other for other in every if other not in grouped]
    finer = [other for other in others if set(axes) < set(other)]
    coarser = [other for other in others if set(other) < set(axes)]
    finer = [a for a in finer if not any(set(b) < set(a) for b in finer)]
    coarser = [a for a in coarser if not any(set(a) < set(b) for b in coarser)]
    if axes in grouped:
        finer, coarser = [], [groups[axes[0]]]
    finer += [other for other in grouped if groups[other[0]] == axes]
    return _Level(
        axes,
        tuple(i for i, other in enumerate(inputs) if other == axes),
        tuple(i for i, other in enumerate(masks) if other == axes),
        tuple(map(every.index, finer)),
        tuple(map(every.index, coarser)),
        [*groups].index(axes[0]) if axes in grouped else None,
    )


def _shown(features: Tensor, coarser: _Level, finer: _Level) -> Tensor:
    """Features of a coarser level with axes of size 1 for the plates that it lacks."""
    sizes = iter(features.shape[1:-1])
    return features.reshape(features.shape[0], *(next(sizes) if a in coarser.axes else 1 for a in finer.axes), -1)
