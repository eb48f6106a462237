"""Models of sequences of Pyro's examples, with simulated data.

Pyro's contributors, "Deep Markov Model" (2017, ``dmm``), of Rahul G. Krishnan, Uri Shalit, David Sontag, "Structured
Inference Networks for Nonlinear State Space Models" (2016); and "Hierarchical mixed-effect hidden Markov models" (2018,
``mixed_hmm``), of Brett T. McClintock and others, "Modelling group dynamic animal movement" and related work on harbour
seals. Of the latter the random effects are continuous, for groups and for individuals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from public._model import Program, PublicModel
from public.autoencoders import both

# dmm

NUM_NOTES, MAX_LENGTH, NUM_SEQUENCES = 12, 10, 100


class GatedTransition(nn.Module):
    def __init__(self, z_dim: int, transition_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(z_dim, transition_dim), nn.ReLU(), nn.Linear(transition_dim, z_dim))
        self.proposed = nn.Sequential(nn.Linear(z_dim, transition_dim), nn.ReLU(), nn.Linear(transition_dim, z_dim))
        self.lin_sig, self.lin_z_to_loc = nn.Linear(z_dim, z_dim), nn.Linear(z_dim, z_dim)
        nn.init.eye_(self.lin_z_to_loc.weight)
        nn.init.zeros_(self.lin_z_to_loc.bias)

    def forward(self, z_t_1: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposed_mean = self.gate(z_t_1).sigmoid(), self.proposed(z_t_1)
        loc = (1 - gate) * self.lin_z_to_loc(z_t_1) + gate * proposed_mean
        return loc, F.softplus(self.lin_sig(proposed_mean.relu()))


class DMM(nn.Module):
    def __init__(self, z_dim: int = 8, emission_dim: int = 24, transition_dim: int = 24, rnn_dim: int = 32) -> None:
        super().__init__()
        layers = [nn.Linear(z_dim, emission_dim), nn.ReLU(), nn.Linear(emission_dim, emission_dim), nn.ReLU()]
        self.emitter = nn.Sequential(*layers, nn.Linear(emission_dim, NUM_NOTES), nn.Sigmoid())
        self.trans = GatedTransition(z_dim, transition_dim)
        self.rnn = nn.RNN(NUM_NOTES, rnn_dim, nonlinearity="relu", batch_first=True)
        self.z_to_hidden, self.to_loc, self.to_scale = (
            nn.Linear(*sizes) for sizes in ((z_dim, rnn_dim), (rnn_dim, z_dim), (rnn_dim, z_dim))
        )
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(z_dim)), nn.Parameter(torch.zeros(z_dim))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, rnn_dim))

    def model(
        self,
        mini_batch: Tensor,
        mini_batch_reversed: PackedSequence,
        mini_batch_mask: Tensor,
        mini_batch_seq_lengths: Tensor,
        annealing_factor: float = 1.0,
    ) -> None:
        pyro.module("dmm", self)
        z_prev = self.z_0.expand(mini_batch.size(0), self.z_0.size(0))
        with pyro.plate("z_minibatch", len(mini_batch)):
            for t in pyro.markov(range(1, mini_batch.size(1) + 1)):
                mask = mini_batch_mask[:, t - 1 : t]
                z_loc, z_scale = self.trans(z_prev)
                with poutine.scale(scale=annealing_factor):
                    z_t = pyro.sample(f"z_{t}", dist.Normal(z_loc, z_scale).mask(mask).to_event(1))
                notes = dist.Bernoulli(self.emitter(z_t)).mask(mask).to_event(1)
                pyro.sample(f"obs_x_{t}", notes, obs=mini_batch[:, t - 1, :])
                z_prev = z_t

    def guide(
        self,
        mini_batch: Tensor,
        mini_batch_reversed: PackedSequence,
        mini_batch_mask: Tensor,
        mini_batch_seq_lengths: Tensor,
        annealing_factor: float = 1.0,
    ) -> None:
        pyro.module("dmm", self)
        h_0 = self.h_0.expand(1, mini_batch.size(0), self.rnn.hidden_size).contiguous()
        rnn_output, _ = pad_packed_sequence(self.rnn(mini_batch_reversed, h_0)[0], batch_first=True)
        rnn_output = reversed_within(rnn_output, mini_batch_seq_lengths)
        z_prev = self.z_q_0.expand(mini_batch.size(0), self.z_q_0.size(0))
        with pyro.plate("z_minibatch", len(mini_batch)):
            for t in pyro.markov(range(1, mini_batch.size(1) + 1)):
                combined = 0.5 * (torch.tanh(self.z_to_hidden(z_prev)) + rnn_output[:, t - 1, :])
                z_dist = dist.Normal(self.to_loc(combined), F.softplus(self.to_scale(combined)))
                with poutine.scale(scale=annealing_factor):
                    z_prev = pyro.sample(f"z_{t}", z_dist.mask(mini_batch_mask[:, t - 1 : t]).to_event(1))


def reversed_within(x: Tensor, lengths: Tensor) -> Tensor:
    """Every sequence turned round by itself; what lies beyond its end stays where it is."""
    steps = torch.arange(x.shape[1]).expand(len(x), -1)
    last = lengths.unsqueeze(-1) - 1
    order = torch.where(steps <= last, last - steps, steps)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


class Masked(poutine.messenger.Messenger):
    """Masks the sites of steps and of individuals that are not there."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        mask = self.masks.get(message["name"].removesuffix("_unconstrained"))
        if mask is not None:
            message["mask"] = mask


