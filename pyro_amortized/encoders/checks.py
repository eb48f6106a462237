"""What encoders refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_flag, check_function, is_traced

__all__ = ["check_heads", "check_inputs", "check_lengths", "check_sizes", "check_width"]


def check_width(module: nn.Module, x: Tensor, input_dim: int) -> None:
    """Raises a ValueError if inputs have another number of features than an encoder was built for."""
    if x.shape[-1] != input_dim:
        raise ValueError(
            f"Cannot encode inputs with {x.shape[-1]} features because this {type(module).__name__} was built for "
            f"{input_dim}; try input_dim={x.shape[-1]}, or bring the data to the shape of the first call."
        )


def check_sizes(input_dim: Any, activation: Any, standardize: Any) -> int:
    """The number of input features, if it is one, after a look at two further options of an encoder."""
    check_function(
        "activation", activation, "the class of an activation, or a function that makes one", "torch.nn.SiLU"
    )
    check_flag("standardize", standardize)
    return check_count("input_dim", input_dim, 1, "x[0].numel()")


def check_inputs(module: nn.Module, inputs: tuple[Any, ...], least_dim: int = 1) -> None:
    """Raises a ValueError unless there are inputs, real tensors of equally many rows."""
    kinds = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
    usable = all(isinstance(x, Tensor) and x.dim() >= least_dim and not x.is_complex() for x in inputs)
    if not inputs or not usable or any(x.shape[0] != inputs[0].shape[0] for x in inputs):  # `len` knows numbers alone
        raise ValueError(
            f"Cannot encode inputs {kinds} by {type(module).__name__} because real tensors of at least "
            f"{least_dim} dimensions are wanted, with a row for each datapoint; try torch.as_tensor(x), and "
            "x.unsqueeze(0) for a single datapoint."
        )


def check_heads(width: int, num_heads: int) -> None:
    """Raises a ValueError unless features can be divided among the heads of an attention."""
    if width % num_heads:
        raise ValueError(
            f"Cannot divide {width} features among {num_heads} heads because they are no divisor; try "
            f"hidden_dims=({num_heads * max(1, width // num_heads)},), or num_heads=1."
        )


def check_lengths(lengths: Tensor, most: int) -> None:
    """Raises a ValueError unless the lengths of sequences are integers from 0 to that of the longest."""
    if is_traced():
        return
    if lengths.dtype == torch.bool or not ((lengths >= 0) & (lengths <= most) & (lengths == lengths.floor())).all():
        raise ValueError(
            f"Cannot read the second input, {tuple(lengths.shape[:1])}, as lengths of sequences because these are "
            f"integers from 0 to {most}, the number of steps; try encoder_input=... with the name of one argument, or "
            "of one and the lengths."
        )
