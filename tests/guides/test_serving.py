"""Exported programs give what guides do, for other numbers of datapoints, where neither Pyro nor this package is."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    ConvEncoder,
    CountEncoder,
    DeepSetEncoder,
    DiscreteAmortizedGuide,
    Flow,
    IterativeAmortizedGuide,
    MLPEncoder,
    PerDatapointGuide,
    SemiAmortizedGuide,
    SequenceEncoder,
    SetEncoder,
    VectorQuantizedGuide,
    over_datasets,
)
from pyro_amortized.export import to_arviz

PROBS = (0.05, 0.5, 0.95)
X = torch.linspace(-2.0, 2.0, 18).reshape(6, 3)


def sites(x: Tensor) -> None:
    """Global latents, and local ones of every kind of support."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        scale = pyro.sample("scale", dist.Uniform(0.5, 2.0))
        loc = shift + z.sum(-1, keepdim=True) + rate.unsqueeze(-1) * share
        pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)


def simple(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 3]).to_event(1), obs=x)


def set_up(guide: Any, *args: Any) -> Any:
    """A guide after a step of training, so that answers differ between datapoints."""
    guide.setup(*args)
    SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(*args)
    return guide.eval()


def run(program: Any, guide: Any, *args: Any) -> Any:
    return program.module()(*guide.encoder_inputs(*args))


def says(guide: Any, output: str, *args: Any) -> Any:
    """What a program should give."""
    torch.manual_seed(0)
    if output == "phi":
        return guide.variational_parameters(*args)
    if output == "sample":
        return guide.layout.values(guide.posterior(*args).sample())
    return guide.median(*args) if output == "median" else guide.quantiles(PROBS, *args)


OUTPUTS = ("phi", "median", "quantiles", "sample")


def check(guide: Any, example: tuple[Any, ...], *others: tuple[Any, ...], outputs: tuple[str, ...] = OUTPUTS) -> None:
    """Outputs against what the guide says."""
    for output in outputs:
        program = guide.exported(*example, output=output)
        for args in (example, *others):
            torch.manual_seed(0)
            actual, expected = run(program, guide, *args), says(guide, output, *args)
            if output == "sample" and len(example[0]) != len(args[0]):  # bounds of the layout are the example's
                actual.pop("scale", None), expected.pop("scale", None)
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


FAMILIES: dict[str, Any] = {
    "normal": "normal",
    "multivariate_normal": "multivariate_normal",
    "low_rank_multivariate_normal": "low_rank_multivariate_normal",
    "structured": "structured",
    "mixture": "mixture",
    "flow": "flow",
    "spline flow": lambda dim: Flow(dim, "spline_autoregressive", num_transforms=1),
    "planar flow": lambda dim: Flow(dim, "planar"),
    "zuko flow": lambda dim: Flow(dim, "zuko.NSF", num_transforms=1),
}


SLOW = [*FAMILIES][1:]


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES])
def test_every_family(family: str) -> None:
    if family.startswith("zuko"):
        pytest.importorskip("zuko")
    check(set_up(AmortizedGuide(sites, family=FAMILIES[family]), X), (X,), (X[:4] + 1.0,))


def schools(y: Tensor) -> None:
    with pyro.plate("school", y.shape[0], dim=-2):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", y.shape[1], dim=-1):
            p = pyro.sample("p", dist.Normal(s, 1.0))
            pyro.sample("y", dist.Normal(p, 1.0), obs=y)


@pytest.mark.parametrize(
    ("family", "outputs"), [("normal", ("median",)), pytest.param("structured", OUTPUTS, marks=pytest.mark.slow)]
)
def test_plates(family: str, outputs: tuple[str, ...]) -> None:
    check(set_up(AmortizedGuide(schools, family=family), X), (X,), (X[:4] + 1.0,), (X[:1],), outputs=outputs)


def counties(y: Tensor, county: Tensor, number: int) -> None:
    with pyro.plate("county", number):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(a[..., county], 1.0), obs=y)


