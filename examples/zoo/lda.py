"""Latent Dirichlet allocation, the topic of every word summed over exactly, the topics' words learned with it.

David M. Blei, Andrew Y. Ng, Michael I. Jordan, "Latent Dirichlet Allocation" (2003); after Pyro's example ``lda.py``
(2018), with simulated documents. Data are words x documents, so that the datapoints lie on the second axis; the encoder
sees how often each word occurs.

Run ``python examples/zoo/lda.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from _problem import RATES, Problem, indices, main
from pyro.infer import TraceEnum_ELBO
from torch import Tensor


def model(words: Tensor, index: Tensor | None = None, *, num_topics: int, num_words: int) -> None:
    """Words of shape ``(words, documents)``; all documents, or those at ``index``."""
    with pyro.plate("topics", num_topics):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.full((num_words,), 0.5)))
    with documents(words, index):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(num_topics)))
        with pyro.plate("words", len(words), dim=-2):
            topic = pyro.sample("topic", dist.Categorical(shares), infer={"enumerate": "parallel"})
            pyro.sample("word", dist.Categorical(topic_words[topic]), obs=pyro.subsample(words, event_dim=0))


def simulate(num_topics: int, num_words: int, length: int, num_documents: int) -> Tensor:
    """Documents of ``length`` words each, as a matrix ``(length, documents)``."""
    topic_words = dist.Dirichlet(torch.full((num_words,), 0.2)).sample((num_topics,))
    shares = dist.Dirichlet(torch.full((num_topics,), 0.3)).sample((num_documents,))
    return dist.Categorical(shares @ topic_words).sample((length,))


def counts(words: Tensor, index: Tensor | None = None, *, num_words: int) -> Tensor:
    """What the encoder sees: how often each word occurs in each document of the batch, ``(documents, num_words)``."""
    batch = pyro.subsample(words, event_dim=0).T
    return torch.zeros(len(batch), num_words).scatter_add_(1, batch, torch.ones(batch.shape))


def documents(words: Tensor, index: Tensor | None = None) -> pyro.plate:
    return pyro.plate("documents", words.shape[1], subsample=index, dim=-1)


def batches(args: tuple[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return ((*args, index) for index in indices(args[0].shape[1], size))


def make_problem(seed: int = 0, small: bool = False) -> Problem:
    pyro.set_rng_seed(seed)
    num_topics, num_words, length, num_documents, num_unseen = (3, 12, 40, 50, 2) if small else (4, 40, 64, 1000, 20)
    words = simulate(num_topics, num_words, length, num_documents + num_unseen)
    return Problem(
        name="Latent Dirichlet allocation",
        model=partial(model, num_topics=num_topics, num_words=num_words),
        train=(words[:, :num_documents].contiguous(),),
        held_out=(words[:, num_documents:].contiguous(),),
        options={"plate": "documents", "encoder_input": partial(counts, num_words=num_words)},
        loss=partial(TraceEnum_ELBO, max_plate_nesting=2),
        num_datapoints=lambda words, *_: words.shape[1],
        batches=partial(batches, size=num_documents // 2 if small else 50),
        create_plates=documents,
        global_rate=25.0,
    )


if __name__ == "__main__":
    main(make_problem, num_steps=500, lr=2e-2, rates=RATES)
