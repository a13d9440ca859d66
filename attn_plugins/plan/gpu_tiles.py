"""Which tiles a plan for GPU kernels should have: full steps of a kernel, and as few of them as possible.

A kernel computes whole steps (128 queries by 64 keys): a tile shorter than a step wastes the rest of it, a step under
a mask costs more. The cost is a model, not a measurement; benchmarks on a GPU may correct its two numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from attn_plugins.plan.windows import AxisWindow

Q_STEP, KV_STEP = 128, 64
MASKED = 1.3  # a step whose pairs are tested, against one whose pairs are not
RAGGED = 1.1  # a step of fewer keys than a kernel takes: its end is tested


class GpuTiles(NamedTuple):
    """Tokens per axis of the query and KV tiles, and the steps a kernel then takes, in steps without a mask."""

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    cost: float


@functools.lru_cache(maxsize=1024)
def gpu_tiles(axes: tuple[AxisWindow, ...]) -> GpuTiles:
    """The tiles of least cost; among equals those with the longest runs of neighbouring tokens."""
    longest = [axis.class_length(0) for axis in axes]
    q_tiles = [tile for tile in _boxes([_lengths(n, Q_STEP) for n in longest], Q_STEP) if _worth(tile, longest, Q_STEP)]
    kv_tiles = [tile for tile in _boxes([_powers(n) for n in longest], KV_STEP) if _worth(tile, longest, KV_STEP)]
    costed = (GpuTiles(q, kv, _cost(axes, q, kv)) for q, kv in itertools.product(q_tiles, kv_tiles))
    return min(costed, key=lambda tiles: (tiles.cost, [-size for size in reversed(tiles.kv_tile + tiles.q_tile)]))


def _cost(axes: tuple[AxisWindow, ...], q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> float:
    visited = whole = even = 1
    for axis, tq, tk in zip(axes, q_tile, kv_tile, strict=True):
        one = _axis_steps(axis, tq, tk)
        visited, whole, even = visited * one[0], whole * one[1], even * one[2]
    if math.prod(kv_tile) < KV_STEP:
        even = 0
    return visited + (MASKED - 1) * (visited - whole) + (RAGGED - 1) * (visited - even)


@functools.lru_cache(maxsize=8192)
def _axis_steps(axis: AxisWindow, q_tile: int, kv_tile: int) -> tuple[int, int, int]:
    """KV tiles visited along an axis, summed over its query tiles; those seen whole; those of full length."""
    visited = whole = even = 0
    lengths = [axis.class_length(residue) for residue in range(axis.dilation)]
    for length in sorted(set(lengths)):
        start, end = axis.intervals(length)
        first = np.arange(0, length, q_tile)
        last = np.minimum(first + q_tile, length) - 1
        low, high = start[first] // kv_tile, -(-end[last] // kv_tile)
        inner_high = np.where(end[first] < length, end[first] // kv_tile, -(-length // kv_tile))
        inner = np.maximum(inner_high - -(-start[last] // kv_tile), 0)
        times = lengths.count(length)
        visited += times * int((high - low).sum())
        whole += times * int(inner.sum())
        even += times * int((high - low - (high * kv_tile > length)).sum())
    return visited, whole, even


def _lengths(longest: int, step: int) -> list[int]:
    """Sizes of a query tile along an axis: powers of two, small divisors and the whole axis."""
    sizes = {size for size in range(1, min(longest, 16) + 1) if longest % size == 0} | set(_powers(longest))
    return sorted(size for size in sizes | {longest} if size <= step)


def _powers(longest: int) -> list[int]:
    """Powers of two up to the first that holds the axis."""
    return [1 << i for i in range((longest - 1).bit_length() + 1)]


def _boxes(columns: list[list[int]], most: int) -> list[tuple[int, ...]]:
    return [tile for tile in itertools.product(*columns) if math.prod(tile) <= most]


def _worth(tile: tuple[int, ...], longest: list[int], step: int) -> bool:
    """Whether a tile fills most of a step, or the whole grid."""
    return math.prod(tile) > step / 2 or all(size >= n for size, n in zip(tile, longest, strict=True))
