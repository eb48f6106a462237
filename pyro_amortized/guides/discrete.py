"""Amortized inference of discrete local latents, beside continuous ones that depend on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyro_amortized.checks import check_positive
from pyro_amortized.encoders.layers import Head, hidden_layers
from pyro_amortized.guides.amortized import AmortizedGuide
from pyro_amortized.guides.base import GuideOptions
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.checks import check_values
from pyro_amortized.guides.posterior import Inferred
from pyro_amortized.guides.sampling import sample_local
from pyro_amortized.inference.base import InferenceStrategy, Objective
from pyro_amortized.structure.discrete import (
    DiscreteSite,
    check_inference,
    distribution,
    mode,
    one_hot,
    sample_discrete,
)
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.masking import NEUTRAL
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import isolated
from pyro_amortized.structure.structure import Structure

__all__ = ["DiscreteAmortizedGuide"]


_INSTEAD = (
    "guide.probabilities(...) and guide.median(...), for draws pyro.infer.Predictive(model, guide=guide, "
    "num_samples=...), or, for diagnostics, exports and refinement, a model that sums the discrete latents out, "
    'infer={"enumerate": "parallel"}, with AmortizedGuide'
)
"""What to try where q of a datapoint is no member of the family."""


class _EncodedJointly(InferenceStrategy):
    """Logits of the discrete latents from the features of a datapoint, phi from these and the discrete latents."""

    def __init__(self, encoder: nn.Module, logits: nn.Module | None, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.logits = logits
        self.head = head

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """The features ``(N, H)``: phi depends on the discrete latents too."""
        return self.encoder(*inputs)


class DiscreteAmortizedGuide(AmortizedGuide):
    r"""Amortized variational inference of discrete and continuous latents of a datapoint together.

    .. math:: q(y, z \mid x) = \prod_i q(y_i \mid x) \; q(z;\, \phi = f(x, y))

    An encoder head gives the probabilities of every Categorical, OneHotCategorical or Bernoulli latent y in the
    datapoint plate, another one, which also sees those y of which a datapoint has one, the parameters of the continuous
    latents z. A latent may be observed in some calls, as the label in a semi-supervised model: then z is inferred from
    the value observed. Set the guide up with a call in which it is not.

    Under ``TraceEnum_ELBO`` the discrete latents are enumerated in the guide: the expectation over them is exact and
    their gradients have no noise. Where there are too many values to enumerate, as in a vector of 50 Bernoulli
    variables, give a ``temperature``: the values are drawn, and their gradient is that of a Gumbel-softmax variable
    (straight through). The ELBO is then still an unbiased estimate for the discrete latents themselves, while its
    gradient is biased, the more so the higher the temperature. Use ``TraceMeanField_ELBO`` with it: Pyro's
    OneHotCategorical has no gradient by value, so that other ELBOs leave that of ``log p(y)`` out.

    The model may not condition y on z where y is enumerated, since Pyro has no dimension left for that; it may with a
    temperature, or where y is observed.

    A discrete latent that need not be inferred is better summed out in the model (``infer={"enumerate":
    "parallel"}``), where any guide of this package serves: that ELBO is tighter.

    Args:
        model: A Pyro model.
        encoder: A module from inputs to features ``(N, H)``, to which the guide adds the heads; an
            :class:`~pyro_amortized.MLPEncoder` by default.
        temperature: Of the Gumbel-softmax variables through which gradients flow, above 0; None (the default) to
            enumerate the values under ``TraceEnum_ELBO``, and to draw them without gradient under other ELBOs.
        conditioned: Which discrete latents each continuous one depends on, by name, as ``{"z1": ["y"], "z2": []}``;
            those not named, and by default all, depend on every discrete latent of which a datapoint has one. For the
            mean-field normal family.
        **options: As for :class:`AmortizedGuide`. Discrete latents that are observed in a call are no encoder input.

    Raises:
        ValueError: If a discrete local latent is of another kind, or was observed when the guide was set up and is
            latent now; without a temperature, if it cannot be enumerated because its values are joined by
            ``to_event``; with one, if it is a Categorical, through whose integers no gradient flows; if ``conditioned``
            names a latent that there is not, or the family couples what it tells apart.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         y = pyro.sample("y", dist.Categorical(torch.ones(2)))
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(10.0 * y + z, 1.0), obs=x)
        >>> guide = DiscreteAmortizedGuide(model)
        >>> elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> x = torch.tensor([0.0, 1.0, 11.0])
        >>> losses = [svi.step(x) for _ in range(300)]
        >>> guide.probabilities(x)["y"].round().long()
        tensor([[1, 0],
                [1, 0],
                [0, 1]])

    References:
        Semi-Supervised Learning with Deep Generative Models, Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed,
        Max Welling (2014), https://arxiv.org/abs/1406.5298

        Categorical Reparameterization with Gumbel-Softmax, Eric Jang, Shixiang Gu, Ben Poole (2017),
        https://arxiv.org/abs/1611.01144
    """

    _shares_heads = False

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None = None,
        *,
        temperature: float | None = None,
        conditioned: Mapping[str, Sequence[str]] | None = None,
        **options: Unpack[GuideOptions],
    ) -> None:
        super().__init__(model, encoder, **options)
        _check_conditioned(conditioned)
        self._conditioned = {name: frozenset(on) for name, on in (conditioned or {}).items()}
        if temperature is not None:  # by which gradients are divided
            check_positive("temperature", temperature, 0.5)
        self.temperature = temperature
        self._structures = StructureReader(options.get("plate"), discrete=True, groups=options.get("groups"))
        self._discrete: tuple[DiscreteSite, ...] = ()

    # Building

    def _build(self, call: Call) -> None:
        for site in call.structure.discrete:
            check_inference(site, self.temperature)
        self._discrete = call.structure.discrete
        super()._build(call)

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        like = (
            init_loc if structure.layout is not None else next((x for x in inputs if x.is_floating_point()), init_loc)
        )
        encoder = self._encoder_spec[0] or self._default_encoder(inputs, like)
        features = self._first_features(encoder, inputs)
        if isinstance(features, tuple) or features.dim() != 2:
            raise ValueError(
                "Cannot use this encoder for discrete and continuous latents because heads are added to its features; "
                "try an encoder from (N, ...) to (N, H), or AmortizedGuide if no latent is discrete."
            )
        self._check_features(features, inputs, structure)
        logits = head = None
        if self._discrete:
            logits = Head(features, self._discrete[-1].logits.stop)
        self._check_groups(structure)
        if structure.layout is not None:
            head = self._conditional_head(features)
            last: Any = head[-1]
            with torch.no_grad():
                last.bias.copy_(self.family.initial(init_loc.mean(0), self.init_scale))
        return _EncodedJointly(encoder, logits, head)

    def _conditional_head(self, features: Tensor) -> nn.Sequential:
        """From features and indicators of discrete latents to phi; a hidden layer lets the ones act on the others."""
        num_features = features.shape[1]
        num_indicators = sum(site.num_categories * site.logits.shape[:-1].numel() for site in self._known)
        if not num_indicators:
            return nn.Sequential(Head(features, self.family.num_params))
        hidden = hidden_layers(num_features + num_indicators, (num_features,)).to(features)
        with torch.no_grad():
            first = hidden(torch.cat([features, features.new_zeros(len(features), num_indicators)], -1))
        return nn.Sequential(*hidden, Head(first, self.family.num_params))

    def _check_groups(self, structure: Structure) -> None:
        """Raises a ValueError unless the latents that ``conditioned`` names are there, and can be told apart."""
        layout = structure.layout
        continuous = [] if layout is None else [site.name for site in layout.sites]
        discrete = [site.name for site in self._known]
        unknown = sorted({*self._conditioned} - {*continuous}) or sorted(
            {name for on in self._conditioned.values() for name in on} - {*discrete}
        )
        if unknown:
            raise ValueError(
                f"Cannot condition as conditioned=... says because of {unknown}: keys are continuous latents, "
                f"{continuous}, and values lists of discrete ones of which a datapoint has one, {discrete}; try names "
                "among these."
            )
        if layout is not None and len(self._groups(layout)) > 1 and not self.family.is_mean_field:
            raise ValueError(
                f"Cannot condition {continuous} on other discrete latents each because {type(self.family).__name__} "
                'couples them; try family="normal".'
            )

    def _groups(self, layout: SiteLayout) -> list[tuple[SiteLayout, frozenset[str]]]:
        """The continuous latents that depend on the same discrete ones, and the names of these."""
        every = frozenset(site.name for site in self._known)
        groups: dict[frozenset[str], list[LocalSite]] = {}
        for site in layout.sites:
            groups.setdefault(self._conditioned.get(site.name, every), []).append(site)
        if len(groups) == 1:
            return [(layout, next(iter(groups)))]
        return [(replace(layout, sites=tuple(sites)), on) for on, sites in groups.items()]

    @property
    def _known(self) -> list[DiscreteSite]:
        """The discrete latents that q(z) is conditioned on: those that have one value for each datapoint."""
        return [site for site in self._discrete if not site.logits.plates]

    # One call

    @property
    def _needs_observed(self) -> bool:
        return True

    @property
    def _hidden(self) -> Collection[str]:
        return [*super()._hidden, *(site.name for site in self._discrete)]

    def _phi(self, call: Call) -> Tensor:
        names = [site.name for site in self._discrete]
        if not names:
            _, features, _ = self._features(call)
            phi = self._conditional_phi(call, (), features, {})
            return phi.reshape(-1, phi.shape[-1])
        raise ValueError(
            f"Cannot give variational parameters per datapoint because they depend on discrete latents {names}; try "
            f"{_INSTEAD}."
        )

    def _features(self, call: Call) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Inputs; features and logits with the datapoints at their plate's dimension."""
        inputs, strategy = self._inputs(call), self.inference
        frame, features = call.structure.datapoints, strategy(inputs, call.index)
        self._check_features(features, inputs, call.structure)
        features = features.reshape(features.shape[:1] + (1,) * (-frame.dim - 1) + features.shape[1:])
        return inputs, features, strategy.logits(features) if self._discrete else features  # type: ignore[operator]

    def _latent(self, call: Call) -> dict[str, DiscreteSite]:
        """The discrete sites that are latent in this call, by name."""
        latent = {site.name: site for site in call.structure.discrete}
        result = {}
        for site in self._discrete:
            now = latent.pop(site.name, None)
            if now is not None and now.same_as(site):
                result[site.name] = replace(site, weight=now.weight)
            elif now is not None or site.name not in (call.structure.observed or {}):
                raise ValueError(
                    f"Cannot run this guide because discrete latent {site.name!r} has changed since it was set up, or "
                    "is neither latent nor observed any more; try the same structure in every call."
                )
        if latent:
            raise ValueError(
                f"Cannot run this guide because discrete sites {sorted(latent)} were not latent when it was set up; "
                "try guide.setup(...) with a call in which they are not observed."
            )
        return result

    def _observed(self, call: Call) -> dict[str, Tensor]:
        """Values of the discrete sites that are observed in this call, datapoints at their plate's dimension."""
        dims = (1,) * (-call.structure.datapoints.dim - 1)
        result = {}
        for site in self._known:
            value = (call.structure.observed or {}).get(site.name)
            if value is not None:
                num_events = site.num_events + (site.kind == "one_hot")
                result[site.name] = value.reshape(value.shape[:1] + dims + value.shape[value.dim() - num_events :])
        return result

    def _conditional_phi(
        self, call: Call, inputs: Any, features: Tensor, values: dict[str, Tensor], on: Collection[str] = ()
    ) -> Tensor:
        """phi of the continuous latents given the discrete ones named in ``on``, ``(*batch, P)``."""
        labels = []
        for site in self._known:
            width = site.num_categories * site.logits.shape[:-1].numel()
            unknown = features.new_zeros(features.shape[:-1] + (width,))
            labels.append(one_hot(site, values[site.name], features) if site.name in on else unknown)
        batch = torch.broadcast_shapes(features.shape[:-1], *(label.shape[:-1] for label in labels))
        parts = [part.expand(batch + part.shape[-1:]) for part in (features, *labels)]
        phi = self.inference.head(torch.cat(parts, -1))  # type: ignore[operator]
        check_values(phi, self._family, self.inference, inputs)
        layout: Any = call.structure.layout
        return phi if layout.present is None else self._family.masked(phi, layout.batch(layout.present))

    def _sample_local(self, call: Call) -> dict[str, Tensor]:
        layout = call.structure.layout
        if layout is None and not self._discrete:
            return {}
        latent = self._latent(call)
        inputs, features, logits = self._features(call)
        with call.plates[call.structure.datapoints.name]:
            result = {n: sample_discrete(s, logits, call.plates, self.temperature) for n, s in latent.items()}
            values = self._observed(call) | result
            for part, on in [] if layout is None else self._groups(layout):
                phi = self._conditional_phi(call, inputs, features, values, on)
                name = f"{self._pyro_name}_latent"
                result.update(sample_local(part, self._sampling_family, phi, call.plates, name))
        return result

    # What is known of the posterior

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Inferred:
        inferred = super()._infer(args, kwargs, **options)
        names = [site.name for site in inferred.structure.discrete]
        cause = f"its local latents {names} are discrete" if names else inferred.cause
        return replace(inferred, cause=cause, remedy=_INSTEAD if names else inferred.remedy)

    def probabilities(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """q(y | x) of the discrete latents of a call, differentiable.

        Returns:
            Probabilities by site name: ``(*plates, *events, K)`` of K categories, ``(*plates, *events)`` of a one for
            Bernoulli sites.

        Raises:
            ValueError: If the guide has no discrete latents, as where the model sums them out.
        """
        with isolated():
            call = self._read(args, kwargs)
            if not self._discrete:
                summed = [*call.structure.enumerated]
                cause = f"the model sums out {summed}" if summed else "the model has none"
                raise ValueError(
                    f"Cannot give probabilities of discrete latents because this guide guides none: {cause}; try "
                    'sites without infer={"enumerate": "parallel"} in the model, or for latents that it sums out '
                    "pyro.infer.infer_discrete."
                )
            latent, logits = self._latent(call), self._features(call)[2]
            return {
                name: torch.sigmoid(x).squeeze(-1) if site.kind == "bernoulli" else x.softmax(-1)
                for name, site in latent.items()
                for x in [site.logits.unflatten(logits)]
            }

    def _local_quantiles(self, quantiles: Sequence[float] | Tensor, call: Call) -> dict[str, Tensor]:
        """The most probable discrete values, and quantiles of the continuous latents given these."""
        values, given = self._local_values(
            call, mode, lambda phi: self._family.quantile(phi, torch.as_tensor(quantiles).to(phi))
        )
        return {name: value.expand(len(quantiles), *value.shape) for name, value in values.items()} | given

    def _local_draw(self, call: Call) -> dict[str, Tensor]:
        values, given = self._local_values(
            call,
            lambda site, logits: distribution(replace(site, weight=NEUTRAL), logits).sample(),
            lambda phi: self.family(phi).sample(),
        )
        return values | given

    def _local_values(
        self, call: Call, choose: Callable[[DiscreteSite, Tensor], Tensor], flat: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of the discrete latents by site, chosen by their logits, and of the continuous ones given these.

        Args:
            call: The call.
            choose: From a site and its logits to its value.
            flat: From phi ``(N, P)`` to flat latents ``(*, N, D)``.
        """
        layout = call.structure.layout
        if layout is None and not self._discrete:
            return {}, {}
        latent = self._latent(call)
        inputs, features, logits = self._features(call)
        values = {name: choose(site, site.logits.unflatten(logits)) for name, site in latent.items()}
        given: dict[str, Tensor] = {}
        for part, on in [] if layout is None else self._groups(layout):
            phi = self._conditional_phi(call, inputs, features, self._observed(call) | values, on)
            given.update(part.values(flat(phi.reshape(-1, phi.shape[-1]))))
        return values, given


def _check_conditioned(conditioned: Any) -> None:
    """Raises a ValueError unless it maps names to lists of names."""
    usable = conditioned is None or (
        isinstance(conditioned, Mapping)
        and all(isinstance(on, Collection) and not isinstance(on, str) for on in conditioned.values())
    )
    if not usable:
        raise ValueError(
            f"Cannot condition by conditioned={conditioned!r} because lists of names are wanted by name; try "
            '{"z": ["y"]}, or None for all.'
        )
