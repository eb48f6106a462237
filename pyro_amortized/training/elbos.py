r"""Training objectives that change how the KL divergence of the local latents counts: free bits and capacity."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import torch_item
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_amortized.checks import check_positive, check_real
from pyro_amortized.structure.layout import datapoint_plate
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sites import is_enumerated, sample_sites

__all__ = ["CapacityELBO", "FreeBitsELBO"]


@dataclass
class _SiteKL:
    """The KL divergence of one local site from its prior.

    Attributes:
        mean: Mean over the datapoints of a batch for every dimension of the site, nats.
        weight: Weight of these means in the loss: the number of datapoints, times their scale.
    """

    mean: Tensor
    weight: float


class _LocalKLELBO(TraceMeanField_ELBO):
    """A mean-field ELBO that is trained with another penalty in place of the KL divergence of the local latents."""

    def __init__(self, *, plate: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.plate = plate

    @abstractmethod
    def _penalty(self, kls: list[_SiteKL]) -> Tensor:
        """What is to take the place of ``sum(kl.weight * kl.mean.sum())``."""

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The plain negative ELBO, as of ``TraceMeanField_ELBO``: the same number for every objective."""
        traces = self._get_traces(model, guide, args, kwargs)
        return sum(super(_LocalKLELBO, self)._differentiable_loss_particle(*pair)[0] for pair in traces) / (
            self.num_particles
        )

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[float, Tensor]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        kls = self._local_kls(model_trace, guide_trace)
        change = self._penalty(kls) - sum(kl.weight * kl.mean.sum() for kl in kls)
        return loss + torch_item(change), surrogate + change

    def _local_kls(self, model_trace: Any, guide_trace: Any) -> list[_SiteKL]:
        sites = {name: _without_particles(site) for name, site in sample_sites(model_trace).items()}
        frames: Any = {frame.name: frame for site in sites.values() for frame in site["cond_indep_stack"]}
        plate = datapoint_plate(SimpleNamespace(nodes=sites), frames, self.plate)  # type: ignore[arg-type]
        local = {
            name: site
            for name, site in sites.items()
            if not site["is_observed"] and not is_enumerated(site) and _is_in(plate, site)
        }
        if not local:
            raise ValueError(
                f"Cannot use {type(self).__name__} because the model has no local latents, none that lies in a plate "
                "with observed sites; try plate=..., or TraceMeanField_ELBO."
            )
        return [_site_kl(name, guide_trace.nodes[name], site, plate) for name, site in local.items()]


class FreeBitsELBO(_LocalKLELBO):
    r"""An ELBO in which the first nats of KL divergence are free.

    .. math:: \sum_n E_q[\log p(x_n \mid z_n)] - N \sum_g \max\Big(\lambda,\,
        \frac{1}{N} \sum_n \mathrm{KL}_g\big(q(z_n) \,\|\, p(z_n)\big)\Big)

    with the mean taken over the batch. Groups g are the latent dimensions, or the sites. ``svi.step`` and
    ``differentiable_loss`` use the negative of this; ``loss``, and so ``svi.evaluate_loss``, returns the negative ELBO
    itself, so that losses compare.

    Every local latent needs a closed form of its KL divergence: a mean-field normal guide, and priors of independent
    normals (or log-normals and the like).

    Args:
        free_bits: :math:`\lambda`, nats per group.
        per: What makes a group: ``"dimension"`` or ``"site"``.
        plate: Name of the datapoint plate; by default the outermost one that holds an observed site.
        **options: Those of ``TraceMeanField_ELBO``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> optimizer = pyro.optim.Adam({"lr": 0.01})
        >>> svi = pyro.infer.SVI(model, AmortizedGuide(model), optimizer, FreeBitsELBO(free_bits=0.25))
        >>> loss = svi.step(torch.randn(8))

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, Diederik P. Kingma, Tim Salimans, Rafal
        Jozefowicz, Xi Chen, Ilya Sutskever, Max Welling (2016), https://arxiv.org/abs/1606.04934
    """

    def __init__(self, free_bits: float, per: str = "dimension", *, plate: str | None = None, **options: Any) -> None:
        check_real("free_bits", free_bits, "a number of nats, 0 or more", lambda x: x >= 0, 0.25)
        if per not in ("dimension", "site"):
            raise ValueError(
                f'Cannot give free bits per {per!r} because there is no such share; try per="dimension" or per="site".'
            )
        super().__init__(plate=plate, **options)
        self.free_bits = free_bits
        self.per = per

    def _penalty(self, kls: list[_SiteKL]) -> Tensor:
        means = [kl.mean if self.per == "dimension" else kl.mean.sum() for kl in kls]
        free = [kl.weight * mean.clamp(min=self.free_bits).sum() for kl, mean in zip(kls, means, strict=True)]
        return torch.stack(free).sum()


