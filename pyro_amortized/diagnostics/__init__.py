"""Diagnostics of amortized inference."""

from pyro_amortized.diagnostics.bounds import evidence_bounds
from pyro_amortized.diagnostics.calibration import CalibrationReport, calibrate
from pyro_amortized.diagnostics.collapse import CollapseReport, collapse_report
from pyro_amortized.diagnostics.comparison import GapComparison, compare_gaps
from pyro_amortized.diagnostics.evidence import log_evidence
from pyro_amortized.diagnostics.gaps import GapEstimate, estimate_gaps
from pyro_amortized.diagnostics.importance import psis
from pyro_amortized.diagnostics.local_optimum import LocalOptimum, optimize_local
from pyro_amortized.diagnostics.simulation import Simulation, simulate

__all__ = [
    "CalibrationReport",
    "CollapseReport",
    "GapComparison",
    "GapEstimate",
    "LocalOptimum",
    "Simulation",
    "calibrate",
    "collapse_report",
    "compare_gaps",
    "estimate_gaps",
    "evidence_bounds",
    "log_evidence",
    "optimize_local",
    "psis",
    "simulate",
]
