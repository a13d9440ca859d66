"""Convolutional UNets of diffusers: one grid per level."""

from collections.abc import Mapping
from typing import Any

from attn_plugins.patches.adapter_references import IPAdapterReferences
from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.family import Family, SequenceReader, SitePattern
from attn_plugins.patches.grids import unet
from attn_plugins.patches.longer_text import LongerText

MIN_TOKENS = 1024
_SITES: tuple[SitePattern, ...] = (
    (r".*\.transformer_blocks\.\d+\.attn1", "self"),
    (r".*\.transformer_blocks\.\d+\.attn2", "cross"),
)
_LEVELS = {"Transformer2DModel": unet.feature_map}
_ADDED_SITES: tuple[SitePattern, ...] = ((r".*\.attentions\.\d+", "joint"),)
_ADDED_LEVELS = {_ADDED_SITES[0][0]: unet.feature_map_and_text}


def _family(
    name: str,
    title: str,
    root: str,
    sites: tuple[SitePattern, ...],
    levels: Mapping[str, SequenceReader],
    references: IPAdapterReferences | None = None,
    **config: Any,
) -> Family:
    more: dict[str, Any] = {} if references is None else {"references": references, "prompts": LongerText()}
    return diffusers_family(
        name,
        title,
        root,
        sites,
        unet.by_level,
        notes=f"Levels of fewer than min_tokens tokens ({MIN_TOKENS:,}) stay dense.",
        config=config,
        levels=levels,
        min_tokens=MIN_TOKENS,
        **more,
    )


FAMILIES = (
    _family(
        "sd15",
        "Stable Diffusion 1.x / 2.x",
        "UNet2DConditionModel",
        _SITES,
        _LEVELS,
        IPAdapterReferences(),
        addition_embed_type=None,
    ),
    _family(
        "sdxl",
        "Stable Diffusion XL, Kolors",
        "UNet2DConditionModel",
        _SITES,
        _LEVELS,
        IPAdapterReferences(),
        addition_embed_type="text_time",
    ),
    _family(
        "kandinsky21",
        "Kandinsky 2.1",
        "UNet2DConditionModel",
        _ADDED_SITES,
        _ADDED_LEVELS,
        addition_embed_type="text_image",
    ),
    _family(
        "kandinsky22",
        "Kandinsky 2.2",
        "UNet2DConditionModel",
        _ADDED_SITES,
        _ADDED_LEVELS,
        addition_embed_type="image",
    ),
    _family(
        "deepfloyd_if",
        "DeepFloyd IF",
        "UNet2DConditionModel",
        _ADDED_SITES,
        _ADDED_LEVELS,
        addition_embed_type="text",
    ),
    _family(
        "kandinsky3",
        "Kandinsky 3",
        "Kandinsky3UNet",
        ((r".*\.attentions\.0\.attention", "self"), (r".*\.attentions\.\d+\.attention", "cross")),
        {"Kandinsky3AttentionBlock": unet.feature_map},
    ),
    _family(
        "ddpm",
        "DDPM, LDM without text",
        "UNet2DModel",
        ((r".*\.attentions\.\d+", "self"),),
        {r".*\.attentions\.\d+": unet.feature_map},
    ),
    _family(
        "stable_cascade",
        "Stable Cascade",
        "StableCascadeUNet",
        ((r".*_blocks\.\d+\.\d+\.attention", "joint"),),
        {"SDCascadeAttnBlock": unet.stable_cascade},
    ),
    _family(
        "dreamlite",
        "DreamLite",
        "DreamLiteUNetModel",
        _SITES,
        {"DreamLiteTransformer2DModel": unet.feature_map},
    ),
    diffusers_family(
        "amused",
        "aMUSEd",
        "UVit2DModel",
        (
            (r"transformer_layers\.\d+\.attn1", "self"),
            (r"transformer_layers\.\d+\.attn2", "cross"),
            (r"(down|up)_block\.attention_blocks\.\d+\.attn[12]", "cross"),
        ),
        unet.uvit,
    ),
)
