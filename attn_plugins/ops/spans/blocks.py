"""Span attention over block plans, for the GPU kernels: one plan for all heads of a span."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.ops.neighborhood.heads import kv_heads_of
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.spans import Place, SpanRule, span_plan


def _plans_of(spec: Sequence[int], q: torch.Tensor, backend: str) -> list[tuple[slice, BlockPlan]]:
    """[keys, span, sink, grain, start, first, end of each item]: a plan for each run of items that are alike."""
    keys, span, sink, grain, *rest = (int(value) for value in spec)
    places = [Place(*rest[at : at + 3]) for at in range(0, len(rest), 3)]
    parts, first = [], 0
    for last in range(1, len(places) + 1):
        if last == len(places) or places[last] != places[first]:
            plan = span_plan(SpanRule(span, sink, grain), places[first], q.shape[2], keys)
            parts.append((slice(first, last), plan))
            first = last
    return parts


_op = register_sparse_op("span_blocks", _plans_of)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: list[SpanRule],
    places: list[Place],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE; a rule per query head, a place per item."""
    groups: dict[SpanRule, list[int]] = {}
    for head, rule in enumerate(rules):
        groups.setdefault(rule, []).append(head)
    where = [n for place in places for n in (place.start, place.first, place.end)]
    outs, lses = [], []
    for rule, members in groups.items():
        one = (q, k, v)
        if len(groups) > 1:
            heads = torch.tensor(members, device=q.device)
            kv = torch.tensor(kv_heads_of(tuple(members), q.shape[1], k.shape[1]), device=q.device)
            one = (q[:, heads], k[:, kv], v[:, kv])
        out, lse = _op(*one, scale, [k.shape[2], rule.span, rule.sink, rule.grain, *where], backend)
        outs.append(out)
        lses.append(lse)
    if len(groups) == 1:
        return outs[0], lses[0]
    order = [head for members in groups.values() for head in members]
    back = torch.tensor([order.index(head) for head in range(len(rules))], device=q.device)
    return torch.empty_like(q).copy_(torch.cat(outs, dim=1)[:, back]), torch.cat(lses, dim=1)[:, back]
