"""Tiny image transformers that get latents (B, C, H, W)."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import TinyModel, built, randn


def sd3(dual: bool = True) -> Any:
    return built(
        "SD3Transformer2DModel", sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32,
        out_channels=4, dual_attention_layers=(0,) if dual else (),
    )  # fmt: skip


def _sd3_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 5 + size, 6),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 8, 32),
        "pooled_projections": randn(batch, 32),
    }


def _latents(batch: int, size: int, text: int = 0, width: int = 16) -> dict[str, Any]:
    """What nearly all of them take: 5 x 6 or 6 x 6 patches of 2 x 2."""
    inputs = {"hidden_states": randn(batch, 4, 10 + 2 * size, 12), "timestep": torch.full((batch,), 500)}
    return {**inputs, "encoder_hidden_states": randn(batch, text, width, seed=2)} if text else inputs


def _text_mask(batch: int, length: int = 8) -> torch.Tensor:
    """Prompts of different lengths in one batch, padded at the end."""
    return (torch.arange(length)[None] < torch.tensor([[5], [3], [8], [1]])[:batch]).long()


def pixart() -> Any:
    return built(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=32, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip


def _pixart_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_latents(batch, size, 8, 32), "encoder_attention_mask": _text_mask(batch)}


def dit() -> Any:
    return built(
        "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def _dit_inputs(batch: int, size: int) -> dict[str, Any]:  # square, whatever its forward says
    latents = randn(batch, 4, 10 + 2 * size, 10 + 2 * size)
    return {"hidden_states": latents, "timestep": torch.full((batch,), 5), "class_labels": torch.arange(batch)}


def hunyuan_dit() -> Any:
    return built(
        "HunyuanDiT2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=16, num_layers=2, mlp_ratio=2.0, cross_attention_dim=8, cross_attention_dim_t5=8,
        pooled_projection_dim=4, text_len=4, text_len_t5=4,
    )  # fmt: skip


def _hunyuan_dit_inputs(batch: int, size: int) -> dict[str, Any]:
    tokens = (5 + size) * 6
    return {
        **_latents(batch, size, 4, 8),
        "timestep": torch.full((batch,), 500.0),
        "text_embedding_mask": _text_mask(batch, 4),
        "encoder_hidden_states_t5": randn(batch, 4, 8),
        "text_embedding_mask_t5": _text_mask(batch, 4),
        "image_meta_size": torch.full((batch, 6), 8.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (randn(tokens, 8), randn(tokens, 8, seed=2)),
    }


def lumina_next() -> Any:
    return built(
        "LuminaNextDiT2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, cross_attention_dim=8,
    )  # fmt: skip


def _lumina_next_inputs(batch: int, size: int) -> dict[str, Any]:
    angles = randn(6, 6, 4)
    return {
        **_latents(batch, size, 8, 8),
        "encoder_mask": _text_mask(batch),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def sana() -> Any:
    return built(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=8, patch_size=2,
    )  # fmt: skip


def _sana_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_latents(batch, size, 8), "encoder_attention_mask": _text_mask(batch)}


def auraflow() -> Any:
    return built(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip


def cogview3() -> Any:
    return built(
        "CogView3PlusTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip


def cogview4() -> Any:
    return built(
        "CogView4Transformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16,
        sample_size=8, rope_axes_dim=(16, 16),
    )  # fmt: skip


def _cogview_inputs(batch: int, size: int) -> dict[str, Any]:
    sizes = {key: torch.full((batch, 2), 8.0) for key in ("original_size", "target_size", "crop_coords")}
    return {**_latents(batch, size, 8), **sizes}


def glm_image() -> Any:
    return built(
        "GlmImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )  # fmt: skip


def _glm_image_inputs(batch: int, size: int) -> dict[str, Any]:
    inputs = _cogview_inputs(batch, size)
    del inputs["original_size"]
    tokens = (5 + size) * 6
    return {
        **inputs,
        "prior_token_id": torch.arange(tokens).remainder(16).repeat(batch, 1),
        "prior_token_drop": torch.zeros(batch, dtype=torch.bool),
    }


def hidream() -> Any:
    return built(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=8, num_attention_heads=2, caption_channels=[16, 12], text_emb_dim=8,
        num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16),
        llama_layers=[0, 2],
    )  # fmt: skip


def _hidream_inputs(batch: int, size: int) -> dict[str, Any]:  # 5 x 6 is filled up to 64 tokens, 6 x 6 is not
    return {
        "hidden_states": _latents(batch, size)["hidden_states"],
        "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": randn(batch, 4, 16, seed=2),
        "encoder_hidden_states_llama3": [randn(batch, 5, 12, seed=seed) for seed in (3, 4, 5)],
        "pooled_embeds": randn(batch, 8),
    }


def lumina2() -> Any:
    return built(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32), cap_feat_dim=8,
    )  # fmt: skip


def _lumina2_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_latents(batch, size, 8, 8), "encoder_attention_mask": (torch.arange(8) < 5).long().repeat(batch, 1)}


def ernie_image() -> Any:
    return built(
        "ErnieImageTransformer2DModel", hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=24,
        in_channels=4, out_channels=4, patch_size=2, text_in_dim=8, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip


def _ernie_image_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_latents(batch, size), "text_bth": randn(batch, 8, 8, seed=2), "text_lens": _text_mask(batch).sum(dim=1)}


def hunyuan_image(glyphs: int | None = None) -> Any:
    return built(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(2, 2), text_embed_dim=16,
        text_embed_2_dim=glyphs, rope_axes_dim=(4, 4),
    )  # fmt: skip


def _hunyuan_image_inputs(batch: int, size: int) -> dict[str, Any]:
    timestep = torch.full((batch,), 500.0)
    return {**_latents(batch, size, 8), "timestep": timestep, "encoder_attention_mask": _text_mask(batch)}


def joy_image() -> Any:
    return built(
        "JoyImageEditTransformer3DModel", patch_size=[1, 2, 2], in_channels=4, hidden_size=16, num_attention_heads=2,
        text_dim=8, mlp_width_ratio=2.0, num_layers=2, rope_dim_list=[4, 2, 2],
    )  # fmt: skip


def _joy_image_inputs(batch: int, size: int) -> dict[str, Any]:
    """One reference of the same size, then the picture that is made."""
    return {**_latents(batch, size, 8, 8), "hidden_states": randn(batch, 2, 4, 1, 10 + 2 * size, 12)}


def joy_image_plus() -> Any:
    return built(
        "JoyImageEditPlusTransformer3DModel", patch_size=[1, 2, 2], in_channels=4, hidden_size=16,
        num_attention_heads=2, text_dim=8, mlp_width_ratio=2.0, num_layers=2, rope_dim_list=[4, 2, 2],
    )  # fmt: skip


def _joy_image_plus_inputs(batch: int, size: int) -> dict[str, Any]:
    height = 5 + size
    return {
        **_latents(batch, size, 8, 8),
        "hidden_states": randn(batch, height * 6 + 12, 4, 1, 2, 2),
        "encoder_hidden_states_mask": _text_mask(batch).float(),
        "shape_list": [[(1, height, 6), (1, 3, 4)]] * batch,
    }


def prx() -> Any:
    return built(
        "PRXTransformer2DModel", in_channels=4, patch_size=2, context_in_dim=8, hidden_size=16, mlp_ratio=2.0,
        num_heads=2, depth=2, axes_dim=[4, 4],
    )  # fmt: skip


def _prx_inputs(batch: int, size: int) -> dict[str, Any]:
    return {**_latents(batch, size, 8, 8), "attention_mask": _text_mask(batch).bool()}


def z_image() -> Any:
    return built(
        "ZImageTransformer2DModel", all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 2, 2], axes_lens=[128, 32, 32],
    )  # fmt: skip


def _z_image_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "x": list(randn(batch, 4, 1, 10 + 2 * size, 12)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": [randn(length, 8, seed=length) for length in (40, 7, 9, 3)[:batch]],
    }


def bria_fibo2() -> Any:
    return built(
        "BriaFibo2Transformer2DModel", in_channels=4, patch_size=2, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2,
        cap_feat_dim=8, injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8,
        gist_step=2, gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 2, 2), axes_lens=(64, 32, 32),
    )  # fmt: skip


def _bria_fibo2_inputs(batch: int, size: int) -> dict[str, Any]:
    lengths = torch.tensor([[12], [5], [9], [3]])[:batch]
    return {
        **_latents(batch, size),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(batch, 2, 12, 8),
        "encoder_attention_mask": torch.arange(12)[None] < lengths,
    }


def _aura_inputs(batch: int, size: int) -> dict[str, Any]:
    return _latents(batch, size, 8)


_GRIDS = ((5, 6), (6, 6))
MODELS = {
    "sd3": TinyModel(sd3, _sd3_inputs, _GRIDS),
    "pixart": TinyModel(pixart, _pixart_inputs, _GRIDS),
    "dit": TinyModel(dit, _dit_inputs, ((5, 5), (6, 6))),
    "hunyuan_dit": TinyModel(hunyuan_dit, _hunyuan_dit_inputs, _GRIDS),
    "lumina_next": TinyModel(lumina_next, _lumina_next_inputs, _GRIDS),
    "sana": TinyModel(sana, _sana_inputs, _GRIDS),
    "auraflow": TinyModel(auraflow, _aura_inputs, _GRIDS),
    "cogview3": TinyModel(cogview3, _cogview_inputs, _GRIDS),
    "cogview4": TinyModel(cogview4, _cogview_inputs, _GRIDS),
    "glm_image": TinyModel(glm_image, _glm_image_inputs, _GRIDS),
    "hidream": TinyModel(hidream, _hidream_inputs, _GRIDS),
    "lumina2": TinyModel(lumina2, _lumina2_inputs, _GRIDS),
    "ernie_image": TinyModel(ernie_image, _ernie_image_inputs, _GRIDS),
    "hunyuan_image": TinyModel(hunyuan_image, _hunyuan_image_inputs, _GRIDS),
    "joy_image": TinyModel(joy_image, _joy_image_inputs, _GRIDS),
    "joy_image_plus": TinyModel(joy_image_plus, _joy_image_plus_inputs, _GRIDS, per_item=("shape_list",)),
    "prx": TinyModel(prx, _prx_inputs, _GRIDS),
    "z_image": TinyModel(z_image, _z_image_inputs, _GRIDS, per_item=("x", "cap_feats")),
    "bria_fibo2": TinyModel(bria_fibo2, _bria_fibo2_inputs, _GRIDS),
}