@pytest.mark.slow
def test_long_format() -> None:
    guide = AmortizedGuide(counties, plate="county", groups={"obs": "county"})
    example = torch.randn(6), torch.tensor([0, 0, 1, 2, 2, 2]), 3
    other = torch.randn(9), torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, 4]), 5
    guide = set_up(guide, *example)
    program = guide.exported(*example, output="median")
    torch.testing.assert_close(run(program, guide, *other), guide.median(*other))
    with pytest.raises(ValueError, match="Cannot export .* single entry of plate 'county' .*; try an example of two"):
        guide.exported(torch.randn(3), torch.tensor([0, 0, 0]), 1)
    own = AmortizedGuide(
        counties, MLPEncoder(1), plate="county", groups={"obs": "county"}, encoder_input=lambda *a: a[0]
    )
    with pytest.raises(ValueError, match=r"Cannot export this encoder because .*; try PlateEncoder\(\)"):
        set_up(own, torch.randn(3), torch.tensor([0, 1, 2]), 3).exported(torch.randn(3), torch.tensor([0, 1, 2]), 3)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=y)


@pytest.mark.slow
def test_whole_data_sets() -> None:
    guide = AmortizedGuide(
        over_datasets(regression), SetEncoder(3), encoder_input=lambda x, y: torch.cat([x, y.unsqueeze(-1)], -1)
    )
    data = [(torch.randn(size, 7, 2), torch.randn(size, 7)) for size in (5, 3)]
    check(set_up(guide, *data[0]), *data)


def walk(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


ENCODERS: dict[str, tuple[Callable[..., None], Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "gru": (walk, lambda: SequenceEncoder(1), lambda n: torch.randn(n, 5)),
    "causal": (walk, lambda: SequenceEncoder(1, causal=True), lambda n: torch.randn(n, 5)),
    "transformer": (walk, lambda: SequenceEncoder(1, network="transformer"), lambda n: torch.randn(n, 5)),
    "pooled": (simple, lambda: SequenceEncoder(1, pooled=True), lambda n: torch.randn(n, 3)),
    "set": (simple, lambda: SetEncoder(1), lambda n: torch.randn(n, 3)),
    "deep set": (simple, lambda: DeepSetEncoder(1), lambda n: torch.randn(n, 3)),
    "counts": (simple, lambda: CountEncoder(3), lambda n: torch.poisson(torch.ones(n, 3))),
    "images": (simple, lambda: nn.Sequential(nn.Unflatten(1, (1, 3, 1)), ConvEncoder(1)), lambda n: torch.randn(n, 3)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(e, marks=[pytest.mark.slow] * (e not in ("transformer", "counts"))) for e in ENCODERS]
)
def test_every_encoder(name: str) -> None:
    model, encoder, data = ENCODERS[name]
    guide = set_up(AmortizedGuide(model, encoder(), encoder_input="x"), data(6))
    program = guide.exported(data(6), output="median")
    for size in (1, 2, 9):
        x = data(size)
        torch.testing.assert_close(run(program, guide, x), guide.median(x), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_lengths_are_an_input() -> None:
    guide = AmortizedGuide(simple, SequenceEncoder(1, pooled=True), encoder_input=lambda x: (x, (x > 0).sum(1)))
    program = set_up(guide, X).exported(X)
    torch.testing.assert_close(run(program, guide, X[2:]), guide.variational_parameters(X[2:]))


class Own(nn.Module):
    """An encoder as users write them."""

    def __init__(self, function: Callable[[Tensor], Tensor] = lambda x: x.view(len(x), -1)) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.function(x))


@pytest.mark.slow
def test_encoders_that_ask_for_a_length_and_have_modes() -> None:
    """In training mode too, the program is that of the evaluation mode, and leaves the guide in its own."""
    guide = set_up(AmortizedGuide(simple, Own()), X)
    expected = guide.variational_parameters(X[:4])
    program = guide.train().exported(X)
    assert guide.training
    assert all(part.training for part in guide.inference.modules())
    assert isinstance(guide.inference.encoder, Own)
    torch.testing.assert_close(run(program, guide, X[:4]), expected)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc(x), self.scale(x).exp()


@pytest.mark.parametrize("outputs", [("median",), pytest.param(OUTPUTS, marks=pytest.mark.slow)])
def test_pairs_single_datapoints_and_double_precision(outputs: tuple[str, ...]) -> None:
    check(set_up(AmortizedGuide(simple, Pair()), X[:1]), (X[:1],), (X,), outputs=outputs)
    torch.set_default_dtype(torch.float64)
    guide = set_up(AmortizedGuide(simple, name="double"), X.double())
    check(guide, (X.double(),), (X[:2].double(),), outputs=outputs)


def test_a_program_stays_as_it_is() -> None:
    guide = set_up(AmortizedGuide(simple), X)
    program = guide.exported(X)
    before = guide.variational_parameters(X).detach().clone()
    state, rng = copy.deepcopy(guide.state_dict()), torch.get_rng_state()
    guide.exported(X, output="sample")
    assert torch.equal(torch.get_rng_state(), rng)
    torch.testing.assert_close(guide.state_dict(), state)
    guide.train()
    SVI(simple, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    assert not torch.allclose(guide.variational_parameters(X), before, atol=1e-3)
    torch.testing.assert_close(run(program, guide, X), before)


def test_global_latents_as_inputs_and_answers() -> None:
    guide = set_up(AmortizedGuide(sites, encoder_input=["x", "shift"]), X)
    inputs = guide.encoder_inputs(X)
    program = guide.exported(X, output="median")
    torch.testing.assert_close(program.module()(*inputs), guide.median(X))
    moved = program.module()(inputs[0], inputs[1] + 1.0)
    assert not torch.allclose(moved["z"], guide.median(X)["z"])
    torch.testing.assert_close(moved["shift"], guide.median(X)["shift"])


# Guides of other kinds


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda: SemiAmortizedGuide(simple, num_steps=2), marks=pytest.mark.slow), lambda: refined()],
)
def test_guides_that_refine_export_their_encoder(make: Callable[[], Any]) -> None:
    guide = make()
    guide.setup(X)
    guide.eval()
    with pytest.warns(UserWarning, match="what the encoder of SemiAmortizedGuide says, without the 2 steps"):
        program = guide.exported(X)
    guide.num_steps = 0
    torch.testing.assert_close(run(program, guide, X[:4]), guide.variational_parameters(X[:4]))
    guide.exported(X)  # without a warning


