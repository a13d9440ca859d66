"""Wan and what is made from it: attention over the video alone, text by cross-attention."""

from typing import Any

from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.family import Family, SequenceReader, SitePattern
from attn_plugins.patches.grids import video, video_references
from attn_plugins.patches.longer_text import LongerText

_SITES: tuple[SitePattern, ...] = ((r"(vace_)?blocks\.\d+\.attn1", "self"), (r"(vace_)?blocks\.\d+\.attn2", "cross"))


def _family(
    name: str, title: str, root: str, read: SequenceReader = video.patched_video, notes: str = "", **extras: Any
) -> Family:
    return diffusers_family(name, title, root, _SITES, read, notes=notes, **extras)


FAMILIES = (
    _family(
        "wan",
        "Wan 2.1 / 2.2",
        "WanTransformer3DModel",
        notes="Both transformers of the A14B models share one schedule.",
        prompts=LongerText(),
    ),
    _family(
        "wan_vace",
        "Wan VACE",
        "WanVACETransformer3DModel",
        video_references.wan_vace,
        "Reference pictures are dense, the video is sparse.",
    ),
    _family(
        "wan_animate",
        "Wan Animate",
        "WanAnimateTransformer3DModel",
        video_references.wan_animate,
        "The picture of the character is dense; the face adapter is not a site.",
    ),
    _family(
        "skyreels_v2",
        "SkyReels V2",
        "SkyReelsV2Transformer3DModel",
        notes="Calls under a causal mask over blocks of frames (causal_block_size > 1) stay dense.",
    ),
    _family("chronoedit", "ChronoEdit", "ChronoEditTransformer3DModel"),
    _family("anyflow", "AnyFlow", "AnyFlowTransformer3DModel", video.frames_first),
    _family(
        "helios",
        "Helios",
        "HeliosTransformer3DModel",
        video_references.helios,
        "The history is dense, the section that is made is sparse.",
    ),
)
