"""Random-weight denoisers of diffusers, and inputs for one forward: a row per family of the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class TinyModel:
    """build() -> a model in eval mode; inputs(batch, size) -> its keyword arguments (`size` 0 or 1: two grids)."""

    build: Callable[..., Any]
    inputs: Callable[[int, int], dict[str, Any]]
    grids: tuple[tuple[int, ...], tuple[int, ...]]


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


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip


def flux_ids(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros(height, width), rows, columns], dim=-1).reshape(-1, 3).float()


def _flux_inputs(batch: int, size: int) -> dict[str, Any]:
    height, width = 5 + size, 6
    return {
        "hidden_states": randn(batch, height * width, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(batch, 8, 32),
        "pooled_projections": randn(batch, 32),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": flux_ids(height, width),
    }


def sd3(dual: bool = True) -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        dual_attention_layers=(0,) if dual else (),
    ).eval()  # fmt: skip


def _sd3_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 5 + size, 6),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 32),
        "pooled_projections": randn(batch, 32),
    }


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


MODELS = {
    "wan": TinyModel(wan, _wan_inputs, ((3, 3, 4), (3, 4, 4))),
    "hunyuan_video": TinyModel(hunyuan_video, _hunyuan_inputs, ((3, 3, 4), (3, 4, 4))),
    "ltx_video": TinyModel(ltx_video, _ltx_inputs, ((3, 3, 4), (3, 4, 4))),
    "cogvideox": TinyModel(cogvideox, _cogvideox_inputs, ((3, 3, 4), (3, 4, 4))),
    "cosmos": TinyModel(cosmos, _cosmos_inputs, ((3, 3, 4), (3, 4, 4))),
    "flux": TinyModel(flux, _flux_inputs, ((5, 6), (6, 6))),
    "sd3": TinyModel(sd3, _sd3_inputs, ((5, 6), (6, 6))),
    "sd15": TinyModel(sd15, _sd15_inputs, ((4, 6), (6, 6))),
    "sdxl": TinyModel(sdxl, _sdxl_inputs, ((4, 6), (6, 6))),
}


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
