"""Tiny video transformers whose text, history or sound goes with the video."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, randn
from tests.support.tiny_video_models import GRIDS

_LENGTHS = torch.tensor([[6], [3], [8], [1]])  # prompts of different lengths in one batch


def _mask(batch: int, tokens: int = 8) -> torch.Tensor:
    return (torch.arange(tokens)[None] < _LENGTHS[:batch]).long()


def hunyuan_video15() -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=14, rope_axes_dim=(2, 4, 4),
        target_size=16,
    ).eval()  # fmt: skip


def _hunyuan_video15_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 3 + size, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, 8, 16),
        "encoder_attention_mask": _mask(batch),
        "encoder_hidden_states_2": randn(batch, 5, 12, seed=2),
        "encoder_attention_mask_2": _mask(batch, 5),
        "image_embeds": randn(batch, 4, 14, seed=3),
    }


def framepack() -> Any:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    torch.manual_seed(0)
    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True,
    ).eval()  # fmt: skip


def _framepack_inputs(batch: int, size: int) -> dict[str, Any]:
    """A section of 3 frames, 1 clean frame, 3 frames at half size (padded to 4), 5 at a quarter (padded to 8)."""
    rows: dict[str, Any] = {"indices_latents": torch.arange(9, 12)}
    first = 0
    for latents, frames in (("latents_history_4x", 5), ("latents_history_2x", 3), ("latents_clean", 1)):
        rows[latents] = randn(batch, 4, frames, 6 + 2 * size, 8, seed=frames)
        rows[f"indices_{latents}"] = torch.arange(first, first + frames)
        first += frames
    return {
        "hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 16),
        "encoder_attention_mask": _mask(batch),
        "pooled_projections": randn(batch, 8),
        "image_embeds": randn(batch, 4, 16, seed=2),
        "guidance": torch.ones(batch),
        **rows,
    }


def motif_video(decoder_layers: int = 0) -> Any:
    from diffusers import MotifVideoTransformer3DModel

    torch.manual_seed(0)
    return MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1 + decoder_layers, num_decoder_layers=decoder_layers, patch_size=1, text_embed_dim=16,
        image_embed_dim=14, rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip


def _motif_video_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 3 + size, 4),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 16),
        "encoder_attention_mask": _mask(batch),
        "image_embeds": randn(batch, 4, 14, seed=2),
    }


def ltx2() -> Any:
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    ).eval()  # fmt: skip


def _ltx2_inputs(batch: int, size: int) -> dict[str, Any]:
    """The sound has as many tokens as the video: only the names of the modules tell them apart."""
    tokens = 3 * (3 + size) * 4
    return {
        "hidden_states": randn(batch, tokens, 4),
        "audio_hidden_states": randn(batch, tokens, 4, seed=2),
        "encoder_hidden_states": randn(batch, 8, 16),
        "audio_encoder_hidden_states": randn(batch, 8, 16, seed=3),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.ones(batch, 8),
        "audio_encoder_attention_mask": torch.ones(batch, 8),
        "num_frames": 3,
        "height": 3 + size,
        "width": 4,
        "audio_num_frames": tokens,
    }


def mochi() -> Any:
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    return MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    ).eval()  # fmt: skip


def _mochi_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8),
        "encoder_hidden_states": randn(batch, 8, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": _mask(batch).bool(),
    }


def easyanimate() -> Any:
    from diffusers import EasyAnimateTransformer3DModel

    torch.manual_seed(0)
    return EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
        mmdit_layers=1, time_embed_dim=4, text_embed_dim=16, text_embed_dim_t5=12,
    ).eval()  # fmt: skip


def _easyanimate_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 16),
        "encoder_hidden_states_t5": randn(batch, 5, 12, seed=2),
    }


def consisid() -> Any:
    from diffusers import ConsisIDTransformer3DModel

    torch.manual_seed(0)
    return ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=16,
        num_layers=2, sample_width=8, sample_height=6, sample_frames=9, max_text_seq_length=8, cross_attn_interval=1,
        is_train_face=True, cross_attn_dim_head=4, cross_attn_num_heads=2, LFE_id_dim=4, LFE_vit_dim=4, LFE_depth=5,
        LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=10, LFE_ff_mult=1,
        LFE_num_scale=1,
    ).eval()  # fmt: skip


def _consisid_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 3, 4, 6 + 2 * size, 8),
        "encoder_hidden_states": randn(batch, 8, 16),
        "timestep": torch.full((batch,), 500),
        "id_cond": randn(batch, 4, seed=2),
        "id_vit_hidden": [randn(batch, 3, 4, seed=3)],
    }


MODELS = {
    "hunyuan_video15": TinyModel(hunyuan_video15, _hunyuan_video15_inputs, GRIDS),
    "framepack": TinyModel(framepack, _framepack_inputs, GRIDS),
    "motif_video": TinyModel(motif_video, _motif_video_inputs, GRIDS),
    "ltx2": TinyModel(ltx2, _ltx2_inputs, GRIDS),
    "mochi": TinyModel(mochi, _mochi_inputs, GRIDS),
    "easyanimate": TinyModel(easyanimate, _easyanimate_inputs, GRIDS),
    "consisid": TinyModel(consisid, _consisid_inputs, GRIDS),
}
