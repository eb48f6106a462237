"""Encoders: networks from a datapoint's values to features, one row per datapoint.

An encoder ends in features ``(N, H)``; the guide adds the linear head that makes variational parameters of them.
"""

from pyro_amortized.encoders.codebook import Codebook
from pyro_amortized.encoders.conv import ConvEncoder
from pyro_amortized.encoders.count import CountEncoder
from pyro_amortized.encoders.deep_set import DeepSetEncoder
from pyro_amortized.encoders.layers import Head, hidden_layers
from pyro_amortized.encoders.mlp import MLPEncoder
from pyro_amortized.encoders.plate import PlateEncoder, UnseenSizeWarning
from pyro_amortized.encoders.quantized import Quantized, perplexity
from pyro_amortized.encoders.sequence import SequenceEncoder
from pyro_amortized.encoders.set import SetEncoder
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = [
    "Codebook",
    "ConvEncoder",
    "CountEncoder",
    "DeepSetEncoder",
    "Head",
    "MLPEncoder",
    "PlateEncoder",
    "Quantized",
    "SequenceEncoder",
    "SetEncoder",
    "Standardize",
    "StandardizedEncoder",
    "UnseenSizeWarning",
    "hidden_layers",
    "perplexity",
]
