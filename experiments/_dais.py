"""Semi-amortized annealed importance sampling of NumPyro's, for a VAE whose weights come from torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from _common import VAE
    from torch import Tensor

__all__ = ["dais_bounds"]


def dais_bounds(
    vae: VAE,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    steps: tuple[int, ...],
    seed: int,
    draws: int = 50,
) -> list[tuple[float, float]]:
    """Bounds that leapfrog steps reach from an encoder's answers by NumPyro's ``AutoSemiDAIS``.

    Its step size, damping, temperatures and masses, the same for all images, are trained first, by 1000 steps of Adam
    on the training images; decoder and encoder are held fixed.

    Args:
        vae: The model.
        train: Training images, and the encoder's answers (mean, log scale) for them.
        test: Those to judge by.
        steps: Numbers of leapfrog steps, each of which takes a gradient.
        seed: Of the draws.
        draws: Number of draws of each bound.

    Returns:
        For each number of steps seconds of the processor for a draw for all images, compiled before, and the bound in
        nats per image. Unlike an ELBO within the encoder's family it can exceed the best of these.
    """
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoSemiDAIS

    weights = [jnp.array(parameter.detach().numpy()) for parameter in vae.decoder.parameters()]

    def logits(z: Any) -> Any:
        for layer in range(0, len(weights), 2):
            z = z @ weights[layer].T + weights[layer + 1]
            z = jax.nn.relu(z) if layer + 2 < len(weights) else z
        return z

    def model(x: Any, phi: Any) -> None:
        with numpyro.plate("images", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(vae.latent_dim), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=logits(z)).to_event(1), obs=x)

    def encoder(x: Any, phi: Any) -> None:
        loc, log_scale = jnp.split(phi, 2, -1)
        with numpyro.plate("images", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    def guide_of(number: int) -> Any:
        options = {"use_global_dais_params": True, "eta_init": 0.02, "eta_max": 0.5}
        return AutoSemiDAIS(model, model, None, encoder, K=number, **options)

    known, unseen = (tuple(jnp.array(part.numpy()) for part in pair) for pair in (train, test))
    found = []
    for number in steps:
        rng, batches = jax.random.PRNGKey(seed), np.random.default_rng(seed)
        svi = SVI(model, guide_of(number), numpyro.optim.Adam(0.01), Trace_ELBO())
        rows = batches.integers(len(known[0]), size=(1000, 100))
        state = svi.init(rng, *(part[rows[0]] for part in known))
        update = jax.jit(svi.update)
        for row in rows:
            state, _ = update(state, *(part[row] for part in known))
        guide, params = guide_of(number), svi.get_params(state)
        SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO()).init(rng, *unseen)
        loss = jax.jit(lambda key, guide=guide, params=params: Trace_ELBO().loss(key, params, model, guide, *unseen))
        loss(rng).block_until_ready()
        start = time.process_time()
        losses = [loss(key).block_until_ready() for key in jax.random.split(rng, draws)]
        found.append(((time.process_time() - start) / draws, -float(np.mean(losses)) / len(unseen[0])))
    return found
