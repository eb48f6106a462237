"""Newton's method in expectation."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_amortized.encoders.devices import has_to_wait
from pyro_amortized.families import VariationalFamily
from pyro_amortized.updates.base import Curvature, State, SteppedRule, check_limits

__all__ = ["Newton", "damping"]


class Newton(SteppedRule[Tensor | Curvature]):
    r"""Newton's method: a natural gradient that knows how the latents of a datapoint depend on each other.

    The particles of a step, whose gradients are averaged for other rules, are regressed on where they were drawn: this
    gives the slope r and the curvature H of the ELBO in the location, in the coordinates
    :math:`\epsilon = L^{-1}(z - \mu)` of q, without a further evaluation of the model. The step goes towards the
    optimum of that quadratic, for a covariance :math:`L L^T` of q

    .. math:: \mu \leftarrow \mu + \rho L H^{-1} r, \qquad
        \Sigma^{-1} \leftarrow L^{-T} \big((1 - \rho) I + \rho H\big) L^{-1},

    of which the mean-field normal takes the diagonal in the coordinates of q. :class:`NaturalGradient` needs the more
    steps the more the latents are correlated in the posterior; this rule does not. It needs two particles at least; 10
    do for 20 latents, and 32 do better. The regression is shrunk towards H = I by as much as the draws fail to predict
    each other, and H is made positive definite. A step factorises a D x D matrix for each datapoint besides.

    Args:
        step_size: :math:`\rho`, at most 1.
        max_shift: Most that a location moves in the first step, in standard deviations of q. After a step that this has
            limited the next may go twice as far where the slope along it is still more than half of what it was, and
            half as far where the slope has turned: far from the optimum steps grow, and they leap over less.
        max_log_ratio: Most that the logarithm of a scale changes in one step.
        learned: Whether the step size is trained with the encoder.

    References:
        Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression, Tim Salimans, David A.
        Knowles (2013), https://arxiv.org/abs/1206.6679
        Convergence Conditions for Ascent Methods, Philip Wolfe (1969).
        The Variational Gaussian Approximation Revisited, Manfred Opper, Cédric Archambeau (2009).
    """

    _usual_step = 0.7
    takes = Curvature

    def __init__(
        self, step_size: float = 0.7, *, max_shift: float = 2.0, max_log_ratio: float = 0.7, learned: bool = False
    ) -> None:
        super().__init__(step_size, learned, None)
        if step_size > 1:
            raise ValueError(
                f"Cannot refine with step_size={step_size} because a step of 1 goes to the optimum already; try 0.7."
            )
        check_limits(max_shift, max_log_ratio)
        self.max_shift = max_shift
        self.max_log_ratio = max_log_ratio

    def setup(self, family: VariationalFamily, num_features: int = 0) -> None:
        """Makes sure that the family is a normal."""
        if not family.takes_newton_steps:
            raise ValueError(
                f"Cannot refine a {type(family).__name__} family by Newton because its optimum under a quadratic is "
                'only known here for family="normal" and "multivariate_normal"; try update=Adam(0.05), which fits '
                "every family."
            )

    def init(self, phi: Tensor, features: Tensor | None = None) -> State:
        """Nothing yet; then how far the last step could go ``(N, 1)``, itself ``(N, D)``, and the slope along it."""
        return ()

    def update(self, phi: Tensor, grad: Tensor | Curvature, state: State) -> tuple[Tensor, State]:
        """One step; a ValueError where there is no curvature."""
        if isinstance(grad, Tensor):
            raise ValueError(
                'Cannot refine by Newton with one particle, or with estimator="analytic_kl", because the curvature is '
                "taken from the gradients at several draws; try num_particles=32, or NaturalGradient(0.5)."
            )
        slope, precision, family = grad.slope, grad.precision, grad.family
        eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
        step_size = self.step_size if self.log_step_size is None else self.step_size.clamp(max=1.0)  # type: ignore[union-attr]
        damped = precision + damping(precision.detach())[:, None, None] * eye
        factor = torch.linalg.cholesky_ex(damped)[0]
        shift = step_size * torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        reach = self._reach(grad, state).to(shift)
        kept = reach / torch.maximum(shift.abs().amax(-1, keepdim=True), reach)
        limit = (2.0 * self.max_log_ratio * kept).exp()  # q keeps its width as long as it has far to go
        if family.is_mean_field:
            size = precision.diagonal(dim1=-2, dim2=-1).clamp(min=_LEAST_CURVATURE)
            size = (1.0 + step_size * (size - 1.0)).clamp(1.0 / limit, limit)
            precision = torch.diag_embed(size)
        else:
            change = damped - eye
            most = (limit - 1.0) / torch.linalg.matrix_norm(change).clamp(min=1e-6).unsqueeze(-1)
            precision = eye + (step_size * torch.ones_like(most)).clamp(max=most).unsqueeze(-1) * change
        moved = family.moved(phi.to(slope), kept * shift, precision).to(phi)  # type: ignore[operator]
        step = (moved - phi)[..., : family.latent_dim].detach()
        return moved, (reach, step, torch.where(kept < 1.0, _along(grad, step), 0.0))  # a free step says nothing of it

    def _reach(self, grad: Curvature, state: State) -> Tensor:
        """The most that this step may move a location, by what the slope along the last one has become."""
        if not state:
            return torch.full_like(grad.slope[:, :1], self.max_shift)
        reach, step, before = state
        after = _along(grad, step)
        grown = torch.where((before > 0) & (after > 0.5 * before), 2.0 * reach, reach)
        return torch.where((before > 0) & (after < 0), 0.5 * reach, grown)


def _along(grad: Curvature, step: Tensor) -> Tensor:
    """The slope of the ELBO along a step of the locations, ``(N, 1)``."""
    return (grad.grad[..., : step.shape[-1]].detach() * step).sum(-1, keepdim=True)


_LEAST_CURVATURE = 0.05
"""Least eigenvalue of the curvature, in units of the precision of q, that a Newton step trusts."""


@torch.no_grad()
def damping(curvature: Tensor) -> Tensor:
    """What has to be added to the diagonal of each curvature ``(N, D, D)`` to make it safely positive, ``(N,)``."""
    norm = torch.linalg.matrix_norm(curvature)
    least = (100.0 * torch.finfo(curvature.dtype).eps * norm).clamp(min=_LEAST_CURVATURE)  # beyond rounding errors
    eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    lowered = curvature - least[:, None, None] * eye
    if has_to_wait(curvature):
        return _tried_damping(lowered, norm + least)
    rows = (torch.linalg.cholesky_ex(lowered)[1] > 0) & norm.isfinite()
    damping = torch.zeros_like(norm)
    damping[rows] = (-torch.linalg.eigvalsh(lowered[rows])[:, 0]).clamp(min=0.0)
    return damping


def _tried_damping(curvature: Tensor, enough: Tensor) -> Tensor:
    """The same without eigenvalues, which would be read off the device; too large by 1/256 of the curvature at most."""
    tried = torch.zeros_like(enough)
    found = torch.linalg.cholesky_ex(curvature)[1] == 0
    damping = torch.where(found, 0.0, enough)
    eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    for _ in range(_TRIALS):
        middle = (tried + damping) / 2
        works = torch.linalg.cholesky_ex(curvature + middle[:, None, None] * eye)[1] == 0
        tried, damping = torch.where(works, tried, middle), torch.where(works, middle, damping)
    return torch.where(enough.isfinite(), damping, 0.0)


_TRIALS = 8
"""Halvings of the range of the damping."""
