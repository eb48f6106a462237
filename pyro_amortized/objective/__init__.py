"""What is a datapoint's ELBO?"""

from pyro_amortized.objective.draws import MAX_ROWS, chunks
from pyro_amortized.objective.elbo import ESTIMATORS, LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint

__all__ = ["ESTIMATORS", "MAX_ROWS", "LocalLogJoint", "LocalObjective", "chunks"]
