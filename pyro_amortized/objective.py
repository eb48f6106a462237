r"""The per-datapoint ELBO under a Pyro model, as a function of the flat latent and of phi.

With the global latents held at given values, a model with a datapoint plate is a product over datapoints, so that

.. math:: L_n(\phi_n) = E_{q_{\phi_n}(z)}\big[\log p(x_n, z) - \log q_{\phi_n}(z)\big]

is defined for each datapoint on its own. :class:`LocalLogJoint` evaluates :math:`\log p(x_n, z)` for many z at once;
:class:`LocalObjective` makes the ELBO of it. Both are in nats, without the scale N/B of a subsampled plate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.families import VariationalFamily
from pyro_amortized.structure import Structure
from pyro_amortized.tracing import Site, run_model, sample_sites

__all__ = ["LocalLogJoint", "LocalObjective"]

MAX_ROWS = 8192
"""How many draws times datapoints to evaluate at once; bounds memory."""


class LocalLogJoint:
    r"""Evaluates :math:`\log p(x_n, T(z_n)) + \log|\det T'(z_n)|` for every datapoint, at flat unconstrained latents z.

    The sum runs over the sites inside the datapoint plate: local latents and observations. The plate's subsampling
    scale is removed, masks and the model's own ``poutine.scale`` are kept. The model runs apart from the caller's
    handlers.

    Many draws are evaluated in one run: in an outermost plate, if the model gives the same numbers that way as one draw
    at a time (:meth:`check`); else as copies of the datapoints, if its arguments can be indexed (:meth:`select`); else
    one by one.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: The structure of this call, with the indices of subsampled plates.
        global_values: Values of the global latent sites.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        structure: Structure,
        global_values: Mapping[str, Tensor],
    ) -> None:
        if structure.layout is None:
            raise ValueError(
                "Cannot evaluate per-datapoint quantities because the model has no local latents: no latent site lies "
                "in a plate that holds observed sites; try naming the plate with plate=..., or use Pyro's autoguides."
            )
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.structure = structure
        self.layout = structure.layout
        self.global_values = dict(global_values)
        self.depth = max(-frame.dim for frame in structure.frames.values())
        self.vectorized = True
        self._validate = True
        self.like = torch.empty(0)
        self._selectable: bool | None = None
        self._copies: LocalLogJoint | None = None

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints in this call."""
        return self.structure.datapoints.size

    def __call__(self, z: Tensor) -> Tensor:
        """Log-joints of shape ``(K, N)``, in nats, at latents ``z`` of shape ``(K, N, D)``."""
        if self.vectorized:
            return self._evaluate(z)
        if len(z) > 1 and self._is_selectable():
            return self._evaluate_copies(z)
        return torch.stack([self._evaluate(draw.unsqueeze(0)).squeeze(0) for draw in z])

    def _evaluate_copies(self, z: Tensor) -> Tensor:
        if self._copies is None or self._copies.num_datapoints != z.shape[0] * z.shape[1]:
            self._copies = self._selected(torch.arange(z.shape[1]).repeat(len(z)))
        return self._copies._evaluate(z.reshape(1, -1, z.shape[-1])).reshape(z.shape[:2])

    def _evaluate(self, z: Tensor) -> Tensor:
        one_by_one = not self.vectorized
        parts = self.layout.split(z[0]) if one_by_one else self.layout.split(z, self.depth)
        values = {**self.global_values, **self.structure.indices}
        log_joint = z.new_zeros(z.shape[:2])
        for site in self.layout.sites:
            values[site.name], log_det = site.constrain(parts[site.name])
            if not site.is_real:
                log_joint = log_joint + self._per_datapoint(log_det, z.shape[0])
        handlers = () if one_by_one else (pyro.plate("_local_draws", z.shape[0], dim=-self.depth - 1),)
        with nullcontext() if self._validate else pyro.validation_enabled(False):
            trace = run_model(self.model, self.args, self.kwargs, values, handlers)
            return log_joint + self._sum_sites(trace, z.shape[0], values)

    def _sum_sites(self, trace: Trace, num_draws: int, values: Mapping[str, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for name, site in sample_sites(trace).items():
            if not site["is_observed"] and name not in values:
                raise ValueError(
                    f"Cannot evaluate the model's log-joint because site {name!r} is latent and the guide has no value "
                    "for it, as for sites that are enumerated in the model; try summing it out in the model."
                )
            frame = next((f for f in site["cond_indep_stack"] if f.name == self.layout.plate), None)
            if frame is not None:
                total = total + self._per_datapoint(_log_prob(site, frame), num_draws)
        return total

    def _per_datapoint(self, log_prob: Tensor, num_draws: int) -> Tensor:
        """Sums over all batch dimensions but those of the draws and of the datapoints: ``(K, N)``."""
        rank = self.depth + 1
        log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
        others = [axis for axis in range(1, rank) if axis != rank + self.layout.dim]
        total = log_prob.sum(others) if others else log_prob
        return total.expand(num_draws, self.num_datapoints)

    @torch.no_grad()
    def check(self, z: Tensor) -> None:
        """Makes sure that the numbers can be trusted, and finds out whether draws may be evaluated together.

        Args:
            z: Two different draws, of shape ``(2, N, D)``.

        Raises:
            ValueError: If the model gives different numbers for equal latents, or the log-joint of a datapoint is
                not finite.
        """
        self.vectorized = False
        self.like = z.new_empty(0)
        reference = torch.cat([self(draw.unsqueeze(0)) for draw in z])
        if not _close(self(z[:1]), reference[:1]):
            raise ValueError(
                "Cannot evaluate the model's log-joint because two runs at the same latent values give different "
                "numbers; try model.eval() if it holds dropout or batch normalisation, and keep random numbers in "
                "pyro.sample sites."
            )
        self._check_finite(reference)
        self._check_independence(z, reference)
        try:
            self.vectorized = True
            self.vectorized = _close(self(z), reference)
        except Exception:  # a model may fail in any way on a batch of draws; then it is run otherwise
            self.vectorized = False
        self._validate = False

    def _check_independence(self, z: Tensor, log_joint: Tensor) -> None:
        """Changes the latents of one datapoint; the log-joints of the others must stay."""
        mixed = z[:1].clone()
        mixed[:, 0] = z[1, 0]
        if not _close(self(mixed)[:, 1:], log_joint[:1, 1:]):
            raise ValueError(
                f"Cannot evaluate datapoints on their own because the log-joint of one datapoint in plate "
                f"{self.layout.plate!r} depends on the latents of others; try model.eval() if the model holds batch "
                "normalisation, or move what datapoints share out of the plate."
            )

    def _check_finite(self, log_joint: Tensor) -> None:
        bad = (~log_joint.isfinite()).any(0).nonzero().squeeze(-1).tolist()
        if bad:
            raise ValueError(
                f"Cannot evaluate the ELBO of {len(bad)} datapoints because their log-joint is not finite (datapoints "
                f"{bad[:10]} of plate {self.layout.plate!r}); try looking for invalid values in their data, or for a "
                "likelihood that underflows."
            )

    def select(self, rows: Tensor) -> LocalLogJoint | None:
        """The log-joint of some of the datapoints only, at their share of the cost.

        The arguments that have one entry per datapoint are indexed; whether that is right is checked once by numbers.

        Args:
            rows: Positions in ``range(N)``.

        Returns:
            The evaluator for these datapoints, or None if the model cannot be run on a part of the arguments.
        """
        return self._selected(rows) if self._is_selectable() else None

    def _is_selectable(self) -> bool:
        if self._selectable is None:
            self._selectable = self._try_selection()
        return self._selectable

    def on_rows(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """The log-joint of some datapoints as a function of their latents, ``(K, n, D)`` to ``(K, n)``.

        As :meth:`select`, but where the model can only run on all datapoints it does, with zeros for the others.
        """
        size = self.num_datapoints
        if len(rows) == size and torch.equal(rows, torch.arange(size)):
            return self
        part = self.select(rows)
        if part is not None:
            return part
        return lambda z: self(z.new_zeros(len(z), size, z.shape[-1]).index_copy(1, rows.to(z.device), z))[:, rows]

    @torch.no_grad()
    def prior_draw(self) -> Tensor:
        """One draw of the local latents from the prior, flat and unconstrained, of shape ``(N, D)``."""
        values = {**self.global_values, **self.structure.indices}
        with pyro.validation_enabled(False):
            nodes: dict[str, Any] = run_model(self.model, self.args, self.kwargs, values).nodes
        return self.layout.flatten({site.name: nodes[site.name]["value"] for site in self.layout.sites})

    def _selected(self, rows: Tensor) -> LocalLogJoint:
        size = self.num_datapoints
        name = self.layout.plate
        args, kwargs = _take((tuple(self.args), dict(self.kwargs)), rows, size)
        frames = {**self.structure.frames, name: replace(self.structure.datapoints, size=len(rows))}
        if not self.structure.datapoints.subsampled:
            frames[name] = replace(frames[name], full_size=len(rows))
        indices = {k: v[rows.to(v.device)] if k == name else v for k, v in self.structure.indices.items()}
        structure = replace(self.structure, frames=frames, indices=indices, observed=None)
        part = LocalLogJoint(self.model, args, kwargs, structure, self.global_values)
        part._validate, part.vectorized, part.like, part._selectable = (
            self._validate,
            self.vectorized,
            self.like,
            True,
        )
        return part

    @torch.no_grad()
    def _try_selection(self) -> bool:
        size = self.num_datapoints
        if size < 2 or not self.structure.is_static or self.structure.datapoints.kind == "random":
            return False
        rows = torch.arange(size - 1, -1, -max(1, size // 3))
        z = torch.linspace(-0.5, 0.5, size * self.layout.latent_dim, dtype=self.like.dtype)
        z = z.to(self.like).reshape(1, size, -1)
        self._selectable = False
        try:
            return _close(self._selected(rows)(z[:, rows]), self(z)[:, rows])
        except Exception:  # a model may fail in any way on a part of its data; then it is run on all of it
            return False


def _log_prob(site: Site, frame: Any) -> Tensor:
    """A site's log-probability with its masks and scales, but without the subsampling scale of ``frame``."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    subsampling = frame.full_size / frame.size if frame.full_size else 1.0
    return scale_and_mask(log_prob, site["scale"] / subsampling, site["mask"])


