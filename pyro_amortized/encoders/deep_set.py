"""The encoder of exchangeable observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_widths
from pyro_amortized.encoders.checks import check_inputs, check_sizes, check_width
from pyro_amortized.encoders.layers import hidden_layers
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = ["DeepSetEncoder"]


class DeepSetEncoder(StandardizedEncoder):
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

    def _elements(self, x: Tensor) -> Tensor:
        x = (x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)).to(next(self.parameters()).dtype)
        check_width(self, x, self.input_dim)
        return x

    def _mask(self, x: Tensor, *inputs: Tensor | None) -> Tensor | None:
        """The mask among the further inputs, if there is one."""
        check_inputs(self, (x,), 2)
        if len(inputs) > 1 or not isinstance(mask := (*inputs, None)[0], Tensor | None):
            raise ValueError(
                f"Cannot encode {1 + len(inputs)} inputs by DeepSetEncoder because it takes a set and, if need be, a "
                "mask; try encoder_input=... with the name of one argument, or an encoder of your own."
            )
        if mask is None:
            return None
        looked_at = mask.dtype != torch.bool and not torch.compiler.is_compiling() and not torch._C._get_tracing_state()
        if mask.shape != x.shape[:2] or (looked_at and not ((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"Cannot read the second input of DeepSetEncoder, of shape {tuple(mask.shape)}, as a mask because a "
                f"mask says by True and False, or 1 and 0, which of the elements {tuple(x.shape[:2])} belong to the "
                "set; try encoder_input=... with the name of one argument, or of one and its mask."
            )
        return mask

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from elements ``(N, M, F)``, those under a mask ``(N, M)`` if it is given."""
        mask = self._mask(*inputs)
        x = self._elements(inputs[0])
        if self.standardize is not None:
            self.standardize.fit(x if mask is None else x[mask.bool()])

    def forward(self, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """Features of sets.

        Args:
            x: Elements of shape ``(N, M, F)``, or ``(N, M)`` for scalar ones.
            *inputs: A mask: which elements belong to the set, shape ``(N, M)``, boolean or 1 and 0; by default all.

        Returns:
            Features of shape ``(N, H)``; they do not depend on the order of the elements nor on those masked out.
        """
        mask = self._mask(x, *inputs)
        x = self._elements(x)
        member = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        x = x if mask is None else x.masked_fill(member.unsqueeze(-1) == 0, 0.0)
        hidden = self.element_layers(x if self.standardize is None else self.standardize(x))
        count = member.sum(1, keepdim=True)
        mean = (hidden * member.unsqueeze(-1)).sum(1) / count.clamp(min=1.0)
        return self.set_layers(torch.cat([mean, count.clamp(min=1.0).log()], -1))
