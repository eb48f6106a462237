"""Every combination of model structure, guide and ELBO, and the tables of them in the documentation."""

import re
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compatibility import (
    FAMILIES,
    GUIDES,
    LOSSES,
    NESTED,
    TABLE,
    WORKS,
    cell,
    family_outcomes,
    loss_outcome,
    outcome,
    outcomes,
)
from compatible_structures import ELBOS, STRUCTURES, Structure
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_amortized.structure.plates import PlateFrame

TITLES = [structure.title for structure in STRUCTURES]
REFUSALS = (
    "Cannot",
    "Error while packing tensors",
    "Continuous inference cannot",
    "Model and guide shapes disagree",
    "All distributions in the guide must be fully reparameterized",
)


@cache
def found(title: str, Guide: str) -> dict[str, str]:
    return outcomes(STRUCTURES[TITLES.index(title)], Guide)


@cache
def found_loss(title: str, Guide: str) -> str:
    return loss_outcome(title, Guide)


@cache
def documented() -> dict[tuple[str, str], str]:
    """The cells of the documentation's tables by row and column, with the messages in place of their numbers."""
    text = TABLE.read_text()
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    cells, columns = {}, list[str]()
    for line in text.splitlines():
        row = [part.strip() for part in line.strip("|").split(" | ")]
        if line.startswith("| ") and row[0] in ("model", "loss", "family"):
            columns = [name.strip("`") for name in row[1:]]
        elif line.startswith("| ") and set(row[1]) != {"-"}:
            for column, part in zip(columns, row[1:], strict=True):
                cells[row[0], column] = re.sub(r"\[(\d+)\]", lambda match: f"[{notes[match[1]].strip('` ')}]", part)
    return cells


def spelled(by_elbo: dict[str, str]) -> str:
    """A cell as :func:`documented` gives it."""
    notes: list[str] = []
    text = cell(by_elbo, notes)
    return re.sub(r"\[(\d+)\]", lambda match: f"[{notes[int(match[1]) - 1]}]", text)


ALL = [(title, Guide) for title in TITLES for Guide in GUIDES]
FAST = ["AmortizedGuide", "PerDatapointGuide", "DiscreteAmortizedGuide"]
SAMPLE = {(title, "AmortizedGuide") for title in TITLES} | {
    (title, list(GUIDES)[1 + i % (len(GUIDES) - 1)]) for i, title in enumerate(TITLES) if i % 2
}


def sampled(combinations: list[tuple[str, str]], sample: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """A sample of the combinations, in order; slow tests compare the others."""
    return [both for both in combinations if both in sample]


@pytest.mark.thinned
@pytest.mark.parametrize(("title", "Guide"), sampled(ALL, SAMPLE))
def test_every_combination(title: str, Guide: str) -> None:
    """The ELBOs are those that the traces give, or the structure is refused, as the documentation says."""
    for result in found(title, Guide).values():
        assert result.startswith((WORKS, *REFUSALS))
    assert documented()[title, Guide] == spelled(found(title, Guide))


ALL_LOSSES = [(title, Guide) for title in LOSSES for Guide in GUIDES]
SLOW_LOSSES = ("ReweightedWakeSleep", "CSIS")


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("title", "Guide"),
    sampled(ALL_LOSSES, {(t, G) for t, G in ALL_LOSSES if G in FAST or not any(name in t for name in SLOW_LOSSES)}),
)
def test_every_loss(title: str, Guide: str) -> None:
    """The losses are those that the traces give, or refused, as the documentation says."""
    assert documented()[title, Guide] == spelled({"": found_loss(title, Guide)}).removesuffix(" under ``")


ALL_FAMILIES = [(title, family) for title in NESTED for family in FAMILIES]


@cache
def found_family(title: str, family: str) -> dict[str, str]:
    return family_outcomes(title, family)


