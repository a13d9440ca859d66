"""Random-weight causal language models, and what a causal window is, by definition."""

from __future__ import annotations

from typing import Any

import torch

import attn_plugins

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

# X of XConfig, and what it needs beside `tiny`'s own sizes: one for each class that the language rows name
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {**_EXPERTS, "head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Ministral": {**_MIXED, "head_dim": 8},
    "Ministral3": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "sliding_window": 9},
    "Gemma": {"head_dim": 8},
    "Gemma2": {**_MIXED, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.7},
    "Gemma3Text": {**_MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Phi": {},
    "Phi3": {},
    "GptOss": {**_MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "StableLm": {},
    "Starcoder2": {"sliding_window": 9},
    "Cohere": {"logit_scale": 1.0},
    "Cohere2": {**_MIXED, "logit_scale": 1.0},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": _MIXED,
    "Glm": {"head_dim": 8},
    "Glm4": {"head_dim": 8},
    "Glm4Moe": {**_ROUTED, "head_dim": 8},
    "SmolLM3": {},
    "Granite": {},
    "GraniteMoe": {"num_local_experts": 4},
    "Exaone4": {**_MIXED, "head_dim": 8},
    "Ernie4_5": {"head_dim": 8},
    "Helium": {"head_dim": 8},
    "HunYuanDenseV1": {"head_dim": 8},
    "SeedOss": {"head_dim": 8},
    "Apertus": {},
    "Nemotron": {},
}


def tiny(architecture: str = "Llama", **options: Any) -> Any:
    """A model in eval mode: grouped queries, float32, its weights large enough for attention to matter."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **ARCHITECTURES[architecture], **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def visible(
    attention_mask: torch.Tensor, window: int, stride: int = 1, dilation: int = 1, sliding: int | None = None
) -> torch.Tensor:
    """(B, 1, N, N) bool, one pair at a time. A row that is padding sees itself."""
    batch, tokens = attention_mask.shape
    seen = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bool)
    for item in range(batch):
        real = attention_mask[item].bool().tolist()
        first = real.index(True)
        for i in range(tokens):
            seen[item, 0, i, i] = True
            for j in range(first, i + 1):
                query, key = i - first, j - first
                group = query // dilation // stride * stride
                start = max(group + stride - window, 0)
                fits = query % dilation == key % dilation and key // dilation >= start
                seen[item, 0, i, j] |= real[j] and fits and (sliding is None or i - j < sliding)
    return seen


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What plain attention adds to its scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@torch.no_grad()
def expected_logits(
    model: Any, tokens: torch.Tensor, attention_mask: torch.Tensor, window: int, stride: int = 1, dilation: int = 1
) -> torch.Tensor:
    """Logits of an unpatched model that is given the mask as a matrix, with plain ("eager") attention.

    The model's own sliding window, of all layers or of those that its config names, is part of the matrix.
    """

    def matrix(sliding: int | None) -> torch.Tensor:
        return additive(visible(attention_mask, window, stride, dilation, sliding), model.dtype)

    config = model.config
    sliding = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in types:
        mask: Any = {"sliding_attention": matrix(sliding), "full_attention": matrix(None)}
    else:
        mask = matrix(None if types else sliding)
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(tokens, attention_mask=mask, position_ids=positions(attention_mask), use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int, *rule: int) -> tuple[Any, Any]:
    """Token ids and logits of greedy decoding without a cache, each step from a matrix mask on the unpatched model."""
    scores = []
    for _ in range(steps):
        scores.append(expected_logits(model, ids, mask, *rule)[:, -1])
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids, torch.stack(scores, 1)


def check(found: torch.Tensor, expected: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
    """Equal where tokens are real: float32 through two layers, logits of size 10."""
    real = ... if attention_mask is None else attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=5e-5)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Counted from each item's first real token, as `generate` counts."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def patch(model: Any, window: int = 5, stride: int = 1, dilation: int = 1, **more: Any) -> attn_plugins.PatchHandle:
    return attn_plugins.patch(model, "gna", window=window, stride=stride, dilation=dilation, **more)


def prompt(batch: int = 2, tokens: int = 23, left: tuple[int, ...] = (), right: tuple[int, ...] = ()) -> Any:
    """(token ids, attention mask), with so many padding tokens per item."""
    ids = torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    for item, count in enumerate(left):
        mask[item, :count] = 0
    for item, count in enumerate(right):
        mask[item, tokens - count :] = 0
    return ids * mask, mask
