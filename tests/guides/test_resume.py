"""A run resumed from a checkpoint goes on with the same numbers, whatever batch sizes a guide had met before."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, IterativeAmortizedGuide, PerDatapointGuide, SemiAmortizedGuide
from pyro_amortized.training import (
    AggressiveEncoder,
    KLAnnealing,
    linear_schedule,
    load_checkpoint,
    save_checkpoint,
)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("more", 3):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0)).sum(-1)
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.layers(z) + offset, 1.0).to_event(1), obs=x)


def start(Guide: Any, options: dict[str, Any]) -> tuple[Decoder, Any, Any]:
    pyro.clear_param_store()
    decoder = Decoder()
    guide = Guide(decoder.model, plate="data", **options)
    guide.setup(torch.randn(40, 4))
    return decoder, guide, pyro.optim.Adam({"lr": 0.01})


def losses(decoder: Decoder, guide: Any, optimizer: Any, sizes: list[int]) -> list[float]:
    svi = SVI(decoder.model, guide, optimizer, Trace_ELBO())
    return [svi.step(torch.randn(size, 4)) for size in sizes]


@pytest.mark.parametrize(
    ("Guide", "options"),
    [
        (AmortizedGuide, {}),
        (AmortizedGuide, {"family": "flow"}),
        (AmortizedGuide, {"encoder_input": "x"}),
        (PerDatapointGuide, {}),
        (SemiAmortizedGuide, {"num_steps": 2}),
        (IterativeAmortizedGuide, {"num_steps": 2, "num_particles": 2}),
    ],
)
def test_resumed_losses_are_equal_to_the_last_digit(Guide: Any, options: dict[str, Any], tmp_path: Path) -> None:
    decoder, guide, optimizer = start(Guide, options)
    losses(decoder, guide, optimizer, [12, 12, 7])
    save_checkpoint(tmp_path / "run.pt", decoder=decoder, guide=guide, optimizer=optimizer, step=3)
    expected = losses(decoder, guide, optimizer, [12, 7, 5, 12])
    decoder, guide, optimizer = start(Guide, options)
    loaded = load_checkpoint(tmp_path / "run.pt", decoder=decoder, guide=guide, optimizer=optimizer)
    assert loaded == {"step": 3}
    assert os.listdir(tmp_path) == ["run.pt"]
    assert losses(decoder, guide, optimizer, [12, 7, 5, 12]) == expected


def test_an_optimizer_in_use_is_put_back(tmp_path: Path) -> None:
    """Its momenta too, of which the first step does not tell; and a checkpoint of what waits to be used."""
    decoder, guide, optimizer = start(AmortizedGuide, {})
    losses(decoder, guide, optimizer, [8, 8, 8])
    parts = {"decoder": decoder, "guide": guide, "optimizer": optimizer}
    save_checkpoint(tmp_path / "run.pt", **parts)
    expected = losses(decoder, guide, optimizer, [8, 8, 8, 8])
    load_checkpoint(tmp_path / "run.pt", **parts)
    save_checkpoint(tmp_path / "again.pt", **parts)
    assert losses(decoder, guide, optimizer, [8, 8, 8, 8]) == expected
    load_checkpoint(tmp_path / "again.pt", **parts)
    assert losses(decoder, guide, optimizer, [8, 8, 8, 8]) == expected


def functional(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def test_parameters_of_functions_go_along(tmp_path: Path) -> None:
    def svi() -> Any:
        pyro.clear_param_store()
        return SVI(functional, AmortizedGuide(functional), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    run = svi()
    for _ in range(3):
        run.step(torch.randn(5))
    save_checkpoint(tmp_path / "run.pt", guide=run.guide, optimizer=run.optim)
    expected = [run.step(torch.randn(5)) for _ in range(3)]
    run = svi()
    with pytest.raises(ValueError, match=r"Cannot load parameters \['scale'\].*svi.evaluate_loss"):
        load_checkpoint(tmp_path / "run.pt", guide=run.guide, optimizer=run.optim)
    run.evaluate_loss(torch.randn(5))
    load_checkpoint(tmp_path / "run.pt", guide=run.guide, optimizer=run.optim)
    assert [run.step(torch.randn(5)) for _ in range(3)] == expected


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="Cannot read a checkpoint"):
        load_checkpoint(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="Cannot save the checkpoint"):
        save_checkpoint(tmp_path / "no" / "run.pt")
    with pytest.raises(ValueError, match="Cannot save model=<function>"):
        save_checkpoint(tmp_path / "run.pt", model=functional)
    save_checkpoint(tmp_path / "run.pt", step=1)
    with pytest.raises(ValueError, match=r"Cannot load \['guide'\] because the checkpoint holds \['step'\]"):
        load_checkpoint(tmp_path / "run.pt", guide=AmortizedGuide(functional))


def test_files_and_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path, module = tmp_path / "run.pt", nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    before = os.umask(0o027)
    try:
        save_checkpoint(path, module=module, optimizer=optimizer, epoch=3)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    for parts, message in (
        ({"optimizer": torch.optim.SGD(module.parameters(), momentum=0.9)}, r"another optimizer: it has no option"),
        ({"optimizer": torch.optim.Adam(nn.Linear(2, 3, bias=False).parameters())}, r"it is of \[2\] parameters"),
        ({"epoch": 0}, r"Cannot load epoch=<int> because it has no state .* try leaving it out"),
        ({"epoch": module}, r"Cannot load epoch=<Linear> because a plain value was saved"),
        ({"module": optimizer}, r"what was saved is of another optimizer"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, **parts)
    assert load_checkpoint(path, module=module, optimizer=optimizer) == {"epoch": 3}
    whole = path.read_bytes()
    for value in (module, torch.ones(2), whole[: len(whole) // 2]):
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)
        with pytest.raises(ValueError, match=r"because it is none, or a part of one"):
            load_checkpoint(path, module=module)
    with pytest.raises(ValueError, match=r"because there is no such file"):
        load_checkpoint(tmp_path / "absent.pt")


def test_parameters_of_another_shape_are_refused(tmp_path: Path) -> None:
    """Also where they could be broadcast."""
    for saved, made in (((1,), (4,)), ((4,), (1,))):
        pyro.clear_param_store()
        pyro.param("scale", torch.ones(saved))
        save_checkpoint(tmp_path / "run.pt")
        pyro.clear_param_store()
        pyro.param("scale", torch.zeros(made))
        with pytest.raises(ValueError, match=r"Cannot load parameter 'scale' because the model makes it of shape"):
            load_checkpoint(tmp_path / "run.pt")
        assert not pyro.param("scale").any()


class Scaled(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


def test_guides_need_not_be_set_up_and_modules_keep_their_parameters(tmp_path: Path) -> None:
    """Building draws initial weights, but not where others are to be loaded."""
    found = []
    for resumed in (False, True):
        pyro.clear_param_store()
        model = Scaled()
        run = SVI(model, AmortizedGuide(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        parts = {"model": model, "guide": run.guide, "optimizer": run.optim}
        if resumed:
            load_checkpoint(tmp_path / "run.pt", **parts)
        else:
            for _ in range(3):
                run.step(torch.randn(5))
            save_checkpoint(tmp_path / "run.pt", **parts)
        found.append([run.step(torch.randn(5)) for _ in range(3)])
    assert found[0] == found[1]


def test_schedulers_of_pyro_are_refused(tmp_path: Path) -> None:
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    with pytest.raises(ValueError, match="do not give the state of the optimizers"):
        save_checkpoint(tmp_path / "run.pt", optimizer=optimizer)


# States that wait, values that cannot be read again, and what else goes along


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def trained(x: Tensor) -> AmortizedGuide:
    guide = AmortizedGuide(normal)
    svi = SVI(normal, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(x)
    return guide.eval()


def test_a_state_that_waits_to_be_built_is_saved_again(tmp_path: Path) -> None:
    x = torch.randn(16)
    guide = trained(x)
    loaded, again, checked, last = (AmortizedGuide(normal, name=f"guide_{i}") for i in range(4))
    loaded.load_state_dict(guide.state_dict())
    again.load_state_dict(loaded.state_dict())
    inside = nn.ModuleDict({"guide": checked})
    inside.load_state_dict({f"guide.{name}": value for name, value in again.state_dict().items()})
    save_checkpoint(tmp_path / "run.pt", inside=inside)
    load_checkpoint(tmp_path / "run.pt", inside=nn.ModuleDict({"guide": last}))
    for other in (loaded, again, checked, last):
        assert torch.equal(other.eval().median(x)["z"], guide.median(x)["z"])


def test_a_checkpoint_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run.pt", best=np.float64(1.5), steps=np.int64(3), losses=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"Cannot save \['best'\] because one holds"):
        save_checkpoint(tmp_path / "run.pt", best=[np.float64(1.5)])
    assert os.listdir(tmp_path) == ["run.pt"]
    assert load_checkpoint(tmp_path / "run.pt") == {"best": 1.5, "steps": 3, "losses": [1.0, 2.0]}


def test_parameters_that_have_come_since_then_go(tmp_path: Path) -> None:
    def model(x: Tensor, learn: bool) -> None:
        one = torch.tensor(1.0)
        scale = pyro.param("scale", one, constraint=dist.constraints.positive) if learn else one
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    x, guide, optimizer = torch.randn(16), AmortizedGuide(model), pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    svi.step(x, False)
    save_checkpoint(tmp_path / "run.pt", guide=guide, optimizer=optimizer)
    expected = [svi.step(x, True) for _ in range(3)]
    load_checkpoint(tmp_path / "run.pt", guide=guide, optimizer=optimizer)
    assert [svi.step(x, True) for _ in range(3)] == expected


def test_schedules_go_along(tmp_path: Path) -> None:
    x = torch.randn(16)

    def start_again() -> tuple[AggressiveEncoder, KLAnnealing, dict[str, Any]]:
        pyro.clear_param_store()
        guide, optimizer = AmortizedGuide(normal), pyro.optim.Adam({"lr": 0.01})
        annealing = KLAnnealing(normal, guide, linear_schedule(10))
        svi = AggressiveEncoder(normal, guide, optimizer, Trace_ELBO(), window=2)
        return svi, annealing, {"svi": svi, "annealing": annealing, "guide": guide, "optimizer": optimizer}

    svi, annealing, parts = start_again()
    for _ in range(7):
        svi.step(x)
        annealing.step()
    svi.aggressive = False
    save_checkpoint(tmp_path / "run.pt", **parts)
    expected = [svi.step(x) for _ in range(4)]
    svi, annealing, parts = start_again()
    load_checkpoint(tmp_path / "run.pt", **parts)
    assert not svi.aggressive
    assert annealing.num_steps == 7
    assert [svi.step(x) for _ in range(4)] == expected
