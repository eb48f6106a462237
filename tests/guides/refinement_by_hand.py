"""Refinement in plain torch, and what the tests of it share."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from models import LinearGaussian
from pyro.infer import (
    SVI,
    Trace_ELBO,
    config_enumerate,
)
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_amortized import (
    Adam,
    AmortizedGuide,
    GradientAscent,
    IterativeAmortizedGuide,
    LearnedUpdate,
    NaturalGradient,
    PerDatapointGuide,
    SemiAmortizedGuide,
    UpdateRule,
)

FAMILIES = ["normal", "multivariate_normal", "low_rank_multivariate_normal"]
OTHERS = ["first_order", "initial", "distill"]
GRADIENTS = ["unrolled", *OTHERS, "anchored"]
ESTIMATORS = ["stl", "plain", "analytic_kl"]
RULES: dict[str, Callable[[], UpdateRule]] = {
    "ascent": lambda: GradientAscent(0.1, 0.5),
    "adam": lambda: Adam(0.1, (0.8, 0.95)),
    "natural": lambda: NaturalGradient(0.5, max_shift=100.0, max_log_ratio=100.0),
}
POINTS, LATENTS, PIXELS, STEPS = 4, 2, 5, 3


def some_slow(fast: list[Any], *axes: list[Any]) -> list[Any]:
    """The product of some axes, all but the combinations in ``fast`` marked as slow."""
    combinations = product(*axes) if len(axes) > 1 else [(value,) for value in axes[0]]
    fast = [values if isinstance(values, tuple) else (values,) for values in fast]
    return [pytest.param(*values, marks=() if values in fast else pytest.mark.slow) for values in combinations]


class VAE(nn.Module):
    """Binary pixels behind a decoder with curvature."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, PIXELS))
        for parameter in self.decoder.parameters():
            parameter.data.mul_(2.0)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        logits = self.decoder(z)
        return (x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(-1)


def pixels(size: int = POINTS) -> Tensor:
    return torch.rand(size, PIXELS, generator=torch.Generator().manual_seed(2)).round()


def small_encoder() -> nn.Module:
    torch.manual_seed(12)
    return nn.Sequential(nn.Linear(PIXELS, 4), nn.Tanh())


def svi(model: Any, guide: Any, elbo: Any = None, lr: float = 0.01) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())


# The same in plain torch


def gradient_by_hand(vae: VAE, x: Tensor, phi: Tensor, noise: Tensor, estimator: str) -> Tensor:
    """The gradient of the ELBO in phi = (loc, log scale), by the score of the model at each draw."""
    loc, log_scale = phi.chunk(2, -1)
    scale = log_scale.exp()
    z = loc + scale * noise
    z = z if z.requires_grad else z.requires_grad_()
    with torch.enable_grad():
        density = vae.log_likelihood(x, z) - (0 if estimator == "analytic_kl" else 0.5 * z.square().sum(-1))
        (score,) = torch.autograd.grad(density.sum(), z, create_graph=True)
    if estimator == "stl":
        score = score + noise / scale
    loc_grad, scale_grad = score.mean(0), (score * noise * scale).mean(0)
    if estimator == "plain":
        scale_grad = scale_grad + 1
    if estimator == "analytic_kl":
        loc_grad, scale_grad = loc_grad - loc, scale_grad + 1 - scale.square()
    return torch.cat([loc_grad, scale_grad], -1)


