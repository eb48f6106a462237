"""The table of ``PerDatapointGuide``: rows by index, sparse gradients, and no datapoints but its own."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from plain_guides import GUIDES, INDEX, SIZE, X, normals
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from torch import Tensor, nn

from pyro_amortized import PerDatapointGuide


def subsampled_normals(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize("sparse", [False, True])
def test_only_rows_of_the_batch_receive_gradient(sparse: bool) -> None:
    x = torch.randn(SIZE)
    guide = PerDatapointGuide(subsampled_normals, sparse=sparse)
    Trace_ELBO().differentiable_loss(subsampled_normals, guide, x, INDEX).backward()
    grad = guide.inference.table.grad
    assert grad.is_sparse == sparse
    rows = grad.to_dense().abs().sum(-1).nonzero().squeeze(-1)
    assert rows.tolist() == sorted(INDEX.tolist())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's own Adagrad
def test_sparse_gradients_equal_dense_ones() -> None:
    x = torch.randn(SIZE)
    guides = [PerDatapointGuide(subsampled_normals, sparse=sparse, name=f"sparse_{sparse}") for sparse in (False, True)]
    steps = [SVI(subsampled_normals, g, pyro.optim.Adagrad({"lr": 0.1}), Trace_ELBO()) for g in guides]
    start = None
    for seed in range(6):
        index = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))[:4]
        for s in steps:
            pyro.set_rng_seed(seed)
            s.step(x, index)
        dense, sparse = (g.inference.table.detach() for g in guides)
        torch.testing.assert_close(dense, sparse)
        start = dense.clone() if start is None else start
    assert not torch.allclose(start, dense)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_table_without_subsampling(sparse: bool) -> None:
    x = torch.full((6,), 2.0)
    guide = PerDatapointGuide(normals, sparse=sparse)
    steps = SVI(normals, guide, pyro.optim.Adagrad({"lr": 0.3}), TraceMeanField_ELBO(num_particles=8))
    for _ in range(60):
        steps.step(x)
    torch.testing.assert_close(guide.median(x)["z"], torch.ones(6), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("Optim", [pyro.optim.Adam, pyro.optim.ClippedAdam, pyro.optim.RMSprop])
def test_dense_table_takes_any_optimizer(Optim: Any) -> None:
    x = torch.full((6,), 2.0)
    guide = PerDatapointGuide(subsampled_normals)
    steps = SVI(subsampled_normals, guide, Optim({"lr": 0.05}), Trace_ELBO(num_particles=8))
    for _ in range(20):
        steps.step(x, torch.tensor([0, 1, 2]))
    median = guide.median(x, torch.arange(6))["z"]
    assert (median[:3] > 0.3).all()
    assert (guide.variational_parameters(x, torch.tensor([3]))[0, 1] - torch.tensor(0.1).log()).abs() < 1e-6


@pytest.mark.parametrize("size", [5, 11])
def test_table_knows_no_unseen_datapoints(size: int) -> None:
    guide = PerDatapointGuide(normals)
    guide(torch.randn(SIZE))
    for call in (guide, guide.median, guide.posterior, guide.variational_parameters):
        with pytest.raises(ValueError, match=f"now has {size} .*set up with {SIZE}.*AmortizedGuide"):
            call(torch.randn(size))


def test_all_indices_given_in_another_order() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=len(index), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = PerDatapointGuide(model)
    index = torch.arange(len(X)).flip(0)
    guide.setup(X, index)
    nn.init.normal_(guide.inference.table)
    assert torch.equal(guide.median(X, index)["z"], guide.inference.table[:, 0].flip(0))


@pytest.mark.parametrize("Guide", GUIDES)
def test_permuted_subsample_of_all_datapoints(Guide: Any) -> None:
    x, order = torch.randn(SIZE), torch.randperm(SIZE)
    guide = Guide(subsampled_normals, init_loc_fn=init_to_value(values={"z": x}))
    straight = guide.variational_parameters(x, torch.arange(SIZE))
    torch.testing.assert_close(guide.variational_parameters(x, order), straight[order])
    if Guide is PerDatapointGuide:
        torch.testing.assert_close(guide.median(x, order)["z"], x[order])
