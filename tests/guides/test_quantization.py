"""Vector-quantised codes: the codebook, its guide, and the collapse report, against their definitions."""

import copy
import gc
import io
import math
import pickle
import re
import runpy
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import AmortizedGuide, Codebook, CollapseReport, VectorQuantizedGuide, collapse_report
from pyro_amortized.diagnostics.collapse.codes import codes_dataset, find_codes
from pyro_amortized.encoders.quantized import perplexity
from pyro_amortized.guides import LocalGuide

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("_float64")

POSITIONS, CODES, DIM, PIXELS = 3, 5, 2, 4


class VQVAE(nn.Module):
    """p(x, k) = prod_i 1/K N(x; W e_k, 0.5), positions in a plate or in the event."""

    def __init__(self, *, to_event: bool = True, prior: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.codebook = Codebook(CODES, DIM, **options)
        self.weights = nn.Parameter(torch.randn(POSITIONS * DIM, PIXELS))
        self.to_event = to_event
        self.prior = torch.zeros(CODES) if prior is None else prior

    def code(self) -> Tensor:
        """The codes ``(N, P)``."""
        if self.to_event:
            return pyro.sample("code", dist.Categorical(logits=self.prior.expand(POSITIONS, -1)).to_event(1))
        with pyro.plate("positions", POSITIONS, dim=-2):
            return pyro.sample("code", dist.Categorical(logits=self.prior)).movedim(-2, -1)

    def forward(self, x: Tensor, size: int | None = None) -> None:
        pyro.module("vqvae", self)
        with pyro.plate("data", size or len(x), subsample_size=len(x), dim=-1):
            mean = self.codebook(self.code()).flatten(-2) @ self.weights
            if mean.dim() == 3 and not self.to_event:  # particles lie on the left of the plate of positions
                mean = mean.unsqueeze(1)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    def log_likelihood(self, x: Tensor, codes: Tensor) -> Tensor:
        """log p(x | k), ``(N,)``, of codes ``(N, P)``."""
        mean = self.codebook.embeddings[codes].flatten(1) @ self.weights
        return dist.Normal(mean, 0.5).log_prob(x).sum(-1)


class Encoder(nn.Module):
    """Features ``(N, P, D)``, linear in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(PIXELS, POSITIONS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(-1, POSITIONS, DIM)


def data(size: int = 30, seed: int = 3) -> Tensor:
    return torch.randn(size, PIXELS, generator=torch.Generator().manual_seed(seed))


def setup(x: Tensor, **options: Any) -> tuple[VQVAE, Encoder, VectorQuantizedGuide]:
    keys = {"to_event", "prior", "decay", "revive_below"} & options.keys()
    model, encoder = VQVAE(**{key: options.pop(key) for key in keys}), Encoder()
    guide = VectorQuantizedGuide(model, model.codebook, encoder, **options)
    guide.setup(x)
    return model, encoder, guide


def nearest(codebook: Codebook, features: Tensor) -> Tensor:
    """The definition."""
    return (features.unsqueeze(-2) - codebook.embeddings).square().sum(-1).argmin(-1)


def loss_and_gradient(elbo: Any, model: Any, guide: Any, x: Tensor, *modules: nn.Module) -> tuple[float, list[Tensor]]:
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    loss = elbo.loss_and_grads(model, guide, x)
    return loss, [p.grad.clone() for p in parameters]


class Levels(nn.Module):
    """Two sites of codes, two coarse ones and one fine one, whose prior depends on the first coarse one."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.coarse = Codebook(CODES, DIM)
        self.fine = self.coarse if shared else Codebook(CODES + 2, DIM + 1)
        self.weights = nn.Parameter(torch.randn(2 * DIM + self.fine.dim, PIXELS))
        self.prior = nn.Parameter(torch.randn(CODES, self.fine.num_codes))

    def books(self) -> Codebook | dict[str, Codebook]:
        return self.coarse if self.fine is self.coarse else {"coarse": self.coarse, "fine": self.fine}

    def mean(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return torch.cat([coarse.flatten(-2), fine], -1) @ self.weights

    def forward(self, x: Tensor) -> None:
        pyro.module("levels", self)
        with pyro.plate("data", len(x)):
            coarse = pyro.sample("coarse", dist.Categorical(logits=torch.zeros(2, CODES)).to_event(1))
            fine = pyro.sample("fine", dist.Categorical(logits=self.prior[coarse[..., 0]]))
            mean = self.mean(self.coarse(coarse), self.fine(fine))
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


# The codebook


def test_nearest_codes_and_lookup() -> None:
    codebook = Codebook(CODES, DIM)
    features = 100 + torch.randn(200, 3, DIM)
    codebook.initialize(features)
    codes = codebook.nearest(features)
    assert torch.equal(codes, nearest(codebook, features))
    assert torch.equal(codebook(codes), codebook.embeddings[codes])
    assert not codebook(codes).requires_grad


def test_codebook_starts_at_the_clusters() -> None:
    centers = 10 * torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [3.0, 3.0]])
    features = centers.repeat(200, 1) + 0.1 * torch.randn(1000, DIM)
    codebook = Codebook(4 * CODES, DIM)
    codebook.initialize(features)
    distance = (features - codebook(codebook.nearest(features))).square().sum(-1).sqrt()
    assert distance.max() < 1.0
    before = codebook.embeddings.clone()
    codebook.initialize(features + 1)
    assert torch.equal(codebook.embeddings, before)


def test_fewer_features_than_codes() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    codebook = Codebook(CODES, DIM)
    codebook.initialize(features)
    assert torch.equal(codebook(codebook.nearest(features)), features)
    assert len(codebook.embeddings.unique(dim=0)) == CODES


