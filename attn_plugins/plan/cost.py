"""Which tile a CPU plan should have: a cost model, not autotuning.

A tile of T queries that gathers E keys costs about `E * (m * T + g)`: `m` is 1 without a mask and MASKED with one, `g`
is what fetching and packing a key costs, in (query, key) pairs; it is higher in half precision, where a pair costs
less. `benchmarks/cpu_primitives.py` measures both; the choice is flat around its optimum.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from attn_plugins.plan.partition import axis_visits
from attn_plugins.plan.windows import AxisWindow

MASKED = 1.2
GATHER = {2: 120.0, 4: 60.0, 8: 40.0}  # by bytes an element
WHOLE_KEYS = 512  # from so many keys of a tile that no query has masked, they go without a mask, in a call of their own
MAX_TILE = 4096
MASK_SHARE = 128  # mask entries a tile may have, per token of the grid: a mask stays smaller than q, k, v
MAX_LIST_ENTRIES = 4_000_000


@dataclass(frozen=True)
class TileChoice:
    """The tiles, and the work they make, in (query, key) pairs of one head.

    `pairs`: visited; `masked`: those of them under a mask; `gathered`: keys fetched, summed over the query tiles.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    pairs: float
    masked: float
    gathered: float
    itemsize: int = 4

    @property
    def cost(self) -> float:
        """What the operator should cost, in mask-free pairs of large tiles; dense attention costs N * N."""
        return self.pairs + (MASKED - 1) * self.masked + GATHER[self.itemsize] * self.gathered


@functools.lru_cache(maxsize=1024)
def choose_tiles(axes: tuple[AxisWindow, ...], text: int = 0, itemsize: int = 4) -> TileChoice:
    """The query tile and the key run (along the last axis) of least cost for this setting.

    Args:
        axes: the windows of the grid's axes.
        text: keys that every grid row sees besides.
        itemsize: bytes an element of q, k, v.
    """
    tokens = math.prod(axis.size for axis in axes)
    columns = [[_axis_work(axis, tile) for tile in _candidates(axis)] for axis in axes]
    best: TileChoice | None = None
    for rows in itertools.product(*columns):
        area = math.prod(row.tile for row in rows)
        if area > MAX_TILE:
            continue
        choice = _choice(rows, text, itemsize)
        if choice.masked and area * max(choice.masked, choice.pairs / 4) > MASK_SHARE * tokens**2:
            continue  # on average over the tiles: a bias only where it is needed, but made from a bool of all pairs
        if best is None or choice.cost < best.cost:
            best = choice
    assert best is not None  # tile 1 on every axis is always a candidate
    run = _key_run(axes[-1], best)
    rows = tuple(
        _axis_work(axis, tile, run if axis_number == len(axes) - 1 else 1)
        for axis_number, (axis, tile) in enumerate(zip(axes, best.q_tile, strict=True))
    )
    return replace(_choice(rows, text, itemsize), kv_tile=(1,) * (len(axes) - 1) + (run,))


class _AxisWork(NamedTuple):
    """Of a tile size along one axis; `whole`: with keys that a tile's queries all see, `free`: of mask-free tiles."""

    tile: int
    pairs: int
    whole_pairs: int
    free_pairs: int
    queries: int
    free_queries: int
    keys: int
    tiles: int


@functools.lru_cache(maxsize=4096)
def _axis_work(axis: AxisWindow, tile: int, run: int = 1) -> _AxisWork:
    """Keys are counted as they are gathered: in runs of `run`."""
    visits = axis_visits(axis, tile, run)
    keys, queries, free = visits.key_hi - visits.key_lo, visits.q.hi - visits.q.lo, visits.whole
    whole = np.maximum(np.minimum(visits.full_hi, visits.hi) - np.maximum(visits.full_lo, visits.lo), 0) * run
    pairs = keys * queries
    return _AxisWork(
        tile,
        pairs=int(pairs.sum()),
        whole_pairs=int((np.minimum(whole, keys) * queries).sum()),
        free_pairs=int(pairs[free].sum()),
        queries=int(queries.sum()),
        free_queries=int(queries[free].sum()),
        keys=int(keys.sum()),
        tiles=visits.q.count,
    )


def _choice(rows: Sequence[_AxisWork], text: int, itemsize: int) -> TileChoice:
    """The work of a tile is the product of its axes' work, and the text's keys."""
    tile, pairs, whole_pairs, free_pairs, queries, free_queries, keys, tiles = zip(*rows, strict=True)
    visited = math.prod(pairs) + text * math.prod(queries)
    whole = math.prod(whole_pairs) + text * math.prod(queries)
    split = whole >= WHOLE_KEYS * math.prod(queries)
    free = whole if split else math.prod(free_pairs) + text * math.prod(free_queries)
    gathered = math.prod(keys) + text * math.prod(tiles)
    return TileChoice(tile, (1,) * len(rows), visited, visited - free, gathered, itemsize)


def _candidates(axis: AxisWindow) -> list[int]:
    """Tile sizes worth trying: divisors, powers of two, and multiples of the stride up to the axis' longest class."""
    longest = axis.class_length(0)
    sizes = {1, longest} | {t for t in range(1, longest + 1) if longest % t == 0}
    sizes |= {2**i for i in range(int(math.log2(longest)) + 1)}
    sizes |= {axis.stride * m for m in (1, 2, 3, 4, 8) if axis.stride * m <= longest}
    if len(sizes) > 14:  # large axes: thin out evenly on a log scale, keeping the stride and its multiples
        kept = sorted(sizes)
        targets = np.geomspace(1, min(longest, 512), 10)
        near = {kept[int(np.argmin([abs(math.log(size / target)) for size in kept]))] for target in targets}
        sizes = near | {t for t in (axis.stride, 2 * axis.stride, 4 * axis.stride, longest) if t <= longest}
    return sorted(t for t in sizes if t <= MAX_TILE)


def _key_run(axis: AxisWindow, choice: TileChoice) -> int:
    """Keys are listed as runs along the last axis: as long as costs no key, longer only where lists would be huge."""
    visits = axis_visits(axis, choice.q_tile[-1], 1)
    lengths = np.array([axis.class_length(residue) for residue in range(axis.dilation)])[visits.q.residue]
    edges = np.concatenate([visits.key_lo, visits.key_hi[visits.key_hi < lengths]])  # the end of a class is free
    run = int(np.gcd.reduce(edges)) or axis.class_length(0)
    while choice.gathered / run > MAX_LIST_ENTRIES and run < axis.size:
        run *= 2
    return run
