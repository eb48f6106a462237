"""Draws the logo and the pictures of the front pages into ``docs/_static``: ``python docs/pictures.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, FancyBboxPatch
from torch import Tensor

from pyro_amortized import AmortizedGuide, estimate_gaps, optimize_local

OUT = Path(__file__).parent / "_static"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#7A7A7A"


def draw_logo() -> None:
    """Two densities, the encoder's and the best of its family, and the gap between them."""
    grid = np.linspace(-3, 3, 61)

    def curve(loc: float, scale: float, height: float) -> str:
        points = zip(32 + 9 * grid, 54 - height * np.exp(-0.5 * ((grid - loc) / scale) ** 2), strict=True)
        return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)

    def path(shape: str, colour: str) -> str:
        return f'<path d="{shape}" fill="{colour}" fill-opacity="0.25" stroke="{colour}" stroke-width="3.5"/>'

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img" aria-label="pyro_amortized">',
        path(curve(-0.5, 0.6, 44.0), BLUE),
        path(curve(0.6, 0.9, 28.0), ORANGE),
        "</svg>",
    ]
    (OUT / "logo.svg").write_text("\n".join(lines) + "\n")


def draw_badge(name: str, left: str, right: str) -> None:
    """A badge of two words, as the README shows them without asking a service."""
    first, second = (round(6.6 * len(text)) + 12 for text in (left, right))
    text = 'y="14" fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{first + second}" height="20" role="img" '
        f'aria-label="{left}: {right}">',
        f'<rect width="{first + second}" height="20" rx="3" fill="#555"/>',
        f'<path d="M{first},0 h{second - 3} a3,3 0 0 1 3,3 v14 a3,3 0 0 1 -3,3 h-{second - 3} z" fill="{BLUE}"/>',
        f'<text x="{first / 2}" {text}>{left}</text><text x="{first + second / 2}" {text}>{right}</text>',
        "</svg>",
    ]
    (OUT / f"badge_{name}.svg").write_text("\n".join(lines) + "\n")


def readme_example() -> tuple[object, AmortizedGuide, Tensor, Tensor]:
    """The model, the trained guide, the data and the weights of the README's example."""
    torch.manual_seed(0)
    weights = torch.randn(2, 10)
    x = torch.poisson((torch.randn(500, 2) @ weights).exp())

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson((z @ weights).exp()).to_event(1), obs=x)

    guide = AmortizedGuide(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    for _ in range(1000):
        svi.step(x[torch.randint(500, (64,))])
    return model, guide, x, weights


def _ellipses(ax: Axes, posterior: object, colour: str, label: str) -> None:
    """Those that hold half and nine tenths of a normal of independent dimensions."""
    loc, scale = (value[0].detach().numpy() for value in (posterior.mean, posterior.stddev))
    for level, name in ((1.177, label), (2.146, None)):
        ax.add_patch(Ellipse(loc, *(2 * level * scale), fill=False, ec=colour, lw=2, label=name))


def draw_gaps() -> None:
    """One datapoint of the README's example: the exact posterior, the guide's answer, and the best of its family."""
    model, guide, x, weights = readme_example()
    gaps = estimate_gaps(model, guide, (x[:100],)).dataset
    middle = np.abs(gaps["amortization_gap"] - 0.9) + 2 * np.abs(gaps["approximation_gap"] - 0.45)
    n = int(np.argmin(middle.values))
    datum = x[n : n + 1]
    best = guide.infer(datum).family(optimize_local(model, guide, (datum,)).phi)
    centre, reach = best.mean[0].detach(), 6 * best.stddev[0].detach()
    axes = [torch.linspace(float(c - r), float(c + r), 200) for c, r in zip(centre, reach, strict=True)]
    z = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)
    density = dist.Poisson((z @ weights).exp()).log_prob(datum[0]).sum(-1) - 0.5 * z.square().sum(-1)
    row = gaps.isel(data=n)
    evidence, elbo_best, elbo = (float(row[name]) for name in ("log_evidence", "elbo_optimal", "elbo"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.1, 1))
    left.contourf(*axes, (density - density.max()).exp(), levels=np.linspace(0.05, 1, 8), cmap="Greys", alpha=0.6)
    _ellipses(left, guide.posterior(datum), ORANGE, "$q$, what the encoder answers")
    _ellipses(left, best, BLUE, "$q^*$, the best of the family")
    left.set(title="posterior of one datapoint (grey: exact)", xlabel="$z_1$", ylabel="$z_2$")
    left.legend(loc="lower left")
    left.set(xlim=axes[0][[0, -1]], ylim=axes[1][[0, -1]])
    for low, high, colour, text in (
        (elbo_best, evidence, BLUE, "approximation gap\na richer family helps"),
        (elbo, elbo_best, ORANGE, "amortization gap\nrefinement, a better encoder"),
    ):
        right.bar(0, high - low, bottom=low, width=0.5, color=colour)
        right.text(0.32, (low + high) / 2, f"{text}\n{high - low:.2f} nats", va="center")
    for value, text in ((evidence, "log p(x)"), (elbo_best, "ELBO of q*"), (elbo, "ELBO of q")):
        right.axhline(value, xmax=0.4, color=GREY, lw=1, ls=":")
        right.text(-0.98, value, text, va="bottom")
    right.set(xlim=(-1, 1.6), xticks=[], ylim=(elbo - 0.1, evidence + 0.1), ylabel="nats", title="what its ELBO lacks")
    figure.savefig(OUT / "gaps.png", dpi=150)
    plt.close(figure)


