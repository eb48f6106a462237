"""What all guides share: building, running one call, the posterior's summaries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypedDict

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, AutoNormal, init_to_feasible
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyro_amortized.checks import check_count
from pyro_amortized.families import VariationalFamily, build_family
from pyro_amortized.families.base import FamilySpec, check_family_spec
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.checks import (
    check_global_latents,
    check_initial,
    check_initial_value,
    check_options,
    check_refinable,
    warn_of_unamortized,
)
from pyro_amortized.guides.global_guide import (
    build_global_guide,
    check_parameter_store,
    global_of,
    is_amortized,
    stored,
)
from pyro_amortized.guides.inputs import EncoderInput
from pyro_amortized.guides.levels import Sharing
from pyro_amortized.guides.posterior import PosteriorGuide
from pyro_amortized.guides.printing import describe, describe_in_html
from pyro_amortized.guides.sampling import (
    KeepLogDensity,
    add_gradient,
    check_scaled_once,
    log_conditionals,
    sample_local,
)
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import Refined
from pyro_amortized.objective.independence import check_absent
from pyro_amortized.objective.log_joint import takes_draws
from pyro_amortized.structure.dependence import posterior_parents
from pyro_amortized.structure.groups import GroupSpec, check_groups
from pyro_amortized.structure.observed import check_observed
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import Feasible, is_predicting, isolated, run_model
from pyro_amortized.structure.sites import is_enumerated
from pyro_amortized.structure.state import kept_generators, untouched
from pyro_amortized.structure.steady import check_steady
from pyro_amortized.structure.structure import Structure
from pyro_amortized.updates.base import UpdateRule
from pyro_amortized.updates.rules import rule_for

__all__ = ["GuideOptions", "LocalGuide"]


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
    groups: GroupSpec | None


class LocalGuide(PosteriorGuide):
    """What all guides of this package share; see :class:`AmortizedGuide` for the arguments.

    A member says where phi comes from by building an inference strategy in :meth:`_build_strategy`.
    """

    refining: ClassVar[type[Any]]
    """The class of what :meth:`refined` returns, which registers itself here."""

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
        groups: GroupSpec | None = None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"Cannot guide {model!r} because it is not callable; try passing the Pyro model itself.")
        check_family_spec(family)
        check_options(plate, encoder_input, global_guide, create_plates, init_loc_fn, init_scale, name)
        check_groups({} if groups is None else groups, plate)
        structures = StructureReader(plate, promised=encoder_input is not None, groups=groups)
        super().__init__(model, structures, create_plates, encoder_input=encoder_input)
        if name is not None:
            self._pyro_name = name
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self._family_spec = family
        self._global_guide_factory = global_guide
        self._sharing: Sharing | None = None
        self._takes_draws: bool | None = None
        self._first_parameter = ""
        self._taken: list[str] = []
        self.register_buffer("_like", torch.empty(0), persistent=False)  # knows precision and device, after moves too

    def __repr__(self) -> str:
        """The model, its sites, and what guides them, before and after the guide is set up."""
        return describe(self)

    def _repr_html_(self) -> str:
        return describe_in_html(self)

    # Building

    @abstractmethod
    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        """The strategy, sized for the data at hand.

        Args:
            inputs: The encoder's inputs of shapes ``(N, ...)``.
            init_loc: Initial locations of the flat latent, shape ``(N, D)``.
            structure: The structure of the first call.
        """

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
                self._read(args, kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, predicting: bool = False) -> Call:
        """A call as in the base class, after building the guide in the first one."""
        call = super()._read(args, kwargs, predicting=predicting)
        structure, built = call.structure, self._built_structure
        if not self._ready:
            self._build_or_forget(call)
        elif structure.layout is not self.layout and built is not None:
            plates, by_step = (self._sharing.plates, self._sharing.by_step) if self._sharing else ((), False)
            built.check_same(structure, plates=plates, by_step=by_step)
        if structure.global_sites and built is not None and type(global_of(self)).__module__.startswith("pyro."):
            check_global_latents(structure, built)
        if self._sharing is not None:
            family = self._sharing.family_of(structure, self._family, partial(self._parents, call))
            if family is not self._family:
                self.family = family.to(self._like)
        return call

    def _build_or_forget(self, call: Call) -> None:
        """Builds the guide, or leaves it as if it had never seen the call."""
        self._built_structure = call.structure.without_tensors()
        before = stored(self._pyro_name)  # by another guide, with which they would be shared
        self._taken = before if call.structure.global_sites else []
        try:
            with ExitStack() as stack:
                if self._pending_state:  # whose weights are not to be drawn
                    stack.enter_context(kept_generators())
                if torch.is_inference_mode_enabled():  # in which no parameter can be made
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.no_grad())
                self._build(call)
            if not self.training:
                self.eval()  # what has been built now too
            self._ready = True
            self._load_pending_state()
        except Exception:
            self._structures.clear()  # nothing has been built for what it has seen
            self._ready, self._built_structure = False, None
            self._levels = self._sharing = None
            for name in set(stored(self._pyro_name)) - set(before):
                del pyro.get_param_store()[name]
            raise

    def _build(self, call: Call) -> None:
        structure = call.structure
        check_steady(self._structures, call.of_model(self.model), observed=self._needs_observed)
        check_absent(call.of_model(self.model))
        if self._needs_inputs:
            warn_of_unamortized(call, self.model)
        init_loc = self._initial_locations(call)
        if structure.layout is not None:
            self._like = init_loc.new_empty(0)
            find_parents = partial(self._parents, call)
            self.family = build_family(self._family_spec, structure.layout.latent_dim, find_parents).to(init_loc)
            if structure.layout.is_apart:
                phi = init_loc.new_zeros(1, self.family.num_params)
                log_conditionals(structure.layout, self.family, phi, init_loc[:1])
        if structure.global_sites:
            build_global_guide(self, self._global_guide_factory, self.init_loc_fn, call)
        if structure.layout is not None:
            self._choose_levels(call)
        if structure.layout is not None or structure.discrete:
            self.inference = self._build_strategy(self._inputs(call), init_loc, structure)
            self._first_parameter = next((name for name, _ in self.inference.named_parameters()), "")
        self.layout = structure.layout
        self._shown_masks = tuple(structure.present) if self._shows_masks else ()
        seen = [structure.observed or {}, *(group.observed for group in structure.groups.values())]
        self._seen_sites = tuple(name for values in seen for name in values if name not in self._hidden)

    def _choose_levels(self, call: Call) -> None:
        """Decides, before there is an encoder, whether it is shown a hierarchy; most guides' are not."""

    def _initial_locations(self, call: Call) -> Tensor:
        """Where q starts: ``(N, D)``, without entries if there are no local latents."""
        with torch.no_grad(), untouched():
            start = InitMessenger(self._initial)
            trace = run_model(self.model, call.args, call.kwargs, call.structure.indices, (Feasible(), start))
        check_observed(trace)
        nodes: dict[str, Any] = trace.nodes
        layout = call.structure.layout
        if layout is None:
            return torch.empty(0)
        init_loc = layout.flatten({site.name: nodes[site.name]["value"] for site in layout.sites})
        check_initial(init_loc, layout.names)
        return init_loc

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

    def _check_prototype(self, part_trace: Any) -> None:
        """Called by the global guide on its own look at the model; the structure has been checked already."""

    def _parents(self, call: Call) -> Tensor:
        """Which dimensions of the flat latent each one depends on in the posterior, ``(D, D)``; one model run."""
        model = self.model_at_hand if call.model is None else call.model
        if model is None:
            raise ValueError(
                "Cannot find which local latents depend on which because this guide was loaded without its model; try "
                "`guide.model = model`."
            )
        return posterior_parents(call.of_model(model))

    # One call

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
        call = self._read(args, kwargs, predicting=is_predicting())
        check_parameter_store(self._taken, self._stored_parameters())
        result: dict[str, Tensor] = {}
        if call.structure.is_weighted:
            check_scaled_once(call.structure)
        if self.global_sites:
            guide = global_of(self)
            with KeepLogDensity({} if is_amortized(guide) else call.structure.global_weights):
                result.update(guide(*call.args, **call.kwargs))
            call.global_values = dict(result)
        if not self._sees_nothing(call):
            result.update(self._sample_local(call))
        return result

    def _sample_local(self, call: Call) -> dict[str, Tensor]:
        """Samples the local latents as Pyro sites."""
        layout = call.structure.layout
        if layout is None:
            return {}
        phi = layout.batch(self._phi(call))
        with call.plates[layout.plate]:
            result = sample_local(layout, self._sampling_family, phi, call.plates, f"{self._pyro_name}_latent")
            if call.structure.groups and not call.structure.missing:
                self._check_draws(call, result)
            if call.signal is not None:
                term = layout.spread(layout.batch(-call.signal.unsqueeze(-1)).squeeze(-1))
                with ExitStack() as stack:
                    for frame in layout.shared:
                        stack.enter_context(call.plates[frame.name] if frame.name else nullcontext())
                    add_gradient(f"{self._pyro_name}_signal", term)
        return result

    def _check_draws(self, call: Call, values: Mapping[str, Tensor]) -> None:
        """Refuses several draws at once where the model, as by ``a[county]``, would take draws for groups."""
        layout: Any = call.structure.layout
        model = self.model_at_hand if call.model is None else call.model
        if model is None or not any(site.has_draws(values[site.name], layout.dim) for site in layout.sites):
            return
        if self._takes_draws is None:
            with isolated(), torch.no_grad():
                given = replace(call.of_model(model), global_values=self._global_values(call))
                self._takes_draws = takes_draws(given, self._like)
        if not self._takes_draws:
            raise ValueError(
                f"Cannot sample several draws of {[site.name for site in layout.sites]} at once because the model "
                "gives other log-probabilities for them together than one by one; try indexing from the right, "
                "a[..., index], or "
                "vectorize_particles=False, Predictive(parallel=False)."
            )

    @property
    def _sampling_family(self) -> VariationalFamily:
        """The family, whose own parameters, if it has any, are registered with Pyro."""
        return self._family if self._family.is_mean_field else self.family

    def _stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A parameter of the strategy and one of the global guide, with their names in the parameter store."""
        if self._first_parameter:
            *path, leaf = self._first_parameter.split(".")
            module: Any = self._modules["inference"]
            for part in path:
                module = module._modules[part]
            yield (
                param_with_module_name(f"{self._pyro_name}.inference", self._first_parameter),
                module._parameters[leaf],
            )
        if self.global_sites:
            for name, parameter in self._modules["global_guide"].named_parameters():  # type: ignore[union-attr]
                yield f"{self._pyro_name}.global_guide.{name.removesuffix('_unconstrained')}", parameter
                return

    # Refinement

    def refined(
        self, num_steps: int, update: UpdateRule | None = None, *, num_particles: int = 32, **options: Any
    ) -> LocalGuide:
        """This guide with its answers refined by gradient steps for each datapoint: test-time refinement.

        Args:
            num_steps: Number of steps.
            update: The update rule; by default :class:`~pyro_amortized.Newton` for the normal and the full-rank family
                of up to 128 latents, else :class:`~pyro_amortized.NaturalGradient` or :class:`~pyro_amortized.Adam`.
            num_particles: Number of draws for each step's gradient.
            **options: Further ones of :class:`~pyro_amortized.SemiAmortizedGuide`, such as ``compile=True``.

        Returns:
            A :class:`~pyro_amortized.SemiAmortizedGuide` in ``eval()`` mode that shares this guide's parameters.

        Raises:
            ValueError: If this guide has not been set up yet, or has no local latents.
        """
        num_particles = check_count("num_particles", num_particles, 1, 32)
        check_refinable(self, options)
        if update is None and self._family is not None:
            update = rule_for(self._family, num_particles, options.get("estimator"))
        options = {"name": f"{self._pyro_name}_refined", "num_particles": num_particles, **options}
        guide = self.refining(self.model, num_steps=num_steps, update=update, **options)
        guide._adopt(self)
        return guide

    @contextmanager
    def repeatable(self) -> Iterator[None]:
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
