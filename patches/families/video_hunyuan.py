"""HunyuanVideo and its kin: joint attention of video, then text."""

from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.family import Family, SequenceReader, SitePattern
from attn_plugins.patches.grids import video_references, video_text

_SITES: tuple[SitePattern, ...] = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)


def _family(name: str, title: str, root: str, read: SequenceReader, notes: str) -> Family:
    return diffusers_family(name, title, root, _SITES, read, notes=notes, key_padding=True)


FAMILIES = (
    _family(
        "hunyuan_video",
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        video_text.hunyuan_video,
        "Padded prompts are shorter text, per item.",
    ),
    _family(
        "hunyuan_video15",
        "HunyuanVideo 1.5",
        "HunyuanVideo15Transformer3DModel",
        video_text.hunyuan_video15,
        "Its processor's N x N mask is not made, in dense steps either.",
    ),
    _family(
        "framepack",
        "HunyuanVideo FramePack",
        "HunyuanVideoFramepackTransformer3DModel",
        video_references.framepack,
        "The history is dense, the section that is made is sparse.",
    ),
    _family(
        "motif_video",
        "Motif-Video",
        "MotifVideoTransformer3DModel",
        video_text.motif_video,
        "Its decoder layers, which attend a second copy of the video, stay dense.",
    ),
)
