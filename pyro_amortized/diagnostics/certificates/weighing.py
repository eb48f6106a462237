"""Whether weighted draws of an approximation can stand for the posterior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_amortized.diagnostics.certificates.support import in_support
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.evidence.evidence import BOUNDED, log_weights_at
from pyro_amortized.diagnostics.evidence.importance import psis, systematic
from pyro_amortized.diagnostics.evidence.proposal import Approximation
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.families import VariationalFamily
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.noise import draw
from pyro_amortized.structure.layout import SiteLayout

__all__ = ["Member", "Weighed", "weigh", "weighted_moments"]

_SCREENED, _LEAST_SHARE, _HOPELESS = 8, 0.5, 1.0
"""One in so many draws shows first whether the rest is worth its cost: at half of the share wanted, it is. Of weights
whose mean is infinite, by the shape of their tail, no more are taken."""
_NUM_POWERS = 10
"""Iterations for the longest axis of draws, of which any that is nearly as long does."""
_PIECE = 2**24
"""Numbers in the draws that are held at a time."""


@dataclass
class Member:
    """Members of a variational family, as an approximation.

    Attributes:
        family: The family.
        phi: Variational parameters, ``(n, P)``.
    """

    family: VariationalFamily
    phi: Tensor

    def sample(self, num_draws: int, rng: torch.Generator) -> Tensor:
        """Independent draws ``(K, n, D)``, float64."""
        return draw(self.family, self.phi, num_draws, rng).cpu().double()

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-densities ``(K, n)``, float64."""
        parts = [self.family(self.phi).log_prob(z[piece].to(self.phi)) for piece in chunks(len(z), z.shape[1])]
        return torch.cat(parts).cpu().double()

    def __getitem__(self, rows: Tensor) -> Member:
        """Those of some datapoints."""
        return Member(self.family, self.phi[rows.to(self.phi.device)])


@dataclass
class Weighed:
    """What weighted draws say of n datapoints.

    Attributes:
        draws: ``(S, n, D)``, drawn again in proportion to their smoothed weights.
        khat: Shape of the weights' tail, ``(n,)``; minus infinity for equal weights.
        ess: Effective sample size of ``draws``, ``(n,)``: the smallest of that of the weights, those of the means of
            all dimensions, and of values in their support; an extrapolation where a few draws showed it to be small.
        tail_ess: The smallest of those of the dimensions' standard deviations, ``(n,)``.
    """

    draws: Tensor
    khat: Tensor
    ess: Tensor
    tail_ess: Tensor

    def reach(self, target: Target) -> Tensor:
        """For which datapoints they can be trusted, ``(n,)``."""
        return (self.khat < target.khat) & (self.ess >= target.ess) & (self.tail_ess >= target.tail_ess)


