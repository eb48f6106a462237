"""Draws of the local latents from their prior."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_amortized.objective.draws import chunks, draws_plate
from pyro_amortized.objective.log_joint import LocalLogJoint

__all__ = ["prior_draws"]


@torch.no_grad()
def prior_draws(log_joint: LocalLogJoint, num_draws: int) -> Tensor:
    """Draws of the local latents of a call from the prior, flat and unconstrained, of shape ``(K, N, D)``.

    Raises:
        ValueError: If the prior is improper.
    """
    if not log_joint.vectorized:
        return torch.cat([_together(log_joint, 1) for _ in range(num_draws)])
    pieces = chunks(num_draws, log_joint.num_datapoints)
    return torch.cat([_together(log_joint, piece.stop - piece.start) for piece in pieces])


def _together(log_joint: LocalLogJoint, num_draws: int) -> Tensor:
    layout, depth = log_joint.layout, log_joint.structure.depth
    with pyro.validation_enabled(False):
        handlers = [draws_plate(num_draws, depth)] if num_draws > 1 else []
        try:
            nodes: dict[str, Any] = log_joint.call.run(handlers=handlers).nodes
        except NotImplementedError as error:
            raise ValueError(
                f"Cannot draw latents {[*layout.names]} from their prior because it is improper ({error}), so that the "
                "evidence is not defined; try a wide one, Normal(0.0, 100.0)."
            ) from error
    drawn = {site.name: nodes[site.name]["value"] for site in layout.sites}
    if num_draws == 1:
        return layout.flatten(drawn).unsqueeze(0)
    return torch.stack([layout.flatten({name: x[k] for name, x in drawn.items()}) for k in range(num_draws)])
