"""Update rules: how does a refinement step move phi?"""

from pyro_amortized.updates.base import Curvature, State, UpdateRule
from pyro_amortized.updates.gradient import Adam, GradientAscent, NaturalGradient
from pyro_amortized.updates.learned import LearnedUpdate
from pyro_amortized.updates.newton import Newton
from pyro_amortized.updates.rules import rule_for

__all__ = [
    "Adam",
    "Curvature",
    "GradientAscent",
    "LearnedUpdate",
    "NaturalGradient",
    "Newton",
    "State",
    "UpdateRule",
    "rule_for",
]
