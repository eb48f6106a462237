"""Posteriors of whole data sets from simulations alone, beside neural posterior estimation by sbi: ``make simulated``.

Linear regressions of eight observations with unknown noise, whose posteriors are skewed and heavy-tailed. Every method
sees the same simulated data sets, a tenth of them to stop by, and is judged by the mean of log q(z | data) at the true
latents of new ones, in nats: higher is better, and the truth is the highest. Ours are guides trained by the forward KL
divergence; sbi's is NPE with a permutation-invariant embedding, its defaults otherwise; without sbi left out.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_amortized import AmortizedGuide, SetEncoder, over_datasets, simulate

Data = tuple[Tensor, Tensor]


def regression(x: Tensor, y: Tensor) -> None:
    """Of one data set."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def rows(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y.unsqueeze(-1)], -1)


def simulations(number: int, size: int) -> tuple[Data, Tensor]:
    """Data sets, and their latents, flat and unconstrained."""
    model = over_datasets(regression)
    args = torch.randn(number, size, 2), torch.randn(number, size)
    found = simulate(model, AmortizedGuide(model, name="simulator"), args, seed=int(torch.randint(2**31, ())))
    return found.args, found.latents


def train(loss: Callable[[Data, Tensor], Tensor], module: nn.Module, data: Data, latents: Tensor) -> int:
    """Adam on batches of 200, until a tenth of the data sets has seen nothing better in 20 epochs; the best is kept."""
    held = len(latents) // 10
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    best, state, epoch, since = torch.inf, copy.deepcopy(module.state_dict()), 0, 0
    while since < 20:
        module.train()
        for index in torch.randperm(len(latents) - held).split(200):
            optimizer.zero_grad()
            loss((data[0][held + index], data[1][held + index]), latents[held + index]).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
        module.eval()
        with torch.no_grad():
            value = float(loss((data[0][:held], data[1][:held]), latents[:held]))
        epoch, since = epoch + 1, since + 1
        if value < best:
            best, state, since = value, copy.deepcopy(module.state_dict()), 0
    module.load_state_dict(state)
    return epoch


def ours(family: str) -> Callable[[Data, Tensor], Callable[[Data, Tensor], Tensor]]:
    """A guide trained by the forward KL divergence, as a function to log q."""

    def fit(data: Data, latents: Tensor) -> Callable[[Data, Tensor], Tensor]:
        encoder = SetEncoder(3)
        guide = AmortizedGuide(over_datasets(regression), encoder, family=family, encoder_input=rows, name=family)
        guide.setup(*data)
        train(lambda args, z: -guide.posterior(*args).log_prob(z).mean(), guide, data, latents)
        return lambda args, z: guide.posterior(*args).log_prob(z)

    return fit


def npe(data: Data, latents: Tensor) -> Callable[[Data, Tensor], Tensor]:
    """Neural posterior estimation by sbi, with its defaults."""
    from sbi.inference import NPE
    from sbi.neural_nets import posterior_nn
    from sbi.neural_nets.embedding_nets import FCEmbedding, PermutationInvariantEmbedding

    trial = FCEmbedding(input_dim=3, num_hiddens=64, num_layers=2, output_dim=64)
    embedding = PermutationInvariantEmbedding(trial, trial_net_output_dim=64, num_hiddens=64, output_dim=64)
    inference = NPE(density_estimator=posterior_nn("nsf", embedding_net=embedding), show_progress_bars=False)
    estimator = inference.append_simulations(latents, rows(*data)).train(training_batch_size=200)
    return lambda args, z: estimator.log_prob(z.unsqueeze(0), condition=rows(*args)).squeeze(0)


METHODS = {name: ours(name) for name in ("normal", "multivariate_normal", "flow")} | {"sbi, NPE": npe}


def main() -> None:
    """Prints a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-simulations", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=8, help="observations of a data set")
    parser.add_argument("--num-seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(options.num_seeds):
        pyro.set_rng_seed(seed)
        data, latents = simulations(options.num_simulations, options.size)
        args, z = simulations(2000, options.size)
        for name, fit in METHODS.items():
            pyro.set_rng_seed(seed)
            start = time.perf_counter()
            try:
                log_q = fit(data, latents)
            except ImportError as error:
                print(f"seed {seed}  {name:20s} left out: {error}")
                continue
            with torch.no_grad():
                found = log_q(args, z)
            error = float(found.std()) / len(found) ** 0.5
            print(f"seed {seed}  {name:20s} {float(found.mean()):8.4f} +- {error:.4f}   ", end="")
            print(f"{time.perf_counter() - start:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
