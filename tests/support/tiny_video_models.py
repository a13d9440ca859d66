"""Tiny video transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, randn

GRIDS = ((3, 3, 4), (3, 4, 4))  # token grids of the two sizes of nearly all tiny video models


def wan(layers: int = 2) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def _wan_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 16, 3, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 32),
    }


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip


def _hunyuan_inputs(batch: int, size: int) -> dict[str, Any]:
    lengths = torch.tensor([[6], [3], [8], [1]])[:batch]  # prompts of different lengths in one batch
    return {
        "hidden_states": randn(batch, 4, 3, 3 + size, 4),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 16),
        "encoder_attention_mask": (torch.arange(8)[None] < lengths).long(),
        "pooled_projections": randn(batch, 8),
        "guidance": torch.ones(batch),
    }


def ltx_video() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    ).eval()  # fmt: skip


def _ltx_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 3 * (3 + size) * 4, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 32),
        "encoder_attention_mask": torch.ones(batch, 8),
        "num_frames": 3,
        "height": 3 + size,
        "width": 4,
    }


def cogvideox(patch_size_t: int | None = None) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2, patch_size_t=patch_size_t,
        temporal_compression_ratio=4, max_text_seq_length=16,
    ).eval()  # fmt: skip


def _cogvideox_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 3, 4, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 16, 32),
    }


def cosmos() -> Any:
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(0)
    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, extra_pos_embed_type="learnable",
    ).eval()  # fmt: skip


def _cosmos_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, 8, 32),
    }


MODELS = {
    "wan": TinyModel(wan, _wan_inputs, GRIDS),
    "hunyuan_video": TinyModel(hunyuan_video, _hunyuan_inputs, GRIDS),
    "ltx_video": TinyModel(ltx_video, _ltx_inputs, GRIDS),
    "cogvideox": TinyModel(cogvideox, _cogvideox_inputs, GRIDS),
    "cosmos": TinyModel(cosmos, _cosmos_inputs, GRIDS),
}
