"""Codebooks: nearest codes, moving averages, revived codes, and when training moves them."""

import gc
import math
import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, RenyiELBO, ReweightedWakeSleep, Trace_ELBO
from quantized_models import CODES, DIM, VQVAE, Encoder, data, nearest, setup
from torch import Tensor

from pyro_amortized import Codebook, VectorQuantizedGuide, collapse_report
from pyro_amortized.encoders.quantized import perplexity

pytestmark = pytest.mark.usefixtures("_float64")


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
