"""Video transformers of diffusers; those of the Wan and HunyuanVideo kind, and UNets, have files of their own."""

from attn_plugins.method import SiteKind
from attn_plugins.patches.family import Family
from attn_plugins.patches.grids import video, video_references, video_text, video_unet
from attn_plugins.patches.processor_swap import ProcessorSwap

_SWAP = ProcessorSwap()
_CROSS: tuple[str, SiteKind] = (r"transformer_blocks\.\d+\.attn2", "cross")
_SELF: tuple[str, SiteKind] = (r"transformer_blocks\.\d+\.attn1", "self")
_JOINT: tuple[str, SiteKind] = (r"transformer_blocks\.\d+\.attn1", "joint")

FAMILIES = (
    Family(
        name="ltx_video",
        title="LTX-Video",
        library="diffusers",
        classes=("LTXVideoTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=video_references.ltx_video,
        interception=_SWAP,
        notes="Keyframes and clips to begin from are dense, the video is sparse.",
    ),
    Family(
        name="ltx2",
        title="LTX-2",
        library="diffusers",
        classes=("LTX2VideoTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=video_references.ltx2,
        interception=_SWAP,
        notes="Sound is no site. Keyframes and references are dense; under an IC-LoRA attention mask all is.",
    ),
    Family(
        name="cogvideox",
        title="CogVideoX 1.0 / 1.5",
        library="diffusers",
        classes=("CogVideoXTransformer3DModel",),
        sites=(_JOINT,),
        read=video_text.cogvideox,
        interception=_SWAP,
    ),
    Family(
        name="consisid",
        title="ConsisID",
        library="diffusers",
        classes=("ConsisIDTransformer3DModel",),
        sites=(_JOINT,),
        read=video_text.cogvideox,
        interception=_SWAP,
    ),
    Family(
        name="easyanimate",
        title="EasyAnimate 5.1",
        library="diffusers",
        classes=("EasyAnimateTransformer3DModel",),
        sites=(_JOINT,),
        read=video_text.easyanimate,
        interception=_SWAP,
    ),
    Family(
        name="mochi",
        title="Mochi 1",
        library="diffusers",
        classes=("MochiTransformer3DModel",),
        sites=(_JOINT,),
        read=video_text.hunyuan_video,
        interception=_SWAP,
        notes="Attends item by item, each with its own text length.",
    ),
    Family(
        name="cosmos",
        title="Cosmos 1.0 / Predict 2 / 2.5",
        library="diffusers",
        classes=("CosmosTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=video.patched_video,
        interception=_SWAP,
    ),
    Family(
        name="allegro",
        title="Allegro",
        library="diffusers",
        classes=("AllegroTransformer3DModel",),
        sites=(_SELF, _CROSS),
        read=video.patched_video,
        interception=_SWAP,
    ),
    Family(
        name="kandinsky5",
        title="Kandinsky 5",
        library="diffusers",
        classes=("Kandinsky5Transformer3DModel",),
        sites=(
            (r"visual_transformer_blocks\.\d+\.self_attention", "self"),
            (r"visual_transformer_blocks\.\d+\.cross_attention", "cross"),
        ),
        read=video.kandinsky5,
        interception=_SWAP,
        notes="Checkpoints with sparse attention of their own (NABLA) keep it.",
    ),
    Family(
        name="kandinsky6",
        title="Kandinsky 6",
        library="diffusers",
        classes=("Kandinsky6Transformer3DModel",),
        sites=(
            (r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention", "self"),
            (r"visual_transformer_blocks\.\d+\.video_dec_block\.cross_attention", "cross"),
        ),
        read=video_references.kandinsky6,
        interception=_SWAP,
        notes="Sound is no site. A picture to begin with is dense.",
    ),
    Family(
        name="latte",
        title="Latte",
        library="diffusers",
        classes=("LatteTransformer3DModel",),
        sites=((r"(temporal_)?transformer_blocks\.\d+\.attn1", "self"), _CROSS),
        read=video.each_frame,
        interception=_SWAP,
        notes="Frame by frame; its attention over time is 16 tokens, below min_tokens (256).",
        extras={"inner_levels": {r"temporal_transformer_blocks\.\d+": video_unet.tokens_over_time}, "min_tokens": 256},
    ),
    Family(
        name="sana_video",
        title="SANA-Video",
        library="diffusers",
        classes=("SanaVideoTransformer3DModel",),
        sites=(_CROSS,),
        read=video.patched_video,
        interception=_SWAP,
        notes="Cross-attention only: its self-attention is linear.",
    ),
)
