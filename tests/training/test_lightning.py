"""Training by Lightning's Trainer in one process."""

import csv
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    PerDatapointGuide,
)
from pyro_amortized.training import FreeBitsELBO, KLAnnealing, linear_schedule

lightning = pytest.importorskip("lightning")
from lightning_runs import GUIDES, SIZE, Factors, KeepGradients, data, loader, quiet, sgd  # noqa: E402

from pyro_amortized.lightning import AggressiveTraining, SVIModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of Lightning's on loaders, loggers and checkpoints


@pytest.mark.thinned
@pytest.mark.parametrize("kind", list(GUIDES))
def test_trains_as_svi_does(kind: str, tmp_path: Path) -> None:
    """The same losses as SVI's with the same optimizer."""
    Guide, options = GUIDES[kind]
    found, expected = [], []
    for losses in (found, expected):
        pyro.clear_param_store()
        lightning.seed_everything(1)
        model = Factors()
        guide = Guide(model, **options)
        module = SVIModule(model, guide, optimizer=sgd)
        module.initialize(data())
        lightning.seed_everything(2)
        if losses is found:
            quiet(tmp_path).fit(module, loader())
            losses += module.history.dataset["train_loss"].values.tolist()
        else:
            svi = infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), infer.Trace_ELBO())
            losses += [svi.step(*batch) for _ in range(2) for batch in loader()]
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-6)


def functions() -> tuple[Any, Any, nn.Module]:
    """A model and a guide that are functions, with parameters of every kind."""
    decoder = nn.Linear(2, 3)

    def model(x: Tensor, index: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor, index: Tensor) -> None:
        weight = pyro.param("encoder.weight", lambda: torch.randn(3, 2))
        spread = pyro.param("spread", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, spread).to_event(1))

    return model, guide, decoder


