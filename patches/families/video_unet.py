"""UNets of diffusers for video: attention within a frame, and over time at each place."""

from collections.abc import Mapping

from attn_plugins.patches import grids
from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.families.unet import MIN_TOKENS
from attn_plugins.patches.family import Family, SequenceReader, SitePattern
from attn_plugins.patches.grids import video_unet

_SPATIAL: tuple[SitePattern, ...] = (
    (r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn1", "self"),
    (r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn2", "cross"),
)
_NOTES = (
    f"Within a frame; over time alone (16 to 32 tokens), and below {MIN_TOKENS:,} tokens, it stays dense by min_tokens."
)


def _family(
    name: str,
    title: str,
    root: str,
    over_time: str,
    inner_levels: Mapping[str, SequenceReader],
    level: str = "Transformer2DModel",
) -> Family:
    return diffusers_family(
        name,
        title,
        root,
        (*_SPATIAL, (over_time, "self")),
        grids.by_level,
        notes=_NOTES,
        levels={level: grids.feature_map},
        inner_levels=inner_levels,
        min_tokens=MIN_TOKENS,
    )


def _over_time(block: str) -> tuple[str, dict[str, SequenceReader]]:
    """Blocks of two self-attentions over time, one after the other: those, and what a block's tokens are."""
    return block + r"\.attn[12]", {block: video_unet.tokens_over_time}


_MOTION = _over_time(r".*\.motion_modules\.\d+\.transformer_blocks\.\d+")
_TEMPORAL = _over_time(r"(transformer_in|.*\.temp_attentions\.\d+)\.transformer_blocks\.\d+")

FAMILIES = (
    _family("animatediff", "AnimateDiff", "UNetMotionModel", *_MOTION),
    _family("text_to_video", "ModelScope / ZeroScope text to video", "UNet3DConditionModel", *_TEMPORAL),
    _family("i2vgen_xl", "I2VGen-XL", "I2VGenXLUNet", *_TEMPORAL),
    _family(
        "svd",
        "Stable Video Diffusion",
        "UNetSpatioTemporalConditionModel",
        r".*\.temporal_transformer_blocks\.\d+\.attn1",
        {"TemporalBasicTransformerBlock": video_unet.frames},
        "TransformerSpatioTemporalModel",
    ),
)
