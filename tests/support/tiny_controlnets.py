"""Tiny ControlNets: what their denoisers get, and a picture to follow."""

from __future__ import annotations

from typing import Any

from tests.support import tiny_image_models, tiny_packed_image_models, tiny_unets
from tests.support.tiny import TinyModel, built, randn


def sd_controlnet(**more: Any) -> Any:
    return built(
        "ControlNetModel", block_out_channels=(8, 16), layers_per_block=1, in_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32, attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 8), **more,
    )  # fmt: skip


def _sd_inputs(batch: int, size: int) -> dict[str, Any]:
    inputs = tiny_unets.MODELS["sd15"].inputs(batch, size)
    height, width = inputs["sample"].shape[-2:]
    return {**inputs, "controlnet_cond": randn(batch, 3, 2 * height, 2 * width, seed=9)}


def sd3_controlnet() -> Any:
    return built(
        "SD3ControlNetModel", sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32,
        out_channels=4,
    )  # fmt: skip


def flux_controlnet(modes: int | None = None) -> Any:
    return built(
        "FluxControlNetModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        num_mode=modes,
    )  # fmt: skip


def qwen_image_controlnet() -> Any:
    return built(
        "QwenImageControlNetModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _following(models: dict[str, TinyModel], name: str) -> Any:
    """The inputs of a denoiser, and a picture of the same shape to follow."""

    def inputs(batch: int, size: int) -> dict[str, Any]:
        given = models[name].inputs(batch, size)
        return {**given, "controlnet_cond": randn(*given["hidden_states"].shape, seed=9)}

    return inputs


MODELS = {
    "sd_controlnet": TinyModel(sd_controlnet, _sd_inputs, ((4, 6), (6, 6))),
    "sd3_controlnet": TinyModel(sd3_controlnet, _following(tiny_image_models.MODELS, "sd3"), ((5, 6), (6, 6))),
    "flux_controlnet": TinyModel(
        flux_controlnet, _following(tiny_packed_image_models.MODELS, "flux"), ((5, 6), (6, 6))
    ),
    "qwen_image_controlnet": TinyModel(
        qwen_image_controlnet, _following(tiny_packed_image_models.MODELS, "qwen_image"), ((5, 6), (6, 6))
    ),
}
