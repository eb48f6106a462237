"""Models of gene counts: scANVI of Pyro's examples, and cell2location of its own package.

Pyro's contributors, "Single Cell RNA Sequencing Analysis with VAEs" (2020, ``scanvi.py``), of Chenling Xu, Romain
Lopez, Edouard Mehlman, Jeffrey Regier, Michael I. Jordan, Nir Yosef, "Probabilistic Harmonization and Annotation of
Single-cell Transcriptomics Data with Deep Generative Models" (2021); Vitalii Kleshchevnikov and others, "Cell2location
maps fine-grained cell types in spatial transcriptomics" (2022), whose model class is
``LocationModelLinearDependentWMultiExperimentLocationBackgroundNormLevelGeneAlphaPyroModel``. The counts are simulated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible, init_to_mean
from torch import Tensor, nn
from torch.distributions import constraints

from public._model import Program, PublicModel
from public.autoencoders import both, joined

NUM_CELLS, NUM_GENES, NUM_LABELS = 200, 30, 4


# scANVI


class Network(nn.Module):
    """Layers with batch normalisation, whose last output comes in two halves."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        self.fc = nn.Sequential(*layers, nn.Linear(widths[-2], 2 * widths[-1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.fc(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1).chunk(2, -1)
        return first, second


class SCANVI(nn.Module):
    def __init__(self, l_loc: float, l_scale: float, scale_factor: float, latent_dim: int = 5, width: int = 50) -> None:
        super().__init__()
        self.latent_dim, self.l_loc, self.l_scale, self.scale_factor = latent_dim, l_loc, l_scale, scale_factor
        self.alpha, self.epsilon = 0.01, 5.0e-3
        self.z2_decoder = Network(latent_dim + NUM_LABELS, width, latent_dim)
        self.x_decoder = Network(latent_dim, width, NUM_GENES)
        self.z2l_encoder = Network(NUM_GENES, width, latent_dim + 1)
        self.classifier = Network(latent_dim, width, NUM_LABELS)  # its second half is of no use
        self.z1_encoder = Network(latent_dim + NUM_LABELS, width, latent_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        theta = pyro.param("inverse_dispersion", lambda: 10.0 * x.new_ones(NUM_GENES), constraint=constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(self.latent_dim)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(NUM_LABELS)), obs=y)
            z2_loc, z2_scale = self.z2_decoder(joined(z1, y))
            z2 = pyro.sample("z2", dist.Normal(z2_loc, F.softplus(z2_scale)).to_event(1))
            size = pyro.sample("l", dist.LogNormal(self.l_loc, self.l_scale * x.new_ones(1)).to_event(1))
            gate_logits, mu = self.x_decoder(z2)
            nb_logits = (size * mu.softmax(-1) + self.epsilon).log() - (theta + self.epsilon).log()
            x_dist = dist.ZeroInflatedNegativeBinomial(gate_logits=gate_logits, total_count=theta, logits=nb_logits)
            pyro.sample("x", x_dist.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale_factor):
            loc, scale = self.z2l_encoder(x.log1p())
            scale = F.softplus(scale)
            pyro.sample("l", dist.LogNormal(loc[..., -1:], scale[..., -1:]).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(loc[..., :-1], scale[..., :-1]).to_event(1))
            y_dist = dist.OneHotCategorical(logits=self.classifier(z2)[0])
            if y is None:
                y = pyro.sample("y", y_dist)
            else:
                pyro.factor("classification_loss", -self.alpha * y_dist.log_prob(y), has_rsample=False)
            z1_loc, z1_scale = self.z1_encoder(joined(z2, y.to(x)))
            pyro.sample("z1", dist.Normal(z1_loc, F.softplus(z1_scale)).to_event(1))


class ScaledAutoNormal(AutoNormal):
    """AutoNormal, which does not follow a model's scale, with that scale put round it by hand."""

    scale: float

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with poutine.scale(scale=self.scale):
            return super().forward(*args, **kwargs)


def scaled_auto_normal(model: Program, scale: float) -> AutoNormal:
    guide = ScaledAutoNormal(model)
    guide.scale = scale
    return guide


def scanvi() -> PublicModel:
    label = torch.randint(NUM_LABELS, (NUM_CELLS,))
    share = (torch.randn(NUM_LABELS, NUM_GENES)[label] + 0.3 * torch.randn(NUM_CELLS, NUM_GENES)).softmax(-1)
    x = torch.poisson(dist.LogNormal(5.0, 0.4).sample((NUM_CELLS, 1)) * share)
    x = x * (torch.rand(x.shape) > 0.1)
    log_size, labels, scale_factor = x.sum(-1).log(), F.one_hot(label, NUM_LABELS).to(x), 1.0 / (100 * NUM_GENES)
    sizes = {"l_loc": log_size.mean().item(), "l_scale": log_size.std().item()}
    return PublicModel(
        make=partial(both, SCANVI, **sizes, scale_factor=scale_factor),
        calls=((x[50:],), (x[:50], labels[:50])),
        num_datapoints=lambda x, *_: len(x) * scale_factor,
        loss=partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
        discrete_options={},
        enumerated=("y",),
        hidden=("classification_loss",),
        auto_normal=partial(scaled_auto_normal, scale=scale_factor),
    )


# cell2location

NUM_SPOTS, NUM_TYPES, NUM_GROUPS, NUM_BATCHES = 100, 6, 10, 2


