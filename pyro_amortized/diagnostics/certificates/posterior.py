"""Posteriors with a certificate for each datapoint: what a user gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.diagnostics.certificates.plots import draw_certificates
from pyro_amortized.diagnostics.certificates.stages import STAGES
from pyro_amortized.diagnostics.report import Report, fill, in_style, inference_data, join, new_axes

if TYPE_CHECKING:
    from typing import Self

    import xarray
    from matplotlib.axes import Axes

__all__ = ["FLAT", "CertifiedPosterior"]

FLAT = "_unconstrained"
"""The variable that holds the flat draws beside those of the sites."""
_PREFIX = "posterior_"
_KEPT = ("certified", "local", "all")


@dataclass(repr=False)
class CertifiedPosterior(Report):
    """Draws from every datapoint's posterior, and what speaks for them.

    Attributes:
        dataset: Over the plate's dimension. ``stage``, whose draws these are (``"encoder"``, ``"refined"``,
            ``"full_rank"`` or ``"hmc"``); ``certified``, whether they have converged and agree with an exploration that
            did not start at q; ``local``, whether they have converged and do not agree, so that all that is known is
            that they are right where they are; neither for datapoints that no stage has served. ``khat`` of the last
            importance weights, ``rhat`` of chains, and ``ess``, the smallest effective sample size, of weights, or of
            chains in any unconstrained dimension. ``reason``, why the stages before failed; ``exploration``, what the
            draws were compared with (``"importance"`` samples of a mixture at all modes found, ``"smc"`` particles from
            a wide reference, or only the ``"modes"``); ``num_modes``, modes that hold a thousandth of the posterior
            or more; ``divergences`` of chains. ``num_gradients`` and ``num_evaluations``, how often the log-joint has
            been differentiated and evaluated alone.
        posterior: The draws, ``(draw, *plates, *event)`` by site, and the flat unconstrained ones.
    """

    posterior: xarray.Dataset

    @property
    def plate(self) -> str:
        """Name of the datapoint plate."""
        return str(self.dataset["stage"].dims[0])

    @property
    def draws(self) -> Tensor:
        """Flat unconstrained draws, ``(S, N, D)``."""
        return torch.from_numpy(self.posterior[FLAT].transpose("draw", self.plate, ...).values)

    @classmethod
    def concat(cls, parts: Sequence[CertifiedPosterior]) -> CertifiedPosterior:
        """Joins the results of several batches along the plate."""
        plate = parts[0].plate
        return cls(join([part.dataset for part in parts], plate), join([part.posterior for part in parts], plate))

    def to_netcdf(self, path: str | os.PathLike[str]) -> None:
        """Saves certificates and draws; :meth:`from_netcdf` reads them again.

        Raises:
            ValueError: If the file cannot be written.
        """
        draws = self.posterior.rename({name: _PREFIX + quote(str(name), safe="") for name in self.posterior.data_vars})
        _Packed(self.dataset.merge(draws)).to_netcdf(path)

    @classmethod
    def from_netcdf(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what :meth:`to_netcdf` saved.

        Raises:
            ValueError: If the file cannot be read, or holds no report of this kind.
        """
        packed = _Packed.from_netcdf(path).dataset
        names = [name for name in packed.data_vars if str(name).startswith(_PREFIX)]
        draws = packed[names].rename({name: unquote(str(name).removeprefix(_PREFIX)) for name in names})
        draws.attrs = {}  # those of the certificates
        dataset = packed.drop_vars(names)
        dims = {dim for variable in dataset.data_vars.values() for dim in variable.dims}
        return cls(dataset.drop_vars([name for name in dataset.coords if name not in dims]), draws)

    def to_arviz(self, keep: str = "certified") -> Any:
        """The draws as ArviZ knows them; those of datapoints without a certificate are NaN, so that no mean is wrong.

        Args:
            keep: Whose draws to keep: ``"certified"``, ``"local"`` (converged, at least where they are) or ``"all"``.

        Returns:
            An ``arviz.InferenceData`` (ArviZ below 1) or an ``xarray.DataTree`` (from 1 on), with the draws as one
            chain in ``posterior``, ``(chain, draw, *plates, *event)``, and the certificates in ``sample_stats``.

        Raises:
            ValueError: If there is no such ``keep``.

        Warns:
            UserWarning: If draws of any datapoint are left out, naming how many.
        """
        if keep not in _KEPT:
            raise ValueError(f"Cannot keep the draws of keep={keep!r} because it is unknown; try one of {_KEPT}.")
        data = self.dataset
        kept = data["certified"] | (data["local"] & (keep == "local")) | (keep == "all")
        left = int((~kept).sum())
        if left:
            warnings.warn(
                f"{left} of {kept.size} datapoints are not {keep}: their draws are NaN. Leave them out with "
                f"isel({self.plate}=...), or look at them with keep='all'.",
                stacklevel=2,
            )
        draws = self.posterior.drop_vars(FLAT)
        draws = draws.where(kept).transpose("draw", ...) if left else draws
        return inference_data({"posterior": draws.expand_dims("chain"), "sample_stats": data})

    def __str__(self) -> str:
        """A table of the stages, and a verdict."""
        data = self.dataset
        total = data.sizes[self.plate]
        title = (
            f"Certified posteriors of {total} datapoints of plate {self.plate!r}: {data.attrs['num_samples']} draws "
            f"each ({data.attrs['family']} family, {data.attrs['latent_dim']} dimensions)"
        )
        lines = [
            *fill(title),
            f"{'stage':12s}{'datapoints':>12s}{'certified':>11s}{'local':>8s}{'neither':>9s}{'median ess':>12s}"
            f"{'gradients':>11s}{'evaluations':>13s}",
        ]
        for stage in STAGES:
            own = data.isel({self.plate: np.flatnonzero(data["stage"].values == stage)})
            if own.sizes[self.plate]:
                lines.append(f"{stage:12s}" + self._row(own))
        lines.append(f"{'all':12s}" + self._row(data))
        return "\n".join([*lines, *fill(self.verdict)])

    def _row(self, data: xarray.Dataset) -> str:
        certified, local = (int(data[name].sum()) for name in ("certified", "local"))
        total, ess = data.sizes[self.plate], float(data["ess"].median())
        gradients, evaluations = (float(data[name].mean()) for name in ("num_gradients", "num_evaluations"))
        counts = f"{total:12d}{certified:11d}{local:8d}{total - certified - local:9d}"
        return counts + f"{ess:12.0f}{gradients:11.0f}{evaluations:13.0f}"

    @property
    def verdict(self) -> str:
        """In words: how many posteriors can be signed, what of the others, and when to stop."""
        data = self.dataset
        total, certified, local = data.sizes[self.plate], int(data["certified"].sum()), int(data["local"].sum())
        words = [
            "All posteriors are certified: their draws have converged and agree with an exploration that did not start "
            "at the guide."
            if certified == total
            else f"{certified} of {total} posteriors are certified."
        ]
        if local:
            words.append(
                f"{local} are local: their draws have converged where they are, and the exploration found something "
                "else; look for further modes with log_evidence, or with another model."
            )
        neither = total - certified - local
        if neither:
            words.append(
                f"{neither} have not converged, and their draws are not to be used: try a reparameterised model "
                "(non-centred, for a hierarchy), a larger num_samples, or look at `dataset.reason`."
            )
        first = float((data["certified"] & (data["stage"] == "encoder")).mean())
        if first > 0.9:
            words.append("The encoder's weighted draws do for nearly all of them.")
        held = data.attrs.get("global_latents", "none")
        if held != "none":
            words.append(f"Posteriors are those given the global latents, {held}.")
        return " ".join(words)

    @in_style
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws every datapoint's cost against the khat of its last weights, by stage; what is not certified is marked.

        Args:
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes.
        """
        return draw_certificates(self.dataset, new_axes(ax))


class _Packed(Report):
    """Certificates and draws in one file."""
