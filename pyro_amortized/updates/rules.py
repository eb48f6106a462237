"""Which rule serves a family best."""

from __future__ import annotations

from pyro_amortized.families import VariationalFamily
from pyro_amortized.updates.base import UpdateRule
from pyro_amortized.updates.gradient import NaturalGradient
from pyro_amortized.updates.newton import Newton

__all__ = ["MOST_LATENTS", "rule_for"]


MOST_LATENTS = 128
"""Latents of a datapoint beyond which nothing uses the curvature unasked, since its cost grows with their cube."""


def rule_for(family: VariationalFamily, num_particles: int, estimator: str | None) -> UpdateRule | None:
    """The rule that refines a trained guide best, or None for the default of guides in training.

    Args:
        family: The variational family.
        num_particles: Number of draws for each step's gradient.
        estimator: The estimator of the gradient.
    """
    curved = num_particles > 1 and estimator != "analytic_kl" and family.latent_dim <= MOST_LATENTS
    if curved and family.takes_newton_steps:
        return Newton()
    return NaturalGradient() if family.is_mean_field else None
