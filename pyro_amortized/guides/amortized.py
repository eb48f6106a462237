"""The amortized guide: a network from data to variational parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyro_amortized.encoders.layers import Head
from pyro_amortized.encoders.mlp import MLPEncoder
from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.encoders.plate import PlateEncoder
from pyro_amortized.encoders.standardize import StandardizedEncoder
from pyro_amortized.guides.base import GuideOptions, LocalGuide
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.inputs import by_plate, check_finite_inputs
from pyro_amortized.guides.level_inputs import build_levels, check_tells_apart, find_levels
from pyro_amortized.guides.levels import Sharing, inner_plates, levels_of, refuse_sharing
from pyro_amortized.inference.base import InferenceStrategy
from pyro_amortized.inference.sharing import Level, SharedHeads, check_level_features
from pyro_amortized.inference.strategies import Encoded, check_output, output_parts
from pyro_amortized.structure.structure import Structure

__all__ = ["AmortizedGuide"]


class AmortizedGuide(LocalGuide):
    r"""Amortized variational inference: a network maps each datapoint to the parameters of its q(z | x).

    .. math:: q(z_{1:N}, \theta) = q(\theta) \prod_n q(z_n;\, \phi_n = f(x_n))

    Works on any Pyro model with a plate over datapoints, any batch size in any call. Latents inside that plate are
    amortized; the others go to ``global_guide``. Entries of plates inside it that are exchangeable, as is found by
    numbers, share the head of their level and may be of any number in any call; others are folded into the datapoint.

    Args:
        model: A Pyro model.
        encoder: A module from inputs to features ``(N, H)``, to which the guide adds the linear head; or one that
            returns ``(loc, scale)``, each of shape ``(N, D)``, for the normal family; or, for sites that are numbered
            by time (``z_1``, ``z_2``, ...), one that returns features ``(N, T, H)``: the steps share one head, and
            every call may have another number T of them; or, for latents in inner plates, a dict from the name of each
            plate with latents to features, ``{"school": (N, H), "pupil": (N, P, H)}``, datapoints first, then inner
            plates by dim, most negative first, then steps. By default an :class:`~pyro_amortized.MLPEncoder` of
            standardised inputs, or, where entries of inner plates share heads, data are in long format or
            ``encoder_input`` is by plate, a :class:`~pyro_amortized.PlateEncoder`.
        family: The shape of q: ``"normal"``, ``"multivariate_normal"``, ``"low_rank_multivariate_normal"``,
            ``"structured"`` (a normal with the couplings of the model), ``"mixture"``, ``"flow"``, a
            :class:`~pyro_amortized.VariationalFamily`, or a function from ``latent_dim`` to one.
        plate: Name of the datapoint plate; by default the outermost plate that holds an observed site.
        encoder_input: What the encoder sees: by default the observed values in the plate, at all entries of further
            plates inside of it even where a call draws some of them; or the name of a model argument, a list of names,
            or a function of the model's arguments, run inside the plate so that ``pyro.subsample`` works in it. Of an
            argument that is seen to hold the data of a whole subsampled plate the encoder gets those of the datapoints
            at hand. What it sees may not depend on which entries of a further plate were drawn, or the loss would be no
            bound. A name may also be that of a global latent :math:`\theta`, flattened and repeated for every
            datapoint: then q is :math:`q(\theta) \prod_n q(z_n \mid x_n, \theta)`, with the draw of the same call, and
            with the median in the diagnostics and in refinement. Several inputs are passed as positional arguments.
            To say what is encoded is also a promise, that the structure of the model depends on the shapes of the
            arguments, and on values that are no tensors, alone: the run that shows it is then spared in most calls.
            With inner plates or ``groups`` also a dict from the name of a plate to names,
            ``{"pupil": ["y", "age"], "school": ["size"]}``, for arrays with datapoints first, then inner plates.
        global_guide: A function from a model to an autoguide, for the latents outside the plate; also to an
            :class:`AmortizedGuide` of another plate, ``lambda model: AmortizedGuide(model, plate="genes")``, where
            plates cross: it is given the model with all that it observes, and without the latents of this plate.
        create_plates: A function of the model's arguments that returns the plates to use, as in Pyro's autoguides.
        init_loc_fn: Where q starts, one of Pyro's initialisation functions.
        init_scale: Standard deviation of q at the start, in unconstrained space.
        name: Name under which parameters go to Pyro's parameter store; by default that of the class.
        groups: For observations in long format, in a plate beside the datapoint plate: a dict from the name of that
            plate to the argument, or a function of the arguments, that holds for each of its entries the position of
            its datapoint among those of the call, ``{"obs": "county_index"}``. The entries count as part of their
            datapoints, also in refinement and every diagnostic. Where an index has the name of another such plate, it
            points into that one.

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

    def __init__(
        self, model: Callable[..., Any], encoder: nn.Module | None = None, **options: Unpack[GuideOptions]
    ) -> None:
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise ValueError(
                f"Cannot use encoder {encoder!r} because it is not a torch.nn.Module instance; try passing a "
                "constructed module, for example MLPEncoder(input_dim)."
            )
        super().__init__(model, **options)
        self._encoder_spec = (encoder,)
        self._structures.encodes = encoder is None and options.get("encoder_input") is None

    _shares_heads: ClassVar[bool] = True
    """Whether entries of inner plates may share heads; not where phi is not what the encoder's heads give."""

    @property
    def _shows_masks(self) -> bool:
        return self._encoder_spec[0] is None or isinstance(self._encoder_spec[0], PlateEncoder)

    def _choose_levels(self, call: Call) -> None:
        encoder = self._encoder_spec[0]
        asked = isinstance(encoder, PlateEncoder)
        plates, grouped = inner_plates(call.structure.layout), bool(call.structure.groups)
        default = (
            encoder is None
            and self._shares_heads
            and (grouped or self._encoder_plates or (self.family.shares_heads and plates))
        )
        if (asked or (grouped and encoder is None)) and not self._shares_heads:
            raise ValueError(
                f"Cannot use PlateEncoder in {type(self).__name__} because that needs features (N, H) of whole "
                "datapoints; try AmortizedGuide or SemiAmortizedGuide, or an encoder of your own."
            )
        if encoder is not None and not asked and plates and self._shares_heads:
            check_tells_apart(self, partial(_first_output, encoder), call)
        spec = self._encoder_input
        flat = callable(spec) and any(plate is None for plate, _ in by_plate(spec, call))
        if flat or not (asked or default):
            return
        found = find_levels(self, call, asked or bool(self._encoder_plates))
        shared = (
            plates
            & {name for where in found.values for name in where.plates}
            & (plates if self.family.shares_heads else set())
        )
        if asked or grouped or shared or self._encoder_plates:
            self._levels = found
            self._sharing = Sharing(frozenset(shared), by_step=False) if shared else None
            if found.masks:
                self._structures.promised = False  # masks are read off the run

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        encoder = self._encoder_spec[0]
        if self._levels is not None:
            encoder = encoder or PlateEncoder()
            shared = () if self._sharing is None else self._sharing.plates
            targets = levels_of(structure, shared) if shared else [Level(structure.datapoints.name, (), torch.empty(0))]
            build_levels(encoder, self._levels, inputs, targets)
            encoder.to(init_loc)
        return self._encoded(encoder or self._default_encoder(inputs, init_loc), inputs, init_loc, structure)

    def _encoded(
        self, encoder: nn.Module, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure
    ) -> Encoded:
        """The encoder with the head that it needs."""
        features = self._first_features(encoder, inputs)
        if isinstance(features, tuple):
            self._check_pair(features, init_loc)
            return Encoded(encoder, None)
        if isinstance(features, dict) or features.dim() == 3:
            return Encoded(encoder, self._shared_heads(features, init_loc, structure))
        self._check_features(features, inputs, structure)
        head = Head(features, self.family.num_params, room=4.0 if isinstance(encoder, PlateEncoder) else 1.0)
        with torch.no_grad():
            head.bias.copy_(self.family.initial(init_loc.mean(0), self.init_scale))
        return Encoded(encoder, head)

    def _shared_heads(
        self, features: Tensor | dict[str, Tensor], init_loc: Tensor, structure: Structure
    ) -> SharedHeads:
        """Heads from the features of an entry of a plate, or a step of a sequence, to phi of its latents."""
        layout: Any = structure.layout
        if self._sharing is None:
            plates = inner_plates(layout) if isinstance(features, dict) else ()
            by_step = not isinstance(features, dict) or _are_by_step(features, structure, plates)
            if by_step and layout.steps is None or not self.family.shares_heads:
                refuse_sharing(features, layout, self.family)
            self._sharing = Sharing(frozenset(plates), by_step)
        sharing = self._sharing
        arrangement = sharing.arrange(structure, self.family)
        found = {arrangement.levels[0].name: features} if isinstance(features, Tensor) else features
        heads = []
        for level, width in zip(arrangement.levels, arrangement.widths, strict=True):
            check_level_features(found.get(level.name), level)
            head = Head(found[level.name], width, room=1.0 if isinstance(features, Tensor) else 4.0)
            with torch.no_grad():
                head.bias.zero_()
                head.bias[: level.size].copy_(init_loc[:, level.positions].reshape(-1, level.size).mean(0))
                head.bias[level.size : 2 * level.size] = math.log(self.init_scale)
            heads.append(head)
        sharing.heads = SharedHeads(heads, arrangement)
        sharing.family_of(structure, self.family, lambda: torch.empty(0))
        return sharing.heads

    def _first_features(self, encoder: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        check_finite_inputs(inputs)
        if isinstance(encoder, StandardizedEncoder):
            encoder.fit(*inputs)
        features = _first_output(encoder, inputs)
        check_output(features, by_level=self._shares_heads)
        if not all(part.isfinite().all() for part in output_parts(features)):
            raise ValueError(
                "Cannot build a guide on this encoder because what it returned at first holds NaN or infinite values; "
                "try a look at its weights and at its inputs, which are finite."
            )
        return features

    def _check_features(self, features: Tensor, inputs: tuple[Tensor, ...], structure: Structure) -> None:
        size = structure.datapoints.size
        frame = structure.datapoints
        if frame.kind == "unsized" and features.dim() == 2 and features.shape[0] != size:
            raise ValueError(
                f"Cannot tell the latents of {len(features)} datapoints apart because plate {frame.name!r} has no "
                f"size to expand their prior to; try `pyro.plate({frame.name!r}, {len(features)})`."
            )
        if features.dim() != 2 or features.shape[0] != size or not features.shape[1]:
            raise ValueError(
                f"Cannot encode the {size} datapoints of plate {structure.datapoints.name!r} because the "
                f"encoder returned features of shape {tuple(features.shape)} for inputs of shapes "
                f"{[tuple(x.shape) for x in inputs]}; try an encoder from (N, ...) to (N, H), a row per datapoint."
            )

    def _default_encoder(self, inputs: tuple[Tensor, ...], init_loc: Tensor, **options: Any) -> nn.Module:
        if not inputs:
            raise ValueError(
                "Cannot build a default encoder because no site in the datapoint plate is observed with values; "
                "try encoder_input=... with the name of an argument, or a function of the model's arguments."
            )
        return MLPEncoder(MLPEncoder.flatten(*inputs).shape[1], **options).to(init_loc)

    def _check_pair(self, pair: tuple[Tensor, ...], init_loc: Tensor) -> None:
        shapes = [tuple(part.shape) for part in pair]
        if shapes == [tuple(init_loc.shape)] * 2 and not (pair[1] > 0).all():
            raise ValueError(
                "Cannot use the encoder's (loc, scale) pair because some scales are not positive; try "
                "torch.nn.functional.softplus(scale), or scale.exp()."
            )
        if not self.family.is_mean_field or shapes != [tuple(init_loc.shape)] * 2:
            raise ValueError(
                f"Cannot use the encoder's output, a tuple of tensors of shapes {shapes}, because a (loc, scale) pair "
                f'must have shapes {tuple(init_loc.shape)} and needs family="normal" (this guide has '
                f"{type(self.family).__name__}); try an encoder that returns features of shape (N, H)."
            )


@torch.no_grad()
def _first_output(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The encoder's output in full precision, without dropout or an update of running statistics."""
    with evaluating(encoder), torch.autocast(inputs[0].device.type, enabled=False):
        return encoder(*inputs)


def _are_by_step(features: dict[str, Tensor], structure: Structure, plates: Collection[str]) -> bool:
    """Whether features by level have an axis of steps beside those of plates."""
    ranks = {level.name: len(level.axes) for level in levels_of(structure, plates)}
    return any(isinstance(x, Tensor) and x.dim() == ranks.get(name, x.dim()) + 3 for name, x in features.items())
