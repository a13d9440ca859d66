"""Convolutional UNets of diffusers: one grid per level."""

from attn_plugins.method import SiteKind
from attn_plugins.patches import grids
from attn_plugins.patches.family import Family
from attn_plugins.patches.processor_swap import ProcessorSwap

_SITES: tuple[tuple[str, SiteKind], ...] = (
    (r".*\.transformer_blocks\.\d+\.attn1", "self"),
    (r".*\.transformer_blocks\.\d+\.attn2", "cross"),
)
_EXTRAS = {"levels": "Transformer2DModel", "read_level": grids.feature_map, "min_tokens": 1024}
_NOTES = "Levels of fewer than min_tokens tokens (1,024) stay dense."

FAMILIES = (
    Family(
        name="sd15",
        title="Stable Diffusion 1.x / 2.x",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": None},
        sites=_SITES,
        read=grids.by_level,
        interception=ProcessorSwap(),
        notes=_NOTES,
        extras=_EXTRAS,
    ),
    Family(
        name="sdxl",
        title="Stable Diffusion XL",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": "text_time"},
        sites=_SITES,
        read=grids.by_level,
        interception=ProcessorSwap(),
        notes=_NOTES,
        extras=_EXTRAS,
    ),
)
