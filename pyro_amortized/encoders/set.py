"""The encoder of sets by attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_flag, check_widths
from pyro_amortized.encoders.checks import check_heads, check_sizes
from pyro_amortized.encoders.elements import ElementsEncoder
from pyro_amortized.encoders.layers import hidden_layers
from pyro_amortized.encoders.pooling import Along, Pool, statistics
from pyro_amortized.encoders.standardize import Standardize

__all__ = ["SetEncoder"]


class _Block(nn.Module):
    """Attention of queries to elements and a layer for each, both added to what comes in, normalised before."""

    def __init__(self, width: int, num_heads: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.layer = nn.Sequential(nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width))

    def forward(self, query: Tensor, keys: Tensor, absent: Tensor) -> Tensor:
        normed = self.norms[1](keys)
        found, _ = self.attention(self.norms[0](query), normed, normed, key_padding_mask=absent, need_weights=False)
        query = query + found
        return query + self.layer(self.norms[2](query))


class SetEncoder(ElementsEncoder):
    r"""A permutation-invariant encoder of a datapoint that is a set, whose elements see each other: a set transformer.

    Elements attend to each other, and one learned query attends to the result; beside it go mean, deviation and the
    logarithm of the number of elements, weighted sums and their weights. With ``attention=False`` elements do not see
    each other, as in :class:`~pyro_amortized.DeepSetEncoder`; it costs time in proportion to their number M, where
    attention costs its square. Use it for whole data sets (:func:`~pyro_amortized.over_datasets`), of any size.

    Args:
        input_dim: Number of values per element F.
        hidden_dims: Widths of the layers that every element goes through; the last one is the number of features H.
        attention: Whether elements attend to each other.
        num_blocks: Number of times that they do.
        num_heads: Number of heads of each attention, a divisor of H.
        activation: Constructor of the activation after each layer.
        standardize: As in :class:`MLPEncoder`.

    Raises:
        ValueError: If a size is none, or ``num_heads`` no divisor of H.

    Example:
        >>> encoder = SetEncoder(2)
        >>> encoder(torch.zeros(3, 7, 2)).shape
        torch.Size([3, 64])

    References:
        Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks, Juho Lee, Yoonho Lee,
        Jungtaek Kim, Adam R. Kosiorek, Seungjin Choi, Yee Whye Teh (2019), https://arxiv.org/abs/1810.00825
    """

    def __init__(
        self,
        input_dim: int,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        attention: bool = True,
        num_blocks: int = 2,
        num_heads: int = 4,
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim = check_sizes(input_dim, activation, standardize)
        hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        check_flag("attention", attention)
        num_blocks, num_heads = check_count("num_blocks", num_blocks, 1, 2), check_count("num_heads", num_heads, 1, 4)
        width = hidden_dims[-1]
        if attention:
            check_heads(width, num_heads)
        self.standardize = Standardize(input_dim) if standardize else None
        self.element_layers = hidden_layers(input_dim, hidden_dims, activation)
        self.blocks = nn.ModuleList(
            _Block(width, num_heads, activation) for _ in range(num_blocks + 1 if attention else 0)
        )
        self.query = nn.Parameter(torch.randn(1, 1, width) / width**0.5) if attention else None
        self.nobody = nn.Parameter(torch.zeros(1, 1, width)) if attention else None
        self.pool = Pool(width)
        pooled = 2 * width + 2 * input_dim + 1 + (width if attention else 0)
        self.set_layers = hidden_layers(pooled, (width,), activation)

    def features(self, x: Tensor, member: Tensor) -> Tensor:
        """Features ``(N, H)`` of standardised elements ``(N, M, F)``; ``member`` ``(N, M)`` says which count."""
        hidden, present, groups = self.element_layers(x), member.unsqueeze(-1), Along((1,))
        parts = [self.pool(hidden, present, groups), statistics(x, present, groups)]
        if self.query is not None and self.nobody is not None:
            # one element that is always there: softmax over none is not defined
            hidden = torch.cat([hidden, self.nobody.expand(x.shape[0], -1, -1)], 1)
            absent = torch.cat([member == 0, member.new_zeros(x.shape[0], 1, dtype=torch.bool)], 1)
            for block in self.blocks[:-1]:
                hidden = block(hidden, hidden, absent)
            parts.append(self.blocks[-1](self.query.expand(x.shape[0], -1, -1), hidden, absent).squeeze(1))
        return self.set_layers(torch.cat(parts, -1))