def _close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-8 if expected.dtype == torch.float64 else 1e-4
    return actual.shape == expected.shape and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _take(value: Any, rows: Tensor, size: int) -> Any:
    """Indexes every tensor that has one entry per datapoint, along its first axis of that size."""
    if isinstance(value, Tensor):
        axis = next((i for i, n in enumerate(value.shape) if n == size), None)
        return value if axis is None else value.index_select(axis, rows.to(value.device))
    if isinstance(value, dict):
        return {key: _take(child, rows, size) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_take(child, rows, size) for child in value)
    return value


class LocalObjective:
    """The per-datapoint ELBO of phi: draws from the family, weighed under the model.

    Args:
        log_joint: The model's log-joint per datapoint.
        family: The variational family.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized.families import Normal
        >>> from pyro_amortized.structure import StructureCache
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([0.0, 2.0])
        >>> structure = StructureCache().find(model, (x,), {}, observed=False)
        >>> objective = LocalObjective(LocalLogJoint(model, (x,), {}, structure, {}), Normal(1))
        >>> exact_posterior = torch.stack([x / 2, torch.full((2,), 0.5).sqrt().log()], -1)
        >>> objective(exact_posterior)  # the log evidence, without noise
        tensor([-1.2655, -2.2655])
    """

    def __init__(self, log_joint: LocalLogJoint, family: VariationalFamily) -> None:
        self.log_joint = log_joint
        self.family = family

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

    def log_weights(self, phi: Tensor, noise: Tensor | int) -> Tensor:
        """log p(x_n, z) - log q(z) at draws z from q.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            noise: Standard normal noise of shape ``(K, N, noise_dim)`` to be turned into draws, or a number K of fresh
                draws.

        Returns:
            Log weights of shape ``(K, N)``.
        """
        q = self.family(phi)
        z = q.rsample((noise,)) if isinstance(noise, int) else self.family.rsample(phi, noise)
        return self.log_joint(z) - q.log_prob(z)

    def sum_elbo(self, phi: Tensor, noise: Tensor) -> Tensor:
        """K times the ELBO on given noise, with the entropy in closed form where the family has one.

        Args:
            phi: Variational parameters of shape ``(N, P)``.
            noise: Standard normal noise of shape ``(K, N, noise_dim)``.

        Returns:
            Sums over the K draws, of shape ``(N,)``, differentiable in phi.
        """
        q = self.family(phi)
        z = self.family.rsample(phi, noise)
        try:
            return self.log_joint(z).sum(0) + len(noise) * q.entropy()
        except NotImplementedError:
            return (self.log_joint(z) - q.log_prob(z)).sum(0)

    def select(self, rows: Tensor) -> LocalObjective | None:
        """The objective of some of the datapoints, as :meth:`LocalLogJoint.select`."""
        log_joint = self.log_joint.select(rows)
        return None if log_joint is None else LocalObjective(log_joint, self.family)


def chunks(num_draws: int, num_datapoints: int, max_rows: int = MAX_ROWS) -> list[slice]:
    """Cuts draws into pieces such that a piece times the datapoints stays below ``max_rows``."""
    step = max(1, max_rows // max(1, num_datapoints))
    return [slice(start, min(start + step, num_draws)) for start in range(0, num_draws, step)]
