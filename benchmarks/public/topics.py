"""Topic models: of Pyro's examples and tutorials, and of scvi-tools.

Pyro's contributors, "Example: Amortized Latent Dirichlet Allocation" (2018, ``lda.py``) and "Probabilistic Topic
Modeling" (2020, ``prodlda``); the contributors of scvi-tools, ``AmortizedLDA`` (2021). The models are of David M. Blei,
Andrew Y. Ng, Michael I. Jordan, "Latent Dirichlet Allocation" (2003), and Akash Srivastava, Charles Sutton,
"Autoencoding Variational Inference for Topic Models" (2017). The documents are simulated.
"""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from public._model import PublicModel
from public.autoencoders import both

NUM_TOPICS, NUM_WORDS, NUM_DOCS, LENGTH = 5, 60, 150, 32


def documents() -> Tensor:
    """Words ``(LENGTH, NUM_DOCS)``."""
    topic_words = dist.Dirichlet(torch.full((NUM_WORDS,), 0.1)).sample((NUM_TOPICS,))
    doc_topics = dist.Dirichlet(torch.full((NUM_TOPICS,), 0.3)).sample((NUM_DOCS,))
    return dist.Categorical(doc_topics @ topic_words).sample((LENGTH,))


def histograms(words: Tensor) -> Tensor:
    """How often each word occurs in each document, ``(documents, NUM_WORDS)``."""
    return torch.zeros(NUM_WORDS, words.shape[1]).scatter_add(0, words, torch.ones(words.shape)).T


# lda.py


def lda_model(data: Tensor | None = None) -> Tensor:
    with pyro.plate("topics", NUM_TOPICS):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / NUM_TOPICS, 1.0))
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(NUM_WORDS) / NUM_WORDS))
    with pyro.plate("documents", NUM_DOCS) as ind:
        if data is not None:
            data = data[:, ind]
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", LENGTH):
            topics = dist.Categorical(doc_topics)
            word_topics = pyro.sample("word_topics", topics, infer={"enumerate": "parallel"})
            return pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)


class LDAGuide(nn.Module):
    """Conjugate for the global latents; the shares of a document's topics are a point, ``Delta``."""

    def __init__(self, hidden_dim: int = 100) -> None:
        super().__init__()
        widths = NUM_WORDS, hidden_dim, hidden_dim, NUM_TOPICS
        layers = [nn.Linear(before, after) for before, after in zip(widths[:-1], widths[1:], strict=True)]
        for layer in layers:
            nn.init.normal_(layer.weight, 0.0, 0.001)
            nn.init.normal_(layer.bias, 0.0, 0.001)
        self.predictor = nn.Sequential(layers[0], nn.Sigmoid(), layers[1], nn.Sigmoid(), layers[2], nn.Softmax(dim=-1))

    def forward(self, data: Tensor) -> None:
        one = partial(torch.ones, NUM_TOPICS)
        weights = pyro.param("topic_weights_posterior", one, constraint=constraints.positive)
        words = pyro.param("topic_words_posterior", partial(one, NUM_WORDS), constraint=constraints.greater_than(0.5))
        with pyro.plate("topics", NUM_TOPICS):
            pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
            pyro.sample("topic_words", dist.Dirichlet(words))
        pyro.module("predictor", self.predictor)
        with pyro.plate("documents", NUM_DOCS) as ind:
            doc_topics = self.predictor(histograms(data[:, ind]))
            pyro.sample("doc_topics", dist.Delta(doc_topics, event_dim=1))


def lda() -> PublicModel:
    return PublicModel(
        make=lambda: (lda_model, LDAGuide()),
        calls=((documents(),),),
        num_datapoints=lambda words: words.shape[1],
        loss=partial(TraceEnum_ELBO, max_plate_nesting=2),
        options={"encoder_input": histograms},
    )


# ProdLDA


class ProdLDA(nn.Module):
    """A product of experts: the words' log-probabilities are mixed, not their probabilities."""

    def __init__(self, hidden_dim: int = 100, dropout: float = 0.2) -> None:
        super().__init__()
        self.beta = nn.Linear(NUM_TOPICS, NUM_WORDS, bias=False)
        self.bn = nn.BatchNorm1d(NUM_WORDS, affine=False)
        self.decoder = nn.ModuleList([self.beta, self.bn])
        self.drop = nn.Dropout(dropout)
        self.encoder = ProdLDAEncoder(hidden_dim, dropout)

    def model(self, docs: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, scale = docs.new_zeros(docs.shape[0], NUM_TOPICS), docs.new_ones(docs.shape[0], NUM_TOPICS)
            logtheta = pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))
            theta = F.softmax(logtheta, -1)
            count_param = F.softmax(self.bn(self.beta(self.drop(theta))), dim=1)
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, count_param), obs=docs)

    def guide(self, docs: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, scale = self.encoder(docs)
            pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))


