"""L-BFGS by rows, against SciPy and against functions made to be awkward."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import optimize
from torch import Tensor

from pyro_amortized.diagnostics.optimum.lbfgs import Minimum, minimize_rows

Values = Callable[[Tensor, Tensor], Tensor]
"""(points ``(n, P)``, rows ``(n,)``) -> values ``(n,)``."""


class Function:
    """Values of rows with their gradients, and what was evaluated."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.rows: list[Tensor] = []

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert len(x) == len(rows)
        self.rows.append(rows.clone())
        x = x.detach().clone().requires_grad_()
        value = self.values(x, rows)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    def gradient(self, x: Tensor) -> Tensor:
        return self(x, torch.arange(len(x)))[1]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratics(conditions: list[float], dim: int) -> tuple[Function, Tensor]:
    """One convex quadratic per row with the given condition numbers and minimum 0, and its minimisers."""
    rotation = torch.linalg.qr(randn(len(conditions), dim, dim, seed=1)).Q
    spectrum = torch.stack([torch.logspace(0, math.log10(c), dim, dtype=torch.float64) for c in conditions])
    matrix = rotation * spectrum.unsqueeze(-2) @ rotation.mT
    minimiser = randn(len(conditions), dim, seed=2)

    def values(x: Tensor, rows: Tensor) -> Tensor:
        off = x - minimiser[rows]
        return 0.5 * torch.einsum("ni,nij,nj->n", off, matrix[rows], off)

    return Function(values), minimiser


def rosenbrock(x: Tensor, rows: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1].square()).square() + (1 - x[:, :-1]).square()).sum(-1)


def scipy_minimum(function: Function, x: Tensor, row: int) -> optimize.OptimizeResult:
    def single(point: object) -> tuple[float, object]:
        value, gradient = function(torch.as_tensor(point).unsqueeze(0), torch.tensor([row]))
        return float(value), gradient.squeeze(0).numpy()

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9}
    return optimize.minimize(single, x[row].numpy(), jac=True, method="L-BFGS-B", options=options)


CONDITIONS = [1.0, 10.0, 100.0, 1e3, 1e4]


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_quadratics(dim: int) -> None:
    function, minimiser = quadratics(CONDITIONS, dim)
    found = minimize_rows(function, 3 * randn(5, dim), tolerance=1e-12, max_steps=1000)
    assert found.converged.all()
    assert (found.value < 1e-8).all()
    # From the value and the smallest curvature, which is 1.
    assert ((found.x - minimiser).norm(dim=-1) < math.sqrt(2e-8)).all()


def test_default_tolerance_on_quadratics() -> None:
    """What is left at the end is of the size of the tolerance times the square root of the condition number."""
    conditions = CONDITIONS * 40
    function, _ = quadratics(conditions, 10)
    found = minimize_rows(function, 3 * randn(200, 10), max_steps=1000)
    assert found.converged.all()
    assert (found.value < 1e-4 * 10 * torch.tensor(conditions).sqrt()).all()


def test_as_good_as_scipy_on_quadratics() -> None:
    function, _ = quadratics(CONDITIONS, 8)
    start = 3 * randn(5, 8)
    found = minimize_rows(function, start, tolerance=1e-12, max_steps=1000)
    for row in range(5):
        expected = scipy_minimum(function, start, row)
        assert float(found.value[row]) < expected.fun + 1e-8
        assert found.num_steps[row] < 2 * expected.nit + 10


@pytest.mark.parametrize("dim", [2, 4])
def test_as_good_as_scipy_on_rosenbrock(dim: int) -> None:
    function, start = Function(rosenbrock), 1.0 + randn(12, dim)
    found = minimize_rows(function, start, tolerance=1e-12, max_steps=500)
    assert found.converged.all()
    assert (function.gradient(found.x).norm(dim=-1) < 1e-3).all()
    for row in range(12):
        expected = scipy_minimum(function, start, row)
        local = float(found.value[row]) > 1.0  # from 4 dimensions on there is another minimum
        assert local or float(found.value[row]) < expected.fun + 1e-8
        assert found.num_steps[row] < 3 * expected.nit + 10
    assert (found.value < 1e-8).double().mean() > 0.7


def test_start_is_left_alone() -> None:
    start = randn(3, 2)
    before = start.clone()
    minimize_rows(Function(rosenbrock), start)
    assert torch.equal(start, before)


def test_rows_do_not_depend_on_each_other() -> None:
    function, _ = quadratics(CONDITIONS, 6)
    start = 3 * randn(5, 6)
    together = minimize_rows(function, start)
    for row in range(5):
        alone = minimize_rows(lambda x, rows, row=row: function(x, rows + row), start[row : row + 1])
        torch.testing.assert_close(alone.x[0], together.x[row], rtol=1e-6, atol=1e-6)
        assert alone.num_steps[0] == together.num_steps[row]
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = minimize_rows(lambda x, rows: function(x, order[rows]), start[order])
    torch.testing.assert_close(shuffled.x, together.x[order], rtol=1e-6, atol=1e-6)