def test_moving_averages_against_the_closed_form() -> None:
    codebook = Codebook(CODES, DIM, decay=0.9, revive_below=0.0)
    codebook.initialize(torch.randn(50, DIM))
    weight, total = torch.full((CODES,), 50 / CODES), codebook.embeddings * 50 / CODES
    for _ in range(20):
        features = torch.randn(40, DIM)
        codes = codebook.nearest(features)
        indicator = torch.nn.functional.one_hot(codes, CODES).double()
        weight = 0.9 * weight + 0.1 * indicator.sum(0)
        total = 0.9 * total + 0.1 * indicator.T @ features
        codebook.update(features, codes)
        torch.testing.assert_close(codebook.counts, weight)
        torch.testing.assert_close(codebook.embeddings, total / weight[:, None])
    share = weight / weight.sum()
    assert codebook.perplexity == pytest.approx(float((-share * share.log()).sum().exp()))


def test_moving_averages_reach_the_centres() -> None:
    features = torch.cat([torch.randn(30, DIM), 20 + torch.randn(30, DIM)])
    codebook = Codebook(2, DIM, decay=0.5)
    codebook.initialize(features)
    for _ in range(60):
        codebook.update(features, codebook.nearest(features))
    expected = torch.stack([features[:30].mean(0), features[30:].mean(0)])
    torch.testing.assert_close(codebook.embeddings.sort(0).values, expected)


def test_dead_codes_are_revived_from_the_batch() -> None:
    features = torch.randn(100, DIM)
    revived, left = (Codebook(CODES, DIM, decay=0.5, revive_below=share) for share in (0.1, 0.0))
    for codebook in (revived, left):
        codebook.initialize(features)
        codebook.embeddings[2:] = 1e3
        codebook.sums[2:] = 1e3 * codebook.counts[2:, None]
        for _ in range(3):
            codebook.update(features, codebook.nearest(features))
        assert (codebook.embeddings[2:] > 100).all()
    revived.update(features, codes := revived.nearest(features))
    assert set(codes.tolist()) <= {0, 1}
    assert (revived.embeddings[2:, None] == features).all(-1).any(-1).all()
    torch.testing.assert_close(revived.counts[2:], torch.full((3,), 100 / CODES))
    assert set(revived.nearest(features).tolist()) == set(range(CODES))
    for _ in range(2000):  # nothing underflows to NaN
        left.update(features, left.nearest(features))
    assert left.embeddings.isfinite().all()
    assert set(left.nearest(features).tolist()) == {0, 1}


def test_perplexity() -> None:
    counts = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    expected = [4.0, 1.0, math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))]
    torch.testing.assert_close(perplexity(counts), torch.tensor(expected))


# The gradient


def test_straight_through_gradient_of_any_view() -> None:
    codebook = Codebook(CODES, DIM)
    codebook.initialize(torch.randn(50, DIM))
    features = torch.randn(6, 3, DIM, requires_grad=True)
    codes = codebook.quantize(features).codes
    weight = torch.randn(6, 3, DIM)
    straight = features + (codebook.embeddings[nearest(codebook, features)] - features).detach()
    expected = torch.autograd.grad((straight * weight).cos().sum(), features)[0]
    views: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (lambda k: k, lambda v: v),
        (lambda k: k.T, lambda v: v.transpose(0, 1)),
        (lambda k: k.reshape(2, 9), lambda v: v.reshape(6, 3, DIM)),
        (lambda k: k.unsqueeze(1).expand(6, 4, 3), lambda v: v.mean(1)),
        (lambda k: k[:, 1:], lambda v: torch.cat([codebook(codes)[:, :1], v], 1)),
    ]
    for view, back in views:
        looked_up = codebook(view(codes))
        assert torch.equal(looked_up, codebook.embeddings[view(codes)])
        gradient = torch.autograd.grad((back(looked_up) * weight).cos().sum(), features)[0]
        torch.testing.assert_close(gradient, expected)
    assert not codebook(codes.clone()).requires_grad  # the twin: a copy is another code of the same value


def test_overwritten_codes_have_their_own_vectors_and_no_gradient() -> None:
    codebook = Codebook(CODES, DIM)
    codebook.initialize(torch.randn(50, DIM))
    features = torch.randn(6, 3, DIM, requires_grad=True)
    codes = codebook.quantize(features).codes
    before = codes.clone()
    codes[:, 0] = 1
    looked_up = codebook(codes)
    assert torch.equal(looked_up, codebook.embeddings[codes])
    gradient = torch.autograd.grad(looked_up.sum(), features)[0]
    torch.testing.assert_close(gradient, (codes == before).double().unsqueeze(-1).expand_as(gradient))
    assert (gradient[:, 0] == 0).any()


def test_codes_are_looked_up_among_the_vectors_of_the_moment() -> None:
    codebook = Codebook(CODES, DIM)
    codebook.initialize(torch.randn(50, DIM))
    codes = codebook.quantize(torch.randn(6, DIM, requires_grad=True)).codes
    codebook.load_state_dict({**codebook.state_dict(), "embeddings": torch.randn(CODES, DIM)})
    assert torch.equal(codebook(codes), codebook.embeddings[codes])
    with torch.no_grad():
        assert torch.equal(codebook(codes), codebook.embeddings[codes])


