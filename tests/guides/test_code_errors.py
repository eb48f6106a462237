"""What codebooks and guides of codes refuse, and which ways to look codes up lose no gradient."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from quantized_models import CODES, DIM, PIXELS, POSITIONS, VQVAE, Encoder, data, setup
from torch import Tensor, nn

from pyro_amortized import Codebook, VectorQuantizedGuide, collapse_report

pytestmark = pytest.mark.usefixtures("_float64")


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
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of torch.jit
        with pytest.raises(ValueError, match="compiled ELBO because its moving averages are kept by Python"):
            svi.step(x)
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
