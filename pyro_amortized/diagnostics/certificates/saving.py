"""Batches that are saved when they are done, so that work that was interrupted can go on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_amortized.diagnostics.certificates.posterior import CertifiedPosterior
from pyro_amortized.diagnostics.certificates.target import Target
from pyro_amortized.diagnostics.problem import LocalProblem
from pyro_amortized.objective.noise import generator

__all__ = ["SavedBatches"]

_NUM_PLACES = 4
"""Latents of each datapoint at which a model is told from others."""


class SavedBatches:
    """A directory with a file for each batch.

    Args:
        path: The directory, made if need be.

    Raises:
        ValueError: If it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(path)
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, TypeError) as error:
            raise ValueError(
                f"Cannot save batches at path={path!r} because that is no directory and cannot be made one ({error}); "
                'try a directory of your own, path="certificates".'
            ) from error

    def _file(self, number: int) -> Path:
        return self.path / f"batch_{number:05d}.nc"

    def read(self, number: int, problem: LocalProblem, target: Target, seed: int) -> CertifiedPosterior | None:
        """What was saved of a batch; None if nothing was.

        Raises:
            ValueError: If it belongs to other data, settings, guide or model.
        """
        file = self._file(number)
        if not file.exists():
            return None
        part = CertifiedPosterior.from_netcdf(file)
        if part.dataset.attrs.pop("fingerprint", None) != _fingerprint(problem, target, seed):
            raise ValueError(
                f"Cannot go on with the batches at path={str(self.path)!r} because {file.name} belongs to other data, "
                "settings or variational parameters; try another directory, or deleting this one."
            )
        return part

    def write(self, number: int, problem: LocalProblem, target: Target, seed: int, part: CertifiedPosterior) -> None:
        """Saves a batch; under its name only once it is whole."""
        own = part.dataset.assign_attrs(fingerprint=_fingerprint(problem, target, seed))
        unfinished = self._file(number).with_suffix(".part")
        CertifiedPosterior(own, part.posterior).to_netcdf(unfinished)
        unfinished.replace(self._file(number))


def _fingerprint(problem: LocalProblem, target: Target, seed: int) -> str:
    """A hash of what a result depends on: settings, variational parameters, data, global values, and the log-joint.

    The log-joint, of whose constants nothing else tells, is that at a few latents around the origin.
    """
    log_joint = problem.objective.log_joint
    call = log_joint.call
    leaves = tree_flatten((call.args, dict(call.kwargs), dict(call.global_values), problem.phi, problem.index))[0]
    z = torch.randn(_NUM_PLACES, len(problem.phi), problem.objective.family.latent_dim, generator=generator(0))
    with torch.no_grad():
        values = log_joint.plain(z.to(problem.phi))
    digest = hashlib.sha256(repr((target, seed)).encode())
    for leaf in (*leaves, values):
        if isinstance(leaf, Tensor):
            dense = leaf.to_dense() if leaf.layout != torch.strided else leaf
            digest.update(dense.detach().cpu().numpy().tobytes())
        else:
            plain = isinstance(leaf, bool | int | float | str | None)
            digest.update(repr(leaf if plain else type(leaf)).encode())
    return digest.hexdigest()
