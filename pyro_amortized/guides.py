"""The Pyro guides: each puts together a layout, a variational family and an inference strategy.

A guide samples the global latents with an autoguide of Pyro's, asks its strategy for phi, one row per datapoint, and
samples the local latents from its family at phi, inside the datapoint plate, so that subsampling scales them as it
scales the model.
"""

from __future__ import annotations

import inspect
import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_feasible
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.kl import register_kl

from pyro_amortized.encoders import MLPEncoder, StandardizedEncoder
from pyro_amortized.families import Normal, VariationalFamily, build_family
from pyro_amortized.families.base import FamilySpec, check_family_spec
from pyro_amortized.inference import Encoded, InferenceStrategy, PerDatapoint
from pyro_amortized.layout import LocalSite, SiteLayout
from pyro_amortized.structure import Structure, StructureCache, check_observed
from pyro_amortized.tracing import isolated, run_model

__all__ = ["AmortizedGuide", "LocalGuide", "PerDatapointGuide"]

EncoderInput = str | Sequence[str] | Callable[..., Any] | None


class PushedDelta(dist.Delta):
    """A value drawn elsewhere and transformed; ``log_density`` holds the Jacobian of the transform.

    Pyro's KL divergence of a ``Delta`` leaves its ``log_density`` out, so that ``TraceMeanField_ELBO`` is wrong for all
    of Pyro's autoguides with constrained latents. This class has no closed-form KL: the ELBO samples it, correctly.
    """


@register_kl(PushedDelta, dist.Distribution)
def _no_closed_form(p: PushedDelta, q: dist.Distribution) -> Tensor:
    raise NotImplementedError


