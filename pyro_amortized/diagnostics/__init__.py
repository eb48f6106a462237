"""Diagnostics of amortized inference: log evidence, local optimum and the gaps between them, per datapoint."""

from pyro_amortized.diagnostics.evidence import log_evidence
from pyro_amortized.diagnostics.gaps import GapEstimate, estimate_gaps
from pyro_amortized.diagnostics.importance import psis
from pyro_amortized.diagnostics.local_optimum import LocalOptimum, optimize_local

__all__ = ["GapEstimate", "LocalOptimum", "estimate_gaps", "log_evidence", "optimize_local", "psis"]