def refined() -> Any:
    guide = AmortizedGuide(simple)
    guide.setup(X)
    return guide.refined(2)


def labels(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        b = pyro.sample("b", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal((z + y + b).unsqueeze(-1), 1.0).expand([*z.shape, 3]).to_event(1), obs=x)


@pytest.mark.slow
def test_discrete_latents() -> None:
    guide = DiscreteAmortizedGuide(labels)
    guide.setup(X)
    for output, expected in (("median", guide.median(X[:4])), ("quantiles", guide.quantiles(PROBS, X[:4]))):
        torch.testing.assert_close(run(guide.exported(X, output=output), guide, X[:4]), expected)
    many = run(guide.exported(X, output="sample"), guide, X[:1].expand(4000, -1))
    shares = many["y"].bincount(minlength=3) / 4000
    assert (shares - guide.probabilities(X[:1])["y"][0]).abs().max() < 4 * 0.5 / 4000**0.5
    with pytest.raises(ValueError, match="Cannot export phi because latents .* are discrete.*; try output=.median"):
        guide.exported(X)


def test_codes() -> None:
    codebook, decoder = Codebook(4, 2), nn.Linear(6, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Categorical(torch.ones(3, 4)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(codebook(code).flatten(-2)), 1.0).to_event(1), obs=x)

    guide = VectorQuantizedGuide(model, codebook)
    guide.setup(torch.randn(40, 3))
    for output in ("median", "sample"):
        assert torch.equal(run(guide.exported(X, output=output), guide, X[:4])["code"], guide.codes(X[:4]))


def masked(x: Tensor, present: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=present):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 3]).to_event(1), obs=x)


def test_masks_of_latents_are_not_known() -> None:
    present = torch.tensor([True, True, False, True, False, True])
    guide = set_up(AmortizedGuide(masked), X, present)
    with pytest.warns(UserWarning, match=r"knows no masks of latents: what it says of \['z'\] .* means nothing"):
        program = guide.exported(X, present)
    phi, expected = run(program, guide, X, present), guide.variational_parameters(X, present)
    torch.testing.assert_close(phi[present], expected[present])
    assert not torch.allclose(phi[~present], expected[~present])


# What is refused