@pytest.mark.parametrize(
    ("title", "family"),
    sampled(ALL_FAMILIES, {both for i, both in enumerate(ALL_FAMILIES) if i % 9 == 0}),
)
def test_every_family(title: str, family: str) -> None:
    """The ELBOs, and Renyi's bound, are those that the traces give under every family, or the family is refused."""
    assert documented()[title, family] == spelled(found_family(title, family))


REFINING = ("SemiAmortizedGuide", "IterativeAmortizedGuide")
"""Guides that sample as AmortizedGuide does from another phi; of what the sample leaves out a third is tried."""


@pytest.mark.slow
@pytest.mark.parametrize("Guide", GUIDES)
def test_the_other_combinations(Guide: str) -> None:
    """If this fails, look at the difference and then run ``python tests/compatibility.py --write``."""
    titles = [title for title in TITLES if (title, Guide) not in SAMPLE]
    for title in titles[:: 3 if Guide in REFINING else 1]:
        assert documented()[title, Guide] == spelled(found(title, Guide)), title
    for title in LOSSES if Guide not in FAST else ():
        if any(name in title for name in SLOW_LOSSES):
            assert documented()[title, Guide] == spelled({"": found_loss(title, Guide)}).removesuffix(" under ``"), (
                title
            )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_the_other_families(part: int) -> None:
    for title, family in [both for i, both in enumerate(ALL_FAMILIES) if i % 9][part::2]:
        assert documented()[title, family] == spelled(found_family(title, family)), (title, family)


def test_the_tables_hold_every_combination() -> None:
    assert list(documented()) == ALL + ALL_LOSSES + ALL_FAMILIES
    assert len(set(TITLES)) == len(TITLES)


def test_every_elbo_is_tried() -> None:
    assert all(structure.elbos == list(ELBOS) or structure.enumerated for structure in STRUCTURES)


def plain(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def batches() -> Any:
    x = torch.randn(5)
    return (x, torch.tensor([0, 3])), (x, torch.tensor([4]))


@pytest.mark.parametrize(
    ("Guide", "Elbo"),
    [
        *(("AmortizedGuide", Elbo) for Elbo in ELBOS if Elbo != "RenyiELBO"),
        ("IterativeAmortizedGuide", "Trace_ELBO"),
    ],
)
def test_a_wrong_scale_is_found(Guide: str, Elbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide whose plate is not subsampled counts each datapoint once, the model N/B times."""
    monkeypatch.setattr(PlateFrame, "create", lambda self, indices=None: pyro.plate(self.name, self.size, dim=self.dim))
    with pytest.raises(AssertionError, match="the ELBO is .* and should be"):
        outcome(Structure("plain", plain, batches), Guide, Elbo)


def coins(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


PLAIN = Structure("plain", plain, batches)
COINS = Structure("coins", coins, lambda: ((torch.randn(5),), (torch.randn(4),)), drawn="k")


@pytest.mark.parametrize(
    ("structure", "Guide", "Elbo"),
    [*((PLAIN, "AmortizedGuide", Elbo) for Elbo in ELBOS), (COINS, "DiscreteAmortizedGuide", "TraceEnum_ELBO")],
)
def test_a_wrong_elbo_is_found(structure: Structure, Guide: str, Elbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ELBO whose value is off by a factor is no match for the sum over the traces."""
    assert outcome(structure, Guide, Elbo) == WORKS
    right = ELBOS[Elbo]
    kind = right.func if isinstance(right, partial) else right

    class Wrong(kind):  # type: ignore[misc, valid-type]
        def loss(self, *args: Any, **kwargs: Any) -> float:
            return 1.001 * super().loss(*args, **kwargs)

    options = right.keywords if isinstance(right, partial) else {}
    monkeypatch.setitem(ELBOS, Elbo, partial(Wrong, **options))
    with pytest.raises(AssertionError, match="the ELBO is .* and should be"):
        outcome(structure, Guide, Elbo)


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Trace_ELBO.loss
    monkeypatch.setattr(Trace_ELBO, "loss", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    with pytest.raises(AssertionError, match="the ELBO is .* and should be"):
        loss_outcome("`Trace_ELBO(num_particles=3)`", "AmortizedGuide")
