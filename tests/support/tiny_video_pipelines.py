"""Complete video pipelines with random weights, besides those of tiny_pipelines.py; nothing is downloaded.

Text encoders that are large families of their own (Gemma, Qwen-VL) are left out: their embeddings are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.support import tiny_pipelines, tiny_video_grids
from tests.support.tiny import randn
from tests.support.tiny_text import clip_text_encoder, clip_tokenizer, t5_encoder, t5_tokenizer


def picture(seed: int, height: int = 48, width: int = 64) -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def clip(frames: int = 9, height: int = 48, width: int = 64) -> list[Any]:
    return [picture(seed, height, width) for seed in range(frames)]


def wan_image_to_video() -> Any:
    """With the picture's embeddings beside the text: two cross-attention calls a layer."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=32, freq_dim=256,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24,
    ).eval()  # fmt: skip
    parts = tiny_pipelines.wan().components
    return WanImageToVideoPipeline(
        **{**parts, "transformer": transformer, "transformer_2": None}, image_encoder=encoder,
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip


def wan_vace() -> Any:
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=96,
    ).eval()  # fmt: skip
    parts = tiny_pipelines.wan().components
    return WanVACEPipeline(**{**parts, "transformer": transformer, "transformer_2": None})


def wan_video_to_video() -> Any:
    from diffusers import WanVideoToVideoPipeline

    parts = tiny_pipelines.wan().components
    return WanVideoToVideoPipeline(**{name: part for name, part in parts.items() if name != "transformer_2"})


def ltx_condition() -> Any:
    from diffusers import LTXConditionPipeline

    return LTXConditionPipeline(**tiny_pipelines.ltx_video().components)


def ltx2() -> Any:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
        perturbed_attn=True,
    ).eval()  # fmt: skip
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32, temporal_compression_ratio=8,
    ).eval()  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, norm_type="pixel", mel_bins=8
    ).eval()
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_double_precision=False,
    ).eval()  # fmt: skip
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, audio_vae=audio_vae, text_encoder=None, tokenizer=None,
        connectors=connectors, transformer=transformer, vocoder=None,
    )  # fmt: skip


def mochi() -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        text_embed_dim=32, time_embed_dim=4, max_sequence_length=16,
    ).eval()  # fmt: skip
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    ).eval()
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, DDIMScheduler

    return AnimateDiffPipeline(
        vae=tiny_pipelines.sd15().vae, text_encoder=clip_text_encoder(16), tokenizer=clip_tokenizer(),
        unet=tiny_video_grids.animatediff(), motion_adapter=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )  # fmt: skip


def kandinsky5() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline

    return Kandinsky5T2VPipeline(
        transformer=tiny_video_grids.kandinsky5(), vae=tiny_pipelines.hunyuan_video().vae, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


@dataclass(frozen=True)
class TinyVideoPipeline:
    """build() -> a pipeline; call(items) -> what it is called with, besides steps and seed; the token grid.

    batches: whether the pipeline takes several prompts (some of diffusers' do not).
    """

    build: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    grid: tuple[int, ...]
    batches: bool = True


def _prompts(items: int) -> dict[str, Any]:
    """Of different lengths; guidance in one batch or two calls, as the pipeline has it."""
    prompts = ["a cat", "a photo of a dog, high quality"][:items]
    return {"prompt": prompts if items > 1 else prompts[0], "guidance_scale": 3.0}


def _embeddings(items: int, *shape: int, seed: int = 1) -> torch.Tensor:
    """An item's are the same in any batch."""
    return torch.cat([randn(1, *shape, seed=10 * seed + item) for item in range(items)])


_SIZE = {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 16}


def _image_to_video(items: int) -> dict[str, Any]:
    return {
        **_prompts(items),
        **_SIZE,
        "image": picture(3),
        "max_sequence_length": 512,  # what the processor counts on
    }


def _vace(items: int) -> dict[str, Any]:
    from PIL import Image

    masks = [Image.new("L", (64, 48), 255 * (frame > 2)) for frame in range(9)]
    return {**_prompts(items), **_SIZE, "video": clip(), "mask": masks, "reference_images": [picture(7)]}


def _video_to_video(items: int) -> dict[str, Any]:
    return {**_prompts(items), "height": 48, "width": 64, "max_sequence_length": 16, "video": clip(), "strength": 0.5}


def _ltx_condition(items: int) -> dict[str, Any]:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    rows = [LTXVideoCondition(image=picture(3 + index, 32, 32), frame_index=index) for index in (0, 8)]
    return {**_prompts(items), **_SIZE, "height": 32, "width": 32, "conditions": rows}


def _ltx2(items: int) -> dict[str, Any]:
    return {
        "prompt_embeds": _embeddings(items, 16, 16),
        "negative_prompt_embeds": _embeddings(items, 16, 16, seed=2),
        "prompt_attention_mask": torch.ones(items, 16),
        "negative_prompt_attention_mask": torch.ones(items, 16),
        "height": 96, "width": 128, "num_frames": 17, "spatio_temporal_guidance_blocks": [1],
    }  # fmt: skip


def _mochi(items: int) -> dict[str, Any]:
    return {**_prompts(items), **_SIZE, "num_frames": 13}


def _animatediff(items: int) -> dict[str, Any]:
    return {**_prompts(items), "height": 16, "width": 24, "num_frames": 3}


def _kandinsky5(items: int) -> dict[str, Any]:
    return {
        "prompt_embeds_qwen": _embeddings(items, 6, 16),
        "prompt_embeds_clip": _embeddings(items, 12),
        "prompt_cu_seqlens": torch.arange(0, 6 * items + 1, 6, dtype=torch.int32),
        "negative_prompt_embeds_qwen": _embeddings(items, 6, 16, seed=2),
        "negative_prompt_embeds_clip": _embeddings(items, 12, seed=2),
        "negative_prompt_cu_seqlens": torch.arange(0, 6 * items + 1, 6, dtype=torch.int32),
        **_SIZE,
    }


VIDEO_PIPELINES = {
    "wan_image_to_video": TinyVideoPipeline(wan_image_to_video, _image_to_video, (3, 3, 4)),
    "wan_vace": TinyVideoPipeline(wan_vace, _vace, (3, 3, 4), batches=False),
    "wan_video_to_video": TinyVideoPipeline(wan_video_to_video, _video_to_video, (3, 3, 4)),
    "ltx_condition": TinyVideoPipeline(ltx_condition, _ltx_condition, (3, 8, 8), batches=False),
    "ltx2": TinyVideoPipeline(ltx2, _ltx2, (3, 3, 4)),
    "mochi": TinyVideoPipeline(mochi, _mochi, (3, 3, 4)),
    "animatediff": TinyVideoPipeline(animatediff, _animatediff, (4, 6)),
    "kandinsky5": TinyVideoPipeline(kandinsky5, _kandinsky5, (3, 3, 4)),
}


def build(name: str) -> Any:
    pipe = VIDEO_PIPELINES[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any, steps: int = 2, items: int = 1, **more: Any) -> torch.Tensor:
    """The latents after `steps` steps, each item from a noise of its own that is always the same."""
    generators: Any = [torch.Generator().manual_seed(seed) for seed in range(items)]
    call = {"num_inference_steps": steps, "output_type": "latent", **VIDEO_PIPELINES[name].call(items), **more}
    return pipe(generator=generators if items > 1 else generators[0], **call)[0]
