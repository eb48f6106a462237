"""Models that change behind the guide's back: right in the very next call, or, with ``encoder_input``, soon an error.

Every way below makes a number that was 1 a half. The model scales its prior by it, and observes its data times its sign
of being whole. The encoder's q is the prior, so that the loss of a right guide has a closed form without variance.
"""

import argparse
import array
import collections
import configparser
import contextvars
import ctypes
import decimal
import enum
import functools
import gc
import io
import itertools
import json
import logging
import math
import mmap
import os
import sqlite3
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide

WHOLE = 1.0
Way = tuple[Callable[[], float], Callable[[], Any]]
"""A function that reads the number, and one that changes it from 1 to a half."""
WAYS: dict[str, Callable[[], Way]] = {}


def way(make: Callable[[], Way]) -> Callable[[], Way]:
    WAYS[make.__name__] = make
    return make


def held(name: str, holder: Any, read: Callable[[Any], float], change: Callable[[Any], Any]) -> None:
    """A way through an object: made anew for each test by ``holder``."""

    def make() -> Way:
        thing = holder()
        return lambda: read(thing), lambda: change(thing)

    WAYS[name] = make


# Containers

held("list", lambda: [1.0], lambda x: x[0], lambda x: x.__setitem__(0, 0.5))
held("length of a list", list, lambda x: 0.5 if x else 1.0, lambda x: x.append(0))
held("nested lists", lambda: [[[1.0]]], lambda x: x[0][0][0], lambda x: x[0].__setitem__(0, [0.5]))
held("dict", lambda: {"beta": 1.0}, lambda x: x["beta"], lambda x: x.update(beta=0.5))
held("key of a dict", dict, lambda x: x.get("beta", 1.0), lambda x: x.update(beta=0.5))
held("dict of 121", lambda: dict.fromkeys(map(str, range(121)), 1.0), lambda x: x["7"], lambda x: x.update({"7": 0.5}))
held("defaultdict", lambda: collections.defaultdict(lambda: 1.0), lambda x: x["b"], lambda x: x.update(b=0.5))
held("deque", lambda: collections.deque([1.0]), lambda x: x[0], lambda x: x.appendleft(0.5))
held("ChainMap", lambda: collections.ChainMap({}, {"b": 1.0}), lambda x: x["b"], lambda x: x.maps[0].update(b=0.5))
held("Counter", lambda: collections.Counter(b=2), lambda x: x["b"] / 2, lambda x: x.subtract("b"))
held("set", lambda: {1.0}, max, lambda x: (x.add(0.5), x.remove(1.0)))
held("array", lambda: array.array("d", [1.0]), lambda x: x[0], lambda x: x.__setitem__(0, 0.5))
held("bytearray", lambda: bytearray([2]), lambda x: x[0] / 2, lambda x: x.__setitem__(0, 1))
held("memoryview", lambda: memoryview(bytearray([2])), lambda x: x[0] / 2, lambda x: x.__setitem__(0, 1))
held("ctypes", lambda: ctypes.c_double(1.0), lambda x: x.value, lambda x: setattr(x, "value", 0.5))
held("mmap", lambda: mmap.mmap(-1, 1), lambda x: 1.0 - x[0] / 2, lambda x: x.__setitem__(0, 1))
held("StringIO", lambda: io.StringIO("1.0"), lambda x: float(x.getvalue()), lambda x: (x.seek(0), x.write("0.5")))
held("list in a tuple", lambda: ([1.0],), lambda x: x[0][0], lambda x: x[0].__setitem__(0, 0.5))


@way
def mapping_proxy() -> Way:
    store = {"beta": 1.0}
    proxy = types.MappingProxyType(store)
    return lambda: proxy["beta"], lambda: store.update(beta=0.5)


@way
def weak_value() -> Way:
    class Thing:
        beta = 1.0

    things = {"a": Thing()}
    known = weakref.WeakValueDictionary(things)
    return lambda: known["a"].beta if "a" in known else 0.5, lambda: (things.clear(), gc.collect())


# Objects and classes


