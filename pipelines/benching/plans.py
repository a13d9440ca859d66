"""Row intervals as a block plan: blocks cut at a mask's edges, sized by a cost model on a CPU, by steps on a GPU."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attn_plugins.pipelines.benching.sides import Setting
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.cost import CALL, GATHER, MASKED, PAIR, SLICES
from attn_plugins.plan.gpu_tiles import KV_STEP, Q_STEP
from attn_plugins.plan.intervals import Intervals, pack

if TYPE_CHECKING:
    from attn_plugins.pipelines.benching.masks.rows import Rows

TILES = (128, 256, 512, 1024, 2048)  # queries of a tile that are tried on a CPU


@dataclass(frozen=True, eq=False)
class RowRule:
    """The mask rule of a plan of row intervals. Its blocks end where the first runs do, so a masked one is one run."""

    rows: Rows
    patterns: dict[int, bytes]
    empty_rows: bool

    def pattern(self, row: int, item: int, head: int) -> Hashable:
        return self.patterns[row]

    def keys(self, plan: BlockPlan, rows: torch.Tensor, item: int, head: int) -> torch.Tensor:
        return plan.kv_tokens(rows, item, head)

    def mask(self, plan: BlockPlan, row: int, item: int, head: int) -> torch.Tensor:
        return self.row(plan, row, item, head)[1]

    def row(self, plan: BlockPlan, row: int, item: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.tensor([row])
        keys, q = plan.kv_tokens(one, item, head)[0], plan.q_tokens(one)[0]
        lead, start, high = (t[0, q, None] for t in (self.rows.lead, self.rows.start, self.rows.high))
        return keys, (keys < lead) | ((start <= keys) & (keys < high))

    def intervals(self, plan: BlockPlan) -> Intervals:
        """For kernels: the second run of each row, joined to the first where they touch; whole blocks do not ask."""
        rows = self.rows
        low = rows.start.masked_fill(rows.low <= rows.lead, 0)[0]
        return pack([torch.arange(plan.kv_length)], [low], [rows.high[0] - 1], [plan.kv_length])


def interval_plan(rows: Rows, edges: Sequence[int], q_tile: int, kv_tile: int) -> BlockPlan:
    """The plan with blocks of at most `q_tile` and `kv_tile` tokens that end at the edges; rows of one head."""
    n = rows.low.shape[-1]
    q_start, kv_start = (_cut(n, edges, tile) for tile in (q_tile, kv_tile))
    q_size, kv_size = (torch.diff(start, append=torch.tensor([n])) for start in (q_start, kv_start))
    q_of = torch.repeat_interleave(torch.arange(len(q_start)), q_size)
    visited, whole = rows.tables(kv_start, kv_start + kv_size, q_of, len(q_start))
    rank = torch.where(whole, 0, torch.where(visited, 1, 2))
    count, full = visited.sum(-1, dtype=torch.int32), whole.sum(-1, dtype=torch.int32)
    lists = torch.sort(rank, dim=-1, stable=True).indices[..., : max(int(count.max()), 1)].to(torch.int32)
    lists = lists.masked_fill(torch.arange(lists.shape[-1]) >= count[..., None], -1)
    q_start, q_size, kv_start, kv_size = (t.int() for t in (q_start, q_size, kv_start, kv_size))
    plan = BlockPlan(n, n, q_start, q_size, kv_start, kv_size, lists[None], full[None], count[None])
    if bool((full < count).any()):
        empty = bool(((rows.lead == 0) & (rows.high <= rows.low)).any())
        plan.rule = RowRule(rows, _patterns(plan, rows), empty)
    return plan


def _patterns(plan: BlockPlan, rows: Rows) -> dict[int, bytes]:
    """By query block under a mask: where its rows' runs begin and end among the keys of its masked blocks.

    The keys before those are seen by all rows, so blocks that agree in this and in their sizes have one mask.
    """
    found = {}
    for row in torch.nonzero(plan.full[0, 0] < plan.count[0, 0])[:, 0].tolist():
        blocks = plan.lists[0, 0, row, plan.full[0, 0, row] : plan.count[0, 0, row]].long()
        start, size = plan.kv_start[blocks].tolist(), plan.kv_size[blocks].tolist()
        keys = torch.cat([torch.arange(at, at + count) for at, count in zip(start, size, strict=True)])
        q = slice(int(plan.q_start[row]), int(plan.q_start[row] + plan.q_size[row]))
        runs = torch.stack([rows.lead[0, q], rows.start[0, q], rows.high[0, q]])
        found[row] = torch.searchsorted(keys, runs).numpy().tobytes()
    return found


def choose_plan(rows: Rows, edges: Sequence[int], setting: Setting) -> BlockPlan:
    """The plan of least cost: on a GPU by a kernel's steps, on a CPU by the constants of `plan/cost.py`."""
    if setting.device.type != "cpu":
        return interval_plan(rows, edges, Q_STEP, KV_STEP)
    n = rows.low.shape[-1]
    tiles = [tile for tile in TILES if tile < n] or [n]
    return min((interval_plan(rows, edges, tile, KV_STEP) for tile in tiles), key=lambda plan: _cost(plan, setting))


def _cost(plan: BlockPlan, setting: Setting) -> float:
    """In pairs of large tiles without a mask; a call for each tile, which is the worst case."""
    size = setting.dtype.itemsize
    sizes = torch.where(plan.lists >= 0, plan.kv_size[plan.lists.clamp(min=0).long()], 0)[0, 0].double()
    masked = torch.arange(sizes.shape[-1]) >= plan.full[0, 0, :, None]
    keys, q = sizes.sum(-1), plan.q_size.double()
    pair = torch.tensor([next(PAIR[height] for least, height in SLICES if rows >= least) for rows in q.tolist()])
    tiles = q * (keys * pair + MASKED[size] * (sizes * masked).sum(-1)) + GATHER[size] * keys
    return float(tiles.sum()) + CALL[size] * len(q)


def _cut(n: int, edges: Sequence[int], tile: int) -> torch.Tensor:
    """Where blocks of at most `tile` begin, with an edge at each of `edges`."""
    bounds = sorted({0, n, *(edge for edge in edges if 0 < edge < n)})
    return torch.tensor([at for low, high in zip(bounds, bounds[1:], strict=False) for at in range(low, high, tile)])
