r"""Simulation-based calibration: whether the guide's posteriors are right on average over simulated data.

If z is drawn from the prior and x given z, and q(z | x) is the posterior, then z is one more draw from q: its rank
among L draws from q is uniform on 0, ..., L, in every coordinate and in every function of z and x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_count, check_function, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.calibration.findings import DENSITY, JOINT, LEVEL, TARP, advice, findings
from pyro_amortized.diagnostics.calibration.plots import draw_coverage, draw_ecdf, draw_ranks
from pyro_amortized.diagnostics.calibration.ranks import Posterior, prior_location, ranks
from pyro_amortized.diagnostics.calibration.uniformity import holm, simultaneous_band, uniformity_test
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar
from pyro_amortized.diagnostics.report import Report, fill, in_style, new_axes, put_title
from pyro_amortized.diagnostics.simulation import Simulator
from pyro_amortized.guides import LocalGuide
from pyro_amortized.objective.noise import generator

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["CalibrationReport", "calibrate"]

_LEAST_SIMULATIONS, _LEAST_SAMPLES = 20, 19
_MAX_POINTS = 99
_SHOWN = 12


@dataclass(repr=False)
class CalibrationReport(Report):
    """Ranks of simulated latents among draws from the guide, and whether they are uniform.

    Attributes:
        dataset: ``rank``, between 0 and L, and ``pit``, the same on (0, 1) with the width of a rank filled in at
            random, over ``simulation`` and ``quantity``. The quantities are the unconstrained latents by name, the
            log-joint ``log_joint``, the guide's own log density ``log_q`` (expected coverage of regions of highest
            density) and the distance ``tarp`` to a random reference point. Over ``quantity``: ``shift`` and ``spread``,
            mean and standard deviation of the normal scores of ``pit`` (0 and 1 if calibrated), ``p_shift``,
            ``p_spread`` and ``p_ecdf``, their p-values and that of the distribution function, ``p_value`` of all three,
            ``p_adjusted`` for the number of quantities, and ``finding``, what is wrong in words. Over ``point``:
            ``ecdf_lower`` and ``ecdf_upper``, bounds of the distribution function that hold at all points and for all
            quantities at once with probability 95%.
    """

    @property
    def calibrated(self) -> bool:
        """Whether no quantity fails; an exact posterior passes with probability at least 95%."""
        return not self.failing

    @property
    def failing(self) -> tuple[str, ...]:
        """Names of the quantities that fail, worst first."""
        data = self.dataset.sortby("p_adjusted")
        return tuple(str(name) for name in data["quantity"].values[data["p_adjusted"].values < LEVEL])

    @property
    def verdict(self) -> str:
        """Whether the guide is calibrated, and in how many quantities it fails."""
        return (
            f"{'CALIBRATED' if self.calibrated else 'NOT CALIBRATED'}: {len(self.failing)} of "
            f"{self.dataset.sizes['quantity']} quantities fail (an exact posterior fails in any with probability "
            f"{LEVEL:.0%})"
        )

    def coverage(self, level: float) -> tuple[float, float]:
        """Share of simulations whose latents lie in the guide's region of highest density with the given content.

        Returns:
            The share and its binomial standard error.
        """
        self._check_density()
        inside = float((self.dataset["pit"].sel(quantity=DENSITY).values > 1 - level).mean())
        return inside, float(np.sqrt(inside * (1 - inside) / self.dataset.sizes["simulation"]))

    def _check_density(self) -> None:
        if DENSITY not in self.dataset["quantity"]:
            raise ValueError(
                f"Cannot tell the coverage of regions of highest density because {self.dataset.attrs['guide']} gives "
                'draws without their density; try plot("tarp").'
            )

    def __str__(self) -> str:
        """The verdict, the quantities with the smallest p-values, expected coverage, and what to try."""
        data, attrs = self.dataset, self.dataset.attrs
        words = dict(zip(data["quantity"].values.tolist(), data["finding"].values.tolist(), strict=True))
        count = data.sizes["quantity"]
        shown = data.isel(quantity=np.argsort(data["p_value"].values, kind="stable")[:_SHOWN])
        title = (
            f"Simulation-based calibration: {data.sizes['simulation']} simulations of plate {attrs['plate']!r}, "
            f"{attrs['num_samples']} draws each ({attrs['guide']}, {attrs['family']} family)"
        )
        lines = [
            *fill(title),
            *fill(self.verdict),
            f"{'quantity':16s}{'shift':>8s}{'spread':>8s}{'p':>10s}{'adjusted':>10s}  finding",
        ]
        for name in shown["quantity"].values:
            row = shown.sel(quantity=name)
            scores = "".join(f"{float(row[key]):8.2f}" for key in ("shift", "spread"))
            p_values = "".join(f"{_shown_p(float(row[key])):>10s}" for key in ("p_value", "p_adjusted"))
            numbers = f"{name:16s}{scores}{p_values}  "
            lines += fill(row["finding"].item(), begin=numbers)
        if count > _SHOWN:
            lines.append(f"... and {count - _SHOWN} with larger p")
        if DENSITY in data["quantity"]:
            shares = [self.coverage(level) for level in (0.5, 0.8, 0.95)]
            cells = ", ".join(f"{s:.1%} (+- {e:.1%})" for s, e in shares)
            lines += fill(f"expected coverage of 50%, 80% and 95% regions: {cells}")
        if attrs.get("num_left_out"):
            lines.append(f"{attrs['num_left_out']} more simulations have no certificate and are left out")
        if attrs["global_latents"] != "none":
            lines.append(f"global latents {attrs['global_latents']}")
        return "\n".join([*lines, *(line for part in advice(words) for line in fill(part, begin="- "))])

    @in_style
    def plot(self, kind: str = "ecdf", ax: Axes | None = None, *, quantity: str | None = None) -> Axes:
        """Draws one of four pictures.

        Args:
            kind: ``"ecdf"``, the difference between distribution function and uniform of every quantity, within the
                band that an exact posterior leaves with probability 5% at most; ``"ranks"``, the histogram of one
                quantity's ranks; ``"coverage"``, expected coverage against content; ``"tarp"``, the same for balls
                around random reference points.
            ax: Axes to draw on; new ones if None.
            quantity: The one for ``"ecdf"`` (by default all) or ``"ranks"`` (by default that of the smallest p-value).

        Returns:
            The axes.

        Raises:
            ValueError: If there is no such picture or quantity.
        """
        names = [str(name) for name in self.dataset["quantity"].values]
        if kind == "coverage":
            self._check_density()
        if kind not in ("ecdf", "ranks", "coverage", "tarp"):
            raise ValueError(
                f"Cannot draw kind={kind!r} because it is unknown; try 'ecdf', 'ranks', 'coverage' or 'tarp'."
            )
        if quantity is not None and quantity not in names:
            raise ValueError(f"Cannot draw quantity {quantity!r} because there is none; try one of {names[:20]}.")
        ax = new_axes(ax)
        shown = {"coverage": DENSITY, "tarp": TARP}.get(kind, quantity)
        if kind == "ranks" and shown is None:
            shown = names[int(np.argmin(self.dataset["p_value"].values))]
        told = self.verdict if shown is None else f"{shown}: {self.dataset['finding'].sel(quantity=shown).item()}"
        put_title(ax, f"{self.dataset.attrs['guide']}, {self.dataset.attrs['family']} family", told)
        if kind == "ecdf":
            return draw_ecdf(self.dataset, ax, names if shown is None else [shown], self.failing)
        return (draw_ranks if kind == "ranks" else draw_coverage)(self.dataset, ax, str(shown))


def calibrate(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_simulations: int = 1000,
    num_samples: int = 199,
    posterior: Posterior | None = None,
    plate: str | None = None,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationReport:
    r"""Tests whether a guide's posteriors are calibrated, on data simulated from the model.

    Local latents are drawn from the prior, with global latents held at the guide's median, and observations given them;
    covariates are those of the call. The guide infers the simulated datapoints, all at once where the model can be run
    on any number of rows. The rank of the true value among draws from the guide is uniform for every quantity if the
    guide is exact: for every latent, for the log-joint :math:`\log p(x, z)`, which sees the correlations that the
    latents one by one do not, for :math:`\log q(z | x)`, which gives the expected coverage of the guide's regions of
    highest density, and for the distance to a random reference point (TARP).

    Every quantity is tested for a shift, a wrong spread and any other shape of its distribution function, and p-values
    are adjusted for the number of quantities by Holm's method, so that an exact posterior fails with probability 5% at
    most. A guide that passes is right on average over the prior, which is no promise for each datapoint.

    Args:
        model: The Pyro model.
        guide: A guide of this package that serves unseen data.
        model_args: The model's positional arguments, as a tuple, or a ``DataLoader`` of batches, over which the
            simulations are spread.
        model_kwargs: Its keyword arguments.
        num_simulations: S, at least 20. 500 show a scale that is off by 20%.
        num_samples: L, draws from the guide for each simulation, at least 19.
        posterior: A procedure to test in place of the guide, such as :func:`~pyro_amortized.certified_posterior`, or
            ``functools.partial`` of it: it is run on the simulated data. Simulations that it does not certify, as it
            decides by their data alone, are left out and counted; there is no log q then.
        plate: As for :func:`estimate_gaps`: with crossed plates the side to test, given the other at its median.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all draws; torch's global seed is left alone.
        progress: Whether to show a progress bar.

    Returns:
        The report.

    Raises:
        ValueError: If the model is none that can be simulated (see :func:`simulate`), it has no local latents, the
            guide only knows the observed datapoints, or a number is too small.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> report = calibrate(model, AmortizedGuide(model), (torch.randn(50),), num_simulations=200)
        >>> report.calibrated  # the guide has not been trained
        False

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Sean Talts, Michael Betancourt,
        Daniel Simpson, Aki Vehtari, Andrew Gelman (2018), https://arxiv.org/abs/1804.06788

        Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes
        Sensitivity, Martin Modrák, Angie H. Moon, Shinyoung Kim, Paul Bürkner, Niko Huurre, Kateřina Faltejsková,
        Andrew Gelman, Aki Vehtari (2023), https://arxiv.org/abs/2211.02383

        A Trust Crisis In Simulation-Based Inference? Your Posterior Approximations Can Be Unfaithful, Joeri Hermans,
        Arnaud Delaunoy, François Rozet, Antoine Wehenkel, Volodimir Begy, Gilles Louppe (2022),
        https://arxiv.org/abs/2110.06581

        Graphical Test for Discrete Uniformity and its Applications in Goodness-of-Fit Evaluation and Multiple Sample
        Comparison, Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari (2022), https://arxiv.org/abs/2103.10522

        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference, Pablo Lemos, Adam Coogan, Yashar
        Hezaveh, Laurence Perreault-Levasseur (2023), https://arxiv.org/abs/2302.03026
    """
    num_simulations = check_count("num_simulations", num_simulations, _LEAST_SIMULATIONS, 10 * _LEAST_SIMULATIONS)
    num_samples = check_count("num_samples", num_samples, _LEAST_SAMPLES, 10 * _LEAST_SAMPLES)
    seed = check_seed(seed)
    if posterior is not None:
        check_function("posterior", posterior, "a function such as certified_posterior", "certified_posterior")
    rng, parts = generator(seed, 21), []
    with progress_bar(num_simulations, "calibration", progress) as bar:
        for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model)):
            share = _share(num_simulations, num_calls(model_args), number)
            if share == 0:
                continue
            problem = bind(model, guide, args, kwargs, seed, plate=plate)
            _check_posterior(posterior, problem, guide)
            prior = prior_location(problem, rng)
            for simulation in Simulator(problem).blocks(share, rng):
                found, served = ranks(problem, simulation, prior, num_samples, rng, posterior)
                parts.append((found[:share], served[:share]))
                share -= len(parts[-1][0])
                bar.update(len(parts[-1][0]))
    found, served = (torch.cat(column) for column in zip(*parts, strict=True))
    if int(served.sum()) < _LEAST_SIMULATIONS:
        raise ValueError(
            f"Cannot test calibration because {int(served.sum())} of {len(served)} simulations have a certificate; try "
            f"num_simulations={10 * len(served)}, or a reparameterised model, of which more have one."
        )
    dataset = _to_dataset(found[served], problem, num_samples, seed, posterior)
    return CalibrationReport(dataset.assign_attrs(num_left_out=int((~served).sum())))


def _check_posterior(posterior: Posterior | None, problem: LocalProblem, guide: LocalGuide) -> None:
    """Refuses procedures that would find other values of the latents that the simulations hold."""
    amortized = isinstance(getattr(guide, "global_guide", None), LocalGuide) or problem.guide is not guide
    if posterior is not None and amortized:
        raise ValueError(
            f"Cannot calibrate {_name(posterior)} beside crossed plates because it would infer latents "
            f"{[*problem.global_sites]} anew from simulated data, which hold them at their median; try posterior=None."
        )


def _share(total: int, number_of_calls: int | None, number: int) -> int:
    """How many simulations the given call gets."""
    if number_of_calls is None:
        raise ValueError(
            "Cannot spread simulations over batches because their number is unknown; try a DataLoader with a length, "
            "or the arguments of one batch, (x,)."
        )
    return total // number_of_calls + (number < total % number_of_calls)


def _to_dataset(
    found: Tensor,
    problem: LocalProblem,
    num_samples: int,
    seed: int,
    posterior: Posterior | None,
) -> xarray.Dataset:
    import xarray

    names = [*problem.objective.log_joint.layout.names, JOINT, *([DENSITY] if posterior is None else []), TARP]
    noise = torch.rand(found.shape, generator=generator(seed, 22), dtype=torch.float64)
    pit = ((found + noise) / (num_samples + 1)).numpy()
    points = _points(num_samples)
    test = uniformity_test(pit, points)
    adjusted = holm(test.p_value)
    lower, upper = simultaneous_band(len(found), points, LEVEL / len(names))
    held = ", ".join(problem.global_sites)
    columns = {key: ("quantity", getattr(test, key)) for key in vars(test)}
    words = np.array(findings(names, test, adjusted.tolist()), dtype=object)
    return xarray.Dataset(
        {
            "rank": (("simulation", "quantity"), found.numpy()),
            "pit": (("simulation", "quantity"), pit),
            **columns,
            "p_adjusted": ("quantity", adjusted),
            "finding": ("quantity", words),
            "ecdf_lower": ("point", lower),
            "ecdf_upper": ("point", upper),
        },
        coords={"simulation": np.arange(len(found)), "quantity": names, "point": points},
        attrs={
            "units": "rank: number of draws below the truth; shift and spread: of standard normal scores",
            "num_samples": num_samples,
            "seed": seed,
            "family_wise_level": LEVEL,
            "plate": problem.plate,
            "guide": type(problem.guide).__name__ if posterior is None else _name(posterior),
            "family": type(problem.objective.family).__name__,
            "latent_dim": problem.objective.family.latent_dim,
            "latents": "unconstrained",
            "global_latents": f"held at the guide's median: {held}" if held else "none",
        },
    )


def _name(posterior: Any) -> str:
    """What a procedure is called, also inside of ``functools.partial``."""
    return str(getattr(getattr(posterior, "func", posterior), "__name__", type(posterior).__name__))


def _shown_p(p_value: float) -> str:
    return f"{p_value:.4f}" if p_value >= 1e-4 else "<0.0001"


def _points(num_samples: int) -> np.ndarray[Any, Any]:
    """Points between ranks, where the distribution function of uniform ranks is that of uniform numbers."""
    number = min(num_samples, _MAX_POINTS)
    return np.unique(np.linspace(1, num_samples, number).round()) / (num_samples + 1)