@dataclass
class Settings:
    beta: float = 1.0


@dataclass(frozen=True)
class Frozen:
    beta: float = 1.0


class Slots:
    __slots__ = ("beta",)

    def __init__(self) -> None:
        self.beta = 1.0


class Options(NamedTuple):
    beta: float = 1.0


held("namespace", lambda: types.SimpleNamespace(b=1.0), lambda x: x.b, lambda x: setattr(x, "b", 0.5))
held("arguments", lambda: argparse.Namespace(b=1.0), lambda x: x.b, lambda x: setattr(x, "b", 0.5))
held("dataclass", Settings, lambda x: x.beta, lambda x: setattr(x, "beta", 0.5))
held("frozen dataclass", Frozen, lambda x: x.beta, lambda x: object.__setattr__(x, "beta", 0.5))
held("slots", Slots, lambda x: x.beta, lambda x: setattr(x, "beta", 0.5))
held("named tuple", lambda: [Options()], lambda x: x[0].beta, lambda x: x.__setitem__(0, Options(0.5)))


@way
def class_attribute() -> Way:
    class Model:
        beta = 1.0

    return lambda: Model().beta, lambda: setattr(Model, "beta", 0.5)


@way
def inherited_attribute() -> Way:
    class Base:
        beta = 1.0

    class Model(Base):
        pass

    model = Model()
    return lambda: model.beta, lambda: setattr(Base, "beta", 0.5)


@way
def base_class() -> Way:
    class Whole:
        beta = 1.0

    class Half:
        beta = 0.5

    class Model(Whole):
        pass

    model = Model()
    return lambda: model.beta, lambda: setattr(Model, "__bases__", (Half,))


@way
def class_of_an_object() -> Way:
    class Whole:
        beta = 1.0

    class Half:
        beta = 0.5

    model = Whole()
    return lambda: model.beta, lambda: setattr(model, "__class__", Half)


@way
def metaclass() -> Way:
    class Meta(type):
        whole = True

        @property
        def beta(cls) -> float:
            return 1.0 if cls.whole else 0.5

    class Model(metaclass=Meta):
        pass

    return lambda: Model.beta, lambda: setattr(Meta, "whole", False)


@way
def property_that_reads_a_global() -> Way:
    class Model:
        @property
        def beta(self) -> float:
            return WHOLE

    model = Model()
    return lambda: model.beta, lambda: globals().update(WHOLE=0.5)


@way
def static_method() -> Way:
    class Model:
        @staticmethod
        def beta() -> float:
            return WHOLE

    return Model.beta, lambda: globals().update(WHOLE=0.5)


@way
def class_method() -> Way:
    class Model:
        value = 1.0

        @classmethod
        def beta(cls) -> float:
            return cls.value

    return Model.beta, lambda: setattr(Model, "value", 0.5)


@way
def cached_property() -> Way:
    class Model:
        value = 1.0

        @functools.cached_property
        def beta(self) -> float:
            return self.value

    model = Model()

    def change() -> None:
        model.value = 0.5
        del model.beta

    return lambda: model.beta, change


@way
def attribute_hook() -> Way:
    values = {"beta": 1.0}

    class Model:
        def __getattr__(self, name: str) -> float:
            return values[name]

    model = Model()
    return lambda: model.beta, lambda: values.update(beta=0.5)


@way
def data_descriptor() -> Way:
    class Descriptor:
        value = 1.0

        def __get__(self, holder: Any, kind: Any) -> float:
            return type(self).value

    class Model:
        beta = Descriptor()

    return lambda: Model().beta, lambda: setattr(Descriptor, "value", 0.5)


@way
def enumeration() -> Way:
    class Kind(enum.Enum):
        A = 1

        def beta(self) -> float:
            return 1.0

    return lambda: Kind.A.beta(), lambda: setattr(Kind, "beta", lambda self: 0.5)


@way
def dunder_call() -> Way:
    class Beta:
        def __call__(self) -> float:
            return 1.0

    beta = Beta()
    return lambda: beta(), lambda: setattr(Beta, "__call__", lambda self: 0.5)


