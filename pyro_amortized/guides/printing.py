"""How guides print."""

from __future__ import annotations

from html import escape
from typing import Any

from pyro_amortized.inference.refined import start_of
from pyro_amortized.structure.signature import named_function

__all__ = ["describe", "describe_in_html"]


def describe(guide: Any) -> str:
    """The model, its sites, and what guides them, before and after a guide is set up."""
    model = guide.model_at_hand
    name = "none at hand" if model is None else getattr(named_function(model), "__qualname__", type(model).__name__)
    lines = [f"{type(guide).__name__} {guide._pyro_name!r}", f"  model: {name.removesuffix('.forward')}"]
    structure = guide._built_structure
    if structure is None:
        family = guide._family_spec if isinstance(guide._family_spec, str) else "of your own"
        plate = "that of the observed sites" if guide.plate is None else guide.plate
        lines += [f"  plate: {plate}", f"  family: {family}"]
        return "\n".join([*lines, "  not set up yet: the first call, or guide.setup(...), looks at the model"])
    modules, family = guide._modules, guide._modules.get("family")
    sites = () if structure.layout is None else structure.layout.sites
    local = [f"{s.name} ({' '.join([str(s.stop - s.start), *(f'in {p}' for p in s.inner_plates)])})" for s in sites]
    local += [f"{site.name} (discrete)" for site in structure.discrete]
    lines += [f"  plate: {structure.plate}"] if structure.plate is not None else []
    lines += [f"  local latents: {', '.join(local) or 'none'}"]
    within = f" (in {', '.join(structure.global_plates)})" if structure.global_plates else ""
    lines += [f"  global latents: {', '.join(structure.global_sites) or 'none'}{within}"]
    lines += [f"  data: {', '.join(structure.data) or 'none'}"]
    lines += [f"  in long format: plates {', '.join(guide.groups)}"] if guide.groups else []
    lines += [f"  family: {type(family).__name__} of {family.latent_dim} dimensions"] if family is not None else []
    encoder = getattr(start_of(modules.get("inference")), "encoder", None)
    seen = _seen(guide) if encoder is not None else ""
    lines += [f"  encoder sees: {seen}"] if seen else []
    steps = getattr(guide, "num_steps", 0)
    rule = getattr(modules.get("inference"), "update", None)
    lines += [f"  refined by: {steps} steps of {type(rule).__name__}"] if rule is not None else []
    parts = {"encoder": encoder, "inference": modules.get("inference"), "global guide": modules.get("global_guide")}
    lines += [f"  {what}: {type(module).__name__}" for what, module in parts.items() if module is not None]
    return "\n".join([*lines, f"  parameters: {sum(p.numel() for p in guide.parameters()):,}"])


def _seen(guide: Any) -> str:
    """What the encoder sees, by plate where it was said so."""
    if guide._encoder_plates:
        plates = dict.fromkeys(guide._encoder_plates.values())
        return "; ".join(
            f"{plate}: {', '.join(name for name, of in guide._encoder_plates.items() if of == plate)}"
            for plate in plates
        )
    if callable(guide._encoder_input):
        return "what encoder_input makes of the arguments"
    named = guide._encoder_input
    names = guide._seen_sites if named is None else [named] if isinstance(named, str) else named
    shown = [name for name in guide._shown_masks if name in names]
    return ", ".join(names) + (f", and what is missing of {', '.join(shown)}" if shown else "")


def describe_in_html(guide: Any) -> str:
    """The same as a table."""
    heading, *lines = describe(guide).splitlines()
    cells = [
        (escape(part) for part in (line.strip().partition(": ") if ": " in line else ("", "", line))) for line in lines
    ]
    rows = "".join(f'<tr><th style="text-align: left">{what}</th><td>{said}</td></tr>' for what, _, said in cells)
    return f"<strong>{escape(heading)}</strong><table>{rows}</table>"
