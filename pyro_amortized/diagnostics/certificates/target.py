"""What draws must be worth for a stage to pass."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """What a stage must reach, from the number of draws wanted.

    Attributes:
        num_samples: S, the number of draws.
        khat: Largest tail shape of importance weights.
        rhat: Largest R-hat of chains.
    """

    num_samples: int
    khat: float = 0.7
    rhat: float = 1.01

    @property
    def ess(self) -> float:
        """Least effective sample size, for the centre of the distribution: half of the draws."""
        return self.num_samples / 2

    @property
    def tail_ess(self) -> float:
        """Least effective sample size of chains for their 5 % and 95 % quantiles: a quarter of the draws."""
        return self.num_samples / 4
