r"""Normalizing flows: noise pushed through transforms that a context vector shapes, then scaled and shifted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_widths
from pyro_amortized.families.base import VariationalFamily, register_family
from pyro_amortized.families.normal import MultivariateNormal, Normal

__all__ = ["Flow"]


_BOUND = 5.0
"""Splines act within this distance from 0 and leave the tails as they are."""


@register_family("flow")
class Flow(VariationalFamily):
    r"""A conditional normalizing flow.

    .. math:: z = \mu + L \, T_K(\dots T_1(\epsilon; c) \dots; c), \quad \epsilon \sim N(0, I),
        \quad \phi = (\mu, L, c)

    Location, the lower triangular L (see :class:`~pyro_amortized.MultivariateNormal`) and context :math:`c` belong to
    the datapoint; the networks in the transforms are shared by all and trained with the guide. So refinement, local
    optima and gaps work on phi as they do for every family; they leave the networks as they are.

    With affine transforms, whatever their networks have learned, the flow holds every full-rank normal: their outputs
    are multiplied by :math:`1 + c_1`, which a datapoint can set to zero. So its approximation gap is never the larger.

    Draws come with their log-densities in one pass, at the cost of the networks. The log-density of any other point
    takes an inversion, which for autoregressive transforms costs D passes, and which planar ones do not have. New flows
    are close to the identity, but for planar ones. An affine transform scales by at most :math:`e^{2}`, smoothly
    limited, without which training diverges.

    Args:
        latent_dim: D; ``num_params`` is 2D + D(D - 1)/2 + ``context_dim``, or 2D + ``context_dim``.
        transform: ``"affine_autoregressive"``, ``"spline_autoregressive"``, ``"affine_coupling"`` (from two dimensions
            on) or ``"planar"``; ``"zuko.NSF"`` or another of zuko's flows, if zuko is installed; or a function of D and
            ``context_dim`` to a conditional transform of Pyro's, or to a flow or lazy transform of zuko's, which noise
            is then pushed through in the direction that zuko takes from data to noise: the cheap one. With one
            dimension, where autoregressive ones have nothing to condition on, Pyro's are splines.
        num_transforms: K.
        context_dim: Length of the context.
        hidden_dims: Widths of the hidden layers of each transform's network, at least D for autoregressive ones.
        covariance: ``"full"``; or ``"diagonal"`` for a diagonal L, with fewer parameters where D is large.

    Raises:
        ValueError: If the transform is unknown or does not fit D, or the covariance is neither.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, Diederik P. Kingma, Tim Salimans, Rafal
        Jozefowicz, Xi Chen, Ilya Sutskever, Max Welling (2016), https://arxiv.org/abs/1606.04934
        Neural Spline Flows, Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios (2019),
        https://arxiv.org/abs/1906.04032
        Density estimation using Real NVP, Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio (2016),
        https://arxiv.org/abs/1605.08803
        Zuko: Normalizing flows in PyTorch, François Rozet and others (2022), https://github.com/probabilists/zuko
        Variational Inference with Normalizing Flows, Danilo Jimenez Rezende, Shakir Mohamed (2015),
        https://arxiv.org/abs/1505.05770
    """

    loc_first = True
    fast_log_prob = False

    def __init__(
        self,
        latent_dim: int,
        transform: str | Callable[[int, int], nn.Module] = "affine_autoregressive",
        num_transforms: int = 3,
        context_dim: int = 16,
        hidden_dims: Sequence[int] = (64,),
        covariance: str = "full",
    ) -> None:
        super().__init__(latent_dim)
        if covariance not in _AFFINE:
            raise ValueError(
                f"Cannot build a flow of covariance={covariance!r} because there is none of that name; try one of "
                f"{sorted(_AFFINE)}."
            )
        if isinstance(transform, str) and transform not in _TRANSFORMS and not transform.startswith(_ZUKO):
            raise ValueError(
                f"Cannot build a flow of {transform!r} because no transform has that name; try one of "
                f"{sorted(_TRANSFORMS)}, {_ZUKO}NSF, or a function of latent_dim and context_dim to a conditional "
                "transform."
            )
        num_transforms = check_count("num_transforms", num_transforms, 1, 3)
        context_dim = check_count("context_dim", context_dim, 1, 16)
        hidden_dims = check_widths("hidden_dims", hidden_dims)
        layers: list[nn.Module]
        if isinstance(transform, str) and transform.startswith(_ZUKO):
            flow = _zuko_flow(transform.removeprefix(_ZUKO))
            options = {"transforms": 1, "hidden_features": list(hidden_dims)}
            layers = [_Lazy(flow(latent_dim, context_dim, **options)) for _ in range(num_transforms)]
        elif isinstance(transform, str):
            build = _TRANSFORMS[transform]
            layers = [build(latent_dim, context_dim, list(hidden_dims)) for _ in range(num_transforms)]
            _scale_outputs(layers, 0.1 if transform == "planar" else 0.0)  # planar ones have no gradient at 0
        else:
            layers = [_conditional(transform(latent_dim, context_dim)) for _ in range(num_transforms)]
        self.affine = _AFFINE[covariance](latent_dim)
        self.num_params = self.affine.num_params + context_dim
        self.noise_dim = latent_dim
        self.context_dim = context_dim
        self.layers = nn.ModuleList(layers)
        self.register_buffer("reverse", torch.arange(latent_dim - 1, -1, -1))

    def _split(self, phi: Tensor) -> tuple[Tensor, list[Any]]:
        """phi of the affine map, and the transforms at the context, with a reversal of the dimensions between them."""
        affine, context = phi.split([self.affine.num_params, self.context_dim], -1)
        context = context.to(next(self.parameters()))
        conditioned: list[Any] = []
        for layer in self.layers:
            if conditioned and self.latent_dim > 1:
                conditioned.append(transforms.Permute(self.reverse))
            conditioned.append(layer.condition(context))  # type: ignore[operator]
        return affine, conditioned

    def forward(self, phi: Tensor) -> dist.TorchDistribution:
        """The distribution at ``phi``, in the precision of the networks."""
        affine, conditioned = self._split(phi)
        affine = affine.to(next(self.parameters()))
        loc = affine[..., : self.latent_dim]
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(base, [*conditioned, self._last(affine)])

    def _last(self, affine: Tensor) -> Any:
        """The affine map, as a transform."""
        loc = affine[..., : self.latent_dim]
        if isinstance(self.affine, MultivariateNormal):
            return _LowerAffine(loc, self.affine.scale_tril(affine), cache_size=1)
        return transforms.AffineTransform(loc, self.affine.marginals(affine)[1], event_dim=1, cache_size=1)

    def _push(self, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws ``(K, *, D)`` and the log absolute determinant of their Jacobian ``(K, *)``."""
        affine, conditioned = self._split(phi)
        x = noise.to(next(self.parameters()))
        log_det = affine[..., self.latent_dim : 2 * self.latent_dim].sum(-1).expand(noise.shape[:-1])
        for transform in conditioned:
            y = transform(x)
            part = transform.log_abs_det_jacobian(x, y).to(log_det)
            log_det = log_det + (part.sum(-1) if part.dim() == x.dim() else part)  # splines give one per dimension
            x = y
        return self.affine.rsample(affine, x.to(affine)), log_det

    def rsample(self, phi: Tensor, noise: Tensor) -> Tensor:
        """Turns noise ``(K, *, D)`` into draws."""
        return self._push(phi, noise)[0]

    def sample_and_log_prob(
        self, phi: Tensor, noise: Tensor | int, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in one pass; with a ``path`` of its own by inversion."""
        if path is not None:
            return super().sample_and_log_prob(phi, noise, path)
        if isinstance(noise, int):
            noise = torch.randn(noise, *phi.shape[:-1], self.latent_dim, dtype=phi.dtype, device=phi.device)
        z, log_det = self._push(phi, noise)
        return z, dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - log_det

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """phi at the given location and scale, with a context of zeros."""
        context = loc.new_zeros(*loc.shape[:-1], self.context_dim)
        return torch.cat([self.affine.initial(loc, scale), context], -1)

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor:
        """phi of the best normal; affine transforms are the identity there."""
        context = loc.new_zeros(*loc.shape[:-1], self.context_dim)
        context[..., 0] = -1.0
        return torch.cat([self.affine.laplace(loc, precision), context], -1)


_AFFINE: dict[str, Callable[[int], Normal | MultivariateNormal]] = {"diagonal": Normal, "full": MultivariateNormal}


class _LowerAffine(transforms.LowerCholeskyAffine):
    """Pyro's affine map, with a Jacobian of its own for every datapoint."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


_LOG_SCALE = 2.0
"""Limit on the log scales of affine transforms: a few draws far out would blow up the others' gradients."""


class _Gated(nn.Module):
    """The network of a conditional affine transform, times one plus the first entry of the context."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.permutation = getattr(network, "permutation", None)

    def get_permutation(self) -> Tensor | None:
        """The order of the dimensions, which autoregressive transforms ask for."""
        return self.permutation

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Location and logarithm of the scale, which stays within its limit."""
        gate = 1.0 + context[..., :1]
        loc, log_scale = self.network(x, context=context)
        return gate * loc, _LOG_SCALE * (gate * log_scale / _LOG_SCALE).tanh()


def _affine_autoregressive(dim: int, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    if dim == 1:
        return _spline_autoregressive(dim, context_dim, hidden_dims)
    widths = [max(width, dim) for width in hidden_dims]
    return _gated(transforms.conditional_affine_autoregressive(dim, context_dim, widths))


def _gated(transform: Any) -> nn.Module:
    transform.nn = _Gated(transform.nn)
    return transform


def _spline_autoregressive(dim: int, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    if dim == 1:
        return transforms.conditional_spline(dim, context_dim, hidden_dims, bound=_BOUND)
    widths = [max(width, dim) for width in hidden_dims]
    return transforms.conditional_spline_autoregressive(dim, context_dim, widths, bound=_BOUND)


def _affine_coupling(dim: int, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    if dim == 1:
        raise ValueError(
            "Cannot build a flow of affine couplings over one latent dimension because there is nothing to couple; try "
            '"spline_autoregressive".'
        )
    return _gated(transforms.conditional_affine_coupling(dim, context_dim, hidden_dims))


def _planar(dim: int, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    return _Planar(transforms.conditional_planar(dim, context_dim, hidden_dims).nn)


class _Planar(transforms.ConditionalPlanar):
    """Pyro's planar transform, with an error that says why a density cannot be had."""

    def condition(self, context: Tensor) -> Any:
        transform = super().condition(context)
        transform._inverse = _no_inverse
        return transform


def _no_inverse(y: Tensor) -> Tensor:
    raise NotImplementedError(
        "Cannot evaluate the log-density of a flow at points that are not its own draws because planar transforms have "
        'no inverse; try transform="affine_autoregressive".'
    )


_TRANSFORMS: dict[str, Callable[[int, int, list[int]], nn.Module]] = {
    "affine_autoregressive": _affine_autoregressive,
    "spline_autoregressive": _spline_autoregressive,
    "affine_coupling": _affine_coupling,
    "planar": _planar,
}


# Flows of zuko


_ZUKO = "zuko."


def _zuko_flow(name: str) -> Callable[..., nn.Module]:
    """A class of zuko's flows. Importing zuko switches torch's validation off for everybody; it is put back on here."""
    validated = torch.distributions.Distribution._validate_args
    try:
        flow = getattr(importlib.import_module("zuko.flows"), name, None)
    except ImportError as error:
        raise ValueError(
            f'Cannot build a flow of "{_ZUKO}{name}" because zuko is not installed; try pip install zuko.'
        ) from error
    finally:
        torch.distributions.Distribution.set_default_validate_args(validated)
    if flow is None:
        raise ValueError(f'Cannot build a flow of "{_ZUKO}{name}" because zuko has no such flow; try "{_ZUKO}NSF".')
    return flow


def _conditional(layer: Any) -> nn.Module:
    """A module with ``condition``, as Pyro's conditional transforms have, from one of these or from a zuko flow."""
    if hasattr(layer, "condition"):
        return layer
    if isinstance(layer, nn.Module):
        return _Lazy(layer)
    raise ValueError(
        f"Cannot build a flow of {layer!r} because it takes no context; try a conditional transform of Pyro's, such as "
        "pyro.distributions.transforms.conditional_spline, or a flow of zuko's."
    )


class _Lazy(nn.Module):
    """A flow or lazy transform of zuko's as a conditional transform."""

    def __init__(self, lazy: nn.Module) -> None:
        super().__init__()
        self.lazy: Any = getattr(lazy, "transform", lazy)

    def condition(self, context: Tensor) -> _Conditioned:
        """The transform at a context."""
        return _Conditioned(self.lazy(context))


class _Conditioned(torch.distributions.Transform):
    """A transform of zuko's, which computes its Jacobian together with its value."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, transform: Any) -> None:
        super().__init__(cache_size=1)
        self.transform = transform
        self._last: tuple[Tensor, Tensor] | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.transform.call_and_ladj(x)
        self._last = (x, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``(*)`` for x of shape ``(*, D)``."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        return self.transform.log_abs_det_jacobian(x, y)


def _scale_outputs(layers: Sequence[nn.Module], factor: float) -> None:
    """Makes the outputs of the transforms' networks small, so that the flow is close to the identity."""
    for layer in layers:
        *_, last = (module for module in layer.modules() if isinstance(module, nn.Linear))
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(factor)