def curvature_by_hand(vae: VAE, x: Tensor, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and curvature in units of q, by least squares on the draws and as many times zero as the ridge counts."""
    loc, log_scale = phi.chunk(2, -1)
    z = loc + log_scale.exp() * noise
    z = z if z.requires_grad else z.requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(
            (vae.log_likelihood(x, z) - 0.5 * z.square().sum(-1)).sum(), z, create_graph=True
        )
    residual = score * log_scale.exp() + noise
    slopes, curvatures = [], []
    for n in range(len(x)):
        draws, values = noise[:, n], residual[:, n]
        draws_mean, values_mean = draws.mean(0), values.mean(0)
        draws, values = draws - draws_mean, values - values_mean
        hat = draws @ torch.linalg.inv(draws.T @ draws + 3.0 * torch.eye(LATENTS)) @ draws.T
        left_out = (values - hat @ values) / (1 - hat.diagonal() - 1 / len(draws)).clamp(min=0.05).unsqueeze(-1)
        count = 3.0 * (left_out.square().sum() / values.square().sum()).clamp(0.01, 1.0)
        design = torch.cat([draws, count.sqrt() * torch.eye(LATENTS)])
        target = torch.cat([values, torch.zeros(LATENTS, LATENTS)])
        excess = -torch.linalg.lstsq(design, target).solution
        excess = (excess + excess.T) / 2
        slopes.append(values_mean + excess @ draws_mean)
        curvatures.append(torch.eye(LATENTS) + excess)
    return torch.stack(slopes), torch.stack(curvatures)


def newton_by_hand(vae: VAE, x: Tensor, phi: Tensor, noises: list[Any], step_size: float) -> Tensor:
    """Newton steps without limits."""
    for noise in noises:
        slope, curvature = curvature_by_hand(vae, x, phi, noise)
        assert (torch.linalg.eigvalsh(curvature) > 0.05).all()  # nothing is damped
        loc, log_scale = phi.chunk(2, -1)
        shift = step_size * torch.linalg.solve(curvature, slope)
        precision = 1 + step_size * (curvature.diagonal(dim1=-2, dim2=-1) - 1)
        phi = torch.cat([loc + log_scale.exp() * shift, log_scale - 0.5 * precision.log()], -1)
    return phi


def climb_by_hand(vae: VAE, x: Tensor, phi: Tensor, noises: list[Any], rule: str, estimator: str = "stl") -> Tensor:
    """Steps of the rules in ``RULES``."""
    velocity, first, second = 0.0, 0.0, 0.0
    for step, noise in enumerate(noises, 1):
        g = gradient_by_hand(vae, x, phi, noise, estimator)
        if rule == "ascent":
            velocity = 0.5 * velocity + g
            phi = phi + 0.1 * velocity
        elif rule == "adam":
            first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g * g
            phi = phi + 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        else:
            dim = phi.shape[1] // 2
            variance = (2 * phi[:, dim:]).exp()
            phi = phi + torch.cat([0.5 * variance * g[:, :dim], 0.25 * g[:, dim:]], -1)
    return phi


def loss_by_hand(vae: VAE, x: Tensor, phi: Tensor, z: Tensor) -> Tensor:
    """The negative ELBO from the draw z of q_phi, differentiable through its location and scale."""
    loc, log_scale = phi.chunk(2, -1)
    noise = ((z - loc) / log_scale.exp()).detach()
    z = loc + log_scale.exp() * noise
    log_joint = vae.log_likelihood(x, z) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    return (dist.Normal(loc, log_scale.exp()).log_prob(z).sum(-1) - log_joint).sum()


def loss_and_draw(model: Any, guide: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """Trace_ELBO's differentiable loss, and the draw z that it used."""
    draws: list[Tensor] = []

    def spied(*args: Any) -> None:
        draws.append(guide(*args)["z"].detach())

    return Trace_ELBO().differentiable_loss(model, spied, *args), draws[-1]


def semi_amortized(vae: VAE, x: Tensor, **options: Any) -> Any:
    """A guide with a small encoder, set up; it returns the last phi, as in training."""
    options = {"num_steps": STEPS, "keep_best": False, **options}
    guide = SemiAmortizedGuide(vae, small_encoder(), **options)
    guide.setup(x)
    return guide


def start_by_hand(guide: Any, x: Tensor) -> Tensor:
    start = guide.inference.initial
    return start.head(start.encoder(x))


def relative_error(actual: Any, expected: Any) -> float:
    """The largest over tensors."""
    return max(((a - e).norm() / e.norm().clamp(min=1e-12)).item() for a, e in zip(actual, expected, strict=True))


def gradients(loss: Tensor, *modules: Any) -> tuple[Tensor, ...]:
    parameters = [p for module in modules for p in nn.Module.parameters(module)]
    return torch.autograd.grad(loss, parameters, retain_graph=True)


def exact_elbo(linear: LinearGaussian, x: Tensor, guide: Any, phi: Tensor) -> Tensor:
    """log p(x) - KL(q || p(z|x)), per datapoint, in closed form."""
    return linear.log_evidence(x) - kl_from_posterior(linear, x, guide, phi)


def kl_from_posterior(linear: LinearGaussian, x: Tensor, guide: Any, phi: Tensor) -> Tensor:
    q = guide.family(phi)
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    return kl_divergence(dist.MultivariateNormal(q.mean, covariance), linear.posterior(x)).detach()


def mean_field_gap(linear: LinearGaussian) -> float:
    """The least KL divergence of a mean-field normal from the posterior."""
    precision = torch.linalg.inv(linear.posterior(torch.zeros(1, len(linear.weights))).covariance_matrix[0])
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


def guide_of_kind(kind: str, model: Any, family: str, **options: Any) -> Any:
    kinds: dict[str, Callable[..., Any]] = {
        "amortized": AmortizedGuide,
        "per_datapoint": PerDatapointGuide,
        "semi_amortized": lambda model, **o: SemiAmortizedGuide(model, num_steps=1, **o),
        "iterative": lambda model, **o: IterativeAmortizedGuide(model, num_steps=1, update=LearnedUpdate((8,)), **o),
    }
    return kinds[kind](model, family=family, **options)


KINDS = ["amortized", "per_datapoint", "semi_amortized", "iterative"]


def refining_guide(kind: str, model: Any, **options: Any) -> Any:
    if kind == "iterative":
        return IterativeAmortizedGuide(model, update=LearnedUpdate((8,)), **options)
    return SemiAmortizedGuide(model, encoder_gradient=kind, **options)


REFINING = [*GRADIENTS, "iterative"]
FAST = ["unrolled", "distill", "iterative"]


@config_enumerate
def mixture(x: Tensor) -> None:
    """A discrete latent beside a continuous one."""
    with pyro.plate("data", len(x)):
        component = pyro.sample("component", dist.Categorical(torch.tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 3.0 * component, 1.0), obs=x)
