r"""The per-datapoint ELBO under a Pyro model, as a function of phi.

.. math:: L_n(\phi_n) = E_{q_{\phi_n}(z)}\big[\log p(x_n, z) - \log q_{\phi_n}(z)\big]

for every datapoint on its own, in nats, without the scale N/B of a subsampled plate. Where the model itself scales its
local latents (``poutine.scale``, as for KL annealing), log q is scaled as the prior is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyro_amortized.families import VariationalFamily
from pyro_amortized.graphs.cache import Function, GraphCache
from pyro_amortized.graphs.programs import run_traced
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.objective.noise import MOST_ORTHOGONAL, orthogonal, whitened, widened
from pyro_amortized.objective.regression import ridge
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.state import untouched

__all__ = ["ESTIMATORS", "LocalObjective"]

ESTIMATORS = ("stl", "plain", "analytic_kl")
"""Estimators of the gradient of the per-datapoint ELBO, see :class:`LocalObjective`."""


class LocalObjective:
    r"""The per-datapoint ELBO of phi: draws from the family, weighed under the model.

    Its gradient is the reparameterised one, by one of three estimators: ``"stl"`` ("sticking the landing") leaves out
    the derivative with respect to the parameters inside log q, which is zero on average, so that no noise is left where
    q is the posterior; ``"plain"`` keeps it; ``"analytic_kl"``, for the normal family, uses the closed form of
    :math:`KL(q \| p(z))` for every site that has one.

    Args:
        log_joint: The model's log-joint per datapoint.
        family: The variational family.
        estimator: The estimator of the gradient; by default ``"stl"``, or ``"plain"`` for families whose log-density is
            costly at any points but their own draws.
        graphs: Where to keep traced forms of this objective and its gradient; None to run the model as it is.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference, Geoffrey Roeder,
        Yuhuai Wu, David Duvenaud (2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized.families import Normal
        >>> from pyro_amortized.structure.call import ModelCall
        >>> from pyro_amortized.structure.reader import StructureReader
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([0.0, 2.0])
        >>> structure = StructureReader().read(model, (x,), {})
        >>> objective = LocalObjective(LocalLogJoint(ModelCall(model, (x,), {}, structure)), Normal(1))
        >>> exact_posterior = torch.stack([x / 2, torch.full((2,), 0.5).sqrt().log()], -1)
        >>> objective(exact_posterior)  # the log evidence, without noise
        tensor([-1.2655, -2.2655])
    """

    def __init__(
        self,
        log_joint: LocalLogJoint,
        family: VariationalFamily,
        estimator: str | None = None,
        graphs: GraphCache | None = None,
    ) -> None:
        if estimator is None:
            estimator = "stl" if family.fast_log_prob else "plain"
        if estimator not in ESTIMATORS or (estimator == "analytic_kl" and not family.is_mean_field):
            raise ValueError(
                f"Cannot estimate gradients of a {type(family).__name__} family by {estimator!r} because "
                + (
                    f"it is none of {ESTIMATORS}"
                    if estimator not in ESTIMATORS
                    else "there is no closed form of its KL"
                )
                + '; try estimator="stl".'
            )
        self.log_joint = log_joint
        self.family = family
        self.estimator = estimator
        self.graphs = graphs
        self._programs: dict[Any, Function] = {}

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and device that the model runs with."""
        return self.log_joint.like

    def __call__(self, phi: Tensor, num_particles: int = 1) -> Tensor:
        """An unbiased estimate of the ELBO from fresh draws.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            num_particles: Number of draws.

        Returns:
            ELBO of shape ``(N,)``, in nats, differentiable in phi.
        """
        return self.log_weights(phi, num_particles).mean(0)

    def elbo(self, phi: Tensor, noise: Tensor | int, path: Tensor | None = None) -> Tensor:
        """The ELBO ``(N,)`` on given noise, in nats, from draws that the family weighs, if it does."""
        weighted = None if isinstance(noise, int) else self.family.weighted_draws(phi, noise, path)
        if weighted is None:
            return self.log_weights(phi, noise, path).mean(0)
        z, log_q, weights = weighted
        return (weights * (self.log_joint(z) - self._as_scaled(log_q))).sum(0)

    def log_weights(self, phi: Tensor, noise: Tensor | int, path: Tensor | None = None) -> Tensor:
        """log p(x_n, z) - log q(z) at draws z from q.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            noise: Standard normal noise of shape ``(K, N, noise_dim)`` to be turned into draws, or a number K of fresh
                draws.
            path: The same phi once more, to be used for the draws alone.

        Returns:
            Log weights of shape ``(K, N)``.
        """
        z, log_q = self.family.sample_and_log_prob(phi, noise, path)
        return self.log_joint(z) - self._as_scaled(log_q)

    def sum_elbo(self, phi: Tensor, noise: Tensor) -> Tensor:
        """K times the ELBO on given noise, with the entropy in closed form where the family has one.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            noise: Standard normal noise of shape ``(K, N, noise_dim)``.

        Returns:
            Sums over the K draws, of shape ``(N,)``, differentiable in phi.
        """
        try:
            entropy = self.family(phi).entropy()
        except NotImplementedError:
            return len(noise) * self.elbo(phi, noise)
        return self.log_joint(self.family.rsample(phi, noise)).sum(0) + len(noise) * self._as_scaled(entropy)

    def _as_scaled(self, value: Tensor) -> Tensor:
        """What belongs to q, with the scale that the model gives to the prior."""
        return value * self.log_joint.layout.scale if self.log_joint.layout.is_scaled else value

    def select(self, rows: Tensor) -> LocalObjective | None:
        """The objective of some of the datapoints, as :meth:`LocalLogJoint.select`."""
        log_joint = self.log_joint.select(rows)
        return None if log_joint is None else LocalObjective(log_joint, self.family)

    # For refinement

    def noise(self, phi: Tensor, num_particles: int, whiten: bool = False) -> Tensor | int:
        """Fresh noise for K draws, from torch's generator: if K is even in antithetic pairs, orthogonal to each other.

        Every draw for itself is standard normal; pairs are orthogonal in blocks of as many as there are dimensions.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            num_particles: K.
            whiten: Whether to give pairs of draws second moments of exactly I, or of 1 each where K is below 2 D: a
                posterior that is normal is then found exactly, and of others the gap left by refinement is a third to a
                ninth; single draws are standard normal no more, so no gradient is unbiased.

        Returns:
            Noise of shape ``(K, N, noise_dim)``, or K for families that draw their own.

        References:
            Orthogonal Random Features, Felix X. Yu, Ananda Theertha Suresh, Krzysztof Choromanski, Daniel
            Holtmann-Rice, Sanjiv Kumar (2016), https://arxiv.org/abs/1610.09072
        """
        if self.family.noise_dim is None:
            return num_particles
        pairs, odd = divmod(num_particles, 2)
        count = num_particles if odd else pairs
        noise = torch.randn(count, len(phi), self.family.noise_dim, dtype=phi.dtype, device=phi.device)
        if odd:
            return noise
        if pairs > 1 and 1 < self.family.noise_dim <= MOST_ORTHOGONAL:
            noise = torch.cat([orthogonal(block) for block in noise.split(self.family.noise_dim)])
        noise = torch.cat([noise, -noise])
        return whitened(noise) if whiten else noise

    def masked(self, phi: Tensor) -> Tensor:
        """phi ``(N, P)`` with a standard normal of their own for masked latents, where the family allows it."""
        present = self.log_joint.layout.present
        return phi if present is None else self.family.masked(phi, present)

    def unscaled(self, gradient: Tensor) -> Tensor:
        """A gradient ``(..., N, P)`` of the ELBO, nats, without the scale that the model gives to its latents.

        With it q's optimum stays where it is, as all that belongs to q is scaled alike, and steps their sizes.
        """
        layout = self.log_joint.layout
        return gradient / torch.as_tensor(layout.scale).to(gradient).unsqueeze(-1) if layout.is_scaled else gradient

    def value(self, phi: Tensor, noise: Tensor | int) -> Tensor:
        """The ELBO ``(N,)`` on given noise."""
        return self._run(_value, phi, noise)[0]

    def gradient(self, phi: Tensor, noise: Tensor | int) -> Tensor:
        """The gradient of the ELBO ``(N, P)`` on given noise; itself differentiable where gradients are enabled."""
        return self._run(_gradient, phi, noise)[0]

    @property
    def has_curvature(self) -> bool:
        """Whether :meth:`curvature` can be had: for a normal with the reparameterised gradient."""
        return self.family.takes_newton_steps and self.estimator != "analytic_kl"

    def curvature(self, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The gradient of the ELBO with its curvature in the location, from the same K evaluations of the model.

        In the coordinates :math:`\epsilon = L^{-1}(z - \mu)` of the draws, for a covariance :math:`L L^T`, the
        gradients :math:`r_k` of :math:`\log p(x, z) - \log q(z)` at the K draws are regressed on the draws,
        :math:`r_k \approx r - B \epsilon_k`, by ridge regression towards B = 0, which holds where q is the
        posterior. Where the posterior is normal they are linear in the draws, and the regression is exact but for the
        ridge.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            noise: Standard normal noise of shape ``(K, N, D)``, K at least 2.

        Returns:
            The gradient ``(N, P)``, as :meth:`gradient`; r, of shape ``(N, D)``; and the curvature
            :math:`H = I + B`, of shape ``(N, D, D)``, symmetric: the negative Hessian of the ELBO by :math:`\mu`, and
            with it the precision that the posterior seems to have, both in units of the precision of q.

        References:
            Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression, Tim Salimans, David A.
            Knowles (2013), https://arxiv.org/abs/1206.6679
        """
        grad, slope, curvature = self._run(_curvature, phi, noise)
        return grad, slope, curvature

    def prepare(self, phi: Tensor, noise: Tensor | int, curvature: bool = False) -> None:
        """Traces the gradient, if it is to be traced, before it is first run."""
        with torch.random.fork_rng():
            self._run(_curvature if curvature else _gradient, phi, noise, again=False)

    def _run(
        self, program: Callable[..., tuple[Tensor, ...]], phi: Tensor, noise: Tensor | int, again: bool = True
    ) -> tuple[Tensor, ...]:
        """Runs a program: the first time to find out whether it can be traced, and then as it was found."""
        inputs, count = ([phi], noise) if isinstance(noise, int) else ([phi, noise], None)
        key = (program, count if isinstance(noise, int) else noise.shape, torch.is_grad_enabled())
        if key in self._programs:
            return self._programs[key](*inputs) if again else ()
        family, estimator = self.family, self.estimator
        self.log_joint.verify_copies((program.__name__, count or key[1]), lambda: self.elbo(phi, noise))

        def run(log_joint: LocalLogJoint, phi: Tensor, *noise_tensor: Tensor) -> tuple[Tensor, ...]:
            objective = LocalObjective(log_joint, family, estimator)
            return program(objective, phi, noise_tensor[0] if noise_tensor else count)

        number, graphs = noise if isinstance(noise, int) else len(noise), self.graphs
        if graphs is not None and number > _MOST_TRACED_RUNS and not self.log_joint.runs_once(number):
            graphs.warn("it has to run once for each of many draws, which would be long to trace")
            graphs = None
        results, self._programs[key] = run_traced(
            run,
            self.log_joint,
            inputs,
            (program.__name__, estimator, count),
            graphs,
            (self.log_joint.call.model, family),
            draws=None if isinstance(noise, int) else 1,
            derivatives=torch.is_grad_enabled(),
        )
        return results

    def prior(self) -> Tensor:
        """phi close to the prior: locations and scales of every local latent, given those before it at their location.

        Returns:
            phi of shape ``(N, P)``.
        """
        sites = {site.name: site for site in self.log_joint.layout.sites}
        locs, scales = {}, {}

        gradients = torch.is_grad_enabled()

        def start(site: Site) -> Tensor | None:
            local = sites.get(site["name"])
            if local is None:
                return None
            with torch.set_grad_enabled(gradients):  # which Pyro switches off here
                locs[local.name], scales[local.name] = _unconstrained_moments(site["fn"], local)
                return local.transform(locs[local.name])

        with pyro.validation_enabled(False), untouched():
            self.log_joint.call.run(handlers=(InitMessenger(start),))
        dim = self.log_joint.layout.dim
        loc, scale = (torch.cat([s.flatten(part[s.name], dim) for s in sites.values()], -1) for part in (locs, scales))
        phi = self.family.laplace(loc, torch.diag_embed(scale.square().reciprocal()))
        return self.family.initial(loc, 1.0) if phi is None else phi


_MOST_TRACED_RUNS = 2
"""Runs of a model up to which they are traced, where draws are evaluated one by one."""


def _value(objective: LocalObjective, phi: Tensor, noise: Tensor | int) -> tuple[Tensor, ...]:
    return (objective.elbo(phi, noise),)


def _gradient(objective: LocalObjective, phi: Tensor, noise: Tensor | int) -> tuple[Tensor, ...]:
    """The gradient ``(N, P)``, with a graph of its own where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        path = phi.view_as(phi) if create_graph and phi.requires_grad else phi.detach().requires_grad_()
        if objective.estimator == "analytic_kl":
            loc, scale = objective.family.marginals(path)  # type: ignore[operator]
            z = objective.family.rsample(path, noise)  # type: ignore[arg-type]
            elbo = objective.log_joint.minus_kl(z, loc, scale).mean(0)
        else:
            stl = objective.estimator == "stl"
            elbo = objective.elbo(phi, noise, path) if stl else objective.elbo(path, noise)
        (grad,) = torch.autograd.grad(elbo.sum(), path, create_graph=create_graph)
    return (grad,)


def _curvature(objective: LocalObjective, phi: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """The gradient, and the linear regression of the draws' gradients on the draws."""
    create_graph, family = torch.is_grad_enabled(), objective.family
    with torch.enable_grad():
        path = phi.view_as(phi) if create_graph and phi.requires_grad else phi.detach().requires_grad_()
        stl = objective.estimator == "stl"
        z, log_q = family.sample_and_log_prob(phi if stl else path, noise, path)
        (slope,) = torch.autograd.grad(objective.log_joint(z).sum(), z, create_graph=create_graph)
        log_q = objective._as_scaled(log_q)
        cotangents = [slope / len(noise), torch.full_like(log_q, -1.0 / len(noise))]
        (grad,) = torch.autograd.grad([z, log_q], path, cotangents, create_graph=create_graph)
    slope = family.in_units(phi, slope)  # type: ignore[operator]
    slope = objective.unscaled(slope)
    slope, noise = widened(slope + noise).transpose(0, 1), widened(noise).transpose(0, 1)  # (N, K, D)
    mean, centre = slope.mean(1), noise.mean(1)
    slope, noise = slope - mean.unsqueeze(1), noise - centre.unsqueeze(1)
    eye = torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device)
    excess = -ridge(noise, slope)
    excess = 0.5 * (excess + excess.mT)
    return grad, mean + (excess @ centre.unsqueeze(-1)).squeeze(-1), eye + excess


def _unconstrained_moments(prior: dist.TorchDistribution, site: LocalSite) -> tuple[Tensor, Tensor]:
    """Location and scale of a prior in unconstrained space: exact for normals, by linearisation at the mean else."""
    shape = prior.batch_shape + site.shape
    try:
        loc = site.transform.inv(prior.mean)
        scale = prior.stddev
        if not site.is_real:
            with torch.enable_grad():
                at = loc if loc.requires_grad else loc.detach().requires_grad_()
                (slope,) = torch.autograd.grad(site.transform(at).sum(), at, create_graph=loc.requires_grad)
            scale = scale / slope.abs() if scale.shape == slope.shape == shape else torch.ones_like(loc)
        loc, scale = loc.expand(shape), scale.expand(shape)
    except (NotImplementedError, AttributeError, RuntimeError):
        loc, scale = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    usable = loc.isfinite() & scale.isfinite() & (scale > 0)
    return torch.where(usable, loc, torch.zeros_like(loc)), torch.where(usable, scale, torch.ones_like(scale))
