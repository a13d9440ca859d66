"""Span attention by its definition: a dense boolean mask from the rule, and a softmax. Any dtype, differentiable."""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.plan.spans import Place, SpanRule


def span_mask(rules: list[SpanRule], places: list[Place], queries: int, keys: int) -> torch.Tensor:
    """(B, H, queries, keys) bool: positions are counted from an item's first real token, padding sees nothing."""
    items = []
    for place in places:
        i = place.start - place.first + torch.arange(queries)[:, None]
        j = torch.arange(keys) - place.first
        length = place.end - place.first
        real = (i >= 0) & (i < length) & (j >= 0) & (j < length)
        items.append(torch.stack([rule.sees(i, j) & real for rule in rules]))
    return torch.stack(items)


def span_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: list[SpanRule], places: list[Place], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D), a rule per query head, a place per item. Returns output and LSE."""
    return masked_attention(q, k, v, span_mask(rules, places, q.shape[2], k.shape[2]).to(q.device), scale)
