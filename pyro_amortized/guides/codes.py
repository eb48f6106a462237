"""Sites of codes: what they may be, which codebook serves them, and where the codes of a datapoint lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyro_amortized.encoders.codebook import Codebook
from pyro_amortized.structure.discrete import DiscreteSite
from pyro_amortized.structure.local_site import LocalSite
from pyro_amortized.structure.structure import Structure

__all__ = ["CodeBooks", "code_place", "code_value", "code_values"]


class CodeBooks:
    """Which codebook serves which site: one all of them, or each its own.

    Args:
        books: The codebook, or those by the names of sites.
    """

    def __init__(self, books: Codebook | nn.ModuleDict) -> None:
        self._books = books
        self.all: list[Codebook] = []
        for book in books.values() if isinstance(books, nn.ModuleDict) else [books]:
            if all(book is not other for other in self.all):
                self.all.append(book)  # type: ignore[arg-type]

    def of(self, site: DiscreteSite) -> Codebook:
        """The codebook of a site."""
        return self._books[site.name] if isinstance(self._books, nn.ModuleDict) else self._books  # type: ignore[return-value]

    def check(self, sites: Sequence[DiscreteSite]) -> None:
        """Raises a ValueError if these are not the sites that there are codebooks for."""
        names = [site.name for site in sites]
        if isinstance(self._books, nn.ModuleDict) and set(self._books) != set(names):
            raise ValueError(
                f"Cannot quantize sites {names} because there are codebooks of {list(self._books)}; try a dict from "
                "each of these sites to its codebook, or one Codebook for all of them."
            )
        for site in sites:
            _check(site, self.of(site).num_codes)

    @property
    def are_settled(self) -> bool:
        """Whether no batches are left to be averaged."""
        return all(book.is_settled for book in self.all)

    def numbers(self, sites: Sequence[DiscreteSite]) -> tuple[list[int], int]:
        """The number of each site's first code where those of all codebooks are counted through, and of all codes."""
        sizes = [book.num_codes for book in self.all]
        starts = {id(book): sum(sizes[:i]) for i, book in enumerate(self.all)}
        return [starts[id(self.of(site))] for site in sites], sum(sizes)

    def widths(self, structure: Structure) -> list[int]:
        """The number of features of every site."""
        return [code_place(site).stop * self.of(site).dim for site in structure.discrete]

    def arrange(self, features: Tensor, structure: Structure) -> list[Tensor]:
        """Features of every site as ``(N, P, D)``."""
        sites, given, size = structure.discrete, features.shape, structure.datapoints.size
        positions, dims = [code_place(site).stop for site in sites], [self.of(site).dim for site in sites]
        widths = self.widths(structure)
        if features.dim() == 2 and given == (size, sum(widths)):
            parts = features.split(widths, 1)
            return [x.reshape(size, -1, dim) for x, dim in zip(parts, dims, strict=True)]
        if given[0] != size or features.dim() < 3 or given[1:-1].numel() != sum(positions) or len({*dims}) > 1:
            wanted = [f"(N, {number}, {dim})" for number, dim in zip(positions, dims, strict=True)]
            shape = wanted[0] if len(sites) == 1 else f"(N, {sum(widths)}), that is {' and '.join(wanted)}"
            raise ValueError(
                f"Cannot quantize features of shape {tuple(given)} because {_in_words(sites, positions)} in each of "
                f"the {size} datapoints of plate {structure.datapoints.name!r}; try an encoder to {shape}, of a "
                "feature map the channels last."
            )
        return list(features.reshape(size, sum(positions), given[-1]).split(positions, 1))

    def by_book(self, features: Sequence[Tensor], structure: Structure) -> list[tuple[Codebook, Tensor]]:
        """Every codebook with the features of its sites, ``(N, P, D)``, one site's after the other's."""
        pairs = list(zip(features, structure.discrete, strict=True))
        return [(book, torch.cat([x for x, site in pairs if self.of(site) is book], 1)) for book in self.all]

    def by_site(self, codes: Sequence[Tensor], structure: Structure) -> list[Tensor]:
        """The codes of every site ``(N, P)``, views of those of every codebook."""
        parts = {}
        for book, found in zip(self.all, codes, strict=True):
            sizes = [code_place(site).stop for site in structure.discrete if self.of(site) is book]
            parts[id(book)] = iter(found.split(sizes, 1))
        return [next(parts[id(self.of(site))]) for site in structure.discrete]


def _in_words(sites: Sequence[DiscreteSite], positions: Sequence[int]) -> str:
    named = [f"site {site.name!r} has {number} positions" for site, number in zip(sites, positions, strict=True)]
    return " and ".join(named)


def _check(site: DiscreteSite, num_codes: int) -> None:
    """Raises a ValueError if a discrete latent is none of codes of the codebook."""
    cause = None
    if site.kind != "categorical":
        cause = f"its prior is no Categorical but of kind {site.kind!r}"
    elif site.weight.is_masked:
        cause = "the model masks it"
    elif site.num_categories != num_codes:
        cause = f"its prior has {site.num_categories} codes and the codebook {num_codes}"
    if cause is not None:
        raise ValueError(
            f"Cannot guide site {site.name!r} by vector-quantised codes because {cause}; try "
            f"`pyro.sample({site.name!r}, Categorical(logits=torch.zeros({num_codes})))` in a plate of all positions, "
            "without a mask."
        )


def code_value(structure: Structure, site: DiscreteSite, codes: Tensor) -> Tensor:
    """Codes ``(N, P)`` in the shape of the site, without a copy: the codebook knows them by their memory."""
    dims = (1,) * (-structure.datapoints.dim - 1)
    return code_place(site).unflatten(codes.unflatten(0, (-1, *dims)))


def code_values(structure: Structure, codes: Sequence[Tensor]) -> dict[str, Tensor]:
    """The codes of every site in its shape, by name."""
    pairs = zip(structure.discrete, codes, strict=True)
    return {site.name: code_value(structure, site, values) for site, values in pairs}


def code_place(site: DiscreteSite) -> LocalSite:
    """Where the codes of a site lie among those of a datapoint, ``(N, P)``: the site's shape without its categories."""
    shape = site.logits.shape[:-1]
    size = site.logits.stop - site.logits.start
    return replace(site.logits, event_dim=len(shape), shape=shape, start=0, stop=size // site.num_categories)
