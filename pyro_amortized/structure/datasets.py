"""A model of one data set as a model of many: whole data sets as datapoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_amortized.structure.cache import call_key
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.running import isolated, run_model
from pyro_amortized.structure.signature import named_function
from pyro_amortized.structure.stacked_site import StackedSite, rebuilt, tensors_of
from pyro_amortized.structure.state import untouched

__all__ = ["over_datasets"]

_MAX_KNOWN, _FEW = 128, 4
"""For how many shapes to know how calls are run, and on how many of a call's data sets to find it out."""


def over_datasets(model: Callable[..., Any], plate: str = "datasets") -> Callable[..., None]:
    r"""Makes of a model of one data set a model of many, so that one guide infers the latents of any of them.

    .. math:: p(z_{1:B}, x_{1:B}) = \prod_b p(z_b, x_b)

    The result takes the arguments of the model, every tensor with one further leading dimension: that of the data sets.
    Its sites have the names that they have in the model and lie in a plate of data sets, outside of the model's own
    plates, so that every guide and every diagnostic serves them: all latents of the model are latents of a datapoint,
    and a datapoint is a data set. Data sets of one call have arguments of equal shapes, those of other calls others. An
    encoder for any number of observations, :class:`~pyro_amortized.SetEncoder` or
    :class:`~pyro_amortized.DeepSetEncoder`, then infers the posterior of data sets of any size.

    The model is run for all data sets in one by ``torch.vmap`` where that gives, in the first call of each shape, the
    log-probabilities of one run for each; else it is run for each of them. A call takes one run more than the model has
    latent sites.

    Args:
        model: A Pyro model of one data set.
        plate: Name of the plate of data sets.

    Raises:
        ValueError: If the arguments have no common leading dimension, or the model cannot be stacked: which sites it
            has depends on the data, it subsamples, or it enumerates.

    Example:
        >>> import pyro.distributions as dist
        >>> def regression(x, y):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("obs", len(y)):
        ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
        >>> model = over_datasets(regression)
        >>> trace = pyro.poutine.trace(model).get_trace(torch.randn(5, 20), torch.randn(5, 20))
        >>> trace.nodes["slope"]["value"].shape
        torch.Size([5, 1])

    References:
        BayesFlow: Learning Complex Stochastic Models With Invertible Neural Networks, Stefan T. Radev, Ulf K. Mertens,
        Andreas Voss, Lynton Ardizzone, Ullrich Koethe (2020), https://arxiv.org/abs/2003.06281
    """
    if not callable(model):
        raise ValueError(f"Cannot stack {model!r} because it is not callable; try passing the Pyro model itself.")
    if not isinstance(plate, str) or not plate:
        raise ValueError(f'Cannot use plate={plate!r} because it is no name; try plate="datasets".')
    stacked = _OverDatasets(model, plate)

    @functools.wraps(named_function(model))
    def over(*args: Any, **kwargs: Any) -> None:
        stacked(*args, **kwargs)

    return over


class _Stop(Exception):
    """Ends a run at the first latent that has no value yet."""


class _Recorder(Messenger):
    """Takes down the sample statements of a run up to the first latent without a value, and the parameters.

    Args:
        known: Values of latents.
        depth: Number of batch dimensions that all sites are to have.
        parameters: Where names of parameters go.
    """

    def __init__(self, known: Mapping[str, Tensor], depth: int, parameters: dict[str, None]) -> None:
        super().__init__()
        self.known = known
        self.depth = depth
        self.parameters = parameters
        self.found: list[StackedSite] = []

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters[msg["name"]] = None

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            return
        if not msg["is_observed"] and name in self.known:
            msg["value"] = self.known[name]
        _check_stackable(msg)
        rank, events = len(fn.batch_shape), fn.event_dim
        if rank < self.depth:
            fn = fn.expand((1,) * (self.depth - rank) + tuple(fn.batch_shape))
        value = self._deep(torch.as_tensor(msg["value"]), events) if msg["is_observed"] else None
        scale, mask = (self._deep(x) if isinstance(x, Tensor) else x for x in (msg["scale"], msg["mask"]))
        plates = tuple((f.name, f.dim, f.size) for f in msg["cond_indep_stack"] if f.vectorized)
        infer = dict(msg["infer"])
        self.found.append(StackedSite(name, fn, value, msg["is_observed"], scale, mask, infer, plates, rank))
        if not msg["is_observed"] and name not in self.known:
            raise _Stop

    def _deep(self, x: Tensor, events: int = 0) -> Tensor:
        return x.reshape((1,) * (self.depth + events - x.dim()) + x.shape)


