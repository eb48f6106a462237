"""What ranks that are not uniform say about a guide, in words."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_amortized.diagnostics.calibration.uniformity import UniformityTest

__all__ = ["DENSITY", "JOINT", "LEVEL", "TARP", "advice", "findings"]

LEVEL = 0.05
"""Probability that an exact posterior fails in any quantity, at most."""
JOINT, DENSITY, TARP = "log_joint", "log_q", "tarp"
"""The quantities beside the latents: log p(x, z), log q(z | x), and the distance to a random reference point."""

_OTHER = "another shape: skewness, tails or modes"


def findings(names: list[str], test: UniformityTest, p_adjusted: list[float]) -> list[str]:
    """What is wrong with each quantity; ``"ok"`` if its adjusted p-value is not small.

    Args:
        names: Of the Q quantities.
        test: The tests of all quantities.
        p_adjusted: p-values adjusted for their number.
    """
    found = []
    for i, name in enumerate(names):
        p_shift, p_spread, p_ecdf = (float(p[i]) for p in (test.p_shift, test.p_spread, test.p_ecdf))
        small = max(LEVEL / (3 * len(names)), min(p_shift, p_spread, p_ecdf))
        enough = LEVEL if name in (JOINT, DENSITY) else small  # their sign is all that is said of them
        shift = float(test.shift[i]) if p_shift <= enough else 0.0
        spread = float(test.spread[i]) if p_spread <= small else 1.0
        found.append("ok" if p_adjusted[i] >= LEVEL else _in_words(name, shift, spread))
    return found


def _in_words(name: str, shift: float, spread: float) -> str:
    """The finding for a shift and a spread of the normal scores, 0 and 1 if there is nothing to say of them."""
    if name == JOINT and shift:
        return f"draws {'less' if shift > 0 else 'more'} probable than the truth"
    if name == DENSITY and shift:
        return "underconfident: regions cover too often" if shift > 0 else "overconfident: regions cover too rarely"
    if name in (JOINT, DENSITY):
        return _OTHER
    said = []
    if spread < 1:
        said.append("too wide (overdispersed, hump-shaped ranks)")
    elif spread > 1:
        said.append("too narrow (underdispersed, U-shaped ranks)")
    if name == TARP and shift:
        said.append(f"draws too {'close to' if shift > 0 else 'far from'} random points")
    if name != TARP and spread != 1.0:
        said[0] += f", scale about {1 / spread:.2f} of the right one"
    if name != TARP and shift:
        said.append(f"biased {'low' if shift > 0 else 'high'} by about {abs(shift):.2f} of its sd")
    return "; ".join(said) or _OTHER


def advice(found: Mapping[str, str]) -> list[str]:
    """What to try, given the findings by quantity."""
    failing = {name: text for name, text in found.items() if text != "ok"}
    if not failing:
        return []
    said = " ".join(failing.values())
    lines = []
    others = {JOINT, DENSITY, TARP}
    if set(failing) <= others and len(found) > len(others) + 1:
        lines.append('latents are right one by one and wrong together: try family="multivariate_normal"')
    elif "too narrow" in said:
        lines.append(
            'too narrow: try a richer family such as "multivariate_normal", longer training with a KL term of no less '
            "than its full weight, guide.refined(20)"
        )
    if "too wide" in said:
        lines.append("too wide: try longer training with a KL term of no more than its full weight, guide.refined(20)")
    if "biased" in said:
        lines.append("biased: try a larger encoder, an encoder_input with all data and covariates, guide.refined(20)")
    if "another shape" in said:
        lines.append(
            'another shape: try a more flexible family, "mixture" or "flow"; plot("ecdf") shows how much it matters'
        )
    return [
        *lines,
        "estimate_gaps tells whether family or encoder is to blame, on the observed data",
        "an encoder trained on data that are unlike the model's simulations may fail here and serve its data well",
    ]
