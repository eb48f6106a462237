"""From a call to the variational parameters of its datapoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Size, Tensor

from pyro_amortized.families import VariationalFamily
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.checks import check_known, check_predictable, check_shape, check_summed_out, check_values
from pyro_amortized.guides.global_guide import global_median
from pyro_amortized.guides.inputs import EncoderInput, check_global_shapes, encoder_inputs
from pyro_amortized.guides.level_inputs import LevelInputs
from pyro_amortized.guides.reading import ReadingGuide
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.structure.running import isolated
from pyro_amortized.structure.whole import WholeObservations

__all__ = ["EncodingGuide"]


class EncodingGuide(ReadingGuide):
    """A guide that finds the variational parameters phi of each call's datapoints by an inference strategy."""

    family: VariationalFamily
    inference: InferenceStrategy

    def __init__(self, *args: Any, encoder_input: EncoderInput) -> None:
        super().__init__(*args)
        plates = encoder_input if isinstance(encoder_input, Mapping) else {}
        self._encoder_plates = {name: plate for plate, names in plates.items() for name in _listed(names)}
        self._encoder_input = [*self._encoder_plates] if isinstance(encoder_input, Mapping) else encoder_input
        self._levels: LevelInputs | None = None
        self._hold_all: dict[Any, bool] = {}
        self._whole_observations = WholeObservations()
        self._shown_masks: tuple[str, ...] = ()
        self._seen_sites: tuple[str, ...] = ()
        self._global_shapes: dict[str, Size] | None = None

    # What a member says of its encoder

    @property
    def _needs_inputs(self) -> bool:
        """Whether phi is inferred from anything of the call."""
        strategy: Any = self._modules.get("inference")
        return True if strategy is None else strategy.needs_inputs

    @property
    def _needs_observed(self) -> bool:
        return self._encoder_input is None and self._needs_inputs

    @property
    def _hidden(self) -> Collection[str]:
        """Names of observed sites that the encoder does not see: those summed out in the call of the set-up."""
        return () if self._built_structure is None else self._built_structure.enumerated

    @property
    def _shows_masks(self) -> bool:
        """Whether the encoder also sees which observed values are masked."""
        return False

    @property
    def _family(self) -> VariationalFamily:
        """The family; reading ``self.family`` instead registers its own parameters, if it has any, with Pyro."""
        return self._modules.get("family")  # type: ignore[return-value]

    # Inputs

    def _inputs(self, call: Call) -> tuple[Tensor, ...]:
        if call.inputs is not None:
            return call.inputs
        if not self._needs_inputs:
            return ()
        if self._needs_observed and self._built_structure is not None:
            check_summed_out(call.structure, self._built_structure, self._hidden)
        self._condition(call)
        inputs = self._plain_inputs(call, masks=self._shows_masks and self._levels is None)
        if self._levels is None or not inputs:
            return inputs
        return self._levels.arranged(inputs, self._present(call), call.structure)

    def _plain_inputs(self, call: Call, *, masks: bool = False) -> tuple[Tensor, ...]:
        """The encoder's inputs as they are found, in no hierarchy."""
        return encoder_inputs(
            self._encoder_input,
            self.model_at_hand,
            call,
            known=self._hold_all,
            show_masks=masks,
            show_indices=self._levels is None,
            but=self._hidden,
            whole=self._whole_observations,
        )

    def _present(self, call: Call) -> dict[str, Tensor]:
        """Which observed values are not masked, by site."""
        present = call.structure.present
        if self._encoder_input is None and call.structure.data_plates:
            present = self._whole_observations.find(call.of_model(self.model_at_hand))[1]  # type: ignore[arg-type]
        of_groups = {name: mask for group in call.structure.groups.values() for name, mask in group.present.items()}
        return {name: mask for name, mask in {**present, **of_groups}.items() if name not in self._hidden}

    def _condition(self, call: Call) -> None:
        """Makes sure that global latents that the encoder sees are at hand, one value of each for all datapoints."""
        spec = self._encoder_input
        names = [] if spec is None or callable(spec) else _listed(spec)
        seen = [name for name in names if name in call.structure.global_sites]
        whole = [name for name in seen if name not in self._encoder_plates]  # of one size in every call
        if not seen:
            return
        if call.global_values is None:
            call.global_values = self._global_values(call)
        shapes = {name: call.global_values[name].shape for name in whole}
        if not self._ready or self._global_shapes is None:
            self._global_shapes = shapes
        check_global_shapes(shapes, self._global_shapes)

    def _global_values(self, call: Call) -> dict[str, Tensor]:
        """The global latents at their median, or for autoguides without one at a draw; or where the call holds them."""
        if call.held is not None:
            return dict(call.held)
        return global_median(self, call.args, call.kwargs) if self.global_sites else {}

    # phi

    def _phi(self, call: Call) -> Tensor:
        """phi of a call's datapoints, ``(N, P)``; reading ``self.inference`` registers its parameters with Pyro."""
        inputs, strategy = self._inputs(call), self.inference
        check_known(strategy, call.structure.datapoints, call.index)
        phi = self._run_strategy(strategy, inputs, call)
        check_shape(phi, (call.structure.datapoints.size, self._family.num_params), inputs, call.structure.datapoints)
        check_values(phi, self._family, strategy, inputs)
        present = call.structure.layout.present  # type: ignore[union-attr]
        return phi if present is None else self._family.masked(phi, present)

    def _run_strategy(self, strategy: InferenceStrategy, inputs: tuple[Tensor, ...], call: Call) -> Tensor:
        return strategy(inputs, call.index)

    # Predictions

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
        check_predictable(missing, self._shown_masks)
        return False


def _listed(names: str | Collection[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
