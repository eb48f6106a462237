r"""The log-joint of every datapoint under a Pyro model, as a function of the flat unconstrained latent.

With the global latents held at given values, a model with a datapoint plate is a product over datapoints, so that
:math:`\log p(x_n, z)` is defined for each of them on its own. It is evaluated for many z at once, in nats, without the
scale N/B of a subsampled plate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import kl_divergence

from pyro_amortized.graphs.cache import Function, GraphCache
from pyro_amortized.graphs.programs import run_traced
from pyro_amortized.objective.checks import check_outside
from pyro_amortized.objective.unconstrained import unconstrained_log_prob
from pyro_amortized.structure.arguments import Arguments, Axis, CallArguments
from pyro_amortized.structure.influence import DatapointAxes
from pyro_amortized.structure.influence import close as _close
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.masking import SiteMask, site_mask
from pyro_amortized.structure.running import Site, isolated, run_model
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.structure import Structure

__all__ = ["MAX_ROWS", "LocalLogJoint", "chunks"]

MAX_ROWS = 8192
"""How many draws times datapoints to evaluate at once; bounds memory."""


@dataclass
class Copying:
    """How to evaluate draws as copies of the datapoints.

    Attributes:
        axes: The axes of the arguments that hold the datapoints.
        serves: Whether it gives the numbers that single draws give, by the number of draws.
        uses: What has been run once to find that out.
    """

    axes: Sequence[Axis]
    serves: dict[int, bool] = field(default_factory=dict)
    uses: set[Any] = field(default_factory=set)


Mode = tuple[bool, Copying | None]
"""Whether draws are evaluated together in an outermost plate, and else how they are as copies of the datapoints."""


class LocalLogJoint:
    r"""Evaluates :math:`\log p(x_n, T(z_n)) + \log|\det T'(z_n)|` for every datapoint, at flat unconstrained latents z.

    The sum runs over the sites inside the datapoint plate: local latents and observations. The plate's subsampling
    scale is removed, masks and the model's own ``poutine.scale`` are kept. The model runs apart from the caller's
    handlers.

    Many draws are evaluated in one run: in an outermost plate, if the model gives the same numbers that way as one draw
    at a time (:meth:`check`); else as copies of the datapoints, if its arguments can be cut to rows (:meth:`select`);
    else one by one.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: The structure of this call, with the indices of subsampled plates; it has local latents.
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
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.structure = structure
        self.layout: SiteLayout = structure.layout  # type: ignore[assignment]
        self.global_values = dict(global_values)
        self.depth = structure.depth
        self.vectorized = True
        self.validate = True
        self.like = torch.empty(0)
        self.graphs: GraphCache | None = None
        self.verified: dict[Any, Function | None] = {}
        self.selectable = True
        self._axes: DatapointAxes | None = None
        self._origin: tuple[LocalLogJoint, Tensor] | None = None
        self._with_priors = True
        self.copying: Copying | None = None
        self._verifying = False
        self._copies: LocalLogJoint | None = None

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints in this call."""
        return self.structure.datapoints.size

    def __call__(self, z: Tensor) -> Tensor:
        """Log-joints of shape ``(K, N)``, in nats, at latents ``z`` of shape ``(K, N, D)``.

        With :attr:`graphs`, draws and datapoints are evaluated in blocks of rows of a few fixed sizes, by graphs that
        are traced once for each size; the result can then be differentiated once, with respect to z.
        """
        if self.graphs is not None and self._can_run_blocks(z.shape[0] * z.shape[1]):
            return _InBlocks.apply(z, self)
        return self.plain(z)

    def likelihood(self) -> LocalLogJoint:
        """The same without the local latents' densities: a function of z with other maxima."""
        part = self.of_call(self.args, self.kwargs, self.structure)
        part.selectable, part._with_priors = self.selectable, False
        return part

    def plain(self, z: Tensor) -> Tensor:
        """The same without graphs; differentiable any number of times, with respect to everything."""
        if self.vectorized:
            return self._evaluate(z)
        if self._verifying:
            self._verify_copies(z.detach())
        copies = self._copied(len(z)) if len(z) > 1 else None
        if copies is not None:
            return copies._evaluate(z.reshape(1, -1, z.shape[-1])).reshape(z.shape[:2])
        return self._one_by_one(z)

    def minus_kl(self, z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        r"""Log-joints less :math:`\log q(z)` of a mean-field normal q, with closed forms where there are any.

        For every site whose prior allows it, :math:`\log p(z) - \log q(z)` is replaced by its expectation
        :math:`-\mathrm{KL}(q \| p)`, given the sites before it.

        Args:
            z: Latents of shape ``(K, N, D)``.
            loc: Locations of q, ``(N, D)``.
            scale: Standard deviations of q, ``(N, D)``.

        Returns:
            Values of shape ``(K, N)``.
        """
        if self.vectorized:
            return self._evaluate(z, (loc, scale))
        copies = self._copied(len(z)) if len(z) > 1 else None
        if copies is None:
            return self._one_by_one(z, (loc, scale))
        normal = loc.repeat(len(z), 1), scale.repeat(len(z), 1)
        return copies._evaluate(z.reshape(1, -1, z.shape[-1]), normal).reshape(z.shape[:2])

    def _one_by_one(self, z: Tensor, normal: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return torch.stack([self._evaluate(draw.unsqueeze(0), normal).squeeze(0) for draw in z])

    def runs_once(self, number: int) -> bool:
        """Whether so many draws are evaluated in one run of the model."""
        return self.vectorized or number == 1 or (self.copying is not None and self.copying.serves.get(number, False))

    def _copied(self, number: int) -> LocalLogJoint | None:
        """The log-joint of as many copies of all datapoints, if it can be had."""
        size = self.num_datapoints
        if self.copying is not None and not self.copying.serves.get(number):
            return None
        if self._copies is None or self._copies.num_datapoints != number * size:
            rows = torch.arange(size).repeat(number)
            if self.copying is None:
                self._copies = self.select(rows)
            else:
                self._copies = self._part(Arguments(self.args, self.kwargs).take(self.copying.axes, rows), rows)
        return self._copies

    def _evaluate(self, z: Tensor, normal: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Log-joints ``(K, N)``; given location and scale of a normal q, less log q with closed forms."""
        together = self.vectorized and len(z) > 1
        parts = self._split(z, together)
        values = {**self.global_values, **self.structure.indices}
        posteriors: dict[str, dist.TorchDistribution] = {}
        if normal is not None:
            locs, scales = (self._split(part.expand_as(z), together) for part in normal)
            posteriors = {site.name: site.normal(locs[site.name], scales[site.name]) for site in self.layout.sites}
        log_joint, log_dets = z.new_zeros(z.shape[:2]), {}
        for site in self.layout.sites:
            values[site.name], log_dets[site.name] = site.constrain(parts[site.name])
        handlers: list[Any] = []
        if together:
            with isolated():
                handlers.append(pyro.plate("_local_draws", z.shape[0], dim=-self.depth - 1))
        if self.structure.enumerated:
            handlers.append(poutine.enum(first_available_dim=-self.depth - 2))
        with nullcontext() if self.validate else pyro.validation_enabled(False):
            trace = run_model(self.model, self.args, self.kwargs, values, handlers)
            done: set[str] = set()
            if self.structure.enumerated:
                summed, done = self._sum_out(trace, z.shape[0])
                log_joint = log_joint + summed
            for site in self.layout.sites if self._with_priors else ():
                node: Site = trace.nodes[site.name]  # type: ignore[assignment]
                weight = site_mask(node)
                if not (site.is_real or posteriors or weight.is_masked or site.name in done):
                    stable = unconstrained_log_prob(node["fn"], site.transform, parts[site.name])
                    if stable is not None:
                        term = _scaled(stable, node, self._frame(node))
                        log_joint = log_joint + self._per_datapoint(term, z.shape[0])
                        done.add(site.name)
                        continue
                if weight.is_masked or not (site.is_real or posteriors):
                    term = site.log_det_and_padding(log_dets[site.name], parts[site.name], weight)
                    log_joint = log_joint + self._per_datapoint(term, z.shape[0])
            return log_joint + self._sum_sites(trace, z.shape[0], values, posteriors, done)

    def _sum_out(self, trace: Trace, num_draws: int) -> tuple[Tensor | float, set[str]]:
        """The part of the log-joint in which discrete sites are summed out, and the names of the sites in it."""
        trace.compute_log_prob()
        trace.pack_tensors()
        sites = sample_sites(trace)
        symbols = {
            site["infer"]["_enumerate_symbol"] for site in sites.values() if "_enumerate_symbol" in site["infer"]
        }
        factors: OrderedDict[Any, list[Tensor]] = OrderedDict()
        names, scales = set(), []
        for name, site in sites.items():
            factor = site["packed"]["unscaled_log_prob"]
            if symbols.isdisjoint(factor._pyro_dims) or self._is_left_out(name):
                continue
            if "_enumerate_symbol" not in site["infer"]:
                factor = packed.scale_and_mask(factor, mask=site["packed"]["mask"])
            frame = self._frame(site)
            if frame is None:
                raise ValueError(
                    f"Cannot evaluate datapoints on their own because site {name!r} belongs to a discrete latent that "
                    f"is enumerated outside of plate {self.layout.plate!r}; try a discrete latent inside the plate."
                )
            ordinal = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            factors.setdefault(ordinal, []).append(factor)
            scales.append(site["scale"] * (frame.size / frame.full_size if frame.full_size else 1.0))
            names.add(name)
        if len({float(scale) for scale in scales}) > 1:
            raise ValueError(
                f"Cannot sum out the discrete latents among sites {sorted(names)} because they have different scales; "
                "try poutine.scale around all of them."
            )
        total: Tensor | float = 0.0
        for terms in contract_tensor_tree(factors, symbols).values():
            for term in terms:
                total = total + self._per_datapoint(packed.unpack(term, trace.symbol_to_dim), num_draws)
        return total * scales[0] if scales else total, names

    def in_blocks(self, z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Log-joints ``(K, N)`` and, if asked for, their gradients ``(K, N, D)``, without a graph of their own."""
        size = z.shape[1]
        flat, values, gradients = z.detach().flatten(0, 1), [], []
        program = _value_and_gradient if gradient else _value_alone
        start = 0
        for length in _block_lengths(len(flat)):
            rows = torch.arange(start, start + length).clamp(max=len(flat) - 1)
            part = self._selected(rows % size)
            inputs = [flat[rows].unsqueeze(0)]
            results, _ = run_traced(program, part, inputs, (), part.graphs, part.model, verified=self.verified)
            left = len(flat) - start
            values.append(results[0][0, :left])
            gradients += [grad[0, :left] for grad in results[1:]]
            start += length
        grads = torch.cat(gradients).reshape(z.shape) if gradients else z.new_empty(0)
        return torch.cat(values).reshape(z.shape[:2]), grads

    def _can_run_blocks(self, total: int) -> bool:
        lengths = set(_block_lengths(total))
        return all(self._serves(torch.arange(length) % self.num_datapoints) for length in lengths)

    def _split(self, z: Tensor, together: bool) -> dict[str, Tensor]:
        return self.layout.split(z, self.depth) if together else self.layout.split(z[0])

    def _sum_sites(
        self,
        trace: Trace,
        num_draws: int,
        values: Mapping[str, Tensor],
        posteriors: Mapping[str, dist.TorchDistribution],
        done: set[str],
    ) -> Tensor | float:
        total: Tensor | float = 0.0
        for name, site in sample_sites(trace).items():
            if name in done or self._is_left_out(name):
                continue
            if not site["is_observed"] and name not in values:
                raise ValueError(
                    f"Cannot evaluate the model's log-joint because site {name!r} is latent and the guide has no value "
                    "for it; try a model with the same latents in every run, whatever the values of its latents."
                )
            frame = self._frame(site)
            if frame is not None:
                posterior = posteriors.get(name)
                if posterior is None:
                    term = _scaled(_log_prob(site), site, frame)
                else:
                    weight = site_mask(site)
                    term = (
                        _masked_minus_kl(posterior, site, frame, weight)
                        if weight.is_masked
                        else _scaled(_minus_kl(posterior, site), site, frame)
                    )
                total = total + self._per_datapoint(term, num_draws)
        return total

    def _is_left_out(self, name: str) -> bool:
        return not self._with_priors and any(site.name == name for site in self.layout.sites)

    def _frame(self, site: Site) -> Any:
        """The datapoint plate in a site's stack, or None."""
        return next((frame for frame in site["cond_indep_stack"] if frame.name == self.layout.plate), None)

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
            ValueError: If the model gives different numbers for equal latents, the log-joint of a datapoint is not
                finite, or sites outside of the plate depend on its latents.
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
        self.check_outside(z)
        self._try_vectorized(z, reference)
        self.validate = False

    def check_outside(self, z: Tensor) -> None:
        """Raises a ValueError if a site outside of the plate depends on its latents; ``z`` as for :meth:`check`."""
        check_outside(self.model, self.args, self.kwargs, self.structure, self.global_values, z)

    @torch.no_grad()
    def choose_mode(self, z: Tensor) -> Mode:
        """Finds out how draws ``(2, N, D)`` may be evaluated, without the other checks of :meth:`check`.

        Models that draw random numbers of their own, such as dropout's, get every draw in a run of its own, and so do
        those in which datapoints matter to each other, by batch normalisation in training: the copies of a datapoint at
        one draw would matter to those at another.
        """
        self.validate, self.vectorized = False, False
        reference = self._one_by_one(z)
        self._try_vectorized(z, reference)
        copying = None
        if not self.vectorized and self._is_selectable and self._datapoint_axes.found is not None:
            copying = Copying(self._datapoint_axes.found)
        self.take_mode((self.vectorized, copying))
        return self.vectorized, copying

    def take_mode(self, mode: Mode) -> None:
        """Evaluates draws as :meth:`choose_mode` found for a call of the same shapes."""
        self.validate, self.selectable = False, False
        self.vectorized, self.copying = mode

    def verify_copies(self, use: Any, evaluate: Callable[[], Any]) -> None:
        """Finds out by numbers whether the draws of a use may be evaluated as copies, where it is new.

        Args:
            use: What tells it from others.
            evaluate: Evaluates this log-joint at as many draws.
        """
        if self.copying is None or use in self.copying.uses:
            return
        self.copying.uses.add(use)
        self._verifying = True
        try:
            with torch.no_grad(), torch.random.fork_rng():
                evaluate()
        finally:
            self._verifying = False

    def _verify_copies(self, z: Tensor) -> None:
        number = len(z)
        if self.copying is None or number < 2 or number in self.copying.serves:
            return
        self.copying.serves[number], self._verifying = True, False
        try:
            self.copying.serves[number] = _close(self.plain(z), self._one_by_one(z))
        except Exception:  # a model may fail in any way on copies of its data; then it is run on each draw
            self.copying.serves[number] = False
        self._verifying = True

    def _try_vectorized(self, z: Tensor, reference: Tensor) -> None:
        try:
            self.vectorized = True
            self.vectorized = _close(self(z), reference)
        except Exception:  # a model may fail in any way on a batch of draws; then it is run otherwise
            self.vectorized = False

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
                "likelihood that underflows or is not defined at all latents, as z.sqrt() is not, but softplus(z)."
            )

    def select(self, rows: Tensor, *, once: bool = False) -> LocalLogJoint | None:
        """The log-joint of some of the datapoints only, at their share of the cost.

        The arguments are cut along the axes that hold the datapoints, which are found once by numbers; whether the
        result is right is verified by numbers for each new number of rows.

        Args:
            rows: Positions in ``range(N)``; some may be left out or repeated.
            once: Whether to verify this very selection, which may be right where datapoints' data matter to others.

        Returns:
            The evaluator for these datapoints, or None if the model cannot be run on such a part of the arguments.
        """
        return self._selected(rows) if self._serves(rows, once=once) else None

    def _serves(self, rows: Tensor, *, once: bool = False) -> bool:
        if self._origin is not None:
            whole, positions = self._origin
            return whole._serves(positions[rows], once=once)
        return self._is_selectable and self._datapoint_axes.serves(rows, once=once)

    def _selected(self, rows: Tensor) -> LocalLogJoint:
        if self._origin is not None:
            whole, positions = self._origin
            return whole._selected(positions[rows])
        return self._part(self._datapoint_axes.take(rows), rows)

    @property
    def _datapoint_axes(self) -> DatapointAxes:
        """The axes of the arguments that hold the datapoints."""
        if self._axes is None:
            size, generator = self.num_datapoints, torch.Generator().manual_seed(0)
            z = torch.randn(1, size, self.layout.latent_dim, generator=generator).to(self.like)
            arguments = Arguments(self.args, self.kwargs)
            self._axes = DatapointAxes(arguments, size, lambda call, rows: self._part(call, rows).plain(z[:, rows])[0])
        return self._axes

    @property
    def _is_selectable(self) -> bool:
        fixed = self.num_datapoints < 2 or not self.structure.is_static or isinstance(self.layout.scale, Tensor)
        return self.selectable and not fixed and self.structure.datapoints.kind != "random"

    def on_rows(self, rows: Tensor, *, plain: bool = False) -> Callable[[Tensor], Tensor]:
        """The log-joint of some datapoints as a function of their latents, ``(K, n, D)`` to ``(K, n)``.

        As :meth:`select`, but where the model can only run on all datapoints it does, with zeros for the others.

        Args:
            rows: Positions in ``range(N)``.
            plain: Whether to evaluate as :meth:`plain` does.
        """
        size = self.num_datapoints
        whole = len(rows) == size and torch.equal(rows, torch.arange(size))
        part = self if whole else self.select(rows)
        if part is not None:
            return part.plain if plain else part
        return lambda z: self.plain(z.new_zeros(len(z), size, z.shape[-1]).index_copy(1, rows.to(z.device), z))[:, rows]

    @torch.no_grad()
    def prior_draws(self, num_draws: int) -> Tensor:
        """Draws of the local latents from the prior, flat and unconstrained, of shape ``(K, N, D)``."""
        if not self.vectorized:
            return torch.cat([self._prior_draws(1) for _ in range(num_draws)])
        return torch.cat([self._prior_draws(p.stop - p.start) for p in chunks(num_draws, self.num_datapoints)])

    def _prior_draws(self, num_draws: int) -> Tensor:
        values, handlers = {**self.global_values, **self.structure.indices}, []
        if num_draws > 1:
            with isolated():
                handlers.append(pyro.plate("_local_draws", num_draws, dim=-self.depth - 1))
        with pyro.validation_enabled(False):
            nodes: dict[str, Any] = run_model(self.model, self.args, self.kwargs, values, handlers).nodes
        drawn = {site.name: nodes[site.name]["value"] for site in self.layout.sites}
        if num_draws == 1:
            return self.layout.flatten(drawn).unsqueeze(0)
        return torch.stack([self.layout.flatten({name: x[k] for name, x in drawn.items()}) for k in range(num_draws)])

    def _part(self, call: CallArguments, rows: Tensor) -> LocalLogJoint:
        """The log-joint of a call whose datapoints are some of this one's."""
        name = self.layout.plate
        frames = {**self.structure.frames, name: replace(self.structure.datapoints, size=len(rows))}
        if not self.structure.datapoints.subsampled:
            frames[name] = replace(frames[name], full_size=len(rows))
        indices = {k: v[rows.to(v.device)] if k == name else v for k, v in self.structure.indices.items()}
        structure = replace(self.structure, frames=frames, indices=indices, observed=None)
        part = self.of_call(*call, structure)
        part.graphs, part.verified, part._origin = self.graphs, self.verified, (self, rows)
        return part

    def of_call(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        structure: Structure,
        global_values: Mapping[str, Tensor] | None = None,
    ) -> LocalLogJoint:
        """The log-joint of another call of the same model without new checks, by default at the same global values."""
        global_values = self.global_values if global_values is None else global_values
        part = LocalLogJoint(self.model, args, kwargs, structure, global_values)
        part.validate, part.vectorized, part.like = self.validate, self.vectorized, self.like
        part._with_priors, part.copying = self._with_priors, self.copying
        return part


def _log_prob(site: Site) -> Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def _minus_kl(posterior: dist.TorchDistribution, site: Site) -> Tensor:
    """Minus the KL divergence of a posterior from the prior of a site, or one draw's estimate of it."""
    try:
        return -kl_divergence(posterior, site["fn"])
    except NotImplementedError:
        return _log_prob(site) - posterior.log_prob(site["value"])


def _masked_minus_kl(posterior: dist.TorchDistribution, site: Site, frame: Any, weight: SiteMask) -> Tensor:
    """One draw's estimate of minus the KL divergence, where masked entries have a posterior but no prior."""
    return _scaled(_log_prob(site), site, frame) - posterior.log_prob(site["value"]) * weight.scale


def _scaled(log_prob: Tensor, site: Site, frame: Any) -> Tensor:
    """With the masks and scales of a site, but without the subsampling scale of ``frame``."""
    subsampling = frame.full_size / frame.size if frame.full_size else 1.0
    return scale_and_mask(log_prob, site["scale"] / subsampling, site["mask"])


_SMALL, _LARGE = 256, 2048
"""Numbers of rows for which log-joints are traced."""


def _block_lengths(total: int) -> list[int]:
    """Lengths of the blocks in which rows are evaluated, the last of them filled up."""
    lengths = []
    while total > 0:
        lengths.append(_LARGE if total > _LARGE // 2 else _SMALL)
        total -= lengths[-1]
    return lengths


class _InBlocks(torch.autograd.Function):
    """:meth:`LocalLogJoint.in_blocks` as a function of z that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_joint: LocalLogJoint) -> Tensor:
        """Keeps the gradient, which comes with the values at little further cost."""
        values, gradient = log_joint.in_blocks(z, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        """Scales the gradient."""
        return ctx.saved_tensors[0] * cotangents[0].unsqueeze(-1), None


def _value_alone(log_joint: LocalLogJoint, z: Tensor) -> tuple[Tensor, ...]:
    return (log_joint.plain(z),)


def _value_and_gradient(log_joint: LocalLogJoint, z: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_joint.plain(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


def chunks(num_draws: int, num_datapoints: int, max_rows: int = MAX_ROWS) -> list[slice]:
    """Cuts draws into pieces such that a piece times the datapoints stays below ``max_rows``."""
    step = max(1, max_rows // max(1, num_datapoints))
    return [slice(start, min(start + step, num_draws)) for start in range(0, num_draws, step)]
