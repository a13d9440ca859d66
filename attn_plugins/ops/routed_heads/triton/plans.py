"""Dense and causal attention as block plans: what the backward runs on."""

from __future__ import annotations

import functools

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.spans import Place, SpanRule, span_plan

BLOCK = 128  # rows


@functools.lru_cache(maxsize=64)
def plan_of(queries: int, keys: int, first: int, end: int, causal: bool) -> BlockPlan:
    """All queries see the keys [first, end), or those up to their own."""
    if causal:
        return span_plan(SpanRule.of(keys, 0, "token"), Place(keys - queries, first, end), queries, keys)
    rows = [(start, min(BLOCK, queries - start)) for start in range(0, queries, BLOCK)]
    real = [(first, end - first)] if end > first else []
    rest = [(start, stop - start) for start, stop in ((0, first), (end, keys)) if stop > start]
    return BlockPlan.from_lists(rows, [*real, *rest], [[0] if real else [] for _ in rows])
