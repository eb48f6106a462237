r"""The log evidence of every datapoint, :math:`\log p(x_n)`, by importance sampling that watches its own reliability.

A proposal is a multivariate t. The first has the mean of the optimal member of the guide's family and the Hessian of
the log-joint there; where its weights have a heavy tail, proposals are fitted to the weighted draws instead. Draws are
taken in rounds, per datapoint, until the standard error is small and the tail of the weights is light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.importance import psis
from pyro_amortized.diagnostics.local_optimum import LocalOptimum, solve
from pyro_amortized.diagnostics.noise import draw, generator
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar, to_dataset
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective import LocalLogJoint, chunks

if TYPE_CHECKING:
    import xarray

__all__ = ["log_evidence"]

_LIGHT_TAIL = 0.5
_ROUND = 1000
_PATIENCE = 4
"""Rounds that a proposal gets before it is adapted."""


def log_evidence(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    max_samples: int = 20000,
    optimum: LocalOptimum | None = None,
    seed: int = 0,
    progress: bool = False,
) -> xarray.Dataset:
    r"""Estimates :math:`\log p(x_n) = \log \int p(x_n, z)\, dz` for every datapoint.

    The estimate is the logarithm of the mean weight, its standard error :math:`sd(w) / (mean(w) \sqrt{K})`, calibrated
    while ``khat`` is below 0.5 and too small above.

    Args:
        model: The Pyro model.
        guide: A guide of this package; only the efficiency depends on how well it is trained.
        model_args: The model's positional arguments.
        model_kwargs: The model's keyword arguments.
        tolerance: Four times the standard error at which a datapoint is done, in nats.
        max_samples: Most draws from one proposal per datapoint.
        optimum: The result of :func:`optimize_local` on the same call, if it is at hand.
        seed: Seed of the draws; torch's global seed is not touched.
        progress: Whether to show progress bars.

    Returns:
        A dataset over the plate's dimension with ``log_evidence`` and ``log_evidence_se`` in nats, ``khat``, ``ess``
        (effective sample size) and ``num_samples``. Global latents are held at the guide's median.

    Raises:
        ValueError: If the log-joint cannot be evaluated, or is not finite, naming the datapoints.

    References:
        Bayesian Inference in Econometric Models Using Monte Carlo Integration, John Geweke (1989).
        Pareto Smoothed Importance Sampling, Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry (2024),
        https://arxiv.org/abs/1507.02646
        Adaptive Importance Sampling in General Mixture Classes, Olivier Cappé, Randal Douc, Arnaud Guillin, Jean-Michel
        Marin, Christian P. Robert (2008).
    """
    problem = bind(model, guide, model_args, model_kwargs, seed)
    optimum = solve(problem, tolerance, seed, progress) if optimum is None else optimum
    evidence = estimate_evidence(problem, optimum.phi, tolerance, max_samples, seed, progress)
    settings = {"tolerance": tolerance, "max_samples": max_samples, "seed": seed}
    return to_dataset(problem, evidence, **settings)


@dataclass
class Proposal:
    """A multivariate t per datapoint.

    Attributes:
        loc: ``(N, D)``, float64.
        scale_tril: ``(N, D, D)``, float64.
        df: Degrees of freedom.
    """

    loc: Tensor
    scale_tril: Tensor
    df: float = 10.0

    def __getitem__(self, rows: Tensor) -> Proposal:
        return Proposal(self.loc[rows], self.scale_tril[rows], self.df)

    def sample(self, num_draws: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws ``(K, N, D)`` and their log-densities ``(K, N)``."""
        df, (size, dim) = self.df, self.loc.shape
        normal = torch.randn(num_draws, size, dim, generator=rng, dtype=torch.float64)
        half_df = torch.full((num_draws, size), df / 2, dtype=torch.float64)
        mixing = torch._standard_gamma(half_df, generator=rng) / half_df
        white = normal * mixing.rsqrt().unsqueeze(-1)
        z = self.loc + torch.einsum("nij,knj->kni", self.scale_tril, white)
        constant = math.lgamma((df + dim) / 2) - math.lgamma(df / 2) - 0.5 * dim * math.log(df * math.pi)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return z, constant - log_det - 0.5 * (df + dim) * torch.log1p(white.square().sum(-1) / df)


