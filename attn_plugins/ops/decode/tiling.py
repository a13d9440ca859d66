"""Which tiles ragged ranges are seen as: the cache as rows of equally long tiles, all of them in one attention call.

Behind the last long tile the cache is seen as short ones, a second call: `Layout` puts there what is left of its heads.
What no tile takes of a range is copied, and takes a smaller call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from attn_plugins.ops.block_sparse.tile_attention import bias_of

Segment = tuple[int, int, int]  # KV head, start, end
Segments = tuple[tuple[Segment, ...], ...]  # of each batch item, or of all

Piece = tuple[int, int, int, int]  # batch item, KV head, start, end

TILES = (512, 256, 128, 64)  # tokens; the last ones also behind the others
# Costs in bytes that could have been read meanwhile:
TILE_BYTES = {True: 8 << 10, False: 20 << 10}  # of a tile besides its keys and values, merge included; if of one row
CALL_BYTES = 1 << 20  # of a call besides
COPIED = 3  # an end is read, written and read again


@dataclass(frozen=True)
class View:
    """Tokens from `first` on as `count` tiles of `tile`."""

    first: int
    tile: int
    count: int

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """(1 or B, total, ...) to (1 or B, count, tile, ...)."""
        tokens = t.stride(1)
        shape = (t.shape[0], self.count, self.tile, *t.shape[2:])
        strides = (t.stride(0), self.tile * tokens, *t.stride()[1:])
        return t.as_strided(shape, strides, t.storage_offset() + self.first * tokens)


@dataclass(frozen=True)
class Tiling:
    """Tensors on the device of the keys; b is 1 or the number of items; T tiles of all views, and behind them E ends.

    Args:
        views: of long tiles, and of short ones behind them.
        owner: (b, T + E) the KV head of each, 0 where none has it.
        ends: (b, E, W) the tokens of what is left of the ranges, the last one again and again up to W; or None.
        end_bias: (b, E, 1, W) -inf where a token is there again; None if none is.
        among: (b, 1, H_kv, T + E) 0 where a head has the tile or end, else -inf.
        nobodys: (b, T + E) bool, the tiles and ends that are of no head; None if there are none.
        bare: some head has neither.
    """

    views: tuple[View, ...]
    owner: torch.Tensor
    ends: torch.Tensor | None
    end_bias: torch.Tensor | None
    among: torch.Tensor
    nobodys: torch.Tensor | None
    bare: bool


@dataclass(frozen=True)
class Run:
    """Tiles [low, high) of a KV head in a batch item."""

    item: int
    head: int
    low: int
    high: int


@dataclass(frozen=True)
class Cut:
    """Ranges cut into tiles: (tile, runs) of each view, and what is left."""

    views: tuple[tuple[int, tuple[Run, ...]], ...]
    left: tuple[Piece, ...]

    @property
    def width(self) -> int:
        return max((end - start for *_, start, end in self.left), default=0)

    @property
    def most(self) -> int:
        """Pieces of the item that has most of them."""
        return max(Counter(piece[0] for piece in self.left).values(), default=0)

    def cost(self, items: int, row_bytes: int, tile_bytes: int) -> float:
        tiles = sum(items * _span(runs) * (tile * row_bytes + tile_bytes) for tile, runs in self.views)
        ends = items * self.most * (self.width * COPIED * row_bytes + tile_bytes)
        return tiles + ends + (1 + len(self.views) + bool(self.left)) * CALL_BYTES


def tiling_of(
    segments: Segments, kv_heads: int, row_bytes: int, tile_bytes: int, other: int, device: torch.device
) -> Tiling | None:
    """The best tiling, or None where none costs less than `other`, in bytes.

    Args:
        segments: the non-empty ranges; with several entries those of each item, else of all.
        row_bytes: of the key and the value of a token, in all items that share its range.
        tile_bytes: what a tile costs besides, in all of them (`TILE_BYTES`).
    """
    plans = [*((tile,) for tile in TILES), *((tile, TILES[-1]) for tile in TILES[:-1])]
    cuts = [_cut(segments, plan) for plan in plans]
    costs = [cut.cost(len(segments), row_bytes, tile_bytes) for cut in cuts]
    best = min(costs)
    return _made(cuts[costs.index(best)], len(segments), kv_heads, device) if best < other else None


def _cut(segments: Segments, tiles: Iterable[int]) -> Cut:
    """Each next size of tiles is used behind the tiles of the one before."""
    left: list[Piece] = [(item, *segment) for item, row in enumerate(segments) for segment in row]
    views: list[tuple[int, tuple[Run, ...]]] = []
    behind = 0
    for tile in tiles:
        runs: list[Run] = []
        others: list[Piece] = []
        for item, head, start, end in left:
            low, high = -(-start // tile), end // tile
            if start < behind or low >= high:
                others.append((item, head, start, end))
                continue
            runs.append(Run(item, head, low, high))
            others += [(item, head, a, b) for a, b in ((start, low * tile), (high * tile, end)) if a < b]
        left = others
        if runs:
            views.append((tile, tuple(runs)))
            behind = tile * max(run.high for run in runs)
    short = TILES[-1]
    pieces = [
        (item, head, at, min(at + short, end)) for item, head, start, end in left for at in range(start, end, short)
    ]
    return Cut(tuple(views), tuple(pieces))


def _span(runs: tuple[Run, ...]) -> int:
    return max(run.high for run in runs) - min(run.low for run in runs)


def _made(cut: Cut, items: int, kv_heads: int, device: torch.device) -> Tiling:
    views, owners = [], []
    for tile, runs in cut.views:
        first = min(run.low for run in runs)
        views.append(View(first * tile, tile, _span(runs)))
        owners.append(torch.full((items, _span(runs)), -1))
        for run in runs:
            owners[-1][run.item, run.low - first : run.high - first] = run.head
    most, width = cut.most, cut.width
    rows = [[piece[1:] for piece in cut.left if piece[0] == item] for item in range(items)]
    filled = [[*row, *[(-1, 0, 1)] * (most - len(row))] for row in rows]
    table = torch.tensor(filled, dtype=torch.int64).view(items, most, 3)
    end_owner, begin, stop = table.unbind(-1)
    slots = begin[..., None] + torch.arange(width)
    again = slots >= stop[..., None]
    slots = torch.minimum(slots, stop[..., None] - 1)
    owner = torch.cat([*owners, end_owner], dim=1)
    mine = owner[:, None, None] == torch.arange(kv_heads)[:, None]
    nobodys = owner < 0
    return Tiling(
        tuple(views), owner.clamp(min=0).to(device), slots.to(device) if most else None,
        bias_of(~again, torch.float32)[:, :, None].to(device) if bool(again.any()) else None,
        bias_of(mine, torch.float32).to(device), nobodys.to(device) if bool(nobodys.any()) else None,
        not bool(mine.any(-1).all()),
    )  # fmt: skip
