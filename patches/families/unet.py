"""Convolutional UNets of diffusers: one grid per level."""

from attn_plugins.method import SiteKind
from attn_plugins.patches.family import Family
from attn_plugins.patches.grids import unet
from attn_plugins.patches.processor_swap import ProcessorSwap

_SWAP = ProcessorSwap()
_SITES: tuple[tuple[str, SiteKind], ...] = (
    (r".*\.transformer_blocks\.\d+\.attn1", "self"),
    (r".*\.transformer_blocks\.\d+\.attn2", "cross"),
)
_EXTRAS = {"levels": {"Transformer2DModel": unet.feature_map}, "min_tokens": 1024}
_NOTES = "Levels of fewer than min_tokens tokens (1,024) stay dense."
_ADDED_SITES: tuple[tuple[str, SiteKind], ...] = ((r".*\.attentions\.\d+", "joint"),)
_ADDED_EXTRAS = {"levels": {_ADDED_SITES[0][0]: unet.feature_map_and_text}, "min_tokens": 1024}

FAMILIES = (
    Family(
        name="sd15",
        title="Stable Diffusion 1.x / 2.x",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": None},
        sites=_SITES,
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras=_EXTRAS,
    ),
    Family(
        name="sdxl",
        title="Stable Diffusion XL, Kolors",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": "text_time"},
        sites=_SITES,
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras=_EXTRAS,
    ),
    Family(
        name="kandinsky21",
        title="Kandinsky 2.1",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": "text_image"},
        sites=_ADDED_SITES,
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras=_ADDED_EXTRAS,
    ),
    Family(
        name="kandinsky22",
        title="Kandinsky 2.2",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": "image"},
        sites=_ADDED_SITES,
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras=_ADDED_EXTRAS,
    ),
    Family(
        name="deepfloyd_if",
        title="DeepFloyd IF",
        library="diffusers",
        classes=("UNet2DConditionModel",),
        config={"addition_embed_type": "text"},
        sites=_ADDED_SITES,
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras=_ADDED_EXTRAS,
    ),
    Family(
        name="kandinsky3",
        title="Kandinsky 3",
        library="diffusers",
        classes=("Kandinsky3UNet",),
        sites=(
            (r".*\.attentions\.0\.attention", "self"),
            (r".*\.attentions\.\d+\.attention", "cross"),
        ),
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={"levels": {"Kandinsky3AttentionBlock": unet.feature_map}, "min_tokens": 1024},
    ),
    Family(
        name="ddpm",
        title="DDPM, LDM without text",
        library="diffusers",
        classes=("UNet2DModel",),
        sites=((r".*\.attentions\.\d+", "self"),),
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={"levels": {r".*\.attentions\.\d+": unet.feature_map}, "min_tokens": 1024},
    ),
    Family(
        name="stable_cascade",
        title="Stable Cascade",
        library="diffusers",
        classes=("StableCascadeUNet",),
        sites=((r".*_blocks\.\d+\.\d+\.attention", "joint"),),
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={"levels": {"SDCascadeAttnBlock": unet.stable_cascade}, "min_tokens": 1024},
    ),
    Family(
        name="dreamlite",
        title="DreamLite",
        library="diffusers",
        classes=("DreamLiteUNetModel",),
        sites=_SITES,
        read=unet.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={**_EXTRAS, "levels": {"DreamLiteTransformer2DModel": unet.feature_map}},
    ),
    Family(
        name="amused",
        title="aMUSEd",
        library="diffusers",
        classes=("UVit2DModel",),
        sites=(
            (r"transformer_layers\.\d+\.attn1", "self"),
            (r"transformer_layers\.\d+\.attn2", "cross"),
            (r"(down|up)_block\.attention_blocks\.\d+\.attn[12]", "cross"),
        ),
        read=unet.uvit,
        interception=_SWAP,
    ),
)
