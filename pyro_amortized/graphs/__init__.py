"""The same numbers without Python; never on a reader's path."""

from pyro_amortized.graphs.cache import Function, GraphCache, Use

__all__ = ["Function", "GraphCache", "Use"]
