"""From a guide to the groups of an export, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_amortized.diagnostics.checks import check_model, check_repeatable, check_same_model
from pyro_amortized.diagnostics.problem import bind
from pyro_amortized.diagnostics.shards import Shards
from pyro_amortized.export.batch import Batch, Options
from pyro_amortized.export.groups import to_dataset
from pyro_amortized.export.marginal import Marginal
from pyro_amortized.export.runs import Draws, Mode, ModelRuns
from pyro_amortized.guides import LocalGuide
from pyro_amortized.guides.posterior import Inferred
from pyro_amortized.objective.noise import draw, generator, seeded
from pyro_amortized.structure.call import ModelCall
from pyro_amortized.structure.signature import named_arguments
from pyro_amortized.structure.structure import Structure

if TYPE_CHECKING:
    import xarray

__all__ = ["Exporter", "check_guide"]


def check_guide(model: Any, guide: Any) -> None:
    """Raises a ValueError unless these are a model and a guide of this package."""
    check_model(model)
    if not isinstance(guide, LocalGuide):
        raise ValueError(
            f"Cannot export the posterior of a {type(guide).__name__} because it is no guide of this package; try an "
            "AmortizedGuide, which serves the latents outside of its plate by global_guide=...."
        )


def _drawn(inferred: Inferred) -> Inferred:
    """What a guide says, or its refusal where it draws discrete latents, which only whole calls of it give."""
    if inferred.structure.discrete:
        _ = replace(inferred, phi=None).local
    return inferred


def _check_names(structure: Structure) -> None:
    """Raises a ValueError if a plate has the name of a dimension that every export has."""
    taken = sorted({"chain", "draw"} & structure.frames.keys())
    if taken:
        raise ValueError(
            f"Cannot export a model with a plate {taken[0]!r} because ArviZ has a dimension of that name; try "
            f"`pyro.plate({taken[0] + 's'!r}, ...)` in the model, and a guide of it."
        )


def _version() -> str:
    try:
        return metadata.version("pyro-amortized")
    except metadata.PackageNotFoundError:
        return "not installed"


class Exporter:
    """Exports one batch after the other, with the same draws of the global latents.

    Args:
        model: The Pyro model.
        guide: The guide.
        options: What was asked for.
        shards: How processes share the batches.
        marginal: Log-likelihoods at draws of the global latents, which are then those of the export; or None.

    Attributes:
        plate: Name of the datapoint plate; None before the first batch, and if there is none.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: LocalGuide,
        options: Options,
        shards: Shards,
        marginal: Marginal | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.options = options
        self.plate: str | None = None
        self._shards, self._number = shards, shards.number(0)
        self._marginal = marginal
        self._globals: Mapping[str, Tensor] | None = None if marginal is None else marginal.globals
        self._prior_globals: dict[str, Tensor] = {}
        self._modes: dict[Any, tuple[dict[str, Mode], tuple[str, ...]]] = {}

    @torch.no_grad()
    def export(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], advance: Callable[[int], Any] | None = None
    ) -> dict[str, xarray.Dataset]:
        """The groups of the next batch.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            advance: Called with the number of draws done.
        """
        with seeded(generator(self.options.seed, 30, self._number)):
            structure, phi = self._infer(args, kwargs)
            _check_names(structure)
            batch = Batch(
                ModelRuns(ModelCall(self.model, args, kwargs, structure)),
                self.options,
                self._log_q(phi),
                self._number == 0,
            )
            if self.options.quantiles:
                batch.add_quantiles(self._quantiles(batch.runs.call, phi))
            if self.options.num_samples:
                self._add_draws(batch, phi, advance)
            if batch.has_prior:
                found = batch.add_prior(self._prior_globals)
                self._prior_globals = self._prior_globals or found
        batch.add_observed()
        batch.add_arguments(named_arguments(self.model, args, kwargs))
        if self._marginal is not None:
            self._marginal.add_to(batch.groups, self._number, batch.runs)
        self._number += self._shards.number(1) - self._shards.number(0)
        self.plate = structure.plate
        attributes = self._attributes(structure)
        return {name: to_dataset(name, group, structure, attributes) for name, group in batch.groups.items()}

    def _add_draws(self, batch: Batch, phi: Tensor | None, advance: Callable[[int], Any] | None) -> None:
        draws = self._draw(batch.runs, phi)
        self._choose_modes(batch, draws)
        if self.options.resample:
            draws = batch.resampled(draws, generator(self.options.seed, 31, self._number))
        batch.add_posterior(draws)
        batch.add_evaluations(draws, advance)

    def _quantiles(self, call: ModelCall, phi: Tensor | None) -> dict[str, Tensor]:
        """Quantiles ``(Q, *batch, *event)`` by site; of global latents only in the first batch."""
        structure = call.structure
        guide, probs, values = self.guide, torch.tensor(self.options.quantiles), {}
        if structure.global_sites and self._number == 0:
            try:
                found = guide.quantiles(self.options.quantiles, *call.args, **call.kwargs)
            except (AttributeError, NotImplementedError) as error:
                raise ValueError(
                    f"Cannot take quantiles of global latents {list(structure.global_sites)} because "
                    f"{type(guide.global_guide).__name__} knows none; try quantiles=(0.5,), to_arviz for draws, or "
                    "another global_guide, such as AutoNormal."
                ) from error
            values = {name: found[name] for name in structure.global_sites}
        if structure.layout is not None and phi is not None:
            values.update(structure.layout.values(guide.family.quantile(phi, probs.to(phi))))
        return values

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Structure, Tensor | None]:
        """The structure of a call with all indices, and phi where there are local latents."""
        guide = self.guide
        guide.setup(*args, **kwargs)
        if guide.layout is None:
            structure = _drawn(guide.infer(*args, **kwargs)).structure
            check_same_model(guide, ModelCall(self.model, args, kwargs, structure))
            return structure, None
        if self.options.weighs and self._number == 0:
            self._check(args, kwargs)
        with guide.repeatable():
            inferred = _drawn(guide.infer(*args, **kwargs))
            structure, phi = inferred.structure, inferred.phi
            call = ModelCall(self.model, args, kwargs, structure)
            check_same_model(guide, call)
            if self._number == 0 and phi is not None:
                check_repeatable(guide, call, phi)
        return structure, phi

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes sure, in the first batch, that log-densities can be trusted."""
        try:
            bind(self.model, self.guide, args, kwargs, self.options.seed)
        except NotImplementedError:  # a global guide that knows no median, at which the check would be
            return

    def _draw(self, runs: ModelRuns, phi: Tensor | None) -> Draws:
        names = [name for name in runs.structure.global_sites if name in runs.latent]
        if self.options.resample and (phi is None or names):
            cause = f"global latents {names} are drawn, so that its weights would mix draws of them"
            remedy = "pyro.condition(model, data=guide.global_median(*args)) for the model"
            if phi is None:
                cause, remedy = "the model has no local latents", "resample=False"
            raise ValueError(f"Cannot resample the draws of each datapoint because {cause}; try {remedy}.")
        if self._globals is None:
            with seeded(generator(self.options.seed, 33)):  # the same in all processes
                self._globals = self._draw_globals(runs, names) if names else {}
        if phi is None:
            return Draws(None, self._globals)
        rng = generator(self.options.seed, 32, self._number)
        return Draws(draw(self.guide.family, phi, self.options.num_samples, rng), self._globals)

    def _draw_globals(self, runs: ModelRuns, names: list[str]) -> dict[str, Tensor]:
        """Draws of global latents, one by one, which every autoguide can do."""
        draws = [
            self.guide.sample_globals(*runs.call.args, **runs.call.kwargs) for _ in range(self.options.num_samples)
        ]
        return {name: torch.stack([values[name] for values in draws]) for name in names}

    def _log_q(self, phi: Tensor | None) -> Callable[[Tensor], Tensor]:
        if phi is None:
            return lambda z: z
        return self.guide.family(phi).log_prob

    def _choose_modes(self, batch: Batch, draws: Draws) -> None:
        """Finds out how draws may be evaluated, once for batches of the same structure."""
        runs = batch.runs
        key = (tuple(runs.structure.frames.values()), bool(self._prior_globals))
        if key not in self._modes:
            if self.options.weighs:
                runs.check_outside(draws)
            runs.leave_out_shared(draws)
            for function in batch.passes if self.options.num_samples > 1 else ():
                runs.choose_mode(function, draws)
            if batch.has_prior and self.options.num_prior_samples > 1:
                runs.choose_mode(runs.prior, Draws(None, self._prior_globals))
            self._modes[key] = runs.modes, runs.computed
        runs.modes, runs.computed = self._modes[key]

    def _attributes(self, structure: Structure) -> dict[str, Any]:
        guide, options = self.guide, self.options
        local, drawn = structure.layout is not None, sorted(self._globals or ())
        return {
            "created_at": datetime.now(timezone.utc).isoformat(),
            "inference_library": "pyro_amortized",
            "inference_library_version": _version(),
            "guide": type(guide).__name__,
            "family": type(guide.family).__name__ if local else "none",
            "latent_dim": structure.layout.latent_dim if structure.layout is not None else 0,
            "datapoint_plate": structure.plate or "none",
            "global_latents": f"drawn from {type(guide.global_guide).__name__}: {', '.join(drawn)}"
            if drawn
            else "none",
            "resampled": int(options.resample),
            "kind_of_log_likelihood": "marginal" if self._marginal is not None else "given local latents",
            "seed": options.seed,
        }
