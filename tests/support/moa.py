"""Spans per head by definition: one mask matrix for each layer of an unpatched model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from attn_plugins.methods.moa import SpanPlan
from tests.support.tiny_language import additive, positions

# of two layers: four query heads over two KV heads; spans that differ inside a group, a dense head, a tiny one
UNEVEN = SpanPlan(((3, 9, 5, 20), (8, 8, 0, 4)), ((0, 0, 0.1, 0), (0, 0, 1, 0.3)), "query", 4, 2, sink=2, block=1)
EVEN = SpanPlan(((4, 9), (0, 6)), ((0, 0), (1, 0)), "kv", 4, 2, sink=2, block=1)


def seen(
    attention_mask: torch.Tensor, spans: list[int], sink: int, sliding: int | None = None, grain: int = 1
) -> torch.Tensor:
    """(B, H, N, N) bool; positions count from an item's first real token, a row that is padding sees itself."""
    batch, tokens = attention_mask.shape
    at = torch.arange(tokens)
    own = torch.eye(tokens, dtype=torch.bool)
    items = []
    for real in attention_mask.bool():
        p = at - int(real.int().argmax())
        i, j = p[:, None], p
        heads = []
        for span in spans:
            back = i - j if grain == 1 else (i // grain - j // grain) * grain
            rule = (j < sink) | (back < span)
            if sliding is not None:
                rule = rule & (i - j < sliding)
            heads.append((rule & (j <= i) & (j >= 0) & real & real[:, None]) | own)
        items.append(torch.stack(heads))
    return torch.stack(items)


def query_spans(plan: SpanPlan, n: int) -> list[list[int]]:
    """Of each layer's query heads."""
    rows = plan.spans(n)
    return rows.repeat_interleave(plan.query_heads // rows.shape[1], dim=1).tolist()


@contextlib.contextmanager
def masked_layers(model: Any, attention_mask: torch.Tensor, plan: SpanPlan, n: int, grain: int = 1) -> Iterator[None]:
    """Inside, each layer of the unpatched model is given a mask matrix of its own.

    float64 models run SDPA, for the softmax of transformers' plain attention is in float32.
    """
    config = model.config
    types = getattr(config, "layer_types", None)
    hooks = []
    layers = [module for name, module in model.named_modules() if name.endswith((".self_attn", ".attention"))]
    for index, (module, spans) in enumerate(zip(layers, query_spans(plan, n), strict=True)):
        slides = types[index] == "sliding_attention" if types else True
        sliding = getattr(config, "sliding_window", None) if slides else None
        matrix = additive(seen(attention_mask, spans, plan.sink, sliding, grain), model.dtype)

        def swap(module: Any, args: Any, kwargs: Any, matrix: torch.Tensor = matrix) -> Any:
            return args, {**kwargs, "attention_mask": matrix}

        hooks.append(module.register_forward_pre_hook(swap, with_kwargs=True))
    before = config._attn_implementation
    model.set_attn_implementation("sdpa" if model.dtype == torch.float64 else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def expected_logits(
    model: Any, ids: torch.Tensor, attention_mask: torch.Tensor, plan: SpanPlan, n: int, grain: int = 1
) -> torch.Tensor:
    """Logits of the unpatched model under `masked_layers`, without a cache."""
    at = positions(attention_mask)
    with masked_layers(model, attention_mask, plan, n, grain):
        return model(ids, attention_mask=attention_mask, position_ids=at, use_cache=False).logits


def greedy(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int, plan: SpanPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and logits of greedy decoding, each step from scratch, by the rule at the final length."""
    scores = []
    n = ids.shape[1] + steps
    for _ in range(steps):
        scores.append(expected_logits(model, ids, mask, plan, n)[:, -1])
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids, torch.stack(scores, 1)


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int, **options: Any) -> Any:
    """Greedy `generate`, to the full length, with logits."""
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
