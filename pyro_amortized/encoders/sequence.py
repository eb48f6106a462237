"""The encoder of sequences: features of every step, or of the whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_flag, check_widths
from pyro_amortized.encoders.checks import check_heads, check_lengths, check_sizes
from pyro_amortized.encoders.elements import ElementsEncoder
from pyro_amortized.encoders.layers import LEAST_NORMALIZED, hidden_layers
from pyro_amortized.encoders.pooling import Along, Pool
from pyro_amortized.encoders.standardize import Standardize

__all__ = ["SequenceEncoder"]


class _OverTime(nn.Module):
    """From features of every step by itself to those that know of other steps, ``(N, T, H)``."""

    @abstractmethod
    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Features of sequences of lengths ``(N,)``; steps beyond their ends change nothing in those before."""


class _Recurrent(_OverTime):
    """GRUs that read forwards and, unless features are causal, others that read backwards from each sequence's end.

    Their states are the features, as they are: a sum with what is known of a step by itself, normalised, would at first
    say little but that, and many models have no use for other steps before their latents tell something.
    """

    def __init__(self, width: int, num_layers: int, causal: bool) -> None:
        super().__init__()
        backwards = 0 if causal else width // 2
        self.forwards = nn.ModuleList(nn.GRU(width, width - backwards, batch_first=True) for _ in range(num_layers))
        self.backwards = nn.ModuleList(
            nn.GRU(width, backwards, batch_first=True) for _ in range(num_layers if backwards else 0)
        )

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        for number, gru in enumerate(self.forwards):
            found = [gru(hidden)[0]]
            if self.backwards:
                found.append(_turned(self.backwards[number](_turned(hidden, lengths))[0], lengths))
            hidden = torch.cat(found, -1)
        return hidden


