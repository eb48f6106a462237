"""The encoder of counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_widths, is_traced
from pyro_amortized.encoders.checks import check_inputs, check_sizes, check_width
from pyro_amortized.encoders.layers import hidden_layers
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = ["CountEncoder"]


class CountEncoder(StandardizedEncoder):
    r"""A multilayer perceptron over counts, such as those of genes in cells or of words in documents.

    .. math:: f\big(\log(1 + x_n \bar s / s_n),\; \log s_n,\; \mathrm{onehot}(b_n)\big)

    with the size factor :math:`s_n`, by default the datapoint's total count and one, its median :math:`\bar s` in the
    data of the guide's ``setup``, and the batch :math:`b_n` in which the datapoint was measured. So datapoints that
    differ in size alone differ in one input alone. Counts and size factor are standardised after the logarithm.

    Args:
        input_dim: Number of counts per datapoint G.
        num_batches: Number of batches; 0 for data that come in none.
        hidden_dims: Widths of the hidden layers; the last one is the number of features H.
        activation: Constructor of the activation after each layer.
        standardize: As in :class:`MLPEncoder`.

    Raises:
        ValueError: If a size is none.

    Example:
        >>> encoder = CountEncoder(20, num_batches=3)
        >>> encoder(torch.ones(5, 20), torch.tensor([0, 0, 1, 2, 1])).shape
        torch.Size([5, 200])

    References:
        Deep generative modeling for single-cell transcriptomics, Romain Lopez, Jeffrey Regier, Michael B. Cole, Michael
        I. Jordan, Nir Yosef (2018), https://doi.org/10.1038/s41592-018-0229-2
    """

    typical: Tensor
    fitted: Tensor

    def __init__(
        self,
        input_dim: int,
        *,
        num_batches: int = 0,
        hidden_dims: Sequence[int] = (200, 200),
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim = check_sizes(input_dim, activation, standardize)
        self.num_batches = check_count("num_batches", num_batches, 0, 2)
        hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        self.register_buffer("typical", torch.tensor(1.0))
        self.register_buffer("fitted", torch.tensor(False))
        self.standardize = Standardize(input_dim + 1) if standardize else None
        self.layers = hidden_layers(input_dim + 1 + self.num_batches, hidden_dims, activation)

    def _parts(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Counts ``(N, G)``, size factors ``(N, 1)``, and one-hot batches, if there are any."""
        check_inputs(self, inputs)
        least = 2 if self.num_batches else 1
        if not least <= len(inputs) <= least + 1:
            wanted = "counts, then, if need be, a size factor" + (", then the batch" if self.num_batches else "")
            raise ValueError(
                f"Cannot encode {len(inputs)} inputs by CountEncoder because it takes {wanted}; try encoder_input=... "
                "with the names of these, or another num_batches."
            )
        dtype = next(self.parameters()).dtype
        counts = inputs[0].flatten(1).to(dtype)
        check_width(self, counts, self.input_dim)
        size = inputs[1].reshape(-1, 1).to(dtype) if len(inputs) > least else 1 + counts.sum(-1, keepdim=True)
        self._check_values(counts, size)
        batch = self._one_hot(inputs[-1]).to(dtype) if self.num_batches else None
        return counts, size, batch

    def _logarithms(self, counts: Tensor, size: Tensor) -> Tensor:
        """Those of counts at the typical size, and of the size, ``(N, G + 1)``."""
        return torch.cat([(counts * (self.typical / size)).log1p(), size.log()], -1)

    def _one_hot(self, batch: Tensor) -> Tensor:
        """Batches ``(N, num_batches)`` from their numbers ``(N,)``, or from what is one-hot already."""
        if batch.dim() == 2 and batch.shape[1] == self.num_batches and self.num_batches > 1:
            return batch
        numbers = batch.reshape(batch.shape[0], -1)
        known = (numbers >= 0) & (numbers < self.num_batches) & (numbers == numbers.floor())
        if numbers.shape[1] != 1 or not (is_traced() or known.all()):
            raise ValueError(
                f"Cannot read the last input of CountEncoder, of shape {tuple(batch.shape)}, as batches because these "
                f"are integers from 0 to {self.num_batches - 1}, or one-hot; try num_batches=... with their number."
            )
        return numbers == torch.arange(self.num_batches, device=batch.device)

    def _check_values(self, counts: Tensor, size: Tensor) -> None:
        if is_traced():
            return
        counted = ((counts >= 0) & counts.isfinite()).all() & ((size > 0) & size.isfinite()).all()
        if counted.is_cuda:
            torch._assert_async(counted)  # the device stops at an error, and Python need not wait to read
        elif not counted:
            raise ValueError(
                "Cannot encode counts because some are negative or not finite, or a size factor is not positive; try "
                "the raw counts, or MLPEncoder for values of other kinds."
            )

    def fit(self, *inputs: Tensor) -> None:
        """Takes the typical size and the standardisation, once, from counts and the other inputs as they come."""
        counts, size, _ = self._parts(inputs)
        if not self.fitted:
            self.fitted.fill_(True)
            self.typical.copy_(size.median())
        if self.standardize is not None:
            self.standardize.fit(self._logarithms(counts, size))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of counts.

        Args:
            *inputs: Counts ``(N, G)``; if there are any, size factors ``(N,)``; and if there are batches, their numbers
                ``(N,)`` or indicators ``(N, num_batches)``.

        Returns:
            Features ``(N, H)``.
        """
        counts, size, batch = self._parts(inputs)
        values = self._logarithms(counts, size)
        values = values if self.standardize is None else self.standardize(values)
        return self.layers(values if batch is None else torch.cat([values, batch], -1))
