"""Which structures may be refused, and by which words."""

from __future__ import annotations

from collections.abc import Callable

from structures import Structure

__all__ = ["is_needed"]

DIAGNOSTICS = ("evidence", "gaps", "arviz", "refined")
REFUSALS: list[tuple[Callable[[Structure, str], bool], str]] = [
    (lambda s, check: s.guide.kind == "PerDatapointGuide", "Cannot look up variational parameters"),
    (lambda s, check: s.state is not None and s.state[1] in ("dim", "size"), "since the guide was set up"),
    (lambda s, check: s.state is not None and s.state[1] == "dim", "datapoint plate is now"),
    (lambda s, check: s.state is not None, "Cannot"),
    (lambda s, check: s.outside != "none", "outside"),
    (lambda s, check: s.entrywise and s.guide.family != "normal", 'family="normal"'),
    (lambda s, check: s.subsampled_inner, "subsample"),
    (lambda s, check: s.subsampled_inner, "this call sees only"),
    (lambda s, check: s.scale in ("number", "tensor") and s.mask == "obs_mask", "scale"),  # one part of the latents
    (lambda s, check: s.scale == "tensor_all" and s.guide.family != "normal", "scale"),
    (lambda s, check: s.scale in ("all", "tensor_all") and check in DIAGNOSTICS, "a scaled prior is no density"),
    (lambda s, check: s.guide.kind == "IterativeAmortizedGuide" and s.guide.encoder == "pair", "returns a pair in"),
    (lambda s, check: s.guide.kind == "IterativeAmortizedGuide" and s.guide.encoder == "steps", "a row per datapoint"),
    (lambda s, check: s.numpy and s.guide.sees in ("name", "names"), "Cannot encode ['ndarray'"),
    (lambda s, check: s.guide.encoder == "steps" and s.mask == "obs_mask", "are not numbered alike"),
    (lambda s, check: s.has_anonymous and s.guide.family == "flow", "dimension -1 outside of all plates"),
    (lambda s, check: s.guide.sees == "names" and check in ("elbo", "renyi"), "vectorize_particles=False"),
    (lambda s, check: s.guide.kind == "SemiAmortizedGuide", "refinement has diverged"),  # by steps of a fixed size
    (lambda s, check: s.guide.family == "structured", "Cannot find which local latents depend on which"),
    (lambda s, check: s.guide.family == "structured" and _collide(s), "Cannot couple latents of level"),
    (lambda s, check: s.mask != "none" and s.guide.sees in ("name", "names"), "no log-probability in it is seen to"),
]
"""A structure and a check that may be refused, and a part of the message; everything else is refused without need."""


def _collide(s: Structure) -> bool:
    """Whether entries of inner plates may be coupled in the posterior.

    By a child that they share, by one with parents in two plates of which neither lies in the other, or by a discrete
    latent.
    """
    children = [(i, site) for i, site in enumerate(s.latents) if site.depends]
    children += [(len(s.latents), site) for site in s.observed]
    shared = any(
        not {*parent.plates} <= {*child.plates} or parent.anonymous > child.anonymous
        for i, child in children
        for parent in s.latents[:i]
    )
    crossed = any(
        not {*one.plates} <= {*other.plates} and not {*other.plates} <= {*one.plates}
        for i, _ in children
        for j, one in enumerate(s.latents[:i])
        for other in s.latents[:j]
    )
    return shared or crossed or s.discrete != "none"


def is_needed(structure: Structure, check: str, message: str) -> bool:
    """Whether a refusal is one that the structure needs."""
    return any(applies(structure, check) and words in message for applies, words in REFUSALS)
