"""Tiny UNets."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, built, randn


def _unet(**extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, **extra,
    ).eval()  # fmt: skip


def sd15() -> Any:
    return _unet(cross_attention_dim=32, attention_head_dim=2)


def _sd15_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, 8 + 4 * size, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(batch, 8, 32),
    }


def sdxl() -> Any:
    return _unet(
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
    )  # fmt: skip


def _sdxl_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, 8 + 4 * size, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(batch, 8, 64),
        "added_cond_kwargs": {"text_embeds": randn(batch, 32), "time_ids": torch.zeros(batch, 6)},
    }


_ADDED = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "sample_size": 8, "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": 16, "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip


def kandinsky21() -> Any:
    return built(
        "UNet2DConditionModel", encoder_hid_dim=8, encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image", **_ADDED,
    )  # fmt: skip


def kandinsky22() -> Any:
    return built(
        "UNet2DConditionModel",
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        **_ADDED,
    )


def deepfloyd_if() -> Any:
    return built(
        "UNet2DConditionModel", encoder_hid_dim=8, encoder_hid_dim_type="text_proj", addition_embed_type="text",
        addition_embed_type_num_heads=2, **_ADDED,
    )  # fmt: skip


def _sample(batch: int, size: int, channels: int = 4) -> dict[str, Any]:
    return {"sample": randn(batch, channels, 8 + 4 * size, 12), "timestep": torch.tensor(500)}


def _kandinsky21_inputs(batch: int, size: int) -> dict[str, Any]:
    pictures, texts = randn(batch, 16, seed=3), randn(batch, 16, seed=4)
    return {
        **_sample(batch, size),
        "encoder_hidden_states": randn(batch, 8, 8, seed=2),
        "added_cond_kwargs": {"image_embeds": pictures, "text_embeds": texts},
    }


def _kandinsky22_inputs(batch: int, size: int) -> dict[str, Any]:
    added = {"image_embeds": randn(batch, 8, seed=3)}
    return {**_sample(batch, size), "encoder_hidden_states": None, "added_cond_kwargs": added}


def _deepfloyd_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_sample(batch, size), "encoder_hidden_states": randn(batch, 8, 8, seed=2)}


def kandinsky3() -> Any:
    return built(
        "Kandinsky3UNet", in_channels=4, time_embedding_dim=16, groups=1, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(8, 16, 16, 16), cross_attention_dim=8, encoder_hid_dim=8,
    )  # fmt: skip


def _kandinsky3_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, 16 + 8 * size, 24),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(batch, 8, 8, seed=2),
        "encoder_attention_mask": torch.ones(batch, 8),
    }


def ddpm() -> Any:
    return built(
        "UNet2DModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip


def stable_cascade() -> Any:
    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return built(
        "StableCascadeUNet", in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1,
        conditioning_dim=16, block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(block, block), clip_text_in_channels=8, clip_text_pooled_in_channels=8,
        clip_image_in_channels=8, clip_seq=2, self_attn=True, switch_level=[False],
    )  # fmt: skip


def _stable_cascade_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, 8 + 4 * size, 12),
        "timestep_ratio": torch.full((batch,), 0.5),
        "clip_text_pooled": randn(batch, 1, 8, seed=2),
        "clip_text": randn(batch, 5, 8, seed=3),
        "clip_img": randn(batch, 1, 8, seed=4),
    }


def dreamlite() -> Any:
    return built(
        "DreamLiteUNetModel", sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DreamLiteDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), cross_attention_dim=8,
        attention_head_dim=2, transformer_layers_per_block=1, ff_mult=2,
    )  # fmt: skip


def _dreamlite_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_sample(batch, size), "encoder_hidden_states": randn(batch, 8, 8, seed=2)}


def amused() -> Any:
    return built(
        "UVit2DModel", hidden_size=16, use_bias=False, hidden_dropout=0.0, cond_embed_dim=8, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=8, vocab_size=32, codebook_size=24, in_channels=8,
        block_out_channels=8, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=2, num_hidden_layers=1,
        num_attention_heads=2, attention_dropout=0.0, intermediate_size=16,
    )  # fmt: skip


def _amused_inputs(batch: int, size: int) -> dict[str, Any]:
    ids = torch.arange((8 + 4 * size) * 12).reshape(1, -1, 12).repeat(batch, 1, 1).remainder(24)
    return {
        "input_ids": ids + torch.arange(batch)[:, None, None],
        "encoder_hidden_states": randn(batch, 8, 8, seed=2),
        "pooled_text_emb": randn(batch, 8, seed=3),
        "micro_conds": torch.ones(batch, 5),
    }


_GRIDS = ((4, 6), (6, 6))
MODELS = {
    "sd15": TinyModel(sd15, _sd15_inputs, _GRIDS),
    "sdxl": TinyModel(sdxl, _sdxl_inputs, _GRIDS),
    "kandinsky21": TinyModel(kandinsky21, _kandinsky21_inputs, _GRIDS),
    "kandinsky22": TinyModel(kandinsky22, _kandinsky22_inputs, _GRIDS),
    "deepfloyd_if": TinyModel(deepfloyd_if, _deepfloyd_inputs, _GRIDS),
    "kandinsky3": TinyModel(kandinsky3, _kandinsky3_inputs, ((8, 12), (12, 12))),
    "ddpm": TinyModel(ddpm, _sample, _GRIDS),
    "stable_cascade": TinyModel(stable_cascade, _stable_cascade_inputs, ((8, 12), (12, 12))),
    "dreamlite": TinyModel(dreamlite, _dreamlite_inputs, _GRIDS),
    "amused": TinyModel(amused, _amused_inputs, _GRIDS),
}
