"""Tiny image transformers that get packed tokens (B, N, C): FLUX, Qwen-Image and their kin."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, built, randn

_FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32,
}  # fmt: skip


def flux_ids(height: int, width: int, time: int = 0, axes: int = 3, row: int = 0, column: int = 0) -> torch.Tensor:
    """Position ids (H * W, axes) of a picture that begins at (row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height) + row, torch.arange(width) + column, indexing="ij")
    places = [torch.full((height, width), float(time)), rows, columns, *[torch.zeros(height, width)] * (axes - 3)]
    return torch.stack(places, dim=-1).reshape(-1, axes).float()


def flux() -> Any:
    return built(
        "FluxTransformer2DModel", patch_size=1, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **_FLUX
    )  # fmt: skip


def _packed(batch: int, size: int, axes: int = 3) -> dict[str, Any]:
    height, width = 5 + size, 6
    return {
        "hidden_states": randn(batch, height * width, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(batch, 8, 32, seed=2),
        "txt_ids": torch.zeros(8, axes),
        "img_ids": flux_ids(height, width, axes=axes),
    }


def _flux_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_packed(batch, size), "pooled_projections": randn(batch, 32)}


def _mask(batch: int, tokens: int = 0) -> torch.Tensor:
    """Prompts of different lengths, padded at the end, and `tokens` behind them."""
    text = torch.arange(8)[None] < torch.tensor([[5], [3], [8], [1]])[:batch]
    return torch.cat([text, torch.ones(batch, tokens, dtype=torch.bool)], dim=1)


def flux2() -> Any:
    return built("Flux2Transformer2DModel", timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **_FLUX)


def _flux2_inputs(batch: int, size: int) -> dict[str, Any]:
    """With a reference of 3 x 4 tokens behind the picture."""
    inputs = _packed(batch, size, 4)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], randn(batch, 12, 4, seed=3)], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], flux_ids(3, 4, time=10, axes=4)])
    return {**inputs, "guidance": torch.ones(batch)}


def flux3() -> Any:
    return built(
        "Flux3Transformer2DModel", cond_in_channels=4, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4), **_FLUX
    )


def _flux3_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        **_packed(batch, size, 4),
        "image_cond_hidden_states": randn(batch, 12, 4, seed=3),
        "image_cond_ids": flux_ids(3, 4, time=10, axes=4),
    }


def chroma() -> Any:
    return built(
        "ChromaTransformer2DModel", axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1, **_FLUX,
    )  # fmt: skip


def _chroma_inputs(batch: int, size: int) -> dict[str, Any]:
    inputs = _packed(batch, size)
    return {**inputs, "attention_mask": _mask(batch, inputs["hidden_states"].shape[1])}


def bria() -> Any:
    return built("BriaTransformer2DModel", axes_dims_rope=[4, 4, 8], **_FLUX)


def bria_fibo() -> Any:
    return built(
        "BriaFiboTransformer2DModel", axes_dims_rope=[4, 4, 8], text_encoder_dim=8, **{**_FLUX, "num_single_layers": 2}
    )


def _bria_fibo_inputs(batch: int, size: int) -> dict[str, Any]:
    inputs = _packed(batch, size)
    mask = _mask(batch, inputs["hidden_states"].shape[1])[:, None, None]
    layers = [randn(batch, 8, 8, seed=seed) for seed in (3, 4, 5)]
    return {**inputs, "text_encoder_layers": layers, "joint_attention_kwargs": {"attention_mask": mask}}


def ovis_image() -> Any:
    return built("OvisImageTransformer2DModel", out_channels=4, axes_dims_rope=(4, 4, 8), **_FLUX)


def longcat_image() -> Any:
    return built("LongCatImageTransformer2DModel", pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], **_FLUX)


def _longcat_inputs(batch: int, size: int) -> dict[str, Any]:
    """Its picture begins where its longest prompt ends."""
    return {**_packed(batch, size), "img_ids": flux_ids(5 + size, 6, time=1, row=8, column=8)}


