"""Diagnostics of amortized inference."""

from pyro_amortized.diagnostics.calibration.calibration import CalibrationReport, calibrate
from pyro_amortized.diagnostics.certificates.certified import certified_posterior
from pyro_amortized.diagnostics.certificates.posterior import CertifiedPosterior
from pyro_amortized.diagnostics.collapse.collapse import CollapseReport, collapse_report
from pyro_amortized.diagnostics.evidence.bounds import evidence_bounds
from pyro_amortized.diagnostics.evidence.importance import psis
from pyro_amortized.diagnostics.evidence.log_evidence import log_evidence
from pyro_amortized.diagnostics.gaps.comparison import GapComparison, compare_gaps
from pyro_amortized.diagnostics.gaps.gaps import GapEstimate, estimate_gaps
from pyro_amortized.diagnostics.gaps.prediction import predict_gap
from pyro_amortized.diagnostics.optimum.local_optimum import LocalOptimum, optimize_local
from pyro_amortized.diagnostics.simulation import Simulation, simulate
from pyro_amortized.diagnostics.typicality.typicality import AtypicalDataWarning, TypicalityReport, typicality

__all__ = [
    "AtypicalDataWarning",
    "CalibrationReport",
    "CertifiedPosterior",
    "CollapseReport",
    "GapComparison",
    "GapEstimate",
    "LocalOptimum",
    "Simulation",
    "TypicalityReport",
    "calibrate",
    "certified_posterior",
    "collapse_report",
    "compare_gaps",
    "estimate_gaps",
    "evidence_bounds",
    "log_evidence",
    "optimize_local",
    "predict_gap",
    "psis",
    "simulate",
    "typicality",
]
