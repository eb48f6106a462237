r"""KL annealing: the KL divergence of the local latents counts little at first, and fully in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_amortized.checks import check_count, check_positive, check_real
from pyro_amortized.guides import LocalGuide
from pyro_amortized.structure.reader import StructureReader
from pyro_amortized.structure.sites import is_enumerated

__all__ = ["KLAnnealing", "Schedule", "cyclical_schedule", "linear_schedule", "sigmoid_schedule"]

Schedule = Callable[[int], float]
"""From the number of steps done to beta."""


def linear_schedule(num_steps: int, start: float = 0.0) -> Schedule:
    """Beta rises linearly from ``start`` to 1 within ``num_steps``, and stays there.

    Example:
        >>> schedule = linear_schedule(100)
        >>> schedule(0), schedule(25), schedule(1000)
        (0.0, 0.25, 1.0)

    References:
        Generating Sentences from a Continuous Space, Samuel R. Bowman, Luke Vilnis, Oriol Vinyals, Andrew M. Dai, Rafal
        Jozefowicz, Samy Bengio (2015), https://arxiv.org/abs/1511.06349
    """
    check_positive("num_steps", num_steps, 1000)
    _check_beta(start)
    return lambda step: start + (1 - start) * min(1.0, step / num_steps)


def sigmoid_schedule(midpoint: float, width: float) -> Schedule:
    """Beta is the logistic function of ``(step - midpoint) / width`` (Bowman et al., see :func:`linear_schedule`).

    Args:
        midpoint: Step at which beta is a half.
        width: Number of steps in which the logit rises by 1.

    Example:
        >>> schedule = sigmoid_schedule(500, 50)
        >>> round(schedule(0), 4), schedule(500), round(schedule(1000), 4)
        (0.0, 0.5, 1.0)
    """
    check_real("midpoint", midpoint, "a number of steps", lambda _: True, 500)
    check_positive("width", width, 50)
    return lambda step: 0.5 * (1 + math.tanh(0.5 * (step - midpoint) / width))


def cyclical_schedule(num_steps: int, num_cycles: int = 4, ramp: float = 0.5) -> Schedule:
    """Beta starts anew from 0 in every cycle, rises linearly to 1 and stays there until the cycle ends.

    Args:
        num_steps: Number of steps of all cycles together; beta is 1 after them.
        num_cycles: Number of cycles.
        ramp: Share of a cycle in which beta rises.

    Example:
        >>> schedule = cyclical_schedule(400)
        >>> [schedule(step) for step in (0, 25, 50, 99, 100, 125, 399, 400)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0]

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, Hao Fu, Chunyuan Li, Xiaodong Liu,
        Jianfeng Gao, Asli Celikyilmaz, Lawrence Carin (2019), https://arxiv.org/abs/1903.10145
    """
    check_positive("num_steps", num_steps, 1000)
    num_cycles = check_count("num_cycles", num_cycles, 1, 4)
    check_real("ramp", ramp, "a share of a cycle, above 0 and at most 1", lambda x: 0 < x <= 1, 0.5)
    cycle = num_steps / num_cycles
    return lambda step: 1.0 if step >= num_steps else min(1.0, step % cycle / cycle / ramp)


def _check_beta(beta: float) -> float:
    if isinstance(beta, bool) or not (isinstance(beta, int | float) and 0 <= beta < math.inf):
        raise ValueError(
            f"Cannot scale the KL divergence by beta={beta!r} because that must be a finite number, 0 or more (and no "
            "tensor, which Pyro refuses under enumeration); try a schedule from steps to floats, linear_schedule(1000)."
        )
    return float(beta)


class KLAnnealing:
    r"""Scales the KL divergence of the local latents by beta, in the model and in the guide.

    .. math:: L_\beta = \sum_n E_q\big[\log p(x_n \mid z_n)\big] - \beta\, \mathrm{KL}\big(q(z_n) \,\|\, p(z_n)\big)

    A pair of handlers: every latent site in the datapoint plate is scaled by beta, :math:`\log p(z)` in the model and
    :math:`\log q(z)` in the guide, auxiliary sites of joint families included. All of Pyro's ELBOs then see
    :math:`L_\beta`, with subsampling and with vectorised particles. Global latents and observations are left alone, so
    are discrete latents that the model sums out (Pyro refuses an annealed latent whose prior depends on one).

    While beta is not 1, ``svi.step`` and ``svi.evaluate_loss`` return :math:`-L_\beta`; for the ELBO itself evaluate
    the bare ``model`` and ``guide``, as in ``Trace_ELBO().loss(model, guide, x)``. A guide that refines does so on the
    plain per-datapoint ELBO whatever beta is, since it runs its model out of reach of handlers: only what trains the
    model's and the guide's parameters is annealed.

    Args:
        model: The Pyro model.
        guide: Its guide: one of this package, or any that draws the local latents inside the datapoint plate.
        schedule: A function from the number of steps done to beta, such as :func:`linear_schedule`.
        plate: Name of the datapoint plate; by default the guide's, or the outermost one that holds an observed site.

    Attributes:
        num_steps: Number of steps done.
        bare: The model and the guide themselves, not annealed.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_amortized import AmortizedGuide
        >>> _ = pyro.set_rng_seed(0); pyro.clear_param_store()
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> annealing = KLAnnealing(model, AmortizedGuide(model), linear_schedule(10))
        >>> loss = pyro.infer.TraceMeanField_ELBO()
        >>> svi = pyro.infer.SVI(annealing.model, annealing.guide, pyro.optim.Adam({"lr": 0.01}), loss)
        >>> for _ in range(5):
        ...     loss = svi.step(torch.randn(8))
        ...     annealing.step()
        >>> annealing.beta
        0.5
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        schedule: Schedule,
        *,
        plate: str | None = None,
    ) -> None:
        for name, handled in (("model", model), ("guide", guide)):
            if not callable(handled):
                raise ValueError(
                    f"Cannot anneal the {name} {handled!r} because it is not callable; try the {name} itself."
                )
        if not callable(schedule):
            raise ValueError(
                f"Cannot anneal by {schedule!r} because a schedule is a function from steps to beta; try "
                "linear_schedule(1000)."
            )
        self.schedule = schedule
        self.num_steps = 0
        self.bare = (model, guide)
        self._requested = guide.plate if plate is None and isinstance(guide, LocalGuide) else plate
        self._plate: str | None = None
        self._in_guide: set[str] = set()

    @property
    def beta(self) -> float:
        """The present scale of the KL divergence."""
        return _check_beta(self.schedule(self.num_steps))

    def step(self) -> None:
        """Goes on by one step of the schedule; to be called after each step of SVI."""
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.num_steps = state_dict["num_steps"]

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """The guide with its local latents scaled."""
        with _Scaled(self.beta, self._find_plate(args, kwargs)) as scaled:
            result = self.bare[1](*args, **kwargs)
        scaled.check_guide()
        self._in_guide = scaled.latents
        return result

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The model with its local latents scaled."""
        plate = self._find_plate(args, kwargs)
        with _Scaled(self.beta, plate, is_model=True) as scaled:
            result = self.bare[0](*args, **kwargs)
        missing = scaled.latents - self._in_guide
        if missing and self._in_guide:
            raise ValueError(
                f"Cannot anneal the KL divergence of sites {sorted(missing)} because the guide does not draw them "
                f"inside of plate {plate!r}; try drawing them there."
            )
        return result

    def _find_plate(self, args: Any, kwargs: Any) -> str:
        if self._plate is None:
            structure = StructureReader(self._requested).look(self.bare[0], args, kwargs)
            if structure.layout is None:
                raise ValueError(
                    "Cannot anneal the KL divergence of local latents because the model has none: no latent site lies "
                    "in a plate that holds observed sites; try naming the plate with plate=..., or training without "
                    "annealing."
                )
            self._plate = structure.layout.plate
        return self._plate


class _Scaled(Messenger):
    """Scales the latent sites in a plate, and notes which they are."""

    def __init__(self, beta: float, plate: str, *, is_model: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.plate = plate
        self.is_model = is_model
        self.latents: set[str] = set()
        self.auxiliary: dict[bool, str] = {}
        self.point: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or (self.is_model and is_enumerated(msg)):
            return
        inside = any(frame.name == self.plate for frame in msg["cond_indep_stack"])
        if msg["infer"].get("is_auxiliary"):
            self.auxiliary[inside] = msg["name"]
        if inside:
            self.latents.add(msg["name"])
            self.point = msg["name"] if isinstance(msg["fn"], dist.Delta) else self.point
            msg["scale"] = msg["scale"] * self.beta

    def check_guide(self) -> None:
        """Refuses guides whose local latents are functions of one that is drawn outside of the plate."""
        if self.point is not None and False in self.auxiliary and True not in self.auxiliary:
            raise ValueError(
                f"Cannot anneal the KL divergence of site {self.point!r} because the guide draws it as a part of "
                f"{self.auxiliary[False]!r}, outside of plate {self.plate!r}; try AmortizedGuide, or AutoNormal."
            )
