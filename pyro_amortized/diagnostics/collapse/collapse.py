"""Posterior collapse: which latent dimensions tell nothing of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_amortized.checks import check_count, check_positive, check_real, check_seed
from pyro_amortized.diagnostics.batches import ModelArgs, ToArgs, calls, num_calls
from pyro_amortized.diagnostics.collapse.activity import PriorSpread, dimension_information, least_information
from pyro_amortized.diagnostics.collapse.codes import code_verdict, codes_dataset, find_codes
from pyro_amortized.diagnostics.collapse.divergence import Divergence, local_divergence, mutual_information
from pyro_amortized.diagnostics.noise import generator
from pyro_amortized.diagnostics.problem import LocalProblem, bind, progress_bar
from pyro_amortized.diagnostics.report import Report, new_axes
from pyro_amortized.families import VariationalFamily
from pyro_amortized.guides import LocalGuide, VectorQuantizedGuide

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

__all__ = ["CollapseReport", "collapse_report"]

EPSILONS = np.logspace(-4, 1, 51)
"""Where the collapse curve is evaluated, in nats."""
_REMEDIES = "KL annealing, free bits, an aggressive encoder, a SemiAmortizedGuide, or a weaker likelihood"


@dataclass
class CollapseReport(Report):
    r"""What a guide's latents tell of the data.

    Attributes:
        dataset: Over the dimension ``latent``, whose coordinates are named after the sites (``z[0]``); where these are
            numbered by time (``z_1[0]``), the coordinate ``over_time`` names them without (``z_*[0]``):

            ``kl``: KL divergence from the prior given the sites before, nats, averaged over the datapoints; ``kl_se``
            its Monte Carlo standard error, 0 where there is a closed form.
            ``posterior_mean_variance``: variance over the datapoints of the posterior mean, in unconstrained space;
            ``posterior_mean_variance_se`` its Monte Carlo standard error.
            ``relative_variance``: the same with the latent in units of its prior's spread (interquartile range), from
            the median of the datapoint's own prior.
            ``information``: mutual information of datapoint and dimension by itself, beyond what a prior that differs
            between datapoints tells, nats; a lower bound of at most log 32.
            ``active``: whether the information exceeds that of a normal whose mean varies over the datapoints by
            ``threshold`` times its own variance (Burda et al., in units of the posterior).
            ``collapsed``: whether the KL divergence is below ``epsilon`` for a share of at least 1 - ``delta`` of the
            datapoints (Lucas et al.).
            ``share_below``, also over the dimension ``epsilon``: the share of datapoints whose divergence is below.

            For vector-quantised codes the dimensions are the positions (``code[0]``). The KL divergence is
            -log p(code), and the variance that of the posterior mean of the code's indicator vector, summed over its
            entries; above ``threshold`` the position is active. Beside these, ``usage``, also over the dimension
            ``code``, is the share of datapoints with that code, and ``perplexity`` the exponential of its entropy.

            Its attributes hold ``active_units``, ``mutual_information``, ``num_datapoints``, ``total_kl``,
            ``aggregate_kl``, their standard errors ``<name>_se`` and the settings.
    """

    @property
    def active_units(self) -> int:
        """Number of active dimensions."""
        return int(self.dataset.attrs["active_units"])

    @property
    def mutual_information(self) -> float:
        """Mutual information of datapoint and latent, in nats; at most the logarithm of the number of datapoints."""
        return float(self.dataset.attrs["mutual_information"])

    @property
    def num_datapoints(self) -> int:
        """Number of datapoints."""
        return int(self.dataset.attrs["num_datapoints"])

    @property
    def perplexity(self) -> float:
        """Perplexity of the codebook, over all positions together: the effective number of codes in use.

        Raises:
            ValueError: If the latents are no codes.
        """
        if "perplexity" not in self.dataset:
            raise ValueError(
                "Cannot give the perplexity of the codebook because the latents are no codes; try active_units and "
                "mutual_information."
            )
        return float(self.dataset.attrs["perplexity"])

    def collapse_curve(self) -> xarray.DataArray:
        """Share of collapsed dimensions as a function of ``epsilon``, at the report's ``delta``."""
        collapsed = self.dataset["share_below"] >= 1 - self.dataset.attrs["delta"]
        return collapsed.mean("latent").rename("collapsed")

    @property
    def verdict(self) -> str:
        """What the numbers say, in words."""
        return "\n".join((code_verdict if "perplexity" in self.dataset else _verdict)(self.dataset))

    def __str__(self) -> str:
        """A table of dimensions, the totals and the verdict."""
        data, attrs = self.dataset, self.dataset.attrs
        width = max(10, *(len(str(name)) for name in data["latent"].values)) + 2
        lines = [
            f"Posterior collapse over {self.num_datapoints} datapoints of plate {attrs['plate']!r} "
            f"({attrs['family']} family)",
            f"{'':{width}s}{'KL, nats':>10s}{'var of mean':>13s}{'tells, nats':>13s}{'active':>8s}{'collapsed':>11s}"
            + (f"{'perplexity':>12s}" if "perplexity" in data else ""),
        ]
        for name, rows in self._rows().items():
            numbers = (float(data[key].values[rows].mean()) for key in ("kl", "relative_variance", "information"))
            flags = (_share(data[flag].values[rows]) for flag in ("active", "collapsed"))
            line = "{:{}s}{:10.4f}{:13.4f}{:13.4f}{:>8s}{:>11s}".format(name, width, *numbers, *flags)
            lines.append(line + (f"{data['perplexity'].values[rows].mean():12.2f}" if "perplexity" in data else ""))
        if "over_time" in data.coords:
            lines.append("Numbers are means over time, and shares counts of steps.")
        lines += [
            "The variance of the posterior mean is in units of the prior's."
            if "perplexity" not in data
            else "The variance is that of the indicator of the code.",
            f"KL of the whole latent: {attrs['total_kl']:.3f} nats per datapoint; active units: {self.active_units} of "
            f"{data.sizes['latent']}",
            _surgery(attrs),
            self.verdict,
        ]
        return "\n".join(lines)

    def _rows(self) -> dict[str, list[int]]:
        """The dimensions in each row of the table: one, or those of all steps of time."""
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.dataset.coords.get("over_time", self.dataset["latent"]).values):
            rows.setdefault(str(name), []).append(i)
        return rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the KL divergence of every dimension; those that are not active are pale.

        Of codes, whose KL divergence is that of their prior, the entropy over the datapoints is drawn instead.

        Args:
            ax: Axes to draw on; new ones if None.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        position, active = np.arange(self.dataset.sizes["latent"]), self.dataset["active"].values
        is_codes = "perplexity" in self.dataset
        kl, error = self.dataset["kl"].values, self.dataset["kl_se"].values
        level, label = self.dataset.attrs["epsilon"], "epsilon"
        if is_codes:
            kl = np.log(self.dataset["perplexity"].values)
            level, label = math.log(self.dataset.attrs["num_codes"]), "log of the number of codes"
        for chosen, name, alpha in ((active, "active", 1.0), (~active, "not active", 0.3)):
            if chosen.any():
                ax.bar(
                    position[chosen],
                    kl[chosen],
                    yerr=error[chosen] if error.any() else None,
                    color="C0",
                    alpha=alpha,
                    label=f"{name} ({chosen.sum()})",
                )
        ax.axhline(level, color="black", lw=0.8, ls=":", label=label)
        few = position[:: max(1, len(position) // 20)]
        ax.set_xticks(few, [str(self.dataset["latent"].values[i]) for i in few], rotation=90)
        ax.set(ylabel="entropy of the codes, nats" if is_codes else "KL, nats per datapoint")
        ax.legend(frameon=is_codes, loc="lower right" if is_codes else "best")
        return ax

    def plot_curve(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Draws the share of collapsed dimensions against epsilon; reports may be compared in one picture.

        Args:
            ax: Axes to draw on; new ones if None.
            label: The curve's name in a legend.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        curve = self.collapse_curve()
        ax.plot(curve["epsilon"].values, 100 * curve.values, drawstyle="steps-post", label=label)
        ax.set(xscale="log", xlabel="epsilon, nats", ylabel="collapsed dimensions, %", ylim=(-3, 103))
        if label is not None:
            ax.legend(frameon=False)
        return ax


def _share(flags: np.ndarray[Any, Any]) -> str:
    return f"{flags.sum()}/{len(flags)}" if len(flags) > 1 else "yes" if flags[0] else "no"


def _surgery(attrs: Mapping[str, Any]) -> str:
    """The decomposition of the KL divergence, of the datapoints that the mutual information was estimated from."""
    count, bound = attrs["mutual_information_datapoints"], attrs["mutual_information_bound"]
    information, error, rest = (attrs[k] for k in ("mutual_information", "mutual_information_se", "aggregate_kl"))
    sample = "" if count == attrs["num_datapoints"] else f" ({count} datapoints drawn at random)"
    text = (
        f"mutual information{sample}: {information:.3f} +- {error:.3f} nats, at most log {math.exp(bound):.0f} = "
        f"{bound:.2f}; KL of the aggregate posterior from the prior: {rest:.3f} +- {attrs['aggregate_kl_se']:.3f}"
    )
    if information > math.log(count) - 0.5:
        text += "\nThe mutual information is close to its bound, so that it may be larger; try more datapoints."
    return text


def _verdict(data: xarray.Dataset) -> list[str]:
    names = data["latent"].values
    active, kl = data["active"].values, data["kl"].values
    dead = ~active
    count, attrs = len(names), data.attrs
    if not dead.any():
        information = f"{attrs['mutual_information']:.2f} nats of information on the datapoint"
        return [f"No collapse: all {count} latent dimensions are active; together they hold {information}."]
    shown = ", ".join(map(str, names[dead][:10])) + (", ..." if dead.sum() > 10 else "")
    if dead.all():
        lines = [f"{_nothing_active(attrs, count)} Try {_REMEDIES}."]
    else:
        lines = [
            f"{dead.sum()} of {count} latent dimensions are dead: {shown}. If the model should use them, try "
            f"{_REMEDIES}; if the held-out ELBO does not rise, it has no need of them."
        ]
    misplaced = dead & (kl > attrs["epsilon"])
    if misplaced.any():
        lines.append(
            f"{misplaced.sum()} dead dimensions have a KL divergence above {attrs['epsilon']:g} nats all the "
            "same: q differs from the prior in the same way everywhere; try a prior with learned parameters."
        )
    return lines


def _nothing_active(attrs: Mapping[str, Any], count: int) -> str:
    information = attrs["mutual_information"]
    if information > 0.05 + 3 * attrs["mutual_information_se"]:
        return (
            f"None of the {count} latent dimensions is active by itself, yet together they hold {information:.2f} nats "
            "of information on the datapoint: a little in each, or in how q couples them."
        )
    return f"Collapsed: none of the {count} latent dimensions is active; z tells next to nothing of x."


def collapse_report(
    model: Callable[..., Any],
    guide: LocalGuide,
    model_args: ModelArgs = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 200,
    threshold: float = 0.01,
    epsilon: float = 0.1,
    delta: float = 0.01,
    max_pairs: int = 1000,
    to_args: ToArgs | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CollapseReport:
    r"""Which latent dimensions a model and its guide use, and which have collapsed to the prior.

    For dimension d of local site s, with the sites before it written :math:`u_{<s}`, all unconstrained,

    .. math:: \mathrm{KL}_d = \frac{1}{N} \sum_n E_{q(u_{<s})}\big[
        \mathrm{KL}\big(q(u_d \mid u_{<s}, x_n) \,\|\, p(u_d \mid u_{<s})\big)\big],

    exactly where there is a closed form given :math:`u_{<s}` (a Gaussian family against a normal prior, or a
    transformed normal on the same support), from draws elsewhere. Other dimensions of the same site are left out on
    both sides; where a prior couples them other than by a multivariate normal (a Dirichlet, a Cholesky factor), the
    divergence of the event is shared equally by its dimensions. For families that are not Gaussian it is estimated from
    nearest neighbours, with linear dependence on earlier sites taken into account; expect errors of some 0.02 nats.

    The mutual information of datapoint and latent, and the KL divergence of the aggregate posterior from the prior, add
    up to the KL divergence of the whole latent ("ELBO surgery"): a divergence without information is no use. Whether a
    dimension is active does not depend on its units, nor on those of the others.

    Args:
        model: The Pyro model. The scales of ``poutine.scale`` are left out.
        guide: A trained guide of this package. For a :class:`~pyro_amortized.VectorQuantizedGuide` the report is about
            the codes at each position, exactly, and holds the perplexity of the codebook.
        model_args: The model's positional arguments, or a ``DataLoader`` of batches.
        model_kwargs: The model's keyword arguments.
        num_samples: Number of draws per datapoint.
        threshold: Variance of the posterior mean, in units of the posterior's variance, above which a dimension is
            active; where the posteriors differ otherwise, by as much information.
        epsilon: KL divergence below which a datapoint counts as collapsed, nats.
        delta: Share of datapoints that may exceed it in a collapsed dimension.
        max_pairs: Most datapoints, drawn at random, for the mutual information: its cost is quadratic in their number.
        to_args: Where batches of a loader hold something else than the model's arguments: a function from a batch to
            the positional arguments, a tuple, or to a pair of these and keyword arguments, ``(args, kwargs)``.
        seed: Seed of all noise; torch's global seed is not touched.
        progress: Whether to show a progress bar.

    Returns:
        A :class:`CollapseReport`; print it for a table. Global latents are held at the guide's median.

    Raises:
        ValueError: If the model has no local latents, there are fewer than two datapoints, or an argument is out of
            its range.

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov (2015),
        https://arxiv.org/abs/1509.00519
        ELBO surgery: yet another way to carve up the variational evidence lower bound, Matthew D. Hoffman, Matthew J.
        Johnson (2016), http://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse, James Lucas, George Tucker, Roger Grosse,
        Mohammad Norouzi (2019), https://arxiv.org/abs/1911.02469
    """
    num_samples, max_pairs = (
        check_count("num_samples", num_samples, 2, 200),
        check_count("max_pairs", max_pairs, 2, 1000),
    )
    threshold, epsilon = check_positive("threshold", threshold, 0.01), check_positive("epsilon", epsilon, 0.1)
    delta = check_real("delta", delta, "a share of the datapoints, at least 0 and below 1", lambda x: 0 <= x < 1, 0.01)
    seed = check_seed(seed)
    settings = {"threshold": threshold, "epsilon": epsilon, "delta": delta, "num_samples": num_samples, "seed": seed}
    if isinstance(guide, VectorQuantizedGuide):
        codes = find_codes(model, guide, model_args, model_kwargs, to_args, progress)
        _check_enough(len(codes.codes))
        return CollapseReport(codes_dataset(codes, EPSILONS, settings))
    found = _Found(max_pairs)
    with progress_bar(num_calls(model_args) or 0, "posterior collapse", progress) as bar:
        for number, (args, kwargs) in enumerate(calls(model_args, model_kwargs, to_args, model)):
            problem = bind(model, guide, args, kwargs, seed)
            found.add(problem, local_divergence(problem, num_samples, generator(seed, 11, number)), seed, number)
            bar.update()
    _check_enough(len(found.join("kl")))
    return CollapseReport(_to_dataset(found, settings))


def _check_enough(num_datapoints: int) -> None:
    """Refuses what gives no variance."""
    if num_datapoints < 2:
        raise ValueError(
            "Cannot tell whether the latents depend on the data because there is only one datapoint; try more."
        )


class _Found:
    """What the batches have given so far."""

    def __init__(self, max_pairs: int) -> None:
        self.max_pairs = max_pairs
        self.parts: list[Divergence] = []
        self.spreads: list[PriorSpread] = []
        self.problem: LocalProblem | None = None
        self.phi = torch.empty(0)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, dtype=torch.long)

    def add(self, problem: LocalProblem, divergence: Divergence, seed: int, number: int) -> None:
        """Adds a batch; keeps phi of those datapoints that are, so far, among the ``max_pairs`` with lowest keys."""
        start = sum(len(part.kl) for part in self.parts)
        self.parts.append(divergence)
        before = self.spreads[-1] if self.spreads else None
        self.spreads.append(PriorSpread.of(problem, generator(seed, 14, number), before))
        keys = torch.rand(len(problem.phi), generator=generator(seed, 12, number), dtype=torch.float64)
        rows = torch.arange(start, start + len(keys))
        phi = problem.phi if self.problem is None else torch.cat([self.phi, problem.phi])
        keys, rows = torch.cat([self.keys, keys]), torch.cat([self.rows, rows])
        kept = keys.argsort()[: self.max_pairs].sort().values
        self.phi, self.keys, self.rows = phi[kept], keys[kept], rows[kept]
        self.problem = problem

    def join(self, name: str) -> Tensor:
        """One attribute of the divergences, over all datapoints."""
        return torch.cat([getattr(part, name) for part in self.parts])

    def units(self) -> tuple[Tensor, Tensor]:
        """Location and scale of the priors of all datapoints, ``(N, D)`` each."""
        return torch.cat([part.loc for part in self.spreads]), torch.cat([part.scale for part in self.spreads])


def _to_dataset(found: _Found, settings: Mapping[str, Any]) -> xarray.Dataset:
    import xarray

    problem: Any = found.problem
    kl, mean, mean_se = found.join("kl").numpy(), found.join("mean").numpy(), found.join("mean_se").numpy()
    count = len(kl)
    variance, variance_se = _variance_of_mean(mean, mean_se)
    share = (kl[..., None] < EPSILONS).mean(0)
    loc, scale = found.units()
    relative, _ = _variance_of_mean((mean - loc.numpy()) / scale.numpy(), mean_se / scale.numpy())
    units = loc[found.rows], scale[found.rows]
    family: VariationalFamily = problem.objective.family
    of_dimension = dimension_information(family, found.phi, *units, generator(settings["seed"], 15)).numpy()
    active = of_dimension > least_information(settings["threshold"])
    information, information_se = mutual_information(family, found.phi, generator(settings["seed"], 13), units=units)
    total, total_se = found.join("total").numpy(), found.join("total_se").numpy()
    chosen = found.rows.numpy()
    held = ", ".join(problem.global_sites)
    attributes = {
        "active_units": int(active.sum()),
        "mutual_information": information,
        "mutual_information_se": information_se,
        "mutual_information_bound": math.log(len(chosen)),
        "mutual_information_datapoints": len(chosen),
        "num_datapoints": count,
        "total_kl": float(total.mean()),
        "total_kl_se": float(_error_of_mean(total_se)),
        "aggregate_kl": float(total[chosen].mean() - information),
        "aggregate_kl_se": float(np.hypot(_error_of_mean(total_se[chosen]), information_se)),
        "units": "nats per datapoint",
        "plate": problem.plate,
        "family": type(family).__name__,
        "global_latents": f"held at the guide's median: {held}" if held else "none",
    }
    layout = problem.objective.log_joint.layout
    coords: dict[str, Any] = {"latent": list(layout.names), "epsilon": EPSILONS}
    if layout.names_over_time is not None:
        coords["over_time"] = ("latent", list(layout.names_over_time))
    return xarray.Dataset(
        {
            "kl": ("latent", kl.mean(0)),
            "kl_se": ("latent", _error_of_mean(found.join("kl_se").numpy())),
            "posterior_mean_variance": ("latent", variance),
            "posterior_mean_variance_se": ("latent", variance_se),
            "relative_variance": ("latent", relative),
            "information": ("latent", of_dimension),
            "active": ("latent", active),
            "collapsed": ("latent", (kl < settings["epsilon"]).mean(0) >= 1 - settings["delta"]),
            "share_below": (("latent", "epsilon"), share),
        },
        coords=coords,
        attrs={**attributes, **settings},
    )


def _error_of_mean(errors: np.ndarray) -> Any:
    return np.sqrt(np.square(errors).sum(0)) / len(errors)


def _variance_of_mean(mean: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances over datapoints without what Monte Carlo noise adds, and their standard errors due to it."""
    noise = np.square(error).mean(0)
    variance = np.maximum(mean.var(0, ddof=1) - noise, 0.0)
    return variance, np.sqrt((4 * variance + 2 * noise) * noise / len(mean))