class CapacityELBO(_LocalKLELBO):
    r"""An ELBO that draws the KL divergence of the local latents to a given value.

    .. math:: \sum_n E_q[\log p(x_n \mid z_n)] - N \gamma\, \Big|\,
        \frac{1}{N} \sum_n \mathrm{KL}\big(q(z_n) \,\|\, p(z_n)\big) - C\,\Big|

    Raise the attribute ``capacity`` while training, as in ``objective.capacity = min(10.0, 0.01 * step)``. Losses and
    requirements are as for :class:`FreeBitsELBO`.

    Args:
        capacity: C, nats per datapoint.
        gamma: :math:`\gamma`, how strongly; at least 1, since the KL divergence could rise for free otherwise.
        plate: Name of the datapoint plate; by default the outermost one that holds an observed site.
        **options: Those of ``TraceMeanField_ELBO``.

    References:
        Understanding disentangling in beta-VAE, Christopher P. Burgess, Irina Higgins, Arka Pal, Loic Matthey, Nick
        Watters, Guillaume Desjardins, Alexander Lerchner (2018), https://arxiv.org/abs/1804.03599
    """

    def __init__(self, capacity: float, gamma: float = 10.0, *, plate: str | None = None, **options: Any) -> None:
        check_real("capacity", capacity, "a number of nats, 0 or more", lambda x: x >= 0, 5.0)
        check_positive("gamma", gamma, 10.0)
        super().__init__(plate=plate, **options)
        self.capacity = capacity
        self.gamma = gamma

    def _penalty(self, kls: list[_SiteKL]) -> Tensor:
        total = torch.stack([kl.mean.sum() for kl in kls]).sum()
        return max(kl.weight for kl in kls) * self.gamma * (total - self.capacity).abs()


_PARTICLES = "num_particles_vectorized"


def _without_particles(site: Site) -> Site:
    """The site without the plate that Pyro puts around everything for ``vectorize_particles``."""
    stack = tuple(frame for frame in site["cond_indep_stack"] if frame.name != _PARTICLES)
    return {**site, "cond_indep_stack": stack}


def _is_in(plate: str | None, site: Site) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def _site_kl(name: str, guide_site: Site, model_site: Site, plate: str | None) -> _SiteKL:
    q, p = (_base(site["fn"]) for site in (guide_site, model_site))
    try:
        if isinstance(q, dist.Delta) or q.event_shape or p.event_shape or guide_site["mask"] is not None:
            raise NotImplementedError
        kl = kl_divergence(q, p)
    except NotImplementedError as error:
        kinds = [type(part).__name__ for part in (q, p)]
        raise ValueError(
            f"Cannot tell the KL divergence of each dimension of site {name!r} because there is no closed form of "
            f'{kinds[0]} against {kinds[1]}, or the site is masked; try family="normal" with a prior of independent '
            "normals or log-normals, or KLAnnealing, which works for every guide."
        ) from error
    rank = kl.dim() - model_site["fn"].event_dim
    outer = {frame.dim for frame in guide_site["cond_indep_stack"] if frame.name in (plate, _PARTICLES)}
    averaged = [axis for axis in range(rank) if axis - rank in outer]
    count = torch.Size([kl.shape[axis] for axis in averaged]).numel()
    scale = guide_site["scale"]
    if isinstance(scale, Tensor) and scale.numel() > 1:  # each datapoint's share is its own
        kl, scale = kl * (scale / scale.mean()).reshape(scale.shape + (1,) * (kl.dim() - rank)), scale.mean()
    return _SiteKL(kl.mean(averaged), count * float(scale))


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn
