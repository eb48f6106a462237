"""The state of the random number generators, in a form that any checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["generator_state", "restore_generators"]


def generator_state() -> dict[str, Any]:
    """The states of the generators of torch, on every device, of NumPy and of Python: tensors, numbers and tuples."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))  # which processes can send to each other
    return {
        "torch": torch.get_rng_state(),
        "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": key},
        },
        "python": random.getstate(),
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Puts generators back into the states that :func:`generator_state` returned; devices as far as there are any."""
    torch.set_rng_state(state["torch"].cpu())
    for device, of_device in enumerate(state["devices"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(of_device.cpu(), device)
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
