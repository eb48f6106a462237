"""What every error says: what, why and what to try; and the values that errors propose are taken."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remedies import X, made, model, report

import pyro_amortized
from pyro_amortized import (
    Adam,
    Codebook,
    CollapseReport,
    ConvEncoder,
    CountEncoder,
    DeepSetEncoder,
    DiscreteAmortizedGuide,
    Flow,
    GapEstimate,
    LearnedUpdate,
    LowRankMultivariateNormal,
    Mixture,
    MLPEncoder,
    NaturalGradient,
    Newton,
    Normal,
    SemiAmortizedGuide,
    SequenceEncoder,
    VectorQuantizedGuide,
    posterior_summary,
    simulate,
)
from pyro_amortized.training import CapacityELBO, FreeBitsELBO, cyclical_schedule, linear_schedule, sigmoid_schedule


def test_values_that_errors_propose_are_taken() -> None:
    """Where the remedy is a setting, it is read off the text."""
    settings: list[tuple[Callable[..., Any], list[str]]] = [
        (lambda **k: made(**k), ["init_scale", "name", "plate"]),
        (
            lambda **k: SemiAmortizedGuide(model, **k),
            ["num_steps", "num_particles", "compile", "keep_best", "fixed_noise", "checkpoint"],
        ),
        (lambda **k: report(**k), ["threshold", "epsilon", "delta", "max_pairs", "seed"]),
        (lambda **k: simulate(model, made(), (X,), **k), ["num_datapoints", "seed"]),
        (lambda **k: posterior_summary(model, made(), (X,), **k), ["num_samples", "seed"]),
        (lambda **k: Adam(**k), ["step_size", "max_norm", "betas"]),
        (lambda **k: NaturalGradient(**k), ["step_size", "max_shift", "max_log_ratio"]),
        (lambda **k: Newton(**k), ["step_size", "max_shift", "max_log_ratio"]),
        (lambda **k: LearnedUpdate(**k), ["hidden_dims"]),
        (lambda **k: MLPEncoder(1, **k), ["hidden_dims", "standardize"]),
        (lambda **k: DeepSetEncoder(1, **k), ["hidden_dims", "output_dims"]),
        (lambda **k: SequenceEncoder(1, **k), ["causal", "pooled", "hidden_dims", "num_layers", "num_heads"]),
        (lambda **k: ConvEncoder(1, **k), ["conv_dims", "hidden_dims", "kernel_size", "grid", "standardize"]),
        (lambda **k: CountEncoder(1, **k), ["num_batches", "hidden_dims", "standardize"]),
        (lambda **k: Normal(**k), ["latent_dim"]),
        (lambda **k: LowRankMultivariateNormal(3, **k), ["rank"]),
        (lambda **k: Mixture(2, **k), ["num_components", "spread"]),
        (lambda **k: Flow(2, **k), ["num_transforms", "context_dim", "hidden_dims"]),
        (lambda **k: Codebook(**{"num_codes": 4, "dim": 2, **k}), ["num_codes", "dim", "decay", "revive_below"]),
        (lambda **k: linear_schedule(**k), ["num_steps"]),
        (lambda **k: sigmoid_schedule(**{"midpoint": 5, "width": 2, **k}), ["midpoint", "width"]),
        (lambda **k: cyclical_schedule(**{"num_steps": 5, **k}), ["num_steps", "num_cycles", "ramp"]),
        (lambda **k: FreeBitsELBO(**k), ["free_bits"]),
        (lambda **k: CapacityELBO(**{"capacity": 1.0, **k}), ["capacity", "gamma"]),
        (lambda **k: DiscreteAmortizedGuide(model, **k), ["temperature"]),
        (lambda **k: VectorQuantizedGuide(model, Codebook(4, 2), **k), ["commitment"]),
    ]
    for call, names in settings:
        for name in names:
            with pytest.raises(ValueError, match="; try ") as caught:
                call(**{name: object()})
            setting, value = re.search(r"; try (\w+)=(.+?)\.?$", str(caught.value), re.DOTALL).groups()  # type: ignore[union-attr]
            assert setting == name, caught.value
            call(**{name: ast.literal_eval(value)})


def test_reports_are_read_by_the_class_that_the_error_names(tmp_path: Path) -> None:
    path = tmp_path / "report.nc"
    report().to_netcdf(path)
    with pytest.raises(ValueError, match="try the path that to_netcdf was given, or CollapseReport.from_netcdf"):
        GapEstimate.from_netcdf(path)
    assert CollapseReport.from_netcdf(path).num_datapoints == 6


def _texts(source: str) -> list[str]:
    """The texts of all ValueErrors that are raised, with what they insert as code."""
    calls = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    texts = [ast.unparse(c) for c in calls if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "ValueError"]
    return [
        text for text in texts if not text.startswith(("ValueError('it ", "ValueError('the "))
    ]  # which are caught in the package


ROOT = Path(pyro_amortized.__file__).parent


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_error_says_what_why_and_what_to_try(path: Path) -> None:
    for text in _texts(path.read_text()):
        assert "Cannot " in text, text
        assert re.search(r"because|\{why\}", text), text
        assert re.search(r"\b[Tt]ry\b|\{remedy\}", text), text
