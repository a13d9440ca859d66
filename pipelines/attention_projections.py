"""Which layers of a model a LoRA of its attention goes on."""

from __future__ import annotations

from torch import nn

from attn_plugins import registry


def attention_projections(model: nn.Module) -> list[str]:
    """The linear layers of a model's attention, by their whole names.

    Raises:
        ValueError: a model that no family knows.
    """
    family = registry.family_of(model)
    if family is None:
        raise ValueError(f"no family of models knows {type(model).__name__}: `attn-plugins families` lists them")
    return [
        f"{site.name}.{name}"
        for site in family.find_sites(model)
        for name, part in site.module.named_modules()
        if isinstance(part, nn.Linear)
    ]
