"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_widths
from pyro_amortized.encoders.checks import check_inputs, check_sizes, check_width
from pyro_amortized.encoders.layers import hidden_layers
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = ["MLPEncoder"]


class MLPEncoder(StandardizedEncoder):
    """A multilayer perceptron over the flattened values of a datapoint.

    Args:
        input_dim: Number of values per datapoint F, summed over the inputs if there are several.
        hidden_dims: Widths of the hidden layers; the last one is the number of features H. Empty for the standardised
            inputs themselves.
        activation: Constructor of the activation after each layer.
        standardize: Whether to shift and scale the inputs with the mean and deviation found by :meth:`fit`, which
            guides call on the data of their ``setup``.

    Example:
        >>> encoder = MLPEncoder(784, hidden_dims=(400,))
        >>> encoder(torch.zeros(3, 28, 28)).shape
        torch.Size([3, 400])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (200, 200),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim = check_sizes(input_dim, activation, standardize)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        self.standardize = Standardize(input_dim) if standardize else None
        self.layers = hidden_layers(input_dim, hidden_dims, activation)

    @staticmethod
    def flatten(*inputs: Tensor) -> Tensor:
        """Inputs of shapes ``(N, ...)`` as one matrix ``(N, F)``."""
        flat = [x.reshape(x.shape[0], -1) for x in inputs]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def _matrix(self, inputs: tuple[Tensor, ...]) -> Tensor:
        check_inputs(self, inputs)
        x = self.flatten(*inputs)
        check_width(self, x, self.input_dim)
        dtype = next((t.dtype for t in chain(self.parameters(), self.buffers())), torch.get_default_dtype())
        return x if x.dtype == dtype else x.to(dtype)

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from ``inputs`` of shapes ``(N, ...)``."""
        if self.standardize is not None:
            self.standardize.fit(self._matrix(inputs))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features ``(N, H)`` of inputs of shapes ``(N, ...)``."""
        x = self._matrix(inputs)
        return self.layers(x if self.standardize is None else self.standardize(x))
