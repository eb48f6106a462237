import warnings
from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)  # on tensors as small as those of the tests, further threads only wait for each other


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
