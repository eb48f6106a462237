"""Which plate of a model a loader goes over."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide

lightning = pytest.importorskip("lightning")
from lightning_runs import SIZE, Factors, data, loader, quiet, within_another  # noqa: E402

from pyro_amortized.lightning import SVIModule  # noqa: E402
from pyro_amortized.training.plates import DataPlate, find_plate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of Lightning's on loaders, loggers and checkpoints


def beside_another(index: Tensor, x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("calibration", 5):
        pyro.sample("y", dist.Normal(m, 1.0), obs=torch.ones(5))
    with pyro.plate("data", SIZE, subsample=index):
        pyro.sample("x", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=x)


def of_the_batch(x: Tensor) -> None:
    with pyro.plate("features", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def both_subsampled(index: Tensor, x: Tensor) -> None:
    with pyro.plate("others", 9, subsample=index):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])
    with pyro.plate("data", 10, subsample=index):
        pyro.sample("x", dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0))), obs=x[:, 1])


def time_first(x: Tensor) -> None:
    with pyro.plate("documents", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("words", x.shape[0], dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def some_pixels(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 3, subsample_size=2, dim=-1) as j:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, j])


def one_after_the_other(x: Tensor) -> None:
    for k in pyro.plate("components", 2):
        m = pyro.sample(f"m{k}", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x[:, 0])


def plate_of(model: Any, *batch: Tensor, named: str | None = None, own: Any = None) -> DataPlate | None:
    def read(batch: Any) -> Any:
        return (batch[0].T,) if model is time_first else tuple(batch), {}

    return find_plate(model, list(batch), read, named, own)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_plate_is_the_one_that_loaders_go_over(size: int) -> None:
    """However large others are, whichever lies around the other, and whatever is subsampled beside."""
    x, index = torch.randn(size, 3), torch.arange(size)
    for model in (beside_another, within_another):
        assert plate_of(model, index, x) == DataPlate("data", SIZE)
    for model in (of_the_batch, some_pixels):
        assert plate_of(model, x) == DataPlate("data", None)
    assert plate_of(time_first, x) == DataPlate("documents", None)
    assert plate_of(one_after_the_other, x) is None  # and no size is to be checked
    assert plate_of(both_subsampled, index, x) is None
    assert plate_of(both_subsampled, index, x, named="data") == DataPlate("data", 10)
    assert plate_of(both_subsampled, index, x, own="others") == DataPlate("others", 9)
    assert plate_of(of_the_batch, x, own="gpu") == DataPlate("data", None)
    with pytest.raises(ValueError, match="no plate of that name"):
        plate_of(of_the_batch, x, named="gpu")


def test_data_of_one_size_lie_in_the_outermost_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-2), pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.reshape(4, 3))

    assert plate_of(model, torch.randn(4, 3)) == DataPlate("data", None)


def test_sizes_are_those_of_the_plate_that_is_named(tmp_path: Path) -> None:
    swapped = TensorDataset(*data()[::-1])
    module = SVIModule(both_subsampled, lambda *_: None, plate="others")
    with pytest.raises(ValueError, match="because plate 'others' of the model has 9"):
        quiet(tmp_path).fit(module, DataLoader(swapped, batch_size=4))
    quiet(tmp_path).fit(SVIModule(both_subsampled, lambda *_: None, plate="data"), DataLoader(swapped, batch_size=4))


def test_names_of_parameters_may_be_those_of_attributes(tmp_path: Path) -> None:
    def model(x: Tensor, index: Tensor) -> None:
        scale = pyro.param("type", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", SIZE, subsample=index):
            pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=x)

    module = SVIModule(model, lambda *_: None)
    quiet(tmp_path).fit(module, loader())
    assert pyro.param("type") != 1.0
    assert "store.type_" in module.state_dict()
    with pytest.raises(ValueError, match="Cannot predict by a function because .*Predictive"):
        quiet(tmp_path).predict(module, loader())


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    model = Factors()
    with pytest.raises(ValueError, match="Cannot train on a dict of loaders because .*StackDataset"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), {"a": loader(), "b": loader()})