class _KeepLogDensity(Messenger):
    """Makes the autoguide for the global latents use :class:`PushedDelta`."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta and isinstance(fn.log_density, Tensor):
            msg["fn"] = PushedDelta(fn.v, log_density=fn.log_density, event_dim=fn.event_dim)


class LocalGuide(AutoGuide):
    """What all guides of this package share; see :class:`AmortizedGuide` for the arguments.

    A member says where phi comes from by building an inference strategy in :meth:`_build_strategy`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        family: FamilySpec = "normal",
        plate: str | None = None,
        encoder_input: EncoderInput = None,
        global_guide: Callable[[Callable[..., Any]], AutoGuide] = AutoNormal,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_scale: float = 0.1,
        name: str | None = None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"Cannot guide {model!r} because it is not callable; try passing the Pyro model itself.")
        check_family_spec(family)
        if not init_scale > 0:
            raise ValueError(f"Cannot use init_scale={init_scale} because a scale must be positive; try 0.1.")
        super().__init__(model, create_plates=create_plates)
        if name is not None:
            self._pyro_name = name
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self.layout: SiteLayout | None = None
        self._family_spec = family
        self._encoder_input = encoder_input
        self._global_guide_factory = global_guide
        self._structures = StructureCache(plate)
        self._ready = False
        self._global_sites: tuple[str, ...] = ()
        self._first_parameter = ""
        self._pending_state: dict[str, Tensor] = {}

    # Building

    @abstractmethod
    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        """The strategy, sized for the data at hand.

        Args:
            inputs: The encoder's inputs of shapes ``(N, ...)``.
            init_loc: Initial locations of the flat latent, shape ``(N, D)``.
            structure: The structure of the first call.
        """

    @property
    def _needs_inputs(self) -> bool:
        return True

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Builds every parameter and buffer from one look at the model; the first call does so otherwise.

        Args:
            *args: The model's arguments: a batch, or all data so that inputs are standardised with all of it.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If the model has no latents, or none that this guide can serve.
        """
        if not self._ready:
            with isolated():
                self._prepare(args, kwargs)

    def _build(
        self,
        structure: Structure,
        plates: Mapping[str, pyro.plate],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if structure.layout is None and not structure.global_sites:
            raise ValueError(
                "Cannot build a guide because the model has no latent sites; try an empty guide, "
                "`lambda *args, **kwargs: None`."
            )
        indices = structure.indices
        with torch.no_grad():
            init = run_model(self.model, args, kwargs, indices, handlers=(InitMessenger(self.init_loc_fn),))
        check_observed(init)
        if structure.layout is not None:
            init_loc = structure.layout.flatten({s.name: init.nodes[s.name]["value"] for s in structure.layout.sites})
            self.family = build_family(self._family_spec, structure.layout.latent_dim).to(init_loc)
            inputs = self._inputs(structure, plates, args, kwargs) if self._needs_inputs else ()
            self.inference = self._build_strategy(inputs, init_loc, structure)
            self._first_parameter = next((name for name, _ in self.inference.named_parameters()), "")
        if structure.global_sites:
            self._build_global_guide(structure, args, kwargs)
        self.layout = structure.layout
        self._global_sites = structure.global_sites
        self._ready = True
        if self._pending_state:
            state, self._pending_state = self._pending_state, {}
            self.load_state_dict(state)

    def _build_global_guide(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = InitMessenger(self.init_loc_fn)(poutine.block(self.model, expose=list(structure.global_sites)))
        self.global_guide = self._global_guide_factory(model)
        with isolated(), torch.no_grad():
            self.global_guide(*args, **kwargs)  # makes its parameters

    def _check_prototype(self, part_trace: Any) -> None:
        """Called by the global guide on its own look at the model; the structure has been checked already."""

    # One call

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Structure, dict[str, pyro.plate]]:
        """The structure of this call and its plates, with all indices and, if needed, the observed values."""
        observed = self._encoder_input is None and self._needs_inputs
        model = None if self._model is None else self.model
        structure = self._structures.find(model, args, kwargs, observed=observed or not self._ready)
        plates = self._call_plates(structure, args, kwargs)
        redrawn = structure.random_plates if self.create_plates is None else list(plates)
        if redrawn:
            indices = {**structure.indices, **{name: plates[name].indices for name in redrawn if name in plates}}
            if not structure.is_static or (structure.observed is None and (observed or not self._ready)):
                structure = self._structures.look(self.model, args, kwargs, indices)[0]
            structure = replace(structure, indices=indices)
        if not self._ready:
            self._build(structure, plates, args, kwargs)
        elif structure.layout is not self.layout:
            self._check_same(structure)
        return structure, plates

    def _call_plates(self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, pyro.plate]:
        if self.master is not None:
            plates = dict(self.master().plates)
            for name, frame in structure.frames.items():
                if name in plates and plates[name].subsample_size != frame.size:
                    raise ValueError(
                        f"Cannot run this guide inside an AutoGuideList because plate {name!r} now has size "
                        f"{frame.size}, and the list fixed it at {plates[name].subsample_size} in its first call; try "
                        "batches of equal size, or this guide on its own with global_guide=..."
                    )
            return plates
        plates = {}
        if self.create_plates is not None:
            created = self.create_plates(*args, **kwargs)
            plates = {plate.name: plate for plate in ([created] if isinstance(created, pyro.plate) else created)}
        for name in structure.latent_plates:
            if name not in plates:
                plates[name] = structure.frames[name].create(structure.indices.get(name))
        self.__dict__["plates"] = plates
        return plates

    def _check_same(self, structure: Structure) -> None:
        remedy = "try the same structure in every call, or one guide per structure."
        if self.layout is None or structure.layout is None:
            if self.layout is not structure.layout:
                raise ValueError(
                    "Cannot run this guide because the model "
                    f"{'had' if structure.layout is None else 'had no'} local latents when the guide was set up, and "
                    f"now has {'none' if structure.layout is None else 'some'}; {remedy}"
                )
        else:
            self.layout.check_same(structure.layout)
        changed = set(self._global_sites) ^ set(structure.global_sites)
        if changed:
            raise ValueError(
                f"Cannot run this guide because global latent sites {sorted(changed)} have appeared or disappeared "
                f"since it was set up; {remedy}"
            )

    def _inputs(
        self,
        structure: Structure,
        plates: Mapping[str, pyro.plate],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """The encoder's positional inputs."""
        spec = self._encoder_input
        if spec is None:
            return tuple((structure.observed or {}).values())
        if callable(spec):
            with plates[structure.datapoints.name]:
                found = spec(*args, **kwargs)
        else:
            names = [spec] if isinstance(spec, str) else list(spec)
            found = [self._argument(name, structure, args, kwargs) for name in names]
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    def _argument(self, name: str, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        signature = inspect.signature(_signature_owner(self.model))
        bound = signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        if name not in arguments:
            raise ValueError(
                f"Cannot use encoder_input={name!r} because the model has no argument of that name; try one of "
                f"{list(signature.parameters)}, or a function of the model's arguments."
            )
        value, frame = arguments[name], structure.datapoints
        if frame.subsampled and isinstance(value, Tensor) and len(value) == frame.full_size != frame.size:
            return value[structure.indices[frame.name].to(value.device)]
        return value

    def _phi(
        self,
        structure: Structure,
        plates: Mapping[str, pyro.plate],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """phi of this call's datapoints, ``(N, P)``; reading ``self.inference`` registers its parameters with Pyro."""
        frame, num_params = structure.datapoints, self._modules["family"].num_params
        inputs = self._inputs(structure, plates, args, kwargs) if self._needs_inputs else ()
        phi = self.inference(inputs, structure.indices.get(frame.name))
        if phi.shape != (frame.size, num_params):
            raise ValueError(
                f"Cannot sample the latents of {frame.size} datapoints in plate {frame.name!r} because the encoder "
                f"returned variational parameters of shape {tuple(phi.shape)} and not "
                f"{(frame.size, num_params)}; try an encoder and an encoder_input whose first dimension "
                f"runs over the plate (inputs have shapes {[tuple(x.shape) for x in inputs]})."
            )
        if not torch._C._get_tracing_state() and not math.isfinite(phi.detach().sum().item()):
            self._check_finite(phi, inputs)
        return phi

    def _check_finite(self, phi: Tensor, inputs: tuple[Tensor, ...]) -> None:
        bad = (~phi.isfinite()).any(-1).nonzero().squeeze(-1).tolist()
        if not bad:
            return
        cause, remedy = "its parameters have diverged", "a smaller learning rate or clipped gradients"
        for i, x in enumerate(inputs):
            if x.is_floating_point() and not x.isfinite().all():
                cause = f"its input number {i} holds NaN or infinite values"
                remedy = "dropping or imputing them, or an encoder_input that fills them in"
        raise ValueError(
            f"Cannot sample the latents of {len(bad)} datapoints (first: {bad[:10]}) because the variational "
            f"parameters from {type(self.inference).__name__} are not finite: {cause}; try {remedy}."
        )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples all latents of the model, as any Pyro guide.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Sampled values by site name.

        Raises:
            ValueError: If the data are not finite, the structure has changed since the guide was set up, or another
                guide's parameters lie in the parameter store under this guide's names.
        """
        structure, plates = self._prepare(args, kwargs)
        result: dict[str, Tensor] = {}
        if self._global_sites:
            with _KeepLogDensity():
                result.update(self._global()(*args, **kwargs))
        if structure.layout is not None:
            self._check_parameter_store()
            phi = self._phi(structure, plates, args, kwargs)
            with plates[structure.layout.plate]:
                result.update(self._sample(structure.layout, phi, plates))
        return result

    def _global(self) -> AutoGuide:
        guide = self.global_guide
        if guide.master is None:  # saving a guide with Pyro's own __getstate__ cuts it off
            guide._update_master(weakref.ref(self))
        return guide

    def _sample(self, layout: SiteLayout, phi: Tensor, plates: Mapping[str, pyro.plate]) -> dict[str, Tensor]:
        phi = layout.batch(phi)
        family = self._modules["family"]
        if isinstance(family, Normal):
            loc, scale = family.marginals(phi)
            return {s.name: _sample_site(s, _site_normal(s, loc, scale), plates) for s in layout.sites}
        family = self.family  # reading the attribute registers the family's own parameters, if it has any, with Pyro
        latent = pyro.sample(f"{self._pyro_name}_latent", family(phi), infer={"is_auxiliary": True})
        return {s.name: _sample_site(s, _site_delta(s, latent), plates) for s in layout.sites}

    def _check_parameter_store(self) -> None:
        """Refuses to train on a parameter store that holds other parameters under this guide's names."""
        if not self._first_parameter:
            return
        full_name = param_with_module_name(self._pyro_get_fullname("inference"), self._first_parameter)
        stored = pyro.get_param_store()._params.get(full_name)
        if stored is None or stored is self._modules["inference"].get_parameter(self._first_parameter):
            return
        if not pyro.settings.get("module_local_params"):
            raise ValueError(
                f"Cannot run this guide because the parameter store already holds other parameters named "
                f"{full_name!r}, from another guide of the same name or from a file; try a name=... of its own for each "
                "guide, pyro.clear_param_store() before a new one, or "
                "pyro.settings.set(module_local_params=True)."
            )

    # What is known of the posterior

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Structure, Tensor]:
        """The structure of a call and phi, outside any inference of the caller."""
        with isolated():
            structure, plates = self._prepare(args, kwargs)
            if structure.layout is None:
                raise ValueError(
                    "Cannot give variational parameters per datapoint because the model has no local latents; "
                    "try guide.global_guide."
                )
            return structure, self._phi(structure, plates, args, kwargs)

    def variational_parameters(self, *args: Any, **kwargs: Any) -> Tensor:
        """The variational parameters phi of the datapoints in a call.

        Returns:
            phi of shape ``(N, P)``.
        """
        return self._infer(args, kwargs)[1]

    def posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """q(z | x) over the flat unconstrained latent.

        Returns:
            A distribution of batch shape ``(N,)`` and event shape ``(D,)``.
        """
        return self.family(self.variational_parameters(*args, **kwargs))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians of all latents.

        Returns:
            Medians by site name, in the sites' supports.
        """
        return {name: value.squeeze(0) for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles of all latents.

        Quantiles are taken in unconstrained space and transformed, which keeps them for every one-dimensional
        transform; for joint ones (simplexes, Cholesky factors) the values lie in the support but are not quantiles of
        its coordinates. The same convention as Pyro's autoguides.

        Args:
            quantiles: Q probabilities between 0 and 1.
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Quantiles by site name, of shape ``(Q, *batch, *event)``.
        """
        result: dict[str, Tensor] = {}
        with isolated():
            structure, plates = self._prepare(args, kwargs)
            if self._global_sites:
                result.update(_global_quantiles(self._global(), quantiles, args, kwargs))
            if structure.layout is not None:
                phi = self._phi(structure, plates, args, kwargs)
                probs = torch.as_tensor(quantiles, dtype=phi.dtype, device=phi.device)
                result.update(structure.layout.values(self.family.quantile(phi, probs)))
        return result

    @torch.no_grad()
    def global_median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Medians of the global latents by site name; empty if there are none."""
        if not self._global_sites:
            return {}
        with isolated():
            self._prepare(args, kwargs)
            return self._global().median(*args, **kwargs)

    # Saving

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # not registered as a submodule, as in all of Pyro's autoguides
            self.__dict__["_model"] = (value,)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """The guide without its model, as in Pyro; set ``guide.model`` after loading to go on with new shapes."""
        for parameter in nn.Module.parameters(self):  # weak references that the store sets anew at every access
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "plates": {}}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keeps the state for the first call if nothing has been built yet."""
        if self._ready:
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            self._pending_state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


class AmortizedGuide(LocalGuide):
    r"""Amortized variational inference: a network maps each datapoint to the parameters of its q(z | x).

    .. math:: q(z_{1:N}, \theta) = q(\theta) \prod_n q(z_n;\, \phi_n = f(x_n))

    Works on any Pyro model with a plate over datapoints, any batch size in any call. Latents inside that plate are
    amortized, with any inner plates folded into the datapoint; the others go to ``global_guide``.

    Args:
        model: A Pyro model.
        encoder: A module from inputs to features ``(N, H)``, to which the guide adds the linear head; or one that
            returns ``(loc, scale)``, each of shape ``(N, D)``, for the normal family. By default an
            :class:`~pyro_amortized.MLPEncoder` of standardised inputs.
        family: The shape of q: ``"normal"``, ``"multivariate_normal"``, ``"low_rank_multivariate_normal"``, a
            :class:`~pyro_amortized.VariationalFamily`, or a function from ``latent_dim`` to one.
        plate: Name of the datapoint plate; by default the outermost plate that holds an observed site.
        encoder_input: What the encoder sees: by default the observed values in the plate; or the name of a model
            argument, a list of names, or a function of the model's arguments, run inside the plate so that
            ``pyro.subsample`` works in it. Several inputs are passed as positional arguments.
        global_guide: A function from a model to an autoguide, for the latents outside the plate.
        create_plates: A function of the model's arguments that returns the plates to use, as in Pyro's autoguides.
        init_loc_fn: Where q starts, one of Pyro's initialisation functions.
        init_scale: Standard deviation of q at the start, in unconstrained space.
        name: Name under which parameters go to Pyro's parameter store; by default that of the class.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = AmortizedGuide(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.randn(8))
        >>> guide.median(torch.randn(3))["z"].shape
        torch.Size([3])

    References:
        Auto-Encoding Variational Bayes, Diederik P. Kingma, Max Welling (2013), https://arxiv.org/abs/1312.6114
    """

    def __init__(self, model: Callable[..., Any], encoder: nn.Module | None = None, **options: Any) -> None:
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise ValueError(
                f"Cannot use encoder {encoder!r} because it is not a torch.nn.Module instance; try passing a "
                "constructed module, for example MLPEncoder(input_dim)."
            )
        super().__init__(model, **options)
        self._encoder_spec = (encoder,)

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        encoder = self._encoder_spec[0] or self._default_encoder(inputs, init_loc)
        if isinstance(encoder, StandardizedEncoder):
            encoder.fit(*inputs)
        features = _first_output(encoder, inputs)
        if isinstance(features, tuple):
            self._check_pair(features, init_loc)
            return Encoded(encoder, None)
        if features.dim() != 2 or len(features) != len(init_loc):
            raise ValueError(
                f"Cannot encode the {len(init_loc)} datapoints of plate {structure.datapoints.name!r} because the "
                f"encoder returned features of shape {tuple(features.shape)} for inputs of shapes "
                f"{[tuple(x.shape) for x in inputs]}; try an encoder from (N, ...) to (N, H) with one row per datapoint."
            )
        head = nn.Linear(features.shape[1], self.family.num_params).to(features)
        with torch.no_grad():
            head.bias.copy_(self.family.initial(init_loc.mean(0), self.init_scale))
        return Encoded(encoder, head)

    def _default_encoder(self, inputs: tuple[Tensor, ...], init_loc: Tensor) -> nn.Module:
        if not inputs:
            raise ValueError(
                "Cannot build a default encoder because no site in the datapoint plate is observed with values; "
                "try encoder_input=..."
            )
        return MLPEncoder(MLPEncoder.flatten(*inputs).shape[1]).to(init_loc)

    def _check_pair(self, pair: tuple[Tensor, ...], init_loc: Tensor) -> None:
        shapes = [tuple(part.shape) for part in pair]
        if not isinstance(self.family, Normal) or shapes != [tuple(init_loc.shape)] * 2:
            raise ValueError(
                f"Cannot use the encoder's output, a tuple of tensors of shapes {shapes}, because a (loc, scale) pair "
                f'must have shapes {tuple(init_loc.shape)} and needs family="normal" (this guide has '
                f"{type(self.family).__name__}); try an encoder that returns features of shape (N, H)."
            )


class PerDatapointGuide(LocalGuide):
    """Classical variational inference: every datapoint has variational parameters of its own, without an encoder.

    The baseline without amortization gap once trained to convergence. It knows only the datapoints of its table; for
    unseen ones use :class:`AmortizedGuide`.

    Args:
        model: A Pyro model whose datapoint plate has the same full size in every call; subsampling is welcome.
        sparse: Whether gradients of the table hold only the rows of the batch, so that a step's cost does not grow with
            the number of datapoints; needs an optimizer that takes sparse gradients beside dense ones, such as
            ``pyro.optim.Adagrad``. Give the indices with ``pyro.plate(..., subsample=indices)`` then, since Pyro's own
            random subsampling permutes all datapoints.
        **options: ``family``, ``plate``, ``global_guide``, ``create_plates``, ``init_loc_fn``, ``init_scale`` and
            ``name`` as in :class:`AmortizedGuide`.
    """

    def __init__(self, model: Callable[..., Any], *, sparse: bool = False, **options: Any) -> None:
        if "encoder_input" in options:
            raise ValueError(
                "Cannot use encoder_input with PerDatapointGuide because it has no encoder; try AmortizedGuide."
            )
        super().__init__(model, **options)
        self.sparse = sparse

    @property
    def _needs_inputs(self) -> bool:
        return False

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        rows = torch.arange(structure.datapoints.full_size, device=init_loc.device) % len(init_loc)
        return PerDatapoint(self.family.initial(init_loc, self.init_scale)[rows].contiguous(), sparse=self.sparse)

    def _phi(
        self,
        structure: Structure,
        plates: Mapping[str, pyro.plate],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        frame, known = structure.datapoints, len(self._modules["inference"].table)
        if frame.full_size != known:
            raise ValueError(
                f"Cannot look up variational parameters because plate {frame.name!r} now has {frame.full_size} "
                f"datapoints and PerDatapointGuide was set up with {known}: it knows nothing of unseen data; try "
                "AmortizedGuide, or pyro.plate(name, full_size, subsample=indices) for a batch of the same data."
            )
        return super()._phi(structure, plates, args, kwargs)


def _signature_owner(model: Any) -> Any:
    """The function whose parameters name a model's arguments, under Pyro's handlers and inside modules."""
    model = poutine.unwrap(model)
    return model.forward if isinstance(model, nn.Module) else model


@torch.no_grad()
def _first_output(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The encoder's output, without dropout or an update of running statistics."""
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        return encoder(*inputs)
    finally:
        for module, mode in training.items():
            module.training = mode


def _global_quantiles(guide: AutoGuide, quantiles: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    probs = torch.as_tensor(quantiles)
    if probs.tolist() == [0.5]:
        return {name: value.unsqueeze(0) for name, value in guide.median(*args, **kwargs).items()}
    return guide.quantiles(probs.tolist(), *args, **kwargs)


def _site_normal(site: LocalSite, loc: Tensor, scale: Tensor) -> Distribution:
    """A normal in unconstrained space, on the site's support: an analytic KL where the prior is of its kind."""
    normal = dist.Normal(site.unflatten(loc), site.unflatten(scale))
    if site.is_real:
        return normal.to_event(site.event_dim)
    try:
        transform = site.transform.with_cache()
    except NotImplementedError:
        transform = site.transform
    pushed = dist.TransformedDistribution(normal, [transform])
    return pushed.to_event(site.event_dim - len(pushed.event_shape))


def _site_delta(site: LocalSite, latent: Tensor) -> Distribution:
    value, log_det = site.constrain(site.unflatten(latent))
    return PushedDelta(value, log_density=-log_det, event_dim=site.event_dim)


def _sample_site(site: LocalSite, fn: Distribution, plates: Mapping[str, pyro.plate]) -> Tensor:
    if not site.plates:
        return pyro.sample(site.name, fn)
    with ExitStack() as stack:
        for name in site.plates:
            stack.enter_context(plates[name])
        return pyro.sample(site.name, fn)