def test_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    x = data()
    model, encoder, guide = setup(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(x).dtype == torch.bfloat16
        codes = guide.codes(x)
        Trace_ELBO().loss_and_grads(model, guide, x)
        assert torch.equal(codes, nearest(model.codebook, encoder(x).float()))
        features = torch.randn(1000, DIM)
        assert torch.equal(model.codebook.nearest(features), nearest(model.codebook, features))
    assert encoder.linear.weight.grad.norm() > 0


@pytest.mark.parametrize("to_event", [True, False])
@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=2),
        RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2),
    ],
)
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
def test_elbo_and_gradient_against_the_definition(elbo: Any, to_event: bool) -> None:
    x = data()
    prior = torch.randn(CODES)
    model, encoder, guide = setup(x, to_event=to_event, prior=prior, commitment=0.7)
    encoder.linear.weight.data.mul_(3)
    embeddings, codes = model.codebook.embeddings.clone(), nearest(model.codebook, encoder(x))
    value = (model.log_likelihood(x, codes) + prior.log_softmax(0)[codes].sum(-1)).sum()
    features = encoder(x)
    straight = features + (embeddings[codes] - features).detach()
    likelihood = dist.Normal(straight.flatten(1) @ model.weights, 0.5).log_prob(x).sum()
    commitment = 0.7 * (features - embeddings[codes]).square().sum()
    parameters = [*encoder.parameters(), model.weights]
    expected = torch.autograd.grad(commitment - likelihood, parameters)

    loss, gradient = loss_and_gradient(elbo, model, guide, x, encoder, model)
    assert loss == pytest.approx(-float(value.detach()))
    for found, right in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, right)
    assert torch.equal(model.codebook.embeddings, embeddings)  # one step has one q
    model.codebook.settle()
    assert not torch.equal(model.codebook.embeddings, embeddings)


def test_reported_loss_does_not_depend_on_the_commitment() -> None:
    x = data()
    model, encoder, guide = setup(x, commitment=0.0, decay=0.0)
    guide.eval()
    values = {}
    for guide.commitment in (0.0, 10.0):
        values[guide.commitment] = loss_and_gradient(Trace_ELBO(), model, guide, x, encoder)
    assert values[0.0][0] == values[10.0][0]
    assert not torch.allclose(values[0.0][1][0], values[10.0][1][0])
    distance = (encoder(x) - model.codebook.embeddings[nearest(model.codebook, encoder(x))]).square().sum((-1, -2))
    torch.testing.assert_close(guide.commitment_loss(x), 10 * distance.detach())


@pytest.mark.parametrize("shared", [False, True])
def test_several_sites_against_the_definition(shared: bool) -> None:
    x = data()
    model = Levels(shared=shared)
    encoder = nn.Linear(PIXELS, 8)
    guide = VectorQuantizedGuide(model, model.books(), encoder)
    guide.setup(x)
    head = guide.inference.head
    assert head.out_features == 2 * DIM + model.fine.dim
    features = head(encoder(x))
    coarse, fine = features[:, : 2 * DIM].reshape(-1, 2, DIM), features[:, 2 * DIM :]
    codes = nearest(model.coarse, coarse), nearest(model.fine, fine)
    found = guide.codes(x)
    assert torch.equal(found["coarse"], codes[0])
    assert torch.equal(found["fine"], codes[1])
    vectors = model.coarse.embeddings[codes[0]], model.fine.embeddings[codes[1]]
    passed = [v + z - z.detach() for v, z in zip(vectors, (coarse, fine), strict=True)]
    log_likelihood = dist.Normal(model.mean(*passed), 0.5).log_prob(x).sum()
    log_prior = dist.Categorical(logits=model.prior[codes[0][:, 0]]).log_prob(codes[1]).sum()
    loss = 2 * len(x) * math.log(CODES) - log_likelihood - log_prior
    commitment = 0.25 * sum((z - v).square().sum() for z, v in zip((coarse, fine), vectors, strict=True))
    weights = [encoder.weight, head.weight, model.weights, model.prior]
    expected = torch.autograd.grad(loss + commitment, weights)
    actual, gradients = loss_and_gradient(Trace_ELBO(), model, guide, x, encoder, head, model)
    assert actual == pytest.approx(loss.item())
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert gradients
    assert float(guide.commitment_loss(x).sum()) == pytest.approx(commitment.item())


def test_several_sites_in_training_and_in_the_report() -> None:
    x = data(40)
    model = Levels()
    guide = VectorQuantizedGuide(model, model.books())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = [book.embeddings.clone() for book in (model.coarse, model.fine)]
    losses = [svi.step(x) for _ in range(60)]
    assert losses[-1] < losses[0]
    guide.eval()
    assert not any(map(torch.equal, before, (model.coarse.embeddings, model.fine.embeddings)))
    codes = guide.codes(x)
    median = guide.median(x)
    assert all(torch.equal(median[name], codes[name]) for name in ("coarse", "fine"))
    report = collapse_report(model, guide, (x,))
    assert list(report.dataset["latent"].values) == ["coarse[0]", "coarse[1]", "fine"]
    kl = -dist.Categorical(logits=model.prior[codes["coarse"][:, 0]]).log_prob(codes["fine"]).mean()
    np.testing.assert_allclose(report.dataset["kl"], [math.log(CODES)] * 2 + [kl.item()])
    assert report.dataset.attrs["num_codes"] == CODES + CODES + 2
    usage = report.dataset["usage"].values
    assert not usage[:2, CODES:].any()
    assert not usage[2, :CODES].any()
    np.testing.assert_allclose(usage[2, CODES:], codes["fine"].bincount(minlength=CODES + 2) / 40)
    assert report.dataset.attrs["codes_per_position"] == CODES + 2
    report.plot()
    loss = Trace_ELBO().loss(model, guide, x)
    loaded = pickle.loads(pickle.dumps(guide))
    loaded.model, loaded.codebook = model, nn.ModuleDict(model.books())
    pyro.clear_param_store()
    assert Trace_ELBO().loss(model, loaded, x) == pytest.approx(loss)


