"""Video transformers of diffusers."""

from attn_plugins.method import SiteKind
from attn_plugins.patches import grids
from attn_plugins.patches.family import Family
from attn_plugins.patches.processor_swap import ProcessorSwap

_SWAP = ProcessorSwap()
_CROSS: tuple[str, SiteKind] = (r"(transformer_)?blocks\.\d+\.attn2", "cross")
_SELF: tuple[str, SiteKind] = (r"(transformer_)?blocks\.\d+\.attn1", "self")

FAMILIES = (
    Family(
        name="wan",
        title="Wan 2.1 / 2.2",
        library="diffusers",
        classes=("WanTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=grids.patched_video,
        interception=_SWAP,
        notes="Both transformers of the A14B models share one schedule.",
    ),
    Family(
        name="hunyuan_video",
        title="HunyuanVideo",
        library="diffusers",
        classes=("HunyuanVideoTransformer3DModel",),
        sites=((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),),
        read=grids.hunyuan_video,
        interception=_SWAP,
        notes="Padded prompts are shorter text, per item.",
        extras={"key_padding": True},
    ),
    Family(
        name="ltx_video",
        title="LTX-Video",
        library="diffusers",
        classes=("LTXVideoTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=grids.ltx_video,
        interception=_SWAP,
        notes="Calls with conditioning tokens stay dense.",
    ),
    Family(
        name="cogvideox",
        title="CogVideoX 1.0 / 1.5",
        library="diffusers",
        classes=("CogVideoXTransformer3DModel",),
        sites=((r"transformer_blocks\.\d+\.attn1", "joint"),),
        read=grids.cogvideox,
        interception=_SWAP,
    ),
    Family(
        name="cosmos",
        title="Cosmos 1.0 / Predict2",
        library="diffusers",
        classes=("CosmosTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=grids.patched_video,
        interception=_SWAP,
        notes="Its cross-attention with image context (2.5) is not a site.",
    ),
)
