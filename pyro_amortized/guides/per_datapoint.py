"""Classical variational inference: a table of variational parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyro_amortized.checks import check_flag
from pyro_amortized.guides.base import GuideOptions, LocalGuide
from pyro_amortized.guides.checks import check_positions
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.strategies import PerDatapoint
from pyro_amortized.structure.structure import Structure

__all__ = ["PerDatapointGuide"]


class PerDatapointGuide(LocalGuide):
    """Classical variational inference: every datapoint has variational parameters of its own, without an encoder.

    The baseline without amortization gap once trained to convergence. It knows only the datapoints of its table; for
    unseen ones use :class:`AmortizedGuide`.

    Args:
        model: A Pyro model whose datapoint plate has the same full size in every call; subsampling is welcome.
        sparse: Whether gradients of the table hold only the rows of the batch, so that a step's cost does not grow with
            the number of datapoints; needs an optimizer that takes sparse gradients beside dense ones, such as
            ``pyro.optim.Adagrad``. Give the indices with ``pyro.plate(..., subsample=indices)`` then, since Pyro's own
            random subsampling permutes all datapoints.
        **options: ``family``, ``plate``, ``global_guide``, ``create_plates``, ``init_loc_fn``, ``init_scale`` and
            ``name`` as in :class:`AmortizedGuide`.
    """

    def __init__(self, model: Callable[..., Any], *, sparse: bool = False, **options: Unpack[GuideOptions]) -> None:
        if "encoder_input" in options:
            raise ValueError(
                "Cannot use encoder_input with PerDatapointGuide because it has no encoder; try AmortizedGuide."
            )
        check_flag("sparse", sparse)
        super().__init__(model, **options)
        self.sparse = sparse

    @property
    def _needs_inputs(self) -> bool:
        return False

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        frame = structure.datapoints
        check_positions(frame, structure.positions)
        rows = torch.arange(frame.full_size, device=init_loc.device) % len(init_loc)
        return PerDatapoint(self.family.initial(init_loc, self.init_scale)[rows].contiguous(), sparse=self.sparse)