def test_several_sites_with_wrong_codebooks_and_features() -> None:
    model = Levels()
    with pytest.raises(ValueError, match=r"there are codebooks of \['coarse'\]; try a dict from each"):
        VectorQuantizedGuide(model, {"coarse": model.coarse}).setup(data())
    with pytest.raises(ValueError, match="'fine'.* 7 codes and the codebook 5"):
        VectorQuantizedGuide(model, {"coarse": model.coarse, "fine": Codebook(CODES, DIM)}).setup(data())
    match = r"and site 'fine' has 1 positions in each.*try an encoder to \(N, 7\), that is \(N, 2, 2\) and \(N, 1, 3\)"
    encoder = nn.Sequential(nn.Linear(PIXELS, 3 * DIM), nn.Unflatten(-1, (3, DIM)))
    with pytest.raises(ValueError, match=match):
        VectorQuantizedGuide(model, model.books(), encoder).setup(data())
    pyro.clear_param_store()
    shared = Levels(shared=True)
    VectorQuantizedGuide(shared, shared.books(), nn.Linear(PIXELS, 4)).setup(data())


def test_particles_and_subsampling() -> None:
    x = data(10)
    model, encoder, guide = setup(x)
    guide.eval()
    one = loss_and_gradient(Trace_ELBO(), model, guide, x, encoder, model)
    for options in ({}, {"vectorize_particles": True, "max_plate_nesting": 1}):
        many = loss_and_gradient(Trace_ELBO(num_particles=3, **options), model, guide, x, encoder, model)
        assert many[0] == pytest.approx(one[0])
        torch.testing.assert_close(many[1], one[1])
    scaled = Trace_ELBO().differentiable_loss(model, guide, x, 40)
    assert float(scaled.detach()) == pytest.approx(4 * one[0])
    torch.testing.assert_close(torch.autograd.grad(scaled, [model.weights])[0], 4 * one[1][-1])


# The commitment term


WAKE_SLEEP = {"num_particles": 2, "insomnia": 1.0}


def commitment_gradient(elbo: Any) -> Tensor:
    """What the commitment term adds to the gradient of the encoder."""
    x, gradients = data(), []
    for commitment in (1.0, 0.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, encoder, guide = setup(x, commitment=commitment)
        guide.eval()
        gradients.append(torch.cat([g.flatten() for g in loss_and_gradient(elbo, model, guide, x, encoder)[1]]))
    return gradients[0] - gradients[1]


@pytest.mark.parametrize(
    "elbo",
    [TraceMeanField_ELBO(), RenyiELBO(num_particles=2), ReweightedWakeSleep(**WAKE_SLEEP)],  # type: ignore[arg-type]
)
def test_every_loss_decreases_the_commitment_term(elbo: Any) -> None:
    torch.testing.assert_close(commitment_gradient(elbo), commitment_gradient(Trace_ELBO()))


def test_a_plain_factor_would_increase_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: in the wake-phi loss the guide's log-density counts negatively."""
    right = commitment_gradient(Trace_ELBO())
    monkeypatch.setattr(
        "pyro_amortized.guides.vector_quantized.add_gradient",
        lambda name, term: pyro.factor(name, term - term.detach(), has_rsample=True),
    )
    torch.testing.assert_close(commitment_gradient(ReweightedWakeSleep(**WAKE_SLEEP)), -right)  # type: ignore[arg-type]


def test_training_by_wake_sleep_lowers_the_commitment_term() -> None:
    x = data(60)
    model, encoder, guide = setup(x, commitment=1.0)
    encoder.linear.weight.data.mul_(3)
    before = guide.commitment_loss(x).mean()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ReweightedWakeSleep(**WAKE_SLEEP))  # type: ignore[arg-type]
    for _ in range(100):
        svi.step(x)
    assert guide.commitment_loss(x).mean() < 0.5 * before


# When the codebook moves


def record_updates(codebook: Codebook) -> list[int]:
    """Grows by the number of batches of each update of the codebook."""
    updates, settle = [], codebook.settle

    def recorded() -> None:
        if codebook._collected is not None:
            updates.append(codebook._collected.num_batches)
        settle()

    codebook.settle = recorded  # type: ignore[method-assign]
    return updates


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("Adam", {"lr": 0.01}),
        ("ClippedAdam", {"lr": 0.01}),  # writes to `p.data`, as the next two
        ("AdagradRMSProp", {}),
        ("DCTAdam", {"lr": 0.01}),
        ("SGD", {"lr": 0.01}),
        ("SGD", {"lr": 0.0}),  # the end of a step is to be seen from its gradients
    ],
)
@pytest.mark.parametrize("vectorize", [True, False])
def test_codebook_is_updated_once_for_each_step(optimizer: str, options: dict[str, float], vectorize: bool) -> None:
    x = data()
    model, _, guide = setup(x, decay=0.9, revive_below=0.0)
    updates = record_updates(model.codebook)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=2)
    svi = SVI(model, guide, getattr(pyro.optim, optimizer)(options), elbo)
    seen = []
    for _ in range(5):
        svi.step(x)
        seen.append(model.codebook.embeddings.clone())
    model.codebook.settle()
    assert updates == [1 if vectorize else 3] * 5
    assert all(not torch.equal(first, second) for first, second in zip(seen, seen[1:], strict=False))


