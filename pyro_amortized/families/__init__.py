"""Variational families: what shape q(z | x) may take.

A family maps a vector of variational parameters phi, one per datapoint, to a distribution over the flat unconstrained
latent of that datapoint. It knows torch, not Pyro, and nothing of encoders: where phi comes from is not its business.
"""

from pyro_amortized.families.base import VariationalFamily, build_family, register_family
from pyro_amortized.families.flow import Flow
from pyro_amortized.families.mixture import Mixture
from pyro_amortized.families.normal import LowRankMultivariateNormal, MultivariateNormal, Normal
from pyro_amortized.families.structured import Structured

__all__ = [
    "Flow",
    "LowRankMultivariateNormal",
    "Mixture",
    "MultivariateNormal",
    "Normal",
    "Structured",
    "VariationalFamily",
    "build_family",
    "register_family",
]