# Functions


@way
def variable_of_this_module() -> Way:
    return lambda: WHOLE, lambda: globals().update(WHOLE=0.5)


@way
def variable_of_another_module() -> Way:
    sys.modules["_another"] = module = types.ModuleType("_another")
    module.beta = 1.0
    return lambda: sys.modules["_another"].beta, lambda: setattr(module, "beta", 0.5)


@way
def attribute_of_a_library() -> Way:
    math._beta = 1.0
    return lambda: math._beta, lambda: setattr(math, "_beta", 0.5)


@way
def closed_over_variable() -> Way:
    beta = 1.0

    def change() -> None:
        nonlocal beta
        beta = 0.5

    return lambda: beta, change


@way
def default_of_an_argument() -> Way:
    def read(beta: float = 1.0) -> float:
        return beta

    return lambda: read(), lambda: setattr(read, "__defaults__", (0.5,))


@way
def keyword_default() -> Way:
    def read(*, beta: float = 1.0) -> float:
        return beta

    return lambda: read(), lambda: setattr(read, "__kwdefaults__", {"beta": 0.5})


@way
def attribute_of_a_function() -> Way:
    def read() -> float:
        return read.beta

    read.beta = 1.0
    return read, lambda: setattr(read, "beta", 0.5)


@way
def code_of_a_function() -> Way:
    def read() -> float:
        return 1.0

    return lambda: read(), lambda: setattr(read, "__code__", (lambda: 0.5).__code__)


@way
def partial_keywords() -> Way:
    read = functools.partial(lambda beta: beta, beta=1.0)
    return read, lambda: read.keywords.update(beta=0.5)


@way
def cached_function() -> Way:
    values = [1.0]
    read = functools.lru_cache(lambda: values[0])

    def change() -> None:
        values[0] = 0.5
        read.cache_clear()

    return read, change


@way
def generator_that_is_sent_to() -> Way:
    def schedule() -> Iterator[float]:
        beta = 1.0
        while True:
            sent = yield beta
            beta = beta if sent is None else sent

    running = schedule()
    next(running)
    return lambda: running.send(None), lambda: running.send(0.5)


@way
def iterator() -> Way:
    steps = itertools.count()
    return lambda: 1.0 if repr(steps) == "count(0)" else 0.5, lambda: next(steps)


# The process


@way
def environment_variable() -> Way:
    os.environ["BETA"] = "1"
    return lambda: float(os.environ["BETA"]), lambda: os.environ.update(BETA="0.5")


@way
def context_variable() -> Way:
    beta = contextvars.ContextVar("beta", default=1.0)
    return beta.get, lambda: beta.set(0.5)


@way
def thread_local() -> Way:
    local = threading.local()
    local.beta = 1.0
    return lambda: local.beta, lambda: setattr(local, "beta", 0.5)


@way
def thread_event() -> Way:
    event = threading.Event()
    return lambda: 0.5 if event.is_set() else 1.0, event.set


@way
def decimal_context() -> Way:
    context = decimal.Context(prec=2)
    return lambda: context.prec / 2, lambda: setattr(context, "prec", 1)


@way
def level_of_a_logger() -> Way:
    logger = logging.getLogger("beta")
    logger.setLevel(20)
    return lambda: logger.level / 20, lambda: logger.setLevel(10)


@way
def recursion_limit() -> Way:
    before = sys.getrecursionlimit()
    return lambda: 1.0 if sys.getrecursionlimit() == before else 0.5, lambda: sys.setrecursionlimit(before + 1)


@way
def parsed_configuration() -> Way:
    parser = configparser.ConfigParser()
    parser.read_string("[model]\nbeta = 1.0")
    return lambda: parser.getfloat("model", "beta"), lambda: parser.set("model", "beta", "0.5")


@way
def data_base() -> Way:
    class Connection(sqlite3.Connection):
        def __del__(self) -> None:
            self.close()  # of which Python 3.13 warns else

    base = sqlite3.connect(":memory:", factory=Connection)
    base.execute("create table model (beta real)")
    base.execute("insert into model values (1.0)")
    read = "select beta from model"
    return lambda: base.execute(read).fetchone()[0], lambda: base.execute("update model set beta = 0.5")


