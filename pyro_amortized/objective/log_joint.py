r"""The log-joint of every datapoint under a Pyro model, as a function of the flat unconstrained latent.

With the global latents held at given values, a model with a datapoint plate is a product over datapoints, so that
:math:`\log p(x_n, z)` is defined for each of them on its own. It is evaluated for many z at once, in nats, without the
scale N/B of a subsampled plate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_amortized.graphs.cache import Function, GraphCache
from pyro_amortized.objective.blocks import InBlocks, block_lengths
from pyro_amortized.objective.draws import Copying, Mode, agrees
from pyro_amortized.objective.evaluation import Evaluation
from pyro_amortized.objective.meter import Meter
from pyro_amortized.structure.arguments import Arguments, CallArguments
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import DatapointAxes, close, cut_to_rows
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.structure import Structure

__all__ = ["LocalLogJoint", "takes_draws"]


class LocalLogJoint:
    r"""Evaluates :math:`\log p(x_n, T(z_n)) + \log|\det T'(z_n)|` for every datapoint, at flat unconstrained latents z.

    The sum runs over the sites inside the datapoint plate: local latents and observations. The plate's subsampling
    scale is removed, masks and the model's own ``poutine.scale`` are kept. The model runs apart from the caller's
    handlers.

    Many draws are evaluated in one run: in an outermost plate, if the model gives the same numbers that way as one draw
    at a time (:meth:`choose_mode`); else as copies of the datapoints, if its arguments can be cut to rows
    (:meth:`select`); else one by one.

    Args:
        call: A call of the model with local latents, at given global ones.
    """

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        self.vectorized = True
        self.validate = True
        self.with_priors = True
        self.selectable = True
        self.like = torch.empty(0)
        self.graphs: GraphCache | None = None
        self.verified: dict[Any, Function | None] = {}
        self.copying: Copying | None = None
        self.meter: Meter | None = None
        self._axes: DatapointAxes | None = None
        self._origin: tuple[LocalLogJoint, Tensor] | None = None
        self._verifying = False
        self._copies: LocalLogJoint | None = None

    @property
    def structure(self) -> Structure:
        """What the call looks like."""
        return self.call.structure

    @property
    def layout(self) -> SiteLayout:
        """The local latents."""
        return self.call.structure.layout  # type: ignore[return-value]

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints in this call."""
        return self.structure.datapoints.size

    def of_call(self, call: ModelCall) -> LocalLogJoint:
        """The log-joint of another call of the same model without new checks."""
        part = LocalLogJoint(call)
        part.validate, part.vectorized, part.like = self.validate, self.vectorized, self.like
        part.with_priors, part.copying = self.with_priors, self.copying
        return part

    def likelihood(self) -> LocalLogJoint:
        """The same without the local latents' densities: a function of z with other maxima."""
        part = self.of_call(self.call)
        part.selectable, part.with_priors = self.selectable, False
        part.meter = self.meter
        return part

    # Values

    def __call__(self, z: Tensor) -> Tensor:
        """Log-joints of shape ``(K, N)``, in nats, at latents ``z`` of shape ``(K, N, D)``.

        With :attr:`graphs`, draws and datapoints are evaluated in blocks of rows of a few fixed sizes, by graphs that
        are traced once for each size; the result can then be differentiated once, with respect to z.
        """
        of_one_size = self.graphs is not None and not self.structure.groups
        blocks = set(block_lengths(z.shape[0] * z.shape[1])) if of_one_size else set()
        if blocks and all(self._serves(torch.arange(length) % self.num_datapoints) for length in blocks):
            if self.meter is not None:
                self.meter.add(z)
            return InBlocks.apply(z, self)
        return self.plain(z)

    def plain(self, z: Tensor) -> Tensor:
        """The same without graphs; differentiable any number of times, with respect to everything."""
        if self.meter is not None:
            self.meter.add(z)
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

    def _evaluate(self, z: Tensor, normal: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """In one run of the model."""
        return Evaluation(self.call, len(z), self.with_priors, self.validate)(z, normal)

    # How several draws are evaluated

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
                arguments = Arguments(self.call.args, self.call.kwargs)
                part = cut_to_rows(arguments, self.copying.axes, rows, size, self.structure.groups)
                self._copies = self._part(part, rows)
        return self._copies

    @torch.no_grad()
    def choose_mode(self, z: Tensor) -> Mode:
        """Finds out how draws ``(2, N, D)`` may be evaluated, without the checks that diagnostics make.

        Models that draw random numbers of their own, such as dropout's, get every draw in a run of its own, and so do
        those in which datapoints matter to each other, by batch normalisation in training: the copies of a datapoint at
        one draw would matter to those at another.
        """
        self.validate = False
        self.try_vectorized(z, self._one_by_one(z))
        copying = None
        if not self.vectorized and self._is_selectable and self._datapoint_axes.found is not None:
            copying = Copying(self._datapoint_axes.found)
        self.take_mode((self.vectorized, copying))
        return self.vectorized, copying

    def try_vectorized(self, z: Tensor, reference: Tensor) -> None:
        """Evaluates draws together from now on if that gives the log-joints of one draw at a time."""
        self.vectorized = agrees(lambda: self._evaluate(z), lambda found: close(found, reference))

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
        reference = self._one_by_one(z)
        self.copying.serves[number] = agrees(lambda: self.plain(z), lambda found: close(found, reference))
        self._verifying = True

    # Rows

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
        if not self._serves(rows, once=once):
            return None
        part = self.cut(rows)
        part.meter = None if self.meter is None else self.meter.of_rows(rows)
        return part

    def _serves(self, rows: Tensor, *, once: bool = False) -> bool:
        if self._origin is not None:
            whole, positions = self._origin
            return whole._serves(positions[rows], once=once)
        return self._is_selectable and self._datapoint_axes.serves(rows, once=once)

    def cut(self, rows: Tensor) -> LocalLogJoint:
        """As :meth:`select`, for rows that have been found to serve."""
        if self._origin is not None:
            whole, positions = self._origin
            return whole.cut(positions[rows])
        return self._part(self._datapoint_axes.take(rows), rows)

    def _part(self, arguments: CallArguments, rows: Tensor) -> LocalLogJoint:
        """The log-joint of a call whose datapoints are some of this one's."""
        part = self.of_call(self.call.of_rows(arguments, rows))
        part.graphs, part.verified, part._origin = self.graphs, self.verified, (self, rows)
        return part

    @property
    def _datapoint_axes(self) -> DatapointAxes:
        """The axes of the arguments that hold the datapoints."""
        if self._axes is None:
            size, generator = self.num_datapoints, torch.Generator().manual_seed(0)
            z = torch.randn(1, size, self.layout.latent_dim, generator=generator).to(self.like)
            arguments = Arguments(self.call.args, self.call.kwargs)
            self._axes = DatapointAxes(
                arguments, size, lambda found, rows: self._part(found, rows).plain(z[:, rows])[0], self.structure.groups
            )
        return self._axes

    @property
    def _is_selectable(self) -> bool:
        chained = len(self.structure.groups) > 1 or any(
            self.structure.frames[name].subsampled for name in self.structure.groups
        )
        fixed = (
            chained or self.num_datapoints < 2 or not self.structure.is_static or isinstance(self.layout.scale, Tensor)
        )
        return self.selectable and not fixed and self.structure.datapoints.kind != "random"

    def on_rows(self, rows: Tensor, *, plain: bool = False) -> Callable[[Tensor], Tensor]:
        """The log-joint of some datapoints as a function of their latents, ``(K, n, D)`` to ``(K, n)``.

        As :meth:`select`, but where the model can only run on all datapoints it does, with zeros for the others.

        Args:
            rows: Positions in ``range(N)``.
            plain: Whether to evaluate as :meth:`plain` does.
        """
        size = self.num_datapoints
        whole = len(rows) == size and torch.equal(rows.cpu(), torch.arange(size))
        part = self if whole else self.select(rows)
        if part is not None:
            return part.plain if plain else part
        return lambda z: self.plain(z.new_zeros(len(z), size, z.shape[-1]).index_copy(1, rows.to(z.device), z))[:, rows]


def takes_draws(call: ModelCall, like: Tensor) -> bool:
    """Whether a model gives for several draws of its local latents, in an outermost plate, what it gives for each.

    Args:
        call: A call of the model, at given global latents.
        like: A tensor of the latents' precision and device.
    """
    log_joint = LocalLogJoint(call)
    shape = (2, log_joint.num_datapoints, log_joint.layout.latent_dim)
    z = torch.linspace(-0.5, 0.5, math.prod(shape), dtype=like.dtype, device=like.device).reshape(shape)
    return log_joint.choose_mode(z)[0]
