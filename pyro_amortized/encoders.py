"""Encoders: networks from a datapoint's values to features, one row per datapoint.

An encoder ends in features ``(N, H)``; the guide adds the linear head that makes variational parameters of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_flag, check_function, check_widths

__all__ = ["DeepSetEncoder", "Head", "MLPEncoder", "hidden_layers"]


class Standardize(nn.Module):
    r"""Shifts and scales features: :math:`(x - m) / s`, with m and s taken once from data by :meth:`fit`.

    Features that hardly vary in that data are scaled by a tenth of the typical deviation instead of their own, so that
    a pixel that was dark in the first batch and is lit later does not blow up. Beyond five deviations, which the data
    of a few rows may leave anywhere, features go on as a logarithm.

    Args:
        dim: Number of features F.
    """

    loc: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Takes location and scale from ``x`` of shape ``(..., F)``, once: a second call changes nothing."""
        if self.fitted:
            return
        self.fitted.fill_(True)
        x = x.reshape(-1, x.shape[-1]).to(self.loc)
        deviation = x.std(0, correction=0)
        floor = 0.1 * deviation.square().mean().sqrt()
        self.loc.copy_(x.mean(0))
        self.scale.copy_(torch.where(floor > 0, deviation.clamp(min=floor), torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised features of the shape of ``x``."""
        standardized = (x - self.loc) / self.scale
        return torch.where(self.fitted, standardized * _limit(standardized.abs()), standardized)


_FAR = 5.0
"""Sizes, relative to those in the data of the first call, up to which features are taken as they are."""


def _limit(size: Tensor) -> Tensor:
    """What to multiply values by for their sizes to go on as a logarithm beyond :data:`_FAR`."""
    size = size.clamp(min=_FAR)
    return (_FAR + (size - _FAR).log1p()) / size


def hidden_layers(
    input_dim: int, hidden_dims: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU
) -> nn.Sequential:
    """Linear layers, each normalised over its units and followed by an activation.

    Without the normalisation a step of Adam, which moves all weights alike, moves the last layer by the product of what
    it moves each of them.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise((input_dim, *hidden_dims)):
        norm = [nn.LayerNorm(after)] if after >= _LEAST_NORMALIZED else []
        layers += [nn.Linear(before, after), *norm, activation()]
    return nn.Sequential(*layers)


_LEAST_NORMALIZED = 8
"""Layers of fewer units are not normalised: little would be left of what they hold."""


class Head(nn.Linear):
    r"""The linear layer from features to variational parameters, :math:`\phi = b + W f / (r \sqrt{H})`.

    r is the root mean square of the features at first. A step of Adam at learning rate :math:`\eta` moves an output by
    up to :math:`\eta \sqrt{H}` so, whatever the scale of the features, where a plain layer moves by
    :math:`\eta \sum_h |f_h|`; and at the start outputs differ little from b. Features of a datapoint whose norm exceeds
    :math:`5 r \sqrt{H}`, as an outlier's, or when the encoder is about to diverge, go on as a logarithm of it.

    Args:
        features: The features of the first call, ``(..., H)``.
        num_outputs: Number of outputs.
    """

    size: Tensor

    def __init__(self, features: Tensor, num_outputs: int) -> None:
        num_features = features.shape[-1]
        super().__init__(num_features, num_outputs, dtype=features.dtype, device=features.device)
        size = features.detach().square().mean().sqrt() * num_features**0.5
        self.register_buffer("size", torch.where(size > 0, size, num_features**0.5))

    def forward(self, features: Tensor) -> Tensor:
        """Outputs ``(..., P)`` of features ``(..., H)``."""
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state()
        if traced or (torch.linalg.vector_norm(features.detach(), dim=-1) > _FAR * self.size).any():
            features = features * _limit(torch.linalg.vector_norm(features, dim=-1, keepdim=True) / self.size)
        output = F.linear(features, self.weight / self.size, self.bias)
        return output.to(self.weight.dtype)  # under autocast, where it has fewer digits than scales need


def _check_width(module: nn.Module, x: Tensor, input_dim: int) -> None:
    if x.shape[-1] != input_dim:
        raise ValueError(
            f"Cannot encode inputs with {x.shape[-1]} features because this {type(module).__name__} was built for "
            f"{input_dim}; try input_dim={x.shape[-1]}, or bring the data to the shape of the first call."
        )


def _check_sizes(input_dim: Any, activation: Any, standardize: Any) -> int:
    check_function(
        "activation", activation, "the class of an activation, or a function that makes one", "torch.nn.SiLU"
    )
    check_flag("standardize", standardize)
    return check_count("input_dim", input_dim, 1, "x[0].numel()")


def _check_inputs(module: nn.Module, inputs: tuple[Any, ...], least_dim: int = 1) -> None:
    """Raises a ValueError unless there are inputs, real tensors of equally many rows."""
    kinds = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
    usable = all(isinstance(x, Tensor) and x.dim() >= least_dim and not x.is_complex() for x in inputs)
    if not inputs or not usable or len({len(x) for x in inputs}) > 1:
        raise ValueError(
            f"Cannot encode inputs {kinds} by {type(module).__name__} because real tensors of at least "
            f"{least_dim} dimensions are wanted, with a row for each datapoint; try torch.as_tensor(x), and "
            "x.unsqueeze(0) for a single datapoint."
        )


class StandardizedEncoder(nn.Module):
    """Base class of encoders that shift and scale their inputs by what they saw in :meth:`fit`."""

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from ``inputs`` of shapes ``(N, ...)``; guides call it in their ``setup``."""
        raise NotImplementedError


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
        self.input_dim = input_dim = _check_sizes(input_dim, activation, standardize)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        self.standardize = Standardize(input_dim) if standardize else None
        self.layers = hidden_layers(input_dim, hidden_dims, activation)

    @staticmethod
    def flatten(*inputs: Tensor) -> Tensor:
        """Inputs of shapes ``(N, ...)`` as one matrix ``(N, F)``."""
        flat = [x.reshape(x.shape[0], -1) for x in inputs]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def _matrix(self, inputs: tuple[Tensor, ...]) -> Tensor:
        _check_inputs(self, inputs)
        x = self.flatten(*inputs)
        _check_width(self, x, self.input_dim)
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
        self.input_dim = input_dim = _check_sizes(input_dim, activation, standardize)
        hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        output_dims = check_widths("output_dims", output_dims)
        self.standardize = Standardize(input_dim) if standardize else None
        self.element_layers = hidden_layers(input_dim, hidden_dims, activation)
        self.set_layers = hidden_layers(hidden_dims[-1] + 1, output_dims, activation)

    def _elements(self, x: Tensor) -> Tensor:
        x = (x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)).to(next(self.parameters()).dtype)
        _check_width(self, x, self.input_dim)
        return x

    def _mask(self, x: Tensor, *inputs: Tensor | None) -> Tensor | None:
        """The mask among the further inputs, if there is one."""
        _check_inputs(self, (x,), 2)
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
