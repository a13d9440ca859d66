"""Tiny video transformers of the Wan kind."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, randn
from tests.support.tiny_video_models import GRIDS

_SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


def _inputs(batch: int, size: int, channels: int = 4, frames: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, channels, frames, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 32),
    }


def wan_vace() -> Any:
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(0)
    return WanVACETransformer3DModel(
        **_SMALL, cross_attn_norm=True, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=12
    ).eval()


def _wan_vace_inputs(batch: int, size: int) -> dict[str, Any]:
    """Four frames, of which the first is a reference picture: its latents have no reactive part."""
    control = randn(batch, 12, 4, 6 + 2 * size, 8, seed=2)
    control[:, 4:8, :1] = 0
    return {**_inputs(batch, size, frames=4), "control_hidden_states": control}


def wan_animate() -> Any:
    from diffusers import WanAnimateTransformer3DModel

    torch.manual_seed(0)
    return WanAnimateTransformer3DModel(
        **{**_SMALL, "in_channels": 12}, latent_channels=4, image_dim=None, rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()  # fmt: skip


def _wan_animate_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        **_inputs(batch, size, channels=12, frames=4),
        "pose_hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8, seed=2),
        "face_pixel_values": randn(batch, 3, 9, 16, 16, seed=3),
    }


def skyreels_v2(num_frame_per_block: int = 1) -> Any:
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    return SkyReelsV2Transformer3DModel(
        **_SMALL, cross_attn_norm=True, rope_max_seq_len=32, num_frame_per_block=num_frame_per_block
    ).eval()


def chronoedit() -> Any:
    from diffusers import ChronoEditTransformer3DModel

    torch.manual_seed(0)
    return ChronoEditTransformer3DModel(**_SMALL, cross_attn_norm=True, rope_max_seq_len=32).eval()


def anyflow() -> Any:
    from diffusers import AnyFlowTransformer3DModel

    torch.manual_seed(0)
    return AnyFlowTransformer3DModel(**_SMALL, rope_max_seq_len=32).eval()


def _anyflow_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        **_inputs(batch, size),
        "hidden_states": randn(batch, 3, 4, 6 + 2 * size, 8),
        "timestep": torch.full((batch, 3), 500),
        "r_timestep": torch.full((batch, 3), 400),
    }


def helios() -> Any:
    from diffusers import HeliosTransformer3DModel

    torch.manual_seed(0)
    return HeliosTransformer3DModel(**_SMALL, rope_dim=(4, 4, 4)).eval()


def _helios_inputs(batch: int, size: int) -> dict[str, Any]:
    """A section of 3 frames after 1 frame, 3 coarser ones (padded to 4) and 5 that are coarser still (padded to 8)."""
    rows: dict[str, Any] = {"indices_hidden_states": torch.arange(9, 12).expand(batch, -1)}
    first = 0
    for name, frames in (("long", 5), ("mid", 3), ("short", 1)):
        rows[f"latents_history_{name}"] = randn(batch, 4, frames, 6 + 2 * size, 8, seed=frames)
        rows[f"indices_latents_history_{name}"] = torch.arange(first, first + frames).expand(batch, -1)
        first += frames
    return {**_inputs(batch, size), **rows}


MODELS = {
    "wan_vace": TinyModel(wan_vace, _wan_vace_inputs, GRIDS),
    "wan_animate": TinyModel(wan_animate, _wan_animate_inputs, GRIDS),
    "skyreels_v2": TinyModel(skyreels_v2, _inputs, GRIDS),
    "chronoedit": TinyModel(chronoedit, _inputs, GRIDS),
    "anyflow": TinyModel(anyflow, _anyflow_inputs, GRIDS),
    "helios": TinyModel(helios, _helios_inputs, GRIDS),
}
