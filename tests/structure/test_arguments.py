"""Where the datapoints lie among a model's arguments is found by numbers, whatever sizes coincide."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, MLPEncoder, PerDatapointGuide, estimate_gaps, log_evidence, to_arviz
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.arguments import Arguments
from pyro_amortized.structure.influence import DatapointAxes

pytestmark = pytest.mark.usefixtures("_float64")


def log_joint_of(model: Callable[..., Any], *args: Any, **kwargs: Any) -> LocalLogJoint:
    pyro.clear_param_store()
    return bind(model, PerDatapointGuide(model), args, kwargs, 0).objective.log_joint


def check_selections(
    log_joint: LocalLogJoint, expected: Callable[[Tensor], Tensor], *, cut: bool | None = True
) -> None:
    """All numbers of rows, some selections of each, against a formula; arguments are to be cut, are not, or may."""
    rng, size = torch.Generator().manual_seed(1), log_joint.num_datapoints
    z = torch.randn(2, size, log_joint.layout.latent_dim, generator=rng)
    right = expected(z)
    for number in range(1, size + 3):
        for _ in range(2):
            rows = torch.randint(size, (number,), generator=rng)
            part = log_joint.select(rows)
            assert cut is None or (part is not None) == (cut and size > 1), number
            assert torch.allclose(log_joint.on_rows(rows)(z[:, rows]), right[:, rows], atol=1e-9)
            assert torch.allclose(log_joint.on_rows(rows, plain=True)(z[:, rows]), right[:, rows], atol=1e-9)


# Any layout of the arguments


class Pair(NamedTuple):
    """A container."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Layout:
    """How the arguments of a model are laid out; all sizes may equal N."""

    size: int
    replicates: int
    axis: int
    container: str
    shared: tuple[str, ...]
    passed_twice: bool
    as_array: bool


def layouts() -> st.SearchStrategy[Layout]:
    size = st.sampled_from((1, 2, 3, 5))
    shared = st.lists(st.sampled_from(("table", "matrix", "scale", "unused", "scalar", "mask")), unique=True)
    return st.builds(
        Layout,
        size,
        st.sampled_from((1, 2, 3, 5)),
        st.sampled_from((0, 1, 2)),
        st.sampled_from(("plain", "list", "tuple", "dict", "namedtuple", "nested")),
        shared.map(tuple),
        st.booleans(),
        st.booleans(),
    )


class Laid:
    """A conjugate-like model of data ``(N, R, 2)``, stored with the datapoints along any axis."""

    def __init__(self, layout: Layout) -> None:
        self.layout, rng = layout, torch.Generator().manual_seed(layout.size * 31 + layout.replicates)
        n, r = layout.size, layout.replicates
        self.x = torch.randn(n, r, 2, generator=rng)
        self.table = torch.randn(n, generator=rng)  # as many groups as datapoints
        self.ids = torch.randint(n, (n,), generator=rng)
        self.matrix = torch.randn(r, r, generator=rng)
        self.scale = torch.ones(n)  # of which the model reads the first alone
        self.scale[-1] = 2.0
        self.mask = torch.rand(n, generator=rng) < 0.7

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        x = self.x.movedim(0, self.layout.axis)
        data: Any = x.numpy() if self.layout.as_array else x.contiguous()
        extra = {name: getattr(self, name) for name in ("table", "ids", "matrix", "scale", "mask")}
        extra |= {"unused": torch.zeros(self.layout.size, self.layout.size), "scalar": torch.tensor(0.5)}
        used = [*self.layout.shared, *(("ids",) if "table" in self.layout.shared else ())]
        extra = {name: extra[name] for name in used}
        again = data if self.layout.passed_twice else None
        packed = {
            "plain": data,
            "list": [data, again],
            "tuple": (data, again),
            "dict": {"x": data, "again": again},
            "namedtuple": Pair(data, again),
            "nested": {"x": [(data,), again]},
        }[self.layout.container]
        return packed, extra

    def model(self, packed: Any, extra: dict[str, Any]) -> None:
        data = packed
        while not isinstance(data, Tensor | np.ndarray):
            data = next(iter(data.values())) if isinstance(data, dict) else data[0]
        x = torch.as_tensor(data).movedim(self.layout.axis, 0)
        loc, scale = self.loc(extra), self.sd(extra)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mask = extra["mask"].unsqueeze(-1) if "mask" in extra else True
            with pyro.plate("replicates", x.shape[1], dim=-1):
                mean = torch.broadcast_tensors(z + loc.unsqueeze(-1), z * self.row(extra, x.shape[1]))
                pyro.sample("x", dist.Normal(torch.stack(mean, -1), scale).to_event(1).mask(mask), obs=x)

    def loc(self, extra: dict[str, Any]) -> Tensor:
        loc = extra["table"][extra["ids"]] if "table" in extra else torch.zeros(1)
        return loc + extra.get("scalar", 0.0)

    def row(self, extra: dict[str, Any], replicates: int) -> Tensor:
        return extra["matrix"].sum(0) if "matrix" in extra else torch.ones(replicates)

    def sd(self, extra: dict[str, Any]) -> Any:
        return extra["scale"][0] if "scale" in extra else 1.0

    def log_joint(self, z: Tensor) -> Tensor:
        """By hand, ``(K, N)``, without a look at the arguments' layout."""
        extra = self.arguments()[1]
        mean = torch.broadcast_tensors(z + self.loc(extra).unsqueeze(-1), z * self.row(extra, self.layout.replicates))
        terms = dist.Normal(torch.stack(mean, -1), self.sd(extra)).log_prob(self.x).sum((-1, -2))
        present = self.mask if "mask" in extra else torch.ones(self.layout.size, dtype=torch.bool)
        return dist.Normal(0.0, 1.0).log_prob(z).squeeze(-1) + torch.where(present, terms, 0.0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts())