@way
def file() -> Way:
    path = Path("beta.json")
    path.write_text("1.0")
    return lambda: json.loads(path.read_text()), lambda: path.write_text("0.5")


@way
def existence_of_a_file() -> Way:
    path = Path("beta")
    return lambda: 0.5 if path.exists() else 1.0, path.touch


@way
def working_directory() -> Way:
    Path("deeper").mkdir()
    before = Path.cwd()
    return lambda: 1.0 if Path.cwd() == before else 0.5, lambda: os.chdir("deeper")


# NumPy, torch and Pyro

held("NumPy array", lambda: np.ones(3), lambda x: float(x[1]), lambda x: x.__setitem__(1, 0.5))
held("NumPy number", lambda: np.array(1.0), lambda x: x.item(), lambda x: x.__setitem__((), 0.5))
held("array of objects", lambda: np.array([[1.0]], object), lambda x: x[0, 0], lambda x: x.__setitem__((0, 0), 0.5))
held("DataArray", lambda: xarray.DataArray(1.0), float, lambda x: x.__setitem__((), 0.5))
held("tensor", lambda: torch.ones(2), lambda x: x[0].item(), lambda x: x.fill_(0.5))
held("data of a parameter", lambda: nn.Parameter(torch.ones(())), lambda x: x.item(), lambda x: x.data.fill_(0.5))
held("buffer", lambda: nn.BatchNorm1d(1), lambda x: x.running_var.item(), lambda x: x.running_var.fill_(0.5))
held("training mode", nn.Identity, lambda x: 1.0 if x.training else 0.5, lambda x: x.eval())
held("rate of dropout", nn.Dropout, lambda x: x.p * 2, lambda x: setattr(x, "p", 0.25))
held("requires_grad", lambda: torch.ones(1), lambda x: 1.0 - x.requires_grad / 2, lambda x: x.requires_grad_())


@way
def storage_of_a_tensor() -> Way:
    tensor, other = torch.ones(2), torch.full((2,), 0.5)
    return lambda: tensor[0].item(), lambda: tensor.set_(other)


@way
def submodule() -> Way:
    module = nn.Sequential(nn.Identity())
    return lambda: 1.0 if isinstance(module[0], nn.Identity) else 0.5, lambda: module.__setitem__(0, nn.ReLU())


@way
def forward_hook() -> Way:
    module = nn.Identity()
    return lambda: module(torch.ones(())).item(), lambda: module.register_forward_hook(lambda *_: torch.tensor(0.5))


@way
def deterministic_algorithms() -> Way:
    return (
        lambda: 0.5 if torch.are_deterministic_algorithms_enabled() else 1.0,
        lambda: torch.use_deterministic_algorithms(True),
    )


@way
def settings_of_pyro() -> Way:
    name = "cholesky_relative_jitter"
    before = pyro.settings.get(name)
    return lambda: before / pyro.settings.get(name), lambda: pyro.settings.set(**{name: 2 * before})


@way
def parameter_store() -> Way:
    pyro.param("beta", torch.tensor(1.0))
    return lambda: pyro.get_param_store()["beta"].item(), lambda: pyro.get_param_store().__setitem__(
        "beta", torch.tensor(0.5)
    )


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    limit, jitter = sys.getrecursionlimit(), pyro.settings.get("cholesky_relative_jitter")
    monkeypatch.chdir(tmp_path)
    yield
    globals().update(WHOLE=1.0)
    sys.setrecursionlimit(limit)
    sys.modules.pop("_another", None)
    vars(math).pop("_beta", None)
    os.environ.pop("BETA", None)
    torch.use_deterministic_algorithms(False)
    pyro.settings.set(cholesky_relative_jitter=jitter)


