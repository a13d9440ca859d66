"""Span attention over block plans, for the GPU kernels: one plan for all heads of a span."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.ops.heads import Pair, attend_by_head, equal_runs
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.spans import Place, SpanRule, span_plan


def _plans_of(spec: Sequence[int], q: torch.Tensor, backend: str) -> list[tuple[slice, BlockPlan]]:
    """[keys, span, sink, grain, start, first, end of each item]: a plan for each run of items that are alike."""
    keys, span, sink, grain, *rest = (int(value) for value in spec)
    places = [Place(*rest[at : at + 3]) for at in range(0, len(rest), 3)]
    rule, queries = SpanRule(span, sink, grain), q.shape[2]
    return [(items, span_plan(rule, place, queries, keys)) for items, place in equal_runs(places)]


_op = register_sparse_op("span_blocks", _plans_of)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: list[SpanRule],
    places: list[Place],
    scale: float,
    backend: str,
) -> Pair:
    """Output and LSE; a rule per query head, a place per item."""
    where = [n for place in places for n in (place.start, place.first, place.end)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: SpanRule) -> Pair:
        return _op(q, k, v, scale, [k.shape[2], rule.span, rule.sink, rule.grain, *where], backend)

    return attend_by_head(q, k, v, rules, attend)
