"""Tiny video transformers that attend a plain grid, of the video or frame by frame; UNets for video."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, randn
from tests.support.tiny_video_models import GRIDS


def allegro() -> Any:
    from diffusers import AllegroTransformer3DModel

    torch.manual_seed(0)
    return AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, caption_channels=16,
        sample_width=8, sample_height=8, sample_frames=3,
    ).eval()  # fmt: skip


def _allegro_inputs(batch: int, size: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    height = 3 + size
    rows = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (height, 4)), (height, 4), 3)
    places = torch.cartesian_prod(*(axis.long() for axis in rows[3:])).T.reshape(3, 1, -1).contiguous()
    return {
        "hidden_states": randn(batch, 4, 3, 2 * height, 8),
        "encoder_hidden_states": randn(batch, 8, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, 8),
        "image_rotary_emb": (rows[:3], tuple(places)),
    }


def _awake(model: Any) -> Any:
    """Modulations begin at zero, under which a random model passes its attention by: these do not."""
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def kandinsky5() -> Any:
    from diffusers import Kandinsky5Transformer3DModel

    torch.manual_seed(0)
    return _awake(
        Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=12,
            time_dim=8,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
        )  # fmt: skip
    )


def _kandinsky5_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 3, 6 + 2 * size, 8, 4),
        "encoder_hidden_states": randn(batch, 8, 16),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": randn(batch, 12),
        "visual_rope_pos": [torch.arange(3), torch.arange(3 + size), torch.arange(4)],
        "text_rope_pos": torch.arange(8),
    }


def kandinsky6() -> Any:
    from diffusers import Kandinsky6Transformer3DModel

    torch.manual_seed(0)
    return _awake(
        Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=12,
            time_dim=8,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        )  # fmt: skip
    )


def _kandinsky6_inputs(batch: int, size: int) -> dict[str, Any]:
    """The sound has as many tokens as the video: only the names of the modules tell them apart."""
    return {
        "hidden_states": randn(batch, 3, 6 + 2 * size, 8, 4),
        "encoder_hidden_states": randn(batch, 8, 16),
        "pooled_projections": randn(batch, 12),
        "timestep": torch.full((batch,), 500.0),
        "audio_hidden_states": randn(batch, 3 * (3 + size) * 4, 4, seed=2),
    }


def latte() -> Any:
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    return LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=16,
        video_length=3,
    ).eval()  # fmt: skip


def _latte_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 16),
    }


def sana_video() -> Any:
    from diffusers import SanaVideoTransformer3DModel

    torch.manual_seed(0)
    return SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        sample_size=8, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def _sana_video_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 3, 6 + 2 * size, 8),
        "encoder_hidden_states": randn(batch, 8, 16),
        "timestep": torch.full((batch,), 500),
    }


_LEVELS: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def animatediff() -> Any:
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    model = UNetMotionModel(
        **_LEVELS, cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():  # motion modules begin as nothing
        if "motion_modules" in name and "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _animatediff_inputs(batch: int, size: int) -> dict[str, Any]:
    """The pipelines repeat the prompt for each of the 3 frames."""
    return {**_unet_inputs(batch, size), "encoder_hidden_states": randn(batch, 8, 16).repeat_interleave(3, dim=0)}


def _unet_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, 3, 8 + 4 * size, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(batch, 8, 16),
    }


def text_to_video() -> Any:
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    return UNet3DConditionModel(
        **_LEVELS, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"), up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    ).eval()  # fmt: skip


def i2vgen_xl() -> Any:
    from diffusers import I2VGenXLUNet

    torch.manual_seed(0)
    return I2VGenXLUNet(
        **_LEVELS, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"), up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    ).eval()  # fmt: skip


def _i2vgen_xl_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        **_unet_inputs(batch, size),
        "fps": torch.full((batch,), 8),
        "image_latents": randn(batch, 4, 3, 8 + 4 * size, 12, seed=2),
        "image_embeddings": randn(batch, 16, seed=3),
    }


def svd(blocks: int = 2) -> Any:
    """Two blocks a level: after the first one's attention over time, the second attends within frames again."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, num_attention_heads=(2, 4),
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, transformer_layers_per_block=blocks,
    ).eval()  # fmt: skip


def _svd_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 3, 8, 8 + 4 * size, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(batch, 1, 16),
        "added_time_ids": torch.ones(batch, 3),
    }


_LEVEL = ((4, 6), (6, 6))
MODELS = {
    "allegro": TinyModel(allegro, _allegro_inputs, GRIDS),
    "kandinsky5": TinyModel(kandinsky5, _kandinsky5_inputs, GRIDS),
    "kandinsky6": TinyModel(kandinsky6, _kandinsky6_inputs, GRIDS),
    "latte": TinyModel(latte, _latte_inputs, ((3, 4), (4, 4))),
    "sana_video": TinyModel(sana_video, _sana_video_inputs, GRIDS),
    "animatediff": TinyModel(animatediff, _animatediff_inputs, _LEVEL, per_frame=("encoder_hidden_states",)),
    "text_to_video": TinyModel(text_to_video, _unet_inputs, _LEVEL),
    "i2vgen_xl": TinyModel(i2vgen_xl, _i2vgen_xl_inputs, _LEVEL),
    "svd": TinyModel(svd, _svd_inputs, _LEVEL),
}
