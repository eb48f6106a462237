"""What a report on posterior collapse holds and says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_amortized.diagnostics.report import Report, fill, in_style, new_axes, put_title

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes


__all__ = ["EPSILONS", "CollapseReport", "report_dataset"]

EPSILONS = np.logspace(-4, 1, 51)
"""Where the collapse curve is evaluated, in nats."""
_REMEDIES = "KL annealing, free bits, an aggressive encoder, a SemiAmortizedGuide, or a weaker likelihood"


@dataclass(repr=False)
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
        return "\n".join((_code_verdict if "perplexity" in self.dataset else _verdict)(self.dataset))

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
            *fill(_surgery(attrs)),
            *(line for sentence in self.verdict.splitlines() for line in fill(sentence)),
        ]
        return "\n".join(lines)

    def _rows(self) -> dict[str, list[int]]:
        """The dimensions in each row of the table: one, or those of all steps of time."""
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.dataset.coords.get("over_time", self.dataset["latent"]).values):
            rows.setdefault(str(name), []).append(i)
        return rows

    @in_style
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
            level, label = math.log(self.dataset.attrs["codes_per_position"]), "log of the number of codes"
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
        ax.axhline(level, color="0.5", lw=0.8, ls=":", label=label)
        few = position[:: max(1, len(position) // 20)]
        ax.set_xticks(few, [str(self.dataset["latent"].values[i]) for i in few], rotation=90)
        ax.set(ylabel="entropy of the codes, nats" if is_codes else "KL, nats per datapoint")
        ax.legend(frameon=is_codes, loc="lower right" if is_codes else "best")
        put_title(ax, f"{self.num_datapoints} datapoints of plate {self.dataset.attrs['plate']!r}", self.verdict)
        return ax

    @in_style
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
            ax.legend()
        ax.set_title("Collapsed dimensions by threshold")
        return ax


def _share(flags: np.ndarray[Any, Any]) -> str:
    return f"{flags.sum()}/{len(flags)}" if len(flags) > 1 else "yes" if flags[0] else "no"


def _shown(names: np.ndarray[Any, Any]) -> str:
    return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")


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
        close = data["collapsed"].values
        if close.any():
            return [
                f"All {count} latent dimensions are active, {close.sum()} of them hardly: the KL divergence of "
                f"{_shown(names[close])} is below {attrs['epsilon']:g} nats for {100 * (1 - attrs['delta']):g} % of "
                f"the datapoints. Together they hold {information}."
            ]
        return [f"No collapse: all {count} latent dimensions are active; together they hold {information}."]
    if dead.all():
        lines = [f"{_nothing_active(attrs, count)} Try {_REMEDIES}."]
    else:
        lines = [
            f"{dead.sum()} of {count} latent dimensions are dead: {_shown(names[dead])}. If the model should use them, "
            f"try {_REMEDIES}; if the held-out ELBO does not rise, it has no need of them."
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


def _code_verdict(data: xarray.Dataset) -> list[str]:
    """What the numbers say, in words."""
    names, active, attrs = data["latent"].values, data["active"].values, data.attrs
    num_codes, effective = attrs["num_codes"], attrs["perplexity"]
    lines = [
        f"Codebook: perplexity {effective:.1f} of {num_codes} codes, {attrs['codes_used']} of them in use. The KL "
        "divergence of a code is -log of its prior whatever it tells; the perplexity says what is used."
    ]
    remedies = "a smaller commitment, a codebook that revives more codes (revive_below), or a weaker likelihood"
    if not active.any():
        lines.append(f"Collapsed: every datapoint has the same codes; they tell nothing of x. Try {remedies}.")
    elif not active.all():
        shown = _shown(names[~active])
        lines.append(f"{(~active).sum()} of {len(names)} positions have the same code everywhere: {shown}.")
    else:
        lines.append(
            f"No collapse: all {len(names)} positions are active; together they hold "
            f"{attrs['mutual_information']:.2f} nats of information on the datapoint."
        )
    if active.any() and effective < 0.1 * num_codes:
        lines.append("Fewer than a tenth of the codes are in effective use; try fewer codes, or a larger revive_below.")
    return lines


def report_dataset(
    per_latent: Mapping[str, Any], kl: np.ndarray, coords: Mapping[str, Any], settings: Mapping[str, Any], **more: Any
) -> xarray.Dataset:
    """The dataset of a report.

    Args:
        per_latent: Variables by name, over the latents.
        kl: KL divergences ``(N, D)``.
        coords: The coordinates, but for ``epsilon``.
        settings: The attributes.
        **more: Further variables.
    """
    import xarray

    variables = {name: ("latent", value) for name, value in per_latent.items()}
    variables["kl"] = ("latent", kl.mean(0))
    variables["collapsed"] = ("latent", (kl < settings["epsilon"]).mean(0) >= 1 - settings["delta"])
    share = (("latent", "epsilon"), (kl[..., None] < EPSILONS).mean(0))
    return xarray.Dataset(
        {**variables, "share_below": share, **more}, coords={**coords, "epsilon": EPSILONS}, attrs=dict(settings)
    )
