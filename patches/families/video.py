"""Video transformers of diffusers; those of the Wan and HunyuanVideo kind, and UNets, have files of their own."""

from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.family import SitePattern
from attn_plugins.patches.grids import video, video_references, video_text, video_unet

_CROSS: SitePattern = (r"transformer_blocks\.\d+\.attn2", "cross")
_SELF: SitePattern = (r"transformer_blocks\.\d+\.attn1", "self")
_JOINT: SitePattern = (r"transformer_blocks\.\d+\.attn1", "joint")

FAMILIES = (
    diffusers_family(
        "ltx_video",
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        (_SELF, _CROSS),
        video_references.ltx_video,
        notes="Keyframes and clips to begin from are dense, the video is sparse.",
    ),
    diffusers_family(
        "ltx2",
        "LTX-2",
        "LTX2VideoTransformer3DModel",
        (_SELF, _CROSS),
        video_references.ltx2,
        notes="Sound is no site. Keyframes and references are dense; under an IC-LoRA attention mask all is.",
    ),
    diffusers_family(
        "cogvideox", "CogVideoX 1.0 / 1.5", "CogVideoXTransformer3DModel", (_JOINT,), video_text.cogvideox
    ),
    diffusers_family("consisid", "ConsisID", "ConsisIDTransformer3DModel", (_JOINT,), video_text.cogvideox),
    diffusers_family(
        "easyanimate", "EasyAnimate 5.1", "EasyAnimateTransformer3DModel", (_JOINT,), video_text.easyanimate
    ),
    diffusers_family(
        "mochi",
        "Mochi 1",
        "MochiTransformer3DModel",
        (_JOINT,),
        video_text.hunyuan_video,
        notes="Attends item by item, each with its own text length.",
    ),
    diffusers_family(
        "cosmos", "Cosmos 1.0 / Predict 2 / 2.5", "CosmosTransformer3DModel", (_SELF, _CROSS), video.patched_video
    ),
    diffusers_family("allegro", "Allegro", "AllegroTransformer3DModel", (_SELF, _CROSS), video.patched_video),
    diffusers_family(
        "kandinsky5",
        "Kandinsky 5",
        "Kandinsky5Transformer3DModel",
        (
            (r"visual_transformer_blocks\.\d+\.self_attention", "self"),
            (r"visual_transformer_blocks\.\d+\.cross_attention", "cross"),
        ),
        video.kandinsky5,
        notes="Checkpoints with sparse attention of their own (NABLA) keep it.",
    ),
    diffusers_family(
        "kandinsky6",
        "Kandinsky 6",
        "Kandinsky6Transformer3DModel",
        (
            (r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", "self"),
            (r"visual_transformer_blocks\.\d+\.video_dec_block\.cross_attention", "cross"),
        ),
        video_references.kandinsky6,
        notes="Sound is no site. A picture to begin with is dense.",
    ),
    diffusers_family(
        "latte",
        "Latte",
        "LatteTransformer3DModel",
        ((r"(temporal_)?transformer_blocks\.\d+\.attn1", "self"), _CROSS),
        video.each_frame,
        notes="Frame by frame; its attention over time is 16 tokens, below min_tokens (256).",
        inner_levels={r"temporal_transformer_blocks\.\d+": video_unet.tokens_over_time},
        min_tokens=256,
    ),
    diffusers_family(
        "sana_video",
        "SANA-Video",
        "SanaVideoTransformer3DModel",
        (_CROSS,),
        video.patched_video,
        notes="Cross-attention only: its self-attention is linear.",
    ),
)
