"""What is a datapoint's ELBO?"""

from pyro_amortized.objective.elbo import ESTIMATORS, LocalObjective
from pyro_amortized.objective.log_joint import MAX_ROWS, LocalLogJoint, chunks

__all__ = ["ESTIMATORS", "LocalLogJoint", "LocalObjective", "MAX_ROWS", "chunks"]
