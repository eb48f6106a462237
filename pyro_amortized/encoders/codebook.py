"""A codebook: vectors that features are replaced by, with the gradient passed straight through.

The codebook does two things that belong together. A guide asks it for the nearest codes of the encoder's features; the
model looks those codes up. Codes are integers, through which no gradient passes, so the codebook remembers which
features they came from, and gives the vectors it looks up the gradient of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_real, is_traced
from pyro_amortized.encoders.quantized import Quantized, perplexity

__all__ = ["Codebook"]

_LLOYD_STEPS = 10


def _check_gradient(looked_up: Tensor, _: Tensor) -> None:
    """Raises a ValueError if gradients reach features ``(M, D)`` while the model's cannot be among those of all rows.

    A hook of the features; it holds no part of their graph, which would never be freed otherwise.
    """
    if not looked_up.all():
        raise ValueError(
            f"Cannot train the encoder because the model has looked up only {int(looked_up.sum())} of the "
            f"{len(looked_up)} codes that the guide found, or copies of the others, through which no gradient comes "
            "back; try `codebook(code)` in the model, with the guide's own codebook and the value of the sample site "
            "or views of it (reshape, permute, slices). Where codes are not wanted, look all of them up and drop the "
            "vectors."
        )


@dataclass
class _Collected:
    """What the codebook's next update is made from.

    Attributes:
        sums: Number and sum of the features of every code in all batches, ``(K, 1 + D)``, of all processes.
        num_batches: Number of batches.
        rows: The features of the last batch, ``(M, D)``; of several processes K of the first one's, drawn already, so
            that all processes revive dead codes alike.
        num_rows: Number of features of the last batch in all processes.
        is_drawn: Whether the features are those of several processes.
    """

    sums: Tensor
    num_batches: int
    rows: Tensor
    num_rows: int
    is_drawn: bool


class Codebook(nn.Module):
    r"""K vectors that stand for features: looked up in the model, found and trained by the guide.

    The code of features z is the nearest one, :math:`k(z) = \arg\min_k \|z - e_k\|`. Calling the codebook looks codes
    up. For those that a guide has just found (the value of its sample site, or any view of it) the gradient of the
    vectors is passed on to the features unchanged, the straight-through estimator:

    .. math:: z_q = z + \mathrm{sg}(e_k - z), \qquad \frac{\partial z_q}{\partial z} = I.

    The vectors are no parameters. They are moving averages of the features that they stand for, of batches with
    :math:`n_k` features of code k each,

    .. math:: N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \quad
        m_k \leftarrow \gamma m_k + (1 - \gamma) \sum_{i: k(z_i) = k} z_i, \quad
        e_k = m_k / N_k.

    At first they are k-means centres of the first batch's features, each with the weight of uniform usage. A code that
    is hardly used any more is moved to a feature vector of the batch, drawn at random, and starts anew with the weight
    of uniform usage.

    A guide collects the features of a step of training, and the averages move when the next step begins: all draws of
    one step, and all parts of a batch, meet the same vectors. They move as well before the codebook is saved, copied or
    set to ``eval()``. Where several processes train together (``torch.distributed``), they move by the features of all.

    Args:
        num_codes: Number of codes K.
        dim: Number of features D of a code's vector.
        decay: :math:`\gamma`.
        revive_below: A code is moved when :math:`N_k` falls below this share of uniform usage, M / K for batches of M
            features; 0 for never.

    Attributes:
        embeddings: The vectors :math:`e_k`, ``(K, D)``.
        counts: :math:`N_k`, ``(K,)``.
        sums: :math:`m_k`, ``(K, D)``.
        initialized: Whether features have been seen.

    Example:
        >>> codebook = Codebook(num_codes=2, dim=1)
        >>> codebook.initialize(torch.tensor([[0.0], [0.2], [5.0], [5.2]]))
        >>> codes = codebook.nearest(torch.tensor([[0.3], [4.0], [9.0]]))
        >>> codebook(codes).squeeze(-1)
        tensor([0.1000, 5.1000, 5.1000])

    References:
        Neural Discrete Representation Learning, Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu (2017),
        https://arxiv.org/abs/1711.00937
        Generating Diverse High-Fidelity Images with VQ-VAE-2, Ali Razavi, Aaron van den Oord, Oriol Vinyals (2019),
        https://arxiv.org/abs/1906.00446
        Jukebox: A Generative Model for Music, Prafulla Dhariwal, Heewoo Jun, Christine Payne, Jong Wook Kim, Alec
        Radford, Ilya Sutskever (2020), https://arxiv.org/abs/2005.00341
    """

    embeddings: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.99, revive_below: float = 0.02) -> None:
        super().__init__()
        num_codes, dim = check_count("num_codes", num_codes, 2, 64), check_count("dim", dim, 1, 16)
        for name, share, usual in (("decay", decay, 0.99), ("revive_below", revive_below, 0.02)):
            check_real(name, share, "at least 0 and below 1", lambda x: 0 <= x < 1, usual)
        self.num_codes, self.dim, self.decay, self.revive_below = num_codes, dim, decay, revive_below
        self.register_buffer("embeddings", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.embeddings.clone())
        self.register_buffer("initialized", torch.tensor(False))
        self._quantized: Quantized | None = None
        self._collected: _Collected | None = None

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"num_codes={self.num_codes}, dim={self.dim}, decay={self.decay}, revive_below={self.revive_below}"

    @property
    def perplexity(self) -> float:
        """Effective number of codes in use, from the moving averages of their counts: between 1 and K."""
        return float(perplexity(self.counts))

    # In the model

    def forward(self, codes: Tensor) -> Tensor:
        """The vectors of codes.

        Args:
            codes: Integers ``(*)`` from 0 to K - 1.

        Returns:
            Vectors ``(*, D)``, with the gradient of the features where a guide has just found these codes, and the
            model has not overwritten them.

        Raises:
            ValueError: If the codes are no integers, or none of this codebook.
        """
        if not isinstance(codes, Tensor):
            raise ValueError(f"Cannot look up codes {codes!r} because they are no tensor; try torch.as_tensor(codes).")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(
                f"Cannot look up codes of type {codes.dtype} because they are positions in the codebook; try integers, "
                "as a Categorical draws them."
            )
        try:
            vectors = F.embedding(codes.long(), self.embeddings)
        except IndexError as error:
            raise ValueError(
                f"Cannot look up codes from {int(codes.min())} to {int(codes.max())} because this Codebook holds "
                f"codes 0 to {self.num_codes - 1}; try Categorical(logits=torch.zeros({self.num_codes})) as their "
                "prior."
            ) from error
        quantized = self._quantized if torch.is_grad_enabled() else None
        rows = None if quantized is None else quantized.rows(codes)
        if quantized is None or rows is None:
            return vectors
        quantized.looked_up.index_fill_(0, rows.flatten(), True)
        features = F.embedding(rows, quantized.features)
        unchanged = (codes == quantized.nearest[rows]).unsqueeze(-1)
        return vectors + torch.where(unchanged, features - features.detach(), 0.0)

    # In the guide

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """The codes nearest to features, the first of them in case of a tie.

        Args:
            features: Of shape ``(*, D)``.

        Returns:
            Integers ``(*)``.

        Raises:
            ValueError: If the codebook has no vectors yet, or the features are not finite or of another size or type.
        """
        self._check(features)
        if not is_traced() and not self.initialized:
            raise ValueError(
                "Cannot find the nearest codes because this Codebook has seen no features yet; try guide.setup(...) "
                "with data, a step of training, codebook.initialize(features), or load_state_dict."
            )
        return self._nearest(features.reshape(-1, self.dim)).reshape(features.shape[:-1])

    def _nearest(self, rows: Tensor) -> Tensor:
        center = self.embeddings.mean(0)  # as products lose digits where vectors are long beside their distances
        vectors = self.embeddings - center
        with torch.autocast(rows.device.type, enabled=False):  # and more of them in half precision
            return ((rows - center) @ vectors.T - 0.5 * vectors.square().sum(-1)).argmax(-1)

    def quantize(self, features: Tensor) -> Quantized:
        """Finds the codes of features, and remembers them, so that looking these up passes gradients straight through.

        Args:
            features: Of shape ``(*, D)``.

        Returns:
            The codes, and what else is known of them.
        """
        codes = self.nearest(features)
        nearest = codes.flatten().clone()
        vectors = F.embedding(nearest, self.embeddings)
        looked_up = torch.zeros_like(nearest, dtype=torch.bool)
        result = Quantized(features.reshape(-1, self.dim), codes, nearest, vectors, looked_up)
        self._quantized = None
        if result.features.requires_grad and torch.is_grad_enabled():
            self._quantized = result
            result.features.register_hook(partial(_check_gradient, looked_up))
        return result

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        """Takes the vectors from features, once: a second call changes nothing.

        Their centres by k-means, from distinct ones drawn at random; if there are fewer than K, the rest of the vectors
        lie close by some of them.

        Args:
            features: Of shape ``(*, D)``.
        """
        self._check(features)
        if self.initialized:
            return
        rows = features.reshape(-1, self.dim)
        distinct = rows.unique(dim=0)
        self.embeddings.copy_(self._draw(distinct))
        for _ in range(_LLOYD_STEPS if len(distinct) > self.num_codes else 0):
            number, total = self._count(rows, self._nearest(rows))
            self.embeddings.copy_(torch.where(number > 0, total / number.clamp(min=1), self.embeddings))
        self._weigh(torch.ones_like(self.counts, dtype=torch.bool), len(rows))
        self.initialized.fill_(True)

    def update(self, features: Tensor, codes: Tensor) -> None:
        """Moves the averages by one batch, and revives dead codes.

        Args:
            features: Of shape ``(*, D)``.
            codes: Their codes ``(*)``.
        """
        self.settle()
        self.collect(features, codes)
        self.settle()

    @torch.no_grad()
    def collect(self, features: Tensor, codes: Tensor) -> None:
        """Keeps a batch for the next update, which is by the mean of :math:`n_k` and of the sums over all such batches.

        Args:
            features: Of shape ``(*, D)``.
            codes: Their codes ``(*)``.
        """
        self._check(features)
        rows = features.detach().reshape(-1, self.dim)
        sums, num_batches, num_rows = torch.cat(self._count(rows, codes.flatten()), -1), 1, len(rows)
        several = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
        if several:
            torch.distributed.all_reduce(sums)
            num_rows = int(sums[:, 0].sum())
            rows = self._draw(rows) if len(rows) else self.embeddings.to(rows)
            torch.distributed.broadcast(rows, 0)
        if not num_rows:
            return
        if self._collected is not None:
            sums, num_batches = sums + self._collected.sums.to(sums), 1 + self._collected.num_batches
        self._collected = _Collected(sums, num_batches, rows, num_rows, several)

    @property
    def is_settled(self) -> bool:
        """Whether no batches are left to be averaged."""
        return self._collected is None

    @torch.no_grad()
    def settle(self) -> None:
        """Moves the averages by the batches collected, if there are any, and revives dead codes."""
        if self._collected is None:
            return
        collected, self._collected = self._collected, None
        mean, rows = collected.sums.to(self.sums) / collected.num_batches, collected.rows.to(self.sums)
        self.counts.lerp_(mean[:, 0], 1 - self.decay)
        self.sums.lerp_(mean[:, 1:], 1 - self.decay)
        counted = self.counts > torch.finfo(self.counts.dtype).tiny
        self.embeddings.copy_(torch.where(counted[:, None], self.sums / self.counts[:, None], self.embeddings))
        dead = self.counts < self.revive_below * collected.num_rows / self.num_codes
        if dead.any():
            drawn = rows if collected.is_drawn else self._draw(rows)
            self.embeddings[dead] = drawn[dead]
            self._weigh(dead, collected.num_rows)

    def train(self, mode: bool = True) -> Codebook:
        """As of any module; ``eval()`` settles the averages."""
        if not mode:
            self.settle()
        return super().train(mode)

    def _count(self, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Number ``(K, 1)`` and sums ``(K, D)`` of the rows of every code."""
        ones = rows.new_ones(len(rows), 1)
        total = rows.new_zeros(self.num_codes, self.dim + 1).index_add_(0, codes, torch.cat([ones, rows], -1))
        return total[:, :1], total[:, 1:]

    def _weigh(self, chosen: Tensor, num_rows: int) -> None:
        """Gives codes the weight of uniform usage."""
        self.counts[chosen] = num_rows / self.num_codes
        self.sums[chosen] = self.embeddings[chosen] * (num_rows / self.num_codes)

    def _draw(self, rows: Tensor) -> Tensor:
        """K rows at random: distinct ones, or all of them again and again, moved a little to tell them apart."""
        order = torch.randperm(len(rows), device=rows.device)
        if len(rows) >= self.num_codes:
            return rows[order[: self.num_codes]]
        spread = rows.std(0, correction=0).square().mean().sqrt()
        size = 0.01 * torch.where(spread > 0, spread, torch.ones_like(spread)) / math.sqrt(self.dim)
        repeated = rows[order.repeat(math.ceil(self.num_codes / len(rows)))[: self.num_codes]]
        noise = size * torch.randn_like(repeated)
        noise[: len(rows)] = 0.0
        return repeated + noise

    def _check(self, features: Tensor) -> None:
        own = self.embeddings
        if features.dim() < 1 or features.shape[-1] != self.dim:
            raise ValueError(
                f"Cannot quantize features of shape {tuple(features.shape)} because the vectors of this Codebook have "
                f"dim {self.dim}; try features (*, {self.dim}), of a feature map the channels last."
            )
        if features.dtype != own.dtype or features.device != own.device:
            raise ValueError(
                f"Cannot quantize features of type {features.dtype} on {features.device} because this Codebook holds "
                f"{own.dtype} on {own.device}; try codebook.to(features)."
            )
        if is_traced():
            return
        bad = (~features.isfinite()).reshape(len(features) if features.dim() > 1 else 1, -1).any(-1)
        if bad.any():
            raise ValueError(
                f"Cannot quantize the features of {int(bad.sum())} datapoints (first: "
                f"{bad.nonzero().flatten()[:10].tolist()}) because they are NaN or infinite; try a look at the data, "
                "a smaller learning rate, and pyro.optim.ClippedAdam if gradients are not clipped yet."
            )

    # Saving

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._collected = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """The codebook without the features that it has seen last."""
        self.settle()
        return {**self.__dict__, "_quantized": None}
