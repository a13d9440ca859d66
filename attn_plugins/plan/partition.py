"""Tiles of a grid: per axis first, then their product.

A dilated axis falls into residue classes that never see each other, so a tile lies within one class; an axis' tiles are
those of class 0, then of class 1, and so on. Everything in N dimensions is a product of axes.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from attn_plugins.plan.windows import AxisWindow, Ints

Tile = int | tuple[int, ...]  # tokens of every tile, or (undilated axes) of each tile


@dataclass(frozen=True)
class AxisTiles:
    """The tiles along one axis of `size` tokens at `dilation`.

    `tile` is their length (the last of a class may be shorter), or the lengths of all, which add up to `size`.
    Tile `g` holds the indices `lo[g] <= i < hi[g]` of its residue class; index `i` is coordinate `i * dilation + r`.
    """

    size: int
    tile: Tile
    dilation: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tile, tuple) and (self.dilation > 1 or sum(self.tile) != self.size or min(self.tile) < 1):
            raise ValueError(
                f"tiles of {self.tile} tokens on an axis of {self.size} at dilation {self.dilation}: tiles of "
                "different lengths add up to an undilated axis; elsewhere give one length"
            )

    @functools.cached_property
    def _rows(self) -> tuple[Ints, Ints, Ints, Ints]:
        residue: list[int] = []
        lo: list[int] = []
        hi: list[int] = []
        base: list[int] = []
        for r in range(self.dilation):
            length = -(-(self.size - r) // self.dilation)
            base.append(len(lo))
            lengths = self.tile if isinstance(self.tile, tuple) else (self.tile,) * -(-length // self.tile)
            ends = list(itertools.accumulate(lengths))
            residue += [r] * len(lengths)
            lo += [0, *ends[:-1]]
            hi += [min(end, length) for end in ends]
        return np.array(residue), np.array(lo), np.array(hi), np.array(base)

    @property
    def residue(self) -> Ints:
        return self._rows[0]

    @property
    def lo(self) -> Ints:
        return self._rows[1]

    @property
    def hi(self) -> Ints:
        return self._rows[2]

    @property
    def class_base(self) -> Ints:
        """First tile of each residue class."""
        return self._rows[3]

    @property
    def count(self) -> int:
        return len(self.lo)

    @functools.cached_property
    def placed(self) -> tuple[Ints, Ints]:
        """(coordinate, tile) of every position, in tile order."""
        tile = np.repeat(np.arange(self.count), self.hi - self.lo)
        index = np.concatenate([np.arange(a, b) for a, b in zip(self.lo, self.hi, strict=True)])
        return index * self.dilation + self.residue[tile], tile


@dataclass(frozen=True)
class Partition:
    """A grid cut into boxes: the product of its axes' tiles, in raster order of tiles, raster order within each.

    `offset` is the token at which the grid begins.
    """

    axes: tuple[AxisTiles, ...]
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Tiles per axis."""
        return tuple(axis.count for axis in self.axes)

    @functools.cached_property
    def sizes(self) -> Ints:
        """Tokens of each tile."""
        return functools.reduce(np.multiply.outer, [axis.hi - axis.lo for axis in self.axes]).reshape(-1)

    @functools.cached_property
    def starts(self) -> Ints:
        """Where each tile begins in tile order (the offset included)."""
        return self.offset + np.cumsum(self.sizes) - self.sizes

    @functools.cached_property
    def order(self) -> Ints:
        """(tokens,): the raster token (offset included) that stands at each place of the tile order."""
        strides = [math.prod(axis.size for axis in self.axes[i + 1 :]) for i in range(len(self.axes))]
        token = np.zeros((1,), dtype=np.int64)
        tile = np.zeros((1,), dtype=np.int64)
        for axis, stride in zip(self.axes, strides, strict=True):
            coordinate, place = axis.placed
            token = np.add.outer(token, coordinate * stride).reshape(-1)
            tile = np.add.outer(tile * axis.count, place).reshape(-1)
        return self.offset + token[np.argsort(tile, kind="stable")]

    def unravel(self) -> tuple[Ints, ...]:
        """Per axis, the axis tile of each tile."""
        return tuple(np.unravel_index(np.arange(math.prod(self.shape)), self.shape))


@dataclass(frozen=True)
class AxisVisits:
    """Per query tile of an axis: the KV tiles it visits, and those that all of its queries see whole.

    `lo, hi` and `full_lo, full_hi` are ranges of KV tile numbers, end exclusive; `full_hi <= full_lo` means none.
    `key_lo, key_hi` is the visited range in class units, rounded out to KV tiles.
    """

    window: AxisWindow
    q: AxisTiles
    kv: AxisTiles
    lo: Ints
    hi: Ints
    full_lo: Ints
    full_hi: Ints
    key_lo: Ints
    key_hi: Ints

    @functools.cached_property
    def masks(self) -> tuple[list[np.ndarray], Ints]:
        """The distinct (queries, keys) bool masks of the axis' query tiles, and which of them each tile has."""
        found: dict[bytes, int] = {}
        masks: list[np.ndarray] = []
        which = np.zeros(self.q.count, dtype=np.int64)
        for g in range(self.q.count):
            start, end = self.window.intervals(self.window.class_length(int(self.q.residue[g])))
            rows = slice(self.q.lo[g], self.q.hi[g])
            keys = np.arange(self.key_lo[g], self.key_hi[g])
            mask = (keys >= start[rows, None]) & (keys < end[rows, None])
            signature = np.array(mask.shape).tobytes() + mask.tobytes()
            if signature not in found:
                found[signature] = len(masks)
                masks.append(mask)
            which[g] = found[signature]
        return masks, which

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """(query tiles,) bool: every query of the tile sees every key visited, so no mask is needed."""
        return (self.full_lo <= self.lo) & (self.full_hi >= self.hi)


@functools.lru_cache(maxsize=4096)
def axis_visits(window: AxisWindow, q_tile: Tile, kv_tile: int) -> AxisVisits:
    """The visits of one axis. `start` and `end` never decrease along a class, so they are one interval a tile."""
    q = AxisTiles(window.size, q_tile, window.dilation)
    kv = AxisTiles(window.size, kv_tile, window.dilation)
    columns = np.zeros((6, q.count), dtype=np.int64)
    for g in range(q.count):
        residue = int(q.residue[g])
        length = window.class_length(residue)
        start, end = window.intervals(length)
        first, last = q.lo[g], q.hi[g] - 1
        base = kv.class_base[residue]
        seen_lo, seen_hi = start[first] // kv_tile, -(-end[last] // kv_tile)
        all_lo = -(-start[last] // kv_tile)
        all_hi = end[first] // kv_tile if end[first] < length else -(-length // kv_tile)
        key_hi = min(seen_hi * kv_tile, length)
        columns[:, g] = (base + seen_lo, base + seen_hi, base + all_lo, base + all_hi, seen_lo * kv_tile, key_hi)
    return AxisVisits(window, q, kv, *columns)
