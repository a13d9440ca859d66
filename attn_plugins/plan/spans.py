"""Causal spans with sinks: the rule of one head, and the block plan of it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.gpu_tiles import KV_STEP, Q_STEP

if TYPE_CHECKING:
    from attn_plugins.plan.intervals import Intervals

BLOCK = 64  # of granularity "block", in tokens
Position = TypeVar("Position", int, torch.Tensor)


@dataclass(frozen=True)
class SpanRule:
    """Query i sees key j iff `j <= i and (j < sink or j >= first(i))`; span and sink are whole blocks of `grain`."""

    span: int
    sink: int
    grain: int = 1

    @classmethod
    def of(cls, span: int, sink: int, granularity: str) -> SpanRule:
        grain = 1 if granularity == "token" else BLOCK
        return cls(-(-span // grain) * grain, -(-sink // grain) * grain, grain)

    def first(self, i: Position) -> Position:
        """The first key of query i's window; it may be negative."""
        return i // self.grain * self.grain - self.span + self.grain

    @property
    def whole(self) -> int:
        """Queries before this one see all that came before them: their windows reach the sinks."""
        return self.span + self.sink

    def sees(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & ((j < self.sink) | (j >= self.first(i)))


@dataclass(frozen=True)
class Place:
    """Of one batch item, by index in k: its first query, its first real token, and where the real tokens end."""

    start: int
    first: int
    end: int

    def rows(self, queries: int) -> tuple[int, int]:
        """The queries that are real tokens, [a, b)."""
        first = min(max(self.first - self.start, 0), queries)
        return first, max(min(self.end - self.start, queries), first)


@dataclass(frozen=True, eq=False)
class SpanMask:
    """The mask rule of a span plan. Its blocks end at the sinks, so that a masked one is a row interval."""

    rule: SpanRule
    place: Place
    empty_rows: bool

    def pattern(self, row: int, item: int, head: int) -> Hashable:
        return row

    def keys(self, plan: BlockPlan, rows: torch.Tensor, item: int, head: int) -> torch.Tensor:
        return plan.kv_tokens(rows, item, head)

    def mask(self, plan: BlockPlan, row: int, item: int, head: int) -> torch.Tensor:
        return self.row(plan, row, item, head)[1]

    def row(self, plan: BlockPlan, row: int, item: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.tensor([row])
        keys = plan.kv_tokens(one, item, head)[0]
        i = plan.q_tokens(one)[0] + (self.place.start - self.place.first)
        return keys, self.rule.sees(i[:, None], keys - self.place.first)

    def intervals(self, plan: BlockPlan) -> Intervals:
        """A row sees from its window's first key, or from the first of all, to itself; whole blocks do not ask."""
        from attn_plugins.plan.intervals import pack

        i = torch.arange(plan.q_length) + self.place.start
        low = (self.rule.first(i - self.place.first) + self.place.first).clamp(0, plan.kv_length)
        low = low.masked_fill(i - self.place.first < self.rule.whole, 0)
        return pack([torch.arange(plan.kv_length)], [low], [i], [plan.kv_length])


@functools.lru_cache(maxsize=64)
def span_plan(rule: SpanRule, place: Place, queries: int, keys: int) -> BlockPlan:
    """The plan of `rule` for `queries` queries and `keys` keys of an item whose tokens stand at `place`.

    Blocks are whole steps of a kernel. Padding is in no block, or in a block that sees nothing.
    """
    a, b = place.rows(queries)
    if a == b:
        zero, none = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
        all_rows, all_keys = (torch.tensor([size], dtype=torch.int32) for size in (queries, keys))
        return BlockPlan(queries, keys, zero, all_rows, zero, all_keys, none[..., None] - 1, none, none)
    offset = place.start - place.first
    low, high = _cut(a + offset, b + offset, rule.sink, Q_STEP)
    left, right = _cut(0, b + offset, rule.sink, KV_STEP)
    before = left <= high[:, None] - 1
    visited = before & ((left < rule.sink) | (right > rule.first(low)[:, None]))
    whole = (right - 1 <= low[:, None]) & ((right <= rule.sink) | (left >= rule.first(high - 1)[:, None]))
    rank = torch.where(visited & whole, 0, torch.where(visited, 1, 2))
    count = visited.sum(-1, dtype=torch.int32)
    lists = torch.sort(rank, dim=-1, stable=True).indices[:, : max(int(count.max()), 1)].to(torch.int32)
    lists = lists.masked_fill(torch.arange(lists.shape[1]) >= count[:, None], -1)
    full = (visited & whole).sum(-1, dtype=torch.int32)
    mask = SpanMask(rule, place, not rule.whole) if bool((full < count).any()) else None
    starts = ((low - offset).int(), (high - low).int(), (left + place.first).int(), (right - left).int())
    return BlockPlan(queries, keys, *starts, lists[None, None], full[None, None], count[None, None], mask)


def _cut(first: int, last: int, sink: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where blocks of at most `step` begin and end, with an edge at the sink."""
    middle = min(max(sink, first), last)
    edges = sorted({*range(first, middle, step), *range(middle, last, step)})
    return torch.tensor(edges), torch.tensor([*edges[1:], last])
