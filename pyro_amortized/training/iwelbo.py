r"""The importance-weighted bound: a tighter ELBO from K draws of every datapoint's latents."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from pyro.infer.util import torch_item
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_amortized.checks import check_count, check_flag
from pyro_amortized.objective.checks import check_alone
from pyro_amortized.structure.cache import call_key
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.influence import close
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import isolated
from pyro_amortized.structure.sites import sample_sites
from pyro_amortized.structure.state import modes_of_modules, untouched
from pyro_amortized.structure.structure import Structure
from pyro_amortized.training.particles import Particles, at_particle, latents_at, run_particles, value_at
from pyro_amortized.training.plates import scale_of_caller

__all__ = ["IWELBO"]

_MAX_KNOWN = 128
_ESTIMATORS = ("dreg", "plain")


class IWELBO(ELBO):
    r"""The importance-weighted bound on the evidence, datapoint by datapoint.

    .. math:: \mathcal{L}_K = E\Big[\log \frac{p(\theta)}{q(\theta)} + \frac{N}{B} \sum_{n=1}^B s_n
        \log \frac{1}{K} \sum_{k=1}^K w_{nk}\Big], \qquad
        w_{nk} = \Big(\frac{p(x_n, z_{nk} \mid \theta)}{q(z_{nk} \mid x_n)}\Big)

    with one draw of the global latents :math:`\theta` and K of each datapoint's own, which are weighed among
    themselves. Pyro's ``RenyiELBO(alpha=0)`` draws :math:`\theta` K times and weighs all datapoints by their product as
    soon as there is a global latent, by which most of the tightening is lost. The bound rises with K, from the ELBO at
    K = 1 to the evidence given :math:`\theta`.

    Masked sites drop out, and :math:`N/B` is the scale of a subsampled plate. A ``poutine.scale`` that all sites of a
    datapoint share is its weight :math:`s_n`; one of some sites alone, as of :class:`KLAnnealing`, tempers
    :math:`w_{nk}`. Discrete latents that the model enumerates are summed out.

    With ``"dreg"`` the gradient by the guide's local parameters is the doubly reparameterised one,
    :math:`\sum_k \tilde w_{nk}^2\, \partial_z \log w_{nk}\, \partial_\phi z_{nk}` with normalised weights
    :math:`\tilde w`, which is unbiased as the plain one is, but gets better with K where the other drowns in noise.
    Parameters of the model and of the global latents' guide get the plain one.

    The K draws are made in one run of the guide and the model, if the model gives for them together what it gives for
    each on its own, which is checked by numbers at the first call with arguments of new shapes; else one after the
    other.

    Serves guides that draw local latents inside the datapoint plate: all of this package's for continuous latents,
    Pyro's ``AutoNormal``, most written by hand.

    Args:
        num_particles: K, the number of draws for each datapoint.
        gradient: ``"dreg"``, or ``"plain"`` for the gradient of the bound as it is.
        plate: Name of the datapoint plate; by default the guide's, or the outermost one that holds an observed site.
        vectorize_particles: Whether to try to make the K draws in one run.
        retain_graph: As for Pyro's ELBOs.

    Raises:
        ValueError: When called with a guide or a model that it cannot serve.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Poisson(z.exp()), obs=x)
        >>> optimizer = pyro.optim.Adam({"lr": 0.01})
        >>> svi = pyro.infer.SVI(model, AmortizedGuide(model), optimizer, loss=IWELBO(50))
        >>> loss = svi.step(torch.tensor([0.0, 1.0, 3.0]))

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov (2016),
        https://arxiv.org/abs/1509.00519
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, George Tucker, Dieterich Lawson, Shixiang
        Gu, Chris J. Maddison (2019), https://arxiv.org/abs/1810.04152
        Tighter Variational Bounds are Not Necessarily Better, Tom Rainforth, Adam R. Kosiorek, Tuan Anh Le, Chris J.
        Maddison, Maximilian Igl, Frank Wood, Yee Whye Teh (2018), https://arxiv.org/abs/1802.04537
    """

    def __init__(
        self,
        num_particles: int,
        *,
        gradient: str = "dreg",
        plate: str | None = None,
        vectorize_particles: bool = True,
        retain_graph: bool | None = None,
    ) -> None:
        num_particles = check_count("num_particles", num_particles, 1, 50)
        check_flag("vectorize_particles", vectorize_particles)
        if gradient not in _ESTIMATORS:
            raise ValueError(
                f"Cannot estimate gradients by {gradient!r} because it is none of {_ESTIMATORS}; try "
                f"gradient={_ESTIMATORS[0]!r}."
            )
        super().__init__(num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph)
        self.gradient = gradient
        self.plate = plate
        self._reader: StructureReader | None = None
        self._known: dict[Any, bool] = {}
        self._alone: set[Any] = set()  # keys of calls whose datapoints have been found to depend on themselves alone

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Minus an estimate of the bound, nats."""
        with torch.no_grad():
            return self._checked(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The same, and adds its gradient to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return self._checked(loss)

    @staticmethod
    def _checked(loss: Tensor) -> float:
        value = torch_item(loss)
        warn_if_nan(value, "loss")
        return value

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus an estimate of the bound, whose gradient is an estimate of its gradient."""
        runs = self._run(ModelCall(model, args, kwargs, self._look(model, guide, args, kwargs)), guide)
        own = _own_scale(runs[0], scale_of_caller())
        log_p, log_q = (torch.cat([getattr(run, part) for run in runs]) / own for part in ("log_p", "log_q"))
        frame = runs[0].call.structure.datapoints
        weight = own * (frame.full_size / frame.size)
        bounds = torch.logsumexp(log_p - log_q, 0) - math.log(self.num_particles)
        bound = runs[0].outside + (weight * bounds).sum()
        if not (self.gradient == "dreg" and bound.requires_grad):
            return -bound
        shares = (log_p - log_q).detach().softmax(0)
        surrogate = runs[0].outside + (weight * shares * log_p).sum()
        for run, part in zip(runs, shares.split(runs[0].number), strict=True):
            run.shares.append(part)
            surrogate = surrogate - _through_draws(run, weight / own * part.square())
            if run.factors:
                surrogate = surrogate - (frame.full_size / frame.size * part * run.factor_terms).sum()
        return -(bound.detach() + surrogate - surrogate.detach())

    # The runs

    def _get_trace(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One draw's runs of the model and the guide, as Pyro's ELBOs make them."""
        particles = run_particles(ModelCall(model, args, kwargs, self._look(model, guide, args, kwargs)), guide, 1)
        return particles.model_trace, particles.guide_trace

    def _look(
        self, model: Callable[..., Any], guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Structure:
        plate = self.plate or getattr(guide, "plate", None)
        groups = getattr(guide, "groups", {})
        if self._reader is None or (self._reader.requested_plate, self._reader.groups) != (plate, groups):
            self._reader = StructureReader(plate, discrete=True, groups=groups)
        structure = self._reader.look(model, args, kwargs)
        _check_structure(structure)
        return structure

    def _run(self, call: ModelCall, guide: Callable[..., Any]) -> list[Particles]:
        key = self._key(call)
        runs = self._runs(call, guide, key)
        if key is None or key not in self._alone:
            with isolated():
                check_alone(*latents_at(runs), all_pairs=key is not None or not self._alone)
            self._alone = {key} if len(self._alone) > _MAX_KNOWN else self._alone | {key}
        return runs

    def _runs(self, call: ModelCall, guide: Callable[..., Any], key: Any) -> list[Particles]:
        if self.vectorize_particles and self._known.get(key, True):
            particles = self._together(call, guide, checked=key in self._known)
            self._remember(key, particles is not None)
            if particles is not None:
                return [particles]
        first = run_particles(call, guide, 1)
        runs = [first, *(run_particles(call, guide, 1, shared=first) for _ in range(self.num_particles - 1))]
        _check_draws(runs, self.gradient)
        last = runs[-1]
        _check_outside(first, *(run.evaluation.outside(run.model_trace) for run in (first, last)))
        return runs

    def _together(self, call: ModelCall, guide: Callable[..., Any], *, checked: bool) -> Particles | None:
        """The draws made in one run; None if the model does not take them so."""
        if checked:
            return run_particles(call, guide, self.num_particles)
        try:
            particles = run_particles(call, guide, self.num_particles)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            first = run_particles(call, guide, 1)  # raises what is wrong with single draws too
            _check_draws([first], self.gradient)
            self._warn(f"cannot take them together ({str(error).splitlines()[0]})")
            return None
        return particles if self._is_right(particles) else None

    def _warn(self, cause: str) -> None:
        warnings.warn(
            f"IWELBO makes its {self.num_particles} draws one after the other because the model {cause}; try "
            "eval() of modules that hold dropout or batch normalisation, and indexing from the right, a[..., index], "
            "or vectorize_particles=False.",
            stacklevel=6,
        )

    def _key(self, call: ModelCall) -> Any:
        """What tells calls apart for which draws together may be right or wrong; None if it is not known."""
        shapes = call_key((call.args, dict(call.kwargs)))
        try:
            key = call.model, getattr(call.model, "training", None), modes_of_modules(), shapes
            hash(key)
        except TypeError:
            return None
        return None if shapes is None else key

    def _remember(self, key: Any, serves: bool) -> None:
        if key is not None:
            self._known[key] = serves
            if len(self._known) > _MAX_KNOWN:
                self._known.pop(next(iter(self._known)))

    def _is_right(self, particles: Particles) -> bool:
        """Whether the model gives for draws together what it gives for each; refuses guides that draw none."""
        _check_draws([particles], self.gradient)
        if particles.number == 1:
            return True
        at, scale = [0, particles.number - 1], scale_of_caller()
        with isolated(), untouched():
            (first, before), (last, after) = (at_particle(particles, number) for number in at)
        _check_outside(particles, before, after)
        if close(particles.log_p.detach()[at] / scale, torch.cat([first, last])):
            return True
        self._warn("gives other log-probabilities for them together than one by one")
        return False


def _own_scale(run: Particles, of_caller: float) -> float | Tensor:
    """The scale of whole datapoints, a number or one for each ``(N,)``: the caller's, and the model's of all sites."""
    scales, frame = run.scales, run.call.structure.datapoints
    first = scales[0]
    same = all(s is first or torch.equal(torch.as_tensor(s), torch.as_tensor(first)) for s in scales[1:])
    if not same:
        return of_caller
    if not isinstance(first, Tensor):
        return first
    if first.numel() > 1 and (first.dim() < -frame.dim or first.shape[frame.dim] != first.numel()):
        return of_caller
    return first.reshape(-1)


def _through_draws(run: Particles, cotangents: Tensor) -> Tensor:
    """What has the gradient of ``(cotangents * log q).sum()`` by way of the draws, not of the parameters at them."""
    draws = [draw for draw in run.draws if draw.source.requires_grad]
    if not draws:
        return cotangents.new_zeros(())
    sources, leaves = [draw.source for draw in draws], [draw.leaf for draw in draws]
    parts = [(run.log_q_at(draws), leaves), (run.log_q_of_points, sources)]
    total = cotangents.new_zeros(())
    for log_q, inputs in parts:
        if log_q.requires_grad:
            slopes = torch.autograd.grad((cotangents * log_q).sum(), inputs, retain_graph=True, allow_unused=True)
            pairs = zip(sources, slopes, strict=True)
            total = total + sum((source * slope).sum() for source, slope in pairs if slope is not None)
    return total


# What is refused


def _check_structure(structure: Structure) -> None:
    if structure.discrete:
        raise ValueError(
            f"Cannot weigh draws of site {structure.discrete[0].name!r} because it is discrete, so that its draws have "
            'no gradient; try infer={"enumerate": "parallel"} at this site in the model, which sums it out, or '
            "Trace_ELBO."
        )
    if structure.layout is None:
        raise ValueError(
            "Cannot weigh the draws of single datapoints because the model has no local latents, none that lies in a "
            "plate with observed sites; try plate=..., or Trace_ELBO."
        )
    for name in structure.data_plates:
        frame = structure.frames[name]
        raise ValueError(
            f"Cannot weigh the draws of the datapoints of plate {structure.plate!r} because this call sees only "
            f"{frame.size} of the {frame.full_size} entries of plate {name!r} inside of it: a logarithm of weights "
            "that are estimates themselves is no bound; try a call with all entries, or Trace_ELBO."
        )


def _check_outside(particles: Particles, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if what lies outside of the datapoint plate differs between draws inside of it."""
    for name, term in before.items():
        if name in after and not torch.allclose(term, after[name], rtol=1e-4, atol=1e-4):
            raise particles.outside_error(name)


def _check_draws(runs: Sequence[Particles], gradient: str) -> None:
    """Raises a ValueError unless the guide makes draws of its own for each datapoint, which have gradients."""
    drawn = runs[0].drawn
    for name, site in drawn.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"Cannot weigh the guide's draws of site {name!r} because they have no gradient "
                f"({type(site['fn']).__name__}); try a distribution with rsample, or TraceGraph_ELBO."
            )
    if _number(runs) > 1 and not _differ(runs):
        raise ValueError(
            f"Cannot weigh {_number(runs)} draws of the latents in plate {runs[0].call.structure.plate!r} because the "
            "guide gives the same values for all of them: it draws none, or only outside of that plate, as Pyro's "
            "joint autoguides do; try an AmortizedGuide, pyro.infer.autoguide.AutoNormal, or Trace_ELBO."
        )
    if gradient == "dreg" and not _is_separable(runs[0]):
        raise ValueError(
            f"Cannot reparameterise the draws of sites {list(drawn)} doubly because the guide draws some of them given "
            'others, or holds pyro.factor statements; try gradient="plain", or an AmortizedGuide with '
            'family="structured".'
        )


def _number(runs: Sequence[Particles]) -> int:
    return sum(run.number for run in runs)


def _differ(runs: Sequence[Particles]) -> bool:
    """Whether two draws differ in any of the model's latents."""
    for site in runs[0].call.structure.layout.sites:  # type: ignore[union-attr]
        found = [sample_sites(run.guide_trace)[site.name] for run in runs[:2]]
        depth = runs[0].call.structure.depth
        pair = [value_at(found[0], k, depth) for k in (0, 1)] if len(runs) == 1 else [node["value"] for node in found]
        if not torch.equal(*pair):
            return True
    return False


def _is_separable(run: Particles) -> bool:
    """Whether no draw depends on another, which would get the gradient of the other one's weights too."""
    if any(bool(site["fn"].log_prob(site["value"]).any()) for site in run.factors.values()):
        return False
    draws = [draw.source for draw in run.draws if draw.source.requires_grad]
    if len(draws) < 2:
        return True
    numbers = torch.Generator().manual_seed(0)
    ways = [torch.rand(z.shape, generator=numbers).to(z) + 0.5 for z in draws]
    total = torch.stack([(z * way).sum() for z, way in zip(draws, ways, strict=True)]).sum()
    found = torch.autograd.grad(total, draws, retain_graph=True)
    return all(torch.equal(grad, way) for grad, way in zip(found, ways, strict=True))
