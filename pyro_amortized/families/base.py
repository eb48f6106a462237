"""The abstract variational family and the registry of named ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_amortized.checks import check_count

__all__ = ["FamilySpec", "VariationalFamily", "build_family", "register_family"]


class VariationalFamily(nn.Module, ABC):
    r"""A parametric set of distributions :math:`q_\phi(z)` over a flat unconstrained latent :math:`z \in R^D`.

    To write a member, set ``num_params`` and implement :meth:`forward`. That is enough for training and for every
    diagnostic. Override :meth:`initial` to start at a given location and scale (the default starts at zeros),
    :attr:`rsample` with ``noise_dim`` to let randomised quasi-Monte-Carlo drive the sampling, and :meth:`quantile`
    where quantiles are known.

    Args:
        latent_dim: D, the number of unconstrained latent dimensions per datapoint.

    Attributes:
        latent_dim: D.
        num_params: P, the length of phi.
        noise_dim: Number of standard normal variables that :attr:`rsample` turns into one draw, or None if the family
            can only draw its own noise.
        fast_log_prob: Whether the log-density of any point costs no more than a draw. If not, gradients are the plain
            ones, of draws and their log-densities together (:meth:`sample_and_log_prob`).
        loc_first: Whether the first D entries of phi are a location, added to every draw; optimisation then works in
            units of the posterior's own covariance.
        multimodal: Whether members can have several modes; optimisation then also starts at all that can be found
            (:meth:`laplace_of_modes`).
        draws_per_noise: Number of draws that :meth:`weighted_draws` makes of one noise.
        is_mean_field: Whether dimensions are independent normals, of locations and scales ``marginals(phi)``, with
            :math:`\phi = (\mu, \log\sigma)`: every site is then sampled on its own, and Pyro's analytic KL divergences
            apply.
        takes_newton_steps: Whether a member can be moved by steps in units of its noise, ``in_units(phi, gradient)``
            and ``moved(phi, shift, precision)``, as :class:`~pyro_amortized.Newton` moves it.
        shares_heads: Whether dimensions can share the head of an encoder, as steps of a sequence and entries of a plate
            do: phi holds the location and the log scale of every dimension, and then an entry for each of
            :attr:`couplings`; :meth:`resized` makes the family for another number of them.
        rsample: A function of phi ``(*, P)`` and standard normal noise ``(K, *, noise_dim)`` that makes draws
            ``(K, *, D)``, differentiably in phi; of families with ``noise_dim``.
        takes_parents: Whether the class is constructed from D and the parents of every dimension, which guides find
            from the model's dependence.
    """

    num_params: int
    noise_dim: int | None = None
    loc_first: bool = False
    fast_log_prob: bool = True
    takes_parents: bool = False
    multimodal: bool = False
    draws_per_noise: int = 1
    is_mean_field: bool = False
    takes_newton_steps: bool = False
    shares_heads: bool = False
    rsample: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim, 1, 2)

    @abstractmethod
    def forward(self, phi: Tensor) -> TorchDistribution:
        """The distribution at ``phi``.

        Args:
            phi: Variational parameters of shape ``(*, P)``.

        Returns:
            A reparameterised distribution of batch shape ``(*)`` and event shape ``(D,)``.
        """

    @property
    def locations(self) -> slice:
        """The entries of phi that are locations in latent space, a multiple of D; optimised in units of the posterior.

        The first D if :attr:`loc_first`, otherwise none unless a member knows better.
        """
        return slice(0, self.latent_dim if self.loc_first else 0)

    def centres(self, phi: Tensor) -> Tensor:
        """Where in latent space modes may be, apart from the mean: diagnostics look for modes from there.

        Args:
            phi: Variational parameters of shape ``(*, P)``.

        Returns:
            Points of shape ``(M, *, D)``; none unless a member knows some.
        """
        return phi.new_zeros(0, *phi.shape[:-1], self.latent_dim)

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """A start: phi of the member closest to independent normals.

        Args:
            loc: Locations of shape ``(*, D)``.
            scale: Standard deviation of every dimension.

        Returns:
            phi of shape ``(*, P)``; zeros unless a member knows better.
        """
        return loc.new_zeros(*loc.shape[:-1], self.num_params)

    def laplace(self, loc: Tensor, precision: Tensor) -> Tensor | None:
        """The best member for a normal posterior, a start for optimisation; None unless a member knows one.

        Args:
            loc: Mean of the posterior, ``(*, D)``.
            precision: Its precision matrix, ``(*, D, D)``.

        Returns:
            phi of shape ``(*, P)``.
        """
        return None

    def laplace_of_modes(self, locs: Tensor, precisions: Tensor, shares: Tensor) -> Tensor | None:
        """A start for a posterior with several modes; None unless a member can hold them.

        Args:
            locs: M modes of the posterior, ``(M, *, D)``.
            precisions: Its precision matrices there, ``(M, *, D, D)``.
            shares: Their shares of the posterior, ``(M, *)``, zero where there are fewer modes.

        Returns:
            phi of shape ``(*, P)``.
        """
        return None

    def sample_and_log_prob(
        self, phi: Tensor, noise: Tensor | int, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities, for which a family may know a shorter way.

        Args:
            phi: Variational parameters of shape ``(*, P)``.
            noise: Standard normal noise of shape ``(K, *, noise_dim)``, or a number K of draws.
            path: The same phi once more, to be used for the draws alone.

        Returns:
            Draws of shape ``(K, *, D)`` and log-densities of shape ``(K, *)``.
        """
        q = self(phi)
        if isinstance(noise, int):
            z = (q if path is None else self(path)).rsample((noise,))
        else:
            z = self.rsample(phi if path is None else path, noise)
        return z, q.log_prob(z)

    def log_conditionals(self, phi: Tensor, z: Tensor) -> Tensor | None:
        r"""The terms of the log-density in order, :math:`\log q(z_d \mid z_{1:d-1})`, whose sum it is.

        Needed only for models all of whose sites lie in a plate inside of the datapoint plate.

        Args:
            phi: Variational parameters of shape ``(*, P)``.
            z: Points of shape ``(K, *, D)``.

        Returns:
            Terms of shape ``(K, *, D)``; None unless a member knows them.
        """
        return None

    @property
    def couplings(self) -> tuple[Tensor, Tensor]:
        """Of families that share heads, the dimensions that further entries of phi couple, and to which, ``(E,)``."""
        nothing = torch.zeros(0, dtype=torch.long)
        return nothing, nothing

    def resized(self, latent_dim: int, find_parents: Callable[[], Tensor]) -> VariationalFamily:
        """The family of another number of dimensions, of families that share heads.

        Args:
            latent_dim: D, now.
            find_parents: Finds the parents of every dimension, ``(D, D)``.
        """
        return type(self)(latent_dim)

    def weighted_draws(
        self, phi: Tensor, noise: Tensor, path: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Draws that count differently, for refinement and local optima; None where all count alike.

        Args:
            phi: Variational parameters of shape ``(*, P)``.
            noise: Standard normal noise of shape ``(K, *, noise_dim)``.
            path: The same phi once more, to be used for the draws and weights alone.

        Returns:
            Draws of shape ``(M, *, D)``, their log-densities and their weights of shape ``(M, *)``; the weights of each
            datapoint sum to 1.
        """
        return None

    def quantile(self, phi: Tensor, probs: Tensor, num_samples: int = 1000) -> Tensor:
        """Marginal quantiles of every latent dimension, from draws unless a member knows them exactly.

        Args:
            phi: Variational parameters of shape ``(*, P)``.
            probs: Probabilities of shape ``(Q,)``.
            num_samples: Number of draws.

        Returns:
            Quantiles of shape ``(Q, *, D)``.
        """
        draws = self(phi).sample((num_samples,))
        return draws.quantile(probs.to(draws), dim=0)

    def masked(self, phi: Tensor, present: Tensor) -> Tensor:
        """phi with a standard normal for masked latents, of which nothing is known, where the family allows it.

        Args:
            phi: Variational parameters of shape ``(*, P)``.
            present: Which latents are not masked, ``(*, D)``.

        Returns:
            phi of shape ``(*, P)``; as it is unless a member knows better.
        """
        return phi

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"latent_dim={self.latent_dim}, num_params={self.num_params}"


FamilySpec = str | VariationalFamily | Callable[[int], VariationalFamily]
"""A registered name, a family, or a function from ``latent_dim`` to a family."""

_REGISTRY: dict[str, Callable[[int], VariationalFamily]] = {}


def register_family(
    name: str,
) -> Callable[[Callable[[int], VariationalFamily]], Callable[[int], VariationalFamily]]:
    """Decorator that makes a family available by name to every guide.

    Args:
        name: The string that guides accept as ``family``.
    """

    def register(factory: Callable[[int], VariationalFamily]) -> Callable[[int], VariationalFamily]:
        _REGISTRY[name] = factory
        return factory

    return register


def check_family_spec(spec: FamilySpec) -> None:
    """Raises a ValueError when ``spec`` is an unknown family name, before any model has run."""
    if isinstance(spec, str) and spec not in _REGISTRY:
        raise ValueError(
            f"Cannot use family {spec!r} because no variational family has that name; "
            f"try one of {sorted(_REGISTRY)} or pass a VariationalFamily."
        )
    if isinstance(spec, type) and not issubclass(spec, VariationalFamily):
        raise ValueError(
            f"Cannot use family {spec.__name__} of {spec.__module__} because it is no VariationalFamily; try one of "
            f"{sorted(_REGISTRY)}, or a class of pyro_amortized."
        )
    if not isinstance(spec, str) and not callable(spec):
        raise ValueError(
            f"Cannot use family {spec!r} because it is neither a name nor a VariationalFamily; "
            f"try one of {sorted(_REGISTRY)}."
        )


def build_family(
    spec: FamilySpec, latent_dim: int, find_parents: Callable[[], Tensor] | None = None
) -> VariationalFamily:
    """Builds the family that a guide was asked for.

    Args:
        spec: A registered name, a :class:`VariationalFamily`, or a function from ``latent_dim`` to one.
        latent_dim: D, as found from the model.
        find_parents: Finds which dimensions each one depends on, ``(D, D)``; called only for a family that takes them.

    Returns:
        A family over D dimensions.

    Raises:
        ValueError: If the name is unknown or the family's ``latent_dim`` is not D.
    """
    check_family_spec(spec)
    factory: Any = _REGISTRY[spec] if isinstance(spec, str) else spec
    if isinstance(factory, VariationalFamily):
        family = factory
    elif find_parents is not None and getattr(factory, "takes_parents", False):
        family = factory(latent_dim, find_parents())
    else:
        family = factory(latent_dim)
    if not isinstance(family, VariationalFamily):
        raise ValueError(
            f"Cannot use family {spec!r} because it gave a {type(family).__name__}; "
            "try a function that returns a VariationalFamily."
        )
    if family.latent_dim != latent_dim:
        raise ValueError(
            f"Cannot use {type(family).__name__}(latent_dim={family.latent_dim}) because the model's local latents "
            f"have {latent_dim} unconstrained dimensions per datapoint; try latent_dim={latent_dim}, or pass the class."
        )
    return family