def krea2() -> Any:
    return built(
        "Krea2Transformer2DModel", in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=16, timestep_embed_dim=16, text_hidden_dim=8, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip


def _krea2_inputs(batch: int, size: int) -> dict[str, Any]:
    inputs = _packed(batch, size)
    ids = torch.cat([inputs.pop("txt_ids"), inputs.pop("img_ids")])
    text = randn(batch, 8, 2, 8, seed=2)
    return {**inputs, "encoder_hidden_states": text, "position_ids": ids, "encoder_attention_mask": _mask(batch)}


def ideogram4() -> Any:
    return built(
        "Ideogram4Transformer2DModel", in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=16, adaln_dim=8, llm_features_dim=8, mrope_section=(4, 2, 2),
    )  # fmt: skip


def _ideogram4_inputs(batch: int, size: int) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    height, width, text = 5 + size, 6, 8
    tokens = text + height * width
    place = torch.arange(text)[:, None].repeat(1, 3)
    ids = torch.cat([place, flux_ids(height, width, time=text, row=text, column=text).long()])
    roles = torch.full((batch, tokens), OUTPUT_IMAGE_INDICATOR)
    roles[:, :text] = LLM_TOKEN_INDICATOR
    return {
        "hidden_states": randn(batch, tokens, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(batch, tokens, 8, seed=2),
        "position_ids": ids.repeat(batch, 1, 1),
        "segment_ids": torch.ones(batch, tokens, dtype=torch.long),
        "indicator": roles,
    }


def qwen_image(**more: Any) -> Any:
    return built(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), **more,
    )  # fmt: skip


def _qwen_inputs(batch: int, size: int, references: tuple[tuple[int, int, int], ...] = ((1, 3, 4),)) -> dict[str, Any]:
    height, width = 5 + size, 6
    tokens = height * width + sum(t * h * w for t, h, w in references)
    return {
        "hidden_states": randn(batch, tokens, 16),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(batch, 8, 16, seed=2),
        "encoder_hidden_states_mask": _mask(batch).long(),
        "img_shapes": [[(1, height, width), *references]] * batch,
    }


def qwen_image21() -> Any:
    return built(
        "QwenImage21Transformer2DModel", in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=16, mlp_ratio=2, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _qwen21_inputs(batch: int, size: int) -> dict[str, Any]:
    height, width = 4 + 2 * size, 6
    slots = torch.cat([torch.zeros(8, dtype=torch.bool), torch.ones(height * width // 4, dtype=torch.bool)])
    return {
        "hidden_states": randn(batch, height * width, 4),
        "timestep": torch.full((batch,), 0.5)[:1],
        "encoder_hidden_states": randn(batch, 8, 16, seed=2),
        "encoder_hidden_states_mask": _mask(batch),
        "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": slots.repeat(batch, 1),
    }


def nucleus_image() -> Any:
    return built(
        "NucleusMoEImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1, joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8), mlp_ratio=2.0, moe_enabled=False,
    )  # fmt: skip


def _nucleus_inputs(batch: int, size: int) -> dict[str, Any]:
    return _qwen_inputs(batch, size, references=())


_GRIDS = ((5, 6), (6, 6))
MODELS = {
    "flux": TinyModel(flux, _flux_inputs, _GRIDS),
    "flux2": TinyModel(flux2, _flux2_inputs, _GRIDS),
    "flux3": TinyModel(flux3, _flux3_inputs, _GRIDS),
    "chroma": TinyModel(chroma, _chroma_inputs, _GRIDS),
    "bria": TinyModel(bria, _packed, _GRIDS),
    "bria_fibo": TinyModel(bria_fibo, _bria_fibo_inputs, _GRIDS),
    "ovis_image": TinyModel(ovis_image, _packed, _GRIDS),
    "longcat_image": TinyModel(longcat_image, _longcat_inputs, _GRIDS),
    "krea2": TinyModel(krea2, _krea2_inputs, _GRIDS),
    "ideogram4": TinyModel(ideogram4, _ideogram4_inputs, _GRIDS),
    "qwen_image": TinyModel(qwen_image, _qwen_inputs, _GRIDS, per_item=("img_shapes",)),
    "qwen_image21": TinyModel(qwen_image21, _qwen21_inputs, ((4, 6), (6, 6)), per_item=("img_shapes",)),
    "nucleus_image": TinyModel(nucleus_image, _nucleus_inputs, _GRIDS, per_item=("img_shapes",)),
}
