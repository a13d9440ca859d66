"""A grid cut into KV blocks and each block into query tiles, with text around: what stays from call to call."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from attn_plugins.ops.heads import equal_runs
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.partition import AxisTiles, Partition
from attn_plugins.sequence import Sequence

TILE = 1536  # tokens that a query tile has at most, if no one says: a block cut in two still fills a kernel (768)

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Blocks and tiles of one sequence; `sequence` has plain ints for its valid lengths.

    Blocks are numbered in raster order of blocks, then text before, then text after; tiles in raster order of tiles.
    Tiles never cross a block, so each has one block of its own.
    """

    sequence: Sequence
    block: Sizes
    tile: Sizes

    @functools.cached_property
    def blocks(self) -> Partition:
        axes = zip(self.sequence.grid, self.block, strict=True)
        return Partition(tuple(AxisTiles(size, block) for size, block in axes), self.sequence.text_before)

    @functools.cached_property
    def tiles(self) -> Partition:
        axes = zip(self.sequence.grid, self.block, self.tile, strict=True)
        return Partition(tuple(AxisTiles(row[0], _cut(*row)) for row in axes), self.sequence.text_before)

    @property
    def count(self) -> int:
        """Blocks of the grid."""
        return math.prod(self.blocks.shape)

    @functools.cached_property
    def own(self) -> torch.Tensor:
        """(tiles,) int64: the block of each tile."""
        number = torch.zeros(1, dtype=torch.int64)
        for block, tile in zip(self.blocks.axes, self.tiles.axes, strict=True):
            number = (number[:, None] * block.count + torch.from_numpy(tile.lo // self.block_of(block))).flatten()
        return number

    @functools.cached_property
    def tile_of(self) -> torch.Tensor:
        """(grid tokens,) int64: the tile of each token, in raster order of tokens."""
        sizes = torch.from_numpy(self.tiles.sizes)
        tile = torch.empty(self.sequence.tokens, dtype=torch.int64)
        order = torch.from_numpy(self.tiles.order) - self.sequence.text_before
        tile[order] = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        return tile

    @functools.cached_property
    def text(self) -> list[tuple[int, int]]:
        """(start, length) of the real text on either side."""
        sequence = self.sequence
        after = sequence.text_before + sequence.tokens
        sides = [(0, sequence.valid_before), (after, sequence.valid_after)]
        return [(start, length) for start, length in sides if isinstance(length, int) and length]

    @functools.cached_property
    def text_rows(self) -> torch.Tensor:
        """(text tokens,) int64: the real ones."""
        return torch.cat([torch.arange(start, start + length) for start, length in self.text])

    @functools.cached_property
    def real_places(self) -> torch.Tensor:
        """(real tokens,) int64: the places of text and grid in the order of blocks, padding left out."""
        runs = sorted([*self.text, (self.sequence.text_before, self.sequence.tokens)])
        return torch.cat([torch.arange(start, start + length) for start, length in runs])

    @functools.cached_property
    def real_tokens(self) -> torch.Tensor:
        """(real tokens,) int64: the tokens that stand there."""
        return self.columns[5][self.real_places]

    @functools.cached_property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """q_start, q_size, kv_start, kv_size (int32) and the two orders (int64) of a `BlockPlan`."""
        text = torch.tensor(self.text, dtype=torch.int64).reshape(-1, 2)
        rows = []
        for partition in (self.tiles, self.blocks):
            for of_grid, of_text in ((partition.starts, text[:, 0]), (partition.sizes, text[:, 1])):
                rows.append(torch.cat([torch.from_numpy(of_grid), of_text]).int())
        return *rows, self._order(self.tiles), self._order(self.blocks)

    def plan(self, lists: torch.Tensor, count: torch.Tensor) -> BlockPlan:
        """The plan in which tile `r` sees the first `count[.., r]` blocks of `lists[.., r, :]`, and all text.

        Args:
            lists: (B or 1, H or 1, tiles, L) int32, on any device; nothing is read on the host.
            count: (B or 1, H or 1, tiles) int32.
        """
        lead, device, texts = lists.shape[:2], lists.device, len(self.text)
        behind = torch.arange(lists.shape[-1], device=device) >= count[..., None]
        lists = lists.masked_fill(behind, -1)
        if texts:
            names = torch.arange(self.count, self.count + texts, dtype=torch.int32, device=device)
            everything = torch.arange(self.count + texts, dtype=torch.int32, device=device)
            lists = torch.cat([names.expand(*lists.shape[:3], -1), lists], dim=-1)
            lists = torch.nn.functional.pad(lists, (0, len(everything) - lists.shape[-1]), value=-1)
            lists = torch.cat([lists, everything.expand(*lead, texts, -1)], dim=2)
            count = torch.cat([count + texts, count.new_full((*lead, texts), len(everything))], dim=2)
        q_start, q_size, kv_start, kv_size, q_order, kv_order = self.columns
        length = self.sequence.length
        return BlockPlan(
            length, length, q_start, q_size, kv_start, kv_size, lists.contiguous(), count, count,
            q_order=None if self._raster(q_order) else q_order, kv_order=None if self._raster(kv_order) else kv_order,
        )  # fmt: skip

    @staticmethod
    def block_of(axis: AxisTiles) -> int:
        assert isinstance(axis.tile, int)  # blocks are of one length, but for the last
        return axis.tile

    def _order(self, partition: Partition) -> torch.Tensor:
        sequence = self.sequence
        before, after = torch.arange(sequence.text_before), torch.arange(sequence.text_after)
        order = torch.from_numpy(partition.order)
        return torch.cat([before, order, sequence.text_before + sequence.tokens + after])

    @staticmethod
    def _raster(order: torch.Tensor) -> bool:
        return bool((order == torch.arange(len(order))).all())


@functools.lru_cache(maxsize=64)
def layout(sequence: Sequence, block: Sizes, tile: Sizes) -> Layout:
    """Made once for equal settings."""
    return Layout(sequence, block, tile)


def fit_block(grid: Sizes, block: int | Rows[int]) -> Sizes:
    """Block sizes on a grid: one for all axes or one per axis; -1 is the whole axis, and so is one longer than it.

    Raises:
        ValueError: as many sizes as axes not given, or a size that is neither -1 nor 1 and more.
    """
    sizes = (block,) * len(grid) if isinstance(block, int) else tuple(block)
    legal = "a size of 1 and more tokens, or -1 for the whole axis"
    if len(sizes) != len(grid):
        raise ValueError(
            f"block={block}: {len(sizes)} sizes for the {len(grid)} axes of grid {grid}; give one per axis"
        )
    if any(isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1 for size in sizes):
        raise ValueError(f"block={block}: each is {legal}")
    return tuple(length if size == -1 else min(size, length) for size, length in zip(sizes, grid, strict=True))


def fit_tile(block: Sizes, tile: int | Rows[int] | None) -> Sizes:
    """Tile sizes within a block: a size per axis, or a number of tokens that a nearly cubic tile shall not exceed.

    Raises:
        ValueError: as many sizes as axes not given, or a size below 1.
    """
    if tile is None or isinstance(tile, int):
        most = TILE if tile is None else tile
        if most < 1:
            raise ValueError(f"tile={tile}: a tile has 1 token or more")
        parts = [1] * len(block)
        sizes = list(block)
        while math.prod(sizes) > most:  # cut the longest side once more
            axis = max(range(len(sizes)), key=sizes.__getitem__)
            parts[axis] += 1
            sizes[axis] = -(-block[axis] // parts[axis])
        return tuple(sizes)
    sizes = list(tile)
    if len(sizes) != len(block) or any(
        isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes
    ):
        raise ValueError(f"tile={tile}: give a number of tokens, or one size (1 or more) for each of {len(block)} axes")
    return tuple(min(size, length) for size, length in zip(sizes, block, strict=True))


def encode(sequence: Sequence, block: Sizes, tile: Sizes) -> list[int]:
    """Ints that a custom op and a compiled graph can carry; `decode` reads them."""
    items = sequence.batch or 1
    valid: list[int] = []
    for lengths in (sequence.valid_before, sequence.valid_after):
        valid += list(lengths) if isinstance(lengths, tuple) else [lengths] * items  # type: ignore[list-item]
    return [len(block), *sequence.grid, *block, *tile, sequence.text_before, sequence.text_after, items, *valid]


def decode(spec: Rows[int]) -> list[tuple[slice, Layout]]:
    """One layout for the whole batch, or one for each run of items with equal text lengths."""
    return _decode(tuple(int(value) for value in spec))


@functools.lru_cache(maxsize=64)
def _decode(spec: tuple[int, ...]) -> list[tuple[slice, Layout]]:
    axes, rest = spec[0], spec[1:]
    grid, block, tile = (rest[i * axes : (i + 1) * axes] for i in range(3))
    before, after, items, *valid = rest[3 * axes :]
    runs = equal_runs(list(zip(valid[:items], valid[items:], strict=True)))
    return [(where, layout(Sequence(grid, before, after, *lengths), block, tile)) for where, lengths in runs]


def _cut(size: int, block: int, tile: int) -> Sizes | int:
    """The tiles of an axis: each block cut into tiles, the last of each shorter."""
    if block % tile == 0:
        return tile
    lengths: list[int] = []
    for start in range(0, size, block):
        end = min(start + block, size)
        lengths += [min(tile, end - at) for at in range(start, end, tile)]
    return tuple(lengths)
