"""Autoencoders of Pyro's examples, on scikit-learn's digits of 8 x 8 pixels.

Pyro's contributors, "Variational Autoencoders" (2017, ``vae.py``), "The Semi-Supervised VAE" (2017, ``ss_vae_M2.py``)
and "Conditional Variational Auto-encoder" (2020, ``cvae``). The models are of Diederik P. Kingma, Max Welling,
"Auto-Encoding Variational Bayes" (2013); Diederik P. Kingma, Danilo J. Rezende, Shakir Mohamed, Max Welling,
"Semi-Supervised Learning with Deep Generative Models" (2014); and Kihyuk Sohn, Xinchen Yan, Honglak Lee, "Learning
Structured Output Representation using Deep Conditional Generative Models" (2015). Networks are smaller than there.
"""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import TraceEnum_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

from public._model import Program, PublicModel

NUM_PIXELS, NUM_LABELS = 64, 10


def digits(number: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 64)`` of pixels from 0 to 1, and their labels ``(N,)``."""
    data, order = load_digits(), torch.randperm(1797)[:number]
    return torch.tensor(data.data / 16.0, dtype=torch.float)[order], torch.tensor(data.target)[order]


def mlp(*widths: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class LocAndScale(nn.Module):
    """A network to location and scale, as the encoders of all three examples are."""

    def __init__(self, *widths: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.network = mlp(*widths[:-1], 2 * widths[-1], activation=activation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.network(x).chunk(2, -1)
        return loc, log_scale.exp()


class VAE(nn.Module):
    def __init__(self, z_dim: int = 10, hidden_dim: int = 100) -> None:
        super().__init__()
        self.encoder = LocAndScale(NUM_PIXELS, hidden_dim, z_dim, activation=nn.Softplus)
        self.decoder = mlp(z_dim, hidden_dim, NUM_PIXELS, activation=nn.Softplus)
        self.z_dim = z_dim

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = x.new_zeros(x.shape[0], self.z_dim), x.new_ones(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z).sigmoid()
            obs = x.reshape(-1, NUM_PIXELS)
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=obs)
            return loc_img

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x.reshape(-1, NUM_PIXELS))
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def both(kind: type[nn.Module], **options: object) -> tuple[Program, Program]:
    """Model and guide that share a fresh module."""
    module = kind(**options)
    return module.model, module.guide  # type: ignore[return-value]


def vae() -> PublicModel:
    return PublicModel(make=partial(both, VAE), calls=((digits(300)[0].reshape(-1, 1, 8, 8),),))


def joined(*parts: Tensor) -> Tensor:
    """Parts side by side, broadcast as one of them may be enumerated."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, -1) for part in parts], -1)


class SSVAE(nn.Module):
    """M2: the label is a latent of images without one."""

    def __init__(self, z_dim: int = 10, hidden_dim: int = 100) -> None:
        super().__init__()
        self.encoder_y = mlp(NUM_PIXELS, hidden_dim, NUM_LABELS, activation=nn.Softplus)
        self.encoder_z = LocAndScale(NUM_PIXELS + NUM_LABELS, hidden_dim, z_dim, activation=nn.Softplus)
        self.decoder = mlp(z_dim + NUM_LABELS, hidden_dim, NUM_PIXELS, activation=nn.Softplus)
        self.z_dim = z_dim

    def model(self, xs: Tensor, ys: Tensor | None = None) -> Tensor:
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            prior_loc, prior_scale = xs.new_zeros(len(xs), self.z_dim), xs.new_ones(len(xs), self.z_dim)
            zs = pyro.sample("z", dist.Normal(prior_loc, prior_scale).to_event(1))
            alpha_prior = xs.new_ones(len(xs), NUM_LABELS) / NUM_LABELS
            ys = pyro.sample("y", dist.OneHotCategorical(alpha_prior), obs=ys)
            loc = self.decoder(joined(zs, ys)).sigmoid()
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)
            return loc

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs).softmax(-1)))
            loc, scale = self.encoder_z(joined(xs, ys))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def ss_vae() -> PublicModel:
    x, label = digits(300)
    labels = F.one_hot(label, NUM_LABELS).to(x)
    return PublicModel(
        make=partial(both, SSVAE),
        calls=((x[100:],), (x[:100], labels[:100])),
        loss=partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
        discrete_options={},
        enumerated=("y",),
    )


class CVAE(nn.Module):
    """The missing quadrants of an image, which are -1 in ``xs``, given the others and a baseline's guess."""

    def __init__(self, baseline: nn.Module, z_dim: int = 10, hidden_dim: int = 100) -> None:
        super().__init__()
        encoder = partial(LocAndScale, NUM_PIXELS, hidden_dim, hidden_dim, z_dim, activation=nn.ReLU)
        self.baseline_net, self.prior_net, self.recognition_net = baseline, encoder(), encoder()
        self.generation_net = mlp(z_dim, hidden_dim, hidden_dim, NUM_PIXELS, activation=nn.ReLU)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> Tensor:
        pyro.module("generation_net", self)
        batch_size = xs.shape[0]
        with pyro.plate("data"):
            with torch.no_grad():
                y_hat = self.baseline_net(xs).sigmoid().view(xs.shape)
            prior_loc, prior_scale = self.prior_net(filled(xs, y_hat))
            zs = pyro.sample("z", dist.Normal(prior_loc, prior_scale).to_event(1))
            loc = self.generation_net(zs).sigmoid()
            if ys is not None:
                mask_loc = loc[(xs == -1).view(-1, NUM_PIXELS)].view(batch_size, -1)
                mask_ys = ys[xs == -1].view(batch_size, -1)
                pyro.sample("y", dist.Bernoulli(mask_loc, validate_args=False).to_event(1), obs=mask_ys)
            else:
                pyro.deterministic("y", loc.detach())
            return loc

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                y_hat = self.baseline_net(xs).sigmoid().view(xs.shape)
                loc, scale = self.prior_net(filled(xs, y_hat))
            else:
                loc, scale = self.recognition_net(filled(xs, ys))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def filled(xs: Tensor, ys: Tensor) -> Tensor:
    return torch.where(xs == -1, ys, xs).view(-1, NUM_PIXELS)


def train_baseline(xs: Tensor, ys: Tensor) -> nn.Module:
    """A network that guesses the missing pixels, trained before the CVAE is."""
    baseline, missing = mlp(NUM_PIXELS, 100, 100, NUM_PIXELS, activation=nn.ReLU), xs == -1
    optimizer = torch.optim.Adam(baseline.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(baseline(xs)[missing], ys[missing]).backward()
        optimizer.step()
    return baseline.requires_grad_(False)


def cvae() -> PublicModel:
    ys, _ = digits(300)
    xs = torch.full((len(ys), 8, 8), -1.0)
    xs[:, 4:, :4] = ys.reshape(-1, 8, 8)[:, 4:, :4]  # one quadrant, the lower left one, is known
    xs = xs.reshape(-1, NUM_PIXELS)
    baseline = train_baseline(xs, ys)
    return PublicModel(
        make=partial(both, CVAE, baseline=baseline),
        calls=((xs, ys),),
        options={"encoder_input": ["xs", "ys"]},
    )
