"""A guide's encoder as a program of torch alone, for where neither Pyro nor this package is at hand.

The program is traced from what the guide itself says of a call that consists of the encoder's inputs and nothing else:
the structure is that of an example, in which the datapoints are of no fixed number.
"""

from __future__ import annotations

import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_probabilities
from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.global_guide import global_quantiles, is_amortized
from pyro_amortized.inference.refined import Refined, start_of
from pyro_amortized.structure.layout import SiteLayout
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.masking import NEUTRAL
from pyro_amortized.structure.stacked_site import rebuilt, tensors_of

__all__ = ["OUTPUTS", "export_guide"]

OUTPUTS = ("phi", "median", "quantiles", "sample")
"""What a program can give."""

Answer = Callable[[Call], Any]
"""What a guide says of a call."""


class _Served(nn.Module):
    """What a guide says of the encoder's inputs, whatever their number of datapoints.

    Args:
        call: The example, of which the structure alone is used.
        rows: Names of the plates along whose entries the first axes of the inputs run.
        answer: What is said of a call.
        parts: The modules whose parameters it takes.
    """

    def __init__(self, call: Call, rows: Sequence[str], answer: Answer, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.call, self.rows, self.answer = call, rows, answer
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        """The answer to these inputs."""
        frames = dict(self.call.structure.frames)
        for name, x in zip(self.rows, inputs, strict=True):
            frames[name] = replace(frames[name], size=x.shape[0], full_size=x.shape[0])
        structure = replace(self.call.structure, frames=frames)
        return self.answer(replace(self.call, structure=structure, inputs=inputs))


def export_guide(guide: Any, call: Call, output: str, quantiles: Any) -> torch.export.ExportedProgram:
    """The program of a guide that has been set up.

    Args:
        guide: The guide.
        call: An example of its calls.
        output: One of :data:`OUTPUTS`.
        quantiles: The probabilities of ``"quantiles"``.

    Raises:
        ValueError: If there is no such output, no encoder, or none that can be traced.
    """
    probabilities = [0.5] if output == "median" else check_probabilities(quantiles)
    _check_served(guide, call, output)
    inputs, original = guide._inputs(call), call.structure.layout
    layout = original
    rows = _rows(guide, call, inputs)
    known = _known(guide, call, probabilities) if output in ("median", "quantiles") else {}
    if layout is not None:
        layout = replace(layout, sites=tuple(_alone(site, layout, output) for site in layout.sites))
    call = replace(call, structure=replace(call.structure, layout=layout, observed={}, indices={}))

    def answer(call: Call) -> Any:
        if output in ("phi", "sample"):
            return guide._phi(call) if output == "phi" else guide._local_draw(call)
        found = {**known, **guide._local_quantiles(probabilities, call)}
        return {name: x.squeeze(0) for name, x in found.items()} if output == "median" else found

    parts = {"inference": start_of(guide._modules["inference"])}
    parts.update({name: guide._modules[name] for name in ("family", "codebook") if guide._modules.get(name)})
    served = _Served(call, rows, answer, parts)
    whole = torch.autocast(inputs[0].device.type, enabled=False)
    with torch.no_grad(), whole, evaluating(served), pyro.validation_enabled(False):
        program = _copied(_traced(served, _of_several(inputs, rows)))
        _check_numbers(program, served, inputs)
    _warn(guide, original)
    return program


def _check_served(guide: Any, call: Call, output: str) -> None:
    """Raises a ValueError if a guide has no such output to give, or no encoder."""
    structure = call.structure
    if output not in OUTPUTS:
        raise ValueError(f'Cannot export output={output!r} because it is none of {OUTPUTS}; try output="phi".')
    if structure.layout is None and not structure.discrete:
        raise ValueError(
            "Cannot export a program because the model has no local latents, and there is nothing to encode; try "
            "guide.quantiles(...), whose answers are numbers."
        )
    if not start_of(guide._modules["inference"]).needs_inputs:
        raise ValueError(
            f"Cannot export {type(guide).__name__} because its variational parameters come from no encoder; try "
            'AmortizedGuide, or a guide that refines with initial="encoder".'
        )
    if structure.discrete and output == "phi":
        raise ValueError(
            f"Cannot export phi because latents {[site.name for site in structure.discrete]} are discrete, and what is "
            'known of them is no vector of variational parameters; try output="median", or output="sample".'
        )


def _rows(guide: Any, call: Call, inputs: Sequence[Tensor]) -> list[str]:
    """Names of the plates along whose entries the first axes of the inputs run."""
    levels, structure = guide._levels, call.structure
    plate, groups = structure.datapoints.name, structure.groups
    if not groups:
        return [plate] * len(inputs)
    if levels is None:
        raise ValueError(
            f"Cannot export this encoder because it is not known which of its inputs have a row for each entry of "
            f"{[*groups]}, in long format, and which for each datapoint; try PlateEncoder(), the default."
        )
    found = [*levels.values, *levels.masks.values()]
    names = [where.plates[0] if where.plates and where.plates[0] in groups else plate for where in found]
    return [*names, *(name for group in levels.groups for name in (group, groups[group].parent))]


def _of_several(inputs: Sequence[Tensor], rows: Sequence[str]) -> tuple[Tensor, ...]:
    """The inputs with two rows at least: tracing takes a single one for all that there can be."""
    if all(x.shape[0] > 1 for x in inputs):
        return tuple(inputs)
    if len({*rows}) == 1:
        return tuple(torch.cat([x, x]) for x in inputs)
    few = next(name for name, x in zip(rows, inputs, strict=True) if x.shape[0] < 2)
    raise ValueError(
        f"Cannot export from an example with a single entry of plate {few!r} because tracing would take that for all "
        "that there can be; try an example of two or more."
    )


def _alone(site: LocalSite, layout: SiteLayout, output: str) -> LocalSite:
    """A site as that of any datapoints: without masks and scales, its support the same for all of them."""
    site = replace(site, present=None, weight=NEUTRAL)
    if site.is_static or output == "phi":
        return site
    rank = max([-layout.dim, *(-dim for dim, _ in site.inner)]) + site.event_dim
    axis, bounds = rank - site.event_dim + layout.dim, []
    for bound in tensors_of(site.transform, rank):
        first = bound[(slice(None),) * axis + (slice(1),)] if bound.dim() == rank else bound
        if not bool((bound == first).all()):
            raise ValueError(
                f"Cannot export values of local site {site.name!r} because its support differs between datapoints, and "
                'what decides it is no input of the encoder; try output="phi", in unconstrained space.'
            )
        bounds.append(first.detach().clone())
    return replace(site, transform=rebuilt(site.transform, iter(bounds), 1))


def _known(guide: Any, call: Call, probabilities: Sequence[float]) -> dict[str, Tensor]:
    """Quantiles of the global latents, which are numbers, unless they have an encoder of their own."""
    if not guide.global_sites or is_amortized(guide._modules["global_guide"]):
        return {}
    found = global_quantiles(guide, probabilities, call.args, call.kwargs)
    return {name: value.detach().clone() for name, value in found.items()}


def _traced(served: _Served, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The program; of encoders that ask for ``len(x)`` by way of a program of these alone."""
    with _plainly():
        try:
            return _export(served, inputs, served.rows)
        except Exception as error:  # of whatever kind: it is the user's encoder that runs
            first = error
        strategy: Any = served.inference
        encoder = strategy.encoder
        try:
            strategy.encoder = _export(encoder, inputs, served.rows, strict=True).module()
            return _export(served, inputs, served.rows)
        except Exception as second:
            cause = str(first).partition("\n")[0] or type(first).__name__
            raise ValueError(
                f"Cannot export this guide because torch.export cannot trace its encoder {type(encoder).__name__} "
                f"({cause}); try operations of torch alone, x.shape[0] in place of len(x), and no decisions by values."
            ) from second
        finally:
            strategy.encoder = encoder


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], rows: Sequence[str], *, strict: bool = False
) -> torch.export.ExportedProgram:
    """A module that takes any number of entries of the plates along whose entries the first axes run."""
    names = {row: f"num_{re.sub(r'[^0-9a-zA-Z_]', '_', row)}" for row in dict.fromkeys(rows)}
    dims = {row: torch.export.Dim(name) for row, name in names.items()}
    along = tuple({0: dims[row]} for row in rows)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    shapes = (along,) if takes_any else along
    return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)


def _copied(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with parameters of its own, which training goes on without, as it will be once it has been saved."""
    file = io.BytesIO()
    for parameter in program.state_dict.values():
        vars(parameter).pop("unconstrained", None)  # Pyro's, made anew when it is asked for, which cannot be saved
    with _plainly():
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)


@contextmanager
def _plainly() -> Iterator[None]:
    """Leaves out what torch's exporter tells of its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_numbers(program: torch.export.ExportedProgram, served: _Served, inputs: Sequence[Tensor]) -> None:
    """Raises a ValueError unless a program gives what the guide does, for other numbers of datapoints too."""
    with _plainly():
        run, found = program.module(), [tuple(inputs)]
    if len({*served.rows}) == 1:
        found += [tuple(x[:1] for x in inputs), tuple(torch.cat([x, x, x[:1]]) for x in inputs)]
    for example in found:
        values = []
        for module in (served, run):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                values.append(module(*example))
        expected, actual = ([*x.values()] if isinstance(x, dict) else [x] for x in values)
        if not all(_same(a, b) for a, b in zip(actual, expected, strict=True)):
            raise ValueError(
                "Cannot export this guide because the program gives other numbers than the guide does for "
                f"{example[0].shape[0]} rows; try an encoder of torch alone, whose operations do not depend on values "
                "nor on the number of rows."
            )


def _same(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def _warn(guide: Any, layout: SiteLayout | None) -> None:
    """Says what a program leaves out."""
    strategy = guide._modules["inference"]
    if isinstance(strategy, Refined) and guide.num_steps:
        warnings.warn(
            f"This program gives what the encoder of {type(guide).__name__} says, without the {guide.num_steps} steps "
            "of refinement, which take gradients of the model.",
            stacklevel=4,
        )
    masked = [] if layout is None else [site.name for site in layout.sites if site.present is not None]
    if masked:
        warnings.warn(
            f"This program knows no masks of latents: what it says of {masked[:6]} where the model masks them means "
            "nothing, and is no standard normal as from the guide.",
            stacklevel=4,
        )
