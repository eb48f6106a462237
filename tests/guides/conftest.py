from typing import Any

import pytest
from torch import Tensor

from pyro_amortized.objective.elbo import LocalObjective


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The noise of every step, in order, as the objective gave it out."""
    given: list[Any] = []
    original = LocalObjective.noise

    def recording(self: LocalObjective, phi: Tensor, num_particles: int, whiten: bool = False) -> Any:
        given.append(original(self, phi, num_particles, whiten))
        return given[-1]

    monkeypatch.setattr(LocalObjective, "noise", recording)
    return given
