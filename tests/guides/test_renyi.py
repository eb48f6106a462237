"""Renyi and importance-weighted bounds keep the plates that all sites share: log q must be a sum over their entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_amortized import AmortizedGuide, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.families import build_family

N, M = 4, 3
SPLIT = ("multivariate_normal", "low_rank_multivariate_normal", "structured", "mixture")
"""Joint families that know the density of one entry given others."""
FAMILIES = ("normal", *SPLIT, "flow")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def _observe(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def left(x: Tensor) -> None:
    with pyro.plate("d", N, dim=-1), pyro.plate("f", M, dim=-2):
        _observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x.T)


def right(x: Tensor) -> None:
    with pyro.plate("d", N, dim=-2), pyro.plate("f", M, dim=-1):
        _observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def unplated(x: Tensor) -> None:
    """An inner dimension in no plate."""
    with pyro.plate("d", N, dim=-2):
        _observe(pyro.sample("z", dist.Normal(torch.zeros(1, M), 1.0)), x)


def chained(x: Tensor) -> None:
    """Two latents for every entry, of several supports, one of them a vector."""
    with pyro.plate("d", N, dim=-2), pyro.plate("f", M, dim=-1):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), rate.unsqueeze(-1)).to_event(1))
        _observe(w.sum(-1), x)


def scaled(x: Tensor) -> None:
    with pyro.plate("d", 2 * N, subsample=torch.arange(N), dim=-2), pyro.plate("f", M, dim=-1):
        _observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def masked(x: Tensor) -> None:
    with pyro.plate("d", N, dim=-2), pyro.plate("f", M, dim=-1), poutine.mask(mask=torch.arange(M) > 0):
        _observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def three(x: Tensor) -> None:
    """A further inner plate for some of the sites only, which is summed over."""
    with pyro.plate("d", N, dim=-2), pyro.plate("f", M, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("g", 2, dim=-3):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            _observe(w, x)


def beside(x: Tensor) -> None:
    """A global latent in the shared inner plate, outside of the datapoint plate."""
    f = pyro.plate("f", M, dim=-1)
    with f:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("d", N, dim=-2), f:
        _observe(pyro.sample("z", dist.Normal(loc, 1.0)), x)


def outer(x: Tensor) -> None:
    """One latent for each datapoint, which alone is shared by all sites."""
    with pyro.plate("d", N, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("f", M, dim=-1):
            _observe(z.sum(-1), x)


def globals_(x: Tensor) -> None:
    """No plate is shared by all sites."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("d", N, dim=-2), pyro.plate("f", M, dim=-1):
        _observe(pyro.sample("z", dist.Normal(loc, 1.0)), x)


SHARED: dict[str, Callable[..., None]] = {
    m.__name__: m for m in (left, right, unplated, chained, scaled, masked, three, beside)
}
"""Models whose sites all lie in an inner plate."""
OTHERS: dict[str, Callable[..., None]] = {m.__name__: m for m in (outer, globals_)}
KEPT = {"left": (-1, -2), "beside": (-1,), "outer": (-2,), "globals_": ()}
"""Dimensions that all sites of a model share, (-2, -1) where nothing is said."""


def conditionals(q: Any, z: Tensor) -> Tensor:
    """Terms ``(*, D)`` of log q, as differences of the log-densities of the first d and d - 1 dimensions."""
    marginals = [z.new_zeros(z.shape[:-1])]
    for d in range(1, z.shape[-1] + 1):
        if hasattr(q, "log_scales"):
            parts = dist.Normal(q.locs[..., :d], q.log_scales[..., :d].exp()).log_prob(z[..., None, :d]).sum(-1)
            marginals.append((q.logits.log_softmax(-1) + parts).logsumexp(-1))
        else:
            covariance = q.covariance_matrix[..., :d, :d]
            marginals.append(dist.MultivariateNormal(q.mean[..., :d], covariance).log_prob(z[..., :d]))
    return torch.stack(marginals, -1).diff(dim=-1)


def bound_by_hand(model: Any, guide: Any, x: Tensor, count: int, kept: tuple[int, ...]) -> float:
    """The bound of order 0: log-mean-exp over draws of all log-densities, summed but for the dimensions kept."""
    log_weights = []
    for _ in range(count):
        guide_trace = poutine.trace(guide).get_trace(x)
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x)
        trace.compute_log_prob()
        guide_trace.compute_log_prob()
        total = torch.zeros(())
        for sites, sign in ((trace, 1.0), (guide_trace, -1.0)):
            for site in sites.nodes.values():
                if site["type"] == "sample" and site["log_prob"].numel():
                    value = site["log_prob"].reshape((1,) * (3 - site["log_prob"].dim()) + site["log_prob"].shape)
                    summed = [dim for dim in (-1, -2, -3) if dim not in kept]
                    assert all(value.shape[dim] > 1 for dim in kept) or not value.any(), site["name"]
                    total = total + sign * (value.sum(summed, keepdim=True) if summed else value)
        log_weights.append(total)
    return float((torch.stack(log_weights).logsumexp(0) - math.log(count)).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*SHARED, *OTHERS])
