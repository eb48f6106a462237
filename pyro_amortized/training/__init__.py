"""For any SVI loop: the importance-weighted bound, remedies for collapse and for few data, checkpoints."""

from pyro_amortized.training.aggressive import AggressiveEncoder
from pyro_amortized.training.checkpoint import load_checkpoint, save_checkpoint
from pyro_amortized.training.decoder_draws import DecoderDraws
from pyro_amortized.training.elbos import CapacityELBO, FreeBitsELBO
from pyro_amortized.training.iwelbo import IWELBO
from pyro_amortized.training.kl_annealing import KLAnnealing, cyclical_schedule, linear_schedule, sigmoid_schedule

__all__ = [
    "IWELBO",
    "AggressiveEncoder",
    "CapacityELBO",
    "DecoderDraws",
    "FreeBitsELBO",
    "KLAnnealing",
    "cyclical_schedule",
    "linear_schedule",
    "load_checkpoint",
    "save_checkpoint",
    "sigmoid_schedule",
]
