"""What ArviZ makes of an export."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import arviz
import matplotlib.pyplot as plt
import pytest
import xarray
from exports import BEFORE_1, FEATURES, LATENTS, POINTS, as_datasets, exact, group_names, regression, regression_data
from models import LinearGaussian

from pyro_amortized import AmortizedGuide
from pyro_amortized.export import to_arviz

pytestmark = pytest.mark.usefixtures("_float64")


@pytest.fixture
def exported() -> Any:
    t, y = regression_data()
    return to_arviz(regression, AmortizedGuide(regression), (t, y), num_samples=100, prior=True)


def test_type_and_summary(exported: Any) -> None:
    assert isinstance(exported, arviz.InferenceData if BEFORE_1 else xarray.DataTree)
    table = arviz.summary(exported, kind="stats")
    assert [str(name) for name in table.index[:3]] == ["mu", "slope[0]", "slope[1]"]
    assert "level[4]" in table.index


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of ArviZ 0.23 and matplotlib 3.11
def test_plots(exported: Any) -> None:
    posterior, predictive = ("plot_posterior", "plot_ppc") if BEFORE_1 else ("plot_dist", "plot_ppc_dist")
    getattr(arviz, posterior)(exported, var_names=["mu", "slope"])
    arviz.plot_forest(exported, var_names=["level"])
    getattr(arviz, predictive)(exported)
    oracle = LinearGaussian.random_weights(FEATURES, LATENTS, orthogonal=True)
    stats = to_arviz(oracle.full, exact(oracle, widen=1.2), (oracle.simulate(POINTS),), num_samples=50)["sample_stats"]
    khat = stats["khat"]
    arviz.plot_khat(khat if BEFORE_1 else types.SimpleNamespace(pareto_k=khat, good_k=0.7))
    plt.close("all")


def test_netcdf_round_trip(exported: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "posterior.nc")
    exported.to_netcdf(path, engine="h5netcdf")
    read = arviz.from_netcdf(path, engine="h5netcdf") if BEFORE_1 else xarray.open_datatree(path)
    assert group_names(read) == group_names(exported)
    for name, values in as_datasets(exported).items():
        assert values.equals(as_datasets(read)[name].load())
        assert read[name].attrs == exported[name].attrs
    read.close()


@pytest.mark.slow
def test_importing_loads_neither_arviz_nor_xarray() -> None:
    code = "import sys, pyro_amortized.export; print({'arviz', 'xarray', 'pandas'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
