"""Amortized variational inference for Pyro: guides with encoders, and diagnostics that say how far they are from exact.

A short map: ``structure`` reads what a model looks like in a call, ``families`` are the shapes of q, ``encoders``,
``inference`` and ``updates`` say where its parameters come from, ``objective`` is the ELBO of a datapoint, ``guides``
put them together for Pyro, ``diagnostics`` measure the result, ``training`` holds remedies for posterior collapse,
``export`` hands posteriors to ArviZ, and ``graphs`` makes the same numbers faster.
"""

from pyro_amortized.diagnostics import (
    CalibrationReport,
    CollapseReport,
    GapComparison,
    GapEstimate,
    LocalOptimum,
    Simulation,
    calibrate,
    collapse_report,
    compare_gaps,
    estimate_gaps,
    evidence_bounds,
    log_evidence,
    optimize_local,
    psis,
    simulate,
)
from pyro_amortized.encoders import (
    Codebook,
    ConvEncoder,
    CountEncoder,
    DeepSetEncoder,
    MLPEncoder,
    PlateEncoder,
    SequenceEncoder,
    SetEncoder,
    UnseenSizeWarning,
)
from pyro_amortized.export import posterior_summary, to_arviz
from pyro_amortized.families import (
    Flow,
    LowRankMultivariateNormal,
    Mixture,
    MultivariateNormal,
    Normal,
    Structured,
    VariationalFamily,
)
from pyro_amortized.guides import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
    VectorQuantizedGuide,
    over_datasets,
)
from pyro_amortized.updates import Adam, GradientAscent, LearnedUpdate, NaturalGradient, Newton, UpdateRule

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AmortizedGuide",
    "CalibrationReport",
    "Codebook",
    "ConvEncoder",
    "CountEncoder",
    "CollapseReport",
    "DeepSetEncoder",
    "DiscreteAmortizedGuide",
    "Flow",
    "GapComparison",
    "GapEstimate",
    "GradientAscent",
    "IterativeAmortizedGuide",
    "LearnedUpdate",
    "LocalOptimum",
    "LowRankMultivariateNormal",
    "MLPEncoder",
    "Mixture",
    "MultivariateNormal",
    "NaturalGradient",
    "Newton",
    "Normal",
    "PerDatapointGuide",
    "PlateEncoder",
    "SemiAmortizedGuide",
    "SequenceEncoder",
    "SetEncoder",
    "Simulation",
    "Structured",
    "UnseenSizeWarning",
    "UpdateRule",
    "VariationalFamily",
    "VectorQuantizedGuide",
    "calibrate",
    "collapse_report",
    "compare_gaps",
    "estimate_gaps",
    "evidence_bounds",
    "log_evidence",
    "optimize_local",
    "over_datasets",
    "posterior_summary",
    "psis",
    "simulate",
    "to_arviz",
]
