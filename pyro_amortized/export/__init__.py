"""Results for other tools: posteriors as ArviZ knows them, and summaries of large data sets."""

from pyro_amortized.export.inference_data import to_arviz
from pyro_amortized.export.summary import posterior_summary

__all__ = ["posterior_summary", "to_arviz"]