def _check_stackable(msg: Any) -> None:
    name = msg["name"]
    for frame in msg["cond_indep_stack"]:
        if frame.vectorized and frame.full_size and frame.full_size != frame.size:
            raise ValueError(
                f"Cannot stack data sets because plate {frame.name!r} of site {name!r} is subsampled; try a model that "
                "takes all of a data set."
            )
    if msg["infer"].get("enumerate") and not msg["is_observed"]:
        raise ValueError(
            f"Cannot stack data sets because latent {name!r} is enumerated; try a model in which it is summed out, a "
            "mixture distribution or torch.logsumexp in a pyro.factor."
        )


class _OverDatasets:
    """Runs a model for all data sets, site after site."""

    def __init__(self, model: Callable[..., Any], plate: str) -> None:
        self.model = model
        self.plate = plate
        self.known: dict[Any, tuple[int, bool]] = {}
        self.parameters: dict[str, None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        stack = _Stack(self.model, args, kwargs, self.parameters)
        way = self._way(stack)
        stack.make_parameters()
        values: dict[str, Tensor] = {}
        plates = {self.plate: pyro.plate(self.plate, stack.size, dim=-way[0] - 1)}
        for site in stack.sites(*way, values):
            value = self._sample(site, plates)
            if not site.is_observed:
                values[site.name] = site.by_dataset(value, stack.size)
        for name in stack.parameters:
            pyro.param(name)  # which shows it to the caller's handlers: the model runs apart from them

    def _way(self, stack: _Stack) -> tuple[int, bool]:
        """Number of batch dimensions of the model's sites, and whether all data sets run together."""
        key = call_key((stack.args, stack.kwargs))
        if key is None or key not in self.known:
            if len(self.known) > _MAX_KNOWN:
                self.known.clear()
            self.known[key] = stack.first(_FEW).find_way()
        return self.known[key]

    def _sample(self, site: StackedSite, plates: dict[str, pyro.plate]) -> Tensor:
        """The sample statement of all data sets."""
        with ExitStack() as stack:
            stack.enter_context(plates[self.plate])
            for name, dim, length in site.plates:
                if name not in plates:
                    plates[name] = pyro.plate(name, length, dim=dim)
                stack.enter_context(plates[name])
            if isinstance(site.scale, Tensor) or site.scale != 1.0:
                stack.enter_context(ScaleMessenger(site.scale))
            if site.mask is not None:
                stack.enter_context(MaskMessenger(site.mask))
            return pyro.sample(site.name, site.fn, obs=site.value, infer=site.infer)  # type: ignore[arg-type]


class _Stack:
    """The data sets of one call.

    Args:
        model: The model of one.
        args: Positional arguments, tensors with a leading dimension of data sets.
        kwargs: Keyword arguments of the same kind.
        parameters: Names of the parameters that earlier calls have met; new ones are added.
    """

    def __init__(self, model: Callable[..., Any], args: Any, kwargs: Any, parameters: dict[str, None]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.batched = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        sizes = {leaf.shape[0] if leaf.dim() else None for leaf in (self.leaves[i] for i in self.batched)}
        if len(sizes) != 1 or None in sizes:
            shapes = [tuple(self.leaves[i].shape) for i in self.batched]
            raise ValueError(
                f"Cannot tell how many data sets there are because the arguments' tensors, of shapes {shapes}, have no "
                "common leading dimension; try x.unsqueeze(0) for one data set, and numbers in place of tensors for "
                "what all data sets share."
            )
        self.size: int = sizes.pop()  # type: ignore[assignment]
        self.parameters = parameters

    def _run(
        self, tensors: Sequence[Tensor], known: Mapping[str, Tensor], depth: int
    ) -> tuple[list[StackedSite], bool]:
        """Runs the model on one data set; also whether it came to its end."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.batched, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        recorder = _Recorder(known, depth, self.parameters)
        try:
            with pyro.validation_enabled(False):
                run_model(self.model, args, kwargs, handlers=(recorder,))
        except _Stop:
            return recorder.found, False
        return recorder.found, True

    def _row(self, number: int) -> list[Tensor]:
        return [self.leaves[i][number] for i in self.batched]

    def _call(self, number: int) -> tuple[Any, Any]:
        """The arguments of one data set."""
        return tree_unflatten([x[number] if i in self.batched else x for i, x in enumerate(self.leaves)], self.spec)

    def first(self, number: int) -> _Stack:
        """Some of the data sets."""
        leaves = [x[:number] if i in self.batched else x for i, x in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return _Stack(self.model, args, kwargs, self.parameters)

    def make_parameters(self) -> None:
        """Runs the model on one data set if its parameters are not there yet, which cannot be made under vmap."""
        missing = self.parameters.keys() - pyro.get_param_store().keys()
        if missing:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                run_model(self.model, *self._call(0))

    def sites(self, depth: int, together: bool, values: Mapping[str, Tensor]) -> Iterator[StackedSite]:
        """The sites of all data sets in order; ``values`` must hold each latent before the next site is asked for."""
        done, ended = 0, False
        while not ended:
            found, ended = self._together(values, depth) if together else self._each(values, depth)
            yield from found[done:]
            done = len(found)

    def _together(self, values: Mapping[str, Tensor], depth: int) -> tuple[list[StackedSite], bool]:
        """All data sets in one run, under ``torch.vmap``."""
        last: list[Any] = []

        def run(tensors: list[Tensor], known: dict[str, Tensor]) -> list[Tensor]:
            found, ended = self._run(tensors, known, depth)
            last[:] = found, ended
            return [tensor for site in found for tensor in tensors_of(site)]

        tensors = torch.vmap(run)([self.leaves[i] for i in self.batched], dict(values))
        found, ended = last
        left = iter(tensors)
        return [rebuilt(site, left, self.size) for site in found], ended

    def _each(self, values: Mapping[str, Tensor], depth: int) -> tuple[list[StackedSite], bool]:
        """One run for each data set."""
        runs = [self._run(self._row(b), {n: v[b] for n, v in values.items()}, depth) for b in range(self.size)]
        first = [site.kind for site in runs[0][0]]
        for found, _ in runs:
            kinds = [site.kind for site in found]
            if kinds != first:
                other = next((k[0] for k, f in zip(kinds, first, strict=False) if k != f), "at the end")
                raise ValueError(
                    f"Cannot stack data sets because their sites are not the same, from {other!r} on; try a model "
                    "whose sites, their distributions and shapes do not depend on the data."
                )
        stacked = [
            rebuilt(sites[0], iter([torch.stack(t) for t in zip(*map(tensors_of, sites), strict=True)]), self.size)
            for sites in zip(*(found for found, _ in runs), strict=True)
        ]
        return stacked, runs[0][1]

    @torch.no_grad()
    def find_way(self) -> tuple[int, bool]:
        """Number of batch dimensions, and whether all data sets may run together; both found by numbers."""
        with untouched(), isolated():
            torch.manual_seed(0)
            draws: dict[str, Tensor] = {}
            samples = _samples(run_model(self.model, *self._call(0)))
            dims = [-f.dim for site in samples for f in site["cond_indep_stack"] if f.vectorized]
            depth = max([0, *dims, *(len(site["fn"].batch_shape) for site in samples)])
            expected = self._log_joints(depth, False, draws)
            if not close(expected, self._alone(draws)):
                raise ValueError(
                    "Cannot stack data sets because the log-probabilities of all of them together are not those of "
                    "each; try distributions of torch and Pyro whose parameters are tensors."
                )
            try:
                together = close(self._log_joints(depth, True, draws), expected)
            except Exception:  # a model may fail in any way under vmap; then it is run for each data set
                together = False
        return depth, together

    def _log_joints(self, depth: int, together: bool, draws: dict[str, Tensor]) -> Tensor:
        """Log-joints of the data sets ``(B,)``, at draws from the prior that are made, or are at hand."""
        terms = []
        values: dict[str, Tensor] = {}
        for site in self.sites(depth, together, values):
            value = site.value
            if value is None:
                value = draws[site.name] if site.name in draws else site.fn.sample()
                draws[site.name] = value
                values[site.name] = site.by_dataset(value, self.size)
            terms.append(site.fn.log_prob(value).reshape(self.size, -1).sum(-1))
        return torch.stack([term.double() for term in terms]).sum(0).to(terms[-1])  # in which it can be compared

    def _alone(self, draws: Mapping[str, Tensor]) -> Tensor:
        """The same of every data set on its own, as the model has them."""
        totals = []
        for b in range(self.size):
            given = _Given({name: value[b] for name, value in draws.items()})
            samples = _samples(run_model(self.model, *self._call(b), None, (given,)))
            log_probs = [site["fn"].log_prob(site["value"]).sum() for site in samples]
            totals.append(torch.stack([log_prob.double() for log_prob in log_probs]).sum().to(log_probs[0]))
        return torch.stack(totals)


def _samples(trace: Any) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]


class _Given(Messenger):
    """Gives latents their values, in the shapes that their sites have."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]].reshape(msg["fn"].shape())
