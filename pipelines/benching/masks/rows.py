"""Masks of row intervals: every query sees the first `lead` keys, and one run of keys besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.masks.mask import Mask, Shape, Tables, Told
from attn_plugins.pipelines.benching.plans import choose_plan
from attn_plugins.pipelines.benching.sides import Built, Cannot, Setting
from attn_plugins.plan.block_plan import BlockPlan

CHUNK = 1 << 22  # entries of a table of rows by blocks that are made at a time

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # head, query, key


@dataclass(frozen=True, eq=False)
class Rows:
    """A query sees the keys [0, lead) and [low, high).

    Attributes:
        lead, low, high: (H or 1, N) int64; low may be above high (no second run), and below lead (they overlap).
    """

    lead: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def heads(self) -> int:
        return self.low.shape[0]

    @property
    def start(self) -> torch.Tensor:
        """Where the second run begins that the first does not hold."""
        return torch.maximum(self.low, self.lead)

    @property
    def area(self) -> torch.Tensor:
        """(H or 1,) pairs."""
        return (self.lead + (self.high - self.start).clamp(min=0)).sum(-1)

    def tables(self, starts: torch.Tensor, ends: torch.Tensor, q_of: torch.Tensor, count: int) -> Tables:
        """Which KV blocks [start, end) the query blocks see; `q_of` (N,): the block, of `count`, of each query."""
        shape = (self.heads, count, len(starts))
        least, most = torch.full(shape, 1 << 40), torch.zeros(shape, dtype=torch.int64)
        size = ends - starts
        for some in torch.arange(len(q_of)).split(max(1, CHUNK // len(starts))):
            lead, start, high = (t[:, some, None] for t in (self.lead, self.start, self.high))
            keys = (torch.minimum(lead, ends) - starts).clamp(min=0)
            keys += (torch.minimum(high, ends) - torch.maximum(start, starts)).clamp(min=0)
            index = q_of[some][None, :, None].expand_as(keys)
            least.scatter_reduce_(1, index, keys, "amin")
            most.scatter_reduce_(1, index, keys, "amax")
        return most > 0, (least == size) & (most > 0)


@dataclass(frozen=True, eq=False)
class RowMask(Mask):
    """A mask of row intervals.

    Args:
        rule: the same in arithmetic, written apart from `intervals`: what checks go by.
        edges: places where blocks of a plan are cut, so that few of them need a mask.
    """

    shape: Shape
    option: str
    intervals: Rows
    rule: Rule
    edges: tuple[int, ...] = ()
    told: Told | None = None
    causal: bool = False

    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.rule(head, query, key)

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        return self.intervals.heads > 1

    @property
    def pairs(self) -> float:
        area = self.intervals.area.double()
        return float(area.mean())

    def flex(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        """The mask function looks the intervals up: one compiled graph then serves all masks of a length."""
        n, device = self.shape.tokens, setting.device
        starts = torch.arange(0, n, flex.BLOCK)
        of = torch.arange(n) // flex.BLOCK
        tables = self.intervals.tables(starts, (starts + flex.BLOCK).clamp(max=n), of, len(starts))
        rows = self.intervals
        lead, low, high = (t.to(device, torch.int32) for t in (rows.lead, rows.low, rows.high))
        step = int(rows.heads > 1)

        def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            h = h * step
            return (j < lead[h, i]) | ((low[h, i] <= j) & (j < high[h, i]))

        gqa = self.shape.heads != self.shape.kv_heads
        return flex.build((tables[0].to(device), tables[1].to(device)), mask_mod, n, None, gqa, not setting.tiny)

    def plan(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> BlockPlan:
        if self.intervals.heads > 1:
            raise Cannot("its rows differ by head: see ours_operator")
        return choose_plan(self.intervals, self.edges, setting)
