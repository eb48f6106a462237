"""What all guides share: building, running one call, the posterior's summaries, saving."""

from __future__ import annotations

import copy
import types
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypedDict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_feasible
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_probabilities
from pyro_amortized.families import Normal, Structured, VariationalFamily, build_family
from pyro_amortized.families.base import FamilySpec, check_family_spec
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.inputs import EncoderInput, encoder_inputs
from pyro_amortized.guides.options import check_initial, check_initial_value, check_options, check_state, created_plates
from pyro_amortized.guides.sampling import (
    KeepLogDensity,
    add_gradient,
    check_scaled_once,
    log_conditionals,
    sample_local,
)
from pyro_amortized.guides.simulated import simulated_call, takes_observations
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import Refined, start_of
from pyro_amortized.structure.dependence import posterior_parents
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.local_site import check_continuous
from pyro_amortized.structure.observed import check_observed
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import Feasible, is_predicting, isolated, run_model
from pyro_amortized.structure.signature import named_function
from pyro_amortized.structure.sites import is_enumerated
from pyro_amortized.structure.state import untouched
from pyro_amortized.structure.steady import check_steady
from pyro_amortized.structure.structure import Structure
from pyro_amortized.structure.whole import WholeObservations
from pyro_amortized.updates.base import UpdateRule
from pyro_amortized.updates.rules import rule_for

if TYPE_CHECKING:
    from pyro_amortized.guides.semi_amortized import SemiAmortizedGuide

__all__ = ["GuideOptions", "LocalGuide"]

_MODERATE = 80.0
"""Variational parameters below this in size need no closer look: even as logarithms they do not overflow."""


class GuideOptions(TypedDict, total=False):
    """The options that all guides share, explained at :class:`AmortizedGuide`."""

    family: FamilySpec
    plate: str | None
    encoder_input: EncoderInput
    global_guide: Callable[[Callable[..., Any]], AutoGuide]
    create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None
    init_loc_fn: Callable[..., Any]
    init_scale: float
    name: str | None


