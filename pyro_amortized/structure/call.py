"""One call of a model, with what it looks like, as one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from pyro_amortized.structure.arguments import CallArguments
from pyro_amortized.structure.running import run_model
from pyro_amortized.structure.structure import Structure

__all__ = ["ModelCall"]


@dataclass(frozen=True)
class ModelCall:
    """One call of a model.

    Attributes:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What the model looks like in this call, with the indices of subsampled plates.
        global_values: Values of the global latent sites.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    structure: Structure
    global_values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Tensor]:
        """The global latents, and the indices of plates, by site."""
        return {**self.global_values, **self.structure.indices}

    def run(self, values: Mapping[str, Tensor] | None = None, handlers: Sequence[Any] = ()) -> Trace:
        """Runs the model with what is given, and further values, apart from the caller's handlers."""
        return run_model(self.model, self.args, self.kwargs, {**self.given, **(values or {})}, handlers)

    def of_rows(self, arguments: CallArguments, rows: Tensor) -> ModelCall:
        """The call with arguments that are cut to some of its datapoints."""
        whole = self.structure
        frame = whole.datapoints
        size = len(rows)
        part = replace(frame, size=size, full_size=frame.full_size if frame.subsampled else size)
        indices = {k: v[rows.to(v.device)] if k == frame.name else v for k, v in whole.indices.items()}
        frames = {**whole.frames, frame.name: part}
        groups = {}
        for name, group in whole.groups.items():
            entries, groups[name] = group.of_rows(rows, frame.size)
            frames[name] = replace(frames[name], size=len(entries), full_size=len(entries))
        structure = replace(whole, frames=frames, indices=indices, observed=None, groups=groups)
        return replace(self, args=tuple(arguments[0]), kwargs=arguments[1], structure=structure)
