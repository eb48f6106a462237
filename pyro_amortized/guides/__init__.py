"""The Pyro guides: each puts together a layout, a variational family and an inference strategy.

A guide samples the global latents with an autoguide of Pyro's, asks its strategy for phi, one row per datapoint, and
samples the local latents from its family at phi, inside the datapoint plate, so that subsampling scales them as it
scales the model.
"""

from pyro_amortized.guides.amortized import AmortizedGuide
from pyro_amortized.guides.base import LocalGuide
from pyro_amortized.guides.discrete import DiscreteAmortizedGuide
from pyro_amortized.guides.iterative import IterativeAmortizedGuide
from pyro_amortized.guides.per_datapoint import PerDatapointGuide
from pyro_amortized.guides.semi_amortized import SemiAmortizedGuide
from pyro_amortized.guides.vector_quantized import VectorQuantizedGuide
from pyro_amortized.structure.datasets import over_datasets

__all__ = [
    "AmortizedGuide",
    "DiscreteAmortizedGuide",
    "IterativeAmortizedGuide",
    "LocalGuide",
    "PerDatapointGuide",
    "SemiAmortizedGuide",
    "VectorQuantizedGuide",
    "over_datasets",
]