def test_codebook_is_updated_by_training_alone() -> None:
    x = data()
    model, _, guide = setup(x)
    updates = record_updates(model.codebook)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with torch.no_grad():
        Trace_ELBO().loss(model, guide, x)
    svi.evaluate_loss(x)
    guide(x), Trace_ELBO().differentiable_loss(model, guide, x)  # no backward pass follows
    guide.codes(x), guide.median(x), guide.commitment_loss(x), Predictive(model, guide=guide, num_samples=2)(x)
    collapse_report(model, guide, (x,))
    for module in (guide, model):  # the model's flag holds for the codebook as well
        module.eval()
        svi.step(x)
        module.train()
    model.codebook.settle()
    assert updates == []
    svi.step(x)
    model.codebook.settle()
    assert updates == [1]


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(num_particles=3),
        RenyiELBO(num_particles=3),
        ReweightedWakeSleep(num_particles=3, insomnia=1.0, vectorize_particles=False),
    ],
)
@pytest.mark.parametrize("subsample", [False, True])
def test_one_step_has_one_q(elbo: Any, subsample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = data()

    class Subsampled(VQVAE):
        def forward(self, x: Tensor, size: int | None = None) -> None:
            pyro.module("vqvae", self)
            with pyro.plate("data", len(x), subsample_size=10) as index:
                pyro.sample(
                    "x",
                    dist.Normal(self.codebook(self.code()).flatten(-2) @ self.weights, 0.5).to_event(1),
                    obs=x[index],
                )

    model = (Subsampled if subsample else VQVAE)(decay=0.5)
    guide = VectorQuantizedGuide(model, model.codebook, Encoder())
    guide.setup(x)
    vectors: list[Tensor] = []
    nearest = model.codebook._nearest
    monkeypatch.setattr(
        model.codebook, "_nearest", lambda rows: (vectors.append(model.codebook.embeddings.clone()), nearest(rows))[1]
    )
    updates = record_updates(model.codebook)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), elbo)
    for _ in range(3):
        svi.step(x)
    assert updates == [3, 3]
    assert len(vectors) == 9
    for first, *others in (vectors[:3], vectors[3:6], vectors[6:]):
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(vectors[2], vectors[3])
    assert not torch.equal(vectors[5], vectors[6])


@pytest.mark.parametrize("zero_grad", ["before the step", "before backward"])
@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_gradients_make_one_step(zero_grad: str, parts: int) -> None:
    x = data()
    model, encoder, guide = setup(x, decay=0.8, revive_below=0.0)
    codebook = model.codebook
    optimizer = torch.optim.SGD([*encoder.parameters(), *model.parameters()], lr=0.01)
    counts, sums = codebook.counts.clone(), codebook.sums.clone()
    for _ in range(4):
        if zero_grad == "before the step":
            optimizer.zero_grad()
        number, total = torch.zeros(CODES), torch.zeros(CODES, DIM)
        for part in range(parts):
            batch = x[part::parts]
            loss = Trace_ELBO().differentiable_loss(model, guide, batch)
            if zero_grad == "before backward" and part == 0:
                optimizer.zero_grad()
            with torch.no_grad():
                features, codes = encoder(batch).flatten(0, 1), guide.codes(batch).flatten()
            indicator = torch.nn.functional.one_hot(codes, CODES).double()
            number, total = number + indicator.sum(0) / parts, total + indicator.T @ features / parts
            loss.backward(retain_graph=True)
            loss.backward()  # a second pass through the same graph is no second batch
        optimizer.step()
        counts, sums = 0.8 * counts + 0.2 * number, 0.8 * sums + 0.2 * total
    codebook.settle()
    torch.testing.assert_close(codebook.counts, counts)
    torch.testing.assert_close(codebook.sums, sums)
    torch.testing.assert_close(codebook.embeddings, sums / counts[:, None])


@pytest.mark.parametrize("save", ["state_dict", "pickle"])
def test_resumed_training_goes_on_as_it_would_have(save: str) -> None:
    x = data()

    def train(model: VQVAE, guide: VectorQuantizedGuide, steps: int) -> Tensor:
        optimizer = torch.optim.SGD([*guide.inference.parameters(), *model.parameters()], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(model, guide, x).backward()
            optimizer.step()
        return torch.cat(
            [model.codebook.embeddings.flatten(), model.codebook.counts, guide.inference.encoder.linear.bias]
        )

    model, _, guide = setup(x, decay=0.8)
    train(model, guide, 2)
    state = copy.deepcopy((guide.state_dict(), model.state_dict()))
    pickled = pickle.dumps(guide)
    expected = train(model, guide, 2)
    pyro.clear_param_store()
    other, _, loaded = setup(data(seed=9), decay=0.8)
    train(other, loaded, 1)  # what it has collected is of no account any more
    pyro.clear_param_store()
    other.load_state_dict(state[1])
    if save == "pickle":
        loaded = pickle.loads(pickled)
        loaded.model, other.codebook = other, loaded.codebook
    else:
        loaded.load_state_dict(state[0])
    torch.testing.assert_close(train(other, loaded, 2), expected, rtol=0, atol=0)


def test_moved_between_steps() -> None:
    x = data()
    model, encoder, guide = setup(x)
    Trace_ELBO().differentiable_loss(model, guide, x).backward()
    for dtype in (torch.float32, torch.float64):  # with gradients, so that the step goes on
        model.to(dtype), guide.to(dtype)
        torch.set_default_dtype(dtype)
        model.prior = model.prior.to(dtype)
        Trace_ELBO().differentiable_loss(model, guide, x.to(dtype)).backward()
    model.codebook.settle()
    assert model.codebook.embeddings.dtype == torch.float64
    assert model.codebook.embeddings.isfinite().all()


def test_eval_settles_the_codebook() -> None:
    x = data()
    model, _, guide = setup(x)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    assert not model.codebook.is_settled
    guide.eval()
    assert model.codebook.is_settled


def test_features_are_freed() -> None:
    x = data()
    model, _, guide = setup(x)
    Trace_ELBO().differentiable_loss(model, guide, x).backward()
    quantized = model.codebook._quantized
    assert quantized is not None
    reference = weakref.ref(quantized.features)
    del quantized
    model.codebook._quantized = None
    gc.collect()
    assert reference() is None


@pytest.mark.filterwarnings("ignore:encoder.* was not registered in the param store:UserWarning")
def test_frozen_encoder_trains_the_codebook() -> None:
    x = data()
    model, encoder, guide = setup(x, decay=0.5)
    encoder.requires_grad_(False)
    updates = record_updates(model.codebook)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2))
    for _ in range(80):
        svi.step(x)
    assert updates == [2] * 79
    features, codes = encoder(x).flatten(0, 1), guide.codes(x).flatten()
    for k in codes.unique():
        torch.testing.assert_close(model.codebook.embeddings[k], features[codes == k].mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("to_event", [True, False])
def test_training_finds_the_clusters(to_event: bool) -> None:
    labels = torch.randint(0, 4, (200,))
    x = torch.eye(4)[labels] * 3 + 0.1 * torch.randn(200, 4)
    model = VQVAE(to_event=to_event)
    guide = VectorQuantizedGuide(model, model.codebook)  # the default encoder
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(300)]
    guide.eval()
    codes = guide.codes(x)
    assert codes.shape == ((200, POSITIONS) if to_event else (POSITIONS, 200))
    codes = codes if to_event else codes.T
    assert losses[-1] < 0.6 * losses[0]
    decoded = model.codebook.embeddings[codes].flatten(1) @ model.weights
    assert (decoded.argmax(-1) == labels).double().mean() > 0.98
    exact = model.log_likelihood(x, codes) - POSITIONS * math.log(CODES)
    assert -svi.evaluate_loss(x) == pytest.approx(float(exact.sum().detach()))


