"""What a guide says of the posterior outside of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_amortized.checks import check_probabilities
from pyro_amortized.encoders.modes import evaluating
from pyro_amortized.families import VariationalFamily
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.encoding import EncodingGuide
from pyro_amortized.guides.global_guide import (
    draw_globals,
    global_median,
    global_of,
    global_quantiles,
    weighted_globals,
)
from pyro_amortized.guides.serving import export_guide
from pyro_amortized.inference.refined import start_of
from pyro_amortized.inference.strategies import Encoded, output_parts
from pyro_amortized.structure.running import isolated
from pyro_amortized.structure.structure import Structure

__all__ = ["Inferred", "PosteriorGuide"]


@dataclass(frozen=True)
class Inferred:
    """What a guide says of a call's datapoints.

    Attributes:
        structure: What the call looks like, with the indices of all its plates.
        phi: The variational parameters ``(N, P)``, or None if the model has no local latents.
        family: The family that makes distributions of them, or None.
        global_values: The global latents by name, at their median, or at a draw for autoguides that know none.
        cause: Why there are no variational parameters, where there are none.
        remedy: What to try then.
    """

    structure: Structure
    phi: Tensor | None
    family: VariationalFamily | None
    global_values: Mapping[str, Tensor]
    cause: str = "the model has no local latents"
    remedy: str = "guide.global_median(...), or guide.quantiles(...), of the global ones"

    @property
    def local(self) -> tuple[Tensor, VariationalFamily]:
        """phi and the family; a ValueError if the model has no latents of single datapoints."""
        if self.phi is None or self.family is None:
            others = [self.structure.amortizing(name) + ", or" for name in self.structure.global_plates[:1]]
            raise ValueError(
                f"Cannot give variational parameters per datapoint because {self.cause}; try "
                f"{' '.join([*others, self.remedy])}."
            )
        return self.phi, self.family


class PosteriorGuide(EncodingGuide):
    """A guide that can be asked what is known of a call's latents."""

    def infer(self, *args: Any, **kwargs: Any) -> Inferred:
        """All that a guide says of the datapoints in a call, which diagnostics, export and training build on.

        Args:
            *args: The model's arguments, with all data.
            **kwargs: The model's keyword arguments.
        """
        inferred = self._infer(args, kwargs)
        if inferred.global_values or not self.global_sites:
            return inferred
        return replace(inferred, global_values=global_median(self, args, kwargs))

    def infer_given(self, global_values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Inferred:
        """As :meth:`infer`, with given values of the global latents in place of their medians.

        Args:
            global_values: The values by name.
            *args: The model's arguments, with all data.
            **kwargs: The model's keyword arguments.
        """
        return self._infer(args, kwargs, given=global_values)

    def _infer(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        predicting: bool = False,
        given: Mapping[str, Tensor] | None = None,
    ) -> Inferred:
        """As :meth:`infer`, with global latents only if the encoder sees any; ``predicting`` as in :meth:`_read`."""
        with isolated():
            call = self._read(args, kwargs, predicting=predicting)
            call.held = given
            self._require_data(call)
            phi = None if call.structure.layout is None else self._phi(call)
            family = None if phi is None else self.family
            return Inferred(self._with_all_indices(call), phi, family, call.global_values or {})

    def _require_data(self, call: Call) -> None:
        """Refuses to say what is known of the latents of a call where nothing is."""
        if self._sees_nothing(call):
            raise ValueError(
                f"Cannot infer local latents because none of the data that they depend on, {call.structure.missing}, "
                "are observed in this call; try pyro.infer.Predictive(model, guide=guide, num_samples=...), which "
                "draws them from their prior."
            )

    def encoder_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What the encoder sees of a call, ``(N, ...)`` each; nothing where phi comes from elsewhere."""
        with isolated():
            return self._inputs(self._read(args, kwargs)) if self._needs_inputs else ()

    def encoder_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the encoder makes of the datapoints of a call, ``(N, F)``, before a head turns it to phi.

        Features of several entries of a datapoint are averaged over them, those of all levels and the parts of a pair
        are put side by side. A guide that encodes nothing has none, F = 0; of one that refines it is the encoder where
        it starts. It runs in evaluation mode, without dropout.
        """
        inferred_size = self._infer(args, kwargs, predicting=True).structure.datapoints.size
        strategy = start_of(self._modules.get("inference"))
        if not isinstance(strategy, Encoded):
            return self._like.new_zeros(inferred_size, 0)
        with evaluating(self):
            parts = output_parts(strategy.encoder(*self.encoder_inputs(*args, **kwargs)))
        return torch.cat([part.flatten(1, -2).mean(1) if part.dim() > 2 else part for part in parts], -1)

    def variational_parameters(self, *args: Any, **kwargs: Any) -> Tensor:
        """The variational parameters phi of the datapoints in a call.

        Returns:
            phi of shape ``(N, P)``.
        """
        return self._infer(args, kwargs, predicting=True).local[0]

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
        with isolated():
            call = self._read(args, kwargs, predicting=True)
            self._require_data(call)
            result = global_quantiles(self, quantiles, args, kwargs) if self.global_sites else {}
            return {**result, **self._local_quantiles(quantiles, call)}

    def _local_quantiles(self, quantiles: Sequence[float] | Tensor, call: Call) -> dict[str, Tensor]:
        layout = call.structure.layout
        if layout is None:
            return {}
        phi = self._phi(call)
        probs = torch.as_tensor(quantiles, dtype=phi.dtype, device=phi.device)
        return layout.values(self.family.quantile(phi, probs))

    def _local_draw(self, call: Call) -> dict[str, Tensor]:
        """One draw of the local latents by site, outside of Pyro."""
        layout = call.structure.layout
        return {} if layout is None else layout.values(self.family(self._phi(call)).sample())

    def exported(
        self, *args: Any, output: str = "phi", quantiles: Sequence[float] = (0.05, 0.5, 0.95), **kwargs: Any
    ) -> torch.export.ExportedProgram:
        """The encoder as a program of ``torch.export``, which needs neither Pyro nor this package nor the model.

        The program takes what :meth:`encoder_inputs` gives, of any number of datapoints, and answers as the guide does
        in ``eval()`` mode with its parameters as they are now; it has been compared with the guide on the example. All
        other sizes (steps of a sequence, entries of inner plates) are those of the example.

        Args:
            *args: The model's arguments, as an example.
            output: ``"phi"`` for variational parameters ``(N, P)``; ``"median"`` and ``"quantiles"`` for those of all
                latents by site name, as from the methods of these names, where those of global latents are numbers;
                ``"sample"`` for one draw of the local latents by site name, from torch's generator.
            quantiles: The probabilities of ``"quantiles"``.
            **kwargs: The model's keyword arguments.

        Returns:
            The program, for ``torch.export.save(program, path)``, or ``program.module()(*inputs)``. Guides that refine
            give that of their encoder, and warn of it.

        Raises:
            ValueError: If there is no encoder, it cannot be traced, or discrete latents have no phi.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_amortized import AmortizedGuide
            >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            ...         pyro.sample("x", dist.Poisson(rate), obs=x)
            >>> guide = AmortizedGuide(model)
            >>> program = guide.exported(torch.tensor([1.0, 4.0, 2.0]), output="median")
            >>> program.module()(torch.tensor([3.0, 0.0, 1.0, 7.0]))["rate"].shape
            torch.Size([4])
        """
        with isolated():
            call = self._read(args, kwargs)
            self._require_data(call)
            return export_guide(self, call, output, quantiles)

    @torch.no_grad()
    def global_median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Medians of the global latents by site name; empty if there are none."""
        if not self.global_sites:
            return {}
        with isolated():
            self._read(args, kwargs, predicting=True)
            return global_of(self).median(*args, **kwargs)

    @torch.no_grad()
    def sample_globals(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw of the global latents by site name; empty if there are none."""
        if not self.global_sites:
            return {}
        with isolated():
            self._read(args, kwargs, predicting=True)
            return draw_globals(self, args, kwargs)

    @torch.no_grad()
    def sample_globals_and_log_prob(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
        """One draw of the global latents by site name, with its log-density in their supports, in nats."""
        with isolated():
            self._read(args, kwargs, predicting=True)
            return weighted_globals(self, args, kwargs)