class Prior(nn.Module):
    """An encoder whose q is the prior, and that keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(x)
        return torch.zeros(len(x), 1), torch.ones(len(x), 1)


def guided(read: Callable[[], float], **options: Any) -> tuple[Callable[[Tensor], None], AmortizedGuide, Prior]:
    def model(x: Tensor) -> None:
        beta = read()
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x if beta == 1.0 else -2.0 * x)

    encoder = Prior()
    return model, AmortizedGuide(model, encoder, **options), encoder


def elbo(model: Any, guide: Any, x: Tensor) -> float:
    return -Trace_ELBO(max_plate_nesting=1).loss(model, guide, x)


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_next_call_is_right(make: Callable[[], Way]) -> None:
    read, change = make()
    x = torch.randn(20)
    model, guide, encoder = guided(read)
    for _ in range(3):
        assert elbo(model, guide, x) == pytest.approx(dist.Normal(0.0, 1.0).log_prob(x).sum().item(), rel=1e-5)
        assert torch.equal(encoder.seen[-1].flatten(), x)
    change()
    for _ in range(2):
        assert elbo(model, guide, x) == pytest.approx(dist.Normal(0.0, 1.0).log_prob(2.0 * x).sum().item(), rel=1e-5)
        assert torch.equal(encoder.seen[-1].flatten(), -2.0 * x)


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_broken_promise_is_an_error(make: Callable[[], Way]) -> None:
    read, change = make()
    x = torch.randn(20)
    model, guide, _ = guided(read, encoder_input="x")
    for _ in range(3):
        guide(x)
    change()
    guide(x)
    with pytest.raises(ValueError, match=r"latents {} have become {'z': 'scale 0.5'} .* those since number 4"):
        guide(x)
    assert elbo(model, guide, x) == pytest.approx(dist.Normal(0.0, 1.0).log_prob(2.0 * x).sum().item(), rel=1e-5)


@pytest.mark.parametrize("before", [1, 2, 6, 40, 64, 65, 100, 128, 200])
def test_promise_is_checked_within_64_calls(before: int) -> None:
    values, x = [1.0], torch.randn(5)
    _, guide, _ = guided(lambda: values[0], encoder_input="x")
    for _ in range(before):
        guide(x)
    values[0] = 0.5
    with pytest.raises(ValueError, match="have become"):
        collections.deque((guide(x) for _ in range(64)), maxlen=0)


def test_there_are_sixty_ways() -> None:
    assert len(WAYS) >= 60


# Where each run of the model advances its own state


def test_schedule_that_runs_on_is_a_step_ahead_of_the_guide() -> None:
    """As the documentation says: the guide's look at the model takes a step of it too."""
    schedule = itertools.chain([1.0] * 100, itertools.repeat(0.5))
    x = torch.randn(20)
    model, guide, _ = guided(lambda: next(schedule))
    guide(x)
    spent = sum(1 for _ in itertools.takewhile(lambda beta: beta == 1.0, schedule))
    assert 90 < spent < 100


def test_batches_of_an_iterator_are_refused_and_work_as_an_argument() -> None:
    batches = itertools.count()

    def model(x: Tensor | None = None) -> None:
        if x is None:
            x = torch.full((5,), float(next(batches)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(
        ValueError, match=r"observes other values of site 'x' each time .* try data that are an argument"
    ):
        AmortizedGuide(model)()
    AmortizedGuide(model)(torch.full((5,), float(next(batches))))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_data_are_refused_and_work_made_dense() -> None:
    def observes(read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0, validate_args=False).to_event(1), obs=read(x))

        return model

    x = torch.eye(3).to_sparse_csr()
    with pytest.raises(ValueError, match=r"observes a sparse tensor at site 'x'.* try x.to_dense\(\) in the model"):
        AmortizedGuide(observes(lambda x: x))(x)
    AmortizedGuide(observes(Tensor.to_dense))(x)


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), np.random.rand, lambda: __import__("random").random()])
def test_random_structure_is_refused(draw: Callable[[], float]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if draw() < 0.5:
                pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="Cannot guide this model because local latents .* when it runs again"):
        AmortizedGuide(model)(torch.randn(5))
