"""Training by Lightning's Trainer; needs the extra ``lightning``, as in ``pip install pyro-amortized[lightning]``."""

from pyro_amortized.lightning.aggressive import AggressiveTraining
from pyro_amortized.lightning.history import History
from pyro_amortized.lightning.module import SVIModule

__all__ = ["AggressiveTraining", "History", "SVIModule"]
