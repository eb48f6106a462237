"""The encoder of exchangeable observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_widths
from pyro_amortized.encoders.checks import check_sizes
from pyro_amortized.encoders.elements import ElementsEncoder
from pyro_amortized.encoders.layers import hidden_layers
from pyro_amortized.encoders.standardize import Standardize

__all__ = ["DeepSetEncoder"]


class DeepSetEncoder(ElementsEncoder):
    r"""A permutation-invariant encoder of a datapoint that is a set of elements.

    .. math:: f(x_n) = \rho\Big(\frac{1}{M_n} \sum_m \psi(x_{nm}),\; \log M_n\Big)

    Args:
        input_dim: Number of values per element F.
        hidden_dims: Widths of the element network :math:`\psi`.
        output_dims: Widths of the set network :math:`\rho`; the last one is the number of features H.
        activation: Constructor of the activation after each layer.
        standardize: As in :class:`MLPEncoder`.

    Example:
        >>> encoder = DeepSetEncoder(2)
        >>> encoder(torch.zeros(3, 7, 2)).shape
        torch.Size([3, 64])

    References:
        Deep Sets, Manzil Zaheer, Satwik Kottur, Siamak Ravanbakhsh, Barnabas Poczos, Ruslan Salakhutdinov, Alexander
        Smola (2017), https://arxiv.org/abs/1703.06114
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        output_dims: Sequence[int] = (64,),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim = check_sizes(input_dim, activation, standardize)
        hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        output_dims = check_widths("output_dims", output_dims)
        self.standardize = Standardize(input_dim) if standardize else None
        self.element_layers = hidden_layers(input_dim, hidden_dims, activation)
        self.set_layers = hidden_layers(hidden_dims[-1] + 1, output_dims, activation)

    def features(self, x: Tensor, member: Tensor) -> Tensor:
        """Features ``(N, H)`` of standardised elements ``(N, M, F)``; ``member`` ``(N, M)`` says which count."""
        hidden = self.element_layers(x)
        count = member.sum(1, keepdim=True)
        mean = (hidden * member.unsqueeze(-1)).sum(1) / count.clamp(min=1.0)
        return self.set_layers(torch.cat([mean, count.clamp(min=1.0).log()], -1))