def estimate_evidence(
    problem: LocalProblem, phi: Tensor, tolerance: float, max_samples: int, seed: int, progress: bool
) -> dict[str, Tensor]:
    """:func:`log_evidence` of a call that is bound already, from the optimal phi ``(N, P)``."""
    log_joint, family = problem.objective.log_joint, problem.objective.family
    proposal = hessian_proposal(log_joint, *_moments(family, phi, generator(seed, 5)))
    size = len(phi)
    with progress_bar(size, "log evidence", progress) as bar:
        rounds = _Rounds(problem, tolerance, max_samples, bar)
        result = rounds.run(proposal, torch.arange(size), generator(seed, 6), patience=_PATIENCE)
        poor = (~rounds.done(result)).nonzero().squeeze(-1)
        if len(poor):
            adapted = _adapt(problem, proposal, poor, generator(seed, 7))
            _keep_better(result, rounds.run(adapted, poor, generator(seed, 8)), poor)
        stuck = (~rounds.done(result) & (result["khat"] <= _LIGHT_TAIL)).nonzero().squeeze(-1)
        if len(stuck):  # the first proposal was the better one, and only lacks draws
            _keep_better(result, rounds.run(proposal, stuck, generator(seed, 9)), stuck)
        bar.update(bar.total - bar.n)
    return result


