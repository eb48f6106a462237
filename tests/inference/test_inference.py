from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_amortized.families import Normal
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.strategies import Encoded, PerDatapoint


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.layer(x).chunk(2, -1)
        return loc, raw.exp()


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_encoded_is_head_after_encoder() -> None:
    encoder, head, x = nn.Linear(3, 5), nn.Linear(5, 4), torch.randn(7, 3)
    strategy = Encoded(encoder, head)
    assert strategy.needs_inputs
    assert torch.equal(strategy((x,), None), head(encoder(x)))
    assert torch.equal(strategy((x,), torch.tensor([5] * 7)), head(encoder(x)))
    assert {name.split(".")[0] for name, _ in strategy.named_parameters()} == {"encoder", "head"}


def test_encoded_passes_several_inputs() -> None:
    x, y = torch.randn(2, 7, 3)
    assert torch.equal(Encoded(Sum(), nn.Identity())((x, y), None), x + y)


def test_encoded_pair_is_location_and_scale() -> None:
    encoder, x = Pair(), torch.randn(7, 3)
    phi = Encoded(encoder, None)((x,), None)
    loc, scale = encoder(x)
    q = Normal(2)(phi)
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, scale)
    phi.sum().backward()
    assert encoder.layer.weight.grad.abs().sum() > 0


INDICES: dict[str, Tensor | None] = {
    "all": None,
    "rows": torch.tensor([4, 0, 2]),
    "repeated": torch.tensor([3, 3, 1]),
    "one": torch.tensor([5]),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_sparse_and_dense_tables_agree(index: Tensor | None) -> None:
    table = torch.randn(6, 4)
    dense, sparse = PerDatapoint(table.clone()), PerDatapoint(table.clone(), sparse=True)
    phis = [strategy((), index) for strategy in (dense, sparse)]
    assert torch.equal(*phis)
    assert torch.equal(phis[0], table if index is None else table[index])
    for phi in phis:
        phi.pow(3).sum().backward()
    gradient = sparse.table.grad
    assert not dense.table.grad.is_sparse
    assert gradient.is_sparse
    torch.testing.assert_close(gradient.to_dense(), dense.table.grad)
    rows = gradient.coalesce().indices().squeeze(0)
    assert torch.equal(rows, torch.arange(6) if index is None else index.unique())


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_moves_only_the_rows_looked_up(sparse: bool) -> None:
    strategy = PerDatapoint(torch.ones(6, 4), sparse=sparse)
    assert not strategy.needs_inputs
    index = torch.tensor([4, 1])
    strategy((), index).sum().backward()
    torch.optim.SGD(strategy.parameters(), lr=0.5).step()
    moved = (strategy.table.detach() != 1).any(-1)
    assert torch.equal(moved.nonzero().squeeze(-1), index.sort().values)


@pytest.mark.parametrize("sparse", [False, True])
def test_table_is_the_only_state(sparse: bool) -> None:
    strategy = PerDatapoint(torch.randn(6, 4), sparse=sparse)
    other = PerDatapoint(torch.zeros(6, 4), sparse=sparse)
    assert list(strategy.state_dict()) == ["rows.weight"]
    other.load_state_dict(strategy.state_dict())
    assert torch.equal(other((), None), strategy((), None))


@pytest.mark.parametrize(
    "strategy", [lambda: Encoded(nn.Identity(), nn.Identity()), lambda: PerDatapoint(torch.zeros(3, 2))]
)
def test_objective_is_left_alone(strategy: Callable[[], InferenceStrategy]) -> None:
    def objective(phi: Tensor) -> Tensor:
        raise AssertionError("nothing to refine")

    assert strategy()((torch.zeros(3, 2),), None, objective).shape == (3, 2)
