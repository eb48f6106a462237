"""Inference strategies: where do the variational parameters phi come from?"""

from pyro_amortized.inference.base import InferenceStrategy, Objective
from pyro_amortized.inference.refined import ENCODER_GRADIENTS, Refined, Refinement, start_of
from pyro_amortized.inference.strategies import Encoded, PerDatapoint, Prior, check_output

__all__ = [
    "ENCODER_GRADIENTS",
    "Encoded",
    "InferenceStrategy",
    "Objective",
    "PerDatapoint",
    "Prior",
    "Refined",
    "Refinement",
    "check_output",
    "start_of",
]
