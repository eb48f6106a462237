"""Training by Lightning's Trainer, in one process and in several."""

import csv
import os
import socket
import time
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
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_amortized import (
    AmortizedGuide,
    Codebook,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    VectorQuantizedGuide,
)
from pyro_amortized.training import FreeBitsELBO, KLAnnealing, linear_schedule

lightning = pytest.importorskip("lightning")
from pyro_amortized.lightning import AggressiveTraining, SVIModule  # noqa: E402
from pyro_amortized.training.plates import DataPlate, find_plate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of Lightning's on loaders, loggers and checkpoints

SIZE = 10
STEPS: dict[str, Any] = {"num_steps": 2, "keep_best": False, "fixed_noise": True}
GUIDES: dict[str, tuple[Any, dict[str, Any]]] = {
    "amortized": (AmortizedGuide, {}),
    "per datapoint": (PerDatapointGuide, {}),
    "sparse table": (PerDatapointGuide, {"sparse": True}),
    "discrete": (DiscreteAmortizedGuide, {}),
    **{
        gradient: (SemiAmortizedGuide, {**STEPS, "encoder_gradient": gradient})
        for gradient in ("anchored", "unrolled", "first_order", "initial", "distill")
    },
    "iterative": (IterativeAmortizedGuide, {**STEPS, "num_particles": 2}),
}


def data(size: int = SIZE) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(1)), torch.arange(size)