class MaskedAutoNormal(AutoNormal):
    """AutoNormal, which knows no masks, with those of the model put round its sites by hand."""

    masks: Callable[..., dict[str, Tensor]]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        annealing = kwargs.get("annealing_factor", 1.0)  # nor does it know scales
        with Masked(self.masks(*args)), poutine.scale(scale=annealing):
            return super().forward(*args, **kwargs)


def masked_auto_normal(model: Program, masks: Callable[..., dict[str, Tensor]]) -> AutoNormal:
    guide = MaskedAutoNormal(model)
    guide.masks = masks
    return guide


def masks_of_steps(x: Tensor, packed: PackedSequence, mask: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    return {f"z_{t + 1}": mask[:, t] for t in range(x.shape[1])}


def dmm() -> PublicModel:
    lengths = torch.randint(3, MAX_LENGTH + 1, (NUM_SEQUENCES,))
    lengths[0] = MAX_LENGTH
    mask = (torch.arange(MAX_LENGTH) < lengths.unsqueeze(-1)).float()
    pace = 0.3 + 0.2 * torch.rand(NUM_SEQUENCES, 1) + 0.2 * torch.randn(NUM_SEQUENCES, MAX_LENGTH)
    angle = 6.28 * torch.rand(NUM_SEQUENCES, 1) + pace.cumsum(1)
    logits = 6 * (angle.unsqueeze(-1) - torch.linspace(0, 6.28, NUM_NOTES + 1)[:-1]).cos() - 4
    x = dist.Bernoulli(logits=logits).sample() * mask.unsqueeze(-1)
    packed = pack_padded_sequence(reversed_within(x, lengths), lengths, batch_first=True, enforce_sorted=False)
    return PublicModel(
        make=partial(both, DMM),
        calls=((x, packed, mask.bool(), lengths),),
        annealing=lambda done: {"annealing_factor": min(1.0, 0.2 + 0.8 * done / 0.3)},
        auto_normal=partial(masked_auto_normal, masks=masks_of_steps),
    )


# mixed_hmm

MISSING = 1e-6
NUM_STATES, NUM_TIMES = 3, 6
SIZES = (2, 10)
"""Numbers of groups, and of individuals in the larger one of them."""


def mixed_model(config: dict[str, Any]) -> None:
    num_coefficients, positive = NUM_STATES**2, constraints.positive
    observations, zeros, ones = config["observations"], torch.zeros, torch.ones
    num_individuals, num_groups = config["mask"].shape

    def some() -> Tensor:
        return torch.randn(NUM_STATES).exp()

    loc_g = pyro.param("loc_group", lambda: zeros(num_coefficients))
    scale_g = pyro.param("scale_group", lambda: ones(num_coefficients), constraint=positive)
    loc_i = pyro.param("loc_individual", lambda: zeros(num_groups, num_coefficients))
    scale_i = pyro.param("scale_individual", lambda: ones(num_groups, num_coefficients), constraint=positive)
    step_zi_param = pyro.param("step_zi_param", lambda: ones(NUM_STATES, 2))
    step_concentration = pyro.param("step_param_concentration", some, constraint=positive)
    step_rate = pyro.param("step_param_rate", some, constraint=positive)
    angle_concentration = pyro.param("angle_param_concentration", some, constraint=positive)
    angle_loc = pyro.param("angle_param_loc", lambda: torch.randn(NUM_STATES).abs())
    omega_zi_param = pyro.param("omega_zi_param", lambda: ones(NUM_STATES, 2))
    omega_0 = pyro.param("omega_param_concentration0", some, constraint=positive)
    omega_1 = pyro.param("omega_param_concentration1", some, constraint=positive)

    def zero_inflated(name: str, t: int, logits: Tensor, fn: dist.TorchDistribution) -> None:
        value = observations[name][..., t]
        is_zero = pyro.sample(f"{name}_zi_{t}", dist.Categorical(logits=logits), obs=(value == MISSING).long())
        mixture = dist.MaskedMixture(is_zero.bool(), fn, dist.Delta(torch.tensor(MISSING)))
        pyro.sample(f"{name}_{t}", mixture, obs=value)

    with pyro.plate("group", num_groups, dim=-1):
        eps_g = pyro.sample("eps_g", dist.Normal(loc_g, scale_g).to_event(1))
        with pyro.plate("individual", num_individuals, dim=-2), poutine.mask(mask=config["mask"]):
            eps_i = pyro.sample("eps_i", dist.Normal(loc_i, scale_i).to_event(1))
            gamma = eps_g + eps_i
            gamma = gamma.reshape(*gamma.shape[:-1], NUM_STATES, NUM_STATES)
            y = torch.tensor(0)
            for t in pyro.markov(range(NUM_TIMES)):
                with poutine.mask(mask=config["timestep_mask"][..., t]):
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(gamma)[..., y, :]))
                    step = dist.Gamma(Vindex(step_concentration)[..., y], Vindex(step_rate)[..., y])
                    zero_inflated("step", t, Vindex(step_zi_param)[..., y, :], step)
                    angle = dist.VonMises(Vindex(angle_loc)[..., y], Vindex(angle_concentration)[..., y])
                    pyro.sample(f"angle_{t}", angle, obs=observations["angle"][..., t])
                    omega = dist.Beta(Vindex(omega_0)[..., y], Vindex(omega_1)[..., y])
                    zero_inflated("omega", t, Vindex(omega_zi_param)[..., y, :], omega)


