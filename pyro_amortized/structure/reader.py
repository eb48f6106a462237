"""The structure of one call, read off a run of the model: its plates, their indices, its latents and observed values.

The model runs once in every call, without log-probabilities. Only where the user has said what the encoder sees, so
that no observed values are asked for, is the run spared, and repeated now and then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.cache import call_key, versions
from pyro_amortized.structure.discrete import DiscreteSite, discrete_sites
from pyro_amortized.structure.groups import GroupSpec, check_index_failed, group_indices, read_groups
from pyro_amortized.structure.layout import SiteLayout, datapoint_plate
from pyro_amortized.structure.masking import site_mask
from pyro_amortized.structure.observed import observed_values
from pyro_amortized.structure.periodic import check_periodic
from pyro_amortized.structure.plates import PlateFrame, batch_depth, probe, subsample_indices
from pyro_amortized.structure.running import Site
from pyro_amortized.structure.sameness import run_key
from pyro_amortized.structure.sites import is_data, is_enumerated, latent_sites, sample_sites
from pyro_amortized.structure.structure import Structure

__all__ = ["StructureReader"]


@dataclass
class _Known:
    """What the calls with arguments of equal shapes have looked like.

    Attributes:
        structure: Their structure, without tensors.
        calls: Their number.
        agreed: The last of them in which the model was looked at.
    """

    structure: Structure
    calls: int = 1
    agreed: int = 1

    @property
    def is_due(self) -> bool:
        """Whether the next call is the second, third, fifth, ninth, ..., and then every 64th."""
        return self.calls & (self.calls - 1) == 0 if self.calls <= _MAX_SPARED else self.calls % _MAX_SPARED == 0


_MAX_SPARED = 64
"""Calls from one look at the model to the next, at most."""


class StructureReader:
    """Reads the structure of a call off a run of the model.

    Where the user has promised that arguments of equal shapes have equal structure, the run is spared after the first
    such call, and repeated in the second, third, fifth, ninth, ... and then in every 64th to check the promise. Masked,
    scaled and subsampled models, and those whose latents have bounds of their own, run in every call.

    Args:
        plate: The datapoint plate that the user asked for, or None.
        discrete: Whether the guide draws discrete local latents itself.
        promised: Whether the structure depends on the shapes of the arguments, and values that are no tensors, alone.
        encodes: Whether observed values are needed: latents of plates that have none count as global.
        groups: The indices of plates in long format.
        max_size: Number of structures kept.
    """

    def __init__(
        self,
        plate: str | None = None,
        *,
        discrete: bool = False,
        promised: bool = False,
        encodes: bool = False,
        groups: GroupSpec | None = None,
        max_size: int = 128,
    ) -> None:
        self.requested_plate = plate
        self.discrete = discrete
        self.promised = promised
        self.encodes = encodes
        self.groups = {} if groups is None else groups
        self.max_size = max_size
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._drawn: OrderedDict[Any, Structure] = OrderedDict()
        self._read_before: OrderedDict[Any, Structure] = OrderedDict()
        self._parameters: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what runs have looked like, for copies and files."""
        return {**self.__dict__, "_read_before": OrderedDict()}

    def clear(self) -> None:
        """Forgets all structures: the model is another one."""
        self._known.clear()
        self._drawn.clear()
        self._read_before.clear()
        self._parameters = None

    def foresee(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure | None:
        """What a call will look like if it draws a random subsample as the last one with arguments like these did.

        It spares a look: the guide's plates draw their indices first, and the model is looked at with these, once. That
        look tells whether the structure is what was foreseen.
        """
        return self._drawn.get(call_key((args, dict(kwargs)))) if self._drawn else None

    def look_as_foreseen(
        self, foreseen: Structure, model: Callable[..., Any], args: Any, kwargs: Any, indices: Mapping[str, Tensor]
    ) -> Structure:
        """Looks at a call with the indices that the foreseen plates have drawn.

        Raises:
            ValueError: If the plates are other ones than those foreseen; only once, the next call looks first.
        """
        try:
            structure = self.look(model, args, kwargs, indices)
        except ValueError:  # Pyro's, where the number of indices is another
            structure = self.look(model, args, kwargs)
            if structure.frames == foreseen.frames:
                raise
        if structure.frames != foreseen.frames:
            self._drawn.clear()
            raise ValueError(
                f"Cannot use the subsample that this call has drawn because {foreseen.difference(structure)} since the "
                "last call with arguments of the same shapes; try again: the next call looks at the model first."
            )
        return structure

    def read(
        self,
        model: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        data: Collection[str] = (),
    ) -> Structure:
        """The structure of a call; without observed values where the run is spared.

        Args:
            model: The model, or None if it is not at hand (a guide loaded from a file).
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            data: As for :meth:`look`.

        Raises:
            ValueError: If the structure cannot be known, is one that no guide can serve, or is another than that of an
                earlier call where it was promised to be the same.
        """
        key = call_key((args, dict(kwargs))) if self.promised and (args or kwargs) else None
        known = None if key is None else self._known.get(key)
        if known is not None and not (known.is_due and model is not None):
            known.calls += 1
            if not self.groups:
                return known.structure
            return replace(known.structure, groups=self._groups(model, args, kwargs, known.structure.frames))
        if model is None:
            raise ValueError(
                "Cannot run a guide that was loaded without its model, but for one with a function as encoder_input on "
                "arguments of shapes that it has seen, because the model shows what a call looks like; try "
                "`guide.model = model`."
            )
        structure = self.look(model, args, kwargs, data=data)
        if known is not None:
            self._check_promise(key, known, structure)
        elif key is not None and structure.is_fixed:
            self._keep(self._known, key, _Known(structure.without_tensors()))
        explicit = any(frame.kind == "explicit" for frame in structure.frames.values())
        foreseeable = structure.is_static and not structure.is_weighted and not structure.missing
        if structure.random_plates and foreseeable and not explicit:
            key = call_key((args, dict(kwargs)))
            if key is not None:
                self._keep(self._drawn, key, structure.without_tensors())
        return structure

    def _groups(self, model: Any, args: Any, kwargs: Mapping[str, Any], frames: Mapping[str, PlateFrame]) -> Any:
        """The indices of a call's plates in long format."""
        if not self.groups:
            return {}
        if model is None:
            raise ValueError(
                "Cannot read the index of a plate in long format because this guide was loaded without its model; try "
                "`guide.model = model`."
            )
        return group_indices(self.groups, model, args, kwargs, frames, str(self.requested_plate))

    def _keep(self, known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        known[key] = value
        if len(known) > self.max_size:
            known.popitem(last=False)

    def _check_promise(self, key: Any, known: _Known, structure: Structure) -> None:
        """Goes on trusting what is known of calls with a key, or trusts no promise any more and says so."""
        known.calls += 1
        changed = known.structure.difference(structure)
        if changed is None:
            known.agreed = known.calls
            self._known.move_to_end(key)
            return
        self.promised = False
        self.clear()
        raise ValueError(
            f"Cannot use what earlier calls have shown of the model because {changed} for arguments of the same "
            "shapes, and encoder_input=... promises that the structure depends on these alone. Of the calls with such "
            f"arguments those since number {known.agreed + 1} may have given wrong results; in number {known.agreed} "
            "the model was last looked at. Try again: from now on this guide looks at the model in every call, as with "
            "encoder_input=None; or make what changes an argument of the model."
        )

    def look(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, Tensor] | None = None,
        data: Collection[str] = (),
    ) -> Structure:
        """Runs the model once and reads the structure off the run.

        Args:
            model: A Pyro model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            values: Values to give to sites, such as the indices of a plate.
            data: Names of sites that are no latents even where they are not observed: those to be predicted.

        Raises:
            ValueError: If the structure is one that no guide can serve, or the model changes its arguments.
        """
        before = versions(args, kwargs)
        try:
            trace, frames = probe(model, args, kwargs, values, first=self._parameters is None)
        except IndexError as error:  # torch's
            check_index_failed(self.groups, model, args, kwargs, error)
            raise
        parameters = trace.param_nodes
        self._parameters = (
            parameters if self._parameters in (None, parameters) else None
        )  # other modules: the next is first
        if versions(args, kwargs) != before:
            raise ValueError(
                "Cannot guide a model that changes its arguments in place because guide and model would see different "
                "data; try x = x.clone() at its beginning."
            )
        plain = not (data or self.groups or self.discrete)
        key = run_key(trace, frames) if plain else None
        before_now = None if key is None else self._read_before.get(key)
        if before_now is not None:
            return _with_values(before_now, trace)
        missing = tuple(name for name in latent_sites(trace) if name in data) if data else ()
        for name in missing:
            trace.nodes[name]["is_observed"] = True
        grouped = bool(self.groups)
        plate = datapoint_plate(trace, frames, self.requested_plate, encodes=self.encodes, grouped=grouped)
        discrete = discrete_sites(trace, frames, plate) if self.discrete and plate is not None else ()
        structure = _with_values(_read_structure(trace, frames, plate, discrete, missing), trace)
        if key is not None:
            self._keep(self._read_before, key, structure.without_tensors().worked_out())
        found = self._groups(model, args, kwargs, frames)
        return replace(structure, groups=read_groups(trace, frames, found, str(plate), missing)) if found else structure


def _read_structure(
    trace: Trace,
    frames: Mapping[str, PlateFrame],
    plate: str | None,
    discrete: tuple[DiscreteSite, ...],
    missing: tuple[str, ...],
) -> Structure:
    """Reads a structure off a run, but for its values, given the datapoints and the discrete latents of a guide."""
    local = {site.name for site in discrete}
    layout = None if plate is None else SiteLayout.from_trace(trace, frames, plate, local)
    if layout is not None and not layout.sites:
        layout = None
    local |= set() if layout is None else {site.name for site in layout.sites}
    global_sites = {name: site for name, site in latent_sites(trace).items() if name not in local}
    for name, site in global_sites.items():
        check_periodic(name, site)
    weights = {name: site_mask(site).simplified for name, site in global_sites.items()}
    return Structure(
        frames=frames,
        plate=plate,
        layout=layout,
        global_sites=tuple(global_sites),
        global_plates=tuple({f.name for site in global_sites.values() for f in site["cond_indep_stack"]}),
        global_shapes={name: _shape_outside_plates(site) for name, site in global_sites.items()},
        discrete=discrete,
        global_weights={name: weight for name, weight in weights.items() if not weight.is_neutral},
        data_plates=_subsampled_data_plates(trace, frames, plate),
        depth=batch_depth(trace, frames),
        data=tuple(name for name, site in sample_sites(trace).items() if is_data(site)),
        missing=missing,
        enumerated=tuple(
            name for name, site in sample_sites(trace).items() if not site["is_observed"] and is_enumerated(site)
        ),
    )


def _shape_outside_plates(site: Site) -> tuple[int, ...]:
    """The shape of a site's values, with size 1 at the dimensions of its plates."""
    shape, event_dim = [*site["value"].shape], site["fn"].event_dim
    for frame in site["cond_indep_stack"]:
        if len(shape) - event_dim >= -frame.dim:
            shape[frame.dim - event_dim] = 1
    return tuple(shape)


def _with_values(structure: Structure, trace: Trace) -> Structure:
    """A structure with the indices and the observed values of a run that has it."""
    indices = subsample_indices(trace, structure.frames)
    if structure.plate is None:
        return structure.holding(indices, {}, {})
    return structure.holding(indices, *observed_values(trace, structure.datapoints, structure.missing))


def _subsampled_data_plates(trace: Trace, frames: Mapping[str, PlateFrame], plate: str | None) -> tuple[str, ...]:
    stacks = [[f.name for f in site["cond_indep_stack"]] for site in sample_sites(trace).values() if is_data(site)]
    names = [name for stack in stacks if plate in stack for name in stack if frames[name].size < frames[name].full_size]
    return tuple(dict.fromkeys(name for name in names if name != plate))
