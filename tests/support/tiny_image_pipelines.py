"""Complete pipelines of image transformers with random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.support import tiny_image_models, tiny_packed_image_models, tiny_unets
from tests.support.tiny_controlnets import sd_controlnet
from tests.support.tiny_text import clip_text_encoder, clip_tokenizer, llm_tokenizer, t5_encoder, t5_tokenizer


def kl_vae(channels: int = 4, **extra: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=[8, 8], norm_num_groups=4, in_channels=3, out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=channels,
        sample_size=32, **extra,
    ).eval()  # fmt: skip


def _shifted_vae(channels: int = 4) -> Any:
    return kl_vae(channels, shift_factor=0.0609, scaling_factor=1.5035, use_quant_conv=False, use_post_quant_conv=False)


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=tiny_image_models.sd3(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=_shifted_vae(),
        text_encoder=clip_text_encoder(16, projection=16), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(16, projection=16), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(32), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(32), vae=kl_vae(), transformer=tiny_image_models.pixart(),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def qwen_image() -> Any:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    words = len(llm_tokenizer())
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": words, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        },
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, tokenizer=llm_tokenizer(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        transformer=tiny_packed_image_models.qwen_image(),
    )  # fmt: skip


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = copy.deepcopy(llm_tokenizer())
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_shifted_vae(), tokenizer=tokenizer,
        text_encoder=Qwen3Model(config).eval(), transformer=tiny_image_models.z_image(),
    )  # fmt: skip


def from_sd15(kind: str, **more: Any) -> Any:
    """`kind`: a pipeline class that has the parts of Stable Diffusion 1.5, and those in `more`."""
    import diffusers

    pipe = getattr(diffusers, kind)(
        vae=kl_vae(), text_encoder=clip_text_encoder(), tokenizer=clip_tokenizer(), unet=tiny_unets.sd15(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd15_controlnet() -> Any:
    return from_sd15("StableDiffusionControlNetPipeline", controlnet=sd_controlnet())


_PICTURE = {"height": 24, "width": 32}
# name -> (build, what it is called with besides prompt, steps and seed, grid)
PIPELINES: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "sd3": (sd3, {**_PICTURE, "max_sequence_length": 16}, (12, 16)),
    "pixart": (
        pixart,
        {**_PICTURE, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16},
        (6, 8),
    ),
    "qwen_image": (
        qwen_image,
        {**_PICTURE, "negative_prompt": "blurry", "true_cfg_scale": 2.0, "max_sequence_length": 16},
        (3, 4),
    ),
    "z_image": (
        z_image,
        {**_PICTURE, "guidance_scale": 3.0, "negative_prompt": "bad", "max_sequence_length": 48},
        (6, 8),
    ),
}
