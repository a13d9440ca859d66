"""A row of a model of diffusers: the processors of its attention modules are swapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_plugins.patches.family import Family, SequenceReader, SitePattern
from attn_plugins.patches.processor_swap import ProcessorSwap
from attn_plugins.patches.shapes import of_attention

_SWAP = ProcessorSwap()


def diffusers_family(
    name: str,
    title: str,
    classes: str | tuple[str, ...],
    sites: tuple[SitePattern, ...],
    read: SequenceReader,
    *,
    notes: str = "",
    config: Mapping[str, Any] | None = None,
    **extras: Any,
) -> Family:
    """A `Family`, whose arguments these are; one class may be given by its name alone."""
    return Family(
        name=name,
        title=title,
        library="diffusers",
        classes=(classes,) if isinstance(classes, str) else classes,
        sites=sites,
        read=read,
        interception=_SWAP,
        notes=notes,
        shape=of_attention,
        extras=extras,
        config=config or {},
    )
