"""Results for other tools: posteriors as ArviZ knows them, and summaries of large data sets."""

from pyro_amortized.export.inference_data import open_store, to_arviz
from pyro_amortized.export.summary import posterior_summary

__all__ = ["open_store", "posterior_summary", "to_arviz"]