class _Attention(nn.Module):
    """Attention of steps to steps and a layer for each, both added to what comes in, normalised before.

    It may fall on nothing instead, a step with a logit and values of 0. Weights of all steps would sum to 1 wherever a
    step stands: that it is one of the first, where the posterior is closer to what the model starts from, or that few
    steps are there to be averaged, could not be told.

    Torch's own layer takes another path in evaluation, on which biases of single heads come out otherwise.
    """

    def __init__(self, width: int, num_heads: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.seek, self.found = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layer = nn.Sequential(nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Features ``(N, T, H)`` from such, with biases ``(N, heads, T, T)`` of the logits of attention."""
        parts = self.seek(self.norms[0](hidden)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        key, value, bias = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), F.pad(bias, (0, 1))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        hidden = hidden + self.found(found.transpose(1, 2).flatten(2))
        return hidden + self.layer(self.norms[1](hidden))


class _Attentive(_OverTime):
    """Attention to all steps or, where features are causal, to earlier ones, each head with a reach of its own.

    How much a step attends to another falls with their distance d, by a bias of -d, -d / 2, -d / 4, ...: the features
    are moving averages to begin with, as a GRU's are, and of any number of steps. Of two heads of one reach one looks
    back, the other ahead. What the layers have added up is normalised at last: a step of Adam at a high learning rate
    would move a sum by more than all that it held.
    """

    def __init__(
        self, width: int, num_layers: int, causal: bool, num_heads: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.causal, self.num_heads = causal, num_heads
        self.layers = nn.ModuleList(_Attention(width, num_heads, activation) for _ in range(num_layers))
        self.last_norm = nn.LayerNorm(width) if width >= LEAST_NORMALIZED else nn.Identity()

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        bias = self._bias(hidden, lengths)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return self.last_norm(hidden)

    def _bias(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """What is added to the logits of attention, ``(N, heads, T, T)``; every step sees itself, if nothing else."""
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        heads = torch.arange(self.num_heads, device=hidden.device).reshape(-1, 1, 1)
        ahead = steps - steps.unsqueeze(-1)
        pairs = not self.causal and self.num_heads > 1
        bias = -ahead.abs() * 2.0 ** -(heads // 2 if pairs else heads).to(hidden.dtype)
        unseen = ahead > 0 if self.causal else ahead * (1 - 2 * (heads % 2)) > 0
        if self.causal or pairs:
            bias = bias.masked_fill(unseen, -torch.inf)
        beyond = (steps >= lengths.unsqueeze(-1)).unsqueeze(-2) & (ahead != 0)
        return bias.masked_fill(beyond.unsqueeze(1), -torch.inf)


def _turned(x: Tensor, lengths: Tensor) -> Tensor:
    """Sequences ``(N, T, H)`` in reverse, each by itself; what lies beyond its end stays where it is."""
    steps = torch.arange(x.shape[1], device=x.device)
    ends = lengths.unsqueeze(-1)
    order = torch.where(steps < ends, ends - 1 - steps, steps)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


class SequenceEncoder(ElementsEncoder):
    r"""An encoder of sequences, whose steps know of each other: features of every step, or of the whole sequence.

    Features of every step, ``(N, T, H)``, serve sites that are numbered by time, in any number of steps. They know all
    steps of the sequence, as posteriors of states do (smoothing), or with ``causal=True`` the step itself and those
    before (filtering). With ``pooled=True`` features ``(N, H)`` serve a latent of the whole sequence.

    A mask says which steps are there. Those that are not, because they have not been observed, have features too, from
    what is known of the others; those after the last one that is there, because sequences have unequal lengths, change
    no feature of the steps before.

    Args:
        input_dim: Number of values per step F.
        causal: Whether features of a step depend on no later ones.
        pooled: Whether there is one vector of features for the whole sequence.
        network: ``"gru"``, or ``"transformer"``, whose time grows with the square of T, but which looks at all steps at
            once.
        hidden_dims: Widths of the layers that every step goes through first; the last one is the width of the network
            and the number of features H.
        num_layers: Number of layers of the network over time.
        num_heads: Number of heads of the transformer, a divisor of H.
        activation: Constructor of the activation after each layer.
        standardize: As in :class:`MLPEncoder`.

    Raises:
        ValueError: If a size is none, there is no such network, or ``num_heads`` is no divisor of H.

    Example:
        >>> encoder = SequenceEncoder(2)
        >>> encoder(torch.zeros(3, 7, 2)).shape
        torch.Size([3, 7, 64])
        >>> encoder(torch.zeros(3, 7, 2), torch.tensor([7, 4, 5])).shape  # of sequences of these lengths
        torch.Size([3, 7, 64])

    References:
        Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation, Kyunghyun Cho,
        Bart van Merrienboer, Caglar Gulcehre, Dzmitry Bahdanau, Fethi Bougares, Holger Schwenk, Yoshua Bengio (2014),
        https://arxiv.org/abs/1406.1078

        Attention Is All You Need, Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N.
        Gomez, Lukasz Kaiser, Illia Polosukhin (2017), https://arxiv.org/abs/1706.03762

        Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, Ofir Press, Noah A.
        Smith, Mike Lewis (2022), https://arxiv.org/abs/2108.12409
    """

    kind = "a sequence"

    def __init__(
        self,
        input_dim: int,
        *,
        causal: bool = False,
        pooled: bool = False,
        network: str = "gru",
        hidden_dims: Sequence[int] = (64,),
        num_layers: int = 1,
        num_heads: int = 4,
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim = check_sizes(input_dim, activation, standardize)
        hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        for name, flag in (("causal", causal), ("pooled", pooled)):
            check_flag(name, flag)
        num_layers, num_heads = check_count("num_layers", num_layers, 1), check_count("num_heads", num_heads, 1, 4)
        if network not in ("gru", "transformer"):
            raise ValueError(
                f'Cannot encode sequences by network={network!r} because there is none of that name; try network="gru".'
            )
        width = hidden_dims[-1]
        self.causal, self.pooled = causal, pooled
        self.standardize = Standardize(input_dim) if standardize else None
        self.step_layers = hidden_layers(input_dim + 1, hidden_dims, activation)
        if network == "gru":
            if not causal and width == 1:
                raise ValueError(
                    "Cannot read sequences both ways with a single feature because each way needs one; try "
                    "hidden_dims=(2,), or causal=True."
                )
            self.over_time: _OverTime = _Recurrent(width, num_layers, causal)
        else:
            check_heads(width, num_heads)
            self.over_time = _Attentive(width, num_layers, causal, num_heads, activation)
        self.pool = Pool(width) if pooled else None
        self.last_layers = hidden_layers(4 * width, (width,), activation) if pooled else nn.Identity()

    def _mask(self, x: Tensor, *inputs: Tensor | None) -> Tensor | None:
        """The mask among the further inputs, or that of lengths ``(N,)`` among them."""
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].dim() == 1 and isinstance(x, Tensor):
            steps = torch.arange(x.shape[1] if x.dim() > 1 else 1, device=x.device)
            lengths = inputs[0].unsqueeze(-1)
            check_lengths(lengths, len(steps))
            return super()._mask(x, steps < lengths)
        return super()._mask(x, *inputs)

    def forward(self, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """Features of sequences.

        Args:
            x: Steps of shape ``(N, T, F)``, or ``(N, T)`` for scalar ones.
            *inputs: A mask: which steps are there, shape ``(N, T)``, boolean or 1 and 0; or the lengths of the
                sequences, ``(N,)``; by default all are there.

        Returns:
            Features ``(N, T, H)``, or ``(N, H)`` if they are pooled; they do not depend on what is masked out.
        """
        return super().forward(x, *inputs)

    def features(self, x: Tensor, member: Tensor) -> Tensor:
        """Features of standardised steps ``(N, T, F)``; ``member`` ``(N, T)`` says which are there."""
        steps = torch.arange(x.shape[1], device=x.device)
        lengths = ((steps + 1) * (member != 0)).amax(1)
        hidden = self.over_time(self.step_layers(torch.cat([x, member.unsqueeze(-1)], -1)), lengths)
        if self.pool is None:
            return hidden
        within = (steps < lengths.unsqueeze(-1)).to(x.dtype).unsqueeze(-1)
        last = (lengths - 1).clamp(min=0).reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        ends = [hidden[:, 0], hidden.gather(1, last).squeeze(1)]
        return self.last_layers(torch.cat([self.pool(hidden, within, Along((1,))), *ends], -1))
