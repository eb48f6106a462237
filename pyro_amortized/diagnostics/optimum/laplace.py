"""Modes of every datapoint's log-joint and its curvature there: starts, units and proposals for diagnostics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.optimum.lbfgs import minimize_rows
from pyro_amortized.objective.draws import chunks
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.objective.noise import draw

__all__ = ["covariance_root", "find_modes", "hessian", "moments"]


@torch.no_grad()
def moments(family: Any, phi: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean ``(N, D)`` and Cholesky factor of the covariance ``(N, D, D)`` of q, in float64 on the CPU."""
    q = family(phi.double()) if family.noise_dim is not None else None
    try:
        mean, covariance = q.mean, getattr(q, "covariance_matrix", None)  # type: ignore[union-attr]
        covariance = torch.diag_embed(q.variance) if covariance is None else covariance  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        z = draw(family, phi, max(1000, 10 * family.latent_dim), rng).double()
        mean, centred = z.mean(0), z - z.mean(0)
        covariance = torch.einsum("kni,knj->nij", centred, centred) / (len(z) - 1)
    return mean.cpu(), torch.linalg.cholesky(covariance).cpu()


def find_modes(
    log_joint: LocalLogJoint,
    starts: Tensor,
    scale_tril: Tensor,
    like: Tensor,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> tuple[Tensor, Tensor]:
    """Climbs from each start to a mode of the log-joint.

    Args:
        log_joint: The log-joint per datapoint.
        starts: S starts per datapoint, ``(S, N, D)``, float64.
        scale_tril: Cholesky factor of a covariance of about the right size, ``(N, D, D)``; its units are the steps'.
        like: A tensor of the dtype and device that the model runs with.
        tolerance: Smallest improvement worth a further step, in nats.
        max_steps: Most steps of a climb.

    Returns:
        The modes ``(S, N, D)`` and the log-joint there ``(S, N)``, float64.
    """
    shape = starts.shape
    units = scale_tril.expand(shape[0], *scale_tril.shape).flatten(0, 1)
    origin = starts.flatten(0, 1)

    def loss(u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        points = origin[rows] + (units[rows] @ u.unsqueeze(-1)).squeeze(-1)
        values, gradients = [], []
        for piece in chunks(len(rows), 1):
            part = log_joint.select(rows[piece] % shape[1])
            z = points[piece] if part else origin.index_copy(0, rows[piece], points[piece])
            with torch.enable_grad():
                z = z.to(like).clone().requires_grad_()
                value = part(z.unsqueeze(0)) if part else log_joint(z.reshape(shape))
                flat = value.sum() + 0.0 * z.sum()  # a likelihood need not depend on z, nor have a derivative in it
                (gradient,) = torch.autograd.grad(flat, z)
            own = slice(None) if part else rows[piece]
            values.append(-value.detach().flatten().cpu().double()[own])
            gradients.append(-gradient.cpu().double()[own])
        gradient = torch.cat(gradients)
        return torch.cat(values), (units[rows].transpose(-1, -2) @ gradient.unsqueeze(-1)).squeeze(-1)

    found = minimize_rows(loss, torch.zeros_like(origin), max_steps=max_steps, tolerance=tolerance, explore=True)
    modes = origin + (units @ found.x.unsqueeze(-1)).squeeze(-1)
    return modes.reshape(shape), -found.value.reshape(shape[:2])


def hessian(log_joint: Callable[[Tensor], Tensor], z: Tensor, like: Tensor) -> Tensor:
    """Second derivatives of the log-joint with respect to the flat latent.

    Args:
        log_joint: From ``(K, n, D)`` to ``(K, n)``.
        z: Where, ``(n, D)``, float64.
        like: A tensor of the dtype and device that the model runs with.

    Returns:
        Hessians ``(n, D, D)``, float64 on the CPU.
    """
    size, dim = z.shape
    identity = torch.eye(dim, dtype=like.dtype, device=like.device)
    rows = []
    with torch.enable_grad():
        for piece in chunks(dim, size):
            directions = identity[piece].unsqueeze(1)
            point = z.to(like).expand(len(directions), size, dim).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_joint(point).sum(), point, create_graph=True)
            rows.append(torch.autograd.grad((gradient * directions).sum(), point)[0].cpu().double())
    return torch.cat(rows).transpose(0, 1)


def covariance_root(curvature: Tensor, scale_tril: Tensor) -> Tensor:
    """Cholesky factor of the inverse of a negative Hessian, made positive definite.

    The Hessian is looked at in units of a given covariance. Directions in which the log-joint is not concave get the
    size of its curvature, and at most ten times the width of the given covariance.

    Args:
        curvature: Hessians of the log-joint, ``(N, D, D)``.
        scale_tril: Cholesky factor of a covariance of about the right size, ``(N, D, D)``.

    Returns:
        Lower triangular factors with positive diagonal, ``(N, D, D)``.
    """
    relative = -scale_tril.transpose(-1, -2) @ curvature @ scale_tril
    usable = relative.isfinite().flatten(1).all(-1)
    identity = torch.eye(relative.shape[-1], dtype=relative.dtype).expand_as(relative)
    relative = torch.where(usable[:, None, None], 0.5 * (relative + relative.transpose(-1, -2)), identity)
    eigenvalues, directions = torch.linalg.eigh(relative)
    eigenvalues = torch.where(eigenvalues > 0, eigenvalues.clamp(min=1e-6), eigenvalues.abs().clamp(min=0.01))
    root = scale_tril @ directions * eigenvalues.rsqrt().unsqueeze(-2)
    triangular = torch.linalg.qr(root.transpose(-1, -2)).R.transpose(-1, -2)
    return triangular * triangular.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