def draw_refinement() -> None:
    """The amortization gap of the README's example by number of refinement steps."""
    pyro.clear_param_store()
    model, guide, x, _ = readme_example()
    refined, steps, means, errors = guide.refined(20), (0, 1, 2, 3, 5, 10, 20), [], []
    for refined.num_steps in steps:
        left = optimize_local(model, refined, (x[:100],)).improvement.detach()
        means.append(float(left.mean()))
        errors.append(float(left.std() / len(left) ** 0.5))
    figure, ax = plt.subplots(figsize=(6, 3))
    ax.errorbar(range(len(steps)), means, errors, fmt="o-", capsize=3)
    ax.set(xticks=range(len(steps)), xticklabels=steps, yscale="log", ylim=(5e-5, 1), xlabel="refinement steps")
    ax.set(ylabel="nats per datapoint", title="amortization gap, mean and standard error over 100 datapoints")
    figure.savefig(OUT / "refinement.png", dpi=150)
    plt.close(figure)


def draw_families() -> None:
    """What each family makes of one bent posterior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(bend(z), 0.3), obs=x)

    def bend(z: Tensor) -> Tensor:
        return z[..., 1] + z[..., 0] + 0.6 * z[..., 0] ** 2

    pyro.set_rng_seed(0)
    x, families = torch.tensor([1.0]), ("normal", "multivariate_normal", "mixture", "flow")
    grid = torch.linspace(-2.5, 2.5, 160)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
    exact = dist.Normal(bend(z), 0.3).log_prob(x) - 0.5 * z.square().sum(-1)
    figure, axes = plt.subplots(1, len(families), figsize=(9, 2.6), sharex=True, sharey=True)
    for ax, name in zip(axes, families, strict=True):
        guide = AmortizedGuide(model, family=name, name=name)
        elbo = pyro.infer.Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
        svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.998}), elbo)
        for _ in range(1000):  # a flow has networks that all datapoints share
            svi.step(x)
        optimum = optimize_local(model, guide, (x,))
        with torch.no_grad():
            density = guide.infer(x).family(optimum.phi).log_prob(z.reshape(-1, 1, 2)).reshape(z.shape[:2])
        gap = float(torch.logsumexp(exact - np.log(2 * np.pi), (0, 1)) + 2 * np.log(5 / 159)) - float(optimum.elbo)
        ax.contourf(grid, grid, (exact - exact.max()).exp(), levels=np.linspace(0.05, 1, 8), cmap="Greys", alpha=0.6)
        ax.contour(grid, grid, (density - density.max()).exp(), levels=[0.1, 0.5], colors=[BLUE], linewidths=1.5)
        ax.set(title=f"{name}\n{gap:.2f} nats short", xlabel="$z_1$", xlim=(-2.2, 2.2), ylim=(-2.5, 2.2))
    axes[0].set_ylabel("$z_2$")
    figure.savefig(OUT / "families.png", dpi=150)
    plt.close(figure)


def _box(ax: Axes, x: float, y: float, text: str, colour: str = GREY, width: float = 2.5) -> None:
    """A box with a text, around a point."""
    style = {"boxstyle": "round,pad=0.06", "fc": "none", "ec": colour, "lw": 1.5}
    ax.add_patch(FancyBboxPatch((x - width / 2, y - 0.33), width, 0.66, **style))
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)


def draw_choosing() -> None:
    """The way from a question to a guide, and from what the diagnostics say to the next step."""
    figure, ax = plt.subplots(figsize=(9, 6))
    guides = [
        ("discrete latents that the\nmodel does not sum out?", "DiscreteAmortizedGuide\n(codes: VectorQuantizedGuide)"),
        ("few datapoints,\nand no new ones?", "PerDatapointGuide"),
        ("trained already, and the\nanswers should be better?", "guide.refined(20)"),
        ("may each answer cost a\nfew model evaluations?", "SemiAmortizedGuide,\nIterativeAmortizedGuide"),
    ]
    for i, (question, answer) in enumerate(guides):
        y = 5.6 - 1.25 * i
        _box(ax, 1.5, y, question)
        _box(ax, 5.1, y, answer, BLUE)
        _arrow(ax, (2.81, y), (3.79, y), "yes")
        _arrow(ax, (1.5, y - 0.39), (1.5, y - 0.86), "no")
    _box(ax, 1.5, 0.6, "AmortizedGuide(model)", BLUE)
    ax.text(8.5, 6.15, "then estimate_gaps says", ha="center")
    steps = [
        ("approximation gap:\na richer family", ORANGE),
        ("amortization gap: refine,\nenlarge, train longer", ORANGE),
        ("z tells nothing of x:\ncollapse_report, KLAnnealing", ORANGE),
        ("both gaps small:\ncalibrate, then use it", GREEN),
    ]
    for i, (text, colour) in enumerate(steps):
        _box(ax, 8.5, 5.6 - 1.25 * i, text, colour, 2.7)
    ax.set(xlim=(0.1, 10), ylim=(0.1, 6.4))
    ax.axis("off")
    figure.savefig(OUT / "choosing.svg")
    plt.close(figure)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY})
    ax.text((start[0] + end[0]) / 2 + 0.12, (start[1] + end[1]) / 2 + 0.08, text, fontsize=8)


def main() -> None:
    """Draws all of them."""
    plt.style.use("pyro_amortized.style")
    plt.rcParams["svg.hashsalt"] = "pyro_amortized"
    draw_logo()
    draw_badge("python", "python", "3.10 or later")
    draw_badge("licence", "licence", "Apache 2.0")
    draw_badge("typed", "types", "mypy")
    draw_choosing()
    draw_gaps()
    draw_refinement()
    draw_families()


if __name__ == "__main__":
    main()
