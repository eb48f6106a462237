"""Whether code lets the values of tensors decide what Python does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ValueReads"]


_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _reads_values(func: Any, args: Any) -> bool:
    """Whether the result of an operator, or its shape, is decided by values outside the graph of tensors."""
    if func.overloadpacket is torch.ops.aten.index:  # only a mask gives a shape that depends on values
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _VALUE_TAGS.isdisjoint(func.tags)


_PYTHON_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class ValueReads:
    """Watches whether code lets the values of tensors decide what Python does.

    Attributes:
        seen: Whether a tensor's value was read.
    """

    def __init__(self) -> None:
        self.seen = False
        self._stack = ExitStack()

    def __enter__(self) -> ValueReads:
        self._stack.enter_context(_PythonReads(self))
        self._stack.enter_context(_OperatorReads(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


class _PythonReads(TorchFunctionMode):
    def __init__(self, watch: ValueReads) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.seen |= func in _PYTHON_READS
        return func(*args, **(kwargs or {}))


class _OperatorReads(TorchDispatchMode):
    def __init__(self, watch: ValueReads) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.seen |= _reads_values(func, args)
        return func(*args, **(kwargs or {}))