class Factors(PyroModule):
    """A global latent, a local one and a parameter; the plate knows how many datapoints there are in all, or not."""

    def __init__(self, sized: bool = True) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.4, -1.0]]))
        self.sized = sized

    def forward(self, x: Tensor, index: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", SIZE, subsample=index) if self.sized else pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weights + loc.unsqueeze(-1), 1.0).to_event(1), obs=x)


class NoiseByDatapoint(Messenger):
    """Latents are their means plus noise that belongs to the datapoint, whatever batch it comes in."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        z = torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(2))
        self.noise = {"z": z[index], "loc_unconstrained": torch.tensor(0.7)}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.noise:
            msg["value"] = msg["fn"].mean + msg["fn"].stddev * self.noise[msg["name"]]


class Repeatable(nn.Module):
    """A guide whose draws depend on nothing but the datapoints."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide
        self.plate, self.groups = "data", guide.groups

    def forward(self, x: Tensor, index: Tensor) -> None:
        with NoiseByDatapoint(index):
            self.guide(x, index)


def county(x: Tensor, index: Tensor) -> Tensor:
    """The datapoint of each row: of datapoint n there are 1 + n mod 3."""
    return torch.arange(len(x)).repeat_interleave(1 + index % 3)


class LongFormat(PyroModule):
    """Rows in a plate beside that of the datapoints, which is as large as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.4, -1.0]]))

    def forward(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rows = county(x, index)
        with pyro.plate("rows", len(rows)):
            loc = z[rows] @ self.weights + torch.arange(3.0)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[rows])


class KeepGradients(lightning.Callback):
    """What optimizers are given."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.gradients.append({name: g.to_dense().clone() if g.is_sparse else g.clone() for name, g in found.items()})


def quiet(path: Path | str, **options: Any) -> Any:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {**off, "accelerator": "cpu", "default_root_dir": path, "max_epochs": 2, **options}
    return lightning.Trainer(**options)


def loader(size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=size, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)


# One process


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
        "store.decoder$$$weight",
        "store.decoder$$$bias",
        "store.scale",
        "store.encoder/weight",
        "store.spread",
    }
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    quiet(tmp_path).fit(module, loader())
    for name, value in pyro.get_param_store().items():
        assert not torch.equal(value, before[name])
    assert dict(module.named_parameters())["store.decoder$$$weight"] is decoder.weight
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
    waits = any(name.startswith("store.") for name in state)
    with pytest.warns(UserWarning, match=r"call module.initialize\(batch\)") if waits else nullcontext():
        loaded = SVIModule.load_from_checkpoint(tmp_path / "training.ckpt", model=model, guide=guide, weights_only=True)
    assert loaded.history.dataset.equals(module.history.dataset)
    loaded.initialize(data())
    torch.testing.assert_close(dict(loaded.state_dict()), state)
    assert seeded_loss(loaded) == pytest.approx(expected, rel=1e-6)


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
        ({"scheduler": 1}, "Cannot train with scheduler=1"),
        ({"to_args": 1}, "Cannot train with to_args=1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = Factors()
    with pytest.raises(ValueError, match=message):
        SVIModule(model, AmortizedGuide(model), **options)


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


# Killed and resumed


class Varied(torch.utils.data.Sampler[list[int]]):
    """Batches of changing sizes, shuffled by torch's own generator."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        yield from (order[:3], order[3:4], order[4:])

    def __len__(self) -> int:
        return 3


def train(
    path: Path,
    epochs: int,
    kind: str = "amortized",
    ckpt: Path | None = None,
    mid: bool = False,
    scheduler: Any = None,
    **watched: str,
) -> list[float]:
    """The losses of a run that saves a checkpoint after every epoch, or after every step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    pyro.clear_param_store()
    lightning.seed_everything(0 if ckpt is None else 1)
    model = Factors()
    Guide, options = GUIDES[kind]
    module = SVIModule(model, Guide(model, **options), scheduler=scheduler)
    every = {"every_n_train_steps": 1} if mid else {}
    saving = ModelCheckpoint(path, save_top_k=-1, filename="{step}", save_last=True, **every, **watched)
    if mid:
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        batches = stateful.StatefulDataLoader(TensorDataset(*data()), batch_size=4, shuffle=True)
    else:
        batches = DataLoader(TensorDataset(*data()), batch_sampler=Varied())
    trainer = quiet(path, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, batches, DataLoader(TensorDataset(*data()), batch_size=4), ckpt_path=ckpt)
    return module.history.dataset["train_loss"].values.tolist()


@pytest.mark.parametrize("kind", ["amortized", "per datapoint", pytest.param("anchored", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", 4, kind)
    assert train(tmp_path / "broken", 2, kind) == expected[:6]
    assert train(tmp_path / "broken", 4, kind, tmp_path / "broken" / "last.ckpt") == expected
    assert train(tmp_path / "other", 4, kind, tmp_path / "broken" / "step=3.ckpt") == expected


@pytest.mark.parametrize("watched", [{"monitor": "val_elbo", "mode": "max"}, {}], ids=["validation", "epoch"])
def test_a_scheduler_that_waits_for_validations_resumes(watched: dict[str, str], tmp_path: Path) -> None:
    """Lightning saves before such a scheduler steps, here to a tenth of the learning rate each time but the first."""

    def never_better(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs")

    expected = train(tmp_path / "whole", 4, scheduler=never_better, **watched)
    train(tmp_path / "broken", 2, scheduler=never_better, **watched)
    last = tmp_path / "broken" / "last.ckpt"
    assert train(tmp_path / "steady", 4, ckpt=last, **watched) != expected  # with the learning rate in the file
    assert train(tmp_path / "resumed", 4, ckpt=last, scheduler=never_better, **watched) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_loader_for_training_and_validation_resumes(shuffle: bool, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def losses(epochs: int, ckpt: Path | None = None) -> list[float]:
        pyro.clear_param_store()
        lightning.seed_everything(0 if ckpt is None else 1)
        model, both = Factors(), loader(shuffle=shuffle)
        module = SVIModule(model, AmortizedGuide(model))
        saving = ModelCheckpoint(tmp_path, save_last=True)
        trainer = quiet(tmp_path, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(module, both, both, ckpt_path=ckpt)
        return module.history.dataset["train_loss"].values.tolist()

    expected = losses(3)
    losses(1)
    assert losses(3, tmp_path / "last.ckpt") == expected


def test_validations_lie_where_they_were_made(tmp_path: Path) -> None:
    """In the order of batches, however many there are to a step of the optimizer, and over all trainers."""
    model = Factors()
    module = SVIModule(model, AmortizedGuide(model))
    for options in ({"accumulate_grad_batches": 3}, {}):
        quiet(tmp_path, **options).fit(module, loader(), loader())
    assert module.history.dataset["val_step"].values.tolist() == [3, 6, 9, 12]


@pytest.mark.slow
def test_a_run_resumed_within_an_epoch(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", 3, mid=True)
    for step in (2, 6):  # in the middle and at the end of an epoch
        assert train(tmp_path / str(step), 3, ckpt=tmp_path / "whole" / f"step={step}.ckpt", mid=True) == expected


def run_until_killed(path: str, epochs: int) -> None:
    torch.set_num_threads(1)
    last = Path(path) / "last.ckpt"
    train(Path(path), epochs, ckpt=last if last.exists() else None)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Killed at any moment, again and again; checkpoints are whole or absent."""
    context = torch.multiprocessing.get_context("spawn")
    for wait in (0.0, 0.4, 1.1):
        process = context.Process(target=run_until_killed, args=(str(tmp_path / "killed"), 10_000))
        process.start()
        before = len(list((tmp_path / "killed").glob("step*.ckpt")))
        while process.is_alive() and len(list((tmp_path / "killed").glob("step*.ckpt"))) < before + 3:
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -9
    state = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    epochs = state["epoch"] + 3
    found = train(tmp_path / "killed", epochs, ckpt=tmp_path / "killed" / "last.ckpt")
    assert found == train(tmp_path / "whole", epochs)


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


# The plate of the datapoints


def beside_another(index: Tensor, x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("calibration", 5):
        pyro.sample("y", dist.Normal(m, 1.0), obs=torch.ones(5))
    with pyro.plate("data", SIZE, subsample=index):
        pyro.sample("x", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=x)


def within_another(index: Tensor, x: Tensor) -> None:
    with pyro.plate("features", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", SIZE, subsample=index, dim=-2):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def of_the_batch(x: Tensor) -> None:
    with pyro.plate("features", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def both_subsampled(index: Tensor, x: Tensor) -> None:
    with pyro.plate("others", 9, subsample=index):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])
    with pyro.plate("data", 10, subsample=index):
        pyro.sample("x", dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0))), obs=x[:, 1])


def time_first(x: Tensor) -> None:
    with pyro.plate("documents", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("words", x.shape[0], dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def some_pixels(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 3, subsample_size=2, dim=-1) as j:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, j])


def one_after_the_other(x: Tensor) -> None:
    for k in pyro.plate("components", 2):
        m = pyro.sample(f"m{k}", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x[:, 0])


def plate_of(model: Any, *batch: Tensor, named: str | None = None, own: Any = None) -> DataPlate | None:
    def read(batch: Any) -> Any:
        return (batch[0].T,) if model is time_first else tuple(batch), {}

    return find_plate(model, list(batch), read, named, own)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_plate_is_the_one_that_loaders_go_over(size: int) -> None:
    """However large others are, whichever lies around the other, and whatever is subsampled beside."""
    x, index = torch.randn(size, 3), torch.arange(size)
    for model in (beside_another, within_another):
        assert plate_of(model, index, x) == DataPlate("data", SIZE)
    for model in (of_the_batch, some_pixels):
        assert plate_of(model, x) == DataPlate("data", None)
    assert plate_of(time_first, x) == DataPlate("documents", None)
    assert plate_of(one_after_the_other, x) is None  # and no size is to be checked
    assert plate_of(both_subsampled, index, x) is None
    assert plate_of(both_subsampled, index, x, named="data") == DataPlate("data", 10)
    assert plate_of(both_subsampled, index, x, own="others") == DataPlate("others", 9)
    assert plate_of(of_the_batch, x, own="gpu") == DataPlate("data", None)
    with pytest.raises(ValueError, match="no plate of that name"):
        plate_of(of_the_batch, x, named="gpu")


def test_data_of_one_size_lie_in_the_outermost_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 4, dim=-2), pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.reshape(4, 3))

    assert plate_of(model, torch.randn(4, 3)) == DataPlate("data", None)


def test_sizes_are_those_of_the_plate_that_is_named(tmp_path: Path) -> None:
    swapped = TensorDataset(*data()[::-1])
    module = SVIModule(both_subsampled, lambda *_: None, plate="others")
    with pytest.raises(ValueError, match="because plate 'others' of the model has 9"):
        quiet(tmp_path).fit(module, DataLoader(swapped, batch_size=4))
    quiet(tmp_path).fit(SVIModule(both_subsampled, lambda *_: None, plate="data"), DataLoader(swapped, batch_size=4))


def test_names_of_parameters_may_be_those_of_attributes(tmp_path: Path) -> None:
    def model(x: Tensor, index: Tensor) -> None:
        scale = pyro.param("type", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", SIZE, subsample=index):
            pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=x)

    module = SVIModule(model, lambda *_: None)
    quiet(tmp_path).fit(module, loader())
    assert pyro.param("type") != 1.0
    assert "store.type_" in module.state_dict()
    with pytest.raises(ValueError, match="Cannot predict by a function because .*Predictive"):
        quiet(tmp_path).predict(module, loader())


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    model = Factors()
    with pytest.raises(ValueError, match="Cannot train on a dict of loaders because .*StackDataset"):
        quiet(tmp_path).fit(SVIModule(model, AmortizedGuide(model)), {"a": loader(), "b": loader()})


# Several processes


class Codes(PyroModule):
    """A model of codes, whose codebook moves by the statistics of all processes."""

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        self.codebook = codebook
        self.decoder = nn.Linear(2, 3)

    def forward(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", SIZE, subsample=index):
            code = pyro.sample("code", dist.Categorical(logits=torch.zeros(self.codebook.num_codes)))
            pyro.sample("x", dist.Normal(self.decoder(self.codebook(code)), 1.0).to_event(1), obs=x)


FAST = ["amortized", "sparse table", "size of the batch", "long format", "codes", "revived codes"]
KINDS = [*FAST, *(kind for kind in GUIDES if kind not in FAST), "renyi"]
WHOLE = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [5, 0, 9]]
PARTS = [[[0, 1, 2, 3], [6], [5, 0]], [[4, 5], [7, 8, 9], [9]]]
"""The same rows in one process and in two, as unequally as can be."""


def gradients_of(kind: str, batches: list[list[int]], path: str, **options: Any) -> list[dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = None
    is_codes = "codes" in kind
    if is_codes:
        model: Any = Codes(Codebook(4, 2) if kind == "codes" else Codebook(12, 2, decay=0.5, revive_below=0.5))
        guide: Any = VectorQuantizedGuide(model, encoder=nn.Linear(3, 2), codebook=model.codebook)
    else:
        model = LongFormat() if kind == "long format" else Factors(sized=kind != "size of the batch")
        Guide, guide_options = GUIDES.get(kind, GUIDES["amortized"])
        if kind == "long format":
            guide_options = {"plate": "data", "groups": {"rows": county}}
        guide = Repeatable(Guide(model, **guide_options))
        elbo = infer.RenyiELBO(alpha=0.0, num_particles=1) if kind == "renyi" else None
    guide(*data()) if is_codes else guide.guide.setup(*data())
    kept = KeepGradients()
    module = SVIModule(model, guide, elbo, optimizer=sgd)
    batches = DataLoader(TensorDataset(*data()), batch_sampler=batches)
    quiet(path, max_epochs=1, callbacks=[kept], use_distributed_sampler=False, **options).fit(module, batches)
    if is_codes:
        kept.gradients.append({"embeddings": guide.eval() and model.codebook.embeddings})
    return kept.gradients


def train_in_process(rank: int, size: int, path: str, kinds: list[str]) -> None:
    """As ``torchrun`` starts it."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
    os.environ.update(zip(names, map(str, (rank, rank, size, size, 0, "tests")), strict=True))
    for kind in kinds:
        found = gradients_of(kind, PARTS[rank], path, strategy="ddp", devices=size)
        torch.save(found, f"{path}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def resume_in_process(rank: int, size: int, path: str) -> None:
    """A run of two processes that goes on from its checkpoint has the losses of an unbroken one."""
    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
    os.environ.update(zip(names, map(str, (rank, rank, size, size, 0, "tests")), strict=True))

    def losses(name: str, epochs: int, ckpt: str | None = None) -> list[float]:
        pyro.clear_param_store()
        lightning.seed_everything(0)  # of which Lightning makes the order of the data
        torch.manual_seed(rank if ckpt is None else 7 + rank)
        model = Factors()
        module = SVIModule(model, AmortizedGuide(model))
        options = {
            "strategy": "ddp",
            "devices": size,
            "enable_checkpointing": True,
            "default_root_dir": f"{path}/{name}",
        }
        trainer = quiet(path, max_epochs=epochs, **options)
        trainer.fit(module, loader(shuffle=True), ckpt_path=ckpt)
        trainer.save_checkpoint(f"{path}/{name}.ckpt")
        return module.history.dataset["train_loss"].values.tolist()

    expected = losses("whole", 3)
    broken = losses("broken", 1)
    assert expected[: len(broken)] == broken
    assert losses("resumed", 3, f"{path}/broken.ckpt") == expected
    pyro.clear_param_store()
    model, options = Factors(), {"strategy": "ddp", "devices": size, "max_epochs": 1}
    module = SVIModule(model, AmortizedGuide(model))
    half = DataLoader(torch.utils.data.Subset(TensorDataset(*data()), range(rank, SIZE, size)), batch_size=2)
    quiet(path, use_distributed_sampler=False, **options).fit(module, half)
    with pytest.raises(ValueError, match=f"over {SIZE // size} datapoints because plate 'data' .* has {SIZE}"):
        quiet(path, **options).fit(module, half)
    compiled = SVIModule(within_another, infer.autoguide.AutoDelta(within_another), infer.JitTrace_ELBO())
    swapped = DataLoader(TensorDataset(*data()[::-1]), batch_size=2)
    with pytest.raises(ValueError, match="Cannot share the datapoints among processes with a JitTrace_ELBO"):
        quiet(path, strategy="ddp", devices=size).fit(compiled, swapped)
    torch.distributed.destroy_process_group()


@pytest.fixture
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def _meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


@pytest.mark.usefixtures("_meeting")
def test_two_processes_resume(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(resume_in_process, (2, str(tmp_path)), nprocs=2)


@pytest.mark.usefixtures("_double", "_meeting")
@pytest.mark.parametrize("kinds", [FAST, pytest.param(KINDS[len(FAST) :], marks=pytest.mark.slow)], ids=["few", "all"])
def test_two_processes_have_the_gradients_of_one_with_all_rows(kinds: list[str], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_process, (2, str(tmp_path), kinds), nprocs=2)
    for kind in kinds:
        of_processes = [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]
        expected = of_processes[0] if kind == "revived codes" else gradients_of(kind, WHOLE, str(tmp_path))
        assert len(expected) >= 3
        for found in of_processes:  # which draw the same codes, though not those that one process would
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=lambda m, kind=kind: f"{kind}: {m}")


@pytest.mark.usefixtures("_double")
def test_a_part_of_the_rows_has_other_gradients(tmp_path: Path) -> None:
    """So that the test above would fail if processes went their own ways."""
    expected, found = (gradients_of("amortized", batches, str(tmp_path)) for batches in (WHOLE, PARTS[0]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
