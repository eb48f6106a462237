"""Which model structures work under which guides and ELBOs, found by running them.

Every combination is set up, trained for two steps and called with a second batch. Where it runs, the ELBO of a draw is
compared with a sum over the traces of guide and model, and Renyi's bound of several draws with the weights of all that
these sums are kept apart for, so that no combination can be silently wrong. Rewrite the tables
of the documentation by ``python tests/compatibility.py --write``.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from compatible_structures import ELBOS, STRUCTURES, Structure, explicit_subsample, local_latents, normal
from elbos_by_hand import NESTING, bound_by_hand, elbo_by_hand, enumerated_elbo_by_hand, model_sites, trace_sites
from pyro import poutine
from pyro.infer import (
    CSIS,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor

from pyro_amortized import (
    AmortizedGuide,
    DiscreteAmortizedGuide,
    IterativeAmortizedGuide,
    PerDatapointGuide,
    SemiAmortizedGuide,
)

__all__ = [
    "FAMILIES",
    "GUIDES",
    "LOSSES",
    "NESTED",
    "TABLE",
    "WORKS",
    "cell",
    "family_outcomes",
    "loss_outcome",
    "outcome",
    "outcomes",
    "page",
]

TABLE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
WORKS = "works"
TOLERANCE = 1e-7

GUIDES: dict[str, Callable[..., Any]] = {
    "AmortizedGuide": AmortizedGuide,
    "SemiAmortizedGuide": partial(SemiAmortizedGuide, num_steps=1, keep_best=False),
    "IterativeAmortizedGuide": partial(IterativeAmortizedGuide, num_steps=1, num_particles=1, keep_best=False),
    "PerDatapointGuide": PerDatapointGuide,
    "DiscreteAmortizedGuide": DiscreteAmortizedGuide,
}
FAMILIES = ("normal", "multivariate_normal", "low_rank_multivariate_normal", "structured", "mixture", "flow")


# Outcomes


@contextmanager
def _double_precision() -> Iterator[None]:
    """Double precision, validation, an empty parameter store, and warnings as errors, as in the tests.

    But for Pyro's advice to enumerate what other ELBOs than ``TraceEnum_ELBO`` draw.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        with pyro.validation_enabled(True), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "(?s).*If you want to enumerate sites, you need to use TraceEnum_ELBO")
            yield
    finally:
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()


def outcome(structure: Structure, Guide: str, Elbo: str) -> str:
    """What comes of a structure under a guide and an ELBO: ``"works"``, or the first sentence of the refusal.

    Raises:
        AssertionError: If the ELBO is not the sum over the traces.
    """
    return outcomes(structure, Guide)[Elbo]


def outcomes(structure: Structure, Guide: str) -> dict[str, str]:
    """The outcomes of a structure and a guide by ELBO; the guide is set up once."""
    with _double_precision():
        options = dict(structure.options)
        if structure.encoder is not None and Guide != "PerDatapointGuide":
            options["encoder"] = structure.encoder()
        guide = GUIDES[Guide](structure.model, **options)
        first, second = structure.batches()
        try:
            guide.setup(*first)
        except ValueError as error:
            return dict.fromkeys(structure.elbos, _first_sentence(error))
        return {Elbo: _run(structure, guide, Elbo, first, second) for Elbo in structure.elbos}


