"""A short run of the fuzzer, and mistakes that it must find."""

from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import pyro
import pytest
import run as fuzz
from checks import CHECKS, chosen
from programs import Program
from structures import Structure, generate
from torch import Tensor

from pyro_amortized.guides.base import LocalGuide
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.plates import PlateFrame

SLOW_GUIDES = ("SemiAmortizedGuide", "IterativeAmortizedGuide")
SLOW_CHECKS = ("refined", "evidence", "gaps", "traced", "gradient", "outside")


def quick(seed: int, count: int) -> list[Structure]:
    """Structures that take a fraction of a second each."""
    found = (generate(seed, number) for number in range(3 * count))
    return [s for s in found if s.guide.kind not in SLOW_GUIDES][:count]


def is_bad(outcome: fuzz.Outcome) -> bool:
    return outcome.result in (fuzz.WRONG, fuzz.FOREIGN)


@pytest.mark.parametrize("seed", range(6))
def test_random_structures(seed: int) -> None:
    """``make fuzz`` runs thousands of them, with all checks and guides."""
    for structure in quick(seed, 8):
        names = [name for name in chosen(structure) if name not in SLOW_CHECKS]
        for outcome in fuzz.outcomes(structure, names):
            assert not is_bad(outcome), f"{outcome.check}: {outcome.message}\n{structure}\n{structure.command}"


def test_structures_follow_from_seed_and_number() -> None:
    assert [generate(1, n) for n in range(50)] == [generate(1, n) for n in range(50)]
    assert len({str(generate(1, n)) for n in range(50)} | {str(generate(2, n)) for n in range(50)}) == 100
    assert generate(3, 417).command == "make fuzz SEED=3 START=417 NUM=1"


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's plate has another size than the model's."""
    right = PlateFrame.create

    def create(self: PlateFrame, indices: Tensor | None = None) -> pyro.plate:
        return right(replace(self, full_size=self.full_size + (self.kind == "explicit")), indices)

    monkeypatch.setattr(PlateFrame, "create", create)


def wrong_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Jacobian of the transforms is forgotten."""
    right = LocalSite.constrain

    def constrain(self: LocalSite, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        value, log_det = right(self, unconstrained)
        return value, 0.0 * log_det

    monkeypatch.setattr(LocalSite, "constrain", constrain)


def wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a datapoint's event and of its inner plates are taken for those of another datapoint."""
    right = LocalLogJoint._evaluate
    monkeypatch.setattr(LocalLogJoint, "_evaluate", lambda self, z, *args: right(self, z.flip(1), *args).flip(1))


def wrong_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no gradient in the model has one where it can be traced."""
    right = Program.detached
    wrong = lambda self, h: h if self.structure.traceable else right(self, h)  # noqa: E731
    monkeypatch.setattr(Program, "detached", wrong)


def stale_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structure of the first call is that of every call."""
    right = LocalGuide._read

    def read(self: LocalGuide, args: Any, kwargs: Any, **options: Any) -> Any:
        call = right(self, args, kwargs, **options)
        call.structure = self.__dict__.setdefault("_first_structure", call.structure)
        return call

    monkeypatch.setattr(LocalGuide, "_read", read)


MISTAKES = {
    wrong_scale: ("elbo", lambda s: s.subsample == "explicit"),
    wrong_jacobian: ("density", lambda s: s.guide.family != "normal" and s.latents[0].prior == "positive"),
    wrong_rows: ("evidence", lambda s: s.has_closed_form and s.subsample == "whole" and s.size > 2),
    wrong_detach: ("traced", lambda s: s.detach == "stop" and len(s.latents) == 1 and s.globals == "none"),
    stale_structure: ("state", lambda s: s.state is not None and s.state[1] == "scale"),
}


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, marks=pytest.mark.slow if m is wrong_detach else (), id=m.__name__) for m in MISTAKES],
)
def test_mistakes_are_found(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, fits = MISTAKES[mistake]
    count = 1 if name == "traced" else 3
    structures = (s for s in map(partial(generate, 0), range(3000)) if fits(s) and CHECKS[name][1](s))
    found = list(islice((s for s in structures if name == "traced" or s.guide.kind not in SLOW_GUIDES), count))
    assert not any(is_bad(o) for s in found for o in fuzz.outcomes(s, [name]))
    mistake(monkeypatch)
    assert any(is_bad(o) for s in found for o in fuzz.outcomes(s, [name]))