class Cell2location(nn.Module):
    """Counts at spots, of cells whose types have known signatures ``(genes, types)``."""

    def __init__(self, signatures: Tensor) -> None:
        super().__init__()
        self.register_buffer("cell_state", signatures.T)
        self.register_buffer("ones", torch.ones(1, 1))

    def create_plates(self, x_data: Tensor, idx: Tensor, batch_index: Tensor) -> pyro.plate:
        return pyro.plate("obs_plate", size=NUM_SPOTS, dim=-2, subsample=idx)

    def forward(self, x_data: Tensor, idx: Tensor, batch_index: Tensor) -> None:
        obs2sample = F.one_hot(batch_index.squeeze(-1), NUM_BATCHES).float()
        obs_plate, ones = self.create_plates(x_data, idx, batch_index), self.ones
        # sensitivity of each gene
        m_g_mean = pyro.sample("m_g_mean", dist.Gamma(1.0, 1.0).expand([1, 1]).to_event(2))
        m_g_alpha_e_inv = pyro.sample("m_g_alpha_e_inv", dist.Exponential(3.0).expand([1, 1]).to_event(2))
        m_g_alpha_e = ones / m_g_alpha_e_inv.pow(2)
        m_g = pyro.sample("m_g", dist.Gamma(m_g_alpha_e, m_g_alpha_e / m_g_mean).expand([1, NUM_GENES]).to_event(2))
        # cells of each type at each spot, by way of groups of types
        with obs_plate:
            n_s = pyro.sample("n_s_cells_per_location", dist.Gamma(torch.tensor(8.0), torch.tensor(1.0)))
            b_s = pyro.sample("b_s_groups_per_location", dist.Gamma(torch.tensor(7.0), ones))
        groups = ones.expand(1, NUM_GROUPS)
        with obs_plate:
            z_sr = pyro.sample("z_sr_groups_factors", dist.Gamma(groups * b_s / NUM_GROUPS, groups / (n_s / b_s)))
        k_r = pyro.sample("k_r_factors_per_groups", dist.Gamma(1.0, ones).expand([NUM_GROUPS, 1]).to_event(2))
        x_fr_dist = dist.Gamma(k_r / NUM_TYPES, k_r).expand([NUM_GROUPS, NUM_TYPES]).to_event(2)
        x_fr = pyro.sample("x_fr_group2fact", x_fr_dist)
        with obs_plate:
            w_sf = pyro.sample("w_sf", dist.Gamma(z_sr @ x_fr * 5.0, torch.tensor(5.0)))
        # efficiency of detection at each spot
        y_e_dist = dist.Gamma(ones * 10.0, ones * 20.0).expand([NUM_BATCHES, 1]).to_event(2)
        y_e = pyro.sample("detection_mean_y_e", y_e_dist)
        hyp_alpha = pyro.deterministic("detection_hyp_prior_alpha", ones.expand(NUM_BATCHES, 1) * 20.0)
        beta = (obs2sample @ hyp_alpha) / (obs2sample @ y_e)
        with obs_plate:
            y_s = pyro.sample("detection_y_s", dist.Gamma(obs2sample @ hyp_alpha, beta))
        # background, and overdispersion
        add_hyp = pyro.sample("s_g_gene_add_alpha_hyp", dist.Gamma(ones * 9.0, ones * 3.0))
        add_mean = pyro.sample("s_g_gene_add_mean", dist.Gamma(1.0, 100.0).expand([NUM_BATCHES, 1]).to_event(2))
        add_inv_dist = dist.Exponential(add_hyp).expand([NUM_BATCHES, 1]).to_event(2)
        add_alpha = ones / pyro.sample("s_g_gene_add_alpha_e_inv", add_inv_dist).pow(2)
        add_dist = dist.Gamma(add_alpha, add_alpha / add_mean).expand([NUM_BATCHES, NUM_GENES]).to_event(2)
        s_g = pyro.sample("s_g_gene_add", add_dist)
        phi_hyp = pyro.sample("alpha_g_phi_hyp", dist.Gamma(ones * 9.0, ones * 3.0))
        inverse_dist = dist.Exponential(phi_hyp).expand([NUM_BATCHES, NUM_GENES]).to_event(2)
        alpha_g_inverse = pyro.sample("alpha_g_inverse", inverse_dist)
        mu = ((w_sf @ self.cell_state) * m_g + obs2sample @ s_g) * y_s
        alpha = obs2sample @ (ones / alpha_g_inverse.pow(2))
        with obs_plate:
            pyro.sample("data_target", dist.GammaPoisson(concentration=alpha, rate=alpha / mu), obs=x_data)


def make_cell2location(signatures: Tensor) -> tuple[Program, Program]:
    model = Cell2location(signatures)
    init = init_to_mean(fallback=init_to_feasible)
    return model, AutoNormal(model, init_loc_fn=init, create_plates=model.create_plates)


def cell2location() -> PublicModel:
    signatures = dist.Gamma(0.5, 0.5).sample((NUM_GENES, NUM_TYPES))
    cells = dist.Gamma(0.7, 0.35).sample((NUM_SPOTS, NUM_TYPES))
    batch = torch.randint(NUM_BATCHES, (NUM_SPOTS, 1))
    mean = cells @ signatures.T * torch.tensor([0.4, 0.6])[batch] * dist.Gamma(5.0, 5.0).sample((NUM_GENES,))
    x_data = torch.poisson(mean * dist.Gamma(5.0, 5.0).sample(mean.shape))
    return PublicModel(
        make=partial(make_cell2location, signatures),
        calls=((x_data, torch.arange(NUM_SPOTS), batch),),
        auto_normal=lambda model: AutoNormal(model, create_plates=lambda x, i, b: _plate(i)),
    )


def _plate(idx: Tensor) -> pyro.plate:
    return pyro.plate("obs_plate", size=NUM_SPOTS, dim=-2, subsample=idx)