class ProdLDAEncoder(nn.Module):
    def __init__(self, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(NUM_WORDS, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.fcmu, self.fclv = nn.Linear(hidden_dim, NUM_TOPICS), nn.Linear(hidden_dim, NUM_TOPICS)
        self.bnmu, self.bnlv = nn.BatchNorm1d(NUM_TOPICS, affine=False), nn.BatchNorm1d(NUM_TOPICS, affine=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, docs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.drop(F.softplus(self.fc2(F.softplus(self.fc1(docs)))))
        return self.bnmu(self.fcmu(hidden)), (0.5 * self.bnlv(self.fclv(hidden))).exp()


def prodlda() -> PublicModel:
    return PublicModel(make=partial(both, ProdLDA), calls=((histograms(documents()),),), loss=TraceMeanField_ELBO)


# AmortizedLDA of scvi-tools


class CategoricalBoW(dist.Multinomial):
    """A multinomial of ordered features, without its coefficient."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = dist.util.broadcast_all(self.logits, value)
        logits = logits.clone(memory_format=torch.contiguous_format)
        logits[(value == 0) & (logits == -math.inf)] = 0
        return (logits * value).sum(-1)


def logistic_normal_approximation(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the logistic normal that is Laplace's approximation of a Dirichlet."""
    size = len(alpha)
    mu = alpha.log() - alpha.log().sum() / size
    return mu, ((1 - 2 / size) / alpha + (1 / alpha).sum() / size**2).sqrt()


class AmortizedLDAModel(PyroModule):
    def __init__(self) -> None:
        super().__init__("amortized_lda")
        cell, feature = (
            logistic_normal_approximation(torch.full((size,), 1 / NUM_TOPICS)) for size in (NUM_TOPICS, NUM_WORDS)
        )
        for name, (mu, sigma) in (("cell", cell), ("feature", feature)):
            self.register_buffer(f"{name}_mu", mu)
            self.register_buffer(f"{name}_sigma", sigma)

    def forward(self, x: Tensor, library: Tensor, n_obs: int | None = None, kl_weight: float = 1.0) -> None:
        with pyro.plate("topics", NUM_TOPICS), poutine.scale(None, kl_weight):
            topic_prior = dist.Normal(self.feature_mu, self.feature_sigma).to_event(1)
            topic_feature_dist = F.softmax(pyro.sample("log_topic_feature_dist", topic_prior), dim=1)
        max_library_size = int(library.max().item())
        with pyro.plate("cells", size=n_obs or NUM_DOCS, subsample_size=x.shape[0]):
            with poutine.scale(None, kl_weight):
                cell_prior = dist.Normal(self.cell_mu, self.cell_sigma).to_event(1)
                cell_topic_dist = F.softmax(pyro.sample("log_cell_topic_dist", cell_prior), dim=1)
            counts = CategoricalBoW(max_library_size, cell_topic_dist @ topic_feature_dist)
            pyro.sample("feature_counts", counts, obs=x)


class AmortizedLDAGuide(PyroModule):
    def __init__(self, n_hidden: int = 128) -> None:
        super().__init__("amortized_lda_guide")
        normalized = nn.BatchNorm1d(n_hidden, momentum=0.01, eps=0.001)
        self.encoder = nn.Sequential(nn.Linear(NUM_WORDS, n_hidden), normalized, nn.ReLU(), nn.Dropout(0.1))
        self.mean_encoder, self.var_encoder = nn.Linear(n_hidden, NUM_TOPICS), nn.Linear(n_hidden, NUM_TOPICS)
        mu, sigma = logistic_normal_approximation(torch.ones(NUM_WORDS))
        self.mu, self.unconstrained_sigma = (nn.Parameter(part.repeat(NUM_TOPICS, 1)) for part in (mu, sigma))

    def forward(self, x: Tensor, library: Tensor, n_obs: int | None = None, kl_weight: float = 1.0) -> None:
        with pyro.plate("topics", NUM_TOPICS), poutine.scale(None, kl_weight):
            sigma = F.softplus(self.unconstrained_sigma)
            pyro.sample("log_topic_feature_dist", dist.Normal(self.mu, sigma).to_event(1))
        with pyro.plate("cells", size=n_obs or NUM_DOCS, subsample_size=x.shape[0]), poutine.scale(None, kl_weight):
            hidden = self.encoder(x)
            variance = self.var_encoder(hidden).exp() + 1e-4  # which the package takes for the deviation
            pyro.sample("log_cell_topic_dist", dist.Normal(self.mean_encoder(hidden), variance).to_event(1))


def amortized_lda() -> PublicModel:
    x = histograms(documents())
    return PublicModel(
        make=lambda: (AmortizedLDAModel(), AmortizedLDAGuide()),
        calls=((x, x.sum(1)),),
    )