class LocalGuide(AutoGuide):
    """What all guides of this package share; see :class:`AmortizedGuide` for the arguments.

    A member says where phi comes from by building an inference strategy in :meth:`_build_strategy`.
    """

    family: VariationalFamily
    inference: InferenceStrategy
    global_guide: AutoGuide

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
        check_options(plate, encoder_input, global_guide, create_plates, init_loc_fn, init_scale, name)
        super().__init__(model, create_plates=create_plates)
        if name is not None:
            self._pyro_name = name
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self.layout: SiteLayout | None = None
        self._family_spec = family
        self._encoder_input = encoder_input
        self._hold_all: dict[Any, bool] = {}
        self._global_guide_factory = global_guide
        self._structures = StructureReader(plate, promised=encoder_input is not None)
        self._whole_observations = WholeObservations()
        self._ready = False
        self._per_step = False
        self._step_families: dict[int, VariationalFamily] = {}
        self._global_sites: tuple[str, ...] = ()
        self._first_parameter = ""
        self._taken: list[str] = []
        self._shown_masks: tuple[str, ...] = ()
        self._global_shapes: dict[str, torch.Size] = {}
        self.register_buffer("_like", torch.empty(0), persistent=False)  # knows precision and device, after moves too
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
        strategy: Any = self._modules.get("inference")
        return True if strategy is None else strategy.needs_inputs

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Builds every parameter and buffer from one look at the model; the first call does so otherwise.

        Args:
            *args: The model's arguments: a batch, or all data so that inputs are standardised with all of it.
            **kwargs: The model's keyword arguments.

        Raises:
            ValueError: If the model has latents that this guide cannot serve.
        """
        if not self._ready:
            with isolated():
                self._prepare(args, kwargs)

    def _build(self, call: Call) -> None:
        structure = call.structure
        check_steady(self._structures, structure, self.model, call.args, call.kwargs, observed=self._needs_observed)
        with torch.no_grad(), untouched():
            init = run_model(self.model, call.args, call.kwargs, structure.indices, (InitMessenger(self._initial),))
        nodes: dict[str, Any] = init.nodes
        check_observed(init)
        init_loc = torch.empty(0)
        if structure.layout is not None:
            init_loc = structure.layout.flatten({s.name: nodes[s.name]["value"] for s in structure.layout.sites})
            check_initial(init_loc, structure.layout.names)
            self._like = init_loc.new_empty(0)
            find_parents = partial(self._parents, call)
            self.family = build_family(self._family_spec, structure.layout.latent_dim, find_parents).to(init_loc)
            if structure.layout.is_apart:
                log_conditionals(
                    structure.layout, self.family, init_loc.new_zeros(1, self.family.num_params), init_loc[:1]
                )
        self._global_sites = structure.global_sites
        if structure.global_sites:
            self._build_global_guide(call)
        if structure.layout is not None or structure.discrete:
            try:
                self.inference = self._build_strategy(self._inputs(call), init_loc, structure)
            except Exception:
                self._forget_global_guide()
                raise
            self._first_parameter = next((name for name, _ in self.inference.named_parameters()), "")
        self.layout = structure.layout
        self._shown_masks = tuple(structure.present) if self._shows_masks else ()
        self._built_structure = structure.without_tensors()
        self._ready = True
        if self._pending_state:
            try:
                self.load_state_dict(self._pending_state)
            except ValueError:
                self._ready = False
                self._forget_global_guide()
                raise
            self._pending_state = {}

    def _initial(self, site: Any) -> Tensor | None:
        """Where a latent starts; sites enumerated in the model, and discrete ones, are left to the model."""
        if is_enumerated(site) or site["fn"].support.is_discrete:
            return None
        try:
            value = self.init_loc_fn(site)
        except NotImplementedError:  # torch knows no way to the support of a MixtureSameFamily: at a draw
            return None
        check_initial_value(site, value)
        return value

    def _stored_globals(self) -> list[str]:
        """Names of parameters in Pyro's store that belong to a global guide of this guide's name."""
        prefix = f"{self._pyro_name}.global_guide."
        return [name for name in pyro.get_param_store()._params if name.startswith(prefix)]

    def _forget_global_guide(self) -> None:
        """Takes back the parameters of a global guide that has been of no use."""
        for name in set(self._stored_globals()) - set(self._taken):
            del pyro.get_param_store()[name]

    def _build_global_guide(self, call: Call) -> None:
        self._taken = self._stored_globals()  # by another guide, with which they would be shared
        expose = list(call.structure.global_sites)
        self.global_guide = self._global_guide_factory(
            InitMessenger(self.init_loc_fn)(poutine.block(Feasible()(self.model), expose=expose))
        )
        with isolated(), torch.no_grad(), untouched():
            try:
                self.global_guide(*call.args, **call.kwargs)  # makes its parameters
            except ValueError as error:
                if "discrete sample site" in str(error):
                    self._refuse_discrete(call)
                raise

    def _refuse_discrete(self, call: Call) -> None:
        nodes: dict[str, Any] = run_model(self.model, call.args, call.kwargs, call.structure.indices).nodes
        for name in call.structure.global_sites:
            check_continuous(name, nodes[name], f"global_guide={type(self.global_guide).__name__}")

    @property
    def _model_at_hand(self) -> Callable[..., Any] | None:
        """The model, or None in a guide that was loaded without it."""
        return None if self._model is None else self._model[0]

    def _check_prototype(self, part_trace: Any) -> None:
        """Called by the global guide on its own look at the model; the structure has been checked already."""

    # One call

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, predicting: bool = False) -> Call:
        """Finds the structure of a call and opens its plates; builds the guide in the first one.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            predicting: Whether sites that were observed when the guide was set up may be latent, to be predicted.
        """
        if "observations" in kwargs and not self._observes_itself(args, kwargs):
            return self._prepare_simulated(args, kwargs)
        alone = self._ready and self.create_plates is None and self.master is None
        foreseen = self._structures.foresee(args, kwargs) if alone else None
        data = self._built_structure.data if predicting and self._ready else ()
        structure = foreseen or self._without_model or self._structures.read(self._model_at_hand, args, kwargs, data)
        plates = self._call_plates(structure, args, kwargs)
        drawn = structure.random_plates if self.create_plates is None else [n for n in plates if n in structure.frames]
        if drawn:
            indices = {**structure.indices, **{name: plates[name].indices for name in drawn if name in plates}}
            _check_created(structure, indices)
            structure = replace(structure, indices=indices, observed=None, present={})  # they were of other indices
            if foreseen is not None:
                looked = self._structures.look_as_foreseen(foreseen, self.model, args, kwargs, indices)
                structure = replace(looked, indices={**looked.indices, **indices})
            elif not self._ready or self._needs_observed or not structure.is_static or structure.is_weighted:
                structure = self._look_at(structure, args, kwargs)
        return self._checked(Call(args, kwargs, structure, plates))

    @property
    def global_sites(self) -> tuple[str, ...]:
        """Names of the latents that all datapoints share; known once the guide has been set up."""
        return self._global_sites

    def __repr__(self) -> str:
        """The model, its sites, and what guides them, before and after the guide is set up."""
        model = self._model_at_hand
        name = "none at hand" if model is None else getattr(named_function(model), "__qualname__", type(model).__name__)
        lines = [f"{type(self).__name__} {self._pyro_name!r}", f"  model: {name.removesuffix('.forward')}"]
        if not self._ready:
            asked = self._structures.requested_plate
            lines += [
                f"  plate: {'that of the observed sites' if asked is None else asked}",
                f"  family: {self._family_spec if isinstance(self._family_spec, str) else 'of your own'}",
                "  not set up yet: the first call, or guide.setup(...), looks at the model",
            ]
            return "\n".join(lines)
        structure, family = self._built_structure, self._family
        local = [] if structure.layout is None else [f"{s.name} ({s.stop - s.start})" for s in structure.layout.sites]
        local += [f"{site.name} (discrete)" for site in structure.discrete]
        modules = {"encoder": None, "inference": self._modules.get("inference"), "global guide": None}
        modules["encoder"] = getattr(start_of(modules["inference"]), "encoder", None)
        modules["global guide"] = self._modules.get("global_guide")
        lines += [f"  plate: {structure.plate}"] if structure.plate is not None else []
        lines += [f"  local latents: {', '.join(local) or 'none'}"]
        lines += [f"  global latents: {', '.join(self.global_sites) or 'none'}"]
        lines += [f"  data: {', '.join(structure.data) or 'none'}"]
        lines += [f"  family: {type(family).__name__} of {family.latent_dim} dimensions"] if family is not None else []
        lines += [f"  {what}: {type(module).__name__}" for what, module in modules.items() if module is not None]
        return "\n".join([*lines, f"  parameters: {sum(p.numel() for p in self.parameters()):,}"])

    @property
    def has_local_latents(self) -> bool:
        """Whether the model has latents of single datapoints; known once the guide has been set up."""
        return self._ready and self._built_structure.latents != {*self._built_structure.global_sites}

    @property
    def _without_model(self) -> Structure | None:
        """What calls of a guide look like that was loaded without its model, and has global latents alone."""
        if self._model_at_hand is not None or not self._ready:
            return None
        built = self._built_structure
        return built if built.is_fixed and not self.has_local_latents else None

    def _look_at(self, structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
        """The structure of a call at the indices of a known one, those of plates that this one leaves to chance too."""
        looked = self._structures.look(self.model, args, kwargs, structure.indices, structure.missing)
        return replace(looked, indices={**looked.indices, **structure.indices})

    def _prepare_simulated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of wake-sleep or CSIS, which hand their simulated data to the guide as ``observations``."""
        observations = kwargs["observations"]
        own = {name: value for name, value in kwargs.items() if name != "observations"}
        structure = self._structures.look(self.model, args, own)
        plates = self._call_plates(structure, args, own)
        kwargs = kwargs if takes_observations(self.model) else own
        indices = {name: plate.indices for name, plate in plates.items() if plate.subsample_size < plate.size}
        with isolated():
            model, args, kwargs, complete = simulated_call(self.model, args, kwargs, observations, indices)
            structure = self._structures.look(model, args, kwargs, indices)
        structure = replace(structure, indices={**structure.indices, **indices})
        return self._checked(Call(args, kwargs, structure, plates, model=model, complete=complete))

    def _observes_itself(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model observes what it is given as ``observations``, so that nothing needs to be put in."""
        observations, model = kwargs["observations"], self._model_at_hand
        if model is None or not isinstance(observations, Mapping):
            return True
        if not takes_observations(model):
            return False
        observed = self._structures.look(model, args, kwargs).observed or {}
        values = {name: torch.as_tensor(value) for name, value in observations.items()}
        return all(n in observed and value.data_ptr() == observed[n].data_ptr() for n, value in values.items())

    def _checked(self, call: Call) -> Call:
        """The call, after building the guide for the first one, or checking that its structure is the guide's."""
        structure = call.structure
        if not self._ready:
            try:
                self._build(call)
            except Exception:
                self._structures.clear()  # nothing has been built for what it has seen
                raise
        elif structure.layout is not self.layout:
            self._built_structure.check_same(structure, per_step=self._per_step)
        if self._per_step and structure.layout.latent_dim != self._family.latent_dim:  # type: ignore[union-attr]
            self.family = self._family_of_steps(call)
        return call

    def _parents(self, call: Call) -> Tensor:
        """Which dimensions of the flat latent each one depends on in the posterior, ``(D, D)``; one model run."""
        model = self._model_at_hand if call.model is None else call.model
        if model is None:
            raise ValueError(
                "Cannot find which local latents depend on which because this guide was loaded without its model; try "
                "`guide.model = model`."
            )
        layout: Any = call.structure.layout
        return posterior_parents(model, call.args, call.kwargs, layout, call.structure.global_sites)

    def _family_of_steps(self, call: Call) -> VariationalFamily:
        """The family for as many steps as a call has; the same one for the same number."""
        latent_dim = call.structure.layout.latent_dim  # type: ignore[union-attr]
        if not isinstance(self._family, Structured):
            return _normal(latent_dim)
        if latent_dim not in self._step_families:
            self._step_families[latent_dim] = self._family.with_steps(latent_dim, self._parents(call))
        return self._step_families[latent_dim].to(self._like)

    def _call_plates(
        self, structure: Structure, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, pyro.plate]:
        if self.master is not None:
            self.__dict__["plates"] = plates = dict(self.master().plates)
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
            plates = created_plates(self.create_plates(*args, **kwargs), structure.frames)
        for name in structure.latent_plates:
            if name not in plates:
                plates[name] = structure.frames[name].create(structure.indices.get(name))
        self.__dict__["plates"] = plates
        return plates

    def _inputs(self, call: Call) -> tuple[Tensor, ...]:
        if not self._needs_inputs:
            return ()
        self._condition(call)
        return encoder_inputs(
            self._encoder_input,
            self._model_at_hand,
            call,
            known=self._hold_all,
            show_masks=self._shows_masks,
            but=self._hidden,
            whole=self._whole_observations,
        )

    def _condition(self, call: Call) -> None:
        """Makes sure that global latents that the encoder sees are at hand, one value of each for all datapoints."""
        spec = self._encoder_input
        names = [] if spec is None or callable(spec) else [spec] if isinstance(spec, str) else list(spec)
        seen = [name for name in names if name in call.structure.global_sites]
        if not seen:
            return
        if call.global_values is None:
            call.global_values = self._global_values(call)
        shapes = {name: call.global_values[name].shape for name in seen}
        if not self._ready:
            self._global_shapes = shapes
        elif shapes != self._global_shapes:
            raise ValueError(
                f"Cannot condition on global latents of shapes {[tuple(shape) for shape in shapes.values()]} because "
                f"they had {[tuple(shape) for shape in self._global_shapes.values()]} when the guide was set up, and "
                "there is one phi per datapoint; try vectorize_particles=False, or Predictive(parallel=False)."
            )

    @property
    def _needs_observed(self) -> bool:
        """Whether the observed values are asked for in every call."""
        return self._encoder_input is None and self._needs_inputs

    @property
    def _hidden(self) -> Collection[str]:
        """Names of observed sites that the encoder does not see."""
        return ()

    @property
    def _shows_masks(self) -> bool:
        """Whether the encoder also sees which observed values are masked."""
        return False

    def _phi(self, call: Call) -> Tensor:
        """phi of a call's datapoints, ``(N, P)``; reading ``self.inference`` registers its parameters with Pyro."""
        frame = call.structure.datapoints
        inputs, strategy = self._inputs(call), self.inference
        if strategy.num_known is not None and strategy.num_known != frame.full_size:
            raise ValueError(
                f"Cannot look up variational parameters because plate {frame.name!r} now has {frame.full_size} "
                f"datapoints and the guide's table was set up with {strategy.num_known}: it knows nothing of unseen "
                "data; try AmortizedGuide, or pyro.plate(name, full_size, subsample=indices) for a batch of the same "
                "data."
            )
        phi = self._run_strategy(strategy, inputs, call)
        self._check_shape(phi, inputs, call)
        self._check_values(phi, inputs)
        present = call.structure.layout.present  # type: ignore[union-attr]
        return phi if present is None else self._masked(phi, present)

    def _check_shape(self, phi: Tensor, inputs: tuple[Tensor, ...], call: Call) -> None:
        frame, num_params = call.structure.datapoints, self._family.num_params
        if phi.shape != (frame.size, num_params):
            raise ValueError(
                f"Cannot sample the latents of {frame.size} datapoints in plate {frame.name!r} because the encoder "
                f"returned variational parameters of shape {tuple(phi.shape)} and not "
                f"{(frame.size, num_params)}; try an encoder and an encoder_input whose first dimension "
                f"runs over the plate (inputs have shapes {[tuple(x.shape) for x in inputs]}), and for features "
                "(N, T, H) as many steps T as the model has."
            )

    def _check_values(self, phi: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Raises a ValueError if phi makes no distributions; looks closer only where values are far out."""
        if not torch._C._get_tracing_state():
            low, high = torch.aminmax(phi.detach())
            if not (low.item() > -_MODERATE and high.item() < _MODERATE):
                self._check_phi(phi, inputs)

    def _masked(self, phi: Tensor, present: Tensor) -> Tensor:
        """phi with a standard normal for masked latents, of which nothing is known, where the family allows it."""
        return self._family.masked(phi, present)

    def _run_strategy(self, strategy: InferenceStrategy, inputs: tuple[Tensor, ...], call: Call) -> Tensor:
        return strategy(inputs, call.index)

    @property
    def _family(self) -> VariationalFamily:
        """The family; reading ``self.family`` instead registers its own parameters, if it has any, with Pyro."""
        return self._modules.get("family")  # type: ignore[return-value]

    def _makes_distributions(self, phi: Tensor) -> bool:
        with pyro.validation_enabled():
            try:
                self._family(phi)
            except ValueError:
                return False
        return True

    def _check_phi(self, phi: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Raises a ValueError naming the datapoints whose variational parameters make no distribution."""
        rows = phi.detach().reshape(-1, phi.shape[-1])
        wrong = ~rows.isfinite().all(-1)
        if isinstance(self._family, Normal):
            scale = self._family.marginals(rows)[1]
            wrong |= ~(scale.isfinite() & (scale > 0)).all(-1)
        elif not self._makes_distributions(rows[~wrong]):
            wrong |= torch.tensor([not self._makes_distributions(row) for row in rows], device=rows.device)
        bad = wrong.nonzero().squeeze(-1).tolist()
        if not bad:
            return
        cause = "its parameters have diverged"
        remedy = "a smaller learning rate, and pyro.optim.ClippedAdam if gradients are not clipped yet"
        if isinstance(self._modules["inference"], Refined):
            cause = "refinement has diverged, the data hold invalid values, or the encoder has diverged"
            remedy = (
                'a smaller step_size, encoder_gradient="anchored", or "first_order" where exact gradients explode, a '
                "smaller learning rate, and a look at the data"
            )
        for i, x in enumerate(inputs):
            if x.is_floating_point() and not x.isfinite().all():
                cause = f"its input number {i} holds NaN or infinite values"
                remedy = "dropping or imputing them, or an encoder_input that fills them in"
        raise ValueError(
            f"Cannot sample the latents of {len(bad)} datapoints (first: {bad[:10]}) because the variational "
            f"parameters from {type(self.inference).__name__} are not finite, or a scale is zero or infinite: "
            f"{cause}; try {remedy}."
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
        call = self._prepare(args, kwargs, predicting=is_predicting())
        self._check_parameter_store()
        args, kwargs = call.args, call.kwargs
        result: dict[str, Tensor] = {}
        if call.structure.is_weighted:
            check_scaled_once(call.structure)
        if self._global_sites:
            with KeepLogDensity(call.structure.global_weights):
                result.update(self._global()(*args, **kwargs))
            call.global_values = dict(result)
        if not self._sees_nothing(call):
            result.update(self._sample_local(call))
        return result

    def _sees_nothing(self, call: Call) -> bool:
        """Whether no data are at hand, to be predicted, of those that phi depends on; latents then have their prior.

        Raises:
            ValueError: If some are, and the encoder cannot tell those at hand from the others.
        """
        structure = call.structure
        if not structure.missing or structure.layout is None or not self._needs_inputs:
            return False
        if not self._needs_observed:
            with isolated():
                return not self._inputs(call)
        seen = [name for name in structure.observed or {} if name not in self._hidden]
        missing = [name for name in structure.missing if name in seen]
        if len(missing) == len(seen):
            return True
        unknown = sorted(set(missing) - set(self._shown_masks))
        if unknown:
            raise ValueError(
                f"Cannot infer latents from part of the data because sites {unknown} are not observed in this call and "
                "the encoder does not know of missing values; try the default encoder and a model that masks them, "
                "`dist.Normal(...).mask(present)` with obs filled in, in training as in this call."
            )
        return False

    def _require_data(self, call: Call) -> None:
        """Refuses to say what is known of the latents of a call where nothing is."""
        if self._sees_nothing(call):
            raise ValueError(
                f"Cannot infer local latents because none of the data that they depend on, {call.structure.missing}, "
                "are observed in this call; try pyro.infer.Predictive(model, guide=guide, num_samples=...), which "
                "draws them from their prior."
            )

    def _sample_local(self, call: Call) -> dict[str, Tensor]:
        """Samples the local latents as Pyro sites."""
        layout = call.structure.layout
        if layout is None:
            return {}
        phi = layout.batch(self._phi(call))
        with call.plates[layout.plate]:
            result = sample_local(layout, self._sampling_family, phi, call.plates, f"{self._pyro_name}_latent")
            if call.signal is not None:
                term = layout.spread(layout.batch(-call.signal.unsqueeze(-1)).squeeze(-1))
                with ExitStack() as stack:
                    for frame in layout.shared:
                        stack.enter_context(call.plates[frame.name] if frame.name else nullcontext())
                    add_gradient(f"{self._pyro_name}_signal", term)
        return result

    @property
    def _sampling_family(self) -> VariationalFamily:
        """The family, whose own parameters, if it has any, are registered with Pyro."""
        return self._family if isinstance(self._family, Normal) else self.family

    def _global_values(self, call: Call) -> dict[str, Tensor]:
        """The global latents at their median, or for autoguides without one at a draw."""
        if not self._global_sites:
            return {}
        with isolated(), torch.no_grad():
            guide = self._global()
            try:
                return guide.median(*call.args, **call.kwargs)
            except NotImplementedError:  # autoguides without a closed form
                return guide(*call.args, **call.kwargs)

    def _global(self) -> AutoGuide:
        guide = self.global_guide
        if guide.master is None or guide.master() is not self:  # saving cuts it off, a refined guide shares it
            guide._update_master(weakref.ref(self))
        return guide

    def _check_parameter_store(self) -> None:
        """Refuses to train on a parameter store that holds other parameters under this guide's names."""
        if pyro.settings.get("module_local_params"):
            return
        stored = pyro.get_param_store()._params
        for name in self._taken:
            if name in stored:
                self._refuse_parameters(name)
        for name, parameter in self._stored_parameters():
            if stored.get(name, parameter) is not parameter:
                self._refuse_parameters(name)

    def _stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A parameter of the strategy and one of the global guide, with their names in the parameter store."""
        if self._first_parameter:
            strategy: Any = self._modules["inference"]
            name = param_with_module_name(self._pyro_get_fullname("inference"), self._first_parameter)
            yield name, strategy.get_parameter(self._first_parameter)
        if self._global_sites:
            for name, parameter in self._modules["global_guide"].named_parameters():  # type: ignore[union-attr]
                yield f"{self._pyro_name}.global_guide.{name.removesuffix('_unconstrained')}", parameter
                return

    def _refuse_parameters(self, name: str) -> None:
        raise ValueError(
            f"Cannot run this guide because the parameter store already holds other parameters named {name!r}, from "
            "another guide of the same name or from a file; try a name=... of its own for each guide, "
            "pyro.clear_param_store() before a new one, or pyro.settings.set(module_local_params=True) with "
            "elbo(model, guide) and a torch optimizer."
        )

    # What is known of the posterior

    def _infer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, predicting: bool = False
    ) -> tuple[Structure, Tensor]:
        """The structure of a call and phi, outside any inference of the caller; ``predicting`` as in `_prepare`."""
        with isolated():
            call = self._prepare(args, kwargs, predicting=predicting)
            self._require_data(call)
            if call.structure.layout is None:
                raise ValueError(
                    "Cannot give variational parameters per datapoint because the model has no local latents; "
                    "try guide.global_median(...), or guide.quantiles(...), of the global ones."
                )
            structure = call.structure
            if any(name not in structure.indices for name in structure.random_plates):
                structure = self._look_at(structure, args, kwargs)
            return structure, self._phi(call)

    def variational_parameters(self, *args: Any, **kwargs: Any) -> Tensor:
        """The variational parameters phi of the datapoints in a call.

        Returns:
            phi of shape ``(N, P)``.
        """
        return self._infer(args, kwargs, predicting=True)[1]

    def posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """q(z | x) over the flat unconstrained latent.

        Returns:
            A distribution of batch shape ``(N,)`` and event shape ``(D,)``.
        """
        phi = self.variational_parameters(*args, **kwargs)  # builds the family in the first call
        return self.family(phi)

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
            quantiles: Q probabilities from 0 to 1.
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            Quantiles by site name, of shape ``(Q, *batch, *event)``.

        Raises:
            ValueError: If the probabilities are none.
        """
        quantiles = check_probabilities(quantiles)
        result: dict[str, Tensor] = {}
        with isolated():
            call = self._prepare(args, kwargs, predicting=True)
            self._require_data(call)
            if self._global_sites:
                result.update(_global_quantiles(self._global(), quantiles, args, kwargs))
            result.update(self._local_quantiles(quantiles, call))
        return result

    def _local_quantiles(self, quantiles: Sequence[float] | Tensor, call: Call) -> dict[str, Tensor]:
        layout = call.structure.layout
        if layout is None:
            return {}
        phi = self._phi(call)
        probs = torch.as_tensor(quantiles, dtype=phi.dtype, device=phi.device)
        return layout.values(self.family.quantile(phi, probs))

    @torch.no_grad()
    def global_median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Medians of the global latents by site name; empty if there are none."""
        if not self._global_sites:
            return {}
        with isolated():
            self._prepare(args, kwargs, predicting=True)
            return self._global().median(*args, **kwargs)

    def refined(
        self, num_steps: int, update: UpdateRule | None = None, *, num_particles: int = 32, **options: Any
    ) -> SemiAmortizedGuide:
        """This guide with its answers refined by gradient steps for each datapoint: test-time refinement.

        Args:
            num_steps: Number of steps.
            update: The update rule; by default :class:`~pyro_amortized.Newton` for the normal and the full-rank family
                of up to 128 latents, else :class:`~pyro_amortized.NaturalGradient` or :class:`~pyro_amortized.Adam`.
            num_particles: Number of draws for each step's gradient.
            **options: Further ones of :class:`~pyro_amortized.SemiAmortizedGuide`, such as ``compile=True``.

        Returns:
            A guide in ``eval()`` mode that shares this guide's parameters.

        Raises:
            ValueError: If this guide has not been set up yet, or has no local latents.
        """
        from pyro_amortized.guides.semi_amortized import SemiAmortizedGuide

        num_particles = check_count("num_particles", num_particles, 1, 32)
        if not self._ready:
            raise ValueError(
                "Cannot refine this guide because it has not been set up; try training it, or guide.setup(...)."
            )
        if self.layout is None:
            raise ValueError(
                "Cannot refine this guide because the model has no local latents; try this guide as it is."
            )
        taken = {"family", "initial", "encoder_input", "global_guide", "create_plates", "plate"} & options.keys()
        if taken:
            raise ValueError(
                f"Cannot refine this guide with other {sorted(taken)} because these are shared with it; try a new "
                "SemiAmortizedGuide."
            )
        if self._model_at_hand is None:
            raise ValueError(
                "Cannot refine this guide because it was loaded without its model; try `guide.model = model`."
            )
        if update is None and self._family is not None:
            update = rule_for(self._family, num_particles, options.get("estimator"))
        options = {"name": f"{self._pyro_name}_refined", "num_particles": num_particles, **options}
        guide = SemiAmortizedGuide(self.model, num_steps=num_steps, update=update, **options)
        guide._adopt(self)
        return guide

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Makes refinement use the same noise in every call."""
        found = [module for module in self.modules() if isinstance(module, Refined)]
        before = [module.fixed_noise for module in found]
        for module in found:
            module.fixed_noise = True
        try:
            yield
        finally:
            for module, fixed in zip(found, before, strict=True):
                module.fixed_noise = fixed

    # Saving

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # not registered as a submodule, as in all of Pyro's autoguides
            self.__dict__["_model"] = (value,)
            if "_structures" in self.__dict__:
                self._structures.clear()
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """The guide without its model, as in Pyro; set ``guide.model`` after loading to go on with new shapes."""
        for parameter in nn.Module.parameters(self):  # weak references that the store sets anew at every access
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalGuide:
        """A guide of the same model; of the copied one where the model, or what it is a method of, is copied along."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = self._model_at_hand
        holder = getattr(model, "__self__", None)
        if id(holder) in memo and isinstance(model, types.MethodType):
            model = types.MethodType(model.__func__, memo[id(holder)])
        copied.__dict__["_model"] = None if model is None else (memo.get(id(model), model),)
        return copied

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads parameters and buffers, in the first call if nothing has been built yet.

        Raises:
            ValueError: If they are those of another guide; nothing is loaded then.
        """
        check_state(self, state_dict, strict and self._ready)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keeps the state for the first call if nothing has been built yet."""
        if self._ready:
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            self._pending_state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


@cache
def _normal(latent_dim: int) -> Normal:
    """The same family for the same number of steps, so that graphs traced with it stay valid."""
    return Normal(latent_dim)


def _global_quantiles(guide: AutoGuide, quantiles: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    probs = torch.as_tensor(quantiles)
    if probs.tolist() == [0.5]:
        return {name: value.unsqueeze(0) for name, value in guide.median(*args, **kwargs).items()}
    return guide.quantiles(probs.tolist(), *args, **kwargs)


def _check_created(structure: Structure, indices: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if plates made by ``create_plates`` have other indices than the model gives them.

    Some models, such as Pyro's own CEVAE, give ``subsample=`` data of the right length, which say nothing.
    """
    for name, index in structure.indices.items():
        if structure.frames[name].kind != "explicit" or index.is_floating_point():
            continue
        if not torch.equal(index, indices[name].to(index.device)):
            raise ValueError(
                f"Cannot run this guide because create_plates gives plate {name!r} other indices than the model's own "
                "`subsample=`; try create_plates without that plate."
            )
