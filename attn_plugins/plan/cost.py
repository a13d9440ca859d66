"""Which tiles a CPU plan should have: a cost model, not autotuning.

A tile of T queries that gathers E keys costs `E * (T * (pair(T) + masked) + gather)`, and every kind of tile a call.
The kernel works in slices of the queries that grow with T; a mask costs a little on top; fetching and packing a key
costs as much as some (query, key) pairs, more in half precision, where a pair costs less.

`benchmarks/cpu_primitives.py` measures PAIR, MASKED and GATHER (of float32 and bfloat16); CALL and REMADE were read off
profiles of the operator. Nothing timed float64. The choice is flat around its optimum.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attn_plugins.plan.cuts import cut_axis
from attn_plugins.plan.partition import Tile, axis_visits
from attn_plugins.plan.windows import AxisWindow, Ints

SLICES = ((768, 256), (192, 64), (0, 32))  # queries of a problem from which on the kernel takes them so many at a time
PAIR = {256: 1.02, 64: 1.15, 32: 1.47}  # of a pair, by the queries of a slice
# By bytes an element, in pairs of large tiles without a mask:
MASKED = {2: 0.2, 4: 0.09, 8: 0.05}  # of a pair under a mask, besides
GATHER = {2: 50.0, 4: 25.0, 8: 15.0}  # of a key fetched
CALL = {2: 250_000.0, 4: 90_000.0, 8: 50_000.0}  # of an attention call
REMADE = {2: 5.0, 4: 2.5, 8: 1.5}  # of an entry of a mask that is made anew in every run, spread over a few heads
CHUNK_BYTES = 1 << 20  # of gathered keys and values, per thread: they are read again at once, from a core's own cache
CHUNK_KEYS = {size: 2 * CHUNK_BYTES // (2 * 64 * size) for size in (2, 4, 8)}  # of two threads, at head size 64
HEADS = 4  # that go in one call where it is small
UNEVEN = 0.95  # tiles of different lengths must promise this much: what they cost besides is less well known
KEPT_BYTES = 32 << 20  # of token numbers and masks that a plan may keep; beyond that they are made anew in each call
WHOLE_KEYS = 512  # from so many keys of a tile that no query has masked, they go without a mask, in a call of their own
MAX_TILE = 4096
MASK_SHARE = 128  # mask entries a tile may have, per token of the grid: a mask stays smaller than q, k, v
MAX_LIST_ENTRIES = 4_000_000


@dataclass(frozen=True)
class TileChoice:
    """The tiles, and the work they make, in (query, key) pairs of one head.

    `pairs`: visited; `sliced`: the same, each at its tile's cost; `masked`: those under a mask; `gathered`: keys
    fetched, summed over the query tiles; `tiles`, `kinds`: query tiles, and how many of them differ and cannot share
    a call.
    """

    q_tile: tuple[Tile, ...]
    kv_tile: tuple[int, ...]
    pairs: float
    sliced: float
    masked: float
    gathered: float
    tiles: int
    kinds: int
    itemsize: int = 4

    @property
    def uneven(self) -> bool:
        """Whether tiles of an axis differ in length by more than a remainder."""
        return any(isinstance(tile, tuple) for tile in self.q_tile)

    @property
    def cost(self) -> float:
        """What the operator should cost, in mask-free pairs of large tiles; dense attention costs N * N."""
        size = self.itemsize
        together = max(1, CHUNK_KEYS[size] * self.tiles // self.gathered)
        entries = self.masked / self.tiles * self.kinds
        remade = REMADE[size] * entries if entries * size + 8 * self.gathered > KEPT_BYTES else 0.0
        return (
            self.sliced
            + MASKED[size] * self.masked
            + GATHER[size] * self.gathered
            + CALL[size] * max(self.kinds / HEADS, self.tiles / together)
            + remade
        )


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
        area = math.prod(row.largest for row in rows)
        if area > MAX_TILE:
            continue
        if best is not None and math.prod(row.pairs for row in rows) > best.cost:
            continue
        choice = _choice(rows, text, itemsize)
        if choice.masked and area * max(choice.masked, choice.pairs / 4) > MASK_SHARE * tokens**2:
            continue  # on average over the tiles: a bias only where it is needed, but made from a bool of all pairs
        if best is None or choice.cost < best.cost * (UNEVEN if choice.uneven > best.uneven else 1):
            best = choice
    assert best is not None  # tile 1 on every axis is always a candidate
    run = _key_run(axes[-1], best)
    rows = tuple(
        _axis_work(axis, tile, run if axis_number == len(axes) - 1 else 1)
        for axis_number, (axis, tile) in enumerate(zip(axes, best.q_tile, strict=True))
    )
    return replace(_choice(rows, text, itemsize), kv_tile=(1,) * (len(axes) - 1) + (run,))


class _AxisWork(NamedTuple):
    """Of a tiling along one axis; `whole`: with keys that a tile's queries all see, `free`: of mask-free tiles.

    `sizes`, `size_pairs`, `size_queries`: the distinct lengths of tiles, and the pairs and queries in tiles of each.
    """

    tile: Tile
    largest: int
    pairs: int
    whole_pairs: int
    free_pairs: int
    queries: int
    free_queries: int
    keys: int
    tiles: int
    kinds: int
    sizes: Ints
    size_pairs: npt.NDArray[np.float64]
    size_queries: npt.NDArray[np.float64]


@functools.lru_cache(maxsize=4096)
def _axis_work(axis: AxisWindow, tile: Tile, run: int = 1) -> _AxisWork:
    """Keys are counted as they are gathered: in runs of `run`."""
    visits = axis_visits(axis, tile, run)
    keys, queries, free = visits.key_hi - visits.key_lo, visits.q.hi - visits.q.lo, visits.whole
    whole = np.maximum(np.minimum(visits.full_hi, visits.hi) - np.maximum(visits.full_lo, visits.lo), 0) * run
    pairs = keys * queries
    sizes, of_size = np.unique(queries, return_inverse=True)
    kinds = np.stack([queries, keys, visits.full_lo - visits.lo, visits.full_hi - visits.hi])
    return _AxisWork(
        tile,
        largest=int(queries.max()),
        pairs=int(pairs.sum()),
        whole_pairs=int((np.minimum(whole, keys) * queries).sum()),
        free_pairs=int(pairs[free].sum()),
        queries=int(queries.sum()),
        free_queries=int(queries[free].sum()),
        keys=int(keys.sum()),
        tiles=visits.q.count,
        kinds=np.unique(kinds, axis=1).shape[1],
        sizes=sizes,
        size_pairs=np.bincount(of_size, weights=pairs).astype(np.float64),
        size_queries=np.bincount(of_size, weights=queries).astype(np.float64),
    )


def _choice(rows: Sequence[_AxisWork], text: int, itemsize: int) -> TileChoice:
    """The work of a tile is the product of its axes' work, and the text's keys."""
    pairs, queries, tiles = (math.prod(getattr(row, name) for row in rows) for name in ("pairs", "queries", "tiles"))
    whole, free = (math.prod(getattr(row, name) for row in rows) for name in ("whole_pairs", "free_pairs"))
    visited = pairs + text * queries
    whole, free = whole + text * queries, free + text * math.prod(row.free_queries for row in rows)
    masked = visited - (whole if whole >= WHOLE_KEYS * queries else free)
    area, by_area, queries_by_area = (
        functools.reduce(np.multiply.outer, [getattr(row, name) for row in rows])
        for name in ("sizes", "size_pairs", "size_queries")
    )
    slices = np.select([area >= least for least, _ in SLICES], [PAIR[height] for _, height in SLICES])
    return TileChoice(
        tuple(row.tile for row in rows),
        (1,) * len(rows),
        pairs=visited,
        sliced=float(((by_area + text * queries_by_area) * slices).sum()),
        masked=masked,
        gathered=math.prod(row.keys for row in rows) + text * tiles,
        tiles=tiles,
        kinds=math.prod(row.kinds for row in rows),
        itemsize=itemsize,
    )


def _candidates(axis: AxisWindow) -> list[Tile]:
    """Tilings worth trying: powers of two, the stride and its multiples, the whole axis, and the best uneven cuts."""
    longest = axis.class_length(0)
    sizes = {1, longest} | {2**i for i in range(int(math.log2(longest)) + 1)}
    sizes |= {axis.stride * m for m in (1, 2, 3, 4, 8) if axis.stride * m <= longest}
    if len(sizes) > 14:  # large axes: thin out evenly on a log scale, keeping the stride and its multiples
        kept = sorted(sizes)
        targets = np.geomspace(1, min(longest, 512), 10)
        near = {kept[int(np.argmin([abs(math.log(size / target)) for size in kept]))] for target in targets}
        sizes = near | {t for t in (axis.stride, 2 * axis.stride, 4 * axis.stride, longest) if t <= longest}
    even = sorted(t for t in sizes if t <= MAX_TILE)
    return [*even, *(cuts for cuts in cut_axis(axis, MAX_TILE) if len(set(cuts)) > 1)]


def _key_run(axis: AxisWindow, choice: TileChoice) -> int:
    """Keys are listed as runs along the last axis: as long as costs no key, longer only where lists would be huge."""
    visits = axis_visits(axis, choice.q_tile[-1], 1)
    lengths = np.array([axis.class_length(residue) for residue in range(axis.dilation)])[visits.q.residue]
    edges = np.concatenate([visits.key_lo, visits.key_hi[visits.key_hi < lengths]])  # the end of a class is free
    run = int(np.gcd.reduce(edges)) or axis.class_length(0)
    while choice.gathered / run > MAX_LIST_ENTRIES and run < axis.size:
        run *= 2
    return run