def test_bound_is_that_of_its_draws(name: str, family: str) -> None:
    """Every log-density has an entry for each of those that are kept, and the bound is made of them."""
    model = {**SHARED, **OTHERS}[name]
    x = torch.randn(N, M)
    guide = AmortizedGuide(model, family=family, plate="d", init_scale=0.7)
    if family == "flow" and name in SHARED:
        where = "dimension -1 outside of all plates" if name == "unplated" else "plate 'f'"
        with pytest.raises(ValueError, match=f'every site of the model lies in {where} .* try family="normal"'):
            guide.setup(x)
        return
    guide.setup(x)
    with torch.no_grad():
        elbo = RenyiELBO(alpha=0, num_particles=4, max_plate_nesting=3)
        pyro.set_rng_seed(1)
        found = -elbo.loss(model, guide, x)
        pyro.set_rng_seed(1)
        assert found == pytest.approx(bound_by_hand(model, guide, x, 4, KEPT.get(name, (-2, -1))), abs=1e-9)


@pytest.mark.parametrize("family", SPLIT)
def test_terms_of_log_q(family: str) -> None:
    """Differences of marginal log-densities, and their sum log q, whatever the parameters."""
    options = {"find_parents": lambda: torch.ones(5, 5).tril(-1).bool()}
    built = build_family(family, 5, **options)
    phi, z = torch.randn(2, built.num_params), torch.randn(3, 2, 5)
    found = built.log_conditionals(phi, z)
    torch.testing.assert_close(found, conditionals(built(phi), z))
    torch.testing.assert_close(found.sum(-1), built(phi).log_prob(z))


@pytest.mark.parametrize("family", ["normal", *SPLIT])
@pytest.mark.parametrize("vectorized", [True, False])
def test_bound_is_one(family: str, vectorized: bool) -> None:
    """Below the log evidence on average, and close to it with many particles."""
    x = torch.randn(N, M)
    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum())
    guide = AmortizedGuide(left, family=family, plate="d", init_scale=0.7)
    guide.setup(x)
    count, repeats = (100, 20) if vectorized else (20, 5)
    elbo = RenyiELBO(alpha=0, num_particles=count, vectorize_particles=vectorized, max_plate_nesting=2)
    with torch.no_grad():
        bounds = -torch.tensor([elbo.loss(left, guide, x) for _ in range(repeats)])
    error = float(bounds.std()) / repeats**0.5
    assert evidence - 1.5 < float(bounds.mean()) < evidence + 4 * error


@pytest.mark.parametrize("family", SPLIT)
@pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_other_elbos_are_what_they_were(family: str, Elbo: Any) -> None:
    """log p less log q of the draw, with log q from the family itself."""
    x = torch.randn(N, M)
    guide = AmortizedGuide(chained, family=family, plate="d", init_scale=0.5)
    guide.setup(x)
    with torch.no_grad():
        pyro.set_rng_seed(1)
        loss = Elbo(max_plate_nesting=2).loss(chained, guide, x)
        pyro.set_rng_seed(1)
        draw = guide(x)
        trace = poutine.trace(pyro.condition(chained, data=draw)).get_trace(x)
        unconstrained = torch.cat([draw["rate"].log(), draw["w"].flatten(1)], -1)
        log_q = guide.posterior(x).log_prob(unconstrained).sum() - draw["rate"].log().sum()
        assert loss == pytest.approx(float(log_q - trace.log_prob_sum()))


@pytest.mark.parametrize("make", [SemiAmortizedGuide, PerDatapointGuide])
def test_other_guides_train_under_the_bound(make: Any) -> None:
    """The semi-amortized guide adds the gradient of its encoder's own ELBO to the bound of every entry."""
    x = torch.randn(N, M)
    guide = make(left, family="multivariate_normal", plate="d", init_scale=0.7)
    elbo = RenyiELBO(alpha=0, num_particles=3, max_plate_nesting=2)
    svi = SVI(left, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(x) for _ in range(3)]
    assert guide.layout is not None
    torch.testing.assert_close(guide.layout.spread(torch.ones(N)).sum(0), torch.ones(N))
    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum())
    assert all(-loss < evidence + 3.0 for loss in losses)


def test_remedies_of_the_refusal() -> None:
    x = torch.randn(N, M)
    for family in ("normal", "multivariate_normal"):
        guide = AmortizedGuide(left, family=family, plate="d", name=family)
        assert math.isfinite(RenyiELBO(num_particles=2, max_plate_nesting=2).loss(left, guide, x))
