import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import uniform_bounds
from torch import Tensor
from torch.distributions import constraints

from pyro_amortized import AmortizedGuide, PerDatapointGuide
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.plates import probe

pytestmark = pytest.mark.usefixtures("_float64")
SIZE = 5
LEFT, RIGHT = 2, 3

Prior = Callable[[], Any]

# A prior, the unconstrained event shape, and coordinates of the support in which a density is one.
SUPPORTS: dict[str, tuple[Prior, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "real": (lambda: dist.Normal(0.0, 1.0), (), lambda v: v),
    "real vector": (lambda: dist.Normal(0.0, 1.0).expand([4]).to_event(1), (4,), lambda v: v),
    "real matrix": (lambda: dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2), (2, 3), lambda v: v),
    "multivariate": (lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), (3,), lambda v: v),
    "positive": (lambda: dist.Gamma(2.0, 1.0), (), lambda v: v),
    "positive vector": (lambda: dist.LogNormal(0.0, 1.0).expand([4]).to_event(1), (4,), lambda v: v),
    "unit interval": (lambda: dist.Beta(2.0, 3.0), (), lambda v: v),
    "interval": (lambda: dist.Uniform(-1.0, 3.0), (), lambda v: v),
    "intervals": (
        lambda: dist.Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 9.0])).to_event(1),
        (2,),
        lambda v: v,
    ),
    "simplex": (lambda: dist.Dirichlet(torch.ones(4)), (3,), lambda v: v[..., :-1]),
    "simplexes": (lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1), (2, 2), lambda v: v[..., :-1]),
    "corr_cholesky": (
        lambda: dist.LKJCholesky(3, 1.0),
        (3,),
        lambda v: v[(..., *torch.tril_indices(3, 3, -1))],
    ),
    "ordered": (
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0).expand([3]).to_event(1), [dist.transforms.OrderedTransform()]
        ),
        (3,),
        lambda v: v,
    ),
    "greater than": (lambda: dist.Pareto(2.0, 1.0), (), lambda v: v),
}
PLATES: dict[str, tuple[int, tuple[str, ...]]] = {
    "alone": (-1, ()),
    "inner on the left": (-1, ("left",)),
    "inner on the right": (-2, ("right",)),
    "inner on both sides": (-2, ("left", "right")),
    "alone at dim -2": (-2, ()),
}


def model_of(prior: Prior, plates: str = "alone") -> Callable[[Tensor], None]:
    """A latent ``z`` of a prior in plates, between latents before and after it in the flat vector."""
    dim, inner = PLATES[plates]

    def model(x: Tensor) -> None:
        data = pyro.plate("data", len(x), dim=dim)
        around = {
            "left": lambda: pyro.plate("left", LEFT, dim=dim - 1),
            "right": lambda: pyro.plate("right", RIGHT, dim=-1),
        }
        with data:
            pyro.sample("before", dist.Normal(0.0, 1.0))
        opened = [around[name]() for name in inner]
        for plate in opened:
            plate.__enter__()
        with data:
            pyro.sample("z", prior())
        for plate in reversed(opened):
            plate.__exit__(None, None, None)
        with data:
            pyro.sample("after", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.reshape(-1, *[1] * (-dim - 1)))

    return model


def layout_of(model: Callable[..., Any], *args: Any) -> tuple[SiteLayout, dict[str, Tensor]]:
    trace, frames = probe(model, args, {})
    layout = SiteLayout.from_trace(trace, frames, "data")
    return layout, {site.name: trace.nodes[site.name]["value"] for site in layout.sites}


def site_of(layout: SiteLayout) -> Any:
    return next(site for site in layout.sites if site.name == "z")


