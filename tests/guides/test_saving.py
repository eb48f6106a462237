"""Guides that are saved, loaded and copied."""

import copy
import io
import pickle
from itertools import product
from typing import Any

import pyro
import pytest
import torch
from models import counts, topics
from plain_guides import FAMILIES, X, normals, regression, svi
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide


def saved(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def trained(Guide: Any, family: str, x: Tensor) -> Any:
    guide = Guide(topics, family=family)
    steps = svi(topics, guide, lr=0.002)
    for _ in range(3):
        steps.step(x)
    return guide


def assert_same(guide: Any, other: Any, x: Tensor) -> None:
    for call in (lambda g: g.median(x), lambda g: g.quantiles([0.1, 0.9], x)):
        mine, theirs = call(guide), call(other)
        assert mine.keys() == theirs.keys() == {"rate", "size", "share"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert list(guide.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize(("Guide", "family"), [*product([AmortizedGuide], FAMILIES), (PerDatapointGuide, "normal")])
@pytest.mark.parametrize("setup", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dict(Guide: Any, family: str, setup: bool, nested: bool) -> None:
    x = counts(12)
    guide = trained(Guide, family, x)
    other = Guide(topics, family=family)
    if setup:
        other.setup(x)
    source, target = (nn.ModuleDict({"guide": g}) if nested else g for g in (guide, other))
    result = target.load_state_dict(saved(source.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(guide, other, x)


@pytest.mark.parametrize("Guide", [AmortizedGuide, SemiAmortizedGuide, IterativeAmortizedGuide])
@pytest.mark.parametrize("first", ["eval", "load"])
def test_a_loaded_guide_in_evaluation_mode_answers_in_it(Guide: Any, first: str) -> None:
    """Its encoder is built by the first call."""

    def make() -> Any:
        layers = [
            nn.Unflatten(0, (-1, 1)),
            nn.Linear(1, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(8, 4),
        ]
        return Guide(normals, nn.Sequential(*layers))

    guide, other = make(), make()
    for _ in range(5):
        guide(torch.randn(16))
    state = guide.eval().state_dict()
    calls = [other.eval, lambda: other.load_state_dict(state)]
    for call in calls if first == "eval" else reversed(calls):
        call()
    with guide.repeatable(), other.repeatable():
        torch.testing.assert_close(other.median(X), guide.median(X), rtol=1e-3, atol=1e-3)
        assert other.median(X[:1])["z"].shape == (1,)  # too few for batch statistics
    buffers = {name: value for name, value in other.state_dict().items() if "running" in name}
    assert buffers
    assert all(torch.equal(value, state[name]) for name, value in buffers.items())
    assert not any(module.training for module in other.modules())


def test_wrong_state_dict_is_refused() -> None:
    x = counts(12)
    state = trained(AmortizedGuide, "normal", x).state_dict()
    for setup in (False, True):
        other = AmortizedGuide(topics, family="multivariate_normal")
        calls = [lambda other=other: other.load_state_dict(state), lambda other=other: other.setup(x)]
        first, second = reversed(calls) if setup else calls
        first()
        with pytest.raises(ValueError, match="that of another guide: .*of other shapes are"):
            second()


@pytest.mark.parametrize(("Guide", "family"), [*product([AmortizedGuide], FAMILIES), (PerDatapointGuide, "normal")])
@pytest.mark.parametrize(
    "duplicate", [lambda g: saved(g, weights_only=False), lambda g: pickle.loads(pickle.dumps(g)), copy.deepcopy]
)
def test_whole_guide_is_saved_and_copied(Guide: Any, family: str, duplicate: Any) -> None:
    x = counts(12)
    guide = trained(Guide, family, x)
    other = duplicate(guide)
    if duplicate is not copy.deepcopy:
        with pytest.raises(ValueError, match="guide.model = model"):
            other.median(x)
        other.model = topics
    assert_same(guide, other, x)
    before = {name: value.clone() for name, value in other.median(x).items()}
    steps = svi(topics, guide, lr=0.002)
    assert all(torch.tensor(steps.step(x)).isfinite() for _ in range(2))  # the original goes on, on its own
    assert all(torch.equal(value, other.median(x)[name]) for name, value in before.items())
    assert not torch.equal(guide.median(x)["size"], before["size"])
    new = torch.cat([x, counts(5)])
    pyro.clear_param_store()
    steps = svi(topics, other, lr=0.002)
    steps.step(x)
    assert other.median(x)["rate"].shape == (3,)
    if Guide is AmortizedGuide:
        assert torch.tensor(steps.step(new)).isfinite()
        assert other.median(new)["size"].shape == (17,)


def test_a_copy_of_a_guide_that_knows_a_structure_goes_on() -> None:
    guide = AmortizedGuide(normals, encoder_input="x")
    guide.setup(torch.randn(3))
    copied = copy.deepcopy(guide)
    for _ in range(3):
        copied(torch.randn(3))


def test_a_failed_load_leaves_a_guide_that_is_not_set_up() -> None:
    class Plain(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, 1))

    class Extra(Plain):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    x, y = torch.randn(2, 10)
    saved = AmortizedGuide(regression, Extra())
    saved.setup(x, y)
    guide = AmortizedGuide(regression, Plain(), name="other")
    guide.load_state_dict(saved.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="extra_state"):
            guide(x, y)
    assert "not set up yet" in repr(guide)
    assert "not set up yet" in guide._repr_html_()
