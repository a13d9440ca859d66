"""The block plan: the one thing that a sparse method hands to a kernel.

It says which KV blocks each query block sees, and nothing of methods, models, strides or borders. Blocks are runs of
tokens of any length, in an optional order of their own (tile order), so text, ragged edges and padding are only
shorter blocks. Query rows that no block holds give 0 and an LSE of -inf.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins.plan.rules import BitRule, MaskRule
from attn_plugins.sequence import Sequence

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from attn_plugins.plan.partition import Tile

_serial = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, BlockPlan] = weakref.WeakValueDictionary()
_plans_lock = threading.Lock()


@dataclass(eq=False)
class BlockPlan:
    """Which KV blocks each query block sees.

    Args:
        q_length, kv_length: tokens of q and of k.
        q_start, q_size: (Q,) int32, the query blocks as runs in the query order.
        kv_start, kv_size: (K,) int32, the KV blocks as runs in the KV order. A KV block may be in no list.
        lists: (B or 1, H or 1, Q, L) int32, KV blocks of each query block: those without a mask first; -1 beyond
            `count`.
        full: (B or 1, H or 1, Q) int32, how many at the front of a list need no mask.
        count: (B or 1, H or 1, Q) int32, how many there are.
        rule: which keys a query row sees in the blocks behind the first `full`; None if there are none.
        q_order, kv_order: (tokens,) int64, the token that stands at each place of the order; None is raster order.
    """

    q_length: int
    kv_length: int
    q_start: torch.Tensor
    q_size: torch.Tensor
    kv_start: torch.Tensor
    kv_size: torch.Tensor
    lists: torch.Tensor
    full: torch.Tensor
    count: torch.Tensor
    rule: MaskRule | None = None
    q_order: torch.Tensor | None = None
    kv_order: torch.Tensor | None = None
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)  # what a backend derives once

    def __post_init__(self) -> None:
        self.key = next(_serial)  # custom ops take numbers, not objects
        with _plans_lock:
            _plans[self.key] = self

    @staticmethod
    def by_key(key: int) -> BlockPlan:
        """The living plan of that key.

        Raises:
            RuntimeError: the plan has been freed; keep a reference to it while a compiled model uses it.
        """
        plan = _plans.get(key)
        if plan is None:
            raise RuntimeError(f"block plan {key} no longer exists: keep a reference to it while its key is in use")
        return plan

    @classmethod
    def from_lists(
        cls,
        q_blocks: Rows[tuple[int, int]],
        kv_blocks: Rows[tuple[int, int]],
        lists: Any,
        *,
        q_length: int | None = None,
        kv_length: int | None = None,
    ) -> BlockPlan:
        """A plan without masks from (start, length) blocks and, per query block, the KV blocks it sees.

        Args:
            lists: Q lists of KV block numbers, or H such lists (per head), or B of those (per batch item).

        Raises:
            ValueError: no blocks, a block outside its sequence, an overlap of query blocks, a list with an unknown or
                repeated block or with KV blocks that overlap, or as many lists as there are query blocks not given.
        """
        if not q_blocks or not kv_blocks:
            raise ValueError(f"{len(q_blocks)} query and {len(kv_blocks)} KV blocks: a plan has at least one of each")
        q_length = max((s + n for s, n in q_blocks), default=0) if q_length is None else q_length
        kv_length = max((s + n for s, n in kv_blocks), default=0) if kv_length is None else kv_length
        _check_blocks("query", q_blocks, q_length, disjoint=True)
        _check_blocks("KV", kv_blocks, kv_length, disjoint=False)
        nested = lists
        depth = 0
        while depth < 4 and _depth(nested) < 4:
            nested, depth = [nested], depth + 1
        per_batch = [[[[int(j) for j in row] for row in head] for head in item] for item in nested]
        heads = {len(item) for item in per_batch}
        widest = max((len(row) for item in per_batch for head in item for row in head), default=0)
        if len(heads) != 1 or any(len(head) != len(q_blocks) for item in per_batch for head in item):
            raise ValueError(f"lists: every head needs one list for each of the {len(q_blocks)} query blocks")
        table = torch.full((len(per_batch), heads.pop(), len(q_blocks), max(widest, 1)), -1, dtype=torch.int32)
        count = torch.zeros(table.shape[:3], dtype=torch.int32)
        for b, item in enumerate(per_batch):
            for h, head in enumerate(item):
                for i, row in enumerate(head):
                    if len(set(row)) != len(row) or any(not 0 <= j < len(kv_blocks) for j in row):
                        raise ValueError(
                            f"lists: query block {i} lists {row}; legal are distinct numbers in 0..{len(kv_blocks) - 1}"
                        )
                    if _overlap([kv_blocks[j] for j in row]):  # their keys would count twice in the softmax
                        raise ValueError(f"lists: query block {i} lists {row}, which overlap: list each key once")
                    table[b, h, i, : len(row)] = torch.tensor(row, dtype=torch.int32)
                    count[b, h, i] = len(row)
        q_columns, kv_columns = (torch.tensor(list(blocks), dtype=torch.int32).T for blocks in (q_blocks, kv_blocks))
        q_start, q_size, kv_start, kv_size = (t.contiguous() for t in (*q_columns, *kv_columns))
        return cls(q_length, kv_length, q_start, q_size, kv_start, kv_size, table, count, count)

    @classmethod
    def from_windows(
        cls,
        sequence: Sequence,
        window: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        *,
        q_tile: tuple[Tile, ...] | None = None,
        kv_tile: tuple[int, ...] | None = None,
    ) -> BlockPlan:
        """The plan of generalized neighborhood attention (arXiv 2504.16922) over a grid with text.

        Args:
            sequence: with plain ints for its valid lengths (`Sequence.item` of one that differs by batch item).
            window, stride, dilation, causal: one value, or one per axis; as in `ops.neighborhood_attention`.
            q_tile, kv_tile: tokens per axis of the query and KV blocks (for queries also a tuple: the tokens of each
                tile of the axis); None: what the cost model chooses for a CPU.

        Raises:
            ValueError: an illegal setting, or valid lengths that differ by batch item.
        """
        from attn_plugins.plan.cost import choose_tiles
        from attn_plugins.plan.neighborhood import neighborhood_plan
        from attn_plugins.plan.windows import axis_windows

        if sequence.batch is not None:
            raise ValueError("valid text lengths differ by batch item: make one plan for each, from sequence.item(b)")
        axes = axis_windows(sequence.grid, window, stride, dilation, causal)
        tiles = choose_tiles(axes, sequence.length - sequence.tokens)
        return neighborhood_plan(sequence, axes, q_tile or tiles.q_tile, kv_tile or tiles.kv_tile)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, q_block: int, kv_block: int) -> BlockPlan:
        """A plan from a dense bool mask (N, N_kv), (H, N, N_kv) or (B, H, N, N_kv): for tests and small problems."""
        while mask.dim() < 4:
            mask = mask[None]
        batch, heads, rows, columns = mask.shape
        q_edges, kv_edges = list(range(0, rows, q_block)), list(range(0, columns, kv_block))
        edge = (0, -columns % kv_block, 0, -rows % q_block)
        seen, unseen = (torch.nn.functional.pad(m, edge) for m in (mask, ~mask))  # the padding is neither
        tiles = (m.unflatten(3, (-1, kv_block)).unflatten(2, (-1, q_block)) for m in (seen, unseen))
        visited, holes = (m.transpose(3, 4).flatten(4).any(-1) for m in tiles)  # (B, H, Q, K)
        whole = visited & ~holes
        rank = torch.where(whole, 0, torch.where(visited, 1, 2))
        lists = torch.sort(rank, dim=-1, stable=True).indices.to(torch.int32)
        count, full = visited.sum(-1, dtype=torch.int32), whole.sum(-1, dtype=torch.int32)
        lists = lists[..., : max(int(count.max()), 1)]
        lists = lists.masked_fill(torch.arange(lists.shape[-1]) >= count[..., None], -1)
        q_start, kv_start = (torch.tensor(edges, dtype=torch.int32) for edges in (q_edges, kv_edges))
        return cls(
            rows, columns,
            q_start, (rows - q_start).clamp(max=q_block),
            kv_start, (columns - kv_start).clamp(max=kv_block),
            lists, full, count,
            rule=BitRule(mask) if bool((count != full).any()) else None,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Batch items with lists of their own; 1 is shared by all."""
        return self.lists.shape[0]

    @property
    def heads(self) -> int:
        """Heads with lists of their own; 1 is shared by all."""
        return self.lists.shape[1]

    @property
    def visited(self) -> float:
        """(query, key) pairs in the visited blocks, per head and batch item (the mean over those that differ)."""
        if "visited" not in self.prepared:
            sizes = torch.where(self.lists >= 0, self.kv_size[self.lists.clamp(min=0).long()], 0).sum(-1)
            self.prepared["visited"] = float((sizes * self.q_size).sum(-1, dtype=torch.float64).mean())
        return self.prepared["visited"]

    @property
    def density(self) -> float:
        """Share of the q_length x kv_length pairs that lie in visited blocks: what a kernel computes."""
        return self.visited / (self.q_length * self.kv_length)

    def flops(self, batch: int, heads: int, head_dim: int) -> float:
        """Floating-point operations of the forward: two products of 2 * head_dim operations a visited pair."""
        return 4.0 * head_dim * self.visited * batch * heads

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key: what plain SDPA computes."""
        if "is_dense" not in self.prepared:
            whole = self.rule is None and self.visited == self.q_length * self.kv_length
            self.prepared["is_dense"] = whole and int(self.q_size.sum()) == self.q_length
        return self.prepared["is_dense"]

    @property
    def row_order(self) -> torch.Tensor:
        """(B or 1, H or 1, Q): query blocks, most work first, ties by number: the order a kernel should take them."""
        return torch.sort(self.count, dim=-1, descending=True, stable=True).indices

    def inverted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per KV block, the query blocks that list it, ascending, (B or 1, H or 1, K, L) int32, -1 beyond; counts."""
        visits = torch.zeros(*self.lists.shape[:2], len(self.kv_start), len(self.q_start), dtype=torch.bool)
        b, h, q, slot = torch.nonzero(self.lists >= 0, as_tuple=True)
        visits[b, h, self.lists[b, h, q, slot].long(), q] = True
        count = visits.sum(-1, dtype=torch.int32)
        lists = torch.sort(~visits, dim=-1, stable=True).indices[..., : max(int(count.max()), 1)].to(torch.int32)
        return lists.masked_fill(torch.arange(lists.shape[-1]) >= count[..., None], -1), count

    def q_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, T) int64: the tokens of query blocks `rows`, which must be of one size."""
        places = self.q_start[rows].long()[:, None] + torch.arange(int(self.q_size[rows[0]]))
        return places if self.q_order is None else self.q_order[places]

    def kv_tokens(self, rows: torch.Tensor, item: int = 0, head: int = 0) -> torch.Tensor:
        """(R, E) int64: the keys in the lists of `rows`, which must hold the same number of keys."""
        blocks = self.lists[item, head, rows]
        blocks = blocks[blocks >= 0].long()
        sizes = self.kv_size[blocks].long()
        ends = torch.cumsum(sizes, 0)
        places = torch.repeat_interleave(self.kv_start[blocks].long() - (ends - sizes), sizes)
        places += torch.arange(len(places))
        tokens = places if self.kv_order is None else self.kv_order[places]
        return tokens.view(len(rows), -1)

    def to_mask(self) -> torch.Tensor:
        """(B or 1, H or 1, N, N_kv) bool, what the plan allows: for tests, never on a hot path."""
        mask = torch.zeros(self.batch, self.heads, self.q_length, self.kv_length, dtype=torch.bool)
        for item, head, row in itertools.product(range(self.batch), range(self.heads), range(len(self.q_start))):
            if not self.count[item, head, row]:
                continue
            one = torch.tensor([row])
            q = self.q_tokens(one)[0]
            if self.full[item, head, row] == self.count[item, head, row]:
                keys, seen = self.kv_tokens(one, item, head)[0], torch.ones(1, 1, dtype=torch.bool)
            else:
                assert self.rule is not None  # a partial list has a rule by construction
                keys, seen = self.rule.row(self, row, item, head)
            mask[item, head, q[:, None], keys[None]] = seen
        return mask

    def to_block_mask(self) -> BlockMask:
        """The plan as PyTorch's flex attention takes it; q and k must stand in the plan's own orders.

        Raises:
            ValueError: blocks that are not of one size (but for the last), which flex attention cannot express.
        """
        from attn_plugins.plan.flex import block_mask

        return block_mask(self)


def _depth(nested: Any) -> int:
    depth = 0
    while isinstance(nested, (list, tuple)) or (isinstance(nested, torch.Tensor) and nested.dim() > 0):
        depth += 1
        if len(nested) == 0:
            break
        nested = nested[0]
    return depth


def _check_blocks(name: str, blocks: Rows[tuple[int, int]], length: int, disjoint: bool) -> None:
    for start, size in blocks:
        if start < 0 or size < 1 or start + size > length:
            raise ValueError(f"{name} block ({start}, {size}) does not lie in 0..{length}; blocks are (start, length)")
    if disjoint and _overlap(blocks):
        raise ValueError(f"{name} blocks overlap: every query row belongs to at most one block")


def _overlap(blocks: Rows[tuple[int, int]]) -> bool:
    ordered = sorted(blocks)
    return any(a[0] + a[1] > b[0] for a, b in zip(ordered, ordered[1:], strict=False))