def test_finished_rows_are_not_evaluated() -> None:
    function, _ = quadratics(CONDITIONS, 6)
    reports: list[int] = []
    found = minimize_rows(function, 3 * randn(5, 6), on_step=reports.append)
    last = torch.tensor([max(i for i, rows in enumerate(function.rows) if row in rows) for row in range(5)])
    first_reports = torch.tensor([(found.num_steps <= step).sum() for step in range(1, len(reports) + 1)])
    assert reports == first_reports.tolist()
    assert reports[-1] == 5
    assert len(set(found.num_steps.tolist())) > 2
    assert torch.equal(last[found.num_steps.argsort()], last.sort().values)
    assert all((rows.unique(return_counts=True)[1] == 1).all() for rows in function.rows)


# Awkward functions

BARRIERS: dict[str, tuple[Values, float, list[float]]] = {
    "nan left of zero": (lambda x, rows: (x - x.log()).sum(-1), 1.0, [1e-4, 0.5, 3.0, 200.0]),
    "overflow": (lambda x, rows: (x.square().exp() - 3 * x).sum(-1), 0.79600183, [-10.0, -1.0, 5.0, 8.0]),
    "infinite": (lambda x, rows: torch.where(x < 2, (x - 1).square(), math.inf).sum(-1), 1.0, [-50.0, 0.0, 1.99]),
    "nan gradient": (
        lambda x, rows: (x.abs().sqrt() * x.square() - x.clamp(min=0).sqrt()).sum(-1),
        0.2**0.5,
        [0.01, 2.0],
    ),
}


@pytest.mark.parametrize(("values", "minimiser", "starts"), BARRIERS.values(), ids=BARRIERS)
def test_trial_points_that_are_not_finite(values: Values, minimiser: float, starts: list[float]) -> None:
    function = Function(values)
    start = torch.tensor(starts, dtype=torch.float64).unsqueeze(-1)
    found = minimize_rows(function, start, tolerance=1e-12)
    assert found.converged.all()
    torch.testing.assert_close(found.x, torch.full_like(start, minimiser), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.value, function(found.x, torch.arange(len(start)))[0])


def test_a_row_that_starts_at_its_optimum() -> None:
    function, minimiser = quadratics(CONDITIONS, 6)
    start = torch.cat([minimiser[:2], 3 * randn(3, 6)])
    found = minimize_rows(function, start)
    assert found.converged.all()
    assert torch.equal(found.x[:2], start[:2])
    assert found.num_steps[:2].tolist() == [2, 2]
    assert (found.num_steps[2:] > 2).all()


def test_rows_cut_short_have_not_converged() -> None:
    start = torch.cat([torch.ones(1, 4, dtype=torch.float64), 2 + randn(3, 4)])
    found = minimize_rows(Function(rosenbrock), start, max_steps=4)
    assert found.converged.tolist() == [True, False, False, False]
    assert found.num_steps.tolist() == [2, 4, 4, 4]
    assert (found.value < rosenbrock(start, torch.arange(4))).tolist() == [False, True, True, True]


def test_no_steps_at_all() -> None:
    start = randn(3, 2)
    found = minimize_rows(Function(rosenbrock), start, max_steps=0)
    assert torch.equal(found.x, start)
    assert not found.converged.any()


def nowhere_finite(x: Tensor, rows: Tensor) -> Tensor:
    return (x + math.nan).sum(-1)


def finite_only_at_the_start(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where((x == 1.0).all(-1), x.sum(-1), x.sum(-1) + math.nan)


@pytest.mark.parametrize("values", [nowhere_finite, finite_only_at_the_start])
def test_a_row_that_cannot_move_has_not_converged(values: Values) -> None:
    def mixed(x: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows == 0, values(x, rows), (x - 3).square().sum(-1))

    found: Minimum = minimize_rows(Function(mixed), torch.ones(2, 3, dtype=torch.float64))
    assert found.converged.tolist() == [False, True]
    torch.testing.assert_close(found.x[1], torch.full_like(found.x[1], 3.0))
    assert torch.equal(found.x[0], torch.ones_like(found.x[0]))


def test_flat_and_unbounded_rows() -> None:
    def values(x: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows == 0, 0.0 * x.sum(-1), x.sum(-1))

    found = minimize_rows(Function(values), torch.ones(2, 2, dtype=torch.float64), max_steps=20)
    assert found.converged.tolist() == [True, False]


def test_single_precision() -> None:
    function = Function(rosenbrock)
    found = minimize_rows(function, 1.0 + randn(6, 2).float(), tolerance=1e-7)
    assert found.x.dtype == torch.float32
    assert (found.value < 1e-4).all()


@pytest.mark.parametrize("unit", [1e-6, 1e6, 1e12])
def test_units_of_the_function_do_not_matter(unit: float) -> None:
    """As in a model whose latents are known to within 1e-6 of a unit, where curvatures are of the order of 1e12."""
    function, _ = quadratics(CONDITIONS, 6)
    scaled = Function(lambda x, rows: unit * function.values(x, rows))
    found = minimize_rows(scaled, 3 * randn(5, 6), tolerance=1e-12 * unit, max_steps=1000)
    assert found.converged.all()
    assert (found.value < 1e-8 * unit).all()
