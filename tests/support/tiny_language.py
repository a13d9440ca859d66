"""Random-weight causal language models, and what a causal window is, by definition."""

from __future__ import annotations

from typing import Any

import torch

import attn_plugins

ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Phi3")


def tiny(architecture: str = "Llama", **options: Any) -> Any:
    """A model in eval mode: grouped queries, float32, its weights large enough for attention to matter."""
    import transformers

    torch.manual_seed(0)
    if architecture == "Qwen3":
        options.setdefault("head_dim", 8)
    if architecture == "Mistral":
        options.setdefault("sliding_window", None)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
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
def expected_logits(model: Any, tokens: torch.Tensor, attention_mask: torch.Tensor, *rule: int | None) -> torch.Tensor:
    """Logits of an unpatched model that is given the mask as a matrix, with plain ("eager") attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        mask = additive(visible(attention_mask, *rule), model.dtype)
        return model(tokens, attention_mask=mask, position_ids=positions(attention_mask), use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


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
