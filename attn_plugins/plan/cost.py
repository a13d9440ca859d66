"""Which tile a CPU plan should have: a cost model, not autotuning.

A tile of T queries that gathers E keys costs about `E * (m * T + g)`: `m` is 1 without a mask and MASKED with one, `g`
is what fetching and packing a key costs, in (query, key) pairs; it is higher in half precision, where a pair costs
less. `benchmarks/cpu_primitives.py` measures both; the choice is flat around its optimum.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from attn_plugins.plan.partition import axis_visits
from attn_plugins.plan.windows import AxisWindow

MASKED = 1.2
GATHER = {2: 120.0, 4: 60.0, 8: 40.0}  # by bytes an element
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
        return self.bound + GATHER[self.itemsize] * self.gathered

    @property
    def bound(self) -> float:
        """The cost without any overhead but the mask's: what the operator's time is held against."""
        return self.pairs + (MASKED - 1) * self.masked


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
        tile = tuple(row[0] for row in rows)
        if math.prod(tile) > MAX_TILE:
            continue
        pairs, free_pairs, queries, free_queries, keys, tiles = (math.prod(column) for column in zip(*(r[1:7] for r in rows), strict=True))
        pairs, free_pairs = pairs + text * queries, free_pairs + text * free_queries
        if pairs > free_pairs and math.prod(tile) * math.prod(row[7] for row in rows) > MASK_SHARE * tokens:
            continue
        choice = TileChoice(tile, (1,) * len(axes), pairs, pairs - free_pairs, keys + text * tiles, itemsize)
        if best is None or choice.cost < best.cost:
            best = choice
    assert best is not None  # tile 1 on every axis is always a candidate
    return replace(best, kv_tile=_key_run(axes, best))


@functools.lru_cache(maxsize=4096)
def _axis_work(axis: AxisWindow, tile: int) -> tuple[int, ...]:
    """Along one axis: tile, pairs, pairs of mask-free tiles, queries, those of mask-free tiles, keys, tiles, most keys."""
    visits = axis_visits(axis, tile, 1)
    keys, queries, free = visits.hi - visits.lo, visits.q.hi - visits.q.lo, visits.whole
    pairs = keys * queries
    counts = (pairs, pairs[free], queries, queries[free], keys)
    return tile, *(int(count.sum()) for count in counts), visits.q.count, int(keys.max())


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


def _key_run(axes: tuple[AxisWindow, ...], choice: TileChoice) -> tuple[int, ...]:
    """Keys are listed as runs along the last axis: as long as costs no key, longer only where lists would be huge."""
    visits = axis_visits(axes[-1], choice.q_tile[-1], 1)
    inner = np.concatenate([visits.key_lo, visits.key_hi])
    longest = axes[-1].class_length(0)
    inside = inner[(inner > 0) & (inner < axes[-1].class_length(axes[-1].dilation - 1))]  # the ends of a class are free
    run = int(np.gcd.reduce(inside)) if len(inside) else longest
    while choice.gathered / run > MAX_LIST_ENTRIES and run < axes[-1].size:
        run *= 2
    return (1,) * (len(axes) - 1) + (run,)
