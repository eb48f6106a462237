"""What guides that refine phi share: the per-datapoint objective of a call, and its traced gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import Unpack

from pyro_amortized.checks import check_count, check_flag
from pyro_amortized.graphs.cache import GraphCache
from pyro_amortized.guides.amortized import AmortizedGuide
from pyro_amortized.guides.base import GuideOptions
from pyro_amortized.guides.call import Call
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.refined import Refined, start_of
from pyro_amortized.inference.strategies import Prior
from pyro_amortized.objective.checks import check_outside
from pyro_amortized.objective.draws import Mode
from pyro_amortized.objective.elbo import ESTIMATORS, LocalObjective
from pyro_amortized.objective.log_joint import LocalLogJoint
from pyro_amortized.structure.cache import call_key
from pyro_amortized.structure.state import kept_state, modes_of_modules, untouched
from pyro_amortized.updates.base import UpdateRule

__all__ = ["RefiningGuide", "RefiningOptions", "check_update"]

_MAX_MODES = 128

_MOST_TRACED_NUMBERS = 2**14
"""Numbers per site of the model, over all draws, up to which steps run by graphs after training."""


class RefiningOptions(GuideOptions, total=False):
    """The options of guides that refine, explained at :class:`SemiAmortizedGuide`."""

    fixed_noise: bool
    keep_best: bool | None
    estimator: str | None


def check_update(update: Any) -> None:
    """Raises a ValueError unless ``update`` is an update rule or None."""
    if update is not None and not isinstance(update, UpdateRule):
        raise ValueError(
            f"Cannot refine by {update!r} because it is not an update rule; try pyro_amortized.NaturalGradient(0.5) or "
            "pyro_amortized.Adam(0.05)."
        )


class RefiningGuide(AmortizedGuide):
    """An amortized guide whose phi is refined by a few steps on each datapoint's own ELBO."""

    refines = True

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None,
        *,
        num_steps: int,
        update: UpdateRule | None,
        num_particles: int,
        compile: bool,
        initial: str,
        fixed_noise: bool = False,
        keep_best: bool | None = None,
        estimator: str | None = None,
        **options: Unpack[GuideOptions],
    ) -> None:
        num_steps = check_count("num_steps", num_steps, 0, 5)
        num_particles = check_count("num_particles", num_particles, 1, 8)
        for flag_name, flag in (("compile", compile), ("fixed_noise", fixed_noise)):
            check_flag(flag_name, flag)
        check_flag("keep_best", keep_best, may_be_none=True)
        check_update(update)
        if initial not in ("encoder", "prior"):
            raise ValueError(
                f'Cannot start at {initial!r} because there is no such start; try initial="encoder" or initial="prior".'
            )
        if estimator is not None and estimator not in ESTIMATORS:
            raise ValueError(
                f"Cannot estimate gradients by {estimator!r} because it is none of {ESTIMATORS}; try {ESTIMATORS[0]!r}."
            )
        super().__init__(model, encoder, **options)
        self._num_steps = self._first_num_steps = num_steps
        self._update_spec = (update,)
        self._initial_kind = initial
        self._estimator = estimator
        self._settings: dict[str, Any] = {
            "num_particles": num_particles,
            "fixed_noise": fixed_noise,
            "keep_best": keep_best,
        }
        self._graphs = GraphCache(compile)
        self._modes: dict[Any, Mode] = {}

    @property
    def num_steps(self) -> int:
        """Number of refinement steps; may be changed at any time."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._num_steps = value = check_count("num_steps", value, 0, 5)
        if "inference" in self._modules:
            self._modules["inference"].num_steps = value  # type: ignore[union-attr]

    def _model_changed(self) -> None:
        self.__dict__["_modes"] = {}
        super()._model_changed()

    def __getstate__(self) -> dict[str, Any]:
        """As every guide's, without what has been found out about the model."""
        return {**super().__getstate__(), "_modes": {}}

    def _run_strategy(self, strategy: InferenceStrategy, inputs: tuple[Tensor, ...], call: Call) -> Tensor:
        if call.structure.missing or call.inputs is not None:  # there is nothing to refine to
            return start_of(strategy)(inputs, call.index)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "Cannot refine phi under torch.inference_mode because no gradients can be taken there; try "
                "torch.no_grad()."
            )
        with kept_state():  # the model's own run in this step counts, not those of refinement
            try:
                refinement = strategy.refine(inputs, call.index, self._objective(call))  # type: ignore[operator]
            except torch.linalg.LinAlgError as error:
                raise ValueError(
                    "Cannot refine phi because a step has left a covariance that is singular: refinement has diverged; "
                    "try a smaller step_size, or the default update."
                ) from error
        call.signal = refinement.signal
        return refinement.phi

    def _sees_nothing(self, call: Call) -> bool:
        """Whether no data are at hand; without any to refine to, phi is where refinement starts."""
        structure = call.structure
        left = [name for name in structure.observed or {} if name not in structure.missing]
        if structure.missing and left and structure.layout is not None:
            raise ValueError(
                f"Cannot refine phi to part of the data because sites {[*structure.missing]} are not observed in this "
                f"call, and {left} are; try a model that masks them, `dist.Normal(...).mask(present)` with obs filled "
                "in."
            )
        at_prior = structure.missing and isinstance(start_of(self._modules.get("inference")), Prior)
        return bool(at_prior) or super()._sees_nothing(call)

    def _objective(self, call: Call) -> LocalObjective:
        """The per-datapoint ELBO of a call, with global latents at their median."""
        if self.model_at_hand is None:
            raise ValueError(
                "Cannot refine phi because this guide was loaded without its model; try `guide.model = model`."
            )
        model = self.model if call.model is None else call.model
        log_joint = LocalLogJoint(replace(call.of_model(model), global_values=self._global_values(call)))
        if torch._C._get_tracing_state():
            raise ValueError(
                "Cannot refine phi inside torch.jit.trace, as JitTrace_ELBO does, because gradients cannot be taken "
                "there; try Trace_ELBO, and compile=True for speed."
            )
        shapes = call_key((call.args, call.kwargs))
        modes = getattr(model, "training", None), modes_of_modules()
        key = (call.model is None, tuple(call.structure.frames.values()), modes, shapes)
        if shapes is None or key not in self._modes:
            self._modes[key] = self._choose_mode(log_joint)
            if len(self._modes) > _MAX_MODES:
                self._modes.pop(next(iter(self._modes)))
        log_joint.take_mode(self._modes[key])
        return LocalObjective(log_joint, self._family, self._estimator, self._graphs if self._traces(call) else None)

    def _traces(self, call: Call) -> bool:
        """Whether steps run by graphs: in training always, after it unless each site's numbers are too many.

        A graph saves what Pyro's handlers cost at every site, and costs several evaluations to make: where those are
        long beside the handlers, a few steps are done before it is made. The numbers of a call alone decide, so that
        equal calls give equal results.
        """
        if self.training or self._graphs.compile:
            return True
        numbers = sum(x.numel() for x in tree_leaves((call.args, dict(call.kwargs))) if isinstance(x, Tensor))
        sites = len(call.structure.data) + len(call.structure.layout.sites)  # type: ignore[union-attr]
        return self._settings["num_particles"] * numbers <= _MOST_TRACED_NUMBERS * sites

    def _choose_mode(self, log_joint: LocalLogJoint) -> Mode:
        """How many draws may be evaluated in one run of the model; refuses those that leave sites out."""
        shape = (2, log_joint.num_datapoints, log_joint.layout.latent_dim)
        z = torch.linspace(-0.5, 0.5, math.prod(shape), dtype=self._like.dtype, device=self._like.device).reshape(shape)
        with untouched():
            check_outside(log_joint.call, z, all_pairs=not self._modes)
            return log_joint.choose_mode(z)

    def _refined_from(
        self, initial: InferenceStrategy, update: UpdateRule, features: nn.Module | None = None
    ) -> Refined:
        return Refined(initial, update, self._num_steps, features=features, **self._settings)
