"""What a GNA setting can gain at a given tiling, before anything runs: tiles visited against tiles in dense attention.

The paper (arXiv 2504.16922, section 4) calls it NATTENSim. A kernel reads whole KV tiles, so a setting is worth what it
skips in tiles, not in tokens. Every number comes from the tables of plan/windows.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from attn_plugins.plan.windows import AxisWindow, Ints, axis_windows

IntPerAxis = int | tuple[int, ...]


@dataclass(frozen=True)
class AxisSimulation:
    """One axis: `visited` KV tiles per query tile (the worst one), of `total` in dense attention.

    `query_tiles` counts the tiles of all dilation classes; a class that is no multiple of the query tile wastes part of
    its last one, so it may exceed `dense_query_tiles`. `block_sparse`: no tile of this axis needs a mask.
    """

    window: AxisWindow
    q_tile: int
    kv_tile: int
    visited: int
    total: int
    query_tiles: int
    dense_query_tiles: int
    block_sparse: bool

    @property
    def speedup(self) -> float:
        return self.total / self.visited * self.dense_query_tiles / self.query_tiles

    @property
    def flop_speedup(self) -> float:
        return self.window.size / self.window.window


@dataclass(frozen=True)
class Simulation:
    """A setting at a tiling. Products over `axes` (per-axis numbers, outermost first)."""

    axes: tuple[AxisSimulation, ...]
    dynamic: bool

    @property
    def visited(self) -> int:
        """KV tiles that a query tile reads, in the worst case."""
        return math.prod(axis.visited for axis in self.axes)

    @property
    def total(self) -> int:
        """KV tiles that a query tile reads in dense attention."""
        return math.prod(axis.total for axis in self.axes)

    @property
    def speedup(self) -> float:
        """Bound on the gain over dense attention at this tiling: total / visited (and padded query tiles, if any)."""
        return math.prod(axis.speedup for axis in self.axes)

    @property
    def flop_speedup(self) -> float:
        """Bound from the pairs alone, grid size / window size; no tiling beats it (but for ragged dense tiles)."""
        return math.prod(axis.flop_speedup for axis in self.axes)

    @property
    def block_sparse(self) -> bool:
        """Whether no tile at all needs a mask."""
        return all(axis.block_sparse for axis in self.axes)

    @property
    def window(self) -> tuple[int, ...]:
        return tuple(axis.window.window for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(axis.window.stride for axis in self.axes)


def simulate(
    *,
    grid: IntPerAxis,
    window: IntPerAxis,
    stride: IntPerAxis = 1,
    dilation: IntPerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
    q_tile: IntPerAxis,
    kv_tile: IntPerAxis,
    dynamic: bool = False,
) -> Simulation:
    """Count the KV tiles that GNA visits (arXiv 2504.16922, section 4).

    Args:
        grid, window, stride, dilation, causal: as in `ops.neighborhood_attention`, in tokens.
        q_tile, kv_tile: tokens per tile and axis, one value or one per axis.
        dynamic: KV tiles begin where a query tile's window begins, instead of at multiples of `kv_tile`.

    A dilated axis is tiled per class of equal remainders, as kernels run it, and compared with dense attention over the
    whole axis.

    Raises:
        ValueError: an illegal setting or a tile below 1; the message names the axis and what is legal.
    """
    shape = _grid(grid)
    axes = axis_windows(shape, window, stride, dilation, causal)
    q_tiles, kv_tiles = _tiles("q_tile", q_tile, shape), _tiles("kv_tile", kv_tile, shape)
    rows = (_axis(axis, tq, tk, dynamic) for axis, tq, tk in zip(axes, q_tiles, kv_tiles, strict=True))
    return Simulation(tuple(rows), dynamic)


def useful_strides(
    *,
    grid: IntPerAxis,
    window: IntPerAxis,
    dilation: IntPerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
    q_tile: IntPerAxis,
    kv_tile: IntPerAxis,
    dynamic: bool = False,
) -> tuple[tuple[int, ...], ...]:
    """Per axis, the strides that visit fewer tiles than every smaller stride; 1 always leads.

    A larger stride makes the output less local, so one that saves no tile has a price and no gain.
    """
    shape = _grid(grid)
    axes = axis_windows(shape, window, 1, dilation, causal)
    columns = []
    for axis, tq, tk in zip(axes, _tiles("q_tile", q_tile, shape), _tiles("kv_tile", kv_tile, shape), strict=True):
        kept: list[int] = []
        fewest = axis.size + 1
        for stride in range(1, axis.window + 1):
            candidate = AxisWindow(axis.size, axis.window, stride, axis.dilation, axis.causal)
            visited = _axis(candidate, tq, tk, dynamic).visited
            if visited < fewest:
                kept.append(stride)
                fewest = visited
            if fewest == 1:
                break
        columns.append(tuple(kept))
    return tuple(columns)


def rank(
    *,
    grid: IntPerAxis,
    window: IntPerAxis,
    dilation: IntPerAxis = 1,
    causal: bool | tuple[bool, ...] = False,
    q_tile: IntPerAxis,
    kv_tile: IntPerAxis,
    dynamic: bool = False,
) -> list[Simulation]:
    """All combinations of useful strides, fastest first; among equals the smallest strides first."""
    shape = _grid(grid)
    strides = useful_strides(
        grid=shape, window=window, dilation=dilation, causal=causal, q_tile=q_tile, kv_tile=kv_tile, dynamic=dynamic
    )
    rows = [
        simulate(
            grid=shape, window=window, stride=stride, dilation=dilation, causal=causal,
            q_tile=q_tile, kv_tile=kv_tile, dynamic=dynamic,
        )
        for stride in itertools.product(*strides)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (-row.speedup, row.stride))


def end_to_end(speedup: float, share: float) -> float:
    """Gain of the whole job (Amdahl): `share` of its time is attention in sparse steps, which gets `speedup` faster.

    `share` is attention's share of a step's time times the share of steps that are sparse. `speedup=math.inf` is the
    bound that no method can beat.

    Raises:
        ValueError: a share outside 0..1 or a speedup that is not above 0.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: a share of the time lies in 0..1")
    if not speedup > 0:
        raise ValueError(f"speedup={speedup}: must be above 0 (1 is no gain)")
    rest = 1 - share * (1 - 1 / speedup)
    return 1 / rest if rest > 0 else math.inf