def test_global_latents_and_one_code() -> None:
    codebook = Codebook(3, 1)

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(codebook(code).squeeze(-1) + shift, 1.0), obs=x)

    x = torch.randn(12)
    guide = VectorQuantizedGuide(model, codebook)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    assert all(math.isfinite(svi.step(x)) for _ in range(3))
    assert isinstance(guide, LocalGuide)
    assert {name: value.shape for name, value in guide.median(x).items()} == {"shift": (), "code": (12,)}
    report = collapse_report(model, guide, (x,))
    assert list(report.dataset["latent"].values) == ["code"]
    assert "shift" in report.dataset.attrs["global_latents"]


def test_feature_maps() -> None:
    codebook = Codebook(CODES, DIM)

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, DIM, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.unsqueeze(1)).movedim(1, -1)

    def model(x: Tensor) -> None:
        plate = pyro.plate("data", len(x), dim=-1)
        with plate, pyro.plate("rows", 2, dim=-3), pyro.plate("columns", 3, dim=-2):
            code = pyro.sample("code", dist.Categorical(torch.ones(CODES)))  # (rows, columns, data)
        with plate:
            mean = nn.functional.interpolate(codebook(code).sum(-1).permute(2, 0, 1)[:, None], scale_factor=2)
            pyro.sample("x", dist.Normal(mean[:, 0], 1.0).to_event(2), obs=x)

    x = torch.randn(7, 4, 6)
    guide = VectorQuantizedGuide(model, codebook, Convolution())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(x)) for _ in range(3))
    features = guide.inference.encoder(x)  # (data, rows, columns, D)
    assert torch.equal(guide.codes(x), nearest(codebook, features).permute(1, 2, 0))
    report = collapse_report(model, guide, (x,))
    assert list(report.dataset["latent"].values)[:4] == ["code[0,0]", "code[0,1]", "code[0,2]", "code[1,0]"]


# Saving