def bounded(x: Tensor, low: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(low, low + 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_supports_of_single_datapoints() -> None:
    guide, args = AmortizedGuide(bounded), (torch.randn(5), torch.arange(5.0))
    with pytest.raises(ValueError, match="Cannot export values of local site 'z' .*; try output=.phi"):
        set_up(guide, *args).exported(*args, output="median")
    torch.testing.assert_close(run(guide.exported(*args), guide, *args), guide.variational_parameters(*args))


def global_only(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: AmortizedGuide(simple), {"output": "mean"}, 'none of .*; try output="phi"'),
        (lambda: AmortizedGuide(simple), {"output": "quantiles", "quantiles": (2.0,)}, "try .0.05, 0.5, 0.95"),
        (lambda: PerDatapointGuide(simple), {}, "from no encoder; try AmortizedGuide"),
        (lambda: IterativeAmortizedGuide(simple), {}, 'initial="encoder"'),
        (lambda: AmortizedGuide(global_only), {}, r"no local latents.*; try guide.quantiles"),
        (lambda: AmortizedGuide(simple, Own(lambda x: x if x.sum() > 0 else -x)), {}, "x.shape.0. in place of len"),
    ],
)
def test_refusals(make: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    guide = make()
    guide.setup(X)
    with pytest.raises(ValueError, match=f"(?s)Cannot .*because.*{message}"):
        guide.exported(X, **options)


def test_a_program_that_gives_other_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_amortized.guides import serving

    guide, whole = set_up(AmortizedGuide(simple), X), serving._export

    def wrong(module: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        module.inference.head.bias.data += 0.01
        try:
            return serving._copied(whole(module, inputs, *args, **options))
        finally:
            module.inference.head.bias.data -= 0.01

    monkeypatch.setattr(serving, "_export", wrong)
    with pytest.raises(ValueError, match="Cannot export .* gives other numbers than the guide does for 6 rows"):
        guide.exported(X)


# Elsewhere


CODE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyro", "pyro_amortized"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
for name in ("pyro", "pyro_amortized"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is there")
import torch
folder = sys.argv[1]
for name, inputs in torch.load(f"{folder}/inputs.pt").items():
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    torch.manual_seed(0)
    torch.save(program(*inputs), f"{folder}/{name}.out")
assert not any(name.split(".")[0] in ("pyro", "pyro_amortized") for name in sys.modules)
"""


@pytest.mark.parametrize(
    "outputs",
    [
        {"flow": ("sample",), "plates": ("median",)},
        pytest.param(dict.fromkeys(("flow", "plates"), OUTPUTS), marks=pytest.mark.slow),
    ],
)
def test_in_a_process_without_pyro(outputs: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    guides = {
        "flow": (set_up(AmortizedGuide(sites, family="flow", name="flow"), X), X),
        "plates": (set_up(AmortizedGuide(schools, name="plates"), X), X),
    }
    inputs, expected = {}, {}
    for name, (guide, x) in guides.items():
        for output in outputs[name]:
            torch.export.save(guide.exported(x, output=output), tmp_path / f"{name}_{output}.pt2")
            inputs[f"{name}_{output}"] = guide.encoder_inputs(x[:3])
            expected[f"{name}_{output}"] = says(guide, output, x[:3])
    torch.save(inputs, tmp_path / "inputs.pt")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    for name, value in expected.items():
        actual = torch.load(tmp_path / f"{name}.out")
        if name == "flow_sample":  # the bounds of its uniform site are the example's
            actual.pop("scale"), value.pop("scale")
        torch.testing.assert_close(actual, value, atol=1e-6, rtol=1e-6)


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_exports_are_of_whole_precision_under_autocast() -> None:
    x, guide = torch.randn(8), AmortizedGuide(rows)
    guide.setup(x)
    with torch.autocast("cpu", torch.bfloat16):
        program = guide.exported(x[:3], output="median")
        halved = to_arviz(rows, guide, (x,), num_samples=3)
    torch.testing.assert_close(program.module()(x)["z"], guide.eval().median(x)["z"], rtol=0, atol=1e-6)
    assert halved.posterior["z"].shape == (1, 3, 8)


def test_medians_in_half_precision() -> None:
    x = torch.randn(8)
    guide = AmortizedGuide(rows)
    guide.setup(x)
    exact = guide.median(x)["z"]
    torch.testing.assert_close(guide.to(torch.bfloat16).median(x.bfloat16())["z"].float(), exact, rtol=0.05, atol=0.05)