@pytest.mark.parametrize("plates", PLATES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_round_trips(support: str, plates: str) -> None:
    prior, shape, coordinates = SUPPORTS[support]
    layout, values = layout_of(model_of(prior, plates), torch.randn(SIZE))
    site = site_of(layout)
    copies = math.prod({"left": LEFT, "right": RIGHT}[name] for name in PLATES[plates][1])
    assert site.shape == shape
    assert site.stop - site.start == copies * math.prod(shape)
    assert layout.latent_dim == 2 + copies * math.prod(shape)

    flat = layout.flatten(values)
    assert flat.shape == (SIZE, layout.latent_dim)
    again = layout.values(flat)
    for name, value in values.items():
        assert again[name].shape == value.shape
        torch.testing.assert_close(again[name], value, rtol=1e-10, atol=1e-10)

    flat = torch.randn(SIZE, layout.latent_dim)
    values, parts = layout.values(flat), layout.split(flat)
    assert torch.equal(torch.cat([s.flatten(parts[s.name], layout.dim) for s in layout.sites], -1), flat)
    assert site.transform.codomain.check(values["z"]).all()
    torch.testing.assert_close(layout.flatten(values), flat, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordered_values_keep_their_order_where_steps_are_below_rounding_errors(dtype: torch.dtype) -> None:
    layout, _ = layout_of(model_of(SUPPORTS["ordered"][0]), torch.randn(SIZE))
    site, prior = site_of(layout), SUPPORTS["ordered"][0]()
    u = torch.tensor([[1.0, -60.0, -60.0], [-1e4, -60.0, 2.0], [0.3, 0.2, -1.0], [0.0, -80.0, -80.0]], dtype=dtype)
    value, log_det = site.constrain(u)
    assert prior.support.check(value).all()
    assert torch.equal(log_det, u[:, 1:].sum(-1))
    pyros = dist.transforms.OrderedTransform()(u)
    assert not prior.support.check(pyros)[:2].any()
    torch.testing.assert_close(value, pyros, rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    assert torch.equal(value[2:], pyros[2:])  # what Pyro can tell apart is the same


@pytest.mark.parametrize("size", [2, 50, 1000])
def test_sticks_are_torchs_where_these_are_exact(size: int) -> None:
    layout, _ = layout_of(model_of(lambda: dist.Dirichlet(torch.ones(size))), torch.randn(SIZE))
    site, torchs = site_of(layout), dist.transforms.StickBreakingTransform()
    u = 2.0 * torch.randn(7, size - 1)
    value, log_det = site.constrain(u)
    torch.testing.assert_close(value, torchs(u), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(log_det, torchs.log_abs_det_jacobian(u, torchs(u)), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(site.transform.inv(value), u, rtol=1e-9, atol=1e-9)

    single = u.float()
    assert (site.transform.inv(site.transform(single)) - single).abs().max() < 1e-4
    assert size < 1000 or (torchs.inv(torchs(single)) - single).abs().max() > 1.0
    value, log_det = site.constrain(torch.stack([single[0] + 1e4, single[0] - 1e4]))
    assert constraints.simplex.check(value).all()
    assert (value >= torch.finfo(torch.float32).tiny).all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("plates", PLATES)
@pytest.mark.parametrize("support", ["real", "real matrix", "simplex"])
def test_datapoints_keep_their_own_values(support: str, plates: str) -> None:
    layout, _ = layout_of(model_of(SUPPORTS[support][0], plates), torch.randn(SIZE))
    dim, inner = PLATES[plates]
    site, flat = site_of(layout), torch.randn(4, SIZE, layout.latent_dim)
    mine = flat[..., site.start : site.stop]
    sizes = [{"left": LEFT, "right": RIGHT}[name] for name in inner]
    expected = site.transform(mine.reshape(4, SIZE, *sizes, *site.shape))
    if "left" in inner:
        expected = expected.transpose(1, 2)
    if dim == -2 and "right" not in inner:
        expected = expected.unsqueeze(2)
    values = layout.values(flat)["z"]
    assert torch.equal(values, expected)
    for k in range(4):
        torch.testing.assert_close(layout.values(flat[k])["z"], values[k])
    deep = layout.values(flat, depth=4)["z"]
    assert deep.shape == (4, *[1] * (4 + 1 + site.event_dim - values.dim()), *values.shape[1:])
    assert torch.equal(deep.reshape(values.shape), values)


@pytest.mark.parametrize("support", SUPPORTS)
def test_log_abs_det_is_that_of_the_jacobian(support: str) -> None:
    prior, shape, coordinates = SUPPORTS[support]
    site = site_of(layout_of(model_of(prior), torch.randn(SIZE))[0])
    unconstrained = torch.randn(SIZE, *shape)
    value, log_det = site.constrain(unconstrained)
    assert log_det.shape == (SIZE,)
    assert value.shape == (SIZE, *prior().event_shape)
    jacobian = torch.autograd.functional.jacobian(lambda u: coordinates(site.transform(u)), unconstrained)
    square = jacobian.reshape(SIZE, math.prod(shape), SIZE, -1)[range(SIZE), :, range(SIZE)]
    torch.testing.assert_close(log_det, torch.linalg.slogdet(square).logabsdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plates", PLATES)
@pytest.mark.parametrize("Guide", [AmortizedGuide, PerDatapointGuide])
def test_guides_give_values_in_the_plates_of_the_model(Guide: Any, plates: str) -> None:
    model, x = model_of(SUPPORTS["simplex"][0], plates), torch.randn(SIZE)
    guide = Guide(model, plate="data")
    shape = pyro.poutine.trace(model).get_trace(x).nodes["z"]["value"].shape
    assert guide(x)["z"].shape == guide.median(x)["z"].shape == shape
    assert guide.quantiles([0.1, 0.9], x)["z"].shape == (2, *shape)
    with pyro.plate("particles", 7, dim=-4):
        values = guide(x)["z"]
    assert values.shape == (7, *[1] * (5 - 1 - len(shape)), *shape)


def test_bounds_are_read_anew() -> None:
    x = torch.randn(SIZE)
    flat = torch.randn(SIZE, 1)
    for low in (torch.zeros(SIZE), torch.arange(5.0), torch.full((SIZE,), -7.0)):
        layout, values = layout_of(uniform_bounds, x, low)
        assert not layout.sites[0].is_static
        z = layout.values(flat)["z"]
        torch.testing.assert_close(z, low + 2 * flat.squeeze(-1).sigmoid())
        torch.testing.assert_close(layout.values(layout.flatten(values))["z"], values["z"])


@pytest.mark.parametrize("support", SUPPORTS)
def test_only_bounds_are_not_static(support: str) -> None:
    site = site_of(layout_of(model_of(SUPPORTS[support][0]), torch.randn(SIZE))[0])
    assert site.is_static == (support not in ("intervals", "greater than"))


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ("real vector", "real", r"'z' now has unconstrained event shape \(\).*had \(4,\)"),
        ("real", "positive", r"'z'"),
        ("simplex", "simplexes", r"event shape \(2, 2\)"),
    ],
)
def test_changed_layouts_are_named(before: str, after: str, match: str) -> None:
    x = torch.randn(SIZE)
    layouts = [layout_of(model_of(SUPPORTS[support][0]), x)[0] for support in (before, after)]
    layouts[0].check_same(layout_of(model_of(SUPPORTS[before][0]), torch.randn(2 * SIZE))[0])
    with pytest.raises(ValueError, match=match):
        layouts[0].check_same(layouts[1])


def test_changed_plates_are_named() -> None:
    x = torch.randn(SIZE)
    layouts = [layout_of(model_of(SUPPORTS["real"][0], plates), x)[0] for plates in PLATES]
    with pytest.raises(ValueError, match="inner plates"):
        layouts[0].check_same(layouts[1])
    with pytest.raises(ValueError, match="'data' at dim -2, and was 'data' at dim -1"):
        layouts[0].check_same(layouts[4])


def test_support_without_bijection_is_refused() -> None:
    def prior() -> Any:
        normal = dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2)
        return dist.TransformedDistribution(normal, [torch.distributions.transforms.LowerCholeskyTransform()])

    with pytest.raises(ValueError, match="'z'"):
        layout_of(model_of(prior), torch.randn(SIZE))


def test_subsampled_inner_plate_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 10, subsample_size=3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="Cannot fold plate 'inner' of local site 'z'.*subsampled"):
        layout_of(model, torch.randn(SIZE, 1))
