"""Complete pipelines with random weights: every component real, everything small, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.support import tiny_image_pipelines, tiny_models
from tests.support.tiny_image_pipelines import kl_vae
from tests.support.tiny_text import (
    clip_text_encoder,
    clip_tokenizer,
    llama_encoder,
    llm_tokenizer,
    t5_encoder,
    t5_tokenizer,
)


def wan() -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    return WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(32, "UMT5"), vae=vae, transformer=tiny_models.wan(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def hunyuan_video() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        act_fn="silu", norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8,
        temporal_compression_ratio=4, mid_block_add_attention=True,
    ).eval()  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=llama_encoder(), tokenizer=llm_tokenizer(), transformer=tiny_models.hunyuan_video(), vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=clip_text_encoder(8),
        tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


def ltx_video() -> Any:
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        decoder_spatio_temporal_scaling=(True, True, False, False),
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        transformer=tiny_models.ltx_video(),
    )  # fmt: skip


def cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
    ).eval()  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae, transformer=tiny_models.cogvideox(),
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    vae = kl_vae(1, shift_factor=0.0609, scaling_factor=1.5035, use_quant_conv=False, use_post_quant_conv=False)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
        transformer=tiny_models.flux(),
    )  # fmt: skip


def sd15() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=kl_vae(), text_encoder=clip_text_encoder(), tokenizer=clip_tokenizer(), unet=tiny_models.sd15(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=kl_vae(), text_encoder=clip_text_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(32, projection=32), tokenizer_2=clip_tokenizer(), unet=tiny_models.sdxl(),
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


@dataclass(frozen=True)
class TinyPipeline:
    """build() -> a pipeline; call: what it is called with, besides the prompt, steps and seed."""

    build: Callable[[], Any]
    call: dict[str, Any]
    grid: tuple[int, ...]


_PICTURE = {"height": 32, "width": 32}
_VIDEO = {"height": 32, "width": 32, "num_frames": 9}
_TEXT = {"max_sequence_length": 16}
PIPELINES = {
    "wan": TinyPipeline(wan, {**_VIDEO, **_TEXT, "height": 48, "width": 64}, (3, 3, 4)),
    "hunyuan_video": TinyPipeline(
        hunyuan_video, {**_VIDEO, **_TEXT, "prompt_template": {"template": "{}", "crop_start": 0}}, (3, 4, 4)
    ),
    "flux": TinyPipeline(flux, {**_PICTURE, **_TEXT, "width": 40}, (8, 10)),
    "ltx_video": TinyPipeline(ltx_video, {**_VIDEO, **_TEXT}, (3, 8, 8)),
    "cogvideox": TinyPipeline(cogvideox, {**_TEXT, "height": 32, "width": 48, "num_frames": 8}, (2, 2, 3)),
    "sd15": TinyPipeline(sd15, _PICTURE, (8, 8)),
    "sdxl": TinyPipeline(sdxl, _PICTURE, (8, 8)),
}
PIPELINES |= {name: TinyPipeline(*row) for name, row in tiny_image_pipelines.PIPELINES.items()}


def build(name: str) -> Any:
    pipe = PIPELINES[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, pipe: Any, steps: int = 2, prompt: Any = "a cat", **more: Any) -> torch.Tensor:
    """The latents after `steps` steps, always from the same noise (the VAE is not what is tested)."""
    call = {"num_inference_steps": steps, "output_type": "latent", **PIPELINES[name].call, **more}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **call)[0]