def _run(structure: Structure, guide: Any, Elbo: str, first: tuple[Any, ...], second: tuple[Any, ...]) -> str:
    elbo = ELBOS[Elbo](max_plate_nesting=NESTING)
    svi = SVI(structure.model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    result = WORKS
    for batch in (first, second):
        try:
            losses = [svi.step(*batch) for _ in range(2)]
        except (ValueError, NotImplementedError) as error:
            refused = _first_sentence(error)
            return refused if batch is first else f"{result} for the first batch, then: {refused}"
        if not torch.tensor(losses).isfinite().all():
            raise AssertionError(f"losses {losses} of {structure.title!r} under {Elbo}")
        _check_number(structure, guide, Elbo, elbo, batch)
    return result


@torch.no_grad()
def _check_number(structure: Structure, guide: Any, Elbo: str, elbo: Any, batch: tuple[Any, ...]) -> None:
    """Compares the loss with the computation by hand on the same noise."""
    model, analytic = structure.model, Elbo == "TraceMeanField_ELBO"
    guide(*batch)
    pyro.set_rng_seed(5)
    loss = elbo.loss(model, guide, *batch)
    pyro.set_rng_seed(5)
    if structure.drawn is not None and Elbo == "TraceEnum_ELBO" and not _is_observed(structure, batch):
        expected = enumerated_elbo_by_hand(model, guide, structure.drawn, *batch)
    elif Elbo == "RenyiELBO":
        expected = bound_by_hand(model, guide, *batch, count=elbo.num_particles)
    else:
        expected = elbo_by_hand(model, guide, *batch, analytic=analytic, enumerated=structure.enumerated)
    _compare(f"{structure.title!r} under {Elbo}", -loss, expected)


def _is_observed(structure: Structure, batch: tuple[Any, ...]) -> bool:
    with torch.random.fork_rng():
        return poutine.trace(structure.model).get_trace(*batch).nodes[structure.drawn]["is_observed"]


def _compare(what: str, found: float, expected: float) -> None:
    if not abs(found - expected) <= TOLERANCE * max(1.0, abs(expected)):
        raise AssertionError(f"{what}: the ELBO is {found} and should be {expected}")


def _first_sentence(error: Exception) -> str:
    """Up to the remedy."""
    return re.split(r"; try|\. |\n", str(error))[0].rstrip(".")


# Families of distributions by how plates are nested

NESTED = (
    "local latents",
    "local and global latents",
    "inner plate on the left of the datapoints",
    "inner plate on the right, datapoints at dim -2",
    "datapoints at dim -3, two inner plates",
    "all sites in an inner plate on the left",
    "all sites in two inner plates, a global latent in one of them",
    "a dimension outside of all plates",
    "observations in a subsampled inner plate",
    "`subsample=indices`",
)
"""Titles of the structures that every family is tried on. (Under masks a joint q has a normal prior in place of what is
masked, which the computation by hand does not know: exact evidence tests it.)"""


def family_outcomes(title: str, family: str) -> dict[str, str]:
    """What comes of a structure under a family, by ELBO; as for :func:`outcomes`."""
    (entry,) = (entry for entry in STRUCTURES if entry.title == title)
    entry = replace(entry, options={**entry.options, "family": family, "init_scale": 0.7})
    return outcomes(entry, "AmortizedGuide")


# Other ways to compute a loss, each on one model

Batch = tuple[Tensor, Tensor]


def _by_hand_in_order(guide: Any, batch: Batch, count: int) -> list[float]:
    return [elbo_by_hand(explicit_subsample, guide, *batch) for _ in range(count)]


def _particles(Elbo: Any, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Draws one after the other, the ELBO their mean."""
    SVI(explicit_subsample, guide, pyro.optim.Adam({"lr": 1e-3}), Elbo(num_particles=3)).step(*batch)
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = Elbo(num_particles=3).loss(explicit_subsample, guide, *batch)
        pyro.set_rng_seed(5)
        return [(-loss, sum(_by_hand_in_order(guide, batch, 3)) / 3)]


def _in_particles(fn: Callable[..., Any], size: int = 3) -> Callable[..., Any]:
    def vectorized(*args: Any, **kwargs: Any) -> None:
        with pyro.plate("particles", size, dim=-2):
            fn(*args, **kwargs)

    return vectorized


def _vectorized_particles(Elbo: Any, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Draws in a plate of particles, the ELBO their mean."""
    elbo = Elbo(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    SVI(explicit_subsample, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(*batch)
    analytic = Elbo is TraceMeanField_ELBO
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = elbo.loss(explicit_subsample, guide, *batch)
        pyro.set_rng_seed(5)
        total = elbo_by_hand(_in_particles(explicit_subsample), _in_particles(guide), *batch, analytic=analytic)
        return [(-loss, total / 3)]


def _importance_weighted(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Renyi's bound of order 0, which averages the weights of every datapoint on its own."""
    elbo = RenyiELBO(alpha=0, num_particles=4)
    SVI(_local_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(*batch)
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = elbo.loss(_local_explicit, guide, *batch)
        pyro.set_rng_seed(5)
        log_p, log_q = _draws(guide, batch, 4)
        return [(-loss, ((log_p - log_q).logsumexp(0) - math.log(4)).sum().item())]


def _datapoints(guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p and log q of a draw, of every datapoint, as often as each counts."""
    guide_trace = poutine.trace(guide).get_trace(*batch)
    model_trace = poutine.trace(poutine.replay(_local_explicit, guide_trace)).get_trace(*batch)
    z, x = guide_trace.nodes["z"]["value"], model_trace.nodes["x"]
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x["value"])
    scale = len(batch[0]) / len(batch[1])
    return scale * log_p, scale * guide_trace.nodes["z"]["fn"].log_prob(z)


def _module(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """``elbo(model, guide)`` with a torch optimizer."""
    elbo = Trace_ELBO()(explicit_subsample, guide)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-3)
    elbo(*batch).backward()
    optimizer.step()
    with torch.no_grad():
        pyro.set_rng_seed(5)
        loss = elbo(*batch).item()
        pyro.set_rng_seed(5)
        return [(-loss, elbo_by_hand(explicit_subsample, guide, *batch))]


def _compiled(Elbo: Any, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """The loss that has been compiled for one batch, on other data of its shape."""
    options = {"strict_enumeration_warning": False} if Elbo is JitTraceEnum_ELBO else {}
    elbo = Elbo(ignore_jit_warnings=True, max_plate_nesting=1, **options)
    SVI(local_latents, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(batch[0])
    results = []
    for data in (batch[0], batch[0].flip(0) - 1.0):
        pyro.set_rng_seed(5)
        loss = elbo.loss_and_grads(local_latents, guide, data)
        pyro.set_rng_seed(5)
        results.append((-loss, elbo_by_hand(local_latents, guide, data)))
    return results


def _compiled_mean_field(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """This compiled ELBO uses up other random numbers, with Pyro's guides too: q is made so narrow that it has none."""
    elbo = JitTraceMeanField_ELBO(ignore_jit_warnings=True)
    SVI(local_latents, guide, pyro.optim.Adam({"lr": 1e-12}), elbo).step(batch[0])
    results = []
    for data in (batch[0], batch[0].flip(0) - 1.0):
        loss = elbo.loss_and_grads(local_latents, guide, data)
        results.append((-loss, elbo_by_hand(local_latents, guide, data, analytic=True)))
    return results


def _wake_sleep(vectorized: bool, guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """Reweighted wake-sleep: the bound that trains the model, and the guide's loss, half wake and half sleep."""
    loss = ReweightedWakeSleep(
        num_particles=3,
        insomnia=0.5,
        model_has_params=True,
        num_sleep_particles=1,
        vectorize_particles=vectorized,
        max_plate_nesting=1,
    )
    SVI(_local_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step(*batch)
    with torch.no_grad():
        pyro.set_rng_seed(5)
        bound, both = (value.item() for value in loss.loss(_local_explicit, guide, *batch))
        pyro.set_rng_seed(5)
        log_p, log_q = _log_probs_in_particles(guide, batch) if vectorized else _log_probs(guide, batch)
        log_weights = log_p - log_q
        wake = -(log_weights.softmax(0) * log_q).sum().item()
        sleep = -_simulated_log_q(guide, batch)
    return [(-bound, log_weights.logsumexp(0).item() - math.log(3)), (-both, -0.5 * (wake + sleep))]


def _draws(guide: Any, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """log p and log q of several draws, one after the other, of every datapoint."""
    log_p, log_q = zip(*(_datapoints(guide, batch) for _ in range(count)), strict=True)
    return torch.stack(log_p), torch.stack(log_q)


def _log_probs(guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p and log q of three draws, one after the other."""
    log_p, log_q = _draws(guide, batch, 3)
    return log_p.sum(-1), log_q.sum(-1)


def _log_probs_in_particles(guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p and log q of three draws in a plate."""
    guide_trace = poutine.trace(_in_particles(guide)).get_trace(*batch)
    posterior = trace_sites(guide_trace)
    prior = model_sites(_in_particles(_local_explicit), guide_trace, batch, {}, {})
    totals = []
    for sites in (prior, posterior):
        parts = [site["scale"] * site["fn"].log_prob(site["value"]) for site in sites.values()]
        totals.append(torch.stack([part.reshape(3, -1).sum(-1) for part in parts]).sum(0))
    return totals[0], totals[1]


def _simulated_log_q(guide: Any, batch: Batch) -> float:
    """log q, given data simulated by the model, of the latents that they were simulated from."""
    trace = poutine.trace(poutine.uncondition(_local_explicit)).get_trace(*batch)
    observations = {"x": trace.nodes["x"]["value"]}
    guide_trace = poutine.trace(poutine.replay(guide, trace)).get_trace(*batch, observations=observations)
    z, scale = trace.nodes["z"]["value"], len(batch[0]) / len(batch[1])
    if not torch.equal(guide_trace.nodes["z"]["value"], z):
        raise AssertionError("the guide has not been given the simulated latents")
    return scale * guide_trace.nodes["z"]["fn"].log_prob(z).sum().item()


def _compiled_inference(guide: Any, batch: Batch) -> list[tuple[float, float]]:
    """CSIS, Pyro's inference compilation."""
    csis = CSIS(_local_explicit, guide, pyro.optim.Adam({"lr": 1e-3}), training_batch_size=2)
    csis.step(*batch)
    pyro.set_rng_seed(5)
    loss = csis.loss_and_grads(False, None, *batch)
    pyro.set_rng_seed(5)
    return [(-loss, sum(_simulated_log_q(guide, batch) for _ in range(2)) / 2)]


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {}
"""What computes loss and expectation, the model, and the guide's options, by what the table calls it."""


def _local_explicit(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


for _Elbo in (Trace_ELBO, TraceGraph_ELBO):
    LOSSES[f"`{_Elbo.__name__}(num_particles=3)`"] = partial(_particles, _Elbo), explicit_subsample, {}
for _Elbo in (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO):
    LOSSES[f"`{_Elbo.__name__}(num_particles=3, vectorize_particles=True)`"] = (
        partial(_vectorized_particles, _Elbo),
        explicit_subsample,
        {},
    )
LOSSES["`RenyiELBO(alpha=0, num_particles=4)`"] = _importance_weighted, _local_explicit, {}
LOSSES["`Trace_ELBO()(model, guide)` with a torch optimizer"] = _module, explicit_subsample, {}
for _Elbo in (JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO):
    LOSSES[f"`{_Elbo.__name__}`"] = partial(_compiled, _Elbo), local_latents, {}
LOSSES["`JitTraceMeanField_ELBO`"] = _compiled_mean_field, local_latents, {"init_scale": 1e-12}
LOSSES["`ReweightedWakeSleep`"] = partial(_wake_sleep, False), _local_explicit, {}
LOSSES["`ReweightedWakeSleep(vectorize_particles=True)`"] = partial(_wake_sleep, True), _local_explicit, {}
LOSSES["`CSIS`"] = _compiled_inference, _local_explicit, {}


def loss_outcome(title: str, Guide: str) -> str:
    """What comes of a loss under a guide; results and exceptions as for :func:`outcome`."""
    compute, model, options = LOSSES[title]
    with _double_precision():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        guide = GUIDES[Guide](model, **options)
        x, index = normal(8), torch.tensor([7, 2, 4])
        guide.setup(*((x,) if model is local_latents else (x, index)))
        try:
            results = compute(guide, (x, index))
        except ValueError as error:
            return _first_sentence(error)
        for found, expected in results:
            _compare(f"{title} and {Guide}", found, expected)
        return WORKS


# The tables


def page(
    results: Mapping[tuple[str, str], Mapping[str, str]],
    losses: Mapping[tuple[str, str], str],
    families: Mapping[tuple[str, str], Mapping[str, str]],
) -> str:
    """The page of the documentation, from outcomes by structure and guide, loss and guide, and structure and family."""
    notes: list[str] = []
    head = f" | {' | '.join(f'`{name}`' for name in GUIDES)} |\n| --- |" + " --- |" * len(GUIDES)
    lines = [f"| model{head}"]
    for entry in STRUCTURES:
        cells = [cell(results[entry.title, name], notes) for name in GUIDES]
        lines.append(f"| {entry.title} | {' | '.join(cells)} |")
    lines += ["", _LOSSES_HEAD, f"| loss{head}"]
    for title in LOSSES:
        lines.append(f"| {title} | {' | '.join(_text(losses[title, name], notes) for name in GUIDES)} |")
    lines += ["", _FAMILIES_HEAD, f"| family | {' | '.join(f'`{name}`' for name in FAMILIES)} |"]
    lines.append("| --- |" + " --- |" * len(FAMILIES))
    for title in NESTED:
        lines.append(f"| {title} | {' | '.join(cell(families[title, name], notes) for name in FAMILIES)} |")
    footnotes = [f"{i}. {_literal(note)}" for i, note in enumerate(notes, 1)]
    return "\n".join([_HEAD, *lines, "", _FOOT, "", *footnotes, ""])


_HEAD = """# What works with what

Each row is a small model, each column a guide. A plain *yes* means that the guide ran under every one of
`Trace_ELBO`, `TraceMeanField_ELBO`, `TraceGraph_ELBO`, `TraceEnum_ELBO` and `RenyiELBO`, with a second batch of another
size too, and that every ELBO equalled a sum over the sites of guide and model done by hand, and Renyi's bound (of order
0, with three draws) the mean of their weights. The numbers lead to the
error messages below; models that are refused are refused with a message, never served with a wrong ELBO.

This page is written by `python tests/compatibility.py --write`, and a test compares it with what the code does.
"""

_LOSSES_HEAD = """Other ways to train, on a model with a subsampled plate of datapoints. *Yes* means again that a step
of training ran and that the loss equalled a computation by hand.
"""

_FAMILIES_HEAD = """Families of distributions by how plates are nested, under `AmortizedGuide` and all these ELBOs.
`RenyiELBO` takes the mean weight of several draws for every entry of the plates that hold all sites of a model; along a
dimension outside of all plates too, where Pyro is told of no independence: it is a bound only if the entries are
independent and every site has the dimension, whatever the guide.
"""

_FOOT = """*first batch only*: the batch that the guide was set up with works, and the second of these models is refused
with the message given. A `PerDatapointGuide` has no answer for datapoints outside its table.

The messages, without the remedies that end them:"""


def cell(by_elbo: Mapping[str, str], notes: list[str]) -> str:
    """One cell: yes or no for all ELBOs alike, else by ELBO."""
    texts = {Elbo: _text(result, notes) for Elbo, result in by_elbo.items()}
    distinct = list(dict.fromkeys(texts.values()))
    if len(distinct) == 1:
        only = f" under `{next(iter(texts))}`" if len(texts) == 1 else ""
        return distinct[0] + only
    return "; ".join(f"{text} under {', '.join(f'`{e}`' for e in texts if texts[e] == text)}" for text in distinct)


def _text(result: str, notes: list[str]) -> str:
    if result == WORKS:
        return "yes"
    start, _, message = result.rpartition(", then: ")
    if message not in notes:
        notes.append(message)
    return f"{'first batch only' if start else 'no'} [{notes.index(message) + 1}]"


def _literal(message: str) -> str:
    return f"`{message}`" if "`" not in message else f"`` {message} ``"


def _all_results() -> tuple[Any, Any, Any]:
    found = {(entry.title, name): outcomes(entry, name) for entry in STRUCTURES for name in GUIDES}
    losses = {(title, name): loss_outcome(title, name) for title in LOSSES for name in GUIDES}
    return found, losses, {(title, name): family_outcomes(title, name) for title in NESTED for name in FAMILIES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = page(*_all_results())
    if "--write" in sys.argv:
        TABLE.write_text(text)
    else:
        print(text)
