import warnings
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pyro
import pytest
import torch

collect_ignore_glob = ["*/conftest.py"]  # which hold no docstrings to test, and all have one name

torch.set_num_threads(1)  # on tensors as small as those of the tests, further threads only wait for each other


SLOW = tuple((Path(__file__).parent / "slow_cases.txt").read_text().splitlines())
"""Cases, by how their names begin, that take seconds, of tests of which another case runs by default."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--part 0/3`` runs the first third of the tests that are chosen, the cases of a test together."""
    parser.addoption("--part", default="0/1", help="number of a part and number of parts, such as 0/3")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks them as slow, and leaves out tests of other parts than the one asked for."""
    begun = set()
    for item in items:
        name = item.nodeid.rpartition("/")[2]
        test, case = name.partition("[")[0], name.partition("::")[2]
        thinned = item.get_closest_marker("thinned") and crc32(case.encode()) % 3 and test in begun
        begun.add(test)
        elsewhere = any(item.get_closest_marker(name) for name in ("gpu", "fake_device"))
        if (thinned or name.startswith(SLOW)) and not elsewhere:
            item.add_marker(pytest.mark.slow)
    part, parts = map(int, config.getoption("--part").split("/"))
    if parts > 1:
        left = [item for item in items if crc32(item.nodeid.partition("[")[0].encode()) % parts != part]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _fresh_pyro() -> Iterator[None]:
    """Every test starts from an empty parameter store, a fixed seed and validation, and leaves no dtype behind."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def _float64(_fresh_pyro: None) -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def _compiler() -> Iterator[None]:
    """TorchInductor warns of deprecations of its own making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="compile=True has no effect")
        yield