def mixed_guide(config: dict[str, Any]) -> None:
    num_individuals, num_groups = config["mask"].shape

    def normal(name: str, *shape: int) -> dist.TorchDistribution:
        loc = pyro.param(f"loc_q_{name}", lambda: torch.zeros(shape))
        scale = pyro.param(f"scale_q_{name}", lambda: torch.ones(shape), constraint=constraints.positive)
        return dist.Normal(loc, scale).to_event(1)

    with pyro.plate("group", num_groups, dim=-1):
        pyro.sample("eps_g", normal("group", NUM_STATES**2))
        with pyro.plate("individual", num_individuals, dim=-2), poutine.mask(mask=config["mask"]):
            pyro.sample("eps_i", normal("individual", num_groups, NUM_STATES**2))


def make_mixed() -> tuple[Program, Program]:
    return pyro.infer.config_enumerate(mixed_model, "parallel"), mixed_guide


def mixed_hmm() -> PublicModel:
    num_groups, num_individuals = SIZES
    mask = torch.arange(num_individuals).unsqueeze(-1) < torch.tensor([num_individuals, num_individuals - 3])
    shape = (num_individuals, num_groups, NUM_TIMES)
    logits = 2.0 * torch.eye(NUM_STATES) + 0.7 * torch.randn(num_individuals, num_groups, NUM_STATES, NUM_STATES)
    y, states = torch.zeros(shape[:2], dtype=torch.long), []
    for _ in range(NUM_TIMES):
        y = dist.Categorical(logits=Vindex(logits)[..., y, :]).sample()
        states.append(y)
    state = torch.stack(states, -1)
    step = dist.Gamma(torch.tensor([1.0, 4.0, 9.0])[state], 2.0).sample()
    angle = dist.VonMises(torch.tensor([0.0, 1.0, 2.0])[state], 3.0).sample()
    omega = dist.Beta(torch.tensor([1.0, 3.0, 6.0])[state], 3.0).sample()
    present = mask.unsqueeze(-1) & (torch.rand(shape) > 0.05)
    config = {
        "mask": mask,
        "timestep_mask": present,
        "observations": {
            "step": torch.where(torch.rand(shape) < 0.1, MISSING, step.clamp(min=0.01)),
            "angle": angle,
            "omega": torch.where(torch.rand(shape) < 0.1, MISSING, omega.clamp(0.01, 0.99)),
        },
    }
    return PublicModel(
        make=make_mixed,
        calls=((config,),),
        num_datapoints=lambda config: int(config["mask"].sum()),
        loss=partial(TraceEnum_ELBO, max_plate_nesting=2),
        options={"plate": "individual"},  # the outermost one, "group", has but two entries
        auto_normal=partial(masked_auto_normal, masks=lambda config: {"eps_i": config["mask"]}),
    )
