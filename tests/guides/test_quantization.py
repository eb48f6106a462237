"""Vector-quantised codes: ELBOs and gradients of their guide against the definitions, training, saving, the example."""

import copy
import io
import math
import pickle
import re
import runpy
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
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from quantized_models import CODES, DIM, PIXELS, POSITIONS, VQVAE, Encoder, data, nearest, setup
from torch import Tensor, nn

from pyro_amortized import Codebook, VectorQuantizedGuide, collapse_report
from pyro_amortized.guides import LocalGuide

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("_float64")


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


# Training


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
