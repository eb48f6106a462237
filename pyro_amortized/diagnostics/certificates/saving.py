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

__all__ = ["SavedBatches"]


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
    """A hash of what a result depends on: settings, variational parameters, data, global values, and the log-joint."""
    call = problem.objective.log_joint.call
    leaves = tree_flatten((call.args, dict(call.kwargs), dict(call.global_values), problem.phi, problem.index))[0]
    with torch.no_grad():
        at_zero = problem.objective.log_joint.plain(
            torch.zeros_like(problem.phi[:, : problem.objective.family.latent_dim])[None]
        )
    digest = hashlib.sha256(repr((target, seed)).encode())
    for leaf in (*leaves, at_zero):
        dense = leaf.to_dense() if isinstance(leaf, Tensor) and leaf.layout != torch.strided else leaf
        digest.update(
            dense.detach().cpu().numpy().tobytes() if isinstance(dense, Tensor) else repr(type(dense)).encode()
        )
    return digest.hexdigest()