def test_saved_and_loaded() -> None:
    x = data()
    model, _, guide = setup(x)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    guide.eval()
    loss, codes = Trace_ELBO().loss(model, guide, x), guide.codes(x)
    file = io.BytesIO()
    torch.save({"guide": guide.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for early in (True, False):
        pyro.clear_param_store()
        other = VQVAE()
        copied = VectorQuantizedGuide(other, other.codebook, Encoder())
        if not early:
            copied.setup(data(seed=9))
        copied.load_state_dict(state["guide"])
        other.load_state_dict(state["model"])
        copied.eval()
        assert torch.equal(copied.codes(x), codes)
        assert Trace_ELBO().loss(other, copied, x) == pytest.approx(loss)
        assert other.codebook.perplexity == pytest.approx(model.codebook.perplexity)
        torch.testing.assert_close(other.codebook.sums, model.codebook.sums)


def test_pickled_and_copied_in_training() -> None:
    x = data()
    model, _, guide = setup(x)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    for make_copy in (lambda guide: pickle.loads(pickle.dumps(guide)), copy.deepcopy):
        pyro.clear_param_store()
        other = make_copy(guide)
        other.model = model
        assert torch.equal(other.codes(x), guide.codes(x))
        other.codebook = copy.deepcopy(model.codebook)
        with pytest.raises(ValueError, match="with the guide's own codebook"):
            SVI(model, other, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
        other.codebook = model.codebook
        assert math.isfinite(SVI(model, other, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x))
        assert torch.equal(copy.deepcopy(model.codebook).embeddings, model.codebook.embeddings)
        guide = other


# The collapse report


def test_report_against_the_definition(tmp_path: Path) -> None:
    x, prior = data(40), torch.randn(CODES)
    model, _, guide = setup(x, prior=prior)
    guide.eval()
    codes = guide.codes(x)
    report = collapse_report(model, guide, (x,))
    usage = torch.nn.functional.one_hot(codes, CODES).double().mean(0)
    np.testing.assert_allclose(report.dataset["kl"], -prior.log_softmax(0)[codes].mean(0))
    np.testing.assert_allclose(report.dataset["perplexity"], torch.exp(-torch.xlogy(usage, usage).sum(-1)))
    np.testing.assert_allclose(report.dataset["usage"], usage)
    whole = usage.mean(0)
    assert report.perplexity == pytest.approx(float(torch.exp(-torch.xlogy(whole, whole).sum())))
    assert 1 < report.perplexity <= CODES
    rows = [tuple(row) for row in codes.tolist()]
    entropy = -sum(rows.count(row) / 40 * math.log(rows.count(row) / 40) for row in set(rows))
    assert report.mutual_information == pytest.approx(entropy)
    assert report.dataset.attrs["aggregate_kl"] == pytest.approx(report.dataset.attrs["total_kl"] - entropy)
    assert report.active_units == POSITIONS
    assert list(report.dataset["latent"].values) == ["code[0]", "code[1]", "code[2]"]
    assert "No collapse: all 3 positions are active" in str(report)
    assert "perplexity" in str(report)
    loader = DataLoader(TensorDataset(x), batch_size=16)
    batches = collapse_report(model, guide, loader)
    assert batches.dataset.equals(report.dataset)
    report.to_netcdf(tmp_path / "report.nc")
    assert str(CollapseReport.from_netcdf(tmp_path / "report.nc")) == str(report)
    ax = report.plot()
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], np.log(report.dataset["perplexity"]))
    report.plot_curve(label="codes")


class _LargestTensor(TorchDispatchMode):
    """Knows how many numbers the largest tensor made has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_report_of_a_large_codebook_takes_little_memory() -> None:
    model, _, guide = setup(data(40))
    found = find_codes(model, guide.eval(), (data(40),), None, None, False)
    found.num_codes, (count, positions) = 1000, found.codes.shape
    found.codes = torch.randint(0, 1000, (count, positions))
    settings = {"threshold": 0.01, "epsilon": 0.01, "delta": 0.01}
    with _LargestTensor() as largest:
        dataset = codes_dataset(found, settings)
    assert largest.size <= positions * 1000
    indicator = torch.nn.functional.one_hot(found.codes, 1000).double()
    np.testing.assert_allclose(dataset["posterior_mean_variance"], indicator.var(0).sum(-1))
    np.testing.assert_allclose(dataset["usage"], indicator.mean(0))


def test_report_with_positions_in_a_plate() -> None:
    x = data(40)
    pyro.set_rng_seed(1)
    event, _, first = setup(x)
    report = collapse_report(event, first.eval(), (x,))
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    plate, _, second = setup(x, to_event=False)
    assert collapse_report(plate, second.eval(), (x,)).dataset.equals(report.dataset)


def test_codes_that_tell_nothing_have_collapsed() -> None:
    x = data(40)
    model, encoder, guide = setup(x)
    guide.eval()
    with torch.no_grad():
        encoder.linear.weight.zero_()
    report = collapse_report(model, guide, (x,))
    assert report.active_units == 0
    assert report.mutual_information == 0
    np.testing.assert_allclose(report.dataset["perplexity"], 1.0)
    np.testing.assert_allclose(report.dataset["kl"], math.log(CODES))  # which is no sign of use
    assert "Collapsed: every datapoint has the same codes" in report.verdict
    with torch.no_grad():
        encoder.linear.weight[0] = 5.0
    verdict = collapse_report(model, guide, (x,)).verdict
    assert "2 of 3 positions have the same code everywhere: code[1], code[2]" in verdict


def test_continuous_latents_have_no_perplexity() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    report = collapse_report(model, AmortizedGuide(model), (torch.randn(5),), num_samples=2)
    with pytest.raises(ValueError, match="Cannot give the perplexity of the codebook because the latents are no codes"):
        _ = report.perplexity


# Errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_codes": 1, "dim": 2}, "num_codes=1 because it must be an integer of at least 2"),
        ({"num_codes": 2.0, "dim": 2}, "num_codes=2.0 because it must be an integer"),
        ({"num_codes": 4, "dim": 0}, "dim=0 because it must be an integer of at least 1"),
        ({"num_codes": 4, "dim": 2, "decay": 1.0}, "decay=1.0 because it must be at least 0 and below 1"),
        ({"num_codes": 4, "dim": 2, "revive_below": -0.1}, "revive_below=-0.1 because it must be at least 0"),
    ],
)
def test_wrong_codebooks(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Codebook(**options)


def test_wrong_features_and_codes() -> None:
    codebook = Codebook(CODES, DIM)
    with pytest.raises(ValueError, match="this Codebook has seen no features yet; try guide.setup"):
        codebook.nearest(torch.zeros(3, DIM))
    codebook.initialize(torch.randn(20, DIM))
    with pytest.raises(ValueError, match=r"features of shape \(3, 4\) because the vectors of this Codebook have dim 2"):
        codebook.nearest(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="torch.float32 on cpu because this Codebook holds torch.float64"):
        codebook.nearest(torch.zeros(3, DIM, dtype=torch.float32))
    features = torch.zeros(3, 4, DIM)
    features[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"of 1 datapoints \(first: \[1\]\) because they are NaN or infinite"):
        codebook.quantize(features)
    with pytest.raises(ValueError, match="codes of type torch.float64 because they are positions"):
        codebook(torch.zeros(3))


def one_site(prior: Any, **plates: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("code", prior)
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([PIXELS]).to_event(1), obs=x)

    return model


def normal_beside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("code", dist.Categorical(torch.ones(CODES)))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([PIXELS]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (one_site(dist.Categorical(torch.ones(4))), "its prior has 4 codes and the codebook 5"),
        (one_site(dist.Bernoulli(0.5)), "its prior is no Categorical but of kind 'bernoulli'"),
        (one_site(dist.Categorical(torch.ones(5)).mask(False)), "because the model masks it"),
        (one_site(dist.Normal(0.0, 1.0)), r"local latents \['code'\] because this guide infers sites of codes"),
        (normal_beside, r"local latents \['code', 'z'\] because this guide infers sites of codes"),
    ],
)
def test_wrong_models(model: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VectorQuantizedGuide(model, Codebook(CODES, DIM)).setup(data())


def test_wrong_guides() -> None:
    model = VQVAE()
    with pytest.raises(ValueError, match="because it is no Codebook; try the Codebook"):
        VectorQuantizedGuide(model, nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="commitment=-1 because it must be a finite number, 0 or more"):
        VectorQuantizedGuide(model, model.codebook, commitment=-1)
    with pytest.raises(ValueError, match="Cannot use a family with vector-quantised codes"):
        VectorQuantizedGuide(model, model.codebook, family="normal")
    wrong = nn.Unflatten(1, (2, 2))
    with pytest.raises(ValueError, match=r"features of shape \(30, 2, 2\) because site 'code' has 3 positions"):
        VectorQuantizedGuide(model, model.codebook, wrong).setup(data())
    encoder = nn.Sequential(nn.Linear(4, 9), nn.Unflatten(1, (3, 3)))
    with pytest.raises(ValueError, match="Cannot quantize features of shape .* have dim 2"):
        VectorQuantizedGuide(model, model.codebook, encoder).setup(data())


def test_wrong_calls() -> None:
    x = data()
    model, _, guide = setup(x)
    with pytest.raises(ValueError, match="because q has one possible value, the nearest codes; try guide.codes"):
        guide.posterior(x)
    with pytest.raises(ValueError, match=r"holds 1 NaN values|NaN or infinite"):
        Trace_ELBO().loss(model, guide, torch.cat([x[:3], torch.full((1, PIXELS), math.nan)]))
    with (
        pytest.raises(ValueError, match="compiled ELBO because its moving averages are kept by Python"),
        warnings.catch_warnings(action="ignore"),  # torch announces the end of torch.jit
    ):
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO()).step(x)
    with pytest.raises(ValueError, match="because there is only one datapoint"):
        collapse_report(model, guide, (x[:1],))
    noisy = VectorQuantizedGuide(model, model.codebook, nn.Sequential(nn.Dropout(0.5), Encoder()), name="noisy")
    with pytest.raises(ValueError, match="its encoder gives different codes for the same data in two calls"):
        collapse_report(model, noisy, (x,))
    scaled = pyro.poutine.scale(model, 0.5)
    with pytest.raises(ValueError, match="because the model scales its codes 'code' by 0.5"):
        collapse_report(scaled, VectorQuantizedGuide(scaled, model.codebook, Encoder(), name="scaled").eval(), (x,))


LOOK_UPS: dict[str, Callable[[Codebook, Tensor], Tensor]] = {
    "all": lambda codebook, code: codebook(code),
    "in two parts": lambda codebook, code: torch.cat([codebook(code[:, :1]), codebook(code[:, 1:])], 1),
    "position by position": lambda codebook, code: torch.stack([codebook(k) for k in code.unbind(1)], 1),
    "dropping some vectors": lambda codebook, code: codebook(code) * torch.tensor([1.0, 0.0, 0.0])[:, None],
    "a code beside them": lambda codebook, code: codebook(code) - codebook(torch.tensor(0)),
    "overwritten": lambda codebook, code: codebook(code.index_fill_(1, torch.tensor([0]), 0)),
}
LOSSY_LOOK_UPS: dict[str, Callable[[Codebook, Tensor], Tensor]] = {  # the twins that must fail
    "a copy": lambda codebook, code: codebook(code + 0),
    "a copied part": lambda codebook, code: torch.cat([codebook(code[:, :1]), codebook(code[:, 1:].clone())], 1),
    "by hand": lambda codebook, code: torch.cat([codebook(code[:, :1]), codebook.embeddings[code[:, 1:]]], 1),
    "a part": lambda codebook, code: nn.functional.pad(codebook(code[:, :1]), (0, 0, 0, POSITIONS - 1)),
}


class LookingUp(VQVAE):
    """Looks its codes up in a way of its own."""

    def __init__(self, look_up: Callable[[Codebook, Tensor], Tensor]) -> None:
        super().__init__()
        self.look_up = look_up

    def forward(self, x: Tensor, size: int | None = None) -> None:
        pyro.module("vqvae", self)
        with pyro.plate("data", len(x)):
            mean = self.look_up(self.codebook, self.code()).flatten(-2) @ self.weights
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("name", LOOK_UPS)
def test_ways_to_look_codes_up(name: str) -> None:
    model = LookingUp(LOOK_UPS[name])
    guide = VectorQuantizedGuide(model, model.codebook, Encoder())
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(data()))


@pytest.mark.parametrize("name", LOSSY_LOOK_UPS)
def test_a_lost_gradient_is_noticed(name: str) -> None:
    model = LookingUp(LOSSY_LOOK_UPS[name])
    guide = VectorQuantizedGuide(model, model.codebook, Encoder())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    number = 0 if name == "a copy" else 30
    with pytest.raises(
        ValueError, match=f"Cannot train the encoder because .* looked up only {number} of the 90 codes"
    ):
        svi.step(data())
    assert math.isfinite(svi.evaluate_loss(data()))


def test_another_structure_is_noticed() -> None:
    class Growing(VQVAE):
        positions = POSITIONS

        def forward(self, x: Tensor, size: int | None = None) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("code", dist.Categorical(torch.ones(self.positions, CODES)).to_event(1))
                pyro.sample("x", dist.Normal(0.0, 1.0).expand([PIXELS]).to_event(1), obs=x)

    model = Growing()
    guide = VectorQuantizedGuide(model, model.codebook, Encoder())
    guide.setup(data())
    model.positions = 4
    with pytest.raises(ValueError, match=r"are \[\('code', 5, 4\)\] and were \[\('code', 5, 3\)\] when it was set up"):
        guide(data())


# The example


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    images = np.random.default_rng(0).integers(0, 255, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    options = ["--data", str(tmp_path / "images.npz"), "--num-steps", "2", "--num-images", "3", "--out", str(tmp_path)]
    example = Path(__file__).parents[2] / "examples" / "vq_vae.py"
    monkeypatch.setattr("sys.argv", [example.name, *options])
    monkeypatch.syspath_prepend(example.parent)
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "autoregressive, codes: Posterior collapse over 3 datapoints" in printed
    assert len(re.findall(r"^(?:independent|autoregressive), Gaussian( +-?\d+\.\d+){5} +\d+$", printed, re.M)) == 2
    assert (
        len(re.findall(r"^(?:independent|autoregressive), codes( +-?\d+\.\d+){6} +\d +\d+\.\d+$", printed, re.M)) == 2
    )
    assert (tmp_path / "vq_vae.png").exists()
