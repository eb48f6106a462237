"""How guides of sequences are trained, and one batch's refinement in plain torch."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pyro
import torch
from _finite import DifferencedSteps, Differences, antithetic, mean_elbo, slope_of, unrolled
from _sequences import Generator, TokenEncoder, bounds
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_amortized import GradientAscent, Newton, SemiAmortizedGuide

BATCH_SIZE, MOMENTUM, PARTICLES = 50, 0.5, 2
MAX_NORM = 35.0
"""Longest gradient of a datapoint: that of the mean of 50 is then at most 5 or so, the limit of the paper's code."""
RATES, STEP_SIZES = (1e-3, 3e-3, 1e-2), (0.005, 0.01, 0.02, 0.05)


class Task:
    """A generator, fixed or to be learned, and the sequences.

    Args:
        generator: The generator.
        train: Training sequences.
        args: The options.
    """

    def __init__(self, generator: Generator, train: Tensor, args: argparse.Namespace) -> None:
        self.generator, self.train, self.args = generator, train, args
        self.fixed = not any(parameter.requires_grad for parameter in generator.parameters())
        self.rate, self.step_size = RATES[1], STEP_SIZES[2]

    def call(self, x: Tensor) -> tuple[Tensor, ...]:
        """The model's arguments: with the states of the generator where they are not to be learned."""
        return (x, self.generator.states(x).detach()) if self.fixed else (x,)

    def encoder(self) -> TokenEncoder:
        """A new encoder."""
        return TokenEncoder(self.args.vocabulary, self.args.hidden_dim)

    def refining(self, num_steps: int, gradient: str, newton: bool = False, **options: Any) -> SemiAmortizedGuide:
        """A guide that refines by the paper's rule, or by Newton steps."""
        encoder = None if options.get("initial") == "prior" else self.encoder()
        options |= self.refinement(newton)
        return SemiAmortizedGuide(self.generator, encoder, num_steps=num_steps, encoder_gradient=gradient, **options)

    def refinement(self, newton: bool) -> dict[str, Any]:
        """The options of guides that refine."""
        if newton:
            return {"update": Newton(), "num_particles": PARTICLES}
        update = GradientAscent(self.step_size, MOMENTUM, max_norm=MAX_NORM)
        return {"update": update, "num_particles": PARTICLES, "estimator": "analytic_kl"}

    def batch(self) -> Tensor:
        """Training sequences drawn at random."""
        return self.train[torch.randint(len(self.train), (BATCH_SIZE,))]

    def fit(self, guide: Any, num_steps: int) -> Any:
        """Trains a guide, and the generator with it unless it is held fixed; None if it diverges."""
        pyro.clear_param_store()
        decay = 0.1 ** (1 / num_steps)
        svi = SVI(self.generator, guide, ClippedAdam({"lr": self.rate, "lrd": decay}), TraceMeanField_ELBO())
        try:
            for _ in range(num_steps):
                svi.step(*self.call(self.batch()))
        except ValueError as error:
            if "diverged" not in str(error):
                raise
            return None
        return guide.eval()

    def fit_differenced(self, guide: SemiAmortizedGuide, num_steps: int, how: Differences) -> Any:
        """Trains the encoder of a guide by gradients through its steps that are finite differences, likewise."""
        pyro.clear_param_store()
        guide.setup(*self.call(self.batch()))
        steps, guide.num_steps = guide.num_steps, 0
        optimizer = torch.optim.Adam(guide.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / num_steps))
        for _ in range(num_steps):
            x = self.batch()
            climb = Climb(self, x, guide.infer(*self.call(x)).local[0], steps)
            optimizer.zero_grad()
            loss = -climb.refined_elbo(climb.start, how)
            loss.backward()
            if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in guide.parameters()):
                return None
            optimizer.step()
            schedule.step()
        guide.num_steps = steps
        return guide.eval()

    def posterior(self, guide: Any, x: Tensor) -> Any:
        """The independent normals of a guide."""
        torch.manual_seed(0)
        with torch.no_grad():
            return guide.posterior(*self.call(x)).base_dist

    def bound(self, guide: Any, x: Tensor) -> float:
        """The mean ELBO of sequences, in nats; not a number for a guide that has diverged."""
        if guide is None:
            return math.nan
        try:
            return bounds(self.generator, self.posterior(guide, x), x).mean().item()
        except ValueError as error:
            if "diverged" not in str(error):
                raise
            return math.nan


class Climb:
    """The refinement of one batch in plain torch, on noise that stays the same.

    Args:
        task: The task, whose generator is held fixed.
        x: Sequences.
        start: The encoder's phi for them.
        num_steps: Number of steps.
    """

    def __init__(self, task: Task, x: Tensor, start: Tensor, num_steps: int) -> None:
        states = task.generator.states(x)
        self.start, self.step = start, task.step_size * len(x)  # of the gradient of the mean
        self.log_likelihood = lambda z: task.generator.log_likelihood(x, states, z)
        self.slope = slope_of(self.log_likelihood, MAX_NORM)
        self.noises = [antithetic(PARTICLES, start) for _ in range(num_steps)]
        self.last = antithetic(PARTICLES, start)

    def refined_elbo(self, start: Tensor, how: Differences | str) -> Tensor:
        """The mean ELBO after the steps, with gradients through them."""
        settings = self.slope, self.noises, self.step, MOMENTUM
        if isinstance(how, Differences):
            phi = DifferencedSteps.apply(start, *settings, how)
        else:
            phi = unrolled(start, *settings)
        if how == "first_order":
            phi = start + (phi - start).detach()
        return mean_elbo(self.log_likelihood, phi, self.last)

    def gradient(self, how: Differences | str) -> Tensor:
        """By where the steps start."""
        start = self.start.detach().requires_grad_()
        return torch.autograd.grad(self.refined_elbo(start, how), start)[0]
