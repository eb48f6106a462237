"""Vector-quantised codes: a guide that answers with the nearest codes of the encoder's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyro_amortized.checks import check_real
from pyro_amortized.encoders.codebook import Codebook
from pyro_amortized.encoders.quantized import Quantized
from pyro_amortized.guides.amortized import AmortizedGuide
from pyro_amortized.guides.base import GuideOptions
from pyro_amortized.guides.call import Call
from pyro_amortized.guides.codes import CodeBooks, code_place, code_value, code_values
from pyro_amortized.guides.posterior import Inferred
from pyro_amortized.guides.sampling import add_gradient
from pyro_amortized.inference.base import InferenceStrategy, Objective
from pyro_amortized.structure.discrete import DiscreteSite
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.running import isolated
from pyro_amortized.structure.structure import Structure

__all__ = ["VectorQuantizedGuide"]


class _EncodedFeatures(InferenceStrategy):
    """A feature vector for every position of a datapoint's codes, from the encoder and its head."""

    def __init__(self, encoder: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, inputs: tuple[Tensor, ...], index: Tensor | None, objective: Objective | None = None) -> Tensor:
        """The encoder's features, before the head."""
        return self.encoder(*inputs)


class VectorQuantizedGuide(AmortizedGuide):
    r"""Vector-quantised codes: each datapoint's codes are those nearest to its encoder's features.

    .. math:: q(k \mid x) = \prod_i 1\{k_i = \arg\min_k \|f_i(x) - e_k\|\}

    The model draws the codes from a Categorical, in the datapoint plate and an inner plate of positions, or with
    ``to_event``, and looks them up in the :class:`~pyro_amortized.Codebook` that it shares with the guide. There may be
    several sites of codes, coarse ones and fine ones, with priors that depend on those before. As q has no entropy, the
    ELBO is :math:`\log p(x \mid k) + \log p(k)`: with a uniform prior over K codes it pays :math:`\log K` nats for each
    position, whatever these tell. Any ELBO of Pyro trains all of it:

    - The encoder by the gradient of the looked-up vectors, passed straight through to the features, and by that of the
      commitment term :math:`\beta \|f_i(x) - \mathrm{sg}(e_{k_i})\|^2`, summed over positions, in nats. The latter
      comes as a factor of value zero, so that the reported loss is the negative ELBO and nothing else.
    - The codebook by moving averages, once for each step, however many particles there are: in ``train()`` mode, after
      a backward pass, at the beginning of the next step, so that one step has one q. A step ends when the encoder's
      parameters change or its gradients are set to zero.

    A guide that is pickled takes a copy of the codebook with it; after loading, give it the model's, with
    ``guide.model = model; guide.codebook = model.codebook``.

    Args:
        model: A Pyro model.
        codebook: The codebook, the one that the model looks codes up in. ``setup`` takes its first vectors from data.
            One for all sites of codes, or a dict from the name of each site to its own.
        encoder: A module from inputs to features ``(N, H)``, to which the guide adds a linear head; or one that returns
            the features of all positions, ``(N, P, D)`` or ``(N, *positions, D)``, channels last; those of several
            sites ``(N, P, D)``, one site's positions after the other's. By default an
            :class:`~pyro_amortized.MLPEncoder` of standardised inputs.
        commitment: :math:`\beta`.
        **options: As for :class:`AmortizedGuide`, but for ``family``.

    Raises:
        ValueError: If the model has other local latents than sites of codes, or a prior over another number of codes
            than the codebook holds.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> codebook = Codebook(num_codes=4, dim=2)
        >>> decoder = nn.Linear(3 * 2, 5)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         code = pyro.sample("code", dist.Categorical(torch.ones(3, 4)).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(codebook(code).flatten(-2)), 1.0).to_event(1), obs=x)
        >>> guide = VectorQuantizedGuide(model, codebook)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(torch.randn(8, 5))
        >>> guide.codes(torch.randn(6, 5)).shape
        torch.Size([6, 3])

    References:
        Neural Discrete Representation Learning, Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu (2017),
        https://arxiv.org/abs/1711.00937
    """

    _shares_heads = False

    codebook: Codebook | nn.ModuleDict

    def __init__(
        self,
        model: Callable[..., Any],
        codebook: Codebook | Mapping[str, Codebook],
        encoder: nn.Module | None = None,
        *,
        commitment: float = 0.25,
        **options: Unpack[GuideOptions],
    ) -> None:
        books = codebook.values() if isinstance(codebook, Mapping) else [codebook]
        if not books or not all(isinstance(book, Codebook) for book in books):
            raise ValueError(
                f"Cannot quantize with {codebook!r} because it is no Codebook; try the Codebook that the model looks "
                "codes up in, or a dict from the names of sites of codes to theirs."
            )
        check_real("commitment", commitment, "a finite number, 0 or more", lambda x: x >= 0, 0.25)
        if "family" in options:
            raise ValueError(
                "Cannot use a family with vector-quantised codes because q has one possible value; try leaving it out."
            )
        super().__init__(model, encoder, **options)
        self._structures = StructureReader(options.get("plate"), discrete=True, groups=options.get("groups"))
        self._sites: tuple[DiscreteSite, ...] = ()
        self._step_parameters: list[Tensor] = []
        self.commitment = commitment
        self.codebook = codebook if isinstance(codebook, Codebook) else nn.ModuleDict(codebook)

    # Building

    def _build(self, call: Call) -> None:
        structure = call.structure
        others = [] if structure.layout is None else [site.name for site in structure.layout.sites]
        if not structure.discrete or others:
            raise ValueError(
                f"Cannot guide local latents {[*(site.name for site in structure.discrete), *others]} because this "
                "guide infers sites of codes and nothing beside them; try Categorical sites alone."
            )
        self.code_books.check(structure.discrete)
        self._sites = structure.discrete
        super()._build(call)

    def _build_strategy(self, inputs: tuple[Tensor, ...], init_loc: Tensor, structure: Structure) -> InferenceStrategy:
        books = self.code_books
        encoder = self._encoder_spec[0] or self._default_encoder(inputs, books.all[0].embeddings)
        features, head = self._first_features(encoder, inputs), None
        if isinstance(features, tuple):
            raise ValueError(
                "Cannot quantize a tuple because one feature vector is wanted for each position; try an encoder from "
                "(N, ...) to (N, H), or to (N, P, D)."
            )
        if features.dim() <= 2:
            self._check_features(features, inputs, structure)
            head = nn.Linear(features.shape[1], sum(books.widths(structure))).to(features)
            features = head(features)
        for book, rows in books.by_book(books.arrange(features.detach(), structure), structure):
            book.initialize(rows)
        return _EncodedFeatures(encoder, head)

    @property
    def code_books(self) -> CodeBooks:
        """Which codebook serves which site."""
        return CodeBooks(self._modules["codebook"])  # type: ignore[arg-type]

    # One call

    def _features(self, call: Call) -> list[Tensor]:
        """The encoder's features of every site, ``(N, P, D)``, in the codebook's precision."""
        self._check_same(call.structure)
        inputs, strategy = self._inputs(call), self.inference
        features = strategy(inputs, call.index)
        if strategy.head is not None:
            self._check_features(features, inputs, call.structure)
            features = strategy.head(features)  # type: ignore[operator]
        books = self.code_books
        return [x.to(books.all[0].embeddings.dtype) for x in books.arrange(features, call.structure)]

    def _nearest(self, call: Call) -> list[Tensor]:
        """The codes of every site, ``(N, P)``."""
        parts = self.code_books.by_book(self._features(call), call.structure)
        return self.code_books.by_site([book.nearest(x) for book, x in parts], call.structure)

    def _check_same(self, structure: Structure) -> None:
        now = structure.discrete
        same = len(now) == len(self._sites) and all(
            site.name == other.name and site.same_as(other) for site, other in zip(now, self._sites, strict=True)
        )
        if not same:
            before, after = (
                [(site.name, site.num_categories, code_place(site).stop) for site in sites]
                for sites in (self._sites, now)
            )
            raise ValueError(
                f"Cannot run this guide because its codes (site, number of codes, positions) are {after} and were "
                f"{before} when it was set up; try the same structure in every call."
            )

    def _sample_local(self, call: Call) -> dict[str, Tensor]:
        if not call.structure.discrete and not self._sites:
            return {}
        books = self.code_books
        training = torch.is_grad_enabled() and self.training and all(book.training for book in books.all)
        if training and torch._C._get_tracing_state():
            raise ValueError(
                "Cannot train a codebook under a compiled ELBO because its moving averages are kept by Python; try "
                "Trace_ELBO instead of JitTrace_ELBO."
            )
        if training and not self._is_same_step():
            for book in books.all:
                book.settle()
        found = [book.quantize(x) for book, x in books.by_book(self._features(call), call.structure)]
        commitment = self.commitment * torch.stack([x.squared_distance.sum(-1) for x in found]).sum(0)
        if training:
            self._collect_in_backward(found, commitment)
        return self._sample_codes(call, books.by_site([x.codes for x in found], call.structure), commitment)

    def _sample_codes(self, call: Call, codes: Sequence[Tensor], commitment: Tensor) -> dict[str, Tensor]:
        """Samples the codes ``(N, P)`` as Pyro sites, beside the gradient of the commitment terms ``(N,)``."""
        frame, result = call.structure.datapoints, {}
        with call.plates[frame.name]:
            add_gradient(f"{self._pyro_name}_commitment", commitment.reshape(-1, *(1,) * (-frame.dim - 1)))
            for site, values in zip(call.structure.discrete, codes, strict=True):
                value = code_value(call.structure, site, values)
                with ExitStack() as stack:
                    for name in site.logits.inner_plates:
                        stack.enter_context(call.plates[name])
                    stack.enter_context(site.weight.handlers())
                    result[site.name] = pyro.sample(site.name, dist.Delta(value, event_dim=code_place(site).event_dim))
        return result

    def _trained_parameters(self) -> list[Tensor]:
        """The encoder's parameters, or, if it is frozen, all those that Pyro trains."""
        own: list[Tensor] = [p for p in self._modules["inference"].parameters() if p.requires_grad]  # type: ignore[union-attr]
        return own or list(pyro.get_param_store()._params.values())

    def _is_same_step(self) -> bool:
        """Whether a step goes on of which a batch is collected: its parameters have gradients, and have not changed."""
        now, before = self._trained_parameters(), self._step_parameters
        if self.code_books.are_settled or len(now) != len(before):
            return False
        pairs = list(zip(now, before, strict=True))
        norms = [p.grad.norm() for p in now if p.grad is not None]
        if not norms or not torch.stack(norms).any() or any(p.shape != old.shape for p, old in pairs):
            return False
        return bool(torch.stack([(p == old.to(p)).all() for p, old in pairs]).all())

    def _collect_in_backward(self, found: Sequence[Quantized], commitment: Tensor) -> None:
        """Lets the codebooks collect a batch once a backward pass reaches its commitment terms, part of every loss."""
        batch = [[(quantized.features.detach(), quantized.nearest) for quantized in found]]
        if not commitment.requires_grad:  # of a frozen encoder
            commitment.requires_grad_()

        def collect(_: Tensor) -> None:
            if batch:
                if self.code_books.are_settled:
                    self._step_parameters = [p.detach().clone() for p in self._trained_parameters()]
                for book, part in zip(self.code_books.all, batch.pop(), strict=True):
                    book.collect(*part)

        commitment.register_hook(collect)

    # What is known of the posterior

    @torch.no_grad()
    def find_codes(self, *args: Any, **kwargs: Any) -> tuple[Structure, list[Tensor]]:
        """The structure of a call, and the codes of its datapoints ``(N, P)``, site by site."""
        with isolated():
            call = self._read(args, kwargs)
            return call.structure, self._nearest(call)

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Inferred:
        inferred = super()._infer(args, kwargs, **options)
        cause, remedy = "q has one possible value, the nearest codes", "guide.codes(...) and collapse_report(...)"
        return replace(inferred, cause=cause, remedy=remedy)

    @torch.no_grad()
    def codes(self, *args: Any, **kwargs: Any) -> Any:
        """The codes of the datapoints in a call.

        Returns:
            Integers in the shape of the site; of several sites a dict by name.
        """
        structure, codes = self.find_codes(*args, **kwargs)
        values = code_values(structure, codes)
        return values if len(values) > 1 else next(iter(values.values()))

    @torch.no_grad()
    def commitment_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The commitment term, which trains the encoder and is no part of the ELBO.

        Returns:
            One number for each datapoint, ``(N,)``, counted in nats.
        """
        with isolated():
            call = self._read(args, kwargs)
            parts = self.code_books.by_book(self._features(call), call.structure)
            distances = [(x - book.embeddings[book.nearest(x)]).square().sum((-1, -2)) for book, x in parts]
            return self.commitment * torch.stack(distances).sum(0)

    def _local_quantiles(self, quantiles: Sequence[float] | Tensor, call: Call) -> dict[str, Tensor]:
        """The codes, whatever the quantile."""
        values = code_values(call.structure, self._nearest(call))
        return {name: value.expand(len(quantiles), *value.shape) for name, value in values.items()}

    def _local_draw(self, call: Call) -> dict[str, Tensor]:
        return {name: value.squeeze(0) for name, value in self._local_quantiles([0.5], call).items()}

    # Saving

    def __getstate__(self) -> dict[str, Any]:
        """The guide without its model, and without what it knows of the last step."""
        return {**super().__getstate__(), "_step_parameters": []}