@torch.no_grad()
def weigh(
    problem: LocalProblem, rows: Tensor, q: Approximation, target: Target, rng: torch.Generator, most: int = 1
) -> Weighed:
    """Weighs draws of an approximation by Pareto-smoothed importance sampling.

    Args:
        problem: The bound call.
        rows: Which datapoints, ``(n,)``.
        q: The approximations of their posteriors.
        target: How many draws, and what they must be worth.
        rng: Source of the draws.
        most: Up to how many times as many draws may be weighed, where so many are worth what is wanted.
    """
    z = q.sample(4 * -(-target.num_samples // (4 * _SCREENED)), rng)
    log_weights = log_weights_at(problem, q, rows, z)
    layout = problem.objective.log_joint.layout
    found = _summarise(z, log_weights, layout, target, rng)
    hopeful = (_share(found, target, most) >= _LEAST_SHARE / most).nonzero().squeeze(-1)
    for part in hopeful.split(max(1, _PIECE // (most * target.num_samples * z.shape[-1]))) if len(hopeful) else ():
        draws, weights, times = z[:, part], log_weights[:, part], 1
        while len(part):
            more = q[part].sample(4 * -(-(times * target.num_samples - len(draws)) // 4), rng)
            more = more[: times * target.num_samples - len(draws)]
            weights = torch.cat([weights, log_weights_at(problem, q[part], rows[part], more)])
            draws = torch.cat([draws, more])
            own = _summarise(draws, weights, layout, target, rng)
            for name, value in vars(found).items():
                value.index_copy_(1 if name == "draws" else 0, part, getattr(own, name))
            short = ~own.reach(target) & (own.khat < _HOPELESS) & (_share(own, target, most) >= times / most)
            short &= times < most
            part, draws, weights, times = part[short], draws[:, short], weights[:, short], 2 * times
    return found


def _share(found: Weighed, target: Target, most: int) -> Tensor:
    """Of what draws must be worth, ``(n,)``; for standard deviations only where more of them may be taken."""
    share = found.ess / target.ess
    return share if most == 1 else torch.minimum(share, found.tail_ess / target.tail_ess)


def _summarise(z: Tensor, log_weights: Tensor, layout: SiteLayout, target: Target, rng: torch.Generator) -> Weighed:
    """What weights ``(K, n)`` of draws ``(K, n, D)`` say, effective sizes as those of all draws wanted at least."""
    count, wanted = len(z), target.num_samples
    none = ~(log_weights.amax(0) > -torch.inf)
    smoothed, khat = psis(torch.where(none, 0.0, log_weights.nan_to_num(nan=-torch.inf)))
    z, weights = _in_order(z, smoothed.softmax(0))
    khat = torch.where(weights.amax(0) * count <= BOUNDED, khat.double().clamp(max=0.0), khat.double())
    chosen = systematic(weights, rng, wanted)
    of_means, of_scales = _effective_sizes(z, weights, chosen)
    of_means = torch.minimum(of_means, 1 / (weights.square().sum(0) + max(0.0, 1 / wanted - 1 / count)))
    supported = in_support(layout, z)
    if supported is not None:
        of_means = torch.minimum(of_means, _effective_sizes(supported, weights, chosen)[0])
    sizes = (torch.where(none, 0.0, size * max(1.0, wanted / count)) for size in (of_means, of_scales))
    return Weighed(_at(z, chosen), torch.where(none, torch.inf, khat), *sizes)


def _in_order(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Draws and weights from one end of the posterior to the other, along the longest axis of the standardised draws.

    What is drawn again from them, evenly spaced, then holds of every mode along it what all do.
    """
    loc, scale, _ = weighted_moments(z, weights)
    standardized = (z - loc) / scale
    places = torch.einsum("knd,d->kn", standardized, torch.linspace(1.0, 2.0, z.shape[-1]).to(z))
    for _ in range(_NUM_POWERS):
        axis = torch.einsum("kn,knd->nd", weights * places, standardized)
        places = torch.einsum("knd,nd->kn", standardized, torch.nn.functional.normalize(axis, dim=-1))
    order = places.argsort(0)
    return _at(z, order), weights.gather(0, order)


def _at(z: Tensor, positions: Tensor) -> Tensor:
    """Draws ``(S, n, D)`` at positions ``(S, n)``."""
    return z.gather(0, positions.unsqueeze(-1).expand(-1, -1, z.shape[-1]))


def _effective_sizes(z: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many independent normal draws have means, and standard deviations, of the errors of those chosen, ``(n,)``.

    The smallest of all dimensions. To the errors of the weighted draws is added, where fewer are chosen, what choosing
    them evenly spaced does: that of samples within strata, from the differences of neighbours.
    """
    loc, scale, error = weighted_moments(z, weights)
    again = (_at(z, chosen.sort(0)[0]) - loc) / scale
    within = torch.stack([again, again.square() / 2]).diff(dim=1).square().mean(1) / 2
    variances = error.square() + max(0.0, 1 / len(chosen) - 1 / len(z)) * within
    return (1 / variances[0]).amin(-1), (0.5 / variances[1]).amin(-1)


def weighted_moments(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Means and standard deviations of weighted draws, and their errors.

    A mean :math:`\sum_k w_k u_k` of standardised draws has variance :math:`\sum_k w_k^2 u_k^2`, and a standard
    deviation a relative one of :math:`\sum_k w_k^2 (u_k^2 - 1)^2 / 4`. Where large weights lie far out, as in heavy
    tails, both are larger than the weights alone tell.

    Args:
        z: Draws ``(K, n, D)``.
        weights: Their weights ``(K, n)``, which sum to 1.

    Returns:
        Means and standard deviations, ``(n, D)`` each, and standard errors of the means, in standard deviations, and
        of the logarithms of the standard deviations, ``(2, n, D)``.

    References:
        Monte Carlo Theory, Methods and Examples, Art B. Owen (2013), chapter 9, https://artowen.su.domains/mc/
    """
    squares = weights.square()
    loc = torch.einsum("kn,knd->nd", weights, z)
    centred = (z - loc).square()
    variance = torch.einsum("kn,knd->nd", weights, centred).clamp(min=1e-300)
    relative = centred / variance
    of_loc = torch.einsum("kn,knd->nd", squares, relative)
    of_scale = torch.einsum("kn,knd->nd", squares, (relative - 1).square()) / 4
    return loc, variance.sqrt(), torch.stack([of_loc, of_scale]).sqrt()
