"""UNets of diffusers for video: attention within a frame, and over time at each place."""

from attn_plugins.method import SiteKind
from attn_plugins.patches import grids
from attn_plugins.patches.family import Family
from attn_plugins.patches.grids import video_unet
from attn_plugins.patches.processor_swap import ProcessorSwap

_SWAP = ProcessorSwap()
_NOTES = "Within a frame; over time alone (16 to 32 tokens), and below 1,024 tokens, it stays dense by min_tokens."
_SPATIAL: tuple[tuple[str, SiteKind], ...] = (
    (r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn1", "self"),
    (r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn2", "cross"),
)
# two self-attentions over time one after the other
_MOTION_BLOCK = r".*\.motion_modules\.\d+\.transformer_blocks\.\d+"
_TEMPORAL_BLOCK = r"(transformer_in|.*\.temp_attentions\.\d+)\.transformer_blocks\.\d+"


FAMILIES = (
    Family(
        name="animatediff",
        title="AnimateDiff",
        library="diffusers",
        classes=("UNetMotionModel",),
        sites=(*_SPATIAL, (_MOTION_BLOCK + r"\.attn[12]", "self")),
        read=grids.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={
            "levels": {"Transformer2DModel": grids.feature_map},
            "inner_levels": {_MOTION_BLOCK: video_unet.tokens_over_time},
            "min_tokens": 1024,
        },
    ),
    Family(
        name="text_to_video",
        title="ModelScope / ZeroScope text to video",
        library="diffusers",
        classes=("UNet3DConditionModel",),
        sites=(*_SPATIAL, (_TEMPORAL_BLOCK + r"\.attn[12]", "self")),
        read=grids.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={
            "levels": {"Transformer2DModel": grids.feature_map},
            "inner_levels": {_TEMPORAL_BLOCK: video_unet.tokens_over_time},
            "min_tokens": 1024,
        },
    ),
    Family(
        name="i2vgen_xl",
        title="I2VGen-XL",
        library="diffusers",
        classes=("I2VGenXLUNet",),
        sites=(*_SPATIAL, (_TEMPORAL_BLOCK + r"\.attn[12]", "self")),
        read=grids.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={
            "levels": {"Transformer2DModel": grids.feature_map},
            "inner_levels": {_TEMPORAL_BLOCK: video_unet.tokens_over_time},
            "min_tokens": 1024,
        },
    ),
    Family(
        name="svd",
        title="Stable Video Diffusion",
        library="diffusers",
        classes=("UNetSpatioTemporalConditionModel",),
        sites=(*_SPATIAL, (r".*\.temporal_transformer_blocks\.\d+\.attn1", "self")),
        read=grids.by_level,
        interception=_SWAP,
        notes=_NOTES,
        extras={
            "levels": {"TransformerSpatioTemporalModel": grids.feature_map},
            "inner_levels": {"TemporalBasicTransformerBlock": video_unet.frames},
            "min_tokens": 1024,
        },
    ),
)
