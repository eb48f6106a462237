"""What guides refuse: models, options, data and structures that change."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from plain_guides import GUIDES, X, normals, svi
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, Normal


def with_nan(size: int = 4) -> Tensor:
    return torch.randn(size).index_fill(0, torch.tensor([1]), float("nan"))


def two_plates(x: Tensor, y: Tensor) -> None:
    with pyro.plate("xs", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    with pyro.plate("ys", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def latent_plate(x: Tensor) -> None:
    with pyro.plate("latents", 3):
        pyro.sample("w", dist.Normal(0.0, 1.0))
    normals(x)


def optional(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def longer(x: Tensor, steps: int) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(())
        for t in range(steps):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def more_globals(x: Tensor, extra: bool) -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    if extra:
        pyro.sample("b", dist.Normal(0.0, 1.0))
    normals(x)


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def sequential(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("model", "options", "args", "match"),
    [
        (normals, {}, (with_nan(),), r"Cannot infer .*site 'x' holds 1 NaN values \(first rows: \[1\]\)"),
        (normals, {"plate": "rows"}, (X,), r"no plate of that name; try one of \['data'\]"),
        (latent_plate, {"plate": "latents"}, (X,), r"'latents' as the datapoint plate because no observed site"),
        (two_plates, {}, (X, X), r"several plates hold observed sites: \['xs', 'ys'\].*plate="),
        (normals, {}, (X[:0],), r"Cannot run the model on an empty batch"),
        (discrete, {}, (X,), r"discrete.*'k'|'k'.*discrete"),
        (sequential, {}, (X,), r"site 'z_0' .*sequential plate 'data'.*pyro.plate"),
        (normals, {"family": Normal(3)}, (X,), r"Normal\(latent_dim=3\).*1 unconstrained dimensions.*latent_dim=1"),
        (normals, {"family": lambda dim: None}, (X,), r"gave a NoneType"),
    ],
)
def test_models_that_no_guide_can_serve(Guide: Any, model: Any, options: Any, args: Any, match: str) -> None:
    guide = Guide(model, **options)
    with pytest.raises(ValueError, match=match):
        guide(*args)


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"family": "norml"}, r"Cannot use family 'norml'.*'multivariate_normal', 'normal'"),
        ({"family": 3}, r"neither a name nor a VariationalFamily"),
        ({"init_scale": 0.0}, r"init_scale=0.0 .*positive"),
        ({"init_scale": -1.0}, r"init_scale=-1.0 .*positive"),
    ],
)
def test_options_that_cannot_work(Guide: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Guide(normals, **options)
    with pytest.raises(ValueError, match="not callable"):
        Guide(3)


@pytest.mark.parametrize("Guide", GUIDES)
@pytest.mark.parametrize(
    ("model", "first", "second", "match"),
    [
        (optional, (X, X), (X,), r"sites \['y'\] are latent in this call and were observed"),
        (optional, (X,), (X, X), r"site 'y' is no longer a latent site of plate 'data'"),
        (longer, (X, 2), (X, 3), r"site 'z_2' has become a latent site"),
        (longer, (X, 2), (X, 1), r"site 'z_1' is no longer a latent site"),
        (more_globals, (X, False), (X, True), r"global latent sites \['b'\] have appeared or disappeared"),
        (normals, (X,), (X[:0],), r"Cannot run the model on an empty batch"),
    ],
)
def test_structures_that_change(Guide: Any, model: Any, first: Any, second: Any, match: str) -> None:
    guide = Guide(model)
    steps = svi(model, guide)
    steps.step(*first)
    with pytest.raises(ValueError, match=match):
        steps.step(*second)
    steps.step(*first)


def test_nan_in_later_batches() -> None:
    guide = AmortizedGuide(normals)
    guide(X)
    with pytest.raises(ValueError, match=r"1 datapoints \(first: \[1\]\).*input number 0 holds NaN"):
        guide(with_nan())


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "structured", "flow"])
def test_diverged_parameters(family: str) -> None:
    guide = AmortizedGuide(normals, family=family)
    guide(X)
    nn.init.constant_(guide.inference.head.bias, float("nan"))
    with pytest.raises(ValueError, match="have diverged.*learning rate"):
        guide(X)


def test_masked_nan_is_allowed_where_it_is_filled_in() -> None:
    def bare(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()), obs=x)

    with pytest.raises(ValueError, match="'x' holds 1 NaN values.*nan_to_num"):
        AmortizedGuide(bare)(with_nan())

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(~x.isnan()), obs=x.nan_to_num())

    guide = AmortizedGuide(model)
    assert torch.tensor(svi(model, guide).step(with_nan())).isfinite()


@pytest.mark.parametrize("Guide", GUIDES)
def test_a_flag_of_the_model_is_part_of_its_structure(Guide: Any) -> None:
    class Supervised(nn.Module):
        observed = False

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=x if self.observed else None)
                z = pyro.sample("z", dist.Normal(y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = Supervised()
    model.observed = False
    guide = Guide(model)
    guide(X)
    model.observed = True
    with pytest.raises(ValueError, match="site 'y' is no longer a latent site"):
        guide(X)


def test_bounds_that_depend_on_other_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Uniform(0.0, high))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'z' because its support depends on other latents"):
        AmortizedGuide(model)(X)


@pytest.mark.parametrize("Guide", GUIDES)
def test_two_guides_of_one_name(Guide: Any) -> None:
    svi(normals, Guide(normals)).step(X)
    with pytest.raises(ValueError, match="already holds other parameters.*name="):
        svi(normals, Guide(normals)).step(X)
    svi(normals, Guide(normals, name="other")).step(X)
