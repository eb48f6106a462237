"""From the arguments of a call to what the call looks like: its structure, with the plates that a guide opens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch

from pyro_amortized.guides.call import Call
from pyro_amortized.guides.checks import check_created, created_plates
from pyro_amortized.guides.saving import SavedGuide
from pyro_amortized.guides.simulated import simulated_call, takes_observations
from pyro_amortized.structure.groups import GroupSpec
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import isolated
from pyro_amortized.structure.structure import Structure

__all__ = ["ReadingGuide"]


class ReadingGuide(SavedGuide):
    """A guide that reads what each call of its model looks like.

    Args:
        model: A Pyro model.
        structures: What reads the structure of a call off a run of the model.
        create_plates: A function of the model's arguments that returns the plates to use, or None.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        structures: StructureReader,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._structures = structures
        self._built_structure: Structure | None = None
        self.layout: SiteLayout | None = None

    @property
    def plate(self) -> str | None:
        """Name of the datapoint plate: as asked for, or as found by a guide that has been set up; else None."""
        found = None if self._built_structure is None else self._built_structure.plate
        return found if self._structures.requested_plate is None else self._structures.requested_plate

    @property
    def groups(self) -> GroupSpec:
        """The indices of plates in long format, as they were given."""
        return self._structures.groups

    @property
    def global_sites(self) -> tuple[str, ...]:
        """Names of the latents that all datapoints share; known once the guide has been set up."""
        return () if self._built_structure is None else self._built_structure.global_sites

    @property
    def has_local_latents(self) -> bool:
        """Whether the model has latents of single datapoints; known once the guide has been set up."""
        built = self._built_structure
        return built is not None and built.latents != {*built.global_sites}

    @property
    def draws_discrete(self) -> tuple[str, ...]:
        """Names of the discrete latents that the guide draws itself; known once the guide has been set up."""
        return () if self._built_structure is None else tuple(site.name for site in self._built_structure.discrete)

    @property
    def _needs_observed(self) -> bool:
        """Whether the observed values are asked for in every call."""
        return True

    def _model_changed(self) -> None:
        if "_structures" in self.__dict__:
            self._structures.clear()

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, predicting: bool = False) -> Call:
        """The structure of a call, and its plates.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            predicting: Whether sites that were observed when the guide was set up may be latent, to be predicted.
        """
        if "observations" in kwargs and not self._observes_itself(args, kwargs):
            return self._read_simulated(args, kwargs)
        alone = self._ready and self.create_plates is None and self.master is None
        foreseen = self._structures.foresee(args, kwargs) if alone else None
        data = self._built_structure.data if predicting and self._built_structure is not None else ()
        structure = foreseen or self._without_model or self._structures.read(self.model_at_hand, args, kwargs, data)
        call = Call(args, kwargs, structure, {})
        call.plates = plates = self._call_plates(call)
        drawn = structure.random_plates if self.create_plates is None else [n for n in plates if n in structure.frames]
        if drawn:
            indices = {**structure.indices, **{name: plates[name].indices for name in drawn if name in plates}}
            check_created(structure, indices)
            call.structure = replace(
                structure, indices=indices, observed=None, present={}
            )  # they were of other indices
            if foreseen is not None:
                looked = self._structures.look_as_foreseen(foreseen, self.model, args, kwargs, indices)
                call.structure = replace(looked, indices={**looked.indices, **indices})
            elif not self._ready or self._needs_observed or not structure.is_static or structure.is_weighted:
                call.structure = self._look_again(call)
        return call

    @property
    def _without_model(self) -> Structure | None:
        """What calls of a guide look like that was loaded without its model, and has global latents alone."""
        built = self._built_structure
        if self.model_at_hand is not None or built is None:
            return None
        return built if built.is_fixed and not self.has_local_latents else None

    def _look_again(self, call: Call) -> Structure:
        """The structure of a call at the indices that are known, those of plates that it leaves to chance too."""
        known = call.structure
        looked = self._structures.look(self.model, call.args, call.kwargs, known.indices, known.missing)
        return replace(looked, indices={**looked.indices, **known.indices})

    def _read_simulated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of wake-sleep or CSIS, which hand their simulated data to the guide as ``observations``."""
        observations = kwargs["observations"]
        own = {name: value for name, value in kwargs.items() if name != "observations"}
        structure = self._structures.look(self.model, args, own)
        plates = self._call_plates(Call(args, own, structure, {}))
        kwargs = kwargs if takes_observations(self.model) else own
        indices = {name: plate.indices for name, plate in plates.items() if plate.subsample_size < plate.size}
        with isolated():
            model, args, kwargs, complete = simulated_call(self.model, args, kwargs, observations, indices)
            structure = self._structures.look(model, args, kwargs, indices)
        structure = replace(structure, indices={**structure.indices, **indices})
        return Call(args, kwargs, structure, plates, model=model, complete=complete)

    def _observes_itself(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model observes what it is given as ``observations``, so that nothing needs to be put in."""
        observations, model = kwargs["observations"], self.model_at_hand
        if model is None or not isinstance(observations, Mapping):
            return True
        if not takes_observations(model):
            return False
        observed = self._structures.look(model, args, kwargs).observed or {}
        values = {name: torch.as_tensor(value) for name, value in observations.items()}
        return all(n in observed and value.data_ptr() == observed[n].data_ptr() for n, value in values.items())

    def _call_plates(self, call: Call) -> dict[str, pyro.plate]:
        """The plates of a call by name, opened by nobody yet."""
        structure = call.structure
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
            plates = created_plates(self.create_plates(*call.args, **call.kwargs), structure.frames)
        for name in structure.latent_plates:
            if name not in plates:
                plates[name] = structure.frames[name].create(structure.indices.get(name))
        self.__dict__["plates"] = plates
        return plates

    def _with_all_indices(self, call: Call) -> Structure:
        """The structure of a call, looked at again where a plate that the guide does not open drew its indices."""
        structure = call.structure
        if all(name in structure.indices for name in structure.random_plates):
            return structure
        return self._look_again(call)