def _axis(axis: AxisWindow, q_tile: int, kv_tile: int, dynamic: bool) -> AxisSimulation:
    visited, query_tiles, aligned = 0, 0, True
    lengths = [axis.class_length(residue) for residue in range(axis.dilation)]
    for length in set(lengths):
        start, end = axis.intervals(length)
        first = np.arange(0, length, q_tile)
        last = np.minimum(first + q_tile, length) - 1
        # start and end never decrease, so a tile of queries needs start(first) .. end(last).
        low, high = start[first], end[last]
        tiles = _ceil(high - low, kv_tile) if dynamic else _ceil(high, kv_tile) - low // kv_tile
        visited = max(visited, int(tiles.max()))
        query_tiles += len(first) * lengths.count(length)
        aligned &= _block_sparse(start, end, first, last, kv_tile, length, dynamic)
    return AxisSimulation(
        axis, q_tile, kv_tile, visited, -(-axis.size // kv_tile), query_tiles, -(-axis.size // q_tile), aligned
    )


def _block_sparse(start: Ints, end: Ints, first: Ints, last: Ints, kv_tile: int, length: int, dynamic: bool) -> bool:
    """Queries of one tile share their window, and windows begin and end with KV tiles (or with the axis)."""
    shared = bool((start[first] == start[last]).all() and (end[first] == end[last]).all())
    if dynamic:
        whole = ((end - start) % kv_tile == 0) | (end == length)
    else:
        whole = (start % kv_tile == 0) & ((end % kv_tile == 0) | (end == length))
    return shared and bool(whole.all())


def _ceil(values: Ints, divisor: int) -> Ints:
    return -(-values // divisor)


def _grid(grid: IntPerAxis) -> tuple[int, ...]:
    return (grid,) if isinstance(grid, int) else tuple(int(size) for size in grid)


def _tiles(name: str, value: IntPerAxis, grid: tuple[int, ...]) -> tuple[int, ...]:
    tiles = (value,) * len(grid) if isinstance(value, int) else tuple(int(tile) for tile in value)
    if len(tiles) != len(grid) or min(tiles) < 1:
        raise ValueError(f"{name}={value}: give tiles of at least 1 token, one value or one per axis of grid {grid}")
    return tiles