def test_parameters_of_functions_are_trained_and_stay_in_the_store(tmp_path: Path) -> None:
    model, guide, decoder = functions()
    module = SVIModule(model, guide, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    module.initialize(data())
    assert {name for name, _ in module.named_parameters()} == {
        "called.decoder.weight",
        "called.decoder.bias",
        "store.scale",
        "store.encoder/weight",
        "store.spread",
    }
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    quiet(tmp_path).fit(module, loader())
    for name, value in pyro.get_param_store().items():
        assert not torch.equal(value, before[name])
    assert dict(module.named_parameters())["called.decoder.weight"] is decoder.weight
    assert pyro.param("scale") is not None
    assert pyro.param("scale").item() == pytest.approx(module.state_dict()["store.scale"].exp().item())


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("kind", ["functions", "AutoNormal", "AmortizedGuide", "method"])
def test_checkpoints_hold_everything(kind: str, built: bool, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        pyro.clear_param_store()
        model, guide, _ = functions()
        if kind == "method":
            holder = Factors()
            return holder.forward, AmortizedGuide(holder.forward)
        made = {"functions": lambda _: guide, "AutoNormal": AutoNormal, "AmortizedGuide": AmortizedGuide}
        return model, made[kind](model)

    batches = DataLoader(TensorDataset(*data()), batch_size=SIZE)
    trainer, module = quiet(tmp_path), SVIModule(*make())
    trainer.fit(module, batches, batches)
    trainer.save_checkpoint(tmp_path / "training.ckpt")
    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = seeded_loss(module)
    model, guide = make()
    if built:
        infer.Trace_ELBO().loss(model, guide, *data())
    waits = any(name.startswith(("store.", "called.")) for name in state)
    with pytest.warns(UserWarning, match=r"call module.initialize\(batch\)") if waits else nullcontext():
        loaded = SVIModule.load_from_checkpoint(tmp_path / "training.ckpt", model=model, guide=guide, weights_only=True)
    assert loaded.history.dataset.equals(module.history.dataset)
    loaded.initialize(data())
    torch.testing.assert_close(dict(loaded.state_dict()), state)
    assert seeded_loss(loaded) == pytest.approx(expected, rel=1e-6)


def batch_normalised(parts: bool = False) -> tuple[Any, nn.Module]:
    """A function as a model, whose decoder is a module with statistics and dropout, called as a whole or by parts."""
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8, affine=False), nn.Dropout(0.8), nn.Linear(8, 3))

    def model(x: Tensor, index: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for part in decoder if parts else [decoder]:
                z = part(z)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model, decoder


@pytest.mark.parametrize("parts", [False, True])
def test_modules_that_functions_call_are_parts_of_the_whole(parts: bool, tmp_path: Path) -> None:
    """Validation sees them in evaluation mode, and checkpoints hold their statistics."""
    model, decoder = batch_normalised(parts)
    module = SVIModule(model, AmortizedGuide(model), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    module.initialize(data())
    assert decoder[1].num_batches_tracked == 0
    assert all(part.training for part in decoder.modules())
    batches = DataLoader(TensorDataset(*data()), batch_size=SIZE)
    trainer = quiet(tmp_path)
    trainer.fit(module, batches, batches)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = {name: value.clone() for name, value in module.state_dict().items()}
    validated = [trainer.validate(module, batches, verbose=False)[0]["val_loss"] for _ in range(20)]
    assert decoder[1].num_batches_tracked == 2
    decoder.eval()
    evaluated = [infer.Trace_ELBO().loss(model, module.guide, *data()) for _ in range(20)]
    error = torch.tensor(validated + evaluated).reshape(2, -1).var(1).mean().div(20).mul(2).sqrt()
    assert abs(sum(validated) - sum(evaluated)) / 20 < 4 * error
    decoder.train()
    varied = [infer.Trace_ELBO().loss(model, module.guide, *data()) for _ in range(20)]
    assert abs(sum(validated) - sum(varied)) / 20 > 4 * error
    pyro.clear_param_store()
    other, loaded = batch_normalised(parts)
    with pytest.warns(UserWarning, match="wait for the first batch"):
        again = SVIModule.load_from_checkpoint(
            tmp_path / "last.ckpt", model=other, guide=AmortizedGuide(other), weights_only=True
        )
    again.initialize(data())
    torch.testing.assert_close(dict(again.state_dict()), state, rtol=0.0, atol=0.0)
    assert loaded[1].running_mean.abs().sum() > 0


class Decodes(nn.Module):
    """A module whose parts are called by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("calls", torch.tensor(0))
        self.seen: list[bool] = []

    def decode(self, z: Tensor) -> Tensor:
        self.seen.append(self.training)
        self.calls += self.training
        return z @ self.layer.weight.T + self.layer.bias


def test_modules_that_are_registered_need_not_be_called(tmp_path: Path) -> None:
    decoder = Decodes()

    def model(x: Tensor, index: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder.decode(z), 1.0).to_event(1), obs=x)

    module = SVIModule(model, AmortizedGuide(model))
    module.initialize(data())
    assert decoder.training
    assert "called.decoder.calls" in module.state_dict()
    decoder.seen.clear()
    quiet(tmp_path).validate(module, loader(SIZE), verbose=False)
    assert set(decoder.seen) == {False}


@pytest.mark.parametrize("remedy", ["pyro.module", "frozen"])
def test_modules_that_hold_other_parameters_are_warned_of(remedy: str) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    registers: list[Any] = []

    def model(x: Tensor, index: Tensor) -> None:
        for part in registers:
            pyro.module("net", part)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    match = r"calls modules \(Sequential\) .*: call pyro.module\(.* or module.requires_grad_\(False\).eval\(\) before"
    module = SVIModule(model, AmortizedGuide(model))
    with pytest.warns(UserWarning, match=match):
        module.initialize(data())
    assert not module.called
    if remedy == "frozen":
        net.requires_grad_(False).eval()
    else:
        registers.append(net)
    pyro.clear_param_store()
    module = SVIModule(model, AmortizedGuide(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module.initialize(data())
    assert len(module.called) == 1


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["registered", "called"])
def test_compiled_modules_of_functions(compiled: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    fast = torch.compile(net, backend="eager")

    def model(x: Tensor, index: Tensor) -> None:
        pyro.module("net", fast if compiled == "registered" else net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(fast(z), 1.0).to_event(1), obs=x)

    module = SVIModule(model, AmortizedGuide(model))
    module.initialize(data())
    assert net[1].num_batches_tracked == 0
    assert list(module.called) == ["net"]
    quiet(tmp_path).fit(module, loader(SIZE), loader(SIZE))
    assert net[1].num_batches_tracked == 2


def test_a_second_checkpoint_of_a_function_loaded_beside_the_first(tmp_path: Path) -> None:
    """Pyro keeps one parameter of a name, which a warning says; models that are modules have their own."""

    def trained(model: Any, guide: Any) -> None:
        trainer = quiet(tmp_path, max_epochs=1)
        trainer.fit(SVIModule(model, guide), loader())
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    def load(model: Any, name: str) -> SVIModule:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*wait for the first batch.*")
            guide = AmortizedGuide(model, name=name)
            return SVIModule.load_from_checkpoint(tmp_path / "last.ckpt", model=model, guide=guide, weights_only=True)

    def function(x: Tensor, index: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.ones(2, 3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    trained(function, AmortizedGuide(function))
    pyro.clear_param_store()
    first, second = load(function, "first"), load(function, "second")
    first.initialize(data())
    with pytest.warns(UserWarning, match=r"\['weight'\] of pyro.param are also those of another.*as a plain nn.Module"):
        second.initialize(data())

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

        def forward(self, x: Tensor, index: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight, 1.0).to_event(1), obs=x)

    model = Plain()
    trained(model, AmortizedGuide(model))
    third, fourth = load(Plain(), "third"), load(Plain(), "fourth")
    for module in (third, fourth):
        module.initialize(data())
    assert third.model.weight is not fourth.model.weight


def test_a_test_of_a_checkpoint_leaves_the_history(tmp_path: Path) -> None:
    model = Factors()
    module, trainer = SVIModule(model, AmortizedGuide(model)), quiet(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    quiet(tmp_path).fit(module, loader())
    before = module.history.dataset
    trainer.test(module, loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    assert module.history.dataset.equals(before)


def test_checkpoints_of_another_model_are_refused_at_once() -> None:
    model, other = Factors(), PyroModule()
    other.weight = nn.Parameter(torch.zeros(2))
    state = SVIModule(model, AmortizedGuide(model)).state_dict()
    for wrong in (state, {}):
        with pytest.raises(ValueError, match=r"Cannot load this state because it (lacks|holds) .*'model\.weight"):
            SVIModule(other, AmortizedGuide(other)).load_state_dict(wrong)


def seeded_loss(module: Any) -> float:
    torch.manual_seed(3)
    return module.elbo.loss(module.model, module.guide, *data())


@pytest.mark.parametrize(
    "elbo",
    [
        infer.TraceMeanField_ELBO(),
        infer.TraceGraph_ELBO(),
        infer.TraceEnum_ELBO(max_plate_nesting=1),
        infer.RenyiELBO(alpha=0.5, num_particles=3),
        infer.Trace_ELBO(num_particles=3, vectorize_particles=True),
        FreeBitsELBO(0.5),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_every_elbo_has_the_gradients_of_its_own(elbo: Any, tmp_path: Path) -> None:
    """Also those that give gradients instead of a loss that can be differentiated, while gradients accumulate."""
    model = Factors()
    module = SVIModule(model, AmortizedGuide(model), elbo, optimizer=sgd)
    module.initialize(data())
    parameters = dict(module.named_parameters())
    expected: dict[str, Tensor] = {}
    lightning.seed_everything(2)
    for batch in loader(5):
        elbo.loss_and_grads(model, module.guide, *batch)
    for name, parameter in parameters.items():
        expected[name], parameter.grad = parameter.grad.clone() / 2, None
    lightning.seed_everything(2)
    kept = KeepGradients()
    quiet(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[kept]).fit(module, loader(5))
    torch.testing.assert_close(kept.gradients, [expected], rtol=1e-4, atol=1e-5)


def test_annealing_steps_in_training_and_is_absent_in_validation(tmp_path: Path) -> None:
    model = Factors()
    guide = AmortizedGuide(model)
    annealing = KLAnnealing(model, guide, linear_schedule(10))
    module = SVIModule(annealing.model, annealing.guide, infer.TraceMeanField_ELBO())
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(module, loader(5), loader(SIZE))
    trainer.save_checkpoint(tmp_path / "training.ckpt")
    assert annealing.beta == pytest.approx(0.2)
    first = module.history.dataset["train_loss"].values[0]
    guide.eval()
    bare = [infer.TraceMeanField_ELBO().loss(model, guide, *data()) for _ in range(100)]
    assert module.history.dataset["val_loss"].item() == pytest.approx(sum(bare) / 100, rel=0.3)
    assert first < 0.8 * sum(bare) / 100  # without the KL divergence
    again = KLAnnealing(model, guide, linear_schedule(10))
    SVIModule.load_from_checkpoint(tmp_path / "training.ckpt", model=again.model, guide=again.guide)
    assert again.beta == pytest.approx(0.2)


def test_aggressive_training_moves_one_side_at_a_time(tmp_path: Path) -> None:
    model = Factors()
    guide = AmortizedGuide(model)
    module, aggressive, kept = (
        SVIModule(model, guide),
        AggressiveTraining(window=1, max_encoder_steps=2),
        KeepGradients(),
    )
    trainer = quiet(tmp_path, max_epochs=2, callbacks=[aggressive, kept])
    trainer.fit(module, loader(5), loader(SIZE))
    moved = [{name.split(".")[0] for name in step} for step in kept.gradients]
    assert {"guide"} in moved
    assert all(step in ({"guide"}, {"model"}) for step in moved[:2])  # the first validation comes after them
    aggressive.aggressive = False
    trainer = quiet(tmp_path, max_epochs=1, callbacks=[aggressive, kept])
    trainer.fit(SVIModule(model, guide), loader(SIZE))
    assert {name.split(".")[0] for name in kept.gradients[-1]} == {"guide", "model"}
    with pytest.raises(ValueError, match="Cannot train a AutoNormal aggressively"):
        quiet(tmp_path, callbacks=[aggressive]).fit(SVIModule(model, AutoNormal(model)), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elbo": infer.Trace_ELBO}, "Cannot train with elbo="),
        ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, "function from parameters to a torch optimizer"),
        ({"model": Factors}, r"it is a class; try an instance, as Factors\(\)"),
        ({"guide": AmortizedGuide}, r"it is a class; try an instance, as AmortizedGuide\(model\)"),
        ({"model": infer.SVI(Factors(), AutoNormal(Factors()), pyro.optim.Adam({}), infer.Trace_ELBO())}, "svi.guide"),
        ({"scheduler": 1}, "Cannot train with scheduler=1"),
        ({"to_args": 1}, "Cannot train with to_args=1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = Factors()
    with pytest.raises(ValueError, match=message):
        SVIModule(**{"model": model, "guide": AmortizedGuide(model), **options})


def test_loaders_over_another_number_of_datapoints_are_refused(tmp_path: Path) -> None:
    model = Factors()
    short = DataLoader(TensorDataset(*data(4)), batch_size=2)
    with pytest.raises(ValueError, match="loader over 4 datapoints because plate 'data' of the model has 10"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), short)
    subset = loader(sampler=torch.utils.data.SubsetRandomSampler(range(7)))
    with pytest.raises(ValueError, match="loader over 7 datapoints"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model, name="other")), subset)
    pyro.clear_param_store()
    model = Factors(sized=False)
    quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), short)


def test_a_parameter_of_another_model_in_the_store_is_refused() -> None:
    model, guide, _ = functions()
    infer.Trace_ELBO().loss(model, guide, *data())
    model, guide, _ = functions()
    with pytest.raises(ValueError, match=r"parameter 'decoder\$\$\$weight' because the parameter store holds another"):
        SVIModule(model, guide).initialize(data())
    pyro.clear_param_store()
    SVIModule(model, guide).initialize(data())


def test_batches_that_hold_more_than_the_model_takes(tmp_path: Path) -> None:
    model = Factors()
    batches = DataLoader([{"x": x, "index": i, "label": i} for x, i in zip(*data(), strict=True)], batch_size=5)
    with pytest.raises(ValueError, match="to_args=lambda batch"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), batches)
    guide = AmortizedGuide(model)
    module = SVIModule(model, guide, to_args=lambda batch: (batch["x"], batch["index"]), scheduler=plateau)
    trainer = quiet(tmp_path)
    trainer.fit(module, batches, batches)
    assert {"val_loss", "val_elbo", "train_loss"} <= set(trainer.callback_metrics)
    medians = torch.cat([part["z"] for part in trainer.predict(module, batches)])
    torch.testing.assert_close(medians, guide.eval().median(*data())["z"])
    assert "4 steps" in str(module.history)
    axes = module.history.plot()
    assert axes.get_ylabel() == "loss (negative ELBO, nats)"
    assert len(axes.figure.axes) == 1  # both are losses of all ten datapoints


def test_losses_of_other_numbers_of_datapoints_are_drawn_on_axes_of_their_own(tmp_path: Path) -> None:
    model = Factors(sized=False)
    module = SVIModule(model, AmortizedGuide(model))
    assert module.history.plot().get_legend() is None  # before training
    quiet(tmp_path, max_epochs=1).fit(module, loader(5), loader(5))
    assert module.history.dataset.attrs["of_batches"] == 1
    axes = module.history.plot()
    assert len(axes.figure.axes) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training",
        "validation data, axis on the right",
    ]


@pytest.mark.parametrize("kind", ["amortized", "anchored"])
def test_mixed_precision_and_clipping(kind: str, tmp_path: Path) -> None:
    model = Factors()
    Guide, options = GUIDES[kind]
    module = SVIModule(model, Guide(model, **options))
    quiet(tmp_path, precision="bf16-mixed", gradient_clip_val=10.0, max_epochs=20).fit(module, loader(5), loader(5))
    losses = module.history.dataset["val_loss"].values
    assert module.history.dataset.sizes == {"step": 40, "validation": 20}
    assert losses[-5:].mean() < losses[:5].mean()


def test_loggers_and_early_stopping(tmp_path: Path) -> None:
    """A logger is told what the history holds; training stops where nothing is good enough."""
    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.loggers import CSVLogger

    model = Factors()
    module = SVIModule(model, AmortizedGuide(model))
    stopping = EarlyStopping("val_elbo", mode="max", patience=2, min_delta=1e9)
    trainer = quiet(tmp_path, logger=CSVLogger(tmp_path), callbacks=[stopping], max_epochs=20, log_every_n_steps=1)
    trainer.fit(module, loader(5), loader(5))
    history = module.history.dataset
    assert history.sizes == {"step": 6, "validation": 3}
    written = list(csv.DictReader(Path(trainer.logger.log_dir, "metrics.csv").read_text().splitlines()))
    for name in ("train_loss", "val_loss", "val_elbo"):
        logged = [float(row[name]) for row in written if row[name]]
        assert logged == pytest.approx(history[name].values.tolist(), rel=1e-5)


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize("kind", ["sized", "size of the batch"])
def test_validation_data_without_batches(kind: str, tmp_path: Path) -> None:
    """An ELBO of nothing would be 0, the best of all."""

    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    model = Factors(sized=kind == "sized")
    module = SVIModule(model, AmortizedGuide(model))
    with pytest.raises(ValueError, match=r"Cannot evaluate the loss because the loader has no batches; try one that"):
        quiet(tmp_path).fit(module, loader(5), DataLoader(Nothing()))
    quiet(tmp_path, limit_val_batches=0).fit(module, loader(5), DataLoader(Nothing()))


def test_rows_of_different_sizes_in_training(tmp_path: Path) -> None:
    model = Factors()
    ragged = DataLoader([(torch.zeros(3), 0), (torch.zeros(2), 1)], batch_size=2)
    with pytest.raises(ValueError, match=r"Cannot put datapoints into a batch because they are of different sizes"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), ragged)


def test_gradients_of_sparse_tables_cannot_be_clipped(tmp_path: Path) -> None:
    model = Factors()
    module = SVIModule(model, PerDatapointGuide(model, sparse=True), optimizer=sgd)
    with pytest.raises(ValueError, match=r"Cannot clip gradients .*; try a guide with sparse=False"):
        quiet(tmp_path, gradient_clip_val=1.0).fit(module, loader(5))
    quiet(tmp_path).fit(module, loader(5))


def test_checkpoints_are_written_beside_their_place_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is cut off leaves the file before it as it was."""
    from lightning.pytorch.plugins import TorchCheckpointIO

    model = Factors()
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(SVIModule(model, AmortizedGuide(model)), loader(5))
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    before = file.read_bytes()

    def cut_off(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(file)
    assert file.read_bytes() == before


def test_losses_of_a_validation_that_broke_off_are_forgotten(tmp_path: Path) -> None:
    class Failing(lightning.Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            if args[3] == 1:
                raise KeyError("broken off")

    model = Factors()
    module = SVIModule(model, AmortizedGuide(model))
    module.initialize(next(iter(loader())))
    found = []
    for callbacks in ([], [Failing()], []):
        pyro.set_rng_seed(0)
        with pytest.raises(KeyError, match="broken off") if callbacks else nullcontext():
            found += quiet(tmp_path, callbacks=callbacks).validate(module, loader(), verbose=False)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_parameters_are_averaged_once_they_are_found(name: str, tmp_path: Path) -> None:
    """Such callbacks copy the module before."""
    Averaging = getattr(lightning.pytorch.callbacks, name, None)
    if Averaging is None:
        pytest.skip(f"this version of Lightning has no {name}")
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 2, "annealing_epochs": 1} if "Stochastic" in name else {"decay": 0.5}
    seen: list[Tensor] = []

    class Keeping(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(model.weights.detach().clone())

    model = Factors()
    module = SVIModule(model, AmortizedGuide(model), optimizer=sgd)
    callbacks = [Keeping(), Averaging(**options)]
    with pytest.raises(ValueError, match=rf"Cannot average parameters by {name} .* try module\.initialize"):
        quiet(tmp_path, callbacks=callbacks).fit(module, loader())
    module.initialize(next(iter(loader())))
    quiet(tmp_path, callbacks=callbacks, max_epochs=3).fit(module, loader())
    expected = torch.stack([seen[2], seen[5]]).mean(0)  # at the start of the second and the third epoch
    if "EMA" in name:
        expected = seen[0]
        for value in seen[1:]:
            expected = 0.5 * expected + 0.5 * value
    torch.testing.assert_close(model.weights.detach(), expected)


class Prepared(lightning.LightningDataModule):
    """Images in bytes, made numbers by a hook on the way to the device."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader([(x, i) for i, x in enumerate((100 * data()[0]).byte())], batch_size=5)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 100.0, batch[1]


def test_the_first_batch_passes_the_hooks_of_the_data(tmp_path: Path) -> None:
    """By it the encoder learns how large its inputs are."""
    model, found = Factors(), []
    for name in ("hooks", "by hand"):
        torch.manual_seed(0)
        module = SVIModule(model, AmortizedGuide(model, name=name.replace(" ", "_")))
        if name == "by hand":
            x, index = next(iter(Prepared().train_dataloader()))
            module.initialize((x / 100.0, index))
        quiet(tmp_path, max_epochs=1).fit(module, datamodule=Prepared())
        found.append(module.guide.inference.encoder.standardize.loc.clone())
    assert torch.equal(*found)
    assert found[0].abs().max() < 3.0


def test_datapoints_one_by_one_are_no_batches(tmp_path: Path) -> None:
    x = torch.randn(6, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    for rows in (x, DataLoader(TensorDataset(x), batch_size=None)):
        with pytest.raises(ValueError, match=r"gives the datapoints one by one.* try DataLoader\(TensorDataset"):
            quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), rows)
    with pytest.raises(ValueError, match=r"of loaders .* DataLoader\(batches, batch_size=None\)"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), [x[:4], x[4:]])
    sampler = torch.utils.data.BatchSampler(range(6), 4, drop_last=False)
    for batches in (DataLoader([x[:4], x[4:]], batch_size=None), DataLoader(TensorDataset(x), None, sampler=sampler)):
        pyro.clear_param_store()
        module = SVIModule(model, AmortizedGuide(model))
        quiet(tmp_path, max_epochs=1).fit(module, batches)
        assert module.history.dataset.sizes["step"] == 2


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SparseAdam"])
def test_optimizers_that_do_not_take_a_tables_gradients_are_refused(name: str, tmp_path: Path) -> None:
    model = Factors()
    for optimizer in (getattr(torch.optim, name), torch.optim.Adagrad):
        module = SVIModule(model, PerDatapointGuide(model, sparse=True), optimizer=lambda p, o=optimizer: o(list(p)))
        refusal = pytest.raises(ValueError, match=rf"Cannot train a sparse table by {name} .*; try torch.optim.Adagrad")
        with refusal if optimizer is not torch.optim.Adagrad else nullcontext():
            quiet(tmp_path, max_epochs=1).fit(module, loader(5))
        pyro.clear_param_store()


def test_streams_that_would_miss_their_first_batch_are_refused(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset):
        def __init__(self) -> None:
            self.rows = iter(TensorDataset(*data()))

        def __iter__(self) -> Iterator[Any]:
            return self.rows

    model = Factors()
    module = SVIModule(model, AmortizedGuide(model))
    for stream in (DataLoader(Once(), batch_size=5), iter(loader(5))):
        with pytest.raises(ValueError, match=r"stream that goes on where it was left.* try .*module\.initialize"):
            quiet(tmp_path, max_epochs=1).fit(module, stream)
    module.initialize(next(iter(loader(5))))
    quiet(tmp_path, max_epochs=1).fit(module, DataLoader(Once(), batch_size=5))
    assert module.history.dataset.sizes["step"] == 2
