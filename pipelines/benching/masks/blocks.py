"""Masks of whole blocks: uniform, of all sizes, and those that VMoBA chooses by content."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field

import torch

from attn_plugins.ops import vmoba_attention
from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.definitions.block_choice import BlockChoice
from attn_plugins.pipelines.benching.masks.grids import grid_of
from attn_plugins.pipelines.benching.masks.mask import Mask, Shape
from attn_plugins.pipelines.benching.sides import Built, Oracle, Setting
from attn_plugins.plan.block_plan import BlockPlan

BLOCK, SHARE = 128, 4  # tokens of a uniform block; a query block sees one block in four, its own among them
LEAST, MOST = 32, 256  # tokens of a block of varying size


@dataclass(frozen=True, eq=False)
class BlockMask(Mask):
    """Query blocks that see KV blocks whole.

    Args:
        q_of, kv_of: (N,) the block of each token, numbered from 0.
        table: (H or 1, Q, K) bool.
        order: (N,) the tokens block by block; None where they stand so.
    """

    shape: Shape
    option: str
    q_of: torch.Tensor
    kv_of: torch.Tensor
    table: torch.Tensor
    order: torch.Tensor | None = None

    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        table, q_of, kv_of = (t.to(query.device) for t in (self.table, self.q_of, self.kv_of))
        return table[head * int(len(table) > 1), q_of[query], kv_of[key]]

    @property
    def by_head(self) -> bool:  # type: ignore[override]
        return len(self.table) > 1

    @property
    def pairs(self) -> float:
        q, kv = (torch.bincount(of).double() for of in (self.q_of, self.kv_of))
        return float((self.table.double() @ kv @ q).mean())

    def flex(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        n, device = self.shape.tokens, setting.device
        places = torch.arange(n, device=device) if self.order is None else self.order.to(device)
        table, q_of, kv_of = self.table.to(device), self.q_of.to(device)[places], self.kv_of.to(device)[places]

        def of_head(one: torch.Tensor) -> flex.Blocks:
            return flex.block_tables(lambda i, j: one[q_of[i], kv_of[j]], torch.arange(n, device=device))

        made = [of_head(one) for one in table]
        visited, whole = (torch.cat(part) for part in zip(*made, strict=True))
        step = int(len(table) > 1)

        def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return table[h * step, q_of[i], kv_of[j]]

        order, gqa = None if self.order is None else places, self.shape.heads != self.shape.kv_heads
        return flex.build((visited, whole), mask_mod, n, order, gqa, not setting.tiny)

    def plan(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> BlockPlan:
        n = self.shape.tokens
        place = torch.arange(n) if self.order is None else self.order
        (q_start, q_size), (kv_start, kv_size) = (_runs(of[place]) for of in (self.q_of, self.kv_of))
        count = self.table.sum(-1, dtype=torch.int32)[None]
        lists = torch.sort(~self.table, dim=-1, stable=True).indices[None, ..., : max(int(count.max()), 1)].int()
        lists = lists.masked_fill(torch.arange(lists.shape[-1]) >= count[..., None], -1)
        return BlockPlan(
            n, n, q_start, q_size, kv_start, kv_size, lists, count, count, q_order=self.order, kv_order=self.order
        )


def uniform(shape: Shape) -> BlockMask:
    """Blocks of one size, each seeing a fourth of the others, at random and by head."""
    count = -(-shape.tokens // BLOCK)
    of = torch.arange(shape.tokens) // BLOCK
    return BlockMask(shape, f"blocks of {BLOCK}", of, of, _random_table(shape.heads, count))


def variable(shape: Shape) -> BlockMask:
    """Blocks of any size, each seeing a fourth of the others, at random and by head."""
    dice, sizes = random.Random(0), list[int]()
    while (left := shape.tokens - sum(sizes)) > 0:
        sizes.append(min(dice.randint(LEAST, MOST), left))
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return BlockMask(shape, f"blocks of {LEAST} to {MOST}", of, of, _random_table(shape.heads, len(sizes)))


@dataclass(eq=False)
class ChosenBlocks(Mask):
    """VMoBA (arXiv 2506.23858): the blocks of keys that score best with a tile of queries, one in four.

    The others get the choice, which is made of q and k, for nothing; it is in the time of our own operator.
    """

    shape: Shape
    option: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    count: int
    _kept: tuple[torch.Tensor, BlockMask] | None = field(default=None, repr=False)

    @functools.cached_property
    def choice(self) -> BlockChoice:
        return BlockChoice(self.grid, self.block, self.block, self.count)

    def resolved(self, leaves: tuple[torch.Tensor, ...]) -> BlockMask:
        """The last batch item's choice, made in float64 by the definition, once for the same q and k."""
        q, k = leaves[:2]
        if self._kept is None or self._kept[0] is not q:
            self._kept = q, self._chosen(q, k)
        return self._kept[1]

    def _chosen(self, q: torch.Tensor, k: torch.Tensor) -> BlockMask:
        group = q.shape[1] // k.shape[1]
        block_of, row_of = self.choice.boxes()
        first = torch.zeros(int(row_of.max()) + 1, dtype=torch.int64).scatter_(0, row_of, torch.arange(len(row_of)))
        table = torch.stack([self.choice(q[-1, h], k[-1, h // group])[first.to(q.device)] for h in range(q.shape[1])])
        order = torch.argsort(block_of, stable=True)
        return BlockMask(self.shape, self.option, row_of, block_of, table.cpu(), order)

    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("it depends on q and k: ask what `resolved` gives")

    @property
    def pairs(self) -> float:
        """Tiles are blocks, and a query sees `count` of them, of mean size where the grid's last ones are shorter."""
        sizes = torch.bincount(self.choice.boxes()[0]).double()
        return self.shape.tokens * self.count * float(sizes.mean())

    def oracle(self, leaves: tuple[torch.Tensor, ...]) -> Oracle:
        return self.resolved(leaves).oracle(leaves)

    def operator(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return vmoba_attention(
                q, k, v, grid=self.grid, block=self.block, tile=self.block, k_blocks=self.count, backend=setting.backend
            )  # type: ignore[return-value]  # no LSE was asked for

        return Built(run, self.density)


def vmoba(shape: Shape) -> ChosenBlocks:
    """Half of the time axis, a fourth of the others a block."""
    grid = grid_of(shape.tokens)
    block = tuple(max(size // part, 1) for size, part in zip(grid, (2, 4, 4), strict=True))
    blocks = math.prod(-(-size // b) for size, b in zip(grid, block, strict=True))
    count = max(blocks // SHARE, 1)
    sizes = "x".join(map(str, block))
    return ChosenBlocks(shape, f"{count} of {blocks} blocks of {sizes}", grid, block, count)


def _random_table(heads: int, blocks: int) -> torch.Tensor:
    """(H, blocks, blocks) bool: so many in each row, the diagonal among them."""
    scores = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(3))
    scores.diagonal(dim1=1, dim2=2).fill_(2.0)
    best = scores.topk(max(blocks // SHARE, 1), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def _runs(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and sizes (int32) of blocks that stand in order."""
    size = torch.bincount(of)
    return (size.cumsum(0) - size).int(), size.int()
