"""Random-weight language models that see, and a prompt with one picture in it for each."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tiny import randn
from tests.support.tiny_vision import SIZES

PICTURE, VIDEO, BEGIN, END = 60, 61, 62, 63
_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
_MARKS = {"video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
_QWEN_TEXT = {**_TEXT, "rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2]}}
_OWN_WINDOWS = {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
_DEEP = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_INTERLEAVED = {**_ROTARY, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LAST = {"vision_feature_layer": -1}

# X of XConfig and XForConditionalGeneration: the kinds and options of its text and vision configs, its own options, and
# how many tokens the picture is
MODELS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], dict[str, Any], int]] = {
    "Llava": (("Llama", {}), ("CLIPVision", {}), _LAST, 16),
    "LlavaNext": (("Llama", {}), ("CLIPVision", {}), {**_LAST, "image_grid_pinpoints": [[32, 32]]}, 36),
    "LlavaOnevision": (("Qwen2", {}), ("SiglipVision", {}), {**_LAST, "image_grid_pinpoints": [[32, 32]]}, 36),
    "VipLlava": (("Llama", {}), ("CLIPVision", {}), {"vision_feature_layers": [-1, -2]}, 16),
    "Mistral3": (("Mistral", {"sliding_window": None}), ("PixtralVision", {"head_dim": 16}), _LAST, 4),
    "AyaVision": (
        ("Cohere2", {"layer_types": ["full_attention"] * 2, "logit_scale": 1.0}),
        ("SiglipVision", {}),
        {**_LAST, "downsample_factor": 2, "adapter_layer_norm_eps": 1e-6},
        4,
    ),
    "InternVL": (("Qwen2", {}), ("InternVLVision", {"image_size": [32, 32], "patch_size": [8, 8]}), {}, 4),
    "Idefics3": (("Llama", {}), ("", {}), {"scale_factor": 2}, 4),
    "SmolVLM": (("Llama", {}), ("", {}), {"scale_factor": 2}, 4),
    "Qwen2VL": (("", _QWEN_TEXT), ("", {**_QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}), _MARKS, 4),
    "Qwen2_5_VL": (("", _QWEN_TEXT), ("", {**_QWEN_VISION, **_OWN_WINDOWS}), _MARKS, 4),
    "Qwen3VL": (
        ("", {**_TEXT, "head_dim": 8, "rope_parameters": _INTERLEAVED}),
        ("", {**_QWEN_VISION, **_DEEP}),
        _MARKS,
        4,
    ),
    "Qwen3VLMoe": (
        ("", {**_TEXT, **_EXPERTS, "head_dim": 8, "rope_parameters": _INTERLEAVED}),
        ("", {**_QWEN_VISION, **_DEEP}),
        _MARKS,
        4,
    ),
    "Gemma3": (
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
        ("SiglipVision", {"vision_use_head": False}),
        {"mm_tokens_per_image": 4, "boi_token_index": BEGIN, "eoi_token_index": END},
        4,
    ),
}


def build(name: str) -> Any:
    """The model, in eval mode."""
    import transformers

    def part(kind: str, sizes: dict[str, Any], options: dict[str, Any]) -> Any:
        if name.startswith("Qwen"):
            return options
        return getattr(transformers, f"{kind}Config")(**{**sizes, **options}) if kind else {**sizes, **options}

    (text, text_options), (vision, vision_options), options, _ = MODELS[name]
    torch.manual_seed(0)
    by_id = name in ("InternVL", "Idefics3", "SmolVLM") or name.startswith("Qwen")
    config = getattr(transformers, f"{name}Config")(
        text_config=part(text, _TEXT, text_options),
        vision_config=part(vision, SIZES, vision_options),
        **{"image_token_id" if by_id else "image_token_index": PICTURE},
        **options,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None
    return model


def inputs(name: str, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments: three words, a picture, six words."""
    words = torch.randint(3, 59, (1, 9), generator=torch.Generator().manual_seed(seed))
    tokens = [*words[0, :3].tolist(), *[PICTURE] * MODELS[name][3], *words[0, 3:].tolist()]
    more: dict[str, Any] = {}
    pixels = randn(1, 3, 32, 32, seed=seed)
    if name.startswith("Qwen"):
        pixels, more["image_grid_thw"] = randn(16, 3 * 2 * 8 * 8, seed=seed), torch.tensor([[1, 4, 4]])
    elif name in ("Idefics3", "SmolVLM"):
        pixels = pixels[:, None]
    elif name in ("LlavaNext", "LlavaOnevision"):  # the whole picture, and its one part
        pixels = randn(1, 2, 3, 32, 32, seed=seed)
    if name in ("LlavaNext", "LlavaOnevision", "Mistral3"):
        more["image_sizes"] = torch.tensor([[32, 32]])
    ids = torch.tensor([tokens])
    if name.startswith("Qwen"):
        more["mm_token_type_ids"] = (ids == PICTURE).long()
    if name == "Gemma3":
        more["token_type_ids"] = (ids == PICTURE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}


def language_model(model: Any) -> Any:
    return getattr(model.model, "language_model", None) or model.model.text_model


def tower(model: Any) -> Any:
    """The vision model inside."""
    names = ("vision_tower", "visual", "vision_model")
    return next(getattr(model.model, name) for name in names if hasattr(model.model, name))