def test_every_layout_is_cut_rightly(layout: Layout) -> None:
    laid = Laid(layout)
    hidden = "mask" in layout.shared and not laid.mask.all()  # then too little may be seen of what matters to whom
    check_selections(log_joint_of(laid.model, *laid.arguments()), laid.log_joint, cut=None if hidden else True)


# Particular calls


def scaled(x: Tensor, by: str) -> None:
    """Every datapoint depends on all of them."""
    x = x / x.max() if by == "max" else x - x.mean() if by == "mean" else x / len(x)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("by", ["max", "mean", "number"])
def test_data_that_depend_on_each_other_are_not_cut(by: str) -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 5.0])
    scaled_x = {"max": x / 5, "mean": x - 2, "number": x / 4}[by]
    log_joint = log_joint_of(scaled, x, by)
    check_selections(
        log_joint,
        lambda z: (dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(scaled_x[:, None])).squeeze(-1),
        cut=False,
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("beside", ["all", "batch", "both"])
def test_indices_of_a_subsample_as_an_argument(order: list[int], beside: str) -> None:
    """As many indices as datapoints, so that nothing tells the data of all from those of the batch but numbers."""
    full, index = torch.tensor([0.0, 2.0, -1.0, 4.0]), torch.tensor(order)

    def model(x: Tensor, index: Tensor, covariate: Tensor) -> None:
        with pyro.plate("data", 4, subsample=index) as i:
            z = pyro.sample("z", dist.Normal(covariate if beside == "both" else 0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if beside == "batch" else x[i])

    x = full[index] if beside == "batch" else full
    covariate = torch.tensor([3.0, 1.0, 0.0, -2.0])

    def expected(z: Tensor) -> Tensor:
        prior = dist.Normal(covariate[:, None] if beside == "both" else 0.0, 1.0).log_prob(z)
        return (prior + dist.Normal(z, 1.0).log_prob(full[index][:, None])).squeeze(-1)

    check_selections(log_joint_of(model, x, index, covariate), expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_arguments(layout: torch.layout) -> None:
    x = torch.eye(3) * torch.tensor([1.0, 2.0, 4.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 3]).to_event(1), obs=x.to_dense())

    log_joint = log_joint_of(model, x.to_sparse(layout=layout))
    check_selections(
        log_joint, lambda z: dist.Normal(0.0, 1.0).log_prob(z).squeeze(-1) + dist.Normal(z, 1.0).log_prob(x).sum(-1)
    )


def poisson_factors(x: Tensor, weights: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weights, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(("size", "features_first"), [(2, True), (5, False)])
def test_evidence_beside_weights_as_long_as_the_data(size: int, features_first: bool) -> None:
    """Exact evidence, where weights ``(2, N)`` and data ``(N, N)`` have no axis of another length but the latents'."""
    weights, x = torch.randn(2, size), torch.randn(size, size)
    x[0] += 4.0

    def model(x: Tensor, weights: Tensor) -> None:
        poisson_factors(x.T if features_first else x, weights)

    guide = AmortizedGuide(model, family="multivariate_normal")
    arguments = (x.T.contiguous() if features_first else x, weights)
    guide.setup(*arguments)
    covariance = torch.eye(size) + weights.T @ weights
    exact = dist.MultivariateNormal(torch.zeros(size), covariance).log_prob(x).numpy()
    gaps = estimate_gaps(model, guide, arguments).dataset
    assert np.abs(gaps["log_evidence"] - exact).max() < 0.01
    assert gaps["approximation_gap"].max() < 0.01


# How they are found


def counted(size: int, leaves: int, shared: int) -> tuple[DatapointAxes, list[int]]:
    """Axes among data leaves and shared ones, all as long as there are datapoints, and the evaluations so far."""
    calls: list[int] = []
    data = torch.randn(leaves, size)
    weights = torch.rand(shared, size) + 1

    def evaluate(call: Any, rows: Tensor) -> Tensor:
        calls.append(len(rows))
        (*data, weights), _ = call
        return sum(data, torch.zeros(len(rows))) * math.prod(float(w.sum()) for w in weights)

    return DatapointAxes(Arguments((*data, list(weights)), {}), size, evaluate), calls


@pytest.mark.parametrize(("leaves", "shared", "most"), [(1, 0, 4), (40, 0, 4), (40, 1, 24)])
def test_finding_takes_few_runs(leaves: int, shared: int, most: int) -> None:
    axes, calls = counted(8, leaves, shared)
    assert axes.serves(torch.arange(3))
    assert len(calls) <= most + 1
    assert axes.serves(torch.tensor([7, 1, 1]))
    assert axes.serves(torch.arange(4))
    assert len(calls) <= most + 2
    (*data, weights), _ = axes.take(torch.tensor([7, 1]))
    assert {len(x) for x in data} == {2}
    assert {len(x) for x in weights} <= {8}


def test_each_number_of_rows_is_verified() -> None:
    """A model that squeezes a single row away is right on any other number."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])

    def evaluate(call: Any, rows: Tensor) -> Tensor:
        return call[0][0].squeeze().sum(-1).reshape(-1).expand(len(rows)) + (1.0 if len(rows) == 1 else 0.0)

    axes = DatapointAxes(Arguments((x,), {}), 3, evaluate)
    assert [axes.serves(torch.arange(number)) for number in (2, 1, 3)] == [True, False, True]


# What an encoder sees of a named argument


class Seen(nn.Module):
    """An encoder of anything, that keeps what it saw."""

    def forward(self, *inputs: Tensor) -> Tensor:
        self.inputs = inputs
        return torch.zeros(2, 1)


def factors(x: Tensor, loadings: Tensor, index: Tensor, notes: Tensor | None = None) -> None:
    with pyro.plate("data", 4, subsample=index) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings[:2], 1.0).to_event(1), obs=x if len(x) == len(i) else x[i])


@pytest.mark.parametrize("index", [[0, 1], [3, 1], [1], [3, 0, 1, 2]])
def test_encoder_sees_shared_arguments_whole(index: list[int]) -> None:
    """Loadings ``(4, 3)`` beside data of 4 datapoints are those of the model, not of the datapoints."""
    x, loadings, rows = torch.randn(4, 3), torch.randn(4, 3), torch.tensor(index)
    seen = Seen()
    guide = AmortizedGuide(factors, seen, encoder_input=["x", "loadings"])
    with contextlib.suppress(RuntimeError, ValueError):  # what the encoder returns is no matter
        guide(x, loadings, rows)
    assert torch.equal(seen.inputs[1], loadings)
    if len(index) < 4:
        assert torch.equal(seen.inputs[0], x[rows])


def covered(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def batch_in_order(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(("model", "whole"), [(covered, True), (batch_in_order, False)])
def test_all_indices_in_another_order(model: Callable[..., Any], whole: bool) -> None:
    x, index, seen = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 1]), Seen()
    guide = AmortizedGuide(model, seen, encoder_input="x")
    with contextlib.suppress(RuntimeError, ValueError):
        guide(x, index)
    assert torch.equal(seen.inputs[0], x[index] if whole else x)


def test_an_argument_without_influence_is_refused_with_a_remedy() -> None:
    x, loadings, notes = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 5)
    arguments = (x, loadings, torch.tensor([2, 0]), notes)
    with pytest.raises(ValueError, match="whether argument 'notes' holds the data of all datapoints") as error:
        AmortizedGuide(factors, encoder_input="notes")(*arguments)
    remedy = str(error.value).split("encoder_input=")[1].rstrip(".")
    guide = AmortizedGuide(factors, MLPEncoder(5, [4]), encoder_input=eval(remedy, {"pyro": pyro}), name="mended")
    guide(*arguments)
    assert guide.variational_parameters(*arguments).shape[0] == 2


# Data in place of indices


def given_data(x: Tensor, size: int) -> None:
    """As in pyro.contrib.cevae."""
    with pyro.plate("data", size, subsample=x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)


@pytest.mark.parametrize("size", [3, 9])
def test_a_plate_that_is_given_data_for_indices(size: int) -> None:
    x = torch.randn(3, 2)
    exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0).log_prob(x).numpy()
    evidence = log_evidence(given_data, AmortizedGuide(given_data), (x, size))
    assert evidence["data"].values.tolist() == [0, 1, 2]
    assert np.abs(evidence["log_evidence"] - exact).max() < 0.01
    if size == 3:
        table = PerDatapointGuide(given_data, name="table")
        assert table.median(x, size)["z"].shape == (3,)
        with pytest.raises(ValueError, match="plate 'data' is given data in place of indices.*create_plates"):
            table(x[:2], size)
    else:
        with pytest.raises(ValueError, match="plate 'data' is given data in place of indices"):
            PerDatapointGuide(given_data, name="table")(x, size)


# Exports


def test_exported_axes_are_those_that_matter() -> None:
    """A matrix of covariates, one of coefficients and data of a whole plate, all square."""
    size, index = 3, torch.tensor([2, 0])

    def model(x: Tensor, covariates: Tensor, coefficients: Tensor, order: Tensor, data: Tensor) -> None:
        with pyro.plate("data", size, subsample=index) as i:
            z = pyro.sample("z", dist.Normal(order[i], 1.0))
            loc = z.unsqueeze(-1) + (covariates.T @ coefficients)[i] + data
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[i])

    square = [torch.randn(size, size) for _ in range(3)]
    arguments = (*square, torch.randn(size), torch.randn(size))
    constant = to_arviz(model, AmortizedGuide(model), arguments, num_samples=3)["constant_data"]
    assert constant["covariates"].dims == ("covariates_dim_0", "data")
    assert np.array_equal(constant["covariates"], square[1][:, index])
    assert constant["coefficients"].dims == ("coefficients_dim_0", "coefficients_dim_1")
    assert np.array_equal(constant["order"], arguments[3][index])
    assert constant["data_argument"].dims == ("data_dim_0",)


def test_batches_whose_data_do_not_tell_are_named_as_others() -> None:
    """Equal groups in the first batch, and a single datapoint in the last, show nothing."""

    def model(x: Tensor, group: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + torch.tensor([0.0, 3.0])[group], 1.0), obs=x)

    group = torch.tensor([1, 1, 1, 0, 1, 1, 0])
    loader = DataLoader(TensorDataset(torch.randn(7), group), batch_size=3)
    constant = to_arviz(model, AmortizedGuide(model), loader, num_samples=2)["constant_data"]
    assert constant["group"].dims == ("data",)
    assert np.array_equal(constant["group"], group)