@torch.no_grad()
def _moments(family: Any, phi: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean ``(N, D)`` and Cholesky factor of the covariance ``(N, D, D)`` of q, in float64."""
    q = family(phi.double()) if family.noise_dim is not None else None
    try:
        mean, covariance = q.mean, getattr(q, "covariance_matrix", None)  # type: ignore[union-attr]
        covariance = torch.diag_embed(q.variance) if covariance is None else covariance  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        z = draw(family, phi, max(1000, 10 * family.latent_dim), rng).double()
        mean, centred = z.mean(0), z - z.mean(0)
        covariance = torch.einsum("kni,knj->nij", centred, centred) / (len(z) - 1)
    return mean.cpu(), torch.linalg.cholesky(covariance).cpu()


def hessian_proposal(log_joint: LocalLogJoint, mean: Tensor, scale_tril: Tensor) -> Proposal:
    """A proposal at given means whose covariance is the inverse of the negative Hessian of the log-joint there.

    The Hessian is looked at in units of the given covariance. Directions in which the log-joint is not concave get the
    size of its curvature, and none is more than ten times as wide as the given covariance.

    Args:
        log_joint: The log-joint per datapoint.
        mean: Where to expand, ``(N, D)``, float64.
        scale_tril: Cholesky factor of a covariance of about the right size, ``(N, D, D)``, float64.
    """
    hessian = _hessian(log_joint, mean)
    relative = -scale_tril.transpose(-1, -2) @ hessian @ scale_tril
    usable = relative.isfinite().flatten(1).all(-1)
    identity = torch.eye(mean.shape[-1], dtype=mean.dtype).expand_as(relative)
    relative = torch.where(usable[:, None, None], 0.5 * (relative + relative.transpose(-1, -2)), identity)
    curvature, directions = torch.linalg.eigh(relative)
    root = scale_tril @ directions * curvature.abs().clamp(min=0.01).rsqrt().unsqueeze(-2)
    triangular = torch.linalg.qr(root.transpose(-1, -2)).R.transpose(-1, -2)
    return Proposal(mean, triangular * triangular.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


def _hessian(log_joint: LocalLogJoint, mean: Tensor) -> Tensor:
    """Second derivatives of the log-joint with respect to the flat latent, ``(N, D, D)``, float64."""
    size, dim = mean.shape
    identity = torch.eye(dim, dtype=mean.dtype)
    rows = []
    with torch.enable_grad():
        for piece in chunks(dim, size):
            directions = identity[piece].unsqueeze(1)
            z = mean.to(log_joint.dtype).expand(len(directions), size, dim).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_joint(z).sum(), z, create_graph=True)
            along = (gradient * directions.to(gradient)).sum()
            rows.append(torch.autograd.grad(along, z)[0].double().cpu())
    return torch.cat(rows).transpose(0, 1)


@torch.no_grad()
def _log_weights(
    problem: LocalProblem, proposal: Proposal, rows: Tensor, num_draws: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws ``(K, n, D)`` and log-weights ``(K, n)`` for ``rows``, where ``proposal`` has one row for each of them."""
    log_joint = problem.objective.log_joint
    size = log_joint.num_datapoints
    part = log_joint if len(rows) == size else log_joint.select(rows)
    z, log_q = proposal.sample(num_draws, rng)
    values = []
    for piece in chunks(num_draws, size if part is None else len(rows)):
        inputs = z[piece].to(problem.phi)
        if part is None:
            full = inputs.new_zeros(len(inputs), size, z.shape[-1]).index_copy(1, rows, inputs)
            values.append(log_joint(full)[:, rows])
        else:
            values.append(part(inputs))
    log_p = torch.cat(values).double().cpu().nan_to_num(nan=-math.inf)
    return z, log_p - log_q


def _summary(log_weights: Tensor) -> dict[str, Tensor]:
    """Log-mean-exp, its standard error, tail shape and effective sample size of log-weights ``(K, n)``."""
    count = len(log_weights)
    relative = (log_weights - log_weights.amax(0)).exp()
    mean = relative.mean(0)
    return {
        "log_evidence": log_weights.logsumexp(0) - math.log(count),
        "log_evidence_se": relative.std(0) / (mean * math.sqrt(count)),
        "khat": psis(log_weights)[1],
        "ess": relative.sum(0).square() / relative.square().sum(0),
        "num_samples": torch.full_like(mean, count),
    }


@dataclass
class _Rounds:
    """Rounds of importance sampling until every datapoint is done or has had ``max_samples`` draws."""

    problem: LocalProblem
    tolerance: float
    max_samples: int
    bar: Any

    def run(
        self, proposal: Proposal, rows: Tensor, rng: torch.Generator, patience: int | None = None
    ) -> dict[str, Tensor]:
        """Results of ``rows``; after ``patience`` rounds those that will not be done are left.

        Args:
            proposal: Proposals of all datapoints.
            rows: Which datapoints to work on.
            rng: Source of the draws.
            patience: Number of rounds; None for as many as it takes.
        """
        result: dict[str, Tensor] = {}
        active = torch.arange(len(rows))
        collected = torch.empty(0, len(rows), dtype=torch.float64)
        while len(active) and len(collected) < self.max_samples:
            num_draws = min(_ROUND, self.max_samples - len(collected))
            fresh = _log_weights(self.problem, proposal[rows[active]], rows[active], num_draws, rng)[1]
            collected = torch.cat([collected, fresh])
            summary = _summary(collected)
            for name, values in summary.items():
                result.setdefault(name, values.new_zeros(len(rows)))[active] = values
            done = self.done(summary)
            self.bar.update(min(int(done.sum()), self.bar.total - self.bar.n))
            if patience is not None and len(collected) >= patience * _ROUND:
                done = done | self._hopeless(summary)
            active, collected = active[~done], collected[:, ~done]
        return result

    def done(self, summary: Mapping[str, Tensor]) -> Tensor:
        """Which datapoints have light-tailed weights and a small standard error."""
        return (summary["khat"] <= _LIGHT_TAIL) & (summary["log_evidence_se"] <= self.tolerance / 4)

    def _hopeless(self, summary: Mapping[str, Tensor]) -> Tensor:
        """Which datapoints will not be done within ``max_samples`` draws."""
        ratio = summary["log_evidence_se"] / (self.tolerance / 4)
        return (summary["khat"] > _LIGHT_TAIL) | (summary["num_samples"] * ratio.square() > self.max_samples)


def _keep_better(result: dict[str, Tensor], other: Mapping[str, Tensor], rows: Tensor) -> None:
    """Puts the estimates of ``rows`` in ``other`` into ``result`` where they are the better ones."""
    better = _badness(other) < _badness(result)[rows]
    for name, values in result.items():
        values[rows] = torch.where(better, other[name], values[rows])


def _badness(summary: Mapping[str, Tensor]) -> Tensor:
    """What to choose the better of two estimates by: the tail first, where it is heavy, then the standard error."""
    return summary["khat"].clamp(min=_LIGHT_TAIL) + summary["log_evidence_se"].clamp(max=1.0) * 0.1


def _adapt(problem: LocalProblem, proposal: Proposal, rows: Tensor, rng: torch.Generator) -> Proposal:
    """Moves the proposals of ``rows`` to the weighted mean and covariance of draws from them, three times."""
    loc, scale_tril = proposal.loc.clone(), proposal.scale_tril.clone()
    for _ in range(3):
        current = Proposal(loc, scale_tril)[rows]
        z, log_weights = _log_weights(problem, current, rows, 2 * _ROUND, rng)
        weights = psis(log_weights)[0].softmax(0)
        mean = torch.einsum("kn,knd->nd", weights, z)
        centred = z - mean
        covariance = torch.einsum("kn,kni,knj->nij", weights, centred, centred)
        prior = current.scale_tril @ current.scale_tril.transpose(-1, -2)
        effective = 1 / weights.square().sum(0)
        trust = (effective / (effective + 2 * z.shape[-1]))[:, None, None]
        factor, failed = torch.linalg.cholesky_ex(trust * covariance + (1 - trust) * prior)
        good = failed == 0
        loc[rows[good]], scale_tril[rows[good]] = mean[good], factor[good]
    return Proposal(loc, scale_tril)
